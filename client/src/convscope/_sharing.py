"""Asking along: a question goes in a request of its own, or in one that others share; `_coalescing` says which.

It does not know how work is begun beside other work and how one waits; the clients bring hands for that, of threads or
of tasks. A shared request is nobody's own: a caller that gives up leaves it to the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from convscope._coalescing import AT_ONCE, DELAY_S, Coalesce, Lane, Lanes, Share
from convscope._exceptions import (
    ConnectError,
    ConvscopeError,
    DeadlineExceeded,
    RequestRejected,
    ServerError,
    belonging_to,
)
from convscope._forking import renew_after_fork
from convscope._reply import Answer, check_reply
from convscope._request import choose_request_id, fill_request

SHORTEST_S = 20 * DELAY_S  # Waiting for others would take too much of a shorter deadline.

Send = Callable[..., Coroutine[Any, Any, Answer]]


class Hands(Protocol):
    """Works on coroutines beside what their beginner does, and waits for what comes of them."""

    def mailbox(self) -> Any:
        """Make where something is put once, by `set_result`, and taken from by `result`."""

    async def wait(self, mailbox: Any, seconds: float) -> bool:
        """Wait for so long until something is there; say whether it is."""

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin a piece of work; RuntimeError if the client is closed."""


class Sharing:
    """Asks the questions of one client, in shared requests where that pays.

    Args:
        coalesce: `auto`, or `on`: then nobody goes at once.
        send: Sends a request until it is answered; see `BaseClient._send`.
        hands: Work on the shared requests.
    """

    def __init__(self, coalesce: Coalesce, send: Send, hands: Hands) -> None:
        self._at_once = 0 if coalesce == "on" else AT_ONCE
        self._send = send
        self._hands = hands
        self.renew()
        renew_after_fork(self)

    def renew(self) -> None:
        """Begin with nothing on its way."""
        self._lanes = Lanes(self._at_once)

    async def ask(
        self,
        files: list[bytes],
        asked: bytes,
        model: str,
        version: str | None,
        deadline_s: float,
        request_id: str,
    ) -> Answer:
        """Ask about some pictures, perhaps along with others.

        Args:
            files: The pictures.
            asked: What is asked about them, by `build_options`; who asks the same may share a request.
            model: Whom.
            version: Which of it.
            deadline_s: Seconds it may take.
            request_id: Id of the request, where it is the question's own.

        Returns:
            What came back.

        Raises:
            ConvscopeError: No answer came. Raised for this caller alone, whoever else the failure befell.
        """
        if deadline_s < SHORTEST_S:
            return await self._send(fill_request(asked, files, request_id), model, version, deadline_s)
        lane = self._lanes.find(asked, model, version)
        if not lane.enter():
            share = Share(files, deadline_s, self._hands.mailbox())
            found = await self._ask_along(lane, share)
            if isinstance(found, Answer):
                return found
            if found is not None:
                raise found
            deadline_s = share.left_s()
        answer = None
        try:
            answer = await self._send(fill_request(asked, files, request_id), model, version, deadline_s)
            return answer
        finally:
            self._dispatch(lane, lane.finish(len(files), answer))

    async def _ask_along(self, lane: Lane, share: Share) -> Answer | Exception | None:
        """Wait for what comes of a question that is asked together with others; None if it is to be asked alone."""
        done = False
        try:
            first, groups = lane.join(share)
            for group in groups:
                self._dispatch(lane, group)
            if first and not await self._hands.wait(share.mailbox, DELAY_S):
                self._dispatch(lane, lane.expire(share))
            done = await self._hands.wait(share.mailbox, share.left_s())
        finally:
            if not done:  # The deadline passed, or the caller was cancelled; the others go on.
                self._dispatch(lane, lane.forsake(share))
        if not done:
            error = DeadlineExceeded("the deadline passed")
            error.request_id = share.request_id
            raise error
        found: Answer | Exception | None = share.mailbox.result()
        return found

    def _dispatch(self, lane: Lane, group: list[Share]) -> None:
        """Send a group on its way: one by its own caller, several by our hands."""
        if len(group) == 1:
            group[0].mailbox.set_result(None)
        elif group:
            work = self._ask_together(lane, group)
            try:
                self._hands.begin(work)
            except RuntimeError:  # Closed meanwhile; each finds that out for itself.
                work.close()
                self._part(lane, group)
                self._dispatch(lane, lane.finish(len(group), None))

    async def _ask_together(self, lane: Lane, group: list[Share]) -> None:
        """Ask about the pictures of a group in one request, and tell each what came of it."""
        files = [file for share in group for file in share.files]
        request_id = choose_request_id(None)
        for share in group:
            share.request_id = request_id
        answer = None
        try:
            with belonging_to(request_id):
                request = fill_request(lane.asked, files, request_id)
                deadline_s = max(share.left_s() for share in group)
                answer = await self._send(request, lane.model, lane.version, deadline_s, shared=True)
                check_reply(answer.reply, len(files), request_id)
        except (RequestRejected, ServerError) as error:  # Perhaps one's own fault: nobody else is to pay for it.
            answer = None
            self._part(lane, group, error)
        except Exception as error:
            answer = None
            for share in group:
                share.mailbox.set_result(_own(error))
        except BaseException:  # The client is closed.
            for share in group:
                share.mailbox.set_result(ConnectError("the client was closed"))
            raise
        else:
            start = 0
            for share in group:
                own = slice(start, start := start + len(share.files))
                share.mailbox.set_result(answer._replace(own=own))
        finally:
            self._dispatch(lane, lane.finish(len(files), answer))

    def _part(self, lane: Lane, group: list[Share], error: ConvscopeError | None = None) -> None:
        """Let each of a group ask alone."""
        for share in lane.split(group, error):
            share.mailbox.set_result(None)


def _own(error: Exception) -> Exception:
    """Copy an exception that several callers raise, since raising writes into it."""
    own = copy.copy(error)
    own.__cause__ = error.__cause__
    return own
