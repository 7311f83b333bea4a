"""What is compared on the Sudoku world: one start, and several ways to go on from it with the same rows and CPU time.

Every arm is measured in the same way: the log-probability of the human's answer to each of 1 000 test puzzles, exact,
after the last step and at the step whose validation rows cost the fewest bits.
"""

import hashlib
import inspect
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.worlds import sudoku as world
from benchmarks.worlds.sudoku import Puzzle, data, new_model, solved, tokenizer
from hf_imitate import AdversarialConfig, AdversarialTrainer
from hf_imitate.log_probs import answer_log_probs, nats_to_bits
from hf_imitate.losses import retrodictive_loss
from hf_imitate.rendering import Renderer, collate, end_token_ids
from hf_imitate.sampling import draw_answers
from hf_imitate.scoring import score_answers

MAX_TOKENS = 9  # eight pairs of cells and the end
QUESTIONS, GENERATIONS = 12, 8
BATCH = QUESTIONS * GENERATIONS
RATE, DISTINGUISHER_RATE, BETAS, LR_WARMUP = 8e-4, 1e-4, (0.5, 0.99), 10
NUM_STEPS, NUM_WARMUP = 800, 120
READ_EVERY = 25
START_STEPS, START_RATE = 800, 1e-3
# The control's own rates and lengths, each annealed to 0; together they cost as much CPU time as the game.
SCHEDULES = ((3e-4, 100), (3e-4, 200), (3e-4, 400), (1e-4, 200), (1e-4, 400), (1e-4, 800), (3e-5, 800))
REJECTION_STEPS, REJECTION_QUESTIONS = 50, 2000  # so many likelihood steps between answers to so many questions
TEMPERATURES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def log_probs(model: Qwen3ForCausalLM, puzzles: list[Puzzle], temperature: float = 1.0) -> np.ndarray:
    """Nats the model gives to the human's answer, end included, [N]."""
    questions, answers, _ = zip(*puzzles, strict=True)
    rows = _renderer(model).human(list(questions), list(answers))
    scores = score_answers(model, rows, tokenizer().pad_token_id, batch_size=256, temperature=temperature)
    return np.asarray(scores, dtype=float)


class Readings:
    """Measures a model as it trains: the curve, the last reading, and the one with the fewest bits on validation rows.

    Time spent here does not count as training.
    """

    def __init__(self, model: Qwen3ForCausalLM):
        self.model = model
        self.curve: list[dict[str, float]] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.best = -math.inf
        self.best_step = 0
        self.begin()

    def begin(self) -> None:
        """Start the clock: what was built before is no training."""
        self._begun, self.seconds = time.process_time(), 0.0

    def train_seconds(self) -> float:
        """CPU seconds of training so far."""
        return time.process_time() - self._begun - self.seconds

    def read(self, step: int) -> None:
        """Take a reading after `step` steps."""
        begun, state = time.process_time(), torch.get_rng_state()
        train_seconds = begun - self._begun - self.seconds
        is_training = self.model.training
        validation, test = (log_probs(self.model, puzzles) for puzzles in (data().validation, data().test))
        self.curve.append(
            {
                "step": step,
                "cpu_seconds": round(train_seconds, 1),
                "validation_nats": round(float(validation.mean()), 4),
                "test_nats": round(float(test.mean()), 4),
                "solve_rate": round(float(np.exp(test).mean()), 4),
            }
        )
        if validation.mean() > self.best:
            self.best, self.best_step = float(validation.mean()), step
            self.weights = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        self.model.train(is_training)
        torch.set_rng_state(state)
        self.seconds += time.process_time() - begun

    def result(self) -> dict[str, Any]:
        """What a cell returns: test log-probs after the last step and at the best one, and the curve."""
        last = log_probs(self.model, data().test)
        self.model.load_state_dict(self.weights)
        best = log_probs(self.model, data().test)
        return {
            "cpu_seconds": self.curve[-1]["cpu_seconds"],
            "num_steps": self.curve[-1]["step"],
            "best_step": self.best_step,
            "last": [round(x, 4) for x in last.tolist()],
            "best": [round(x, 4) for x in best.tolist()],
            "curve": self.curve,
        }


def _renderer(model: Qwen3ForCausalLM) -> Renderer:
    return Renderer(tokenizer(), end_token_ids(tokenizer(), model.generation_config))


def start(seed: int, folder: Path) -> Qwen3ForCausalLM:
    """Supervised fine-tuning from nothing, at its step with the fewest bits on validation rows; kept in `folder`."""
    torch.manual_seed(seed)
    sources = "".join(inspect.getsource(part) for part in (world, _likelihood_steps, start))
    settings = [START_STEPS, START_RATE, READ_EVERY, len(data().train), len(data().validation)]
    digest = hashlib.sha256(f"{sources}{settings}".encode()).hexdigest()[:8]
    model, file = new_model(), folder / f"start-{seed}-{digest}.safetensors"
    if file.exists():
        stored = load_file(file)
        model.load_state_dict(stored | {"lm_head.weight": stored["model.embed_tokens.weight"]})
        return model
    readings = Readings(model)
    for step in _likelihood_steps(model, lambda number: data().train, seed, START_STEPS, START_RATE, 64, (0.9, 0.99)):
        if step % READ_EVERY == 0:
            readings.read(step)
    model.load_state_dict(readings.weights)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    save_file({name: w for name, w in model.state_dict().items() if name != "lm_head.weight"}, unfinished)
    unfinished.replace(file)
    return model


