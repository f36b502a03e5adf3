"""A recipe's rate, optimizer and augmentation are what its numbers say."""

from dataclasses import replace

import pytest
import torch
from torch import nn, optim

from training.recipes import RECIPES, Recipe

PLAIN = Recipe(epochs=1, batch_size=1, learning_rate=0.5)


@pytest.mark.parametrize(
    ("recipe", "rates"),
    [
        pytest.param(PLAIN, [0.5, 0.5, 0.5, 0.5], id="constant"),
        pytest.param(replace(PLAIN, decay=True), [0.5, 0.45, 0.25, 0.05], id="falling"),
        pytest.param(replace(PLAIN, warm_up=0.2), [0, 0.25, 0.5, 0.5], id="climbing, then constant"),
        pytest.param(replace(PLAIN, warm_up=0.2, decay=True), [0, 0.25, 0.3125, 0.0625], id="climbing, then falling"),
    ],
)
def test_the_rate_climbs_and_falls_in_straight_lines(recipe, rates):
    assert [recipe.rate(progress) for progress in (0, 0.1, 0.5, 0.9)] == pytest.approx(rates)


def test_a_recipe_without_momentum_is_adams_and_one_with_it_is_nesterovs():
    parameters = [nn.Parameter(torch.ones(1))]
    assert isinstance(PLAIN.optimizer(parameters), optim.Adam)
    descent = replace(PLAIN, momentum=0.9, weight_decay=0.01).optimizer(parameters)
    assert isinstance(descent, optim.SGD)
    settings = descent.param_groups[0]
    assert [settings[key] for key in ("lr", "momentum", "nesterov", "weight_decay")] == [0.5, 0.9, True, 0.01]


@pytest.mark.parametrize("name", RECIPES)
def test_without_augmentation_the_network_sees_the_pictures_as_they_are_and_all_else_stays(name):
    recipe = RECIPES[name]
    images = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8)
    plain = recipe.unaugmented()
    assert torch.equal(plain.augment(images, torch.Generator().manual_seed(0)), images)
    fields = ("mirrored", "shift_px", "reflect", "cover_px", "turn_deg", "scale")
    augmentation = {key: getattr(recipe, key) for key in fields}
    assert replace(plain, **augmentation) == recipe
    changed = not torch.equal(recipe.augment(images, torch.Generator().manual_seed(0)), images)
    assert changed == (augmentation != {key: getattr(PLAIN, key) for key in fields})


@pytest.mark.parametrize("added", [{"turn_deg": 45}, {"scale": 1.5}])
def test_turning_and_scaling_change_the_pictures_and_are_cleared_without_augmentation(added):
    recipe = replace(PLAIN, **added)
    images = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8)
    assert not torch.equal(recipe.augment(images, torch.Generator().manual_seed(0)), images)
    assert recipe.unaugmented() == PLAIN
