"""What a worker keeps after a large request."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.configuration import MALLOC
from tests.thorough import variants

ROOT = Path(__file__).parents[2]
KEPT_MB = 250  # Of a picture of 12 million pixels and its map, 48 MB each, and 500 MB and more within the run.

ASKED = """
import io, sys
from pathlib import Path
from zipfile import ZipFile
import numpy as np, psutil
from handlers import loading
from handlers.wire import convscope_pb2 as wire

folder = Path(sys.argv[1])
ZipFile("model_store/edges.mar").extractall(folder)
service = loading.load(folder, model="edges", version="1.0", config={}, batch_size=1, gpu=None)

def ask(side):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((side, side), np.uint8))
    message = wire.PredictRequest(pictures=[buffer.getvalue()], layers=["conv1"])
    [answer] = service.respond([{"request": message.SerializeToString()}], [{}], ["one"])
    reply = wire.PredictReply.FromString(answer.body)
    assert not reply.HasField("error"), reply.error
    return reply.results[0].maps[0].tensor.shape

process = psutil.Process()
ask(32)
before = process.memory_info().rss
assert list(ask(3464)) == [1, 3464, 3464]
ask(32)
print((process.memory_info().rss - before) // 10**6)
"""


@pytest.mark.parametrize("engine", variants(["onnxruntime"], ["torch"]))
def test_a_worker_gives_back_what_a_large_picture_took(tmp_path: Path, engine: str) -> None:
    environment = {**os.environ, **MALLOC, "CONVSCOPE_ENGINE": engine, "CONVSCOPE_MAX_RESPONSE_BYTES": "100000000"}
    done = subprocess.run(
        [sys.executable, "-c", ASKED, str(tmp_path)], cwd=ROOT, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < KEPT_MB
