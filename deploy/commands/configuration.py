"""Check the configuration: `make check-config`."""

from __future__ import annotations

from collections.abc import Callable

from deploy.commands import gateway
from deploy.commands.common import Refused, deployment, start_once
from deploy.commands.credentials import Vault, show_changes


def check(vault: Vault) -> None:
    """Have each program check its own files, and print the results.

    Raises:
        Refused: One of them rejects its files.
    """
    checks: dict[str, Callable[[], object]] = {
        "docker-compose.yml": deployment,
        "the gateway's files, keys and certificate": gateway.try_files,
        "Prometheus and its rules": _check_prometheus,
        "Alertmanager": _check_alertmanager,
    }
    bad = 0
    for what, look in checks.items():
        try:
            look()
            print(f"good  {what}")
        except Refused as error:
            bad += 1
            print(f"BAD   {what}: {error}")
            if look is deployment:
                break
    if bad:
        raise Refused("the configuration would be rejected")
    show_changes(vault)


def _check_prometheus() -> None:
    start_once("prometheus", "sh", ["/etc/prometheus/check.sh"])


def _check_alertmanager() -> None:
    if "alertmanager" in deployment()["services"]:
        start_once("alertmanager", "amtool", ["check-config", "/etc/alertmanager/alertmanager.yml"])
