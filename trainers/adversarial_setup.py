"""What [`AdversarialTrainer`] puts together before it trains."""

import contextlib
import copy
import logging
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback

from hf_imitate.checks import Check
from hf_imitate.classifier import default_peft_config
from hf_imitate.distinguisher import Distinguisher
from hf_imitate.distinguisher_ensemble import DistinguisherEnsemble
from hf_imitate.distinguisher_files import NGRAM
from hf_imitate.human_rows import ROW_COLUMN
from hf_imitate.ngram_distinguisher import NgramDistinguisher
from hf_imitate.rendering import Renderer, closing_id, end_token_ids
from hf_imitate.trainers.adversarial_config import AdversarialConfig
from hf_imitate.trainers.checkpoints import newest_complete_checkpoint
from hf_imitate.trainers.engines import Engine
from hf_imitate.trainers.phases import Phases

if TYPE_CHECKING:
    from hf_imitate.trainers.adversarial_trainer import AdversarialTrainer

logger = logging.getLogger(__name__)

GivenDistinguisher: TypeAlias = (
    str | PreTrainedModel | Distinguisher | list[str | PreTrainedModel | Distinguisher | None] | None
)


def with_row_numbers(dataset: Dataset) -> Dataset:
    """The data set with its row numbers in a column of our own: answers are held out by row, not by content."""
    return dataset.add_column(ROW_COLUMN, list(range(len(dataset))))


