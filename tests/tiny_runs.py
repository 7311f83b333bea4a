"""Adversarial runs that take a second or two: thirty-two rows, two answers, the tiny model of conftest.py."""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback

from hf_imitate import AdversarialConfig, AdversarialTrainer
from hf_imitate.rendering import Rendered

NUM_ROWS = 32


def rows(number: int = NUM_ROWS, answers: tuple[str, ...] = ("abc", "de"), **columns: list) -> Dataset:
    """Rows whose answers take turns; every question is different."""
    return Dataset.from_dict(
        {
            "prompt": [f"Item {i}:" for i in range(number)],
            "completion": [answers[i % len(answers)] for i in range(number)],
            **columns,
        }
    )


def chat_rows(number: int = NUM_ROWS) -> Dataset:
    """The same rows as conversations."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
            }
            for row in rows(number)
        ]
    )


def settings(folder: Path, **changes: Any) -> AdversarialConfig:
    """Two steps of the game and no warm-up, eight answers in a batch, four to a question."""
    plain: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "max_steps": 2,
        "imitator_warmup_steps": 0,
        "distinguisher_lm_warmup_steps": 0,
        "distinguisher_warmup_steps": 0,
        "heldout_fraction": 0.25,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "imitator_warmup_learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return AdversarialConfig(**{**plain, **changes})


def lora() -> LoraConfig:
    """A small adapter on every linear layer."""
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def make(
    folder: Path,
    model: Any,
    dataset: Dataset | None = None,
    kind: type[AdversarialTrainer] = AdversarialTrainer,
    full: bool = False,
    arguments: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A trainer; `arguments` go to it, `changes` to its settings. With `full=True` there is no adapter."""
    given = {"train_dataset": rows() if dataset is None else dataset, **(arguments or {})}
    if not full:
        given.setdefault("peft_config", lora())
    return kind(model=str(model) if isinstance(model, Path) else model, args=settings(folder, **changes), **given)


def run(*args: Any, **kwargs: Any) -> Any:
    """A trainer that has trained; what transformers prints is left out."""
    trainer = make(*args, **kwargs)
    train(trainer)
    return trainer


def train(trainer: AdversarialTrainer, **kwargs: Any) -> None:
    """Train quietly."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(**kwargs)


def ending_model(path: Path) -> tuple[PreTrainedModel, Any]:
    """The tiny model with a dozen end tokens: of its answers of sixteen tokens about half end by themselves."""
    model = load(path)
    model.generation_config.eos_token_id = list(range(12))
    return model, AutoTokenizer.from_pretrained(str(path))


class Watched(AdversarialTrainer):
    """Notes what each generation batch was scored by the distinguisher as it stood, and what was paid for it."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.batches: list[dict[str, torch.Tensor]] = []
        super().__init__(*args, **kwargs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        answers = [self.renderer.read(ids) for ids in completion_ids_list]
        known = [i for i, row in enumerate(inputs) if row["completion"] is not None]
        human = torch.full((len(inputs),), torch.nan)
        humans = self.renderer.human([prompts[i] for i in known], [inputs[i]["completion"] for i in known])
        human[known] = self.distinguisher.score(
            [prompts[i] for i in known], [self.renderer.read(row.answer_ids) for row in humans]
        ).cpu()
        seen = {
            "row": torch.tensor([row.get("_hf_imitate_row", -1) for row in inputs]),
            "imitator": self.distinguisher.score(prompts, answers).cpu(),
            "human": human,
            "cut": torch.tensor([not answer.ended for answer in answers]),
        }
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.batches.append({**seen, "rewards": rewards.clone()})
        return rewards

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.batches[-1]["advantages"] = output["advantages"].clone()
        return output


def weights(parameters: Any) -> dict[str, torch.Tensor]:
    """Copies of named parameters."""
    return {name: parameter.detach().clone() for name, parameter in parameters}


def imitator_weights(trainer: AdversarialTrainer) -> dict[str, torch.Tensor]:
    """Everything of the imitator that trains."""
    return weights((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad)


def distinguisher_weights(trainer: AdversarialTrainer) -> dict[str, torch.Tensor]:
    """Everything of the distinguisher that trains."""
    return weights((str(i), p) for i, p in enumerate(trainer.game.learner.parameters))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal to the last bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logged(trainer: AdversarialTrainer, name: str) -> list[Any]:
    """Every logged value of a metric."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@contextlib.contextmanager
def spied(owner: Any, name: str) -> Iterator[list[tuple]]:
    """Note the arguments of every call of a method, which works as before."""
    calls: list[tuple] = []
    original: Callable = getattr(owner, name)

    def noting(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    setattr(owner, name, noting)
    try:
        yield calls
    finally:
        delattr(owner, name)


class AtEveryStep(TrainerCallback):
    """Calls back after every optimizer step, and before it, when the gradients are there."""

    def __init__(self, after: Callable = lambda: None, before: Callable = lambda: None):
        self.after, self.before = after, before

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before()

    def on_step_end(self, args, state, control, **kwargs):
        self.after()


def load(path: Path) -> PreTrainedModel:
    """The model stored there, in fp32."""
    return AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)


def nats_of(model: PreTrainedModel, row: Rendered) -> torch.Tensor:
    """Summed nats of one rendered answer, by cross-entropy on the row alone."""
    ids = torch.tensor([row.prompt_ids + row.answer_ids])
    logits = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]
    return F.cross_entropy(logits, ids[0, len(row.prompt_ids) :], reduction="sum")
