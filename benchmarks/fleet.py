"""Measure what a request costs, simulate fleets with it, and hold the simulation to three replicas that run.

    python -m benchmarks.fleet measure --envoy ENVOY   # processor time of a request, into results/fleet.json
    python -m benchmarks.fleet check --envoy ENVOY --network waiting  # the simulation beside three replicas that run
    python -m benchmarks.fleet sizes     # replicas, latency and cost at 1,000, 10,000 and 100,000 requests a second
    python -m benchmarks.fleet gateways  # what it costs that gateways do not know of each other
    python -m benchmarks.fleet limits    # what breaks first
    python -m benchmarks.fleet crowd     # three times the load from one moment to the next, and the autoscaler

ENVOY is a program of the version in docker-compose.yml; only `measure` and `check` start servers. They give each
replica one worker with one thread, and want a machine that does nothing else. docs/capacity.md has the results;
`benchmarks.simulation` says what is modelled.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import yaml
from scipy.optimize import nnls

from benchmarks import machine, models
from benchmarks.capacity import read
from benchmarks.load import ROOT, Load
from benchmarks.load import Outcome as Measured
from benchmarks.load import measure as run_load
from benchmarks.rivals.torchserve_waiting import BATCH_S, REQUEST_S
from benchmarks.running import Running, ask_on, free_port
from benchmarks.servers import JVM_S, OURS, Place, our_request, wrap
from benchmarks.simulation import CHECK_S, Autoscaler, Costs, Fleet, Outcome, simulate
from benchmarks.summaries import percentile, table
from benchmarks.wires import Http
from benchmarks.workloads import Asked

RESULTS = ROOT / "benchmarks/results/fleet.json"
ASSUMPTIONS = ROOT / "benchmarks/fleet-assumptions.yaml"
ENVOY = ROOT / "deploy/envoy"
CALLERS = (1, 2, 4, 8, 16, 32)
SHARES = (0.3, 0.6, 0.8, 1.3)
CONNECTIONS = 128  # Connections of an open loop: more than the gateway lets through.
RATES = (1_000, 10_000, 100_000)
LOADS = (0.5, 0.7, 0.85)  # Shares of the replicas' cores, if every request were alone in its batch.
REPLICA_QUEUE = 100  # TorchServe's job_queue_size


# --- what runs


@dataclass
class Standing:
    """Running replicas and their gateway.

    Attributes:
        replicas: The replicas, one `python -m server` each.
        gateway: The Envoy process.
        port: Port of the gateway, without TLS.
        metrics_port: Port of the gateway's metrics.
        message: A request with a key.
    """

    replicas: list[Running]
    gateway: subprocess.Popen[bytes]
    port: int
    metrics_port: int
    message: bytes

    def load(self, callers: int, seconds: float, rate: float | None = None) -> tuple[Measured, dict[str, float]]:
        """Send requests, in a closed loop or at a rate (Poisson).

        Returns:
            What came of it, and processor seconds of `java`, `python` (the workers), `gateway` and `caller`. `others`
            is the share of all processors that other processes and guests of the machine took.
        """
        others, before = machine.Interval(), self._cpu_s()
        load = Load(("127.0.0.1", self.port), "REST", self.message, callers, seconds, rate=rate, poisson=True)
        found = run_load(load)
        used = {name: spent - before[name] for name, spent in self._cpu_s().items()} | {"caller": found.cpu_s}
        used["others"] = sum(others.end(sum(used.values())))
        return found, used

    def sample(self, callers: int, seconds: float, rate: float | None = None) -> tuple[Measured, dict[str, float]]:
        """Send requests as `load` does.

        Returns:
            The outcome, and what a request took: processor seconds by program, such as `java_s`, those of the gateway
            and the caller also for rejected requests; requests a `batch`; `requests`, how many reached a worker; and
            `callers`, `others`, `median_s`.
        """

        def count() -> tuple[float, float]:
            counts = [read(replica.place.others[0])[1:] for replica in self.replicas]
            return sum(requests for requests, _ in counts), sum(batches for _, batches in counts)

        before = count()
        outcome, used = self.load(callers, seconds, rate)
        requests, batches = (now - then for now, then in zip(count(), before, strict=True))
        assert requests >= len(outcome.latencies), "requests are missing"  # More: the gateway sent some again.
        others = used.pop("others")
        sent = {"gateway": requests + outcome.errors.total(), "caller": requests + outcome.errors.total()}
        taken = {f"{name}_s": spent / sent.get(name, requests) for name, spent in used.items()}
        taken |= {"callers": callers, "batch": requests / batches, "requests": requests, "others": others}
        return outcome, taken | {"median_s": statistics.median(outcome.latencies)}

    def _cpu_s(self) -> dict[str, float]:
        found = {"java": 0.0, "python": 0.0, "gateway": sum(machine.cpu_s(self.gateway.pid).values())}
        for replica in self.replicas:
            for name, spent in machine.cpu_s(replica.process.pid).items():
                found[name] += spent
        return found


@contextlib.contextmanager
def standing(network: str, envoy: Path, count: int) -> Iterator[Standing]:
    """Start replicas of one worker with one thread each, and a gateway before them; warm them up."""
    work = ROOT / "out/bench"
    model = _waiting(work) if network == "waiting" else models.prepare(network, work)
    asked = Asked("scores", 1, next(iter(model.pictures)))
    with contextlib.ExitStack() as stack:
        replicas = []
        for number in range(count):
            server = dataclasses.replace(OURS, name=f"replica {number}", command=_start_replica)
            replicas.append(stack.enter_context(Running(server, model, work, 1)))
        folder = replicas[0].place.folder / "gateway"
        ports = {old: free_port() for old in (8443, 9901, 9902)}
        key = _configure(folder, ports, [one.place for one in replicas])
        listen = {"path_config_source": {"path": f"{folder}/plain.yaml"}}
        command = [str(envoy), "-c", f"{folder}/bootstrap.yaml", "--concurrency", "2", "--use-dynamic-base-id"]
        command += ["--log-level", "warning", "--file-flush-interval-msec", "1000"]
        command += ["--config-yaml", json.dumps({"dynamic_resources": {"lds_config": listen}})]
        with (folder / "log").open("w") as log:
            gateway = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        stack.callback(gateway.wait)
        stack.callback(gateway.terminate)
        message = wrap(replicas[0].place, our_request(model, asked), "REST")
        message = message.replace(b"\r\n\r\n", b"\r\nx-api-key: " + key.encode() + b"\r\n\r\n", 1)
        found = Standing(replicas, gateway, ports[8443], ports[9902], message)
        _await(found, folder / "log")
        found.load(8 * count, JVM_S * count)
        yield found


def _start_replica(place: Place) -> list[str]:
    return [*OURS.command(place), "--ready-port", str(place.others[1])]


def _waiting(work: Path) -> models.Model:
    model = models.Model("waiting", work, work / "waiting/store/waiting.mar", {"": (b"a picture",)}, 0, {})
    model.archive.parent.mkdir(parents=True, exist_ok=True)
    config = (ROOT / "handlers/model-config.yaml").read_text().replace("batchSize: 1\n", "batchSize: 8\n")
    handler = (ROOT / "benchmarks/rivals/torchserve_waiting.py").read_bytes()
    members = {"handler.py": handler, "model-config.yaml": config.encode()}
    models.write_archive(model.archive, model.name, members, {"configFile": "model-config.yaml"})
    return model


def _configure(folder: Path, ports: dict[int, int], replicas: Sequence[Place]) -> str:
    """Write the gateway's files as deployed, except for paths, ports, addresses and the limits of requests a second."""
    subprocess.run(
        [sys.executable, "-m", "deploy.commands", "--secrets", str(folder), "secrets"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    for file in (found for found in ENVOY.iterdir() if found.suffix in (".yaml", ".lua", ".json")):
        text = file.read_text().replace("/etc/envoy", str(folder))
        text = text.replace("/run/secrets/api_keys", f"{folder}/api-keys")
        for old, new in ports.items():
            text = text.replace(f"port_value: {old}", f"port_value: {new}")
        text = re.sub(r"(max_tokens|tokens_per_fill): \d+", r"\1: 1000000", text)
        (folder / file.name).write_text(text)
    clusters = yaml.safe_load((folder / "clusters.yaml").read_text())
    for cluster in clusters["resources"]:
        del cluster["cluster_type"]
        cluster["type"] = "STATIC"
        found = [_endpoint(getattr(place, cluster["name"]), place.others[1]) for place in replicas]
        cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": found}]
    (folder / "clusters.yaml").write_text(yaml.safe_dump(clusters))
    return (folder / "api-key").read_text().strip()


def _endpoint(port: int, ready_port: int) -> dict[str, Any]:
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    return {"endpoint": {"address": address, "health_check_config": {"port_value": ready_port}}}


def _await(standing: Standing, log: Path) -> None:
    for _ in range(300):
        with contextlib.suppress(OSError):
            caller = Http(("127.0.0.1", standing.port))
            caller.socket.settimeout(10)
            with caller.socket:
                if ask_on(caller, standing.message).status == 200:
                    return
        if standing.gateway.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"the gateway did not start:\n{log.read_text()[-3000:]}")


# --- measure


def measure(network: str, envoy: Path, seconds: float, rounds: int) -> None:
    """Measure the cost of a request to a network, and write it to `RESULTS`."""
    runs: list[dict[str, float]] = []
    with standing(network, envoy, 1) as found:
        [replica] = found.replicas
        for callers in CALLERS * rounds:
            outcome, run = found.sample(callers, seconds)
            assert not outcome.errors, outcome.errors
            runs.append(run)
            print(" ".join(f"{name}={value:.5g}" for name, value in run.items()), flush=True)
        costs = fit(runs, batch_size(replica.place.model.archive))
        size = outcome.body_bytes / len(outcome.latencies)
        costs = dataclasses.replace(costs, request_bytes=len(found.message), reply_bytes=size)
        measured = {
            "date": time.strftime("%Y-%m-%d"),
            "load": os.getloadavg()[0],
            **machine.circumstances(),
            "others": statistics.median(run["others"] for run in runs),
            "batch": batch_size(replica.place.model.archive),
            "start_s": replica.first_answer_s,
            "ready_s": _ready_s(replica),
            "replica_series": _series(replica.place.others[0]),
            "gateway_series": _series(found.metrics_port),
            "costs": {name: value for name, value in dataclasses.asdict(costs).items() if name != "spread"},
            "runs": runs,
        }
    everything = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(everything | {network: measured}, indent=1) + "\n")


