"""The gateway: a temporary one that checks files before they are put in place, and the one that serves."""

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

RELOADED_S = 15.0  # Envoy reads a file within a second of its renaming.

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
    """Start Envoy for a moment as the gateway would be started, and check that it accepts every file.

    Its `--mode validate` reads neither what `dynamic_resources` names nor keys and certificates. So it starts for real,
    in a container without a network.

    Args:
        mounts: Folders to use instead of the gateway's own, by their path in the container.
        part: The one part to check (a key of PLACES), or all. A bad keys.yaml must not prevent a good certificate.

    Raises:
        Refused: Envoy rejects a file; the message quotes Envoy's log.
    """
    arguments = [str(word).replace("$$", "$") for word in deployment()["services"]["gateway"]["command"]]
    # A field that Envoy does not know is an error, not a line in the log.
    arguments += [one for one in ("--reject-unknown-dynamic-fields",) if one not in arguments]
    said = start_once("gateway", "bash", ["-c", TRIAL, "trial", *arguments], mounts)
    problems = judge(said, part)
    if problems:
        raise Refused("the gateway would reject this:\n" + "\n".join(f"  {line}" for line in problems))


def judge(said: str, part: str = "") -> list[str]:
    """Return the problems in the output of TRIAL; none if all files, or the one part asked about, were accepted."""
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
            problems.append(f"{PLACES.get(one, one)} is rejected")
        elif one == part:
            return []
    if counts.get("listener_manager.total_listeners_warming") or "public::" not in statistics:
        problems.append("the listener for callers does not start")
    return problems + why if problems else []


def _plain(line: str) -> str:
    """Return the message of a line of Envoy's log if it is a warning or an error, else an empty string."""
    if "work-in-progress" in line or not re.search(r"warn|error|critical", line):
        return ""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(line)["message"])
    return re.sub(r"^(\[[^]]*\]\s*)+", "", line).strip()


def running() -> bool:
    """Return whether the gateway runs here."""
    return has_docker() and bool(container_ids(run("docker", "compose", "ps", "-q", "--status", "running", "gateway")))


def ask_admin(path: str) -> str:
    """Return the response of the running gateway's admin interface, which listens inside its container only."""
    request = f"GET {path} HTTP/1.1\\r\\nHost: gateway\\r\\nConnection: close\\r\\n\\r\\n"
    script = f"exec 3<>/dev/tcp/127.0.0.1/9901 && printf '{request}' >&3 && cat <&3"
    return run("docker", "compose", "exec", "-T", "gateway", "bash", "-c", script, check=False)


def statistic(name: str) -> int | None:
    """Return one of the running gateway's counters; None if it cannot be read."""
    found = re.search(rf"^{re.escape(name)}: (\d+)\s*$", ask_admin(f"/stats?filter=^{name}$"), re.M)
    return int(found[1]) if found else None


def address() -> tuple[str, int]:
    """Return the host and port at which this machine reaches the gateway."""
    [port] = deployment()["services"]["gateway"]["ports"]
    host = port.get("host_ip") or "127.0.0.1"
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), int(port["published"])  # noqa: S104


def secured() -> bool:
    """Return whether the gateway speaks TLS."""
    return setting("CONVSCOPE_DOOR", "tls") == "tls"


def served_fingerprint() -> str | None:
    """Return the SHA-256 of the certificate that the gateway serves now; None if there is none."""
    try:
        with socket.create_connection(address(), 3) as plain, _trusting().wrap_socket(plain) as connection:
            return hashlib.sha256(connection.getpeercert(binary_form=True) or b"").hexdigest()
    except OSError:
        return None


def answers_to(key: str) -> int | None:
    """Return the status of a request with a key, 401 if the gateway does not know it; None without a response.

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
    """Return a context that accepts any certificate: the question is which one the gateway serves."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def wait_until(condition: Callable[[], bool], timeout_s: float = RELOADED_S) -> bool:
    """Return whether a condition becomes true in time."""
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def complaints(seconds: int = 60) -> str:
    """Return the gateway's latest warnings and errors, without its access log."""
    lines = run(
        "docker", "compose", "logs", "--no-log-prefix", "--since", f"{seconds}s", "gateway", check=False
    ).splitlines()
    own = [line for line in map(_plain, lines) if line and '"request_id"' not in line]
    return (
        "\n".join(f"  {line}" for line in own[-5:]) or "  (it logged nothing; `docker compose logs --tail 50 gateway`)"
    )