def _likelihood_steps(
    model: Qwen3ForCausalLM,
    rows_of: Callable[[int], list[Puzzle]],
    seed: int,
    num_steps: int,
    rate: float,
    batch_size: int = BATCH,
    betas: tuple[float, float] = BETAS,
) -> Iterator[int]:
    """The trainer's likelihood term alone: its batch, clipping, rate and decay. Yields each step's number."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=betas, weight_decay=0.0)
    renderer, rng, rendered = _renderer(model), np.random.default_rng([seed, 3]), {}
    model.train()
    for step in range(num_steps):
        rows = rows_of(step)
        chosen = [rows[i] for i in rng.choice(len(rows), batch_size, replace=False)]
        for row in chosen:
            if row not in rendered:
                rendered[row] = renderer.human([row.question], [row.answer])[0]
        batch = collate([rendered[row] for row in chosen], tokenizer().pad_token_id)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        log_prob = answer_log_probs(logits, batch.input_ids, batch.answer_mask)
        (retrodictive_loss(log_prob, torch.ones_like(log_prob)) / MAX_TOKENS).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / LR_WARMUP, (num_steps - step) / (num_steps - LR_WARMUP))
        optimizer.step()
        optimizer.zero_grad()
        yield step + 1


def likelihood(seed: int, folder: Path, num_steps: int, rate: float = RATE) -> dict[str, Any]:
    """The control: the same start, likelihood of the human answers alone, annealed over so many steps."""
    model = start(seed, folder)
    readings = Readings(model)
    readings.read(0)
    for step in _likelihood_steps(model, lambda number: data().train, seed, num_steps, rate):
        if step % READ_EVERY == 0 or step == num_steps:
            readings.read(step)
    return readings.result() | {"rate": rate}


def game(
    seed: int,
    folder: Path,
    num_steps: int = NUM_STEPS,
    with_check: bool = True,
    with_unlabelled: bool = True,
    num_warmup: int = NUM_WARMUP,
) -> dict[str, Any]:
    """Adversarial imitation with a likelihood term of weight 1."""
    model = start(seed, folder)
    rows = [*data().train, *(p._replace(answer=None) for p in data().unlabelled if with_unlabelled)]
    with tempfile.TemporaryDirectory() as output_dir:
        args = AdversarialConfig(
            **_common_settings(output_dir, seed, num_steps),
            allow_unlabelled=with_unlabelled,
            imitator_warmup_steps=0,
            distinguisher_lm_warmup_steps=0,
            distinguisher_warmup_steps=num_warmup,
            distinguisher_learning_rate=DISTINGUISHER_RATE,
            heldout_fraction=0.0,
        )
        readings = Readings(model)
        trainer = AdversarialTrainer(
            model=model,
            args=args,
            train_dataset=_dataset(rows),
            distinguisher=start(seed, folder),
            checks=[solved] if with_check else None,
            processing_class=tokenizer(),
            callbacks=[_Reader(readings, num_warmup)],
        )
        trainer.train()
    return readings.result()


def grpo(seed: int, folder: Path, num_steps: int, rate: float = RATE) -> dict[str, Any]:
    """TRL's own trainer at its own scaling, paid by the check alone, on labelled and unlabelled questions."""
    model = start(seed, folder)
    with tempfile.TemporaryDirectory() as output_dir:
        readings = Readings(model)
        trainer = GRPOTrainer(
            model=model,
            args=GRPOConfig(
                **_common_settings(output_dir, seed, num_steps, rate), bf16=False, gradient_checkpointing=False
            ),
            train_dataset=_dataset([*data().train, *data().unlabelled]).remove_columns("completion"),
            reward_funcs=_reward,
            processing_class=tokenizer(),
            callbacks=[_Reader(readings, 0)],
        )
        trainer.train()
    return readings.result()


def _reward(prompts, completions, **columns) -> list[float]:
    return [float(is_right) for is_right in solved(prompts, completions)]


def _common_settings(output_dir: str, seed: int, num_steps: int, rate: float = RATE) -> dict[str, Any]:
    return {
        "output_dir": output_dir,
        "use_cpu": True,
        "seed": seed,
        "max_steps": num_steps,
        "per_device_train_batch_size": BATCH,
        "num_generations": GENERATIONS,
        "max_completion_length": MAX_TOKENS,
        "learning_rate": rate,
        "warmup_steps": LR_WARMUP,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 50,
        "disable_tqdm": True,
    }


