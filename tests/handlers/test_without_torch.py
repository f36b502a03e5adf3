"""Without torch: a worker with ONNX Runtime answers the same bytes, and says what it cannot explain."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from handlers import loading
from handlers.network.archive import REFERENCE, WEIGHTS
from handlers.wire import convscope_pb2 as wire
from tests.handlers.support import unpack

# Runs in the unpacked archive's folder, with the archive's own handlers.
SCRIPT = """
import io, itertools, json, sys
from pathlib import Path

if sys.argv[1] == "without":
    for name in ("torch", "torchvision"):
        sys.modules[name] = None  # An import fails, and find_spec finds nothing.
elif sys.argv[1] == "imported":
    import torch

import numpy as np
from PIL import Image

from handlers import loading
from handlers.wire import convscope_pb2 as wire

service = loading.load(Path.cwd(), model="cifar", version="1.0", config={}, batch_size=4, gpu=None)
before = sys.argv[1] == "imported" or sys.modules.get("torch") is None
replies = {}


def ask(name, row, **headers):
    [response] = service.respond([row], [{key.replace("_", "-"): value for key, value in headers.items()}], ["id"])
    replies[name] = [response.status, response.media_type, bytes(response.body).hex()]


generator = np.random.default_rng(0)
files = {}
for (height, width), kind in itertools.product([(32, 32), (61, 47), (9, 300)], ["png", "jpeg", "webp"]):
    file = io.BytesIO()
    pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind, **({"quality": 90} if kind != "png" else {}))
    files[f"{kind} {height}x{width}"] = file.getvalue()
for dtype, shape in itertools.product((np.uint8, np.float32), [(32, 32, 3), (2, 40, 20, 3)]):
    file = io.BytesIO()
    np.save(file, (generator.random(shape) * (255 if dtype == np.uint8 else 1)).astype(dtype))
    files[f"array {np.dtype(dtype)} {shape}"] = file.getvalue()
for name, file in files.items():
    ask(f"scores of {name}", {"request": wire.PredictRequest(pictures=[file], top_k=0).SerializeToString()})
selections = [
    {"pool": 1}, {"pool": 3}, {"pool": 16}, {"pool": 5, "channels": {"strongest": 2}},
    {"channels": {"strongest": 5}}, {"channels": {"indexes": [7, 0, 3]}},
]
for dtype, more in [
    *((wire.FLOAT32, more) for more in selections),
    *itertools.product((wire.FLOAT32, wire.FLOAT16, wire.UINT8), ({}, {"pool": 5})),
]:
    asked = wire.PredictRequest(pictures=list(files.values()), layers=["all"], map_dtype=dtype, **more)
    ask(f"maps {dtype} {more}", {"request": asked.SerializeToString()})
picture = files["png 32x32"]
for accept in ("application/json", "application/x-npz", "image/png", "application/x-protobuf"):
    ask(f"a body for {accept}", {"body": picture}, content_type="image/png", accept=accept, x_convscope_layers="conv1")
form = {"data": [picture, files["jpeg 61x47"]], "layers": b"all"}
ask("a form", form, content_type="multipart/form-data; boundary=x")
ask("json", {"body": json.dumps({"filters": "conv1"}).encode()}, content_type="application/json")
ask("filters", {"request": wire.PredictRequest(filters="conv2").SerializeToString()})
for method in ("grad_cam", "cam", "occlusion", "input_gradient", "integrated_gradients", "picture"):
    explain = wire.Explain(method=method)
    ask(f"explain {method}", {"request": wire.PredictRequest(pictures=[picture], explain=explain).SerializeToString()})
edit = wire.Edit(layer="conv1", operation="zero", channels=[0])
ask("an edit", {"request": wire.PredictRequest(pictures=[picture], edits=[edit]).SerializeToString()})
ask("card", {}, accept="application/json")
print(json.dumps({"imported": not before, "replies": replies}))
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("cifar", tmp_path_factory.mktemp("cifar"))


