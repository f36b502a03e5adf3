"""What is changed in TorchServe's queue: one instruction, and only in the TorchServe that is known."""

import zipfile

from server.mending import JAR, MODEL, TAKES, WAITS, mend
from server.process import find_torchserve


def test_the_installed_torchserve_is_mended_in_one_place(tmp_path):
    home = find_torchserve()
    assert mend(home, tmp_path / "classes")
    with zipfile.ZipFile(home / JAR) as jar:
        original = jar.read(MODEL)
    mended = (tmp_path / "classes" / MODEL).read_bytes()
    assert len(WAITS) == len(TAKES)
    assert [at for at in range(len(mended)) if mended[at] != original[at]] == [
        original.index(WAITS) + 2,
        original.index(WAITS) + 3,
    ]


def test_another_torchserve_is_left_alone(tmp_path):
    (tmp_path / JAR).parent.mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / JAR, "w") as jar:
        jar.writestr(MODEL, b"\xca\xfe\xba\xbe" + WAITS)
    assert not mend(tmp_path, tmp_path / "classes")
    assert not (tmp_path / "classes").exists()
