"""Converts requests of the Open Inference Protocol v2 to the contract's, and the contract's replies to v2 tensors.

Parameters become the contract's plain keys unchanged: only the handlers know what options mean and which are invalid.
Axes: `N` pictures, `C` channels, `h, w` map cells, `k` classes.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from kserve import InferOutput, InferResponse
from kserve.errors import InferenceError, InvalidInput
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.infer_type import RequestedOutput
from kserve.utils.numpy_codec import from_np_dtype
from numpy.typing import NDArray

from handlers.api import strict_json
from handlers.api.options import OPTION_NAMES
from handlers.wire import convscope_pb2 as wire
from server.kserve.errors import Rejected

PICTURES = "pictures"
ERRORS = "errors"
LABELS, INDEXES, PROBABILITIES, LOGITS, VALUES = "labels", "indexes", "probabilities", "logits", "values"
SCALE, OFFSET, CHANNELS = ".scale", ".offset", ".channels"
HEAT, SEEN = "explanation.heat", "explanation.picture"
CHANGE = "change."  # Prefix of scores and layers for what edits changed.

LARGEST_JSON_BYTES = 16 * 2**20  # A parser makes an object of each number; arrays and files are sent as binary data.
PROTOBUF = "application/x-protobuf"
TRACE_CONTEXT = ("traceparent", "tracestate")  # Headers, metadata and plain keys alike.

_NUMBERS: dict[Any, np.dtype[Any]] = {"UINT8": np.dtype(np.uint8), "FP32": np.dtype(np.float32)}
_DTYPES: dict[Any, np.dtype[Any]] = {
    wire.FLOAT32: np.dtype("<f4"),
    wire.FLOAT16: np.dtype("<f2"),
    wire.UINT8: np.dtype(np.uint8),
}
_FORMS = (
    "pictures must be BYTES [N] (encoded files; base64 in JSON), UINT8 [N, H, W, C] or [H, W, C], FP32 of these shapes "
    "on the 0..1 scale, or UINT8 [n], the bytes of one file"
)
Outputs = dict[str, NDArray[Any]]
_Found: TypeAlias = "wire.Result | wire.Change"


@dataclass(frozen=True)
class Ask:
    """A request of the Open Inference Protocol.

    Attributes:
        parameters: The contract's plain keys.
        id: The caller's id, which the response repeats.
        outputs: By name of each requested output, whether it is binary; empty for all outputs.
        is_binary: Whether outputs that are not named are binary (REST; over gRPC all are).
    """

    parameters: dict[str, bytes | list[bytes]]
    id: str
    outputs: dict[str, bool]
    is_binary: bool


def from_grpc(message: pb.ModelInferRequest, card: wire.ModelCard) -> Ask:
    """Read a gRPC request.

    Raises:
        Rejected: It cannot be read.
    """
    tensor = _only(message.inputs)
    raw = list(message.raw_input_contents)
    if len(raw) > 1 or (raw and tensor.HasField("contents")):
        raise Rejected("bad_request", "pictures come either in raw_input_contents, once, or in contents")
    content = tensor.contents
    data: Any = raw[0] if raw else content.bytes_contents
    if not raw and tensor.datatype in _NUMBERS:
        data = content.uint_contents if tensor.datatype == "UINT8" else content.fp32_contents
        data = np.fromiter(data, np.float32 if tensor.datatype == "FP32" else np.uint32, len(data))
    files = _files(tensor.name, tensor.datatype, list(tensor.shape), data, card)
    parameters = {
        name: getattr(item, item.WhichOneof("parameter_choice") or "_", None)
        for name, item in message.parameters.items()
    }
    outputs = {output.name: True for output in message.outputs}
    return Ask(_plain(files, parameters, message.id, outputs, card), message.id, outputs, True)


def from_rest(body: bytes, json_length: str | None, card: wire.ModelCard) -> Ask:
    """Read a REST request.

    Args:
        body: JSON, followed by binary data.
        json_length: The header Inference-Header-Content-Length; None if all is JSON.
        card: The model's card.

    Raises:
        Rejected: It cannot be read.
    """
    length = len(body) if json_length is None else _length(json_length, len(body))
    if length > LARGEST_JSON_BYTES:
        raise Rejected("request_too_large", f"JSON may have {LARGEST_JSON_BYTES:,} bytes; send pictures as binary data")
    try:
        values = strict_json.loads(body[:length])
    except ValueError as error:
        raise Rejected("bad_request", f"the request is not valid JSON: {error}") from error
    request = _fields(values, "the request", ("id", "model_name", "parameters", "inputs", "outputs"))
    tensor = _fields(_only(_list(request, "inputs")), "an input", ("name", "shape", "datatype", "parameters", "data"))
    own = _fields(tensor.get("parameters") or {}, "an input's parameters", ("binary_data_size",))
    if "binary_data_size" in own:
        data: Any = body[length:]
        if own["binary_data_size"] != len(data) or "data" in tensor:
            raise Rejected("bad_request", "binary_data_size is not what follows the JSON, or there is data beside it")
    elif len(body) > length:
        raise Rejected("bad_request", "binary data follows the JSON, but no input has a binary_data_size")
    else:
        data = _list(tensor, "data")
    files = _files(tensor.get("name"), tensor.get("datatype"), tensor.get("shape"), data, card)
    parameters = dict(_fields(request.get("parameters") or {}, "parameters"))
    is_binary = _switch(parameters.pop("binary_data_output", False), "binary_data_output")
    outputs = {}
    for item in _list(request, "outputs") if request.get("outputs") else ():
        output = _fields(item, "an output", ("name", "parameters"))
        said = _fields(output.get("parameters") or {}, "an output's parameters", ("binary_data",))
        outputs[_text(output.get("name"), "an output's name")] = _switch(
            said.get("binary_data", is_binary), "binary_data"
        )
    identifier = _text(request.get("id") or "", "id")
    return Ask(_plain(files, parameters, identifier, outputs, card), identifier, outputs, is_binary)


def respond(ask: Ask, body: bytes, status: int) -> InferResponse:
    """Return a reply of the handlers as v2 tensors.

    Args:
        ask: The request.
        body: A `PredictReply`.
        status: Its HTTP status.

    Raises:
        Rejected: The reply is an error, a requested output is missing, or maps of pictures differ in shape.
    """
    reply = wire.PredictReply.FromString(body)
    if reply.HasField("error"):
        raise Rejected(reply.error.code, reply.error.message, status)
    outputs = _outputs(reply)
    missing = [name for name in ask.outputs if name not in outputs]
    if missing:
        raise Rejected("bad_request", f"there is no output {missing[0][:40]!r} here; there are {', '.join(outputs)}")
    parameters: dict[str, Any] = {name: getattr(reply, name) for name in ("engine", "device", "scores")}
    if reply.edits:
        parameters["edits"] = reply.edits
    if notes := [f"{number}: {', '.join(result.notes)}" for number, result in enumerate(reply.results) if result.notes]:
        parameters["notes"] = "; ".join(notes)
    if reply.HasField("timing"):
        times = ((field.name, value) for field, value in reply.timing.ListFields())
        parameters["timing"] = ", ".join(f"{name}={value:g}" for name, value in times)
    wanted = ask.outputs or dict.fromkeys(outputs, ask.is_binary)
    return InferResponse(
        ask.id or reply.request_id,
        reply.model,
        [
            InferOutput(name, list(outputs[name].shape), from_np_dtype(outputs[name].dtype), outputs[name])
            for name in wanted
        ],
        model_version=reply.version,
        parameters=parameters,
        requested_outputs=[RequestedOutput(name, {"binary_data": is_binary}) for name, is_binary in wanted.items()],
    )


def to_rest(response: InferResponse) -> tuple[Any, int | None]:
    """Return the body of a REST response: JSON values, or bytes and how many of them are JSON.

    Raises:
        Rejected: It cannot be JSON, since it has float16.
    """
    try:
        body, json_length = response.to_rest()
    except (InvalidInput, InferenceError) as error:
        raise Rejected("bad_request", str(error)) from error
    return body, json_length


def to_grpc(response: InferResponse) -> Any:
    """Return a gRPC response, with all of its data in `raw_output_contents`."""
    for output in response.outputs:
        output.set_data_from_numpy(output.data)
    return response.to_grpc()


def describe(card: wire.ModelCard, versions: list[str]) -> dict[str, Any]:
    """Return the metadata of a model with the fields of v2; in a shape -1 is any number."""
    names = {"none": (), "value": (LABELS, INDEXES, VALUES)}.get(card.scores, (LABELS, INDEXES, PROBABILITIES, LOGITS))
    kinds = {LABELS: "BYTES", INDEXES: "INT64"}
    outputs = [{"name": name, "datatype": kinds.get(name, "FP32"), "shape": [-1, -1]} for name in names]
    outputs.append({"name": ERRORS, "datatype": "BYTES", "shape": [-1]})
    for layer in card.layers:
        channels, *cells = layer.shape
        shape = [-1, channels, *(cells if card.input.height else [-1] * len(cells))]
        outputs.append({"name": layer.name, "datatype": "FP32", "shape": shape})
    return {
        "name": card.model,
        "versions": versions,
        "platform": f"convscope_{card.engine.partition('-')[0]}",
        "inputs": [{"name": PICTURES, "datatype": "BYTES", "shape": [-1]}],
        "outputs": outputs,
    }


def _files(name: Any, datatype: Any, shape: Any, data: Any, card: wire.ModelCard) -> list[bytes]:
    """Return the pictures of a tensor as files: as they were sent, or each a .npy array (H, W, C)."""
    if name != PICTURES:
        raise Rejected("bad_request", f"the input is {str(name)[:40]!r}; it must be {PICTURES!r}")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise Rejected("bad_request", "shape must be a list of whole numbers, none negative")
    if datatype == "BYTES" and len(shape) in (1, 2) and shape[1:] in ([], [1]):
        _check_count(shape[0], card)
        return _byte_strings(data, shape[0])
    if str(datatype) not in _NUMBERS or len(shape) not in (1, 3, 4) or (len(shape) == 1 and datatype != "UINT8"):
        raise Rejected("bad_request", _FORMS)
    if len(shape) == 4:
        _check_count(shape[0], card)
    array = _array(data, _NUMBERS[datatype], shape)
    if array.ndim == 1:
        return [array.tobytes()]
    return [_npy(picture) for picture in (array if array.ndim == 4 else array[None])]


def _check_count(count: int, card: wire.ModelCard) -> None:
    if count > card.limits.max_images:
        message = f"the request holds {count:,} pictures; at most {card.limits.max_images} are accepted"
        raise Rejected("too_many_images", message)


def _byte_strings(data: Any, count: int) -> list[bytes]:
    if isinstance(data, bytes):  # Each file follows its length, in four bytes.
        found, position = list[bytes](), 0
        while position < len(data) and len(found) < count:
            end = position + 4 + int.from_bytes(data[position : position + 4], "little")
            if position + 4 > len(data) or end > len(data):
                raise Rejected("bad_request", "the binary data of pictures ends within a picture")
            found.append(data[position + 4 : end])
            position = end
        if position < len(data) or len(found) < count:
            raise Rejected("bad_request", f"pictures does not hold the {count} that its shape says")
        return found
    items = [item[0] if isinstance(item, list) and len(item) == 1 else item for item in data[: count + 1]]
    if len(data) != count:
        raise Rejected("bad_request", f"pictures holds {len(data):,} and not the {count} that its shape says")
    return [item if isinstance(item, bytes) else _from_base64(item) for item in items]


def _from_base64(item: Any) -> bytes:
    try:
        return base64.b64decode(item, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise Rejected("bad_request", "in JSON each of pictures must be a file in base64 (RFC 4648)") from error


def _array(data: Any, dtype: np.dtype[Any], shape: list[int]) -> NDArray[Any]:
    try:
        if isinstance(data, bytes):
            return np.frombuffer(data, dtype.newbyteorder("<")).reshape(shape)
        values = np.asarray(data) if len(data) else np.empty(0, dtype)
        values = values.reshape(shape)
    except ValueError as error:
        raise Rejected("bad_request", "the data of pictures does not fill its shape") from error
    if values.dtype.kind not in ("iu" if dtype.kind == "u" else "iuf"):
        raise Rejected("bad_request", f"the data of pictures is not {'whole ' if dtype.kind == 'u' else ''}numbers")
    if dtype.kind == "u" and values.size and not 0 <= values.min() <= values.max() <= 255:
        raise Rejected("bad_request", "UINT8 values are from 0 to 255")
    return values.astype(dtype)


def _npy(picture: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, picture, allow_pickle=False)
    return file.getvalue()


def _plain(
    files: list[bytes],
    parameters: Mapping[str, Any],
    identifier: str,
    outputs: Mapping[str, bool],
    card: wire.ModelCard,
) -> dict[str, bytes | list[bytes]]:
    """Return the contract's plain keys. A layer is requested by the option `layers`, or as an output."""
    plain: dict[str, bytes | list[bytes]] = {"data": files}
    if identifier:
        plain["request_id"] = _utf8(identifier)
    for name, value in parameters.items():
        if name not in OPTION_NAMES:
            message = f"unknown parameter {name[:40]!r}; there are {', '.join(OPTION_NAMES)}"
            raise Rejected("bad_request", message)
        if isinstance(value, (list, dict)) or value is None:
            raise Rejected("bad_request", f"the parameter {name} must be text, a whole number, true or false")
        plain[name] = _utf8(str(value).lower() if isinstance(value, bool) else str(value))
    if outputs and "layers" not in plain:
        scores = (LABELS, INDEXES, PROBABILITIES, LOGITS, VALUES)
        fixed = (*scores, *(CHANGE + name for name in scores), ERRORS, HEAT, SEEN)
        named = {
            prefix + layer.name + suffix: layer.name
            for layer in card.layers
            for prefix in (CHANGE, "")
            for suffix in ("", SCALE, OFFSET, CHANNELS)
        }
        layers = dict.fromkeys(named.get(output, output) for output in outputs if output not in fixed)
        plain["layers"] = _utf8(",".join(layers))
    return plain


