"""The table of networks: its reference is independent, and what is served wrongly is found."""

from __future__ import annotations

import ast
import contextlib
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from benchmarks.networks import __main__ as command
from benchmarks.networks import reference, table
from benchmarks.networks.cases import CASES, OWN

ROOT = Path(__file__).parents[2]


def test_the_reference_knows_torch_torchvision_and_timm_alone() -> None:
    imported = set()
    for path in (Path(reference.__file__), *OWN.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).split(".")[0])
    beside = imported - sys.stdlib_module_names - {path.stem for path in OWN.iterdir()}
    assert beside == {"torch", "torchvision", "timm", "numpy", "PIL"}


def test_there_are_at_least_forty_networks_each_named_once() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 40
    assert {case.family for case in CASES} == {"torchvision", "timm", "own"}


class Residual(nn.Module):
    """One ReLU twice, an operation without a module, one in place, names that end in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()
        self.norm_1, self.norm_2 = nn.BatchNorm2d(3), nn.InstanceNorm2d(3)
        self.tail = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.relu(self.conv(images)) + images
        maps += 2 * self.norm_2(self.norm_1(images))
        return self.tail(self.relu(maps)).mul(3)


def test_hooks_find_what_a_trace_finds_under_the_same_names() -> None:
    torch.manual_seed(0)
    network, images = Residual().eval(), torch.rand(1, 3, 8, 8)
    nodes = set(get_graph_node_names(network)[1]) - {"images"}
    assert {"relu_1", "add", "add_1", "tail.1", "mul_1", "norm", "norm_1"} <= nodes
    _, found = reference.look(network, images, nodes)
    with torch.no_grad():
        expected = create_feature_extractor(network, sorted(nodes))(images)
    for node in nodes:
        torch.testing.assert_close(found[node], expected[node])


@pytest.mark.parametrize(
    ("layout", "shape", "beside"),
    [
        ("channels first", (1, 6, 2, 2), False),
        ("channels last", (1, 2, 2, 6), False),
        ("tokens, 0 before the patches", (1, 4, 6), False),
        ("tokens, 1 before the patches", (1, 5, 6), False),
        ("tokens, 2 before the patches", (1, 6, 6), True),
    ],
)
def test_every_layout_is_turned_to_channels_rows_and_columns(layout: str, shape: tuple[int, ...], beside: bool) -> None:
    made = torch.arange(float(np.prod(shape))).reshape(shape)
    turned = reference._as_map(made, layout, beside=beside)
    assert turned.shape == ((6, 2, 1) if beside else (6, 2, 2))
    if layout == "channels last":
        assert turned[5, 1, 0] == made[0, 1, 0, 5]
    if layout == "tokens, 1 before the patches":
        assert turned[5, 1, 0] == made[0, 3, 5]
    if beside:
        assert turned[5, 1, 0] == made[0, 1, 5]


def test_zeroed_branches_and_heads_of_random_networks_are_drawn() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))
    nn.init.zeros_(network[1].weight)
    nn.init.zeros_(network[3].weight)
    images = torch.rand(8, 3, 5, 5)
    reference.calibrate(network, [images])
    normalised = network[:2](images) / network[1].weight.view(1, 4, 1, 1)
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    assert not network.training
    assert (network(images).std(0) > 0).all()


LIGHTNING = replace(next(case for case in CASES if case.name == "lightning"), size=(48, 64))  # Small: seconds less.


class InThisProcess:
    """The reference without a process of its own."""

    def ask(self, do: str, case: Any, folder: Path, pictures: Any, **more: Any) -> dict[str, Any]:
        function = {"prepare": reference.prepare, "expect": reference.expect}[do]
        return function(asdict(case), folder, [str(one) for one in pictures], **more)  # type: ignore[operator]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Path]]:
    """A network's folder, in which what was served is what the reference computes; its row and the pictures."""
    work = tmp_path_factory.mktemp("work")
    pictures = command.draw_pictures(work / "pictures")[3]
    case, folder = LIGHTNING, work / LIGHTNING.name
    folder.mkdir()
    sys.path.insert(0, str(OWN))
    try:
        InThisProcess().ask("prepare", case, folder, pictures)
        row = {"layers": {"conv1": "features.2", "conv2": "features.5"}, "beside": [], "last": "conv2"}
        recipe = reference.recipe_of(asdict(case), nn.Module())
        pixels = {f"pixels/{number}": recipe.pixels(str(path)) for number, path in enumerate(pictures)}
        np.savez(folder / "served.npz", **pixels)
        InThisProcess().ask("expect", case, folder, pictures, **row)
    finally:
        sys.path.remove(str(OWN))
    computed = np.load(folder / "expected.npz")
    np.savez(
        folder / "served.npz",
        **{name.removeprefix("same/"): computed[name] for name in computed if name.startswith("same/")},
    )
    return folder, row, pictures


