"""Judges by name: the ones that come with the package, and users' own."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from peft import PeftModel

from hf_imitate.audits.evidence import Evidence, score_foils
from hf_imitate.audits.evidence_cache import EvidenceCache
from hf_imitate.audits.feature_judges import (
    AnswerKey,
    answer_key,
    likelihood_features,
    likelihood_judge,
    surface_judge,
)
from hf_imitate.audits.judges import Judge, lora_judge, ngram_judge
from hf_imitate.audits.resampled_law import ResampledLaw
from hf_imitate.checks import Check, check_name
from hf_imitate.imitator import Imitator
from hf_imitate.processed_law import ProcessedLaw
from hf_imitate.rendering import Answer

DEFAULT_JUDGES = ("surface", "ngram", "likelihood")


def named_judges(judges: "Sequence[str | Judge] | None") -> dict[str, "str | Judge"]:
    """Judges by the name their findings carry.

    Raises:
        TypeError, ValueError: an unknown or repeated name, a callable without a name of its own, or no judge at all.
    """
    if isinstance(judges, str):
        raise TypeError(f"`judges` is one string; give a list, `[{judges!r}]`.")
    named: dict[str, str | Judge] = {}
    for judge in DEFAULT_JUDGES if judges is None else judges:
        if isinstance(judge, str):
            if judge not in (*DEFAULT_JUDGES, "lora") and not judge.startswith("lora:"):
                raise ValueError(
                    f"There is no judge {judge!r}; known are {[*DEFAULT_JUDGES, 'lora', 'lora:<repo or path>']}, and "
                    "callables of your own."
                )
            name = "lora" if judge.startswith("lora:") else judge
        elif callable(judge):
            name = check_name(cast(Check, judge))  # the same rule for names
        else:
            raise TypeError(f"A judge is a name or a callable; got {type(judge).__name__}.")
        if name in named:
            raise ValueError(f"Two judges are called {name!r}; the findings need different names.")
        named[name] = judge
    if not named:
        raise ValueError("`judges` is empty; leave it out for the default ones, or name at least one.")
    return named


def make_judge(
    judge: "str | Judge",
    imitator: Imitator,
    base: Any,
    evidence: Evidence,
    foils: list[Answer] | None,
    law: ProcessedLaw,
    cache: EvidenceCache,
    resampled: ResampledLaw | None = None,
) -> Judge:
    """The judge that a name means for this audit; "likelihood" gets the scores of all answers it will be shown, under
    the law that is audited."""
    if callable(judge):
        return judge
    if judge in ("surface", "ngram"):
        return {"surface": surface_judge, "ngram": ngram_judge}[judge]
    if judge == "likelihood":
        sides = [(evidence.human_answers, evidence.human), (evidence.imitator_answers, evidence.imitator)]
        if foils is not None:
            sides.append((foils, score_foils(imitator, evidence, foils, law, cache, resampled)))
        features: dict[AnswerKey, np.ndarray] = {}
        for answers, scores in sides:
            for prompt, answer, row in zip(evidence.prompts, answers, likelihood_features(scores), strict=True):
                features.setdefault(answer_key(prompt, answer), row)
        return likelihood_judge(features)
    body = judge.removeprefix("lora").removeprefix(":") or (base if isinstance(base, str) else None)
    if body is not None:
        return lora_judge(body)
    if isinstance(imitator.model, PeftModel):
        return lora_judge(imitator.model.get_base_model().config._name_or_path)
    return lora_judge(imitator.model, imitator.tokenizer)
