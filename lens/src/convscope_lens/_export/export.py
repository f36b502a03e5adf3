"""Exports features and scores of any number of pictures, and resumes an export that was killed.

Until the result is complete there is a folder `<out>.parts` beside it:

    settings.json   the settings of the rows; an export resumes only with the same
    progress.json   the number of complete parts, written after each of them
    data/           the parts, each of `rows_per_part` rows; see `formats`
    lock            held by the process that writes

A part is on disk before progress.json counts it. A process that resumes skips the pictures of the counted parts, and
makes the next part again. At the end the result is moved to its name, and then the folder is removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from convscope import DeadlineExceeded, ImageTooLarge, ReplyTooLarge, ServerError, TooManyImages
from convscope.commands import SERVICE_ERRORS, UsageError

from convscope_lens._export.formats import FORMATS, INDEX_TYPES, Column, Layout, Part, Store, sync, write_json
from convscope_lens._export.pictures import Entry, Pictures

if TYPE_CHECKING:
    from convscope import Client, ModelCard, Prediction
    from numpy.typing import NDArray

PACKAGES = {".parquet": "pyarrow", ".zarr": "zarr"}
PART_ROWS = 1024
PART_BYTES = 16 * 2**20  # Size of the arrays of a part.
BATCH = 8  # Pictures per request: large files must fit into memory, and into a request.
ANY_SIZE = 224  # Height and width of the reference picture for a network that takes any.
TOLERANCE = 1e-3  # Tolerance of the reference, as a share of its largest value; engines differ by less in float32.
# Errors that may be due to the other pictures of the request, or be temporary.
SHARED = (ServerError, DeadlineExceeded, ReplyTooLarge, TooManyImages, ImageTooLarge)


class Exported(NamedTuple):
    """A complete export.

    Attributes:
        out: The file or folder.
        rows: Number of rows, one for each picture.
        failed: How many of them are errors.
        resumed: How many of them an earlier run had written.
    """

    out: Path
    rows: int
    failed: int
    resumed: int


class Row(NamedTuple):
    """A picture and its prediction, whose error, if it has one, is the picture's own."""

    entry: Entry
    prediction: Prediction


