"""Parts leave or are replaced under constant load, and no request is lost. Writes its table to out/kubernetes/."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import datetime

import pytest
from convscope import AuthenticationFailed

from tests.docker.load import Tally, load
from tests.docker.stack import wait_until
from tests.kubernetes.cluster import PLUG, REPLICAS, ROOT, UNPLUG, VERSIONS, Cluster

BEFORE_S, AFTER_S = 5.0, 5.0
# After the cluster has called a node lost, a Service needs a moment to forget its pods.
FORGOTTEN_S = 5.0
TABLE = ROOT / "out/kubernetes/scenarios.md"
HEAD = (
    "| scenario | sent | answered | failed | longest gap s | slowest answer s | whole again after s |\n"
    "|---|---|---|---|---|---|---|\n"
)


@pytest.fixture(scope="module", autouse=True)
def table() -> None:
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(HEAD)


def play(
    cluster: Cluster, name: str, event: Callable[[], object], replicas: int = REPLICAS, *, lossless: bool = True
) -> Tally:
    """Run a scenario under load until the service is whole again, write its row and check that nothing was lost."""
    with load(cluster) as tally:  # type: ignore[arg-type]
        time.sleep(BEFORE_S)  # Load before, for there to be requests in flight.
        began = time.monotonic()
        event()
        wait_until(lambda: cluster.is_whole(replicas), 600)
        recovered_s = time.monotonic() - began
        time.sleep(AFTER_S)
    row = (
        f"| {name} | {tally.sent} | {tally.answered} | {len(tally.failed)} | {tally.gap_s:.2f} | {tally.slowest_s:.2f} "
        f"| {recovered_s:.1f} |"
    )
    with TABLE.open("a") as file:
        file.write(row + "\n")
    print(row)
    if lossless:
        assert not tally.failed, tally.failed[:5]
    assert tally.answered > 20
    return tally


def test_it_answers_on_both_transports_and_only_with_a_key(cluster: Cluster) -> None:
    wait_until(cluster.is_whole, 120)
    for transport in ("rest", "grpc"):
        with cluster.client(transport) as client:
            assert client.ready("cifar")
        with cluster.client(transport, api_key="wrong") as client, pytest.raises(AuthenticationFailed):
            client.ready("cifar")


def test_the_probe_gets_right_answers(cluster: Cluster) -> None:
    wait_until(lambda: len(cluster.pods("probe")) == 1, 120)
    [pod] = cluster.pods("probe")
    ask = "python deploy/probe_health.py && echo right || echo not yet"
    wait_until(lambda: cluster.kubectl("exec", pod["metadata"]["name"], "--", "sh", "-c", ask).endswith("right\n"), 120)


def test_a_container_cannot_write_and_has_no_token(cluster: Cluster) -> None:
    [pod, *_] = cluster.pods("torchserve")
    code = (
        "import os; print(os.getuid(), os.path.exists('/var/run/secrets/kubernetes.io'), "
        "[path for path in ('/', '/models', '/srv/convscope') if os.access(path, os.W_OK)])"
    )
    said = cluster.kubectl("exec", pod["metadata"]["name"], "--", "python", "-c", code)
    assert said.strip() == "10001 False []"


def test_a_new_archive_is_rolled_out(cluster: Cluster) -> None:
    def event() -> None:
        cluster.kubectl("set", "image", "deployment/torchserve", f"archives={cluster.archives(VERSIONS[1])}")
        cluster.wait_for_rollout("torchserve")

    tally = play(cluster, "rolling update to a new archive", event)
    assert tally.versions == list(VERSIONS)
    with cluster.client("rest") as client:
        assert {client.model_card("cifar").version for _ in range(12)} == {VERSIONS[1]}


@pytest.mark.parametrize(("component", "words"), [("torchserve", "a replica's pod"), ("gateway", "a gateway's pod")])
def test_a_pod_is_deleted(cluster: Cluster, component: str, words: str) -> None:
    [pod, *_] = cluster.pods(component)
    play(cluster, f"{words} is deleted", lambda: cluster.kubectl("delete", "pod", pod["metadata"]["name"]))


@pytest.mark.parametrize(("replicas", "words"), [(REPLICAS + 1, "up"), (REPLICAS, "down")])
def test_the_number_of_replicas_changes(cluster: Cluster, replicas: int, words: str) -> None:
    def event() -> None:
        cluster.kubectl("scale", "deployment/torchserve", f"--replicas={replicas}")

    play(cluster, f"scaled {words} to {replicas} replicas", event, replicas)


def test_a_node_is_drained(cluster: Cluster) -> None:
    def event() -> None:
        cluster.kubectl("drain", cluster.victim, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=600s")

    try:
        play(cluster, "a node is drained", event)
        assert {pod["spec"]["nodeName"] for pod in cluster.pods("torchserve")}.isdisjoint({cluster.victim})
    finally:
        cluster.kubectl("uncordon", cluster.victim)


@pytest.mark.skipif(
    not (os.environ.get(UNPLUG) and os.environ.get(PLUG)), reason=f"no {UNPLUG} and {PLUG} to lose a node"
)
def test_a_node_is_lost(cluster: Cluster) -> None:
    for name in (
        "gateway",
        "torchserve",
    ):  # After the drain all pods are on the other nodes: have one of each come back.
        [pod, *_] = cluster.pods(name)
        cluster.kubectl("delete", "pod", pod["metadata"]["name"])
    wait_until(cluster.is_whole, 300)
    placed = {name: [pod["spec"]["nodeName"] for pod in cluster.pods(name)] for name in ("gateway", "torchserve")}
    assert all(cluster.victim in nodes and len(set(nodes)) > 1 for nodes in placed.values()), placed
    times = {}

    def event() -> None:
        times["lost"] = time.time()
        cluster.switch(UNPLUG)
        wait_until(lambda: not cluster.node_is_ready(cluster.victim), 300)
        times["noticed"] = time.time()

    try:
        tally = play(cluster, "a node is lost", event, lossless=False)
    finally:
        cluster.switch(PLUG)
        wait_until(lambda: cluster.node_is_ready(cluster.victim), 300)
    failed = [call for call in tally.calls if call.error is not None]
    late = [call for call in failed if call.sent_at > times["noticed"] + FORGOTTEN_S]
    noticed_s = times["noticed"] - times["lost"]
    print(
        f"{datetime.now():%Y-%m-%d}: noticed after {noticed_s:.0f} s; the last that failed was sent "
        f"{max((call.sent_at for call in failed), default=times['lost']) - times['lost']:.0f} s after the loss"
    )
    assert not late, late[:5]
