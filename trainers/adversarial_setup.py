"""What [`AdversarialTrainer`] puts together before it trains."""

import contextlib
import copy
import logging
import os
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, Value
from peft import LoraConfig, PeftConfig, PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback

from hf_imitate.checks import Check
from hf_imitate.classifier import default_peft_config
from hf_imitate.distinguisher import ADAPTER_NAME, Distinguisher
from hf_imitate.human_rows import ROW_COLUMN, HumanRows
from hf_imitate.rows import check_columns, completion_role
from hf_imitate.trainers.adversarial_config import LOWEST_BITS, AdversarialConfig
from hf_imitate.trainers.checkpoints import newest_complete_checkpoint
from hf_imitate.trainers.phases import Phases

if TYPE_CHECKING:
    from hf_imitate.trainers.adversarial_trainer import AdversarialTrainer

logger = logging.getLogger(__name__)

DISTINGUISHER_REWARD = "distinguisher"
# Ours, and those that TRL passes to rewards by these names or reads images from.
RESERVED_COLUMNS = {
    *(ROW_COLUMN, "prompts", "completions", "completion_ids", "image", "images"),
    *("trainer_state", "log_extra", "log_metric", "environments"),
}


def check_data(train_dataset: Any, eval_dataset: Any, args: AdversarialConfig) -> None:
    """Check every row before a model loads.

    Raises:
        TypeError, ValueError: rows, columns or their number do not do; the message names them and the cure.
    """
    num_labelled = check_columns(train_dataset, allow_unlabelled=args.allow_unlabelled)
    for key, dataset in (eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}).items():
        if dataset is not None:
            name = f"eval_dataset {key}".strip()
            check_columns(dataset, allow_unlabelled=True, name=name)
            _check_names_and_roles(dataset, name)
    _check_names_and_roles(train_dataset, "train_dataset")
    if round(args.heldout_fraction * num_labelled) == num_labelled:
        raise ValueError(
            f"`heldout_fraction`={args.heldout_fraction} holds out all {num_labelled} answered rows. Lower it, or add "
            "rows."
        )
    questions = args.generation_batch_size // args.num_generations
    if len(train_dataset) < questions:
        raise ValueError(
            f"`train_dataset` has {len(train_dataset)} rows, and one generation batch asks {questions} different ones "
            f"(`generation_batch_size`={args.generation_batch_size} over `num_generations`={args.num_generations}). "
            "Bring more rows, lower `per_device_train_batch_size` or `steps_per_generation`, or raise "
            "`num_generations`."
        )


def check_best_metric(eval_dataset: Any, args: AdversarialConfig) -> None:
    """Check that the metric of the best checkpoint will be measured.

    Raises:
        ValueError: there are several evaluation sets, and none of them was chosen.
    """
    unnamed = (LOWEST_BITS, LOWEST_BITS.removeprefix("eval_"))
    if isinstance(eval_dataset, dict) and args.metric_for_best_model in unnamed:
        choices = [LOWEST_BITS.replace("eval_", f"eval_{name}_", 1) for name in eval_dataset]
        raise ValueError(
            f"`eval_dataset` holds {len(choices)} sets, and `metric_for_best_model` does not say which of them finds "
            f"the best checkpoint. Set it to one of {choices}."
        )


def _check_names_and_roles(dataset: Dataset, name: str) -> None:
    taken = sorted(RESERVED_COLUMNS & set(dataset.column_names))
    if taken:
        raise ValueError(
            f"`{name}` has columns that are reserved for the trainer: {taken}. Rename them with "
            "`dataset.rename_column(old, new)`."
        )
    if isinstance(dataset.features["completion"], Value):
        return
    rows = [i for i, answer in enumerate(dataset["completion"]) if completion_role(answer) == "user"]
    if rows:
        raise ValueError(
            f"`{name}` column `completion`: {len(rows)} of {len(dataset)} rows (the first is row {rows[0]}) have the "
            "role 'user'. GRPO's rollouts open the assistant's turn, so an imitated user would be sampled under "
            "another header than the human's answer is scored under. Give the human's answers the role 'assistant' "
            "(swap the roles of the whole conversation)."
        )


def check_rewards(reward_funcs: Sequence[Any], weights: Sequence[float] | None) -> None:
    """Check the user's own rewards and their weights.

    Raises:
        ValueError: a name is the distinguisher's, or the weights are not one for each.
    """
    for func in reward_funcs:
        name = func.split("/")[-1] if isinstance(func, str) else getattr(func, "__name__", "")
        if name == DISTINGUISHER_REWARD:
            raise ValueError(
                f"A reward in `reward_funcs` is called '{DISTINGUISHER_REWARD}', the name of the reward this trainer "
                "adds itself. Rename it; a Distinguisher of your own goes to the argument `distinguisher`."
            )
    if weights is not None and len(weights) != len(reward_funcs):
        raise ValueError(
            f"`reward_weights` has {len(weights)} values for {len(reward_funcs)} functions in `reward_funcs`. Give "
            "one weight for each of them; the distinguisher's own reward is not among them and always has weight 1."
        )