def batch_size(archive: Path) -> int:
    """Return the `batchSize` of an archive."""
    with zipfile.ZipFile(archive) as file:
        return int(yaml.safe_load(file.read("model-config.yaml"))["batchSize"])


def fit(runs: Sequence[dict[str, float]], batch: int) -> Costs:
    """Split the processor time of requests into the cost of each batch and of each request.

    Non-negative least squares of the seconds a request over the batches a request. Where batches hold one request, what
    the front end takes is counted before the queue. Gateway and caller are averaged over the runs with four callers or
    more, as a gateway has them.
    """

    def split(name: str) -> tuple[float, float]:
        found, _ = nnls(np.array([(1 / run["batch"], 1.0) for run in runs]), np.array([run[name] for run in runs]))
        return float(found[0]), float(found[1])

    busy = [run for run in runs if run["callers"] >= 4]
    handover_s, front_s = split("java_s") if batch > 1 else (0.0, statistics.fmean(run["java_s"] for run in runs))
    batch_s, request_s = split("python_s") if batch > 1 else (0.0, statistics.fmean(run["python_s"] for run in runs))
    return Costs(
        caller_s=statistics.fmean(run["caller_s"] for run in busy),
        gateway_s=statistics.fmean(run["gateway_s"] for run in busy),
        front_s=front_s,
        handover_s=handover_s,
        batch_s=batch_s,
        request_s=request_s,
    )


