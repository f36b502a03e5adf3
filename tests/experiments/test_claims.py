"""The table of claims: every verdict is computed, and the pages are what the commands write."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from experiments import claims
from experiments.__main__ import CLAIMS, EXPERIMENTS, FOUND, PAGE, ROOT, main, page

SECTIONS = {
    found[1]: found[2]
    for found in re.finditer(r"^## (\w+)$(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
}


def test_every_verdict_is_what_the_evidence_gives() -> None:
    assert claims.check(ROOT) == []


def test_a_wrong_verdict_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = (claim for claim in claims.CLAIMS if claim.verdict == claims.HOLDS)
    monkeypatch.setattr(claims, "CLAIMS", (replace(first, verdict=claims.FAILS), *others[:2]))
    assert main(["claims"]) == 1
    assert capsys.readouterr().err == f"1. {first.text}: 'does not hold' is stated, the evidence says 'holds'\n"


def test_the_page_of_claims_is_what_the_command_writes() -> None:
    assert CLAIMS.read_text("utf-8") == claims.page()


def test_what_is_not_tested_says_why() -> None:
    assert len(claims.CLAIMS) == 70
    for claim in claims.CLAIMS:
        assert (claim.parts is None) == (claim.verdict == claims.UNTESTED)
        assert claim.note or claim.verdict == claims.HOLDS, claim.text
        assert bool(claim.shown) == (claim.parts is not None)


def test_claims_link_to_sections_that_exist() -> None:
    linked = {name for claim in claims.CLAIMS for name in re.findall(r"experiments\.md#(\w+)", claim.shown)}
    assert linked <= set(SECTIONS)


def test_the_tables_are_of_what_was_found() -> None:
    text = PAGE.read_text("utf-8")
    assert page(text, FOUND) == text


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_told_from_the_question_to_the_exercise(name: str) -> None:
    section = SECTIONS[name]
    for word in ("**Predict.**", "**Control.**", f"python -m experiments {name}", "**Shows.**", "**Exercise.**"):
        assert word in section, f"{name} lacks {word}"
    assert f"<!-- table: {name} -->" in section
    assert not json.loads((FOUND / f"{name}.json").read_text("utf-8"))["small"]
    drawn: Path = FOUND / f"{name}.png"
    assert drawn.exists() == (f"(experiments/{name}.png)" in section)
    if drawn.exists():
        assert drawn.stat().st_size < 200_000
        with Image.open(drawn) as picture:
            assert picture.size[0] > 300
