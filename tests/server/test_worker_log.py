"""Workers' log lines about failures, and how many of them reach standard error."""

import errno
import io
import json
from pathlib import Path

import pytest

from server.configuration import private_directory
from server.diagnosis import Diagnosis
from server.models import Archive
from server.reporting import Reporter, write
from server.worker_log import LONGEST, MOST_A_SECOND, Relay, parse
from tests.server.harness import poll

ENTRY = {
    "time": "2026-01-01T00:00:00.000Z",
    "level": "error",
    "model": "cifar",
    "version": "1.0",
    "request_id": "3f2a",
    "transport": "rest",
    "code": "internal",
    "message": "the network failed",
    "traceback": "Traceback (most recent call last):\nValueError: x",
}


def line(**changes) -> str:
    return json.dumps({**ENTRY, **changes})


def test_a_failed_request_is_one_readable_line():
    request = parse(line())
    assert request is not None
    assert request.describe() == "cifar 1.0 request 3f2a: internal: the network failed"


def test_a_complaint_that_is_about_no_request_is_told_without_one():
    complaint = parse(json.dumps({key: ENTRY[key] for key in ("time", "level", "model", "version", "message")}))
    assert complaint is not None
    assert complaint.describe() == "cifar 1.0: the network failed"


@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        "{",
        "{}",
        "[1]",
        '{"message": "of some library"}',
        '{"level": "error", "message": "of some library"}',
        '{"level": "info", "model": "cifar", "version": "1.0", "message": "loaded"}',
        "[METRICS]PredictionTime.ms:1|#ModelName:cifar",
        line(message=None),
    ],
)
def test_other_lines_are_no_complaints(text):
    assert parse(text) is None


def test_a_callers_text_cannot_command_the_terminal_or_fill_it():
    request = parse(line(message="\x1b[2J\r\nserver: stopped " + "x" * 10_000))
    assert request is not None
    said = request.describe()
    assert said.isprintable()
    assert len(said) == LONGEST


def test_an_answered_request_is_passed_on_like_a_failed_one():
    answered = parse(line(level="info", code=None, message="answered 1 picture in 0.8 ms"))
    assert answered is not None
    assert answered.describe() == "cifar 1.0 request 3f2a: answered 1 picture in 0.8 ms"


def reported(*, as_json: bool) -> tuple[Reporter, io.StringIO]:
    stream = io.StringIO()
    return Reporter(as_json=as_json, stream=stream), stream


def test_in_json_a_workers_line_passes_as_it_is_and_the_servers_own_has_the_same_fields():
    reporter, stream = reported(as_json=True)
    request = parse(line())
    assert request is not None
    reporter.relay(request)
    reporter.say("first\nsecond", level="warning", source="torchserve", port=1)
    worker, server = stream.getvalue().splitlines()
    assert worker == line()
    said = json.loads(server)
    assert said.pop("time").endswith("+00:00")
    assert said == {"level": "warning", "source": "torchserve", "message": "first\nsecond", "port": 1}


def test_in_text_every_line_says_who_speaks():
    reporter, stream = reported(as_json=False)
    request = parse(line())
    assert request is not None
    reporter.relay(request)
    reporter.say("first\nsecond", port=1)
    assert stream.getvalue() == (
        "worker: cifar 1.0 request 3f2a: internal: the network failed\nserver: first\nserver: second\n"
    )


class Full(io.StringIO):
    """A stream onto a disk that is full at first."""

    full = True

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


@pytest.mark.parametrize("as_json", [False, True])
def test_what_cannot_be_written_is_lost_and_the_next_is_written(as_json):
    stream = Full()
    reporter = Reporter(as_json=as_json, stream=stream)
    complaint = parse(line())
    assert complaint is not None
    reporter.say("first")
    reporter.relay(complaint)
    stream.full = False
    reporter.say("second")
    reporter.relay(complaint)
    assert "second" in stream.getvalue()
    assert "the network failed" in stream.getvalue()
    assert "first" not in stream.getvalue()


def test_a_closed_stream_is_written_to_without_an_error():
    stream = io.StringIO()
    stream.close()
    write("words", stream)


def test_a_flood_is_cut_to_so_many_lines_a_second_and_the_rest_is_counted():
    told, rest = [], []
    relay = Relay(told.append, rest.append)
    request = parse(line())
    flood = [request] * 40
    for now in (100.0, 100.1, 100.9):
        relay.pass_on(flood, now)
    assert (len(told), rest) == (MOST_A_SECOND, [])
    relay.pass_on([], 101.0)
    assert rest == [120 - MOST_A_SECOND]
    relay.pass_on(flood, 101.1)
    relay.pass_on([], 103)
    assert (len(told), rest) == (MOST_A_SECOND + 40, [120 - MOST_A_SECOND])
    relay.pass_on(flood * 2, 104)
    relay.close()
    assert rest[1:] == [80 - MOST_A_SECOND]


def test_failed_requests_are_read_from_the_log_and_do_not_hide_a_workers_last_words(work):
    archive = Archive(Path("cifar.mar"), "cifar", "1.0", None, frozenset())
    head = "2026-01-01T00:00:00,000 [INFO ] W-9000-cifar_1.0-stdout MODEL_LOG - "
    with private_directory(work, None) as directory:
        diagnosis = Diagnosis(directory, [archive])
        words = ["Traceback (most recent call last):", "ValueError: too bad", *[line()] * 1000]
        directory.models_log.write_text("".join(f"{head}{said}\n" for said in words))
        news = diagnosis.read()
        assert len(news.complaints) == 1000
        assert news.complaints[0].line == line()
        death = (
            "2026-01-01T00:00:00,000 [INFO ] W-9000-cifar_1.0 o.p.s.w.WorkerThread - Retry worker: 9000 in 1 seconds."
        )
        directory.torchserve_log.write_text(f"{death}\n")
        deaths = poll(lambda: diagnosis.read().deaths)
    assert [death.text for death in deaths] == ["archive cifar.mar: its worker failed: ValueError: too bad"]
