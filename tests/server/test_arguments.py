"""The command line of the server."""

import subprocess
import sys
from pathlib import Path

import pytest

from server.arguments import build_parser, parse
from server.kserve import __main__ as second_host
from tests.server.harness import ROOT


def test_without_options_it_serves_the_model_store_here_on_the_documented_ports():
    settings = parse([])
    assert settings.model_store == Path("model_store")
    assert (settings.rest_port, settings.grpc_port, settings.metrics_port) == (8080, 7070, 8082)
    assert (settings.host, settings.models, settings.workers, settings.device) == ("127.0.0.1", (), None, "auto")
    assert (settings.max_request_mb, settings.max_reply_mb, settings.drain_s) == (64, 256, 10)


def test_models_are_separated_by_commas():
    assert parse(["--models", "a, b/1.0,"]).models == ("a", "b/1.0")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rest-port", "70000"], "'70000' is not a whole number from 0 to 65535"),
        (["--workers", "0"], "'0' is not a whole number from 1 to 1024"),
        (["--drain-s", "soon"], "'soon' is not a number of seconds"),
        (["--drain-s", "nan"], "'nan' is not a number of seconds"),
        (["--max-reply-mb", "4096"], "'4096' is not a whole number from 1 to 2047"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--precision", "int8"], "invalid choice: 'int8'"),
        (["--rest-port", "7070"], "must differ"),
        (["--rest-prot", "1"], "unrecognized arguments"),
    ],
)
def test_a_wrong_option_is_refused_with_status_2_and_says_what_is_right(options, words, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(options)
    assert exit.value.code == 2
    assert words in capsys.readouterr().err


def test_several_free_ports_may_be_asked_for():
    settings = parse(["--rest-port", "0", "--grpc-port", "0", "--metrics-port", "0"])
    assert settings.rest_port == settings.grpc_port == 0


def test_the_help_shows_every_option_with_its_default():
    shown = build_parser().format_help()
    for option in ("--model-store", "--startup-timeout-s", "--work-dir", "--log-dir", "--heap-mb", "--unready-s"):
        assert option in shown
    assert "(default: 8080)" in shown
    assert "==SUPPRESS==" not in shown


def test_the_server_starts_without_importing_torch_or_another_room():
    code = (
        "import sys, server.__main__, server.launcher; "
        "others = ('torch', 'ts', 'handlers', 'archiver', 'training', 'convscope'); "
        "print([name for name in others if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_the_second_host_has_the_options_that_do_not_depend_on_torchserve(capsys):
    settings = second_host.parse([])
    assert (settings.host, settings.rest_port, settings.grpc_port, settings.timeout_s) == ("127.0.0.1", 8085, 8086, 60)
    assert (settings.models, settings.workers, settings.patch, settings.max_reply_mb) == ((), None, False, 256)
    given = ["--models", "a, b/1.0", "--workers", "2", "--engine", "torch", "--timeout-s", "5"]
    settings = second_host.parse(given)
    assert (settings.models, settings.workers, settings.engine, settings.timeout_s) == (("a", "b/1.0"), 2, "torch", 5)
    for wrong in (["--http-port", "8086"], ["--heap-mb", "1024"], ["--timeout-s", "never"]):
        with pytest.raises(SystemExit) as exit:
            second_host.parse(wrong)
        assert exit.value.code == 2
    assert "must differ" in capsys.readouterr().err
