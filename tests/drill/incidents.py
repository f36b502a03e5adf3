"""The incidents of the drill: how each is caused and ended, which alerts must fire, how fast, and what may fail."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from convscope import ConvscopeError

from tests.docker.load import PICTURE
from tests.docker.stack import JAVA, WORKER, replace, wait_until
from tests.docker.test_scenarios import publish
from tests.drill.site import REPLICAS, Site

PAGE_S = 60.0
TICKET_S = 90.0
UPDATE_S = 900.0  # `make update` gives each of the three replicas five minutes to become ready.
BUDGET = frozenset({"AvailabilityBurnsFast", "LatencyBurnsFast"})
"""Pages that follow from lost or slow requests, and that stop when their windows of 5 and 30 minutes have passed."""
OUTAGE = BUDGET | {"ProbeFailing", "GatewayDown", "NoReadyReplica", "ConfigurationRejected"}
"""Pages that may ring, beside the expected ones, when nobody is served."""

Step = Callable[[Site], object]


def nothing(_: Site) -> None:
    """Do nothing: what happened ends by itself."""


@dataclass(frozen=True)
class Incident:
    """One incident.

    Attributes:
        name: For `-k`.
        what: For the table.
        cause: What happens. Its beginning is second 0 of the times in the table.
        rings: Alerts that must ring, and the seconds until their notification must have come. Of names joined by `|`
            one must ring: the one that rings first may silence the others.
        before: What the table says of the code before the drill; empty for nothing.
        prepare: What is the case before, and rings for itself.
        remedy: What ends it, after the first actions were tried.
        may_ring: Other pages that do not count as wrong.
        stays: Alerts that fire before and must go on until the remedy.
        first: Alerts whose first action is tried; None for those of `rings` that ring.
        shows: Pattern that the output of one of the first actions must contain. An action that shows it may fail.
        lost: Most requests that callers may lose; None where nobody can be served until the remedy.
        wait_s: Longest that a request may take.
        lasts_s: Least time before the remedy.
        whole_s: Longest time from the remedy, or from second 0 where there is none, until everything is whole.
        resolve_s: Longest time from then until the expected alerts are resolved.
        long: Whether it is left out of CI.
        check: What must hold at the end.
    """

    name: str
    what: str
    cause: Step
    rings: Mapping[str, float] = field(default_factory=dict)
    before: str = ""
    prepare: Step = nothing
    remedy: Step = nothing
    may_ring: frozenset[str] = frozenset()
    stays: frozenset[str] = frozenset()
    first: tuple[str, ...] | None = None
    shows: str = ""
    lost: int | None = 0
    wait_s: float = 5.0
    lasts_s: float = 0.0
    whole_s: float = 90.0
    resolve_s: float = 90.0
    long: bool = False
    check: Step = nothing

    @property
    def expected(self) -> dict[str, float]:
        """Every alert named in `rings`, with its limit."""
        return {name: limit_s for names, limit_s in self.rings.items() for name in names.split("|")}


# The gateway and its files


def lock_key(site: Site) -> None:
    """Have openssl's own mode on the private key, and the gateway started with it."""
    (site.secrets / "certificate/tls.key").chmod(0o600)
    site.compose("restart", "gateway")


def unlock_key(site: Site) -> None:
    site.certify(*site.authority.issue("first"))
    site.compose("restart", "gateway")


def stop_gateway(site: Site) -> None:
    site.compose("stop", "-t", "5", "gateway")


def up(site: Site) -> None:
    """Start what is missing, as the runbooks say; without `--wait`, which gives up while the probe still fails."""
    site.compose("up", "-d", "--no-recreate")


def expire(site: Site) -> None:
    site.certify(*site.authority.issue("expired", days=-1))


def renew(site: Site) -> None:
    site.certify(*site.authority.issue("renewed"))


def near_end(site: Site) -> None:
    """Serve a certificate that ends in ten days, and wait for the ticket."""
    site.certify(*site.authority.issue("ending", days=10))
    wait_until(lambda: "CertificateExpiring" in site.bells.firing(), TICKET_S)


