"""The table of networks: its rows as JSON, and as Markdown between two markers of a document."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine

BEGIN, END = "<!-- benchmarks.networks: begin -->", "<!-- benchmarks.networks: end -->"
_PACKAGES = ("torch", "torchvision", "timm", "onnxruntime", "pillow")


def write_table(rows: Mapping[str, Mapping[str, Any]], results: Path, document: Path) -> None:
    """Write the rows to `results`, and the table of them into `document`.

    Args:
        rows: Rows by name of the network.
        results: A JSON file.
        document: Markdown that holds both markers.
    """
    about = machine.circumstances() | {"date": time.strftime("%Y-%m-%d")}
    results.write_text(json.dumps({"circumstances": about, "rows": rows}, indent=1) + "\n")
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise ValueError(f"{document.name} lacks a marker, {BEGIN} or {END}")
    document.write_text(f"{before}{BEGIN}\n{markdown(rows, about)}\n{END}{after}", encoding="utf-8")


def markdown(rows: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """Lay out the rows: a summary, the table, and the networks that were rejected."""
    served = [row for row in rows.values() if row["verdict"] == "served"]
    faults = [name for name, row in rows.items() if row["fault"]]
    lines = [
        f"{about['date']}, {about['machine']}; "
        + ", ".join(f"{name} {about['versions'][name]}" for name in _PACKAGES if name in about["versions"])
        + f". {len(rows)} networks: {len(served)} archived and served as they compute, "
        f"{sum(bool(row['refusal']) for row in rows.values())} rejected as they should be, "
        f"{len(faults)} at fault{': ' + ', '.join(faults) if faults else ''}.",
        "",
        "| network | archiving, s | weights, MB | archive, MB | input | maps | engine | pixels off, levels | "
        "scores off | maps off | scores off, same pixels | maps off, same pixels | same top 5 |",
        "|---|" + "---|" * 12,
    ]
    lines += [f"| {' | '.join(_cells(name, row))} |" for name, row in rows.items() if row.get("archived")]
    apart = {name: row["verdict"] for name, row in rows.items() if row["fault"] or row["refusal"]}
    if apart:
        lines += ["", "| network | what happened |", "|---|---|"]
        lines += [f"| `{name}` | {verdict.replace('|', '/')} |" for name, verdict in apart.items()]
    return "\n".join(lines)


def _cells(name: str, row: Mapping[str, Any]) -> Iterator[str]:
    yield f"`{name}`"
    yield f"{row['seconds']:.0f}"
    yield f"{row['weights_mb']:.1f}"
    yield f"{row['archive_mb']:.1f}"
    yield _input(row["preprocessing"])
    yield _layouts(row.get("layouts", {}))
    yield str(row.get("engine", "–")).partition("-")[0]
    yield _share(row.get("pixels"), "{:.2f}")
    for way in ("own", "same"):
        yield _share(row.get(f"{way}_scores"))
        yield _share(row.get(f"{way}_maps"))
    yield f"{row['own_top5']} of {row['pictures']}" if "own_top5" in row else "–"


def _share(value: float | None, spelt: str = "{:.0e}") -> str:
    return "–" if value is None else "0" if value == 0 else spelt.format(value)


def _layouts(layouts: Mapping[str, int]) -> str:
    """Spell how many maps have which layout in the network."""
    return ", ".join(f"{count} {layout.partition(',')[0]}" for layout, count in layouts.items()) or "–"


def _input(preprocessing: Mapping[str, Any]) -> str:
    """Spell how pictures become a network's input."""
    height, width = preprocessing["height"], preprocessing["width"]
    size = f"{height}×{width}" if height else "any size"
    channels = preprocessing["channels"]
    resize: Sequence[int] = preprocessing.get("resize", ())
    how = [f"{channels} channels"] if channels != 3 else []
    if resize:
        how.append(f"of {'×'.join(map(str, resize))}")
    how.append(preprocessing.get("interpolation", "bilinear") if height else "")
    how += ["not antialiased"] if not preprocessing.get("antialias", True) else []
    return ", ".join([size, *(word for word in how if word)])
