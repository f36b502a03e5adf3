"""A user's own network and torchvision's: found, built from what is packed, checked, and rejected with a reason."""

import builtins
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from torch import nn
from torchvision import models

from archiver import packing
from archiver.__main__ import main
from archiver.external import look_up_torchvision
from archiver.packing import ArchiveError
from handlers import loading
from handlers.wire import convscope_pb2 as wire
from tests.archiver.conftest import NET
from tests.handlers.support import ask_json, ask_message
from tests.pictures import colours, png

Run = Callable[..., tuple[int, str]]
OWN = ("--name", "own", "--layers", "conv1=relu", "--size", "16x16")
RANDOM = ("--random-weights", "3")
STATE = {
    "conv.weight": torch.rand(4, 3, 3, 3),
    "conv.bias": torch.rand(4),
    "fc.weight": torch.rand(3, 4),
    "fc.bias": torch.rand(3),
}


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs the command line on a store of its own and returns status and what was shown."""

    def call(*arguments: object) -> tuple[int, str]:
        try:
            status = main([*map(str, arguments), "--store", str(tmp_path / "store")])
        except SystemExit as stop:
            status = int(stop.code or 0)
        shown = capsys.readouterr()
        return status, shown.out + shown.err

    return call


def packed(tmp_path: Path, name: str = "own") -> dict[str, bytes]:
    return packing.unpack(tmp_path / "store" / f"{name}.mar")


def test_a_file_of_ones_own_travels_in_the_archive(own_archive: bytes, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store/own.mar").write_bytes(own_archive)
    files = packed(tmp_path)
    assert files["own_net.py"].decode() == NET
    assert json.loads(files["card.json"])["architecture"] == "own_net:Net"
    assert main(["--check", "--store", str(tmp_path / "store")]) == 0


def test_an_archive_says_that_its_network_has_no_gradients(
    run: Run, net_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = "    def forward(self, images):\n"
    cannot_be_traced = "        assert images.shape[1] == 3\n"
    net_file.write_text(NET.replace(head, f"    @torch.no_grad()\n{head}{cannot_be_traced}"))
    classes = tmp_path / "classes.txt"
    classes.write_text("a\nb\nc\n")
    status, shown = run("--arch", f"{net_file}:Net", *OWN, *RANDOM, "--classes", classes)
    assert status == 0, shown
    assert "explanations: by occlusion, not by gradients: its forward pass runs without gradients" in shown
    files = packed(tmp_path)
    assert "runs without gradients" in json.loads(files["card.json"])["no_gradients"]
    assert main(["--check", "--store", str(tmp_path / "store")]) == 0

    ZipFile(tmp_path / "store/own.mar").extractall(tmp_path / "own")
    monkeypatch.syspath_prepend(tmp_path / "own")
    config = {"convscope": {}}
    service = loading.load(tmp_path / "own", model="own", version="1.0", config=config, batch_size=1, gpu=None)
    del sys.modules["own_net"]
    assert ask_json(service, {"body": b""})["explanations"] == ["cam", "occlusion", "picture"]
    for method, code in (("input_gradient", "bad_request"), ("integrated_gradients", "bad_request"), ("occlusion", "")):
        asked = wire.PredictRequest(pictures=[png(colours())], explain=wire.Explain(method=method))
        assert ask_message(service, asked).error.code == code


def test_an_archive_of_a_network_with_gradients_says_nothing_of_them(run: Run, net_file: Path, tmp_path: Path) -> None:
    classes = tmp_path / "classes.txt"
    classes.write_text("a\nb\nc\n")
    _, shown = run("--arch", f"{net_file}:Net", *OWN, *RANDOM, "--classes", classes)
    assert "gradients" not in shown
    assert "no_gradients" not in json.loads(packed(tmp_path)["card.json"])


def test_the_archive_of_ones_own_network_is_refreshed_from_itself(run: Run, own_archive: bytes, tmp_path: Path) -> None:
    path = tmp_path / "store" / "own.mar"
    path.parent.mkdir()
    path.write_bytes(own_archive)
    path.write_bytes(packing.pack(packing.unpack(path) | {"handlers/api/errors.py": b""}))
    assert run("--refresh") == (0, "own.mar: rewritten\n")
    assert path.read_bytes() == own_archive


def test_a_package_travels_whole(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "zoo"
    (package / "parts").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "parts" / "__init__.py").write_text("")
    (package / "parts" / "block.py").write_text("from torch.nn import ReLU\n")
    (package / "net.py").write_text(NET.replace("import torch\n", "from .parts.block import ReLU\n"))
    (package / "train.py").write_text("import tqdm\n")  # Never imported by the network.
    monkeypatch.syspath_prepend(tmp_path)
    status, shown = run("--arch", "zoo.net:Net", *OWN, *RANDOM)
    assert status == 0, shown
    names = {name for name in packed(tmp_path) if name.startswith("zoo/")}
    assert names == {
        *("zoo/__init__.py", "zoo/net.py", "zoo/train.py"),
        *("zoo/parts/__init__.py", "zoo/parts/block.py"),
    }
    assert not any(name.split(".")[0] == "zoo" for name in sys.modules)


def test_random_weights_come_from_the_seed(run: Run, net_file: Path, own_archive: bytes, tmp_path: Path) -> None:
    assert run("--arch", f"{net_file}:Net", *OWN, "--random-weights", 3)[0] == 0
    assert (tmp_path / "store/own.mar").read_bytes() == own_archive
    before = packed(tmp_path)["weights.safetensors"]
    assert run("--arch", f"{net_file}:Net", *OWN, "--random-weights", 4)[0] == 0
    assert packed(tmp_path)["weights.safetensors"] != before


def test_a_state_dict_is_loaded_strictly(run: Run, net_file: Path, tmp_path: Path) -> None:
    own = ("--arch", f"{net_file}:Net", *OWN, "--state-dict", tmp_path / "weights.pt")
    average = {name: value + 1 for name, value in STATE.items()}
    torch.save({"model": STATE, "model_ema": average}, tmp_path / "weights.pt")
    status, shown = run(*own, "--ema")
    assert (status, "weights: model_ema" in shown) == (0, True), shown
    assert packed(tmp_path)["weights.safetensors"] == packing.weights(average)
    torch.save(STATE | {"more": torch.zeros(1)}, tmp_path / "weights.pt")
    status, shown = run(*own)
    assert status == 1
    assert "do not fit" in shown
    assert "more" in shown


def test_a_pickled_model_is_refused_and_its_code_not_run(run: Run, net_file: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "sprung",)

    for name, save in (("whole.pt", lambda path: torch.save(nn.Linear(2, 2), path)), ("trap.pt", None)):
        path = tmp_path / name
        save(path) if save else path.write_bytes(pickle.dumps(Trap()))
        status, shown = run("--arch", f"{net_file}:Net", *OWN, "--state-dict", path)
        assert status == 1
        assert "torch.save(model.state_dict(), path)" in shown
    assert not (tmp_path / "sprung").exists()


def test_a_missing_weights_file_is_an_error_in_words(run: Run, net_file: Path, tmp_path: Path) -> None:
    status, shown = run("--arch", f"{net_file}:Net", *OWN, "--state-dict", tmp_path / "none.pt")
    assert status == 1
    assert "No such file" in shown


def test_without_layers_what_there_is_gets_listed(run: Run, net_file: Path, tmp_path: Path) -> None:
    status, shown = run("--arch", f"{net_file}:Net", "--name", "own", "--size", "16x16", *RANDOM)
    assert status == 1
    assert "say which layers to publish" in shown
    assert "  conv  4×16×16" in shown
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--layers", "a=conv,a=relu"], "every name once", id="layer twice"),
        pytest.param(["--layers", "conv"], "NAME=NODE", id="layer without node"),
        pytest.param(["--layers", "a=conv9"], "no node 'conv9'", id="unknown node"),
        pytest.param(["--arguments", '{"classes": 0.5}'], "keyword arguments as JSON", id="bad argument"),
        pytest.param(["--arguments", "{"], "not JSON", id="no JSON"),
        pytest.param(["--arguments", "[1]"], "not a JSON object", id="JSON of another kind"),
        pytest.param(["--size", "big"], "neither HEIGHTxWIDTH", id="size"),
        pytest.param(["--mean", "0.5", "--std", "0.5"], "3 values each (one a channel)", id="mean of one channel"),
        pytest.param(["--channels", "1"], "--channels", id="channels the network does not take"),
        pytest.param(["--name", "two words"], "part of a URL", id="name"),
        pytest.param(["--version", "1/2"], "part of a URL", id="version"),
        pytest.param(["--state-dict", "x.pt"], "--random-weights", id="both weights"),
    ],
)
def test_a_mistake_on_the_command_line_is_explained(
    arguments: list[str], message: str, run: Run, net_file: Path, tmp_path: Path
) -> None:
    status, shown = run("--arch", f"{net_file}:Net", *OWN, *RANDOM, *arguments)
    assert status != 0
    assert message in shown
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        pytest.param("net.py", "no architecture", id="no name"),
        pytest.param("missing.py:Net", "does not exist", id="no file"),
        pytest.param("no_such_package.net:Net", "no module 'no_such_package.net'", id="no package"),
        pytest.param("torchvision.models:resnet_eighteen", "has no 'resnet_eighteen'", id="no such builder"),
        pytest.param("torchvision.models:get_model_builder", "failed", id="arguments missing"),
        pytest.param("torch:zeros", "failed", id="not called with nothing"),
        pytest.param("torch:get_default_dtype", "not a torch.nn.Module", id="no network"),
        pytest.param("json.decoder:JSONDecoder", "not a network's module", id="standard library"),
    ],
)
def test_an_architecture_that_is_none_is_explained(architecture: str, message: str, run: Run) -> None:
    status, shown = run("--arch", architecture, *OWN, *RANDOM)
    assert status == 1
    assert message in shown


@pytest.mark.parametrize("name", ["random.py", "yaml.py", "handlers.py", "ts.py", "pytest.py"])
def test_a_file_that_would_hide_a_module_of_the_server_is_refused(name: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / name).write_text(NET)
    status, shown = run("--arch", f"{tmp_path / name}:Net", *OWN, *RANDOM)
    assert status == 1
    assert "rename it" in shown


@pytest.mark.parametrize("module", ["scipy", "neighbour", "archiver.packing"])
def test_a_network_that_imports_what_the_server_lacks_is_refused(
    module: str, run: Run, net_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (net_file.parent / "neighbour.py").write_text("")
    monkeypatch.chdir(net_file.parent)
    monkeypatch.syspath_prepend(net_file.parent)
    net_file.write_text(f"import {module}\n{NET}")
    status, shown = run("--arch", f"{net_file}:Net", *OWN, *RANDOM)
    assert status == 1
    assert f"needs the {'package' if module == 'scipy' else 'module'} {module.split('.')[0]!r}" in shown


def test_an_import_that_a_network_can_do_without_is_none_of_our_business(run: Run, net_file: Path) -> None:
    net_file.write_text(f"try:\n    import scipy\nexcept ImportError:\n    scipy = None\nassert scipy is None\n{NET}")
    status, shown = run("--arch", f"{net_file}:Net", *OWN, *RANDOM)
    assert status == 0, shown


def test_an_import_made_only_in_the_forward_pass_is_found_out(run: Run, net_file: Path) -> None:
    net_file.write_text(NET.replace("        return self.fc", "        import scipy\n        return self.fc"))
    status, shown = run("--arch", f"{net_file}:Net", *OWN, *RANDOM)
    assert status == 1
    assert "needs the package 'scipy'" in shown


def test_a_file_that_fails_when_imported_says_how(run: Run, net_file: Path) -> None:
    net_file.write_text("def Net(:\n")
    status, shown = run("--arch", f"{net_file}:Net", *OWN, *RANDOM)
    assert status == 1
    assert "importing own_net failed: SyntaxError" in shown


def test_weights_are_never_downloaded_by_a_server(run: Run) -> None:
    options = ("--arguments", '{"weights": "DEFAULT"}')
    status, shown = run("--arch", "torchvision.models:resnet18", *options, *OWN, *RANDOM)
    assert status == 1
    assert "must not download" in shown


@pytest.mark.parametrize(("content", "message"), [("", "one label a line"), ("a\n\nb\n", "no empty line")])
def test_a_class_list_with_holes_is_refused(
    content: str, message: str, run: Run, net_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "classes.txt").write_text(content)
    status, shown = run("--arch", f"{net_file}:Net", *OWN, *RANDOM, "--classes", tmp_path / "classes.txt")
    assert status == 1
    assert message in shown


def test_options_of_ones_own_network_do_not_go_with_a_checkpoint(run: Run) -> None:
    status, shown = run("--checkpoint", "x.pt", "--layers", "a=b")
    assert status == 2
    assert "--layers can only be given with --arch" in shown


def test_the_process_is_what_it_was_afterwards(run: Run, net_file: Path) -> None:
    def state() -> tuple[object, ...]:
        generator = torch.random.get_rng_state().tolist()
        return list(sys.path), set(sys.modules), builtins.__import__, generator, torch.get_num_threads()

    torch.manual_seed(0)
    before = state()
    served = "assert torch.get_num_threads() == 1"  # As in a worker.
    net_file.write_text(NET.replace("return self.fc", f"{served}\n        return self.fc"))
    assert run("--arch", f"{net_file}:Net", *OWN, *RANDOM)[0] == 0
    after = state()
    assert after[0] == before[0]
    assert "own_net" not in after[1]
    assert after[2:] == before[2:]


def test_safetensors_are_read(run: Run, net_file: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "weights.safetensors"
    safetensors.save_file(STATE, path)
    status, shown = run("--arch", f"{net_file}:Net", *OWN, "--state-dict", path)
    assert status == 0, shown
    assert packed(tmp_path)["weights.safetensors"] == packing.weights(STATE)
    path.write_bytes(path.read_bytes()[:50])
    status, shown = run("--arch", f"{net_file}:Net", *OWN, "--state-dict", path)
    assert (status, "is not a safetensors file" in shown) == (1, True)
    status, shown = run("--arch", f"{net_file}:Net", *OWN, "--state-dict", tmp_path / "none.safetensors")
    assert (status, "cannot be read" in shown) == (1, True)


def test_safetensors_without_their_package_say_what_is_missing(
    run: Run, net_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    status, shown = run("--arch", f"{net_file}:Net", *OWN, "--state-dict", tmp_path / "weights.safetensors")
    assert status == 1
    assert "needs the package safetensors" in shown


def test_auto_takes_the_layers_that_are_proposed_without_it(run: Run, net_file: Path, tmp_path: Path) -> None:
    options = ("--arch", f"{net_file}:Net", "--name", "own", "--size", "16x16", *RANDOM)
    status, shown = run(*options)
    assert status == 1
    assert "* conv1  relu  4×16×16  1×1     3×3   112" in shown
    assert "--layers conv1=relu" in shown
    status, shown = run(*options, "--layers", "auto")
    assert status == 0, shown
    assert json.loads(packed(tmp_path)["card.json"])["layers"] == {"conv1": "relu"}
    assert "--models own" in shown


SCRIPTED = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, branches=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.relu = nn.ReLU()
        self.tail = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()))
        self.branches = branches

    def forward(self, images):
        maps = self.relu(self.conv(images))
        if self.branches and maps.mean() > 1e6:
            return maps
        return self.tail(maps)


def whole():
    return torch.jit.script(Net().tail)
"""


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_scripted_part_is_run_and_not_looked_into(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "scripted_net.py"
    path.write_text(SCRIPTED)
    own = ("--name", "own", "--size", "16x16", "--layers", "auto", *RANDOM)
    for branches in ("false", "true"):
        status, shown = run("--arch", f"{path}:Net", *own, "--arguments", f'{{"branches": {branches}}}')
        assert status == 0, shown
        assert json.loads(packed(tmp_path)["card.json"])["layers"] == {"conv1": "relu"}
    status, shown = run("--arch", f"{path}:whole", *own)
    assert (status, "makes a TorchScript program" in shown) == (1, True)


def test_without_maps_nothing_can_be_proposed(run: Run) -> None:
    flat = ("--arch", "torchvision.ops:Permute", "--arguments", '{"dims": [0, 2, 3, 1]}')
    status, shown = run(*flat, "--name", "flat", "--layers", "auto", *RANDOM)
    assert status == 1
    assert "no layers can be proposed" in shown


def test_a_network_that_cannot_be_traced_says_where_and_proposes_its_modules(run: Run, net_file: Path) -> None:
    net_file.write_text(
        NET.replace("        return self.fc", "        assert images.sum() >= 0\n        return self.fc")
    )
    status, shown = run("--arch", f"{net_file}:Net", "--name", "own", "--size", "16x16", *RANDOM)
    assert status == 1
    assert "cannot be traced" in shown
    assert "of own_net.py: assert images.sum() >= 0" in shown
    assert "* conv1  relu  4×16×16  –" in shown


def test_a_network_that_fails_on_black_is_refused_here_and_not_by_the_server(run: Run, net_file: Path) -> None:
    net_file.write_text(
        NET.replace("        return self.fc", "        assert images.sum() > 0\n        return self.fc")
    )
    status, shown = run("--arch", f"{net_file}:Net", *OWN, *RANDOM)
    assert status == 1
    assert "black or noise: AssertionError" in shown


class TestTorchvision:
    def test_a_name_brings_preprocessing_and_classes_and_no_source(self, run: Run, tmp_path: Path) -> None:
        status, shown = run("--torchvision", "squeezenet1_1", "--layers", "auto", "--size", "64x48", *RANDOM)
        assert status == 0, shown
        files = packed(tmp_path, "squeezenet1_1")
        assert all(packing.is_ours(name) for name in files)
        card = json.loads(files["card.json"])
        assert card["architecture"] == "torchvision.models:squeezenet1_1"
        assert (len(card["classes"]), card["classes"][1]) == (1000, "goldfish")
        assert card["preprocessing"] == {
            "channels": 3,
            "height": 64,
            "width": 48,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "resize": [73, 55],  # 256 to 224 of the published recipe, in proportion.
            "fit": "cover",
        }

    def test_another_head_has_classes_of_its_own(self, run: Run, tmp_path: Path) -> None:
        options = ("--arguments", '{"num_classes": 2}', "--layers", "a=features.1", "--size", "64x64", "--name", "pets")
        normal = ("--mean", "0.1,0.2,0.3", "--std", "0.4,0.5,0.6", "--version", "2.0")
        status, shown = run("--arch", "torchvision.models:squeezenet1_1", *options, *normal, *RANDOM)
        assert status == 0, shown
        assert "classes: none, so maps and no scores; --classes FILE names them" in shown
        card = json.loads(packed(tmp_path, "pets")["card.json"])
        assert (card["classes"], card["version"]) == ([], "2.0")
        assert (card["preprocessing"]["mean"], card["preprocessing"]["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
        assert card["description"] == "torchvision.models:squeezenet1_1, a network of torchvision's."

    def test_a_weights_file_tells_which_weights_it_is_by_its_published_name(self) -> None:
        assert look_up_torchvision("efficientnet_b1").weights == "IMAGENET1K_V2"
        older = look_up_torchvision("efficientnet_b1", Path("somewhere/efficientnet_b1_rwightman-bac287d4.pth"))
        assert older.weights == "IMAGENET1K_V1"
        assert older.preprocessing.size == (240, 240)

    def test_its_builders_add_what_published_weights_need(self) -> None:
        file = Path(models.Inception_V3_Weights.DEFAULT.url)
        assert look_up_torchvision("inception_v3", file).arguments == {"transform_input": True}
        large = Path(models.ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1.url)
        assert look_up_torchvision("vit_b_16", large).arguments == {"image_size": 384}
        assert look_up_torchvision("inception_v3", Path("own.pt"), {"transform_input": False}).arguments == {}
        with pytest.raises(ArchiveError, match='add "transform_input": true to --arguments'):
            look_up_torchvision("googlenet", Path("own.pt"))

    def test_the_size_is_that_of_the_weights(self) -> None:
        assert look_up_torchvision("inception_v3").preprocessing.size == (299, 299)

    @pytest.mark.parametrize("name", ["resnet_18", "fcn_resnet50"])
    def test_a_name_that_is_none_is_explained(self, name: str, run: Run) -> None:
        status, shown = run("--torchvision", name, "--layers", "auto", *RANDOM)
        assert status != 0
        assert "has no classifier" in shown
        assert "resnet" in shown.rpartition("has no classifier")[2].replace(repr(name), "")
