"""Which archives a model store holds, and which of them are served."""

import json
import zipfile
import zlib

import pytest

from server.failures import Failure, UsageFailure
from server.models import find_archives, read_archive
from tests.server.harness import write_archive
from tests.thorough import variants


def test_every_archive_is_found_with_the_newest_version_of_a_model_first(tmp_path):
    for version in ("1.9", "1.10", "1.2"):
        write_archive(tmp_path, "cifar", version=version, file=f"cifar-{version}")
    write_archive(tmp_path, "a")
    found = [(archive.name, archive.version) for archive in find_archives(tmp_path).archives]
    assert found == [("a", "1.0"), ("cifar", "1.10"), ("cifar", "1.9"), ("cifar", "1.2")]


def test_a_model_is_chosen_by_name_or_by_name_and_version(tmp_path):
    write_archive(tmp_path, "cifar", version="1.0", file="old")
    write_archive(tmp_path, "cifar", version="2.0", file="new")
    write_archive(tmp_path, "digits")
    assert len(find_archives(tmp_path, ["cifar"]).archives) == 2
    assert [archive.path.name for archive in find_archives(tmp_path, ["cifar/1.0", "digits"]).archives] == [
        "old.mar",
        "digits.mar",
    ]


def test_a_model_store_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageFailure, match=r"there is no model store .*/nowhere: name a folder .* --model-store"):
        find_archives(tmp_path / "nowhere")


def test_an_empty_model_store_says_how_to_build_an_archive(tmp_path):
    with pytest.raises(UsageFailure, match=r"holds no \.mar archives: build one with `python -m archiver`"):
        find_archives(tmp_path)


def test_an_unknown_model_lists_those_there_are(tmp_path):
    write_archive(tmp_path, "cifar")
    write_archive(tmp_path, "digits")
    with pytest.raises(UsageFailure, match=r"no model cat, dog in .*; there are: cifar, digits"):
        find_archives(tmp_path, ["cat", "digits", "dog"])


def test_a_file_that_is_no_zip_is_called_damaged(tmp_path):
    (tmp_path / "broken.mar").write_bytes(b"not a zip")
    with pytest.raises(Failure, match=r"archive broken\.mar: it is damaged or no archive at all"):
        find_archives(tmp_path)


def test_a_truncated_archive_is_called_damaged(tmp_path):
    path = write_archive(tmp_path, "cut")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(Failure, match=r"archive cut\.mar: it is damaged"):
        find_archives(tmp_path)


def test_an_encrypted_archive_is_named(tmp_path):
    path = write_archive(tmp_path, "locked")
    data = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # The first bit of a member's flags.
        at = -1
        while (at := data.find(mark, at + 1)) >= 0:
            data[at + flags] |= 1
    path.write_bytes(data)
    with pytest.raises(Failure, match=r"^archive locked\.mar: it cannot be read \(.*encrypted.*a plain zip file$"):
        find_archives(tmp_path)


def test_an_archive_with_any_byte_wrong_is_read_or_named(tmp_path):
    path = tmp_path / "odd.mar"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": {"modelName": "odd", "configFile": "c"}}))
        archive.writestr("c", "minWorkers: 3\n" * 20)
    whole, told = path.read_bytes(), set()
    for place in range(len(whole)):
        for wrong in variants((whole[place] ^ 1, 14), (whole[place] ^ 0xFF, 99)):  # 14: LZMA.
            path.write_bytes(whole[:place] + bytes([wrong]) + whole[place + 1 :])
            try:
                read_archive(path)
            except Failure as failure:
                told.add(type(failure.__cause__))
    assert {zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError} <= told


def test_a_zip_that_is_no_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "zip.mar", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(Failure, match=r"archive zip\.mar: it is not a TorchServe archive"):
        find_archives(tmp_path)


