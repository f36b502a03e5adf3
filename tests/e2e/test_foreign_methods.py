"""TorchServe takes more than the contract names; none of it may hurt a worker, with no gateway in between.

The requests come from `tests.foreign`. `python -m server` patches TorchServe for this (`server.patches`); what holds
without the patch, as in a stock TorchServe, is tested too.
"""

from __future__ import annotations

import collections
import http.client
import random
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from tests.foreign import (
    INFERENCE,
    PATIENCE_S,
    PICTURE,
    PREDICTIONS,
    Call,
    Target,
    foreign,
    good_calls,
    predictions_request,
    read_responses,
)
from tests.server.harness import Launched
from tests.thorough import tries

pytestmark = pytest.mark.usefixtures("same_workers")
CALLERS, CALLS, CANCELLED, PIPELINED = 4, tries(40, 250), tries(200, 2000), tries(100, 300)  # Per caller.
FORMS = tries(120, 250)
SERVICE = f"/{INFERENCE}.InferenceAPIsService"
REQUEST = predictions_request("cifar", {b"data": PICTURE, b"accept": b"application/json"})


def target(server: Launched) -> Target:
    return Target("127.0.0.1", server.port("REST"), server.port("gRPC"), "cifar", "1.0")


def at_once(caller: Callable[[int], None]) -> None:
    """Run as many callers at once as `CALLERS` says, each with its number; raises what they raise."""
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            caller(number)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def call_everything(server: Launched, **transports: bool) -> collections.Counter[str]:
    """Send calls outside the contract, among good ones, from several callers; return what came how often."""
    came: collections.Counter[str] = collections.Counter()

    def caller(seed: int) -> None:
        calls = foreign(random.Random(seed), target(server), **transports)
        for number, call in zip(range(CALLS), calls, strict=False):
            try:
                answer = call.send()
            except AssertionError as error:
                raise AssertionError(f"{call.name}: {error}") from error
            assert "Worker died" not in answer, call.name
            came[answer] += 1
            if number % 10 == 0:
                for good in good_calls(target(server)):
                    good.send()

    at_once(caller)
    return came


def test_whatever_is_asked_is_answered_and_the_worker_lives_on(server: Launched) -> None:
    came = call_everything(server)
    statuses = {answer.split(" ")[0] for answer in came}
    assert {"200", "404", "400", "OK", "UNIMPLEMENTED", "INTERNAL"} <= statuses, came


@pytest.mark.unpatched
def test_whatever_is_asked_over_rest_is_answered_without_the_patches_too(server: Launched) -> None:
    came = call_everything(server, grpc=False, pipelined=False)
    assert {"200", "404", "400"} <= {answer.split(" ")[0] for answer in came}, came


