"""A client works in a forked child, and in its parent at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from tests.client.stand_in import StandIn, fetch_maps

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")

BEGIN = """
import os, signal, sys, threading
from convscope import Client

def ask(picture, model="cifar"):
    print(picture.decode(), client.predict(picture, model=model).top[0].logit, flush=True)

def fork(work):
    child = os.fork()
    if not child:
        signal.alarm(30)  # A child that hangs ends.
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""


def run(url: str, program: str, ready: Callable[[], bool] = lambda: True, **settings: object) -> dict[str, float]:
    """Run a program that has a client; return the best logit of each picture that it tells.

    Its standard input has a line when `ready` says so.
    """
    begin = f"{BEGIN}\nclient = Client({url!r}, retries=0, deadline_s=5, **{settings!r})\n"
    command = [sys.executable, "-c", begin + program]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as running:
        while running.poll() is None and not ready():
            time.sleep(0.01)
        printed, _ = running.communicate("\n", timeout=120)
    return {picture: float(logit) for picture, logit in map(str.split, printed.splitlines())}


def expected(*pictures: str) -> dict[str, float]:
    return {picture: float(fetch_maps(picture.encode(), (10,)).max()) for picture in pictures}


def test_a_childs_requests_go_over_a_connection_of_its_own(url: str, stand_in: StandIn):
    program = "ask(b'before'); fork(lambda: ask(b'child')); ask(b'after'); os._exit(0)"
    assert run(url, program) == expected("before", "child", "after")
    assert len(stand_in.connections) == 2


def test_a_child_sends_a_request_while_its_parents_is_in_progress(stand_in: StandIn):  # Not with gRPC, which may abort.
    program = (
        "ask(b'before')\n"
        "for _ in range(2): threading.Thread(target=client.predict, args=[b'held'], kwargs={'model': 'slow'}).start()\n"
        "sys.stdin.readline()\n"
        "fork(lambda: ask(b'child'))\n"
        "os._exit(0)\n"
    )
    stand_in.release.clear()
    try:
        assert run(stand_in.rest_url, program, lambda: len(stand_in.requests) == 3) == expected("before", "child")
    finally:
        stand_in.release.set()


def test_a_childs_stream_has_threads_of_its_own(url: str):
    program = (
        "def many(*pictures):\n"
        "    for picture, seen in zip(pictures, client.predict_many(pictures, model='cifar')):\n"
        "        print(picture.decode(), seen.top[0].logit, flush=True)\n"
        "many(b'one', b'two', b'three')\n"
        "fork(lambda: many(b'four', b'five', b'six'))\n"
        "os._exit(0)\n"
    )
    assert run(url, program) == expected("one", "two", "three", "four", "five", "six")


def test_a_lock_that_another_thread_of_the_parent_held_stops_no_child(url: str):
    program = "client._budget._lock.acquire()\nfork(lambda: ask(b'child'))\nos._exit(0)\n"
    assert run(url, program) == expected("child")
