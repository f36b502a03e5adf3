"""The model of a fleet: callers, gateways, replicas with their queues and workers, and the autoscaler, as SimPy events.

`benchmarks.fleet` feeds it with measurements and holds it to servers that run. What is modelled:

* Callers ask in an open loop (Poisson): one kind of request, one transport, a gateway drawn at random.
* A gateway takes processor time, then the less busy of two replicas drawn at random, as far as it knows itself. It
  rejects what is above `max_requests`, sends again once what a full queue refused, sends to a second replica as well
  what hangs, and drops a replica that fails its health checks (deploy/envoy).
* A replica takes processor time to read a request, and queues it. A worker takes what waits, up to a batch, and is busy
  for a constant and a share for each request.
* A thread does one thing at a time, in the order in which it was asked. A gateway has one for each of its cores, which
  serves its connections; a replica has such threads to read requests, and one for each worker.
* The programs that have something to do share the processors evenly, and a program's threads its share, as Linux does
  it with sessions and containers. A gateway and a replica have processors of their own, or all share one machine's.
* The autoscaler follows deploy/kubernetes, the metric's window and the pods' start included.

What is not: limits of requests a second (`python -m benchmarks.fleet limits` has them), TLS, the ejection of replicas
that answer 503 thrice in a row, the pauses of Java, and callers who ask again.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import simpy
import yaml

from benchmarks.load import ROOT
from benchmarks.summaries import percentile

# deploy/envoy: http.yaml (a retry, its pause, the time of a route), model.lua (the wait before a second replica),
# clusters.yaml (a health check's pause and timeout, how many must fail; how often names are looked up).
BACK_OFF_S, ROUTE_S = 0.02, 120.0
HEDGE_S, HEDGE_FACTOR, HEDGE_DECAY = 1.5, 3, 0.98
CHECK_S, CHECK_TIMEOUT_S, CHECKS, LOOK_UP_S = 0.3, 0.7, 3, 1.0
# Kubernetes' own: how often the autoscaler looks, and what it leaves alone. Our rule looks back a minute.
SYNC_S, TOLERANCE, WINDOW_S = 15.0, 0.1, 60.0

Steps = Generator[simpy.Event, Any, Any]


@dataclass(frozen=True)
class Costs:
    """Costs of a request, in seconds of a processor unless said otherwise.

    Attributes:
        caller_s: The load itself, half of it to send; counts where all share the processors.
        gateway_s: Envoy, half of it for the request and half for the reply.
        front_s: TorchServe's front end, before the queue.
        handover_s: The front end for a batch, while its worker waits.
        batch_s: A worker for a batch, whatever is in it.
        request_s: A worker for each request of a batch.
        delay_s: Time of a lone request that no processor accounts for.
        spread: Factors of a batch's time, each as likely as the others.
        request_bytes: Bytes of a request on the wire.
        reply_bytes: Bytes of a reply on the wire.
    """

    caller_s: float = 0.0
    gateway_s: float = 0.0
    front_s: float = 0.0
    handover_s: float = 0.0
    batch_s: float = 0.0
    request_s: float = 0.0
    delay_s: float = 0.0
    spread: tuple[float, ...] = (1.0,)
    request_bytes: float = 0.0
    reply_bytes: float = 0.0

    @property
    def replica_s(self) -> float:
        """Processor seconds of a request in a replica, alone in its batch."""
        return self.front_s + self.handover_s + self.batch_s + self.request_s


@dataclass(frozen=True)
class Fleet:
    """A fleet: replicas, gateways and their limits.

    Attributes:
        replicas: Number of replicas at the start.
        workers: Workers of a replica, with one thread each.
        cores: Cores of a replica; the same number of threads read requests.
        gateways: Number of gateways.
        gateway_cores: Cores of a gateway, and its number of threads.
        together: If not None, everything shares so many processors of one machine, the callers' one thread as well.
        batch: `batchSize` of the archive.
        queue: Requests that wait in a replica; above it the response is 503.
        max_requests: Most requests in flight of one gateway.
        link_bits_s: Bits a second of the network between gateway and replica.
    """

    replicas: int = 2
    workers: int = 2
    cores: float = 2.0
    gateways: int = 2
    gateway_cores: float = 2.0
    together: float | None = None
    batch: int = 1
    queue: int = 100
    max_requests: int = 48
    link_bits_s: float = math.inf


@dataclass(frozen=True)
class Autoscaler:
    """A HorizontalPodAutoscaler, and how long a pod takes until it is ready."""

    least: int
    most: int
    target: float
    up_share: float
    up_period_s: float
    down_window_s: float
    down_pods: int
    down_period_s: float
    start_s: float

    @classmethod
    def deployed(cls, start_s: float) -> Autoscaler:
        """Read deploy/kubernetes."""
        spec = yaml.safe_load((ROOT / "deploy/kubernetes/components/autoscaling/autoscaler.yaml").read_text())["spec"]
        up, down = spec["behavior"]["scaleUp"], spec["behavior"]["scaleDown"]
        [grow], [shrink] = up["policies"], down["policies"]
        assert (grow["type"], shrink["type"], up["stabilizationWindowSeconds"]) == ("Percent", "Pods", 0)
        target = float(spec["metrics"][0]["pods"]["target"]["averageValue"].removesuffix("m")) / 1000
        return cls(
            *(spec["minReplicas"], spec["maxReplicas"], target, grow["value"] / 100, grow["periodSeconds"]),
            *(down["stabilizationWindowSeconds"], shrink["value"], shrink["periodSeconds"], start_s),
        )

    def wanted(self, loads: Sequence[float], starting: int) -> int:
        """Return how many replicas the metric of those that are ready asks for, as Kubernetes computes it.

        Replicas that are starting count as idle where the load is above the target, and as on target below it.
        """
        now = len(loads) + starting
        ratio = statistics.fmean(loads) / self.target if loads else 1.0
        if abs(ratio - 1) > TOLERANCE and starting:
            with_them = (sum(loads) + (0.0 if ratio > 1 else starting * self.target)) / now / self.target
            ratio = with_them if (with_them > 1) == (ratio > 1) else 1.0
        wanted = now if abs(ratio - 1) <= TOLERANCE else math.ceil(ratio * now - 1e-9)
        return min(self.most, max(self.least, wanted))


@dataclass
class Outcome:
    """Outcome of the requests that were sent after the warm-up.

    Attributes:
        sent: Number of requests.
        ends: How many were answered, and how many not for which reason.
        answers: When each answered request was sent, and the seconds until its answer.
        refusals: When each other request was sent.
        replicas: Since when how many replicas are ready.
    """

    sent: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    answers: list[tuple[float, float]] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    replicas: list[tuple[float, int]] = field(default_factory=list)

    def latency(self, share: float, since: float = 0.0, until: float = math.inf) -> float:
        """Return a percentile of the seconds of requests sent in a time; nan without any."""
        return percentile((took for sent, took in self.answers if since <= sent < until), share)


class Cores:
    """Processors that programs share evenly, and their threads each share, as a fair scheduler does in the limit."""

    def __init__(self, env: simpy.Environment, count: float) -> None:
        self.env, self._count = env, count
        self._left: dict[Thread, float] = {}  # Seconds of work, of threads that have some.
        self._speeds: dict[Thread, float] = {}
        self._since = env.now
        self._timer: simpy.Event | None = None

    def run(self, thread: Thread, seconds: float) -> None:
        """Give an idle thread work for some seconds; its `end` is called when it is done."""
        self._advance()
        self._left[thread] = seconds
        self._arm()

    def _advance(self) -> None:
        passed, self._since = self.env.now - self._since, self.env.now
        for thread, speed in self._speeds.items():
            self._left[thread] -= passed * speed

    def _arm(self) -> None:
        self._timer, self._speeds = None, {}
        if not self._left:
            return
        programs: dict[object, list[Thread]] = {}
        for thread in self._left:
            programs.setdefault(thread.program, []).append(thread)
        free = self._count
        for left, threads in zip(itertools.count(len(programs), -1), sorted(programs.values(), key=len), strict=False):
            speed = min(1.0, free / left / len(threads))  # What a small program cannot use is left to the larger ones.
            free -= speed * len(threads)
            self._speeds |= dict.fromkeys(threads, speed)
        wait_s = min(self._left[thread] / speed for thread, speed in self._speeds.items())
        self._timer = self.env.timeout(max(0.0, wait_s))
        assert self._timer.callbacks is not None
        self._timer.callbacks.append(self._end)

    def _end(self, timer: simpy.Event) -> None:
        if timer is not self._timer:  # Another thread began meanwhile.
            return
        self._advance()
        least = max(1e-12, min(self._left.values()))
        ended = [thread for thread, seconds in self._left.items() if seconds <= least]
        for thread in ended:
            del self._left[thread]
        self._arm()
        for thread in ended:
            thread.end()


class Thread:
    """Does its work in the order requested; the threads of one program share its processors."""

    def __init__(self, cores: Cores, program: object) -> None:
        self.program = program
        self._cores = cores
        self._asked: deque[tuple[float, simpy.Event]] = deque()

    def work(self, seconds: float) -> simpy.Event:
        """Return an event for when it has worked so long for this, and before for what it was asked earlier."""
        done = self._cores.env.event()
        self._asked.append((seconds, done))
        if len(self._asked) == 1:
            self._cores.run(self, seconds)
        return done

    def end(self) -> None:
        """Start the next work in the queue."""
        self._asked.popleft()[1].succeed()
        if self._asked:
            self._cores.run(self, self._asked[0][0])


class Replica:
    """A replica: a bounded queue, and workers that take batches from it."""

    def __init__(self, env: simpy.Environment, fleet: Fleet, costs: Costs, cores: Cores, random: Random) -> None:
        self.silent = False
        self._env, self._fleet, self._costs, self._random = env, fleet, costs, random
        self._queue: deque[simpy.Event] = deque()
        self._idle: list[simpy.Event] = []
        self._held, self._held_seconds, self._since = 0, 0.0, env.now
        self._history: deque[tuple[float, float]] = deque([(env.now, 0.0)])
        self._readers = [Thread(cores, self) for _ in range(math.ceil(fleet.cores))]
        for _ in range(fleet.workers):
            env.process(self._work(Thread(cores, self)))

    def read(self) -> simpy.Event:
        """Return an event for when a request has been read."""
        return self._random.choice(self._readers).work(self._costs.front_s)

    def offer(self, reply: simpy.Event) -> bool:
        """Queue a request unless the queue is full; `reply` is triggered when the request is answered."""
        if len(self._queue) >= self._fleet.queue:
            return False
        self._hold(1)
        self._queue.append(reply)
        if self._idle:
            self._idle.pop().succeed()
        return True

    def load(self) -> float:
        """Return the mean of the requests handled or waiting for each worker, of a minute. Ask every `SYNC_S`."""
        self._hold(0)
        now = (self._env.now, self._held_seconds)
        while len(self._history) > 1 and self._history[1][0] <= now[0] - WINDOW_S:
            self._history.popleft()
        began, before = self._history[0]
        self._history.append(now)
        return (now[1] - before) / max(now[0] - began, 1e-9) / self._fleet.workers

    def _hold(self, more: int) -> None:
        self._held_seconds += self._held * (self._env.now - self._since)
        self._since = self._env.now
        self._held += more

    def _work(self, thread: Thread) -> Steps:
        costs, queue = self._costs, self._queue
        while True:
            while not queue:
                wake = self._env.event()
                self._idle.append(wake)
                yield wake
            batch = [queue.popleft() for _ in range(min(self._fleet.batch, len(queue)))]
            seconds = (costs.batch_s + costs.request_s * len(batch)) * self._random.choice(costs.spread)
            yield thread.work(costs.handover_s + seconds)
            if self.silent:
                return
            self._hold(-len(batch))
            for reply in batch:
                reply.succeed()


class Gateway:
    """Chooses a replica for each request, knowing of its own requests alone."""

    def __init__(self, env: simpy.Environment, fleet: Fleet, costs: Costs, cores: Cores, random: Random) -> None:
        self.hosts: list[Replica] = []
        self.threads = [Thread(cores, self) for _ in range(math.ceil(fleet.gateway_cores))]
        self._env, self._fleet, self._costs, self._random = env, fleet, costs, random
        self._active: Counter[Replica] = Counter()
        self._in_flight = self._again = 0
        self._lately_s = 0.0
        self._way_s = costs.delay_s + (costs.request_bytes + costs.reply_bytes) * 8 / fleet.link_bits_s

    def ask(self, thread: Thread) -> Steps:
        """Ask a replica, or two, for a connection of one of `threads`; return `answered`, or why not."""
        yield thread.work(self._costs.gateway_s / 2)
        first = self._pick(None)
        if first is None:
            return "no replica"
        if self._in_flight >= self._fleet.max_requests:
            return "no room"
        began = self._env.now
        attempts, used = [self._send(first, thread)], [first]
        yield attempts[0] | self._env.timeout(max(HEDGE_S, HEDGE_FACTOR * self._lately_s))
        if not _answered(attempts):
            if attempts[0].triggered:  # Its queue is full.
                self._leave(used.pop())
                yield self._env.timeout(self._random.uniform(0, BACK_OFF_S))
            second = self._pick(first)
            budget = max(16, 0.25 * self._in_flight)  # retry_budget of clusters.yaml
            again = second is not None and self._again < budget and self._in_flight < self._fleet.max_requests
            if second is not None and again:
                self._again += 1
                attempts.append(self._send(second, thread))
                used.append(second)
            deadline = self._env.timeout(ROUTE_S - (self._env.now - began))
            while not _answered(attempts) and not deadline.processed:
                waiting = [attempt for attempt in attempts if not attempt.triggered]
                if not waiting:
                    break
                yield self._env.any_of([*waiting, deadline])
            self._again -= again
        for replica in used:
            self._leave(replica)
        for attempt in attempts:
            if attempt.triggered and attempt.value is not None:
                self._lately_s = max(attempt.value, HEDGE_DECAY * self._lately_s)
                return "answered"
        return "queue full" if all(attempt.triggered for attempt in attempts) else "no answer"

    def _pick(self, other_than: Replica | None) -> Replica | None:
        """Return the less busy of two; drawn up to 20 times for another one than was asked, as http.yaml has it."""
        hosts, active, random = self.hosts, self._active, self._random.random
        chosen = None
        for _ in range(20 if hosts else 0):
            one, other = hosts[int(random() * len(hosts))], hosts[int(random() * len(hosts))]
            chosen = other if active[other] < active[one] else one
            if chosen is not other_than:
                break
        return chosen

    def _send(self, replica: Replica, thread: Thread) -> simpy.Process:
        self._active[replica] += 1
        self._in_flight += 1
        return self._env.process(self._attempt(replica, thread))

    def _leave(self, replica: Replica) -> None:
        self._active[replica] -= 1
        self._in_flight -= 1

    def _attempt(self, replica: Replica, thread: Thread) -> Steps:
        """Return the seconds until the replica's answer was read, or None if its queue is full."""
        began = self._env.now
        yield self._env.timeout(self._way_s)
        yield replica.read()
        reply = self._env.event()
        queued = replica.offer(reply)
        if queued:
            yield reply
        yield thread.work(self._costs.gateway_s / 2)
        return self._env.now - began if queued else None


