"""The command line at its limits: wrong values, failures, narrow and ASCII terminals, closed output, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import convscope
import pytest
from convscope._cli import main
from convscope.commands import format_table

from tests.client.stand_in import StandIn
from tests.client.test_cli import pictures, run
from tests.thorough import variants

__all__ = ["pictures"]

ROOT = str(Path(convscope.__file__).parents[1])
WRONG = {
    "predict cat.png --model cifar --pool 0": "argument --pool: must be a whole number of at least 1, not '0'",
    "predict cat.png --model cifar --top-k -1": "argument --top-k: must be a whole number of at least 0, not '-1'",
    "predict cat.png --model cifar --top-k many": "argument --top-k: must be a whole number of at least 0, not 'many'",
    "predict cat.png --model cifar --layers conv1 --channels 0": "--channels: must be a whole number of at least 1",
    "predict cat.png --model cifar --layers conv1 --channels 1,-2": "--channels: must be a whole number of at least 0",
    "predict cat.png --model cifar --deadline-s 0": "--deadline-s: must be seconds above 0 and at most 86400, not '0'",
    "predict cat.png --model cifar --retries -1": "argument --retries: must be a whole number of at least 0",
    "predict cat.png --model cifar --channels 3": "--channels does nothing without --layers",
    "predict cat.png --model cifar --map-dtype uint8": "--map-dtype does nothing without --layers",
    "predict cat.png --model cifar --pool 1": "--pool does nothing without --layers",
    "predict cat.png --model cifar --skip-existing": "--skip-existing does nothing without --save",
    "predict cat.png --model cifar --overwrite": "--overwrite does nothing without --save",
    "predict cat.png --model cifar --save out --overwrite --skip-existing": "not allowed with argument --overwrite",
    "predict - - --model cifar": "- can be given once: standard input is one picture",
    "predict empty --model cifar": "no picture found in empty (.bmp, .gif, .jpeg, .jpg, .npy, .png, .tif, .tiff,",
    "explain cat.png --model cifar --window 4": "--window does nothing with --method grad_cam",
    "explain cat.png --model cifar --method cam --step 4": "--step does nothing with --method cam",
    "explain cat.png --model cifar --method occlusion --steps 4": "--steps does nothing with --method occlusion",
    "explain cat.png --model cifar --method occlusion --layer conv1": "--layer does nothing with --method occlusion",
    "explain cat.png --model cifar --method occlusion --window 0": "--window: must be a whole number of at least 1",
    "explain cat.png --model cifar --target cow": "cifar has no class of this label; there are for example: "
    "class 0; class 1; class 2; class 3; class 4",
    "explain cat.png --model cifar --target 'class 77'": "there are for example: class 7;",
    "card cifar --ca-file ca.pem": "--ca-file applies only to https:// and grpcs:// URLs",
    "models --version 2": "--version does nothing for all models",
    "predict cat.png": "the following arguments are required: --model",
    "predict --model cifar": "the following arguments are required: PICTURE",
    "card": "the following arguments are required: model",
    "predict cat.png --model cifar --api-key secret": "unrecognized arguments: --api-key secret",
    "predict cat.png --model cifar --compare": "--compare does nothing without --edits",
    "predict cat.png --model cifar --map-dtype float64": "--map-dtype: invalid choice: 'float64'",
    "predict cat.png --model cifar --channels strong": "--channels: must be a whole number of at least 1, not 'strong'",
    "predict cat.png --model cifar --channels ,": "--channels: expected a comma-separated list such as A,B, not ','",
    "predict cat.png --model cifar --layers ,": "--layers: expected a comma-separated list such as A,B, not ','",
    "predict cat.png --model ''": "argument --model: must be 1 to 255 of",
    "predict cat.png --model ..": "argument --model: must be 1 to 255 of",
    "card cifar --version ''": "argument --version: must be 1 to 255 of",
    "card cifar --version 1/2": "argument --version: must be 1 to 255 of",
    "ready cifar --request-id 'two words'": "request_id must be 1 to 64 of A-Z a-z 0-9 . _ -, not 'two words'",
}


@pytest.mark.parametrize(("path", "words"), [("", "path must not be empty"), ("-", "standard input is closed")])
def test_a_picture_that_is_no_picture_is_a_wrong_value(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, pictures: Path, path: str, words: str
):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as caught:
        main(["predict", path, "--model", "cifar"])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_value_ends_with_2_and_names_the_option_as_it_is_typed(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, pictures: Path, command: str
):
    (pictures / "empty").mkdir()
    arguments = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", command)] + ["--url", stand_in.rest_url]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(rf"^convscope( {arguments[0]})?: error: ", printed.err, re.MULTILINE)
    assert WRONG[command] in printed.err
    assert not [request for *_, request in stand_in.requests if request.pictures]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--json"])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    error = json.loads(printed.out)["error"]
    assert (error["code"], printed.err) == ("usage", "")
    assert WRONG[command] in error["message"]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("predict cat.png --model missing", "model_not_found"),
        ("predict cat.png --model cifar --layers conv7", "unknown_layer"),
        ("explain cat.png --model error-bad_request", "bad_request"),
        ("card died --retries 0", "internal"),
        ("predict cat.png --model cifar --save cat.png/out", "os_error"),
        ("models --url http://127.0.0.1:1 --retries 0", "connect_error"),
    ],
)
def test_json_is_on_standard_output_in_failure_too(
    capsys: pytest.CaptureFixture[str], url: str, pictures: Path, command: str, code: str
):
    arguments = command.split() if "--url" in command else [*command.split(), "--url", url]
    status, out, err = run(capsys, *arguments, "--json")
    assert (status, err) == (1, "")
    error = json.loads(out)["error"]
    assert error["code"] == code
    assert error["message"]
    assert (error["request_id"] is None) == (code == "os_error")


def test_the_url_comes_from_the_environment_and_a_wrong_one_is_named_so(
    capsys: pytest.CaptureFixture[str], url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CONVSCOPE_URL", url)
    assert run(capsys, "ready", "cifar") == (0, "cifar is ready\n", "")
    wrong = f"{url}/predictions/cifar"
    monkeypatch.setenv("CONVSCOPE_URL", wrong)
    assert run(capsys, "ready", "cifar", "--url", url) == (0, "cifar is ready\n", "")
    for option, name in (([], "CONVSCOPE_URL"), (["--url", wrong], "--url")):
        with pytest.raises(SystemExit) as caught:
            main(["ready", "cifar", *option])
        assert caught.value.code == 2
        words = f"error: {name} must end behind the host and port, without the path '/predictions/cifar'"
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("target", ["class 7", "CLASS 7", "7"])
def test_a_target_is_a_label_or_an_index(
    capsys: pytest.CaptureFixture[str], stand_in: StandIn, pictures: Path, target: str
):
    run(capsys, "explain", "cat.png", "--model", "cifar", "--target", target, "--url", stand_in.rest_url)
    assert stand_in.requests[-1][2].explain.target == 7


COMMANDS = [
    "predict cat.png dog.jpg gone.png --model cifar --layers all --timing",
    "explain cat.png --model cifar",
    "card cifar",
    "models --retries 0",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_printed_fits_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str],
    stand_in: StandIn,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
):
    arguments = [*command.split(), "--url", stand_in.rest_url]
    wide = run(capsys, *arguments)[1]
    assert max(map(len, wide.splitlines())) > 40
    monkeypatch.setenv("COLUMNS", "40")
    narrow = run(capsys, *arguments)[1]
    assert max(map(len, narrow.splitlines())) <= 40
    for word in set(re.findall(r"[A-Za-z]+\d?", wide)) - set(re.findall(r"request [0-9a-f]+", wide)):
        if not re.search(f"request [0-9a-f]*{word}", wide):
            assert word in narrow or word in narrow.replace("\n", "").replace(" ", "")


def test_rows_that_do_not_fit_are_lists_of_fields(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "24")
    rows = [
        ["cat.png", "Egyptian cat and its long tail", "1"],
        ["", "猫猫猫猫猫猫猫猫", "2"],
        ["dog.png", "no picture"],
    ]
    assert format_table(["picture", "class", "n"], rows, right_aligned=[2]).splitlines() == [
        "picture  cat.png",
        "class    Egyptian cat",
        "         and its long",
        "         tail",
        "n        1",
        "",
        "class    猫猫猫猫猫猫猫",
        "         猫",
        "n        2",
        "",
        "picture  dog.png",
        "no picture",
    ]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": ROOT, "PYTHONUNBUFFERED": "", **more}  # What is printed waits for a flush.


def test_an_ascii_terminal_gets_ascii(stand_in: StandIn, pictures: Path):
    (pictures / "猫.png").write_bytes(b"cat")
    command = [sys.executable, "-m", "convscope", "predict", "猫.png", "--model", "cifar", "--layers", "conv1"]
    command += ["--url", stand_in.rest_url]
    options: dict[str, Any] = {"check": True, "capture_output": True, "env": environment(PYTHONIOENCODING="ascii")}
    ran = subprocess.run(command, **options)
    assert b"\n?.png" in ran.stdout
    assert b"4x6x5" in ran.stdout
    assert ran.stderr == b""
    ran = subprocess.run([*command, "--json"], **options)
    assert json.loads(ran.stdout)["results"][0]["picture"] == "猫.png"
    assert ran.stdout.isascii()


@pytest.mark.skipif(sys.platform == "win32", reason="of POSIX shells")
@pytest.mark.parametrize(
    ("command", "redirection"),
    variants(
        [("ready cifar", ">&-"), ("ready cifar", ">/dev/full"), ("--help", ">/dev/full"), ("card cifar --json", ">&-")],
        [("--help", ">&-"), ("card cifar --json", ">/dev/full")],
    ),
)
def test_a_standard_output_that_takes_nothing_is_one_line(stand_in: StandIn, command: str, redirection: str):
    words = {">&-": "is closed", ">/dev/full": "No space left on device"}[redirection]
    url = "" if command == "--help" else f"--url {stand_in.rest_url}"
    line = f"exec '{sys.executable}' -m convscope {command} {url} {redirection}"
    ran = subprocess.run(["sh", "-c", line], check=False, stderr=subprocess.PIPE, text=True, env=environment())
    assert ran.returncode == 1
    assert ran.stderr.startswith("convscope: standard output")
    assert words in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("moment", ["import", "request"])
def test_ctrl_c_is_one_line_and_no_traceback(stand_in: StandIn, pictures: Path, moment: str):
    path = ROOT
    if moment == "import":  # What is imported last hangs.
        path = f"{pictures}{os.pathsep}{ROOT}"
        (pictures / "httpx.py").write_text("import pathlib, time; pathlib.Path('begun').touch(); time.sleep(60)")
    command = [sys.executable, "-m", "convscope", "predict", "cat.png", "--model", "slow", "--url", stand_in.rest_url]
    pipe = subprocess.PIPE
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # A child inherits it if it is ignored.
    try:
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment(PYTHONPATH=path))
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        deadline = time.monotonic() + 60
        while not (stand_in.requests or (pictures / "begun").exists()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "convscope: interrupted\n")
