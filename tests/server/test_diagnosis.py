"""From TorchServe's logs to plain words."""

from dataclasses import replace
from pathlib import Path

import pytest

from server.configuration import PrivateDirectory
from server.diagnosis import Diagnosis, News, explain_java, explain_worker, find_cause
from server.logs import Follower
from server.models import Archive

CIFAR = Archive(Path("cifar.mar"), "cifar", "1.0", None, frozenset({"entry", "handlers"}))


def traceback(*causes: str) -> list[str]:
    lines = ["Torch worker started.", "Backend worker process died."]
    for cause in causes:
        lines += [
            "Traceback (most recent call last):",
            '  File "x.py", line 1, in load',
            "    import x",
            *cause.split("\n"),
        ]
        lines += ["", "During handling of the above exception, another exception occurred:", ""]
    return lines


@pytest.mark.parametrize(
    ("causes", "words"),
    [
        (
            [
                "ModuleNotFoundError: No module named 'foo'",
                "ModuleNotFoundError: No module named 'ts.torch_handler.entry'",
            ],
            "archive cifar.mar: needs the Python package foo, which is not installed",
        ),
        (["ModuleNotFoundError: No module named 'PIL'"], "needs the Python package pillow (imported as PIL), which"),
        (["ModuleNotFoundError: No module named 'torch.fx.new'"], "needs the Python package torch, which"),
        (
            ["ModuleNotFoundError: No module named 'handlers.outputs.maps'"],
            "archive cifar.mar: its module handlers.outputs.maps is missing from the archive",
        ),
        (
            ["ImportError: cannot import name 'a' from 'b'"],
            "its handler cannot be imported: ImportError: cannot import",
        ),
        (["SyntaxError: invalid syntax"], "its handler cannot be imported: SyntaxError: invalid syntax"),
        (["FileNotFoundError: weights.pt is missing"], "its worker failed: FileNotFoundError: weights.pt is missing"),
        (
            [
                "RuntimeError: Error(s) in loading state_dict for Cifar:\n\tMissing key: conv1",
                "RuntimeError: 500 - Unknown",
            ],
            "its worker failed: RuntimeError: Error(s) in loading state_dict for Cifar: Missing key: conv1",
        ),
        (["KeyboardInterrupt"], "its worker failed: KeyboardInterrupt"),
        ([], "archive cifar.mar: its worker ended without a message"),
    ],
)
def test_a_workers_last_words_become_one_sentence(causes, words):
    assert words in explain_worker(CIFAR, traceback(*causes))


def test_a_worker_that_torchserve_ended_did_not_answer_whatever_it_printed_before(tmp_path):
    cifar = replace(CIFAR, response_timeout_s=7, startup_timeout_s=9)
    with PrivateDirectory(tmp_path, None) as directory:
        diagnosis = Diagnosis(directory, [cifar])
        stdout = "2026-01-01T00:00:00,000 [INFO ] W-9000-cifar_1.0-stdout MODEL_LOG -"
        directory.models_log.write_text("".join(f"{stdout} {said}\n" for said in traceback("ValueError: long ago")))
        thread = "2026-01-01T00:00:00,000 [ERROR] W-9000-cifar_1.0 WorkerThread -"
        directory.torchserve_log.write_text(
            f"{thread} Backend worker error\n"
            "org.pytorch.serve.wlm.WorkerInitializationException: Backend worker did not respond in given time\n"
            "\tat org.pytorch.serve.wlm.WorkerThread.run(WorkerThread.java:247)\n"
            f"{thread} Retry worker: 9000 in 1 seconds.\n"
        )
        failures = []
        while not failures:
            failures = diagnosis.read().failures
        with directory.torchserve_log.open("a") as log:
            log.write(f"{thread} Retry worker: 9000 in 1 seconds.\n")
        directory.models_log.write_text("".join(f"{stdout} {said}\n" for said in traceback("ValueError: new")))
        while len(failures) < 2:
            failures += diagnosis.read().failures
    assert failures == [
        "archive cifar.mar: its worker did not answer within 7 s (responseTimeout), "
        "or load within 9 s (startupTimeout), and was ended",
        "archive cifar.mar: its worker failed: ValueError: new",
    ]


THREAD = "2026-01-01T00:00:00,000 [ERROR] W-9000-cifar_1.0 WorkerThread -"


def read_death(tmp_path, *lines: str, said: tuple[str, ...] = (), cgroups: Path = Path("/nonexistent")) -> News:
    """Return the news of one worker's death, from TorchServe's log and the worker's own."""
    with PrivateDirectory(tmp_path, None) as directory:
        diagnosis = Diagnosis(directory, [CIFAR], cgroups)
        if cgroups.exists():
            kill_for_memory(cgroups)
        stdout = "2026-01-01T00:00:00,000 [INFO ] W-9000-cifar_1.0-stdout MODEL_LOG -"
        directory.models_log.write_text("".join(f"{stdout} {line}\n" for line in said))
        directory.torchserve_log.write_text("".join(f"{line}\n" for line in lines))
        while not (news := diagnosis.read()).failures:
            pass
    return news