def _answered(attempts: list[simpy.Process]) -> bool:
    return any(attempt.triggered and attempt.value is not None for attempt in attempts)


class _Simulation:
    def __init__(self, fleet: Fleet, costs: Costs, seed: int, connections: int | None) -> None:
        self.env, self.fleet, self.costs, self.outcome = simpy.Environment(), fleet, costs, Outcome()
        names = ("ask", "choose", "serve")
        self.random, self._choices, self._services = (Random(f"{seed} {name}") for name in names)  # noqa: S311 (no secrets)
        self._shared = Cores(self.env, fleet.together) if fleet.together else None
        self.gateways = [
            Gateway(self.env, fleet, costs, self._cores(fleet.gateway_cores), self._choices)
            for _ in range(fleet.gateways)
        ]
        self.replicas = [self._make() for _ in range(fleet.replicas)]
        for gateway in self.gateways:
            gateway.hosts.extend(self.replicas)
        ends = [(gateway, thread) for gateway in self.gateways for thread in gateway.threads]
        self._connections = None if connections is None else [ends[i % len(ends)] for i in range(connections)]
        self._due: deque[tuple[float, bool]] = deque()  # Requests that wait for a free connection.
        self._caller = Thread(self._shared, None) if self._shared else None
        self.starting = 0
        self.note()

    def note(self) -> None:
        self.outcome.replicas.append((self.env.now, len(self.replicas)))

    def _cores(self, count: float) -> Cores:
        return self._shared or Cores(self.env, count)

    def _make(self) -> Replica:
        return Replica(self.env, self.fleet, self.costs, self._cores(self.fleet.cores), self._services)

    def arrive(self, rate: Callable[[float], float], warm_up_s: float, seconds: float) -> Steps:
        while True:
            yield self.env.timeout(self.random.expovariate(rate(self.env.now)))
            if self.env.now >= warm_up_s + seconds:
                return
            self._due.append((self.env.now, self.env.now >= warm_up_s))
            if self._connections is None:
                gateway = self.gateways[int(self.random.random() * len(self.gateways))]
                self.env.process(self._follow(gateway, self.random.choice(gateway.threads)))
            elif self._connections:
                self.env.process(self._follow(*self._connections.pop()))

    def _follow(self, gateway: Gateway, thread: Thread) -> Steps:
        """Send a request over a connection, and further ones as long as requests wait for a connection."""
        while self._due:
            sent, counts = self._due.popleft()
            if self._caller:
                yield self._caller.work(self.costs.caller_s / 2)
            end = yield from gateway.ask(thread)
            if self._caller:
                yield self._caller.work(self.costs.caller_s / 2)
            if counts:
                self.outcome.sent += 1
                self.outcome.ends[end] += 1
                if end == "answered":
                    self.outcome.answers.append((sent, self.env.now - sent))
                else:
                    self.outcome.refusals.append(sent)
        if self._connections is not None:
            self._connections.append((gateway, thread))

    def hang(self, replica: Replica, at_s: float) -> Steps:
        """Make a replica stop responding; each gateway finds out by its health checks."""
        yield self.env.timeout(at_s)
        replica.silent = True
        for gateway in self.gateways:
            late = self._choices.uniform(0, CHECK_S) + CHECKS * CHECK_TIMEOUT_S + (CHECKS - 1) * CHECK_S
            self.env.process(self._drop(gateway, replica, late))

    def _drop(self, gateway: Gateway, replica: Replica, after_s: float) -> Steps:
        yield self.env.timeout(after_s)
        if replica in gateway.hosts:
            gateway.hosts.remove(replica)

    def _start(self, start_s: float) -> Steps:
        self.starting += 1
        yield self.env.timeout(start_s)
        self.starting -= 1
        replica = self._make()
        self.replicas.append(replica)
        self.note()
        for gateway in self.gateways:
            self.env.process(self._find(gateway, replica))

    def _find(self, gateway: Gateway, replica: Replica) -> Steps:
        yield self.env.timeout(self._choices.uniform(0, LOOK_UP_S) + self._choices.uniform(0, CHECK_S))
        if replica in self.replicas:
            gateway.hosts.append(replica)

    def scale(self, by: Autoscaler, until_s: float) -> Steps:
        changes: list[tuple[float, int]] = []
        wishes: deque[tuple[float, int]] = deque()
        while self.env.now < until_s:
            yield self.env.timeout(SYNC_S)
            loads, now = [replica.load() for replica in self.replicas], self.env.now
            total = len(loads) + self.starting
            wishes.append((now, by.wanted(loads, self.starting)))
            while wishes[0][0] < now - by.down_window_s:
                wishes.popleft()
            wish = wishes[-1][1]
            if wish > total:
                before = total - sum(more for at, more in changes if at > now - by.up_period_s)
                wish = max(total, min(wish, math.ceil(before * (1 + by.up_share))))
                for _ in range(wish - total):
                    self.env.process(self._start(by.start_s))
            else:
                before = total - sum(more for at, more in changes if at > now - by.down_period_s)
                wish = min(total, max(max(one for _, one in wishes), before - by.down_pods))
                for _ in range(min(total - wish, len(self.replicas) - 1)):
                    leaving = self.replicas.pop()
                    for gateway in self.gateways:
                        self.env.process(self._drop(gateway, leaving, self._choices.uniform(0, CHECK_S)))
                self.note()
            changes.append((now, wish - total))


