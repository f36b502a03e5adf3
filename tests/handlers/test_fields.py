"""Tests of cutting a request into its fields: protobuf is the reference, for what is a message and for what is none."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from handlers.fields import split
from handlers.wire import convscope_pb2 as wire

MESSAGE = wire.PredictRequest(
    pictures=[b"", b"a" * 127, b"b" * 128, bytes(20_000)],
    layers=["all"],
    top_k=0,
    map_dtype=wire.UINT8,
    pool=300,
    channels=wire.ChannelSelection(indexes=[1, 200, 70_000]),
    request_id="an-id",
    timing=True,
    explain=wire.Explain(method="occlusion", target=3),
    filters="conv1",
)
UNKNOWN = {
    "varint": b"\xf8\x01\xac\x02",
    "fixed64": b"\xf9\x0112345678",
    "bytes": b"\xfa\x01\x05picts",
    "fixed32": b"\xfd\x011234",
    "a picture's number, another type": b"\x08\x05",
    "an id's number, another type": b"\x45abcd",
}


def joined(message: bytes) -> wire.PredictRequest | None:
    """Return what a message says, by way of its parts; None for no message."""
    try:
        pictures, request_id, rest = split(message)
        found = wire.PredictRequest.FromString(rest)
    except (ValueError, DecodeError):
        return None
    assert not found.pictures
    assert not found.request_id
    found.pictures.extend(pictures)
    found.request_id = request_id
    return found


def parsed(message: bytes) -> wire.PredictRequest | None:
    """Return what protobuf reads; None for no message."""
    try:
        return wire.PredictRequest.FromString(message)
    except DecodeError:
        return None


def has_group(message: bytes) -> bool:
    """Tell whether a message is refused for a group, which proto3 cannot say."""
    try:
        split(message)
    except ValueError as error:
        return "wire type" in str(error)
    return False


def test_what_is_left_says_nothing_of_the_pictures() -> None:
    first, second = wire.PredictRequest(), wire.PredictRequest()
    first.CopyFrom(MESSAGE)
    second.CopyFrom(MESSAGE)
    second.request_id = "another"
    second.pictures.append(b"more")
    assert split(first.SerializeToString()).rest == split(second.SerializeToString()).rest
    assert joined(second.SerializeToString()) == second


def test_fields_may_stand_in_any_order_and_twice() -> None:
    fields = [
        wire.PredictRequest(**{field.name: value}).SerializeToString()
        for field, value in MESSAGE.ListFields()
        if field.name != "pictures"
    ]
    pictures = [wire.PredictRequest(pictures=[picture]).SerializeToString() for picture in MESSAGE.pictures]
    again = wire.PredictRequest(request_id="the-last-counts", top_k=7).SerializeToString()
    message = b"".join([*fields[::-1], pictures[0], again, *pictures[1:]])
    found = joined(message)
    assert found == parsed(message)
    assert found is not None
    assert (found.request_id, found.top_k, list(found.pictures)) == ("the-last-counts", 7, list(MESSAGE.pictures))


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_fields_are_kept(name: str) -> None:
    message = UNKNOWN[name] + MESSAGE.SerializeToString() + UNKNOWN[name]
    assert joined(message) == parsed(message)
    assert parsed(message) is not None


def test_a_message_that_was_cut_off_is_none() -> None:
    whole = wire.PredictRequest(pictures=[b"picture"], layers=["conv1"], top_k=300, request_id="id").SerializeToString()
    for length in range(len(whole)):
        assert joined(whole[:length]) == parsed(whole[:length])


def test_an_endless_number_is_refused_at_once() -> None:
    for message in (b"\xff" * 1_000_000, b"\x0a" + b"\x80" * 1_000_000, b"\x18" + b"\xff" * 1_000_000):
        with pytest.raises(ValueError, match="more than 64 bits"):
            split(message)


@given(
    st.lists(st.binary(max_size=300), max_size=4),
    st.text(max_size=5),
    st.lists(st.text(max_size=5), max_size=3),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_parts_are_the_message(pictures: list[bytes], request_id: str, layers: list[str], top_k: int, timing: bool):
    message = wire.PredictRequest(pictures=pictures, request_id=request_id, layers=layers, top_k=top_k, timing=timing)
    assert joined(message.SerializeToString()) == message


@given(st.binary(max_size=40) | st.lists(st.sampled_from([0x0A, 0x42, 0x12, 0x18, 0, 1, 2, 0x80, 0xFF])).map(bytes))
@example(b"\x42\x01\xff")  # An id that is not UTF-8.
@example(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
@example(b"\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f")
@example(b"\x8a\x00\x01a")  # A tag spelt longer than needed.
def test_any_bytes_are_what_protobuf_says(message: bytes) -> None:
    assert has_group(message) or joined(message) == parsed(message)
