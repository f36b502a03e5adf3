"""Replies: what one request gets, as values.

It knows nothing of TorchServe, of torch, of formats, or of how a result came about.
"""

from __future__ import annotations

from dataclasses import dataclass

from handlers.errors import RequestError
from handlers.maps import FeatureMap


@dataclass(frozen=True)
class ClassScore:
    """One class: its index, label, probability (softmax over all K classes, 0..1) and logit."""

    index: int
    label: str
    probability: float
    logit: float


@dataclass(frozen=True)
class Result:
    """One picture's answer: its most probable classes and the maps asked for."""

    top: tuple[ClassScore, ...] = ()
    maps: tuple[FeatureMap, ...] = ()


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
