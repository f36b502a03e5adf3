"""What is changed in TorchServe: one place a class, and only in the TorchServe that is known."""

import os
import zipfile
from pathlib import Path

import pytest

from server.arguments import parse
from server.configuration import PrivateDirectory
from server.java import Java
from server.mending import CHANGES, JAR, mend
from server.process import build_command, find_torchserve


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.member)
def test_the_installed_torchserve_is_changed_in_one_place_a_class(change, tmp_path):
    home = find_torchserve()
    assert mend(home, tmp_path / "classes")
    with zipfile.ZipFile(home / JAR) as jar:
        original = jar.read(change.member)
    mended = (tmp_path / "classes" / change.member).read_bytes()
    start, _, end = original.partition(change.before)
    assert change.before not in end
    assert mended == start + change.after + end
    assert len(mended) == len(original)


def test_it_can_be_left_as_it_came(tmp_path):
    with PrivateDirectory(tmp_path, None) as directory:
        java = Java(Path("java"), "17.0.15", "PATH")
        for options, mended in (([], True), (["--no-mend"], False)):
            command = build_command(java, find_torchserve(), directory, tmp_path, parse(options))
            path = command[command.index("-cp") + 1].split(os.pathsep)
            assert (str(directory.classes) in path) == mended


def test_another_torchserve_is_left_alone(tmp_path):
    (tmp_path / JAR).parent.mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / JAR, "w") as jar:
        jar.writestr(CHANGES[0].member, b"\xca\xfe\xba\xbe" + CHANGES[0].before)
    assert not mend(tmp_path, tmp_path / "classes")
    assert not (tmp_path / "classes").exists()
