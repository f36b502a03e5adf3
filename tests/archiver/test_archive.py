"""Archives of checkpoints: what is in them, that they are the same each time, and that stale ones are found."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
import yaml

from archiver import packing
from archiver.__main__ import main
from archiver.contents import from_checkpoint
from archiver.packing import ArchiveError
from archiver.store import STORE, build, check, sign

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def built(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of `simple`."""
    return build(from_checkpoint(checkpoint("simple"), "3.2"), tmp_path_factory.mktemp("store"))


@pytest.fixture
def archive(built: Path, tmp_path: Path) -> Path:
    """A copy of it, alone in its store."""
    (tmp_path / "store").mkdir()
    return Path(shutil.copy(built, tmp_path / "store"))


def rewrite(path: Path, **changes: bytes | None) -> None:
    """Change files of an archive; `None` removes one."""
    files = packing.unpack(path) | changes
    path.write_bytes(packing.pack({name: content for name, content in files.items() if content is not None}))


def test_the_committed_archives_hold_todays_handlers() -> None:
    assert check() == []


def test_the_four_networks_are_committed() -> None:
    assert {"edges", "digits", "simple", "cifar", "flat", "deep"} <= {path.stem for path in STORE.glob("*.mar")}


def test_an_archive_holds_code_card_weights_settings_and_manifest_and_nothing_else(archive: Path) -> None:
    files = packing.unpack(archive)
    code = packing.handler_files()
    assert {name: files[name] for name in code} == code
    assert files.keys() - code.keys() == {
        "MAR-INF/MANIFEST.json",
        "card.json",
        "weights.safetensors",
        "reference.safetensors",
        "model-config.yaml",
    }


def test_the_card_carries_the_checkpoints_facts_without_history_or_optimizer(archive: Path) -> None:
    card = json.loads(packing.unpack(archive)["card.json"])
    assert list(card) == [
        *("format", "model", "version", "description", "architecture", "arguments", "classes"),
        *("preprocessing", "layers", "training", "network"),
    ]
    assert card["architecture"] == "handlers.networks.simple:Simple"
    assert card["layers"].keys() == {"conv1", "conv2"}
    assert card["training"] == {"data": "none", "epochs": 0, "seed": 0, "seconds": 0.0}


def test_the_handler_loads_what_was_packed(archive: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    from handlers.network.archive import load

    ZipFile(archive).extractall(tmp_path / "unpacked")
    bundle = load(tmp_path / "unpacked")
    trained = torch.load(checkpoint("simple"), weights_only=True)["state_dict"]
    loaded = bundle.module.state_dict()
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)


@pytest.mark.parametrize(("model", "expected"), [("edges", 1), ("digits", 8), ("simple", 8), ("cifar", 7), ("flat", 8)])
def test_the_batch_size_is_chosen_from_the_maps(model: str, expected: int) -> None:
    """Of the committed archives, which are what a build makes today."""
    files = packing.unpack(STORE / f"{model}.mar")
    assert yaml.safe_load(files["model-config.yaml"])["batchSize"] == expected


def test_an_empty_store_does_not_pass_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--store", str(tmp_path)]) == 1
    assert "holds no archive" in capsys.readouterr().err


