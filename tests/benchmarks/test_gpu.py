"""The parts of the GPU benchmark that need no GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Rates, measure, rates, table
from tests.handlers.test_cuda_graphs import Recorder

CPU = torch.device("cpu")


def test_without_a_gpu_it_says_so_and_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="measures a CUDA GPU, and torch sees none here"):
        gpu.main([])


def test_the_floor_is_bytes_by_the_bus_and_multiply_adds_by_the_arithmetic() -> None:
    found = Rates(to_device=2e9, to_host=1e9, multiply_adds={"float32": 1e12, "float16": 4e12})
    assert found.floor_us(2000, 3000, 10**6, "float32") == pytest.approx((4.0, 1.0))
    assert found.floor_us(2000, 3000, 10**6, "float16")[1] == pytest.approx(0.25)


def test_every_way_is_measured_for_every_batch_and_dtype() -> None:
    found = rates(CPU, size=1024, matrix=16, repeats=1)
    assert min(found.to_device, found.to_host, *found.multiply_adds.values()) > 0
    recorder = Recorder()
    records = measure("digits", CPU, found, 1, (1, 2), recorder)
    assert len(records) == 8 * 2 * 3
    assert len({(one.way, one.batch, one.map_dtype) for one in records}) == len(records)
    assert recorder.recordings == 4 * 2, "one a way with graphs and batch; dtypes of maps are made afterwards"
    assert all(0 < one.least_us <= one.median_us for one in records)
    copies = {one.map_dtype: one.copies_us for one in records if one.batch == 1}
    assert copies["uint8"] < copies["float16"] < copies["float32"], "only what was asked for is copied"
    assert len(table(records).strip().splitlines()) == len(records) + 2
