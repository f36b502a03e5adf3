"""The warm-up: when it ends; what it sends is in test_watched.py."""

import time

from server.arguments import parse
from server.configuration import Listeners
from server.models import find_archives
from server.warming import WarmUp
from tests.server.harness import poll, write_archive


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
