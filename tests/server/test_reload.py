"""Taking in what the store holds now: what is to be done, room for it, requests in flight, and the command."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from server import control, reload
from server.arguments import parse
from server.children import is_alive
from server.configuration import private_directory
from server.control import Control, Reloader, check_room
from server.failures import Failure
from server.host import Memory, read_free_memory, read_process_memory
from server.models import Archive, Found, find_archives, find_changes, look, read_archive
from server.reporting import Reporter
from tests.server.harness import OBEDIENT, ROOT, Launched, launched, poll, write_archive

BROKEN = "import nothing_of_that_name\n"


# ---------------------------------------------------------------- what is to be done


def changes(store: Path, served: list[Archive]) -> list[tuple[list[str], list[str], list[str]]]:
    """Return new, gone and served versions of each model that changes."""
    found, _ = find_changes(served, find_archives(store))
    return [
        tuple([archive.version for archive in archives] for archives in (one.new, one.gone, one.served))
        for one in found
    ]


def test_a_store_that_holds_what_is_served_changes_nothing(tmp_path):
    write_archive(tmp_path, "cifar")
    write_archive(tmp_path, "digits")
    assert changes(tmp_path, find_archives(tmp_path).archives) == []


def test_a_file_with_another_version_replaces_the_one_before_be_it_older(tmp_path):
    write_archive(tmp_path, "cifar", version="1.1")
    served = find_archives(tmp_path).archives
    write_archive(tmp_path, "cifar", version="1.0")
    assert changes(tmp_path, served) == [(["1.0"], ["1.1"], ["1.0"])]


def test_a_version_in_a_file_of_its_own_joins_the_others_and_the_newest_is_the_default(tmp_path):
    write_archive(tmp_path, "cifar", version="1.9")
    served = find_archives(tmp_path).archives
    write_archive(tmp_path, "cifar", version="1.10", file="other")
    assert changes(tmp_path, served) == [(["1.10"], [], ["1.10", "1.9"])]


def test_a_model_without_an_archive_stays(tmp_path):
    path = write_archive(tmp_path, "cifar")
    write_archive(tmp_path, "digits")
    served = find_archives(tmp_path).archives
    path.unlink()
    assert changes(tmp_path, served) == []


def test_a_version_whose_file_cannot_be_read_stays_while_another_joins(tmp_path):
    path = write_archive(tmp_path, "cifar", version="1.0")
    served = find_archives(tmp_path).archives
    path.write_bytes(b"not a zip")
    write_archive(tmp_path, "cifar", version="1.1", file="other")
    assert changes(tmp_path, served) == [(["1.1"], [], ["1.1", "1.0"])]


def test_a_version_whose_file_cannot_be_read_stays_where_models_are_named_too(tmp_path):
    write_archive(tmp_path, "cifar")
    served = find_archives(tmp_path, ["cifar"]).archives
    (tmp_path / "cifar.mar").write_bytes(b"not a zip")
    write_archive(tmp_path, "cifar", version="2.0", file="cifar-2")
    [change], _ = find_changes(served, find_archives(tmp_path, ["cifar"], least=0))
    assert [archive.version for archive in change.new] == ["2.0"]
    assert change.gone == []


def test_the_same_version_with_other_contents_is_a_conflict_and_with_the_same_ones_is_not(tmp_path):
    write_archive(tmp_path, "cifar")
    served = find_archives(tmp_path).archives
    shutil.move(tmp_path / "cifar.mar", tmp_path / "renamed.mar")
    assert find_changes(served, find_archives(tmp_path)) == ([], {})
    (tmp_path / "renamed.mar").unlink()
    write_archive(tmp_path, "cifar", OBEDIENT + "\n")
    found, conflicts = find_changes(served, find_archives(tmp_path))
    assert found == []
    assert "version 1.0 of cifar is served already, with other contents" in conflicts["cifar"]


# ---------------------------------------------------------------- room


def test_an_archive_without_room_in_memory_is_refused_with_what_it_needs_and_what_there_is(tmp_path, monkeypatch):
    archive = read_archive(write_archive(tmp_path, "cifar"))
    own = [os.getpid()]
    assert read_process_memory(own[0]) > 2**20
    check_room(archive, 1, own, own, tmp_path)
    monkeypatch.setattr(control, "read_memory", lambda: Memory(used=100 << 20, limit=(100 << 20) + (1 << 19)))
    with pytest.raises(
        Failure, match=r"archive cifar\.mar: its workers need about \d+ MiB of memory .* 0 MiB are free"
    ):
        check_room(archive, 1, own, own, tmp_path)
    with pytest.raises(Failure, match="need about"):  # Another model's worker says what any takes at least.
        check_room(archive, 1, own, [], tmp_path)


def test_free_memory_is_the_lesser_of_the_groups_and_the_machines(tmp_path):
    table = tmp_path / "meminfo"
    table.write_text("MemTotal:       8000 kB\nMemAvailable:   4000 kB\nHugePages_Total:       0\n")
    assert read_free_memory(Memory(), table) == 4000 * 1024
    assert read_free_memory(Memory(used=1024, limit=3072), table) == 2048
    assert read_free_memory(Memory(used=1024, limit=1 << 40), table) == 4000 * 1024
    assert read_free_memory(Memory(), tmp_path / "none") is None


# ---------------------------------------------------------------- the command


class Pretend:
    """A host that serves whatever it is told to."""

    why_not: str | None = None

    def __init__(self, archives: list[Archive]) -> None:
        self.rejected: dict[str, str] = {}
        self.stopping = threading.Event()
        self.archives = archives
        self.did: list[str] = []
        self.hold = threading.Event()
        self.hold.set()

    def served(self) -> list[Archive]:
        return self.archives

    def take_in(self, archive: Archive) -> None:
        assert self.hold.wait(10)
        self.did.append(f"take in {archive.full_name}")
        if archive.version == "bad":
            raise Failure("it does not answer")

    def serve(self, archives: list[Archive]) -> None:
        self.archives = list(archives)
        self.did.append(f"serve {', '.join(archive.full_name for archive in archives)}")

    def retire(self, archive: Archive) -> None:
        self.did.append(f"retire {archive.full_name}")

    def forget(self, found: Found) -> None:
        assert found.archives


@pytest.fixture
def store(tmp_path):
    for name in ("a", "b"):
        write_archive(tmp_path / "store", name)
    return tmp_path / "store"


@pytest.fixture
def host(store):
    return Pretend(find_archives(store).archives)


@pytest.fixture
def listening(work, store, host, tmp_path):
    """A server's socket, and a host behind it."""
    settings = parse(["--model-store", str(store), "--watch-store"])
    with private_directory(work, None) as directory, (tmp_path / "log").open("w") as log:
        opened = Control(
            Reloader(host, settings, Reporter(as_json=False, stream=log)), directory, settings, look(store)
        )
        yield opened
        opened.close()


