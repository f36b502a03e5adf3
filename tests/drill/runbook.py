"""The runbooks of docs/operations.md: the first action of each alert, as it is written there."""

from __future__ import annotations

import re

from tests.docker.stack import ROOT

OPERATIONS = ROOT / "docs/operations.md"
COMMANDS = ("docker ", "make ", "deploy/")


def first_action(alert: str) -> str | None:
    """Return the command in backticks after **First:** in an alert's section; None if something else stands there."""
    section = re.search(rf"^### {alert}\n(.*?)(?=^##|\Z)", OPERATIONS.read_text(encoding="utf-8"), re.M | re.S)
    assert section, f"docs/operations.md has no section {alert}"
    action = re.search(r"\*\*First:\*\*\s+`([^`]+)`", section[1])
    if action is None or not action[1].startswith(COMMANDS):
        return None
    return " ".join(action[1].split())
