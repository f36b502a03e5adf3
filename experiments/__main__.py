"""Run experiments, and keep what they find.

    python -m experiments reach                    # one, or several, or all
    python -m experiments all --pictures pictures
    python -m experiments page                     # put what was found into docs/experiments.md
    python -m experiments claims                   # check the claims, and write docs/claims.md

An experiment writes NAME.json and, if it draws, NAME.png into --out. All are seeded and use one thread. `--small` runs
everything in seconds, to see that it works: give it an --out of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch
from convscope import ConvscopeError
from PIL import Image

from experiments import claims
from experiments.experiment import Setting
from training import machine

EXPERIMENTS = (
    *(
        "edge",
        "corners",
        "stages",
        "spelling",
        "relu",
        "epochs",
        "traces",
        "norm",
        "sharing",
        "pooling",
        "reach",
        "attention",
    ),
    *("turning", "augmentation", "transfer", "combining", "atlas", "cause"),
)
ROOT = Path(__file__).parents[1]
PAGE, CLAIMS = ROOT / "docs/experiments.md", ROOT / "docs/claims.md"
FOUND = ROOT / "docs/experiments"
MARKED = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit status: 0 done, 1 a verdict differs from the evidence, 2 not possible."""
    options = argparse.ArgumentParser(
        prog="python -m experiments", description="Run experiments, and keep their figures."
    )
    options.add_argument(
        "names",
        nargs="+",
        choices=[*EXPERIMENTS, "all", "page", "claims"],
        metavar="NAME",
        help=f"{', '.join(EXPERIMENTS)}; all of them; page and claims write docs/experiments.md and docs/claims.md",
    )
    options.add_argument(
        "--pictures", type=Path, default=Path("pictures"), help="folder of CIFAR-10 (default: pictures)"
    )
    options.add_argument(
        "--url", default="", help="a running server to ask; by default archives are served in this process"
    )
    options.add_argument("--out", type=Path, default=FOUND, help="where to write (default: docs/experiments)")
    options.add_argument("--small", action="store_true", help="as small as possible: shows that it works")
    chosen = options.parse_args(arguments)
    if "all" in chosen.names and len(chosen.names) > 1:
        options.error("all stands alone: page and claims come after it")
    if chosen.small and chosen.out.resolve() == FOUND:
        options.error("--small needs an --out of its own: the pages' figures are in docs/experiments")
    torch.set_num_threads(1)
    setting = Setting(chosen.pictures, ROOT / "model_store", chosen.url, chosen.small)
    for name in EXPERIMENTS if "all" in chosen.names else chosen.names:
        if name == "page":
            PAGE.write_text(page(PAGE.read_text("utf-8"), FOUND), "utf-8")
        elif name == "claims":
            if wrong := claims.check(ROOT):
                print("\n".join(wrong), file=sys.stderr)
                return 1
            CLAIMS.write_text(claims.page(), "utf-8")
        else:
            try:
                conduct(name, setting, chosen.out)
            except (ConvscopeError, OSError) as err:
                print(f"experiments: {err}", file=sys.stderr)
                return 2
    return 0


def conduct(name: str, setting: Setting, out: Path) -> None:
    """Run an experiment, write what it finds, and print its tables."""
    experiment = import_module(f"experiments.{name}")
    out.mkdir(parents=True, exist_ok=True)
    began = _processor_seconds()
    result = experiment.run(setting)
    kept = {
        "experiment": name,
        "small": setting.small,
        "machine": machine.describe(torch.device("cpu")),
        "processor_seconds": round(_processor_seconds() - began, 1),
        "figures": result.figures,
    }
    (out / f"{name}.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if result.picture is not None:
        drawn = io.BytesIO()
        result.picture.savefig(drawn, dpi=110)
        # 128 colours: a third of the bytes, and the eye sees no difference.
        Image.open(drawn).convert("RGB").quantize(128).save(out / f"{name}.png", optimize=True)
    print(f"{name}: {kept['processor_seconds']} s\n\n{experiment.table(result.figures)}\n", flush=True)


def _processor_seconds() -> float:
    """Return the processor time of this process and its children; the machine's other work does not count."""
    return sum(os.times()[:4])


def page(text: str, found: Path) -> str:
    """Return the page with the tables of what was found, between `<!-- table: NAME -->` and `<!-- end -->`."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        figures = json.loads((found / f"{name}.json").read_text("utf-8"))["figures"]
        made = import_module(f"experiments.{name}").table(figures)
        return f"<!-- table: {name} -->\n\n{made}\n\n<!-- end -->"

    return MARKED.sub(table, text)


if __name__ == "__main__":
    sys.exit(main())
