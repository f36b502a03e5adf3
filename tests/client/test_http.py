"""An answer of HTTP/1.1 as it comes: in whatever pieces, ended in whatever way, beside h11's reading of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import h11
import httpcore
import pytest
from convscope._http import Incoming
from hypothesis import given
from hypothesis import strategies as st

BODY = bytes(range(256)) * 3 + b"\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"  # With what might be taken for a head.


def chunked(body: bytes, sizes: Iterable[int]) -> bytes:
    """Write a body in chunks of these sizes, and the rest in one."""
    written, start = b"", 0
    for size in sizes:
        piece = body[start : start + size]
        written += b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""
        start += size
    rest = body[start:]
    return written + (b"%x\r\n%b\r\n" % (len(rest), rest) if rest else b"") + b"0\r\n\r\n"


ANSWERS = {
    "of a length": (b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY, 200, BODY, True),
    "empty": (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 200, b"", True),
    "chunked": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunked(BODY, [7, 100]), 200, BODY, True),
    "the last": (b"HTTP/1.1 503 No\r\nconnection: close\r\ncontent-length: 2\r\n\r\nno", 503, b"no", False),
    "of HTTP/1.0": (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nno", 200, b"no", False),
    "announced": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nlink: x\r\n\r\n"
        b"HTTP/1.1 404 ?\r\ncontent-length: 1\r\n\r\n!",
        404,
        b"!",
        True,
    ),
    "without a body": (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", True),
    "without a reason": (b"HTTP/1.1 200\r\ncontent-length: 1\r\n\r\n!", 200, b"!", True),
}


def take(answer: Incoming, data: bytes, cuts: Sequence[int] = ()) -> Incoming:
    """Let an answer come in pieces."""
    for start, end in zip((0, *cuts), (*cuts, len(data)), strict=True):
        if data[start:end]:
            answer.take(data[start:end])
    return answer


@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_is_the_same_wherever_it_is_cut(kind: str):
    data, status, body, reusable = ANSWERS[kind]
    for cut in range(len(data) + 1):
        answer = take(Incoming(), data, [cut])
        assert (answer.status, answer.body(), answer.complete, answer.reusable) == (status, body, True, reusable), cut
        answer.end()
        assert answer.complete
        assert not answer.reusable
    answer = take(Incoming(), data, range(1, len(data)))
    assert (answer.status, answer.body(), answer.complete, answer.reusable) == (status, body, True, reusable)


def test_a_body_of_any_size_may_come_with_the_last_bytes_of_a_head():
    head, body = b"HTTP/1.1 200 OK\r\ncontent-length: 300000\r\n\r\n", b"x" * 300_000
    for cut in range(len(head) - 5, len(head) + 1):
        answer = take(Incoming(), head + body, [cut])
        assert (answer.complete, answer.reusable) == (True, True)
        assert answer.body() == body


@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_that_ends_early_is_none(kind: str):
    data, *_ = ANSWERS[kind]
    for cut in range(len(data)):
        answer = take(Incoming(), data[:cut])
        assert not answer.complete
        with pytest.raises(httpcore.ReadError, match="before its answer was complete"):
            answer.end()


@pytest.mark.parametrize("surplus", [b"H", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b"\0" * 100])
@pytest.mark.parametrize("kind", ANSWERS)
def test_what_comes_behind_an_answer_changes_it_not_and_ends_its_connection(kind: str, surplus: bytes):
    data, status, body, _ = ANSWERS[kind]
    for cut in {len(data), *range(0, len(data) + len(surplus), 9)}:
        answer = take(Incoming(), data + surplus, [cut])
        assert (answer.status, answer.body(), answer.complete, answer.reusable) == (status, body, True, False)


def test_a_body_without_a_length_ends_with_its_connection():
    answer = take(Incoming(), b"HTTP/1.1 200 OK\r\n\r\n" + BODY, [5, 30])
    assert not answer.complete
    answer.end()
    assert (answer.complete, answer.body(), answer.reusable) == (True, BODY, False)


def test_an_answer_to_connect_ends_with_its_head_whatever_that_says():
    answer = take(Incoming(bodiless=True), b"HTTP/1.1 200 Connection established\r\n\r\n")
    assert (answer.status, answer.reason, answer.complete, answer.reusable) == (
        *(200, "Connection established"),
        *(True, True),
    )
    answer.take(b"x")
    assert not answer.reusable
    refused = take(Incoming(bodiless=True), b"HTTP/1.1 407 Who?\r\ncontent-length: 5\r\n\r\n12345")
    assert (refused.status, refused.complete, refused.reusable, refused.body()) == (407, True, False, b"")


def test_headers_go_by_their_names_in_lower_case():
    answer = take(Incoming(), b"HTTP/1.1 200 OK\r\nRETRY-After:  7\r\nX-Empty:\r\ncontent-length: 0\r\n\r\n", [25])
    assert answer.headers == {b"retry-after": b"7", b"x-empty": b"", b"content-length": b"0"}


def test_headers_behind_a_body_and_of_the_next_answer_are_not_its_own():
    head = b"HTTP/1.1 200 OK\r\ncontent-type: a\r\ntransfer-encoding: chunked\r\n\r\n"
    surplus = b"HTTP/1.1 500 No\r\ncontent-type: c\r\n\r\n"
    answer = take(Incoming(), head + b"1\r\nx\r\n0\r\ncontent-type: b\r\n\r\n" + surplus)
    assert (answer.status, answer.reason, answer.body(), answer.reusable) == (200, "OK", b"x", False)
    assert answer.headers == {b"content-type": b"a", b"transfer-encoding": b"chunked"}


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x00\x12\x04\x00\x00\x00\x00\x00",  # HTTP/2's first frame.
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\ncontent-length: 1\n\n!",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n!",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n!",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nna me: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nname: x\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000,
    ],
    ids=lambda data: data[:60].decode("latin-1").encode("unicode_escape").decode(),
)
def test_what_is_no_http_is_refused(data: bytes):
    with pytest.raises(httpcore.RemoteProtocolError):
        take(Incoming(), data)


NAMES = st.sampled_from(["Content-Type", "x-request-id", "Retry-After", "server", "date"])
VALUES = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)


@given(
    status=st.integers(200, 599),
    headers=st.dictionaries(NAMES, VALUES),
    body=st.binary(max_size=400),
    sizes=st.none() | st.lists(st.integers(1, 50), max_size=5),
    cuts=st.lists(st.integers(0, 600), max_size=6),
)
def test_h11_reads_the_same(
    status: int, headers: dict[str, str], body: bytes, sizes: list[int] | None, cuts: list[int]
):
    if status in (204, 304):
        body = b""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
    if sizes is None:
        data = b"HTTP/1.1 %d ?\r\n%bcontent-length: %d\r\n\r\n" % (status, lines, len(body)) + body
    elif status in (204, 304):
        data = b"HTTP/1.1 %d ?\r\n%b\r\n" % (status, lines)
    else:
        data = b"HTTP/1.1 %d ?\r\n%btransfer-encoding: chunked\r\n\r\n" % (status, lines) + chunked(body, sizes)
    answer = take(Incoming(), data, sorted(min(cut, len(data)) for cut in cuts))
    other = h11.Connection(h11.CLIENT)
    other.send(h11.Request(method="POST", target="/", headers=[("host", "a")]))
    other.send(h11.EndOfMessage())
    other.receive_data(data)
    head = other.next_event()
    assert isinstance(head, h11.Response)
    read = b""
    while isinstance(event := other.next_event(), h11.Data):
        read += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert (answer.status, answer.headers, answer.body()) == (head.status_code, dict(head.headers), read)
    assert answer.complete
    assert answer.reusable
