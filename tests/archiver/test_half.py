"""An archive with float16 weights is half as large, and serves the same answers but for rounding."""

import io
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch

from archiver import packing
from archiver.__main__ import main
from handlers import loading
from handlers.images.preprocessing import Preprocessing, to_input
from handlers.network.archive import WEIGHTS
from handlers.networks import Deep
from tests.handlers.support import CIFAR_CLASSES, ask_json

Checkpoint = Callable[..., Path]
PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def trained(checkpoint: Checkpoint) -> Path:
    """A checkpoint of `deep`; weights from seed 0."""
    return checkpoint("deep", classes=list(CIFAR_CLASSES))


@pytest.fixture(scope="module")
def served(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of its archive with float16 weights."""
    folder = tmp_path_factory.mktemp("half")
    assert main(["--checkpoint", str(trained), "--half", "--engine", "torch", "--store", str(folder)]) == 0
    ZipFile(folder / "deep.mar").extractall(folder)
    return folder


def test_deep_is_served_from_float16_weights(served: Path) -> None:
    service = loading.load(served, model="deep", version="1.0", config={}, batch_size=1, gpu=None)
    picture = io.BytesIO()
    np.save(picture, PICTURE)
    [seen] = ask_json(service, {"data": bytearray(picture.getvalue()), "layers": "all"})["results"]
    assert seen["top"][0]["label"] in CIFAR_CLASSES
    assert {name: layer["shape"] for name, layer in seen["maps"].items()} == {
        "block1": [32, 32, 32],
        "block2": [64, 32, 32],
        "block3": [64, 16, 16],
        "block4": [192, 16, 16],
        "block5": [192, 8, 8],
        "block6": [256, 8, 8],
        "block7": [256, 4, 4],
    }


def test_only_matrices_and_kernels_are_rounded(trained: Path, served: Path) -> None:
    state = torch.load(trained, weights_only=True)["state_dict"]
    stored = (served / WEIGHTS).read_bytes()
    assert len(stored) < 0.51 * len(packing.weights(state))
    rounded = packing.read_weights(stored)
    assert rounded["block3.conv.weight"].dtype == rounded["fc.weight"].dtype == torch.float16
    assert rounded["block3.norm.running_var"].dtype == rounded["fc.bias"].dtype == torch.float32
    assert rounded["block3.norm.num_batches_tracked"].dtype == torch.int64


def test_rounding_changes_scores_by_less_than_a_hundredth(trained: Path) -> None:
    state = torch.load(trained, weights_only=True)["state_dict"]
    whole, half = Deep().eval(), Deep().eval()
    whole.load_state_dict(state)
    half.load_state_dict(packing.halved(state))
    pictures = torch.from_numpy(to_input([PICTURE], Preprocessing(3, 32, 32)))
    with torch.inference_mode():
        scores = whole(pictures), half(pictures)
    assert not torch.equal(*scores)
    torch.testing.assert_close(*scores, rtol=0.01, atol=0.01)


def test_rounding_is_offered_for_checkpoints_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--refresh", "--half"])
    assert "--half can only be given with --checkpoint" in capsys.readouterr().err
