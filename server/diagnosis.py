"""Explains failures of TorchServe in plain words, from its logs. It does not guess what the logs do not show.

Only Java learns how a worker's process ended, and it does not log that. A worker that crashes with SIGSEGV, SIGBUS or
SIGABRT prints the signal, with Python's faulthandler (`configuration.worker_environment`). A worker that is killed
prints nothing; the kernel counts the processes of this container that it killed for lack of memory (`host`).
"""

from __future__ import annotations

import re
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from server.configuration import SHOWN_CHARACTERS, SHOWN_LINES, PrivateDirectory
from server.host import Memory, describe_host, read_memory
from server.logs import Follower, Record
from server.models import Archive
from server.worker_log import Complaint, parse

MISSING = re.compile(r"^ModuleNotFoundError: No module named '(?P<module>[^']+)'")
FATAL = "Fatal Python error: "
LAST_LINE = re.compile(r"^(?P<error>[A-Za-z_][\w.]*)(: |$)")
JAVA_MARKS = (
    *("Failed to bind", "OutOfMemoryError", "insufficient memory", "#  SIG", "Invalid configuration", "Error: "),
    "Exception",
)
CRASH_MARKS = ("#  SIG", "insufficient memory")  # In the report that the virtual machine writes when it crashes.
NO_ANSWER = "Backend worker did not respond in given time"
# Logged by TorchServe's thread for a worker when an exception other than a failure of the worker ends the thread.
THREAD_ENDS = ("Backend worker thread exception.", "IllegalStateException error", "Out of memory error when creating")
# Lines of a worker: a traceback after one of the first is about a request, after one of the second about the worker.
REQUEST_FAILED = ("Invoking custom service failed", "Prediction error", "System out of memory", "CUDA out of memory")
WORKER_LINES = ("Torch worker started.", "Backend worker process died.", "Load model ")
CALLER_LEFT = ("Connection reset by peer", "Broken pipe")
KEPT_LINES = 400  # Lines kept of each worker's output; a traceback is far shorter.
# Another thread copies a worker's output, so its death may be logged before its last lines. Seconds to wait for further
# lines if the cause is known, and if it is not.
LAST_WORDS_S = 1.0
SILENCE_S = 5.0

# Why a worker ended, as `convscope_worker_deaths_total` counts it.
CAUSES = ("oom", "late", "error", "crash", "torchserve", "killed")
# Exceptions that are the machine's fault, not the archive's.
HOST_ERRORS = re.compile(
    r"^(MemoryError|OSError: \[Errno (12|28)\]|torch\.(cuda\.)?OutOfMemoryError|RuntimeError: .*out of memory)"
)
# The import name differs from the name to install.
PACKAGES = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "google": "protobuf",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


@dataclass(frozen=True)
class Death:
    """The unexpected end of a worker, or an archive that TorchServe cannot load.

    Attributes:
        model: `name/version`; None for an archive that TorchServe cannot load.
        archive: The archive's file name without `.mar`.
        cause: One of `CAUSES`.
        text: The explanation, a sentence.
        retried: Whether TorchServe has logged that it restarts the worker.
        lines: The worker's last lines.
        is_ours: Whether the archive or its handler is at fault, as far as is known, and not the machine.
    """

    model: str | None
    archive: str
    cause: str
    text: str
    retried: bool = False
    lines: tuple[str, ...] = ()
    is_ours: bool = False


@dataclass
class News:
    """New entries of the logs.

    Attributes:
        deaths: Workers that ended, and archives that cannot be loaded.
        warnings: First lines of TorchServe's other warnings.
        complaints: Messages of workers, mostly about failed requests.
    """

    deaths: list[Death] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    complaints: list[Complaint] = field(default_factory=list)


