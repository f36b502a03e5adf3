"""The warm-up: what it sends, when it ends, and that the server is not ready meanwhile."""

import json
import time

from server.arguments import parse
from server.configuration import Listeners
from server.models import find_archives
from server.warming import WarmUp
from tests.server.harness import CAREFUL, launched, poll, write_archive


def test_both_transports_are_asked_before_the_card_is_answered_and_not_after(tmp_path, work):
    write_archive(tmp_path / "store", "alpha", CAREFUL)
    with launched(tmp_path / "store", work, "--warm-up-s", "1") as server:
        server.await_ready()
        seen = json.loads(server.rest("alpha", "seen"))
        assert {kind for kind, starting in seen if starting} == {"REST", "gRPC"}
        assert [kind for kind, starting in seen if not starting] == ["card"]


def test_it_ends_where_nobody_answers(tmp_path):
    write_archive(tmp_path / "store", "alpha")
    nobody = Listeners("127.0.0.1", 1, 1, 1, 1, 1, 1)
    began = time.monotonic()
    warm_up = WarmUp(nobody, find_archives(tmp_path / "store").archives, 30.0)
    poll(warm_up.done)
    assert time.monotonic() - began < 25


def test_it_lasts_two_seconds_unless_told_otherwise():
    assert parse([]).warm_up_s == 2
    assert parse(["--warm-up-s", "0"]).warm_up_s == 0
