"""Warm-up: requests of every kind over both transports, before the server reports that it is ready.

Java interprets code at first and compiles it later, so the first requests take tens of times as long as later ones.
Workers warm up by themselves when they load; this warms up TorchServe's front end.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import grpc
from PIL import Image

from server.configuration import Listeners
from server.models import Archive
from server.ports import reachable
from server.wire.inference_pb2 import PredictionsRequest

SIDE_PX = 64  # Small to decode, and large enough for a network of any size.
LEAST_LIGHT = 4  # Kinds of request that are repeated until the time is over, at least.
FORM_PICTURES = 8  # Pictures in a form.
GRACE_S = 5.0  # For the last responses: a large network may be busy with many pictures.
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

Send = Callable[[], bool]  # Sends one request; returns False if it failed.


class WarmUp:
    """Sends requests to the models in turn for a while, from threads of its own.

    Responses are not checked: a model that cannot respond is found when its card is requested.

    Args:
        listeners: Where the server listens.
        archives: The models.
        seconds: How long new requests are sent.
    """

    def __init__(self, listeners: Listeners, archives: Sequence[Archive], seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._given_up = threading.Event()
        # The second one over REST begins with other requests than the first.
        callers = [
            _over_rest(listeners, archives, 0),
            _over_rest(listeners, archives, 1),
            _over_grpc(listeners, archives),
        ]
        self._threads = [
            threading.Thread(target=self._run, args=(caller,), daemon=True) for caller in callers if seconds
        ]
        for thread in self._threads:
            thread.start()

    def done(self) -> bool:
        """Return whether the time is over and the last responses were received, or waited for long enough."""
        is_late = time.monotonic() > self._end + GRACE_S
        return is_late or not any(thread.is_alive() for thread in self._threads)

    def give_up(self) -> None:
        """Send no more requests."""
        self._given_up.set()

    def _run(self, caller: contextlib.AbstractContextManager[list[Send]]) -> None:
        with caller as requests:
            working = list(filter(self._attempt, requests))  # Every kind once,
            light = working[: max(LEAST_LIGHT, len(working) // 4)]  # then the fastest kinds, as often as possible.
            while light and not self._over():
                light = list(filter(self._attempt, light))

    def _attempt(self, send: Send) -> bool:
        """Send a request unless the time is over; return whether requests of this kind are worth repeating."""
        return not self._over() and send()

    def _over(self) -> bool:
        return time.monotonic() > self._end or self._given_up.is_set()


@contextlib.contextmanager
def _over_rest(listeners: Listeners, archives: Sequence[Archive], start: int) -> Iterator[list[Send]]:
    """Yield a function for each kind of request over REST and each model, beginning with the kind of index `start`."""
    kinds = [*_rest_requests()]
    paths = [archive.predictions_path for archive in archives]
    connection = http.client.HTTPConnection(reachable(listeners.host), listeners.rest, timeout=60)

    def send(path: str, body: bytes, headers: dict[str, str]) -> bool:
        try:
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            return False
        return response.status == 200

    with contextlib.closing(connection):
        yield [partial(send, path, *kind) for kind in kinds[start:] + kinds[:start] for path in paths]


@contextlib.contextmanager
def _over_grpc(listeners: Listeners, archives: Sequence[Archive]) -> Iterator[list[Send]]:
    """Yield a function for each kind of request over gRPC and each model."""
    picture = _picture()

    def send(archive: Archive, options: dict[str, str]) -> bool:
        inputs = {"data": picture} | {name: value.encode() for name, value in options.items()}
        try:
            call(PredictionsRequest(model_name=archive.name, model_version=archive.version, input=inputs), timeout=60)
        except grpc.RpcError:
            return False
        return True

    address = f"{reachable(listeners.host)}:{listeners.grpc}"
    with grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)]) as channel:
        call = channel.unary_unary(METHOD, request_serializer=PredictionsRequest.SerializeToString)
        yield [partial(send, archive, options) for options in MAPS for archive in archives]


def _rest_requests() -> Iterator[tuple[bytes, dict[str, str]]]:
    """Yield body and headers of each kind of request."""
    picture = _picture()
    head = b'--picture\r\nContent-Disposition: form-data; name="data"; filename="a.png"\r\n\r\n'
    form = (head + picture + b"\r\n") * FORM_PICTURES + b"--picture--\r\n"
    options = [{f"X-Convscope-{name.replace('_', '-')}": value for name, value in maps.items()} for maps in MAPS]
    for accepted, headers in itertools.product(ACCEPTED, options):
        yield picture, headers | {"Accept": accepted, "Content-Type": "image/png"}
    for headers in options:
        yield form, headers | {"Accept": PROTOBUF, "Content-Type": "multipart/form-data; boundary=picture"}


def _picture() -> bytes:
    """Return a PNG file: a gradient of grey in colour, `SIDE_PX` pixels a side."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((SIDE_PX, SIDE_PX)).convert("RGB").save(file, "png")
    return file.getvalue()
