"""Reloads the model store while the server serves: on request over a unix socket, or when the store changes.

A new version is registered next to the old one and must respond with its card. Then it becomes the default, and the old
version finishes its requests and is removed. An archive that cannot be loaded changes nothing.

It knows neither host: each is a `Host`. The socket is in the private directory, which only the server's user can open.
`server.reload` is the command. It sends a JSON line, `{"models": ["cifar"]}`, or no names for all, and gets JSON lines:
`{"said": "...", "level": "info"}` as things happen, and at the end `{"status": 0}`, the command's exit status.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socketserver
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from server.arguments import Settings
from server.configuration import PrivateDirectory
from server.failures import Failure, UsageFailure
from server.host import MEBIBYTE, read_disk, read_free_memory, read_memory, read_process_memory
from server.models import (
    Archive,
    Change,
    Files,
    Found,
    copy_checked,
    find_archives,
    find_changes,
    is_named_after,
    look,
    take_fingerprint,
)
from server.reporting import Reporter

LOOK_S = 2.0  # Interval between checks of the store.
MOST_BYTES = 65536  # Longest reload request.

Say = Callable[[str, str], None]  # Takes a line and its level, `info` or `error`.


class Host(Protocol):
    """A server of archives that can load and remove them.

    Attributes:
        rejected: Archives of the store that are not served, by their files' names without `.mar`, and why.
        why_not: Why the host cannot change the archives it serves; None if it can.
        stopping: Set when the server stops; `take_in` and `retire` then stop waiting.
    """

    rejected: dict[str, str]
    why_not: str | None
    stopping: threading.Event

    def served(self) -> list[Archive]:
        """Return the archives served, of several versions of a model the default first."""
        ...

    def take_in(self, archive: Archive) -> None:
        """Load an archive next to the others and wait until it has responded with its card.

        Raises:
            Failure: The archive does not respond with its card; it is removed completely.
        """
        ...

    def serve(self, archives: Sequence[Archive]) -> None:
        """Serve these, all of which are loaded: of several versions of a model, the first is the default."""
        ...

    def retire(self, archive: Archive) -> None:
        """Take an archive away that `serve` has left out: it gets no more requests and finishes those it has."""
        ...

    def forget(self, found: Found) -> None:
        """Give up archives that were rejected and are no longer in the store, whose content is `found`."""
        ...


class Reloader:
    """Makes a host serve what the store holds.

    Args:
        host: The host.
        settings: Settings of the server.
        reporter: Reports what happens; the reload command gets the same lines.
    """

    def __init__(self, host: Host, settings: Settings, reporter: Reporter) -> None:
        self._host = host
        self._settings = settings
        self._reporter = reporter
        self._lock = threading.Lock()

    def reload(self, names: Sequence[str], say: Say) -> int:
        """Load the store's current archives; return the exit status: 1 if one of them could not be loaded.

        Args:
            names: Models to reload; empty for all.
            say: Called with each line that reports what happens.
        """
        if not self._lock.acquire(blocking=False):
            say("a reload is under way: try again when it is done", "error")
            return 1
        return self._locked(names, say)

    def reload_when_free(self) -> None:
        """Take in what the store holds once no reload is under way: the one before may not have seen all of it."""
        self._lock.acquire()
        self._locked((), _mute)

    def settle(self) -> None:
        """Make the newest served version of each model its default: a rejected one may have answered since."""
        with self._lock:
            served = self._host.served()
            changes, _ = find_changes(served, Found(served, {}, {}))
            try:
                for change in changes if not self._host.stopping.is_set() else ():
                    self._apply(change, _mute)
            except Failure as failure:
                self._tell(_mute, str(failure), level="error")

    def _locked(self, names: Sequence[str], say: Say) -> int:
        """Reload, and release the lock, which is held."""
        try:
            return self._reload(names, say)
        except Failure as failure:
            self._tell(say, str(failure), level="error")
            return failure.exit_code
        finally:
            self._lock.release()

    def stop(self) -> None:
        """Start no further reload, and abort the running one."""
        self._host.stopping.set()
        with self._lock:
            pass

    def _reload(self, names: Sequence[str], say: Say) -> int:
        if self._host.stopping.is_set():
            raise Failure("the server is stopping")
        if self._host.why_not:
            raise Failure(self._host.why_not)
        host, store = self._host, self._settings.model_store
        served = host.served()
        found = find_archives(store, self._settings.models, self._settings.require_signature, least=0)
        known = {archive.path.stem: archive.name for archive in (*served, *found.archives)}
        names_there = {*known.values(), *found.rejected}
        if unknown := [name for name in names if name not in names_there]:
            there = ", ".join(sorted(names_there))
            raise UsageFailure(f"no model {', '.join(unknown)} is served or in {store}; there are: {there}")
        host.forget(found)
        changes, conflicts = find_changes(served, found)
        problems = {
            stem: why
            for stem, why in (found.rejected | conflicts).items()
            if not names
            or (known[stem] in names if stem in known else any(is_named_after(stem, name) for name in names))
        }
        for stem, why in problems.items():
            self._reject(stem, why, say)
        wanted = [change for change in changes if not names or change.name in names]
        status = 1 if problems else 0
        for change in wanted:
            try:
                self._apply(change, say)
            except Failure as failure:
                self._reject(change.new[0].path.stem if change.new else change.name, str(failure), say)
                status = 1
        self._forget_rejected(found)
        if not wanted and not problems:
            say("nothing to do: what the store holds is served", "info")
        return status

    def _apply(self, change: Change, say: Say) -> None:
        host = self._host
        taken: list[Archive] = []
        try:
            for archive in change.new:
                say(f"{archive.full_name}: loading", "info")
                host.take_in(archive)
                taken.append(archive)
            others = [archive for archive in host.served() if archive.name != change.name]
            host.serve(sorted([*others, *change.served], key=lambda archive: archive.name))
        except BaseException:
            for archive in taken:
                host.retire(archive)
            raise
        for archive in change.new:
            self._tell(say, f"{archive.full_name}: answers its card and is served")
        default = change.served[0]
        self._tell(say, f"{change.name}: callers who name no version get {default.version}")
        for archive in change.gone:
            host.retire(archive)
            self._tell(say, f"{archive.full_name}: has finished its requests, and is removed")

    def _forget_rejected(self, found: Found) -> None:
        """Remove the rejections of files that are gone or whose content is served."""
        rejected = self._host.rejected
        served = {(archive.full_name, archive.fingerprint) for archive in self._host.served()}
        well = {archive.path.stem for archive in found.archives if (archive.full_name, archive.fingerprint) in served}
        for stem in list(rejected):
            if stem in well or not (self._settings.model_store / f"{stem}.mar").exists():
                del rejected[stem]

    def _reject(self, stem: str, why: str, say: Say) -> None:
        self._host.rejected[stem] = why
        self._tell(say, why, level="error")

    def _tell(self, say: Say, sentence: str, level: str = "info") -> None:
        say(sentence, level)
        self._reporter.say(f"Reload: {sentence}", level=level)


def _mute(sentence: str, level: str) -> None:
    """Drop a sentence: no command waits for it."""


class Control:
    """Listens for `python -m server.reload`, and watches the store if the settings say so.

    Args:
        reloader: Carries out the reloads.
        directory: The private directory, for the socket.
        settings: Settings of the server.
        files: The store's files as `find_archives` saw them at the start.
    """

    def __init__(self, reloader: Reloader, directory: PrivateDirectory, settings: Settings, files: Files) -> None:
        self._reloader, self._files = reloader, files
        self._closed = threading.Event()
        self._server = _Listener(str(directory.control_socket), _build_handler(reloader))
        threads = [threading.Thread(target=self._server.serve_forever, daemon=True)]
        if settings.watch_store:
            threads.append(threading.Thread(target=self._watch, args=(settings.model_store,), daemon=True))
        for thread in threads:
            thread.start()

    def close(self) -> None:
        """Accept no more requests, and wait for a running reload to end."""
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._reloader.stop()

    def _watch(self, store: Path) -> None:
        """Reload when the store has changed and two checks in a row find the same files."""
        before, taken = look(store), self._files
        while not self._closed.wait(LOOK_S):
            now = look(store)
            if now == before and now != taken:
                self._reloader.reload_when_free()
                taken = now
            before = now


class _Listener(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False


def _build_handler(reloader: Reloader) -> type[socketserver.StreamRequestHandler]:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            try:
                names = [str(name) for name in json.loads(self.rfile.readline(MOST_BYTES))["models"]]
            except (ValueError, KeyError, TypeError):
                return
            status = reloader.reload(names, lambda sentence, level: self._write(said=sentence, level=level))
            self._write(status=status)

        def _write(self, **values: object) -> None:
            with contextlib.suppress(OSError):  # The client has disconnected; the reload goes on.
                self.wfile.write(json.dumps(values).encode() + b"\n")

    return Handler


def check_room(archive: Archive, workers: int, running: Iterable[int], alike: Iterable[int], folder: Path) -> None:
    """Check that memory and disk suffice for an archive's workers.

    Args:
        archive: The archive.
        workers: Number of workers of the archive.
        running: Process ids of the running workers.
        alike: Process ids of workers of another version of the model; the largest one estimates a new worker's memory.
        folder: Folder in which archives are unpacked.

    Raises:
        Failure: Memory or disk space does not suffice.
    """
    each = max(map(read_process_memory, alike), default=0)
    if not each:  # The least of the others is the Python, and the weights come on top.
        each = min(filter(None, map(read_process_memory, running)), default=0) + archive.unpacked_bytes
    free = read_free_memory(read_memory())
    if free is not None and workers * each > free:
        raise Failure(
            f"archive {archive.path.name}: its workers need about {workers * each // MEBIBYTE} MiB of memory beside "
            f"those that run, and {free // MEBIBYTE} MiB are free: give the server more, or restart it with the archive"
        )
    disk = read_disk(folder)
    if disk is not None and archive.unpacked_bytes > disk.free:
        raise Failure(
            f"archive {archive.path.name}: unpacked it takes {archive.unpacked_bytes // MEBIBYTE} MiB, and "
            f"{disk.free // MEBIBYTE} MiB are free in {folder}: make room there, or choose another with --work-dir"
        )


def unpack(archive: Archive, folder: Path, signers: Path | None) -> None:
    """Unpack an archive into a new folder.

    Args:
        archive: The archive.
        folder: The new folder.
        signers: File of keys, one of which must have signed the archive; None to accept unsigned archives too.

    Raises:
        Failure: The archive cannot be read or unpacked, or is no longer what was signed; the folder is removed.
    """
    folder.parent.mkdir(exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            private = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder.parent)))
            [taken] = copy_checked([archive], private, signers)
            file = stack.enter_context(zipfile.ZipFile(taken.path))
            if take_fingerprint(file) != archive.fingerprint:
                raise Failure(f"archive {archive.path.name}: it has changed since it was checked: try again")
            file.extractall(folder)
    except (OSError, zipfile.BadZipFile, RuntimeError, EOFError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise Failure(f"archive {archive.path.name}: it cannot be unpacked ({error})") from error
