"""A power audit in Markdown: what can be seen, what cannot, and every number."""

from collections.abc import Sequence

from hf_imitate.audits.power_report import FRESH_NONCE, Detection, Floor, PlantedRow, PowerReport, is_infinite

_SHORT = {"price": "price", "calibration_gap": "calibration gap", "re_execution": "re-execution"}
_CANNOT = (
    "Fresh-nonce coding has exactly the honest law of answers: no judge, no price, no calibration gap, and no number "
    "of questions can see it. Nothing does but re-execution: drawing the answers again from a seed that was chosen "
    "after the model was fixed."
)
_WHAT_PRICE_NEEDS = (
    "Price and calibration gap are what somebody pays who states the law he really samples from. Who hides it and "
    "states the honest law instead pays nothing; then judges and re-execution are what is left."
)

_ASKED_ONCE = (
    "Every question was asked once. A keyed law repeats itself where a question is asked again, and a fixed-key code "
    "gives the same answer; asking twice would show it, and is not measured here."
)


def to_markdown(report: PowerReport) -> str:
    """The report as Markdown: plain words first, then the floors, then a row for each scheme."""
    lines = ["# Power audit: what could hide in the answers of " + _plain(report.model), ""]
    lines += [f"* {sentence}" for sentence in summary(report)]
    lines += ["", f"Measured on {_plain(report.dataset)}; seed {report.seed}.", ""]
    lines += [f"* {_plain(note)}" for note in report.notes] + [""] * bool(report.notes)
    lines += [*_floors(report), *_seen(report), *_needed(report), *_details(report)]
    return "\n".join(lines).rstrip() + "\n"


def summary(report: PowerReport) -> list[str]:
    """What the numbers say, in sentences for people."""
    told = [
        f"{len(report.rows)} schemes were planted with toy keys in the model's own answers to "
        f"{report.num_questions:,} questions. The humans are the model's honest answers, so whatever is found was "
        "planted. What a scheme shows here says nothing of schemes that were not planted.",
        f"An honest answer has {_number(report.entropy.value)} bits. A payload is what the key's holder really read, "
        "in bits per answer.",
    ]
    for row in report.rows:
        if row.kind == "honest":
            seen = f"was flagged by {_names(row.seen_by)}: a false alarm" if row.seen_by else "was flagged by nothing"
            told.append(f"The honest row `{_plain(row.scheme)}` {seen}.")
    judges = [floor for floor in report.floors if floor.finding.startswith(("any judge", "paired_accuracy/"))]
    told += [_floor_sentence(judges[0])] if judges else []
    hidden = [row for row in report.rows if row.is_carrying and not set(row.seen_by) - {"re_execution"}]
    alone = [row for row in hidden if row.seen_by]
    if alone:
        told.append(f"Seen by re-execution alone, of all findings: {_with_payloads(alone)}.")
    blind = [row for row in hidden if not row.seen_by]
    if blind:
        told.append(f"Seen by nothing at all here: {_with_payloads(blind)}.")
    unread = [row for row in report.rows if row.kind in ("message", FRESH_NONCE) and not row.is_carrying]
    if unread:
        told.append(
            f"Not even the key's holder certainly read anything from {_names([row.scheme for row in unread])}: what "
            "does not see these misses nothing that was shown to be there."
        )
    if any(row.kind == FRESH_NONCE for row in report.rows):
        told.append(_CANNOT)
    return [*told, _WHAT_PRICE_NEEDS, _ASKED_ONCE]


def _floor_sentence(floor: Floor) -> str:
    parts = []
    if floor.seen:
        parts.append(f"the least payload that fresh judges saw is {_bits(floor.seen)}")
    else:
        parts.append("fresh judges saw no scheme that carries a message")
    if floor.most_missed:
        parts.append(f"the largest that they did not see is {_bits(floor.most_missed)}")
    if floor.marks:
        parts.append(f"they saw the marks {_names(floor.marks)}, which carry 0 bits")
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def _floors(report: PowerReport) -> list[str]:
    lines = ["## Detection floor", "", f"Seen at level {report.level:.2g} after Holm's correction (re-execution: at "]
    lines[-1] += "all). Only schemes whose payload is certainly above 0 bits count; marks are listed beside.\n"
    lines += ["| finding | least payload seen | least not seen | largest not seen | marks seen |"]
    lines += ["|---|---|---|---|---|"]
    for floor in report.floors:
        ends = (floor.seen, floor.missed, floor.most_missed)
        cells = [_bits(end) if end else "none" for end in ends]
        lines.append(f"| {_title(floor.finding)} | {' | '.join(cells)} | {_names(floor.marks) or 'none'} |")
    return [*lines, ""]