class Diagnosis:
    """Reads the logs, and explains the failures in them.

    Args:
        directory: The private directory, with the logs.
        archives: The archives served.
        memory: Reads the kernel's counters of memory.
    """

    def __init__(
        self, directory: PrivateDirectory, archives: Sequence[Archive], memory: Callable[[], Memory] = read_memory
    ) -> None:
        self._folder = directory.path
        self._torchserve = Follower(directory.torchserve_log)
        self._models = Follower(directory.models_log)
        self._archives = {archive.label: archive for archive in archives}
        self._ignored: set[str] = set()  # Labels of archives that are being unloaded.
        self._new: deque[Archive] = deque()
        self._said: defaultdict[str, list[str]] = defaultdict(list)
        self._dead: dict[str, float] = {}  # Labels whose worker died, and when that was read (monotonic seconds).
        self._late: set[str] = set()  # Those of them whose worker TorchServe ended because it did not respond.
        self._exceptions: dict[str, str] = {}  # By label, the exception that ended TorchServe's thread for the worker.
        self._retried: set[str] = set()
        self._memory = memory
        self._kills = memory().kills

    def follow(self, archive: Archive) -> None:
        """Report failures of an archive that is loaded now, without earlier ones. Any thread may call this."""
        self._new.append(archive)

    def ignore(self, archive: Archive) -> None:
        """Report no further failures of an archive, which is being unloaded. Any thread may call this."""
        self._ignored.add(archive.label)

    def read(self) -> News:
        """Return the new entries of the logs. Complaints of workers are separated from their other output."""
        news = News()
        now = time.monotonic()
        for record in self._torchserve.read():
            if record.label in self._archives:
                self._note(record.label, record, now)
            elif record.text.startswith("Failed to load model: "):
                news.deaths.append(_explain_loading(record))
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
        while self._new:
            archive = self._new.popleft()
            self._archives[archive.label] = archive
            for known in (self._dead, self._said, self._exceptions):
                known.pop(archive.label, None)
            for labels in (self._late, self._retried, self._ignored):
                labels.discard(archive.label)
        for label, died in list(self._dead.items()):
            is_explained = label in self._late or label in self._exceptions or find_cause(self._said[label])
            if now - died >= (LAST_WORDS_S if is_explained else SILENCE_S):
                death = self._conclude(label)
                if label not in self._ignored:
                    news.deaths.append(death)
        return news

    def describe_host(self) -> str:
        """Describe memory and disks, and how many processes the kernel has killed since the last call."""
        memory = self._memory()
        before, self._kills = self._kills, memory.kills
        said = describe_host(self._folder, memory)
        killed = (self._kills or 0) - (before or 0)
        if killed > 0:
            return f"the kernel has killed {killed} of this container's processes: out of memory; {said}"
        return f"the kernel has counted no out-of-memory kill; {said}" if self._kills is not None else said

    def _note(self, label: str, record: Record, now: float) -> None:
        """Record what TorchServe logs about the worker of a label."""
        if _is_death(record):
            self._dead.setdefault(label, now)
        if record.text.startswith("Retry worker: "):
            self._retried.add(label)
        if record.text.startswith(THREAD_ENDS):
            self._exceptions.setdefault(label, record.more[0] if record.more else record.text)
        if any(NO_ANSWER in line for line in record.more):
            self._late.add(label)

    def _conclude(self, label: str) -> Death:
        """Explain a worker's death, and forget it."""
        archive, lines, exception = self._archives[label], self._said.pop(label, []), self._exceptions.pop(label, None)
        del self._dead[label]
        said = find_cause(lines)
        is_ours = True
        if label in self._late:
            cause, text = "late", explain_late(archive)
        elif exception:
            cause, is_ours = "torchserve", False
            text = f"archive {archive.path.name}: TorchServe's own thread for its worker ended: {exception}"
        else:
            text = explain_worker(archive, lines)
            cause = "killed" if said is None else "crash" if said.startswith(FATAL) else "error"
            if said is None or HOST_ERRORS.match(said):
                before, is_ours = self._kills, False
                text += f"; {self.describe_host()}"
                if cause == "killed" and (self._kills or 0) > (before or 0):
                    cause = "oom"
        retried = label in self._retried
        self._late.discard(label)
        self._retried.discard(label)
        shown = tuple(line[:SHOWN_CHARACTERS] for line in lines[-SHOWN_LINES:])
        model = archive.full_name
        return Death(model, archive.path.stem, cause, text, retried=retried, lines=shown, is_ours=is_ours)


