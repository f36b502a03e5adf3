"""`CONVSCOPE_PRECISION`, which `--precision` sets, with a committed archive; `--engine` is in test_traces.py."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from handlers import loading
from handlers.settings import Settings
from handlers.wire import convscope_pb2 as wire
from tests.e2e.conftest import STORE
from tests.e2e.reference import by_hand
from tests.handlers.support import ask_message, cells
from tests.server.harness import ROOT

CAT = ROOT / "samples/cat.png"


def test_16_bits_are_near_float32_and_the_card_says_so(tmp_path: Path) -> None:
    zipfile.ZipFile(STORE / "cifar.mar").extractall(tmp_path)
    settings = Settings.from_environment({"CONVSCOPE_PRECISION": "bfloat16"})
    service = loading.load(tmp_path, model="cifar", version="1.0", config={}, batch_size=1, gpu=None, settings=settings)
    seen = ask_message(service, wire.PredictRequest(pictures=[CAT.read_bytes()], layers=["all"]))
    assert seen.engine.endswith("-bfloat16")
    assert ask_message(service, wire.PredictRequest(describe=True)).card.engine == seen.engine
    expected = by_hand(np.asarray(Image.open(CAT).convert("RGB")))
    for found in seen.results[0].maps:
        off = np.abs(cells(found) - expected[found.layer]).max() / np.abs(expected[found.layer]).max()
        assert 1e-5 < off < 5e-2, found.layer
