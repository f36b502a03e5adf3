"""The second host takes in other archives while it serves."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from convscope import Client, ModelNotFound

from server.children import is_alive
from tests.kserve.conftest import OBEDIENT, Host, serving, web
from tests.kserve.test_life import hold, send
from tests.reloading import MODEL, PICTURE, load, put, reload
from tests.server.harness import poll, processes, write_archive


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reload")


@pytest.fixture(scope="module")
def own(work: Path) -> Iterator[Host]:
    """A server of its own, of one committed archive and one that does as it is told."""
    put(work / "store", "1.0")
    write_archive(work / "store", "obedient", OBEDIENT)
    with serving(work / "store", work, "--device", "cpu") as host:
        yield host


def urls(host: Host) -> dict[str, str]:
    return {"rest": f"http://{host.http}", "grpc": f"grpc://{host.grpc}"}


def test_a_version_is_replaced_twice_under_load_and_no_request_is_lost(own: Host, work: Path) -> None:
    for before, after in (("1.0", "1.1"), ("1.1", "1.0")):
        with load(urls(own), (None, before)) as calls:
            poll(lambda calls=calls: all(got.versions for got in calls.values()))
            put(work / "store", after)
            answer = reload(work)
            assert (answer.returncode, answer.stderr) == (0, ""), answer
            poll(lambda calls=calls, before=before: all(calls[way, before].errors for way in urls(own)))
        for (_, named), got in calls.items():
            if named is None:
                assert not got.errors, got.errors[:3]
                assert list(dict.fromkeys(got.versions)) == [before, after]
            else:
                assert set(got.versions) == {before}
                assert {error.partition(":")[0] for error in got.errors} == {"ModelNotFound"}, got.errors[:3]
        for url in urls(own).values():
            with Client(url, retries=0) as client:
                assert client.model_card(MODEL).version == after
                with pytest.raises(ModelNotFound):
                    client.predict(PICTURE, model=MODEL, version=before)
        metrics = web.get(f"http://{own.http}/metrics").text
        assert f'convscope_workers{{model="edges",state="ready",version="{after}"}} 1.0' in metrics
        assert f'convscope_workers{{model="edges",state="ready",version="{before}"' not in metrics
    assert len([pid for pid in processes(str(work)) if "worker.py" in Path(f"/proc/{pid}/cmdline").read_text()]) == 2


def test_requests_in_flight_and_in_the_queue_of_the_old_version_are_answered(
    own: Host, work: Path, tmp_path: Path
) -> None:
    old = int(send(own, b"").text.split()[1])
    with ThreadPoolExecutor(4) as pool:
        held = [hold(own, pool, tmp_path / "gate"), pool.submit(send, own, b"", "obedient/1.0")]
        write_archive(work / "store", "obedient", OBEDIENT, version="2.0")
        reloading = pool.submit(reload, work)
        poll(lambda: "callers who name no version get 2.0" in own.log.read_text(), 60)
        assert send(own, b"").text.split()[2] == "2.0"
        assert send(own, b"", "obedient/1.0").status_code == 404
        assert not held[0].done()
        (tmp_path / "gate").touch()
        assert {one.result().text.split()[2] for one in held} == {"1.0"}
        assert reloading.result().returncode == 0
    poll(lambda: not is_alive(old))


def test_a_broken_archive_changes_nothing_and_the_reason_is_said_in_a_line(own: Host, work: Path) -> None:
    worker = send(own, b"").text.split()[1]
    for handler, why in (("import nothing_of_that_name\n", "No module named"), (OBEDIENT + "\n", "other contents")):
        version = "3.0" if "nothing" in handler else "2.0"
        write_archive(work / "store", "obedient", handler, version=version)
        answer = reload(work, "obedient")
        assert answer.returncode == 1
        [line] = answer.stderr.splitlines()
        assert "archive obedient.mar: " in line
        assert why in line
        assert send(own, b"").text.split()[1:] == [worker, "2.0"]
        assert 'convscope_archive_rejected{model="obedient"} 1.0' in web.get(f"http://{own.http}/metrics").text
    assert web.get(f"http://{own.http}/v2/health/ready").status_code == 200
