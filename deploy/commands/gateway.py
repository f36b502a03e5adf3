"""Asking the gateway: one that is started for a moment on files that are to be taken in, and the one that serves."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from deploy.commands.common import Refused, container_ids, deployment, has_docker, run, setting, start_once

TAKEN_IN_S = 15.0  # Envoy reads a file within a second of its renaming.

# Starts Envoy with the service's own arguments, waits until it has decided about each file, and prints its statistics
# after a line of its own. The image has no HTTP client but a shell.
TRIAL = r"""
arguments=("$@")
if [[ -r /etc/envoy/tracing.sh ]]; then
  source /etc/envoy/tracing.sh
  [[ -z $(untraceable) ]] || { echo "critical: $(untraceable)"; exit 0; }
  trace "$@"
fi
envoy "${arguments[@]}" 2>&1 &
ask() {
  exec 3<>/dev/tcp/127.0.0.1/9901 || return
  printf 'GET %s HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n' "$1" >&3; cat <&3; exec 3>&-
}
for ((round = 0; round < 300; round++)); do
  sleep 0.2
  kill -0 $! 2>/dev/null || exit 0
  ask /ready 2>/dev/null | grep -q LIVE || continue
  ((live++ < 4)) || ! ask /stats | grep -q 'listeners_warming: [1-9]' && ((live > 4)) && break
  ((live < 25)) || break
done
echo '=== statistics'
ask '/stats?filter=(update_(attempt|success|rejected|failure)|listeners_(active|warming)|key_rotation_failed)$'
ask /listeners
kill $!
"""
PLACES = {  # What an operator edits, by the part of Envoy that reads it.
    "cluster_manager.cds": "clusters.yaml",
    "listener_manager.lds": "the listener's file (tls.yaml or plain.yaml)",
    "extension_config_discovery.network_filter.http": "http.yaml",
    "extension_config_discovery.http_filter.api_keys": "keys.yaml",
    "extension_config_discovery.http_filter.key_limits": "limits.yaml",
    "sds.certificate": "the certificate (tls.crt, tls.key)",
}


def try_files(mounts: Mapping[str, Path] | None = None, part: str = "") -> None:
    """Start Envoy for a moment as the gateway would be started, and see whether it takes every file.

    Its `--mode validate` reads neither what `dynamic_resources` names nor keys and certificates. So it starts for real,
    in a container without a network.

    Args:
        mounts: Folders to use instead of the gateway's own, by where they lie in the container.
        part: The one part that matters (a key of PLACES), or all. A bad keys.yaml must not keep a good certificate out.

    Raises:
        Refused: Envoy does not take a file; with its own words.
    """
    arguments = [str(word).replace("$$", "$") for word in deployment()["services"]["gateway"]["command"]]
    # A field that Envoy does not know is an error, not a line in the log.
    arguments += [one for one in ("--reject-unknown-dynamic-fields",) if one not in arguments]
    said = start_once("gateway", "bash", ["-c", TRIAL, "trial", *arguments], mounts)
    problems = judge(said, part)
    if problems:
        raise Refused("the gateway would not take this in:\n" + "\n".join(f"  {line}" for line in problems))


def judge(said: str, part: str = "") -> list[str]:
    """Return what is wrong by a trial's output; nothing if all is well, or the one part that was asked about."""
    log, _, statistics = said.partition("=== statistics")
    why = list(dict.fromkeys(line for line in map(_plain, log.splitlines()) if line))[-8:]
    if not statistics:
        return ["Envoy did not start", *why]
    counts = {name: int(value) for name, value in re.findall(r"^([\w.]+): (\d+)\s*$", statistics, re.M)}
    problems = []
    for attempt in counts:
        one, _, kind = attempt.rpartition(".")
        if kind != "update_attempt" or one.startswith("cluster."):  # Names that are looked up, which a trial cannot.
            continue
        bad = counts.get(f"{one}.update_rejected", 0) + counts.get(f"{one}.update_failure", 0)
        if bad or not counts.get(f"{one}.update_success"):
            problems.append(f"{PLACES.get(one, one)} is not taken")
        elif one == part:
            return []
    if counts.get("listener_manager.total_listeners_warming") or "public::" not in statistics:
        problems.append("the door for callers does not open")
    return problems + why if problems else []


def _plain(line: str) -> str:
    """Return what a line of Envoy's log complains of; nothing if it does not."""
    if "work-in-progress" in line or not re.search(r"warn|error|critical", line):
        return ""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(line)["message"])
    return re.sub(r"^(\[[^]]*\]\s*)+", "", line).strip()


def running() -> bool:
    """Return whether the gateway runs here."""
    return has_docker() and bool(container_ids(run("docker", "compose", "ps", "-q", "--status", "running", "gateway")))


def ask_admin(path: str) -> str:
    """Ask the running gateway's admin interface, which listens inside its container only; return what it answers."""
    request = f"GET {path} HTTP/1.1\\r\\nHost: gateway\\r\\nConnection: close\\r\\n\\r\\n"
    script = f"exec 3<>/dev/tcp/127.0.0.1/9901 && printf '{request}' >&3 && cat <&3"
    return run("docker", "compose", "exec", "-T", "gateway", "bash", "-c", script, check=False)


def statistic(name: str) -> int | None:
    """Return one of the running gateway's counters; None if it does not say."""
    found = re.search(rf"^{re.escape(name)}: (\d+)\s*$", ask_admin(f"/stats?filter=^{name}$"), re.M)
    return int(found[1]) if found else None


def address() -> tuple[str, int]:
    """Return where it listens, as seen from this machine."""
    [port] = deployment()["services"]["gateway"]["ports"]
    host = port.get("host_ip") or "127.0.0.1"
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), int(port["published"])  # noqa: S104


def secured() -> bool:
    """Return whether the gateway speaks TLS."""
    return setting("CONVSCOPE_DOOR", "tls") == "tls"


def served_fingerprint() -> str | None:
    """Return the SHA-256 of the certificate that callers are shown now; None if there is none."""
    try:
        with socket.create_connection(address(), 3) as plain, _trusting().wrap_socket(plain) as connection:
            return hashlib.sha256(connection.getpeercert(binary_form=True) or b"").hexdigest()
    except OSError:
        return None


def answers_to(key: str) -> int | None:
    """Return the status that a request with a key gets, 401 if the gateway does not know it; None if none comes.

    It asks for a path that is not served: the gateway answers 404 by itself, after it has looked at the key.
    """
    host, port = address()
    if secured():
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(host, port, timeout=3, context=_trusting())
    else:
        connection = http.client.HTTPConnection(host, port, timeout=3)
    try:
        connection.request("GET", "/", headers={"x-api-key": key})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _trusting() -> ssl.SSLContext:
    """Return a context that takes any certificate: what is asked is which one the gateway shows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def wait_until(condition: Callable[[], bool], timeout_s: float = TAKEN_IN_S) -> bool:
    """Return whether a condition comes to hold."""
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def complaints(seconds: int = 60) -> str:
    """Return the latest lines in which the gateway itself, not its access log, says what is wrong."""
    lines = run(
        "docker", "compose", "logs", "--no-log-prefix", "--since", f"{seconds}s", "gateway", check=False
    ).splitlines()
    own = [line for line in map(_plain, lines) if line and '"request_id"' not in line]
    return (
        "\n".join(f"  {line}" for line in own[-5:]) or "  (it logged nothing; `docker compose logs --tail 50 gateway`)"
    )
