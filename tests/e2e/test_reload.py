"""A running TorchServe takes in other archives, and no request is lost."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from convscope import Client, ModelNotFound

from server.children import is_alive
from tests.reloading import MODEL, PICTURE, load, put, reload
from tests.server.harness import Launched, launched, poll
from tests.thorough import variants


class Service(NamedTuple):
    """A server of its own, its store, and where it is asked."""

    server: Launched
    store: Path
    work: Path
    urls: dict[str, str]

    def metrics(self) -> str:
        """Return what its exporter says."""
        return self.server.ask("GET", "/metrics", what="metrics")[1].decode()


pytestmark = pytest.mark.usefixtures("quick_starts")  # ONNX Runtime runs `edges`, which needs no torch.


@pytest.fixture(scope="module")
def service(quick_starts: None) -> Iterator[Service]:
    work = Path(tempfile.mkdtemp(prefix="rld-"))
    store = work / "store"
    put(store, "1.0")
    with launched(store, work, "--workers", "1", "--watch-s", "1", "--ready-port", "0") as server:
        server.await_ready()
        urls = {"rest": f"http://127.0.0.1:{server.port('REST')}", "grpc": f"grpc://127.0.0.1:{server.port('gRPC')}"}
        yield Service(server, store, work, urls)
    shutil.rmtree(work)


def test_a_version_is_replaced_twice_under_load_and_no_request_is_lost(service: Service) -> None:
    for before, after in (("1.0", "1.1"), ("1.1", "2.0")):
        with load(service.urls, (None, before)) as calls:
            poll(lambda calls=calls: all(got.versions for got in calls.values()))
            put(service.store, after)
            answer = reload(service.work)
            assert (answer.returncode, answer.stderr) == (0, ""), answer
            poll(lambda calls=calls, before=before: all(calls[way, before].errors for way in service.urls))
        for (transport, named), got in calls.items():
            if named is None:
                assert not got.errors, (transport, got.errors[:3])
                assert list(dict.fromkeys(got.versions)) == [before, after]
            else:  # Answered, until there is no such version.
                assert set(got.versions) == {before}
                assert {error.partition(":")[0] for error in got.errors} == {"ModelNotFound"}, got.errors[:3]
        for url in service.urls.values():
            with Client(url, retries=0) as client:
                assert client.model_card(MODEL).version == after
                assert client.models() == [(MODEL, after)]
                with pytest.raises(ModelNotFound):
                    client.predict(PICTURE, model=MODEL, version=before)
        assert len(poll(lambda: [pid for pid in service.server.workers() if is_alive(pid)])) == 1  # type: ignore[arg-type]
        assert f"{MODEL}/{before}: has finished its requests, and is removed" in answer.stdout
        assert not re.search(rf'version="{before}"', service.metrics().partition("convscope_workers{")[2])
    again = reload(service.work)
    assert (again.returncode, again.stdout) == (0, "reload: nothing to do: what the store holds is served\n")
    assert "Worker died" not in service.server.err
    assert "Backend worker" not in service.server.err


def test_counters_of_what_callers_named_no_version_for_do_not_move_to_the_new_version(service: Service) -> None:
    text = service.metrics()
    [version] = set(re.findall(r'convscope_torchserve_requests_total{model="edges",version="([\d.]+)"}', text))
    counted = float(re.findall(r"convscope_torchserve_requests_total{.*?} (\S+)", text)[0])
    with Client(service.urls["rest"], retries=0) as client:
        client.predict(PICTURE, model=MODEL)
    after = float(re.findall(r"convscope_torchserve_requests_total{.*?} (\S+)", service.metrics())[0])
    handled = sum(map(float, re.findall(rf'convscope_requests_total{{.*version="{version}".*?}} (\S+)', text)))
    assert after > counted
    assert counted < 2 * handled + 100  # Not those of all versions so far, but its own and cards.


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (lambda store: put(store, "3.0", cut=1000), r"archive edges\.mar: it is damaged"),
    "without weights": (
        lambda store: put(store, "3.0", {"weights.safetensors": None}),
        r"archive edges\.mar: .*weights",
    ),
    "without its imports": (
        lambda store: put(store, "3.0", {"convscope_entry.py": b"import nothing_of_that_name\n"}),
        r"nothing_of_that_name",
    ),
    "the same version": (
        lambda store: put(store, "2.0", {"more.txt": b"x"}),
        r"archive edges\.mar: version 2\.0 of edges is served already, with other contents",
    ),
}


# The two others are tried without callers in tests/server/test_reload.py.
TRIED = variants(["truncated", "without weights"], ["without its imports", "the same version"])


@pytest.mark.parametrize("kind", TRIED)
def test_a_broken_archive_changes_nothing_and_the_reason_is_said_in_a_line(kind: str, service: Service) -> None:
    break_it, why = BROKEN[kind]
    workers = service.server.workers()
    with load(service.urls, (None,)) as calls:
        poll(lambda: all(got.versions for got in calls.values()))
        break_it(service.store)
        answer = reload(service.work)
        seen = {way: len(got.versions) for (way, _), got in calls.items()}
        poll(lambda: all(len(got.versions) > seen[way] + 5 for (way, _), got in calls.items()))
    assert answer.returncode == 1
    [line] = answer.stderr.splitlines()
    assert re.search(why, line), line
    for got in calls.values():
        assert (set(got.versions), got.errors) == ({"2.0"}, [])
    assert poll(lambda: service.server.workers() == workers)
    poll(lambda: 'convscope_archive_rejected{model="edges"} 1.0' in service.metrics(), pause_s=0.2)


def test_the_good_archive_of_before_ends_the_rejection(service: Service) -> None:
    put(service.store, "2.0")
    answer = reload(service.work, MODEL)
    assert (answer.returncode, answer.stdout) == (0, "reload: nothing to do: what the store holds is served\n")
    poll(lambda: 'convscope_archive_rejected{model="edges"} 0.0' in service.metrics(), pause_s=0.2)


def test_a_model_that_is_not_there_is_a_wrong_command(service: Service) -> None:
    answer = reload(service.work, "cat")
    assert answer.returncode == 2
    assert "no model cat is served or in" in answer.stderr
