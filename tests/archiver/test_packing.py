"""The zip and what lies in it besides the network."""

import io
import json
import os
import stat
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from archiver import packing
from archiver.packing import ArchiveError
from archiver.weights import load_strictly

FILES = {"b.txt": b"two", "a/c.py": b"one = 1\n", "a/b.py": b""}


def test_the_order_of_files_does_not_change_the_bytes() -> None:
    assert packing.pack(FILES) == packing.pack(dict(reversed(FILES.items())))


def test_entries_are_sorted_stored_dated_1980_and_readable_by_everyone() -> None:
    with zipfile.ZipFile(io.BytesIO(packing.pack(FILES))) as archive:
        entries = archive.infolist()
    assert [entry.filename for entry in entries] == sorted([*FILES, packing.DIGESTS])
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {entry.compress_type for entry in entries} == {zipfile.ZIP_STORED}
    assert {stat.S_IMODE(entry.external_attr >> 16) for entry in entries} == {0o644}
    assert {entry.create_system for entry in entries} == {3}


def test_unpack_returns_what_was_packed(tmp_path: Path) -> None:
    packing.write(tmp_path / "deep" / "x.mar", packing.pack(FILES))
    assert packing.unpack(tmp_path / "deep" / "x.mar") == FILES


def test_the_list_of_digests_is_one_that_sha256sum_checks(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(packing.pack(FILES | {"größe.txt": b"3"}))) as archive:
        archive.extractall(tmp_path)
    command = ["sha256sum", "--check", "--strict", packing.DIGESTS]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout.count(": OK")) == (0, len(FILES) + 1), said.stderr
    with pytest.raises(ArchiveError, match="backslash"):
        packing.pack({"a\\b": b""})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"b.txt": b"TWO"}, r"'b\.txt' is not as its"),
        ({"more.py": b""}, r"'more\.py' is not as its"),
        ({"b.txt": None}, r"'b\.txt' is not as its"),
    ],
)
def test_files_that_are_not_those_of_the_list_are_refused(
    change: dict[str, bytes | None], words: str, tmp_path: Path
) -> None:
    with zipfile.ZipFile(io.BytesIO(packing.pack(FILES))) as archive:
        members = {entry.filename: archive.read(entry) for entry in archive.infolist()} | change
    with zipfile.ZipFile(tmp_path / "x.mar", "w") as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)
    with pytest.raises(ArchiveError, match=words):
        packing.unpack(tmp_path / "x.mar")


def test_a_file_that_is_no_zip_is_an_archive_error(tmp_path: Path) -> None:
    (tmp_path / "x.mar").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ArchiveError, match="cannot be read as an archive"):
        packing.unpack(tmp_path / "x.mar")


def test_a_written_archive_can_be_read_by_other_users_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        packing.write(tmp_path / "x.mar", b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.mar").stat().st_mode) == 0o644


def test_a_failed_write_leaves_the_old_archive_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing.write(tmp_path / "x.mar", b"old")

    def fail(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        packing.write(tmp_path / "x.mar", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_the_code_in_an_archive_is_the_package_and_its_entry_file_and_python_alone() -> None:
    files = packing.handler_files()
    assert files["convscope_entry.py"] == files["handlers/entry.py"]
    tree = {
        path.relative_to(packing.HANDLERS.parent).as_posix(): path.read_bytes()
        for path in packing.HANDLERS.rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert {name: content for name, content in files.items() if name != "convscope_entry.py"} == tree
    assert all(name.endswith(".py") for name in files)


def test_the_manifest_says_what_torchserve_asks_for() -> None:
    content = json.loads(packing.manifest("cifar", "2.1"))
    assert content["model"] == {
        "modelName": "cifar",
        "handler": "convscope_entry.py",
        "modelVersion": "2.1",
        "configFile": "model-config.yaml",
    }
    assert content["runtime"] == "python"
    assert content["createdOn"]
    assert content["archiverVersion"] == "0.12.0"


def test_the_settings_differ_from_the_committed_file_in_the_batch_size_alone() -> None:
    committed = yaml.safe_load((packing.HANDLERS / packing.CONFIG).read_text())
    filled = yaml.safe_load(packing.model_config(7))
    assert filled == committed | {"batchSize": 7}
    assert filled["maxBatchDelay"] == 1
    assert "minWorkers" not in filled, "it would override the number of workers the server was started with"


def test_the_settings_hold_the_limits_the_handler_reads() -> None:
    from handlers.api.limits import Limits

    limits = Limits.of(yaml.safe_load(packing.model_config(1)), batch_size=1)
    assert (limits.max_images, limits.max_image_bytes, limits.max_image_pixels) == (64, 16 * 2**20, 16_000_000)


def test_settings_without_one_batch_size_line_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "HANDLERS", tmp_path)
    (tmp_path / packing.CONFIG).write_text("maxBatchDelay: 1\n")
    with pytest.raises(ArchiveError, match="exactly one line"):
        packing.model_config(2)


def test_weights_are_the_same_bytes_whatever_the_order_strides_and_sharing_of_the_tensors() -> None:
    base = torch.arange(12.0).view(3, 4)
    plain = {"a": base.clone(), "b": base[1].clone()}
    odd = {"b": base[1], "a": torch.nn.Parameter(base.t().contiguous().t())}  # A view, transposed memory, a gradient.
    assert not odd["a"].is_contiguous()
    assert packing.weights(odd) == packing.weights(plain)


def test_weights_keep_every_value_and_dtype() -> None:
    numbers = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8)
    state = {str(kind): (10 * numbers).to(kind) for kind in (*kinds, torch.bool, torch.complex64)}
    state |= {"count": torch.tensor(3), "empty": torch.empty(0, 3), "module._extra_state": torch.arange(3)}
    loaded = packing.read_weights(packing.weights(state))
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)


def test_a_network_that_ties_its_weights_gets_them_back_tied() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.there = torch.nn.Linear(4, 4)
            self.back = torch.nn.Linear(4, 4)
            self.back.weight = self.there.weight

    network, other = Tied(), Tied()
    load_strictly(other, packing.read_weights(packing.weights(network.state_dict())))
    assert other.back.weight is other.there.weight
    assert torch.equal(other.back.weight, network.there.weight)


def test_weights_hold_no_more_than_their_tensors() -> None:
    small = torch.zeros(1_000_000)[:10]
    assert len(packing.weights({"small": small})) < 5_000


def test_a_state_dict_with_more_than_tensors_is_refused() -> None:
    with pytest.raises(ArchiveError, match=r"more than tensors: module\._extra_state"):
        packing.weights({"module._extra_state": {"version": 1}})


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.eye(3).to_sparse(), id="sparse"),
        pytest.param(torch.ones(3, dtype=torch.complex128), id="complex128"),
    ],
)
def test_tensors_that_the_format_does_not_have_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ArchiveError, match="safetensors"):
        packing.weights({"odd": tensor})


def test_damaged_weights_are_refused() -> None:
    content = packing.weights({"x": torch.ones(5)})
    for damaged in (b"", content[:9], content[:-1], content + b"0", b"\xff" * 20, content.replace(b"F32", b"F99")):
        with pytest.raises(ArchiveError, match=r"weights\.safetensors is damaged"):
            packing.read_weights(damaged)
