"""Failures found in TorchServe's logs, in plain words."""

from dataclasses import replace
from pathlib import Path

import pytest

from server.configuration import private_directory
from server.diagnosis import CAUSES, Death, Diagnosis, explain_java, explain_worker, find_cause
from server.host import Memory
from server.logs import Follower
from server.models import Archive
from tests.server.harness import poll

CIFAR = Archive(Path("cifar.mar"), "cifar", "1.0", None, frozenset({"entry", "handlers"}))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """All logs are written before they are read, so nothing has to be waited for."""
    for name in ("LAST_WORDS_S", "SILENCE_S"):
        monkeypatch.setattr(f"server.diagnosis.{name}", 0.1)


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
        (
            ["FileNotFoundError: weights.safetensors is missing"],
            "its worker failed: FileNotFoundError: weights.safetensors is missing",
        ),
        (
            [
                "RuntimeError: Error(s) in loading state_dict for Cifar:\n\tMissing key: conv1",
                "RuntimeError: 500 - Unknown",
            ],
            "its worker failed: RuntimeError: Error(s) in loading state_dict for Cifar: Missing key: conv1",
        ),
        (["KeyboardInterrupt"], "its worker failed: KeyboardInterrupt"),
        ([], "archive cifar.mar: its worker ended without a message: it was killed, or it exited"),
    ],
)
def test_a_workers_last_words_become_one_sentence(causes, words):
    assert words in explain_worker(CIFAR, traceback(*causes))


def test_a_worker_that_torchserve_ended_did_not_answer_whatever_it_printed_before(work):
    cifar = replace(CIFAR, response_timeout_s=7, startup_timeout_s=9)
    with private_directory(work, None) as directory:
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
        deaths = list(poll(lambda: diagnosis.read().deaths))
        with directory.torchserve_log.open("a") as log:
            log.write(f"{thread} Retry worker: 9000 in 1 seconds.\n")
        directory.models_log.write_text("".join(f"{stdout} {said}\n" for said in traceback("ValueError: new")))
        deaths += poll(lambda: diagnosis.read().deaths)
    assert [death.cause for death in deaths] == ["late", "error"]
    assert [death.text for death in deaths] == [
        "archive cifar.mar: its worker did not answer within 7 s (responseTimeout), "
        "or load within 9 s (startupTimeout), and was ended",
        "archive cifar.mar: its worker failed: ValueError: new",
    ]


THREAD = "2026-01-01T00:00:00,000 [ERROR] W-9000-cifar_1.0 WorkerThread -"


def read_death(work, *lines: str, said: tuple[str, ...] = (), kills: tuple[int | None, ...] = (None,)) -> Death:
    """Return what is made of one worker's death: TorchServe's lines, its own, and the kernel's count of kills."""
    counts = iter(kills)
    last = kills[-1]
    with private_directory(work, None) as directory:
        diagnosis = Diagnosis(directory, [CIFAR], lambda: Memory(512 << 20, 1 << 30, next(counts, last)))
        stdout = "2026-01-01T00:00:00,000 [INFO ] W-9000-cifar_1.0-stdout MODEL_LOG -"
        directory.models_log.write_text("".join(f"{stdout} {line}\n" for line in said))
        directory.torchserve_log.write_text("".join(f"{line}\n" for line in lines))
        (death,) = poll(lambda: diagnosis.read().deaths)
    assert death.cause in CAUSES
    assert (death.model, death.archive) == ("cifar/1.0", "cifar")
    return death


RETRY = f"{THREAD} Retry worker: 9000 in 1 seconds."


def test_an_exception_that_ended_torchserves_own_thread_is_quoted_whatever_the_worker_printed_before(work):
    thrown = 'java.lang.NullPointerException: Cannot invoke "String.equals(Object)"'
    lines = (f"{THREAD} Backend worker thread exception.", thrown, "\tat x.y(Z.java:1)")
    said = tuple(traceback("ValueError: long ago"))
    expected = f"archive cifar.mar: TorchServe's own thread for its worker ended: {thrown}"
    for more, retried in (((RETRY,), True), ((), False)):
        death = read_death(work, *lines, *more, said=said)
        assert (death.text, death.retried, death.cause) == (expected, retried, "torchserve")


def test_a_traceback_of_a_request_is_not_taken_for_the_cause_of_a_later_death(work):
    said = ("Torch worker started.", "Invoking custom service failed.", *traceback("ValueError: a request")[2:])
    death = read_death(work, RETRY, said=said)
    assert death.cause == "killed"
    assert death.text.startswith("archive cifar.mar: its worker ended without a message: it was killed, or it exited;")
    assert death.lines == said


def test_of_a_worker_that_ended_without_a_message_what_the_kernel_knows_is_told_and_no_more(work):
    death = read_death(work, RETRY, kills=(2, 2))
    assert death.cause == "killed"
    assert "; the kernel has counted no out-of-memory kill; memory used 512 MiB of 1024 MiB, free in" in death.text
    death = read_death(work, RETRY, kills=(2, 3))
    assert death.cause == "oom"
    assert "; the kernel has killed 1 of this container's processes: out of memory; memory used" in death.text
    death = read_death(work, RETRY, kills=(None, None))
    assert death.cause == "killed"
    assert "of-memory" not in death.text, "the kernel does not say"


def test_a_worker_that_crashed_says_by_what(work):
    said = (
        "Torch worker started.",
        "Fatal Python error: Bus error",
        "",
        "Current thread 0x1 (most recent call first):",
    )
    death = read_death(work, RETRY, said=said)
    assert (death.cause, death.text) == ("crash", "archive cifar.mar: its worker crashed: Bus error")
    assert death.is_ours


@pytest.mark.parametrize(
    ("cause", "is_ours"),
    [
        ("ValueError: bad weights", True),
        ("MemoryError", False),
        ("OSError: [Errno 28] No space left on device: '/tmp/x'", False),
        ("torch.OutOfMemoryError: CUDA out of memory.", False),
    ],
)
def test_an_exception_that_the_machine_caused_is_not_held_against_the_archive(cause, is_ours, work):
    death = read_death(work, RETRY, said=tuple(traceback(cause)))
    assert (death.cause, death.is_ours) == ("error", is_ours)
    assert ("free in" in death.text) is not is_ours


def test_warnings_without_a_message_are_told_by_their_exception_and_callers_that_hang_up_are_not(work):
    head = "2026-01-01T00:00:00,000 [ERROR] epollEventLoopGroup-3-1 HttpRequestHandler - "
    with private_directory(work, None) as directory:
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


def test_of_a_java_that_was_killed_only_the_report_of_a_crash_is_quoted():
    for line in ("Full thread dump", "java.io.IOException: No space left on device", "Error: an earlier one"):
        assert explain_java([line], killed=True) == "it says nothing"
    assert explain_java(["# A fatal error", "#  SIGSEGV (0xb) at pc=0x1"], killed=True) == "#  SIGSEGV (0xb) at pc=0x1"


def test_a_log_is_followed_by_whole_lines_and_stack_traces_stay_with_their_record(work):
    path = work / "log"
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
