"""The pictures that a command names: read, asked about and saved; one that fails does not fail the others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from convscope._pictures import encode_pictures

if TYPE_CHECKING:
    from convscope._explanation import Explanation
    from convscope._prediction import Prediction

PICTURES_A_REQUEST = 64  # What a service takes at once, unless its archive says otherwise.

Found = TypeVar("Found", "Prediction", "Explanation")


class Failure(NamedTuple):
    """Why a picture has no result.

    Attributes:
        code: For programs; `unreadable`, or the service's.
        message: For people.
    """

    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


@dataclass(frozen=True)
class Row(Generic[Found]):
    """What became of one picture.

    Attributes:
        picture: Its path as given; of a file of several pictures with [its number].
        found: What the service answered; None if the picture could not be read.
        error: Why it has no result; None if it has one.
        saved: Where it was written, if anywhere.
    """

    picture: str
    found: Found | None
    error: Failure | None = None
    saved: Path | None = None


def ask_about(paths: Sequence[str], ask: Callable[[list[bytes]], list[Found]], *, save: str | None) -> list[Row[Found]]:
    """Ask about picture files, at most 64 pictures in a request.

    Args:
        paths: Picture files.
        ask: Asks about the pictures of one request, and returns what was found in each.
        save: Directory to write each picture's result below; None for not.

    Returns:
        A row for each picture, in order; several for a .npy file of several pictures.

    Raises:
        ConvscopeError: A request as a whole failed.
        FileExistsError: A result's folder exists. Nothing was asked then.
        OSError: A result cannot be written.
        ValueError: An option is out of range.
    """
    pictures = read(paths)
    folders = [None] * len(pictures) if save is None else new_folders(Path(save), [name for name, _ in pictures])
    sent = [file for _, file in pictures if isinstance(file, bytes)]
    starts = range(0, max(len(sent), 1), PICTURES_A_REQUEST)  # Without a picture, too, the options are looked at.
    answers = iter([found for start in starts for found in ask(sent[start : start + PICTURES_A_REQUEST])])
    rows: list[Row[Found]] = []
    for (name, file), folder in zip(pictures, folders, strict=True):
        if not isinstance(file, bytes):
            rows.append(Row(name, None, file))
            continue
        found = next(answers)
        if found.error is not None:
            rows.append(Row(name, found, Failure(found.error.code, found.error.message)))
        else:
            rows.append(Row(name, found, saved=None if folder is None else found.save(folder)))
    return rows


def read(paths: Sequence[str]) -> list[tuple[str, bytes | Failure]]:
    """Read picture files.

    Args:
        paths: Of PNG, JPEG, WebP or .npy files.

    Returns:
        Of each picture its name and its file, or why there is none. A file of several pictures becomes several, named
        with [their numbers].
    """
    pictures: list[tuple[str, bytes | Failure]] = []
    for path in paths:
        try:
            files = encode_pictures(path).files
        except (OSError, ValueError) as error:
            pictures.append((path, Failure("unreadable", getattr(error, "strerror", None) or str(error))))
        else:
            names = [path] if len(files) == 1 else [f"{path}[{number}]" for number in range(len(files))]
            pictures += zip(names, files, strict=True)
    return pictures


def new_folders(below: Path, names: Sequence[str]) -> list[Path]:
    """Choose a folder for each picture, named after it, that is no other's.

    Args:
        below: Where the folders are to be.
        names: Of the pictures.

    Returns:
        The folders, which are not made yet.

    Raises:
        FileExistsError: One exists.
    """
    folders: dict[Path, None] = {}  # A set that keeps its order.
    for name in names:
        folder = next(folder for folder in _candidates(below, name) if folder not in folders)
        refuse_existing(folder)
        folders[folder] = None
    return list(folders)


def _candidates(below: Path, name: str) -> Iterator[Path]:
    """Yield `cat`, `cat-2`, `cat-3` and so on."""
    stem = Path(name).stem + (name[name.rindex("[") :] if name.endswith("]") and "[" in name else "")
    yield below / stem
    yield from (below / f"{stem}-{number}" for number in itertools.count(2))


def refuse_existing(folder: Path) -> None:
    """Raise FileExistsError if a folder that is to be new exists."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: remove it, or save elsewhere")
