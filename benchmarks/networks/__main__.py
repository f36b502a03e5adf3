"""Archive and serve many networks, and compare what is served with an independent reference.

    python -m benchmarks.networks                          # all of them, half an hour on two cores
    python -m benchmarks.networks --only resnet18,unet --keep

Every network has random weights from a seed, which `reference.py` writes: a process that knows torch, torchvision and
timm alone. The archiver makes an archive of them, as a user would; the server serves it; the client asks for scores and
all maps of three photographs that are not square. The reference then computes the same with the library's own
transform, and with the pixels that the service gave to the network. So a difference is one of preprocessing or one of
the network.

A run that was interrupted goes on where it was. The table is written to docs/networks.md, and with more figures to
benchmarks/results/networks.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from convscope import Client, Prediction
from PIL import Image, ImageOps

from benchmarks.load import ROOT
from benchmarks.networks.cases import CASES, OWN, Case
from benchmarks.networks.table import write_table

WORK = ROOT / "out/networks"
RESULTS = ROOT / "benchmarks/results/networks.json"
GROUP = 4  # Networks served by one server.
_ARCHIVE_S = 900.0
_ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client/src")])}

TOLERANCE = 1e-4
"""The largest difference for the same pixels, as a share of the largest value: the archiver's own tolerance. Where a
network's float32 is further than a third of that from its float64, three times as far."""
LEVELS = 2.01
"""The largest difference of pixels, in levels of 255. Pillow and torch resize in two passes and round after each: of
one photograph at 384×256, bilinear, each pass alone differs by at most 1, both together by 2 in 11 of 294,912 values,
where each of the two is 1 from the exact value."""

Row = dict[str, Any]
Array = np.ndarray[Any, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0, or 1 if a network's row has a fault.
    """
    options = _parse(argv)
    if options.list:
        print(*(case.name for case in CASES))
        return 0
    names = options.only.split(",") if options.only else [case.name for case in CASES]
    if unknown := set(names) - {case.name for case in CASES}:
        print(f"error: no such networks: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    WORK.mkdir(parents=True, exist_ok=True)
    unfinished = WORK / "rows.json"
    rows: dict[str, Row] = json.loads(unfinished.read_text()) if unfinished.exists() and not options.only else {}
    cases = [case for case in CASES if case.name in names and case.name not in rows]
    pictures = draw_pictures(WORK / "pictures")
    with _Reference() as reference:
        for start in range(0, len(cases), GROUP):
            group = cases[start : start + GROUP]
            rows.update(run_group(group, reference, pictures, options))
            if not options.only:
                unfinished.write_text(json.dumps(rows))
            for case in group:
                _say(f"{len(rows)} of {len(names)}: {case.name}: {rows[case.name]['verdict']}")
                if not options.keep:
                    shutil.rmtree(WORK / case.name, ignore_errors=True)
    before = json.loads(RESULTS.read_text())["rows"] if options.only and RESULTS.exists() else {}
    merged = {case.name: row for case in CASES if (row := rows.get(case.name) or before.get(case.name))}
    write_table(merged, RESULTS, ROOT / "docs/networks.md")
    unfinished.unlink(missing_ok=True)
    return int(any(row["fault"] for row in rows.values()))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="A,B", help="these networks; the rows of the others stay as they are")
    parser.add_argument("--keep", action="store_true", help=f"keep weights, archives and arrays in {WORK.name}/")
    parser.add_argument("--jobs", type=int, default=2, help="networks that are archived at a time (default: 2)")
    parser.add_argument("--list", action="store_true", help="print the networks' names and exit")
    return parser.parse_args(argv)


def run_group(
    group: Sequence[Case], reference: _Reference, pictures: dict[int, list[Path]], options: argparse.Namespace
) -> dict[str, Row]:
    """Archive a few networks one by one, serve them together, compare them; return their rows."""
    rows = {case.name: _start(case, reference, pictures[case.channels]) for case in group}
    with ThreadPoolExecutor(options.jobs) as pool:
        for row, case in zip(rows.values(), group, strict=True):
            if not row["fault"]:
                pool.submit(_attempt, row, lambda case=case: archive(case))
    ready = [case for case in group if rows[case.name].get("archived")]
    store = WORK / "store"
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir()
    for case in ready:
        (store / f"{case.name}.mar").symlink_to(WORK / case.name / f"{case.name}.mar")
    try:
        if ready:
            with _serving(store) as url, Client(url, deadline_s=300) as client:
                for case in ready:
                    _attempt(rows[case.name], lambda case=case: ask(client, case, pictures[case.channels]))
    except (OSError, RuntimeError) as err:
        for case in ready:
            rows[case.name]["fault"] = f"the server: {err}"
    for case in ready:
        row = rows[case.name]
        if not row["fault"]:
            _attempt(row, lambda case=case, row=row: compare(case, row, reference, pictures[case.channels]))
    for row in rows.values():
        for said in ("fault", "refusal"):
            row[said] = row[said].replace(f"{ROOT}/", "")[:300]
        row["verdict"] = row["fault"] or row["refusal"] or "served"
    return rows


def _start(case: Case, reference: _Reference, pictures: Sequence[Path]) -> Row:
    """Write a network's weights, and return its new row."""
    folder = WORK / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "classes.txt").write_text("".join(f"class {number}\n" for number in range(case.outputs)))
    row: Row = {"family": case.family, "archived": False, "refusal": "", "fault": ""}
    _say(f"{case.name}: weights")
    _attempt(row, lambda: {"weights_mb": reference.ask("prepare", case, folder, pictures)["mb"]})
    return row