def _outputs(reply: wire.PredictReply) -> Outputs:
    """Return the outputs of a reply in which at least one picture has a result.

    A picture that has an error instead has it in `errors`; elsewhere its row is NaN, or -1, empty or 0 where there is
    no NaN. A row of 0 of a uint8 map has a scale and an offset of NaN.
    """
    results = [None if result.HasField("error") else result for result in reply.results]
    good = [result for result in results if result is not None]
    outputs = _scores(reply.scores, results)
    errors = [
        f"{result.error.code}: {result.error.message}" if result.HasField("error") else "" for result in reply.results
    ]
    outputs[ERRORS] = np.array([error.encode() for error in errors], np.object_)
    outputs |= _maps(results)
    for name, field in ((HEAT, "heat"), (SEEN, "picture")):
        if good[0].explanation.HasField(field):
            tensors = [None if result is None else getattr(result.explanation, field) for result in results]
            outputs |= _stack(name, tensors)
    if good[0].HasField("change"):
        changes = [None if result is None else result.change for result in results]
        changed = _scores(reply.scores, changes) | _maps(changes)
        outputs |= {CHANGE + name: array for name, array in changed.items()}
    return outputs


def _maps(results: Sequence[_Found | None]) -> Outputs:
    outputs: Outputs = {}
    example = next(result for result in results if result is not None)
    for place, first in enumerate(example.maps):
        maps = [None if result is None else result.maps[place] for result in results]
        outputs |= _stack(first.layer, [None if item is None else item.tensor for item in maps])
        if first.channels:
            empty = [-1] * len(first.channels)
            chosen = [empty if item is None else list(item.channels) for item in maps]
            outputs[first.layer + CHANNELS] = np.array(chosen, np.int64)
    return outputs


