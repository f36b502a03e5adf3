"""Errors of the host itself, before a handler gets the request. For the handlers' errors see `proto/README.md`."""

from __future__ import annotations

STATUS = {
    "bad_request": 400,
    "too_many_images": 413,
    "model_not_found": 404,
    "request_too_large": 413,
    "overloaded": 503,
    "draining": 503,
    "deadline_exceeded": 504,
}
"""HTTP status by code; 500 for any other."""


class Rejected(Exception):
    """A request gets an error instead of a response.

    Args:
        code: Stable code, for programs.
        message: Message, for people.
        status: HTTP status, if it differs from that of the code.
    """

    def __init__(self, code: str, message: str, status: int | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message
        self.status = status or STATUS.get(code, 500)
