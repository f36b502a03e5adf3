"""docs/operations.md as data: the commands of each alert's section, and those of its first action."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/operations.md"

_PROGRAMS = re.compile(r"(make|docker|curl|openssl|nvidia-smi|python3?|deploy/\S+\.sh)(\s|$)")


@dataclass(frozen=True)
class Section:
    """What the page says of one alert.

    Attributes:
        alert: Its name.
        first: The commands of its first action, in order; none if its first sentence has none.
        commands: All commands of the section.
    """

    alert: str
    first: tuple[str, ...]
    commands: tuple[str, ...]


def read_sections(page: Path = PAGE) -> list[Section]:
    """Read the sections of all alerts."""
    _, _, alerts = page.read_text(encoding="utf-8").partition("\n## Alerts\n")
    alerts = re.split(r"^## ", alerts, maxsplit=1, flags=re.M)[0]
    sections = []
    for part in re.split(r"^### ", alerts, flags=re.M)[1:]:
        name, _, text = part.partition("\n")
        action = text.partition("**First:**")[2]
        first = find_commands(action)
        if first and re.search(r"[.:]\s", " ".join(action.split()).partition(f"`{first[0]}`")[0]):
            first = ()
        sections.append(Section(name.strip(), first, find_commands(text)))
    return sections


def find_commands(text: str) -> tuple[str, ...]:
    """Return what stands in backticks and is a command, of which a name of a panel or a file is none."""
    quoted = re.findall(r"`([^`]+)`", text)
    return tuple(" ".join(one.split()) for one in quoted if _PROGRAMS.match(one))
