"""Which questions travel together: those asked while others are on their way gather, within bounds, and go as one.

It neither sends nor waits; the clients do, and tell it what became of it. The clock is that of the requests themselves:
whoever finds few on their way goes at once, the others go when one comes back. Safe to use from several threads.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from convscope._exceptions import ConvscopeError, ImageTooLarge, ReplyTooLarge, TooManyImages
from convscope._wire.convscope_pb2 import FLOAT16, UINT8, PredictReply

if TYPE_CHECKING:
    from convscope._reply import Answer

Coalesce: TypeAlias = Literal["auto", "on", "off"]

AT_ONCE = 2  # Requests on their way beside which nobody waits: for few callers this module is as if it were not there.
DELAY_S = 0.005  # The longest that a question waits for others.
MOST_PICTURES = 32  # In a shared request; half of what a server takes unless it is told otherwise.
MOST_REQUEST_BYTES = 2 * 2**20  # TorchServe refuses 6.5 MB unless it is told otherwise,
MOST_REPLY_BYTES = 2 * 2**20  # and reads a reply again from its start for every 64 KB of it.
LONGEST_S = 0.1  # What neighbours may add: where a picture takes long, sharing saves little and keeps workers idle.
FIRST_MOST = 8  # Pictures together while nothing is known of what they take.
LANES = 64
_CELL_BYTES = {FLOAT16: 2, UINT8: 1}  # Else 4.


def check_coalesce(coalesce: Coalesce) -> None:
    """Refuse what is no way of coalescing.

    Raises:
        ValueError: It is none.
    """
    if coalesce not in get_args(Coalesce):
        raise ValueError(f"coalesce must be one of {', '.join(get_args(Coalesce))}, not {coalesce!r}")


class Share:
    """One caller's part of what may be a shared request.

    Args:
        files: Its pictures.
        deadline_s: Seconds from now in which its caller wants it answered.
        mailbox: Where its caller looks for what came of it.
    """

    def __init__(self, files: Sequence[bytes], deadline_s: float, mailbox: Any) -> None:
        self.files = files
        self.size = sum(map(len, files))
        self.mailbox = mailbox
        self.request_id: str | None = None  # Of the shared request.
        self.left = False  # Its caller waits no more.
        self.alone = False  # Its caller is to ask in a request of its own, which counts as on its way already.
        self._ends = time.monotonic() + deadline_s

    def left_s(self) -> float:
        """Return the seconds left until its deadline; a little where none are."""
        return max(self._ends - time.monotonic(), 0.001)


class Lane:
    """The questions to one model with the same options: those on their way, and those that gather.

    Args:
        asked: What they ask, by `build_options`.
        model: Whom.
        version: Which of it.
        at_once: Requests on their way beside which nobody waits.
    """

    def __init__(self, asked: bytes, model: str, version: str | None, at_once: int) -> None:
        self.asked = asked
        self.model = model
        self.version = version
        self._at_once = at_once
        self._lock = threading.Lock()
        self._on_way = 0
        self._gathered: list[Share] = []
        self._pictures = 0  # Of those.
        self._bytes = 0
        self._limit = MOST_PICTURES
        self._alone_s = math.inf  # The least that a request of one picture took.
        self._more_s: float | None = None  # What one picture more takes.
        self._reply_bytes: int | None = None  # Of one picture's maps.

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way and nobody waits."""
        return not self._on_way and not self._gathered

    @property
    def most(self) -> int:
        """How many pictures may share a request now."""
        fitting = min(self._limit, MOST_REPLY_BYTES // max(self._reply_bytes or 0, 1))
        by_time = FIRST_MOST if self._more_s is None else 1 + LONGEST_S / max(self._more_s, 1e-6)
        return int(max(min(fitting, max(by_time, 2)), 1))  # Two, since what is never tried is never known to be fast.

    def enter(self) -> bool:
        """Say whether a question goes at once; it is then on its way, until `finish`."""
        with self._lock:
            if self._on_way >= self._at_once:
                return False
            self._on_way += 1
            return True

    def join(self, share: Share) -> tuple[bool, list[list[Share]]]:
        """Gather a question that does not go at once.

        Args:
            share: It.

        Returns:
            Whether it is the first of those that gather, who is to call `expire` after `DELAY_S`; and the groups that
            are full and go now, it perhaps among them.
        """
        with self._lock:
            groups = []
            most = self.most
            pictures = len(share.files)
            if self._gathered and (self._pictures + pictures > most or self._bytes + share.size > MOST_REQUEST_BYTES):
                groups.append(self._take())
            self._gathered.append(share)
            self._pictures += pictures
            self._bytes += share.size
            if self._pictures >= most or self._bytes >= MOST_REQUEST_BYTES:
                groups.append(self._take())
            return len(self._gathered) == 1, groups

    def expire(self, share: Share) -> list[Share]:
        """Note that a question has waited long enough; return the group that goes now, if it still waits."""
        with self._lock:
            return self._take() if share in self._gathered else []

    def forsake(self, share: Share) -> list[Share]:
        """Note that a caller waits no more; return the group that goes now because of it."""
        with self._lock:
            share.left = True
            if share in self._gathered:
                first = self._gathered[0] is share
                self._gathered.remove(share)
                self._pictures -= len(share.files)
                self._bytes -= share.size
                return self._take() if first and self._gathered else []
            if share.alone:
                self._on_way -= 1
            return self._next()

    def split(self, group: list[Share], error: ConvscopeError | None = None) -> list[Share]:
        """Let each of a group ask alone, since together they failed; return those whose callers still wait.

        Args:
            group: It.
            error: Why; where it was their number or size, fewer go together from now on.
        """
        with self._lock:
            if isinstance(error, TooManyImages | ReplyTooLarge | ImageTooLarge):
                self._limit = max(sum(len(share.files) for share in group) // 2, 1)
            waiting = [share for share in group if not share.left]
            for share in waiting:
                share.alone = True
            self._on_way += len(waiting)
            return waiting

    def finish(self, pictures: int, answer: Answer | None) -> list[Share]:
        """Note that a request is no longer on its way; return the group that goes now because of it.

        Args:
            pictures: How many it was about.
            answer: What came; None where it failed.
        """
        with self._lock:
            self._on_way -= 1
            if answer is not None and answer.reply.results:
                self._learn(pictures, answer.reply, answer.total_s)
            return self._next()

    def _next(self) -> list[Share]:
        return self._take() if self._gathered and self._on_way < self._at_once else []

    def _take(self) -> list[Share]:
        """Send those that gathered on their way."""
        group, self._gathered = self._gathered, []
        self._pictures = self._bytes = 0
        self._on_way += 1
        if len(group) == 1:
            group[0].alone = True
        return group

    def _learn(self, pictures: int, reply: PredictReply, total_s: float) -> None:
        if pictures == 1:
            self._alone_s = min(self._alone_s, total_s)
        else:
            one_s = self._alone_s if self._alone_s < math.inf else total_s / pictures
            more_s = max(total_s - one_s, 0.0) / (pictures - 1)
            self._more_s = more_s if self._more_s is None else (self._more_s + more_s) / 2
            if self._limit <= pictures < MOST_PICTURES:
                self._limit += 1
        if pictures > 1 or self._reply_bytes is None:
            # The first stands for all: shapes are slow to read.
            tensors = (one.tensor for one in next((result.maps for result in reply.results if result.maps), ()))
            self._reply_bytes = sum(math.prod(one.shape) * _CELL_BYTES.get(one.dtype, 4) for one in tensors)


class Lanes:
    """The lanes of one client.

    Args:
        at_once: Requests on their way beside which nobody waits.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._lanes: dict[tuple[str, str | None, bytes], Lane] = {}
        self._lock = threading.Lock()

    def find(self, asked: bytes, model: str, version: str | None) -> Lane:
        """Return the lane of questions like this one.

        Args:
            asked: What is asked, by `build_options`.
            model: Whom.
            version: Which of it.
        """
        key = model, version, asked
        lane = self._lanes.get(key)
        if lane is None:
            with self._lock:
                if len(self._lanes) >= LANES:
                    self._lanes = {key: lane for key, lane in self._lanes.items() if not lane.idle}
                lane = self._lanes.setdefault(key, Lane(asked, model, version, self._at_once))
        return lane
