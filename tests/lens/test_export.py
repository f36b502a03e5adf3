"""Data sets: what each format holds, where pictures come from, and what a kill at any moment leaves."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas
import polars
import pytest
import zarr
from convscope import BadImage, Client, ConnectError, ConvscopeError, ServerError, TooManyImages, UnknownLayer
from convscope._cli import main
from convscope.commands import UsageError
from convscope.testing import FakeTransport, Request, model_card, prediction
from convscope_lens import Exported, export
from convscope_lens._export import formats
from PIL import Image

from tests.client.stand_in import StandIn, fetch_maps

HEADER = {"descr": "|u1", "fortran_order": False}  # Of a .npy file, without its shape.
LAYERS = {"conv1": (4, 6, 5), "conv2": (3, 2, 2)}
FORMATS = ("features.parquet", "features.zarr", "features")


class Service:
    """A network in this process: maps and scores are computed from the bytes of a picture."""

    def __init__(self) -> None:
        self.card = model_card(layers=LAYERS, classes=("cat", "dog"))
        self.weight = 1.0
        self.failure: Callable[[Request], ConvscopeError | None] = lambda request: None
        self.requests: list[Request] = []

    def client(self) -> Client:
        return Client("http://fake", transport=FakeTransport(self.respond), retries=0)

    def respond(self, request: Request) -> Any:
        if request.method == "model_card":
            return self.card
        if (failure := self.failure(request)) is not None:
            return failure
        self.requests.append(request)
        return [self.answer(picture, request) for picture in request.pictures]

    def answer(self, picture: bytes, request: Request) -> Any:
        if picture.startswith(b"bad"):
            return prediction(error=BadImage("not a picture"))
        notes = ("grey to RGB", "cropped") if picture.startswith(b"grey") else ()
        maps = {layer: self.weight * feature_map(picture, layer, request.pool) for layer in request.layers}
        if self.card.scores == "value":
            return prediction(values={"height": float(len(picture)), "width": 2.0}, maps=maps)
        share = len(picture) % 7 / 10
        scores = dict(zip(self.card.classes, (share, 1 - share), strict=True)) if self.card.classes else {}
        return prediction(scores, maps=maps, notes=notes)


def feature_map(picture: bytes, layer: str, pool: int | None = None) -> np.ndarray[Any, Any]:
    cells = fetch_maps(picture, LAYERS[layer])
    return cells if pool is None else cells.mean(axis=(1, 2))


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with pictures in it: `many` has seven, of which one is bad."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "many").mkdir()
    for number in range(7):
        name = "bad" if number == 4 else "picture " * number
        (tmp_path / f"many/{number}.png").write_bytes(f"{name}{number}".encode())
    return tmp_path


def run(service: Service, out: str, pictures: Any = "many", **options: Any) -> Exported:
    options = {"model": "cifar", "layers": ["conv2"], "pool": 1, "rows_per_part": 2, "batch": 2, **options}
    with service.client() as client:
        return export(client, pictures, out, **options)


def read(out: str) -> tuple[list[dict[str, Any]], dict[str, np.ndarray[Any, Any]]]:
    """Return the rows of a result without their arrays, and the arrays; null and NaN where there is nothing."""
    if out.endswith(".parquet"):
        table = pandas.read_parquet(out)
        shapes = formats.ParquetStore.read_record(Path(out))["columns"]
        nothing = {
            name: np.full(np.prod(one["shape"], dtype=int), np.nan, one["dtype"]) for name, one in shapes.items()
        }
        arrays = {
            name: np.stack([nothing[name] if row is None else row for row in table[name]]).reshape(-1, *one["shape"])
            for name, one in shapes.items()
        }
        rows = table.drop(columns=[*shapes])
        return [{name: none_of(value) for name, value in row.items()} for row in rows.to_dict("records")], arrays
    if out.endswith(".zarr"):
        group = zarr.open_group(out, mode="r")
        columns = {name: array[:] for name, array in group.arrays()}
        rows = {name: values for name, values in columns.items() if name in formats.INDEX_TYPES}
        arrays = {name: values for name, values in columns.items() if name not in rows}
        names = [name for name in formats.INDEX_TYPES if name in rows]
        texts = zip(*(rows[name].tolist() for name in names), strict=True)
        return [dict(zip(names, map(none_of, values), strict=True)) for values in texts], arrays
    index = pandas.read_csv(Path(out) / "index.csv", dtype={"key": str})
    stems = json.loads((Path(out) / "export.json").read_bytes())["arrays"]
    arrays = {
        name: np.concatenate(
            [np.load(Path(out) / one["file"].format(shard=shard)) for shard in index["shard"].unique()]
        )
        for name, one in stems.items()
    }
    size = formats.NpyStore.read_record(Path(out))["rows_per_part"]
    assert list(zip(index["shard"], index["row"], strict=True)) == [divmod(row, size) for row in range(len(index))]
    rows = index.drop(columns=["shard", "row"]).to_dict("records")
    return [{name: none_of(value) for name, value in row.items()} for row in rows], arrays


def none_of(value: Any) -> Any:
    """Return None for what stands for nothing in one of the formats."""
    return None if value in ("", -1) or value != value else value


def assert_equal(out: str, expected: str) -> None:
    rows, arrays = read(out)
    expected_rows, expected_arrays = read(expected)
    assert rows == expected_rows
    assert arrays.keys() == expected_arrays.keys()
    for name, values in arrays.items():
        np.testing.assert_array_equal(values, expected_arrays[name])


class TestFormats:
    @pytest.mark.parametrize("out", FORMATS)
    @pytest.mark.parametrize("pool", [None, 1])
    def test_hold_a_row_for_each_picture_in_order(
        self, service: Service, folder: Path, out: str, pool: int | None
    ) -> None:
        result = run(service, out, ["many", "missing.png"], layers="all", pool=pool)
        assert result == Exported(Path(out), 8, 2, 0)
        rows, arrays = read(out)
        assert [row["path"] for row in rows] == [*(f"many/{number}.png" for number in range(7)), "missing.png"]
        assert {row["key"] for row in rows} == {None}
        errors = {row["path"]: (row["error_code"], row["error_message"]) for row in rows if row["error_code"]}
        assert errors == {
            "many/4.png": ("bad_image", "not a picture"),
            "missing.png": ("unreadable", "No such file or directory"),
        }
        for row, *maps in zip(rows, arrays["conv1"], arrays["conv2"], strict=True):
            if row["error_code"]:
                assert row["label"] is row["class_index"] is row["probability"] is None
                assert all(np.isnan(one).all() for one in maps)
                continue
            picture = Path(row["path"]).read_bytes()
            for layer, one in zip(LAYERS, maps, strict=True):
                np.testing.assert_array_equal(one, feature_map(picture, layer, pool))
            assert (row["label"], row["class_index"]) == ("cat", 0)
            assert row["probability"] == pytest.approx(len(picture) % 7 / 10)
        assert not Path(f"{out}.parts").exists()

    def test_parquet_opens_in_pandas_polars_and_duckdb(self, service: Service, folder: Path) -> None:
        run(service, "features.parquet", map_dtype="float16")
        first = feature_map(b"0", "conv2", 1).astype(np.float16)
        table = pandas.read_parquet("features.parquet")
        np.testing.assert_array_equal(table["conv2"][0], first)
        assert table["conv2"][4] is None
        frame = polars.read_parquet("features.parquet")
        assert frame.schema["conv2"] == polars.Array(polars.Float16, 3)
        np.testing.assert_array_equal(frame["conv2"][0].to_numpy(), first)
        found = duckdb.sql(
            "SELECT path, conv2 FROM 'features.parquet' WHERE error_code IS NULL ORDER BY path"
        ).fetchall()
        assert len(found) == 6
        assert found[0] == ("many/0.png", first.tolist())
        assert duckdb.sql("SELECT error_code FROM 'features.parquet' WHERE conv2 IS NULL").fetchall() == [
            ("bad_image",)
        ]

    def test_zarr_is_of_version_3_whatever_version_its_user_has_set(self, service: Service, folder: Path) -> None:
        run(service, "plain.zarr", layers="all", pool=None)
        with zarr.config.set({"default_zarr_format": 2}):
            run(service, "features.zarr", layers="all", pool=None)
        assert_equal("features.zarr", "plain.zarr")

    @pytest.mark.parametrize("out", FORMATS)
    def test_hold_how_pictures_were_converted(self, service: Service, folder: Path, out: str) -> None:
        (folder / "grey.png").write_bytes(b"grey")
        frames = [Image.new("RGB", (4, 5), colour) for colour in ("red", "blue")]
        frames[0].save("cat.gif", save_all=True, append_images=frames[1:])
        run(service, out, ["grey.png", "cat.gif", "many/0.png", "many/4.png"])
        rows, _ = read(out)
        assert [row["notes"] for row in rows] == ["grey to RGB, cropped", "first frame only", None, None]

    @pytest.mark.parametrize("out", FORMATS)
    def test_hold_all_scores_if_asked_to(self, service: Service, folder: Path, out: str) -> None:
        run(service, out, "many/1.png", layers=(), pool=None, all_scores=True)
        _, arrays = read(out)
        share = len((folder / "many/1.png").read_bytes()) % 7 / 10
        np.testing.assert_allclose(arrays["probabilities"], [[share, 1 - share]], rtol=1e-6)
        np.testing.assert_allclose(arrays["logits"], np.log([[share, 1 - share]]), rtol=1e-6)
        assert {name: values.dtype for name, values in arrays.items()} == dict.fromkeys(arrays, np.dtype(np.float32))

    def test_hold_the_values_of_a_regression(self, service: Service, folder: Path) -> None:
        service.card = dataclasses.replace(service.card, scores="value")
        run(service, "features.parquet", "many/0.png")
        rows, arrays = read("features.parquet")
        np.testing.assert_array_equal(arrays["values"], [[1.0, 2.0]])
        assert "label" not in rows[0]

    def test_hold_maps_alone_of_a_model_without_scores(self, service: Service, folder: Path) -> None:
        service.card = dataclasses.replace(service.card, classes=(), scores="none")
        run(service, "features.parquet", "many/0.png")
        rows, arrays = read("features.parquet")
        assert arrays.keys() == {"conv2"}
        assert rows[0].keys() == {"path", "key", "notes", "error_code", "error_message"}

    def test_shards_of_a_layer_whose_name_is_no_file_name(self, service: Service, folder: Path) -> None:
        service.card = dataclasses.replace(
            service.card, layers=(dataclasses.replace(service.card.layers[1], name="conv/2"),)
        )
        service.answer = lambda picture, request: prediction({"cat": 1.0, "dog": 0.0}, maps={"conv/2": np.ones(3)})
        run(service, "features", layers="conv/2")
        np.testing.assert_array_equal(read("features")[1]["conv/2"], np.ones((7, 3)))
        assert (folder / "features/000000-0-conv_2.npy").exists()


class TestPictures:
    def paths(self, service: Service, *sources: str) -> list[tuple[str, str | None, str | None]]:
        run(service, "features.parquet", sources)
        rows, _ = read("features.parquet")
        return [(row["path"], row["key"], row["error_code"]) for row in rows]

    def tar(self, path: str, files: dict[str, bytes]) -> None:
        with tarfile.open(path, "w") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))

    def test_of_a_tar_keep_their_keys(self, service: Service, folder: Path) -> None:
        self.tar("a.tar", {"x/01.left.png": b"one", "x/01.txt": b"a text", "x/02.jpg": b"two", "x/02.json": b"{}"})
        assert self.paths(service, "a.tar") == [
            ("a.tar/x/01.left.png", "x/01", None),
            ("a.tar/x/02.jpg", "x/02", None),
        ]
        _, arrays = read("features.parquet")
        np.testing.assert_array_equal(arrays["conv2"][1], feature_map(b"two", "conv2", 1))

    def test_of_a_damaged_tar_that_can_be_read_are_there(self, service: Service, folder: Path) -> None:
        self.tar("a.tar", {"01.png": b"one", "02.png": bytes(2000)})
        whole = (folder / "a.tar").read_bytes()
        (folder / "a.tar").write_bytes(whole[:2500])
        (folder / "b.tar").write_bytes(b"no tar")
        assert self.paths(service, "a.tar", "b.tar", "c.tar", "many/0.png") == [
            ("a.tar/01.png", "01", None),
            ("a.tar/02.png", "02", "unreadable"),
            ("a.tar", None, "unreadable"),
            ("b.tar", None, "unreadable"),
            ("c.tar", None, "unreadable"),
            ("many/0.png", None, None),
        ]

    def test_of_a_tar_that_is_damaged_in_the_middle_are_not_missed(self, service: Service, folder: Path) -> None:
        self.tar("a.tar", {"01.png": b"one", "02.png": b"two", "03.png": b"three"})
        data = bytearray((folder / "a.tar").read_bytes())
        data[1024 + 150] ^= 1  # In the checksum of the second header.
        (folder / "a.tar").write_bytes(data)
        assert self.paths(service, "a.tar", "many/0.png") == [
            ("a.tar/01.png", "01", None),
            ("a.tar", None, "unreadable"),
            ("many/0.png", None, None),
        ]

    def test_of_a_tar_that_are_links_are_errors(self, service: Service, folder: Path) -> None:
        with tarfile.open("a.tar", "w") as archive:
            archive.add("many/0.png", "01.png")
            for name, kind in (("02.png", tarfile.LNKTYPE), ("03.png", tarfile.SYMTYPE), ("d.png", tarfile.DIRTYPE)):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, "01.png"
                archive.addfile(member)
        assert self.paths(service, "a.tar") == [
            ("a.tar/01.png", "01", None),
            ("a.tar/02.png", "02", "unreadable"),
            ("a.tar/03.png", "03", "unreadable"),
        ]

    def test_of_hostile_files_do_not_end_the_export(self, service: Service, folder: Path) -> None:
        member = tarfile.TarInfo("01.png")
        member.size = 2**62
        (folder / "large.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        member.pax_headers, member.size = {"GNU.sparse.size": "x"}, 0
        (folder / "sparse.tar").write_bytes(member.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
        with zipfile.ZipFile("zip.npy", "w") as archive:
            archive.writestr("a", "b")
        np.lib.format.write_array_header_1_0(header := io.BytesIO(), {**HEADER, "shape": (2**64, 1, 1, 1)})
        (folder / "long.npy").write_bytes(header.getvalue())
        (folder / "list.csv").write_text("nul\0.tar\n")
        rows = self.paths(service, "large.tar", "sparse.tar", "zip.npy", "long.npy", "list.csv", "many/0.png")
        assert rows == [
            ("large.tar/01.png", "01", "unreadable"),
            ("large.tar", None, "unreadable"),
            ("sparse.tar", None, "unreadable"),
            ("zip.npy", None, None),  # The service says what is wrong with these two.
            ("long.npy", None, None),
            ("nul\0.tar", None, "unreadable"),
            ("many/0.png", None, None),
        ]

    def test_of_a_folder_include_its_tars_and_arrays(self, service: Service, folder: Path) -> None:
        self.tar("many/0a.tar", {"01.png": b"one"})
        pictures = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
        np.save(folder / "many/0b.npy", pictures[:2])
        np.save(folder / "many/0c.npy", pictures[2])
        paths = [path for path, *_ in self.paths(service, "many")]
        assert paths[:6] == [
            *("many/0.png", "many/0a.tar/01.png", "many/0b.npy[0]", "many/0b.npy[1]", "many/0c.npy", "many/1.png")
        ]
        sent = [picture for request in service.requests for picture in request.pictures if request.top_k == 1]
        arrays = [np.load(io.BytesIO(picture)) for picture in sent if picture.startswith(b"\x93NUMPY")]
        assert {array.tobytes() for array in arrays} == {picture.tobytes() for picture in pictures}

    def test_are_listed_in_a_csv(self, service: Service, folder: Path) -> None:
        (folder / "a.csv").write_text('label,path\ncat,many/1.png\n\ndog,"many/0.png"\n', "utf-8-sig")
        (folder / "b.csv").write_text("many/2.png\nmany/none.png\n")
        expected = [("many/1.png", None), ("many/0.png", None), ("many/2.png", None), ("many/none.png", "unreadable")]
        assert self.paths(service, "a.csv", "b.csv") == [(path, None, code) for path, code in expected]

    def test_without_a_path_in_a_csv_are_errors_that_name_the_line(self, service: Service, folder: Path) -> None:
        (folder / "a.csv").write_text('path,label\n,cat\nmany/1.png,dog\n\n"",cat\n')
        (folder / "b.csv").write_text("label,path\ncat\ndog,many/0.png\n")
        (folder / "c.csv").write_text('""\n')
        assert self.paths(service, "a.csv", "b.csv", "c.csv") == [
            ("a.csv, line 2", None, "unreadable"),
            ("many/1.png", None, None),
            ("a.csv, line 5", None, "unreadable"),
            ("b.csv, line 2", None, "unreadable"),
            ("many/0.png", None, None),
            ("c.csv, line 1", None, "unreadable"),
        ]
        assert read("features.parquet")[0][0]["error_message"] == "the row of the .csv file has no path"

    def test_come_from_standard_input(self, service: Service, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = io.BytesIO()
        np.save(file, np.zeros((2, 4, 4, 3), np.uint8))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.getvalue())))
        assert self.paths(service, "-", "many/0.png") == [
            ("-[0]", None, None),
            ("-[1]", None, None),
            ("many/0.png", None, None),
        ]

    def test_with_names_that_are_no_text_or_nothing_in_them(self, service: Service, folder: Path) -> None:
        Path(os.fsdecode(b"many/0\xff.png")).write_bytes(b"one")
        (folder / "empty.png").touch()
        assert self.paths(service, os.fsdecode(b"many/0\xff.png"), "empty.png") == [
            ("many/0\\udcff.png", None, None),
            ("empty.png", None, "unreadable"),
        ]

    def test_of_the_export_itself_are_left_out(self, service: Service, folder: Path) -> None:
        """The shards of an interrupted export are .npy files below the folder of the pictures."""
        service.failure = fail_after(5)
        with pytest.raises(ConnectError):
            run(service, str(folder / "many/features"), concurrency=1)
        assert list((folder / "many/features.parts").rglob("*.npy"))
        service.failure = lambda request: None
        assert run(service, str(folder / "many/features"), concurrency=1).rows == 7
        assert run(service, "many/features", existing="skip").rows == 7

    def test_of_a_part_that_could_hold_more_take_no_memory_for_them(self, service: Service, folder: Path) -> None:
        assert run(service, "features.zarr", rows_per_part=10**9, pool=None).rows == 7

    def test_that_are_not_there_are_an_error(self, service: Service, folder: Path) -> None:
        (folder / "a.csv").write_text("path\n")
        with pytest.raises(UsageError, match="no picture"):
            run(service, "features.parquet", "a.csv")
        (folder / "nothing").mkdir()
        with pytest.raises(UsageError, match="no picture found in nothing"):
            run(service, "features.parquet", "nothing")

    def test_are_read_as_they_are_sent_and_written_meanwhile(self, service: Service, folder: Path) -> None:
        """With one request at a time, four pictures at most are read ahead, and two parts not written."""
        progress = folder / "features.parquet.parts/progress.json"
        for number in range(7, 30):
            (folder / f"many/{number}.png").write_bytes(b"picture")
        behind = []

        def look(request: Request) -> None:
            sent = sum(len(one.pictures) for one in service.requests if one.top_k == 1)
            written = json.loads(progress.read_bytes())["parts"] * 2 if progress.exists() else 0
            behind.append(sent - written)

        service.failure = look
        run(service, "features.parquet", concurrency=1, batch=1)
        assert max(behind) <= 2 * 2 + 2 + 2  # Two parts, what is read ahead, and a part that is not full.


def fail_after(count: int) -> Callable[[Request], ConvscopeError | None]:
    """Return a failure of all requests behind the first `count`."""
    requests = iter(range(10**6))
    return lambda request: ConnectError("gone") if next(requests) >= count else None


class Killed(BaseException):
    """What a kill looks like from within: nothing more is done."""


class TestResume:
    @pytest.mark.parametrize(("out", "stride"), [("features.parquet", 1), ("features.zarr", 13), ("features", 3)])
    def test_after_a_kill_at_any_moment_has_every_row_once(
        self, service: Service, folder: Path, monkeypatch: pytest.MonkeyPatch, out: str, stride: int
    ) -> None:
        """The process dies when something is about to reach the disk, or to get its name: each time a little later."""
        whole, options = f"whole{Path(out).suffix}", {"rows_per_part": 4}
        run(service, whole, **options)
        replace, steps, left = Path.replace, 0, 0

        def count() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        def counted_replace(path: Path, target: Any) -> Path:
            count()
            return replace(path, target)

        monkeypatch.setattr(os, "fsync", lambda descriptor: count())
        monkeypatch.setattr(Path, "replace", counted_replace)
        while True:
            left = steps
            try:
                run(service, out, **options)
                break
            except Killed:
                left = 10**6
            result = run(service, out, **options)
            assert (result.rows, result.failed) == (7, 1)
            assert_equal(out, whole)
            assert not Path(f"{out}.parts").exists()
            (shutil.rmtree if Path(out).is_dir() else os.remove)(out)
            steps += stride
        assert steps > 15

    def test_after_kill_9(self, stand_in: StandIn, folder: Path) -> None:
        """A process of its own, killed while the server holds its requests back."""
        for number in range(7, 40):
            (folder / f"many/{number}.png").write_bytes(f"picture {number}".encode())
        program = (
            "from convscope import Client; from convscope_lens import export;"
            f"export(Client({stand_in.rest_url!r}), 'many', 'features.parquet', model='cifar', layers='conv2', pool=1,"
            " rows_per_part=8, batch=2, concurrency=1)"
        )
        take, waiting, taken = stand_in.take, threading.Event(), []

        def hold_back(*arguments: Any) -> Any:
            taken.append(arguments)
            if len(taken) > 15:  # The card, the references, and the pictures of two parts and at most half the third.
                waiting.wait(30)
            return take(*arguments)

        stand_in.take = hold_back  # type: ignore[method-assign]
        with subprocess.Popen([sys.executable, "-c", program]) as process:
            progress = folder / "features.parquet.parts/progress.json"
            while not (progress.exists() and json.loads(progress.read_bytes())["parts"] == 2):
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        waiting.set()
        stand_in.take = take  # type: ignore[method-assign]
        with Client(stand_in.rest_url) as client:
            options: dict[str, Any] = {"model": "cifar", "layers": "conv2", "pool": 1, "rows_per_part": 8}
            assert export(client, "many", "features.parquet", **options) == (Path("features.parquet"), 40, 1, 16)
            export(client, "many", "whole.parquet", **options)
        assert_equal("features.parquet", "whole.parquet")

    def interrupt(self, service: Service, out: str = "features.parquet", **options: Any) -> None:
        """Leave an export of which one part is written."""
        service.failure = fail_after(5)  # The reference, three batches of which one is a part, the reference again.
        with pytest.raises(ConnectError):
            run(service, out, concurrency=1, **options)
        service.failure = lambda request: None

    def test_asks_for_what_is_missing_only(self, service: Service, folder: Path) -> None:
        self.interrupt(service)
        there = 2 * json.loads(Path("features.parquet.parts/progress.json").read_text())["parts"]
        assert there in (2, 4)  # The part before the failure may be on disk in time, or not.
        service.requests.clear()
        assert run(service, "features.parquet", concurrency=1) == (Path("features.parquet"), 7, 1, there)
        assert sum(len(request.pictures) for request in service.requests if request.top_k == 1) == 7 - there

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"model": "other"}, "model cifar, not other"),
            ({"version": "2.0"}, "version 1.0, not 2.0"),
            ({"layers": ["conv1"]}, r"layers \['conv2'\], not \['conv1'\]"),
            ({"pool": None}, "pool 1, not None"),
            ({"map_dtype": "float16"}, "map_dtype float32, not float16"),
            ({"all_scores": True}, "all_scores False, not True"),
            ({"rows_per_part": 3}, "rows_per_part 2, not 3"),
            ({"pictures": ["many", "many/1.png"]}, "pictures 7, .* not 8"),
            ({"pictures": [f"many/{number}.png" for number in (1, 0, 2, 3, 4, 5, 6)]}, "pictures 7, .* not 7"),
        ],
        ids=str,
    )
    def test_with_other_settings_is_rejected(
        self, service: Service, folder: Path, changes: dict[str, Any], words: str
    ) -> None:
        self.interrupt(service)
        if "version" in changes:
            service.card = dataclasses.replace(service.card, version="2.0")
        with pytest.raises(ValueError, match=words):
            run(service, "features.parquet", **changes)
        service.card = dataclasses.replace(service.card, version="1.0")
        assert run(service, "features.parquet").resumed > 0

    @pytest.mark.parametrize("change", ["weights", "labels"])
    def test_with_another_network_under_the_same_version_is_rejected(
        self, service: Service, folder: Path, change: str
    ) -> None:
        self.interrupt(service)
        if change == "weights":
            service.weight = 2.0
        else:
            service.card = dataclasses.replace(service.card, classes=("cat", "fox"))
        with pytest.raises(ValueError, match="another network of the name cifar and the version"):
            run(service, "features.parquet")

    def test_a_network_that_changes_meanwhile_ends_the_export(self, service: Service, folder: Path) -> None:
        def change(request: Request) -> None:
            if len(service.requests) == 5:
                service.weight = 2.0

        service.failure = change
        with pytest.raises(ValueError, match="another network than before"):
            run(service, "features.parquet", concurrency=1)
        service.weight, service.failure = 1.0, lambda request: None
        run(service, "features.parquet")
        run(service, "whole.parquet")
        assert_equal("features.parquet", "whole.parquet")

    def test_is_for_one_process_at_a_time(self, service: Service, folder: Path) -> None:
        self.interrupt(service)
        with (folder / "features.parquet.parts/lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(OSError, match="another process is writing"):
                run(service, "features.parquet")

    @pytest.mark.parametrize("out", FORMATS)
    def test_what_is_complete_is_left_or_replaced_as_asked(self, service: Service, folder: Path, out: str) -> None:
        run(service, out)
        service.requests.clear()
        with pytest.raises(FileExistsError, match="--skip-existing and --overwrite"):
            run(service, out)
        assert not service.requests
        assert run(service, out, existing="skip") == (Path(out), 7, 1, 7)
        with pytest.raises(ValueError, match="pool 1, not None"):
            run(service, out, existing="skip", pool=None)
        assert run(service, out, "many/1.png", existing="overwrite") == (Path(out), 1, 0, 0)
        assert [row["path"] for row in read(out)[0]] == ["many/1.png"]

    def test_with_another_standard_input_is_rejected(
        self, service: Service, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for data in (b"one", b"two"):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
            if data == b"one":
                run(service, "features.parquet", "-")
            else:
                with pytest.raises(ValueError, match="was made with pictures 1"):
                    run(service, "features.parquet", "-", existing="skip")

    @pytest.mark.parametrize("out", FORMATS)
    def test_that_another_process_completes_meanwhile_is_left(self, service: Service, folder: Path, out: str) -> None:
        def complete(request: Request) -> None:
            service.failure = lambda request: None
            run(service, out, "many/1.png")

        service.failure = complete  # At the first request, of which comes what is to be written.
        with pytest.raises(FileExistsError, match="another process has written"):
            run(service, out)
        assert [row["path"] for row in read(out)[0]] == ["many/1.png"]
        assert not (folder / f"{out}.parts").exists()

    def test_overwrite_begins_an_interrupted_one_again(self, service: Service, folder: Path) -> None:
        self.interrupt(service)
        assert run(service, "features.parquet", pool=None, existing="overwrite").resumed == 0

    @pytest.mark.parametrize("existing", ["error", "skip", "overwrite"])
    @pytest.mark.parametrize("out", FORMATS)
    def test_what_is_no_export_is_never_touched(self, service: Service, folder: Path, out: str, existing: str) -> None:
        (folder / out).mkdir()
        (folder / out / "thesis.txt").touch()
        with pytest.raises(FileExistsError, match="is not an export"):
            run(service, out, existing=existing)
        (folder / f"new{out}.parts/data").mkdir(parents=True)
        (folder / f"new{out}.parts/data/thesis.txt").touch()
        with pytest.raises(FileExistsError, match="does not belong to an export"):
            run(service, f"new{out}", existing=existing)
        assert sorted(path.name for path in folder.rglob("thesis.txt")) == ["thesis.txt"] * 2


class TestErrors:
    def test_of_a_whole_request_are_tried_with_each_picture_alone(self, service: Service, folder: Path) -> None:
        service.failure = lambda request: TooManyImages("one is enough") if len(request.pictures) > 1 else None
        assert run(service, "features.parquet").failed == 1

    def test_of_one_picture_that_breaks_the_network_are_its_own(self, service: Service, folder: Path) -> None:
        (folder / "many/2.png").write_bytes(b"poison")
        service.failure = lambda request: ServerError("died") if b"poison" in request.pictures else None
        run(service, "features.parquet")
        codes = {row["path"]: row["error_code"] for row in read("features.parquet")[0] if row["error_code"]}
        assert codes == {"many/2.png": "internal", "many/4.png": "bad_image"}

    def test_of_the_service_are_no_rows(self, service: Service, folder: Path) -> None:
        """A network that breaks with every picture also breaks with the reference, and nothing is written."""
        breaks = iter([None, *[ServerError("died")] * 1000])
        service.failure = lambda request: next(breaks)
        with pytest.raises(ServerError):
            run(service, "features.parquet")
        assert not (folder / "features.parquet.parts/progress.json").exists()

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"out": "features.npy"}, ValueError, "must end in .parquet or .zarr"),
            ({"layers": "conv9"}, UnknownLayer, "layers: conv1, conv2"),
            ({"rows_per_part": 0}, ValueError, "rows_per_part must be at least 1"),
            ({"map_dtype": "uint8"}, ValueError, "map_dtype must be float32 or float16"),
            ({"batch": 0}, ValueError, "batch must be at least 1"),
        ],
        ids=str,
    )
    def test_of_options_come_before_anything_is_written(
        self, service: Service, folder: Path, options: dict[str, Any], error: type[Exception], words: str
    ) -> None:
        with pytest.raises(error, match=words):
            run(service, options.pop("out", "features.parquet"), **options)
        assert not list(folder.glob("features*"))

    def test_of_options_that_do_not_suit_the_model(self, service: Service, folder: Path) -> None:
        card = service.card
        service.card = dataclasses.replace(card, input=dataclasses.replace(card.input, height=None, width=None))
        with pytest.raises(ValueError, match="pictures of any size"):
            run(service, "features.zarr", pool=None)
        run(service, "features.zarr")
        service.card = dataclasses.replace(card, classes=(), scores="none")
        with pytest.raises(ValueError, match="has no scores"):
            run(service, "scores.parquet", all_scores=True)
        service.card = dataclasses.replace(card, layers=(dataclasses.replace(card.layers[0], name="label"),))
        service.answer = lambda picture, request: prediction({"cat": 1.0, "dog": 0.0}, maps={"label": np.ones(4)})
        with pytest.raises(ValueError, match="another column has this name"):
            run(service, "label.parquet", layers="label")

    @pytest.mark.parametrize(("out", "package"), [("features.parquet", "pyarrow"), ("features.zarr", "zarr")])
    def test_of_a_missing_package_name_the_extra(
        self, service: Service, folder: Path, monkeypatch: pytest.MonkeyPatch, out: str, package: str
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"needs {package}: pip install './lens\[export\]'"):
            run(service, out)
        run(service, "features")


class TestCommand:
    def test_says_what_it_wrote(self, stand_in: StandIn, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--model", "cifar", "--layer", "conv1,conv2", "--pool", "1", "--url", stand_in.rest_url]
        assert main(["export", "many", *arguments, "--out", "features.parquet"]) == 1
        printed = capsys.readouterr()
        assert printed.out == "wrote features.parquet: 7 rows; 1 are errors, see the column error_code\n"
        assert printed.err == ""
        assert main(["export", "many/1.png", *arguments, "--out", "features", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"out": "features", "rows": 1, "failed": 0, "resumed": 0}
        _, arrays = read("features.parquet")
        first = fetch_maps(b"0", LAYERS["conv1"]).mean(axis=(1, 2))
        np.testing.assert_array_equal(arrays["conv1"][0], first)

    def test_that_is_interrupted_says_how_to_go_on(
        self, stand_in: StandIn, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["export", "many", "--model", "cifar", "--out", "features.zarr", "--rows-per-part", "2"]
        arguments += ["--url", stand_in.rest_url, "--batch", "1", "--concurrency", "1", "--retries", "0"]
        stand_in.mishaps += [*[""] * 8, *["reset"] * 20]
        assert main(arguments) == 1
        assert (
            "features.zarr.parts keeps the rows so far; the same command resumes the export" in capsys.readouterr().err
        )
        assert main([*arguments, "--overwrite", "--out", "features.zarr/"]) == 1
        assert "features.zarr.parts keeps the rows so far; the same command without" in capsys.readouterr().err
        stand_in.mishaps.clear()
        assert main(arguments) == 1
        assert "of them from an earlier run" in capsys.readouterr().out
        assert main([*arguments, "--skip-existing"]) == 1

    @pytest.mark.parametrize("out", FORMATS)
    def test_on_a_full_disk_says_so_and_resumes(
        self,
        stand_in: StandIn,
        folder: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        out: str,
    ) -> None:
        """The second part meets with a full disk."""
        arguments = ["export", "many", "--model", "cifar", "--layer", "conv1,conv2", "--out", out]
        arguments += ["--rows-per-part", "3", "--url", stand_in.rest_url]
        real_open, second = Path.open, re.compile(r"\.parts/data/.*(000001|/c\.1)")

        def full(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
            is_full = "w" in mode and second.search(str(path))
            return real_open(Path("/dev/full") if is_full else path, mode, *rest, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", full)
            assert main(arguments) == 1
        said = capsys.readouterr().err
        assert "No space left on device" in said
        assert f"{out}.parts keeps the rows so far; the same command resumes the export" in said
        assert main(arguments) == 1
        assert "7 rows, 3 of them from an earlier run; 1 are errors" in capsys.readouterr().out
        assert [row["path"] for row in read(out)[0]] == [f"many/{number}.png" for number in range(7)]

    def test_with_other_settings_does_not_say_that_it_can_go_on(
        self, stand_in: StandIn, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["export", "many", "--model", "cifar", "--out", "a.parquet", "--rows-per-part", "2"]
        arguments += ["--url", stand_in.rest_url, "--batch", "1", "--concurrency", "1", "--retries", "0"]
        stand_in.mishaps += [*[""] * 8, *["reset"] * 20]
        assert main(arguments) == 1
        assert "resumes the export" in capsys.readouterr().err
        stand_in.mishaps.clear()
        assert main([*arguments, "--layer", "conv1"]) == 1
        said = capsys.readouterr().err
        assert "see --overwrite" in said
        assert "resumes the export" not in said

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            (["--pool", "1"], "--pool does nothing without --layer"),
            (["--map-dtype", "float16"], "--map-dtype does nothing without --layer"),
        ],
    )
    def test_rejects_options_that_do_nothing(
        self, stand_in: StandIn, folder: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["export", "many", "--model", "cifar", "--out", "a.parquet", "--url", stand_in.rest_url, *more])
        assert ended.value.code == 2
        assert words in capsys.readouterr().err

    def test_without_a_package_ends_with_2(
        self, stand_in: StandIn, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(SystemExit) as ended:
            main(["export", "many", "--model", "cifar", "--out", "a.parquet", "--url", stand_in.rest_url])
        assert ended.value.code == 2
        assert "./lens[export]" in capsys.readouterr().err

    def test_shows_a_bar_with_rate_and_time_left(
        self, service: Service, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run(service, "features.parquet", progress=True)
        bar = capsys.readouterr().err
        assert "7/7" in bar
        assert "pictures/s" in bar
