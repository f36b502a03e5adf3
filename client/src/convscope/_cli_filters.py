"""`convscope filters`: its options, and what it prints and saves."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convscope._cli_common import as_json, model
from convscope._table import printable

if TYPE_CHECKING:
    from convscope._client import Client


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command to the command line's others, and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "filters", help="a convolution's kernels, and what they answer to in frequency"
    )
    parser.add_argument("model", type=model)
    parser.add_argument("--layer", metavar="NAME", help="whose kernels (default: the model's first layer)")
    parser.add_argument("--save", metavar="DIR", help="write <model>-<layer>-kernels.png and -spectra.png there")
    parser.set_defaults(run=run)
    return parser


def run(client: Client, options: argparse.Namespace) -> int:
    """Fetch the kernels, print and save; return the exit status."""
    from convscope._filters import peaks, peaks_text

    layer = options.layer or client.model_card(options.model, options.version).layers[0].name
    kernels = client.filters(options.model, layer, options.version, request_id=options.request_id)
    found = peaks(kernels)
    if options.json:
        values = {"model": options.model, "layer": layer, "shape": list(kernels.shape), "kernels": kernels.tolist()}
        print(as_json(values | {"peaks": [peak.to_dict() for peak in found]}, indent=None))
    else:
        print(peaks_text(found, f"{options.model}, {layer}: {'×'.join(map(str, kernels.shape))} kernels"))
    if options.save is None:
        return 0
    try:
        from convscope._filters_figure import draw_kernels, draw_spectra
    except ImportError:
        print("convscope: figures are drawn with matplotlib: pip install 'convscope[figure]'", file=sys.stderr)
        return 1
    folder = Path(options.save)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{Path(options.model).name}-{Path(layer).name}"
    title = f"{options.model}, {layer}"
    draw_kernels(kernels, title=title).savefig(folder / f"{stem}-kernels.png", dpi=110)
    draw_spectra(kernels, title=title).savefig(folder / f"{stem}-spectra.png", dpi=110)
    if not options.json:
        print("\n" + printable(f"saved {folder / stem}-kernels.png and -spectra.png"))
    return 0
