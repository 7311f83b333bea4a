"""What [`AdversarialTrainer`] asks of rows, models, checks and losses, each with the cure in its error.

No message holds a row's text: columns, row numbers and counts only.
"""

import itertools
import logging
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from hf_imitate.checks import Check, check_outcomes
from hf_imitate.distinguisher import Distinguisher
from hf_imitate.human_rows import ROW_COLUMN, HumanRows, question_lengths
from hf_imitate.ngram_distinguisher import NgramDistinguisher
from hf_imitate.rendering import Renderer, canonical_text
from hf_imitate.rows import check_columns
from hf_imitate.scoring import num_positions
from hf_imitate.trainers.adversarial_config import LOWEST_BITS, AdversarialConfig
from hf_imitate.trainers.roles import check_roles, completion_role

logger = logging.getLogger(__name__)

NUM_TRIED = 4  # human answers that a check is tried on
# Ours, and those that TRL passes to rewards by these names or reads images from.
RESERVED_COLUMNS = {
    *(ROW_COLUMN, "prompts", "completions", "completion_ids", "image", "images"),
    *("trainer_state", "log_extra", "log_metric", "environments"),
}


def check_data(train_dataset: Any, eval_dataset: Any, args: AdversarialConfig) -> str:
    """Check every row before a model loads.

    Returns:
        `str`: whose turn the answers are, `"assistant"`, `"user"` or `"alternating"`; plain text has the first.

    Raises:
        TypeError, ValueError: rows, columns or their number do not do; the message names them and the cure.
    """
    num_labelled = check_columns(train_dataset, allow_unlabelled=args.allow_unlabelled)
    _check_names(train_dataset, "train_dataset")
    role = completion_role(train_dataset)
    check_evaluation(eval_dataset, role)
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
    return role


def check_evaluation(eval_dataset: Any, role: str) -> None:
    """Check the rows of one or several evaluation sets, whose answers have to be of the trained role.

    Raises:
        TypeError, ValueError: as [`check_data`].
    """
    for name, dataset in named_sets(None, eval_dataset).items():
        check_columns(dataset, allow_unlabelled=True, name=name)
        _check_names(dataset, name)
        check_roles(dataset, name, role)


