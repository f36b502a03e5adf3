"""What the command line says: many pictures asked about at once, answers as text and as JSON."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convscope._pictures import encode_pictures
from convscope._table import format_table, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convscope._client import Client
    from convscope._prediction import Prediction
    from convscope._timing import Timing


@dataclass(frozen=True)
class Answer:
    """What became of one picture.

    Attributes:
        picture: Its path as given; of a file of several pictures with [its number].
        prediction: None if it could not be read or sent.
        error: Why it has no result, (code, message); None if it has one.
        saved: Where it was written, if anywhere.
    """

    picture: str
    prediction: Prediction | None
    error: tuple[str, str] | None
    saved: Path | None = None


def answer_pictures(client: Client, paths: Sequence[str], *, save: str | None, **options: Any) -> list[Answer]:
    """Ask about pictures in one request; one that fails does not fail the others.

    Args:
        client: Whom to ask.
        paths: Picture files.
        save: Directory to write each picture's result below; None for not.
        **options: As for `Client.predict`.

    Returns:
        An answer for each picture, in order; several for a .npy file of several pictures.

    Raises:
        ConvscopeError: The request as a whole failed.
        OSError: A result cannot be written.
        ValueError: An option is out of range.
    """
    sent: list[bytes] = []
    names: list[str] = []
    unread: dict[int, Answer] = {}
    for path in paths:
        try:
            files = encode_pictures(path).files
        except (OSError, ValueError) as error:
            unread[len(names)] = Answer(path, None, ("unreadable", getattr(error, "strerror", None) or str(error)))
            names.append(path)
        else:
            names += [path] if len(files) == 1 else [f"{path}[{number}]" for number in range(len(files))]
            sent += files
    predictions = iter(client.predict(sent, **options))
    answers: list[Answer] = []
    folders: set[Path] = set()
    for position, name in enumerate(names):
        if position in unread:
            answers.append(unread[position])
            continue
        prediction = next(predictions)
        if prediction.error is not None:
            answers.append(Answer(name, prediction, (prediction.error.code, prediction.error.message)))
            continue
        saved = None
        if save is not None:
            saved = free_folder(Path(save), name, folders)
            prediction.save(saved)
        answers.append(Answer(name, prediction, None, saved))
    return answers


def free_folder(below: Path, name: str, taken: set[Path]) -> Path:
    """Return a folder named after a picture that no other picture of this command has."""
    stem = Path(name).stem + (name[name.rindex("[") :] if name.endswith("]") and "[" in name else "")
    candidates = itertools.chain([below / stem], (below / f"{stem}-{number}" for number in itertools.count(2)))
    folder = next(candidate for candidate in candidates if candidate not in taken)
    taken.add(folder)
    return folder


def predictions_text(answers: Sequence[Answer]) -> str:
    """Return answers as text.

    Args:
        answers: Of one request.

    Returns:
        Tables of scores, of maps and of where the time went; where they were saved; the request's id, if one failed.
    """
    scores: list[list[str]] = []
    maps: list[list[str]] = []
    saved: list[str] = []
    for answer in answers:
        if answer.error is not None or answer.prediction is None:
            code, message = answer.error or ("", "")
            scores.append([answer.picture, f"{code}: {message}"])
            continue
        for position, score in enumerate(answer.prediction.top):
            scores.append(
                [
                    answer.picture if position == 0 else "",
                    score.label,
                    str(score.index),
                    f"{score.probability:.4f}",
                    f"{score.logit:.3f}",
                ]
            )
        if not answer.prediction.top:
            scores.append([answer.picture, "no classes"])
        maps += [[answer.picture, *map(str, row.values())] for row in _maps(answer.prediction)]
        if answer.saved is not None:
            saved.append(f"saved {answer.saved}")
    first = _first(answers)
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
    if first is not None and any(answer.prediction and answer.error for answer in answers):
        parts.append(f"request {printable(first.request_id)}")
    return "\n\n".join(parts)


def _first(answers: Sequence[Answer]) -> Prediction | None:
    """Return a prediction that holds what all of the request have in common."""
    return next((answer.prediction for answer in answers if answer.prediction is not None), None)


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


def _maps(prediction: Prediction) -> list[dict[str, Any]]:
    """Sum each map up in a row: its cells themselves are for `--save`."""
    return [
        {
            "layer": name,
            "shape": "×".join(map(str, cells.shape)),
            "channels": len(prediction.channels[name]),
            "min": f"{cells.min():.4g}",
            "mean": f"{cells.mean():.4g}",
            "max": f"{cells.max():.4g}",
        }
        for name, cells in prediction.maps.items()
    ]


def predictions_json(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return answers for programs: scores in full, maps by shape, channels and range."""
    first = _first(answers)
    return {
        "model": first and first.model,
        "version": first and first.version,
        "engine": first and first.engine,
        "device": first and first.device,
        "request_id": first and first.request_id,
        "timing": None if first is None or first.timing is None else _timing_json(first.timing),
        "results": [_answer_json(answer) for answer in answers],
    }


def _timing_json(timing: Timing) -> dict[str, float]:
    return dataclasses.asdict(timing) | {"outside_s": timing.outside_s}


def _answer_json(answer: Answer) -> dict[str, Any]:
    if answer.error is not None or answer.prediction is None:
        code, message = answer.error or ("", "")
        return {"picture": answer.picture, "error": {"code": code, "message": message}}
    prediction = answer.prediction
    return {
        "picture": answer.picture,
        "top": [dataclasses.asdict(score) for score in prediction.top],
        "maps": {
            name: {
                "shape": list(cells.shape),
                "channels": list(prediction.channels[name]),
                "min": float(cells.min()),
                "mean": float(cells.mean()),
                "max": float(cells.max()),
            }
            for name, cells in prediction.maps.items()
        },
        "saved": None if answer.saved is None else str(answer.saved),
    }
