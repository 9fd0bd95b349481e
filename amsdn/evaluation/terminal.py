"""The headline table as plain text, for the end of a run: the same rows as the page, aligned for a terminal."""

import textwrap
from collections.abc import Sequence

from amsdn.evaluation.headline import Cell, Difference, Row, percent

TERMINAL_WIDTH = 100


def as_text(names: Sequence[str], rows: Sequence[Row]) -> str:
    """The rows as aligned plain text of at most TERMINAL_WIDTH columns; one block per comparison."""
    pairs: list[tuple[int, ...]] = [(0, i) for i in range(1, len(names))] or [(0,)]
    blocks = [_text_block([names[i] for i in pair], [_pick(row, pair) for row in rows]) for pair in pairs]
    doubts = dict.fromkeys((i, doubt) for row in rows for i, found in enumerate(row.doubts) for doubt in found)
    notes = ["Per cent of images, with 95 % intervals; n is the number of images behind each figure."]
    if any(d and d.comparable and d.beyond for row in rows for d in row.differences):
        notes.append("* the two intervals do not meet")
    if any(d and not d.comparable for row in rows for d in row.differences):
        notes.append("? not comparable: other images or other attack settings")
    if doubts:
        notes.append("~ not reliable:")
        notes += [_reason(f"{names[i]}: {doubt}" if len(names) > 1 else doubt) for i, doubt in doubts]
    return "\n\n".join(blocks) + "\n\n" + "\n".join(notes) + "\n"


def _reason(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), TERMINAL_WIDTH, initial_indent="  - ", subsequent_indent="    ")


def _pick(row: Row, pair: Sequence[int]) -> list[str]:
    """A line of the table: what it is about, the cells, the difference where there are two, and the numbers of images."""
    cells = [_text_cell(row.cells[i], doubtful=bool(row.doubts[i])) for i in pair]
    difference = [_text_difference(row.differences[pair[1] - 1])] if len(pair) == 2 else []
    counts = "/".join(dict.fromkeys(str(c.n) for i in pair if (c := row.cells[i])))
    return [" ".join(row.label.split()), *cells, *difference, counts]


def _text_block(names: Sequence[str], rows: Sequence[list[str]]) -> str:
    """The table as lines of one width; a label too long for what the numbers leave goes on, indented, on the next line."""
    titles = [_title(name) for name in names]
    upper = [t[0] if len(t) == 2 else "" for t in titles]
    between = ["difference"] if len(names) == 2 else []
    lines = [["", *upper, *("" for _ in between), ""], ["", *(t[-1] for t in titles), *between, "n"], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(1, len(lines[0]))]
    room = min(max(len(row[0]) for row in rows), TERMINAL_WIDTH - sum(2 + w for w in widths))
    labels = [textwrap.wrap(line[0], room, subsequent_indent="  ") or [""] for line in lines]
    text = [
        "  ".join([label[0].ljust(room), *(c.rjust(w) for c, w in zip(line[1:], widths, strict=True))]).rstrip()
        for label, line in zip(labels, lines, strict=True)
    ]
    body = [part for label, line in zip(labels[2:], text[2:], strict=True) for part in (line, *label[1:])]
    rule = "-" * max(map(len, text))
    assert len(rule) <= TERMINAL_WIDTH, f"the table is {len(rule)} columns wide"
    return "\n".join([*([text[0]] if any(upper) else []), text[1], rule, *body, rule])


def _title(name: str) -> list[str]:
    """A run's name on one or two lines of at most 20 columns."""
    first, *rest = textwrap.wrap(name, 20) or [""]
    return [first, _clip(" ".join(rest), 20)] if rest else [first]


def _text_cell(cell: Cell | None, *, doubtful: bool) -> str:
    return "-" if cell is None else f"{'~' if doubtful else ''}{percent(cell.value)} [{percent(cell.low)}, {percent(cell.high)}]"


def _text_difference(difference: Difference | None) -> str:
    if difference is None:
        return ""
    sign = ("*" if difference.beyond else " ") if difference.comparable else "?"
    return f"{difference.points:+.1f} {sign}"


def _clip(text: str, width: int) -> str:
    clean = " ".join(text.split())
    return clean if len(clean) <= width else clean[: width - 1] + "…"