def _ready_s(replica: Running) -> float:
    """Return the launcher's processor time for a health check."""
    before = machine.cpu_s(replica.process.pid)["python"]
    message = b"GET /ready HTTP/1.1\r\nhost: gateway\r\n\r\n"
    found = run_load(Load(("127.0.0.1", replica.place.others[1]), "REST", message, 1, 2.0))
    return (machine.cpu_s(replica.process.pid)["python"] - before) / len(found.latencies)


def _series(port: int) -> int:
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return sum(not line.startswith(b"#") for line in answer.read().splitlines())


# --- check


def check(network: str, envoy: Path, seconds: float, rounds: int, seed: int) -> None:
    """Print latencies of the simulation beside those of three running replicas, and what a request took.

    A network shares the processors of this machine with gateway, front ends, callers and whatever else runs. The
    simulated fleet shares as many as the others left, a program as much as another: each is a session of its own here,
    which Linux treats so (`kernel.sched_autogroup_enabled`), as it treats containers. A simulated request takes the
    processor time that real ones took in the same seconds, split within a batch as `measure` found: a single request
    wakes every thread on its way and finds caches cold, so it takes more than one of a closed loop. The network
    `waiting` waits for a known time instead of computing: the processors are far from busy then, and are not simulated.

    Args:
        network: A measured network, or `waiting`.
        envoy: Path of the Envoy program.
        seconds: Seconds of each measurement.
        rounds: Number of rounds.
        seed: Seed of the simulations.
    """
    callers = deployed_most() - 3  # As many as the gateway takes, or fewer.
    found: dict[float, list[tuple[Measured, dict[str, float]]]] = {share: [] for share in SHARES}
    waiting = Costs(batch_s=BATCH_S, request_s=REQUEST_S)
    with standing(network, envoy, 3) as there:
        model = Fleet(3, 1, gateways=1, batch=batch_size(there.replicas[0].place.model.archive))
        if network == "waiting":
            lone, _ = there.load(1, seconds)
            waiting = dataclasses.replace(waiting, delay_s=statistics.median(lone.latencies) - BATCH_S - REQUEST_S)
        ask = there.load if network == "waiting" else there.sample
        closed, _ = there.load(callers, seconds)
        most, _ = there.load(CONNECTIONS, seconds, 1.3 * len(closed.latencies) / closed.wall_s)
        capacity = len(most.latencies) / seconds
        for number in range(rounds + 1):
            for share in SHARES:
                outcome, taken = ask(CONNECTIONS, seconds, share * capacity)
                if number:  # The first round only warms up: Java compiles what this load needs.
                    found[share].append((outcome, taken | {"rate": share * capacity}))
                    print(f"{share:.0%}", *(f"{name}={value:.5g}" for name, value in taken.items()), flush=True)
    rows, costs = [], waiting
    for share, runs in found.items():
        real, simulated = [], []
        for number, (outcome, taken) in enumerate(runs):
            if network != "waiting":
                costs = scaled(load_costs(network)[1], taken)
                model = dataclasses.replace(model, together=(os.cpu_count() or 1) * (1 - taken["others"]))
            guess = simulate(model, costs, taken["rate"], seconds, seed=seed + number, connections=CONNECTIONS)
            refused = outcome.errors.pop("status 503", 0)
            assert not outcome.errors, outcome.errors
            real.append(_summary(outcome.latencies, refused, seconds))
            simulated.append(_summary([took for _, took in guess.answers], len(guess.refusals), seconds))
        sent, others = (_median(runs, name) for name in ("rate", "others"))
        rows.append([f"{share:.0%}", f"{sent:,.0f}", *_side_by_side(real, simulated), f"{100 * others:.0f}"])
    print(f"\n{network}, three replicas, {rounds} rounds of {seconds:g} s, load {os.getloadavg()[0]:.0f}:\n")
    head = ["load", "sent/s", *(f"{name}: {whose}" for name in SUMMARY for whose in ("real", "simulated"))]
    print(*table([*head, "others, %"], rows), sep="\n")
    if network != "waiting":
        programs = {"gateway": "gateway_s", "front end": "java_s", "worker": "python_s", "caller": "caller_s"}
        rows = [
            [
                f"{share:.0%}",
                f"{_median(runs, 'batch'):.1f}",
                *(f"{1e3 * _median(runs, name):.2f}" for name in programs.values()),
            ]
            for share, runs in found.items()
        ]
        print("\nWhat a request took, in ms of a processor:\n")
        print(*table(["load", "requests a batch", *programs], rows), sep="\n")


