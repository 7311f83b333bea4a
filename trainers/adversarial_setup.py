"""What [`AdversarialTrainer`] puts together before it trains."""

import contextlib
import logging
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback

from hf_imitate.checks import Check
from hf_imitate.classifier import default_peft_config
from hf_imitate.distinguisher import Distinguisher
from hf_imitate.human_rows import ROW_COLUMN, HumanRows
from hf_imitate.rows import completion_role
from hf_imitate.trainers.adversarial_config import AdversarialConfig
from hf_imitate.trainers.phases import Phases

if TYPE_CHECKING:
    from hf_imitate.trainers.adversarial_trainer import AdversarialTrainer

logger = logging.getLogger(__name__)


def with_row_numbers(dataset: Dataset) -> Dataset:
    """The data set with its row numbers in a column of our own: answers are held out by row, not by content.

    Raises:
        ValueError: the completions' role is `user`, or the column's name is taken.
    """
    if ROW_COLUMN in dataset.column_names:
        raise ValueError(f"The column '{ROW_COLUMN}' is reserved. Rename it.")
    answered = next(c for c in dataset["completion"] if c is not None)
    if completion_role(answered) == "user":
        raise ValueError(
            "The completions' role is 'user'. GRPO's rollouts open the assistant's turn, so an imitated user would be "
            "sampled under another header than the human's answer is scored under. Give the human's answers the role "
            "'assistant' (swap the roles of the whole conversation)."
        )
    return dataset.add_column(ROW_COLUMN, list(range(len(dataset))))


def check_lengths(human_rows: HumanRows, model: PreTrainedModel | PeftModel, args: AdversarialConfig) -> None:
    """Count what the length limit cuts, and refuse questions that leave no room for an answer.

    Raises:
        ValueError: question and longest answer together exceed the model's positions.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    lengths = {i: len(row.rendered.prompt_ids) for i, row in human_rows.rows.items()}
    too_long = [i for i, length in lengths.items() if limit and length + args.max_completion_length > limit]
    if too_long:
        raise ValueError(
            f"{len(too_long)} of {len(lengths)} questions (column 'prompt', rows {too_long[:5]}) have up to "
            f"{max(lengths.values())} tokens; with `max_completion_length`={args.max_completion_length} they exceed the "
            f"model's {limit} positions. Shorten these questions or lower `max_completion_length`."
        )
    cut, total = human_rows.num_truncated, len(human_rows.rows)
    if cut:
        logger.warning(
            "%d of %d human answers (%.1f %%) are longer than `max_completion_length`=%d tokens. They are cut there "
            "without an end token, as the imitator's answers are%s.",
            cut,
            total,
            100 * cut / total,
            args.max_completion_length,
            "; raise the limit if the ends of answers matter" if cut > total / 100 else "",
        )
    if human_rows.num_repeated_heldout:
        logger.warning(
            "%d of %d held-out answers also stand, with the same question, in rows that are trained on: held-out numbers "
            "are not free of memory.",
            human_rows.num_repeated_heldout,
            len(human_rows.heldout),
        )


def build_distinguisher(
    given: str | PreTrainedModel | Distinguisher | None,
    imitator: PreTrainedModel | PeftModel,
    tokenizer: Any,
    args: AdversarialConfig,
    checks: Sequence[Check],
    peft_config: PeftConfig | None,
    distinguisher_peft_config: PeftConfig | None,
) -> Distinguisher:
    """The distinguisher the user asked for; by default on the imitator's own base."""
    common = {
        "checks": checks,
        "max_answer_tokens": args.max_completion_length,
        "chat_template_kwargs": args.chat_template_kwargs,
    }
    if isinstance(given, Distinguisher):
        given.set_checks(checks)
        return given
    if given is not None:
        config = distinguisher_peft_config or peft_config
        if isinstance(given, PreTrainedModel):
            return _from_model(given, tokenizer, config, common, args.seed)
        return Distinguisher.from_causal_lm(given, peft_config=config, seed=args.seed, **common)
    if isinstance(imitator, PeftModel):
        config = distinguisher_peft_config or imitator.peft_config[imitator.active_adapter]
        if isinstance(config, LoraConfig):
            torch.manual_seed(args.seed)
            return Distinguisher.on_shared_base(imitator, tokenizer, config, **common)
        imitator = imitator.get_base_model()
    config = distinguisher_peft_config or default_peft_config()
    copied = Distinguisher.from_causal_lm(imitator, tokenizer, peft_config=config, seed=args.seed, **common)
    megabytes = sum(p.numel() * p.element_size() for p in copied.model.parameters()) / 2**20
    logger.warning(
        "The distinguisher is an adapter on a frozen copy of the starting model: %.0f MB more memory. With LoRA "
        "(`peft_config`) it shares the imitator's base.",
        megabytes,
    )
    return copied


def _from_model(model, tokenizer, config, common, seed) -> Distinguisher:
    size = model.get_input_embeddings().num_embeddings
    if size < len(tokenizer):
        raise ValueError(
            f"The distinguisher's model knows {size} tokens, the imitator's tokenizer {len(tokenizer)}. Give "
            "`distinguisher` as a repo id or path, or as `Distinguisher(model, its_tokenizer)`."
        )
    if type(model).__name__.endswith("ForSequenceClassification"):
        return Distinguisher(model, tokenizer, **common)
    return Distinguisher.from_causal_lm(model, tokenizer, peft_config=config, seed=seed, **common)


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave every random state as it was found."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def set_learning_rate(scheduler: LambdaLR, step: int) -> None:
    """Bring the optimizer to the scheduled rates of `step`, where the schedule changed after it was last asked."""
    groups = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, base, factor in groups:
        group["lr"] = base * factor(step)


def show_total(callbacks: Sequence[TrainerCallback], total: int) -> None:
    """Correct the progress bar's total after a warm-up that ended before its cap."""
    for callback in callbacks:
        if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
            callback.training_bar.total = total
            callback.training_bar.refresh()


class PhaseCallback(TrainerCallback):
    """Says what will happen, and holds the imitator still where the guard asks for it and nothing else moves it."""

    def __init__(self, trainer: "AdversarialTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            logger.info(describe(self.trainer.phases, args))

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self.trainer.game.pause is not None and self.trainer.likelihood.multiplier == 0:
            for group in optimizer.param_groups:
                group["lr"] = 0.0  # the schedule sets it anew after the step

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.game.guard.should_stop and not control.should_training_stop:
            logger.warning(
                "The game did not recover, so training stops here. The last reason: %s", self.trainer.game.pause
            )
            control.should_training_stop = True
            control.should_save = True


def describe(phases: Phases, args: AdversarialConfig) -> str:
    """The plan of a run in one line."""
    most = {True: "at most ", False: ""}
    return (
        f"{most[args.imitator_warmup_steps == 'auto']}{phases.imitator_warmup} steps of imitator warm-up, "
        f"{most[args.distinguisher_warmup_steps == 'auto']}{phases.distinguisher_warmup} of distinguisher warm-up, "
        f"{phases.game} of the game: {phases.total} steps in all."
    )