def _scores(scores: str, results: Sequence[_Found | None]) -> Outputs:
    if scores == "none":
        return {}
    size = (len(results), max(len(result.top) for result in results if result is not None))
    labels, indexes = np.full(size, b"", np.object_), np.full(size, -1, np.int64)
    names = {VALUES: "value"} if scores == "value" else {PROBABILITIES: "probability", LOGITS: "logit"}
    numbers = {name: np.full(size, np.nan, np.float32) for name in names}
    for row, result in enumerate(results):
        for column, score in enumerate(result.top if result is not None else ()):
            labels[row, column], indexes[row, column] = score.label.encode(), score.index
            for name, field in names.items():
                numbers[name][row, column] = getattr(score, field)
    return {LABELS: labels, INDEXES: indexes, **numbers}


def _stack(name: str, tensors: Sequence[wire.Tensor | None]) -> Outputs:
    """Return the tensors (C, h, w) of all pictures as one (N, C, h, w), with scale and offset (N, C) of uint8."""
    example = next(tensor for tensor in tensors if tensor is not None)
    if any(tensor is not None and tensor.shape != example.shape for tensor in tensors):
        message = f"{name} has another shape for each picture, which one tensor cannot hold: send one picture a request"
        raise Rejected("bad_request", message + ", or ask for pool")
    dtype = _DTYPES[example.dtype]
    cells = np.full((len(tensors), *example.shape), np.nan if dtype.kind == "f" else 0, dtype)
    scales = np.full((2, len(tensors), len(example.scale)), np.nan, np.float32)
    for row, tensor in enumerate(tensors):
        if tensor is not None:
            cells[row] = np.frombuffer(tensor.data, dtype).reshape(tuple(example.shape))
            scales[:, row] = tensor.scale, tensor.offset
    return {name: cells} | ({name + SCALE: scales[0], name + OFFSET: scales[1]} if len(example.scale) else {})


def _only(inputs: Sequence[Any]) -> Any:
    if len(inputs) != 1:
        raise Rejected("bad_request", f"a request has one input, {PICTURES}")
    return inputs[0]


def _fields(value: Any, what: str, known: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Rejected("bad_request", f"{what} must be an object")
    unknown = sorted(set(value) - set(known)) if known else ()
    if unknown:
        raise Rejected("bad_request", f"unknown field {unknown[0][:40]!r} of {what}; there are {', '.join(known)}")
    return value


def _list(values: Mapping[str, Any], name: str) -> list[Any]:
    found = values.get(name)
    if not isinstance(found, list):
        raise Rejected("bad_request", f"{name} must be a list")
    return found


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise Rejected("bad_request", f"{what} must be text")
    return value


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # JSON can contain half of a surrogate pair.
        raise Rejected("bad_request", "text in the request is not Unicode") from error


def _switch(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise Rejected("bad_request", f"{name} must be true or false")
    return value


def _length(text: str, most: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 12 and int(text) <= most):
        raise Rejected("bad_request", "Inference-Header-Content-Length must be the length of the JSON")
    return int(text)
