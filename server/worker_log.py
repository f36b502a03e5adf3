"""The log lines of workers, mostly about failed requests: a JSON object per line, among their other output."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
MOST_A_SECOND = 50
LONGEST = 500  # Characters of a line for a person.


@dataclass(frozen=True)
class Complaint:
    """A log line of a worker: a failed request, another problem, or a sample of the successful requests.

    Attributes:
        line: The worker's line, a JSON object.
        model: Name of the model.
        version: Its version.
        message: The message, for people.
        request_id: Id of the request, as in its reply; None if the line is not about a request.
        code: Code of the error; None if the request succeeded.
    """

    line: str
    model: str
    version: str
    message: str
    request_id: str | None = None
    code: str | None = None

    def describe(self) -> str:
        """Return one line that is safe to show on a terminal."""
        code = f": {self.code}" if self.code else ""
        about = f" request {self.request_id}{code}" if self.request_id else ""
        text = f"{self.model} {self.version}{about}: {self.message}"
        text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
        return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def parse(line: str) -> Complaint | None:
    """Parse a line of a worker's output; None if it is not a complaint."""
    if not line.startswith("{"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    said = {key: value for key, value in entry.items() if isinstance(value, str)}
    if not {"model", "version", "message"} <= set(said):
        return None
    if said.get("level") not in ("warning", "error", "critical") and "request_id" not in said:
        return None
    return Complaint(line, said["model"], said["version"], said["message"], said.get("request_id"), said.get("code"))


class Relay(Generic[T]):
    """Passes messages on, a limited number per second, and counts the others.

    Args:
        tell: Takes a message.
        tell_rest: Takes the number of messages of a second that were not passed on.
    """

    def __init__(self, tell: Callable[[T], None], tell_rest: Callable[[int], None]) -> None:
        self._tell = tell
        self._tell_rest = tell_rest
        self._since = 0.0
        self._told = self._untold = 0

    def pass_on(self, complaints: Iterable[T], now: float) -> None:
        """Pass on new messages. To be called repeatedly, also without any.

        Args:
            complaints: The new messages.
            now: `time.monotonic()`.
        """
        if now - self._since >= 1:
            self.close()
            self._since, self._told = now, 0
        for complaint in complaints:
            if self._told < MOST_A_SECOND:
                self._told += 1
                self._tell(complaint)
            else:
                self._untold += 1

    def close(self) -> None:
        """Report how many messages were not passed on since the last report."""
        if self._untold:
            self._tell_rest(self._untold)
            self._untold = 0
