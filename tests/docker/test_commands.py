"""The operator's commands on two replicas of `digits`: what they change, what they refuse, what they survive."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from convscope import RequestRejected, TransportError

from tests.docker.stack import ROOT, Stack, wait_until

SERVICES = ("torchserve", "gateway")


@pytest.fixture(scope="module")
def small() -> Iterator[Stack]:
    work = Path(tempfile.mkdtemp(prefix="convscope-commands-"))
    work.chmod(0o755)
    running = Stack(work, models=("digits",))
    try:
        running.compose("build", "torchserve")
        running.up(2, SERVICES)
        yield running
    finally:
        running.down()
        shutil.rmtree(work)
        shutil.rmtree(logs(running), ignore_errors=True)


def logs(stack: Stack) -> Path:
    return ROOT / "logs" / stack.environment["COMPOSE_PROJECT_NAME"]


def succeed(stack: Stack, *arguments: str) -> str:
    ended = stack.make(*arguments)
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def let_in(stack: Stack, key: str) -> bool:
    with stack.client("rest", api_key=key) as client:
        try:
            return bool(client.model_card("digits"))
        except (RequestRejected, TransportError):
            return False


def containers(stack: Stack) -> dict[str, str]:
    """Return when each replica started, by its container, those that do not run too."""
    ids = stack.compose("ps", "--all", "-q", "torchserve").split()
    return {one: stack.docker("inspect", "-f", "{{.State.StartedAt}}", one).strip() for one in ids}


def names(stack: Stack) -> list[str]:
    return re.findall(r"^(\S+-torchserve-\d+) ", stack.make("replicas").stdout, re.M)


def test_a_key_holds_as_soon_as_the_command_ends_and_no_longer_when_it_is_revoked(small: Stack) -> None:
    said = succeed(small, "key", "NAME=alice")
    assert "The gateway accepts the key of alice." in said
    [key] = re.findall(r"^[0-9a-f]{48}$", said, re.M)
    assert let_in(small, key)
    assert "alice: it gets 401" in succeed(small, "revoke", "NAME=alice")
    assert not let_in(small, key)
    assert let_in(small, small.key)


@pytest.mark.parametrize(("old", "new"), [("key_sources", "key_soruces"), ("hide_credentials", "hide_credential")])
def test_a_key_is_not_added_to_a_file_that_envoy_would_not_take(small: Stack, old: str, new: str) -> None:
    keys = small.secrets / "api-keys/keys.yaml"
    good = keys.read_text()
    keys.write_text(good.replace(old, new))  # In place: the gateway does not see it.
    try:
        refused = small.make("key", "NAME=bob")
        assert refused.returncode != 0
        assert "keys.yaml is rejected" in refused.stdout
        assert f"'{new}'" in re.sub(r"\s+", " ", refused.stdout)
        assert "bob" not in keys.read_text()
    finally:
        keys.write_text(good)


def test_a_certificate_is_served_when_the_command_ends(small: Stack) -> None:
    failed = small.statistic(r"sds\.certificate\.key_rotation_failed")
    for _ in range(2):
        assert "The gateway serves it." in succeed(small, "certificate", "TEST=yes")
        with small.client("rest") as client:  # It trusts the new file, which is self-signed.
            assert client.model_card("digits")
    # Both files change at once, so the gateway never reads half a pair.
    assert small.statistic(r"sds\.certificate\.key_rotation_failed") == failed


def test_a_certificate_that_is_not_served_is_said_so(small: Stack) -> None:
    signal_envoy(small, "STOP")
    try:
        ended = small.make("certificate", "TEST=yes")
    finally:
        signal_envoy(small, "CONT")
    assert ended.returncode != 0
    assert "but the gateway does not answer over TLS" in ended.stdout
    with small.client("rest") as client:
        wait_until(lambda: client.ready("digits"), 20)


def signal_envoy(stack: Stack, name: str) -> None:
    find = "for one in /proc/[0-9]*; do [[ $(<$one/comm) == envoy ]] && kill -{} ${{one#/proc/}}; done; true"
    stack.compose("exec", "-T", "gateway", "bash", "-c", find.format(name))


def test_the_configuration_is_judged_by_those_who_read_it(small: Stack) -> None:
    said = succeed(small, "check-config")
    assert said.count("good  ") >= 3
    small.reconfigure("clusters.yaml", "connect_timeout: 1s", "connect_timeuot: 1s")
    try:
        refused = small.make("check-config")
    finally:
        small.reconfigure("clusters.yaml", "connect_timeuot: 1s", "connect_timeout: 1s")
    assert refused.returncode != 0
    assert "clusters.yaml is rejected" in refused.stdout
    assert "connect_timeuot" in refused.stdout
    succeed(small, "check-config")


def test_what_changed_in_the_configuration_is_noted(small: Stack) -> None:
    succeed(small, "check-config")
    small.reconfigure("http.yaml", "max_tokens: 2000", "max_tokens: 3000")
    try:
        said = succeed(small, "check-config")
    finally:
        small.reconfigure("http.yaml", "max_tokens: 3000", "max_tokens: 2000")
    [line] = [json.loads(one) for one in said.splitlines() if one.startswith("{")]
    assert line["what"] == "configuration changed"
    assert line["files"] == str(small.configuration / "http.yaml")
    assert json.dumps(line) in (small.secrets / "audit.log").read_text()
    succeed(small, "check-config")


def test_compose_up_keeps_the_replicas_there_are(small: Stack) -> None:
    before = containers(small)
    assert len(before) == 2
    small.compose("up", "-d", *SERVICES)
    assert containers(small) == before
    assert "2 of 2 ready" in succeed(small, "replicas")


def test_one_replica_is_restarted_and_the_other_is_not(small: Stack) -> None:
    before = containers(small)
    name = names(small)[0]
    succeed(small, "restart", f"REPLICA={name}")
    after = containers(small)
    assert set(after) == set(before)
    changed = [one for one in after if after[one] != before[one]]
    assert [small.docker("inspect", "-f", "{{.Name}}", one).strip() for one in changed] == [f"/{name}"]
    assert "2 of 2 ready" in succeed(small, "replicas")


def test_a_replica_that_is_not_there_is_not_restarted(small: Stack) -> None:
    refused = small.make("restart", "REPLICA=nobody")
    assert refused.returncode != 0
    assert "there is no replica 'nobody'" in refused.stdout


def test_an_update_to_a_damaged_archive_is_refused_and_one_to_a_good_archive_then_goes_through(small: Stack) -> None:
    before = containers(small)
    archive, other = small.store / "digits.mar", small.store / "other.mar"
    good = archive.read_bytes()
    refuse(small, archive, good[:-1000])  # As a copy that broke off.
    restore(archive, good)
    refuse(small, other, good[:-1000])  # Beside one that is good.
    other.unlink()
    assert containers(small) == before
    said = succeed(small, "update")
    after = containers(small)
    assert len(after) == 2
    assert not set(after) & set(before)
    assert "2 of 2" in said
    assert len(list(logs(small).glob("*.log.gz"))) == 4


def refuse(stack: Stack, archive: Path, content: bytes) -> None:
    """Put an archive into the store; see the update refused, the old replicas serve on, and the new one's log kept."""
    before, kept = containers(stack), set(logs(stack).glob("*.log.gz"))
    restore(archive, content)
    refused = stack.make("update")
    assert refused.returncode != 0
    assert "the new replica cannot be used" in refused.stdout
    assert "Its last lines:" in refused.stdout
    assert archive.stem in refused.stdout
    assert containers(stack) == before
    assert let_in(stack, stack.key)
    [log] = set(logs(stack).glob("*.log.gz")) - kept
    assert archive.stem in gzip.decompress(log.read_bytes()).decode()


