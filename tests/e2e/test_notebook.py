"""docs/lessons.ipynb, run as a student would: a kernel of its own, the service, and the packages that it may need."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.server.harness import ROOT, Launched

PATH = ROOT / "docs/lessons.ipynb"
NEEDED = {"convscope", "convscope_lens", "matplotlib", "numpy", "PIL"}  # What the two packages install.


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(PATH, as_version=4)


@pytest.mark.timeout(900)
def test_every_cell_holds_what_it_says(
    server: Launched, notebook: nbformat.NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVSCOPE_URL", f"http://127.0.0.1:{server.port('REST')}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # Threads of a kernel beside other tests wait for each other.
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    where = {"metadata": {"path": str(PATH.parent)}}
    NotebookClient(notebook, timeout=300, startup_timeout=300, resources=where).execute()
    code = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    said = [output for outputs in code.values() for output in outputs if output.output_type == "stream"]
    assert [output.text for output in said if output.name == "stderr"] == []
    pictured = {
        name for name, outputs in code.items() if any("image/png" in output.get("data", {}) for output in outputs)
    }
    assert code.keys() - pictured == {"edits-add"}


def test_it_is_committed_without_outputs(notebook: nbformat.NotebookNode) -> None:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.id for cell in code if cell.outputs or cell.execution_count] == [], "clear all outputs before saving"
    assert nbformat.validator.isvalid(notebook)


def test_it_needs_no_more_than_the_client_and_the_lens(notebook: nbformat.NotebookNode) -> None:
    imported = set()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.Import):
                    imported |= {name.name.partition(".")[0] for name in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add((node.module or "").partition(".")[0])
    assert imported - sys.stdlib_module_names == NEEDED


def test_every_lesson_has_a_question_and_an_exercise(notebook: nbformat.NotebookNode) -> None:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    lessons = text.split("\n## ")[1:]
    assert len(lessons) == 10
    assert all("**Predict.**" in lesson and "**Exercise.**" in lesson for lesson in lessons)
