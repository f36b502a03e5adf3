"""What the person or the log collector at standard error reads: plain lines, or a JSON object a line.

Telling never ends serving: what cannot be written, to a full disk or a closed pipe, is lost.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
from typing import Any, TextIO

from server.worker_log import Complaint


class Reporter:
    """Writes to standard error.

    Args:
        as_json: JSON objects rather than text.
        stream: Where to; None for standard error.
    """

    def __init__(self, *, as_json: bool, stream: TextIO | None = None) -> None:
        self.as_json = as_json
        self._stream = stream or sys.stderr

    def say(self, message: str, *, level: str = "info", source: str = "server", **fields: Any) -> None:
        """Tell something.

        Args:
            message: What; as text every line of it gets a line of its own.
            level: `info`, `warning` or `error`.
            source: Whom it is about: `server`, `worker` or `torchserve`.
            fields: More to say in JSON.
        """
        if self.as_json:
            time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            entry = {"time": time, "level": level, "source": source, "message": message, **fields}
            self._write(json.dumps(entry, ensure_ascii=False))
        else:
            for line in message.splitlines():
                self._write(f"server: {line}")

    def relay(self, complaint: Complaint) -> None:
        """Pass on what a worker complains of."""
        self._write(complaint.line if self.as_json else f"worker: {complaint.describe()}")

    def _write(self, line: str) -> None:
        write(line, self._stream)


def write(text: str, stream: TextIO) -> None:
    """Write text and a line break, if that can be done."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed.
        print(text, file=stream, flush=True)


def let_go() -> None:
    """Drop what could not be written; else Python tries once more as it ends, and ends with status 120."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: it was closed from the start.
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
