"""`hf-imitate demo`: real text, a tiny base, an imitator trained and judged, on a laptop's CPU, with no network."""

import argparse
import json
import math
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, ProgressCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from hf_imitate.audits.distinguishability import Judgement, judge_pairs
from hf_imitate.audits.figures import plot_frontier
from hf_imitate.audits.judges import lora_judge, ngram_judge
from hf_imitate.docstrings import load_docstrings
from hf_imitate.human_rows import HumanRows
from hf_imitate.imitator import Imitator
from hf_imitate.log_probs import answer_log_probs, nats_to_bits
from hf_imitate.losses import retrodictive_loss
from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer, Renderer, collate, end_token_ids
from hf_imitate.rows import split_by_question
from hf_imitate.sampling import draw_answers
from hf_imitate.scoring import score_answers
from hf_imitate.tiny_base import tiny_base

ANSWER_TOKENS = 32
PROMPT_CHARACTERS = 90  # a few longer signatures would widen every batch
NUM_QUESTIONS = 1800  # held out; half of them train the judges, half are trials
BATCH, NUM_GENERATIONS = 64, 4
WARMUP_RATE, GAME_RATE = 1e-3, 1e-4
JUDGE_SEED = 1
# Seconds on two cores. What is left of twelve minutes belongs to later parts of the demo and to slow machines.
BASE_SECONDS, TRAINING_SECONDS, JUDGING_SECONDS = 180.0, 240.0, 120.0
SHARES = {"imitator_warmup": 0.33, "distinguisher_warmup": 0.10, "game": 0.45, "control": 0.12}


class System(NamedTuple):
    """A way to answer the held-out questions: a model at a temperature."""

    name: str
    model: PreTrainedModel
    temperature: float


class Measured(NamedTuple):
    """What was measured of a system: bits per human answer with a 95 % interval, tokens per answer over the human's,
    one judgement per judge, and its answers."""

    system: System
    bits: float
    bits_interval: tuple[float, float]
    length_ratio: float
    judgements: dict[str, Judgement]
    answers: list[Answer]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo: base, warm-up, game, judges, table, picture, saved imitator. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="hf-imitate demo", description=__doc__)
    parser.add_argument("--output_dir", default="hf-imitate-demo", help="where imitator, table and picture go")
    parser.add_argument("--model", help="start from this model (Hub id or path) instead of a tiny base made here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed_up", type=float, default=1.0, help="divide all training times, for a quick look")
    args = parser.parse_args(argv)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    torch.set_num_threads(fastest_num_threads())
    with _stage("Real text"):
        dataset = split_by_question(load_docstrings(), test_size=NUM_QUESTIONS, seed=args.seed)
        print(
            f"{len(dataset['train'])} pairs to train on, {len(dataset['test'])} held out: a function's signature, and"
        )
        print("the first line of the docstring that its author wrote.")
    with _stage("A base model"):
        path = args.model or str(tiny_base(max_seconds=BASE_SECONDS / args.speed_up))
    with _stage("Training"):
        models = train(path, dataset["train"], output_dir, TRAINING_SECONDS / args.speed_up, args.seed)
    with _stage("Judging"):
        measured = measure(models, path, dataset["test"], args.seed)
    report(measured, dataset["test"], output_dir)
    check_saved(models["imitator"], output_dir)
    print(f"\nDone in {(time.perf_counter() - began) / 60:.1f} minutes. Everything is in {output_dir}/")
    return 0


@contextmanager
def _stage(name: str) -> Iterator[None]:
    print(f"\n=== {name}", flush=True)
    began = time.perf_counter()
    yield
    print(f"    ({time.perf_counter() - began:.0f} s)", flush=True)


