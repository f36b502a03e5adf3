"""The formats of an export: Parquet, .npy shards with an index, and Zarr.

A store gets the rows in parts. It writes each part into a folder of its own, on disk before `write` returns, and makes
the result of the parts at the end. A part may be written again, which replaces it, so a part that a killed process left
incomplete does no harm. The caller keeps count of the complete parts.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

INDEX_TYPES: dict[str, type] = {  # Columns of one value a row; a row may lack it.
    "path": str,
    "key": str,
    "label": str,
    "class_index": int,
    "probability": float,
    "notes": str,
    "error_code": str,
    "error_message": str,
}
ZSTD_LEVEL = 1  # Compression level of Zarr's chunks: for maps two to four times as fast as the default, and as small.
RECORD = "convscope"  # Key of the export's settings in the metadata of Parquet and Zarr.


class Column(NamedTuple):
    """A column of arrays.

    Attributes:
        shape: Shape of a row.
        dtype: `float32` or `float16`.
    """

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Part:
    """Consecutive rows.

    Attributes:
        index: The columns of `INDEX_TYPES` that there are, one value a row; None where a row has none.
        arrays: The other columns, (rows, *shape); NaN in the rows of errors.
    """

    index: Mapping[str, list[Any]]
    arrays: Mapping[str, NDArray[Any]]

    @property
    def is_error(self) -> NDArray[np.bool_]:
        """Whether each row is an error, (rows,)."""
        return np.array([code is not None for code in self.index["error_code"]], bool)


@dataclass(frozen=True)
class Layout:
    """Layout of an export: its columns and parts.

    Attributes:
        index: Names of the columns of one value, of `INDEX_TYPES`.
        columns: The columns of arrays, by name.
        rows: Number of rows of all parts together.
        rows_per_part: Number of rows of each part but the last.
    """

    index: Sequence[str]
    columns: Mapping[str, Column]
    rows: int
    rows_per_part: int


class Store(ABC):
    """Writes parts.

    Args:
        folder: An existing folder that only the store uses.
        layout: What is written.

    Raises:
        ImportError: A package is missing.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder = folder
        self._layout = layout

    @abstractmethod
    def write(self, number: int, part: Part) -> None:
        """Write a part; when this returns, it is on disk."""

    @abstractmethod
    def finish(self, parts: int, record: Mapping[str, Any]) -> Path:
        """Return the complete result, a file or folder within the store's.

        Args:
            parts: Number of parts. Later ones, which a killed process may have left, are not read.
            record: Settings to keep in the result, as JSON types.
        """

    @staticmethod
    @abstractmethod
    def read_record(path: Path) -> Any:
        """Return the record of a complete result. Raises OSError, KeyError or ValueError if it is not one."""


class ParquetStore(Store):
    """A Parquet file for each part; at the end one file, with a row group for each part."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        super().__init__(folder, layout)
        import pyarrow

        types = {str: pyarrow.string(), int: pyarrow.int32(), float: pyarrow.float32()}
        fields = {name: types[INDEX_TYPES[name]] for name in layout.index}
        for name, column in layout.columns.items():
            element = pyarrow.from_numpy_dtype(column.dtype)
            fields[name] = pyarrow.list_(element, int(np.prod(column.shape)))
        self._schema = pyarrow.schema(fields)

    def write(self, number: int, part: Part) -> None:
        """Write a part as a file."""
        import pyarrow
        from pyarrow import parquet

        arrays = [pyarrow.array(part.index[name], self._schema.field(name).type) for name in self._layout.index]
        mask = pyarrow.array(part.is_error)
        for name, values in part.arrays.items():
            flat = pyarrow.array(values.reshape(-1))
            arrays.append(pyarrow.FixedSizeListArray.from_arrays(flat, type=self._schema.field(name).type, mask=mask))
        table = pyarrow.table(arrays, schema=self._schema)
        with complete_file(self._part(number)) as file:
            parquet.write_table(table, file, use_dictionary=["label", "notes", "error_code"])

    def finish(self, parts: int, record: Mapping[str, Any]) -> Path:
        """Write all parts into one file, one after the other."""
        from pyarrow import parquet

        path = self._folder / "_complete"
        schema = self._schema.with_metadata({RECORD: json.dumps(record)})
        with (
            complete_file(path) as file,
            parquet.ParquetWriter(file, schema, use_dictionary=["label", "notes", "error_code"]) as writer,
        ):
            for number in range(parts):
                writer.write_table(
                    parquet.ParquetFile(self._part(number)).read().replace_schema_metadata(schema.metadata)
                )
        return path

    def _part(self, number: int) -> Path:
        return self._folder / f"{number:06}.parquet"

    @staticmethod
    def read_record(path: Path) -> Any:
        """Return what the schema's metadata holds."""
        from pyarrow import parquet

        return json.loads((parquet.read_schema(path).metadata or {})[RECORD.encode()])