def _attempt(row: Row, do: Any) -> None:
    """Add the result of a step to a row; a failure is an entry too."""
    try:
        row.update(do())
    except Exception as err:  # One network's failure is a row of the table.
        row["fault"] = f"{type(err).__name__}: {err}"


def archive(case: Case) -> Row:
    """Archive a network as a user does; return the time it took and the result."""
    folder = WORK / case.name
    _say(f"{case.name}: archiving")
    command = [sys.executable, "-m", "archiver", *case.command(folder / "weights.pt", folder)]
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=OWN, env=_ENVIRONMENT, capture_output=True, text=True, check=False, timeout=_ARCHIVE_S
    )
    seconds = time.monotonic() - began
    (folder / "archiver.txt").write_text(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    if done.returncode:
        said = " ".join(done.stderr.rpartition("error: ")[2].split())
        return {"refusal" if case.refused and case.refused in said else "fault": f"not archived: {said}"}
    if case.refused:
        return {"fault": f"archived, though it should have been rejected ({case.refused})"}
    path = folder / f"{case.name}.mar"
    with zipfile.ZipFile(path) as file:
        card = json.loads(file.read("card.json"))
    return {
        "archived": True,
        "seconds": seconds,
        "archive_mb": path.stat().st_size / 1e6,
        "layers": card["layers"],
        "preprocessing": card["preprocessing"],
    }


@contextlib.contextmanager
def _serving(store: Path) -> Iterator[str]:
    """Serve every archive of a folder for as long as the context lasts; yield the address.

    Raises:
        RuntimeError: The server does not start.
    """
    command = [sys.executable, "-m", "server", "--model-store", str(store), "--workers", "1", "--device", "cpu"]
    command += ["--rest-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    command += ["--warm-up-s", "0", "--watch-s", "3600", "--startup-timeout-s", "600"]
    with (WORK / "server.txt").open("w") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=_ENVIRONMENT, stdout=subprocess.PIPE, stderr=log, text=True)
    said = ""
    try:
        for line in iter(server.stdout.readline, "") if server.stdout else ():
            said += line
            if "Ctrl-C stops it." in line:
                break
        if not (address := re.search(r"REST +(http://\S+)", said)):
            raise RuntimeError(f"it did not start: {(WORK / 'server.txt').read_text()[-300:]}")
        yield address[1]
    finally:
        server.terminate()
        server.wait(60)


def ask(client: Client, case: Case, pictures: Sequence[Path]) -> Row:
    """Request everything that the table compares, and write it to `served.npz`.

    Arrays are `pixels/<picture>` (C, H, W) on the 0..1 scale, what the network was given; `scores/<picture>` (K,),
    `probabilities/<picture>`, `maps/<layer>/<picture>` (C, h, w), and `pooled` (C, 2, 2), of the first
    picture, that of the last layer with more than one cell each way.
    """
    _say(f"{case.name}: asking")
    card = client.model_card(case.name)
    arrays: dict[str, Array] = {}
    for number, picture in enumerate(pictures):
        seen = client.predict(picture, model=case.name, layers="all", top_k=0)
        pixels = client.explain(picture, model=case.name, method="picture").picture
        arrays[f"pixels/{number}"] = pixels
        arrays |= {f"maps/{layer}/{number}": values for layer, values in seen.maps.items()}
        if case.scores != "none":
            scores, probabilities = _scores(seen, case.outputs)
            arrays |= {f"scores/{number}": scores, f"probabilities/{number}": probabilities}
    last = [layer.name for layer in card.layers if min(layer.shape[1:]) >= 2][-1]
    arrays["pooled"] = client.predict(pictures[0], model=case.name, layers=[last], pool=2).maps[last]
    np.savez(WORK / case.name / "served.npz", **arrays)
    beside = [layer.name for layer in card.layers if layer.layout == "extra_tokens"]
    return {"engine": seen.engine, "beside": beside, "last": last}


def _scores(seen: Prediction, outputs: int) -> tuple[Array, Array]:
    """Return the network's numbers and the probabilities, (K,) each, by index; values have no probability."""
    found = np.full((2, outputs), np.nan, np.float32)
    for one in seen.top:
        found[:, one.index] = (one.logit, one.probability) if one.value is None else (one.value, np.nan)
    return found[0], found[1]


def compare(case: Case, row: Row, reference: _Reference, pictures: Sequence[Path]) -> Row:
    """Compare what was served with the reference.

    Returns:
        `pixels`, the largest difference in levels of 255; `scores`, `maps` and `pooled`, the largest difference as a
        share of the largest value, with the library's own pixels (`own_…`) and with the service's (`same_…`);
        `own_top5` and `same_top5`, in how many pictures the first five are the same; `fault`, what is wrong.
    """
    _say(f"{case.name}: comparing")
    folder = WORK / case.name
    more = {name: row[name] for name in ("layers", "beside", "last")}
    found = reference.ask("expect", case, folder, pictures, **more)
    served = dict(np.load(folder / "served.npz"))
    expected = dict(np.load(folder / "expected.npz"))
    pixels = {name: values for name, values in served.items() if name.startswith("pixels/")}
    found["pictures"] = len(pixels)
    found["pixels"] = max(
        255 * float(np.abs(values - expected[f"own/{name}"]).max()) for name, values in pixels.items()
    )
    for way in ("own", "same"):
        for kind in ("scores", "probabilities", "maps", "pooled"):
            names = [name for name in served if name.startswith(kind) and not np.isnan(served[name]).all()]
            if names:
                found[f"{way}_{kind}"] = max(_off(served[name], expected[f"{way}/{name}"]) for name in names)
        if case.scores in ("softmax", "sigmoid") and case.outputs > 1:
            orders = [
                [_first(one[f"{prefix}scores/{n}"]) for n in range(len(pixels))]
                for one, prefix in ((served, ""), (expected, f"{way}/"))
            ]
            found[f"{way}_top5"] = sum(one == other for one, other in zip(*orders, strict=True))
    found["fault"] = "; ".join(_faults(found, case))
    return found


def _faults(found: Row, case: Case) -> Iterator[str]:
    """Yield the faults of a served network."""
    if found["pixels"] > LEVELS:
        yield f"its pixels are off by {found['pixels']:.0f} levels of 255"
    for name, off in found.items():
        if name.startswith("same_") and not name.endswith("top5") and not off <= max(TOLERANCE, 3 * found["rounding"]):
            yield f"its {name.removeprefix('same_')} are off by {off:.1e} for the same pixels"
    if found.get("same_top5", found["pictures"]) < found["pictures"]:
        yield "its first five classes are others for the same pixels"
    if case.outputs and "same_scores" not in found:
        yield "it has no scores"
    if found["spread"] is not None and found["spread"] < 1e-3:
        yield "its scores hardly depend on the picture, so that equal ones prove nothing"


def _first(scores: Array) -> list[int]:
    return [int(index) for index in np.argsort(-scores, kind="stable")[:5]]


def _off(found: Array, expected: Array) -> float:
    """Return the largest difference as a share of the largest value.

    Raises:
        ValueError: The shapes differ: another layout, or another layer.
    """
    if found.shape != expected.shape:
        raise ValueError(f"served {found.shape}, expected {expected.shape}")
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def draw_pictures(folder: Path) -> dict[int, list[Path]]:
    """Write three photographs that are not square, by number of channels.

    They come with scikit-learn and matplotlib. Encoded ones serve networks for colour and for grey; five channels are
    an array of the colours and two more that are made of them.
    """
    folder.mkdir(exist_ok=True)
    photographs = [_installed("sklearn") / "datasets/images" / name for name in ("china.jpg", "flower.jpg")]
    photographs.append(_installed("matplotlib") / "mpl-data/sample_data/grace_hopper.jpg")
    encoded, arrays = [], []
    for photograph, box in zip(photographs, ((480, 320), (300, 400), (341, 400)), strict=True):
        encoded.append(folder / f"{photograph.stem}.png")
        with Image.open(photograph) as picture:
            small = ImageOps.fit(picture.convert("RGB"), box)
        small.save(encoded[-1])
        pixels = np.asarray(small)
        arrays.append(encoded[-1].with_suffix(".npy"))
        np.save(arrays[-1], np.concatenate([pixels, 255 - pixels[:, :, :1], pixels[::-1, :, 1:2]], 2))
    return {1: encoded, 3: encoded, 5: arrays}


def _installed(package: str) -> Path:
    """Return the folder of a package, without importing it."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed")
    return Path(found.origin).parent


class _Reference:
    """The reference as a process of its own, which knows nothing of the service: `-I` hides the repository from it."""

    def __enter__(self) -> _Reference:
        self._log = (WORK / "reference.txt").open("w")
        self._process = self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._log.close()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-I", str(Path(__file__).with_name("reference.py"))]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        return subprocess.Popen(command, **pipes, text=True, cwd=WORK)

    def ask(self, do: str, case: Case, folder: Path, pictures: Sequence[Path], **more: Any) -> Row:
        """Run one order for a network.

        Raises:
            RuntimeError: The order failed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"do": do, "case": asdict(case), "folder": str(folder), "pictures": [str(one) for one in pictures]}
        self._process.stdin.write(json.dumps(order | more) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._process = self._start()
            raise RuntimeError(f"the reference ended with status {status}")
        answer: Row = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"the reference: {answer['error']}")
        return answer


def _say(text: str) -> None:
    """Print a line for the person at the terminal."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")  # One write: two threads may speak.


if __name__ == "__main__":
    sys.exit(main())
