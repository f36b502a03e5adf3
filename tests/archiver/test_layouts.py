"""Which axis is which: layouts are found from what networks do, and turned maps are those that torch makes by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.maxvit import MaxVit
from torchvision.ops import Permute

from archiver.__main__ import main
from archiver.layouts import Layouts
from archiver.packing import ArchiveError
from archiver.trial import noise
from handlers import loading
from handlers.images.preprocessing import Preprocessing, to_input
from handlers.network.engines.torch_engine import TorchEngine
from handlers.network.layouts import map_shape, parse, to_maps
from handlers.pipeline import Pipeline
from handlers.settings import Settings
from handlers.wire import convscope_pb2 as wire
from tests.handlers.support import ask_json, ask_message, cells
from tests.pictures import npy
from tests.thorough import variants

INPUT = Preprocessing(3, 32, 32)

NETWORKS = """
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer


def swin():
    return SwinTransformer([4, 4], 12, [1, 1], [2, 2], [4, 4], num_classes=3, stochastic_depth_prob=0.0)


def vit():
    return VisionTransformer(32, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=16, num_classes=3)


class Cube(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.act = nn.GELU()
        self.fc = nn.Linear(8, 3)

    def forward(self, images):
        maps = self.conv(images)
        if maps.sum() < 1e9:  # A branch, so that nothing is known from the operations.
            maps = maps.permute(0, 2, 3, 1)
        return self.fc(self.act(maps)).mean((1, 2))
"""


def swin() -> nn.Module:
    return SwinTransformer([4, 4], 12, [1, 1], [2, 2], [4, 4], num_classes=3, stochastic_depth_prob=0.0)


def vit() -> nn.Module:
    network = VisionTransformer(32, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=16, num_classes=3)
    nn.init.normal_(network.heads[-1].weight)  # It begins at 0, where nothing depends on anything.
    return network


def maxvit() -> nn.Module:
    return MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=3)


def convnext() -> nn.Module:
    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=3)


def timm_vit(**more: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3, **more)


def channels_last(made: Tensor) -> Tensor:
    return made.permute(0, 3, 1, 2)


def channels_first(made: Tensor) -> Tensor:
    return made


def patches(side: int, first: int) -> Callable[[Tensor], Tensor]:
    def by_hand(made: Tensor) -> Tensor:
        rows = [made[:, first + row * side : first + (row + 1) * side] for row in range(side)]
        return torch.stack(rows, dim=1).permute(0, 3, 1, 2)

    return by_hand


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")  # torchvision's, of EfficientFormer's cache.
@pytest.mark.parametrize(
    ("make", "size", "module", "node", "layout", "by_hand"),
    variants(
        [
            (swin, 32, "features.1.0", "features.1.0.add_1", "channels_last", channels_last),
            (swin, 32, "features.3", "features.3.0.add_1", "channels_last", channels_last),
            (swin, 32, "features.0.0", "features.0.0", "", channels_first),
            (maxvit, 64, "blocks.0.layers.0", "blocks.0.layers.0.layers.grid_attention.departition_op.reshape_1", "",
             channels_first),
            (convnext, 32, "features.1.0.block.2", "features.1.0.block.2", "channels_last", channels_last),
            (convnext, 32, "features.3", "features.3.0.add", "", channels_first),
            (vit, 32, "encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_1.add_1", "tokens:4x4+1",
             patches(4, 1)),
            (vit, 32, "conv_proj", "conv_proj", "", channels_first),
            (timm_vit, 64, "blocks.1", "blocks.1.add_1", "tokens:4x4+1", patches(4, 1)),
            (lambda: timm_vit(class_token=False, global_pool="avg"), 64, "blocks.1", "blocks.1.add_1", "tokens:4x4+0",
             patches(4, 0)),
            (lambda: timm_vit(reg_tokens=4), 64, "blocks.0", "blocks.0.add_1", "tokens:4x4+5", patches(4, 5)),
        ],
        [
            (lambda: timm.create_model("convnext_atto", conv_mlp=False, num_classes=3), 64, "stages.1.blocks.1.mlp.fc1",
             "stages.1.blocks.1.mlp.fc1", "channels_last", channels_last),
            (lambda: timm.create_model("efficientformer_l1", num_classes=3), 224, "stages.3.blocks.4",
             "stages.3.blocks.4.add_1", "tokens:7x7+0", patches(7, 0)),
            (lambda: timm.create_model("efficientformer_l1", num_classes=3), 224, "stages.2", "stages.2.blocks.5.add_1",
             "", channels_first),
        ],
    ),
)  # fmt: skip
def test_a_layout_is_found_and_turns_the_networks_own_tensor(
    make: Callable[[], nn.Module], size: int, module: str, node: str, layout: str, by_hand: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    network = make().eval()
    preprocessing = Preprocessing(3, size, size)
    pictures = noise(preprocessing, 2)
    made: list[Tensor] = []
    handle = network.get_submodule(module).register_forward_hook(lambda *given: made.append(given[2].clone()))
    with torch.no_grad():
        network(pictures)
    handle.remove()
    found, unfit = Layouts(network, preprocessing).find([node])
    assert (found, unfit) == ({node: layout}, {})
    eager = TorchEngine(network, {"seen": node}, has_scores=True, layouts={"seen": layout} if layout else {})
    _, maps = eager.forward(pictures, frozenset(["seen"]))
    expected = by_hand(made[0])
    assert maps["seen"].shape == expected.shape
    assert torch.allclose(maps["seen"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "size", "node", "why"),
    [
        (maxvit, 64, "blocks.0.layers.0.layers.window_attention.add_1", "window_attention.add_1@channels_last"),
        (timm_vit, 64, "blocks.0.attn.q_norm", "blocks.0.attn.q_norm@channels_last"),
        (timm_vit, 64, "patch_embed.flatten", "--tokens HxW+N, or patch_embed.flatten@tokens:HxW+N"),
        (vit, 32, "expand", "--tokens HxW"),
    ],
)
def test_what_cannot_be_told_is_refused_with_what_would_say_it(
    make: Callable[[], nn.Module], size: int, node: str, why: str
) -> None:
    torch.manual_seed(0)
    found, unfit = Layouts(make().eval(), Preprocessing(3, size, size)).find([node])
    assert found == {}
    assert why in unfit[node]


def test_of_one_cell_the_axis_that_is_not_one_is_the_channels() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), Permute([0, 2, 3, 1])).eval()
    assert Layouts(network, INPUT).find(["1", "2"]) == ({"1": "", "2": "channels_last"}, {})


def test_tokens_are_no_grid_of_their_own_in_a_network_of_any_size() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 4, stride=4)
            self.norm = nn.LayerNorm(8)

        def forward(self, images: Tensor) -> Tensor:
            return self.norm(self.conv(images).flatten(2).transpose(1, 2)).mean(1)

    torch.manual_seed(0)
    assert Layouts(Patches().eval(), Preprocessing(3, 24, 40)).find(["norm"])[0] == {"norm": "tokens:6x10+0"}
    _, unfit = Layouts(Patches().eval(), Preprocessing(3, None, None)).find(["norm"])
    assert "give --size" in unfit["norm"]
    with pytest.raises(ArchiveError, match="give --size"):
        Layouts(Patches().eval(), Preprocessing(3, None, None), "8x8+0")


def test_a_grid_that_is_given_is_taken_and_one_that_is_wrong_is_not() -> None:
    torch.manual_seed(0)
    network, node = timm_vit().eval(), "blocks.1.add_1"
    preprocessing = Preprocessing(3, 64, 64)
    assert Layouts(network, preprocessing, "4x4+1").find([node])[0] == {node: "tokens:4x4+1"}
    unfit = Layouts(network, preprocessing, "2x8+1").find([node])[1]
    assert unfit[node].startswith("--tokens 2x8+1 does not fit: ")
    assert "leave --tokens out" in unfit[node]
    mixed = "blocks.0.attn.proj"  # Attention before it is added: every patch holds a little of every other.
    assert mixed in Layouts(network, preprocessing).find([mixed])[1]


def test_a_layout_is_read_and_what_does_not_fit_is_said() -> None:
    values = torch.arange(2 * 7 * 3.0).reshape(2, 7, 3)
    assert torch.equal(to_maps(values, "tokens:2x3+1")[1, :, 1, 0], values[1, 4])
    assert torch.equal(to_maps(values, "extra_tokens:2x3+1")[:, :, 0, 0], values[:, 0])
    assert torch.equal(to_maps(values, "extra_tokens:2x2+2")[1, :, :, 0], values[1, [0, 1, 6]].T)
    assert map_shape((7, 3), "extra_tokens:2x2+2") == (3, 3, 1)
    assert to_maps(values, "plane").shape == (2, 1, 7, 3)
    assert to_maps(values[:, 0], "vector").shape == (2, 3, 1, 1)
    for wrong in ("last", "tokens", "tokens:0x3+1", "channels_last:2x2+0", "tokens:2x3"):
        with pytest.raises(ValueError, match="is no layout"):
            parse(wrong)
    with pytest.raises(ValueError, match="4 axes"):
        to_maps(values, "channels_last")
    with pytest.raises(ValueError, match="more than the 7 tokens"):
        to_maps(values, "tokens:2x3+2")


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A function that archives one of `NETWORKS`, and returns status, what was said, and how to load it."""
    (tmp_path / "tall_networks.py").write_text(NETWORKS)
    (tmp_path / "classes.txt").write_text("cat\ndog\nship\n")

    def call(name: str, *arguments: str):
        own = ["--arch", f"{tmp_path / 'tall_networks.py'}:{name}", "--name", name.lower(), "--size", "32x32"]
        own += ["--classes", str(tmp_path / "classes.txt"), "--store", str(tmp_path)]
        weights = [] if "--state-dict" in arguments else ["--random-weights", "0"]
        status = main([*own, *weights, *arguments])
        said = capsys.readouterr()
        folder = tmp_path / name.lower()
        if status == 0:
            ZipFile(tmp_path / f"{name.lower()}.mar").extractall(folder)
            monkeypatch.syspath_prepend(folder)

        def load(engine: str) -> Pipeline:
            settings = Settings.from_environment({"CONVSCOPE_ENGINE": engine})
            kwargs: Any = {"config": {}, "batch_size": 1, "gpu": None, "settings": settings}
            return loading.load(folder, model=name.lower(), version="1.0", **kwargs)

        return status, said.out + said.err, load

    return call


def made_by(network: nn.Module, modules: Mapping[str, str], pixels: np.ndarray[Any, Any]) -> dict[str, Tensor]:
    """Return what modules make of a picture, from a plain forward pass, with gradients."""
    made: dict[str, Tensor] = {}
    for name, module in modules.items():
        network.get_submodule(module).register_forward_hook(lambda *given, name=name: made.update({name: given[2]}))
    made["logits"] = network(torch.from_numpy(to_input([pixels], INPUT)))
    return made


@pytest.mark.usefixtures("exporter")
def test_swin_is_served_with_channels_first(archive: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = swin().eval()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    status, said, load = archive(
        "swin", "--layers", "embed=features.0.2,deep=features.3.0.add_1", "--state-dict", str(tmp_path / "weights.pt")
    )
    assert status == 0, said
    assert "(channels_last)" in said
    for engine in ("torch", "onnxruntime"):
        service = load(engine)
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
        made = made_by(network, {"embed": "features.0.2", "deep": "features.3"}, pixels)
        message = wire.PredictRequest(pictures=[npy(pixels)], layers=["all"])
        reply = ask_message(service, message)
        for found in reply.results[0].maps:
            expected = made[found.layer].detach().permute(0, 3, 1, 2)[0].numpy()
            assert cells(found).shape == expected.shape
            assert np.allclose(cells(found), expected, atol=1e-4), found.layer
        [first, second] = ask_json(service, {"body": b""})["layers"]
        assert (first["layout"], first["shape"], first["stride"], first["receptive_field"]) == (
            "channels_last", [12, 8, 8], [4, 4], [4, 4],
        )  # fmt: skip
        assert (second["layout"], second["shape"], second["stride"]) == ("channels_last", [24, 4, 4], [])
        pooled = ask_message(service, wire.PredictRequest(pictures=[npy(pixels)], layers=["deep"], pool=1))
        means = made["deep"].detach().mean((1, 2))[0].numpy()
        assert np.allclose(cells(pooled.results[0].maps[0]), means, atol=1e-4)
        message.explain.method, message.explain.target = "grad_cam", 1
        heat = ask_message(service, message).results[0].explanation
        assert heat.layer == "deep"
        [gradient] = torch.autograd.grad(made["logits"][0, 1], made["deep"])
        weighed = (gradient.mean((1, 2), keepdim=True) * made["deep"]).sum(3).relu()[0].detach().numpy()
        assert np.allclose(cells_of(heat.heat), weighed[None], atol=1e-4)


def cells_of(tensor: wire.Tensor) -> np.ndarray[Any, Any]:
    return np.frombuffer(tensor.data, np.float32).reshape(tuple(tensor.shape))


@pytest.mark.usefixtures("exporter")
def test_patches_are_served_as_a_grid_and_the_class_token_beside_them(archive: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = vit().eval()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    status, said, load = archive("vit", "--layers", "auto", "--state-dict", str(tmp_path / "weights.pt"))
    assert status == 0, said
    card = json.loads((tmp_path / "vit/card.json").read_text())
    assert card["layouts"] == {
        f"block{number}{end}": f"{kind}:4x4+1"
        for number in (1, 2, 3)
        for end, kind in (("", "tokens"), (".extra", "extra_tokens"))
    }
    for engine in ("torch", "onnxruntime"):
        service = load(engine)
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
        blocks = {f"block{number}": f"encoder.layers.encoder_layer_{number - 1}" for number in (1, 2, 3)}
        made = made_by(network, blocks, pixels)
        message = wire.PredictRequest(pictures=[npy(pixels)], layers=["all"])
        maps = {found.layer: cells(found) for found in ask_message(service, message).results[0].maps}
        assert list(maps) == ["conv1", *(f"{name}{end}" for name in blocks for end in ("", ".extra"))]
        for name in blocks:
            tokens = made[name].detach()[0].numpy()  # (T, C)
            assert maps[name].shape == (16, 4, 4)
            assert np.allclose(maps[name][:, 2, 3], tokens[1 + 2 * 4 + 3], atol=1e-4)
            assert np.allclose(maps[name].reshape(16, 16), tokens[1:].T, atol=1e-4)
            assert maps[f"{name}.extra"].shape == (16, 1, 1)
            assert np.allclose(maps[f"{name}.extra"][:, 0, 0], tokens[0], atol=1e-4)
        layers = {layer["name"]: layer for layer in ask_json(service, {"body": b""})["layers"]}
        assert (layers["block1"]["layout"], layers["block1.extra"]["layout"]) == ("tokens", "extra_tokens")
        assert (layers["conv1"]["stride"], layers["conv1"]["receptive_field"]) == ([8, 8], [8, 8])
        assert layers["block1"]["receptive_field"] == []
        message.explain.method, message.explain.target = "grad_cam", 1
        explained = ask_message(service, message).results[0].explanation
        assert explained.layer == "block2", "the class needs only the class token of the last block"
        [gradient] = torch.autograd.grad(made["logits"][0, 1], made["block2"])
        weights = gradient[:, 1:].mean(1, keepdim=True)
        weighed = (weights * made["block2"][:, 1:]).sum(2).relu().reshape(4, 4).detach().numpy()
        assert np.allclose(cells_of(explained.heat), weighed[None], atol=1e-4)
        message.explain.layer = "block3"
        assert "earlier layer" in ask_message(service, message).results[0].error.message


def test_equal_sizes_do_not_hide_which_axis_is_which(archive: Any, tmp_path: Path) -> None:
    status, said, _ = archive("Cube", "--layers", "conv=conv,turned=act")
    assert status == 0, said
    assert json.loads((tmp_path / "cube/card.json").read_text())["layouts"] == {"turned": "channels_last"}
    assert archive("Cube", "--layers", "turned=act@channels_first")[0] == 0
    assert "layouts" not in json.loads((tmp_path / "cube/card.json").read_text())
    status, said, _ = archive("Cube", "--layers", "turned=act@tokens:2x2+0")
    assert status == 1
    assert "takes 3 axes" in said
    status, said, _ = archive("Cube", "--layers", "turned=act@tokens:2x2+0", "--size", "any")
    assert status == 1
    assert "give --size HxW" in said


def test_a_layout_that_is_none_is_explained(archive: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ("--layers", "a=act@sideways"),
        ("--layers", "a=act", "--tokens", "4"),
    ):
        with pytest.raises(SystemExit) as stop:
            archive("Cube", *arguments)
        assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "'sideways' is no layout" in said
    assert "neither HEIGHTxWIDTH" in said