class NpyStore(Store):
    """A `.npy` file for each part and column, and `index.csv`, with the shard and row of each picture."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        super().__init__(folder, layout)
        self._shards, self._indexes = folder / "shards", folder / "indexes"
        self._shards.mkdir(exist_ok=True)
        self._indexes.mkdir(exist_ok=True)
        safe = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")  # As of the files that `Prediction.save` writes.
        self._stems = {
            name: name if safe.fullmatch(name) else f"{place}-" + re.sub(r"[^A-Za-z0-9_]", "_", name)[:100]
            for place, name in enumerate(layout.columns)
        }

    def write(self, number: int, part: Part) -> None:
        """Write the shards of a part, and its lines of the index."""
        shards = {self._shards / f"{number:06}-{self._stems[name]}.npy": part.arrays[name] for name in part.arrays}
        for path, values in shards.items():
            with path.open("wb") as file:  # np.save would hide why a file cannot be written.
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
                file.write(values.data)
        rows = zip(*part.index.values(), strict=True)
        lines = self._indexes / f"{number:06}.csv"
        lines.write_bytes(_csv_lines([[number, row, *values] for row, values in enumerate(rows)]))
        sync_files([*shards, lines])

    def finish(self, parts: int, record: Mapping[str, Any]) -> Path:
        """Write the index and the record; the shards are there."""
        with complete_file(self._shards / "index.csv") as file:
            file.write(_csv_lines([["shard", "row", *self._layout.index]]))
            for number in range(parts):
                with (self._indexes / f"{number:06}.csv").open("rb") as lines:
                    shutil.copyfileobj(lines, file)
        arrays = {name: {"file": f"{{shard:06}}-{stem}.npy"} for name, stem in self._stems.items()}
        write_json(self._shards / "export.json", {**record, "arrays": arrays})
        return self._shards

    @staticmethod
    def read_record(path: Path) -> Any:
        """Return what export.json holds."""
        return json.loads((path / "export.json").read_bytes())


def _csv_lines(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


class ZarrStore(Store):
    """A Zarr group with an array for each column, whose chunks are the parts."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        super().__init__(folder, layout)
        import zarr
        from zarr.codecs import ZstdCodec

        self._path = folder / "group"
        self._group = zarr.open_group(self._path, mode="a", zarr_format=3)
        for left in self._path.rglob("*.partial"):  # Files that a killed process was about to write.
            left.unlink()
        types = {str: (str, ""), int: ("int32", -1), float: ("float32", np.nan)}
        arrays: dict[str, tuple[tuple[int, ...], Any, Any]] = {
            name: ((), *types[INDEX_TYPES[name]]) for name in layout.index
        }
        arrays |= {name: (shape, dtype, np.nan) for name, (shape, dtype) in layout.columns.items()}
        for name, (shape, dtype, missing) in arrays.items():
            if name not in self._group:
                self._group.create_array(
                    name,
                    shape=(layout.rows, *shape),
                    chunks=(layout.rows_per_part, *shape),
                    dtype=dtype,
                    fill_value=missing,
                    compressors=ZstdCodec(level=ZSTD_LEVEL),
                    chunk_key_encoding={"name": "default", "separator": "."},
                )
        self._arrays: dict[str, Any] = {name: self._group[name] for name in arrays}
        for path in (self._path, *self._path.rglob("*")):
            sync(path)

    def write(self, number: int, part: Part) -> None:
        """Write a part as a chunk of each array.

        Chunks are encoded here as the arrays' metadata say: with zarr, whose threads hand each of them on twice, an
        export of small maps takes a tenth longer.
        """
        from numcodecs import VLenUTF8, Zstd

        columns: dict[str, Any] = {**part.index, **part.arrays}
        written = []
        for name, values in columns.items():
            array, is_text = self._arrays[name], INDEX_TYPES.get(name) is str
            path = self._path / name / ".".join(["c", str(number), *["0"] * (array.ndim - 1)])
            if name in part.index:
                if set(values) == {None} and not path.exists():
                    continue  # No chunk means that all values are missing.
                values = [array.fill_value if value is None else value for value in values]
            chunk = np.full(array.chunks, array.fill_value, object if is_text else array.dtype)
            chunk[: len(values)] = values
            path.write_bytes(Zstd(level=ZSTD_LEVEL).encode(VLenUTF8().encode(chunk) if is_text else chunk))
            written.append(path)
        sync_files(written)

    def finish(self, parts: int, record: Mapping[str, Any]) -> Path:
        """Add the record to the group's attributes."""
        self._group.attrs[RECORD] = dict(record)
        sync_files([self._path / "zarr.json"])
        return self._path

    @staticmethod
    def read_record(path: Path) -> Any:
        """Return what the group's attributes hold."""
        import zarr

        return zarr.open_group(path, mode="r").attrs[RECORD]


FORMATS: dict[str, type[Store]] = {".parquet": ParquetStore, ".zarr": ZarrStore, "": NpyStore}  # By suffix.


@contextmanager
def complete_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that gets its name when it is complete and on disk; an existing one is replaced."""
    incomplete = path.with_name(f"_{path.name}.incomplete")  # Readers of Parquet folders pass over a leading `_`.
    with incomplete.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    incomplete.replace(path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as `complete_file` does."""
    with complete_file(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


def sync_files(paths: Sequence[Path]) -> None:
    """Wait until files and their names are on disk: all at the end, as the first wait then does for most of them."""
    for path in (*paths, *{path.parent for path in paths}):
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
