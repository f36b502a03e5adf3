"""The stack of the drill: under load, watched from outside, and put back to calm before each incident."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.docker.load import Tally, load
from tests.docker.receiver import Receiver
from tests.docker.stack import ROOT, Stack, wait_until
from tests.drill import history
from tests.drill.certificates import Authority
from tests.watching.tools import Prometheus

REPLICAS = 3
CALLERS, PERIOD_S = 20, 7.0  # Three requests a second, also while some of the callers wait for a silent replica.
TICKET_FOR = "15s"
WATCHERS = ("prometheus", "alertmanager")  # They remember what they have seen.
MINUTES = re.compile(r"(\d+)(s|m|h)$")
SECONDS = {"s": 1, "m": 60, "h": 3600}


@dataclass
class Bell:
    """An alert that fires or fired.

    Attributes:
        name: Of the alert.
        severity: `page`, `ticket` or another one.
        rang_at: Unix time at which it was first seen firing.
        last_at: Unix time at which it was last seen firing.
        silent: Whether it was seen not firing after it had fired.
    """

    name: str
    severity: str
    rang_at: float
    last_at: float
    silent: bool = False


class Bells:
    """Looks at the firing alerts of Prometheus twice a second, from a thread of its own."""

    def __init__(self) -> None:
        self.prometheus: Prometheus | None = None
        self.rung: dict[str, Bell] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def firing(self) -> set[str]:
        """Return the names of the alerts that fired when last looked at; the dead man's switch always does."""
        return {bell.name for bell in self.rung.copy().values() if not bell.silent}

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        self._thread.join(10)

    def _look(self) -> None:
        while not self._stop.wait(0.5):
            try:
                alerts = self.prometheus.alerts() if self.prometheus else None
            except (httpx.HTTPError, RuntimeError, ValueError):
                continue  # Prometheus starts, or is stopped: that is not silence.
            if alerts is not None:
                self._note([alert["labels"] for alert in alerts if alert["state"] == "firing"])

    def _note(self, labels: list[dict[str, str]]) -> None:
        now = time.time()
        for one in labels:
            name = one["alertname"]
            bell = self.rung.setdefault(name, Bell(name, one.get("severity", ""), now, now))
            bell.last_at, bell.silent = now, False
        for name in self.rung.keys() - {one["alertname"] for one in labels}:
            self.rung[name].silent = True


