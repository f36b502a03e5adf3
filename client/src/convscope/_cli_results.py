"""What `convscope predict`, `explain` and `card` do with pictures and print: tables or JSON."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from convscope._exceptions import ConvscopeError
from convscope._prediction import score_headings, score_texts
from convscope.commands import (
    LAYER_HEADINGS,
    STAGES,
    PictureFailure,
    ensure_missing,
    format_table,
    printable,
    read_picture_files,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from convscope._card import Input, Layer, ModelCard
    from convscope._explanation import Explanation
    from convscope._prediction import Prediction, Timing

_WIDTH = 120  # Of the terminal, in columns.
_MISSING = "–"
_OUTPUTS = {
    "softmax": "scores of mutually exclusive classes (softmax)",
    "sigmoid": "multi-label scores (sigmoid)",
    "value": "regression outputs (value)",
    "none": "maps alone (none)",
}

Result = TypeVar("Result", "Prediction", "Explanation")


@dataclass(frozen=True)
class PictureResult(Generic[Result]):
    """The result of one picture.

    Attributes:
        picture: Path as given; `path[i]` for picture i of a .npy file.
        result: The result; None if the picture was not sent, or if its request failed.
        error: Why there is no result; None if there is one.
        saved: Folder with the result; None if it was not saved.
    """

    picture: str
    result: Result | None
    error: PictureFailure | None = None
    saved: Path | None = None


def process_pictures(
    paths: Sequence[str],
    send: Callable[[list[bytes]], list[Result]],
    *,
    pictures_per_request: Callable[[], int],
    request_id: str | None,
    save: str | None,
) -> list[PictureResult[Result]]:
    """Send picture files in as few requests as the model allows. A failed picture or request does not affect others.

    Args:
        paths: Picture files.
        send: Sends the pictures of one request, and returns a result for each.
        pictures_per_request: Returns the largest number of pictures per request; called if there are several.
        request_id: The user's id for the request, which is rejected if there are several requests.
        save: Directory to write each picture's result to, as soon as it is received; None to write nothing.

    Returns:
        One result per picture, in order; several for a .npy file of several pictures.

    Raises:
        ConvscopeError: All requests failed.
        FileExistsError: The folder of a result exists. Nothing was sent.
        OSError: A result cannot be written.
        ValueError: An option is out of range.
    """
    pictures = read_picture_files(paths)
    folders = [None] * len(pictures) if save is None else _new_folders(Path(save), [name for name, _ in pictures])
    results: list[PictureResult[Result] | None] = [
        PictureResult(name, None, file) if isinstance(file, PictureFailure) else None for name, file in pictures
    ]
    readable = [index for index, result in enumerate(results) if result is None]
    size = pictures_per_request() if len(readable) > 1 else 1
    # The options are checked even if no picture is readable.
    batches = [readable[start : start + size] for start in range(0, max(len(readable), 1), size)]
    if request_id is not None and len(batches) > 1:
        raise ValueError(f"--request-id is for one request; these pictures need {len(batches)}")
    errors = []
    for indexes in batches:
        try:
            sent = send([file for file in (pictures[index][1] for index in indexes) if isinstance(file, bytes)])
        except ConvscopeError as error:
            errors.append(error)
            for index in indexes:
                results[index] = PictureResult(pictures[index][0], None, PictureFailure(error.code, str(error)))
            continue
        for index, result in zip(indexes, sent, strict=True):
            results[index] = _picture_result(pictures[index][0], result, folders[index])
    if len(errors) == len(batches):
        raise errors[0]
    return [result for result in results if result is not None]


def _picture_result(name: str, result: Result, folder: Path | None) -> PictureResult[Result]:
    """Return the result of a picture, after saving it to `folder`."""
    if result.error is not None:
        return PictureResult(name, result, PictureFailure(result.error.code, result.error.message))
    return PictureResult(name, result, saved=None if folder is None else result.save(folder))


def _new_folders(parent: Path, names: Sequence[str]) -> list[Path]:
    """Choose a folder for each picture, named after it and distinct; raise if one exists."""
    folders: dict[Path, None] = {}  # An ordered set.
    for name in names:
        folder = next(folder for folder in _candidates(parent, name) if folder not in folders)
        ensure_missing(folder)
        folders[folder] = None
    return list(folders)


def _candidates(parent: Path, name: str) -> Iterator[Path]:
    """Yield `cat`, `cat-2`, `cat-3` and so on."""
    stem = Path(name).stem + (name[name.rindex("[") :] if name.endswith("]") and "[" in name else "")
    yield parent / stem
    yield from (parent / f"{stem}-{count}" for count in itertools.count(2))


def format_predictions(results: Sequence[PictureResult[Prediction]]) -> str:
    """Format predictions as text.

    Args:
        results: One per picture.

    Returns:
        A table of scores, one of maps and one of the first request's timing; the folders; the ids of the requests in
        which a picture failed.
    """
    scores: list[list[str]] = []
    maps: list[list[str]] = []
    for row in results:
        if row.error is not None or row.result is None:
            scores.append([row.picture, str(row.error)])
            continue
        for position, score in enumerate(row.result.top):
            scores.append(
                [
                    row.picture if position == 0 else "",
                    score.label,
                    str(score.index),
                    *score_texts(score),
                ]
            )
        if not row.result.top:
            scores.append([row.picture, "no classes"])
        maps += [[row.picture, *texts] for texts in _map_rows(row.result)]
    first = _first_result(results)
    parts = []
    if first is not None:
        parts.append(printable(f"{first.model} {first.version} ({first.engine}, {first.device})"))
    headings = ("probability", "logit") if first is None else score_headings(first)
    parts.append(format_table(["picture", "class", "index", *headings], scores, right_aligned=(2, 3, 4)))
    if maps:
        header = ["picture", "layer", "shape", "channels", "min", "mean", "max"]
        parts.append(format_table(header, maps, right_aligned=(3, 4, 5, 6)))
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
    if row.error is not None or row.result is None:
        return {"picture": row.picture, "error": row.error and row.error._asdict()}
    channels = row.result.channels
    return {
        "picture": row.picture,
        "top": [score.as_values() for score in row.result.top],
        "maps": {
            name: {"shape": list(feature_map.shape), "channels": list(channels[name]), **_range(feature_map)}
            for name, feature_map in row.result.maps.items()
        },
        "saved": row.saved and str(row.saved),
    }


def _first_result(results: Sequence[PictureResult[Prediction]]) -> Prediction | None:
    """Return the first result; it contains the fields that all results of its request share."""
    return next((row.result for row in results if row.result is not None), None)


def format_timing(timing: Timing) -> str:
    labels = STAGES | {"handler_s": f"{STAGES['handler_s']} ({timing.batch_requests} in the batch)"}
    rows = [[label, f"{1000 * getattr(timing, name):.2f}"] for name, label in labels.items()]
    return format_table(["time", "ms"], rows, right_aligned=(1,))


def _map_rows(prediction: Prediction) -> list[list[str]]:
    """Return a table row for each map. The arrays themselves are written by `--save`."""
    return [
        [
            name,
            "×".join(map(str, feature_map.shape)),
            str(len(prediction.channels[name])),
            *(_MISSING if value is None else f"{value:.4g}" for value in _range(feature_map).values()),
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
        if row.error is not None or row.result is None:
            rows.append([row.picture, str(row.error)])
            continue
        summary = _summary(row.result)
        position = "{}, {} of {} × {}".format(*summary["strongest"], *summary["shape"][1:])
        texts = (summary["label"], summary["target"], summary["method"], summary["layer"] or "", position)
        rows.append([row.picture, *map(str, texts), f"{summary['min']:.4g}", f"{summary['max']:.4g}"])
    header = ["picture", "class", "index", "method", "layer", "strongest at", "min", "max"]
    return "\n\n".join([format_table(header, rows, right_aligned=(2, 6, 7)), *_format_saved(results)])


def explanations_json(results: Sequence[PictureResult[Explanation]]) -> dict[str, Any]:
    """Return explanations as JSON types. The heat itself is written by `--save`."""
    return {
        "results": [
            {"picture": row.picture, "error": row.error and row.error._asdict()}
            if row.error is not None or row.result is None
            else {"picture": row.picture, **_summary(row.result), "saved": row.saved and str(row.saved)}
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


def _format_saved(results: Sequence[PictureResult[Any]]) -> list[str]:
    """Return the lines that name the folders, if there are any."""
    saved = [printable(f"saved {row.saved}") for row in results if row.saved is not None]
    return ["\n".join(saved)] if saved else []


def format_card(card: ModelCard) -> str:
    """Format a model card as text, at most 120 columns wide unless a name is very long.

    The first table lists the operation behind each map, and the receptive field of its cells: size, stride and first
    pixel. The second lists parameters, multiply-adds, the parameters of an equivalent dense layer, and the bytes of the
    map.
    """
    size = "any size" if card.input.height is None else f"{card.input.height}×{card.input.width}"
    fields = [
        ("model", f"{card.model} {card.version}"),
        ("description", card.description),
        ("network", f"{card.architecture}, {card.parameters:,} parameters,"
         f" {_count(card.multiply_adds)} multiply-adds per picture"),
        ("runs on", f"{card.device} ({card.engine})"),
        ("input", f"{card.input.channels} channel{'s' * (card.input.channels != 1)}"
         f"{', BGR' * card.input.bgr}, {size}"),
        ("pictures", _recipe(card.input)),
        ("normalisation", _normalisation(card)),
        ("classes", f"{len(card.classes):,}: {', '.join(card.classes)}" if card.classes else "none"),
        ("outputs", _OUTPUTS.get(card.scores, card.scores)),
        ("limits", f"{card.limits.max_images} pictures per request, {card.limits.max_image_bytes:,} bytes and"
         f" {card.limits.max_image_pixels:,} pixels per picture, {card.limits.max_reply_bytes:,} bytes per reply"),
    ]  # fmt: skip
    if card.training is not None:
        training = card.training
        fields += [
            ("trained", f"on {training.data}: {training.train_pictures:,} pictures, {training.epochs} epochs,"
             f" {training.seconds:.0f} s on {training.machine}"),
            ("accuracy", f"train {_percent(training.train_accuracy)}, test {_percent(training.test_accuracy)}"
             f" (n = {training.test_pictures:,})"),
        ]  # fmt: skip
    width = max(len(name) for name, _ in fields) + 2
    lines = [_format_field(name.ljust(width), printable(value)) for name, value in fields if value]
    return "\n".join(lines) + "\n\n" + _operations_table(card) + "\n\n" + _cost_table(card)


def _operations_table(card: ModelCard) -> str:
    """Return the table of operations and receptive fields; without groups if there is only one everywhere."""
    headings = list(LAYER_HEADINGS.values())
    table = [["layer", *headings[: headings.index("parameters")]], *map(_operations_row, card.layers)]
    if all(layer.groups <= 1 for layer in card.layers):
        groups = table[0].index(LAYER_HEADINGS["groups"])
        table = [row[:groups] + row[groups + 1 :] for row in table]
    return format_table(table[0], table[1:])


def _operations_row(layer: Layer) -> list[str]:
    start = layer.receptive_field_start
    return [
        layer.name,
        layer.operation or _MISSING,
        _product(layer.input_shape),
        _product(layer.shape),
        *map(_product, (layer.kernel, layer.step, layer.padding, layer.dilation)),
        _count(layer.groups),
        _product(layer.receptive_field),
        _product(layer.stride),
        _MISSING if start is None else ", ".join(map(str, start)),
    ]


def _cost_table(card: ModelCard) -> str:
    """Return the table of parameters, multiply-adds and bytes."""
    headings = list(LAYER_HEADINGS.values())
    header = ["layer", "node", *headings[headings.index("parameters") :], "float16", "uint8"]
    rows = [
        [
            layer.name,
            layer.module,
            *map(_count, (layer.parameters, layer.dense_parameters, layer.multiply_adds)),
            *(_count(layer.bytes.get(dtype, 0)) for dtype in ("float32", "float16", "uint8")),
        ]
        for layer in card.layers
    ]
    return format_table(header, rows, right_aligned=range(2, 8))


def _format_field(name: str, value: str) -> str:
    """Return a name and a value, wrapped to the width of the terminal, in at most three lines."""
    lines = textwrap.wrap(value, _WIDTH - len(name), max_lines=3, placeholder=" ...", break_on_hyphens=False)
    return name + ("\n" + " " * len(name)).join(lines)


def _normalisation(card: ModelCard) -> str:
    if not card.input.mean:
        return "none"
    return f"mean {_numbers(card.input.mean)}, std {_numbers(card.input.std)}"


def _recipe(input_spec: Input) -> str:
    """Describe how pictures are brought to the network's size."""
    if not input_spec.interpolation:
        return "not resized"
    size = _product((input_spec.height or 0, input_spec.width or 0))
    filter_name = input_spec.interpolation + ("" if input_spec.antialias else " without antialiasing")
    if not input_spec.resize:
        return f"resized to {size}, {filter_name}; the aspect ratio is not kept"
    if len(input_spec.resize) == 1:
        target = f"until the shorter side has {input_spec.resize[0]} pixels"
    elif input_spec.fit:
        relation = "at least" if input_spec.fit == "cover" else "at most"
        target = f"to {relation} {_product(input_spec.resize)}, keeping the aspect ratio"
    else:
        target = f"to {_product(input_spec.resize)}"
    middle = "" if input_spec.height is None else f"; then the middle {size}"
    fill = f", padded with {' '.join(map(str, input_spec.fill))}" if input_spec.fill else ""
    return f"resized {target}, {filter_name}{middle}{fill}"


def _product(numbers: tuple[int, ...] | None) -> str:
    return "×".join(map(str, numbers)) if numbers else _MISSING


def _count(number: int) -> str:
    return f"{number:,}" if number else _MISSING


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _percent(share: float | None) -> str:
    return _MISSING if share is None else f"{share:.2%}"
