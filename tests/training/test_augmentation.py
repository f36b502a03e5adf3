"""Augmented pictures are mirrored, shifted, turned or covered copies, all choices occur, and the draw decides."""

import pytest
import torch
from torch.nn.functional import pad

from training.augmentation import cover, mirror, shift, turn


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


def fixed(monkeypatch, angle, power):
    """Let every picture be turned by `angle` and scaled by `power`, in shares of the largest: -1..1."""
    monkeypatch.setattr(torch, "rand", lambda *size, **_: (torch.tensor([[angle], [power]]).expand(size) + 1) / 2)


def test_a_turn_of_nothing_at_its_own_size_is_the_picture():
    images = pictures(50)
    assert torch.equal(turn(images, 0, 1, draw()), images)


@pytest.mark.parametrize(("share", "quarters"), [(1.0, 1), (-1.0, -1)])
def test_a_square_picture_turned_by_90_degrees_is_the_known_one(monkeypatch, share, quarters):
    images = pictures(5)[..., :6]
    fixed(monkeypatch, share, 0.0)
    assert torch.equal(turn(images, 90, 1, draw()), images.rot90(quarters, (2, 3)))


def test_an_oblong_picture_is_turned_without_being_stretched(monkeypatch):
    images = torch.zeros(1, 1, 5, 9, dtype=torch.uint8)
    images[..., 2, 2:7] = 200
    fixed(monkeypatch, 1.0, 0.0)
    assert torch.equal(turn(images, 90, 1, draw())[0, 0, :, 4], torch.full((5,), 200, dtype=torch.uint8))


@pytest.mark.parametrize(("power", "side"), [(1.0, 8), (-1.0, 2)])
def test_a_square_at_twice_the_size_has_twice_the_side_and_at_half_half_of_it(monkeypatch, power, side):
    images = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    images[..., 6:10, 6:10] = 200
    fixed(monkeypatch, 0.0, power)
    assert (turn(images, 0, 2, draw())[0, 0, 8, 4:12] > 100).sum() == side


def test_each_picture_is_turned_by_an_angle_of_its_own_and_keeps_shape_and_dtype():
    images = pictures(1).expand(20, -1, -1, -1)
    turned = turn(images, 45, 1.5, draw())
    assert (turned.shape, turned.dtype) == (images.shape, torch.uint8)
    assert len({tuple(picture.flatten().tolist()) for picture in turned}) == 20


def test_the_draw_decides():
    images = pictures(50)
    for augment in (
        mirror,
        lambda images, generator: shift(images, 2, generator),
        lambda images, generator: cover(images, 2, generator),
        lambda images, generator: turn(images, 45, 1.5, generator),
    ):
        assert torch.equal(augment(images, draw(1)), augment(images, draw(1)))
        assert not torch.equal(augment(images, draw(1)), augment(images, draw(2)))