def simulate(
    fleet: Fleet,
    costs: Costs,
    rate: float | Callable[[float], float],
    seconds: float,
    *,
    seed: int = 0,
    warm_up_s: float = 0.0,
    connections: int | None = None,
    autoscaler: Autoscaler | None = None,
    hang_at_s: float | None = None,
) -> Outcome:
    """Run a fleet under an open loop of callers until every request has come to its end.

    Args:
        fleet: The fleet.
        costs: Costs of a request.
        rate: Requests a second, or a function of the time in seconds.
        seconds: How long requests are sent that count.
        seed: The same seed gives the same outcome.
        warm_up_s: How long before that requests are sent that do not count.
        connections: Of the callers; a request that finds none free waits, and its time counts. None for one each.
        autoscaler: Autoscaler of the replicas; None for a constant number.
        hang_at_s: When the first replica answers nothing any more, without closing its connections; None for never.
    """
    simulation = _Simulation(fleet, costs, seed, connections)
    at = rate if callable(rate) else (lambda _: rate)
    simulation.env.process(simulation.arrive(at, warm_up_s, seconds))
    if autoscaler:
        simulation.env.process(simulation.scale(autoscaler, warm_up_s + seconds))
    if hang_at_s is not None:
        simulation.env.process(simulation.hang(simulation.replicas[0], hang_at_s))
    simulation.env.run()
    return simulation.outcome
