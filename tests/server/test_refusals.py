"""Messages when the server cannot start: plain, without a stack trace, at once, and nothing is left behind."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.server.harness import ROOT, launched, poll, write_archive

QUICK_S = 60  # Far below the start-up timeout of 300 s, far above a start on a busy machine.


def refused(store, work, *options, environment=None):
    """Start a server that must fail; return its status and what it said."""
    started = time.monotonic()
    with launched(store, work, *options, environment=environment) as server:
        status = server.end(QUICK_S)
        assert time.monotonic() - started < QUICK_S
        assert "Traceback" not in server.err
        assert "\tat " not in server.err
        assert server.out == ""
        poll(lambda: not server.descendants(), 20)
        assert not list(work.glob("convscope-[!l]*"))
        return status, server.err


HANDLER = """
{top}
class Handler:
    def initialize(self, context):
        {body}

    def handle(self, rows, context):
        return [b"" for _ in rows]
"""


def handler(body: str, top: str = "") -> str:
    return HANDLER.format(body=body, top=top)


CARD_FAILS = """
class Handler:
    def initialize(self, context):
        pass

    def handle(self, rows, context):
        context.set_response_status(500, "no", 0)
        return [{"error": {"code": "internal", "message": "the forward pass failed"}} for _ in rows]
"""


ILL = {
    "missing-package": (
        handler("pass", "import foobarbaz"),
        "needs the Python package foobarbaz, which is not installed",
    ),
    "initialize-raises": (
        handler("raise FileNotFoundError('weights.safetensors is missing')"),
        "its worker failed: FileNotFoundError: weights.safetensors is missing",
    ),
    "runtime-error": (handler("raise RuntimeError('wrong weights')"), "its worker failed: RuntimeError: wrong weights"),
    "syntax-error": (handler("pass", "def ("), "its handler cannot be imported: SyntaxError: "),
    "sudden-death": (handler("import os; os._exit(3)"), "its worker ended without a message"),
    "card-fails": (CARD_FAILS, "its model card fails with internal: the forward pass failed"),
}


def test_archives_that_cannot_be_served_are_told_at_once_each_in_its_own_words(tmp_path, work):
    for name, (source, _) in ILL.items():
        write_archive(tmp_path / "store", name, source)
    write_archive(tmp_path / "store", "no-handler", handler_file="absent.py")
    status, said = refused(tmp_path / "store", work)
    assert status == 1
    for name, (_, words) in ILL.items():
        assert f"archive {name}.mar: {words}" in said
    words = "its manifest names the handler absent.py, which is not in the archive"
    assert f"archive no-handler.mar: {words}" in said
    (logs,) = work.glob("convscope-logs-*")
    assert f"the full logs are in {logs}\n" in said
    assert (logs / "models.log").exists()


def test_beside_a_good_archive_those_that_cannot_be_served_are_rejected_and_the_good_one_is_served(tmp_path, work):
    """TorchServe goes on trying those whose worker died without a word or is late: the machine may be at fault.

    After a signal readiness fails first, while requests go on; a second signal kills at once.
    """
    tried_again = {"sudden-death": handler("import os; os._exit(3)"), "late": handler("import time; time.sleep(600)")}
    given_up = {"initialize-raises": handler("raise RuntimeError('wrong weights')"), "card-fails": CARD_FAILS}
    write_archive(tmp_path / "store", "good")
    for name, source in (tried_again | given_up).items():
        write_archive(tmp_path / "store", name, source)
    damaged = write_archive(tmp_path / "store", "damaged")
    damaged.write_bytes(damaged.read_bytes()[:-30])
    # Time enough for the good one to answer on a busy machine.
    options = ("--ready-port", "0", "--startup-timeout-s", "15", "--watch-s", "1", "--unready-s", "60")
    with launched(tmp_path / "store", work, *options) as server:
        server.await_ready()
        assert server.rest("good") == b"good 1.0"
        assert server.err.count("server: Archive rejected: ") == 5
        for name in (*tried_again, *given_up, "damaged"):
            assert f"archive {name}.mar: " in server.err
        assert "good.mar" not in server.err
        assert [server.ask("GET", f"/predictions/{name}")[0] for name in given_up] == [404, 404]
        assert listed(server) == ["good/1.0"]
        assert server.ask("GET", "/predictions/damaged")[0] == 404

        def metrics() -> str:
            return server.ask("GET", "/metrics", what="metrics")[1].decode()

        lines = poll(lambda: (text := metrics()) and "convscope_workers{" in text and text.splitlines())
        assert 'convscope_archive_rejected{model="good"} 0.0' in lines
        assert "convscope_ready 1.0" in lines
        assert 'convscope_workers{model="good",state="ready",version="1.0"} 1.0' in lines
        for name in (*tried_again, *given_up, "damaged"):
            assert f'convscope_archive_rejected{{model="{name}"}} 1.0' in lines
            assert (f'convscope_workers_wanted{{model="{name}",version="1.0"}} 1.0' in lines) is (name in tried_again)

        server.signal(signal.SIGTERM)
        [drain_file] = poll(lambda: list(work.glob("convscope-*/draining")))
        assert server.rest("good", "environment:CONVSCOPE_DRAIN_FILE").decode() == f"'{drain_file}'"
        started = tmp_path / "started"

        def ask() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                server.rest("good", f"sleep:{started},60")

        thread = threading.Thread(target=ask)
        thread.start()
        poll(started.exists)
        server.signal(signal.SIGINT)
        assert server.end(10) == 1
        thread.join(10)
        poll(lambda: not server.descendants(), 20)
        assert not list(work.iterdir())


def listed(server):
    """Return the models that "Model not found" names."""
    message = json.loads(server.ask("GET", "/predictions/-")[1])["message"]
    return re.search(r"\(models: ([^)]*)\)", message)[1].split(", ")


def test_a_model_that_never_answers_is_told_when_the_time_is_up_in_json_with_the_logs_and_no_path_that_is_gone(
    tmp_path, work
):
    write_archive(tmp_path / "store", "slow", handler("print('loading', flush=True); import time; time.sleep(300)"))
    options = ("--startup-timeout-s", "6", "--log-format", "json")
    status, said = refused(tmp_path / "store", work, *options)
    last = json.loads(said.splitlines()[-1])
    assert (status, last["level"]) == (1, "error")
    assert "not ready after 6 s (--startup-timeout-s):\narchive slow.mar: no answer yet" in last["message"]
    assert "the full logs" not in last["message"]
    assert any("loading" in line for line in last["logs"]["models.log"])
    assert not list(work.iterdir())


@pytest.mark.parametrize("option", ["--rest-port", "--grpc-port", "--metrics-port"])
def test_a_port_in_use_names_the_option_before_java_starts(option, tmp_path, work):
    write_archive(tmp_path / "store", "good")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        status, said = refused(tmp_path / "store", work, option, str(port))
    assert status == 1
    assert said == (
        f"server: port {port} on 127.0.0.1 is in use by another program: stop that, or choose another with {option}\n"
    )
    assert not list(work.iterdir())


def test_a_missing_model_store_is_a_wrong_command_line(tmp_path, work):
    status, said = refused(tmp_path / "nowhere", work)
    assert status == 2
    assert "there is no model store" in said


def test_a_damaged_archive_is_told(tmp_path, work):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "broken.mar").write_bytes(b"PK")
    status, said = refused(tmp_path / "store", work)
    assert (status, said.count("\n")) == (1, 1)
    assert "archive broken.mar: it is damaged" in said


def test_an_archive_damaged_inside_is_told(tmp_path, work):
    path = write_archive(tmp_path / "store", "bad")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"class Handler", b"class Handlxr"))
    status, said = refused(tmp_path / "store", work)
    assert (status, said.count("\n")) == (1, 1)
    assert "archive bad.mar: it is damaged or no archive at all (Bad CRC-32 for file 'entry.py')" in said


def test_java_missing_or_too_old_is_told(tmp_path, work):
    write_archive(tmp_path / "store", "good")
    status, said = refused(tmp_path / "store", work, environment={"JAVA_HOME": str(tmp_path)})
    assert (status, "there is no bin/java in it" in said) == (1, True)
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
    java.chmod(0o755)
    status, said = refused(tmp_path / "store", work, environment={"JAVA_HOME": str(tmp_path)})
    assert (status, "Java 11.0.2" in said, "is too old for TorchServe" in said) == (1, True, True)


def test_a_java_that_ends_at_the_start_is_told_with_its_last_words(tmp_path, work):
    write_archive(tmp_path / "store", "good")
    environment = {"JDK_JAVA_OPTIONS": "-XX:+UseSerialGC"}
    status, said = refused(tmp_path / "store", work, environment=environment)
    assert status == 1
    assert "TorchServe ended by itself (exit status 1): " in said
    assert "collector" in said


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(tmp_path, work):
    write_archive(tmp_path / "store", "good")
    status, said = refused(tmp_path / "store", work, "--device", "cuda")
    assert status == 1
    assert "--device cuda, but there is no GPU to serve on (nvidia-smi finds none)" in said


@pytest.mark.parametrize(("store", "status"), [("nowhere", 2), ("damaged", 1)])
@pytest.mark.parametrize("streams", [">/dev/full 2>&1", ">&- 2>&-"])
def test_what_cannot_be_told_leaves_the_exit_status_as_it_is(streams, store, status, tmp_path):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/bad.mar").write_text("no archive")
    command = [sys.executable, "-m", "server", "--model-store", str(tmp_path / store)]
    mute = ["sh", "-c", f'exec "$@" {streams}', "sh", *command]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}  # As a user has it.
    assert subprocess.run(mute, cwd=ROOT, env=environment, timeout=QUICK_S, check=False).returncode == status
