"""Requests for explanations: what is sent, what comes back, and what can be done with it."""

from __future__ import annotations

import asyncio
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convscope import AsyncClient, BadImage, Client, Explanation, ProtocolError, testing
from convscope._cli import main

from tests.client.stand_in import PIXELS, StandIn


def pixels_of(path: Path) -> np.ndarray[Any, Any]:
    """Read a PNG as this package writes it."""
    data = path.read_bytes()
    width, height, _, kind = struct.unpack(">IIBB", data[16:26])
    start = data.index(b"IDAT") + 4
    rows = np.frombuffer(zlib.decompress(data[start:]), np.uint8).reshape(height, -1)
    return rows[:, 1:].reshape(height, width, 3 if kind == 2 else 1)


def test_every_setting_is_sent(stand_in: StandIn, client: Client) -> None:
    client.explain(b"cat", model="cifar", version="2", layer="conv1", target=0, picture=False, map_dtype="float16")
    client.explain(b"cat", model="cifar", method="occlusion", window=4, step=2, top_k=1)
    client.explain(b"cat", model="cifar", method="integrated_gradients", steps=9)
    first, second, third = (request for *_, request in stand_in.requests)
    assert [version for _, version, _ in stand_in.requests] == ["2", "", ""]
    assert (first.explain.method, first.explain.layer, first.explain.picture) == ("grad_cam", "conv1", False)
    assert first.explain.HasField("target")
    assert (second.explain.method, second.explain.window, second.explain.step) == ("occlusion", 4, 2)
    assert not second.explain.HasField("target")
    assert (second.top_k, second.explain.picture) == (1, True)
    assert third.explain.steps == 9


@pytest.mark.parametrize("map_dtype", ["float32", "float16", "uint8"])
def test_an_explanation_holds_what_came(client: Client, map_dtype: Any) -> None:
    result = client.explain(b"cat", model="cifar", target=4, layer="conv2", map_dtype=map_dtype)
    assert (result.method, result.layer, result.target, result.label) == ("grad_cam", "conv2", 4, "class 4")
    assert (result.heat.shape, result.heat.dtype, result.picture.shape) == ((1, 6, 5), np.float32, PIXELS)
    assert (result.delta, result.error) == (None, None)
    assert result.top == client.predict(b"cat", model="cifar").top
    assert result.prediction.request_id
    assert not result.heat.flags.writeable
    assert 0 <= result.picture.min() < result.picture.max() <= 1


def test_the_most_probable_class_is_explained_unless_said_otherwise(client: Client) -> None:
    result = client.explain(b"cat", model="cifar", method="integrated_gradients")
    assert result.target == result.top[0].index
    assert result.delta == 0.0


def test_a_list_comes_in_order_and_a_bad_picture_fails_when_it_is_read(client: Client) -> None:
    one, bad, two = client.explain([b"one", b"bad", b"two"], model="cifar")
    assert (one, two) == (client.explain(b"one", model="cifar"), client.explain(b"two", model="cifar"))
    assert one != two
    assert isinstance(bad.error, BadImage)
    for read in (lambda: bad.heat, lambda: bad.picture, lambda: bad.top, bad.overlay):
        with pytest.raises(BadImage):
            read()
    assert client.explain([], model="cifar") == []


def test_one_bad_picture_is_raised(client: Client) -> None:
    with pytest.raises(BadImage):
        client.explain(b"bad", model="cifar")


