"""Augmented pictures are mirrored, shifted or covered copies, all choices occur, and the draw decides."""

import pytest
import torch
from torch.nn.functional import pad

from training.augmentation import cover, mirror, shift


def pictures(count):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, 3, 6, 7), dtype=torch.uint8, generator=generator)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def test_half_of_the_pictures_are_mirrored_and_the_others_untouched():
    images = pictures(400)
    mirrored = mirror(images, draw())
    turned = [torch.equal(after, before.flip(2)) for after, before in zip(mirrored, images, strict=True)]
    kept = [torch.equal(after, before) for after, before in zip(mirrored, images, strict=True)]
    assert all(one != other for one, other in zip(turned, kept, strict=True))
    assert 150 < sum(turned) < 250


@pytest.mark.parametrize(("reflect", "mode"), [(False, "constant"), (True, "reflect")])
def test_every_move_within_the_limit_occurs_and_no_other(reflect, mode):
    images = pictures(300)
    shifted = shift(images, 1, draw(), reflect=reflect)
    moves = set()
    for before, after in zip(images, shifted, strict=True):
        padded = pad(before, (1, 1, 1, 1), mode=mode)
        found = [(y, x) for y in range(3) for x in range(3) if torch.equal(after, padded[:, y : y + 6, x : x + 7])]
        assert len(found) == 1
        moves.update(found)
    assert moves == {(y, x) for y in range(3) for x in range(3)}


def test_a_square_of_every_picture_is_covered_everywhere_it_fits_and_nothing_else_changes():
    images = pictures(600).clamp(max=127)
    covered = cover(images, 4, draw())
    places = set()
    for before, after in zip(images, covered, strict=True):
        grey = (after == 128).all(0)
        assert torch.equal(after[:, ~grey], before[:, ~grey])
        ys, xs = torch.nonzero(grey, as_tuple=True)
        assert grey.sum() == 16
        assert (ys.max() - ys.min(), xs.max() - xs.min()) == (3, 3)
        places.add((ys.min().item(), xs.min().item()))
    assert places == {(y, x) for y in range(3) for x in range(4)}


def test_the_draw_decides():
    images = pictures(50)
    for augment in (
        mirror,
        lambda images, generator: shift(images, 2, generator),
        lambda images, generator: cover(images, 2, generator),
    ):
        assert torch.equal(augment(images, draw(1)), augment(images, draw(1)))
        assert not torch.equal(augment(images, draw(1)), augment(images, draw(2)))
