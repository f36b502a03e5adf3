"""TorchServe's failures in plain words, read from its logs. What the logs do not tell is not guessed.

It reads files alone: it knows nothing of processes or ports. Only Java learns how a worker's process ended, and does
not log it. That the kernel killed a process of this container for want of memory, the kernel counts.
"""

from __future__ import annotations

import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from server.configuration import PrivateDirectory
from server.logs import Follower, Record
from server.models import Archive
from server.worker_log import Complaint, parse

MISSING = re.compile(r"^ModuleNotFoundError: No module named '(?P<module>[^']+)'")
LAST_LINE = re.compile(r"^(?P<error>[A-Za-z_][\w.]*)(: |$)")
NO_ANSWER = "Backend worker did not respond in given time"
# What TorchServe's thread for a worker logs where an exception ends it, other than that the worker failed.
THREAD_ENDS = ("Backend worker thread exception.", "IllegalStateException error", "Out of memory error when creating")
# A worker's lines: after the first a traceback is about a request, after the second about the worker.
REQUEST_FAILED = ("Invoking custom service failed", "Prediction error", "System out of memory", "CUDA out of memory")
WORKER_LINES = ("Torch worker started.", "Backend worker process died.", "Load model ")
CALLER_LEFT = ("Connection reset by peer", "Broken pipe")
KEPT_LINES = 400  # of each worker's output; a traceback is far shorter
# Another thread copies a worker's output: the report of its death may be written before its last words. Seconds waited
# for more words, and for any that tell the cause.
LAST_WORDS_S = 1.0
SILENCE_S = 5.0

CGROUPS = Path("/sys/fs/cgroup")

# The import name differs from the name to install.
PACKAGES = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "google": "protobuf",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


@dataclass
class News:
    """What the logs say that was not known before.

    Attributes:
        failures: Sentences, one per archive that cannot be loaded or whose worker died.
        retried: Those of them about a worker that TorchServe says it starts again.
        warnings: First lines of TorchServe's other warnings.
        complaints: What workers complain of, requests that failed above all.
    """

    failures: list[str] = field(default_factory=list)
    retried: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)
    complaints: list[Complaint] = field(default_factory=list)


class Diagnosis:
    """What the logs say has gone wrong so far.

    Args:
        directory: Where the logs are.
        archives: The archives being served.
        cgroups: The kernel's folder of control groups.
    """

    def __init__(self, directory: PrivateDirectory, archives: Sequence[Archive], cgroups: Path = CGROUPS) -> None:
        self._torchserve = Follower(directory.torchserve_log)
        self._models = Follower(directory.models_log)
        self._archives = {archive.label: archive for archive in archives}
        self._said: defaultdict[str, list[str]] = defaultdict(list)
        self._dead: dict[str, float] = {}  # Labels whose worker died, and when we read so (monotonic seconds).
        self._late: set[str] = set()  # Those of them whose worker TorchServe ended, since it did not answer.
        self._exceptions: dict[str, str] = {}  # What ended TorchServe's thread for the worker of a label.
        self._retried: set[str] = set()
        self._cgroups = cgroups
        self._killed = count_memory_kills(cgroups)

    def read(self) -> News:
        """Read on in the logs.

        What workers complain of is kept apart from their other output.
        """
        news = News()
        now = time.monotonic()
        for record in self._torchserve.read():
            if record.label in self._archives:
                if _is_death(record):
                    self._dead.setdefault(record.label, now)
                if record.text.startswith("Retry worker: "):
                    self._retried.add(record.label)
                if record.text.startswith(THREAD_ENDS):
                    self._exceptions.setdefault(record.label, record.more[0] if record.more else record.text)
                if any(NO_ANSWER in line for line in record.more):
                    self._late.add(record.label)
            elif record.text.startswith("Failed to load model: "):
                news.failures.append(_explain_loading(record))
            elif record.level in ("WARN", "ERROR", "FATAL"):
                said = record.text.strip() or (record.more[0] if record.more else "")
                if said and not said.endswith(CALLER_LEFT):
                    news.warnings.append(said)
        for record in self._models.read():
            if complaint := parse(record.text):
                news.complaints.append(complaint)
            elif record.label is not None:
                lines = self._said[record.label]
                lines.extend([record.text, *record.more])
                del lines[:-KEPT_LINES]
        for label, died in list(self._dead.items()):
            lines, late, exception = self._said[label], label in self._late, self._exceptions.get(label)
            told = late or exception or find_cause(lines)
            if now - died < (LAST_WORDS_S if told else SILENCE_S):
                continue
            archive = self._archives[label]
            if late:
                failure = explain_late(archive)
            elif exception:
                failure = f"archive {archive.path.name}: TorchServe's own thread for its worker ended: {exception}"
            else:
                failure = explain_worker(archive, lines)
                if not told:
                    failure += self._explain_memory()
            news.failures.append(failure)
            if label in self._retried:
                news.retried.add(failure)
            del self._dead[label], self._said[label]
            self._late.discard(label)
            self._retried.discard(label)
            self._exceptions.pop(label, None)
        return news

    def _explain_memory(self) -> str:
        """Say how many processes the kernel has killed for want of memory since this was last asked; empty for none."""
        before, self._killed = self._killed, count_memory_kills(self._cgroups)
        if self._killed <= before:
            return ""
        return f"; the kernel has killed {self._killed - before} of this container's processes for want of memory"


