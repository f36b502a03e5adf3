"""Media types: which of the formats we speak a caller accepts."""

from __future__ import annotations

from functools import lru_cache

from handlers.errors import BadRequest

JSON = "application/json"
PROTOBUF = "application/x-protobuf"
NPZ = "application/x-npz"
PNG = "image/png"

REST_DEFAULT = JSON
GRPC_DEFAULT = PROTOBUF

FORMATS = {JSON: "json", PROTOBUF: "protobuf", NPZ: "npz", PNG: "png"}
"""What we offer, and what metrics call it."""


_LONGEST = 1000  # Characters: what was accepted is remembered.


def choose(accept: str, *, default: str) -> str:
    """Pick the format a caller likes best among those offered (RFC 9110, section 12.5.1).

    Args:
        accept: An Accept header's value, e.g. `image/png, */*;q=0.1`; empty for no preference.
        default: What `*/*`, `application/*` and no preference mean.

    Raises:
        BadRequest: Nothing accepted is offered, or the text is of more than a thousand characters.
    """
    if len(accept) > _LONGEST:
        raise BadRequest(f"what is accepted may be said in {_LONGEST:,} characters, not {len(accept):,}")
    return _choose(accept, default)


@lru_cache(maxsize=64)  # Callers that ask often always accept the same.
def _choose(accept: str, default: str) -> str:
    best, best_quality = None, 0.0
    for item in accept.split(","):
        name, *parameters = (part.strip().lower() for part in item.split(";"))
        match = name if name in FORMATS else default if name in ("", "*/*", "application/*") else None
        if name == "application/protobuf":
            match = PROTOBUF
        quality = _quality(parameters)
        if match is not None and quality > best_quality:
            best, best_quality = match, quality
    if best is None:
        raise BadRequest(f"no accepted reply format is offered; there are {', '.join(FORMATS)}")
    return best


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0