def fastest_num_threads() -> int:
    """1 or all of torch's threads, whichever is faster now: on busy cores, threads lose by waiting for each other."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=1024, num_hidden_layers=2, head_dim=32, **sizes))
    ids = torch.zeros(16, 32, dtype=torch.long)
    most, seconds = torch.get_num_threads(), {}
    for num_threads in (1, most):
        torch.set_num_threads(num_threads)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            times.append(time.perf_counter() - began)
        seconds[num_threads] = float(np.median(times))
    torch.set_num_threads(most)
    return min(seconds, key=seconds.get)


# --- training


def train(path: str, rows: Dataset, output_dir: Path, seconds: float, seed: int) -> dict[str, PreTrainedModel]:
    """Fine-tune, then play the game; beside it, go on fine-tuning for as many steps as the game took, as its control.

    Args:
        path: the base, a Hub id or a path.
        rows: human rows to train on.
        seconds: time for all of it; the number of steps follows from the speed measured on a few.

    Returns:
        The models "base", "sft" (where the warm-up ended), "control" and "imitator".
    """
    plan = _plan(path, rows, seconds, seed)
    print(
        f"{plan['imitator_warmup']} steps of fine-tuning (that is plain SFT), {plan['distinguisher_warmup']} of the "
        f"distinguisher's warm-up, {plan['game']} of the game."
    )
    trainer = _trainer(path, rows, str(output_dir), plan, seed)
    keeper = _Keeper(trainer, deadline=time.perf_counter() + 1.25 * seconds)
    trainer.add_callback(keeper)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Progress)
    trainer.train()
    trainer.save_model()
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    sft, control = (AutoModelForCausalLM.from_config(base.config, trust_remote_code=False) for _ in range(2))
    for model in (sft, control):
        model.load_state_dict(keeper.after_warmup)
        model.generation_config = base.generation_config
    num_steps = trainer.state.global_step - trainer.phases.game_start
    _fit_likelihood(control, trainer.likelihood.rows, trainer._tokenizer.pad_token_id, num_steps)
    return {"base": base.eval(), "sft": sft.eval(), "control": control.eval(), "imitator": trainer.model.eval()}


def _trainer(path: str, rows: Dataset, output_dir: str, plan: dict[str, int], seed: int, **settings: Any) -> Any:
    from hf_imitate.trainers.adversarial_config import AdversarialConfig
    from hf_imitate.trainers.adversarial_trainer import AdversarialTrainer

    args = AdversarialConfig(
        output_dir=output_dir,
        seed=seed,
        max_steps=plan["game"],
        imitator_warmup_steps=plan["imitator_warmup"],
        distinguisher_warmup_steps=plan["distinguisher_warmup"],
        per_device_train_batch_size=BATCH,
        num_generations=NUM_GENERATIONS,
        max_completion_length=ANSWER_TOKENS,
        imitator_warmup_learning_rate=WARMUP_RATE,
        learning_rate=GAME_RATE,
        distinguisher_learning_rate=1e-3,
        adam_beta1=0.5,
        retrodictive_coef=1.0,
        report_to="none",
        save_strategy="no",
        **{"logging_steps": 50, **settings},
    )
    return AdversarialTrainer(model=path, args=args, train_dataset=rows.select_columns(["prompt", "completion"]))


def _plan(path: str, rows: Dataset, seconds: float, seed: int) -> dict[str, int]:
    """How many steps of each phase fit into the time, from the speed of a few steps that are thrown away."""
    few = {"imitator_warmup": 3, "distinguisher_warmup": 3, "game": 3}
    trainer = _trainer(path, rows.select(range(512)), "unused", few, seed, disable_tqdm=True, logging_steps=1000)
    trainer.remove_callback(PrinterCallback)
    clock = _Clock(trainer)
    trainer.add_callback(clock)
    trainer.train()
    cost = {phase: min(times) for phase, times in clock.seconds.items()}
    plan = {phase: max(int(seconds * SHARES[phase] / cost[phase]), 3) for phase in few}
    plan["imitator_warmup"] = min(plan["imitator_warmup"], 5 * len(rows) // BATCH)
    plan["game"] = min(plan["game"], int(seconds * SHARES["control"] / cost["imitator_warmup"]))
    return plan


class _Progress(ProgressCallback):
    """transformers' progress bar, with one short line per log."""

    SHOWN = {
        "retrodiction/bits_per_answer": "bits per human answer",
        "distinguisher/accuracy_fresh": "distinguisher right",
        "answers/length_ratio": "length ratio",
    }

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = [f"{text} {logs[name]:.3g}" for name, text in self.SHOWN.items() if name in logs]
        if self.training_bar is not None and shown:
            self.training_bar.write(
                f"  {logs['phase'].replace('_', ' ')}, step {state.global_step}: " + ", ".join(shown)
            )


