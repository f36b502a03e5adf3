"""What an operator is told to type exists: alerts' first actions, make targets, services, settings, files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.runbook import ROOT, Section, find_commands, read_sections

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
ALERTS = ROOT / "deploy/prometheus/rules/alerts.yml"
SECTIONS = {section.alert: section for section in read_sections()}

# What an operator reads: the documents, and the alerts themselves.
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
PAGES |= {
    rule["alert"]: "\n".join(rule["annotations"].values())
    for group in yaml.safe_load(ALERTS.read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
}
BLOCKS = re.compile(r"^(?:make|docker) .*$", re.M)
WRITTEN = {command: page for page, text in PAGES.items() for command in (*find_commands(text), *BLOCKS.findall(text))}


def alerts() -> list[str]:
    return [
        rule["alert"]
        for group in yaml.safe_load(ALERTS.read_text())["groups"]
        for rule in group["rules"]
        if "alert" in rule
    ]


@pytest.mark.parametrize("alert", alerts())
def test_an_alert_has_a_first_action_that_is_a_command(alert: str) -> None:
    assert alert in SECTIONS, "docs/operations.md has no section of it"
    assert SECTIONS[alert].first, "after **First:** there is no command in backticks"


def test_a_command_that_is_written_somewhere_exists() -> None:
    for command, page in WRITTEN.items():
        try:
            check_line(command)
        except AssertionError as error:
            raise AssertionError(f"{page}: {command}: {error}") from error


def check_line(line: str) -> None:
    """Check the programs of a line of the shell."""
    for part in re.split(r"\s(?:\||&&)\s", re.sub(r"\s+#.*", "", line)):
        check(shlex.split(part))


def check(words: list[str]) -> None:
    """Check one program and its arguments as far as a file of ours decides whether they are right."""
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[:1] == ["make"]:
        for word in words[1:]:
            name, _, value = word.partition("=")
            known = rf"^{name}[ :?]*=|\$\({name}\)" if value or "=" in word else rf"^{name}:"
            known = rf"{known}|^export .*\b{name}\b" if "=" in word else known
            assert re.search(known, MAKEFILE, re.M), f"Makefile knows no {word}"
    if words[:2] == ["docker", "compose"]:
        check_compose(words[2:])
    if words and words[0].startswith("deploy/"):
        assert (ROOT / words[0]).exists()
    if words and words[0].startswith("python") and words[1:] and words[1].endswith(".py"):
        assert (ROOT / words[1]).exists()


def check_compose(words: list[str]) -> None:
    """Check a `docker compose` command."""
    assert "--scale" not in words, "the number of replicas is a setting, or the next `up` takes the others away"
    assert "--index" not in words, "an update counts on: which numbers there are, `make replicas` says"
    while words and words[0].startswith("-"):
        if words[0] == "-f":
            assert (ROOT / words[1]).exists()
        words = words[2:] if words[0] in ("-f", "--profile") else words[1:]
    action, *rest = words
    assert not (action == "restart" and "torchserve" in rest), "it restarts all replicas at once"
    if action in ("logs", "exec", "top", "ps", "restart", "stop", "start", "kill"):
        named = [word for word in rest if re.fullmatch(r"[a-z]+", word) and word in COMPOSE["services"]]
        others = [word for word in rest if re.fullmatch(r"[a-z]+", word)]
        assert named or action == "ps" or not others, f"no service of docker-compose.yml among {others}"


@pytest.mark.parametrize("page", [*alerts(), "operations.md"])
def test_nothing_in_a_runbook_replaces_or_restarts_all_replicas(page: str) -> None:
    for command in find_commands(PAGES[page]):
        words = command.split()
        assert words[:2] != ["docker", "restart"], "`make restart` looks whether another replica is ready"
        if words[:4] == ["docker", "compose", "up", "-d"]:
            one = words[-1] in COMPOSE["services"] and words[-1] != "torchserve"
            assert one or "--no-recreate" in words, "after a change of a setting it replaces all replicas at once"


def test_a_first_action_is_read_off_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n## Alerts\n\n### One\nPage. `make keys`. **First:** `make replicas`. A panel: `Requests`.\n"
        "Then `docker compose\nps`.\n"
        "\n### Two\nTicket. **First:** look around. Then `make keys`.\n\n## Sizing\n### Three\n"
    )
    assert read_sections(page) == [
        Section("One", ("make replicas", "docker compose ps"), ("make keys", "make replicas", "docker compose ps")),
        Section("Two", (), ("make keys",)),
    ]


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "make key NOBODY=alice",
        "docker compose up -d --scale torchserve=3",
        "docker compose exec --index 1 torchserve true",
        "docker compose restart torchserve",
        "docker compose logs --tail 50 nobody",
        "deploy/nothing.sh",
    ],
)
def test_a_command_that_does_not_exist_is_found(command: str) -> None:
    with pytest.raises(AssertionError):
        check(shlex.split(command))


def test_the_example_of_settings_has_each_with_its_default() -> None:
    example = dict(re.findall(r"^# (CONVSCOPE_\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.M))
    settings = dict(re.findall(r"\$\{(CONVSCOPE_\w+):-([^}]*)\}", (ROOT / "docker-compose.yml").read_text()))
    # Without a file of keys Compose has to mount something in its place; to name that would ask for signatures.
    settings["CONVSCOPE_SIGNERS"] = ""
    assert {name: example.get(name) for name in settings} == settings
    assert "/.env" in (ROOT / ".gitignore").read_text().splitlines()
