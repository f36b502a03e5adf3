"""Surveys: the figures are NumPy's over all pictures at once, and what was planted in the channels is found."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convscope import BadImage, UnknownLayer
from convscope._cli import build_parser
from convscope.commands import UsageError
from convscope.pixels import encode_png
from convscope_lens import _commands, surveys
from convscope_lens.surveys import survey
from numpy.typing import NDArray

from tests.lens.surveyed import (
    DEAD,
    FOLLOWER,
    SIGNED,
    animate,
    make_card,
    make_client,
    make_maps,
    make_pixels,
    write_folder,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "pictures"


def all_cells(pictures: dict[str, NDArray[np.uint8]], layer: str) -> NDArray[np.float64]:
    """Return the cells of all pictures, (N, C, cells)."""
    maps = [make_maps(pixels)[layer] for pixels in pictures.values()]
    return np.stack([one.reshape(len(one), -1) for one in maps]).astype(np.float64)


@pytest.mark.parametrize("layer", ["conv", "head"])
def test_the_figures_are_those_of_all_pictures_at_once(layer: str, folder: Path) -> None:
    pictures = write_folder(folder)
    client, _ = make_client(make_card(max_images=5))
    [found] = survey(client, str(folder), model="net", layers=layer).layers
    cells = all_cells(pictures, layer)
    together = cells.swapaxes(0, 1).reshape(cells.shape[1], -1)
    assert found.cells == together.shape[1]
    np.testing.assert_allclose(found.mean, together.mean(axis=1), rtol=1e-13)
    np.testing.assert_allclose(found.deviation, together.std(axis=1), rtol=1e-13)
    np.testing.assert_array_equal(found.minimum, together.min(axis=1))
    np.testing.assert_array_equal(found.maximum, together.max(axis=1))
    np.testing.assert_array_equal(found.sparsity, (together <= 0).mean(axis=1))


def test_a_large_mean_does_not_drown_the_deviation(folder: Path) -> None:
    """A sum of squares would leave eight digits of the deviation."""
    pictures = write_folder(folder)

    def shift(maps: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        return {layer: values + np.float32(4096) for layer, values in maps.items()}

    [head] = survey(make_client(change=shift)[0], str(folder), model="net", layers="head").layers
    values = [shift(make_maps(pixels))["head"].astype(np.float64) for pixels in pictures.values()]
    np.testing.assert_allclose(head.deviation, np.std(values, axis=0), rtol=1e-11)


def test_the_dead_channel_is_found(folder: Path) -> None:
    write_folder(folder)
    conv, head = survey(make_client()[0], str(folder), model="net").layers
    assert np.flatnonzero(conv.dead).tolist() == [DEAD]
    assert not head.dead.any()


class TestSelectivity:
    def test_is_the_index_of_morcos_and_others(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(surveys, "SHUFFLE_BLOCK", 4)
        pictures = write_folder(folder)
        [conv] = survey(make_client()[0], str(folder), model="net", layers=["conv"]).layers
        activity = all_cells(pictures, "conv").mean(axis=2)
        means = np.stack([activity[start : start + 8].mean(axis=0) for start in (0, 8, 16)])
        for channel in (0, 1, 2, FOLLOWER):
            *others, largest = sorted(means[:, channel])
            rest = sum(others) / 2
            assert conv.selectivity[channel] == pytest.approx((largest - rest) / (largest + rest), abs=1e-12)
            assert conv.preferred[channel] == means[:, channel].argmax()

    def test_of_a_channel_that_follows_a_class_is_1_and_far_above_chance(self, folder: Path) -> None:
        write_folder(folder, per_class=20)
        result = survey(make_client()[0], str(folder), model="net", layers="conv")
        [conv] = result.layers
        assert conv.selectivity[FOLLOWER] == 1
        assert conv.chance[FOLLOWER] < conv.chance_max[FOLLOWER] < 0.6
        assert conv.selective[FOLLOWER]
        assert result.classes[conv.preferred[FOLLOWER]].label == "zebra"

    def test_of_channels_that_follow_no_class_is_what_chance_gives(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where the pictures come sorted by class, and are shuffled within small blocks."""
        monkeypatch.setattr(surveys, "SHUFFLE_BLOCK", 16)
        write_folder(folder, per_class=30, classes=tuple("abcdef"))
        [conv] = survey(make_client()[0], str(folder), model="net", layers="conv", shuffles=40).layers
        ratio = conv.selectivity[:3] / conv.chance[:3]
        assert (ratio > 0.4).all()
        assert (ratio < 2).all()
        assert (conv.chance[:3] < 0.06).all()

    def test_is_undefined_for_negative_and_dead_channels(self, folder: Path) -> None:
        write_folder(folder)
        conv, head = survey(make_client()[0], str(folder), model="net").layers
        assert np.isnan(conv.selectivity).tolist() == [channel in (DEAD, SIGNED) for channel in range(6)]
        assert np.isnan(head.selectivity).tolist() == [False, False, True]
        assert not conv.selective[[DEAD, SIGNED]].any()

    def test_is_undefined_with_one_class(self, folder: Path) -> None:
        write_folder(folder, classes=("ant",))
        [conv] = survey(make_client()[0], str(folder), model="net", layers="conv").layers
        assert np.isnan(conv.selectivity).all()