def check_model(model: Any) -> None:
    """Check the imitator's model before anything is loaded or changed.

    Raises:
        ValueError: a path holds an adapter; an adapter could not be trained, saved or told from the distinguisher's.
    """
    if isinstance(model, str) and os.path.isfile(os.path.join(model, "adapter_config.json")):
        raise ValueError(
            f"`model` {model!r} is a folder with an adapter, perhaps an imitator trained before. To go on training "
            "it, pass `AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=True)` and no `peft_config`."
        )
    if not isinstance(model, PeftModel):
        return
    adapters = list(model.peft_config)
    if model.active_adapter != "default":
        raise ValueError(
            f"The PeftModel's active adapter is {model.active_adapter!r}; the imitator is saved from the one called "
            "'default'. Load it under that name, `PeftModel.from_pretrained(base, path, is_trainable=True)`."
        )
    if ADAPTER_NAME in adapters:
        raise ValueError(
            f"The PeftModel already carries an adapter '{ADAPTER_NAME}', perhaps of an earlier run. Remove it by "
            f"`model.delete_adapter('{ADAPTER_NAME}')`, or go on with that run by "
            "`trainer.train(resume_from_checkpoint=True)`."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"No parameter of the PeftModel (adapters {adapters}) is trainable. Load the adapter with "
            "`PeftModel.from_pretrained(base, path, is_trainable=True)`."
        )


def with_row_numbers(dataset: Dataset) -> Dataset:
    """The data set with its row numbers in a column of our own: answers are held out by row, not by content."""
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
            f"{max(lengths.values())} tokens; with `max_completion_length`={args.max_completion_length} they exceed "
            f"the model's {limit} positions. Shorten these questions or lower `max_completion_length`."
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
    if len(human_rows.heldout) == 0 and "auto" in (args.imitator_warmup_steps, args.distinguisher_warmup_steps):
        logger.warning(
            "No human answers are held out (`heldout_fraction`=%g of %d), so an 'auto' warm-up cannot tell when it "
            "stops helping and takes its most steps.",
            args.heldout_fraction,
            total,
        )
    num_repeated = human_rows.num_repeated_heldout
    if num_repeated:
        logger.warning(
            "%d of %d held-out answers also stand, with the same question, in rows that are trained on: held-out "
            "numbers are not free of memory.",
            num_repeated,
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
    own = imitator.peft_config["default"] if isinstance(imitator, PeftModel) else None
    if given is not None:
        config = copy.deepcopy(distinguisher_peft_config or peft_config or own)
        if config is not None:
            config.base_model_name_or_path = config.revision = None  # those of the imitator's base
        if isinstance(given, PreTrainedModel):
            return _from_model(given, tokenizer, config, common, args.seed)
        return Distinguisher.from_causal_lm(given, peft_config=config, seed=args.seed, **common)
    if isinstance(imitator, PeftModel):
        config = distinguisher_peft_config or own
        if isinstance(config, LoraConfig):
            # The global random state differs between processes by TRL's design, and has to go on doing so.
            with preserved_random_state():
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
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def set_learning_rates(scheduler: LambdaLR, rates: Sequence[float]) -> None:
    """Set the optimizer's rates for the step at hand, also where they are read for the log; the next follows the
    schedule."""
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = list(rates)


def scheduled_rates(scheduler: LambdaLR, step: int) -> list[float]:
    """The rates of `step`, where the schedule changed after it was last asked."""
    return [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]


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

    def on_pre_optimizer_step(self, args, state, control, lr_scheduler=None, **kwargs):
        if self.trainer.game.pause is not None and self.trainer.likelihood.multiplier == 0:
            set_learning_rates(lr_scheduler, [0.0] * len(lr_scheduler.base_lrs))

    def on_step_end(self, args, state, control, **kwargs):
        game = self.trainer.game
        if game.pause is None:
            game.paused_since = None
            return
        if game.paused_since is None:
            game.paused_since = state.global_step - 1
        if game.guard.should_stop and not control.should_training_stop:
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning(farewell(game.pause, game.paused_since, args.output_dir))


def farewell(reason: str, paused_since: int, output_dir: str) -> str:
    """Why training stops, and where to go on from."""
    checkpoint = newest_complete_checkpoint(output_dir, paused_since)
    where = (
        f"The newest complete checkpoint from before the pause is {checkpoint}."
        if checkpoint
        else "There is no complete checkpoint from before the pause; `save_steps` makes more of them."
    )
    return f"The game did not recover since step {paused_since}, so training stops. {where} The last reason: {reason}"


def describe(phases: Phases, args: AdversarialConfig) -> str:
    """The plan of a run in one line."""
    most = {True: "at most ", False: ""}
    return (
        f"{most[args.imitator_warmup_steps == 'auto']}{phases.imitator_warmup} steps of imitator warm-up, "
        f"{most[args.distinguisher_warmup_steps == 'auto']}{phases.distinguisher_warmup} of distinguisher warm-up, "
        f"{phases.game} of the game: {phases.total} steps in all."
    )