def test_a_service_too_old_to_explain_is_detected(client: Client) -> None:
    with pytest.raises(ProtocolError, match="older"):
        client.explain(b"cat", model="older")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"target": -1}, ValueError),
        ({"target": "cat"}, TypeError),
        ({"window": 0}, ValueError),
        ({"top_k": -1}, ValueError),
    ],
)
def test_settings_out_of_range_are_rejected_before_anything_is_sent(
    stand_in: StandIn, client: Client, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        client.explain(b"cat", model="cifar", **options)
    assert not stand_in.requests


def test_an_explanation_has_the_model_and_the_request_of_its_prediction(client: Client) -> None:
    explanation = client.explain(b"cat", model="cifar", version="2.0", request_id="order-7", timing=True)
    assert (explanation.model, explanation.version, explanation.request_id) == ("cifar", "2.0", "order-7")
    assert explanation.timing == explanation.prediction.timing is not None


def test_a_notebook_shows_scores_and_overlay_and_escapes_every_text(client: Client) -> None:
    html = client.explain(b"cat", model="cifar")._repr_html_()
    assert html.count("<table>") == html.count('src="data:image/png;base64,') == 1
    hostile = testing.explanation(np.ones((1, 2, 2)), label="<b>", method="<i>")
    assert "<img" in hostile._repr_html_()  # The heat alone.
    assert "<i>" not in hostile._repr_html_()
    assert "&lt;i&gt;" in hostile._repr_html_()
    failed = Explanation(testing.prediction(error=BadImage("no <picture>")))
    assert "bad_image: no &lt;picture&gt;" in failed._repr_html_()
    assert not failed.has_heat


def test_what_was_not_requested_says_so(client: Client) -> None:
    bare = client.explain(b"cat", model="cifar", picture=False)
    with pytest.raises(ValueError, match="picture=True"):
        bare.overlay()
    assert bare.heatmap().shape[2] == 3
    alone = client.explain(b"cat", model="cifar", method="picture")
    with pytest.raises(ValueError, match="returns only the network input"):
        _ = alone.heat
    assert alone.target is None


def test_the_asynchronous_client_returns_the_same(url: str) -> None:
    async def ask() -> list[Explanation]:
        async with AsyncClient(url) as client:
            return await client.explain([b"one", b"two"], model="cifar")

    explanations = asyncio.run(ask())
    with Client(url) as client:
        assert explanations == client.explain([b"one", b"two"], model="cifar")


def test_the_overlay_is_large_and_red_where_the_heat_is(client: Client) -> None:
    result = client.explain(b"cat", model="cifar", method="occlusion")
    painted = result.overlay()
    assert painted.dtype == np.uint8
    assert painted.shape == (12 * 22, 10 * 22, 3)
    row, column = np.unravel_index(result.heat[0].argmax(), result.heat[0].shape)
    lowest = np.unravel_index(result.heat[0].argmin(), result.heat[0].shape)
    middle = painted[int((row + 0.5) * 44), int((column + 0.5) * 44)].astype(int)
    cold = painted[int((lowest[0] + 0.5) * 44), int((lowest[1] + 0.5) * 44)].astype(int)
    assert middle[0] > middle[2]
    assert cold[2] > cold[0]


def test_a_figure_shows_picture_heat_and_overlay(client: Client) -> None:
    explanation = client.explain(b"cat", model="cifar", method="input_gradient")
    figure = explanation.figure()
    assert len(figure.axes) == 4  # One is the heat's scale.
    picture, heat, overlay = (place.images[0].get_array() for place in figure.axes[:3])
    assert np.allclose(picture, explanation.picture.transpose(1, 2, 0))
    assert np.allclose(heat, explanation.heat.sum(axis=0))
    assert np.array_equal(overlay, explanation.overlay())
    assert figure.get_suptitle().endswith("input_gradient")


def test_saving_leaves_arrays_pictures_and_a_manifest(client: Client, tmp_path: Path) -> None:
    result = client.explain(b"cat", model="cifar", method="integrated_gradients")
    folder = result.save(tmp_path / "a" / "why")
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "explanation.npz", "heat.png", "overlay.png"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["method"], manifest["target"], manifest["delta"]) == (result.method, result.target, 0.0)
    with np.load(folder / "explanation.npz") as arrays:
        assert np.array_equal(arrays["heat"], result.heat)
        assert np.array_equal(arrays["picture"], result.picture)
    assert np.array_equal(pixels_of(folder / "overlay.png"), result.overlay())
    assert np.array_equal(pixels_of(folder / "heat.png"), result.heatmap())
    with pytest.raises(FileExistsError):
        result.save(folder)


def test_explanations_of_different_heat_are_not_equal(client: Client) -> None:
    one = client.explain(b"cat", model="cifar", target=1)
    assert one != client.explain(b"cat", model="cifar", target=2)
    assert isinstance(one, Explanation)
    assert one != "something else"
    assert "grad_cam" in repr(one)


class TestCommandLine:
    @pytest.fixture
    def pictures(self, tmp_path: Path) -> list[str]:
        for name in ("cat", "bad", "dog"):
            (tmp_path / f"{name}.png").write_bytes(name.encode())
        return [str(tmp_path / f"{name}.png") for name in ("cat", "bad", "dog")]

    def test_explain_shows_and_saves(
        self, url: str, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["explain", *pictures, "--model", "cifar", "--target", "3", "--layer", "conv2", "--url", url]
        assert main([*arguments, "--save", str(tmp_path / "why")]) == 1
        shown = capsys.readouterr().out
        assert "class 3" in shown
        assert "bad_image" in shown
        assert sorted(path.parent.name for path in tmp_path.rglob("overlay.png")) == ["cat", "dog"]

    def test_explain_prints_json(
        self, url: str, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["explain", *pictures[:2], "--model", "cifar", "--method", "occlusion", "--url", url, "--json"]
        assert main([*arguments, "--save", str(tmp_path / "why")]) == 1
        good, bad = json.loads(capsys.readouterr().out)["results"]
        assert (good["method"], good["shape"], good["layer"]) == ("occlusion", [1, 6, 5], None)
        assert good["saved"] == str(tmp_path / "why" / "cat")
        assert bad["error"]["code"] == "bad_image"

    def test_a_file_that_cannot_be_read_does_not_keep_the_others_from_being_explained(
        self, url: str, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        files = [pictures[0], str(tmp_path / "gone.png"), *pictures[1:]]
        assert main(["explain", *files, "--model", "cifar", "--url", url, "--json"]) == 1
        rows = json.loads(capsys.readouterr().out)["results"]
        assert [row["picture"] for row in rows] == files
        assert [row.get("error", {}).get("code") for row in rows] == [None, "unreadable", "bad_image", None]
        with Client(url) as client:
            assert [row["max"] for row in rows[::3]] == [
                client.explain(name, model="cifar").heat.max() for name in (b"cat", b"dog")
            ]
