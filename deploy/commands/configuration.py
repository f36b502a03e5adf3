"""Whether the configuration would be taken in: `make check-config`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from deploy.commands import gateway
from deploy.commands.common import ROOT, Refused, deployment, start_once
from deploy.commands.credentials import Vault, show_changes

RULES = ROOT / "deploy/prometheus/rules"
# A recorded series has a colon in its name, which nothing else in a rule's file has between two words.
RECORDED = re.compile(r"(?<![\w:./$-])[a-zA-Z_]\w*(?::[a-zA-Z_]\w*)+(?![\w:/])")


def check(vault: Vault) -> None:
    """Have each program judge its own files, and say what it says.

    Raises:
        Refused: One of them would not take its files.
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
        raise Refused("the configuration would not be taken in as it is")
    show_changes(vault)


def _check_prometheus() -> None:
    start_once("prometheus", "promtool", ["check", "config", _option("prometheus", "--config.file=")])
    unknown = find_unrecorded(path.read_text() for path in sorted(RULES.glob("*.yml")))
    if unknown:
        raise Refused("rules use series that no rule records: " + ", ".join(unknown))


def _check_alertmanager() -> None:
    if "alertmanager" in deployment()["services"]:
        start_once("alertmanager", "amtool", ["check-config", _option("alertmanager", "--config.file=")])


def _option(service: str, name: str) -> str:
    command = deployment()["services"][service].get("command") or []
    default = f"/etc/{service}/{service}.yml"
    return next((str(word)[len(name) :] for word in command if str(word).startswith(name)), default)


def find_unrecorded(texts: Iterable[str]) -> list[str]:
    """Return the recorded series that rules use and no rule records: promtool lets a misspelt name pass.

    Args:
        texts: The files of rules.
    """
    lines = [line for text in texts for line in text.splitlines() if not line.lstrip().startswith("#")]
    recorded = {name for line in lines for name in re.findall(r"\brecord:\s*[\"']?([\w:]+)", line)}
    used = {name for line in lines for name in RECORDED.findall(line)}
    return sorted(used - recorded)
