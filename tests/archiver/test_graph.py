"""Archives with a graph for ONNX Runtime: small, the same each time, proven, kept, or left out with a reason."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from archiver import packing, sbom
from archiver.__main__ import main
from archiver.contents import Contents, from_checkpoint, from_files
from archiver.graph import with_engine
from archiver.packing import ArchiveError
from archiver.store import STORE
from archiver.trial import noise
from handlers.network.archive import CARD, GRAPH, WEIGHTS
from tests.archiver.conftest import NET

ROOT = packing.HANDLERS.parent
Checkpoint = Callable[..., Path]
Exported = Callable[..., Contents]


def test_the_committed_archives_have_a_graph_that_is_small() -> None:
    for path in STORE.glob("*.mar"):
        files = packing.unpack(path)
        assert GRAPH in files, f"{path.name}: python -m archiver --refresh --engine onnx"
        assert len(files[GRAPH]) < 10_000 + len(files[WEIGHTS]) // 20


def test_without_the_packages_there_is_no_graph_and_a_reason(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint("simple")
    assert main(["--checkpoint", str(source), "--store", str(tmp_path)]) == 0
    assert "torch alone" in capsys.readouterr().out
    files = packing.unpack(tmp_path / "simple.mar")
    assert GRAPH not in files
    assert "graph" not in json.loads(files[CARD])
    assert main(["--checkpoint", str(source), "--store", str(tmp_path), "--engine", "onnx"]) == 1
    assert "not installed here" in capsys.readouterr().err


def test_an_archive_whose_card_and_files_disagree_is_refused() -> None:
    files = packing.unpack(next(STORE.glob("*.mar")))
    with pytest.raises(ArchiveError, match="disagree"):
        from_files({name: content for name, content in files.items() if name != GRAPH})


def test_leaving_the_graph_out_leaves_no_trace(checkpoint: Checkpoint) -> None:
    contents = from_checkpoint(checkpoint("simple"), "1.0")
    assert with_engine(contents, "torch")[0] == contents
    kept = from_files(packing.unpack(STORE / "simple.mar"))
    bare = with_engine(kept, "torch")[0]
    assert (bare.graph, "graph" in bare.card) == (None, False)
    assert bare.weights == kept.weights


@pytest.mark.usefixtures("exporter")
class TestExporting:
    def test_other_checkouts_processes_folders_and_umasks_give_the_same_bytes(
        self, exported: Exported, checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A copy of the checkout with other times, run elsewhere, against the archive made in this process."""
        here = tmp_path / "simple.mar"
        here.write_bytes(packing.pack(exported().files()))
        copy = tmp_path / "checkout"
        for room in ("handlers", "archiver"):
            shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
        for path in copy.rglob("*"):
            os.utime(path, (1_000_000_000, 1_000_000_000))
            path.chmod(0o700)
        elsewhere = shutil.copy(checkpoint("simple"), tmp_path / "renamed.pt")
        options = ["--checkpoint", str(elsewhere), "--engine", "onnx", "--store", "there"]
        made = tmp_path / "cwd/there/simple.mar"
        code = f"""
            import contextlib, io, os
            os.umask(0o077)
            from archiver import __main__, sbom
            with contextlib.redirect_stdout(io.StringIO()):
                assert __main__.main({options}) == 0
            assert sbom.main([{str(made)!r}]) == 0
        """
        environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
        (tmp_path / "cwd").mkdir()
        command = [sys.executable, "-c", textwrap.dedent(code)]
        bill = subprocess.run(command, cwd=tmp_path / "cwd", env=environment, check=True, capture_output=True).stdout
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (made, here)]
        assert digests[0] == digests[1]
        assert sbom.main([str(here)]) == 0
        assert capsys.readouterr().out.encode() == bill

    def test_nothing_of_this_machine_is_in_it(self, exported: Exported) -> None:
        content = exported().graph
        assert content is not None
        assert str(packing.HANDLERS.parent).encode() not in content
        assert b".py" not in content

    def test_what_was_proven_before_the_export_is_not_proven_again(self, exported: Exported) -> None:
        passes = []
        handle = register_module_forward_hook(lambda *_: passes.append(1))
        try:
            files = exported().files()
            assert not passes
            from_files(files).files()  # What comes from elsewhere is.
        finally:
            handle.remove()
        assert passes

    def test_refreshing_keeps_it_and_drops_or_exports_it_when_told(self, exported: Exported, tmp_path: Path) -> None:
        path, files = tmp_path / "simple.mar", exported().files()
        fresh = packing.pack(files)
        path.write_bytes(packing.pack(files | {"handlers/api/errors.py": b""}))
        assert main(["--refresh", "--store", str(tmp_path)]) == 0
        assert path.read_bytes() == fresh
        assert main(["--refresh", "--engine", "torch", "--store", str(tmp_path)]) == 0
        assert GRAPH not in packing.unpack(path)
        assert main(["--check", "--store", str(tmp_path)]) == 0
        assert main(["--refresh", "--engine", "onnx", "--store", str(tmp_path)]) == 0
        assert path.read_bytes() == fresh

    def test_a_graph_that_does_something_else_is_found_out(self, exported: Exported) -> None:
        files = exported().files()
        assert files[GRAPH].count(b"MaxPool") == 2
        other = files | {GRAPH: files[GRAPH].replace(b"MaxPool", b"LpPool_")}
        with pytest.raises(ArchiveError, match="does not do what the network does"):
            from_files(other).files()

    def test_one_node_under_two_names_and_as_the_scores(self, net_file: Path, tmp_path: Path) -> None:
        classes = tmp_path / "classes.txt"
        classes.write_text("a\nb\nc\n")
        layers = ["--layers", "one=relu,two=relu,raw=conv"]
        options = ["--arch", f"{net_file}:Net", "--name", "own", "--random-weights", "3", "--size", "16x16", *layers]
        options += ["--engine", "onnx", "--classes", str(classes), "--store", str(tmp_path)]
        assert main(options) == 0

    def test_a_network_of_any_size_is_proven_on_two(self, checkpoint: Checkpoint) -> None:
        contents, said = with_engine(from_checkpoint(checkpoint("edges"), "1.0"), "onnx")
        assert contents.graph is not None
        assert said.startswith("ONNX Runtime")

    def test_what_cannot_be_exported_is_served_by_torch_and_said_so(
        self, net_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        net_file.write_text(NET.replace(".mean((2, 3))", ".mean((2, 3)) * float(images.numpy().size > 0)"))
        options = ["--arch", f"{net_file}:Net", "--name", "own", "--random-weights", "3", "--size", "16x16"]
        options += ["--layers", "conv1=relu", "--store", str(tmp_path)]
        assert main(options) == 0
        assert "torch alone: the network cannot be exported" in capsys.readouterr().out
        assert GRAPH not in packing.unpack(tmp_path / "own.mar")
        assert main([*options, "--engine", "onnx"]) == 1
        assert "cannot be exported" in capsys.readouterr().err

    @pytest.mark.parametrize("half", [False, True])
    def test_it_is_a_complete_model_with_its_weights_in_the_archives_file(
        self, half: bool, exported: Exported, tmp_path: Path
    ) -> None:
        """Whatever reads ONNX loads it from its path, with no help of ours."""
        import onnx
        import onnxruntime

        contents = exported(half=half)
        files = contents.files()
        assert len(files[GRAPH]) < len(files[WEIGHTS]) / 50
        for name in (GRAPH, WEIGHTS):
            (tmp_path / name).write_bytes(files[name])
        path = tmp_path / GRAPH
        onnx.checker.check_model(path)
        model = onnx.load(path)
        state = packing.read_weights(files[WEIGHTS])
        loaded = {
            item.name.removeprefix("/weights/"): onnx.numpy_helper.to_array(item) for item in model.graph.initializer
        }
        assert state.keys() <= loaded.keys()
        assert all(np.array_equal(loaded[name], value.numpy()) for name, value in state.items())
        session = onnxruntime.InferenceSession(path)
        picture = noise(contents.preprocessing, 2)
        with contents.network() as network, torch.no_grad():
            expected = network(picture)
        found = session.run(None, {"images": picture.numpy()})[0]
        assert np.abs(found - expected.numpy()).max() <= 1e-5 * expected.abs().max()
