"""The headline table as plain text, for the end of a run: the same rows as the page, aligned for a terminal."""

import textwrap
from collections.abc import Sequence

from amsdn.evaluation.headline import Cell, Difference, Row, percent

TERMINAL_WIDTH = 100


def as_text(names: Sequence[str], rows: Sequence[Row]) -> str:
    """The rows as aligned plain text of at most TERMINAL_WIDTH columns; one block per comparison."""
    pairs: list[tuple[int, ...]] = [(0, i) for i in range(1, len(names))] or [(0,)]
    blocks = [_text_block([names[i] for i in pair], [_pick(row, pair) for row in rows]) for pair in pairs]
    notes = ["Per cent of images, with 95 % intervals; n is the number of images behind each figure."]
    if any(d and d.comparable and d.beyond for row in rows for d in row.differences):
        notes.append("* the two intervals do not meet")
    if any(d and not d.comparable for row in rows for d in row.differences):
        notes.append("? not comparable: other images or other attack settings")
    return "\n\n".join(blocks) + "\n\n" + "\n".join(notes) + "\n"


def _pick(row: Row, pair: Sequence[int]) -> tuple[Row, list[Cell | None], Difference | None]:
    return row, [row.cells[i] for i in pair], row.differences[pair[1] - 1] if len(pair) == 2 else None


def _text_block(names: Sequence[str], rows: Sequence[tuple[Row, list[Cell | None], Difference | None]]) -> str:
    titles = [_title(name) for name in names]
    upper = [t[0] if len(t) == 2 else "" for t in titles]
    lines = [
        ["", *upper, *([] if len(names) == 1 else [""]), ""],
        ["", *(t[-1] for t in titles), *([] if len(names) == 1 else ["difference"]), "n"],
    ]
    for row, cells, difference in rows:
        counts = "/".join(dict.fromkeys(str(c.n) for c in cells if c))
        lines.append(
            [_clip(row.label, 30), *(_text_cell(c) for c in cells), *([] if len(names) == 1 else [_text_difference(difference)]), counts]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip() for line in lines
    ]
    rule = "-" * max(map(len, text))
    assert len(rule) <= TERMINAL_WIDTH, f"the table is {len(rule)} columns wide"
    return "\n".join([*([text[0]] if any(upper) else []), text[1], rule, *text[2:], rule])


def _title(name: str) -> list[str]:
    """A run's name on one or two lines of at most 20 columns."""
    first, *rest = textwrap.wrap(name, 20) or [""]
    return [first, _clip(" ".join(rest), 20)] if rest else [first]


def _text_cell(cell: Cell | None) -> str:
    return "-" if cell is None else f"{percent(cell.value)} [{percent(cell.low)}, {percent(cell.high)}]"


def _text_difference(difference: Difference | None) -> str:
    if difference is None:
        return ""
    sign = ("*" if difference.beyond else " ") if difference.comparable else "?"
    return f"{difference.points:+.1f} {sign}"


def _clip(text: str, width: int) -> str:
    clean = " ".join(text.split())
    return clean if len(clean) <= width else clean[: width - 1] + "…"
