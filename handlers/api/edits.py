"""Edits: operations on the maps of layers while the network runs, read the same way from JSON, text and protobuf.

Whether a layer, channel, cell or picture exists is checked by `outputs.editor`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from handlers.api.errors import BadRequest
from handlers.api.strict_json import check_names, whole
from handlers.wire import convscope_pb2 as wire

ZERO, SCALE, ADD, MEAN, CLAMP, PATCH = "zero", "scale", "add", "mean", "clamp", "patch"
OPERATIONS = (ZERO, SCALE, ADD, MEAN, CLAMP, PATCH)

MAX_EDITS = 16
"""Largest number of operations for one picture."""

_MOST_EDITS = 4096  # Operations of a request: 16 for each of more pictures than any archive allows.
_MOST_CHANNELS = 2**16  # Per list: more than any layer has.
_LARGEST = 3.4028234663852886e38  # Largest float32; maps are computed in float32.
_FIELDS = ("layer", "operation", "value", "channels", "region", "box", "picture")
_EXAMPLE = '{"layer": "conv2", "channels": [3, 5], "operation": "scale", "value": 0.5}'
_CHANNELS = 'channels must be a list of channel indexes, "all", or {"except": [...]}'


@dataclass(frozen=True)
class Edit:
    """One operation.

    Attributes:
        layer: The layer's public name.
        operation: One of `OPERATIONS`.
        value: `scale`: the factor; `add`: the summand; `clamp`: least and largest value; `patch`: the index of a
            picture. Empty for `zero` and `mean`.
        channels: Indexes of the channels that are changed; empty for all but `excluded`.
        excluded: Indexes of channels that stay as they are.
        region: (top, left, bottom, right) in cells of the map, half open; empty for the whole map.
        box: The same in pixels of the picture as it was sent; empty for none.
        picture: The index of the picture whose map is changed; None for every picture.
    """

    layer: str
    operation: str
    value: tuple[float, ...] = ()
    channels: tuple[int, ...] = ()
    excluded: tuple[int, ...] = ()
    region: tuple[int, ...] = ()
    box: tuple[float, ...] = ()
    picture: int | None = None

    @property
    def source(self) -> int | None:
        """The index of the picture whose map is inserted; None if the operation is not `patch`."""
        return int(self.value[0]) if self.operation == PATCH else None

    def concerns(self, picture: int) -> bool:
        """Return whether the operation changes the picture of this index."""
        return self.picture in (None, picture)

    @classmethod
    def from_value(cls, value: Any) -> Edit:
        """Parse a JSON object.

        Raises:
            BadRequest: The object is invalid; the message explains what is valid.
        """
        if not isinstance(value, Mapping):
            raise BadRequest(f"an operation must be an object such as {_EXAMPLE}")
        check_names(value, _FIELDS)
        given = {name: item for name, item in value.items() if item is not None and item != ""}
        layer, operation = given.get("layer"), given.get("operation")
        if not isinstance(layer, str):
            raise BadRequest("layer must be a layer's name")
        if operation not in OPERATIONS:
            raise BadRequest(f"operation must be one of {', '.join(OPERATIONS)}")
        channels, excluded = _channels(given.get("channels", "all"))
        region = tuple(whole(edge, "an edge of region") for edge in _four(given.get("region"), "region"))
        box = tuple(_number(edge, "an edge of box") for edge in _four(given.get("box"), "box"))
        if region and box:
            raise BadRequest("region and box say the same in cells and in pixels; give one of them")
        for name, edges in (("region", region), ("box", box)):
            if edges and not (0 <= edges[0] < edges[2] and 0 <= edges[1] < edges[3]):
                raise BadRequest(f"{name} must be [top, left, bottom, right] with 0 <= top < bottom, 0 <= left < right")
        picture = None if "picture" not in given else whole(given["picture"], "picture")
        return cls(layer, operation, _value(operation, given), channels, excluded, region, box, picture)

    @staticmethod
    def read_message(message: wire.Edit) -> dict[str, Any]:
        """Return the fields that a message sets as values of JSON types.

        Raises:
            BadRequest: Channels are chosen in two ways.
        """
        if message.channels and message.excluded:
            raise BadRequest("set either channels or excluded")
        values: dict[str, Any] = {"layer": message.layer, "operation": message.operation}
        if message.channels:
            values["channels"] = list(message.channels)
        elif message.excluded:
            values["channels"] = {"except": list(message.excluded)}
        if message.region:
            values["region"] = list(message.region)
        if message.box:
            values["box"] = list(message.box)
        if message.HasField("picture"):
            values["picture"] = message.picture
        numbers: list[Any] = list(message.value)
        if message.operation == PATCH:
            numbers = [int(number) if number.is_integer() else number for number in numbers]
        if numbers:
            values["value"] = numbers[0] if len(numbers) == 1 else numbers
        return values


def read_edits(values: Any) -> tuple[Edit, ...]:
    """Parse a JSON list.

    Raises:
        BadRequest: The list is invalid; the message has the operation's index, and explains what is valid.
    """
    if not isinstance(values, (list, tuple)):
        raise BadRequest(f"edits must be a list of operations, as JSON: [{_EXAMPLE}]")
    check_edit_count(len(values))
    edits = []
    for number, value in enumerate(values):
        try:
            edits.append(Edit.from_value(value))
        except BadRequest as err:
            raise BadRequest(f"edits[{number}]: {err}") from err
    own = Counter(edit.picture for edit in edits)
    count = own.pop(None, 0) + max(own.values(), default=0)
    if count > MAX_EDITS:
        raise BadRequest(f"edits has {count} operations for one picture; at most {MAX_EDITS} are done")
    return tuple(edits)


def check_edit_count(count: int) -> None:
    """Check how many operations a request lists, before they are read.

    Raises:
        BadRequest: More than `_MOST_EDITS`.
    """
    if count > _MOST_EDITS:
        raise BadRequest(f"edits lists {count:,} operations; at most {_MOST_EDITS:,} are read")


def _channels(value: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the indexes of changed and of excluded channels, at most one of them not empty."""
    if value == "all":
        return (), ()
    is_exception = isinstance(value, Mapping) and set(value) == {"except"}
    listed = value["except"] if is_exception else value
    if not isinstance(listed, (list, tuple)):
        raise BadRequest(_CHANNELS)
    if not listed:
        raise BadRequest(f"{_CHANNELS}; the list is empty")
    if len(listed) > _MOST_CHANNELS:
        raise BadRequest(f"channels lists {len(listed):,}; at most {_MOST_CHANNELS:,} are read")
    indexes = tuple(dict.fromkeys(whole(index, "a channel") for index in listed))
    return ((), indexes) if is_exception else (indexes, ())


def _value(operation: str, given: Mapping[str, Any]) -> tuple[float, ...]:
    value = given.get("value")
    if operation in (ZERO, MEAN):
        if value is not None:
            raise BadRequest(f"{operation} takes no value")
        return ()
    if operation == PATCH:
        return (whole(value, "the value of patch, the index of a picture,"),)
    if operation != CLAMP:
        return (_number(value, f"the value of {operation}"),)
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise BadRequest("the value of clamp must be two numbers, [least, largest]")
    least, largest = (_number(number, "each value of clamp") for number in value)
    if least > largest:
        raise BadRequest("the value of clamp must be [least, largest]; the first is the larger one")
    return least, largest


def _four(value: Any, name: str) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        raise BadRequest(f"{name} must be four numbers, [top, left, bottom, right]")
    return tuple(value)


def _number(value: Any, name: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= _LARGEST:  # NaN compares False.
        raise BadRequest(f"{name} must be a finite number, in 32 bits")
    return float(value)
