"""Public API for packages that add sub-commands to `convscope`.

Such a package declares an entry point of the group `convscope.commands`, named as the sub-command:

    [project.entry-points."convscope.commands"]
    report = "convscope_lens._commands:add_report"

The entry point is a function that adds a parser to argparse's sub-parsers and returns it. The default `run` of that
parser is called with an open `Client` and the parsed options, and returns the exit status; a `ConvscopeError`,
`OSError` or `ValueError` becomes one line on standard error and exit status 1. The options `--version`, `--url`,
`--ca-file`, `--deadline-s`, `--retries` and `--json` are added to every sub-command.

The functions are helpers shared by all sub-commands. Importing this module imports neither numpy nor a transport.
"""

from __future__ import annotations

import argparse
import json
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias, get_args

from convscope._options import Method

__all__ = [
    "LAYER_HEADINGS",
    "METHODS",
    "STAGES",
    "PictureFailure",
    "SubParsers",
    "add_request_id",
    "ensure_missing",
    "format_json",
    "format_table",
    "parse_model_name",
    "parse_model_names",
    "parse_name",
    "parse_names",
    "parse_version",
    "printable",
    "read_picture_files",
]

SubParsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

METHODS = tuple(method for method in get_args(Method) if method != "picture")  # Methods that explain a score.
LAYER_HEADINGS = {  # By field of `Layer`; `stride` is the map's total stride, `step` the operation's own.
    "operation": "operation",
    "input_shape": "input",
    "shape": "output",
    "kernel": "kernel",
    "step": "op stride",
    "padding": "padding",
    "dilation": "dilation",
    "groups": "groups",
    "receptive_field": "receptive field",
    "stride": "stride",
    "receptive_field_start": "field start",
    "parameters": "parameters",
    "dense_parameters": "dense parameters",
    "multiply_adds": "multiply-adds",
    "bytes": "bytes (float32)",
}
STAGES = {  # Labels of the fields of `Timing`, in seconds.
    "read_s": "read",
    "decode_s": "decode",
    "preprocess_s": "preprocess",
    "forward_s": "forward",
    "encode_s": "encode",
    "handler_s": "handler",
    "outside_s": "outside",
    "total_s": "total",
}


def parse_name(text: str) -> str:
    """Type for argparse: a name, such as `cifar`."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def parse_names(text: str) -> list[str]:
    """Type for argparse: comma-separated names, such as `conv1,conv2`."""
    parsed = [item.strip() for item in text.split(",") if item.strip()]
    if not parsed:
        raise argparse.ArgumentTypeError(f"expected a comma-separated list such as A,B, not {text!r}")
    return parsed


def parse_model_name(text: str) -> str:
    """Type for argparse: the name of a model."""
    from convscope._request import check_model  # Imported here to keep --help fast.

    try:
        check_model(text, None)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("model ")) from error
    return text


parse_version = parse_model_name  # A version has the same syntax.


def parse_model_names(text: str) -> list[str]:
    """Type for argparse: comma-separated names of models, such as `cifar,digits`."""
    return [parse_model_name(item) for item in parse_names(text)]


def add_request_id(parser: argparse.ArgumentParser) -> None:
    """Add the option `--request-id` to a sub-command that sends one request."""
    parser.add_argument(
        "--request-id", type=_request_id, metavar="ID", help="id of the request in the server's log (default: random)"
    )


def _request_id(text: str) -> str:
    from convscope._request import validate_or_create_request_id  # Imported here to keep --help fast.

    try:
        return validate_or_create_request_id(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def format_json(value: object, *, indent: int | None = 2) -> str:
    """Format a value as JSON.

    Non-ASCII text is kept, unless it contains undecodable bytes of a file name.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right_aligned: Collection[int] = ()) -> str:
    """Format rows as a text table.

    Args:
        header: Headings of the columns.
        rows: The texts of each row; control characters are shown as `?`. In a row that is shorter than the header, the
            last text may be wider than its column.
        right_aligned: Indexes of the right-aligned columns, for numbers.

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
        "  ".join(_pad(cell, widths[column], column in right_aligned) for column, cell in enumerate(line)).rstrip()
        for line in lines
    )


def printable(text: str) -> str:
    """Replace control characters, which file names and servers may contain, by `?`."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _width(text: str) -> int:
    """Return the width of a text in terminal columns."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def _pad(text: str, width: int, right_aligned: bool) -> str:
    padding = " " * (width - _width(text))
    return padding + text if right_aligned else text + padding


class PictureFailure(NamedTuple):
    """Why a picture has no result.

    Attributes:
        code: `unreadable` if the file could not be read, or the service's error code.
        message: Human-readable message.
    """

    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


def read_picture_files(paths: Sequence[str]) -> list[tuple[str, bytes | PictureFailure]]:
    """Read the picture files of a command. An unreadable file does not affect the others.

    Args:
        paths: PNG, JPEG, WebP or .npy files.

    Returns:
        Name and bytes of each picture, or its failure. A .npy file of several pictures becomes several entries, named
        `file.npy[0]`, `file.npy[1]` and so on.
    """
    from convscope._pictures import encode_pictures  # Imported here to keep --help fast.

    pictures: list[tuple[str, bytes | PictureFailure]] = []
    for path in paths:
        try:
            files = encode_pictures(path).files
        except (OSError, ValueError) as error:
            pictures.append((path, PictureFailure("unreadable", getattr(error, "strerror", None) or str(error))))
        else:
            names = [path] if len(files) == 1 else [f"{path}[{index}]" for index in range(len(files))]
            pictures += zip(names, files, strict=True)
    return pictures


def ensure_missing(folder: Path) -> None:
    """Raise FileExistsError if a folder that a command is about to create exists."""
    if folder.exists():
        raise FileExistsError(f"{folder} already exists")