class TestStrongest:
    def test_cells_are_those_of_brute_force(self, folder: Path) -> None:
        pictures = write_folder(folder)
        [conv] = survey(make_client()[0], str(folder), model="net", layers="conv", k=5).layers
        cells = all_cells(pictures, "conv")
        paths = list(pictures)
        for channel, found in enumerate(conv.strongest):
            values = cells[:, channel].max(axis=1)
            best = sorted(range(len(paths)), key=lambda place: (-values[place], place))[:5]
            assert [(cell.value, cell.file) for cell in found] == [(values[place], paths[place]) for place in best]
            places = [divmod(int(cells[place, channel].argmax()), 8) for place in best]
            assert [cell.cell for cell in found] == places
            assert [cell.label for cell in found] == [Path(paths[place]).parent.name for place in best]

    def test_cells_do_not_depend_on_the_order_of_the_pictures(self, folder: Path) -> None:
        """Of the dead channel all are equal: the first pictures are taken."""
        pictures = write_folder(folder)
        results = [survey(make_client()[0], str(folder), model="net", k=4, seed=seed).layers for seed in (0, 1)]
        assert [layer.strongest for layer in results[0]] == [layer.strongest for layer in results[1]]
        assert [cell.file for cell in results[0][0].strongest[DEAD]] == list(pictures)[:4]

    def test_of_few_pictures_there_are_fewer(self, folder: Path) -> None:
        write_folder(folder, per_class=1)
        [conv] = survey(make_client()[0], str(folder), model="net", layers="conv").layers
        assert {len(cells) for cells in conv.strongest} == {3}

    def test_a_picture_of_a_npy_file_has_its_place_in_it(self, folder: Path) -> None:
        folder.mkdir()
        several = np.stack([make_pixels(number, zebra=number == 2) for number in range(4)])
        np.save(folder / "several.npy", several)
        np.save(folder / "zero.npy", make_pixels(9, zebra=False))
        result = survey(make_client()[0], str(folder), model="net", layers="conv", k=1)
        assert result.pictures == 5
        [cell] = result.layers[0].strongest[FOLLOWER]
        assert (cell.picture, cell.place) == (f"{folder}/several.npy[2]", 2)


