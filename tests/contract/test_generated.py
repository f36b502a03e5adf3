"""The committed generated code is what proto/ makes today."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_generated_code_and_golden_files_are_fresh() -> None:
    command = [ROOT / ".venv-proto/bin/python", ROOT / "proto/generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