def cancel_at_random(server: Launched) -> None:
    """Cancel gRPC calls at about the time of their answers."""

    def caller(seed: int) -> None:
        rng = random.Random(seed)
        with grpc.insecure_channel(
            f"127.0.0.1:{server.port('gRPC')}", [("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            call = channel.unary_unary(PREDICTIONS)
            for _ in range(CANCELLED):
                asked = call.future(REQUEST, timeout=PATIENCE_S)
                time.sleep(rng.uniform(0, 0.004))
                asked.cancel()

    at_once(caller)


def send_once_there_is_room(call: Call) -> str:
    """Send a call, again while the queue is full of cancelled ones; TorchServe's message is then that of no worker."""
    ends = time.monotonic() + PATIENCE_S
    while True:
        try:
            return call.send()
        except (AssertionError, grpc.RpcError) as error:
            if "no worker to serve" not in str(error) or time.monotonic() > ends:
                raise
            time.sleep(0.1)


def settled_log(server: Launched) -> str:
    """Return what is logged once the lines of earlier tests' requests are all there."""
    logged = server.err
    while True:
        time.sleep(1)
        if server.err == logged:
            return logged
        logged = server.err


def test_calls_that_are_cancelled_at_the_moment_of_their_answer_do_not_stop_the_worker(server: Launched) -> None:
    logged = settled_log(server)
    cancel_at_random(server)
    assert [send_once_there_is_room(good) for good in good_calls(target(server))] == ["ok", "ok"]
    assert server.err == logged, "a line for each call that was cancelled"


def test_requests_that_do_not_wait_for_the_last_reply_are_all_answered(server: Launched) -> None:
    """The second of two requests may be read just while the first is answered; a few of 5,000 are, unpatched."""
    head = f"POST /predictions/cifar HTTP/1.1\r\nHost: x\r\nContent-Length: {len(PICTURE)}\r\n\r\n"
    message = head.encode() + PICTURE

    def caller(seed: int) -> None:
        rng = random.Random(seed)
        with (
            socket.create_connection(("127.0.0.1", server.port("REST")), PATIENCE_S) as connection,
            connection.makefile("rb") as stream,
        ):
            for _ in range(PIPELINED):
                for _ in range(4):
                    connection.sendall(message)
                    time.sleep(rng.uniform(0, 0.002))
                assert list(read_responses(stream, "POST", 4)) == ["200"] * 4

    at_once(caller)


MEGABYTE = b"q" * 1_000_000
PART = b'--x\r\nContent-Disposition: form-data; name="data"\r\n\r\n' + MEGABYTE + b"\r\n"
NAMELESS = b"--x\r\nContent-Disposition: form-data\r\n\r\n"


@pytest.mark.parametrize(
    "form",
    [NAMELESS + MEGABYTE + b"\r\n--x--\r\n", PART + NAMELESS + b"q\r\n--x--\r\n"],
    ids=["a nameless part", "a nameless part behind a good one"],
)
def test_forms_that_cannot_be_read_leave_nothing_in_memory(server: Launched, form: bytes) -> None:
    def resident_bytes() -> int:
        (line,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{server.java()}/status").read_text())
        return int(line) * 1024

    before = resident_bytes()
    for _ in range(FORMS):
        connection = http.client.HTTPConnection("127.0.0.1", server.port("REST"), timeout=PATIENCE_S)
        connection.request("POST", "/predictions/cifar", form, {"Content-Type": "multipart/form-data; boundary=x"})
        assert connection.getresponse().status == 400
        connection.close()
    assert resident_bytes() - before < 0.8e6 * FORMS, "a megabyte was sent with each"


def stream(server: Launched, method: str, *requests: bytes) -> list[bytes]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port('gRPC')}") as channel:
        if method == "StreamPredictions":
            return list(channel.unary_stream(f"{SERVICE}/{method}")(requests[0], timeout=PATIENCE_S))
        return list(channel.stream_stream(f"{SERVICE}/{method}")(iter(requests), timeout=PATIENCE_S))


def test_the_streaming_methods_are_not_there(server: Launched) -> None:
    sequence = predictions_request("cifar", {b"data": PICTURE}, sequence_id="1")
    unknown = predictions_request("cifar", {b"data": PICTURE, b"layers": b"conv9"})
    for method, request in (
        ("StreamPredictions", REQUEST),
        ("StreamPredictions2", REQUEST),
        ("StreamPredictions2", REQUEST),
        ("StreamPredictions2", sequence),
        ("StreamPredictions", unknown),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            stream(server, method, request)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]
    assert [good.send() for good in good_calls(target(server))] == ["ok", "ok"]


@pytest.mark.unpatched
def test_without_the_patches_a_streamed_reply_is_the_plain_one_and_the_worker_lives_on(server: Launched) -> None:
    [reply] = stream(server, "StreamPredictions", REQUEST)
    assert b'"results"' in reply
    assert [good.send() for good in good_calls(target(server))] == ["ok", "ok"]


def test_a_rest_request_without_any_header_is_answered(server: Launched) -> None:
    """The handler tells gRPC from REST by there being no header: netty adds one to every request over REST."""
    for path in ("/cifar/predict", "/predictions/cifar"):
        with socket.create_connection(("127.0.0.1", server.port("REST")), PATIENCE_S) as connection:
            connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 ")