def kill_for_memory(cgroups: Path) -> None:
    """Have the kernel count one more kill in this process's control group, below a folder."""
    own = Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()
    events = cgroups / own / "memory.events"
    events.parent.mkdir(parents=True, exist_ok=True)
    kills = int(events.read_text().split()[-1]) if events.exists() else 2
    events.write_text(f"low 0\noom 1\noom_kill {kills + 1}\n")


def test_an_exception_that_ended_torchserves_own_thread_is_quoted_whatever_the_worker_printed_before(tmp_path):
    thrown = 'java.lang.NullPointerException: Cannot invoke "String.equals(Object)"'
    lines = (f"{THREAD} Backend worker thread exception.", thrown, "\tat x.y(Z.java:1)")
    said = tuple(traceback("ValueError: long ago"))
    expected = f"archive cifar.mar: TorchServe's own thread for its worker ended: {thrown}"
    news = read_death(tmp_path, *lines, f"{THREAD} Retry worker: 9000 in 1 seconds.", said=said)
    assert (news.failures, news.retried) == ([expected], {expected})
    news = read_death(tmp_path, *lines, said=said)
    assert (news.failures, news.retried) == ([expected], set())


def test_a_traceback_of_a_request_is_not_taken_for_the_cause_of_a_later_death(tmp_path):
    said = ("Torch worker started.", "Invoking custom service failed.", *traceback("ValueError: a request")[2:])
    news = read_death(tmp_path, f"{THREAD} Retry worker: 9000 in 1 seconds.", said=said)
    assert news.failures == ["archive cifar.mar: its worker ended without a message"]


def test_want_of_memory_is_told_where_the_kernel_has_counted_it(tmp_path):
    kill_for_memory(tmp_path / "cgroups")
    lines = [f"{THREAD} Retry worker: 9000 in 1 seconds."]
    news = read_death(tmp_path, *lines, cgroups=tmp_path / "cgroups")
    told = (
        "its worker ended without a message; the kernel has killed 1 of this container's processes for want of memory"
    )
    assert news.failures == [f"archive cifar.mar: {told}"]


def test_warnings_without_a_message_are_told_by_their_exception_and_callers_that_hang_up_are_not(tmp_path):
    head = "2026-01-01T00:00:00,000 [ERROR] epollEventLoopGroup-3-1 HttpRequestHandler - "
    with PrivateDirectory(tmp_path, None) as directory:
        diagnosis = Diagnosis(directory, [CIFAR])
        directory.torchserve_log.write_text(
            f"{head}\njava.lang.OutOfMemoryError: Cannot reserve 5 bytes\n\tat x.y\n"
            f"{head}\nio.netty.channel.unix.Errors$NativeIoException: read(..) failed: Connection reset by peer\n"
        )
        assert diagnosis.read().warnings == ["java.lang.OutOfMemoryError: Cannot reserve 5 bytes"]


def test_the_newest_of_several_deaths_is_told():
    assert find_cause([*traceback("ValueError: first"), *traceback("ValueError: second")]) == "ValueError: second"


def test_what_a_worker_prints_outside_a_traceback_is_no_cause():
    assert find_cause(["ValueError: only mentioned", "INFO: fine"]) is None


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            ["Invalid maximum heap size: -Xmx9z", "Error: Could not create the Java Virtual Machine."],
            "Error: Could not",
        ),
        (["java.net.BindException: Address already in use", "\tat x.y"], "a port was taken while TorchServe started"),
        (
            ["hello", "java.io.IOException: Failed to bind to address: http://192.0.2.1:80"],
            "java.io.IOException: Failed",
        ),
        (["Invalid configuration: Invalid port"], "Invalid configuration: Invalid port"),
        (["hello", "\tat a.b.C"], "hello"),
        ([], "it says nothing"),
    ],
)
def test_javas_last_words_become_one_sentence(lines, words):
    assert words in explain_java(lines)


def test_a_log_is_followed_by_whole_lines_and_stack_traces_stay_with_their_record(tmp_path):
    path = tmp_path / "log"
    path.write_text("2026-01-01T00:00:00,000 [WARN ] main A - from an earlier run\n")
    follower = Follower(path)
    with path.open("a") as log:
        log.write(
            "2026-01-01T00:00:00,000 [ERROR] W-9000-cifar_1.0 WorkerThread - Backend worker error\n"
            "java.lang.X: y\n\tat z\n"
        )
        log.write("2026-01-01T00:00:00,001 [INFO ] W-9000-cifar_1.0-stdout MODEL_LOG - half a l")
        log.flush()
        (record,) = follower.read()
        assert (record.level, record.label, record.text) == ("ERROR", "cifar_1.0", "Backend worker error")
        assert record.more == ["java.lang.X: y", "\tat z"]
        log.write("ine\n")
        log.flush()
        (record,) = follower.read()
        assert (record.label, record.text) == ("cifar_1.0", "half a line")
