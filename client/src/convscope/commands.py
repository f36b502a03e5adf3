"""Public API for packages that add sub-commands to `convscope`.

Such a package declares an entry point of the group `convscope.commands`, named as the sub-command:

    [project.entry-points."convscope.commands"]
    report = "convscope_lens._commands:add_report"

The entry point is a function that adds a parser to argparse's sub-parsers and returns it. The default `run` of that
parser is called with an open `Client` and the parsed options, and returns the exit status. A `UsageError` becomes a
message on standard error and exit status 2; a `ConvscopeError`, `OSError` or other `ValueError` one line and exit
status 1. With `--json` standard output gets the error too. The options `--version`, `--url`, `--ca-file`,
`--deadline-s`, `--retries` and `--json` are added to every sub-command.

The functions are helpers shared by all sub-commands. Importing this module imports neither numpy nor a transport.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, get_args

from convscope._exceptions import (
    AuthenticationFailed,
    ConvscopeError,
    ModelNotFound,
    Overloaded,
    ServerError,
    TransportError,
    UnknownLayer,
)
from convscope._options import Method

__all__ = [
    "LAYER_HEADINGS",
    "METHODS",
    "METHOD_HELP",
    "MODEL_HELP",
    "PICTURE_HELP",
    "PICTURE_SUFFIXES",
    "SERVICE_ERRORS",
    "STAGES",
    "STANDARD_INPUT",
    "PictureFailure",
    "Progress",
    "SubParsers",
    "UsageError",
    "add_request_id",
    "at_least",
    "ensure_missing",
    "ensure_writable",
    "find_target",
    "format_field",
    "format_json",
    "format_table",
    "list_pictures",
    "parse_model_name",
    "parse_model_names",
    "parse_name",
    "parse_names",
    "parse_version",
    "printable",
    "raise_if_of_service",
    "read_picture_files",
    "reject_unused",
    "terminal_width",
]

SubParsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

METHODS = tuple(method for method in get_args(Method) if method != "picture")  # Methods that explain a score.
STANDARD_INPUT = "-"  # Path of a picture on standard input.
MODEL_HELP = "name of the model; `convscope models` lists them"
METHOD_HELP = "what the heat map shows; grad_cam has only what speaks for the class (default %(default)s)"
PICTURE_HELP = "PNG, JPEG, WebP or .npy files, folders of them, or - for standard input; with Pillow GIF, BMP and TIFF"
PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".npy", ".gif", ".bmp", ".tif", ".tiff"})
# Errors of the service among those of pictures.
SERVICE_ERRORS = (TransportError, Overloaded, ModelNotFound, AuthenticationFailed, UnknownLayer)
_UNLIMITED = 10**6  # Columns where standard output is no terminal.
_NARROWEST = 8  # Columns of a text, however narrow the terminal is.
_SUGGESTIONS = 5  # Labels named where none fits.
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


class UsageError(ValueError):
    """Arguments of a command are wrong, or do not fit together. The message names the options as they are typed."""


def at_least(minimum: int) -> Callable[[str], int]:
    """Return a type for argparse: a whole number from `minimum` to 2³² - 1."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = -1
        if not minimum <= number < 1 << 32:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, not {text!r}")
        return number

    return parse


