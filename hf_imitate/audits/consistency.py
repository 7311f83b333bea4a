"""Do the certified statements of one report fit together?"""

from collections.abc import Sequence

from hf_imitate.audits.report import Finding

_LOWER = ("tv_lower/", "check_tv_lower/")
_UPPER = "hidden_deviation"
_CAUSES = (
    "Likely causes: answers are not sampled from the law that is scored (other temperature, truncation, a processor; "
    "see `sampler_match`); the bounds speak of different questions (repeated ones only, cut answers left out); "
    "humans do not give one answer, or a pair's two humans were not independent; a judge saw its test questions; or "
    "chance, at most with the probabilities of error of the two bounds together."
)


def audit_consistency(findings: Sequence[Finding]) -> list[Finding]:
    """Count certified lower bounds on total variation that lie above a certified upper bound on it.

    Both can be true only with the probability of their errors, so a contradiction says that an assumption is wrong.

    Args:
        findings (`Sequence[Finding]`): a report's; those without value or certificate are passed over.

    Returns:
        `list[Finding]`: `consistency`, a count: 0 where all fit; `None` where there is nothing to compare.
    """
    certified = [finding for finding in findings if finding.certified and finding.value is not None]
    lower = [finding for finding in certified if finding.name.startswith(_LOWER)]
    upper = [finding for finding in certified if finding.name == _UPPER or finding.name.startswith(f"{_UPPER}/")]
    if not lower or not upper:
        missing = "lower" if not lower else "upper"
        reason = f"Not measured: the report holds no certified {missing} bound on total variation."
        return [Finding("consistency", None, "count", detail=reason)]
    pairs = [(below, above) for below in lower for above in upper if _value(below) > _value(above)]
    if not pairs:
        detail = f"All {len(lower)} certified lower bounds on total variation lie below the {len(upper)} upper ones."
        return [Finding("consistency", 0, "count", n=len(lower) * len(upper), detail=detail)]
    named = "; ".join(
        f"`{below.name}` >= {_value(below):.4g} and `{above.name}` <= {_value(above):.4g}" for below, above in pairs
    )
    detail = f"Contradictions: {named}. {_CAUSES}"
    return [Finding("consistency", len(pairs), "count", n=len(lower) * len(upper), detail=detail)]


def _value(finding: Finding) -> float:
    return 0.0 if finding.value is None else finding.value
