"""Predictions as objects: equality, figures, notebooks, files."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
import sys
from base64 import b64decode
from pathlib import Path

import convscope
import numpy as np
import pytest
from convscope import ClassScore, Prediction
from convscope.pixels import encode_png, grey_tiles, tile_grid, to_display_pixels
from PIL import Image

CELLS = np.random.default_rng(0).normal(size=(10, 4, 6)).astype(np.float32)


def make_prediction(**changes) -> Prediction:
    values = {
        "model": "cifar",
        "version": "1.0",
        "engine": "torch-2.15.0",
        "device": "cpu",
        "top": [ClassScore(3, "cat", 0.75, 2.5), ClassScore(5, "<dog>", 0.25, 1.5)],
        "maps": {"conv1": CELLS},
        "channels": {"conv1": tuple(range(0, 20, 2))},
    }
    return Prediction(**(values | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other"},
        {"device": "cuda:0"},
        {"top": []},
        {"maps": {"conv1": CELLS + 1}},
        {"maps": {"conv2": CELLS}},
        {"channels": {"conv1": tuple(range(10))}},
        {"error": convscope.BadImage("no")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_predictions_are_equal_when_all_they_hold_is(changes):
    assert make_prediction() == make_prediction(maps={"conv1": CELLS.copy()})
    assert make_prediction() != make_prediction(**changes)
    assert make_prediction() != "something else"


def test_equal_errors_make_equal_predictions():
    assert make_prediction(error=convscope.BadImage("no")) == make_prediction(error=convscope.BadImage("no"))
    assert make_prediction(error=convscope.BadImage("no")) != make_prediction(error=convscope.BadImage("yes"))


def test_a_prediction_can_be_copied_and_sent_between_processes():
    for error in (None, convscope.BadImage("no")):
        prediction = make_prediction(error=error)
        assert pickle.loads(pickle.dumps(prediction)) == copy.deepcopy(prediction) == prediction


def test_what_a_prediction_holds_cannot_be_changed_from_outside():
    prediction = make_prediction()
    prediction.top.clear()
    with pytest.raises(TypeError):
        prediction.maps["conv1"] = CELLS  # type: ignore[index]
    assert len(prediction.top) == 2


def test_a_prediction_shows_itself_in_a_line():
    assert repr(make_prediction()) == "Prediction(model='cifar', top='cat 0.750', maps={'conv1': (10, 4, 6)})"
    assert "BadImage('no')" in repr(make_prediction(error=convscope.BadImage("no")))


def test_each_tile_is_scaled_to_its_own_range():
    cells = np.stack([np.array([[0, 1], [2, 4]]), np.array([[-100, 100], [0, 0]]), np.full((2, 2), 7)])
    tiles = grey_tiles(cells.astype(np.float32))
    assert tiles.tolist() == [[[0, 64], [128, 255]], [[0, 255], [128, 128]], [[0, 0], [0, 0]]]


def test_cells_that_are_not_finite_are_black_and_spoil_no_others():
    cells = np.array([[[np.nan, 1], [2, np.inf]], [[np.nan] * 2] * 2, [[-np.inf, 0], [0, 1]]], np.float32)
    assert grey_tiles(cells).tolist() == [[[0, 0], [255, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 255]]]


def test_a_grid_holds_every_tile_in_reading_order():
    grid = tile_grid(CELLS, columns=4)  # 10 tiles: rows of 4, 4 and 2; cells enlarged 11 times: 44 x 66.
    assert grid.shape == (3 * 46 + 2, 4 * 68 + 2)
    for number, tile in enumerate(grey_tiles(CELLS)):
        row, column = divmod(number, 4)
        centres = grid[2 + row * 46 + 5 :: 11, 2 + column * 68 + 5 :: 11][:4, :6]
        assert np.array_equal(centres, tile)
    assert (grid[96:, 140:] == 255).all()
    assert tile_grid(CELLS).shape == (2 * 46 + 2, 8 * 68 + 2)


def test_a_png_is_what_other_programs_read():
    grey = np.random.default_rng(1).integers(0, 256, (7, 13), np.uint8)
    image = Image.open(io.BytesIO(encode_png(grey)))
    image.load()
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), grey)


def test_display_pixels_are_clipped_to_the_range_of_bytes():
    found = to_display_pixels(np.array([[[-1, 0, 0.2], [0.5, 1, 3]]], np.float32))
    assert found.shape == (128, 256, 3)
    assert found[0, [0, -1]].tolist() == [[0, 0, 51], [128, 255, 255]]


def test_a_figure_has_a_numbered_tile_a_channel_scaled_to_its_own_range():
    figure = make_prediction().figure("conv1", columns=4)
    tiles = [place for place in figure.axes if place.images]
    assert len(figure.axes) == 12
    assert [place.get_title() for place in tiles] == [str(number) for number in range(0, 20, 2)]
    assert not any(place.axison for place in figure.axes)
    for place, cells in zip(tiles, CELLS, strict=True):
        assert np.array_equal(place.images[0].get_array(), cells)
        assert place.images[0].get_clim() == (cells.min(), cells.max())
        assert place.images[0].get_cmap().name == "gray"
    assert figure.get_suptitle() == "cifar 1.0: conv1"


def test_a_figure_can_be_saved_and_shows_itself_without_pyplot(tmp_path: Path):
    figure = make_prediction().figure("conv1")
    figure.savefig(tmp_path / "conv1.png")
    with Image.open(tmp_path / "conv1.png") as image:
        assert image.width > 500
    assert Image.open(io.BytesIO(figure._repr_png_())).format == "PNG"


@pytest.mark.parametrize("by_layer", ["maps", "channels"])
def test_a_layer_not_requested_is_a_key_error_that_lists_those_that_were(by_layer: str):
    values = getattr(make_prediction(), by_layer)
    with pytest.raises(KeyError, match="layer 'conv9' was not requested; maps: conv1"):
        values["conv9"]
    assert values.get("conv9") is None
    assert "conv9" not in values
    assert list(values) == ["conv1"]  # Looking does not add it.


def test_a_figure_of_a_layer_not_requested_says_which_were():
    with pytest.raises(KeyError, match="was not requested; maps: conv1"):
        make_prediction().figure("conv9")


def test_a_figure_of_a_map_without_cells_is_rejected():
    with pytest.raises(ValueError, match="pool=1"):
        make_prediction(maps={"conv1": CELLS[:, 0, 0]}).figure("conv1")
    with pytest.raises(ValueError, match="columns"):
        make_prediction().figure("conv1", columns=0)


def test_without_matplotlib_a_figure_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "convscope.figures", raising=False)
    with pytest.raises(ImportError, match=re.escape("pip install 'convscope[figure]'")):
        make_prediction().figure("conv1")


def test_a_notebook_shows_scores_and_tiles_and_no_markup_of_strangers():
    html = make_prediction()._repr_html_()
    assert "<td>cat</td><td>0.7500</td><td>2.500</td>" in html
    assert "&lt;dog&gt;" in html
    assert "<dog>" not in html
    [png] = re.findall(r"data:image/png;base64,([^\"]+)", html)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(b64decode(png)))), tile_grid(CELLS))


def test_a_notebook_shows_what_was_converted_and_no_table_without_scores():
    html = make_prediction(top=[], notes=("<CMYK>",))._repr_html_()
    assert "<p>converted: &lt;CMYK&gt;</p>" in html
    assert "<table>" not in html


def test_a_notebook_shows_an_error_instead_of_raising_it():
    html = make_prediction(error=convscope.BadImage("<b>no</b>"))._repr_html_()
    assert "bad_image: &lt;b&gt;no&lt;/b&gt;" in html


def test_a_saved_prediction_can_be_read_back(tmp_path: Path):
    pooled = CELLS[:3, 0, 0]
    prediction = make_prediction(
        maps={"conv1": CELLS, "conv2": pooled}, channels={"conv1": tuple(range(10)), "conv2": (4, 1, 2)}
    )
    folder = prediction.save(tmp_path / "deep" / "cat")
    assert sorted(path.name for path in folder.iterdir()) == ["conv1.png", "manifest.json", "maps.npz"]
    with np.load(folder / "maps.npz", allow_pickle=False) as maps:
        assert np.array_equal(maps["conv1"], CELLS)
        assert np.array_equal(maps["conv2"], pooled)
    with Image.open(folder / "conv1.png") as image:
        assert np.array_equal(np.asarray(image), tile_grid(CELLS))
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert manifest["versions"].keys() == {"convscope", "numpy", "python"}
    del manifest["versions"]
    assert manifest == {
        "schema_version": 1,
        "source": None,
        "model": "cifar",
        "version": "1.0",
        "engine": "torch-2.15.0",
        "device": "cpu",
        "request_id": "",
        "scores": [
            {"index": 3, "label": "cat", "probability": 0.75, "logit": 2.5},
            {"index": 5, "label": "<dog>", "probability": 0.25, "logit": 1.5},
        ],
        "maps": "maps.npz",
        "layers": {
            "conv1": {"shape": [10, 4, 6], "dtype": "float32", "channels": list(range(10)), "grid": "conv1.png"},
            "conv2": {"shape": [3], "dtype": "float32", "channels": [4, 1, 2], "grid": None},
        },
    }


def test_scores_alone_are_saved_without_maps(tmp_path: Path):
    folder = make_prediction(maps={}, channels={}).save(tmp_path / "cat")
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    assert json.loads((folder / "manifest.json").read_text("utf-8"))["maps"] is None


def test_saving_rejects_a_directory_that_exists_and_leaves_it_alone(tmp_path: Path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "mine").write_text("mine")
    with pytest.raises(FileExistsError):
        make_prediction().save(tmp_path / "cat")
    assert [path.name for path in (tmp_path / "cat").iterdir()] == ["mine"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_saving_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error):
    def fail(*_: object, **__: object) -> None:
        assert list(tmp_path.rglob("maps.npz"))
        assert not (tmp_path / "cat").exists()  # It gets its name when it is complete.
        raise error

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(type(error)):
        make_prediction().save(tmp_path / "cat")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_without_a_result_is_not_saved(tmp_path: Path):
    with pytest.raises(convscope.BadImage):
        make_prediction(error=convscope.BadImage("no")).save(tmp_path / "cat")
    assert list(tmp_path.iterdir()) == []


def test_a_layer_named_by_a_stranger_writes_nowhere_else(tmp_path: Path):
    names = ["../../evil", "/etc/evil", "..", "a b", "a_b", "file"]
    prediction = make_prediction(maps=dict.fromkeys(names, CELLS), channels=dict.fromkeys(names, tuple(range(10))))
    folder = prediction.save(tmp_path / "cat")
    assert [path.name for path in tmp_path.iterdir()] == ["cat"]
    grids = {path.name for path in folder.glob("*.png")}
    assert len(grids) == len(names)
    layers = json.loads((folder / "manifest.json").read_text("utf-8"))["layers"]
    assert {layer["grid"] for layer in layers.values()} == grids
