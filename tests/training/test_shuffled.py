"""Shuffled pictures: one order for all, colours together; and the comparison runs as its command line says."""

import torch

from training.corpus import Corpus, Split
from training.shuffled import main, shuffled


def corpus():
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    return Corpus(
        "noise", ("a", "b"), Split(images[:4], torch.tensor([0, 1, 0, 1])), Split(images[4:], torch.tensor([0, 1]))
    )


def test_every_picture_is_shuffled_alike_and_its_colours_stay_together():
    torch.manual_seed(0)
    whole = corpus()
    mixed = shuffled(whole, seed=3)
    before = torch.cat([whole.train.images, whole.test.images]).flatten(2)
    after = torch.cat([mixed.train.images, mixed.test.images]).flatten(2)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(after, before[:, :, order])
    assert not torch.equal(after, before)
    assert torch.equal(mixed.train.labels, whole.train.labels)
    assert torch.equal(shuffled(whole, seed=3).test.images, mixed.test.images)


def test_both_trainings_are_printed_and_their_accuracies_compared(pictures, capsys):
    assert main(["--model", "digits", "--data", str(pictures), "--epochs", "1", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("epoch  train loss") == 2
    assert "pixels shuffled" in printed
    assert " as they are, " in printed.splitlines()[-1]


def test_data_that_is_not_there_is_an_error(capsys, tmp_path):
    assert main(["--model", "digits", "--data", str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err.startswith("training: ")