def run(folder: Path, *arguments: str | Path, code: str = SCRIPT) -> Any:
    """Run it in a process of its own; return what the last line that it prints says."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def run_here(folder: Path) -> dict[str, Any]:
    """Run it in this process, which has imported torch; the archive's handlers are those of the repository."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["script", "imported"])
        exec(compile(SCRIPT, "script", "exec"), {})
    found: dict[str, Any] = json.loads(said.getvalue().splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def answers(unpacked: Path) -> dict[str, dict[str, Any]]:
    return {"imported": run_here(unpacked)} | {how: run(unpacked, how) for how in ("without", "lazily")}


def body(reply: list[Any]) -> Any:
    return json.loads(bytes.fromhex(reply[2]))


def test_every_reply_but_those_that_torch_alone_gives_and_the_card_is_the_same_bytes(
    answers: dict[str, dict[str, Any]],
) -> None:
    without, lazily, imported = (answers[how]["replies"] for how in ("without", "lazily", "imported"))
    assert lazily == imported
    different = {name for name in without if without[name] != imported[name]}
    assert different == {f"explain {method}" for method in ("grad_cam", "input_gradient", "integrated_gradients")} | {
        "an edit",
        "card",
    }
    assert sum(reply[0] == 200 for reply in without.values()) > 30


def test_an_explanation_by_gradients_is_rejected_and_says_what_needs_none(answers: dict[str, dict[str, Any]]) -> None:
    for method in ("grad_cam", "input_gradient", "integrated_gradients"):
        reply = wire.PredictReply.FromString(bytes.fromhex(answers["without"]["replies"][f"explain {method}"][2]))
        assert reply.error.code == "bad_request"
        assert reply.error.message == (
            f"this server has no torch, so there is no {method}; the card lists the methods that need none"
        )
    for method in ("occlusion", "picture"):
        reply = wire.PredictReply.FromString(bytes.fromhex(answers["without"]["replies"][f"explain {method}"][2]))
        assert reply.results[0].explanation.method == method


def test_an_edit_is_rejected(answers: dict[str, dict[str, Any]]) -> None:
    without, lazily = (
        wire.PredictReply.FromString(bytes.fromhex(answers[how]["replies"]["an edit"][2]))
        for how in ("without", "lazily")
    )
    assert without.error.code == "bad_request"
    assert without.error.message.startswith("this server has no torch")
    assert (lazily.edits, lazily.engine.partition("-")[0]) == (1, "torch")


def test_the_card_names_the_explanations_that_are_there(answers: dict[str, dict[str, Any]]) -> None:
    without, lazily = (body(answers[how]["replies"]["card"]) for how in ("without", "lazily"))
    assert without.pop("explanations") == ["occlusion", "picture"]
    assert lazily.pop("explanations") == [
        "grad_cam", "occlusion", "input_gradient", "integrated_gradients", "picture"
    ]  # fmt: skip
    assert without.pop("edits") == []
    assert lazily.pop("edits") == ["zero", "scale", "add", "mean", "clamp", "patch"]
    assert without == lazily


def test_loading_and_warming_up_do_not_import_torch(answers: dict[str, dict[str, Any]]) -> None:
    assert not answers["lazily"]["imported"]


LOAD = """
import json, sys
from pathlib import Path

for name in ("torch", "torchvision"):
    sys.modules[name] = None
from handlers import loading

errors = []
for folder in sys.argv[1:]:
    try:
        loading.load(Path(folder), model="cifar", version="1.0", config={}, batch_size=4, gpu=None)
    except (OSError, RuntimeError) as err:
        errors.append(str(err))
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def broken(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Archives of which a file is wrong: a graph of another activation, other weights, a missing reference."""
    folder = tmp_path_factory.mktemp("broken")
    broken = {what: Path(shutil.copytree(unpacked, folder / what)) for what in ("graph", "weights", "reference")}
    graph = (unpacked / "graph.onnx").read_bytes()
    assert b"Relu" in graph
    (broken["graph"] / "graph.onnx").write_bytes(graph.replace(b"Relu", b"Sign"))
    weights = load_file(unpacked / WEIGHTS)
    weights["conv2.weight"][3] *= 1.01
    save_file(weights, broken["weights"] / WEIGHTS)
    (broken["reference"] / REFERENCE).unlink()
    return broken


class TestWhatComputesSomethingElse:
    """It is found when the worker starts, without torch too."""

    def load(self, folder: Path) -> str:
        """Load the archive with torch; return the name of the engine that runs."""
        service = loading.load(folder, model="cifar", version="1.0", config={}, batch_size=4, gpu=None)
        message = wire.PredictRequest(describe=True).SerializeToString()
        [response] = service.respond([{"request": message}], [{}], ["id"])
        return wire.PredictReply.FromString(response.body).card.engine

    def test_torch_runs_in_place_of_a_wrong_graph_and_says_so(
        self, broken: dict[str, Path], caplog: pytest.LogCaptureFixture
    ) -> None:
        assert self.load(broken["graph"]).startswith("torch-")
        assert "torch runs instead of onnxruntime: RuntimeError: the scores differ from torch's by" in caplog.text

    def test_other_weights_are_a_failure(self, broken: dict[str, Path]) -> None:
        with pytest.raises(RuntimeError, match=r"the archive is damaged.*the scores differ from torch's by"):
            self.load(broken["weights"])

    def test_without_torch_each_is_a_failure(self, unpacked: Path, broken: dict[str, Path]) -> None:
        graph, weights, reference = run(unpacked, *broken.values(), code=LOAD)
        assert graph.startswith("torch must run this network, and torch or torchvision is not installed: ")
        assert "the scores differ from torch's by" in graph
        assert "not installed" in weights
        assert "the scores differ from torch's by" in weights
        assert reference == "reference.safetensors is missing"
