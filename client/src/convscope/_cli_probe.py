"""`convscope probe`: its options, and what it prints and saves."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convscope._cli_common import as_json, model, names, numbers
from convscope._table import printable

if TYPE_CHECKING:
    from convscope._client import Client

KINDS = {
    "shift": ("shifts", "how maps and predictions follow moved pictures; steps are pixels"),
    "rotate": ("angles", "how scores and maps change as pictures turn; steps are degrees"),
    "scale": ("factors", "how scores and maps change as pictures grow and shrink; steps are factors"),
    "border": (None, "what padding does near the border; has no steps"),
    "blur": ("radii", "what is left as pictures are blurred; steps are pixels"),
    "shuffle": ("blocks", "what is left as pictures are cut and their blocks change places; steps are pixels"),
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the command line's others, and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "probe",
        help="what a model does as pictures move, turn, grow, blur, break up, or meet their border",
        description="\n".join(f"{name}: {says}" for name, (_, says) in KINDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=KINDS, metavar="|".join(KINDS))
    parser.add_argument("pictures", nargs="+", metavar="PICTURE|FOLDER", help="PNG, JPEG, WebP or .npy files")
    parser.add_argument("--model", required=True, type=model)
    parser.add_argument("--layers", default="all", type=names, metavar="A,B|all", help="whose maps (default all)")
    parser.add_argument("--steps", type=numbers, metavar="A,B,...", help="how far to change the pictures")
    parser.add_argument("--limit", type=int, metavar="N", help="probe with N of the pictures, chosen at random")
    parser.add_argument("--seed", default=0, type=int, help="of all random choices (default 0)")
    parser.add_argument("--save", metavar="DIR", help="write <kind>-<model>.png and .json there")
    parser.set_defaults(run=run)
    return parser


def run(client: Client, options: argparse.Namespace) -> int:
    """Probe, print and save; return the exit status."""
    arguments: dict[str, Any] = {}
    steps, _ = KINDS[options.kind]
    if options.steps is not None:
        if steps is None:
            raise ValueError(f"probe {options.kind} has no steps")
        whole = options.kind in ("shift", "shuffle")
        if whole and any(step != int(step) for step in options.steps):
            raise ValueError(f"{steps} are whole pixels")
        arguments[steps] = [int(step) for step in options.steps] if whole else options.steps
    if options.limit is not None and options.limit < 1:
        raise ValueError("--limit must be at least 1")
    try:
        from convscope import probes

        if options.save is not None:
            import matplotlib  # noqa: F401  # What is missing is said before a long probe, not after it.
        found = getattr(probes, options.kind)(
            client,
            options.pictures,
            model=options.model,
            version=options.version,
            layers=options.layers,
            limit=options.limit,
            seed=options.seed,
            **arguments,
        )
    except ImportError as error:
        print(f"convscope: {error}; pip install 'convscope[figure]' brings it", file=sys.stderr)
        return 1
    text = as_json(found.to_dict())
    print(text if options.json else found.table())
    if options.save is not None:
        folder = Path(options.save)
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{found.name}-{Path(found.model).name}"
        (folder / f"{stem}.json").write_text(text + "\n", "utf-8")
        found.figure().savefig(folder / f"{stem}.png", dpi=110)
        if not options.json:
            print("\n" + printable(f"saved {folder / stem}.png and .json"))
    return 0
