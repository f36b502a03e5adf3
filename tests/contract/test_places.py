"""Coordinates: the client finds in the original picture the part that the service used, and draws there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from convscope import Client
from convscope._cli import main
from convscope_lens import strongest_patches
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.api import card
from handlers.api.limits import Limits
from handlers.images.preprocessing import Preprocessing
from handlers.network.archive import DESCRIBED, Archive
from handlers.networks import Cifar
from handlers.outputs.response import Identity
from tests.client.conftest import clean_environment
from tests.client.served import serving
from tests.handlers.support import CIFAR_CLASSES, make_service
from tests.pictures import photograph, png
from tests.thorough import tries

__all__ = ["clean_environment"]

RECIPE = Preprocessing(3, 32, 32, resize=(36,), interpolation="bicubic", bgr=True)


@contextmanager
def asked(recipe: Preprocessing) -> Iterator[Client]:
    with (
        serving({"net": make_service(Cifar, recipe, CIFAR_CLASSES)}) as stand_in,
        Client(stand_in.rest_url) as client,
    ):
        yield client


def read_input(recipe: Preprocessing):
    """Return the client's view of a card's input."""
    from convscope._reply import read_card
    from convscope._wire import convscope_pb2 as wire

    network = {"layers": [], "parameters": 0, "multiply_adds": 0, "explanations": [], "default_layer": "", "heads": {}}
    said = {"architecture": "some:Net", "preprocessing": recipe.to_dict(), "layers": {}, "classes": []}
    archive = Archive({**said, DESCRIBED: network}, Path("nowhere"))
    described = card.describe(archive, Identity("net", "1", "torch", "cpu"), Limits(), (), ())
    return read_card(wire.PredictReply.FromString(card.encode(described, "application/x-protobuf").body)).input


side = st.integers(1, 700)
recipes = st.one_of(
    st.builds(lambda h, w: Preprocessing(3, h, w), side, side),
    st.builds(lambda h, w, n: Preprocessing(3, h, w, resize=(n,)), side, side, side),
    st.builds(lambda n: Preprocessing(3, None, None, resize=(n,)), side),
    st.builds(
        lambda h, w, high, wide, fit: Preprocessing(3, h, w, resize=(high, wide), fit=fit),
        side, side, side, side, st.sampled_from(["", "cover", "contain"]),
    ),
    st.just(Preprocessing(3, None, None)),
)  # fmt: skip


@settings(max_examples=tries(100, 300), deadline=None)
@given(recipe=recipes, size=st.tuples(side, side))
def test_client_and_service_agree_where_the_input_lies(recipe: Preprocessing, size: tuple[int, int]) -> None:
    placement, input_spec = recipe.place(size), read_input(recipe)
    if 0 in placement.resized:
        with pytest.raises(ValueError, match="cannot resize"):
            input_spec.original_box((0, 0, 1, 1), size)
        return
    assert input_spec.original_box((0, 0, *placement.size), size) == pytest.approx(placement.region(size))


def test_the_card_says_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with asked(RECIPE) as client:
        found = client.model_card("net").input
        assert (found.resize, found.interpolation, found.antialias, found.bgr) == ((36,), "bicubic", True, True)
        assert main(["card", "net", "--url", client.url]) == 0
    printed = capsys.readouterr().out
    assert "3 channels, BGR, 32×32" in printed
    assert "resized until the shorter side has 36 pixels, bicubic; then the middle 32×32" in printed


def test_what_changes_in_a_cells_box_of_the_original_changes_the_cell_and_nothing_far_from_it_does() -> None:
    """The box ends where the cell's pixels do; the filter reaches two more of the network's pixels."""
    picture, size = photograph(144, 300), (144, 300)
    with asked(RECIPE) as client:
        model = client.model_card("net")
        layer, cell = model.layer("conv1"), (20, 9)
        top, left, bottom, right = model.input.original_box(layer.receptive_field_box(*cell), size)
        rows, columns = (np.arange(length) + 0.5 for length in size)
        reach = 2 * 4  # Original pixels a network's pixel, 144 / 36, twice.
        inside = np.logical_and.outer((rows > top) & (rows < bottom), (columns > left) & (columns < right))
        near = np.logical_and.outer(
            (rows > top - reach) & (rows < bottom + reach), (columns > left - reach) & (columns < right + reach)
        )
        changed = [np.where(mask[:, :, None], 255 - picture, picture) for mask in (inside, ~near)]
        before, touched, far = client.predict(
            [png(each) for each in (picture, *changed)], model="net", layers=["conv1"]
        )
        values = [each.maps["conv1"][:, cell[0], cell[1]] for each in (before, touched, far)]
    assert not np.allclose(values[0], values[1])
    assert values[0] == pytest.approx(values[2], abs=1e-6)


def test_a_patch_says_where_it_is_in_the_original(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    file = tmp_path / "seen.png"
    file.write_bytes(png(photograph(144, 300)))
    with asked(RECIPE) as client:
        [patch] = strongest_patches(client, [file], model="net", layer="conv1", channel=0, n=1)
        model = client.model_card("net")
        box = model.input.original_box(patch.box, (144, 300))
        assert patch.original_box == pytest.approx(box)
        assert main(["strongest", str(file), "--model", "net", "--layer", "conv1", "--channel", "0", "-n", "1",
                     "--url", client.url]) == 0  # fmt: skip
    assert f"{box[0]:.0f} to {box[2] - 1:.0f}, {box[1]:.0f} to {box[3] - 1:.0f}" in capsys.readouterr().out


def test_heat_is_drawn_on_the_original_where_the_network_saw_it() -> None:
    picture = photograph(144, 300)
    with asked(RECIPE) as client:
        found = client.explain(png(picture), model="net", method="occlusion")
        assert found.original_size == (144, 300)
        assert found.region == (8, 88, 136, 216)  # Resized to 36×75, of which the middle begins at (2, 22).
        drawn = found.overlay(picture)
        with pytest.raises(ValueError, match=r"size \(144, 300\), not \(300, 144\)"):
            found.overlay(picture.transpose(1, 0, 2))
        assert np.array_equal(found.overlay(picture[:, :, 0]), found.overlay(picture[:, :, :1]))
    assert drawn.shape == (144, 300, 3)
    coloured = np.ptp(drawn, axis=2) > 0
    assert not coloured[:8].any()
    assert not coloured[:, :88].any()
    assert not coloured[136:].any()
    assert not coloured[:, 216:].any()
    assert coloured[8:136, 88:216].mean() > 0.5
    grey = np.rint(picture.mean(axis=2))
    assert np.abs(drawn[:, :88, 0] - grey[:, :88]).max() <= 1