def _median(runs: Sequence[tuple[Measured, dict[str, float]]], name: str) -> float:
    return statistics.median(taken[name] for _, taken in runs)


def scaled(costs: Costs, taken: dict[str, float]) -> Costs:
    """Return costs by which a request takes what it took in a sample, each program's split as before."""
    java = taken["java_s"] / (costs.front_s + costs.handover_s / taken["batch"])
    python = taken["python_s"] / (costs.request_s + costs.batch_s / taken["batch"])
    return dataclasses.replace(
        costs,
        caller_s=taken["caller_s"],
        gateway_s=taken["gateway_s"],
        front_s=java * costs.front_s,
        handover_s=java * costs.handover_s,
        batch_s=python * costs.batch_s,
        request_s=python * costs.request_s,
    )


SUMMARY = ("answered/s", "p50, ms", "p99, ms", "rejected, %")


def _summary(latencies: Sequence[float], refused: int, seconds: float) -> tuple[float, ...]:
    """Return the values that `SUMMARY` names."""
    p50, p99 = (1e3 * percentile(latencies, share) for share in (0.5, 0.99))
    return len(latencies) / seconds, p50, p99, 100 * refused / (len(latencies) + refused)


def _side_by_side(real: Sequence[tuple[float, ...]], simulated: Sequence[tuple[float, ...]]) -> Iterator[str]:
    """Yield the cells of a row: medians, the least and the largest of what was measured, and the median error."""
    for name, values, guesses in zip(SUMMARY, zip(*real, strict=True), zip(*simulated, strict=True), strict=True):
        digits = ",.0f" if name == "answered/s" else ",.1f"
        yield f"{statistics.median(values):{digits}} ({min(values):{digits}}–{max(values):{digits}})"
        error = ""
        if name != "rejected, %":
            by = statistics.median(guess / one - 1 for guess, one in zip(guesses, values, strict=True))
            error = f" ({by:+.0%})"
        yield f"{statistics.median(guesses):{digits}}{error}"


