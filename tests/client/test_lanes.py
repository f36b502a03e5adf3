"""When questions go, and how many together: the bounds of pictures, bytes and time, without a network."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from convscope import _coalescing
from convscope._coalescing import (
    FIRST_MOST,
    LANES,
    LONGEST_S,
    MOST_PICTURES,
    MOST_REPLY_BYTES,
    MOST_REQUEST_BYTES,
    Lane,
    Lanes,
    Share,
)
from convscope._exceptions import BadRequest, ConvscopeError, ImageTooLarge, ReplyTooLarge, TooManyImages
from convscope._reply import Answer
from convscope._request import build_options
from convscope._wire.convscope_pb2 import FLOAT16, FLOAT32, UINT8, PredictReply


def new_lane(at_once: int = 1) -> Lane:
    return Lane(build_options(), "cifar", None, at_once)


def share(pictures: int = 1, size: int = 1) -> Share:
    return Share([b"x" * size] * pictures, 30.0, Future())


def answer(total_s: float, pictures: int = 1, maps: tuple[tuple[tuple[int, ...], int], ...] = ()) -> Answer:
    reply = PredictReply()
    for _ in range(pictures):
        result = reply.results.add()
        for shape, dtype in maps:
            result.maps.add().tensor.shape.extend(shape)
            result.maps[-1].tensor.dtype = dtype
    return Answer(reply, total_s, "id", pictures)


def test_who_finds_few_on_their_way_goes_and_the_others_when_one_comes_back():
    lane, one, two = new_lane(2), share(), share()
    assert [lane.enter(), lane.enter(), lane.enter()] == [True, True, False]
    assert lane.join(one) == (True, [])
    assert lane.join(two) == (False, [])
    assert lane.finish(1, None) == [one, two]
    assert not lane.enter()
    assert lane.finish(1, None) == []
    assert lane.enter()


def test_a_group_goes_as_soon_as_it_is_full():
    lane = new_lane()
    lane.enter()
    shares = [share() for _ in range(FIRST_MOST)]
    groups = [lane.join(one)[1] for one in shares]
    assert groups == [[]] * (FIRST_MOST - 1) + [[shares]]


def test_who_does_not_fit_any_more_waits_for_the_next_and_keeps_its_time():
    lane, one, two = new_lane(), share(FIRST_MOST - 1), share(2)
    lane.enter()
    lane.join(one)
    assert lane.join(two) == (True, [[one]])
    assert lane.expire(one) == []
    assert lane.expire(two) == [two]
    assert one.alone
    assert two.alone


def test_bytes_of_a_request_are_bounded():
    lane, small, large = new_lane(), share(size=2), share(size=MOST_REQUEST_BYTES - 1)
    lane.enter()
    lane.join(small)
    assert lane.join(large) == (True, [[small]])
    huge = share(size=MOST_REQUEST_BYTES)
    assert lane.join(huge) == (False, [[large], [huge]])


@pytest.mark.parametrize(("dtype", "cell_bytes"), [(FLOAT32, 4), (FLOAT16, 2), (UINT8, 1)])
def test_bytes_of_a_reply_are_foreseen_from_the_one_before(dtype: int, cell_bytes: int):
    lane = new_lane()
    lane.enter()
    lane.finish(1, answer(1e-3, maps=(((16, 64, 64), dtype), ((1, 64, 64), dtype))))
    assert lane.most == min(FIRST_MOST, MOST_REPLY_BYTES // (17 * 64 * 64 * cell_bytes))
    lane.enter()
    lane.finish(2, answer(1e-3, 2, maps=(((32, 1024, 1024), dtype),)))
    assert lane.most == 1


def test_a_picture_that_failed_tells_nothing_of_the_bytes_of_a_reply():
    lane, seen = new_lane(), answer(1e-3, 3, maps=(((32, 1024, 1024), FLOAT32),))
    seen.reply.results[0].Clear()
    seen.reply.results[0].error.code = "bad_image"
    lane.enter()
    lane.finish(3, seen)
    assert lane.most == 1


def test_the_most_grows_while_pictures_together_take_little_more_than_one():
    lane = new_lane()
    lane.enter()
    lane.finish(1, answer(0.010))
    assert lane.most == FIRST_MOST
    lane.enter()
    lane.finish(8, answer(0.012, 8))
    assert lane.most == MOST_PICTURES


def test_the_most_falls_where_each_picture_takes_long_but_two_may_always_try():
    lane = new_lane()
    lane.enter()
    lane.finish(1, answer(0.05))
    for _ in range(9):
        lane.enter()
        lane.finish(4, answer(0.05 + 3 * LONGEST_S / 4.5, 4))
    assert lane.most == 5  # One, and 4.5 in the time that neighbours may add.
    for _ in range(9):
        lane.enter()
        lane.finish(4, answer(4.0, 4))
    assert lane.most == 2


@pytest.mark.parametrize("kind", [TooManyImages, ReplyTooLarge, ImageTooLarge])
def test_a_limit_is_learnt_from_a_refusal_and_tried_again_by_and_by(kind: type[ConvscopeError]):
    lane, group = new_lane(), [share(2), share(1), share(3)]
    assert lane.split(group, kind("no")) == group
    assert lane.most == 3
    assert all(one.alone for one in group)
    lane.finish(3, answer(1e-3, 3))
    assert lane.most == 4
    lane.finish(2, answer(1e-3, 2))
    assert lane.most == 4


def test_other_failures_say_nothing_of_a_limit():
    lane = new_lane()
    lane.split([share(2), share(2)], BadRequest("no"))
    assert lane.most == FIRST_MOST


def test_who_left_is_not_asked_about_again():
    lane, one, two = new_lane(), share(), share()
    lane.enter()
    lane.join(one)
    lane.join(two)
    lane.finish(1, None)
    lane.forsake(one)
    assert lane.split([one, two]) == [two]


def test_failures_teach_nothing():
    lane = new_lane()
    lane.enter()
    lane.finish(1, None)
    lane.enter()
    lane.finish(1, Answer(PredictReply(), 9.0, "id", 1))
    assert lane.most == FIRST_MOST


def test_lanes_are_told_apart_by_all_that_is_asked_and_forgotten_when_idle(monkeypatch: pytest.MonkeyPatch):
    lanes = Lanes(1)
    first = lanes.find(build_options(), "cifar", None)
    assert lanes.find(build_options(), "cifar", None) is first
    assert lanes.find(build_options(), "cifar", "2") is not first
    assert lanes.find(build_options(), "digits", None) is not first
    assert lanes.find(build_options(timing=True), "cifar", None) is not first
    first.enter()
    for number in range(3 * LANES):
        lanes.find(build_options(top_k=number + 6), "cifar", None)
    assert len(lanes._lanes) <= LANES
    assert lanes.find(build_options(), "cifar", None) is first
    assert _coalescing.LANES == LANES