@pytest.mark.parametrize("manifest", ["{", "[]", "{}", '{"model": null}', '{"model": {"modelName": "../x"}}'])
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path, manifest):
    with zipfile.ZipFile(tmp_path / "odd.mar", "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", manifest)
    with pytest.raises(Failure, match=r"archive odd\.mar: "):
        find_archives(tmp_path)


def test_a_broken_archive_is_not_in_the_way_of_good_ones_that_are_named(tmp_path):
    (tmp_path / "broken.mar").write_bytes(b"not a zip")
    write_archive(tmp_path, "good")
    assert [archive.name for archive in find_archives(tmp_path, ["good"]).archives] == ["good"]
    with pytest.raises(Failure, match=r"broken\.mar"):
        find_archives(tmp_path, ["broken"])


def test_what_cannot_be_read_is_rejected_and_the_rest_is_found(tmp_path):
    damaged = write_archive(tmp_path, "damaged")
    damaged.write_bytes(damaged.read_bytes().replace(b"class Handler", b"class Handlxr"))
    (tmp_path / "no.mar").write_bytes(b"not a zip")
    write_archive(tmp_path, "good")
    archives, rejected, _ = find_archives(tmp_path)
    assert [archive.name for archive in archives] == ["good"]
    assert rejected == {
        "damaged": "archive damaged.mar: it is damaged or no archive at all (Bad CRC-32 for file 'entry.py')",
        "no": "archive no.mar: it is damaged or no archive at all (File is not a zip file)",
    }


def test_a_damaged_archive_that_was_named_does_not_keep_the_others_away(tmp_path):
    (tmp_path / "cifar.mar").write_bytes(b"not a zip")
    write_archive(tmp_path, "good")
    archives, rejected, _ = find_archives(tmp_path, ["cifar", "good", "other/2.0"])
    assert [archive.name for archive in archives] == ["good"]
    assert rejected["cifar"].startswith("archive cifar.mar: it is damaged")
    assert rejected["other"] == f"no archive of other/2.0 in {tmp_path} can be read"


def test_a_broken_version_of_a_model_that_was_named_is_rejected_beside_a_good_one(tmp_path):
    write_archive(tmp_path, "cifar")
    for name in ("cifar-1.1", "cifar10", "other"):
        (tmp_path / f"{name}.mar").write_bytes(b"not a zip")
    archives, rejected, _ = find_archives(tmp_path, ["cifar"])
    assert [archive.full_name for archive in archives] == ["cifar/1.0"]
    assert list(rejected) == ["cifar-1.1"]


def test_two_archives_with_the_same_model_and_version_are_both_rejected(tmp_path):
    write_archive(tmp_path, "cifar", file="one")
    write_archive(tmp_path, "cifar", file="two")
    write_archive(tmp_path, "good")
    archives, rejected, _ = find_archives(tmp_path)
    assert [archive.name for archive in archives] == ["good"]
    assert sorted(rejected) == ["one", "two"]


def test_two_archives_with_the_same_model_and_version_are_refused(tmp_path):
    write_archive(tmp_path, "cifar", file="one")
    write_archive(tmp_path, "cifar", file="two")
    with pytest.raises(Failure, match=r"one\.mar and two\.mar both hold version 1\.0 of cifar"):
        find_archives(tmp_path)


def test_the_workers_an_archive_asks_for_are_read_from_its_configuration(tmp_path):
    write_archive(tmp_path, "a", config="minWorkers: 3\nmaxWorkers: 3\n")
    write_archive(tmp_path, "b", config="batchSize: 4\n")
    assert [archive.workers for archive in find_archives(tmp_path).archives] == [3, None]


def test_the_time_a_worker_has_is_read_from_its_configuration(tmp_path):
    write_archive(tmp_path, "a", config="responseTimeout: 7\nstartupTimeout: 9\n")
    write_archive(tmp_path, "b", config="responseTimeout: soon\n")
    times = [(archive.response_timeout_s, archive.startup_timeout_s) for archive in find_archives(tmp_path).archives]
    assert times == [(7, 9), (120, 120)]
