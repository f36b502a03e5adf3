"""Responses: the result of each picture as values, and the response as bytes.

`formats` encodes the results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from handlers.api.errors import RequestError
from handlers.outputs.maps import FeatureMap

Piece = bytes | memoryview
"""Part of a response; a map's cells are a piece of their own and are not copied until they are sent."""


Timing = Mapping[str, Any]
"""A request's time by stage, under the field names of `convscope.v1.Timing`; a stage that it did not complete is 0."""


class ClassScore(NamedTuple):  # A response may hold a thousand, and a frozen dataclass takes 1 µs to make.
    """One class: its index, label, probability (0..1) and logit; or one number, its index, label and value.

    Absent fields are None: probability and logit of a number that is not a score, value of a score.
    """

    index: int  # type: ignore[assignment]  # Hides tuple.index, which a score has no use for.
    label: str
    probability: float | None
    logit: float | None
    value: float | None = None


@dataclass(frozen=True)
class Explanation:
    """An explanation: the parts of a picture that a class's score depends on.

    Attributes:
        method: The method that was used.
        layer: Public name of the layer whose map was used; empty if none was.
        target: The class's index; None if only the picture is shown.
        label: The class's name.
        heat: (C, h, w), values as the method defines them; None if only the picture is shown.
        delta: The error of the sum of the heat, for methods that promise a sum.
        picture: (C, H, W), as the network saw it, if it was asked for.
        view: What a PNG of the explanation shows.
        original_size: (H, W) of the picture as it was sent, upright.
        region: (top, left, bottom, right) of what the network saw, in pixels of that picture; beyond its edges where it
            was padded.
    """

    method: str
    layer: str
    target: int | None
    label: str
    heat: FeatureMap | None
    delta: float | None = None
    picture: FeatureMap | None = None
    view: str = ""
    original_size: tuple[int, int] = (0, 0)
    region: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Change:
    """Changes made by edits: the number after them minus the number before them.

    Attributes:
        top: Changes of the classes in the result, then of the classes that would be in it without the edits.
        maps: Changes of the maps in the result, the same layers and channels.
    """

    top: tuple[ClassScore, ...] = ()
    maps: tuple[FeatureMap, ...] = ()


@dataclass(frozen=True)
class Result:
    """One picture's result: its most probable classes or numbers, its maps, its explanation, and what edits changed.

    `notes` say what was done to the picture before the network saw it; see `handlers.images.decoding.Notes`.
    """

    top: tuple[ClassScore, ...] = ()
    maps: tuple[FeatureMap, ...] = ()
    explanation: Explanation | None = None
    change: Change | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Identity:
    """The server's identity: model and version, engine (`torch-2.15.0`), device (`cpu`, `cuda:0`), what scores mean."""

    model: str
    version: str
    engine: str
    device: str
    scores: str = ""


@dataclass(frozen=True)
class Response:
    """The encoded response to one request.

    Attributes:
        pieces: The body, one piece after the other.
        media_type: The body's media type.
        status: HTTP status; gRPC has none.
        add_timing: Returns the body with a timing, which is known only when the whole batch is encoded; None where the
            format carries none.
    """

    pieces: list[Piece]
    media_type: str
    status: int = 200
    add_timing: Callable[[Timing], list[Piece]] | None = None

    @property
    def size(self) -> int:
        """Length of the body in bytes."""
        return sum(map(len, self.pieces))

    @property
    def body(self) -> bytes:
        """The whole body, copied together each time."""
        return b"".join(self.pieces)

    def with_timing(self, timing: Timing) -> Response:
        """Return this response with a timing, where its format can carry one."""
        return self if self.add_timing is None else Response(self.add_timing(timing), self.media_type, self.status)


def error_of(results: Sequence[Result | RequestError]) -> RequestError | None:
    """Return the error of a whole request: the error of its first picture, if every picture has an error."""
    errors = [result for result in results if isinstance(result, RequestError)]
    return errors[0] if len(errors) == len(results) else None
