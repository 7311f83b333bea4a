"""`hf_imitate.audit`: every claim about an imitator as a number with a confidence."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from hf_imitate.audits.answers import audit_answers
from hf_imitate.audits.audit_files import write_audit
from hf_imitate.audits.audit_plan import make_plan
from hf_imitate.audits.audit_settings import check_audit_settings, check_is_model, check_known, check_numbers
from hf_imitate.audits.checks import audit_checks
from hf_imitate.audits.consistency import audit_consistency
from hf_imitate.audits.copying import audit_copying
from hf_imitate.audits.evidence import Evidence, check_dataset, check_room, collect_evidence, draw_foils
from hf_imitate.audits.evidence_cache import EvidenceCache, write_text
from hf_imitate.audits.hidden_deviation import audit_hidden_deviation
from hf_imitate.audits.judge_family import JudgeFamily, audit_distinguishability
from hf_imitate.audits.judges import Judge
from hf_imitate.audits.named_judges import make_judge, named_judges
from hf_imitate.audits.report import AuditReport, Finding
from hf_imitate.audits.resampled_law import ResampledLaw, resampled_law
from hf_imitate.audits.retrodiction import audit_retrodiction, paired_difference
from hf_imitate.audits.sampler import audit_sampler
from hf_imitate.audits.splits import QuestionSplit
from hf_imitate.checks import Check, check_names
from hf_imitate.imitator import Imitator
from hf_imitate.processed_law import ProcessedLaw
from hf_imitate.rendering import Answer
from hf_imitate.residual_imitator import DEFAULT_NUM_ESTIMATES_RESAMPLED

FOIL_TEMPERATURE = 0.7
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left"


def audit(
    model: "str | PreTrainedModel | PeftModel | Imitator",
    dataset: Dataset,
    train_dataset: Dataset | None = None,
    base: "str | PreTrainedModel | PeftModel | Imitator | None" = None,
    checks: Sequence[Check] | None = None,
    judges: "Sequence[str | Judge] | None" = None,
    resample: int = 1,
    generation_config: GenerationConfig | dict[str, Any] | None = None,
    by: str | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    output_dir: str | Path | None = "audit",
    *,
    against: "str | PreTrainedModel | PeftModel | Imitator | None" = None,
    human_entropy: str | float | None = None,
    max_answer_bytes: int | None = None,
    num_estimates: int = DEFAULT_NUM_ESTIMATES_RESAMPLED,
    batch_size: int = 64,
    progress: bool = True,
) -> AuditReport:
    """Audit any causal LM against what people wrote, whoever trained it.

    A plan (settings, seeds, judges, split, levels, hashes) is fixed and hashed before any answer is read. The imitator
    answers every question once per row, and every finding is a function of both sides' answers and their scores. What
    fails is "not measured" and names the kind of error; the rest goes on. Killed and started again with the same
    arguments and `output_dir`, it goes on where it was.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or [`Imitator`]):
            Hub repo id, folder, or loaded model; a loaded one's tokenizer is found by its name.
        dataset (`datasets.Dataset`):
            Held-out rows: `prompt`, `completion`, and optionally `weight`, `choices` and other columns for the checks.
        train_dataset (`datasets.Dataset`, *optional*):
            What it was trained on; its questions must be others. Needed for `copying`.
        base (*optional*):
            Whose answers the power control plants; defaults to the imitator's own at temperature 0.7.
        checks (`Sequence[Callable]`, *optional*):
            Pass or fail an answer; as in the trainers.
        judges (`Sequence[str | Callable]`, *optional*):
            "surface", "ngram", "likelihood", "lora", "lora:<repo or path>", or callables
            `judge(train_pairs, valid_pairs, seed) -> scorer(prompts, answers) -> scores`. Defaults to the first three.
        resample (`int`, *optional*, defaults to 1):
            K: every finding is about the law of "draw K answers, keep one with probability softmax of the
            distinguisher's logits", [`~hf_imitate.residual`]; the checks it was trained with must be among `checks`.
            Log-probabilities are then estimates. `against` and `base` answer by single draws.
        generation_config ([`~transformers.GenerationConfig`] or `dict`, *optional*):
            The decoding that is sampled *and* scored, see [`~hf_imitate.processed_law.ProcessedLaw`], and
            `max_new_tokens`. `None`: temperature 1, untruncated.
        by (`str`, *optional*):
            A column; the distribution of answers is also compared within each of its values.
        confidence (`float`, *optional*, defaults to 0.95):
            Of all certified findings together, and of each other interval on its own.
        seed (`int`, *optional*, defaults to 0):
            Of every draw, split and control.
        output_dir (`str` or `Path`, *optional*, defaults to `"audit"`):
            Gets `audit.json`, `audit.md`, `plan.json`, figures, `scores.parquet` (numbers per question, to be kept
            local) and the folder `cache` (the imitator's answers, to be kept local). `None` writes nothing.
        against (*optional*):
            Another imitator, of the same answers: adds `bits_per_answer_difference`, below 0 where `model` is better.
        human_entropy (`str` or `float`, *optional*):
            What is known of the humans beforehand, and makes their loss an absolute statement: `"unique"` where each
            question has one right answer that every human gives, or the least mean entropy of their answers, nats.
        max_answer_bytes (`int`, *optional*):
            Longest answer of the population, fixed beforehand. The smaller, the sharper the certified bounds on log p.
        num_estimates (`int`, *optional*, defaults to 8):
            Sets of K - 1 candidates that a row's log-probabilities rest on: the larger part of what `resample` costs.
        batch_size (`int`, *optional*, defaults to 64):
            Most answers at once.
        progress (`bool`, *optional*, defaults to `True`):
            Show a bar with the time left.

    Returns:
        [`AuditReport`].

    Raises:
        FileNotFoundError: `resample` is not 1, and the imitator came without a distinguisher; nothing was written.
        TypeError, ValueError: the rows or settings cannot be audited; nothing was written.

    Example:

    ```python
    report = audit("me/me-imitator", dataset["test"], train_dataset=dataset["train"])
    print(report.to_markdown())
    ```
    """
    notes = check_dataset(dataset, train_dataset)
    law = check_audit_settings(dataset, checks, generation_config, by, confidence)
    check_numbers({"resample": resample, "num_estimates": num_estimates, "batch_size": batch_size, "seed": seed})
    check_known(human_entropy, max_answer_bytes)
    for name, other in (("model", model), ("base", base), ("against", against)):
        if other is not None or name == "model":
            check_is_model(other, name)
    named = named_judges(judges)
    imitator = load_imitator(model)
    if resample != 1:
        imitator.distinguisher  # noqa: B018  loaded once, before a copy with another limit would load it again
    imitator = _limited(imitator, generation_config)
    check_room(imitator, dataset)
    resampled = resampled_law(imitator, law, int(resample), checks, num_estimates)
    plan = make_plan(
        imitator,
        model,
        dataset,
        train_dataset,
        base=base,
        against=against,
        checks=check_names(checks or ()),
        judges=named,
        law=law,
        by=by,
        known={"human_entropy": human_entropy, "max_answer_bytes": max_answer_bytes},
        confidence=confidence,
        seed=seed,
        resampled=resampled,
    )
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "plan.json", plan.text)
    cache = EvidenceCache(None if folder is None else folder / "cache" / plan.hash[:16])
    errors = plan.ledger["certified"]
    parts = _parts((imitator, resampled), checks, by, (human_entropy, max_answer_bytes), confidence, errors)
    with tqdm(
        total=len(dataset) * (3 + 3 * len(named) + len(parts)), desc="auditing", disable=not progress, bar_format=_BAR
    ) as bar:
        began = time.process_time()
        evidence = collect_evidence(
            imitator,
            dataset,
            law=law,
            train_dataset=train_dataset,
            confidence=confidence,
            seed=seed,
            batch_size=batch_size,
            cache=cache,
            notes=notes,
            advance=bar.update,
            resampled=resampled,
        )
        collected = time.process_time() - began
        family = _judge(
            (imitator, base, evidence, law, plan.split, resampled),
            named,
            (confidence, 1 - errors.get("tv_lower", 1 - confidence), seed),
            cache,
            lambda name: bar.update(len(dataset)),
        )
        findings, cost = [*family.findings], dict(family.seconds)
        for name, unit, compute in parts:
            found, seconds = _guarded(name, unit, functools.partial(compute, evidence))
            findings += found
            cost |= {f.name: seconds for f in found}
            bar.update(len(dataset))
    if against is not None:
        name = "bits_per_answer_difference"
        found, cost[name] = _guarded(name, "bits", lambda: _compare(against, imitator, evidence, dataset, law, cache))
        findings += found
    found, cost["consistency"] = _guarded("consistency", "count", lambda: audit_consistency(findings))
    findings += found
    candidates = "" if resampled is None else resampled.describe_cost(len(evidence.prompts))
    report = AuditReport(
        findings=tuple(findings),
        model=plan.values["model"],
        revision=plan.values["revision"],
        dataset=plan.values["dataset"],
        plan_hash=plan.hash,
        seed=seed,
        ledger={**plan.ledger, "judges": family.p_values},
        num_questions=len(evidence.first_of_question),
        decoding=plan.values["decoding"],
        notes=(*evidence.notes, f"Drawing and scoring all answers took {collected:.0f} CPU seconds.{candidates}"),
        cost={name: round(seconds, 3) for name, seconds in cost.items()},
    )
    if folder is not None:
        write_audit(folder, report, evidence, family, plan.split)
    return report


def load_imitator(model: "str | PreTrainedModel | PeftModel | Imitator") -> Imitator:
    """The imitator that a user means.

    Raises:
        TypeError: `model` is none of the four kinds.
        ValueError: a loaded model does not say where its tokenizer is.
    """
    if isinstance(model, Imitator):
        return model
    if isinstance(model, str | Path):
        return Imitator.from_pretrained(model)
    check_is_model(model, "model")
    name = getattr(model.config, "_name_or_path", "")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False) if name else None
    except (OSError, ValueError):
        tokenizer = None
    if tokenizer is None:
        raise ValueError(
            "The model does not say where its tokenizer is. Pass `Imitator(model, tokenizer)`, or save both in one "
            "folder and pass its path."
        )
    return Imitator(model, tokenizer)


def _limited(imitator: Imitator, generation_config: GenerationConfig | dict[str, Any] | None) -> Imitator:
    """The imitator with the length limit of the audited decoding; the given object stays as it is."""
    given = generation_config if isinstance(generation_config, dict) else vars(generation_config or object).copy()
    limit = given.get("max_new_tokens")
    if limit is None or limit == imitator.max_new_tokens:
        return imitator
    other = object.__new__(Imitator)
    other.__dict__.update(imitator.__dict__, max_new_tokens=int(limit))
    return other


def _judge(
    data: "tuple[Imitator, Any, Evidence, ProcessedLaw, QuestionSplit, ResampledLaw | None]",
    named: Mapping[str, "str | Judge"],
    levels: tuple[float, float, int],
    cache: EvidenceCache,
    advance: Callable[[str], None],
) -> JudgeFamily:
    imitator, base, evidence, law, split, resampled = data
    confidence, certified_confidence, seed = levels
    foils: list[Answer] | None = None
    single = "" if resampled is None else "single draws of "
    who = f"{single}the imitator at temperature {FOIL_TEMPERATURE:g}" if base is None else "the base"
    try:
        other = imitator if base is None else load_imitator(base)
        foil_law = ProcessedLaw({"temperature": FOIL_TEMPERATURE} if base is None else None)
        foils = draw_foils(other, evidence, foil_law, cache=cache)
    except Exception as error:
        who = f"{who}, which raised {type(error).__name__}"
    data_of_judges = (imitator, base, evidence, foils, law, cache, resampled)
    judges = {name: make_judge(judge, *data_of_judges) for name, judge in named.items()}
    own = [name for name, judge in named.items() if callable(judge)]

    def cached(name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        # A user's callable may have changed under its old name, so its scores are not kept.
        is_own = any(name.endswith(f"-{judge}") for judge in own)
        return compute() if is_own else cache.arrays(f"judge-{name}", compute)

    return audit_distinguishability(
        evidence,
        judges,
        split,
        foil=foils,
        foil_name=who,
        confidence=confidence,
        certified_confidence=certified_confidence,
        seed=seed,
        cached=cached,
        advance=advance,
    )


def _parts(
    who: tuple[Imitator, ResampledLaw | None],
    checks: Sequence[Check] | None,
    by: str | None,
    known: tuple[str | float | None, int | None],
    confidence: float,
    errors: Mapping[str, float],
) -> list[tuple[str, str, Callable[[Evidence], list[Finding]]]]:
    """What else is audited: (name of the first finding, its unit, function of the evidence that gives all of them)."""

    def certified(name: str) -> float:
        return 1 - errors.get(name, 1 - confidence)

    levels = {name: certified(name) for name in ("check_tv_lower", "mean_log_prob_lower", "hidden_deviation")}
    role, (entropy, longest) = who[0].renderer.completion_role, known
    checked = [
        (
            *("check_pass", "probability"),
            lambda evidence: audit_checks(evidence, checks or (), confidence, levels["check_tv_lower"], role),
        )
    ]
    return [
        *(checked if checks else []),
        (
            *("bits_per_answer", "bits"),
            lambda evidence: audit_retrodiction(evidence, confidence, levels["mean_log_prob_lower"], longest),
        ),
        (
            *("hidden_deviation", "probability"),
            lambda evidence: audit_hidden_deviation(
                evidence, confidence, levels["hidden_deviation"], entropy, longest
            ),
        ),
        ("sampler_match", "probability", lambda evidence: _audit_sampler(*who, evidence, confidence)),
        ("answer_distribution_tv", "probability", lambda evidence: audit_answers(evidence, by, confidence)),
        ("copying", "probability", lambda evidence: audit_copying(evidence, confidence)),
    ]


def _audit_sampler(
    imitator: Imitator, resampled: ResampledLaw | None, evidence: Evidence, confidence: float
) -> list[Finding]:
    """Re-execution compares what was sampled, not its canonical spelling."""
    ended = [answer.ended for answer in evidence.imitator_answers]
    texts = evidence.sampled_texts or [answer.text for answer in evidence.imitator_answers]
    sampled = [Answer(*pair) for pair in zip(texts, ended, strict=True)]
    return audit_sampler(
        imitator,
        dataclasses.replace(evidence, imitator_answers=sampled),
        confidence,
        max_new_tokens=evidence.max_new_tokens,
        temperature=evidence.temperature or 1.0,
        resampled=resampled,
    )


def _compare(
    against: Any, imitator: Imitator, evidence: Evidence, dataset: Dataset, law: ProcessedLaw, cache: EvidenceCache
) -> list[Finding]:
    other = _limited(load_imitator(against), {"max_new_tokens": imitator.max_new_tokens})
    own = EvidenceCache(None if cache.folder is None else cache.folder / "against")
    return paired_difference(evidence, collect_evidence(other, dataset, law=law, seed=evidence.seed, cache=own))


def _guarded(name: str, unit: str, compute: Callable[[], list[Finding]]) -> tuple[list[Finding], float]:
    """Findings and their CPU seconds; an audit that raises gives one without value, and the others go on."""
    began = time.process_time()
    try:
        found = compute()
    except Exception as error:
        found = [Finding(name, None, unit, detail=f"Not measured: this audit raised {type(error).__name__}.")]
    return found, time.process_time() - began
