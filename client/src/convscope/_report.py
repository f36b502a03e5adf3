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

    from convscope._card import ModelCard
    from convscope._client import Client
    from convscope._prediction import Prediction


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
            answers.append(Answer(name, prediction, (prediction.error.code, str(prediction.error))))
            continue
        saved = None
        if save is not None:
            saved = _free_folder(Path(save), name, folders)
            prediction.save(saved)
        answers.append(Answer(name, prediction, None, saved))
    return answers


def _free_folder(below: Path, name: str, taken: set[Path]) -> Path:
    """Return a folder named after a picture that no other picture of this command has."""
    stem = Path(name).stem + (name[name.rindex("[") :] if name.endswith("]") and "[" in name else "")
    candidates = itertools.chain([below / stem], (below / f"{stem}-{number}" for number in itertools.count(2)))
    folder = next(candidate for candidate in candidates if candidate not in taken)
    taken.add(folder)
    return folder


def predictions_text(answers: Sequence[Answer]) -> str:
    """Return answers as tables: scores, then maps, then where they were saved."""
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
    parts = [_heading(answers)] if any(answer.prediction for answer in answers) else []
    parts.append(format_table(["picture", "class", "index", "probability", "logit"], scores, right=(2, 3, 4)))
    if maps:
        parts.append(
            format_table(["picture", "layer", "shape", "channels", "min", "mean", "max"], maps, right=(3, 4, 5, 6))
        )
    return "\n\n".join(parts + (["\n".join(saved)] if saved else []))


def _heading(answers: Sequence[Answer]) -> str:
    prediction = next(answer.prediction for answer in answers if answer.prediction is not None)
    return printable(f"{prediction.model} {prediction.version} ({prediction.engine}, {prediction.device})")


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
    first = next((answer.prediction for answer in answers if answer.prediction is not None), None)
    return {
        "model": first and first.model,
        "version": first and first.version,
        "engine": first and first.engine,
        "device": first and first.device,
        "results": [_answer_json(answer) for answer in answers],
    }


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


def card_text(card: ModelCard) -> str:
    """Return a model card as text."""
    size = "any size" if card.input.height is None else f"{card.input.height}×{card.input.width}"
    facts = [
        ("model", f"{card.model} {card.version}"),
        ("description", card.description),
        ("network", f"{card.architecture}, {card.parameters:,} parameters"),
        ("runs on", f"{card.device} ({card.engine})"),
        ("input", f"{card.input.channels} channel{'s' * (card.input.channels != 1)}, {size}"),
        ("normalised", _normalisation(card)),
        ("classes", ", ".join(card.classes) or "none"),
        ("limits", f"{card.limits.max_images} pictures a request, {card.limits.max_image_bytes:,} bytes and"
         f" {card.limits.max_image_pixels:,} pixels a picture, {card.limits.max_reply_bytes:,} bytes a reply"),
    ]  # fmt: skip
    if card.training is not None:
        training = card.training
        facts += [
            ("trained", f"on {training.data}: {training.train_pictures:,} pictures, {training.epochs} epochs,"
             f" {training.seconds:.0f} s on {training.machine}"),
            ("accuracy", f"train {_percent(training.train_accuracy)}, test {_percent(training.test_accuracy)}"
             f" (n = {training.test_pictures:,})"),
        ]  # fmt: skip
    layers = [
        [
            layer.name,
            layer.module,
            "×".join(map(str, layer.shape)),
            _pair(layer.stride),
            _pair(layer.receptive_field),
            "–" if layer.receptive_field_start is None else ", ".join(map(str, layer.receptive_field_start)),
            f"{layer.parameters:,}",
            f"{layer.bytes['float32']:,}" if "float32" in layer.bytes else "–",
        ]
        for layer in card.layers
    ]
    header = ["layer", "module", "map", "stride", "sees", "from", "parameters", "bytes (float32)"]
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:<{width}}  {printable(value)}" for name, value in facts if value]
    return "\n".join(lines) + "\n\n" + format_table(header, layers, right=(6, 7))


def _normalisation(card: ModelCard) -> str:
    if not card.input.mean:
        return "no"
    return f"mean {_numbers(card.input.mean)}, std {_numbers(card.input.std)}"


def _pair(pair: tuple[int, ...] | None) -> str:
    return "–" if pair is None else "×".join(map(str, pair))


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"
