"""Reads TorchServe's logs as they grow. Lines become records; a stack trace belongs to its record."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

HEAD = re.compile(r"^\d{4}-\d\d-\d\dT[\d:,]+ \[(?P<level>\w+) *\] (?P<thread>.+?) (?P<logger>\S+) - (?P<text>.*)$")
WORKER = re.compile(r"^W-\d+-(?P<label>.+?)(-stdout|-stderr)?$")


@dataclass
class Record:
    """One entry of a log.

    Attributes:
        level: `INFO`, `WARN`, `ERROR`, ...
        thread: Name of the Java thread that wrote it.
        text: Its first line.
        more: Its further lines, such as a Java stack trace.
    """

    level: str
    thread: str
    text: str
    more: list[str]

    @property
    def label(self) -> str | None:
        """The `<model>_<version>` of the worker that the record is about, or None."""
        match = WORKER.match(self.thread)
        return match["label"] if match else None


class Follower:
    """Reads a log file from its present end.

    Args:
        path: The file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self._rest = b""

    def read(self) -> list[Record]:
        """Return the records that were completed since the last call."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._offset:  # The log was rotated.
                    self._offset, self._rest = 0, b""
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        self._offset += len(data)
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        records: list[Record] = []
        for line in lines:
            text = line.decode("utf-8", "replace").rstrip("\r")
            if match := HEAD.match(text):
                records.append(Record(match["level"], match["thread"], match["text"], []))
            elif records:
                records[-1].more.append(text)
        return records