def test_the_check_names_what_is_stale_and_how_to_rebuild(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ["--store", str(archive.parent)]
    assert main(["--check", *store]) == 0
    assert capsys.readouterr().err == ""
    rewrite(
        archive,
        **{"handlers/api/errors.py": b"old = True\n", "handlers/api/limits.py": None, "handlers/gone.py": b""},
        **{"convscope_entry.py": b"", "model-config.yaml": b"batchSize: 1\n", packing.MANIFEST: b"{}"},
    )
    others = {
        "weights of another network.mar": {"weights.safetensors": packing.weights({})},
        "not ours.mar": {"card.json": None},
    }
    for name, changes in others.items():
        rewrite(Path(shutil.copy(archive, archive.with_name(name))), **changes)
    assert main(["--check", *store]) == 1
    *lines, last = capsys.readouterr().err.splitlines()
    assert "--refresh" in last
    assert [line for line in lines if line.startswith("simple.mar")] == [
        "simple.mar: handlers/api/limits.py is missing",
        "simple.mar: handlers/gone.py is no longer part of it",
        *(
            f"simple.mar: {name} differs"
            for name in (packing.MANIFEST, "convscope_entry.py", "handlers/api/errors.py", "model-config.yaml")
        ),
    ]
    assert lines[0].startswith("not ours.mar: cannot be rebuilt: it holds no card.json")
    assert lines[-1].startswith("weights of another network.mar: cannot be rebuilt: ")


def test_an_archive_zipped_by_something_else_is_stale(archive: Path) -> None:
    files = packing.unpack(archive)
    with ZipFile(archive, "w", ZIP_DEFLATED) as again:
        for name, content in files.items():
            again.writestr(name, content)
    assert check(archive.parent) == [
        "simple.mar: the files agree, but the zip around them was written by something else"
    ]


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen (OpenSSH's client)")
def test_what_is_written_is_signed_where_a_key_is_given(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, store = tmp_path / "key", tmp_path / "store"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    made = ["--checkpoint", str(checkpoint("edges")), "--store", str(store), "--engine", "torch", "--quiet"]
    assert main([*made, "--sign", str(key)]) == 0

    def is_signed() -> bool:
        command = ["ssh-keygen", "-Y", "check-novalidate", "-n", "convscope", "-s", store / "edges.mar.sig"]
        return subprocess.run(command, input=(store / "edges.mar").read_bytes(), check=False).returncode == 0

    assert is_signed()
    rewrite(store / "edges.mar", **{"handlers/gone.py": b""})
    sign(store / "edges.mar", key)
    capsys.readouterr()
    assert main(["--refresh", "--store", str(store)]) == 0
    said = "edges.mar: rewritten; edges.mar.sig is of the archive before: --sign KEY signs it again\n"
    assert capsys.readouterr().out == said
    assert not is_signed()
    assert main(["--refresh", "--store", str(store), "--sign", str(key)]) == 0
    assert capsys.readouterr().out == "edges.mar: up to date, signed in edges.mar.sig\n"
    assert is_signed()
    assert main(["--refresh", "--store", str(store), "--sign", str(tmp_path / "none")]) == 1
    assert "edges.mar cannot be signed with" in capsys.readouterr().err


def test_a_refreshed_archive_is_the_fresh_one_byte_for_byte(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fresh = archive.read_bytes()
    rewrite(archive, **{"handlers/api/errors.py": b"old = True\n", "convscope_entry.py": None, "handlers/gone.py": b""})
    assert main(["--refresh", "--store", str(archive.parent)]) == 0
    assert capsys.readouterr().out == "simple.mar: rewritten\n"
    assert archive.read_bytes() == fresh
    assert main(["--refresh", "--store", str(archive.parent)]) == 0
    assert capsys.readouterr().out == "simple.mar: up to date\n"
    assert json.loads(packing.unpack(archive)["MAR-INF/MANIFEST.json"])["model"]["modelVersion"] == "3.2"


def test_refreshing_an_empty_store_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--refresh", "--store", str(tmp_path)]) == 1
    assert "holds no archive" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"format": 2}, "no checkpoint of training.train", id="format"),
        pytest.param({"classes": ["cat"]}, "1 classes need", id="classes"),
        pytest.param({"layers": {"conv1": "conv7"}}, "no node 'conv7'", id="layer"),
        pytest.param({"layers": {"all": "conv1"}}, "cannot be a layer's public name", id="reserved name"),
        pytest.param({"model": "a/b"}, "cannot be a model", id="name"),
        pytest.param({"state_dict": {}}, "weights do not fit", id="weights"),
        pytest.param({"arguments": {"depth": 9}}, "depth", id="arguments"),
    ],
)
def test_a_checkpoint_that_makes_no_model_is_refused_and_nothing_written(
    changes: dict[str, object], message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(ArchiveError, match=message):
        build(from_checkpoint(checkpoint("simple", **changes), "1.0"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_its_classes_says_so(tmp_path: Path) -> None:
    torch.save({"format": 1, "model": "simple"}, tmp_path / "checkpoint.pt")
    with pytest.raises(ArchiveError, match=r"incomplete checkpoint.*classes"):
        from_checkpoint(tmp_path / "checkpoint.pt", "1.0")
