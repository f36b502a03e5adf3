"""What `convscope predict`, `explain`, `card` and `models` do with pictures and print: tables or JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from convscope._card import format_size
from convscope._exceptions import ConvscopeError
from convscope._prediction import format_timing, score_headings, score_texts
from convscope.commands import (
    STANDARD_INPUT,
    PictureFailure,
    Progress,
    UsageError,
    ensure_writable,
    format_table,
    list_pictures,
    printable,
    raise_if_of_service,
    read_picture_files,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from convscope._card import ModelCard
    from convscope._explanation import Explanation
    from convscope._options import ServedModel
    from convscope._prediction import Prediction

REQUEST_BYTES = 32 * 2**20  # Size of the pictures of a request with several: half of the server's default limit.
_MISSING = "–"
_MOST_NAMED = 3  # Pictures that were converted alike.

Result = TypeVar("Result", "Prediction", "Explanation")


@dataclass(frozen=True)
class PictureResult(Generic[Result]):
    """The result of one picture.

    Attributes:
        picture: Path as given or found in a folder; `path[i]` for picture i of a .npy file.
        result: The result; None if the picture was not sent, or if its request failed.
        error: Why there is no result; None if there is one, or if the picture was skipped.
        saved: Folder with the result; None if it was not saved.
        skipped: Whether the folder contained a result of an earlier run, so that the picture was not sent.
    """

    picture: str
    result: Result | None
    error: PictureFailure | None = None
    saved: Path | None = None
    skipped: bool = False

    @property
    def why(self) -> str:
        """Why there is no result to show; empty if there is one."""
        return f"skipped: {self.saved} exists" if self.skipped else str(self.error) if self.error else ""


class ResultFolders:
    """The folders that results are saved to: one per picture, named after it and distinct.

    Args:
        parent: The directory that contains them.
        existing: What to do with an existing folder: `error`, `skip` the picture, or `overwrite` the result in it.
        made_of: Fields of the manifest that a result must have for its picture to be skipped.

    Raises:
        OSError: The directory cannot be written to.
    """

    def __init__(self, parent: Path, existing: str, made_of: Mapping[str, str | None]) -> None:
        ensure_writable(parent)
        self._made_of = made_of
        self.parent = parent
        self.existing = existing
        self._numbers: dict[str, int] = {}  # Number of the last picture, by name.
        self._chosen: set[str] = set()

    def choose(self, name: str) -> tuple[Path, bool]:
        """Choose `cat`, `cat-2`, `cat-3` and so on for a picture.

        Returns:
            The folder, and whether to skip the picture.

        Raises:
            FileExistsError: The folder exists, and holds no result of this picture, or is not to be overwritten.
        """
        end = name.rindex("[") if name.endswith("]") and "[" in name else len(name)
        stem = ("stdin" if name[:end] == STANDARD_INPUT else Path(name[:end]).stem) + name[end:]
        number = self._numbers.get(stem, 0) + 1
        while (place := stem if number == 1 else f"{stem}-{number}") in self._chosen:
            number += 1
        self._numbers[stem] = number
        self._chosen.add(place)
        folder = self.parent / place
        if not folder.exists():
            return folder, False
        if self.existing == "error":
            raise FileExistsError(f"{folder} already exists; see --skip-existing and --overwrite")
        try:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            found = {field: manifest.get(field) for field in ("source", *self._made_of)}
        except (OSError, ValueError, AttributeError) as error:
            raise FileExistsError(f"{folder} already exists, and holds no result") from error
        for field, value in {"source": name, **self._made_of}.items():
            if self.existing == "skip" and found[field] != value:
                raise FileExistsError(f"{folder} already exists, and its {field} is {found[field]}, not {value}")
        return folder, self.existing == "skip"


def process_pictures(
    paths: Sequence[str],
    send: Callable[[list[bytes]], list[Result]],
    *,
    pictures_per_request: Callable[[], int],
    request_id: str | None,
    folders: ResultFolders | None,
    fetch_card: Callable[[], object],
) -> tuple[list[PictureResult[Result]], ConvscopeError | None]:
    """Send picture files in as few requests as the model allows. A failed picture or request does not affect others.

    If the service fails, no more requests are sent. Pictures are read as they are sent, and a line on the terminal says
    how many are done.

    Args:
        paths: Picture files, folders, or `-` for standard input.
        send: Sends the pictures of one request, and returns a result for each.
        pictures_per_request: Returns the largest number of pictures per request; called if there are several.
        request_id: The user's id for the request, which is rejected if there are several requests.
        folders: Where to write each picture's result, as soon as it is received; None to write nothing.
        fetch_card: Fetches the model's card, to see whether the service has failed.

    Returns:
        One result per picture, in order; several for a .npy file of several pictures. And the error of the service,
        after which there are no results; None if it did not fail.

    Raises:
        ConvscopeError: All requests failed.
        FileExistsError: The folder of a result exists. Nothing was sent, unless it is that of a .npy file.
        OSError: The results cannot be written.
        UsageError: An option is wrong.
    """
    sources: list[tuple[str, bytes | PictureFailure | None]] = []  # Name and file; None for one to be read when needed.
    for path in list_pictures(paths, without=[] if folders is None else [folders.parent]):
        several = path == STANDARD_INPUT or path.endswith(".npy")  # Perhaps: how many is known when it has been read.
        sources += read_picture_files([path]) if several else [(path, None)]
    results: list[PictureResult[Result] | None] = [None] * len(sources)
    saved: list[Path | None] = [None] * len(sources)
    if folders is not None:
        for index, (name, _) in enumerate(sources):
            saved[index], skip = folders.choose(name)
            if skip:
                results[index] = PictureResult(name, None, saved=saved[index], skipped=True)
    todo = [index for index, result in enumerate(results) if result is None]
    size = pictures_per_request() if len(todo) > 1 else 1
    if request_id is not None and len(todo) > size:
        raise UsageError(f"--request-id is for one request; these pictures need {-(-len(todo) // size)}")
    batch: list[tuple[int, bytes]] = []
    errors: list[ConvscopeError] = []
    requests = 0
    progress = Progress(len(sources))

    def send_batch() -> None:
        nonlocal requests
        requests += 1
        indexes = [index for index, _ in batch]
        files = [file for _, file in batch]
        batch.clear()
        try:
            received = send(files)
        except ConvscopeError as error:
            errors.append(error)
            if indexes and len(todo) > 1:
                done = sum(result is not None for result in results)
                raise_if_of_service(error, fetch_card, f"{done:,} of {len(sources):,} pictures were done before")
            for index in indexes:
                results[index] = PictureResult(sources[index][0], None, PictureFailure(error.code, str(error)))
        else:
            for index, result in zip(indexes, received, strict=True):
                results[index] = _picture_result(sources[index][0], result, saved[index], folders)
        progress.show(sum(result is not None for result in results))

    failure: ConvscopeError | None = None
    try:
        with progress:
            for index in todo:
                name, file = sources[index]
                if file is None:
                    [(_, file), *others] = read_picture_files([name])
                    if others:
                        file = PictureFailure("unreadable", "it contains several pictures; its name must end in .npy")
                if not isinstance(file, bytes):
                    results[index] = PictureResult(name, None, file)
                    continue
                if batch and request_id is None and len(file) + sum(len(other) for _, other in batch) > REQUEST_BYTES:
                    send_batch()
                batch.append((index, file))
                if len(batch) == size:
                    send_batch()
            if batch or (todo and not requests):  # The options are checked even if no picture is readable.
                send_batch()
    except ConvscopeError as error:
        failure = error
    if errors and len(errors) == requests:
        raise failure or errors[0]
    return [result for result in results if result is not None], failure


def _picture_result(
    name: str, result: Result, folder: Path | None, folders: ResultFolders | None
) -> PictureResult[Result]:
    """Return the result of a picture, after saving it to `folder`."""
    if result.error is not None:
        return PictureResult(name, result, PictureFailure(result.error.code, result.error.message))
    if folder is not None and folders is not None:
        result.save(folder, source=name, overwrite=folders.existing == "overwrite")
    return PictureResult(name, result, saved=folder)


def format_predictions(results: Sequence[PictureResult[Prediction]]) -> str:
    """Format predictions as text.

    Args:
        results: One per picture.

    Returns:
        A table of scores; a line for each way in which pictures were converted; a table of maps and one of the first
        request's timing; the folders; the ids of the requests in which a picture failed.
    """
    scores: list[list[str]] = []
    maps: list[list[str]] = []
    for row in results:
        if row.result is None or row.error is not None:
            scores.append([row.picture, row.why])
            continue
        for position, texts in enumerate(_score_rows(row.result)):
            scores.append([row.picture if position == 0 else "", *texts])
        if not row.result.top:
            scores.append([row.picture, "no classes"])
        maps += [[row.picture, *texts] for texts in _map_rows(row.result)]
    first = _first_result(results)
    parts = []
    if first is not None:
        parts.append(printable(f"{first.model} {first.version} ({first.engine}, {first.device})"))
    headings = ("probability", "logit") if first is None else score_headings(first)
    compared = any(row.result is not None and row.error is None and row.result.change is not None for row in results)
    changes = [f"{heading} change" for heading in headings if compared]
    header = ["picture", "class", "index", *headings, *changes]
    parts.append(format_table(header, scores, right_aligned=range(2, len(header))))
    parts += _format_notes(results)
    if maps:
        header = ["picture", "layer", "shape", "channels", "min", "mean", "max", *["largest change"] * compared]
        parts.append(format_table(header, maps, right_aligned=range(3, len(header))))
    if first is not None and first.timing is not None:
        parts.append(format_timing(first.timing))
    parts += _format_saved(results)
    failed = dict.fromkeys(row.result.request_id for row in results if row.result is not None and row.error is not None)
    if failed:
        parts.append("\n".join(f"request {printable(request_id)}" for request_id in failed))
    return "\n\n".join(parts)


def predictions_json(results: Sequence[PictureResult[Prediction]]) -> dict[str, Any]:
    """Return predictions as JSON types: all scores, and of each map its shape, channels and range.

    With several requests, the id and the timing are those of the first.
    """
    first = _first_result(results)
    return {
        "model": first and first.model,
        "version": first and first.version,
        "engine": first and first.engine,
        "device": first and first.device,
        "scores": first and first.scores,
        "request_id": first and first.request_id,
        "timing": None
        if first is None or first.timing is None
        else dataclasses.asdict(first.timing) | {"outside_s": first.timing.outside_s},
        "results": [_prediction_json(row) for row in results],
    }


def _prediction_json(row: PictureResult[Prediction]) -> dict[str, Any]:
    if row.result is None or row.error is not None:
        return _without_result_json(row)
    channels = row.result.channels
    return {
        "picture": row.picture,
        "top": [score.as_values() for score in row.result.top],
        "maps": {
            name: {"shape": list(feature_map.shape), "channels": list(channels[name]), **_range(feature_map)}
            for name, feature_map in row.result.maps.items()
        },
        **({"notes": list(row.result.notes)} if row.result.notes else {}),
        **_change_json(row.result),
        "saved": row.saved and str(row.saved),
    }


def _score_rows(prediction: Prediction) -> list[list[str]]:
    """Return a table row for each score; with what edits changed, and then a row for each class that they removed."""
    change = prediction.change
    rows = [[score.label, str(score.index), *score_texts(score)] for score in prediction.top]
    if change is None:
        return rows
    rows += [
        [score.label, str(score.index), *(_MISSING for _ in score_texts(score))]
        for score in change.top[len(prediction.top) :]
    ]
    return [[*row, *score_texts(score, signed=True)] for row, score in zip(rows, change.top, strict=True)]


def _largest_change(difference: NDArray[np.float32]) -> float | None:
    """Return the difference that is farthest from 0, with its sign; None for an empty map."""
    return float(difference.flat[np.abs(difference).argmax()]) if difference.size else None


def _change_json(prediction: Prediction) -> dict[str, Any]:
    """Return what edits changed: the differences of scores, and of each map the largest; nothing if not compared."""
    change = prediction.change
    if change is None:
        return {}
    return {
        "change": {
            "top": [score.as_values() for score in change.top],
            "maps": {name: {"largest": _largest_change(difference)} for name, difference in change.maps.items()},
        }
    }


def _without_result_json(row: PictureResult[Any]) -> dict[str, Any]:
    if row.skipped:
        return {"picture": row.picture, "skipped": True, "saved": str(row.saved)}
    return {"picture": row.picture, "error": row.error and row.error._asdict()}


def _first_result(results: Sequence[PictureResult[Prediction]]) -> Prediction | None:
    """Return the first result; it contains the fields that all results of its request share."""
    return next((row.result for row in results if row.result is not None), None)


def _map_rows(prediction: Prediction) -> list[list[str]]:
    """Return a table row for each map. The arrays themselves are written by `--save`."""
    change = prediction.change
    return [
        [
            name,
            "×".join(map(str, feature_map.shape)),
            str(len(prediction.channels[name])),
            *(_MISSING if value is None else f"{value:.4g}" for value in _range(feature_map).values()),
            *([] if change is None else [f"{_largest_change(change.maps[name]) or 0:+.4g}"]),
        ]
        for name, feature_map in prediction.maps.items()
    ]


def _range(feature_map: NDArray[np.float32]) -> dict[str, float | None]:
    """Return minimum, mean and maximum; None for an empty map."""
    if not feature_map.size:
        return dict.fromkeys(("min", "mean", "max"))
    return {"min": float(feature_map.min()), "mean": float(feature_map.mean()), "max": float(feature_map.max())}


def format_explanations(results: Sequence[PictureResult[Explanation]]) -> str:
    """Format explanations as a table: class, method, range of the heat, and the position of its maximum."""
    rows: list[list[str]] = []
    for row in results:
        if row.result is None or row.error is not None:
            rows.append([row.picture, row.why])
            continue
        summary = _summary(row.result)
        position = "{}, {} of {} × {}".format(*summary["strongest"], *summary["shape"][1:])
        texts = (summary["label"], summary["target"], summary["method"], summary["layer"] or "", position)
        rows.append([row.picture, *map(str, texts), f"{summary['min']:.4g}", f"{summary['max']:.4g}"])
    header = ["picture", "class", "index", "method", "layer", "strongest at", "min", "max"]
    parts = [format_table(header, rows, right_aligned=(2, 6, 7)), *_format_notes(results), *_format_saved(results)]
    return "\n\n".join(parts)


def explanations_json(results: Sequence[PictureResult[Explanation]]) -> dict[str, Any]:
    """Return explanations as JSON types. The heat itself is written by `--save`."""
    return {
        "results": [
            _without_result_json(row)
            if row.result is None or row.error is not None
            else {
                "picture": row.picture,
                **_summary(row.result),
                **({"notes": list(row.result.notes)} if row.result.notes else {}),
                "saved": row.saved and str(row.saved),
            }
            for row in results
        ]
    }


def _summary(explanation: Explanation) -> dict[str, Any]:
    """Summarise an explanation. `strongest` is (row, column) of the maximum of the heat, summed over its channels."""
    heat = explanation.heat.sum(axis=0)
    return {
        "label": explanation.label,
        "target": explanation.target,
        "method": explanation.method,
        "layer": explanation.layer or None,
        "shape": list(explanation.heat.shape),
        "strongest": [int(index) for index in np.unravel_index(heat.argmax(), heat.shape)],
        "min": float(heat.min()),
        "max": float(heat.max()),
        "delta": explanation.delta,
        "original_size": explanation.original_size,
        "region": explanation.region,
    }


def _format_notes(results: Sequence[PictureResult[Any]]) -> list[str]:
    """Return a line for each way in which pictures were converted, if there are any; many pictures are counted."""
    pictures: dict[tuple[str, ...], list[str]] = {}
    for row in results:
        if row.result is not None and row.result.notes:
            pictures.setdefault(row.result.notes, []).append(row.picture)
    lines = []
    for notes, names in pictures.items():
        which = ", ".join(names) if len(names) <= _MOST_NAMED else f"{len(names)} pictures"
        lines.append(printable(f"converted ({', '.join(notes)}): {which}"))
    return ["\n".join(lines)] if lines else []


def _format_saved(results: Sequence[PictureResult[Any]]) -> list[str]:
    """Return the lines that name the folders, if there are any."""
    saved = [printable(f"saved {row.saved}") for row in results if row.saved is not None]
    return ["\n".join(saved)] if saved else []


def format_models(models: Sequence[tuple[ServedModel, ModelCard | ConvscopeError]]) -> str:
    """Format models as a table, each with its card or why there is none."""
    rows = [
        [*model, f"not ready: {found.code}: {found}"]
        if isinstance(found, ConvscopeError)
        else [*model, format_size(found.input), f"{len(found.classes):,}", str(len(found.layers)), found.description]
        for model, found in models
    ]
    header = ["model", "version", "input", "classes", "layers", "description"]
    return format_table(header, rows, right_aligned=(3, 4))


def models_json(models: Sequence[tuple[ServedModel, ModelCard | ConvscopeError]]) -> dict[str, Any]:
    """Return models as JSON types, each with a part of its card or the error."""
    rows: list[dict[str, Any]] = []
    for model, found in models:
        row: dict[str, Any] = {"model": model.name, "version": model.version, "error": None}
        if isinstance(found, ConvscopeError):
            rows.append(row | {"error": {"code": found.code, "message": found.message}})
            continue
        size = {"channels": found.input.channels, "height": found.input.height, "width": found.input.width}
        layers = [layer.name for layer in found.layers]
        rows.append(
            row | {"description": found.description, "input": size, "layers": layers, "classes": list(found.classes)}
        )
    return {"models": rows}