@pytest.fixture
def unwatched(monkeypatch):
    monkeypatch.setattr(control, "LOOK_S", 3600.0)


def test_a_new_version_is_loaded_then_served_then_the_old_one_goes(unwatched, listening, work, store, host, capsys):
    write_archive(store, "b", version="2.0")
    assert reload.main(["--work-dir", str(work)]) == 0
    assert host.did == ["take in b/2.0", "serve a/1.0, b/2.0", "retire b/1.0"]
    assert capsys.readouterr().out.splitlines() == [
        "reload: b/2.0: loading",
        "reload: b/2.0: answers its card and is served",
        "reload: b: callers who name no version get 2.0",
        "reload: b/1.0: has finished its requests, and is removed",
    ]


def test_of_several_models_those_that_can_be_taken_in_are(unwatched, listening, work, store, host, capsys):
    write_archive(store, "a", version="bad")
    write_archive(store, "b", version="2.0")
    (store / "c.mar").write_bytes(b"not a zip")
    assert reload.main(["--work-dir", str(work)]) == 1
    assert host.did == ["take in a/bad", "take in b/2.0", "serve a/1.0, b/2.0", "retire b/1.0"]
    said = capsys.readouterr()
    assert "b/2.0" in said.out
    assert [line.split(" ")[1:3] for line in said.err.splitlines()] == [["archive", "c.mar:"], ["it", "does"]]
    assert sorted(host.rejected) == ["a", "c"]
    (store / "c.mar").unlink()
    write_archive(store, "a")
    assert reload.main(["--work-dir", str(work)]) == 0
    assert host.rejected == {}