@pytest.mark.parametrize(
    ("array", "change", "fault"),
    [
        ("", None, ""),
        ("pixels/1", lambda pixels: np.clip(pixels + 3 / 255, 0, 1), "pixels are off by 3 levels"),
        ("maps/conv1/0", lambda maps: maps[::-1], "maps are off"),
        ("maps/conv2/2", lambda maps: maps * 1.001, "maps are off"),
        ("scores/0", lambda scores: scores[::-1], "first five classes are others"),
        ("probabilities/0", lambda values: np.full_like(values, values.mean()), "probabilities are off"),
        ("pooled", lambda maps: maps.transpose(0, 2, 1), "pooled are off"),
    ],
)
def test_what_is_served_wrongly_is_a_fault(
    array: str,
    change: Any,
    fault: str,
    served: tuple[Path, dict[str, Any], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    folder, row, pictures = served
    monkeypatch.setattr(command, "WORK", tmp_path)
    monkeypatch.syspath_prepend(OWN)
    copy = tmp_path / folder.name
    copy.mkdir()
    (copy / "weights.pt").write_bytes((folder / "weights.pt").read_bytes())
    arrays = dict(np.load(folder / "served.npz"))
    if array:
        arrays[array] = change(arrays[array])
    np.savez(copy / "served.npz", **arrays)
    found = command.compare(LIGHTNING, row, InThisProcess(), pictures)  # type: ignore[arg-type]
    assert (fault in found["fault"]) if fault else (found["fault"] == "")


def test_a_run_that_was_interrupted_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document = tmp_path / "docs/networks.md"
    document.parent.mkdir()
    document.write_text(f"{table.BEGIN}\n{table.END}\n")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "WORK", tmp_path / "work")
    monkeypatch.setattr(command, "RESULTS", tmp_path / "networks.json")
    monkeypatch.setattr(command, "_Reference", contextlib.nullcontext)
    asked: list[str] = []
    ends_after = 2 * command.GROUP

    def run_group(group: Any, *_: Any) -> dict[str, Any]:
        if len(asked) == ends_after:
            raise KeyboardInterrupt
        asked.extend(case.name for case in group)
        row = {"archived": False, "refusal": "", "fault": "it failed", "verdict": "it failed"}
        return {case.name: row for case in group}

    monkeypatch.setattr(command, "run_group", run_group)
    with pytest.raises(KeyboardInterrupt):
        command.main([])
    assert "it failed" not in document.read_text()
    ends_after = -1
    assert command.main([]) == 1
    assert asked == [case.name for case in CASES]
    assert document.read_text().count("it failed") == len(CASES)
    asked.clear()
    assert command.main(["--only", "unet"]) == 1
    assert asked == ["unet"]
    assert document.read_text().count("it failed") == len(CASES)


def test_the_table_stands_between_its_markers(tmp_path: Path) -> None:
    document = tmp_path / "networks.md"
    document.write_text(f"before\n\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    good = {
        **{"family": "own", "archived": True, "refusal": "", "fault": "", "verdict": "served", "seconds": 12.3},
        **{"weights_mb": 1.25, "archive_mb": 1.5, "layouts": {"channels last": 2}, "engine": "onnxruntime-1.2"},
        **{"preprocessing": {"channels": 3, "height": 64, "width": 48}, "pixels": 0.0, "pictures": 3},
        **{"own_scores": 1e-3, "own_maps": 2e-3, "same_scores": 1e-7, "same_maps": 2e-7, "own_top5": 3},
    }
    bad = {"archived": False, "refusal": "", "fault": "not archived: why", "verdict": "not archived: why"}
    table.write_table({"good": good, "bad": bad}, tmp_path / "networks.json", document)
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| `good` | 12 | 1.2 | 1.5 | 64×48, bilinear | 2 channels last | onnxruntime | 0 |" in text
    assert "| 3 of 3 |" in text
    assert "| `bad` | not archived: why |" in text
    assert "1 at fault: bad" in text


def test_the_document_has_the_markers() -> None:
    text = (ROOT / "docs/networks.md").read_text("utf-8")
    assert text.index(table.BEGIN) < text.index(table.END)
