"""The bill of materials of an archive: what is in it, and valid CycloneDX."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from archiver import packing
from archiver.sbom import main
from archiver.store import STORE
from handlers.network.archive import CARD, WEIGHTS

PACKAGES = {
    "toy_nets-1.2.dist-info/METADATA": b"Metadata-Version: 2.1\nName: toy-nets\nVersion: 1.2\nLicense: Toy Licence\n",
    "more-3.dist-info/METADATA": b"Name: more\nVersion: 3\nLicense-Expression: MIT OR Apache-2.0\nLicense: other\n",
    "old-0.1.dist-info/METADATA": b"Name: old\nVersion: 0.1\nClassifier: License :: OSI Approved :: MIT License\n",
    "bare-2.dist-info/METADATA": b"Name: bare\nVersion: 2\n",
}


def read(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return the bill, which is valid."""
    assert main([str(path)]) == 0
    text = capsys.readouterr().out
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found: dict[str, Any] = json.loads(text)
    return found


def test_it_names_the_model_its_files_and_what_exported_it(capsys: pytest.CaptureFixture[str]) -> None:
    path = STORE / "cifar.mar"
    found, files = read(path, capsys), packing.unpack(path)
    card = json.loads(files[CARD])
    model = found["metadata"]["component"]
    assert (model["type"], model["name"], model["version"]) == ("machine-learning-model", "cifar", card["version"])
    assert model["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(path.read_bytes()).hexdigest()}]
    parts = {part["name"]: part for part in found["components"]}
    assert parts.keys() == files.keys()
    assert parts[WEIGHTS]["hashes"][0]["content"] == hashlib.sha256(files[WEIGHTS]).hexdigest()
    tools = {tool["name"]: tool["version"] for tool in found["metadata"]["tools"]["components"]}
    assert tools == card["graph"]["versions"]
    assert {"torch", "onnx"} <= tools.keys()


def test_it_names_packages_that_travel_with_their_licences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "own.mar"
    path.write_bytes(packing.pack(packing.unpack(STORE / "edges.mar") | PACKAGES))
    parts = {part["name"]: part for part in read(path, capsys)["components"] if part["type"] == "library"}
    assert {name: part["purl"] for name, part in parts.items()} == {
        "toy-nets": "pkg:pypi/toy-nets@1.2",
        "more": "pkg:pypi/more@3",
        "old": "pkg:pypi/old@0.1",
        "bare": "pkg:pypi/bare@2",
    }
    assert parts["more"]["licenses"] == [{"expression": "MIT OR Apache-2.0"}]
    assert parts["toy-nets"]["licenses"] == [{"license": {"name": "Toy Licence"}}]
    assert parts["old"]["licenses"] == [{"license": {"name": "MIT License"}}]
    assert "licenses" not in parts["bare"]


def test_what_is_no_archive_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.mar").write_bytes(b"no zip")
    (tmp_path / "zip.mar").write_bytes(packing.pack({"a": b""}))
    for name, words in (("no.mar", "cannot be read as an archive"), ("zip.mar", "holds no card.json")):
        assert main([str(tmp_path / name)]) == 1
        assert words in capsys.readouterr().err
