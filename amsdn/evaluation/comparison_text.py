"""A comparison as plain text: the table, what a reader must know to judge it, and what it says together."""

import textwrap
from collections.abc import Iterator, Sequence

from amsdn.evaluation.comparison import GROUPS, ComparedRow, Comparison, Side
from amsdn.evaluation.headline import percent
from amsdn.evaluation.reliability import FILE
from amsdn.evaluation.terminal import TERMINAL_WIDTH

_HEADER = ["", "n", "A", "B", "only A", "only B", "A - B", "p", "better"]
_GAP = "  "


def as_text(comparison: Comparison) -> str:
    """The comparison in lines of at most TERMINAL_WIDTH columns, but for those that name the folders."""
    reasons = list(dict.fromkeys(row.verdict for row in comparison.rows if not row.tested))
    remarks = [*comparison.notes, *_left_out(comparison), _reliability(comparison)]
    paragraphs = [list(_legend(comparison, reasons)), remarks, [comparison.sentence]]
    wrapped = ["\n".join(textwrap.fill(line, TERMINAL_WIDTH, break_on_hyphens=False) for line in lines) for lines in paragraphs]
    return "\n\n".join([_sides(comparison), _table(comparison.rows, reasons), *wrapped]) + "\n"


def _sides(comparison: Comparison) -> str:
    a, b = comparison.a, comparison.b
    counted = f"{comparison.images} images have all rows in both runs; besides, A has {_images(a)}, B {_images(b)}."
    return f"A  {a.folder}  (model {a.model})\nB  {b.folder}  (model {b.model})\n{counted}"


def _images(side: Side) -> str:
    return f"{side.besides} complete" + (f" and {side.incomplete} incomplete" if side.incomplete else "")


def _table(rows: Sequence[ComparedRow], reasons: Sequence[str]) -> str:
    cells = {row.key: _cells(row, reasons) for row in rows}
    widths = [max(len(line[i]) for line in [_HEADER, *cells.values()]) for i in range(len(_HEADER))]
    widths[0] = min(widths[0], TERMINAL_WIDTH - sum(widths[1:]) - len(_GAP) * (len(widths) - 1))
    lines = []
    for group, title in GROUPS.items():
        of_group = [row for row in rows if row.group == group]
        lines += [title, *(_aligned(cells[row.key], widths) for row in of_group)] if of_group else []
    rule = "-" * (sum(widths) + len(_GAP) * (len(widths) - 1))
    return "\n".join([_aligned(_HEADER, widths), rule, *lines, rule])


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    label, *numbers, verdict = line
    aligned = (cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True))
    return _GAP.join([_clip(label, widths[0]).ljust(widths[0]), *aligned, verdict]).rstrip()


def _cells(row: ComparedRow, reasons: Sequence[str]) -> list[str]:
    cells = [f"  {row.label}", str(row.n), percent(row.accuracy_a), percent(row.accuracy_b), str(row.only_a), str(row.only_b)]
    if row.difference is None or row.low is None or row.high is None or row.adjusted is None:
        return [*cells, "", "", f"? ({reasons.index(row.verdict) + 1})"]
    interval = f"{row.difference:+.1f} [{row.low:+.1f}, {row.high:+.1f}]"
    return [*cells, interval, _p_value(row.adjusted), row.verdict if row.verdict in ("A", "B") else "-"]


def _legend(comparison: Comparison, reasons: Sequence[str]) -> Iterator[str]:
    yield "A, B: per cent of the n images. only A: images that A has right and B has not."
    yield f"A - B: in points, with a paired {100 * comparison.confidence:g} % interval (Newcombe), each row's by itself."
    yield "p: McNemar's exact test, adjusted for the number of tested rows (Holm)."
    yield f"better: where p is at most {comparison.level:g}; '-': no difference shown, which does not prove that there is none."
    if any(row.group == "unnoticed" for row in comparison.rows):
        yield "Right or flagged: to be read beside the false alarms; a model that flags everything is never wrong unnoticed."
    yield from (f"? ({number}): {reason}." for number, reason in enumerate(reasons, start=1))


def _left_out(comparison: Comparison) -> Iterator[str]:
    """What only one run has, so that no row is about it."""
    a, b = ([*side.attacks, *(f"the {kind} certificate" for kind in side.certificates)] for side in (comparison.a, comparison.b))
    changed = [name for name in a if name in b]
    if changed:
        yield f"Not compared, for the settings differ: {', '.join(changed)}."
    for side, names in (("A", a), ("B", b)):
        if only := [name for name in names if name not in changed]:
            yield f"Not compared, for only {side} has it: {', '.join(only)}."


def _reliability(comparison: Comparison) -> str:
    if comparison.a.reliability is None and comparison.b.reliability is None:
        return f"Reliability of the attacks: unchecked in both runs (no {FILE})."
    told = []
    for name, side in (("A", comparison.a), ("B", comparison.b)):
        refuted = [family for family, verdict in (side.reliability or {}).items() if verdict != "yes"]
        if side.reliability is None:
            told.append(f"{name} unchecked (no {FILE})")
        else:
            told += [f"{name}'s {', '.join(refuted)} unreliable (see its {FILE})"] if refuted else [f"no check of {name} failed"]
            told += [f"{name}'s {', '.join(side.unchecked)} unchecked"] if side.unchecked else []
    return f"Reliability of the attacks: {'; '.join(told)}."


def _p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
