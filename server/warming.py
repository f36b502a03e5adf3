"""Warming up: requests of every kind, through both transports, before anybody is told that the server is ready.

Java interprets what it runs for the first time and compiles it by and by: the first requests take tens of times as long
as later ones. Workers rehearse by themselves when they load; this is for the way to them and back.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import grpc
from PIL import Image

from server.configuration import Listeners
from server.models import Archive
from server.ports import reachable

SIDE_PX = 64  # Small to decode, and large enough for a network of any size.
LIGHT = 4  # Kinds of request to go on with, at least.
MANY = 8  # Pictures in one request, as a form.
PATIENCE_S = 5.0  # For the last answers: a large network may be at many pictures.
PROTOBUF = "application/x-protobuf"
METHOD = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
MAPS: tuple[dict[str, str], ...] = (
    {},
    {"layers": "all"},
    {"layers": "all", "map_dtype": "uint8"},
    {"layers": "all", "map_dtype": "float16"},
    {"layers": "all", "pool": "1"},
)
ACCEPTED = (PROTOBUF, "application/json", "application/x-npz")

Ask = Callable[[], bool]  # Asks once; False if requests of this kind are to be dropped.


class WarmUp:
    """Asks the models in turns for a while, from threads of its own.

    What is answered does not matter: a model that cannot answer shows when it is asked for its card.

    Args:
        listeners: Where the server listens.
        archives: The models.
        seconds: How long new requests are sent.
    """

    def __init__(self, listeners: Listeners, archives: Sequence[Archive], seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._given_up = threading.Event()
        callers = (_Rest, _Rest, _Grpc) if seconds else ()
        self._threads = [
            threading.Thread(target=self._run, args=(caller(listeners, archives, number),), daemon=True)
            for number, caller in enumerate(callers)
        ]
        for thread in self._threads:
            thread.start()

    def done(self) -> bool:
        """Tell whether the time is over and the last answers are there, or have been waited for long enough."""
        late = time.monotonic() > self._end + PATIENCE_S
        return late or not any(thread.is_alive() for thread in self._threads)

    def give_up(self) -> None:
        """Ask no more."""
        self._given_up.set()

    def _run(self, caller: _Rest | _Grpc) -> None:
        with contextlib.closing(caller):
            asks = list(filter(self._attempt, caller.asks()))  # Every kind once;
            light = asks[: max(LIGHT, len(asks) // 4)]  # then the light ones, of which there can be most.
            while light and not self._over():
                light = list(filter(self._attempt, light))

    def _attempt(self, ask: Ask) -> bool:
        """Ask, unless the time is over; False if it is no use to ask so again."""
        return not self._over() and ask()

    def _over(self) -> bool:
        return time.monotonic() > self._end or self._given_up.is_set()


class _Rest:
    """A caller over REST.

    Args:
        listeners: Where the server listens.
        archives: The models.
        start: Kind of request to start with, so that callers differ.
    """

    def __init__(self, listeners: Listeners, archives: Sequence[Archive], start: int) -> None:
        self._connection = http.client.HTTPConnection(reachable(listeners.host), listeners.rest, timeout=60)
        self._archives = archives
        self._start = start

    def asks(self) -> list[Ask]:
        """Return a function a kind of request."""
        kinds = [*_rest_requests()]
        kinds = kinds[self._start :] + kinds[: self._start]
        paths = [archive.predictions_path for archive in self._archives]
        return [self._ask(path, *kind) for kind, path in itertools.product(kinds, paths)]

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def _ask(self, path: str, body: bytes, headers: dict[str, str]) -> Ask:
        def ask() -> bool:
            try:
                self._connection.request("POST", path, body, headers)
                answer = self._connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException):
                self._connection.close()
                return False
            return answer.status == 200

        return ask


class _Grpc:
    """A caller over gRPC; arguments as those of `_Rest`."""

    def __init__(self, listeners: Listeners, archives: Sequence[Archive], start: int) -> None:
        self._channel = grpc.insecure_channel(
            f"{reachable(listeners.host)}:{listeners.grpc}", [("grpc.max_receive_message_length", -1)]
        )
        self._archives = archives

    def asks(self) -> list[Ask]:
        """Return a function a kind of request."""
        call = self._channel.unary_unary(METHOD)
        return [
            self._ask(call, _grpc_request(archive, options))
            for options, archive in itertools.product(MAPS, self._archives)
        ]

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def _ask(self, call: Callable[..., bytes], request: bytes) -> Ask:
        def ask() -> bool:
            try:
                call(request, timeout=60)
            except grpc.RpcError:
                return False
            return True

        return ask


def _rest_requests() -> Iterator[tuple[bytes, dict[str, str]]]:
    """Yield body and headers of each kind of request."""
    picture = _picture()
    head = b'--picture\r\nContent-Disposition: form-data; name="data"; filename="a.png"\r\n\r\n'
    form = (head + picture + b"\r\n") * MANY + b"--picture--\r\n"
    asked = [{f"X-Convscope-{name.replace('_', '-')}": value for name, value in options.items()} for options in MAPS]
    for accepted, headers in itertools.product(ACCEPTED, asked):
        yield picture, headers | {"Accept": accepted, "Content-Type": "image/png"}
    for headers in asked:
        yield form, headers | {"Accept": PROTOBUF, "Content-Type": "multipart/form-data; boundary=picture"}


def _grpc_request(archive: Archive, options: dict[str, str]) -> bytes:
    """Return a serialized PredictionsRequest: 1 is the model's name, 2 its version, 3 the map `input`."""
    inputs = {"data": _picture()} | {name: value.encode() for name, value in options.items()}
    entries = (_field(1, name.encode()) + _field(2, value) for name, value in inputs.items())
    head = _field(1, archive.name.encode()) + _field(2, archive.version.encode())
    return head + b"".join(_field(3, entry) for entry in entries)


def _field(number: int, data: bytes) -> bytes:
    """Return a length-delimited field of a protobuf message."""
    length, size = len(data), b""
    while length > 127:
        size += bytes([length & 127 | 128])
        length >>= 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + data


def _picture() -> bytes:
    """Return a PNG file: a gradient of grey in colour, `SIDE_PX` pixels a side."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((SIDE_PX, SIDE_PX)).convert("RGB").save(file, "png")
    return file.getvalue()