def deployed_most() -> int:
    """Return `max_requests` of deploy/envoy/clusters.yaml."""
    cluster = yaml.safe_load((ENVOY / "clusters.yaml").read_text())["resources"][0]
    return int(cluster["circuit_breakers"]["thresholds"][0]["max_requests"])


def load_costs(network: str) -> tuple[dict[str, Any], Costs]:
    """Return the measurements of a network.

    Raises:
        SystemExit: The network was not measured.
    """
    everything = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if network not in everything:
        raise SystemExit(f"{network} is not in {RESULTS}: run `measure --network {network}` first")
    return everything[network], Costs(**everything[network]["costs"])


# --- simulate


def sized(measured: dict[str, Any], costs: Costs, rate: float, load: float, assumed: dict[str, Any]) -> Fleet:
    """Return the fleet for a rate at a load of its replicas' cores.

    `max_requests` is raised with the replicas as docs/deployment.md has it: both transports of all gateways together
    stay below what the replicas queue.
    """
    fleet = Fleet(batch=measured["batch"], link_bits_s=assumed["link_gbit_s"] * 1e9)
    replicas = max(2, math.ceil(rate * costs.replica_s / (fleet.cores * load)))
    gateways = max(2, math.ceil(rate * costs.gateway_s / (fleet.gateway_cores * assumed["gateway_load"])))
    most = max(1, (REPLICA_QUEUE * replicas - 1) // (2 * gateways))
    return dataclasses.replace(fleet, replicas=replicas, gateways=gateways, max_requests=most)


def run(fleet: Fleet, costs: Costs, rate: float, requests: int, seed: int) -> Outcome:
    """Simulate so many requests, after a fifth of as many and a hundred times what one takes."""
    lone_s = costs.replica_s + costs.gateway_s
    return simulate(fleet, costs, rate, requests / rate, seed=seed, warm_up_s=max(requests / 5 / rate, 100 * lone_s))


def sizes(network: str, requests: int, seed: int, assumed: dict[str, Any]) -> None:
    """Print the fleet that a network needs at each rate."""
    measured, costs = load_costs(network)
    kinds = assumed["instances"]
    rows = []
    for rate in RATES:
        for load in LOADS:
            fleet = sized(measured, costs, rate, load, assumed)
            outcome = run(fleet, costs, rate, requests, seed)
            rows.append(
                [
                    f"{rate:,}",
                    f"{load:.0%}",
                    f"{fleet.replicas:,}",
                    f"{fleet.gateways}",
                    f"{fleet.max_requests}",
                    f"{outcome.latency(0.5) * 1e3:.1f}",
                    f"{outcome.latency(0.99) * 1e3:.1f}",
                    f"{1 - outcome.ends['answered'] / outcome.sent:.2%}",
                    *(f"{price(fleet, rate, kind, assumed):.2f}" for kind in kinds),
                ]
            )
    print(f"\n{network}, {requests:,} requests a row, seed {seed}:\n")
    head = ["requests/s", "load", "replicas", "gateways", "max_requests", "p50, ms", "p99, ms", "rejected"]
    print(*table([*head, *(f"$ a million on {kind['name']}" for kind in kinds)], rows), sep="\n")


def price(fleet: Fleet, rate: float, kind: dict[str, Any], assumed: dict[str, Any]) -> float:
    """Return the price of a million requests, from the machines that replicas and gateways fit on."""
    places = int(min((kind["vcpus"] - assumed["reserved_vcpus"]) // fleet.cores, kind["gib"] // assumed["pod_gib"]))
    machines = math.ceil((fleet.replicas + fleet.gateways) / places)
    return float(machines * kind["usd_per_hour"] / 3600 / rate * 1e6)


def gateways(network: str, requests: int, seed: int) -> None:
    """Print the latency of equally loaded fleets, by their size and by the number of their gateways."""
    measured, costs = load_costs(network)
    rows = []
    for replicas, count in ((8, 1), (8, 2), (8, 8), (32, 1), (32, 4), (32, 32), (128, 16)):
        rate = 0.7 * replicas * 2 / costs.replica_s
        most = REPLICA_QUEUE * replicas // count
        fleet = Fleet(replicas, gateways=count, gateway_cores=100, batch=measured["batch"], max_requests=most)
        outcome = run(fleet, costs, rate, requests, seed)
        rows.append(
            [str(replicas), str(count), *(f"{outcome.latency(share) * 1e3:.2f}" for share in (0.5, 0.99, 0.999))]
        )
    print(f"\n{network}, load 70 %, gateways with cores enough, {requests:,} requests a row, seed {seed}:\n")
    print(*table(["replicas", "gateways", "p50, ms", "p99, ms", "p99.9, ms"], rows), sep="\n")


def limits(network: str, requests: int, seed: int, assumed: dict[str, Any]) -> None:
    """Print the rate at which each limit of the default deployment is reached."""
    measured, costs = load_costs(network)
    scaler = Autoscaler.deployed(0.0)
    doors = Fleet().gateways  # As deploy/kubernetes/base/gateway.yaml has them; a test compares.
    each = 0.5 * 2 / costs.replica_s  # What a replica carries at half load.
    bucket, key_bucket = (
        int(re.findall(r"tokens_per_fill: (\d+)", (ENVOY / name).read_text())[-1])
        for name in ("http.yaml", "limits.yaml")
    )
    connections = int(
        re.findall(r"max_active_downstream_connections: (\d+)", (ENVOY / "bootstrap.yaml").read_text())[0]
    )
    lone = run(Fleet(8, batch=measured["batch"], max_requests=400), costs, 8 * each, requests, seed)
    mean_s = statistics.fmean(took for _, took in lone.answers)
    size = costs.request_bytes + costs.reply_bytes
    series = 4e9 / (15 * 86_400 * assumed["bytes_per_sample"]) * 5
    monitored = (series - doors * measured["gateway_series"]) / measured["replica_series"]
    checks = 2 / CHECK_S
    asking = 0.05 / (checks * measured["ready_s"])
    a_gateway = 2 * assumed["gateway_load"] / costs.gateway_s
    found = [
        ("requests a second of one API key", doors * key_bucket, f"{doors} gateways × {key_bucket}, limits.yaml"),
        ("requests a second of all callers", doors * bucket, f"{doors} gateways × {bucket}, http.yaml"),
        (
            "replicas that the autoscaler may start",
            scaler.most * each,
            f"{scaler.most} replicas × 0.5 × 2 cores / {costs.replica_s * 1e3:.2f} ms",
        ),
        (
            "the gateways' cores",
            doors * 2 / costs.gateway_s,
            f"{doors} gateways × 2 cores / {costs.gateway_s * 1e3:.3f} ms",
        ),
        (
            "requests in flight in the gateways",
            doors * deployed_most() / mean_s,
            f"{doors} gateways × {deployed_most()} / {mean_s * 1e3:.1f} ms (Little's law, simulated at half load)",
        ),
        (
            "the gateways' network",
            doors * assumed["link_gbit_s"] * 1e9 / 8 / size,
            f"{doors} gateways × {assumed['link_gbit_s']} Gbit/s / 8 / {size:,.0f} bytes",
        ),
        (
            "callers' connections",
            doors * connections * assumed["requests_per_connection_s"],
            f"{doors} gateways × {connections} × {assumed['requests_per_connection_s']}/s",
        ),
        (
            "15 days of metrics in 4 GB",
            monitored * each,
            f"{monitored:.0f} replicas of {measured['replica_series']:,} series, "
            f"each 5 s, {assumed['bytes_per_sample']} bytes a sample; a gateway has {measured['gateway_series']:,}",
        ),
        (
            "health checks take 5 % of a core of each replica",
            asking * a_gateway,
            f"{asking:.0f} gateways × {checks:.1f} checks/s × {measured['ready_s'] * 1e3:.2f} ms",
        ),
    ]
    print(f"\n{network}:\n")
    lines = table(
        ["limit", "reached at requests/s", "how"],
        [[name, f"{rate:,.0f}", how] for name, rate, how in sorted(found, key=lambda one: one[1])],
    )
    print(*lines, sep="\n")


def crowd(network: str, seed: int, assumed: dict[str, Any]) -> None:
    """Print what happens to a fleet whose load triples from one moment to the next."""
    measured, costs = load_costs(network)
    scaler = Autoscaler.deployed(assumed["pod_start_s"] + measured["start_s"])
    before_s, seconds, step = 120.0, 480.0, 30
    rate = 0.35 * 2 * scaler.least / costs.replica_s
    fleet = Fleet(scaler.least, batch=measured["batch"], max_requests=deployed_most())
    outcome = simulate(
        fleet, costs, lambda now: rate * (3 if now >= before_s else 1), seconds, seed=seed, autoscaler=scaler
    )
    rows = []
    for since in range(int(before_s) - step, int(seconds), step):
        until = since + step
        ready = [count for at, count in outcome.replicas if at < until][-1]
        refused = sum(since <= sent < until for sent in outcome.refusals)
        answered = sum(since <= sent < until for sent, _ in outcome.answers)
        latencies = (f"{outcome.latency(share, since, until) * 1e3:,.0f}" for share in (0.5, 0.99))
        row = [f"{since - before_s:+.0f} to {until - before_s:+.0f}", f"{(answered + refused) / step:,.0f}", str(ready)]
        rows.append([*row, *latencies, f"{refused / (answered + refused):.1%}"])
    print(f"\n{network}, {rate:,.0f} requests a second, then three times as many; pods take {scaler.start_s:.0f} s:\n")
    print(*table(["s", "requests/s", "replicas ready at the end", "p50, ms", "p99, ms", "rejected"], rows), sep="\n")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("measure", "check", "sizes", "gateways", "limits", "crowd"))
    parser.add_argument("--network", default="cifar", help="a network of benchmarks/models.py (default: cifar)")
    parser.add_argument("--envoy", type=Path, help="an Envoy program, for measure and check")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="of measure and check (default: 3)")
    parser.add_argument("--requests", type=int, default=100_000, help="in each simulation (default: 100000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--assumptions", type=Path, default=ASSUMPTIONS, help="prices and the like")
    given = parser.parse_args()
    assumed = yaml.safe_load(given.assumptions.read_text())
    if given.what in ("measure", "check") and not (given.envoy and given.envoy.is_file()):
        parser.error(f"{given.what} needs --envoy, a program of the version in docker-compose.yml")
    match given.what:
        case "measure":
            measure(given.network, given.envoy, given.seconds, given.rounds)
        case "check":
            check(given.network, given.envoy, given.seconds, given.rounds, given.seed)
        case "sizes":
            sizes(given.network, given.requests, given.seed, assumed)
        case "gateways":
            gateways(given.network, given.requests, given.seed)
        case "limits":
            limits(given.network, given.requests, given.seed, assumed)
        case "crowd":
            crowd(given.network, given.seed, assumed)


if __name__ == "__main__":
    main()
