"""An audit's report in Markdown: what it says, in words a newcomer understands, then every number."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_imitate.audits.report import AuditReport, Finding

_TITLES = {
    "distinguishability": "Can anyone tell?",
    "checks": "Does it do what people always do?",
    "retrodiction": "What probability did it give the human's answer?",
    "hidden_deviation": "What could hide?",
    "sampler": "Do the answers come from the law that is scored?",
    "answer_distribution": "Does it answer as the population does?",
    "copying": "Does it copy?",
}


def number_of(number: int, one: str, many: str) -> str:
    """A count and the words that agree with it, as of `number_of(number, "answer is", "answers are")`."""
    return f"{number} {one if number == 1 else many}"


def to_markdown(report: "AuditReport") -> str:
    """The report as Markdown: summary, findings by question, where the errors went, and how to repeat it."""
    lines = [f"# Audit of {_plain(report.model)}", "", *(f"* {sentence}" for sentence in summary(report)), ""]
    lines += [f"Audited: {_plain(_settings(report))}", ""]
    lines += [f"* {_plain(note)}" for note in report.notes] + [""] * bool(report.notes)
    seen: set[str] = set()
    for view, title in _TITLES.items():
        found = [f for f in getattr(report, view) if f.name not in seen]
        seen |= {f.name for f in found}
        lines += _table(title, found, report)
    lines += _table("Further findings", [f for f in report.findings if f.name not in seen], report)
    lines += _ledger(report)
    return "\n".join(lines).rstrip() + "\n"


def summary(report: "AuditReport") -> list[str]:
    """What the numbers say, a sentence or two for each question that was asked."""
    told: list[Callable[[AuditReport], list[str]]] = [_judges, _checks, _probability, _hidden, _others]
    return [sentence for tell in told for sentence in tell(report)]


def _judges(report: "AuditReport") -> list[str]:
    found = {f.name.split("/", 1)[1]: f for f in report.distinguishability if f.name.startswith("paired_accuracy/")}
    if not found:
        return []
    measured = {judge: f for judge, f in found.items() if f.value is not None}
    if not measured:
        return ["No judge could be measured, so nothing is known about whether anyone can tell."]
    level = 1 - report.ledger.get("confidence", 0.95)
    p_values = report.ledger.get("judges", {})
    seeing = [j for j in measured if p_values.get(j, {}).get("p_holm", 1.0) <= level]
    controls = {f.name.split("/", 1)[1]: f for f in report.distinguishability if f.name.startswith("power_control/")}
    # Of those who saw a difference nobody asks whether they can see one.
    blind = [j for j in measured if j not in seeing and j in controls and controls[j].value is None]
    sentences = []
    if seeing:
        best = max(seeing, key=lambda j: measured[j].value or 0.0)
        f = measured[best]
        sentences.append(
            f"Machines can tell: {len(seeing)} of {len(measured)} freshly trained judges saw a difference (error "
            f"level {level:.0%} for all together). The best, `{_plain(best)}`, picked the human's answer in "
            f"{f.value:.1%} of {f.n} pairs ({_interval(f)}); tossing a coin gives 50 %."
        )
    else:
        highest = max(f.interval[1] if f.interval else 1.0 for f in measured.values())
        sentences.append(
            f"None of {len(measured)} freshly trained judges ({', '.join(_plain(j) for j in measured)}) saw a "
            f"difference (error level {level:.0%} for all together); their accuracy may be up to {highest:.1%}, and a "
            "coin's is 50 %. That is a statement about these judges and this many pairs, not about every reader."
        )
    if blind:
        sentences.append(
            f"The silence of {', '.join(_plain(j) for j in blind)} proves nothing: shown planted fakes, "
            f"{'that judge' if len(blind) == 1 else 'these judges'} did not notice them."
        )
    gains = [f.value for f in report.distinguishability if f.name.startswith("tv_lower/") and f.value]
    if gains and max(gains) > 0:
        sentences.append(
            f"In at least {max(gains):.1%} of cases (total variation) it answers otherwise than people do."
        )
    return sentences


def _checks(report: "AuditReport") -> list[str]:
    sides: dict[str, dict[str, Finding]] = {}
    for f in report.checks:
        parts = f.name.split("/")
        if parts[0] == "check_pass" and f.value is not None:
            sides.setdefault("/".join(parts[1:-1]), {})[parts[-1]] = f
    return [
        f"The check `{_plain(check)}`: people pass it in {both['human'].value:.1%}, the imitator in "
        f"{both['imitator'].value:.1%} of the answers it applies to ({_interval(both['imitator'])})."
        for check, both in sides.items()
        if {"human", "imitator"} <= set(both)
    ]


def _probability(report: "AuditReport") -> list[str]:
    found = {f.name: f for f in report.retrodiction}
    bits, outside = found.get("bits_per_answer"), found.get("outside_support")
    sentences = []
    if bits is not None and bits.value is not None:
        far = "infinitely many bits" if math.isinf(bits.value) else f"{bits.value:.1f} bits ({_interval(bits)})"
        sentences.append(f"A person's answer surprised the imitator by {far} on average; fewer are better.")
    difference = found.get("bits_per_answer_difference")
    if difference is not None and difference.value is not None:
        better = "more" if difference.value > 0 else "fewer"
        sentences.append(
            f"People's answers took {abs(difference.value):.2f} bits {better} than under the other imitator "
            f"(difference {_interval(difference)})."
        )
    if outside is not None and outside.value:
        sentences.append(f"It can never give {outside.value:.1%} of the answers that people gave.")
    return sentences


def _hidden(report: "AuditReport") -> list[str]:
    for f in report.hidden_deviation:
        if f.name == "hidden_deviation":
            if f.value is None or f.value > 0.999:
                return ["How much could be hidden in its answers is not bounded by these data."]
            return [f"Whatever may be hidden in its answers, they differ from people's by at most {f.value:.1%}."]
    return []


def _others(report: "AuditReport") -> list[str]:
    found = {f.name: f for f in report.findings}
    sentences = []
    match, fit = found.get("sampler_match"), found.get("consistency")
    if match is not None and match.value is not None:
        sentences.append(
            "Re-executed, its answers are what its law and the random numbers give."
            if match.value == 1
            else f"Re-executed, only {match.value:.2%} of its choices are what its law and the random numbers give."
        )
    if fit is not None and fit.value:
        sentences.append("Two certified statements contradict each other: an assumption is wrong. See `consistency`.")
    copied, human = found.get("copying"), found.get("copying/human")
    if copied is not None and human is not None and copied.value is not None and human.value is not None:
        sentences.append(
            f"{copied.value:.1%} of its answers also stand in the training data, and {human.value:.1%} of people's do."
        )
    return sentences


def _table(title: str, found: list["Finding"], report: "AuditReport") -> list[str]:
    if not found:
        return []
    lines = [f"## {title}", "", "| finding | value | interval | n | certified | CPU s | what it is |"]
    lines.append("|---|---|---|---|---|---|---|")
    for f in found:
        value = "not measured" if f.value is None else f"{_number(f.value)} {f.unit}"
        seconds = f"{report.cost[f.name]:.2g}" if f.name in report.cost else ""
        certified = "yes" if f.certified else ""
        cells = [f"`{_plain(f.name)}`", value, _interval(f), "" if f.n is None else f"{f.n:,}", certified, seconds]
        lines.append("| " + " | ".join([*cells, _plain(f.detail)]) + " |")
    return [*lines, ""]


def _ledger(report: "AuditReport") -> list[str]:
    confidence = report.ledger.get("confidence")
    lines = ["## Where the errors went", ""]
    if isinstance(confidence, float):
        lines += [
            f"All certified findings hold together with probability at least {confidence:g}; other intervals hold "
            "each on its own. Error probability of each certified finding, by the name before the slash:",
            "",
        ]
    for name, error in report.ledger.get("certified", {}).items():
        lines.append(f"* `{_plain(name)}`: {_short(error)}")
    for judge, p in report.ledger.get("judges", {}).items():
        if isinstance(p, dict):
            lines.append(f"* judge `{_plain(judge)}`: p = {_short(p.get('p'))}, after Holm {_short(p.get('p_holm'))}")
    chosen_by = report.ledger.get("resampling", {})
    if chosen_by:
        lines += [
            "",
            f"Each answer is kept out of {_plain(chosen_by.get('resample'))} draws by the distinguisher "
            f"`{_plain(chosen_by.get('distinguisher'))}`; each score rests on "
            f"{_plain(chosen_by.get('num_estimates'))} sets of companions.",
        ]
    return [*lines, "", f"Plan `{_plain(report.plan_hash)}`, seed {report.seed}.", ""]


def _settings(report: "AuditReport") -> str:
    revision = f" at {report.revision}" if report.revision else ""
    law = ", ".join(f"{name} {value}" for name, value in report.decoding.items())
    return f"{report.model}{revision} on {report.dataset}, {report.num_questions:,} questions; {law}."


def _interval(f: "Finding") -> str:
    if f.interval is None:
        return ""
    level = "" if f.confidence is None else f" at {f.confidence:.4g}"
    return f"{_number(f.interval[0])} to {_number(f.interval[1])}{level}"


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else ("infinite" if value > 0 else "-infinite")


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else _plain(value)


def _plain(value: object) -> str:
    """Text that stays text: nothing in it makes a table cell, a link, an image or HTML."""
    text = " ".join(str(value).split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    for character in "\\|[]<>`*!":
        text = text.replace(character, {"<": "&lt;", ">": "&gt;", "`": "'"}.get(character, f"\\{character}"))
    # GitHub and the Hub make links of bare addresses, too.
    return text.replace("://", "&#58;//").replace("www.", "www&#46;")