class Site(Stack):
    """Three replicas behind the gateway, with everything that watches them but Grafana.

    Args:
        work: Folder for its secrets, archives and configuration, all of them copies that incidents change.
    """

    def __init__(self, work: Path) -> None:
        super().__init__(work)
        self.authority = Authority(work / "authority")
        self.ca_file = self.authority.ca_file
        self.certify(*self.authority.issue("first"))
        self.watching = work / "prometheus"
        shutil.copytree(ROOT / "deploy/prometheus", self.watching)
        self._hasten_tickets()
        self.bells = Bells()
        self.notifying = work / "alertmanager"
        self._hasten_notifications()
        self.tally = Tally()
        self._past = work / "past.txt"
        self._recorded: list[history.Past] = []
        self._has_past = False
        override = work / "override.yml"
        changes = {
            "prometheus": {"volumes": [_mount(self.watching, "/etc/prometheus")]},
            "alertmanager": {"volumes": [_mount(self.notifying, "/etc/alertmanager")]},
        }
        override.write_text(yaml.safe_dump({"services": changes}))
        self.environment |= {"COMPOSE_FILE": f"{ROOT / 'docker-compose.yml'}:{override}"}
        self.receiver = Receiver(self.environment["COMPOSE_PROJECT_NAME"])

    @contextmanager
    def running(self) -> Iterator[Site]:
        """Start everything and the load; take everything down at the end."""
        try:
            self.build()
            self.up(REPLICAS)
            with self.receiver, load(self, CALLERS, PERIOD_S) as self.tally:
                yield self
        finally:
            self.bells.close()
            self._leave_prometheus()
            self.down()

    # Looking

    @property
    def prometheus(self) -> Prometheus:
        """The stack's Prometheus, asked at the address of its container."""
        if self.bells.prometheus is None:
            networks = self.inspect("prometheus")["NetworkSettings"]["Networks"]
            self.bells.prometheus = Prometheus(f"http://{next(iter(networks.values()))['IPAddress']}:9090")
        return self.bells.prometheus

    def _leave_prometheus(self) -> None:
        gone, self.bells.prometheus = self.bells.prometheus, None
        if gone is not None:
            gone.close()

    def served(self, since: float) -> bool:
        """Tell whether the callers are well: of those who asked after a moment, the last six got the right answer."""
        recent = self.tally.between(since, time.time()).calls[-6:]
        waiting = not self.tally.complete(time.time() - 2)
        return len(recent) == 6 and all(call.error is None for call in recent) and not waiting

    def whole(self, since: float) -> bool:
        """Tell whether callers are well and the gateway uses every replica."""
        return self.served(since) and self.balances() == REPLICAS

    def balances(self) -> int:
        """Return how many replicas the gateway uses; 0 if it does not say."""
        try:
            return self.balanced()
        except AssertionError:
            return 0

    # Calm

    def calm(self, with_past: bool = True) -> None:
        """Wait until the service is whole and nothing rings.

        Where an earlier incident has left something in the windows of the rules, Prometheus and Alertmanager begin
        anew. Prometheus is then given three calm days: when it knows only minutes, the first lost request is a large
        share of all.

        Args:
            with_past: False for a Prometheus that knows nothing.
        """
        wait_until(lambda: self.whole(time.time() - 15), 180)
        if with_past and self._has_past and self._silent():
            self.bells.rung.clear()
            return
        if with_past and not self._recorded:
            self._begin_anew([])
            time.sleep(15)  # For rates of more than two scrapes.
            per_s = CALLERS / PERIOD_S / 2 + 1 / history.PROBE_S
            self._recorded = history.recorded(self.prometheus, self.watching / "rules", self.evaluation_s, per_s)
        self._begin_anew(self._recorded + history.probed(self.prometheus) if with_past else [])
        # Budgets that burn now do so because the machine is slow, not for an earlier incident.
        wait_until(lambda: not self._ringing(), 60)

    def _silent(self) -> bool:
        """Tell whether nothing rings or is about to, and no budget burns faster than it may."""
        return not self._ringing() and self.prometheus.value("max(transport:slo_burn:ratio) or vector(0)") < 1

    def _ringing(self) -> set[str]:
        """Return the names of the alerts that ring or are about to; the dead man's switch always does."""
        return {alert["labels"]["alertname"] for alert in self.prometheus.alerts()} - {"Watchdog"}

    def _begin_anew(self, past: list[history.Past]) -> None:
        self._leave_prometheus()
        self.compose("rm", "-sfv", *WATCHERS)
        for volume in WATCHERS:
            name = f"{self.environment['COMPOSE_PROJECT_NAME']}_{volume}"
            if name in self.docker("volume", "ls", "-q").split():
                self.docker("volume", "rm", name)
        self._has_past = bool(past)
        if past:
            self._backfill(past)
        self.compose("up", "-d", "--no-deps", *WATCHERS)
        self._await_rules()
        self.bells.rung.clear()

    def _await_rules(self) -> None:
        """Wait until Prometheus reaches all its targets and the rules have seen them."""
        wait_until(lambda: self.prometheus.ready(), 60)
        fresh = "count(time() - timestamp(transport:convscope_owed:rate5m) < 30)"
        wait_until(
            lambda: (
                self.prometheus.value('count(up{job="torchserve"} == 1)') == REPLICAS
                and self.prometheus.value("min(up)") == 1
                and self.prometheus.value(fresh) >= 2
            ),
            90,
        )

    def _backfill(self, past: list[history.Past]) -> None:
        history.write(self._past, past)
        mount = f"{self._past}:/past.txt:ro"
        self.compose(
            # promtool writes temporary files, and the container's root is read-only.
            *("run", "--rm", "--no-deps", "-T", "-v", mount, "-e", "TMPDIR=/prometheus"),
            *("--entrypoint", "promtool", "prometheus"),
            *("tsdb", "create-blocks-from", "openmetrics", "--quiet", "/past.txt", "/prometheus"),
        )

    @property
    def evaluation_s(self) -> float:
        """Seconds between two evaluations of the rules."""
        return seconds(yaml.safe_load((self.watching / "prometheus.yml").read_text())["global"]["evaluation_interval"])

    # Changing

    def certify(self, certificate: Path, key: Path, mode: int = 0o644) -> None:
        """Rename a certificate and its key over those of the gateway."""
        folder = self.secrets / "certificate"
        for source, name, bits in ((certificate, "tls.crt", 0o644), (key, "tls.key", mode)):
            fresh = folder / f"{name}.new"
            shutil.copy(source, fresh)
            fresh.chmod(bits)
            fresh.rename(folder / name)

    def signal(self, replica: str, kind: str, number: int) -> None:
        """Send a signal to the processes of a kind in a replica."""
        code = f"import os; [os.kill(pid, {number}) for pid in ({','.join(self.processes(replica, kind))},)]"
        self.docker("exec", replica, "python", "-c", code)

    def shell(self, command: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command as an operator does, in the repository's folder."""
        return subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout_s,
        )

    def fill_in(self, command: str) -> str:
        """Put this stack's files and names where a runbook's command has words for them."""
        certificate, key = self.authority.issue("renewed")
        name = self.docker("inspect", "-f", "{{.Name}}", self.replicas()[0]).strip().lstrip("/")
        for word, value in (("fullchain.pem", str(certificate)), ("privkey.pem", str(key)), ("=NAME", f"={name}")):
            command = command.replace(word, value)
        return command

    def edit_rules(self, name: str, change: Callable[[str], str]) -> None:
        """Change a file of rules in place and have Prometheus read it."""
        path = self.watching / "rules" / name
        text = change(path.read_text())
        assert text != path.read_text()
        path.write_text(text)
        self.compose("kill", "-s", "HUP", "prometheus")

    def _hasten_tickets(self) -> None:
        """Shorten what tickets wait before they fire: the drill would last hours. Pages keep their own."""
        for path in (self.watching / "rules").glob("*.yml"):
            groups = yaml.safe_load(path.read_text())
            for group in groups["groups"]:
                for rule in group["rules"]:
                    ticket = rule.get("labels", {}).get("severity") == "ticket"
                    if ticket and seconds(rule.get("for", "0s")) > seconds(TICKET_FOR):
                        rule["for"] = TICKET_FOR
            path.write_text(yaml.safe_dump(groups, width=1000, sort_keys=False))

    def _hasten_notifications(self) -> None:
        """Have tickets notified as pages are; the configuration has them wait to be gathered."""
        shutil.copytree(ROOT / "deploy/alertmanager", self.notifying)
        path = self.notifying / "alertmanager.yml"
        configuration = yaml.safe_load(path.read_text())
        [pages] = [route for route in configuration["route"]["routes"] if "severity = page" in route["matchers"]]
        configuration["route"] |= {name: pages[name] for name in ("group_wait", "group_interval")}
        path.write_text(yaml.safe_dump(configuration, width=1000, sort_keys=False))


def _mount(source: Path, target: str) -> dict[str, Any]:
    return {"type": "bind", "source": str(source), "target": target, "read_only": True}


def seconds(duration: str) -> float:
    """Return a duration of Prometheus' configuration in seconds."""
    found = MINUTES.match(duration)
    assert found, duration
    return float(int(found[1]) * SECONDS[found[2]])