def reject_unused(options: argparse.Namespace, names: Iterable[str], condition: str) -> None:
    """Raise UsageError if an option was given that does nothing in this combination.

    Args:
        options: The parsed options; None or False means that an option was not given.
        names: The options, as attributes of `options`.
        condition: When they do nothing, such as `without --layers`.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value is not False:
            raise UsageError(f"--{name.replace('_', '-')} does nothing {condition}")


def find_target(client: Any, options: argparse.Namespace) -> int | None:
    """Return the index of the class that `--target` names by its index or label; None without the option.

    Args:
        client: An open `Client`.
        options: Parsed options, with `target`, `model` and `version`.

    Raises:
        ConvscopeError: The model card could not be fetched.
        UsageError: No class, or more than one, has this label.
    """
    target: str | None = options.target
    if target is None or target.isdecimal():
        return None if target is None else int(target)
    classes = client.model_card(options.model, options.version).classes
    folded = target.casefold()
    matches = [index for index, label in enumerate(classes) if label == target]
    matches = matches or [index for index, label in enumerate(classes) if label.casefold() == folded]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UsageError(f"--target {target}: classes {', '.join(map(str, matches))} have this label; give an index")
    from difflib import get_close_matches  # Imported here to keep --help fast.

    close = [label for label in classes if folded in label.casefold()] or get_close_matches(target, classes, cutoff=0.5)
    shown = "; ".join(close[:_SUGGESTIONS] or classes[:_SUGGESTIONS]) or "none"
    raise UsageError(f"--target {target}: {options.model} has no class of this label; there are for example: {shown}")


def format_json(value: object, *, indent: int | None = 2) -> str:
    """Format a value as JSON. Text that standard output cannot show, and undecodable file names, are escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def terminal_width() -> int:
    """Return the columns of the terminal, or of the variable COLUMNS; a large number if there is neither."""
    if "COLUMNS" in os.environ or (sys.stdout is not None and sys.stdout.isatty()):
        return shutil.get_terminal_size().columns
    return _UNLIMITED


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right_aligned: Collection[int] = ()) -> str:
    """Format rows as a text table; as a list of fields per row where the table is wider than the terminal.

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
    if sum(widths) + 2 * (len(widths) - 1) > terminal_width():
        return _format_records(lines[0], lines[1:])
    return "\n".join(
        "  ".join(_pad(cell, widths[column], column in right_aligned) for column, cell in enumerate(line)).rstrip()
        for line in lines
    )


def _format_records(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format each row as lines of a heading and a text; empty texts, which repeat the row before, are left out."""
    names = [_pad(name, max(map(_width, header)), right_aligned=False) + "  " for name in header]
    records = []
    for row in rows:
        fields = [format_field(name, text) for name, text in zip(names, row, strict=False) if text]
        if len(row) < len(header):
            fields[-1] = format_field("", row[-1])  # It is no value of its column.
        records.append("\n".join(fields))
    return "\n\n".join(records)


def format_field(name: str, text: str, *, width: int = _UNLIMITED, max_lines: int | None = None) -> str:
    """Return a name and a text, wrapped to the terminal and aligned behind the name.

    Args:
        name: The name, with the space behind it.
        text: The text.
        width: Largest width, in columns.
        max_lines: Number of lines after which the text is cut off; None for all.
    """
    columns = max(min(width, terminal_width()) - len(name), _NARROWEST)
    if _width(text) > len(text):
        columns //= 2  # textwrap counts characters, of which some are two columns wide.
    lines = textwrap.wrap(text, columns, max_lines=max_lines, placeholder=" ...", break_on_hyphens=False)
    return name + ("\n" + " " * len(name)).join(lines)


def printable(text: str) -> str:
    """Replace control characters, which file names and servers may contain, by `?`."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _width(text: str) -> int:
    """Return the width of a text in terminal columns."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def _pad(text: str, width: int, right_aligned: bool) -> str:
    padding = " " * (width - _width(text))
    return padding + text if right_aligned else text + padding


