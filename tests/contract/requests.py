"""Requests made from the contract: one question in a neutral form, written in every way in which it can travel.

    ask = generate(seed)                     # what is asked, good or odd
    for carrier in CARRIERS:
        sent = write(ask, carrier)           # None where this carrier cannot say it
        hostile = twist(sent, seed)          # the same, damaged on its way

`Sent` holds what a caller sends: method, headers and body over REST, the map `input` over gRPC. `Sent.row()` is what
TorchServe makes of it for the handler, so that the same requests run in one process and over the network. Nothing here
knows what the right response is, but for `meant`, which says what a word means as a value.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import numpy as np

from handlers.api import strict_json as json_text
from handlers.wire import convscope_pb2 as wire
from tests.pictures import colours, npy, png

OPTIONS = ("layers", "top_k", "map_dtype", "pool", "channels", "timing", "explain", "edits", "compare")
FIELDS = (*OPTIONS, "describe", "filters", "accept", "request_id")
LAYERS = ("conv1", "conv2")  # Of the network that is asked; `generate` takes others.
ACCEPTED = ("application/json", "application/x-protobuf", "application/x-npz", "image/png")
_BOUNDARY = "x7Qk3vCz"


@dataclass(frozen=True)
class Number:
    """A number as JSON writes it where Python has none like it: `1e400`, `5.0`, `-0`."""

    text: str


ODD: tuple[Any, ...] = (
    *("", " ", None, True, False, -1, 0, 1, 5, 2**31, 2**32 - 1, 2**32, 2**64, 10**30, 1.5),
    *(Number("5.0"), Number("1e400"), Number("1E2"), Number("-0"), math.nan, math.inf),
    *("5", "+5", "-5", " 5 ", "005", "0000000005", "４", "1_0", "5.0", "5e0", "0x5", "4294967295", "4294967296"),
    *("true", "TRUE", "false", "0", "yes", "null", "none", "None", "NaN"),
    *([], {}, [1], [-1], [1.5], [True], [None], [""], [[1]], [[]], ["conv1"], ["conv1", "conv1"], ["all", "zzz"]),
    *(["conv2", "conv1"], ["zzz"], [0, 0, 3], [10**30], ["5"], {"a": 1}, {"method": "cam", "steps": 5}, [{}]),
    *("conv1", "conv1,conv2", " conv1 , conv2 ", "conv1,,", ",", "all", "all,zzz", "Conv1", "conv1;conv2", '"conv1"'),
    *("[]", "{}", "[", "{", "[1, 2]", '["conv1"]', '{"method": "occlusion"}', '{"method": "cam", "method": "cam"}'),
    *(
        "float16",
        "FLOAT16",
        "float64",
        "uint8",
        "int8",
        "grad_cam",
        "occlusion,window=8",
        "occlusion,window=8,window=4",
    ),
    *("a" * 5000, "\0", "a\tb", "\x7f", "é", "\u202e", "0,3", "3,", "0, 3 ", "0;3", "4.0", "[4]", "[4.0]"),
)
"""Values of every wrong type, and words that are nearly right. Every option is asked for every one of them."""

EXPLAIN: tuple[Any, ...] = (
    *("grad_cam", "occlusion", "input_gradient", "integrated_gradients", "picture", "cam", "Grad_Cam", "lime"),
    *({"method": ""}, {"method": None}, {"method": 5}, {"method": ["cam"]}, {"layer": "conv1"}, {"layer": "zzz"}),
    *(
        {"layer": 1},
        {"target": 3},
        {"target": 10},
        {"target": -1},
        {"target": "3"},
        {"target": True},
        {"target": 2**32},
    ),
    *({"target": 1.5}, {"target": Number("3.0")}, {"target": ""}, {"target": None}, {"window": 0}, {"step": 0}),
    *({"method": "occlusion", "window": 8, "step": 8}, {"method": "occlusion", "window": 4, "step": 8}),
    *({"method": "occlusion", "window": 33}, {"method": "occlusion", "window": 2**32 - 1}, {"window": 10**30}),
    *({"method": "integrated_gradients", "steps": n} for n in (1, 4, 512, 513, 0)),
    *({"view": "heat"}, {"view": "both"}, {"view": 1}, {"picture": True}, {"picture": 1}, {"picture": "true"}),
    *({"methods": "cam"}, {"method": "cam", "zzz": None}, {"Method": "cam"}),
)
"""Values of `explain` alone."""

_ZERO = {"layer": "conv1", "operation": "zero"}
_SCALE = {"layer": "conv2", "operation": "scale", "value": 0.5, "channels": [0, 3]}
EDITS: tuple[Any, ...] = (
    *([_ZERO], [_ZERO, _SCALE], [_SCALE, _ZERO], [_ZERO] * 16, [_ZERO] * 17, [{}], [5], ["zero"], _ZERO, "zero"),
    *([{**_ZERO, "layer": name}] for name in ("zzz", "", None, 5)),
    *([{**_ZERO, "operation": name}] for name in ("Zero", "", None, 5, "mean", "scale", "patch")),
    *([{**_ZERO, "channels": which}] for which in ("all", None, "", [], [0], [4], [-1], [0, 0], [1.5], ["0"], 3, "0")),
    *([{**_ZERO, "channels": {"except": which}}] for which in ([1], [0, 1, 2, 3], [9], [], None, "all")),
    *([{**_ZERO, "channels": which}] for which in ({}, {"but": [1]}, {"except": [1], "but": [2]})),
    *(
        [{**_ZERO, "region": edges}]
        for edges in ([0, 0, 8, 8], [1, 2, 3, 4], [0, 0, 9, 8], [3, 0, 3, 1], [0, 0, 1], [])
    ),
    *([{**_ZERO, "region": edges}] for edges in ([0, 0, 1, 1.0], ["0", 0, 1, 1], None, "0,0,1,1", [-1, 0, 1, 1])),
    *([{**_ZERO, "box": edges}] for edges in ([0, 0, 8.5, 4], [0, 0, 0.1, 0.1], [0, 0, 1e9, 1], [2, 2, 1, 1], [1, 2])),
    *([{**_ZERO, "box": edges}] for edges in ([0, 0, math.nan, 1], [0, 0, 1, 1, 1], ["a"] * 4)),
    *([{**_ZERO, "picture": index}] for index in (0, 1, -1, 1.5, "0", None, "", True)),
    *(
        [{**_SCALE, "value": value}]
        for value in (0, -1, 2.5, 1e38, 1e39, -1e39, math.nan, math.inf, None, "", "1", True)
    ),
    *([{**_SCALE, "value": value}] for value in ([1], [1, 2], [], {}, Number("1E2"), Number("1e400"))),
    *([{**_ZERO, "value": value}] for value in (0, None, [1, 2])),
    *(
        [{**_SCALE, "operation": "clamp", "value": value}]
        for value in ([0, 1], [1, 0], [1, 1], 1, [0, math.inf], [0, 1, 2])
    ),
    *([{**_SCALE, "operation": "patch", "value": value}] for value in (0, 1, -1, 0.5, 2**32, "0", [0, 1], None)),
    *([{**_ZERO, "zzz": 1}], [{**_ZERO, "Layer": "conv1"}], [_ZERO, None], [[_ZERO]]),
)
"""Values of `edits` alone."""

OWN = {"explain": EXPLAIN, "edits": EDITS}
"""Values that are odd for one field alone."""

GOOD: dict[str, tuple[Any, ...]] = {
    "top_k": (0, 1, 3, 10, 11, 2**32 - 1),
    "map_dtype": ("float32", "float16", "uint8"),
    "pool": (1, 2, 7, 16, 17),
    "channels": (1, 5, 40, [0], [3, 1], [2, 2], [31]),
    "timing": (False,),  # With it no two responses are equal.
    "edits": ([], *EDITS[:4]),
    "compare": (False, True),
    "explain": (False, True, *EXPLAIN[:5], {"layer": "conv1"}, {"method": "occlusion", "window": 8, "step": 8}),
    "describe": (True, False),
    "accept": (*ACCEPTED, "*/*", "image/*", "application/*;q=0.1, image/png;q=0", "text/html, */*;q=0.1", "text/html"),
    "request_id": ("abc", "a.b_c-1", "not one", "x" * 65),
}


@dataclass(frozen=True)
class Ask:
    """What a caller asks.

    Attributes:
        pictures: Files, in order.
        fields: Value by name, of `FIELDS`: what JSON says is the value meant; text carriers write it as words.
        path: `predictions` or, over REST only, `explanations`.
    """

    pictures: tuple[bytes, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    path: str = "predictions"


@dataclass(frozen=True)
class Sent:
    """What a caller sends.

    Attributes:
        carrier: The way in which it is written, of `CARRIERS`.
        path: Of REST: what stands before the model's name.
        method: Of REST.
        query: Of REST: what stands behind a `?`; empty for none.
        headers: Of REST, as they are spelt.
        body: Of REST.
        parts: Of a form: name and content of each part, from which `body` is made.
        inputs: Of gRPC: the map `input`; None over REST.
    """

    carrier: str
    path: str = "predictions"
    method: str = "POST"
    query: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    parts: tuple[tuple[str, bytes], ...] = ()
    inputs: Mapping[str, bytes] | None = None

    @property
    def transport(self) -> str:
        """`rest` or `grpc`."""
        return "rest" if self.inputs is None else "grpc"

    def target(self, model: str) -> str:
        """Return path and query for a model, as they stand in a request's first line."""
        return f"/{self.path}/{quote(model)}" + (f"?{self.query}" if self.query else "")

    def row(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return row and properties as TorchServe 0.12 hands them to a handler that reads bodies itself."""
        if self.inputs is not None:
            return {name: bytearray(value) for name, value in self.inputs.items()}, {}
        row: dict[str, Any] = {}
        for name, content in self.parts:
            value = bytearray(content)
            row[name] = [*(row[name] if isinstance(row[name], list) else [row[name]]), value] if name in row else value
        headers = {
            "explain": str(self.path == "explanations"),
            "Host": "localhost",
            **dict(self.headers),
            "url_path": "",
        }
        if not self.parts:
            row["body"] = bytearray(self.body)
        if not self.body:
            headers["content-length"] = "0"  # Netty's spelling.
        return row, {name: {"content-type": ""} for name in row} | headers


def picture_files() -> tuple[bytes, ...]:
    """Return a few files: the first four are good for a colour network of any size, the others are not."""
    return _picture_files()


@lru_cache(maxsize=1)
def _picture_files() -> tuple[bytes, ...]:
    whole = colours()
    return (
        png(whole),
        png(colours(1, 9, 14)),
        npy(colours(2)),
        npy(colours(3).astype(np.float32) / 255),
        npy(colours(4)[..., 0]),
        png(whole)[:60],
        b"text",
        b"",
    )


def generate(seed: int, layers: tuple[str, ...] = LAYERS) -> Ask:
    """Return what a seed asks: mostly what a caller might mean, now and then something odd."""
    chance = random.Random(seed)
    files = picture_files()
    count = chance.choice((0, 1, 1, 1, 1, 1, 1, 2, 3, 65))
    pictures = tuple(chance.choice(files[:4] if chance.random() < 0.8 else files) for _ in range(count))
    names = chance.sample(FIELDS, chance.choice((0, 1, 1, 2, 2, 3, 4)))
    fields: dict[str, Any] = {}
    for name in names:
        if chance.random() < 0.2:
            fields[name] = chance.choice(ODD + OWN.get(name, ()))
        elif name == "layers":
            fields[name] = chance.choice(([layers[0]], list(layers), "all", ["all"], layers[-1], [], ["zzz"]))
        elif name == "filters":
            fields[name] = chance.choice((*layers, "", "zzz"))
        else:
            fields[name] = chance.choice(GOOD[name])
    if chance.random() < 0.8:  # Most requests are for pictures.
        fields.pop("describe", None)
        fields.pop("filters", None)
    return Ask(pictures, fields, chance.choice(("predictions",) * 9 + ("explanations",)))


def write(ask: Ask, carrier: str) -> Sent | None:
    """Write a question for one carrier; None where it has no way to say it."""
    try:
        return CARRIERS[carrier](ask)
    except CannotSayError:
        return None


class CannotSayError(Exception):
    """A carrier has no way to say this."""


def to_json(value: Any) -> str:
    """Write a value as JSON, numbers that Python does not have included."""
    if isinstance(value, Number):
        return value.text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)}: {to_json(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(to_json, value)) + "]"
    return json.dumps(value)


def to_text(name: str, value: Any) -> str:
    """Write a field's value as words."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(map(_is_plain, value)) and len(value) > (name == "channels"):
        return ",".join(map(str, value))
    return to_json(value)


def meant(name: str, text: str) -> Any:
    """Return the value of JSON types that words mean, for every field but `accept` and `request_id`.

    Written from proto/README.md, not from the handler. What means nothing comes back as the words themselves, which no
    field takes.

    Args:
        name: Of the field.
        text: The words.
    """
    text = text.strip()
    if not text:
        return None
    if text[0] in "[{" and name not in ("describe", "filters"):
        try:
            return json_text.loads(text)
        except ValueError:
            return [{}]
    if name in ("timing", "compare", "describe") or (name == "explain" and text.lower() in ("1", "0", "true", "false")):
        return {"1": True, "true": True, "0": False, "false": False}.get(text.lower(), text)
    if name == "layers":
        return [part.strip() for part in text.split(",") if part.strip()]
    if name == "channels" and "," in text:
        return [_digits(part.strip()) for part in text.split(",") if part.strip()]
    if name in ("top_k", "pool", "channels"):
        return _digits(text)
    return _explain_meant(text) if name == "explain" else text


def _explain_meant(text: str) -> Any:
    value: dict[str, Any] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, separator, word = (piece.strip() for piece in part.partition("="))
        name, word = (name, word) if separator else ("method", name)
        if name in value:
            return [{}]
        value[name] = _digits(word) if name in ("target", "window", "step", "steps") else word
        if name == "picture":
            value[name] = {"1": True, "true": True, "0": False, "false": False}.get(word.lower(), word)
    return value


def _digits(text: str) -> int | str:
    return int(text) if text and set(text) <= set("0123456789") and len(text) <= 10 else text


def _is_plain(item: Any) -> bool:
    if isinstance(item, str):
        return item.strip() == item != "" and not set(item) & set(',[{"')
    return isinstance(item, int) and not isinstance(item, bool)


# Carriers.


def _raw(ask: Ask) -> Sent:
    if len(ask.pictures) != 1 or not ask.pictures[0]:
        raise CannotSayError
    headers = (("Content-Type", "application/octet-stream"), *_headers(ask, OPTIONS))
    return Sent("raw", ask.path, headers=headers, body=ask.pictures[0])


def _form(ask: Ask) -> Sent:
    parts = [(name, _encoded(to_text(name, value))) for name, value in ask.fields.items()]
    return _as_form("form", ask, [*_data(ask), *parts], ())


def _form_headers(ask: Ask) -> Sent:
    rest = [(name, _encoded(to_text(name, value))) for name, value in ask.fields.items() if name not in OPTIONS]
    return _as_form("form and headers", ask, [*_data(ask), *rest], OPTIONS)


def _json(ask: Ask) -> Sent:
    headers = (("Content-Type", "application/json"),)
    return Sent("json", ask.path, headers=headers, body=_json_body(ask, FIELDS))


def _json_headers(ask: Ask) -> Sent:
    rest = tuple(name for name in FIELDS if name not in OPTIONS)
    headers = (("Content-Type", "application/json"), *_headers(replace(ask, fields=_only(ask, OPTIONS)), OPTIONS))
    return Sent("json and headers", ask.path, headers=headers, body=_json_body(ask, rest))


def _protobuf(ask: Ask) -> Sent:
    message = to_message(ask, ask.fields)
    headers = (("Content-Type", "application/x-protobuf"), *_headers(replace(ask, fields=_only(ask, ("accept",))), ()))
    return Sent("protobuf", ask.path, headers=headers, body=message.SerializeToString())


def _protobuf_headers(ask: Ask) -> Sent:
    own = {name: value for name, value in ask.fields.items() if name not in OPTIONS}
    headers = _headers(replace(ask, fields=_only(ask, (*OPTIONS, "accept"))), OPTIONS)
    body = to_message(ask, own).SerializeToString()
    return Sent(
        "protobuf and headers", ask.path, headers=(("Content-Type", "application/x-protobuf"), *headers), body=body
    )


def _grpc(ask: Ask) -> Sent:
    _needs_predictions(ask)
    inputs = {"request": to_message(ask, ask.fields).SerializeToString()}
    if "accept" in ask.fields:
        inputs["accept"] = _encoded(to_text("accept", ask.fields["accept"]))
    return Sent("grpc", inputs=inputs)


def _plain_keys(ask: Ask) -> Sent:
    _needs_predictions(ask)
    if len(ask.pictures) != 1:
        raise CannotSayError  # A key of a map stands for one value.
    texts = {name: _encoded(to_text(name, value)) for name, value in ask.fields.items()}
    return Sent("plain keys", inputs={"data": ask.pictures[0], **texts})


CARRIERS: dict[str, Callable[[Ask], Sent]] = {
    "raw": _raw,
    "form": _form,
    "form and headers": _form_headers,
    "json": _json,
    "json and headers": _json_headers,
    "protobuf": _protobuf,
    "protobuf and headers": _protobuf_headers,
    "grpc": _grpc,
    "plain keys": _plain_keys,
}
TYPED = ("json", "protobuf", "grpc")
TEXT = tuple(name for name in CARRIERS if name not in TYPED)


def to_message(ask: Ask, fields: Mapping[str, Any]) -> wire.PredictRequest:
    """Return the message of a question; `accept` has no field there.

    Raises:
        CannotSayError: A field has another type.
    """
    message = wire.PredictRequest(pictures=ask.pictures)
    for name, value in fields.items():
        if value is None or value == "" or name == "accept":
            continue
        if value is False and name == "explain" and ask.path == "explanations":
            raise CannotSayError  # It looks like a field that is not set, and the path asks for one.
        try:
            _set(message, name, value)
        except (TypeError, ValueError, AttributeError) as err:
            raise CannotSayError from err
    return message


def _set(message: wire.PredictRequest, name: str, value: Any) -> None:
    if name == "layers":
        names = [value] if isinstance(value, str) else value
        message.layers.extend(_of_type(list, names))
    elif name in ("top_k", "pool"):
        setattr(message, name, _whole(value))
    elif name == "map_dtype":
        message.map_dtype = wire.Dtype.Value(value.upper()) if value == value.lower() else wire.Dtype.Value(value + "?")
    elif name == "channels":
        if isinstance(value, list):
            message.channels.indexes.extend(map(_whole, value))
        else:
            message.channels.strongest = _whole(value)
    elif name == "explain":
        if value is False:
            return
        message.explain.SetInParent()
        given = {"method": value} if isinstance(value, str) else {} if value is True else _of_type(dict, value)
        for item, what in given.items():
            if not hasattr(message.explain, item):
                raise TypeError
            if what is not None:
                kind = {"method": str, "layer": str, "view": str, "picture": bool}.get(item)
                setattr(message.explain, item, _of_type(kind, what) if kind else _whole(what))
    elif name == "edits":
        for given in _of_type(list, value):
            _set_edit(message.edits.add(), _of_type(dict, given))
    else:
        setattr(message, name, _of_type(bool if name in ("timing", "compare", "describe") else str, value))


def _set_edit(message: wire.Edit, given: Mapping[str, Any]) -> None:
    """Set the fields of an operation; what protobuf cannot tell from a field that is not set is a TypeError."""
    for name, value in given.items():
        if value is None or value == "":
            continue
        if name in ("layer", "operation"):
            setattr(message, name, _of_type(str, value))
        elif name == "picture":
            message.picture = _whole(value)
        elif name == "channels" and value != "all":
            excluded = isinstance(value, dict) and [*value] == ["except"]
            field, listed = (message.excluded, value["except"]) if excluded else (message.channels, value)
            field.extend(map(_whole, _filled(listed)))
        elif name == "region":
            message.region.extend(map(_whole, _filled(value)))
        elif name == "box":
            message.box.extend(map(_real, _filled(value)))
        elif name == "value":
            check = _whole if given.get("operation") == "patch" else _real
            several = isinstance(value, list) and len(value) > 1  # A list of one is that number there.
            message.value.extend(map(check, value if several else [value]))
        elif name != "channels":
            raise TypeError


def _filled(value: Any) -> list[Any]:
    if not _of_type(list, value):
        raise TypeError
    return list(value)


def _real(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(_of_type((int, float), value))


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return int(_of_type(int, value))


def _of_type(kind: type | tuple[type, ...], value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


def _data(ask: Ask) -> list[tuple[str, bytes]]:
    return [("data", file) for file in ask.pictures]


def _as_form(carrier: str, ask: Ask, parts: list[tuple[str, bytes]], in_headers: tuple[str, ...]) -> Sent:
    if not parts:
        raise CannotSayError  # A form without parts is another thing.
    headers = _headers(replace(ask, fields=_only(ask, in_headers)), in_headers)
    kind = ("Content-Type", f"multipart/form-data; boundary={_BOUNDARY}")
    return Sent(carrier, ask.path, headers=(kind, *headers), body=form_body(parts), parts=tuple(parts))


def form_body(parts: list[tuple[str, bytes]]) -> bytes:
    """Write parts as `multipart/form-data`."""
    body = b""
    for name, content in parts:
        file = '; filename="a"' if name == "data" else ""
        head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        body += head.encode() + content + b"\r\n"
    return body + f"--{_BOUNDARY}--\r\n".encode()


def _json_body(ask: Ask, names: tuple[str, ...]) -> bytes:
    import base64

    files = [base64.b64encode(file).decode() for file in ask.pictures]
    return _encoded(to_json({"data": files[0] if len(files) == 1 else files, **_only(ask, names)}))


def _headers(ask: Ask, names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return the fields as headers: options by ours, `accept` and `request_id` by HTTP's."""
    spelt = {"accept": "Accept", "request_id": "X-Request-Id"}
    spelt |= {name: "X-Convscope-" + name.replace("_", "-").title() for name in names}
    found = []
    for name, value in ask.fields.items():
        text = to_text(name, value)
        if name not in spelt or not all(" " <= letter <= "~" for letter in text):
            raise CannotSayError
        found.append((spelt[name], text.strip()))
    return tuple(found)


def _only(ask: Ask, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in ask.fields.items() if name in names}


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as err:
        raise CannotSayError from err


def _needs_predictions(ask: Ask) -> None:
    if ask.path != "predictions":
        raise CannotSayError


# Damage.


def twist(sent: Sent, seed: int) -> Sent:
    """Return a request damaged as a seed says: it may be answered or rejected, and must harm nobody."""
    chance = random.Random(seed)
    if sent.inputs is not None:
        name = chance.choice(sorted(sent.inputs))
        value = sent.inputs[name]
        changed = chance.choice(
            (
                {name: _bitten(value, chance)},
                {name: value[: chance.randrange(len(value) + 1)]},
                {name: value * 2},
                {name: b""},
                {name + "s": value},
                {"body": value},
                {"request": value},
                {"data": chance.randbytes(50)},
                {chance.choice(FIELDS): chance.randbytes(4)},
            )
        )
        return replace(sent, inputs=dict(sent.inputs) | changed)
    twists: tuple[Callable[[], Sent], ...] = (
        lambda: _with_body(sent, _bitten(sent.body, chance)),
        lambda: _with_body(sent, sent.body[: chance.randrange(len(sent.body) + 1)]),
        lambda: _with_body(sent, sent.body * 2),
        lambda: _with_body(sent, b""),
        lambda: _with_body(sent, chance.randbytes(chance.randrange(200))),
        lambda: replace(sent, headers=tuple(one for one in sent.headers if one[0] != "Content-Type"), parts=()),
        lambda: _with_header(sent, "Content-Type", chance.choice(_CONTENT_TYPES)),
        lambda: _with_header(sent, "Accept", chance.choice(_ACCEPTS)),
        lambda: _with_header(sent, chance.choice(_HEADERS), chance.choice(_WORDS)),
        lambda: replace(sent, headers=sent.headers * 2),
        lambda: replace(sent, query=chance.choice(("layers=conv1", "a", "top_k=3&layers=all", "%00"))),
        lambda: replace(sent, method=chance.choice(("GET", "PUT", "POST", "HEAD", "DELETE", "PATCH"))),
    )
    return chance.choice(twists)()


_CONTENT_TYPES = (
    *("", "text/plain", "image/png", "application/json", "Application/JSON", "application/JSON; charset=utf-16"),
    *("application/x-protobuf", "application/x-www-form-urlencoded", "multipart/form-data", "Multipart/Form-Data"),
    *("multipart/mixed; boundary=x", "application/x-npy", "a/b+json", "application/json, image/png", "x" * 500),
)
_ACCEPTS = (
    *("", "*", "*/*", "*/*;q=0", "image/*", "image/*;q=0.5, application/*;q=0", "text/html", "application/json;q=1e9"),
    *("application/x-npz;q=nan", ";q=1", ",,,", "application/json;q=0, */*;q=0.001", "a" * 1500, "image/png"),
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/png,image/svg+xml,*/*;q=0.8",
)
_HEADERS = (
    *("X-Convscope-Layers", "x-convscope-layers", "X-Convscope-Layer", "X-Convscope-Method", "X-Convscope-Caller"),
    *("X-Convscope-Explain", "Describe", "describe", "Explain", "explain", "X-Request-Id", "Content-Encoding"),
    *("url_path", "body", "data", "Expect-CT", "X-Convscope-Top-K", "X-Convscope-Timing"),
)
_WORDS = ("conv1", "true", "True", "GET", "POST", "3", "all", "gzip", "", "zzz", "occlusion,window=8", "[", "{}")


def _bitten(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8)) if changed else 0):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _with_body(sent: Sent, body: bytes) -> Sent:
    """Return it with another body, which is no longer the form it was: only TorchServe can read its parts."""
    return replace(sent, body=body, parts=())


def _with_header(sent: Sent, name: str, value: str) -> Sent:
    return replace(sent, headers=(*(one for one in sent.headers if one[0] != name), (name, value)), parts=())
