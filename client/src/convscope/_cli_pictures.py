"""`convscope predict` and `explain`: read the pictures, send them, save the results, and print them as text or JSON."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from convscope.commands import Failure, check_absent, format_table, printable, read_pictures

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from convscope._explanation import Explanation
    from convscope._prediction import Prediction, Timing

PICTURES_PER_REQUEST = 64  # The limit of a service, unless its archive says otherwise.

Found = TypeVar("Found", "Prediction", "Explanation")


@dataclass(frozen=True)
class PictureResult(Generic[Found]):
    """The result of one picture.

    Attributes:
        picture: Its path as given; of a file of several pictures with [its number].
        found: What the service returned; None if the picture could not be read.
        error: Why there is no result; None if there is one.
        saved: The folder with the result; None if it was not saved.
    """

    picture: str
    found: Found | None
    error: Failure | None = None
    saved: Path | None = None


def process_pictures(
    paths: Sequence[str], send: Callable[[list[bytes]], list[Found]], *, save: str | None
) -> list[PictureResult[Found]]:
    """Send picture files, at most 64 in a request. A picture that fails does not fail the others.

    Args:
        paths: Picture files.
        send: Sends the pictures of one request, and returns a result for each.
        save: Directory to write each picture's result below; None to write nothing.

    Returns:
        A result for each picture, in order; several for a .npy file of several pictures.

    Raises:
        ConvscopeError: A request as a whole failed.
        FileExistsError: A result's folder exists. Nothing was sent then.
        OSError: A result cannot be written.
        ValueError: An option is out of range.
    """
    pictures = read_pictures(paths)
    folders = [None] * len(pictures) if save is None else _new_folders(Path(save), [name for name, _ in pictures])
    sent = [file for _, file in pictures if isinstance(file, bytes)]
    starts = range(0, max(len(sent), 1), PICTURES_PER_REQUEST)  # Options are checked even if no picture can be read.
    found = iter([one for start in starts for one in send(sent[start : start + PICTURES_PER_REQUEST])])
    results: list[PictureResult[Found]] = []
    for (name, file), folder in zip(pictures, folders, strict=True):
        if not isinstance(file, bytes):
            results.append(PictureResult(name, None, file))
            continue
        one = next(found)
        if one.error is not None:
            results.append(PictureResult(name, one, Failure(one.error.code, one.error.message)))
        else:
            results.append(PictureResult(name, one, saved=None if folder is None else one.save(folder)))
    return results


def _new_folders(below: Path, names: Sequence[str]) -> list[Path]:
    """Choose a folder for each picture, named after it and different from the others; raise if one exists."""
    folders: dict[Path, None] = {}  # A set that keeps its order.
    for name in names:
        folder = next(folder for folder in _candidates(below, name) if folder not in folders)
        check_absent(folder)
        folders[folder] = None
    return list(folders)


def _candidates(below: Path, name: str) -> Iterator[Path]:
    """Yield `cat`, `cat-2`, `cat-3` and so on."""
    stem = Path(name).stem + (name[name.rindex("[") :] if name.endswith("]") and "[" in name else "")
    yield below / stem
    yield from (below / f"{stem}-{number}" for number in itertools.count(2))


def predictions_text(results: Sequence[PictureResult[Prediction]]) -> str:
    """Return predictions as text.

    Args:
        results: Of all pictures.

    Returns:
        A table of scores, one of maps and one of the first request's timing; the folders; the ids of the requests in
        which a picture failed.
    """
    scores: list[list[str]] = []
    maps: list[list[str]] = []
    for result in results:
        if result.error is not None or result.found is None:
            scores.append([result.picture, str(result.error)])
            continue
        for position, score in enumerate(result.found.top):
            scores.append(
                [
                    result.picture if position == 0 else "",
                    score.label,
                    str(score.index),
                    f"{score.probability:.4f}",
                    f"{score.logit:.3f}",
                ]
            )
        if not result.found.top:
            scores.append([result.picture, "no classes"])
        maps += [[result.picture, *cells] for cells in _map_rows(result.found)]
    first = _first(results)
    parts = []
    if first is not None:
        parts.append(printable(f"{first.model} {first.version} ({first.engine}, {first.device})"))
    parts.append(format_table(["picture", "class", "index", "probability", "logit"], scores, right=(2, 3, 4)))
    if maps:
        parts.append(
            format_table(["picture", "layer", "shape", "channels", "min", "mean", "max"], maps, right=(3, 4, 5, 6))
        )
    if first is not None and first.timing is not None:
        parts.append(_timing_text(first.timing))
    parts += _saved_text(results)
    failed = dict.fromkeys(
        result.found.request_id for result in results if result.found is not None and result.error is not None
    )
    if failed:
        parts.append("\n".join(f"request {printable(request_id)}" for request_id in failed))
    return "\n\n".join(parts)


def predictions_json(results: Sequence[PictureResult[Prediction]]) -> dict[str, Any]:
    """Return predictions for programs: all scores, and of each map its shape, channels and range.

    Of several requests, the id and the timing are the first one's.
    """
    first = _first(results)
    return {
        "model": first and first.model,
        "version": first and first.version,
        "engine": first and first.engine,
        "device": first and first.device,
        "request_id": first and first.request_id,
        "timing": None
        if first is None or first.timing is None
        else dataclasses.asdict(first.timing) | {"outside_s": first.timing.outside_s},
        "results": [_prediction_json(result) for result in results],
    }


def _prediction_json(result: PictureResult[Prediction]) -> dict[str, Any]:
    if result.error is not None or result.found is None:
        return {"picture": result.picture, "error": result.error and result.error._asdict()}
    channels = result.found.channels
    return {
        "picture": result.picture,
        "top": [score._asdict() for score in result.found.top],
        "maps": {
            name: {"shape": list(cells.shape), "channels": list(channels[name]), **_range(cells)}
            for name, cells in result.found.maps.items()
        },
        "saved": result.saved and str(result.saved),
    }


def _first(results: Sequence[PictureResult[Prediction]]) -> Prediction | None:
    """Return a prediction that holds what all predictions of a request have in common."""
    return next((result.found for result in results if result.found is not None), None)


def _timing_text(timing: Timing) -> str:
    seconds = {
        "read": timing.read_s,
        "decode": timing.decode_s,
        "preprocess": timing.preprocess_s,
        "forward": timing.forward_s,
        "encode": timing.encode_s,
        f"handler, {timing.batch_requests} in the batch": timing.handler_s,
        "network and queue": timing.outside_s,
        "total": timing.total_s,
    }
    rows = [[name, f"{1000 * value:.2f}"] for name, value in seconds.items()]
    return format_table(["time", "ms"], rows, right=(1,))


def _map_rows(prediction: Prediction) -> list[list[str]]:
    """Return a row of a table for each map. The cells themselves are written by `--save`."""
    return [
        [
            name,
            "×".join(map(str, cells.shape)),
            str(len(prediction.channels[name])),
            *("–" if value is None else f"{value:.4g}" for value in _range(cells).values()),
        ]
        for name, cells in prediction.maps.items()
    ]


def _range(cells: NDArray[np.float32]) -> dict[str, float | None]:
    """Return the smallest, mean and largest value; None for a map without cells."""
    if not cells.size:
        return dict.fromkeys(("min", "mean", "max"))
    return {"min": float(cells.min()), "mean": float(cells.mean()), "max": float(cells.max())}


def explanations_text(results: Sequence[PictureResult[Explanation]]) -> str:
    """Return explanations as a table: the class, the method, and where the heat is strongest."""
    rows: list[list[str]] = []
    for result in results:
        if result.error is not None or result.found is None:
            rows.append([result.picture, str(result.error)])
            continue
        summary = _summary(result.found)
        place = "{}, {} of {} × {}".format(*summary["strongest"], *summary["shape"][1:])
        cells = (summary["label"], summary["target"], summary["method"], summary["layer"] or "", place)
        rows.append([result.picture, *map(str, cells), f"{summary['least']:.4g}", f"{summary['most']:.4g}"])
    header = ["picture", "class", "index", "method", "layer", "strongest at", "least", "most"]
    return "\n\n".join([format_table(header, rows, right=(2, 6, 7)), *_saved_text(results)])


def explanations_json(results: Sequence[PictureResult[Explanation]]) -> dict[str, Any]:
    """Return explanations for programs. The heat itself is written by `--save`."""
    return {
        "results": [
            {"picture": result.picture, "error": result.error and result.error._asdict()}
            if result.error is not None or result.found is None
            else {"picture": result.picture, **_summary(result.found), "saved": result.saved and str(result.saved)}
            for result in results
        ]
    }


def _summary(explanation: Explanation) -> dict[str, Any]:
    """Summarise an explanation. The strongest place is (row, column) of the heat, summed over its channels."""
    heat = explanation.heat.sum(axis=0)
    return {
        "label": explanation.label,
        "target": explanation.target,
        "method": explanation.method,
        "layer": explanation.layer or None,
        "shape": list(explanation.heat.shape),
        "strongest": [int(place) for place in np.unravel_index(heat.argmax(), heat.shape)],
        "least": float(heat.min()),
        "most": float(heat.max()),
        "delta": explanation.delta,
    }


def _saved_text(results: Sequence[PictureResult[Any]]) -> list[str]:
    """Return the lines that name the folders, if there are any."""
    saved = [printable(f"saved {result.saved}") for result in results if result.saved is not None]
    return ["\n".join(saved)] if saved else []
