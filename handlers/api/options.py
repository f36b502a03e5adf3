"""Options: what a caller asks for about each picture, read the same way from text, JSON and protobuf."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any

from handlers.api import strict_json
from handlers.api.edits import Edit, check_edit_count, read_edits
from handlers.api.errors import BadRequest
from handlers.api.strict_json import check_names, whole
from handlers.wire import convscope_pb2 as wire

GRAD_CAM, CAM, OCCLUSION = "grad_cam", "cam", "occlusion"
INPUT_GRADIENT, INTEGRATED_GRADIENTS, PICTURE = "input_gradient", "integrated_gradients", "picture"
METHODS = (GRAD_CAM, CAM, OCCLUSION, INPUT_GRADIENT, INTEGRATED_GRADIENTS, PICTURE)
OF_GRADIENTS = (GRAD_CAM, INPUT_GRADIENT, INTEGRATED_GRADIENTS)
VIEWS = ("overlay", "heat")

MAX_STEPS = 512  # Of integrated gradients: finding the points of the rule takes their third power.

_MOST_WHOLE = 2**32 - 1
_NUMBERS = {
    "target": (0, _MOST_WHOLE),
    "window": (1, _MOST_WHOLE),
    "step": (1, _MOST_WHOLE),
    "steps": (1, MAX_STEPS),
}  # From, to.
_FIELDS = tuple(wire.Explain.DESCRIPTOR.fields_by_name)

SWITCH = {"1": True, "true": True, "0": False, "false": False}
"""Texts that mean true and false."""

OPTION_NAMES = ("layers", "top_k", "map_dtype", "pool", "channels", "timing", "explain", "edits", "compare")
DTYPES = ("float32", "float16", "uint8")

_LONGEST_TEXT = 2**20  # Characters per option.
_MOST_NAMES = 2**16  # Layers or channels: more than any network or layer has.


@dataclass(frozen=True)
class Explain:
    """How to explain a class's score.

    Attributes:
        method: One of `METHODS`; `picture` explains nothing and only sends the picture.
        layer: Public name, for methods that use a map; empty for the default.
        target: The class's index; None for the picture's most probable class.
        window: Side in pixels of the square that occlusion covers; None for the default, as in the two below.
        step: Pixels from one square to the next.
        steps: Points between the baseline and the picture.
        view: What a PNG shows, one of `VIEWS`.
        picture: Send the picture too, as the network saw it.
    """

    method: str = GRAD_CAM
    layer: str = ""
    target: int | None = None
    window: int | None = None
    step: int | None = None
    steps: int | None = None
    view: str = VIEWS[0]
    picture: bool = False

    @classmethod
    def from_value(cls, value: Any) -> Explain | None:
        """Parse a JSON value: an object of the fields, a method's name, or true or false.

        Raises:
            BadRequest: The value is invalid; the message explains what is valid.
        """
        if isinstance(value, bool):
            return cls() if value else None
        if isinstance(value, str):
            value = {"method": value}
        if not isinstance(value, Mapping):
            raise BadRequest('explain must be a method\'s name, or an object such as {"method": "grad_cam"}')
        check_names(value, _FIELDS, " of explain")
        given = {name: item for name, item in value.items() if item is not None and item != ""}
        method, layer, view = given.get("method", GRAD_CAM), given.get("layer", ""), given.get("view", VIEWS[0])
        if method not in METHODS:
            raise BadRequest(f"explain.method must be one of {', '.join(METHODS)}")
        if view not in VIEWS:
            raise BadRequest(f"explain.view must be one of {', '.join(VIEWS)}")
        if not isinstance(layer, str):
            raise BadRequest("explain.layer must be a layer's name")
        picture = given.get("picture", False)
        if not isinstance(picture, bool):
            raise BadRequest("explain.picture must be true or false")
        numbers = {name: _explain_number(given.get(name), name, *ends) for name, ends in _NUMBERS.items()}
        return cls(method, layer, **numbers, view=view, picture=picture or method == PICTURE)

    @classmethod
    def from_text(cls, text: str) -> Explain | None:
        """Parse the text of a header, a form field or a plain key: `occlusion,window=8,step=4`.

        Raises:
            BadRequest: As for `from_value`.
        """
        if text.lower() in SWITCH:
            return cls.from_value(SWITCH[text.lower()])
        values: dict[str, Any] = {}
        for part in filter(None, map(str.strip, text.split(","))):
            name, separator, word = (piece.strip() for piece in part.partition("="))
            name, word = (name, word) if separator else ("method", name)
            if name in values:
                raise BadRequest(f"explain says its {name[:40]} twice")
            values[name] = number_in(word) if name in _NUMBERS else word
            if name == "picture":
                values[name] = SWITCH.get(word.lower(), word)
        return cls.from_value(values)


@dataclass(frozen=True)
class Options:
    """The content of a response.

    Attributes:
        layers: Public names in the order asked for, without repetition; `("all",)` for every layer.
        top_k: Number of classes, most probable first; 0 for all.
        map_dtype: Type of the map values sent: `float32`, `float16` or `uint8`.
        pool: Average each map down to pool × pool cells; None for whole maps.
        channels: Indexes of channels in the order asked for, or the number of strongest channels; None for all.
        timing: Add to the response how long each stage took.
        explain: Explain a class's score by the parts of each picture; None for no explanation.
        edits: Operations on maps while the network runs, in order; scores and maps are those after them.
        compare: Add to the response what the edits changed.
    """

    layers: tuple[str, ...] = ()
    top_k: int = 5
    map_dtype: str = "float32"
    pool: int | None = None
    channels: tuple[int, ...] | int | None = None
    timing: bool = False
    explain: Explain | None = None
    edits: tuple[Edit, ...] = ()
    compare: bool = False

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Options:
        """Parse values of JSON types.

        Raises:
            BadRequest: A value is invalid; the message explains what is valid.
        """
        layers = values.get("layers", ())
        if isinstance(layers, str):
            layers = (layers,)
        if not isinstance(layers, (list, tuple)) or not all(isinstance(name, str) for name in layers):
            raise BadRequest('layers must be a list of layer names, or "all"')
        _check_length(layers, "layers")
        map_dtype = values.get("map_dtype", "float32")
        if map_dtype not in DTYPES:
            raise BadRequest(f"map_dtype must be one of {', '.join(DTYPES)}")
        timing, compare = values.get("timing", False), values.get("compare", False)
        for name, switch in (("timing", timing), ("compare", compare)):
            if not isinstance(switch, bool):
                raise BadRequest(f"{name} must be true or false (as text also 1 or 0)")
        pool, channels = values.get("pool"), values.get("channels")
        if isinstance(channels, (list, tuple)):
            _check_length(channels, "channels")
            channels = tuple(dict.fromkeys(whole(index, "a channel") for index in channels))
            if not channels:
                raise BadRequest("channels must name at least one channel; leave it out for all")
        elif channels is not None:
            channels = whole(channels, "channels (a number means that many of the strongest)", least=1)
        operations = read_edits(values["edits"]) if "edits" in values else ()
        if compare and not operations:
            raise BadRequest("compare says what edits change; name at least one operation in edits")
        return cls(
            layers=tuple(dict.fromkeys(layers)),
            top_k=whole(values.get("top_k", 5), "top_k (0 means all)"),
            map_dtype=map_dtype,
            pool=None if pool is None else whole(pool, "pool", least=1),
            channels=channels,
            timing=timing,
            explain=_explain(values.get("explain")),
            edits=operations,
            compare=compare,
        )

    @staticmethod
    def parse_text(values: Mapping[str, str]) -> dict[str, Any]:
        """Convert text to values of JSON types; lists are written `a,b` or as JSON."""
        return {name: _from_text(name, text.strip()) for name, text in values.items() if text.strip()}

    @staticmethod
    def read_message(message: wire.PredictRequest) -> dict[str, Any]:
        """Return the fields that a PredictRequest sets as values of JSON types.

        Raises:
            BadRequest: Channels are chosen in two ways, or as for `Explain.from_value`.
        """
        values: dict[str, Any] = {}
        if message.layers:
            values["layers"] = tuple(message.layers)
        if message.timing:
            values["timing"] = True
        if message.HasField("top_k"):
            values["top_k"] = message.top_k
        if message.HasField("pool"):
            values["pool"] = message.pool
        if message.map_dtype:
            known = message.map_dtype in wire.Dtype.values()
            values["map_dtype"] = wire.Dtype.Name(message.map_dtype).lower() if known else None
        if message.channels.indexes and message.channels.strongest:
            raise BadRequest("channels: set either indexes or strongest")
        if message.channels.indexes:
            values["channels"] = tuple(message.channels.indexes)
        elif message.channels.strongest:
            values["channels"] = message.channels.strongest
        if message.HasField("explain"):
            values["explain"] = Explain.from_value({field.name: value for field, value in message.explain.ListFields()})
        if message.edits:
            check_edit_count(len(message.edits))
            values["edits"] = [Edit.read_message(edit) for edit in message.edits]
        if message.compare:
            values["compare"] = True
        return values


DEFAULT = Options()
"""Options of a request that sets none."""


def _explain(value: Any) -> Explain | None:
    return value if value is None or isinstance(value, Explain) else Explain.from_value(value)


def _from_text(name: str, text: str) -> Any:
    if len(text) > _LONGEST_TEXT:
        raise BadRequest(f"{name} has {len(text):,} characters; at most {_LONGEST_TEXT:,} are read")
    if text[0] in "[{":
        try:
            return strict_json.loads(text)
        except ValueError as err:
            raise BadRequest(f"{name} is neither a comma-separated list nor valid JSON: {err}") from err
    if name == "explain":
        return Explain.from_text(text)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if name == "layers":
        return parts
    if name == "channels" and "," in text:
        return [number_in(part) for part in parts]
    if name in ("timing", "compare"):
        return SWITCH.get(text.lower(), text)
    return text if name == "map_dtype" else number_in(text)


def _check_length(items: Sized, name: str) -> None:
    if len(items) > _MOST_NAMES:
        raise BadRequest(f"{name} lists {len(items):,}; at most {_MOST_NAMES:,} are read")


def _explain_number(value: Any, name: str, least: int, most: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BadRequest(f"explain.{name} must be a whole number, at least {least} and at most {most:,}")
    return value


def number_in(text: str) -> int | str:
    """Convert decimal ASCII digits of at most 32 bits to a number; return any other text unchanged."""
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(_MOST_WHOLE))
    return int(text) if is_number else text
