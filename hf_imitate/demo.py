"""`hf-imitate demo`: real text, a tiny base, an imitator trained and judged, on a laptop's CPU, with no network."""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, ProgressCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from hf_imitate.audits.report import AuditReport
from hf_imitate.audits.run import audit
from hf_imitate.demo_report import Measured, Resampled, System, read_scores, report
from hf_imitate.demo_thinking import show, think
from hf_imitate.docstrings import load_docstrings
from hf_imitate.hub_cards.card_file import write_card
from hf_imitate.human_rows import HumanRows
from hf_imitate.imitator import Imitator
from hf_imitate.log_probs import answer_log_probs, nats_to_bits
from hf_imitate.losses import retrodictive_loss
from hf_imitate.rendering import collate
from hf_imitate.rows import split_by_question
from hf_imitate.tiny_base import tiny_base

ANSWER_TOKENS = 32
PROMPT_CHARACTERS = 90  # a few longer signatures would widen every batch
NUM_QUESTIONS = 1200  # held out: the last ones choose a temperature, the others are audited. A slow machine asks fewer
NUM_CHOOSING, NUM_PROBED, FEWEST_AUDITED = 200, 64, 60
TEMPERATURES = (0.7, 0.85, 1.0)
BATCH, NUM_GENERATIONS = 32, 4
WARMUP_RATE, GAME_RATE = 1e-3, 1e-4
# Seconds on two cores. What is left of twelve minutes belongs to later parts of the demo and to slow machines.
BASE_SECONDS, TRAINING_SECONDS, JUDGING_SECONDS, THINKING_SECONDS = 180.0, 240.0, 120.0, 45.0
RESAMPLING_SECONDS = 50.0
RESAMPLE, NUM_ESTIMATES, NUM_TIMED = 8, 2, 16  # few estimates: the bits are a little too many, and say by how much
SHARES = {"imitator_warmup": 0.33, "distinguisher_warmup": 0.10, "game": 0.45, "control": 0.12}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo: base, warm-up, game, audits, table, picture, latent task. Returns the exit code."""
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
        pairs = load_docstrings()
        short = pairs.filter(lambda prompt: len(prompt) <= PROMPT_CHARACTERS, input_columns="prompt")
        # Not by answer: with stock phrases on one side only, the split itself would tell the authors apart.
        dataset = split_by_question(short, test_size=NUM_QUESTIONS, seed=args.seed)
        num_known = len(set(dataset["train"]["completion"]) & set(dataset["test"]["completion"]))
        first_choosing = len(dataset["test"]) - NUM_CHOOSING
        audited = dataset["test"].select(range(first_choosing))
        print(
            f"{len(pairs)} pairs: a function's signature, and the first line of the docstring that its author wrote.\n"
            f"{len(pairs) - len(short)} with signatures over {PROMPT_CHARACTERS} characters are left out; "
            f"{len(dataset['train'])} train, {len(dataset['test'])} are held out, by question "
            f"({num_known} of their answers also stand under other questions, trained on)."
        )
    with _stage("A base model"):
        path = args.model or str(tiny_base(max_seconds=BASE_SECONDS / args.speed_up))
    with _stage("Training"):
        models = train(path, dataset["train"], output_dir, TRAINING_SECONDS / args.speed_up, args.seed)
        saved = load_saved(models["imitator"], output_dir)
    with _stage("Auditing"):
        systems = choose_systems(models, saved, dataset["test"].select(range(first_choosing, len(dataset["test"]))))
        measured = measure(systems, audited, dataset["train"], output_dir, JUDGING_SECONDS / args.speed_up, args.seed)
    with _stage(f"Keeping one of {RESAMPLE} answers"):
        seconds = RESAMPLING_SECONDS / args.speed_up
        resampled = measure_resampled(measured[-1], audited, dataset["train"], output_dir, seconds, args.seed)
    report(measured, resampled, audited, output_dir, args.seed)
    with _stage("A latent task"):
        show(think(output_dir / "_thinking", THINKING_SECONDS / args.speed_up, args.seed))
    with _stage("The card"):
        card = write_card(output_dir, dataset_name="docstrings", answered_by="the authors of the docstrings")
        print(f"{card}, without its metadata:\n\n{ModelCard.load(card).text.strip()}")
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
    most = torch.get_num_threads()
    seconds: dict[int, float] = {}
    for num_threads in (1, most):
        torch.set_num_threads(num_threads)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            times.append(time.perf_counter() - began)
        seconds[num_threads] = float(np.median(times))
    torch.set_num_threads(most)
    return min(seconds, key=lambda num_threads: seconds[num_threads])


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
    num_steps = max(0, trainer.state.global_step - trainer.phases.game_start)
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
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        **{"logging_steps": 50, **settings},
    )
    return AdversarialTrainer(model=path, args=args, train_dataset=rows.select_columns(["prompt", "completion"]))


def _plan(path: str, rows: Dataset, seconds: float, seed: int) -> dict[str, int]:
    """How many steps of each phase fit into the time, from the speed of a few steps that are thrown away."""
    few = {"imitator_warmup": 3, "distinguisher_warmup": 3, "game": 3}
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(path, rows.select(range(512)), folder, few, seed, disable_tqdm=True, logging_steps=1000)
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
        self.trainer, self.began = trainer, 0.0
        self.seconds: dict[str, list[float]] = {}

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
            self._keep()

    def on_step_end(self, args, state, control, **kwargs):
        if time.perf_counter() > self.deadline and not control.should_training_stop:
            print("\nTime is up: training ends before its last step.")
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if not self.after_warmup:  # time was up within the warm-up: SFT, control and imitator are one
            self._keep()

    def _keep(self) -> None:
        weights = self.trainer.model.state_dict()
        self.after_warmup = {name: weight.detach().clone() for name, weight in weights.items()}


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


# --- auditing


def load_saved(model: PreTrainedModel, output_dir: Path) -> Imitator:
    """Load the saved imitator as a user would, and compare.

    Raises:
        RuntimeError: what was saved is not what was trained.
    """
    loaded = Imitator.from_pretrained(str(output_dir), device="cpu")
    question = "def read(path):\n"
    ids = loaded.tokenizer(question, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        difference = (loaded.model(ids).logits - model(ids).logits).abs().max().item()
    if difference > 0:
        raise RuntimeError(f"The saved imitator's logits differ from the trained one's by {difference}.")
    print(f"Imitator.from_pretrained('{output_dir}') loads it; asked `{question.strip()}` it answers:")
    for answer in loaded.answer([question], num_answers=3, seed=0)[0]:
        print(f"    {answer}")
    return loaded


def choose_systems(models: dict[str, PreTrainedModel], saved: Imitator, rows: Dataset) -> list[System]:
    """What is compared: base, SFT at its best temperature, the game's control, and the imitator, last.

    Args:
        models: as `train` returns them.
        saved: the imitator as it was saved.
        rows: held-out rows that are not audited; under the best temperature they cost the fewest bits.
    """
    base, sft, control = (
        Imitator(models[name], saved.tokenizer, max_new_tokens=ANSWER_TOKENS) for name in ("base", "sft", "control")
    )
    answered = rows["prompt"][:], rows["completion"][:]
    nats = {t: -sft.log_prob(*answered, temperature=t).nats.mean().item() for t in TEMPERATURES}
    best = min(nats, key=lambda temperature: nats[temperature])
    told = ", ".join(f"{nats_to_bits(nats[t]):.1f} at {t:g}" for t in TEMPERATURES)
    print(f"SFT's best temperature is {best:g}: bits of {len(rows)} further human answers are {told}.")
    return [
        System("base", base, 1.0),
        System(f"SFT, T={best:g}", sft, best),
        System("SFT, as many more steps", control, 1.0),
        System("imitator", saved, 1.0),
    ]


def measure(
    systems: Sequence[System], rows: Dataset, train_rows: Dataset, output_dir: Path, seconds: float, seed: int
) -> list[Measured]:
    """Audit every system on the same held-out questions.

    Args:
        systems: what is compared; the last one's audit goes beside its weights.
        rows: held-out rows.
        train_rows: what was trained on.
        output_dir: the demo's folder.
        seconds: time for all of it; on a slow machine fewer questions are asked.
    """
    known, asked = (part.select_columns(["prompt", "completion"]) for part in (train_rows, rows))
    began = time.perf_counter()
    for _ in range(2):  # the first loads what later ones find loaded
        probing = time.perf_counter()
        _audited(systems[0], asked.select(range(NUM_PROBED)), known, None, seed)
    spent = time.perf_counter() - probing
    left = began + seconds - time.perf_counter()
    fitting = int(left / len(systems) / (spent / NUM_PROBED))
    num_questions = min(len(rows), max(fitting, FEWEST_AUDITED))
    print(f"{num_questions} questions to each system.")
    measured = []
    for number, system in enumerate(tqdm(systems, desc="auditing")):
        # A push leaves behind what starts with an underscore.
        folder = output_dir / ("audit" if system is systems[-1] else f"_rivals/{number}")
        found = _audited(system, asked.select(range(num_questions)), known, folder, seed)
        measured.append(Measured(system, found, read_scores(folder / "scores.parquet")))
    return measured


def measure_resampled(
    single: Measured, rows: Dataset, train_rows: Dataset, output_dir: Path, seconds: float, seed: int
) -> Resampled:
    """Audit answers that the distinguisher keeps, and single draws, on as many questions as fit into the time.

    Args:
        single: the imitator, as it was saved, and what was found of it; no other questions are asked.
        rows, train_rows, output_dir, seed: as of [`measure`].
        seconds: time for it; on a slow machine fewer questions are asked, but never below `FEWEST_AUDITED`.
    """
    known, asked = (part.select_columns(["prompt", "completion"]) for part in (train_rows, rows))
    law = single.system.imitator.residual(RESAMPLE, max_new_tokens=ANSWER_TOKENS)
    began = time.perf_counter()
    law.answer(asked["prompt"][:NUM_TIMED], seed=seed, batch_size=128)
    seconds_per_draw = (time.perf_counter() - began) / NUM_TIMED / RESAMPLE
    # Those of which one is kept, the same drawn again by re-execution, and those that the scores rest on.
    num_draws = 2 * RESAMPLE + NUM_ESTIMATES * (RESAMPLE - 1)
    num_asked = len(single.scores["question"])
    num_questions = min(num_asked, max(int(seconds / (seconds_per_draw * num_draws)), FEWEST_AUDITED))
    print(f"{num_questions} questions, {num_draws} answers to each.")

    def measured(system: System, folder: Path) -> Measured:
        found = _audited(system, asked.select(range(num_questions)), known, folder, seed)
        return Measured(system, found, read_scores(folder / "scores.parquet"))

    name = f"{single.system.name}, resample {RESAMPLE}"
    kept = measured(single.system._replace(name=name, resample=RESAMPLE), output_dir / "_rivals" / "resampled")
    if num_questions < num_asked:
        single = measured(single.system, output_dir / "_rivals" / "single")
    return Resampled(kept, single)


def _audited(system: System, rows: Dataset, known: Dataset, folder: Path | None, seed: int) -> AuditReport:
    return audit(
        system.imitator,
        rows,
        known,
        resample=system.resample,
        num_estimates=NUM_ESTIMATES,
        generation_config={"temperature": system.temperature, "max_new_tokens": ANSWER_TOKENS},
        seed=seed,
        output_dir=folder,
        batch_size=128,
        progress=False,
    )
