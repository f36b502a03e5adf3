"""The simulated fleet: against queues whose formulas are known, against deploy/, and against itself."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Generator
from itertools import pairwise
from pathlib import Path

import pytest
import simpy
import yaml

from benchmarks import simulation
from benchmarks.fleet import deployed_most, fit, price, scaled, sized
from benchmarks.simulation import Autoscaler, Cores, Costs, Fleet, Thread, simulate
from tests.thorough import tries

DEPLOY = Path(__file__).parents[2] / "deploy"
S = 0.001  # Mean time of service.
QUEUE = Fleet(replicas=1, workers=1, cores=1, gateways=1, queue=10**9, max_requests=10**9)
EXPONENTIAL = tuple(-math.log(1 - (i + 0.5) / 5000) for i in range(5000))
REQUESTS = tries(800, 2000)
CIFAR = Costs(gateway_s=0.0002, front_s=0.0001, handover_s=0.0001, batch_s=0.0002, request_s=0.0001, delay_s=0.0001)
SMALL = Fleet(replicas=3, workers=1, gateways=2, batch=8)
SCALER = Autoscaler.deployed(start_s=20.0)


def erlang_c(servers: int, offered: float) -> float:
    """The probability of having to wait in M/M/c (Erlang, 1917)."""
    last = offered**servers / math.factorial(servers) * servers / (servers - offered)
    return last / (sum(offered**k / math.factorial(k) for k in range(servers)) + last)


@pytest.mark.parametrize(
    ("fleet", "costs", "busy", "expected_s"),
    [
        pytest.param(QUEUE, Costs(request_s=S, spread=EXPONENTIAL), 0.7, S / 0.3, id="M/M/1"),
        pytest.param(QUEUE, Costs(request_s=S), 0.7, S + 0.7 * S / (2 * 0.3), id="M/D/1"),
        pytest.param(
            dataclasses.replace(QUEUE, workers=3, cores=3),
            Costs(request_s=S, spread=EXPONENTIAL),
            0.8,
            S + erlang_c(3, 2.4) * S / (3 * 0.2),
            id="M/M/3",
        ),
        pytest.param(QUEUE, Costs(front_s=S), 0.7, S + 0.7 * S / (2 * 0.3), id="M/D/1, a thread"),
        pytest.param(
            dataclasses.replace(QUEUE, together=1.0, cores=999),
            Costs(front_s=S),
            0.7,
            S / 0.3,
            id="M/D/1, a processor that many threads share evenly",
        ),
    ],
)
def test_a_request_takes_as_long_as_queueing_theory_says(
    fleet: Fleet, costs: Costs, busy: float, expected_s: float
) -> None:
    rate = busy * fleet.workers / S
    means = []
    for seed in range(10):
        outcome = simulate(fleet, costs, rate, REQUESTS / rate, seed=seed, warm_up_s=200 * S)
        assert outcome.ends == {"answered": outcome.sent}
        means.append(statistics.fmean(took for _, took in outcome.answers))
    error = statistics.stdev(means) / math.sqrt(len(means))
    assert error < 0.06 * math.sqrt(2000 / REQUESTS) * expected_s
    assert abs(statistics.fmean(means) - expected_s) < 3.25 * error  # Student's t of nine degrees, 99 %


def test_programs_share_the_processors_evenly_and_threads_a_program() -> None:
    env = simpy.Environment()
    cores, ends = Cores(env, 2.0), {}
    threads = {name: Thread(cores, name[0]) for name in ("a1", "a2", "a3", "b1")}

    def follow(name: str, seconds: float) -> Generator[simpy.Event]:
        yield threads[name].work(seconds)
        ends[name] = env.now

    for name in threads:
        env.process(follow(name, 1.0))
    env.run()
    # b has one thread, and so one of the two processors until it ends. Then a has both, two thirds for each thread.
    assert ends == pytest.approx({"b1": 1.0, "a1": 2.0, "a2": 2.0, "a3": 2.0})


def test_a_gateway_that_shares_its_processors_rejects_what_replicas_could_answer() -> None:
    costs = Costs(gateway_s=S, request_s=S / 2)
    fleet = Fleet(3, 1, gateways=1, batch=8, max_requests=20)
    alone = simulate(fleet, costs, 1.5 / S, 2.0, connections=99)
    together = simulate(dataclasses.replace(fleet, together=2.0, gateway_cores=1), costs, 1.5 / S, 2.0, connections=99)
    assert len(alone.refusals) < 0.01 * alone.sent
    assert len(together.refusals) > 0.05 * together.sent


def test_a_request_waits_for_a_free_connection() -> None:
    fleet = dataclasses.replace(QUEUE, workers=5, cores=5)
    outcome = simulate(fleet, Costs(request_s=S), 2 / S, 1.0, connections=1)
    assert outcome.ends == {"answered": outcome.sent}
    assert outcome.latency(1.0) == pytest.approx(1.0, rel=0.1)


def test_an_overloaded_replica_answers_full_batches() -> None:
    fleet = dataclasses.replace(QUEUE, batch=8, queue=100)
    outcome = simulate(fleet, Costs(handover_s=S, batch_s=S, request_s=S / 2), 3 / S, 2.0, warm_up_s=0.5)
    assert outcome.ends["answered"] / 2.0 == pytest.approx(8 / (6 * S), rel=0.02)
    assert outcome.ends["queue full"] == outcome.sent - outcome.ends["answered"]


def test_no_more_is_in_flight_than_the_gateway_lets_through() -> None:
    outcome = simulate(dataclasses.replace(QUEUE, max_requests=20), Costs(request_s=S), 2 / S, 2.0)
    assert set(outcome.ends) == {"answered", "no room"}
    assert 19 * S < outcome.latency(1.0) <= 20 * S + 1e-9


def test_requests_are_conserved_whatever_happens() -> None:
    rate = 2.5 * 3 * 8 / (CIFAR.handover_s + CIFAR.batch_s + 8 * CIFAR.request_s)
    fleet = dataclasses.replace(SMALL, queue=10, gateway_cores=8)
    outcome = simulate(fleet, CIFAR, rate, 0.15, hang_at_s=0.05)
    assert outcome.sent == sum(outcome.ends.values()) == len(outcome.answers) + len(outcome.refusals)
    assert outcome.sent == pytest.approx(0.15 * rate, rel=0.05)
    assert set(outcome.ends) >= {"answered", "no room", "queue full"}


def test_the_same_seed_gives_the_same_outcome() -> None:
    outcomes = [simulate(SMALL, CIFAR, 3000, 0.5, seed=seed) for seed in (1, 1, 2)]
    assert outcomes[0] == outcomes[1] != outcomes[2]


def test_more_load_is_never_faster_nor_refused_less() -> None:
    fleet = dataclasses.replace(SMALL, gateway_cores=8)
    outcomes = [simulate(fleet, CIFAR, rate, 3000 / rate, warm_up_s=0.02) for rate in (2000, 16_000, 40_000)]
    for share in (0.5, 0.99):
        latencies = [outcome.latency(share) for outcome in outcomes]
        assert latencies == sorted(latencies)
    refused = [len(outcome.refusals) / outcome.sent for outcome in outcomes]
    assert refused == sorted(refused)
    assert refused[-1] > 0


def test_a_replica_that_hangs_costs_seconds_and_no_request() -> None:
    outcome = simulate(SMALL, CIFAR, 200, 8.0, hang_at_s=2.0)
    assert outcome.ends == {"answered": outcome.sent}
    assert simulation.HEDGE_S < outcome.latency(1.0, 2.0, 5.1) < 2 * simulation.HEDGE_S
    assert outcome.latency(1.0, 5.1) < 0.1


def test_two_gateways_that_know_half_each_balance_worse_than_one() -> None:
    costs = dataclasses.replace(CIFAR, gateway_s=0.0, batch_s=0.002)
    fleet = Fleet(replicas=8, workers=1, gateways=1, gateway_cores=99, max_requests=10**9)
    p99 = [
        simulate(dataclasses.replace(fleet, gateways=n), costs, 2400, 2.0, warm_up_s=0.2).latency(0.99) for n in (1, 8)
    ]
    assert p99[0] < p99[1]


@pytest.mark.parametrize(
    ("loads", "starting", "wanted"),
    [
        ([1.0, 1.0], 0, 4),  # ceil(2 × 1.0 / 0.5), the formula of Kubernetes' documentation
        ([0.25] * 8, 0, 4),
        ([0.54, 0.54, 0.54], 0, 3),  # within the tolerance of 0.1
        ([0.56, 0.56, 0.56], 0, 4),
        ([1.0, 1.0], 2, 4),  # Those that start are idle: half of 1.0 is the target.
        ([2.0, 2.0], 2, 8),
        ([0.1, 0.1], 2, 3),  # Those that start are on target.
        ([9.0] * 9, 0, 10),
        ([0.0] * 4, 0, 2),
    ],
)
def test_the_autoscaler_wants_what_kubernetes_would(loads: list[float], starting: int, wanted: int) -> None:
    assert SCALER.wanted(loads, starting) == wanted


def test_replicas_double_in_a_minute_and_go_one_by_one_after_five() -> None:
    busy = Costs(request_s=0.1)
    outcome = simulate(Fleet(2, gateways=1), busy, lambda now: 110 if 30 <= now < 200 else 4, 800.0, autoscaler=SCALER)
    steps = [(at, count) for at, count in outcome.replicas]
    growth = dict.fromkeys((count for _, count in steps), 0.0) | {count: at for at, count in reversed(steps)}
    assert growth[4] >= 30 + 15 + SCALER.start_s - 15
    assert growth[8] - growth[4] >= 60
    most = max(count for _, count in steps)
    assert 8 <= most <= 10
    down = [(at, count) for (_, before), (at, count) in pairwise(steps) if count < before]
    assert down[0][0] >= 200 + 300
    assert all(later[0] - earlier[0] >= 60 for earlier, later in pairwise(down))
    assert all(earlier[1] - later[1] == 1 for earlier, later in pairwise(down))


def test_what_is_measured_is_split_into_what_it_was_made_of() -> None:
    def measured(callers: int, batch: float) -> dict[str, float]:
        return {
            "callers": callers,
            "batch": batch,
            "java_s": CIFAR.handover_s / batch + CIFAR.front_s,
            "python_s": CIFAR.batch_s / batch + CIFAR.request_s,
            "gateway_s": CIFAR.gateway_s,
            "caller_s": 0.0,
        }

    found = fit([measured(callers, batch) for callers, batch in ((1, 1), (4, 2.5), (8, 4), (32, 8))], 8)
    expected = dataclasses.asdict(dataclasses.replace(CIFAR, delay_s=0.0))
    del expected["spread"]
    assert {name: dataclasses.asdict(found)[name] for name in expected} == pytest.approx(expected, abs=1e-9)


def test_costs_are_scaled_to_what_a_request_took_in_batches_of_a_size() -> None:
    taken = {"batch": 2.5, "java_s": 0.0007, "python_s": 0.0009, "gateway_s": 0.0005, "caller_s": 0.0001}
    found = scaled(CIFAR, taken)
    assert (found.gateway_s, found.caller_s, found.delay_s) == (0.0005, 0.0001, CIFAR.delay_s)
    assert found.front_s + found.handover_s / 2.5 == pytest.approx(0.0007)
    assert found.batch_s / 2.5 + found.request_s == pytest.approx(0.0009)
    assert found.batch_s / found.request_s == pytest.approx(CIFAR.batch_s / CIFAR.request_s)
    assert found.handover_s / found.front_s == pytest.approx(CIFAR.handover_s / CIFAR.front_s)


def test_a_price_is_of_whole_machines() -> None:
    assumed = {"reserved_vcpus": 0.2, "pod_gib": 4}
    kind = {"vcpus": 8, "gib": 32, "usd_per_hour": 0.36}
    # Three places of two cores on 7.8: seven pods need three machines.
    assert price(Fleet(replicas=5, gateways=2), 1000, kind, assumed) == pytest.approx(3 * 0.36 / 3600 / 1000 * 1e6)


def test_a_sized_fleet_carries_the_rate_at_the_load() -> None:
    assumed = {"link_gbit_s": 10, "gateway_load": 0.6}
    fleet = sized({"batch": 8}, CIFAR, 100_000, 0.5, assumed)
    assert fleet.replicas == math.ceil(100_000 * 0.0005 / (2 * 0.5))
    assert fleet.gateways == math.ceil(100_000 * 0.0002 / (2 * 0.6))
    assert 2 * fleet.gateways * fleet.max_requests < 100 * fleet.replicas


def test_the_model_is_that_of_the_deployment() -> None:
    cluster = yaml.safe_load((DEPLOY / "envoy/clusters.yaml").read_text())["resources"][0]
    [check] = cluster["health_checks"]
    [threshold] = cluster["circuit_breakers"]["thresholds"]
    assert (cluster["lb_policy"], cluster.get("least_request_lb_config")) == ("LEAST_REQUEST", None)  # Two are drawn.
    assert Fleet().max_requests == threshold["max_requests"] == deployed_most()
    assert threshold["retry_budget"] == {"budget_percent": {"value": 25}, "min_retry_concurrency": 16}
    assert (check["interval"], check["timeout"]) == (f"{simulation.CHECK_S}s", f"{simulation.CHECK_TIMEOUT_S}s")
    assert check["unhealthy_threshold"] == simulation.CHECKS
    http = yaml.safe_load((DEPLOY / "envoy/http.yaml").read_text())["resources"][0]["typed_config"]
    [route] = [
        one["route"]
        for one in http["route_config"]["virtual_hosts"][0]["routes"]
        if one.get("route", {}).get("cluster") == "rest"
    ]
    assert (route["timeout"], route["retry_policy"]["num_retries"]) == (f"{simulation.ROUTE_S:g}s", 1)
    assert route["retry_policy"]["retry_back_off"]["base_interval"] == f"{simulation.BACK_OFF_S}s"
    lua = (DEPLOY / "envoy/model.lua").read_text()
    found = re.search(r"FLOOR_MS, FACTOR, DECAY = (\d+), (\d+), ([\d.]+)", lua)
    assert found
    assert (float(found[1]) / 1000, int(found[2]), float(found[3])) == (
        simulation.HEDGE_S, simulation.HEDGE_FACTOR, simulation.HEDGE_DECAY
    )  # fmt: skip
    replicas, gateway = (
        next(
            one
            for one in yaml.safe_load_all((DEPLOY / f"kubernetes/base/{name}.yaml").read_text())
            if one["kind"] == "Deployment"
        )
        for name in ("replicas", "gateway")
    )
    assert gateway["spec"]["replicas"] == Fleet().gateways
    assert replicas["spec"]["replicas"] == Fleet().replicas == SCALER.least
    for one, cores in ((replicas, Fleet().cores), (gateway, Fleet().gateway_cores)):
        assert float(one["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]) == cores
    rule = (DEPLOY / "kubernetes/components/monitoring/load.yaml").read_text()
    assert f"rate(convscope_handler_seconds_sum[{simulation.WINDOW_S / 60:g}m])" in rule