def test_only_the_models_that_are_named_are_looked_at(unwatched, listening, work, store, host, capsys):
    write_archive(store, "a", version="bad")
    write_archive(store, "b", version="2.0")
    assert reload.main(["--work-dir", str(work), "b"]) == 0
    assert host.did == ["take in b/2.0", "serve a/1.0, b/2.0", "retire b/1.0"]
    assert reload.main(["--work-dir", str(work), "cat"]) == 2
    assert "no model cat is served or in" in capsys.readouterr().err


def test_the_newest_version_served_becomes_the_default_also_where_the_store_has_not_changed(
    unwatched, listening, work, store, host, capsys
):
    write_archive(store, "b", version="2.0", file="newer")
    host.archives = sorted(find_archives(store).archives, key=lambda archive: archive.full_name)  # It came last.
    assert reload.main(["--work-dir", str(work)]) == 0
    assert host.did == ["serve a/1.0, b/2.0, b/1.0"]
    assert capsys.readouterr().out == "reload: b: callers who name no version get 2.0\n"
    assert reload.main(["--work-dir", str(work)]) == 0
    assert len(host.did) == 1


def test_a_broken_version_of_a_model_that_is_named_is_said(unwatched, listening, work, store, host, capsys):
    for name in ("b-2.0", "c"):
        (store / f"{name}.mar").write_bytes(b"not a zip")
    assert reload.main(["--work-dir", str(work), "b"]) == 1
    assert "archive b-2.0.mar: it is damaged" in capsys.readouterr().err
    assert list(host.rejected) == ["b-2.0"]