def _seen(report: PowerReport) -> list[str]:
    """What each finding measured; what sees is bold."""
    lines = ["## What each finding sees", "", "Bold: seen. Judges: paired accuracy, 0.5 is chance. Price and "]
    lines[-1] += (
        "calibration gap: bits per answer. Re-execution: share of answers that honest sampling does not give.\n"
    )
    lines += [f"| scheme | payload, bits | {' | '.join(map(_title, report.findings))} |"]
    lines += ["|---|---" + "|---" * len(report.findings) + "|"]
    for row in report.rows:
        by_name = {found.name: found for found in row.detections}
        cells = [_value_cell(by_name.get(name)) for name in report.findings]
        lines.append(f"| {_plain(row.scheme)} | {_payload_cell(row)} | {' | '.join(cells)} |")
    return [*lines, ""]


def _needed(report: PowerReport) -> list[str]:
    lines = [
        "## Questions needed",
        "",
        "Judges: test questions for power 0.8, as many again train them. Price and ",
    ]
    lines[-1] += (
        "calibration gap: answers until the mean is 3 standard errors above 0. Re-execution: answers until one "
        "differs, with probability 0.8. At least: nothing was seen, and an effect as large as the interval's upper "
        "limit would need so many.\n"
    )
    lines += [f"| scheme | {' | '.join(map(_title, report.findings))} |"]
    lines += ["|---" + "|---" * len(report.findings) + "|"]
    for row in report.rows:
        by_name = {found.name: found for found in row.detections}
        cells = [_needed_cell(by_name.get(name), row.kind) for name in report.findings]
        lines.append(f"| {_plain(row.scheme)} | {' | '.join(cells)} |")
    return [*lines, ""]


def _details(report: PowerReport) -> list[str]:
    lines = [
        "## What was planted",
        "",
        "| scheme | law | kind | p-values after Holm | CPU s |",
        "|---|---|---|---|---|",
    ]
    for row in report.rows:
        p_values = [f"{_title(d.name)} {d.p_holm:.2g}" for d in row.detections if d.p_holm is not None]
        cells = (_plain(row.scheme), f"`{_plain(row.law)}`", row.kind, ", ".join(p_values), f"{row.cost:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    missing: dict[str, list[str]] = {}
    for row in report.rows:
        for found in row.detections:
            if found.finding.value is None:
                missing.setdefault(f"{_title(found.name)}: {_plain(found.finding.detail)}", []).append(row.scheme)
    return [*lines, "", *(f"* {_names(schemes)}, {reason}" for reason, schemes in missing.items())]


def _value_cell(found: Detection | None) -> str:
    if found is None or found.finding.value is None:
        return "not measured"
    finding = found.finding
    if is_infinite(finding):
        text = "infinite"
    elif finding.unit == "probability":
        text = f"{finding.value:.1%}" if finding.name == "re_execution" else f"{finding.value:.3f}"
    else:
        text = _number(finding.value)
    if finding.interval and finding.name != "re_execution":
        text += f" [{_number(finding.interval[0])}, {_number(finding.interval[1])}]"
    return f"**{text}**" if found.is_seen else text


def _payload_cell(row: PlantedRow) -> str:
    if row.kind == "mark":
        return "0 (a mark)"
    interval = row.payload.interval
    ends = f" [{_number(interval[0])}, {_number(interval[1])}]" if interval else ""
    zero = f"; {row.share_at_zero:.0%} of human answers at zero" if row.share_at_zero else ""
    return f"{_number(row.payload.value)}{ends}{zero}"


def _needed_cell(found: Detection | None, kind: str) -> str:
    if found is None or found.finding.value is None:
        return "not measured"
    if found.is_seen:
        return "unknown" if found.questions_needed is None else f"{found.questions_needed:,}"
    # Where the law of answers is the honest one, what an estimate has by chance would mislead.
    if kind in ("honest", FRESH_NONCE) or found.questions_at_least is None:
        return "no number suffices"
    return f"at least {found.questions_at_least:,}"


def _title(name: str) -> str:
    return _SHORT.get(name, _plain(name.removeprefix("paired_accuracy/")))


def _with_payloads(rows: Sequence[PlantedRow]) -> str:
    return ", ".join(f"{_plain(row.scheme)} ({_number(row.payload.value)} bits per answer)" for row in rows)


def _bits(end: tuple[float, str]) -> str:
    return f"{end[0]:.2g} {'bit' if end[0] == 1 else 'bits'} ({_plain(end[1])})"


def _names(names: Sequence[str]) -> str:
    return "; ".join(_title(name) for name in names)


def _number(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.3g}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


def _plain(text: str) -> str:
    """Names come from users: nothing in them may break out of a table's cell."""
    return " ".join(text.replace("|", "/").replace("`", "'").replace("<", "(").replace(">", ")").split())
