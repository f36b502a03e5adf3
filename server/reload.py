"""Have a running server take in what its model store holds now, without a restart and without losing a request.

    python -m server.reload                    # every model of the store that has changed
    python -m server.reload cifar digits       # these alone
    docker compose exec torchserve python -m server.reload

It works with `python -m server` and with `python -m server.kserve` (`server.control` has how), on the server's machine
and as the server's user. Exit status: 0 if what the store holds is served, 1 if something in it is not (said in a line;
what was served before still is), 2 for a wrong command line or if there is no server.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask the server, print what it says, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m server.reload",
        description="Have the running server take in what its model store holds now. A new version is loaded beside "
        "the old one; once it has responded, the old one finishes its requests and is removed. What cannot be loaded "
        "changes nothing.",
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="models to look at (default: all)")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path(tempfile.gettempdir()),
        metavar="DIR",
        help="the folder in which the server made its private directory (its own --work-dir), or that directory "
        "(default: the system's temporary folder)",
    )
    given = parser.parse_args(arguments)
    servers = find_servers(given.work_dir)
    if len(servers) != 1:
        for _, connection in servers:
            connection.close()
        found = ", ".join(str(folder) for folder, _ in servers)
        why = (
            f"several servers run there: name one of {found} with --work-dir"
            if found
            else "no server of yours runs there"
        )
        print(f"reload: {given.work_dir}: {why}", file=sys.stderr)
        return 2
    [(_, connection)] = servers
    # The server closes the connection if it ends, or if it has not read the whole request.
    with connection, contextlib.suppress(ConnectionError), connection.makefile("rw", encoding="utf-8") as stream:
        stream.write(json.dumps({"models": given.models}) + "\n")
        stream.flush()
        for line in stream:
            said = json.loads(line)
            if "status" in said:
                return int(said["status"])
            file = sys.stderr if said["level"] == "error" else sys.stdout
            print(f"reload: {said['said']}", file=file, flush=True)
    print("reload: the server ended before it was done", file=sys.stderr)
    return 1


def find_servers(folder: Path) -> list[tuple[Path, socket.socket]]:
    """Return the private directories of servers that run, with a connection to each.

    Args:
        folder: Folder of the private directories, or one of them.
    """
    servers = []
    for path in sorted({folder, *folder.glob("convscope-*")}):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path / "control.sock"))
        except OSError:  # None there, another user's, or left behind by a server that was killed.
            connection.close()
        else:
            servers.append((path, connection))
    return servers


if __name__ == "__main__":
    sys.exit(main())