def settle_renderer(trainer: "AdversarialTrainer", role: str) -> Renderer:
    """The renderer of both sides, and a generation that stops wherever an answer can end.

    What the chat template closes a turn with ends an answer, too, where neither tokenizer nor model list it: a base
    model's end token is rarely the one of its template.

    Args:
        trainer ([`AdversarialTrainer`]): with its model and tokenizer loaded.
        role (`str`): whose turn the answers are.

    Raises:
        ValueError: nothing ends an answer.
    """
    tokenizer, kwargs = trainer._tokenizer, trainer.chat_template_kwargs
    ends = end_token_ids(tokenizer, trainer.model.generation_config)
    # vLLM stops at the ends that it finds in the model's own files.
    if not (isinstance(trainer.train_dataset[0]["prompt"], str) or trainer.use_vllm):
        roles = ("assistant", "user") if role == "alternating" else (role,)
        closing = [closing_id(tokenizer, one, kwargs) for one in roles]
        ends += [token for token in dict.fromkeys(closing) if token is not None and token not in ends]
    renderer = Renderer(tokenizer, ends, trainer.max_completion_length, kwargs, role)
    trainer.eos_token_ids = ends
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])
        trainer.model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        trainer.model.generation_config.pad_token_id = tokenizer.pad_token_id
    if not trainer.use_vllm:
        _generate_with(trainer, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
        if trainer.accelerator.device.type != "cpu":
            draw_despite_nans(trainer)
    return renderer


def draw_despite_nans(trainer: "AdversarialTrainer") -> None:
    """A diverged model's NaNs would end in an error about probabilities, on an accelerator in the process's end; so
    the loss meets them, and says whose. It costs a few passes over the scores of every token."""
    _generate_with(trainer, remove_invalid_values=True)


def _generate_with(trainer: "AdversarialTrainer", **law: Any) -> None:
    trainer.generation_kwargs.update(law)
    trainer.generation_config.update(**law)


def build_distinguisher(
    given: GivenDistinguisher,
    imitator: PreTrainedModel | PeftModel,
    renderer: Renderer,
    args: AdversarialConfig,
    checks: Sequence[Check],
    peft_config: PeftConfig | None,
    distinguisher_peft_config: PeftConfig | None,
    engine: Engine,
) -> Distinguisher:
    """The distinguisher the user asked for, by default on the imitator's own base where the engine allows it; it reads
    as `renderer` does."""
    if isinstance(given, list) and len(given) == 1:
        (given,) = given
    common = (imitator, renderer, args)
    configs = (peft_config, distinguisher_peft_config, engine)
    with engine.loading_whole():
        if not isinstance(given, list):
            return _build_one(given, *common, checks, *configs)
        # What checks say is said once, by the ensemble.
        ensemble = DistinguisherEnsemble([_build_one(one, *common, None, *configs) for one in given])
    ensemble.set_checks(checks)
    return ensemble


def _build_one(
    given: str | PreTrainedModel | Distinguisher | None,
    imitator: PreTrainedModel | PeftModel,
    renderer: Renderer,
    args: AdversarialConfig,
    checks: Sequence[Check] | None,
    peft_config: PeftConfig | None,
    distinguisher_peft_config: PeftConfig | None,
    engine: Engine,
) -> Distinguisher:
    tokenizer = renderer.tokenizer
    common = {
        "checks": checks or (),
        "max_answer_tokens": args.max_completion_length,
        "chat_template_kwargs": args.chat_template_kwargs,
        "completion_role": renderer.completion_role,
    }
    if isinstance(given, Distinguisher):
        if checks is not None:
            given.set_checks(checks)
        given.speak_as(renderer.completion_role)
        return given
    if isinstance(given, str) and given == NGRAM:
        return NgramDistinguisher(tokenizer, renderer.end_token_ids, **common)
    own = imitator.peft_config["default"] if isinstance(imitator, PeftModel) else None
    keeps_lm: dict[str, Any] = {"keep_language_model": args.distinguisher_lm_warmup_steps != 0}
    if given is not None:
        config = copy.deepcopy(distinguisher_peft_config or peft_config or own)
        if config is not None and config.is_prompt_learning and distinguisher_peft_config is None:
            config = default_peft_config()
        if config is not None:
            config.base_model_name_or_path = config.revision = None  # those of the imitator's base
        if isinstance(given, PreTrainedModel):
            return _from_model(given, tokenizer, config, common, args.seed, **keeps_lm)
        return Distinguisher.from_causal_lm(given, peft_config=config, seed=args.seed, **keeps_lm, **common)
    common["end_ids"] = renderer.end_token_ids
    config = distinguisher_peft_config or own
    if isinstance(imitator, PeftModel) and isinstance(config, LoraConfig) and engine.why_not_shared is None:
        # The global random state differs between processes by TRL's design, and has to go on doing so.
        with preserved_random_state():
            torch.manual_seed(args.seed)
            return Distinguisher.on_shared_base(imitator, tokenizer, config, **common)
    if not isinstance(config, LoraConfig):
        config = distinguisher_peft_config or default_peft_config()
    # A copy of the imitator's own base is fitted first only where that was asked for.
    keeps_lm["keep_language_model"] = args.distinguisher_lm_warmup_steps not in ("auto", 0)
    copied = Distinguisher.from_causal_lm(
        engine.whole_base(imitator), tokenizer, peft_config=config, seed=args.seed, **keeps_lm, **common
    )
    logger.warning(engine.describe_copy("distinguisher", copied.model))
    return copied


def _from_model(model, tokenizer, config, common, seed, keep_language_model) -> Distinguisher:
    size = model.get_input_embeddings().num_embeddings
    if size < len(tokenizer):
        raise ValueError(
            f"The distinguisher's model knows {size} tokens, the imitator's tokenizer {len(tokenizer)}. Give "
            "`distinguisher` as a repo id or path, or as `Distinguisher(model, its_tokenizer)`."
        )
    if type(model).__name__.endswith("ForSequenceClassification"):
        return Distinguisher(model, tokenizer, **common)
    common = {**common, "keep_language_model": keep_language_model}
    return Distinguisher.from_causal_lm(model, tokenizer, peft_config=config, seed=seed, **common)


def lm_warmup_steps(args: AdversarialConfig, distinguisher: Distinguisher) -> int | str:
    """Likelihood steps of the distinguisher's body: as set, and for "auto" 0 where there is nothing to fit.

    Raises:
        ValueError: steps were asked for, and the body has no language model's head.
    """
    if distinguisher.bodies:
        return args.distinguisher_lm_warmup_steps
    if args.distinguisher_lm_warmup_steps not in ("auto", 0):
        raise ValueError(
            f"`distinguisher_lm_warmup_steps` is {args.distinguisher_lm_warmup_steps}, and this distinguisher has no "
            "body of its own with a language model's head to fit by likelihood. Pass a causal LM or its repo id as "
            "`distinguisher`, or set 0."
        )
    return 0


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

    def on_train_end(self, args, state, control, **kwargs):
        if args.freeze_imitator:
            self.trainer.keep_the_best()

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
    body = most[args.distinguisher_lm_warmup_steps == "auto"] + str(phases.distinguisher_lm_warmup)
    body = f"{body} of likelihood for the distinguisher's body, " if phases.distinguisher_lm_warmup else ""
    return (
        f"{most[args.imitator_warmup_steps == 'auto']}{phases.imitator_warmup} steps of imitator warm-up, {body}"
        f"{most[args.distinguisher_warmup_steps == 'auto']}{phases.distinguisher_warmup} of distinguisher warm-up, "
        f"{phases.game} of the game: {phases.total} steps in all."
    )
