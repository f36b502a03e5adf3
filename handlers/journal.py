"""The worker's log: one JSON object a line on standard output, which TorchServe copies into its own log.

ASCII on one line, whatever a caller sent: a text with a line break in it could otherwise pass for a line of what the
worker tells TorchServe on the same stream.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from handlers.errors import RequestError
from handlers.trace import Trace

_MAX_TRACEBACK = 20_000  # Characters; an exception's text may hold whatever it failed on.

logger = logging.getLogger(__name__)


class JsonLines(logging.Formatter):
    """Writes a record as JSON.

    Args:
        model: Name it is served under.
        version: Of the archive.
    """

    def __init__(self, model: str, version: str) -> None:
        super().__init__()
        self._identity = {"model": model, "version": version}

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        values = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            **self._identity,
            **getattr(record, "request", {}),
            "message": record.getMessage(),
        }
        if record.exc_info:
            text = self.formatException(record.exc_info)
            half = _MAX_TRACEBACK // 2
            values["traceback"] = text if len(text) <= _MAX_TRACEBACK else f"{text[:half]}\n[...]\n{text[-half:]}"
        return json.dumps(values)


def write_to_standard_output(model: str, version: str) -> None:
    """Send what this package logs to standard output as JSON lines and nowhere else; other loggers stay as they are."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines(model, version))
    package = logging.getLogger("handlers")
    package.handlers = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False


def hush_torchserve(metrics: Any = None) -> None:
    """Switch off the two lines that TorchServe's worker prints for every batch: when it came, and what it took.

    Java reads each, and matches it against expressions; nobody reads them where this package keeps metrics of its own.

    Args:
        metrics: TorchServe's own, as its context has them: what a batch took is not even spelled out then, which costs
            a lone request a twentieth of the worker's time.
    """
    logging.getLogger().setLevel(logging.WARNING)
    if hasattr(metrics, "add_time"):
        metrics.add_time = _nothing


def _nothing(*what: Any, **more: Any) -> None:
    pass


class Samples:
    """Logs one answered request now and then, so that the log shows what is asked for and what it takes.

    Args:
        every_s: Seconds from one to the next, at least; 0 logs none.

    Its line has no `code`: whoever searches a log for codes finds what failed.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._due = float("-inf") if every_s > 0 else float("inf")

    def write(self, traces: Sequence[Trace], handler_s: float) -> None:
        """Log one of a batch's predictions, if it is time.

        Args:
            traces: Of the batch's requests.
            handler_s: What the batch took.
        """
        now = monotonic()
        if now < self._due:
            return
        trace = next((trace for trace in traces if trace.error is None and not trace.is_card), None)
        if trace is None:
            return
        self._due = now + self._every_s
        request = {
            "request_id": trace.request_id,
            "transport": trace.transport,
            "pictures": trace.pictures,
            "reply_bytes": trace.reply_bytes,
            "batch_requests": len(traces),
            "handler_s": round(handler_s, 6),
            **{f"{stage}_s": round(seconds, 6) for stage, seconds in trace.seconds.items()},
        }
        pictures = f"{trace.pictures} picture{'s' if trace.pictures != 1 else ''}"
        logger.info("answered %s in %.1f ms", pictures, 1000 * handler_s, extra={"request": request})


def write_failure(trace: Trace) -> None:
    """Log a request that failed, or one picture of which met something unexpected; of a good one say nothing.

    Level warning; error, with the traceback, where the cause is ours to look into.
    """
    errors = [error for error in (trace.error, *trace.results) if isinstance(error, RequestError)]
    unexpected = next((error for error in errors if error.unexpected is not None), None)
    error = trace.error or unexpected
    if error is None:
        return
    request = {"request_id": trace.request_id, "transport": trace.transport, "code": error.code}
    cause = None if unexpected is None else unexpected.unexpected
    level = logging.WARNING if cause is None else logging.ERROR
    logger.log(level, "%s", error.message, exc_info=cause, extra={"request": request})
