"""The committed bundle of the page is what its sources and the lock file give."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.harness import ROOT

WEB, PACKAGE = ROOT / "lens/web", ROOT / "lens/src/convscope_lens/_page"


def test_the_committed_bundle_is_what_the_sources_give(tmp_path: Path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node: the bundle of lens/web was not built again")
    if not (WEB / "node_modules").is_dir():
        pytest.skip("lens/web/node_modules is missing (`make page-tools` fetches it): the bundle was not built again")
    locked = json.loads((WEB / "package-lock.json").read_text("utf-8"))["packages"]
    for name in ("preact", "esbuild"):
        installed = json.loads((WEB / "node_modules" / name / "package.json").read_text("utf-8"))
        assert installed["version"] == locked[f"node_modules/{name}"]["version"], (
            f"{name} is not the locked one: make page-tools"
        )
    subprocess.run([node, "build.mjs", tmp_path], cwd=WEB, check=True, timeout=120)
    built = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert built.keys() == {"page.js", "page.css", "preact.LICENSE"}
    for name, content in built.items():
        assert (PACKAGE / name).read_bytes() == content, f"{name} is stale: run `make page`"


def test_the_lock_file_pins_with_digests_and_names_no_host():
    packages = json.loads((WEB / "package-lock.json").read_text("utf-8"))["packages"]
    pinned = {name: package for name, package in packages.items() if name}
    assert pinned
    for name, package in pinned.items():
        assert package["integrity"].startswith("sha512-"), name
        assert "resolved" not in package, f"{name} names a host: npm install --omit-lockfile-registry-resolved"


def test_the_bundle_cannot_end_its_element():
    assert "</script" not in (PACKAGE / "page.js").read_text("utf-8").lower()
    assert "<!--" not in (PACKAGE / "page.js").read_text("utf-8")
    assert "</style" not in (PACKAGE / "page.css").read_text("utf-8").lower()


def test_samples_of_the_page_are_those_of_the_repository():
    shipped = list((PACKAGE / "samples").iterdir())
    assert shipped
    for path in shipped:
        assert path.read_bytes() == (ROOT / "samples" / path.name).read_bytes()