def renew_unreadable(site: Site) -> None:
    site.certify(*site.authority.issue("unreadable"), mode=0o600)


def misspell_keys(site: Site) -> None:
    path = site.secrets / "api-keys/keys.yaml"
    text = path.read_text()
    path.with_suffix(".good").write_text(text)
    assert "      credentials:" in text
    replace(path, text.replace("      credentials:", "      credential:"))


def right_keys(site: Site) -> None:
    path = site.secrets / "api-keys/keys.yaml"
    replace(path, path.with_suffix(".good").read_text())


def misspell_http(site: Site) -> None:
    site.reconfigure("http.yaml", "request_headers_timeout:", "request_header_timeout:")


def right_http(site: Site) -> None:
    site.reconfigure("http.yaml", "request_header_timeout:", "request_headers_timeout:")


# Callers


def ask_for(site: Site, seconds_: float, period_s: float, transport: str, model: str, **options: str) -> None:
    """Ask again and again, as a caller who does something wrong."""
    until = time.monotonic() + seconds_
    with site.client(transport, **options) as client:
        while time.monotonic() < until:
            with suppress(ConvscopeError):
                client.predict(PICTURE, model=model)
            time.sleep(period_s)


def wrong_keys(site: Site) -> None:
    """Send three requests a second with a wrong key for a minute, on both transports."""
    threads = [
        threading.Thread(target=ask_for, args=(site, PAGE_S, 0.6, transport, "cifar"), kwargs={"api_key": "wrong"})
        for transport in ("rest", "grpc")
    ]
    for thread in threads:
        thread.start()
    # The alert has its minute, too: the threads end by themselves.


def unknown_model(site: Site) -> None:
    """Ask for a model that is not there over gRPC, twice a second for a minute."""
    ask_for(site, 60, 0.5, "grpc", "cifra")


# Replicas


def signal_one(kind: str, number: int) -> Step:
    return lambda site: site.signal(site.replicas()[0], kind, number)


def pause_one(site: Site) -> None:
    site.docker("pause", site.replicas()[0])


def unpause(site: Site) -> None:
    paused = site.docker("ps", "-q", "--filter", "status=paused", "--filter", f"label={label(site)}").split()
    for container in paused:
        site.docker("unpause", container)


def label(site: Site) -> str:
    return f"com.docker.compose.project={site.environment['COMPOSE_PROJECT_NAME']}"


FILL = """
import os
free = os.statvfs("/tmp")
with open("/tmp/ballast", "wb") as file:
    os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - 65536)
    file.seek(0, 2)
    try:
        while True:
            os.write(file.fileno(), bytes(4096))
    except OSError:
        pass
"""


def fill_disk(site: Site) -> None:
    site.docker("exec", site.replicas()[0], "python", "-c", FILL)


def free_disk(site: Site) -> None:
    for replica in site.replicas():
        site.docker("exec", replica, "rm", "-f", "/tmp/ballast")


