"""Plain tables for a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Sequence


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Lay rows out in columns as wide as their widest cell.

    Args:
        header: Names of the columns.
        rows: As many cells a row; control characters in them are shown as `?`. A row of fewer cells ends with one that
            may run past its column.
        right: Positions of columns set flush right, for numbers.

    Returns:
        Lines, without a line break at the end.
    """
    lines = [[printable(cell) for cell in row] for row in (header, *rows)]
    full = [line for line in lines if len(line) == len(header)]
    widths = [max(_width(line[column]) for line in full) for column in range(len(header))]
    for line in lines:
        if len(line) < len(header):  # All but its last cell count.
            for column, cell in enumerate(line[:-1]):
                widths[column] = max(widths[column], _width(cell))
    return "\n".join(
        "  ".join(_pad(cell, widths[column], column in right) for column, cell in enumerate(line)).rstrip()
        for line in lines
    )


def printable(text: str) -> str:
    """Return a text without what would move the cursor: it may come from a file name or from the network."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _width(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def _pad(text: str, width: int, right: bool) -> str:
    """Fill a text up to a width, on its left or its right."""
    room = " " * (width - _width(text))
    return room + text if right else text + room
