"""Patches of the committed archives, through a real TorchServe, on both transports."""

from __future__ import annotations

import numpy as np
import pytest
from convscope import Client
from convscope_lens import cut_patch, strongest_patches

from tests.pictures import FIVE_BY_FIVE
from tests.server.harness import ROOT

SAMPLES = ROOT / "samples"


def test_a_patch_holds_all_pixels_that_its_cell_answers_to(client: Client) -> None:
    """Noise outside the patch changes nothing in its cell, and noise inside does."""
    card = client.model_card("cifar")
    layer = card.layer("conv2")
    seen = client.explain(SAMPLES / "cat.png", model="cifar", method="picture").picture
    picture = np.ascontiguousarray(seen.transpose(1, 2, 0))  # (H, W, C)
    for cell in ((0, 0), (7, 9), (15, 15)):
        top, left, bottom, right = cut_patch(seen, layer, cell).box
        inside = np.zeros(picture.shape[:2], bool)
        inside[max(top, 0) : bottom, max(left, 0) : right] = True
        noise = np.random.default_rng(0).random(picture.shape, np.float32)
        pictures = [picture, np.where(inside[..., None], picture, noise), np.where(inside[..., None], noise, picture)]
        values = [seen.maps["conv2"][:, *cell] for seen in client.predict(pictures, model="cifar", layers=["conv2"])]
        assert np.allclose(values[0], values[1], rtol=1e-4, atol=1e-5)
        assert not np.allclose(values[0], values[2], rtol=1e-2, atol=1e-2)


def test_the_strongest_cells_are_those_of_the_maps(client: Client) -> None:
    pictures = sorted(SAMPLES.glob("*.png"))
    found = strongest_patches(client, pictures, model="cifar", layer="conv2", channel=5, n=4, per_picture=2)
    maps = [seen.maps["conv2"][0] for seen in client.predict(pictures, model="cifar", layers=["conv2"], channels=[5])]
    expected = sorted((value for cells in maps for value in np.sort(cells, axis=None)[-2:]), reverse=True)[:4]
    assert [patch.value for patch in found] == pytest.approx(expected)
    for patch in found:
        assert maps[patch.picture_index][patch.cell] == pytest.approx(patch.value)
        assert patch.pixels.shape[2] == 3


def test_a_network_of_any_size_without_classes_has_patches_too(client: Client) -> None:
    [patch] = strongest_patches(client, [FIVE_BY_FIVE], model="edges", layer="conv1", channel=0, n=1)
    assert (patch.value, patch.cell, patch.box) == (3.0, (0, 2), (-1, 1, 2, 4))
    assert np.array_equal(patch.pixels[:, :, 0], FIVE_BY_FIVE[0:2, 1:4])