def test_an_update_ends_well_whatever_it_finds(small: Stack) -> None:
    """Two replicas too many: one was stopped, the other ends again and again."""
    serving = containers(small)
    archive = small.store / "digits.mar"
    good = archive.read_bytes()
    restore(archive, good[:-1000])
    small.compose("up", "-d", "--no-recreate", "--no-deps", "--scale", "torchserve=4", "torchserve")
    before = containers(small)
    looping, stopped = sorted(set(before) - set(serving))
    wait_until(lambda: int(small.docker("inspect", "-f", "{{.RestartCount}}", looping)) > 0, 90)
    small.docker("stop", "-t", "1", stopped)
    restore(archive, good)
    succeed(small, "update")
    after = containers(small)
    assert len(after) == 2
    assert not set(after) & set(before)
    assert "2 of 2 ready" in succeed(small, "replicas")
    with small.client("grpc") as client:
        assert client.model_card("digits")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_update_that_is_stopped_leaves_what_was_there(small: Stack, number: signal.Signals) -> None:
    before = containers(small)
    command = ["python3", "-m", "deploy.commands", "update"]
    with subprocess.Popen(command, cwd=ROOT, env=small.environment, stdout=subprocess.PIPE, text=True) as update:
        wait_until(lambda: len(containers(small)) == 3, 60)
        second = small.make("update")
        update.send_signal(number)
        update.communicate(timeout=60)
    assert second.returncode != 0
    assert "another change of the replicas is under way" in second.stdout
    assert update.returncode == 130
    assert containers(small) == before


def test_the_only_replica_that_is_ready_is_not_restarted(small: Stack) -> None:
    one, other = names(small)
    small.docker("stop", "-t", "1", other)
    refused = small.make("restart", f"REPLICA={one}")
    assert refused.returncode != 0
    assert "is the only replica that is ready" in refused.stdout
    said = succeed(small, "replicas")
    assert "1 of 2 ready" in said
    assert re.search(rf"^{other} +exited +no .*docker logs --tail 50 {other}", said, re.M)
    small.compose("up", "-d", "--wait", "--no-recreate", *SERVICES)  # Brings back what is missing.
    assert "2 of 2 ready" in succeed(small, "replicas")


def restore(archive: Path, content: bytes) -> None:
    """Rename an archive into the store."""
    fresh = archive.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.chmod(0o644)
    fresh.rename(archive)
