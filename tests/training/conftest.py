"""Small folders of pictures, and runs that take a second."""

from contextlib import nullcontext
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from training.train import main


@pytest.fixture
def write_folder():
    """Return a function that fills a folder with bright and dark pictures, a class each."""

    def write(path, train=20, test=5, size=(28, 28), suffix=".png", classes=("bright", "dark")):
        rng = np.random.default_rng(0)
        for half, count in (("train", train), ("test", test)):
            for label, name in enumerate(classes):
                (path / half / name).mkdir(parents=True)
                for number in range(count):
                    level = 200 if label == 0 else 60
                    picture = rng.normal(level, 25, (*size, 3)).clip(0, 255).astype(np.uint8)
                    Image.fromarray(picture).save(path / half / name / f"{number:03}{suffix}")
        return path

    return write


@pytest.fixture
def pictures(tmp_path, write_folder):
    """A folder of 40 training and 10 test pictures, 28×28."""
    return write_folder(tmp_path / "bright and dark")


@pytest.fixture
def train(pictures, tmp_path):
    """Return a function that trains `digits` on the folder into `tmp_path/<out>`, with one thread.

    It draws curves only where asked to: to draw them takes longer than an epoch.
    """

    def run(*arguments, out="run", model="digits", data=pictures, drawn=False):
        command = ["--model", model, "--data", str(data), "--out", str(tmp_path / out), "--threads", "1"]
        with nullcontext() if drawn else patch("training.curves.draw"):
            return main([*command, "--device", "cpu", *map(str, arguments)])

    return run
