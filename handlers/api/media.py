"""Media types: the formats of a response, and the choice among those that a caller accepts."""

from __future__ import annotations

import re
from functools import lru_cache

from handlers.api.errors import BadRequest

JSON = "application/json"
PROTOBUF = "application/x-protobuf"
NPZ = "application/x-npz"
PNG = "image/png"

REST_DEFAULT = JSON
GRPC_DEFAULT = PROTOBUF

FORMATS = {JSON: "json", PROTOBUF: "protobuf", NPZ: "npz", PNG: "png"}
"""The formats offered, with their names in metrics."""


_NAMES = {name: (name,) for name in FORMATS} | {PROTOBUF: (PROTOBUF, "application/protobuf")}
_EVERYTHING = ("*/*", "*")  # Java's own HTTP client sends the second.
_QUALITY = re.compile(r"0(?:\.\d*)?|\.\d+|1(?:\.0*)?", re.ASCII)
_LONGEST = 1000  # Characters, since results are cached.


def choose(accept: str, *, default: str, without: str = "") -> str:
    """Choose the format that a caller prefers among those offered (RFC 9110, section 12.5.1).

    The most specific of the ranges that match a format gives its quality. Formats of equal quality are taken in the
    order in which they are accepted; if one wildcard matches several, the default goes first.

    Args:
        accept: An Accept header's value, e.g. `image/png, */*;q=0.1`; empty for no preference.
        default: The format to take if a wildcard, or no preference, leaves the choice.
        without: A format that cannot show this response; empty for none.

    Raises:
        BadRequest: No accepted format is offered, or the header has more than a thousand characters.
    """
    if len(accept) > _LONGEST:
        raise BadRequest(f"accept has {len(accept):,} characters; at most {_LONGEST:,} are read")
    return _choose(accept, default, without)


@lru_cache(maxsize=64)  # A caller sends the same Accept header with every request.
def _choose(accept: str, default: str, without: str) -> str:
    ranges = [_read_range(item) for item in accept.split(",") if item.strip()] or [("*/*", 1.0)]
    best, most = "", (0.0, 0, False)
    for media_type in FORMATS:
        specificity, quality, place = max(
            (_specificity(name, media_type), quality, -place) for place, (name, quality) in enumerate(ranges)
        )
        rank = (quality, place, media_type == default)
        if media_type != without and specificity and quality and (not best or rank > most):
            best, most = media_type, rank
    if not best:
        raise BadRequest(f"no accepted reply format is offered; there are {', '.join(FORMATS)}")
    return best


def _specificity(name: str, media_type: str) -> int:
    """Return how closely a media range matches a format: 3 by name, 2 by type, 1 as a wildcard, 0 not at all."""
    if name in _NAMES[media_type]:
        return 3
    if name == media_type.partition("/")[0] + "/*":
        return 2
    return int(name in _EVERYTHING)


def _read_range(item: str) -> tuple[str, float]:
    """Return a media range and its quality, 0..1; a quality that cannot be read is 0, so the range is not accepted."""
    name, *parameters = (part.strip().lower() for part in item.split(";"))
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip() == "q":
            value = value.strip()
            return name, float(value) if _QUALITY.fullmatch(value) else 0.0
    return name, 1.0
