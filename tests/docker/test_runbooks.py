"""The commands of docs/operations.md that change nothing are typed, as they are written, while the stack runs."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.docker.stack import ROOT, Stack
from tests.runbook import read_sections

HARMLESS = re.compile(
    r"make (replicas|keys|check-config)$"
    r"|docker logs "
    r"|docker compose (ps|logs|top) "
    r"|docker compose exec -T prometheus promtool (query|check) "
    r"|docker compose up -d --no-recreate$"
)
COMMANDS = list(dict.fromkeys(one for section in read_sections() for one in section.commands if HARMLESS.match(one)))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_runbooks_works_as_written(stack: Stack, command: str) -> None:
    replica = stack.docker("inspect", "-f", "{{.Name}}", stack.replicas()[0]).strip().lstrip("/")
    before = stack.replicas()
    typed = re.sub(r"\bNAME\b", replica, command)
    ended = subprocess.run(
        ["bash", "-c", typed],
        cwd=ROOT,
        env=stack.environment,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert stack.replicas() == before


def test_most_first_actions_are_among_them() -> None:
    """What is left out changes something, and is tested against the incident that it is for."""
    first = [section.first[0] for section in read_sections() if section.first]
    others = [one for one in first if not HARMLESS.match(one)]
    assert all(one.startswith(("make ", "docker compose ", "nvidia-smi")) for one in others), others
    assert len(first) - len(others) > len(others)
