"""The patches of TorchServe: few places in few classes, and only in the TorchServe that is known."""

import zipfile
from collections import defaultdict

import pytest

from server import patches
from server.patches import JAR, PATCHES
from server.process import find_torchserve

CHANGES = [change for patch in PATCHES for change in patch.changes]
EDITS = defaultdict(list)
for _change in CHANGES:
    EDITS[_change.member] += _change.edits


@pytest.fixture(scope="module")
def known():
    """What is in the classes of the installed TorchServe that are patched, by member."""
    with zipfile.ZipFile(find_torchserve() / JAR) as jar:
        return {change.member: jar.read(change.member) for change in CHANGES}


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """The folder of the patched classes."""
    folder = tmp_path_factory.mktemp("patched") / "classes"
    assert patches.apply(find_torchserve(), folder) == [patch.name for patch in PATCHES]
    return folder


@pytest.mark.parametrize("member", EDITS)
def test_the_installed_torchserve_is_changed_where_it_is_meant_to_be_and_nowhere_else(member, known, classes):
    original, patched = known[member], (classes / member).read_bytes()
    places = []
    for edit in EDITS[member]:
        assert original.count(edit.before) == edit.times
        assert len(edit.before) == len(edit.after) or edit.after[0] == 1 or is_longer_method(edit)  # 1: a constant.
        start = -1
        for _ in range(edit.times):
            start = original.index(edit.before, start + 1)
            places.append((start, edit))
    expected, at = b"", 0
    for start, edit in sorted(places, key=lambda place: place[0]):
        expected += original[at:start] + edit.after
        at = start + len(edit.before)
    assert patched == expected + original[at:]


def is_longer_method(edit):
    """Tell whether a method's lengths, of its attribute and of its code, grow by what its code does."""
    more = len(edit.after) - len(edit.before)
    lengths = [(int.from_bytes(edit.before[at : at + 4]), int.from_bytes(edit.after[at : at + 4])) for at in (0, 8)]
    return all(after - before == more for before, after in lengths)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_patches_are_left_out_where_a_class_of_theirs_is_another_and_the_others_are_applied(patch, known, tmp_path):
    home = tmp_path / "home"
    (home / JAR).parent.mkdir(parents=True)
    with zipfile.ZipFile(home / JAR, "w") as jar:
        for member, content in known.items():
            jar.writestr(member, content + (b"\0" if member == patch.changes[0].member else b""))
    left = [one for one in PATCHES if patch.changes[0].member not in [change.member for change in one.changes]]
    assert patches.apply(home, tmp_path / "classes") == [one.name for one in left]
    members = {change.member for one in left for change in one.changes}
    assert not [
        change for change in CHANGES if (tmp_path / "classes" / change.member).exists() != (change.member in members)
    ]


def test_a_torchserve_without_the_classes_is_left_alone(tmp_path):
    (tmp_path / JAR).parent.mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / JAR, "w") as jar:
        jar.writestr("org/pytorch/serve/ModelServer.class", b"")
    assert patches.apply(tmp_path, tmp_path / "classes") == []
    assert not (tmp_path / "classes").exists()
