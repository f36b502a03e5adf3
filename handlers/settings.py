"""Settings: everything a worker reads from its environment. The launcher sets it (`server/configuration.py`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

STOCK_MAX_RESPONSE_BYTES = 6_553_500  # TorchServe's default max_response_size; a longer response kills the worker.


@dataclass(frozen=True)
class Settings:
    """A worker's settings; the defaults are those of a stock TorchServe.

    Attributes:
        engine: `auto`, `torch`, `onnxruntime` or `openvino` (`CONVSCOPE_ENGINE`).
        precision: `float32`, `float16` or `bfloat16` (`CONVSCOPE_PRECISION`).
        threads: Number of threads of one forward pass, and of decoding (`CONVSCOPE_THREADS`). TorchServe starts a
            worker per core, so the default is 1.
        scaled_decoding: Decode large JPEGs to a part of their size (`CONVSCOPE_SCALED_DECODING`; 1 for yes).
        max_response_bytes: TorchServe's `max_response_size` (`CONVSCOPE_MAX_RESPONSE_BYTES`).
        drain_file: While this file exists, readiness fails (`CONVSCOPE_DRAIN_FILE`).
        starting_file: While this file exists, readiness fails, and requests are neither counted nor logged
            (`CONVSCOPE_STARTING_FILE`).
        metrics_dir: Folder of the metrics' files; None for no metrics (`PROMETHEUS_MULTIPROC_DIR`).
        log_requests_s: Least seconds between two successful requests in the log; 0: none (`CONVSCOPE_LOG_REQUESTS_S`).
        is_quiet: Do not log the lines that TorchServe logs for every batch (`CONVSCOPE_HUSH`).
        sends_spans: Whether OpenTelemetry's variables say where spans go, and do not switch them off
            (`OTEL_EXPORTER_OTLP_ENDPOINT`; `OTEL_SDK_DISABLED`, `OTEL_TRACES_EXPORTER`).
        patches: Whether `handlers.torchserve` may patch TorchServe's worker (`CONVSCOPE_PATCHES`; 0 for not).
    """

    engine: str = "auto"
    precision: str = "float32"
    threads: int = 1
    scaled_decoding: bool = False
    max_response_bytes: int = STOCK_MAX_RESPONSE_BYTES
    drain_file: Path | None = None
    starting_file: Path | None = None
    metrics_dir: Path | None = None
    log_requests_s: float = 0.0
    is_quiet: bool = False
    sends_spans: bool = False
    patches: bool = True

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the settings; `environment` is this process's unless given."""
        values = os.environ if environment is None else environment

        def path(name: str) -> Path | None:
            return Path(values[name]) if values.get(name) else None

        return cls(
            engine=values.get("CONVSCOPE_ENGINE", cls.engine),
            precision=values.get("CONVSCOPE_PRECISION", cls.precision),
            threads=int(values.get("CONVSCOPE_THREADS", cls.threads)),
            scaled_decoding=values.get("CONVSCOPE_SCALED_DECODING", "0") == "1",
            max_response_bytes=int(values.get("CONVSCOPE_MAX_RESPONSE_BYTES", cls.max_response_bytes)),
            drain_file=path("CONVSCOPE_DRAIN_FILE"),
            starting_file=path("CONVSCOPE_STARTING_FILE"),
            metrics_dir=path("PROMETHEUS_MULTIPROC_DIR"),
            log_requests_s=float(values.get("CONVSCOPE_LOG_REQUESTS_S") or 0),
            is_quiet=bool(values.get("CONVSCOPE_HUSH")),
            sends_spans=sends_spans(values),
            patches=values.get("CONVSCOPE_PATCHES", "1") != "0",
        )


def sends_spans(environment: Mapping[str, str]) -> bool:
    """Return whether OpenTelemetry's variables ask for spans; as specified, an empty variable counts as unset."""
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    is_off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return any(map(environment.get, endpoints)) and not is_off and environment.get("OTEL_TRACES_EXPORTER") != "none"
