"""`convscope` against the real service, on both transports."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from convscope._cli import main

from tests.server.harness import ROOT, Launched


@pytest.fixture(params=["rest", "grpc"])
def url(request: pytest.FixtureRequest, server: Launched) -> str:
    if request.param == "rest":
        return f"http://127.0.0.1:{server.port('REST')}"
    return f"grpc://127.0.0.1:{server.port('gRPC')}"


def convscope(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in this process; test_readme.py runs processes."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def test_predict_prints_scores_and_saves_maps(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "seen"
    done = convscope(
        "predict", "samples/cat.png", "--model", "cifar", "--layers", "all", "--url", url, "--save", str(folder)
    )
    assert done.returncode == 0, done.stderr
    assert "probability" in done.stdout
    [manifest] = folder.rglob("manifest.json")
    assert json.loads(manifest.read_text())["model"] == "cifar"
    [stored] = folder.rglob("*.npz")
    assert np.load(stored)["conv1"].shape == (16, 32, 32)
    assert len(list(folder.rglob("*.png"))) == 2


def test_json_is_for_machines(url: str) -> None:
    done = convscope("predict", "samples/cat.png", "samples/README.md", "--model", "cifar", "--json", "--url", url)
    answers = json.loads(done.stdout)
    assert done.returncode == 1
    assert "bad_image" in json.dumps(answers)


def test_card_and_ready(url: str) -> None:
    card = convscope("card", "cifar", "--url", url)
    assert card.returncode == 0
    assert "16×32×32" in card.stdout
    assert convscope("ready", "cifar", "--url", url).returncode == 0
    assert convscope("ready", "nope", "--url", url).returncode == 1