class TestClasses:
    def test_are_the_subfolders(self, folder: Path) -> None:
        write_folder(folder)
        result = survey(make_client()[0], str(folder), model="net")
        assert result.classes_from == "folders"
        assert [tuple(one) for one in result.classes] == [("ant", 8, 8), ("bee", 8, 0), ("zebra", 8, 8)]

    def test_are_the_predicted_ones_without_subfolders(self, folder: Path) -> None:
        folder.mkdir()
        for number in range(9):
            (folder / f"{number}.png").write_bytes(encode_png(make_pixels(number, zebra=number < 3)))
        result = survey(make_client()[0], str(folder), model="net")
        assert result.classes_from == "predicted"
        assert [tuple(one) for one in result.classes] == [("ant", 6, 6), ("zebra", 3, 3)]
        conv = result.layers[0]
        assert (conv.selectivity[FOLLOWER], result.classes[conv.preferred[FOLLOWER]].label) == (1, "zebra")

    def test_there_are_none_without_scores(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "a.png").write_bytes(encode_png(make_pixels(0, zebra=False)))
        client, _ = make_client(dataclasses.replace(make_card(), classes=(), scores="none"))
        result = survey(client, str(folder), model="net")
        assert (result.classes_from, result.classes) == ("nothing", ())
        assert np.isnan(result.layers[0].selectivity).all()
        assert "no classes" in result.format_table()


class TestRequests:
    def test_ask_for_whole_maps_in_half_precision_many_pictures_at_a_time(self, folder: Path) -> None:
        write_folder(folder)
        client, transport = make_client(make_card(max_images=5))
        survey(client, str(folder), model="net")
        asked = [request for request in transport.requests if request.method == "predict"]
        assert sorted(len(request.pictures) for request in asked) == [4, 5, 5, 5, 5]
        assert {(request.map_dtype, request.pool, request.channels) for request in asked} == {("float16", None, None)}
        assert {request.layers for request in asked} == {("conv", "head")}

    def test_are_small_enough_for_large_maps_and_files(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_folder(folder)
        for limit, room in (("REPLY_BYTES", 4 * (6 * 64 + 3) * 2), ("REQUEST_BYTES", 1000)):
            client, transport = make_client()
            with monkeypatch.context() as patched:
                patched.setattr(surveys, limit, room)
                survey(client, str(folder), model="net")
            sizes = {len(request.pictures) for request in transport.requests if request.method == "predict"}
            assert max(sizes) <= 4, limit

    def test_wrong_options_are_found_first(self, folder: Path) -> None:
        write_folder(folder)
        client, transport = make_client()
        with pytest.raises(UnknownLayer):
            survey(client, str(folder), model="net", layers="nose")
        for options in ({"k": 0}, {"shuffles": 0}):
            with pytest.raises(ValueError, match="at least 1"):
                survey(client, str(folder), model="net", **options)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="is not a folder"):
            survey(client, str(folder / "ant/000.png"), model="net")
        (folder.parent / "empty").mkdir()
        with pytest.raises(UsageError, match="no picture found"):
            survey(client, str(folder.parent / "empty"), model="net")
        assert {request.method for request in transport.requests} == {"model_card"}


class TestConversions:
    def test_are_counted_by_kind(self, folder: Path) -> None:
        write_folder(folder)
        animate(folder / "bee", 3)
        result = survey(make_client()[0], str(folder), model="net")
        assert result.pictures == 27
        assert result.converted == {("first frame only",): 3}
        assert result.format_table().splitlines()[-2:] == ["", "converted (first frame only): 3 of 27 pictures"]
        assert result.to_dict()["converted"] == [{"notes": ["first frame only"], "pictures": 3}]

    def test_are_not_mentioned_where_there_are_none(self, folder: Path) -> None:
        write_folder(folder)
        result = survey(make_client()[0], str(folder), model="net")
        assert result.converted == {}
        assert "converted" not in result.format_table()