def explain_late(archive: Archive) -> str:
    """Explain that TorchServe ended a worker that did not respond, with the time limits."""
    return (
        f"archive {archive.path.name}: its worker did not answer within {archive.response_timeout_s} s "
        f"(responseTimeout), or load within {archive.startup_timeout_s} s (startupTimeout), and was ended"
    )


def explain_worker(archive: Archive, lines: Sequence[str]) -> str:
    """Explain why a worker ended, from its output.

    Args:
        archive: The archive that it served.
        lines: Its output, oldest first.
    """
    subject = f"archive {archive.path.name}"
    cause = find_cause(lines)
    if cause is None:
        return f"{subject}: its worker ended without a message: it was killed, or it exited"
    if cause.startswith(FATAL):
        return f"{subject}: its worker crashed: {cause.removeprefix(FATAL)}"
    if match := MISSING.match(cause):
        module = match["module"]
        top = module.split(".")[0]
        if top in archive.modules:
            return f"{subject}: its module {module} is missing from the archive"
        package = PACKAGES.get(top, top)
        named = package if package == top else f"{package} (imported as {top})"
        return f"{subject}: needs the Python package {named}, which is not installed in {sys.executable}"
    error = cause.split(":")[0]
    if error in ("ImportError", "SyntaxError", "IndentationError"):
        return f"{subject}: its handler cannot be imported: {cause}"
    return f"{subject}: its worker failed: {cause}"


def find_cause(lines: Sequence[str]) -> str | None:
    """Return the last line of the traceback that shows the cause, or None if there is none.

    Tracebacks of failed requests are not causes. After a failed import TorchServe looks for the handler among its own
    ones, so the last traceback of an import error is about `ts.torch_handler`, and the one before it shows the cause.
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
        elif line.startswith(FATAL):  # The last line of a crash, also during a request.
            causes.append(line)
        elif inside and LAST_LINE.match(line):
            inside = False
            # "Error(s) in loading state_dict for Cifar:" needs the line below it.
            following = lines[number + 1].strip() if line.endswith(":") and number + 1 < len(lines) else ""
            causes.append(f"{line} {following}".rstrip())
    own = [cause for cause in causes if "'ts.torch_handler." not in cause and not _is_wrapper(cause)]
    return own[-1] if own else causes[-1] if causes else None


def explain_java(lines: Sequence[str], *, killed: bool = False) -> str:
    """Explain why Java ended, from its output.

    Args:
        lines: Its output.
        killed: Whether a signal ended it. Then only the virtual machine's report of a crash is a cause, and not an
            exception that Java printed before.
    """
    said = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith(("at ", "... "))]
    for line in said:
        if "Address already in use" in line and not killed:
            return f"a port was taken while TorchServe started ({line}): start again, or choose other ports"
    for mark in CRASH_MARKS if killed else JAVA_MARKS:
        for line in said:
            if mark in line:
                return line
    return said[-1] if said and not killed else "it says nothing"


def _is_death(record: Record) -> bool:
    return record.text.startswith(("Retry worker: ", "Load model failed: ", "Backend worker error", *THREAD_ENDS))


def _explain_loading(record: Record) -> Death:
    file = record.text.removeprefix("Failed to load model: ").split("/")[-1].split(" ")[0]
    cause = next((line for line in record.more if line.strip()), "TorchServe does not say why").split("Exception: ")[-1]
    text = f"archive {file}: TorchServe cannot load it: {cause}"
    return Death(None, file.removesuffix(".mar"), "error", text, is_ours=not HOST_ERRORS.match(cause))


def _is_wrapper(cause: str) -> bool:
    """Return whether a line is TorchServe's wrapper of an error, such as `RuntimeError: 500 - Unknown exception`."""
    return re.match(r"^RuntimeError: \d{3} - ", cause) is not None