def _dataset(rows: list[Puzzle]) -> Dataset:
    return Dataset.from_dict({"prompt": [row.question for row in rows], "completion": [row.answer for row in rows]})


class _Reader(TrainerCallback):
    """Takes a reading every 25 steps of the game; the distinguisher's warm-up counts as time, not as steps."""

    def __init__(self, readings: Readings, num_warmup: int):
        self.readings, self.num_warmup = readings, num_warmup

    def on_train_begin(self, args, state, control, **kwargs):
        self.readings.begin()

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step - self.num_warmup
        if step >= 0 and (step % READ_EVERY == 0 or state.global_step == state.max_steps):
            self.readings.read(step)


def rejection(seed: int, folder: Path, budget: float, num_steps: int) -> dict[str, Any]:
    """Rejection-sampling fine-tuning: likelihood of the human answers and of own answers that pass the check.

    Every 50 steps 2 000 of the questions without an answer that passes get one from the model as it is then.
    """
    model = start(seed, folder)
    questions = [row.question for row in (*data().train, *data().unlabelled)]
    kept: dict[str, Puzzle] = {
        row.question: row for row in data().train
    }  # one answer can pass: the solution is unique
    readings, rng = Readings(model), np.random.default_rng([seed, 4])

    def rows_of(step: int) -> list[Puzzle]:
        if step % REJECTION_STEPS == 0:
            missing = [question for question in questions if question not in kept]
            missing = rng.permutation(missing)[:REJECTION_QUESTIONS].tolist()
            draws = draw_answers(
                model,
                _renderer(model),
                missing,
                num_answers=1,
                seed=seed,
                max_new_tokens=MAX_TOKENS,
                first_draw=step,
                batch_size=256,
            )
            texts = [answers[0].answer.text for answers in draws]
            passed = solved(missing, texts)
            rows = zip(missing, texts, passed, strict=True)
            kept.update({question: Puzzle(question, text, -1) for question, text, is_right in rows if is_right})
        return list(kept.values())

    readings.read(0)
    for step in _likelihood_steps(model, rows_of, seed, num_steps, RATE):
        is_last = step == num_steps or readings.train_seconds() > budget
        if step % READ_EVERY == 0 or is_last:
            readings.read(step)
        if is_last:
            break
    return readings.result() | {"num_kept": len(kept)}


def tempered(seed: int, folder: Path) -> dict[str, Any]:
    """The start at other temperatures: the tempered law is a law, so its solve rate and bits are exact, too."""
    model = start(seed, folder)
    test, validation = data().test, data().validation
    curve = [
        {
            "temperature": temperature,
            "validation_solve_rate": float(np.exp(log_probs(model, validation, temperature)).mean()),
            "test_nats": float(log_probs(model, test, temperature).mean()),
            "solve_rate": float(np.exp(log_probs(model, test, temperature)).mean()),
        }
        for temperature in TEMPERATURES
    ]
    return {"curve": curve, "sampled": sampled_solve_rate(model, seed), "exact": curve[-1]["solve_rate"]}


def sampled_solve_rate(model: Qwen3ForCausalLM, seed: int, num_answers: int = 4) -> float:
    """Share of sampled answers to the test puzzles that pass the check: what exp(log p) has to agree with."""
    questions = [row.question for row in data().test]
    draws = draw_answers(
        model,
        _renderer(model),
        questions,
        num_answers=num_answers,
        seed=seed,
        max_new_tokens=MAX_TOKENS,
        batch_size=256,
    )
    passed = [
        is_right
        for k in range(num_answers)
        for is_right in solved(questions, [answers[k].answer.text for answers in draws])
    ]
    return float(np.mean(passed))


def seconds_per_game_step(seed: int, folder: Path, num_steps: int = 30) -> float:
    """CPU seconds of one step of the game, measured here and now, for arms that get as much time."""
    curve = game(seed, folder, num_steps=num_steps, num_warmup=0)["curve"]
    return curve[-1]["cpu_seconds"] / num_steps


def rates(log_probs: np.ndarray) -> dict[str, float]:
    """Exact solve rate at temperature 1, and bits per human answer."""
    return {"solved": float(np.exp(log_probs).mean()), "bits": nats_to_bits(float(-log_probs.mean()))}


def table(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per arm and seed: after the last step, and at the step with the fewest bits on validation rows."""
    rows = []
    for entry in sorted(results, key=lambda entry: (entry["cell"]["arm"], entry["cell"]["seed"])):
        result = entry["result"]
        last, best = (rates(np.array(result[which])) for which in ("last", "best"))
        rows.append(
            {
                "arm": entry["cell"]["arm"],
                "seed": entry["cell"]["seed"],
                "solved": last["solved"],
                "bits": last["bits"],
                "best step": result["best_step"],
                "solved there": best["solved"],
                "bits there": best["bits"],
                "steps": result["num_steps"],
                "CPU s": result["cpu_seconds"],
            }
        )
    return rows
