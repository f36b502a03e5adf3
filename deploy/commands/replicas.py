"""The replicas: listed, restarted one at a time, and replaced: `make replicas`, `make restart`, `make update`."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from deploy.commands import gateway
from deploy.commands.common import ROOT, Refused, audit, container_ids, deployment, now, only_one, run, setting
from deploy.commands.credentials import Vault

SERVICE = "torchserve"
READY_S = 300.0  # For a new replica, as the image's health check allows it to start.
NOTICED_S = 20.0  # For the gateway to find a new replica and to ask it for its health.
CHECK_S = 2.0  # Between two looks at what a starting replica says of its archives.
STOP_S = 45  # Same as stop_grace_period in docker-compose.yml.
KEPT_LOGS = 20
LAST_LINES = 20  # Lines shown of a rejected replica's log.
ASK_READY = """
import http.client
connection = http.client.HTTPConnection("127.0.0.1", 8083, timeout=8)
connection.request("GET", "/ready")
print(connection.getresponse().read().decode())
"""


@dataclass(frozen=True)
class Replica:
    """Docker's current view of a replica.

    Attributes:
        id: Id of its container.
        name: Name of its container, such as `convscope-torchserve-1`.
        state: `running`, `restarting`, `exited`, ...
        health: Result of its health check: `starting`, `healthy`, `unhealthy`; empty if it does not run.
        since: When it last started.
        restarts: How often Docker has started it again.
        killed: Whether Docker says that its last run was ended for lack of memory.
        addresses: Its addresses on its networks.
    """

    id: str
    name: str
    state: str
    health: str
    since: str
    restarts: int
    killed: bool
    addresses: tuple[str, ...]

    @property
    def ready(self) -> bool:
        """Return whether it serves."""
        return self.state == "running" and self.health == "healthy"


def find_wanted() -> int:
    """Return the number of replicas that should run.

    Raises:
        Refused: The setting is not a number from 1 to 999.
    """
    text = setting("CONVSCOPE_REPLICAS", "1")
    if not re.fullmatch(r"[1-9]\d{0,2}", text):
        raise Refused(f"CONVSCOPE_REPLICAS must be a number from 1 to 999, not {text!r}")
    return int(text)


def find_replicas() -> list[Replica]:
    """Return all there are, those that do not run too, in the order of their numbers."""
    ids = container_ids(run("docker", "compose", "ps", "--all", "--quiet", SERVICE, check=True))
    found = [one for one in map(_inspect, ids) if one]
    return sorted(found, key=lambda one: int(re.sub(r".*\D", "", one.name) or 0))


def _inspect(container: str) -> Replica | None:
    try:
        facts: dict[str, Any] = json.loads(run("docker", "inspect", "--type", "container", container))[0]
    except (Refused, ValueError):  # It has gone meanwhile.
        return None
    state = facts["State"]
    networks = facts["NetworkSettings"]["Networks"].values()
    return Replica(
        id=facts["Id"],
        name=facts["Name"].lstrip("/"),
        state=state["Status"],
        health=state.get("Health", {}).get("Status", "") if state["Status"] == "running" else "",
        since=state["StartedAt"][:19] + "Z",
        restarts=facts["RestartCount"],
        killed=state["OOMKilled"],
        addresses=tuple(one["IPAddress"] for one in networks if one["IPAddress"]),
    )


def ask_ready(replica: Replica) -> dict[str, Any]:
    """Return a replica's `/ready` (server/health.py); empty if it does not answer."""
    said = run("docker", "exec", replica.id, "python", "-c", ASK_READY, check=False, timeout_s=30)
    try:
        found = json.loads(said.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {}
    return found if isinstance(found, dict) else {}


def list_replicas() -> None:
    """Print a line for each: name, state, whether it is ready, if not why, memory, since when, restarts.

    Raises:
        Refused: There is none.
    """
    replicas = find_replicas()
    if not replicas:
        raise Refused("there is no replica: `docker compose up -d --no-recreate`")
    running = [one.name for one in replicas if one.state == "running"]
    memory = {}
    if running:
        lines = run("docker", "stats", "--no-stream", "--format", "{{.Name}}\t{{.MemUsage}}", *running, check=False)
        memory = dict(line.split("\t", 1) for line in lines.splitlines() if "\t" in line)
    rows = [("NAME", "STATE", "READY", "MEMORY", "SINCE", "RESTARTS", "WHY NOT")]
    for one in replicas:
        why = "" if one.ready else _explain(one)
        ready = "yes" if one.ready else "no"
        rows.append((one.name, one.state, ready, memory.get(one.name, "-"), one.since, str(one.restarts), why))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    for row in rows:
        print("  ".join(row[column].ljust(widths[column]) for column in range(6)) + "  " + row[6])
    wanted = find_wanted()
    ready_count = sum(one.ready for one in replicas)
    print(f"{ready_count} of {wanted} ready (CONVSCOPE_REPLICAS)")


def _explain(replica: Replica) -> str:
    if replica.state != "running":
        memory = ", out of memory" if replica.killed else ""
        return f"it does not run{memory}: docker logs --tail 50 {replica.name}"
    said = ask_ready(replica)
    known = {name: value for name, value in said.items() if name != "ready"}
    return json.dumps(known) if known else f"{replica.health}, and /ready does not answer"


def restart(vault: Vault, name: str, *, force: bool = False) -> None:
    """Restart one replica: it drains first, and is ready again when this returns.

    Raises:
        Refused: There is no such replica, it is the only one that is ready, or it does not become ready.
    """
    with _alone():
        replicas = find_replicas()
        found = next((one for one in replicas if name in (one.name, one.id, one.id[:12])), None)
        if found is None:
            raise Refused(
                f"there is no replica {name!r}; there are: {', '.join(one.name for one in replicas) or 'none'}"
            )
        if found.ready and not force and not any(one.ready for one in replicas if one.id != found.id):
            raise Refused(
                f"{found.name} is the only replica that is ready: callers would get 503 (FORCE=1 does it all the same)"
            )
        audit(vault.folder, "replica restarted", name=found.name)
        run("docker", "restart", "-t", str(STOP_S), found.id)
        _wait_ready(found.id, restarts=_restarts(found.id))
        print(f"{found.name} is ready again")


def update(vault: Vault) -> None:
    """Replace all replicas, one after another, by as many new ones as are wanted: `make update`.

    A new replica comes first, so there has to be memory for one more. An old one is told to drain once the new one has
    answered for every model, has loaded all archives, and is used by the gateway. Whatever goes wrong then, Ctrl-C
    included, a new replica that is not yet good is removed, and the others go on serving.

    Raises:
        Refused: A new replica fails its checks. The old ones that are left go on serving.
    """
    wanted = find_wanted()
    with _alone():
        deployment()  # Says what is wrong with the settings before anything is touched.
        old = find_replicas()
        # Worst first: what serves is the last to go.
        old.sort(key=lambda one: (one.ready, one.state == "running"))
        for one in [one for one in old if one.state in ("created", "exited", "dead")]:
            print(f"{one.name} does not run ({one.state}): removed, its log is {_remove(one)}")
            old.remove(one)
        audit(vault.folder, "update begun", replicas=str(wanted))
        for number in range(1, wanted + 1):
            _stop.check()
            try:
                fresh = _start_one()
            except BaseException as error:
                ended = "refused" if isinstance(error, Refused) else "stopped"
                audit(vault.folder, f"update {ended}", replaced=str(number - 1), replicas=str(wanted))
                raise
            print(f"{fresh.name} is ready ({number} of {wanted})")
            # As many stay as there should be, old and new together.
            while old and len(old) + number > wanted:
                _retire(old.pop(0))
        for one in old:
            _retire(one)
        audit(vault.folder, "update done", replicas=str(wanted))


def _start_one() -> Replica:
    """Start one more replica, and return it when it may serve; otherwise remove it.

    Raises:
        Refused: It fails its checks; the message quotes its log.
    """
    before = {one.id for one in find_replicas()}
    fresh: list[Replica] = []
    good = False
    try:
        up = ["up", "-d", "--no-deps", "--no-recreate", "--scale", f"{SERVICE}={len(before) + 1}", SERVICE]
        said = run("docker", "compose", *up, check=False)
        fresh = [one for one in find_replicas() if one.id not in before]
        if len(fresh) != 1:
            raise Refused(f"Compose started no new replica:\n{said.strip()}")
        try:
            # While it starts, too: once it is ready, the gateway uses it, and callers miss what it does not serve.
            started = _wait_ready(fresh[0].id, restarts=0, check=_check_archives)
            _check_archives(started)
            _wait_used(started)
        except Refused as error:
            lines = run("docker", "logs", "--tail", str(LAST_LINES), fresh[0].id, check=False).strip()
            raise Refused(f"the new replica cannot be used: {error}\nIts last lines:\n{lines}") from error
        good = True
        return started
    finally:
        if not good:
            for one in fresh or [one for one in find_replicas() if one.id not in before]:
                print(f"{one.name}, the new replica, is removed; its whole log is {_remove(one)}")


def _wait_ready(container: str, restarts: int, check: Callable[[Replica], None] | None = None) -> Replica:
    until, check_at = time.monotonic() + READY_S, 0.0
    while True:
        _stop.check()
        found = _inspect(container)
        if found is None:
            raise Refused("it is gone")
        if found.ready:
            return found
        if found.state in ("exited", "dead", "restarting") or found.restarts > restarts:
            raise Refused("it ended" + (", out of memory" if found.killed else ""))
        if found.health == "unhealthy" or time.monotonic() > until:
            raise Refused(f"it does not become ready: {_explain(found)}")
        if check and time.monotonic() > check_at:
            check(found)
            check_at = time.monotonic() + CHECK_S
        time.sleep(0.5)


def _restarts(container: str) -> int:
    found = _inspect(container)
    return found.restarts if found else 0


def _check_archives(replica: Replica) -> None:
    rejected = ask_ready(replica).get("rejected")
    if rejected:
        raise Refused(f"it could not load all archives: {json.dumps(rejected)}")


def _wait_used(replica: Replica) -> None:
    if not gateway.running():
        return

    def used() -> bool:
        _stop.check()
        clusters = gateway.ask_admin("/clusters")
        return all(
            any(
                re.search(rf"^{transport}::{re.escape(one)}:\d+::health_flags::healthy", clusters, re.M)
                for one in replica.addresses
            )
            for transport in ("rest", "grpc")
        )

    if not gateway.wait_until(used, NOTICED_S):
        raise Refused("it is healthy, but the gateway does not use it (`docker compose logs --tail 50 gateway`)")


def _retire(replica: Replica) -> None:
    """Have a replica drain, keep its log and remove it."""
    run("docker", "stop", "-t", str(STOP_S), replica.id, check=False)
    print(f"{replica.name} is gone, its log is {_remove(replica)}")


def _remove(replica: Replica) -> str:
    """Keep a replica's log and remove it; return where the log is."""
    folder = ROOT / "logs" / deployment()["name"]
    path = folder / f"{now():%Y%m%dT%H%M%SZ}-{replica.name}.log.gz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        command = ["docker", "logs", "--timestamps", replica.id]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        with process, gzip.open(path, "wb") as file:
            shutil.copyfileobj(process.stdout, file)  # type: ignore[arg-type]
        for one in sorted(folder.glob("*.log.gz"))[:-KEPT_LOGS]:
            one.unlink()
        place = os.path.relpath(path, Path.cwd())
    except OSError as error:  # A full disk is no reason to stop half-way.
        place = f"lost ({error.strerror})"
    run("docker", "rm", "--force", replica.id, check=False)
    return place


class _Stop:
    """A request to stop this process, which stops where nothing is half done."""

    asked = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self.asked = True

    def check(self) -> None:
        """Stop here, if that was requested."""
        if self.asked:
            raise KeyboardInterrupt


_stop = _Stop()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Let one command at a time change the replicas; signals take effect at the calls of `_stop.check`."""
    with only_one(ROOT / "logs" / deployment()["name"] / ".lock", "another change of the replicas"):
        before = {number: signal.signal(number, _stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