def named_sets(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """Every data set that was given, by the name that errors call it."""
    evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    given = {"train_dataset": train_dataset} | {f"eval_dataset {key}".strip(): d for key, d in evaluated.items()}
    return {name: dataset for name, dataset in given.items() if dataset is not None}


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


def _check_names(dataset: Dataset, name: str) -> None:
    taken = sorted(RESERVED_COLUMNS & set(dataset.column_names))
    if taken:
        raise ValueError(
            f"`{name}` has columns that are reserved for the trainer: {taken}. Rename them with "
            "`dataset.rename_column(old, new)`."
        )


def try_checks(checks: Sequence[Check], dataset: Dataset) -> None:
    """Ask every check about a few human answers, so that one that cannot work fails before a model loads.

    Raises:
        RuntimeError, TypeError, ValueError: as [`~hf_imitate.checks.check_outcomes`].
    """
    if not checks:
        return
    rows = list(itertools.islice((row for row in dataset if row["completion"] is not None), NUM_TRIED))
    answers = [row["completion"] for row in rows]
    shown = [
        canonical_text(answer)
        if isinstance(answer, str)
        else [{"role": answer[0]["role"], "content": canonical_text(answer[0]["content"])}]
        for answer in answers
    ]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
    check_outcomes(checks, [row["prompt"] for row in rows], shown, **columns)


def check_frozen(args: AdversarialConfig, reward_funcs: Sequence[Any], optimizers: tuple[Any, Any]) -> None:
    """Check that nothing was given that only an imitator that learns could use.

    Raises:
        ValueError: `freeze_imitator` is set, and so are rewards or an optimizer of the user's own.
    """
    if args.freeze_imitator and (reward_funcs or optimizers != (None, None)):
        name = "reward_funcs" if reward_funcs else "optimizers"
        raise ValueError(
            f"`{name}` is given, and `freeze_imitator=True` keeps the imitator as it is: nobody is paid, and no "
            f"optimizer moves it. Leave out `{name}`, or set `freeze_imitator=False`."
        )


def check_distinguisher(given: Any) -> None:
    """Check a list of distinguishers before anything is loaded.

    Raises:
        ValueError: it is empty, or holds one distinguisher twice.
    """
    if not isinstance(given, list):
        return
    twice = [one for i, one in enumerate(given) if any(one is other or _is_same(one, other) for other in given[:i])]
    if not given or twice:
        found = "is empty" if not given else f"has {_name(twice[0])} twice, which sees nothing more than one of them"
        raise ValueError(
            f"The list `distinguisher` {found}. Give different ones, such as ['ngram', a larger model]; `None` is the "
            "adapter beside the imitator's."
        )


def _name(distinguisher: Any) -> str:
    return repr(distinguisher) if isinstance(distinguisher, str | None) else f"one {type(distinguisher).__name__}"


def _is_same(one: Any, other: Any) -> bool:
    return isinstance(one, str) and isinstance(other, str) and one == other


def check_read_lengths(
    distinguisher: Distinguisher,
    datasets: dict[str, Dataset],
    tokenizer: Any,
    model: PreTrainedModel | PeftModel,
    args: AdversarialConfig,
) -> None:
    """Refuse questions that a distinguisher with a model of its own cannot read with an answer.

    Args:
        distinguisher: one, or several whose logits add.
        datasets: all rows by the name of their argument.
        tokenizer, model: the imitator's, whose lengths [`check_lengths`] looks at.
        args: settings.

    Raises:
        ValueError: question and longest answer together exceed the positions of a distinguisher's model.
    """
    known = num_positions(model)
    for one in getattr(distinguisher, "members", [distinguisher]):
        limit = None if isinstance(one, NgramDistinguisher) else num_positions(one.model)
        if limit is None or (one.tokenizer is tokenizer and known is not None and known <= limit):
            continue
        longest = min(one.renderer.max_answer_tokens or args.max_completion_length, args.max_completion_length)
        for name, dataset in datasets.items():
            lengths = question_lengths(dataset, one.renderer)
            too_long = [i for i, length in lengths.items() if length + longest > limit]
            if too_long:
                raise ValueError(
                    f"{len(too_long)} of {len(lengths)} questions (`{name}` column 'prompt', rows {too_long[:5]}) "
                    f"have up to {max(lengths.values())} tokens; with an answer of {longest} they exceed the "
                    f"distinguisher's {limit} positions. Give a `distinguisher` that reads more, or shorten these."
                )


def check_lengths(
    human_rows: HumanRows,
    datasets: dict[str, Dataset],
    renderer: Renderer,
    model: PreTrainedModel | PeftModel,
    args: AdversarialConfig,
) -> None:
    """Count what the length limit cuts, and refuse questions that leave no room for an answer.

    Args:
        human_rows: the answered training rows, rendered.
        datasets: all rows by the name of their argument; `train_dataset` among them.
        renderer: renders the others' questions.
        model: whose positions are limited.
        args: settings.

    Raises:
        ValueError: question and longest answer together exceed the model's positions, or a question has no tokens.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, dataset in datasets.items():
        known = {i: len(row.rendered.prompt_ids) for i, row in human_rows.rows.items()}
        lengths = question_lengths(dataset, renderer, known if name == "train_dataset" else {})
        empty = [i for i, length in lengths.items() if length == 0]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(lengths)} questions (`{name}` column 'prompt', rows {empty[:5]}) have no "
                "tokens, and a causal LM needs one before an answer. Leave them out."
            )
        too_long = [i for i, length in lengths.items() if limit and length + args.max_completion_length > limit]
        if too_long:
            raise ValueError(
                f"{len(too_long)} of {len(lengths)} questions (`{name}` column 'prompt', rows {too_long[:5]}) have up "
                f"to {max(lengths.values())} tokens; with `max_completion_length`={args.max_completion_length} they "
                f"exceed the model's {limit} positions. Shorten these questions or lower `max_completion_length`."
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
