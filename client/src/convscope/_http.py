"""One answer of HTTP/1.1, put together as it comes. Nothing here reads or waits.

httptools, which is Node's parser llhttp, reads heads, and bodies that come in chunks. A body whose length its head
tells is kept from it: it would make an object of every piece, where all that is to be done is to count. h11, written in
Python, copied a body three times (its source).
"""

from __future__ import annotations

from typing import Any

import httpcore
import httptools

from convscope._exceptions import ReplyTooLarge
from convscope._transport import MAX_MESSAGE_BYTES

_MOST_HEAD_BYTES = 100 * 1024  # As h11 has it.
_BLANK_LINE = b"\r\n\r\n"
_BODILESS = (204, 304)


class Incoming:
    """An answer as it comes.

    Args:
        bodiless: Whether it ends with its head, whatever that says, as one to CONNECT does.

    Attributes:
        status: HTTP's; 0 while its head is not known.
        reason: The words beside it.
        headers: By name in lower case; of several the last.
        complete: Whether all of it has come.
        reusable: Whether its connection may carry another request once it is complete.
    """

    def __init__(self, *, bodiless: bool = False) -> None:
        self.complete = False
        self.reusable = False
        self._bodiless = bodiless
        self._parser: Any = httptools.HttpResponseParser(self)
        self._head_bytes = 0
        self._size = 0
        self._pieces: list[bytes | memoryview] = []
        self._begin()

    def _begin(self) -> None:
        self.status = 0
        self.reason = ""
        self.headers: dict[bytes, bytes] = {}
        self._left: int | None = None  # Bytes of the body that are to come; None while nobody knows.

    def take(self, data: bytes) -> None:
        """Take what came.

        Args:
            data: The next bytes of the connection, at least one.

        Raises:
            httpcore.RemoteProtocolError: This is not HTTP/1.1.
            ReplyTooLarge: The body is over this client's limit.
        """
        start = 0
        while not self.status and start < len(data):
            found = data.find(_BLANK_LINE, start)
            end = len(data) if found < 0 else found + len(_BLANK_LINE)
            self._parse(data[start:end])
            if not self.status:
                self._head_bytes += end - start
                if self._head_bytes > _MOST_HEAD_BYTES:
                    raise httpcore.RemoteProtocolError("an answer's head does not end")
            start = end
        if start < len(data):
            rest = memoryview(data)[start:] if start else data
            if self.complete:
                self.reusable = False  # It seems to be the next answer, to nobody's question.
            elif self._left is None:
                self._parse(rest)
            else:
                self._count(rest, self._left)
        if self.complete:
            self._parser = None  # It holds this, and both would stay, with the body, until Python looks for cycles.

    def end(self) -> None:
        """Take note that the connection was closed.

        Raises:
            httpcore.ReadError: The answer is not complete.
        """
        self.reusable = False
        if self.status and self._left is None and b"transfer-encoding" not in self.headers:
            self.complete = True  # It said in no other way how long it is.
        self._parser = None
        if not self.complete:
            raise httpcore.ReadError("the server closed the connection before its answer was complete")

    def body(self) -> bytes:
        """Return its body, once it is complete."""
        if len(self._pieces) == 1:
            return bytes(self._pieces[0])
        return b"".join(self._pieces)

    def _count(self, data: bytes | memoryview, left: int) -> None:
        """Take a piece of a body whose length is known, and perhaps what came after it."""
        if len(data) > left:
            self.reusable = False
            data = memoryview(data)[:left]
        self._pieces.append(data)
        self._left = left - len(data)
        self.complete = not self._left

    def _parse(self, data: bytes | memoryview) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:  # What one of those below raised.
            raise error.__context__ or error from None
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self.complete:
                raise httpcore.RemoteProtocolError(str(error)) from error
            self.reusable = False

    # What httptools calls.

    def on_message_begin(self) -> None:
        if self.complete:
            self.reusable = False

    def on_status(self, reason: bytes) -> None:
        if not self.status:  # Else of the next answer.
            self.reason = reason.decode("ascii", "replace")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:  # Else it stands behind the body, or belongs to the next answer.
            self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self.complete:  # Of the next answer.
            return
        if not self._parser.get_http_version().startswith("1."):
            raise httpcore.RemoteProtocolError("this is another version of HTTP")
        self.status = self._parser.get_status_code()
        if self.status < 200:  # Only says that the answer is to come.
            if self.headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in self.headers:
                raise httpcore.RemoteProtocolError("an interim answer has a body")
            return
        self.reusable = self._bodiless or self._parser.should_keep_alive()
        if self._bodiless or self.status in _BODILESS:
            self._left = 0
        elif b"content-length" in self.headers:  # The parser knows it for a number, and for the only such header.
            self._left = int(self.headers[b"content-length"])
            if self._left > MAX_MESSAGE_BYTES:
                raise _too_large()
        self.complete = self._left == 0

    def on_body(self, piece: bytes) -> None:
        if self._left is not None:  # Came along with what seemed to be the head's last bytes.
            self._count(piece, self._left)
            return
        self._size += len(piece)
        if self._size > MAX_MESSAGE_BYTES:
            raise _too_large()
        self._pieces.append(piece)

    def on_message_complete(self) -> None:
        if self.status < 200:
            self._begin()
        else:
            self.complete = True


def _too_large() -> ReplyTooLarge:
    return ReplyTooLarge(f"the reply is over this client's limit of {MAX_MESSAGE_BYTES} bytes")
