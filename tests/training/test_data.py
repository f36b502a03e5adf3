"""Every source gives the pictures that serving would give, or says which file is wrong."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from handlers.images.decoding import decode
from handlers.images.preprocessing import Preprocessing
from training import data
from training.corpus import statistics
from training.errors import DataError

GREY, COLOUR = Preprocessing(1, 28, 28), Preprocessing(3, 32, 32)


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png", ".webp"])
@pytest.mark.parametrize("preprocessing", [GREY, COLOUR], ids=["grey", "colour"])
def test_a_folders_pictures_are_prepared_as_in_serving(tmp_path, write_folder, suffix, preprocessing):
    path = write_folder(tmp_path, train=3, test=2, size=(40, 30), suffix=suffix)
    corpus = data.load(str(path), preprocessing, name="greys")
    assert (corpus.name, corpus.classes) == ("greys", ("bright", "dark"))
    assert corpus.train.images.dtype == torch.uint8
    assert corpus.train.images.shape == (6, preprocessing.channels, preprocessing.height, preprocessing.width)
    assert corpus.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    files = sorted((path / "test").glob("*/*"))
    served = [decode(file.read_bytes(), preprocessing)[0].transpose(2, 0, 1) for file in files]
    assert np.array_equal(corpus.test.images.numpy(), np.stack(served))


def test_a_folder_is_called_by_its_own_name(pictures):
    assert data.load(str(pictures), GREY).name == "bright and dark"


def test_a_class_without_test_pictures_keeps_the_others_labels(tmp_path, write_folder):
    path = write_folder(tmp_path, train=2, test=2, classes=("a", "b", "c"))
    for file in (path / "test" / "b").iterdir():
        file.unlink()
    (path / "test" / "b").rmdir()
    assert data.load(str(path), GREY).test.labels.tolist() == [0, 0, 2, 2]


def test_other_files_and_hidden_folders_are_passed_over(pictures):
    (pictures / "train" / "dark" / "notes.txt").write_text("not a picture")
    (pictures / "train" / ".thumbnails").mkdir()
    corpus = data.load(str(pictures), GREY)
    assert (len(corpus.train), corpus.classes) == (40, ("bright", "dark"))


@pytest.mark.parametrize("missing", ["", "train", "test"])
def test_a_missing_folder_is_named(tmp_path, missing):
    (tmp_path / "set").mkdir()
    for half in ("train", "test"):
        if half != missing:
            (tmp_path / "set" / half).mkdir()
    path = tmp_path / "set" if missing else tmp_path / "nowhere"
    with pytest.raises(DataError, match=f"there is no folder {path / missing}"):
        data.load(str(path), GREY)


def test_an_empty_class_is_named(pictures):
    (pictures / "train" / "empty").mkdir()
    with pytest.raises(DataError, match=r"train/empty holds no pictures \(\.jpg, \.jpeg, \.png, \.webp\)"):
        data.load(str(pictures), GREY)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\nbut cut off"])
def test_an_unreadable_picture_is_named(pictures, content):
    (pictures / "test" / "dark" / "000.png").write_bytes(content)
    with pytest.raises(DataError, match=r"test/dark/000\.png: "):
        data.load(str(pictures), GREY)


def test_a_test_class_that_train_does_not_have_is_named(pictures):
    (pictures / "test" / "zebra").mkdir()
    with pytest.raises(DataError, match="test has classes that train does not have: zebra"):
        data.load(str(pictures), GREY)


def test_a_test_folder_without_classes_is_refused(pictures):
    (pictures / "test").rename(pictures / "old")
    (pictures / "test").mkdir()
    with pytest.raises(DataError, match=r"there are no class folders in .*test"):
        data.load(str(pictures), GREY)


def test_one_class_is_not_enough(tmp_path, write_folder):
    with pytest.raises(DataError, match="train has 1 class folders; at least two are needed"):
        data.load(str(write_folder(tmp_path, classes=("only",))), GREY)


def test_the_digits_are_split_evenly_the_same_way_each_time():
    first, second = data.load("digits", GREY), data.load("digits", GREY)
    assert first.classes == tuple("0123456789")
    assert first.train.images.shape == (4000, 1, 28, 28)
    assert torch.bincount(first.train.labels).tolist() == [400] * 10
    assert torch.bincount(first.test.labels).tolist() == [100] * 10
    assert first.digest() == second.digest()
    every = torch.cat([first.train.images, first.test.images]).flatten(1)
    assert len(torch.unique(every, dim=0)) == 5000


def test_grey_digits_for_a_colour_network_are_refused():
    with pytest.raises(DataError, match=r"MNIST digits .*1 channel in its last axis; this network takes 3"):
        data.load("digits", COLOUR)


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    """CIFAR-10 as torchvision keeps it, of 20 and 10 random pictures."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("one", "two", "test"):
        rows = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": list(range(10))}))
    names = [f"class {number}" for number in range(10)]
    (folder / "meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(CIFAR10, "train_list", [["one", None], ["two", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test", None]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": None})
    return tmp_path


def test_cifar10_is_read_from_torchvisions_own_files(cifar_root):
    corpus = data.load("cifar10", COLOUR, root=cifar_root)
    assert (corpus.name, corpus.classes[3]) == ("CIFAR-10", "class 3")
    assert corpus.train.images.shape == (20, 3, 32, 32)
    assert corpus.train.labels.tolist() == [*range(10), *range(10)]
    stored = pickle.loads((cifar_root / CIFAR10.base_folder / "test").read_bytes())
    assert np.array_equal(corpus.test.images.numpy().reshape(10, 3072), stored["data"])


def test_cifar10_for_a_grey_network_is_refused(cifar_root):
    with pytest.raises(DataError, match=r"CIFAR-10: .*3 channels in its last axis; this network takes 1"):
        data.load("cifar10", GREY, root=cifar_root)


def test_cifar10_without_files_or_network_says_what_to_do(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no route")

    monkeypatch.setattr(CIFAR10, "download", offline)
    with pytest.raises(DataError, match=r"could not be downloaded \(no route\); unpack cifar-10-python.tar.gz there"):
        data.load("cifar10", COLOUR, root=tmp_path)


def test_statistics_are_those_of_the_pixels():
    images = torch.randint(0, 200, (50, 3, 8, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean, std = statistics(images)
    values = images.double() / 255
    assert mean == tuple(round(value, 4) for value in values.mean((0, 2, 3)).tolist())
    assert std == tuple(round(value, 4) for value in values.std((0, 2, 3), correction=0).tolist())


def test_a_channel_of_one_value_can_be_normalised():
    assert statistics(torch.full((2, 1, 3, 3), 51, dtype=torch.uint8)) == ((0.2,), (1.0,))


def test_the_digest_tells_pictures_labels_and_class_names_apart(tmp_path, write_folder, pictures):
    original = data.load(str(pictures), GREY).digest()
    (pictures / "train" / "dark").rename(pictures / "train" / "gloomy")
    (pictures / "test" / "dark").rename(pictures / "test" / "gloomy")
    assert data.load(str(pictures), GREY).digest() != original
    Image.new("L", (28, 28)).save(pictures / "test" / "gloomy" / "000.png")
    assert data.load(str(write_folder(tmp_path / "again")), GREY).digest() == original
