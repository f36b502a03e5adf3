"""What the command line says of predictions, as text and as JSON."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from convscope._table import format_table, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from convscope._cli_pictures import Row
    from convscope._prediction import Prediction
    from convscope._timing import Timing


def predictions_text(rows: Sequence[Row[Prediction]]) -> str:
    """Return answers as text.

    Args:
        rows: What became of each picture.

    Returns:
        Tables of scores, of maps and of where the time of the first request went; where they were saved; the ids of the
        requests in which a picture failed.
    """
    scores: list[list[str]] = []
    maps: list[list[str]] = []
    saved: list[str] = []
    for row in rows:
        if row.error is not None or row.found is None:
            scores.append([row.picture, str(row.error)])
            continue
        for position, score in enumerate(row.found.top):
            scores.append(
                [
                    row.picture if position == 0 else "",
                    score.label,
                    str(score.index),
                    f"{score.probability:.4f}",
                    f"{score.logit:.3f}",
                ]
            )
        if not row.found.top:
            scores.append([row.picture, "no classes"])
        maps += [[row.picture, *cells] for cells in _maps(row.found)]
        if row.saved is not None:
            saved.append(printable(f"saved {row.saved}"))
    first = _first(rows)
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
    if saved:
        parts.append("\n".join(saved))
    failed = dict.fromkeys(row.found.request_id for row in rows if row.found is not None and row.error is not None)
    if failed:
        parts.append("\n".join(f"request {printable(request_id)}" for request_id in failed))
    return "\n\n".join(parts)


def _first(rows: Sequence[Row[Prediction]]) -> Prediction | None:
    """Return a prediction that holds what all of a request have in common."""
    return next((row.found for row in rows if row.found is not None), None)


def _timing_text(timing: Timing) -> str:
    """Return where the time of the request went as a table."""
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


def _maps(prediction: Prediction) -> list[list[str]]:
    """Sum each map up in a row of a table: its cells themselves are for `--save`."""
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
    """Return the least, the mean and the greatest cell; None of a map that has no cells."""
    if not cells.size:
        return dict.fromkeys(("min", "mean", "max"))
    return {"min": float(cells.min()), "mean": float(cells.mean()), "max": float(cells.max())}


def predictions_json(rows: Sequence[Row[Prediction]]) -> dict[str, Any]:
    """Return answers for programs: scores in full, maps by shape, channels and range.

    Where there were several requests, id and timing are the first one's.
    """
    first = _first(rows)
    return {
        "model": first and first.model,
        "version": first and first.version,
        "engine": first and first.engine,
        "device": first and first.device,
        "request_id": first and first.request_id,
        "timing": None if first is None or first.timing is None else _timing_json(first.timing),
        "results": [_row_json(row) for row in rows],
    }


def _timing_json(timing: Timing) -> dict[str, float]:
    return dataclasses.asdict(timing) | {"outside_s": timing.outside_s}


def _row_json(row: Row[Prediction]) -> dict[str, Any]:
    if row.error is not None or row.found is None:
        return {"picture": row.picture, "error": row.error and row.error._asdict()}
    channels = row.found.channels
    return {
        "picture": row.picture,
        "top": [score._asdict() for score in row.found.top],
        "maps": {
            name: {"shape": list(cells.shape), "channels": list(channels[name]), **_range(cells)}
            for name, cells in row.found.maps.items()
        },
        "saved": row.saved and str(row.saved),
    }
