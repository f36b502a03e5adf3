"""What a caller wants explained, and how, read alike from text, JSON and protobuf."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from handlers.errors import BadRequest
from handlers.wire import convscope_pb2 as wire

GRAD_CAM, CAM, OCCLUSION = "grad_cam", "cam", "occlusion"
INPUT_GRADIENT, INTEGRATED_GRADIENTS, PICTURE = "input_gradient", "integrated_gradients", "picture"
METHODS = (GRAD_CAM, CAM, OCCLUSION, INPUT_GRADIENT, INTEGRATED_GRADIENTS, PICTURE)
OF_GRADIENTS = (GRAD_CAM, INPUT_GRADIENT, INTEGRATED_GRADIENTS)
VIEWS = ("overlay", "heat")

MAX_STEPS = 512  # Of integrated gradients: finding the points of the rule takes their third power.

_WHOLE = 2**32 - 1
_NUMBERS = {"target": (0, _WHOLE), "window": (1, _WHOLE), "step": (1, _WHOLE), "steps": (1, MAX_STEPS)}  # From, to.
_FIELDS = tuple(wire.Explain.DESCRIPTOR.fields_by_name)

SWITCH = {"1": True, "true": True, "0": False, "false": False}
"""How text says yes and no."""


@dataclass(frozen=True)
class Explain:
    """How to explain a class's score.

    Attributes:
        method: One of `METHODS`; `picture` explains nothing, for the sake of the picture.
        layer: Public name, of the methods that look at a map; empty for the default.
        target: The class's index; None for the picture's most probable class.
        window: Pixels of the square that occlusion covers, each way; None for the default, as are the two below.
        step: Pixels from one square to the next.
        steps: Points between the baseline and the picture.
        view: What a PNG shows, one of `VIEWS`.
        picture: Send the picture along, as the network saw it.
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
        """Check a value of JSON: an object of the fields, a method's name, or true or false.

        Raises:
            BadRequest: It has no meaning; the text says what would be right.
        """
        if isinstance(value, bool):
            return cls() if value else None
        if isinstance(value, str):
            value = {"method": value}
        if not isinstance(value, Mapping):
            raise BadRequest('explain must be a method\'s name, or an object such as {"method": "grad_cam"}')
        unknown = sorted(set(value) - set(_FIELDS))
        if unknown:
            raise BadRequest(f"unknown field {json.dumps(unknown[0][:40])} of explain; there are {', '.join(_FIELDS)}")
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
        numbers = {name: _whole(given.get(name), name, *ends) for name, ends in _NUMBERS.items()}
        return cls(method, layer, **numbers, view=view, picture=picture or method == PICTURE)

    @classmethod
    def from_text(cls, text: str) -> Explain | None:
        """Check the words of a header, a form or a plain key: `occlusion,window=8,step=4`.

        Raises:
            BadRequest: As `from_value`.
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

    @classmethod
    def from_message(cls, message: wire.Explain) -> Explain | None:
        """Check the fields of a message.

        Raises:
            BadRequest: As `from_value`.
        """
        return cls.from_value({field.name: value for field, value in message.ListFields()})


def number_in(text: str) -> int | str:
    """Return the whole number that a text is, in decimal ASCII digits and 32 bits; any other text as it is."""
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(_WHOLE))
    return int(text) if is_number else text


def _whole(value: Any, name: str, least: int, most: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BadRequest(f"explain.{name} must be a whole number, at least {least} and at most {most:,}")
    return value
