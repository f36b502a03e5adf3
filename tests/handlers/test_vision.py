"""A worker starts without torch's compiler, which stays importable for whoever wants it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MODULE = "handlers.torchserve.torchvision_import"
ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    ).stdout.strip()


def test_what_a_worker_imports_does_not_import_the_compiler() -> None:
    assert run("import sys, handlers.entry; print('torchvision' in sys.modules, 'torch._dynamo' in sys.modules)") == (
        "True False"
    )


def test_the_compiler_can_be_imported_afterwards() -> None:
    code = f"import {MODULE}, torch._dynamo.utils as utils; print(utils.__file__ is not None)"
    assert run(code) == "True"


def test_it_is_left_alone_where_it_is_there_already() -> None:
    code = f"import torch._dynamo as before, {MODULE}, sys; print(sys.modules['torch._dynamo'] is before)"
    assert run(code) == "True"