def test_a_server_that_hangs_up_is_said(listening, work, capsys):
    names = [f"model-{number}" for number in range(control.MOST_BYTES // 8)]  # More than it reads.
    assert reload.main(["--work-dir", str(work), *names]) == 1
    assert capsys.readouterr().err == "reload: the server ended before it was done\n"


def test_one_reload_at_a_time(unwatched, listening, work, store, host, capsys):
    write_archive(store, "b", version="2.0")
    host.hold.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(reload.main, ["--work-dir", str(work)])
        poll(lambda: "loading" in capsys.readouterr().out)
        assert reload.main(["--work-dir", str(work)]) == 1
        assert "a reload is under way" in capsys.readouterr().err
        host.hold.set()
        assert first.result() == 0


def test_a_host_that_cannot_says_why(unwatched, listening, work, store, host, capsys):
    host.why_not = "it is carved in stone"
    write_archive(store, "b", version="2.0")
    assert reload.main(["--work-dir", str(work)]) == 1
    assert capsys.readouterr().err == "reload: it is carved in stone\n"


def test_a_watched_store_is_taken_in_once_it_has_settled(monkeypatch, request, work, store, host):
    monkeypatch.setattr(control, "LOOK_S", 0.05)
    request.getfixturevalue("listening")
    write_archive(store, "b", version="2.0")
    poll(lambda: "retire b/1.0" in host.did)
    assert host.did.count("take in b/2.0") == 1


def test_a_watched_store_that_changes_during_a_reload_is_looked_at_after_it(monkeypatch, request, work, store, host):
    monkeypatch.setattr(control, "LOOK_S", 0.05)
    request.getfixturevalue("listening")
    host.hold.clear()
    write_archive(store, "b", version="2.0")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(reload.main, ["--work-dir", str(work)])
        time.sleep(0.5)  # One of the two reloads has seen the store, and is at b.
        write_archive(store, "a", version="2.0")
        time.sleep(0.5)  # Several looks.
        host.hold.set()
        first.result()
        poll(lambda: "retire a/1.0" in host.did)


def test_a_signature_that_comes_after_its_archive_is_a_change(store):
    before = look(store)
    (store / "a.mar.sig").write_text("one")
    assert look(store) != before


def test_without_a_server_or_with_several_it_says_so(unwatched, work, store, host, tmp_path, capsys):
    (work / "convscope-left").mkdir()
    (work / "convscope-left/control.sock").touch()
    assert reload.main(["--work-dir", str(work)]) == 2
    assert f"{work}: no server of yours runs there" in capsys.readouterr().err
    settings = parse(["--model-store", str(store)])
    log = (tmp_path / "log").open("w")
    with log, private_directory(work, None) as one, private_directory(work, None) as other:
        reporter = Reporter(as_json=False, stream=log)
        opened = [
            Control(Reloader(host, settings, reporter), directory, settings, look(store)) for directory in (one, other)
        ]
        assert reload.main(["--work-dir", str(work)]) == 2
        assert str(one.path) in capsys.readouterr().err
        assert reload.main(["--work-dir", str(one.path)]) == 0
        for each in opened:
            each.close()


# ---------------------------------------------------------------- TorchServe


def run(work: Path, *names: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server.reload", "--work-dir", str(work), *names]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def is_unknown(server: Launched, model: str) -> bool:
    """Tell whether a model is not found; one whose worker is busy does not answer yet."""
    try:
        return server.ask("GET", f"/predictions/{model}", timeout_s=2)[0] == 404
    except TimeoutError:
        return False


def test_requests_in_flight_and_in_the_queue_of_the_old_version_are_answered(work):
    store = work / "store"
    write_archive(store, "alpha", version="1.0", config="minWorkers: 1\nmaxWorkers: 1\n")
    with launched(store, work, workers=None) as server, ThreadPoolExecutor(8) as pool:
        server.await_ready()
        old = int(server.rest("alpha", "pid"))
        folder = Path(f"/proc/{old}/cwd").readlink()
        held = [pool.submit(server.rest, "alpha/1.0", f"wait:{work / 'gate'}")]
        poll((work / "gate.begun").exists)
        held += [pool.submit(server.rest, "alpha", "pid"), pool.submit(server.grpc, "alpha", "pid")]
        write_archive(store, "alpha", version="2.0", config="minWorkers: 2\nmaxWorkers: 2\n")
        write_archive(store, "beta", BROKEN)
        reloading = pool.submit(run, work)
        # The old one still works at what it had, and can be asked for nothing else.
        poll(lambda: "callers who name no version get 2.0" in server.err, 60)
        assert server.rest("alpha") == b"alpha 2.0"
        poll(lambda: is_unknown(server, "alpha/1.0"), 60)
        assert not any(one.done() for one in (*held, reloading))
        (work / "gate").touch()
        assert [one.result() for one in held] == [b"waited", str(old).encode(), str(old).encode()]
        answer = reloading.result()
        assert answer.returncode == 1
        assert "archive beta.mar: needs the Python package nothing_of_that_name" in answer.stderr
        assert "alpha/1.0: has finished its requests, and is removed" in answer.stdout
        poll(lambda: not is_alive(old))
        assert not folder.exists()
        assert {server.rest("alpha/2.0", "pid") for _ in range(20)} != {str(old).encode()}
        # Besides, TorchServe may just have started beta's once more: it ends by itself.
        poll(lambda: len(server.workers()) == 2)
        assert server.ask("GET", "/predictions/beta")[0] == 404

        # Back to the version of before, whose name TorchServe has had already.
        write_archive(store, "alpha", version="1.0", config="minWorkers: 1\nmaxWorkers: 1\n")
        (store / "beta.mar").unlink()
        assert run(work).returncode == 0
        assert server.rest("alpha") == b"alpha 1.0"
        assert server.ask("GET", "/predictions/alpha/2.0")[0] == 404
        poll(lambda: len(server.workers()) == 1)
        assert "Backend worker" not in server.err
        assert "Worker died" not in server.err
        server.signal(15)
        assert server.end() == 0


def names(message: str, model: str = "") -> list[str]:
    """Return the models that "Model not found" names, of some model or all."""
    return [name for name in re.search(r"\(models: ([^)]*)\)", message)[1].split(", ") if name.startswith(model)]


def listed(server: Launched, model: str = "") -> list[str]:
    """Return the models that are named, the same for a model and for a version over REST and gRPC."""
    messages = [json.loads(server.ask("GET", f"/predictions/{name}")[1])["message"] for name in ("-", "alpha/9")]
    for name, version in (("-", ""), ("alpha", "9")):
        with pytest.raises(grpc.RpcError) as raised:
            server.grpc(name, version=version)
        messages.append(raised.value.details())
    [found] = {tuple(names(message, model)) for message in messages}
    return list(found)


LEFT = ("removed", "replaced", "newer", "moved")


@pytest.fixture(scope="module")
def rejecting():
    """A server that has rejected archives: the newer version of `alpha`, the newest of `late`, and some that leave.

    TorchServe goes on trying to load what died without a word: `late` 1.10 until a file is there.
    """
    work = Path(tempfile.mkdtemp(prefix="srv-"))
    store, sudden_death = work / "store", "import os; os._exit(3)\n"
    until_mended = f"import os\nif not os.path.exists({str(work / 'mended')!r}):\n    os._exit(3)\n"
    write_archive(store, "alpha", version="1.0")
    write_archive(store, "alpha", BROKEN, version="2.0", file="other")
    for version, source in (("1.0", OBEDIENT), ("1.10", until_mended + OBEDIENT), ("1.9", OBEDIENT)):
        write_archive(store, "late", source, version=version, file=f"late-{version}")
    for name in LEFT:
        write_archive(store, name, sudden_death)
    with launched(store, work, "--watch-s", "1") as server:
        yield server.await_ready()
    shutil.rmtree(work)


def test_what_torchserve_tries_again_is_served_once_it_answers_and_not_found_once_it_has_left_the_store(rejecting):
    def over_rest() -> list[str]:
        return names(json.loads(rejecting.ask("GET", "/predictions/-")[1])["message"], "late")

    assert rejecting.rest("late") == b"late 1.9"
    assert listed(rejecting, "late") == ["late/1.9", "late/1.0"]
    (rejecting.work / "mended").touch()
    poll(lambda: rejecting.rest("late") == b"late 1.10", 60, 0.1)
    poll(lambda: over_rest() == ["late/1.10", "late/1.9", "late/1.0"], pause_s=0.1)
    assert listed(rejecting, "late") == over_rest()
    assert "Reload: late: callers who name no version get 1.10" in rejecting.err
    answer = run(rejecting.work, "late")
    assert (answer.returncode, answer.stdout) == (0, "reload: nothing to do: what the store holds is served\n")
    assert rejecting.rest("late") == b"late 1.10"
    assert rejecting.rest("late/1.9") == b"late 1.9"

    store = rejecting.work / "store"
    assert not {f"{name}/1.0" for name in LEFT} & set(listed(rejecting))
    (store / "removed.mar").unlink()
    write_archive(store, "gamma", file="replaced")
    write_archive(store, "newer", BROKEN, version="2.0")
    (store / "moved.mar").unlink()
    write_archive(store, "moved", file="elsewhere")
    assert run(rejecting.work).returncode == 1  # For newer/2.0.
    assert {"gamma/1.0", "moved/1.0"} <= set(listed(rejecting))
    assert rejecting.rest("moved/1.0") == b"moved 1.0"
    for name in ("removed", "replaced", "newer"):
        assert rejecting.ask("GET", f"/predictions/{name}/1.0")[0] == 404
        assert f"{name}/1.0" not in listed(rejecting)


def test_no_program_of_the_machine_can_load_or_unload_models_over_grpc(rejecting):
    """The twin listens on loopback, where any user can connect."""
    text = next(rejecting.work.glob("convscope-*/config.properties")).read_text()
    port = next(line.partition("=")[2] for line in text.splitlines() if line.startswith("grpc_management_port"))
    assert "enable_model_api=true" in text
    for method, message in (("RegisterModel", b"\x52\x01x"), ("UnregisterModel", b"\x0a\x05alpha")):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary(f"/org.pytorch.serve.grpc.management.ManagementAPIsService/{method}")
            with pytest.raises(grpc.RpcError) as raised:
                call(message, timeout=10)
        assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert rejecting.rest("alpha") == b"alpha 1.0"


def test_where_the_list_of_models_cannot_be_read_the_message_is_torchserves_own(rejecting):
    [file] = rejecting.work.glob("convscope-*/models.txt")

    def obstruct() -> bool:
        file.unlink(missing_ok=True)
        with contextlib.suppress(FileExistsError):  # The watch has written it again meanwhile.
            file.mkdir()
        return file.is_dir()

    poll(obstruct)
    own = {"-": "Model not found: -", "alpha/9": "Model version: 9 does not exist for model: alpha"}
    for name, message in own.items():
        status, body = rejecting.ask("GET", f"/predictions/{name}")
        assert (status, json.loads(body)["message"]) == (404, message)
        with pytest.raises(grpc.RpcError) as raised:
            rejecting.grpc(*name.split("/")[:1], version=name.partition("/")[2])
        assert raised.value.details().startswith(message)
    poll(lambda: "models.txt cannot be written (Is a directory)" in rejecting.err)
    file.rmdir()
    poll(file.is_file)
    assert "alpha/1.0" in listed(rejecting)
    file.write_bytes(b"\xff")
    assert rejecting.ask("GET", "/predictions/-")[0] == 404
    poll(lambda: "models.txt cannot be read, or held something else" in rejecting.err)
    poll(lambda: file.read_bytes() != b"\xff")  # The message may be about the folder that stood there.
    assert "alpha/1.0" in listed(rejecting)
    assert rejecting.err.count("models.txt cannot be") == 2


def test_a_version_that_was_rejected_at_the_start_is_taken_in_once_it_is_mended(rejecting):
    work = rejecting.work
    assert rejecting.rest("alpha") == b"alpha 1.0"  # Not the newest, which TorchServe got first.
    assert rejecting.ask("GET", "/predictions/alpha/2.0")[0] == 404
    assert listed(rejecting, "alpha") == ["alpha/1.0"]
    answer = run(work, "alpha")
    assert answer.returncode == 1
    assert "archive other.mar: needs the Python package nothing_of_that_name" in answer.stderr
    assert rejecting.rest("alpha") == b"alpha 1.0"
    write_archive(work / "store", "alpha", version="2.0", file="other")
    assert run(work, "alpha").returncode == 0
    assert rejecting.rest("alpha") == b"alpha 2.0"
    assert rejecting.rest("alpha/1.0") == b"alpha 1.0"
    assert listed(rejecting, "alpha") == ["alpha/2.0", "alpha/1.0"]
    write_archive(work / "store", "beta", version="1.0", file="other")
    assert run(work, "alpha", "beta").returncode == 0
    assert listed(rejecting, "alpha") == ["alpha/1.0"]
    assert listed(rejecting, "beta") == ["beta/1.0"]
