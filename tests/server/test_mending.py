"""What is changed in TorchServe: few places in few classes, and only in the TorchServe that is known."""

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
def test_the_installed_torchserve_is_changed_where_it_is_meant_to_be_and_nowhere_else(change, tmp_path):
    home = find_torchserve()
    assert mend(home, tmp_path / "classes")
    with zipfile.ZipFile(home / JAR) as jar:
        original = jar.read(change.member)
    mended = (tmp_path / "classes" / change.member).read_bytes()
    for before, after in change.edits:
        assert original.count(before) == 1
        assert len(before) == len(after)
    places = sorted((original.index(before), before, after) for before, after in change.edits)
    expected, at = b"", 0
    for start, before, after in places:
        expected += original[at:start] + after
        at = start + len(before)
    assert mended == expected + original[at:]


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
        jar.writestr(CHANGES[0].member, b"\xca\xfe\xba\xbe" + CHANGES[0].edits[0][0])
    assert not mend(tmp_path, tmp_path / "classes")
    assert not (tmp_path / "classes").exists()
