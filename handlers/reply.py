"""Replies: what one request gets, as values.

It knows nothing of TorchServe, of torch, of formats, or of how a result came about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from handlers.errors import RequestError
from handlers.maps import FeatureMap


class ClassScore(NamedTuple):  # There may be a thousand of them in a reply, and a frozen dataclass takes 1 µs to make.
    """One class: its index, label, probability (softmax over all K classes, 0..1) and logit."""

    index: int  # type: ignore[assignment]  # It hides a tuple's own, which nobody asks a score for.
    label: str
    probability: float
    logit: float


@dataclass(frozen=True)
class Explanation:
    """Which part of a picture a class's score rests on.

    Attributes:
        method: How it was found out.
        layer: Public name of the layer whose map was looked at; empty where none was.
        target: The class's index; None where nothing is explained but the picture shown.
        label: The class's name.
        heat: (C, h, w), and of what the method says; None where nothing is explained.
        delta: By how much the sum of the heat misses what it should be, where the method promises a sum.
        picture: (C, H, W), as the network saw it, where that was asked for.
        view: What a PNG of it shows.
    """

    method: str
    layer: str
    target: int | None
    label: str
    heat: FeatureMap | None
    delta: float | None = None
    picture: FeatureMap | None = None
    view: str = ""


@dataclass(frozen=True)
class Result:
    """One picture's answer: its most probable classes, the maps asked for, and the explanation."""

    top: tuple[ClassScore, ...] = ()
    maps: tuple[FeatureMap, ...] = ()
    explanation: Explanation | None = None


@dataclass(frozen=True)
class Identity:
    """Who answers: model and version, engine (`torch-2.15.0`) and device (`cpu`, `cuda:0`)."""

    model: str
    version: str
    engine: str
    device: str


@dataclass(frozen=True)
class Timing:
    """Where a request's time went, in the fields of `convscope.v1.Timing`; a stage it did not get through is 0."""

    read_s: float
    decode_s: float
    preprocess_s: float
    forward_s: float
    encode_s: float
    handler_s: float
    batch_requests: int


@dataclass(frozen=True)
class Reply:
    """What one request gets.

    Attributes:
        identity: Who answers.
        results: One a picture, in the order sent: a Result, or the error that this picture alone met.
        refusal: Why no picture was answered: the request's own error, or the first picture's if all have one.
        request_id: Of the request.
    """

    identity: Identity
    results: tuple[Result | RequestError, ...] = ()
    refusal: RequestError | None = None
    request_id: str = ""

    @classmethod
    def of(cls, identity: Identity, results: tuple[Result | RequestError, ...], request_id: str = "") -> Reply:
        """Gather the pictures' results; where all of them are errors, the reply is an error too."""
        errors = [result for result in results if isinstance(result, RequestError)]
        return cls(identity, results, errors[0] if len(errors) == len(results) else None, request_id)