def export(
    client: Client,
    pictures: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    model: str,
    layers: str | Iterable[str] = (),
    pool: int | None = None,
    map_dtype: Literal["float32", "float16"] = "float32",
    all_scores: bool = False,
    version: str | None = None,
    deadline_s: float | None = None,
    concurrency: int = 4,
    batch: int | None = None,
    rows_per_part: int | None = None,
    existing: Literal["error", "skip", "overwrite"] = "error",
    progress: bool = False,
) -> Exported:
    """Write features and scores of pictures into a data set, a row for each picture, in their order.

    Called again with the same arguments, an interrupted export resumes. Pictures are read when they are sent; memory
    does not grow with their number, except for the names of the files in folders.

    Args:
        client: An open client.
        pictures: Paths of picture files, folders, `.npy` files of one picture or several, `.tar` files (the pictures in
            them, with WebDataset's keys), and `.csv` files of paths; `-` for standard input.
        out: The result: a `.parquet` file, a Zarr group `.zarr`, or, without a suffix, a folder of `.npy` shards. Until
            it is complete, `<out>.parts` holds the rows.
        model: Name of the model.
        layers: Layers whose maps to write, each in a column of its name: names, one name, or `"all"`; by default none.
        pool: Average each map down to pool x pool cells; 1 for one number per channel. None for whole maps.
        map_dtype: Dtype of the maps, on the wire and in the result.
        all_scores: Whether to write the scores of all classes too, as `probabilities` and `logits`, (K,), float32.
        version: Version of the model; None for the server's default.
        deadline_s: Deadline of each request, in seconds; None for the client's.
        concurrency: Number of concurrent requests.
        batch: Pictures per request; None for 8, or fewer if their maps do not fit into a reply.
        rows_per_part: Rows that are written at a time: a row group, a shard, or a chunk. None for 1,024, or as many as
            fit into 16 MiB. After a kill, at most two parts are computed again.
        existing: What to do if `out` is complete: `error`, `skip`, or `overwrite` to make it again, which also begins
            an interrupted export again. Only what an export has written is replaced.
        progress: Whether to show a progress bar, with tqdm.

    Returns:
        The result, and how many of its rows are errors: pictures that cannot be read, or that the service rejects.

    Raises:
        ConvscopeError: The service failed, or rejected the options. The rows so far are kept.
        FileExistsError: `out` exists, and is not to be replaced.
        ImportError: A package of the extra `export` is missing.
        OSError: `out` cannot be written, another process is writing it, or a `.csv` file cannot be read.
        ValueError: An option is out of range or does not suit the model, there are no pictures, the interrupted export
            was made with other settings, or the served model or the list of pictures changed meanwhile.
    """
    out = Path(out)
    if not out.name:
        raise ValueError(f"out must have a name, unlike {str(out)!r}")
    if out.suffix not in FORMATS:
        raise ValueError(f"out must end in .parquet or .zarr, or in no suffix for .npy shards, not in {out.suffix}")
    for name, number in (("rows_per_part", rows_per_part), ("batch", batch), ("concurrency", concurrency)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
    for package in filter(None, (PACKAGES.get(out.suffix), "tqdm" if progress else None)):
        _import(package)
    store_type = FORMATS[out.suffix]
    parts = out.with_name(f"{out.name}.parts")
    complete = _read_record(store_type, out) if out.exists() else None
    if complete is not None and existing == "error" and not parts.exists():
        raise FileExistsError(f"{out} already exists; see --skip-existing and --overwrite")
    sources = [pictures] if isinstance(pictures, str | os.PathLike) else pictures
    found = Pictures([os.fspath(source) for source in sources], without=[out, parts])
    digest = hashlib.sha256(found.standard_input)  # It has no name that tells one picture from another.
    total = sum(1 for _ in _hashed(found, digest))
    if not total:
        raise UsageError("there are no pictures to export")
    plan = _plan(client, model, version, layers, pool, map_dtype, all_scores, deadline_s)
    size = rows_per_part or max(1, min(PART_ROWS, PART_BYTES // max(_row_bytes(plan.columns), 1)))
    size = min(size, total)  # Zarr fills the last chunk up.
    pictures_text = f"{total}, whose names have the SHA-256 {digest.hexdigest()}"
    settings = {**plan.settings, "rows_per_part": size, "pictures": pictures_text}
    if complete is not None and existing != "overwrite":
        _check_settings(out, complete, settings, plan.reference)
        shutil.rmtree(parts, ignore_errors=True)  # Of a process that was killed before it could do so itself.
        return Exported(out, total, complete["failed"], total)

    parts.mkdir(parents=True, exist_ok=True)
    with _locked(parts):
        if complete is None and out.exists():
            (parts / "lock").unlink()
            with suppress(OSError):  # It may hold what is no export.
                parts.rmdir()
            raise FileExistsError(f"another process has written {out} meanwhile; see --skip-existing and --overwrite")
        if existing == "overwrite":
            _remove(out)
            if (parts / "settings.json").exists():
                _remove(*(parts / name for name in ("progress.json", "data", "settings.json")))
        counted = _begin(parts, settings, plan.reference)
        resumed = min(counted["parts"] * size, total)
        read_again = hashlib.sha256(found.standard_input)
        entries = islice(_hashed(found, read_again), resumed, None)
        rows = _rows(client, entries, plan, concurrency=concurrency, batch=plan.batch if batch is None else batch)
        with closing(rows), _progress_bar(rows, total, resumed, progress) as shown:
            layout = Layout(plan.index, plan.columns, total, size)
            store, counted = _write_parts(store_type, layout, parts, plan, iter(shown), counted)
        if read_again.digest() != digest.digest():
            raise ValueError("the list of pictures changed while they were read; see --overwrite")
        store.finish(counted["parts"], {**settings, "failed": counted["failed"]}).replace(out)
        sync(out.parent)
        shutil.rmtree(parts)
    return Exported(out, total, counted["failed"], resumed)


@dataclass(frozen=True)
class _Plan:
    """The requests to the service, and the columns of the result.

    Attributes:
        options: Arguments of `predict` and `predict_many`.
        index: Names of the columns with one value a row.
        columns: The columns with an array a row.
        reference: The network's answer to a picture of noise.
        batch: Pictures per request.
        settings: The settings of the rows, as JSON types.
    """

    options: dict[str, Any]
    index: tuple[str, ...]
    columns: dict[str, Column]
    reference: _Reference
    batch: int
    settings: dict[str, Any]


def _row_bytes(columns: Mapping[str, Column]) -> int:
    """Return the bytes of a row's arrays."""
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in columns.values())


def _plan(
    client: Client,
    model: str,
    version: str | None,
    layers: str | Iterable[str],
    pool: int | None,
    map_dtype: Literal["float32", "float16"],
    all_scores: bool,
    deadline_s: float | None,
) -> _Plan:
    """Check the arguments of `export` with the model's card and a first request."""
    if map_dtype not in ("float32", "float16"):
        raise ValueError(f"map_dtype must be float32 or float16, not {map_dtype!r}")
    card = client.model_card(model, version, deadline_s=deadline_s)
    scores = card.scores or ("softmax" if card.classes else "none")  # A service may be too old to say.
    if all_scores and scores == "none":
        raise ValueError(f"{model} has no scores")
    # Requests name the version: the server's default may change meanwhile.
    options: dict[str, Any] = {"model": model, "version": card.version, "deadline_s": deadline_s}
    options["top_k"] = 0 if all_scores or scores == "value" else 1
    chosen = [layer.name for layer in card.select_layers(layers)]
    if chosen:
        if pool is None and card.input.height is None:
            raise ValueError(f"{model} takes pictures of any size, so its maps have no common shape: pool them")
        options |= {"layers": chosen, "pool": pool, "map_dtype": map_dtype}
    reference = _Reference(client, card, options)

    index = ["path", "key", "notes", "error_code", "error_message"]
    columns: dict[str, Column] = {}
    if scores == "value":
        columns["values"] = Column((len(card.classes),), "float32")
    elif scores != "none":
        index[2:2] = ["label", "class_index", "probability"]
        if all_scores:
            columns |= dict.fromkeys(("probabilities", "logits"), Column((len(card.classes),), "float32"))
    if clash := {*chosen} & {*INDEX_TYPES, *columns}:
        raise ValueError(f"layer {min(clash)} cannot be exported: another column has this name")
    columns |= {layer: Column(shape, map_dtype) for layer, shape in reference.shapes.items()}
    settings = {
        "model": model,
        "version": card.version,
        "layers": chosen,
        "pool": pool,
        "map_dtype": map_dtype,
        "all_scores": all_scores,
        "index": index,
        "columns": {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in columns.items()},
        "reference": reference.answer,
    }
    # Maps that are pooled to a known size are small, whatever the size of the picture.
    reply_bytes = 0 if card.input.height is None else _row_bytes(columns)
    return _Plan(
        options, tuple(index), columns, reference, min(BATCH, card.pictures_per_request(reply_bytes)), settings
    )


class _Reference:
    """The network's response to a picture of noise, which shows whether the served network is still the same.

    An archive can be replaced under the same version, and with it weights or labels.

    Args:
        client: An open client.
        card: The model's card.
        options: Options of `predict`.

    Attributes:
        shapes: Shapes of the maps, by layer.
        answer: A digest of the labels, and the scores and the mean of each map, as JSON types.

    Raises:
        ConvscopeError: The service failed, or rejects the options.
    """

    def __init__(self, client: Client, card: ModelCard, options: Mapping[str, Any]) -> None:
        size = (card.input.height or ANY_SIZE, card.input.width or ANY_SIZE, card.input.channels)
        # The stream of RandomState, unlike a Generator's, is the same in every version of numpy.
        self._picture = np.random.RandomState(0).randint(0, 256, size).astype(np.uint8)
        self._client = client
        self._options = {**options, "top_k": 0}
        [prediction] = client.predict([self._picture], **self._options)
        self.shapes = {layer: feature_map.shape for layer, feature_map in prediction.maps.items()}
        self.answer = self._summary(prediction)

    @staticmethod
    def _summary(prediction: Prediction) -> dict[str, Any]:
        scores = sorted(prediction.top, key=lambda score: score.index)
        labels = json.dumps([score.label for score in scores]).encode()
        values = [score.logit if score.value is None else score.value for score in scores]
        values += [float(feature_map.mean(dtype=np.float64)) for feature_map in prediction.maps.values()]
        return {"labels_sha256": hashlib.sha256(labels).hexdigest(), "values": values}

    def equals(self, other: Any) -> bool:
        """Return whether another answer is that of the same network."""
        first, second = (np.array(answer["values"], np.float64) for answer in (self.answer, other))
        if self.answer["labels_sha256"] != other["labels_sha256"] or first.shape != second.shape:
            return False
        scale = float(np.max(np.abs(first), initial=0))
        return np.allclose(first, second, rtol=TOLERANCE, atol=TOLERANCE * scale, equal_nan=True)

    def check(self) -> None:
        """Raise ValueError if the network has changed; ConvscopeError if the service fails."""
        [prediction] = self._client.predict([self._picture], **self._options)
        if not self.equals(self._summary(prediction)):
            raise ValueError(f"{self._options['model']} is another network than before; see --overwrite")


def _rows(
    client: Client, entries: Iterable[Entry], plan: _Plan, *, concurrency: int, batch: int
) -> Generator[Row, None, None]:
    """Yield the row of each picture, in order.

    Raises:
        ConvscopeError: The service failed.
        ValueError: The served model changed.
    """
    sent: deque[Entry] = deque()

    def pictures() -> Iterator[Entry]:
        for entry in entries:
            sent.append(entry)
            yield entry

    version = plan.options["version"]
    with closing(client.predict_many(pictures(), concurrency=concurrency, batch=batch, **plan.options)) as predictions:
        for prediction in predictions:
            entry = sent.popleft()
            if prediction.error is not None:
                prediction = _again(client, entry, prediction, plan)
            if prediction.version != version:
                raise ValueError(f"the reply is from version {prediction.version}, not {version}; see --overwrite")
            yield Row(entry, prediction)


def _again(client: Client, entry: Entry, prediction: Prediction, plan: _Plan) -> Prediction:
    """Return a failed prediction, or that of another attempt; raise its error if it is the service's."""
    if isinstance(prediction.error, SHARED):
        [prediction] = client.predict_many([entry], batch=1, **plan.options)
    if isinstance(prediction.error, ServerError):
        plan.reference.check()  # Raises if the service fails with any picture.
        [prediction] = client.predict_many([entry], batch=1, **plan.options)
    if isinstance(prediction.error, SERVICE_ERRORS):
        raise prediction.error
    return prediction


def _text(name: str) -> str:
    """Return a file name as text, with escapes for bytes that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _part(rows: Iterable[Row], size: int, plan: _Plan) -> Part:
    """Return the next rows as columns; of a picture with an error only its name and the error.

    Each row is copied as it arrives: predictions that are kept take longer to make and to free.
    """
    index: dict[str, list[Any]] = {name: [None] * size for name in plan.index}
    arrays: dict[str, NDArray[Any]] = {
        name: np.full((size, *shape), np.nan, dtype) for name, (shape, dtype) in plan.columns.items()
    }
    count = 0
    for (path, key, _), prediction in islice(rows, size):
        index["path"][count], index["key"][count] = _text(path), None if key is None else _text(key)
        if (error := prediction.error) is not None:
            cause = error.__cause__  # Of a picture that was not sent.
            index["error_code"][count] = "unreadable" if isinstance(cause, OSError | ValueError) else error.code
            index["error_message"][count] = _text(getattr(cause, "strerror", None) or error.message)
        else:
            maps, top = prediction.maps, prediction.top
            index["notes"][count] = ", ".join(prediction.notes) or None
            for layer in plan.options.get("layers", ()):
                arrays[layer][count] = maps[layer]
            if top and "label" in index:
                index["class_index"][count], index["label"][count], index["probability"][count] = top[0][:3]
            top.sort(key=lambda score: score.index)
            if "logits" in arrays:
                arrays["probabilities"][count] = [score.probability for score in top]
                arrays["logits"][count] = [score.logit for score in top]
            if "values" in arrays:
                arrays["values"][count] = [score.value for score in top]
        count += 1
    return Part(
        {name: values[:count] for name, values in index.items()},
        {name: values[:count] for name, values in arrays.items()},
    )


def _write_parts(
    store_type: type[Store], layout: Layout, folder: Path, plan: _Plan, rows: Iterator[Row], counted: dict[str, int]
) -> tuple[Store, dict[str, int]]:
    """Write the rows after those of the counted parts, each part while the rows of the next are received.

    Returns:
        The store with all parts, and the content of progress.json at the end: the number of parts, and of errors.
    """

    def write(part: Part, before: Mapping[str, int]) -> dict[str, int]:
        plan.reference.check()  # These rows came before, so they are of the network that the export began with.
        store.result().write(before["parts"], part)
        after = {"parts": before["parts"] + 1, "failed": before["failed"] + int(part.is_error.sum())}
        write_json(folder / "progress.json", after)
        return after

    with ThreadPoolExecutor(1, thread_name_prefix="convscope-export") as writer:
        store = writer.submit(store_type, folder / "data", layout)
        written: Future[dict[str, int]] | None = None
        while (part := _part(rows, layout.rows_per_part, plan)).index["path"]:
            if written is not None:
                counted = written.result()
            written = writer.submit(write, part, counted)
        return store.result(), counted if written is None else written.result()


def _begin(folder: Path, settings: Mapping[str, Any], reference: _Reference) -> dict[str, int]:
    """Make the folder of the parts, or check that an earlier process made it with the same settings.

    Returns:
        The number of complete parts, and that of errors in them.
    """
    try:
        found = json.loads((folder / "settings.json").read_bytes())
    except FileNotFoundError:
        if {path.name for path in folder.iterdir()} - {"lock", "_settings.json.incomplete"}:
            raise FileExistsError(f"{folder} already exists, and does not belong to an export") from None
        write_json(folder / "settings.json", settings)
    else:
        _check_settings(folder, found, settings, reference)
    (folder / "data").mkdir(exist_ok=True)
    try:
        counted: dict[str, int] = json.loads((folder / "progress.json").read_bytes())
    except FileNotFoundError:
        return {"parts": 0, "failed": 0}
    return counted


def _check_settings(path: Path, found: Mapping[str, Any], settings: Mapping[str, Any], reference: _Reference) -> None:
    """Raise ValueError if rows were made with other settings."""
    differences = [
        f"{name} {found.get(name)}, not {value}"
        for name, value in settings.items()
        if name not in ("columns", "reference") and found.get(name) != value
    ]
    if not differences and not (found["columns"] == settings["columns"] and reference.equals(found["reference"])):
        differences = [f"another network of the name {settings['model']} and the version {settings['version']}"]
    if differences:
        raise ValueError(f"{path} was made with {'; '.join(differences)}; see --overwrite")


def _read_record(store_type: type[Store], path: Path) -> Any:
    """Return the record of a complete export; raise FileExistsError if it is something else."""
    try:
        return store_type.read_record(path)
    except Exception as error:  # The libraries raise almost anything.
        raise FileExistsError(f"{path} already exists, and is not an export") from error


def _hashed(pictures: Iterable[Entry], digest: hashlib._Hash) -> Iterator[Entry]:
    """Pass on the pictures, and add their names to a digest."""
    for entry in pictures:
        digest.update(entry.path.encode("utf-8", "surrogateescape") + b"\0")
        yield entry


def _progress_bar(rows: Iterable[Row], total: int, done: int, enabled: bool) -> AbstractContextManager[Iterable[Row]]:
    """Return the rows; if enabled, with a bar that counts them and shows the rate and the time left."""
    if not enabled:
        return nullcontext(rows)
    bar: AbstractContextManager[Iterable[Row]] = _import("tqdm").tqdm(rows, total=total, initial=done, unit=" pictures")
    return bar


def _import(package: str) -> Any:
    """Import a package of the extra `export`."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f"export needs {package}: pip install './lens[export]' in convscope's repository") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which the system releases if the process is killed."""
    with (folder / "lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"another process is writing {folder}") from error
        yield


def _remove(*paths: Path) -> None:
    """Remove files and folders, if they are there."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