class CrashLoop:
    """Kills the JVM of one replica whenever there is one."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def begin(self, site: Site) -> None:
        """Start killing; return when the replica has restarted twice."""
        replica = site.replicas()[0]
        self._stop.clear()
        threading.Thread(target=self._kill, args=(site, replica), daemon=True).start()
        wait_until(lambda: int(site.docker("inspect", "-f", "{{.RestartCount}}", replica)) >= 2, 60)

    def end(self, _: Site) -> None:
        self._stop.set()

    def _kill(self, site: Site, replica: str) -> None:
        while not self._stop.wait(0.5):
            with suppress(AssertionError):  # It is between two starts.
                site.kill(replica, JAVA)


loop = CrashLoop()


# Archives and updates


def damage(site: Site, model: str) -> None:
    """Cut an archive in half, keeping the whole one aside."""
    archive = site.store / f"{model}.mar"
    shutil.copy(archive, archive.with_suffix(".good"))
    data = archive.read_bytes()
    fresh = archive.with_suffix(".new")
    fresh.write_bytes(data[: len(data) // 2])
    fresh.chmod(0o644)
    fresh.rename(archive)


def mend(site: Site, model: str) -> None:
    (site.store / f"{model}.good").rename(site.store / f"{model}.mar")


def restart_with_damaged_archive(site: Site) -> None:
    damage(site, "digits")
    site.docker("restart", "-t", "45", site.replicas()[0])


def restart_with_good_archive(site: Site) -> None:
    mend(site, "digits")
    site.docker("restart", "-t", "45", site.replicas()[0])


def update(site: Site, *, accepted: bool = True) -> None:
    said = site.shell("make update", UPDATE_S)
    assert (said.returncode == 0) == accepted, said.stdout + said.stderr
    assert len(site.replicas()) == REPLICAS, site.replicas()


def refused_update(site: Site) -> None:
    damage(site, "cifar")
    update(site, accepted=False)


def good_update(site: Site) -> None:
    mend(site, "cifar")
    update(site)


def roll_out_and_back(site: Site) -> None:
    for version in ("1.1", "1.0"):
        publish(site.store / "cifar.mar", version)
        update(site)


def bring_up(site: Site) -> None:
    """Run the command of docs/deployment.md that starts everything, on a stack that runs."""
    before = site.replicas()
    said = site.shell("docker compose up -d")
    assert said.returncode == 0, said.stderr
    assert set(site.replicas()) == set(before)


# What watches


RIGHT, WRONG = "record: transport:convscope_failed:rate5m", "record: transport:convscope_fialed:rate5m"


def misspell_rule(site: Site) -> None:
    """Misspell the name that a rule records, which the burn rates read."""
    site.edit_rules("recording.yml", lambda text: text.replace(RIGHT, WRONG))


def right_rule(site: Site) -> None:
    site.edit_rules("recording.yml", lambda text: text.replace(WRONG, RIGHT))


def burn(site: Site) -> None:
    """Have the fast burn fire: no gateway for as long as it takes."""
    stop_gateway(site)
    wait_until(lambda: "AvailabilityBurnsFast" in site.bells.firing(), 120)
    up(site)


INCIDENTS = (
    Incident(
        "key_unreadable",
        "gateway restarted with a private key it cannot read (mode 0600)",
        lock_key,
        {"ProbeFailing|GatewayDown": PAGE_S},
        before="all of 841 requests in 4 min 38 s; no alert, a firing one resolved",
        remedy=unlock_key,
        may_ring=OUTAGE,
        first=("GatewayDown", "ProbeFailing"),
        shows=r"\bconnect\b",
        lost=None,
    ),
    Incident(
        "gateway_stopped",
        "`docker compose stop gateway`",
        stop_gateway,
        {"GatewayDown|ProbeFailing": PAGE_S},
        before="a ticket after 2 min 13 s",
        remedy=up,
        may_ring=OUTAGE,
        lost=None,
        long=True,
    ),
    Incident(
        "certificate_expired",
        "an expired certificate is served",
        expire,
        {"CertificateExpiring": PAGE_S, "ProbeFailing": PAGE_S},
        before="a ticket",
        remedy=renew,
        may_ring=OUTAGE,
        shows=r"\btls\b",
        lost=None,
    ),
    Incident(
        "renewal_unreadable",
        "the certificate ends in ten days and is renewed with a key that the gateway cannot read",
        renew_unreadable,
        {"CertificateNotRotated": TICKET_S},
        before="`CertificateExpiring` resolved, callers still got the old certificate",
        prepare=near_end,
        remedy=renew,
        may_ring=frozenset({"ConfigurationRejected"}),
        stays=frozenset({"CertificateExpiring"}),
        long=True,
    ),
    Incident(
        "keys_misspelt",
        "a misspelt field in `keys.yaml`",
        misspell_keys,
        {"ConfigurationRejected": PAGE_S},
        before="401 for every key; no alert",
        remedy=right_keys,
        shows="'credential'",
    ),
    Incident(
        "http_misspelt",
        "a misspelt field in `http.yaml`",
        misspell_http,
        {"ConfigurationRejected": PAGE_S},
        before="ignored; no alert",
        remedy=right_http,
        shows="'request_header_timeout'",
        long=True,
    ),
    Incident(
        "wrong_keys",
        "three requests a second with a wrong key",
        wrong_keys,
        {"UnauthorizedRising": PAGE_S},
        before="581 requests in 200 s; no alert",
        lasts_s=PAGE_S,
        resolve_s=400,
        long=True,
    ),
    Incident(
        "unknown_model",
        "a caller asks for an unknown model over gRPC, twice a second for a minute",
        unknown_model,
        before="`AvailabilityBurnsFast` after 37 s",
        lasts_s=75,
    ),
    Incident(
        "worker_killed",
        "`kill -9` of the workers of one replica",
        signal_one(WORKER, signal.SIGKILL),
        before="requests waited 10 to 13 s",
    ),
    Incident(
        "worker_stopped",
        "the workers of one replica stopped (SIGSTOP)",
        signal_one(WORKER, signal.SIGSTOP),
        before="ready for two minutes more",
        lasts_s=45,
        whole_s=120,
        long=True,
    ),
    Incident(
        "replica_paused",
        "`docker pause` of one replica",
        pause_one,
        before="11 to 20 s a request",
        remedy=unpause,
        lasts_s=30,
    ),
    Incident(
        "java_stopped",
        "Java of one replica stopped (SIGSTOP)",
        signal_one(JAVA, signal.SIGSTOP),
        before="REST requests hung for 120 s",
        lasts_s=45,
        whole_s=150,
    ),
    Incident(
        "java_killed",
        "`kill -9` of one replica's Java",
        signal_one(JAVA, signal.SIGKILL),
        lasts_s=15,
        long=True,
    ),
    Incident(
        "disk_full",
        "`/tmp` of one replica is full",
        fill_disk,
        {"ReplicaDiskFull": TICKET_S},
        before='log: "killed for want of memory, perhaps"; not back 50 s after it was freed',
        remedy=free_disk,
        long=True,
    ),
    Incident(
        "crash_loop",
        "the gateway stops while one of three replicas crash-loops",
        stop_gateway,
        {"GatewayDown|ProbeFailing": PAGE_S},
        before="the gateway does not start",
        prepare=loop.begin,
        remedy=loop.end,
        may_ring=OUTAGE | {"WorkerRestartLoop"},
        first=("ProbeFailing", "GatewayDown"),
        lost=None,
        long=True,
    ),
    Incident(
        "archive_damaged",
        "a replica restarts with one damaged archive of two",
        restart_with_damaged_archive,
        {"ArchiveRejected": TICKET_S},
        before="the replica serves nothing",
        remedy=restart_with_good_archive,
    ),
    Incident(
        "rule_misspelt",
        "a recording rule is misspelt while the fast burn fires",
        misspell_rule,
        # Series of traffic count as missing only after the probe has been answered for two minutes.
        {"RulesMissing": 240.0},
        before="the page resolved",
        prepare=burn,
        remedy=right_rule,
        shows="convscope_failed",
        may_ring=OUTAGE,
        stays=frozenset({"AvailabilityBurnsFast"}),
        long=True,
    ),
    Incident(
        "up_again",
        "a plain `up -d` on the running stack",
        bring_up,
        before="two of three replicas deleted with their logs",
        lasts_s=20,
        long=True,
    ),
    Incident(
        "update_refused",
        "`make update` to a damaged archive, then to a good one",
        refused_update,
        before="an extra replica stayed, five replicas after the second update",
        remedy=good_update,
        whole_s=UPDATE_S,
        long=True,
    ),
    Incident(
        "roll_out_and_back",
        "`make update` to a new archive and back to the old one",
        roll_out_and_back,
        before="`WorkerRestartLoop` paged",
        lasts_s=60,
        whole_s=2 * UPDATE_S,
        long=True,
    ),
)
