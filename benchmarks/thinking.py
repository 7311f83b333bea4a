"""Thoughts help where they should: a latent imitator against plain ones, and against the rows with thoughts alone.

All arms learn from one base and the rows of `worlds.checksums`, of which a tenth have their thought. The latent arm
takes the rows with thoughts first, then lets the retrodictor dream, then takes all rows. Its controls: the exact
trainer on the same answers, for as many steps and for as many FLOPs; and the rows with thoughts alone for as many
steps as the latent arm took in all. Every arm is measured on test questions at the step that a dev split likes best.
"""

import contextlib
import dataclasses
import io
import math
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.worlds import checksums
from hf_imitate import LatentRetrodictiveConfig, LatentRetrodictiveTrainer, RetrodictiveConfig, RetrodictiveTrainer
from hf_imitate.sampling import stream_key
from hf_imitate.scoring import evaluation_mode, score_answers

NUM_ROWS, NUM_KNOWN, NUM_DEV, NUM_TEST, BATCH, NUM_THOUGHTS = 3000, 300, 200, 500, 32, 4
KNOWN_STEPS, DREAM_STEPS, ALL_STEPS, MEASURE_EVERY = 900, 400, 250, 100
RATE, RATE_OF_ALL = 1e-3, 3e-4  # the second is for all rows: what is known by then is easily lost
# Chosen before their first run; settings were found on seeds 3 to 5, after others had failed on 31 to 33.
SEEDS = [34, 35, 36]
CELLS = [
    *({"seed": s, "arm": arm, "thoughts_help": True} for s in SEEDS for arm in ("latent", "plain", "thoughts only")),
    *({"seed": SEEDS[0], "arm": arm, "thoughts_help": False} for arm in ("latent", "plain")),
]