class TestFailures:
    def test_of_single_pictures_are_listed_and_the_run_goes_on(self, folder: Path) -> None:
        pictures = write_folder(folder)
        (folder / "bee/zzz.png").write_bytes(b"text")
        (folder / "bee/zzz.gif").write_bytes(b"GIF89a")
        result = survey(make_client()[0], str(folder), model="net", layers="conv")
        assert [(Path(name).name, error.code) for name, error in result.failed] == [
            ("zzz.gif", "unreadable"),
            ("zzz.png", "bad_image"),
        ]
        assert result.pictures == 24
        expected = all_cells(pictures, "conv").mean(axis=(0, 2))
        np.testing.assert_allclose(result.layers[0].mean, expected, rtol=1e-13)

    def test_values_that_are_not_finite_are_a_failure(self, folder: Path) -> None:
        write_folder(folder, per_class=1)
        calls: list[int] = []

        def break_first(maps: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
            calls.append(0)
            return {**maps, "conv": np.full_like(maps["conv"], math.inf)} if len(calls) == 1 else maps

        result = survey(make_client(change=break_first)[0], str(folder), model="net")
        assert [error.code for _, error in result.failed] == ["not_finite"]
        assert np.isfinite(result.layers[0].mean).all()
        assert result.pictures == 2

    def test_of_all_pictures_are_an_error(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "a.png").write_bytes(b"text")
        with pytest.raises(BadImage):
            survey(make_client()[0], str(folder), model="net")
        (folder / "a.png").unlink()
        (folder / "a.gif").write_bytes(b"GIF89a")
        with pytest.raises(ValueError, match=r"no picture of .* could be measured"):
            survey(make_client()[0], str(folder), model="net")


class TestCommand:
    @pytest.fixture
    def run(self, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
        class Point:
            name = "survey"

            def load(self) -> Any:
                return _commands.add_survey

        parser = build_parser([Point()])  # type: ignore[list-item]

        def run(*arguments: str) -> tuple[int, str]:
            options = parser.parse_args(["survey", *arguments, "--model", "net"])
            status = options.run(make_client()[0], options)
            return status, capsys.readouterr().out

        return run

    def test_writes_the_page_and_json(self, run: Callable[..., tuple[int, str]], folder: Path, tmp_path: Path) -> None:
        write_folder(folder)
        page, values = tmp_path / "out/page.html", tmp_path / "out/survey.json"
        status, printed = run(str(folder), "--out", str(page), "--save-json", str(values), "--k", "2")
        assert status == 0
        assert "24 pictures, 3 classes: the subfolders" in printed
        assert f"wrote {page}, {page.stat().st_size:,} bytes" in printed
        assert page.read_text("utf-8").startswith("<!doctype html>")
        saved = json.loads(values.read_text("utf-8"))
        status, printed = run(str(folder), "--k", "2", "--json")
        assert (status, json.loads(printed)) == (0, saved)
        result = survey(make_client()[0], str(folder), model="net", k=2)
        assert saved == json.loads(json.dumps(result.to_dict()))
        channel = saved["layers"][0]["channels"][FOLLOWER]
        assert (channel["selectivity"], channel["preferred"], channel["dead"]) == (1, "zebra", False)
        assert [cell["label"] for cell in channel["strongest"]] == ["zebra", "zebra"]
        assert saved["layers"][0]["channels"][DEAD]["selectivity"] is None

    def test_writes_names_that_are_no_text_or_look_like_html(
        self, run: Callable[..., tuple[int, str]], folder: Path, tmp_path: Path
    ) -> None:
        label = os.fsdecode(b"<i>\xff")
        write_folder(folder, classes=(label, "zebra"))
        page = tmp_path / "page.html"
        assert run(str(folder), "--out", str(page), "--save-json", str(tmp_path / "survey.json"))[0] == 0
        assert "&lt;i&gt;\\udcff" in page.read_text("utf-8")
        assert "<i>" not in page.read_text("utf-8")
        saved = json.loads((tmp_path / "survey.json").read_text("utf-8"))
        assert saved["classes"][0]["label"] == label

    def test_says_which_pictures_failed(self, run: Callable[..., tuple[int, str]], folder: Path) -> None:
        write_folder(folder)
        (folder / "bee/zzz.png").write_bytes(b"text")
        status, printed = run(str(folder), "--layers", "conv")
        assert status == 1
        assert f"{folder}/bee/zzz.png: bad_image: not a picture" in printed
        assert "head" not in printed
