"""Memory and disk of this server, read from the kernel: control groups of version 2 or 1, processes, file systems.

A container is a control group. Outside of a container the values are those of the group in which the server was
started, such as a systemd session. A value is None if there is no group or no limit.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from server.children import PROCESSES

CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
MEBIBYTE = 1 << 20
UNLIMITED = 1 << 60  # Version 1 represents "no limit" by the largest number of whole pages.


@dataclass(frozen=True)
class Memory:
    """Memory of the control group.

    Attributes:
        used: Bytes in use, without file cache that the kernel can drop.
        limit: Bytes above which the kernel kills a process; None without a limit.
        kills: Processes that the kernel has killed for lack of memory since the group was created.
    """

    used: int | None = None
    limit: int | None = None
    kills: int | None = None


@dataclass(frozen=True)
class Disk:
    """A file system.

    Attributes:
        free: Bytes that an ordinary user can still write.
        size: Bytes in all.
    """

    free: int
    size: int


def read_memory(cgroups: Path = CGROUPS, own: Path = OWN) -> Memory:
    """Read the memory use and limit of the control group.

    Args:
        cgroups: Where control groups are mounted.
        own: The kernel's list of this process's groups.
    """
    try:
        groups = dict(line.split(":", 2)[1:] for line in own.read_text().splitlines())
    except (OSError, ValueError):
        return Memory()
    # A container without a cgroup namespace reads the host's path, but its own group is mounted at the root.
    for path in (groups.get("", "/"), "/"):
        folder = cgroups / path.strip("/")
        if (folder / "memory.current").exists():
            events = _read_table(folder / "memory.events")
            return _describe(folder, "memory.current", "memory.max", "inactive_file", events)
    for path in (groups.get("memory", "/"), "/"):
        folder = cgroups / "memory" / path.strip("/")
        if (folder / "memory.usage_in_bytes").exists():
            events = _read_table(folder / "memory.oom_control")
            return _describe(folder, "memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file", events)
    return Memory()


def read_disk(path: Path) -> Disk | None:
    """Read the size and the free space of the file system of a path; None if there is no such path."""
    try:
        found = shutil.disk_usage(path)
    except OSError:
        return None
    return Disk(found.free, found.total)


def read_process_memory(process: int) -> int:
    """Return the anonymous memory of the process of an id in bytes; 0 if it is unknown."""
    return _read_table(PROCESSES / str(process) / "status").get("RssAnon", 0)


def read_free_memory(memory: Memory, table: Path = PROCESSES / "meminfo") -> int | None:
    """Return the free memory in bytes, of the control group or of the machine if that has less; None if it is unknown.

    Args:
        memory: From `read_memory`.
        table: The kernel's table of the machine's memory.
    """
    free = [_read_table(table).get("MemAvailable")]
    if memory.limit is not None and memory.used is not None:
        free.append(max(0, memory.limit - memory.used))
    return min((amount for amount in free if amount is not None), default=None)


def describe_host(folder: Path, memory: Memory) -> str:
    """Describe memory and disks in short, for a line of the log.

    Args:
        folder: Folder in which the server writes.
        memory: From `read_memory`.
    """
    said = []
    if memory.used is not None:
        limit = "no limit" if memory.limit is None else f"{memory.limit // MEBIBYTE} MiB"
        said.append(f"memory used {memory.used // MEBIBYTE} MiB of {limit}")
    for path in (folder, SHARED_MEMORY):
        if (disk := read_disk(path)) is not None:
            said.append(f"free in {path} {disk.free // MEBIBYTE} of {disk.size // MEBIBYTE} MiB")
    return ", ".join(said)


def _describe(folder: Path, used: str, limit: str, cache: str, events: dict[str, int]) -> Memory:
    total, most = _read_number(folder / used), _read_number(folder / limit)
    dropped = _read_table(folder / "memory.stat").get(cache, 0)
    return Memory(
        None if total is None else max(0, total - dropped),
        None if most is None or most >= UNLIMITED else most,
        events.get("oom_kill"),
    )


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # ValueError: "max".
        return None


def _read_table(path: Path) -> dict[str, int]:
    """Return the numbers of one of the kernel's tables by name, amounts in kB as bytes; empty if it cannot be read."""
    try:
        rows = re.findall(r"^(\w+):?\s+(\d+)( kB)?$", path.read_text(), re.MULTILINE)
    except OSError:
        return {}
    return {name: int(number) * (1024 if unit else 1) for name, number, unit in rows}
