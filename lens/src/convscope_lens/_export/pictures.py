"""Finds the pictures of an export: files, folders, .npy files of several, tar files, and CSV files of paths."""

from __future__ import annotations

import csv
import io
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from convscope import encode_pictures
from convscope.commands import PICTURE_SUFFIXES, STANDARD_INPUT, list_pictures

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = PICTURE_SUFFIXES | {".tar"}  # Suffixes of the files to list in a folder.


class Entry(NamedTuple):
    """A picture that has not been read yet; the client takes it like an open file.

    Attributes:
        path: As typed or found; `many.npy[3]` for a picture of a .npy file, `shard.tar/0007.jpg` for one of a tar file.
        key: Of a picture in a tar file its key, as WebDataset forms it: the name up to the first dot of its last part.
        read: Returns the picture file. Raises OSError or ValueError if it cannot be read.
    """

    path: str
    key: str | None
    read: Callable[[], bytes]


class Pictures:
    """The pictures of an export, in order. They can be gone through more than once, and are not kept in memory.

    Args:
        sources: Picture files, folders, `.npy` files of several pictures, `.tar` files, `.csv` files of paths, and `-`
            for standard input, which is read at once.
        without: Folders whose files are left out: those of the results.

    Attributes:
        standard_input: What standard input held; empty if it is no source.

    Raises:
        UsageError: A folder contains no picture, or standard input is named more than once.
    """

    def __init__(self, sources: Iterable[str], *, without: Iterable[Path]) -> None:
        self._paths = list_pictures(sources, without=without, suffixes=SUFFIXES)
        self.standard_input = sys.stdin.buffer.read() if STANDARD_INPUT in self._paths else b""

    def __iter__(self) -> Iterator[Entry]:
        for path in self._paths:
            if path == STANDARD_INPUT:
                yield from _entries_of_bytes(path, self.standard_input)
            elif path.lower().endswith(".csv"):
                yield from _entries_of_csv(path)
            else:
                yield from _entries_of_file(path)


def _entries_of_file(path: str) -> Iterable[Entry]:
    suffix = path.lower().rpartition(".")[2]
    if suffix == "tar":
        return _entries_of_tar(path)
    pictures = _open_npy(path) if suffix == "npy" else None
    if pictures is None or len(pictures) == 1:
        return [Entry(path, None, partial(_read_file, path))]
    return (Entry(f"{path}[{index}]", None, partial(_npy_file, pictures, index)) for index in range(len(pictures)))


def _entries_of_bytes(path: str, data: bytes) -> Iterator[Entry]:
    """Yield the pictures of standard input: one, or those of a .npy file."""
    try:
        files = encode_pictures(data).files
    except ValueError:  # Raised again when it is read.
        files = [data]
    if len(files) == 1:
        yield Entry(path, None, lambda: _one_file(data))
    else:
        for index, file in enumerate(files):
            yield Entry(f"{path}[{index}]", None, partial(bytes, file))


def _read_file(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123  # With a Path, a small picture takes half as long again.
        return _one_file(file.read())


def _one_file(data: bytes) -> bytes:
    """Return the content of a file, which is one picture."""
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(np.lib.format.MAGIC_PREFIX) and len(encode_pictures(data).files) > 1:
        raise ValueError("it contains several pictures; its name must end in .npy")
    return data


def _open_npy(path: str) -> NDArray[Any] | None:
    """Map a .npy file of several pictures into memory, (N, H, W, C); None if the file is not one."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception:  # A malformed header can raise almost anything. The row of the file will say why.
        return None
    is_several = array.ndim == 4 and array.size and array.dtype.newbyteorder("=") in (np.uint8, np.float32)
    return array if is_several else None


def _npy_file(pictures: NDArray[Any], index: int) -> bytes:
    """Return a picture of (N, H, W, C) as a .npy file."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(pictures[index], pictures.dtype.newbyteorder("<")), allow_pickle=False)
    return file.getvalue()


def _entries_of_tar(path: str) -> Iterator[Entry]:
    """Yield the pictures of an uncompressed tar file. Where the file is damaged, an entry of its own path follows."""
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # It would keep a record of each.
                if not member.isdir() and PurePosixPath(member.name).suffix.lower() in PICTURE_SUFFIXES:
                    folder, slash, name = member.name.rpartition("/")
                    key = folder + slash + name.partition(".")[0]
                    read = partial(_read_member, path, member.offset_data, member.size)
                    if not member.isfile() or member.issparse():
                        read = partial(
                            _raise, ValueError("it is a link or a sparse file in the tar file: add it whole")
                        )
                    yield Entry(f"{path}/{member.name}", key, read)
            if _read_at(path, archive.offset, tarfile.BLOCKSIZE).strip(b"\0"):  # Zeros are its end.
                raise tarfile.ReadError("a header is damaged, and the rest is not read")
    except Exception as error:  # A malformed header can raise almost anything.
        yield Entry(path, None, partial(_raise, ValueError(getattr(error, "strerror", None) or str(error))))


def _read_member(path: str, offset: int, size: int) -> bytes:
    if not 0 <= size <= Path(path).stat().st_size - offset:
        raise ValueError("the tar file ends within the picture")
    return _one_file(_read_at(path, offset, size))


def _read_at(path: str, offset: int, size: int) -> bytes:
    with Path(path).open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _raise(error: Exception) -> bytes:
    raise error


def _entries_of_csv(path: str) -> Iterator[Entry]:
    """Yield the pictures of the column `path`, or of the first one without such a heading; blank lines are none."""
    with Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        try:
            first = next(rows, [])
            column = first.index("path") if "path" in first else 0
            for row in rows if "path" in first else chain([first], rows):
                listed = row[column] if len(row) > column else ""
                if listed:
                    yield from _entries_of_file(listed)
                elif row:
                    error = ValueError("the row of the .csv file has no path")
                    yield Entry(f"{path}, line {rows.line_num}", None, partial(_raise, error))
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num}: {error}") from error