class _Clock(TrainerCallback):
    """Times the steps of each phase."""

    def __init__(self, trainer: Any):
        self.trainer, self.seconds, self.began = trainer, {}, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()
        self.phase = self.trainer.phases.name(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.setdefault(self.phase, []).append(time.perf_counter() - self.began)


class _Keeper(TrainerCallback):
    """Keeps the weights at the end of the warm-up, and ends a game that runs late."""

    def __init__(self, trainer: Any, deadline: float):
        self.trainer, self.deadline = trainer, deadline
        self.after_warmup: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.after_warmup and state.global_step >= self.trainer.phases.imitator_warmup:
            weights = self.trainer.model.state_dict()
            self.after_warmup = {name: weight.detach().clone() for name, weight in weights.items()}

    def on_step_end(self, args, state, control, **kwargs):
        if time.perf_counter() > self.deadline and not control.should_training_stop:
            print("\nTime is up: the game ends before its last step.")
            control.should_training_stop = True


def _fit_likelihood(model: PreTrainedModel, rows: HumanRows, pad_token_id: int, num_steps: int) -> None:
    """The game's control: the same rows, rate and number of steps, likelihood alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=GAME_RATE, weight_decay=0.0, betas=(0.5, 0.999))
    model.train()
    for step in tqdm(range(num_steps), desc="fine-tuning goes on (control)"):
        chunk = rows.batch(rows.draw(step, BATCH, stream=9))
        batch = collate([row.rendered for row in chunk], pad_token_id)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        log_prob = answer_log_probs(logits, batch.input_ids, batch.answer_mask)
        (retrodictive_loss(log_prob, torch.ones(len(chunk))) / ANSWER_TOKENS).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = GAME_RATE * (1 - step / num_steps)
        optimizer.step()
        optimizer.zero_grad()


# --- judging


def measure(models: dict[str, PreTrainedModel], base: str, rows: Dataset, seed: int) -> list[Measured]:
    """Let every system answer the held-out questions, score the humans' answers under its law, and have it judged."""
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    systems = [
        System("base", models["base"], 1.0),
        *(System(f"SFT, T={temperature:g}", models["sft"], temperature) for temperature in (0.7, 0.85, 1.0)),
        System("SFT, as many more steps", models["control"], 1.0),
        System("imitator", models["imitator"], 1.0),
    ]
    renderer = Renderer(tokenizer, end_token_ids(tokenizer, models["base"].generation_config), ANSWER_TOKENS)
    humans = list(HumanRows(rows, renderer).rows.values())
    rendered = [human.rendered for human in humans]
    human_tokens = sum(len(row.answer_ids) for row in rendered)
    measured = []
    for system in tqdm(systems, desc="judging"):
        nats = -np.asarray(
            score_answers(system.model, rendered, tokenizer.pad_token_id, 64, system.temperature), dtype=float
        )
        bits = nats_to_bits(nats.mean())
        half = nats_to_bits(1.96 * nats.std(ddof=1) / math.sqrt(len(nats)))
        draws = [
            draws[0]
            for draws in draw_answers(
                system.model,
                renderer,
                rows["prompt"],
                num_answers=1,
                seed=seed,
                max_new_tokens=ANSWER_TOKENS,
                temperature=system.temperature,
                batch_size=128,
            )
        ]
        answers = [draw.answer for draw in draws]
        pairs = [
            Pair(prompt, human.answer, (answer,))
            for prompt, human, answer in zip(rows["prompt"], humans, answers, strict=True)
        ]
        judges = {"ngram": ngram_judge, "lora": lora_judge(base, num_steps=150, batch_size=32)}
        judgements = {name: judge_pairs(pairs, judge, name=name, seed=JUDGE_SEED) for name, judge in judges.items()}
        ratio = sum(len(draw.ids) for draw in draws) / human_tokens
        measured.append(Measured(system, bits, (bits - half, bits + half), ratio, judgements, answers))
    return measured


# --- what people see


def report(measured: list[Measured], rows: Dataset, output_dir: Path) -> None:
    """Print the table, ten answers and a verdict; write table, picture and numbers."""
    lines = table(measured)
    print("\n" + "\n".join(lines))
    print(textwrap.fill(LEGEND, 110))
    print("\n" + verdict(measured))
    print("\nTen held-out questions, what the human wrote, and what the imitator wrote:")
    imitator = measured[-1]
    for i in np.linspace(0, len(rows) - 1, 10).astype(int):
        print(f"\n  {rows[int(i)]['prompt'].strip()}")
        print(f"    human:    {rows[int(i)]['completion']}")
        print(f"    imitator: {imitator.answers[int(i)].text}")
    (output_dir / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (output_dir / "demo.json").write_text(json.dumps([_as_json(m) for m in measured], indent=2), encoding="utf-8")
    plot_frontier([_as_figure_row(m) for m in measured], output_dir / "frontier.png")
    print(f"\nThe picture: {output_dir}/frontier.png")


LEGEND = (
    "bits: of one human answer under the law that is sampled from, fewer are better. Judges are trained afresh on "
    "half of the held-out questions; 'picks the human' is how often they do on the other half (0.5 is chance), "
    "'judge bits' what one answer tells them about its author (0 is nothing). Intervals hold at 95 %, each on its "
    "own, over questions; another judge's seed moves a number by a few hundredths more."
)


def table(measured: list[Measured]) -> list[str]:
    """The table's lines, in Markdown."""
    judges = list(measured[0].judgements)
    header = ["system", "bits/answer", *(f"{j} picks the human" for j in judges), *(f"{j} judge bits" for j in judges)]
    rows = [[*header, "length ratio"]]
    for m in measured:
        accuracies = [f"{j.accuracy:.3f} [{j.interval.low:.3f}, {j.interval.high:.3f}]" for j in m.judgements.values()]
        bits = [f"{j.bits:+.3f}" for j in m.judgements.values()]
        half = (m.bits_interval[1] - m.bits_interval[0]) / 2
        rows.append([m.system.name, f"{m.bits:.1f} ± {half:.1f}", *accuracies, *bits, f"{m.length_ratio:.2f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def verdict(measured: list[Measured]) -> str:
    """In plain words, whether the imitator beat the best of fine-tuning, judge by judge and in bits."""
    imitator, rivals = measured[-1], measured[1:-1]
    sentences = []
    for judge in imitator.judgements:
        best = min(rivals, key=lambda m: m.judgements[judge].accuracy)
        ours, theirs = imitator.judgements[judge], best.judgements[judge]
        if ours.interval.high < theirs.interval.low:
            word = "is harder to tell from the human than"
        elif ours.interval.low > theirs.interval.high:
            word = "is easier to tell from the human than"
        else:
            word = "cannot be ranked against"
        sentences.append(
            f"To the {judge} judge, the imitator ({ours.accuracy:.3f}) {word} the best of SFT, '{best.system.name}' "
            f"({theirs.accuracy:.3f})."
        )
    best = min(rivals, key=lambda m: m.bits)
    sentences.append(
        f"Human answers cost it {imitator.bits:.1f} bits; under '{best.system.name}' they cost {best.bits:.1f}."
    )
    return "\n".join(sentences)


def _as_json(m: Measured) -> dict[str, Any]:
    judgements = {
        name: {"accuracy": j.accuracy, "interval": list(j.interval), "bits": j.bits, "num_pairs": j.num_pairs}
        for name, j in m.judgements.items()
    }
    return {
        "system": m.system.name,
        "temperature": m.system.temperature,
        "bits_per_answer": m.bits,
        "bits_interval": list(m.bits_interval),
        "length_ratio": m.length_ratio,
        "judges": judgements,
    }


def _as_figure_row(m: Measured) -> dict[str, Any]:
    return {
        "name": m.system.name,
        "judge_accuracies": {name: (j.accuracy, *j.interval) for name, j in m.judgements.items()},
        "bits_per_answer": m.bits,
        "bits_interval": m.bits_interval,
        "length_ratio": m.length_ratio,
    }


def check_saved(model: PreTrainedModel, output_dir: Path) -> None:
    """Load the saved imitator as a user would, and compare.

    Raises:
        RuntimeError: what was saved is not what was trained.
    """
    loaded = Imitator.from_pretrained(str(output_dir))
    question = "def read(path):\n"
    ids = loaded.tokenizer(question, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        difference = (loaded.model(ids).logits - model(ids).logits).abs().max().item()
    if difference > 0:
        raise RuntimeError(f"The saved imitator's logits differ from the trained one's by {difference}.")
    print(f"Imitator.from_pretrained('{output_dir}') loads it; asked `{question.strip()}` it answers:")
    for answer in loaded.answer([question], num_answers=3, seed=0)[0]:
        print(f"    {answer}")
