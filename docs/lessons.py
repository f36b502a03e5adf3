"""Run the commands of docs/lessons.md again, and put into it what they print and draw.

    python docs/lessons.py                  # against http://localhost:8080, with CIFAR-10's pictures in pictures/
    python docs/lessons.py --about deep     # only the commands in which this word stands

A block of `sh` or `python` that a block of `text` follows is run from the repository's root; trainings stand alone and
are not. The paragraphs around them quote figures too: read them again afterwards.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LESSONS, PICTURES, DRAWN = ROOT / "docs/lessons.md", ROOT / "docs/pictures/lessons", ROOT / "out/lessons"
DEFAULT = "http://localhost:8080"
PAIR = re.compile(r"```(sh|python)\n([^`]*)```\n\n```text\n([^`]*)```")


def printed(language: str, code: str, url: str) -> str:
    """Run a block, and return what it prints without the line that says where things were saved."""
    if language == "python":
        command = [sys.executable, "-c", code.replace(DEFAULT, url)]
    else:
        [line] = code.splitlines()
        command = ["bash", "-c", f"{line} --url {url}"]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return re.sub(r"\nsaved .*", "", done.stdout).rstrip() + "\n"


def main() -> int:
    """Run what the command line asks for."""
    options = argparse.ArgumentParser(prog="python docs/lessons.py", description=__doc__.partition("\n")[0])
    options.add_argument("--url", default=DEFAULT, help=f"where the models are served (default {DEFAULT})")
    options.add_argument("--about", default="", metavar="WORD", help="only commands with this word in them")
    chosen = options.parse_args()

    def again(pair: re.Match[str]) -> str:
        language, code, before = pair.groups()
        if chosen.about not in code:
            return pair.group()
        print(code, flush=True)
        return pair.group().replace(f"```text\n{before}", f"```text\n{printed(language, code, chosen.url)}")

    text = PAIR.sub(again, LESSONS.read_text("utf-8"))
    LESSONS.write_text(text, "utf-8")
    for name in re.findall(r"\(pictures/lessons/([\w-]+\.png)\)", text):
        if (DRAWN / name).exists():
            shutil.copy(DRAWN / name, PICTURES / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
