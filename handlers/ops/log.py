"""The worker's log: one JSON object per line on standard output, which TorchServe copies into its own log.

It is ASCII on one line, whatever a caller sent: text with a line break could otherwise look like one of the lines that
the worker prints for TorchServe on the same stream.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from time import monotonic

from handlers.api.errors import RequestError
from handlers.api.job import Job

_MAX_TRACEBACK = 20_000  # Characters; an exception's text may hold whatever it failed on.

logger = logging.getLogger(__name__)


class JsonLines(logging.Formatter):
    """Writes a record as JSON.

    Args:
        model: The model's name.
        version: The archive's version.
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


def set_up(model: str, version: str) -> None:
    """Write this package's log to standard output as JSON lines, and nowhere else; other loggers are not changed."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines(model, version))
    package = logging.getLogger("handlers")
    package.handlers = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False


def quiet_torchserve() -> None:
    """Switch off the lines that TorchServe's worker prints for every batch; its warnings stay.

    Java reads each line and matches it against expressions. Nothing reads them where this package keeps metrics.
    """
    logging.getLogger().setLevel(logging.WARNING)


class Samples:
    """Logs a successful request at intervals, so that the log shows typical requests and their times.

    Args:
        every_s: Minimum seconds between two logged requests; 0 logs none.

    Its line has no `code`, so a search for codes finds failures only.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._due = float("-inf") if every_s > 0 else float("inf")

    def write(self, jobs: Sequence[Job], handler_s: float) -> None:
        """Log one prediction of a batch if one is due.

        Args:
            jobs: The batch.
            handler_s: Time of the whole batch.
        """
        now = monotonic()
        if now < self._due:
            return
        job = next((job for job in jobs if job.error is None and not job.predicts_nothing and job.response), None)
        if job is None or job.response is None:
            return
        self._due = now + self._every_s
        count = len(job.pictures)
        request = _identify(job) | {
            "pictures": count,
            "reply_bytes": job.response.size,
            "batch_requests": len(jobs),
            "handler_s": round(handler_s, 6),
            **{f"{stage}_s": round(seconds, 6) for stage, seconds in job.seconds.items()},
        }
        pictures = f"{count} picture{'s' if count != 1 else ''}"
        logger.info("answered %s in %.1f ms", pictures, 1000 * handler_s, extra={"request": request})


def write_failure(job: Job) -> None:
    """Log a request that failed, or that has a picture with an unexpected error; others are not logged.

    The level is warning, or error with the traceback where the cause is a fault of the server.
    """
    errors = [error for error in (job.error, *job.results) if isinstance(error, RequestError)]
    unexpected = next((error for error in errors if error.unexpected is not None), None)
    error = job.error or unexpected
    if error is None:
        return
    request = _identify(job) | {"code": error.code}
    cause = None if unexpected is None else unexpected.unexpected
    level = logging.WARNING if cause is None else logging.ERROR
    logger.log(level, "%s", error.message, exc_info=cause, extra={"request": request})


def _identify(job: Job) -> dict[str, object]:
    """Return what identifies a request: its id, its trace's id if any, and its transport."""
    trace = {"trace_id": job.trace_id} if job.trace_id else {}
    return {"request_id": job.request_id, **trace, "transport": job.transport}
