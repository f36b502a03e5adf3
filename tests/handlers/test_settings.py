"""The settings that a worker reads from its environment."""

from __future__ import annotations

from pathlib import Path

from handlers.settings import Settings


def test_without_an_environment_they_are_those_of_a_stock_torchserve() -> None:
    assert Settings.from_environment({}) == Settings()


def test_every_one_is_read_from_what_the_launcher_sets() -> None:
    environment = {
        "CONVSCOPE_ENGINE": "torch",
        "CONVSCOPE_PRECISION": "bfloat16",
        "CONVSCOPE_THREADS": "3",
        "CONVSCOPE_SCALED_DECODING": "1",
        "CONVSCOPE_MAX_RESPONSE_BYTES": "1000",
        "CONVSCOPE_DRAIN_FILE": "/draining",
        "CONVSCOPE_STARTING_FILE": "/starting",
        "PROMETHEUS_MULTIPROC_DIR": "/metrics",
        "CONVSCOPE_LOG_REQUESTS_S": "0.5",
        "CONVSCOPE_HUSH": "1",
        "CONVSCOPE_PATCHES": "0",
    }
    expected = Settings(
        engine="torch",
        precision="bfloat16",
        threads=3,
        scaled_decoding=True,
        max_response_bytes=1000,
        drain_file=Path("/draining"),
        starting_file=Path("/starting"),
        metrics_dir=Path("/metrics"),
        log_requests_s=0.5,
        is_quiet=True,
        patches=False,
    )
    assert Settings.from_environment(environment) == expected
