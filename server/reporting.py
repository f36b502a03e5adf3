"""Messages on standard error: plain lines for people, or a JSON object per line for log collectors.

A message that cannot be written, to a full disk or a closed pipe, is dropped: that must not end the server.
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
        as_json: Write JSON objects instead of text.
        stream: The stream to write to; None for standard error.
    """

    def __init__(self, *, as_json: bool, stream: TextIO | None = None) -> None:
        self.as_json = as_json
        self._stream = stream or sys.stderr

    def say(self, message: str, *, level: str = "info", source: str = "server", **fields: Any) -> None:
        """Write a message.

        Args:
            message: The message; as text, each of its lines is written as a line.
            level: `info`, `warning` or `error`.
            source: `server`, `worker` or `torchserve`.
            fields: Further fields of the JSON object.
        """
        if self.as_json:
            time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            entry = {"time": time, "level": level, "source": source, "message": message, **fields}
            self._write(json.dumps(entry, ensure_ascii=False))
        else:
            for line in message.splitlines():
                self._write(f"server: {line}")

    def relay(self, complaint: Complaint) -> None:
        """Write a worker's complaint."""
        self._write(complaint.line if self.as_json else f"worker: {complaint.describe()}")

    def _write(self, line: str) -> None:
        write(line, self._stream)


def write(text: str, stream: TextIO) -> None:
    """Write text and a line break, unless the stream fails."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed.
        print(text, file=stream, flush=True)


def drop_unwritten() -> None:
    """Drop buffered output that cannot be written; otherwise Python retries at exit and ends with status 120."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: the stream was closed before Python started.
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