def explain_late(archive: Archive) -> str:
    """Say that TorchServe ended a worker that did not answer, and what it waits for."""
    return (
        f"archive {archive.path.name}: its worker did not answer within {archive.response_timeout_s} s "
        f"(responseTimeout), or load within {archive.startup_timeout_s} s (startupTimeout), and was ended"
    )


def explain_worker(archive: Archive, lines: Sequence[str]) -> str:
    """Say why a worker ended, from what it printed.

    Args:
        archive: The archive it was serving.
        lines: Its output, oldest first.
    """
    who = f"archive {archive.path.name}"
    cause = find_cause(lines)
    if cause is None:
        return f"{who}: its worker ended without a message"
    if match := MISSING.match(cause):
        module = match["module"]
        top = module.split(".")[0]
        if top in archive.modules:
            return f"{who}: its module {module} is missing from the archive"
        package = PACKAGES.get(top, top)
        named = package if package == top else f"{package} (imported as {top})"
        return f"{who}: needs the Python package {named}, which is not installed in {sys.executable}"
    error = cause.split(":")[0]
    if error in ("ImportError", "SyntaxError", "IndentationError"):
        return f"{who}: its handler cannot be imported: {cause}"
    return f"{who}: its worker failed: {cause}"


def find_cause(lines: Sequence[str]) -> str | None:
    """Return the last line of the traceback that tells the cause, or None if there is none.

    Tracebacks of requests that failed are no causes. After a failed import TorchServe looks for the handler among its
    own, so the last traceback of an import error is about `ts.torch_handler`, and the one before it tells the truth.
    """
    causes: list[str] = []
    inside = about_request = False
    for number, line in enumerate(lines):
        if line.startswith(REQUEST_FAILED):
            about_request = True
        elif line.startswith(WORKER_LINES):
            about_request = False
        elif line.startswith("Traceback (most recent call last):"):
            inside = not about_request
        elif inside and LAST_LINE.match(line):
            inside = False
            # "Error(s) in loading state_dict for Cifar:" says nothing without the line below it.
            following = lines[number + 1].strip() if line.endswith(":") and number + 1 < len(lines) else ""
            causes.append(f"{line} {following}".rstrip())
    told = [cause for cause in causes if "'ts.torch_handler." not in cause and not _is_wrapper(cause)]
    return told[-1] if told else causes[-1] if causes else None


def count_memory_kills(cgroups: Path = CGROUPS) -> int:
    """Count the processes of this container, or control group, that the kernel has killed for want of memory.

    Args:
        cgroups: The kernel's folder of control groups, version 2; 0 where there is none.
    """
    try:
        own = Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()
        events = (cgroups / own / "memory.events").read_text().split()
        return int(events[events.index("oom_kill") + 1])
    except (OSError, ValueError, IndexError):
        return 0


def explain_java(lines: Sequence[str]) -> str:
    """Say why Java ended, from what it printed itself."""
    said = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith(("at ", "... "))]
    for line in said:
        if "Address already in use" in line:
            return f"a port was taken while TorchServe started ({line}): start again, or choose other ports"
    for mark in ("Failed to bind", "OutOfMemoryError", "Invalid configuration", "Error: ", "Exception"):
        for line in said:
            if mark in line:
                return line
    return said[-1] if said else "it says nothing"


def _is_death(record: Record) -> bool:
    return record.text.startswith(("Retry worker: ", "Load model failed: ", "Backend worker error", *THREAD_ENDS))


def _explain_loading(record: Record) -> str:
    file = record.text.removeprefix("Failed to load model: ").split("/")[-1]
    cause = next((line for line in record.more if line.strip()), "TorchServe does not say why")
    return f"archive {file}: TorchServe cannot load it: {cause.split('Exception: ')[-1]}"


def _is_wrapper(cause: str) -> bool:
    """Tell the worker's own report (`RuntimeError: 500 - Unknown exception`) from the error it reports."""
    return re.match(r"^RuntimeError: \d{3} - ", cause) is not None
