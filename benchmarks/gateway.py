"""What the gateway costs: the same load on our service directly and through Envoy, in alternation.

    .venv-bench/bin/python -m benchmarks.gateway                # directly, in the clear, with keys, with keys over TLS
    .venv-bench/bin/python -m benchmarks.gateway --settings     # with keys over TLS, one setting changed at a time
    .venv-bench/bin/python -m benchmarks.gateway --streams      # many gRPC calls in flight on few connections

Everything is up at once: the service with one worker, and one Envoy for each way. A round visits every workload and way
once, the order turning; ratios and added latencies compare within a round. Envoy's processor time is its process's own,
its health checks and its access log included.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fnmatch
import json
import os
import sys
import time
from array import array
from pathlib import Path
from statistics import median
from typing import Any

import grpc

from benchmarks import machine, models
from benchmarks.envoy import Gateway, Setting
from benchmarks.gateway_settings import DOORS, SETTINGS
from benchmarks.load import ROOT, Load, Outcome, Request, measure
from benchmarks.running import Running
from benchmarks.servers import SERVERS
from benchmarks.summaries import spread
from benchmarks.wires import OPEN, Grpc
from benchmarks.workloads import Asked, Workload

Take = dict[str, Any]

_IN_FLIGHT = 32
_WARM_UP_S = 1.0


def _workload(want: str, pictures: int, wire: Any, callers: int) -> Workload:
    many = f", {pictures} pictures" if pictures > 1 else ""
    return Workload(f"{want}{many}, {wire}, c={callers}", (Asked(want, pictures),), callers, wire)


_ASKED = (("scores", 1), ("float32", 1), ("float16", 32))
WORKLOADS = tuple(
    _workload(*asked, wire, callers) for asked in _ASKED for wire in ("REST", "gRPC") for callers in (1, 8, 32)
)


def main() -> int:
    """Measure, print the table with its circumstances, and keep both."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--settings", action="store_true", help="change one setting of the gateway at a time")
    parser.add_argument("--streams", action="store_true", help="many gRPC calls on few connections")
    parser.add_argument("--only", default="*", help="workloads, as patterns with | between them")
    parser.add_argument("--ways", default="*", help="ways or settings, likewise; the first is always there")
    parser.add_argument("--model", default="cifar")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--out", type=Path, default=ROOT / "out/bench/gateway.json")
    options = parser.parse_args()
    workloads = [one for one in WORKLOADS if _matches(one.name, options.only)]
    if options.streams:
        workloads = [one for one in workloads if one.wire == "gRPC" and one.callers == _IN_FLIGHT]
    ways = (None, *DOORS) if not options.settings else SETTINGS
    chosen = [one for one in ways if one is ways[0] or _matches(_name(one), options.ways)]
    takes = run(options, workloads, chosen)
    circumstances = {
        **machine.circumstances(),
        "command": " ".join(["python -m benchmarks.gateway", *sys.argv[1:]]),
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }
    print(table(takes))
    print(f"\n{json.dumps(circumstances)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    slim = [{key: value for key, value in take.items() if key != "latencies"} for take in takes]
    options.out.write_text(json.dumps({"circumstances": circumstances, "takes": slim}, indent=1))
    return 0


def run(options: argparse.Namespace, workloads: list[Workload], ways: list[Setting | None]) -> list[Take]:
    """Start everything, and measure every workload every way in every round."""
    work = ROOT / "out/bench"
    model = models.prepare(options.model, work)
    ours = next(server for server in SERVERS if server.kind == "ours")
    takes = []
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(Running(ours, model, work))
        service.warm_up(workloads)
        doors = [
            stack.enter_context(Gateway(way, service.place, work / f"gateway-{number}")) if way else None
            for number, way in enumerate(ways)
        ]
        for workload in workloads:
            for door in doors:
                take_load(service, door, workload, _WARM_UP_S)
        for number in range(options.rounds):
            for workload in workloads:
                turn = number % len(doors)
                for door in doors[turn:] + doors[:turn]:
                    for channels in (1, 4, _IN_FLIGHT) if options.streams else (0,):
                        take = take_once(service, door, workload, options.seconds, channels)
                        takes.append({"round": number, **take})
            print(f"benchmarks: round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    return takes


def take_once(service: Running, door: Gateway | None, workload: Workload, seconds: float, channels: int) -> Take:
    """Measure a workload one way; with `channels` by gRPC's own client, else by the load's bare connections."""
    others = machine.Interval()
    before = _used(service, door)
    if channels:
        outcome = asyncio.run(take_streams(service, door, workload, seconds, channels))
    else:
        outcome = take_load(service, door, workload, seconds)
    server_s, gateway_s = (now - then for now, then in zip(_used(service, door), before, strict=True))
    steal, foreign = others.end(server_s + gateway_s + outcome.cpu_s)
    count = max(1, len(outcome.latencies))
    ordered = sorted(outcome.latencies) or [float("nan")]
    return {
        "workload": workload.name + (f", {channels} connection{'s'[: channels > 1]}" if channels else ""),
        "way": _name(door.setting if door else None),
        "n": len(outcome.latencies),
        "rate": len(outcome.latencies) / outcome.wall_s,
        "p50_ms": 1e3 * median(ordered),
        "p99_ms": 1e3 * ordered[int(0.99 * len(ordered))],
        "gateway_us": 1e6 * gateway_s / count,
        "server_us": 1e6 * server_s / count,
        "load_us": 1e6 * outcome.cpu_s / count,
        "steal": steal,
        "foreign": foreign,
        "errors": dict(outcome.errors),
    }


def take_load(service: Running, door: Gateway | None, workload: Workload, seconds: float) -> Outcome:
    """Run a workload's load; a reply must be as long as one that came directly."""
    message, size = _prepare(service, door, workload)
    request = Request(message, size, slack=64)
    address = ("127.0.0.1", _port(service, door, workload))
    load = Load(address, workload.wire, (request,), workload.callers, seconds, door=door.door if door else OPEN)
    return measure(load)


async def take_streams(
    service: Running, door: Gateway | None, workload: Workload, seconds: float, channels: int
) -> Outcome:
    """Keep as many gRPC calls in flight, shared out among connections, by gRPC's own client."""
    message, size = _prepare(service, door, workload)
    target = f"localhost:{_port(service, door, workload)}"
    settings = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    metadata = [("x-api-key", door.door.key)] if door and door.door.key else []
    outcome = Outcome()
    latencies: array[float] = outcome.latencies

    async def call(channel: grpc.aio.Channel) -> None:
        ask = channel.unary_unary(Grpc.path.decode())
        while time.perf_counter() < end:
            since = time.perf_counter()
            try:
                reply = await ask(message, metadata=metadata, timeout=60)
            except grpc.RpcError as error:
                outcome.errors[error.code().name] += 1
                continue
            if abs(len(reply) - size) > 64:
                outcome.errors["size"] += 1
            latencies.append(time.perf_counter() - since)

    async with contextlib.AsyncExitStack() as stack:
        opened = []
        for _ in range(channels):
            if door and door.door.ca_file:
                trusted = grpc.ssl_channel_credentials(Path(door.door.ca_file).read_bytes())
                channel = grpc.aio.secure_channel(target, trusted, settings)
            else:
                channel = grpc.aio.insecure_channel(target, settings)
            opened.append(await stack.enter_async_context(channel))
        await asyncio.gather(*(channel.channel_ready() for channel in opened))
        cpu_s, began = time.process_time(), time.perf_counter()
        end = began + seconds
        await asyncio.gather(*(call(opened[number % channels]) for number in range(_IN_FLIGHT)))
        outcome.wall_s, outcome.cpu_s = time.perf_counter() - began, time.process_time() - cpu_s
    return outcome


def table(takes: list[Take]) -> str:
    """Lay out medians over the rounds, with the least and the largest of ratios and additions."""
    baseline = takes[0]["way"]
    grouped: dict[tuple[str, str], dict[int, Take]] = {}
    for take in takes:
        grouped.setdefault((take["workload"], take["way"]), {})[take["round"]] = take
    head = ["asked", "way", "n", "requests/s", f"rate to {baseline}", "p50 ms", "added", "p99 ms", "added"]
    head += ["Envoy CPU µs", "service CPU µs", "load CPU µs"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (workload, way), rounds in grouped.items():
        base = grouped[workload, baseline]

        def middle(field: str, rounds: dict[int, Take] = rounds) -> float:
            return median(take[field] for take in rounds.values())

        def added(field: str, rounds: dict[int, Take] = rounds, base: dict[int, Take] = base) -> str:
            return spread([take[field] - base[number][field] for number, take in rounds.items()], "{:+.2f}")

        errors = sum(sum(take["errors"].values()) for take in rounds.values())
        count = f"{sum(take['n'] for take in rounds.values()):,}" + (f", {errors} errors" if errors else "")
        ratios = spread([take["rate"] / base[number]["rate"] for number, take in rounds.items()])
        same = way == baseline
        cells = [workload, way, count, f"{middle('rate'):,.0f}", "1" if same else ratios]
        for field in ("p50_ms", "p99_ms"):
            cells += [f"{middle(field):.2f}", "–" if same else added(field)]
        cells += [f"{middle(field):,.0f}" for field in ("gateway_us", "server_us", "load_us")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _prepare(service: Running, door: Gateway | None, workload: Workload) -> tuple[bytes, int]:
    """Return the message, and the size of a reply that came directly."""
    [asked] = workload.asked
    message = service.server.ask(service.place, asked.want, asked.pictures, workload.wire)
    assert message is not None
    reply = service.ask(message, workload.wire)
    assert reply.status == 200, reply.status
    return door.let_in(message) if door and workload.wire == "REST" else message, len(reply.body)


def _port(service: Running, door: Gateway | None, workload: Workload) -> int:
    if door:
        return door.port
    return service.place.grpc if workload.wire == "gRPC" else service.place.rest


def _used(service: Running, door: Gateway | None) -> tuple[float, float]:
    """Return the processor seconds so far of the service and of the gateway."""
    gateway = sum(machine.cpu_s(door.process.pid).values()) if door else 0.0
    return sum(machine.cpu_s(service.process.pid).values()), gateway


def _name(way: Setting | None) -> str:
    return way.name if way else "directly"


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatch.fnmatch(name, f"*{part}*") for part in patterns.split("|"))


if __name__ == "__main__":
    sys.exit(main())