def token_passes() -> tuple[int, int]:
    """Tokens that the latent arm passes through a model, forward 1 and backward 2; and those of one plain step."""
    question, thought, answer = checksums.NUM_DIGITS, checksums.NUM_DIGITS + 1, 2
    forward, hindsight = question + thought + answer, 2 * question + answer + thought
    known = 3 * (forward + hindsight)
    dream = NUM_THOUGHTS * (forward + 3 * hindsight)
    hidden = NUM_THOUGHTS * (hindsight + 3 * hindsight + 3 * forward)
    share = NUM_KNOWN / NUM_ROWS
    both = share * known + (1 - share) * hidden
    latent = KNOWN_STEPS * known + DREAM_STEPS * dream + ALL_STEPS * both
    return round(BATCH * latent), BATCH * 3 * (question + answer)


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Train one arm of one seed: nats per answer on dev questions along the way, on test questions at the best."""
    seed, arm, helps = cell["seed"], cell["arm"], cell["thoughts_help"]
    rows = checksums.human_rows(NUM_ROWS + NUM_DEV + NUM_TEST, NUM_KNOWN, seed, helps)
    train = rows.select(range(NUM_ROWS))
    dev, test = rows.select(range(NUM_ROWS, NUM_ROWS + NUM_DEV)), rows.select(range(NUM_ROWS + NUM_DEV, len(rows)))
    known = train.select(range(NUM_KNOWN))
    base = checksums.new_base(seed)
    latent_steps = KNOWN_STEPS + DREAM_STEPS + ALL_STEPS
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        if arm == "plain":
            passes, per_step = token_passes()
            trainer = _plain(folder, seed, base, train.remove_columns("thought"), math.ceil(passes / per_step))
            best = _Best(trainer, _exact_nats, dev, latent_steps)
            trainer.train()
        elif arm == "thoughts only":
            trainer = _latent(folder, seed, base, known, latent_steps, 0)
            best = _Best(trainer, _nats_through_thoughts, dev)
            trainer.train()
        else:
            first = _latent(folder, seed, base, known, KNOWN_STEPS, 0)
            first.train()
            model = first.model
            model.delete_adapter("retrodictor")  # it has learned the known thoughts by heart; dreams teach another
            trainer = _latent(folder, seed, model, train, ALL_STEPS, DREAM_STEPS, RATE_OF_ALL)
            best = _Best(trainer, _nats_through_thoughts, dev)
            trainer.train()
        return {"dev": best.curve, **{name: best.measure(trainer, test, name) for name in best.kept}}


def _settings(folder: str, seed: int, num_steps: int) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "use_cpu": True,
        "seed": seed,
        "max_steps": num_steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _lora(model: Any) -> LoraConfig | None:
    if isinstance(model, PeftModel):
        return None
    return LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", lora_dropout=0.0)


def _latent(
    folder: str, seed: int, model: Any, train: Dataset, num_steps: int, num_dreams: int, rate: float = RATE
) -> Any:
    args = LatentRetrodictiveConfig(
        **{**_settings(folder, seed, num_steps), "learning_rate": rate},
        retrodictor_learning_rate=RATE,
        num_thoughts=NUM_THOUGHTS,
        max_thought_length=checksums.NUM_DIGITS,
        retrodictor_warmup_steps=num_dreams,
    )
    return LatentRetrodictiveTrainer(
        model=model,
        args=args,
        train_dataset=train,
        processing_class=checksums.tokenizer(),
        peft_config=_lora(model),
    )


def _plain(folder: str, seed: int, model: Any, train: Dataset, num_steps: int) -> Any:
    return RetrodictiveTrainer(
        model=model,
        args=RetrodictiveConfig(**_settings(folder, seed, num_steps)),
        train_dataset=train,
        processing_class=checksums.tokenizer(),
        peft_config=_lora(model),
    )


def _exact_nats(trainer: Any, rows: Dataset, num_thoughts: int) -> float:
    rendered = trainer.renderer.human(rows["prompt"], rows["completion"])
    return -score_answers(trainer.model, rendered, trainer._tokenizer.pad_token_id, batch_size=256).mean().item()


def _nats_through_thoughts(trainer: Any, rows: Dataset, num_thoughts: int) -> float:
    """Mean nats, from as many thoughts in hindsight as without it: a mean of unbiased estimates, its log too low."""
    rendered = trainer.renderer.human(rows["prompt"], rows["completion"])
    log_weights = []
    for purpose, retrodictor in (("hindsight", trainer.retrodictor), ("foresight", None)):
        thinkers = dataclasses.replace(trainer.thinkers, retrodictor=retrodictor, max_rows=512)
        keys = [[stream_key(0, purpose, prompt, k) for k in range(num_thoughts)] for prompt in rows["prompt"]]
        with evaluation_mode(trainer.model):
            log_p_joint, log_q, _ = thinkers.log_weights(rendered, keys)
        log_weights.append(log_p_joint - log_q)
    both = torch.cat(log_weights, dim=1)
    return -(torch.logsumexp(both, dim=1) - math.log(both.shape[1])).mean().item()


class _Best(TrainerCallback):
    """Keeps the weights that the dev split likes best, within `num_steps` and in all."""

    def __init__(self, trainer: Any, nats: Callable[..., float], dev: Dataset, num_steps: float = math.inf):
        self.trainer, self.nats, self.dev, self.num_steps = trainer, nats, dev, num_steps
        self.curve: list[tuple[int, float]] = []
        self.kept: dict[str, dict[str, Tensor]] = {}
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, **kwargs):
        every = max(MEASURE_EVERY, state.max_steps // 30)
        if state.global_step % every and state.global_step != state.max_steps:
            return
        self.curve.append((state.global_step, self.nats(self.trainer, self.dev, 16)))
        for name, limit in (("same steps", self.num_steps), ("all steps", math.inf)):
            within = [nats for step, nats in self.curve if step <= limit]
            if state.global_step <= limit and within[-1] == min(within):
                self.kept[name] = {key: p.detach().clone() for key, p in _adapters(self.trainer)}

    def measure(self, trainer: Any, rows: Dataset, name: str) -> float:
        """Mean nats per answer under the kept weights."""
        with torch.no_grad():
            for key, parameter in _adapters(trainer):
                parameter.copy_(self.kept[name][key])
        return self.nats(trainer, rows, 64)


def _adapters(trainer: Any) -> list[tuple[str, Tensor]]:
    return [(name, parameter) for name, parameter in trainer.model.named_parameters() if "lora_" in name]


def summarize(results: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """One row per world and seed, nats per answer, and whether thoughts help exactly where they should."""
    found: dict[tuple[bool, int], dict[str, Any]] = {}
    for entry in results:
        cell = entry["cell"]
        found.setdefault((cell["thoughts_help"], cell["seed"]), {})[cell["arm"]] = entry["result"]
    rows, passes = [], []
    for (helps, seed), arms in sorted(found.items(), reverse=True):
        latent, plain = arms["latent"]["all steps"], arms["plain"]
        row: dict[str, Any] = {
            "thoughts can help": helps,
            "seed": seed,
            "human entropy": round(checksums.entropy(helps), 3),
            "latent": round(latent, 3),
            "plain, same steps": round(plain["same steps"], 3),
            "plain, same FLOPs": round(plain["all steps"], 3),
            "thoughts only": "",
        }
        gap = min(plain["same steps"], plain["all steps"]) - latent
        if helps:
            control = arms["thoughts only"]["all steps"]
            row["thoughts only"] = round(control, 3)
            passes.append(gap >= 0.5 and control - latent >= 0.1)
        row["verdict"] = "thoughts help" if gap >= 0.5 else "thoughts do not help"
        rows.append(row)
    others = [row["verdict"] for row in rows if not row["thoughts can help"]]
    return rows, all(passes) and set(others) == {"thoughts do not help"}
