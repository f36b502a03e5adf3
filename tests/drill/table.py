"""The drill's table: written row by row to out/drill/drill.md, and from there into docs/operations.md.

python -m tests.drill.table     # puts the last drill's table between the two markers of docs/operations.md
"""

from __future__ import annotations

import math

from tests.docker.stack import ROOT
from tests.drill.play import OPERATIONS, Outcome

TABLE = ROOT / "out/drill/drill.md"
BEGIN, END = "<!-- drill: begin -->\n", "<!-- drill: end -->\n"
HEAD = (
    "| incident | before the drill | pages: notified after s (limit) | tickets | requests lost of sent "
    "| longest wait s | first action | whole again s | resolved s | verdict |\n"
    "|---|---|---|---|---|---|---|---|---|---|\n"
)


def start() -> None:
    """Begin an empty table."""
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(HEAD)


def add(outcome: Outcome) -> str:
    """Append an incident's row; return it."""
    incident = outcome.incident
    actions = [f"`{command}` {_verdict(outcome, command, status)}" for command, status in outcome.actions.items()]
    cells = (
        incident.what,
        incident.before or "–",
        _alerts(outcome, "page"),
        _alerts(outcome, "ticket"),
        f"{outcome.lost} of {outcome.sent}",
        f"{outcome.wait_s:.1f}",
        "; ".join(actions) or "–",
        "never" if outcome.whole_s is None else f"{outcome.whole_s:.0f}",
        "–" if outcome.resolved_s is None else f"{outcome.resolved_s:.0f}",
        "; ".join(outcome.faults) or "as it must be",
    )
    escaped = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
    row = f"| {' | '.join(escaped)} |\n"
    with TABLE.open("a") as file:
        file.write(row)
    return row


def _verdict(outcome: Outcome, command: str, status: int) -> str:
    if status == 0:
        return "works"
    is_fault = any(f"`{command}`" in fault for fault in outcome.faults)
    return f"fails ({status})" if is_fault else f"says what is wrong (status {status})"


def _alerts(outcome: Outcome, severity: str) -> str:
    words = []
    for name in sorted(outcome.rang, key=lambda name: outcome.notified.get(name, math.inf)):
        if outcome.severities[name] == severity:
            limit_s = outcome.incident.expected.get(name)
            limit = "" if limit_s is None else f" ({limit_s:.0f})"
            unsent = "silenced" if outcome.rang[name] else "before"
            words.append(
                f"{name} {outcome.notified[name]:.0f}{limit}" if name in outcome.notified else f"{name} {unsent}"
            )
    return ", ".join(words) or "none"


def main() -> None:
    """Put the table into docs/operations.md."""
    text = OPERATIONS.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    OPERATIONS.write_text(before + BEGIN + TABLE.read_text() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
