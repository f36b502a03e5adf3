"""For packages that add sub-commands to the command line `convscope`.

Such a package declares an entry point of the group `convscope.commands`, named as the sub-command:

    [project.entry-points."convscope.commands"]
    report = "convscope_lens._commands:add_report"

The entry point is a function that takes argparse's sub-parsers, adds one of its own, and returns it. The default `run`
of that parser is called with an open `Client` and the parsed options, and returns the exit status; a `ConvscopeError`,
`OSError` or `ValueError` that it raises becomes one line of standard error and exit status 1. The options `--version`,
`--url`, `--ca-file`, `--deadline-s`, `--retries` and `--json` are added to every sub-command.

The functions below keep the commands alike. Importing this module imports neither numpy nor a transport.
"""

from __future__ import annotations

import argparse
import json
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

__all__ = [
    "METHODS",
    "Failure",
    "SubParsers",
    "add_request_id",
    "check_absent",
    "format_json",
    "format_table",
    "model",
    "models",
    "name",
    "names",
    "printable",
    "read_pictures",
]

SubParsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

METHODS = ("grad_cam", "cam", "occlusion", "input_gradient", "integrated_gradients")  # Those that explain a score.


def name(text: str) -> str:
    """Read an option's value that must not be empty, such as `cifar`."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def model(text: str) -> str:
    """Read an option's value that is a model's name or version."""
    from convscope._request import check_model  # Imported late: --help must not wait for protobuf.

    try:
        check_model(text, None)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("model ")) from error
    return text


def models(text: str) -> list[str]:
    """Read an option's value that is a list of models, such as `cifar,digits`."""
    return [model(item) for item in names(text)]


def names(text: str) -> list[str]:
    """Read an option's value that is a list of names, such as `conv1,conv2`."""
    found = [item.strip() for item in text.split(",") if item.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"name at least one, as in A,B, not {text!r}")
    return found


def add_request_id(parser: argparse.ArgumentParser) -> None:
    """Add the option `--request-id` to a sub-command that sends one request."""
    parser.add_argument(
        "--request-id", type=_request_id, metavar="ID", help="the request's id in the service's log (default: random)"
    )


def _request_id(text: str) -> str:
    from convscope._request import choose_request_id  # Imported late: --help must not wait for protobuf.

    try:
        return choose_request_id(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def format_json(value: object, *, indent: int | None = 2) -> str:
    """Return a value as JSON.

    Letters stay as they are, unless the value holds a file name with bytes that are not text: then they are escaped.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Lay rows out in columns as wide as their widest cell.

    Args:
        header: Names of the columns.
        rows: The cells of each row. Control characters in them are shown as `?`. The last cell of a row that has fewer
            cells than the header may run past its column.
        right: Indexes of the columns that are aligned right, for numbers.

    Returns:
        Lines, without a line break at the end.
    """
    lines = [[printable(cell) for cell in row] for row in (header, *rows)]
    full = [line for line in lines if len(line) == len(header)]
    widths = [max(_width(line[column]) for line in full) for column in range(len(header))]
    for line in lines:
        if len(line) < len(header):
            for column, cell in enumerate(line[:-1]):
                widths[column] = max(widths[column], _width(cell))
    return "\n".join(
        "  ".join(_pad(cell, widths[column], column in right) for column, cell in enumerate(line)).rstrip()
        for line in lines
    )


def printable(text: str) -> str:
    """Replace characters that would move a terminal's cursor: file names and servers may send such text."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _width(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def _pad(text: str, width: int, right: bool) -> str:
    padding = " " * (width - _width(text))
    return padding + text if right else text + padding


class Failure(NamedTuple):
    """Why a picture has no result.

    Attributes:
        code: `unreadable` if the file could not be read, or the service's error code.
        message: One sentence.
    """

    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


def read_pictures(paths: Sequence[str]) -> list[tuple[str, bytes | Failure]]:
    """Read the picture files that a command names. A file that cannot be read does not fail the others.

    Args:
        paths: PNG, JPEG, WebP or .npy files.

    Returns:
        The name and the bytes of each picture, or why there are none. A .npy file of several pictures becomes several
        entries, named `file.npy[0]`, `file.npy[1]` and so on.
    """
    from convscope._pictures import encode_pictures  # Imported late: --help must not wait for numpy.

    pictures: list[tuple[str, bytes | Failure]] = []
    for path in paths:
        try:
            files = encode_pictures(path).files
        except (OSError, ValueError) as error:
            pictures.append((path, Failure("unreadable", getattr(error, "strerror", None) or str(error))))
        else:
            numbered = [path] if len(files) == 1 else [f"{path}[{number}]" for number in range(len(files))]
            pictures += zip(numbered, files, strict=True)
    return pictures


def check_absent(folder: Path) -> None:
    """Raise FileExistsError if a folder that a command is about to create exists."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: remove it, or save elsewhere")