class Progress:
    """A line on a terminal's standard error that says how many pictures are done; a context manager, which erases it.

    Args:
        total: Number of pictures; nothing is shown of one.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._is_shown = total > 1 and sys.stderr is not None and sys.stderr.isatty()

    def show(self, done: int) -> None:
        """Show the number of pictures that are done."""
        self._write(f"{done:,} of {self._total:,} pictures")

    def _write(self, text: str) -> None:
        if self._is_shown:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)  # Return, and erase the line.

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._write("")


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


def raise_if_of_service(error: ConvscopeError | None, fetch_card: Callable[[], object], so_far: str) -> None:
    """Raise the error of a picture if it is the service's, since the pictures behind it would fail too.

    Args:
        error: The picture's error; None if it has none.
        fetch_card: Fetches the model's card, for which the service runs the network once. Called after a `ServerError`.
        so_far: How far the run came, such as `12 of 40 pictures were measured`: a note of the error.

    Raises:
        ConvscopeError: The service failed.
    """
    try:
        if isinstance(error, SERVICE_ERRORS):
            raise error
        if isinstance(error, ServerError):
            fetch_card()
    except ConvscopeError as failure:
        failure.add_note(so_far)
        raise


def list_pictures(
    paths: Iterable[str], *, without: Iterable[Path] = (), suffixes: Collection[str] = PICTURE_SUFFIXES
) -> list[str]:
    """List picture files: a folder stands for those in it and its sub-folders, sorted by name.

    Args:
        paths: Files, folders, or `-` for standard input.
        without: Folders whose files are left out: those of the results, which are pictures too.
        suffixes: Suffixes of the files to list in a folder, in lower case.

    Raises:
        UsageError: A folder contains no picture, a path is empty, or standard input is closed or named more than once.
    """
    pictures: list[str] = []
    endings, left_out = tuple(suffixes), {one.resolve() for one in without}
    for path in paths:
        if not path:  # An unset shell variable; Path("") would be the current folder.
            raise UsageError("a picture's path must not be empty")
        if path == STANDARD_INPUT and sys.stdin is None:
            raise UsageError("standard input is closed")
        if path == STANDARD_INPUT and path in pictures:
            raise UsageError("- can be given once: standard input is one picture")
        if path == STANDARD_INPUT or not Path(path).is_dir():
            pictures.append(path)
            continue
        found: list[str] = []  # As text: a Path for each would take longer than to classify a small picture.
        for folder, folders, names in os.walk(Path(path)):
            if Path(folder).resolve() in left_out:
                folders.clear()  # And so none of them is entered.
                continue
            chosen = [name for name in names if name.lower().endswith(endings)]
            found += filter(os.path.isfile, map(partial(os.path.join, folder), chosen))
        if not found:
            raise UsageError(f"no picture found in {path} ({', '.join(sorted(suffixes))})")
        found = [file.removeprefix(f".{os.sep}") for file in found]
        pictures += sorted(found, key=lambda file: file.replace(os.sep, "\0"))  # A folder a before a.png.
    return pictures


def read_picture_files(paths: Iterable[str]) -> Iterator[tuple[str, bytes | PictureFailure]]:
    """Read the picture files of a command, one after the other. An unreadable file does not affect the others.

    Args:
        paths: Files, folders, or `-` for standard input.

    Yields:
        Name and bytes of each picture, or its failure. A .npy file of several pictures becomes several entries, named
        `file.npy[0]`, `file.npy[1]` and so on.

    Raises:
        UsageError: A folder contains no picture, or standard input is named more than once.
    """
    from convscope._pictures import encode_pictures  # Imported here to keep --help fast.

    for path in list_pictures(paths):
        try:
            files = encode_pictures(sys.stdin.buffer if path == STANDARD_INPUT else path).files
        except (OSError, ValueError) as error:
            yield path, PictureFailure("unreadable", getattr(error, "strerror", None) or str(error))
        else:
            names = [path] if len(files) == 1 else [f"{path}[{index}]" for index in range(len(files))]
            yield from zip(names, files, strict=True)


def ensure_missing(folder: Path) -> None:
    """Raise FileExistsError if a folder that a command is about to create exists."""
    if folder.exists():
        raise FileExistsError(f"{folder} already exists")


def ensure_writable(folder: Path) -> None:
    """Create a folder, if need be; raise OSError unless files can be written to it."""
    import tempfile  # Imported here to keep --help fast.

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror}") from error
