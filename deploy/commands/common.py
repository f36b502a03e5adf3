"""Shared code of the commands: settings, Docker, files that are replaced atomically, and the audit log."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Refused(Exception):
    """The command did not do what was asked; the message tells the operator why, and what to do."""


def setting(name: str, default: str = "") -> str:
    """Return a setting as Compose reads it: from the environment, else from `.env`, else the default."""
    return os.environ.get(name) or read_settings(ROOT / ".env").get(name) or default


def read_settings(path: Path) -> dict[str, str]:
    """Read a file of settings, as Compose reads `.env`; empty if there is none."""
    if not path.exists():
        return {}
    pairs = re.findall(r"^[ \t]*(?:export[ \t]+)?(\w+)[ \t]*=[ \t]*(.*?)[ \t]*$", path.read_text(), re.M)
    return {name: _unquote(value) for name, value in pairs}


def _unquote(value: str) -> str:
    quoted = re.fullmatch(r"(['\"])(.*)\1(?:\s+#.*)?", value)
    return quoted[2] if quoted else re.sub(r"\s+#.*", "", value)


def run(*command: str | Path, check: bool = True, text: str | None = None, timeout_s: float | None = None) -> str:
    """Run a program in the repository's root; return what it prints, standard error included.

    It runs in a session of its own: Ctrl-C stops the command of ours that waits for it, not the program half-way.

    Raises:
        Refused: The program failed, and `check` is set.
    """
    words = [str(word) for word in command]
    try:
        answer = subprocess.run(
            words,
            cwd=ROOT,
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            check=False,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise Refused(f"there is no program `{words[0]}` here") from error
    except subprocess.TimeoutExpired as error:
        raise Refused(f"`{' '.join(words[:4])}` did not end within {timeout_s:.0f} s") from error
    if check and answer.returncode:
        raise Refused(f"`{' '.join(words[:6])}` failed with status {answer.returncode}:\n{answer.stdout.strip()}")
    return answer.stdout


def container_ids(printed: str) -> list[str]:
    """Return the ids of containers in what Docker printed; its warnings are left out."""
    return re.findall(r"^[0-9a-f]{12,64}$", printed, re.M)


def succeeds(*command: str | Path) -> bool:
    """Return whether a program exits with status 0; False too if there is no such program."""
    try:
        return (
            subprocess.run(
                [str(word) for word in command],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=False,
            ).returncode
            == 0
        )
    except FileNotFoundError:
        return False


@cache
def has_docker() -> bool:
    """Return whether a Docker engine with Compose answers."""
    return succeeds("docker", "info") and succeeds("docker", "compose", "version")


@cache
def deployment() -> dict[str, Any]:
    """Return what Compose makes of its files and settings.

    Raises:
        Refused: It makes nothing of them.
    """
    with tempfile.TemporaryDirectory() as folder:  # Warnings go to the same stream, so not by what it prints.
        path = Path(folder) / "deployment.json"
        run("docker", "compose", "--profile", "*", "config", "--format", "json", "--output", path)
        found: dict[str, Any] = json.loads(path.read_text())
    return found


def start_once(
    service: str,
    program: str,
    arguments: Sequence[str],
    mounts: Mapping[str, Path] | None = None,
    text: str | None = None,
    timeout_s: float = 120,
) -> str:
    """Run a program in a container made like a service's, with its files and no network; return what it prints.

    Args:
        service: Service whose image, user and files are used.
        program: Program to run.
        arguments: Arguments of the program.
        mounts: Files or folders to use instead of the service's own, by where they lie in the container.
        text: Standard input of the program.
        timeout_s: Time limit of the program, in seconds.

    Raises:
        Refused: The program failed.
    """
    found = deployment()["services"][service]
    places = {one["target"]: one["source"] for one in found.get("volumes", []) if one["type"] == "bind"}
    for secret in found.get("secrets", []):
        target = Path("/run/secrets") / secret.get("target", secret["source"])
        places[str(target)] = deployment()["secrets"][secret["source"]]["file"]
    places.update({target: str(source) for target, source in (mounts or {}).items()})
    command = ["docker", "run", "--rm", "--network", "none", "--read-only", "--cap-drop", "ALL", "--tmpfs", "/tmp"]  # noqa: S108
    command += ["--user", found.get("user", "")] if found.get("user") else []
    for name, value in (found.get("environment") or {}).items():
        if name.startswith("OTEL_") and value:  # The gateway's, from which its configuration is made.
            command += ["--env", f"{name}={value}"]
    for target, source in places.items():
        if not Path(source).exists():
            raise Refused(
                f"{source} is missing, which `{service}` reads; `make secrets` makes what belongs into secrets/"
            )
        command += ["--mount", f"type=bind,source={Path(source).resolve()},target={target},readonly"]
    command += ["--interactive"] if text is not None else []
    return run(*command, "--entrypoint", program, found["image"], *arguments, text=text, timeout_s=timeout_s)


def replace(path: Path, content: str, mode: int) -> None:
    """Put a file in place at once: whoever reads the path finds the old file or the new one, whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    fresh = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.chmod(mode)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def only_one(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file.

    Raises:
        Refused: Another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(f"{what} is under way already ({path})") from error
        yield


def now() -> datetime:
    """Return the time, in UTC, to the second."""
    return datetime.now(timezone.utc).replace(microsecond=0)


def stamp(time: datetime) -> str:
    """Write a time as `2026-11-29T15:00:00Z`."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def audit(folder: Path, what: str, **facts: str) -> None:
    """Write who did what and when to `audit.log` in the folder of secrets, a JSON line, and to standard output.

    Args:
        folder: The folder of secrets.
        what: The action, such as `key added`.
        **facts: The name of a key, a certificate's fingerprint: never a key.
    """
    try:
        user = os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):  # This user has no name.
        user = str(os.getuid())
    line = json.dumps({"time": stamp(now()), "user": user, "what": what, **facts})
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "audit.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line)
