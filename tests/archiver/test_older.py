"""Older archives, whose weights were pickled and whose graph named no place in them: refreshed to today's."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto

from archiver import packing
from archiver.__main__ import main
from archiver.contents import Contents, from_checkpoint
from archiver.store import build
from handlers.network.archive import CARD, GRAPH, WEIGHTS

Checkpoint = Callable[..., Path]


def as_it_was(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return an archive of today as an older one held it."""
    found = dict(files)
    state = dict(sorted(packing.read_weights(found.pop(WEIGHTS)).items()))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    found["weights.pt"] = buffer.getvalue()
    if GRAPH in found:
        model = onnx.load_from_string(found[GRAPH])
        names = []
        for item in model.graph.initializer:
            if item.data_location == TensorProto.EXTERNAL:
                name = item.name.removeprefix("/weights/")
                if name != item.name:
                    item.data_type = TensorProto.FLOAT
                item.name = name
                del item.external_data[:]
                item.external_data.add(key="location", value="weights.pt")
                names.append(name)
        kept = [node for node in model.graph.node if not any(name.startswith("/weights/") for name in node.input)]
        del model.graph.node[:]
        model.graph.node.extend(kept)
        card = json.loads(found[CARD])
        card["graph"] = {"weights": sorted(names), **card["graph"]}
        found[GRAPH], found[CARD] = model.SerializeToString(deterministic=True), packing.to_json(card)
    return found


@pytest.mark.parametrize("half", [False, True])
def test_an_archive_with_a_graph(half: bool, exported: Callable[..., Contents], tmp_path: Path) -> None:
    files = exported(half=half).files()
    path = tmp_path / "simple.mar"
    path.write_bytes(packing.pack(as_it_was(files)))
    assert main(["--check", "--store", str(tmp_path)]) == 1
    assert main(["--refresh", "--store", str(tmp_path)]) == 0
    assert path.read_bytes() == packing.pack(files)


def test_an_archive_without_a_graph(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = build(from_checkpoint(checkpoint("edges"), "1.0"), tmp_path)
    today = path.read_bytes()
    path.write_bytes(packing.pack(as_it_was(packing.unpack(path))))
    assert main(["--refresh", "--store", str(tmp_path)]) == 0
    assert path.read_bytes() == today


def test_no_code_in_its_weights_is_run(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    path = build(from_checkpoint(checkpoint("edges"), "1.0"), tmp_path)
    files = packing.unpack(path)
    del files[WEIGHTS]
    buffer = io.BytesIO()
    torch.save({"conv1.weight": Attack()}, buffer)
    path.write_bytes(packing.pack(files | {"weights.pt": buffer.getvalue()}))
    assert main(["--refresh", "--store", str(tmp_path)]) == 1
    assert "weights.pt is damaged" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
