"""What workers say about requests that failed: one JSON object a line, among their other output."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

MOST_A_SECOND = 50
LONGEST = 500  # Characters of a line for a person.


@dataclass(frozen=True)
class FailedRequest:
    """One request that failed.

    Attributes:
        line: The worker's line as it is, a JSON object.
        model: Name of the model.
        version: Its version.
        request_id: As in the reply.
        code: The error's code.
        message: The error, for people.
    """

    line: str
    model: str
    version: str
    request_id: str
    code: str
    message: str

    def describe(self) -> str:
        """Describe it in one line that is safe to show on a terminal."""
        text = f"{self.model} {self.version} request {self.request_id}: {self.code}: {self.message}"
        text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
        return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def parse(line: str) -> FailedRequest | None:
    """Read a line of a worker's output; None if it is anything but a failed request."""
    if not line.startswith("{"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    told = [entry.get(key) for key in ("model", "version", "request_id", "code", "message")]
    if not all(isinstance(value, str) for value in told):
        return None
    return FailedRequest(line, *told)


class Relay:
    """Passes failed requests on, a bounded number each second, and counts the rest.

    Args:
        tell: Takes a failed request.
        tell_rest: Takes the number of those that were not passed on, once their second is over.
    """

    def __init__(self, tell: Callable[[FailedRequest], None], tell_rest: Callable[[int], None]) -> None:
        self._tell = tell
        self._tell_rest = tell_rest
        self._since = 0.0
        self._told = self._untold = 0

    def pass_on(self, requests: Iterable[FailedRequest], now: float) -> None:
        """Pass on what there is; to be called again and again.

        Args:
            requests: New failed requests.
            now: `time.monotonic()`.
        """
        if now - self._since >= 1:
            self.close()
            self._since, self._told = now, 0
        for request in requests:
            if self._told < MOST_A_SECOND:
                self._told += 1
                self._tell(request)
            else:
                self._untold += 1

    def close(self) -> None:
        """Tell how many were not passed on since this was last said."""
        if self._untold:
            self._tell_rest(self._untold)
            self._untold = 0
