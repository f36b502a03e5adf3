"""TorchServe's failures in plain words, read from its logs.

Pure text in, text out, but for the files it follows: knows nothing of processes or ports.
"""

from __future__ import annotations

import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from server.configuration import PrivateDirectory
from server.logs import Follower, Record
from server.models import Archive
from server.worker_log import Complaint, parse

MISSING = re.compile(r"^ModuleNotFoundError: No module named '(?P<module>[^']+)'")
LAST_LINE = re.compile(r"^(?P<error>[A-Za-z_][\w.]*)(: |$)")
NO_ANSWER = "Backend worker did not respond in given time"
KEPT_LINES = 400  # of each worker's output; a traceback is far shorter
# Another thread copies a worker's output: the report of its death may be written before its last words. Seconds waited
# for more words, and for any that tell the cause.
LAST_WORDS_S = 1.0
SILENCE_S = 5.0

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
        warnings: First lines of TorchServe's other warnings.
        complaints: What workers complain of, requests that failed above all.
    """

    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    complaints: list[Complaint] = field(default_factory=list)


class Diagnosis:
    """What the logs say has gone wrong so far.

    Args:
        directory: Where the logs are.
        archives: The archives being served.
    """

    def __init__(self, directory: PrivateDirectory, archives: Sequence[Archive]) -> None:
        self._torchserve = Follower(directory.torchserve_log)
        self._models = Follower(directory.models_log)
        self._archives = {archive.label: archive for archive in archives}
        self._said: defaultdict[str, list[str]] = defaultdict(list)
        self._dead: dict[str, float] = {}  # Labels whose worker died, and when we read so (monotonic seconds).
        self._late: set[str] = set()  # Those of them whose worker TorchServe ended, since it did not answer.

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
                if any(NO_ANSWER in line for line in record.more):
                    self._late.add(record.label)
            elif record.text.startswith("Failed to load model: "):
                news.failures.append(_explain_loading(record))
            elif record.level in ("WARN", "ERROR", "FATAL"):
                news.warnings.append(record.text)
        for record in self._models.read():
            if complaint := parse(record.text):
                news.complaints.append(complaint)
            elif record.label is not None:
                lines = self._said[record.label]
                lines.extend([record.text, *record.more])
                del lines[:-KEPT_LINES]
        for label, died in list(self._dead.items()):
            lines, late = self._said[label], label in self._late
            if now - died >= (SILENCE_S if find_cause(lines) is None and not late else LAST_WORDS_S):
                del self._dead[label], self._said[label]
                self._late.discard(label)
                archive = self._archives[label]
                news.failures.append(explain_late(archive) if late else explain_worker(archive, lines))
        return news


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
        return f"{who}: its worker ended without saying why (killed for want of memory, perhaps)"
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

    After a failed import TorchServe looks for the handler among its own, so the last traceback of an import error is
    about `ts.torch_handler`, and the one before it tells the truth.
    """
    causes: list[str] = []
    inside = False
    for number, line in enumerate(lines):
        if line.startswith("Traceback (most recent call last):"):
            inside = True
        elif inside and LAST_LINE.match(line):
            inside = False
            # "Error(s) in loading state_dict for Cifar:" says nothing without the line below it.
            following = lines[number + 1].strip() if line.endswith(":") and number + 1 < len(lines) else ""
            causes.append(f"{line} {following}".rstrip())
    told = [cause for cause in causes if "'ts.torch_handler." not in cause and not _is_wrapper(cause)]
    return told[-1] if told else causes[-1] if causes else None


def explain_java(lines: Sequence[str]) -> str:
    """Say why Java ended, from what it printed itself."""
    said = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith(("at ", "... "))]
    for line in said:
        if "Failed to bind" in line or "Address already in use" in line:
            return f"a port was taken while TorchServe started ({line}): start again, or choose other ports"
    for mark in ("OutOfMemoryError", "Invalid configuration", "Error: ", "Exception"):
        for line in said:
            if mark in line:
                return line
    return said[-1] if said else "it says nothing"


def _is_death(record: Record) -> bool:
    return record.text.startswith(("Retry worker: ", "Load model failed: ", "Backend worker error"))


def _explain_loading(record: Record) -> str:
    file = record.text.removeprefix("Failed to load model: ").split("/")[-1]
    cause = next((line for line in record.more if line.strip()), "TorchServe does not say why")
    return f"archive {file}: TorchServe cannot load it: {cause.split('Exception: ')[-1]}"


def _is_wrapper(cause: str) -> bool:
    """Tell the worker's own report (`RuntimeError: 500 - Unknown exception`) from the error it reports."""
    return re.match(r"^RuntimeError: \d{3} - ", cause) is not None
