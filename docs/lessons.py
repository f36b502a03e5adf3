"""Run the commands of docs/lessons.md again.

    python docs/lessons.py prepare            # digits as pictures, untrained twins, and a store with all networks
    python docs/lessons.py run                # put into the text what the commands print now, and draw its figures
    python docs/lessons.py check              # compare what they print now with the text; exit 1 where it differs
    python docs/lessons.py check --about deep # only the commands in which this word stands
    python docs/lessons.py draw               # only the figures that show pictures beside maps

They ask http://localhost:8080, where the store of `prepare` is served, and read CIFAR-10's pictures in pictures/. A
block of `sh` or `python` that a block of `text` follows is run from the repository's root; trainings stand alone and
are not. Commands about a network that is not served are skipped. The paragraphs around the blocks quote figures too:
read them again after `run`.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from convscope import Client
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Tile = tuple[str, NDArray[np.floating]]

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # Started as a script, Python looks for modules beside this file alone.
LESSONS, PICTURES = ROOT / "docs/lessons.md", ROOT / "docs/pictures/lessons"
DRAWN, STORE, DATA = (Path(path) for path in ("out/lessons", "out/store", "pictures"))
DEFAULT = "http://localhost:8080"
PAIR = re.compile(r"```(sh|python)\n([^`]*)```\n\n```text\n([^`]*)```")
NUMBER = re.compile(r"[-−+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
TOLERANCE = 0.011  # Or 2 %: another processor rounds otherwise, and a picture between two classes falls to the other.
TWINS = {"deep-untrained": "Deep", "cifar-untrained": "Cifar"}  # Name → network, with the first weights of seed 0.


class Block(NamedTuple):
    """A command of the lessons and what it printed.

    Attributes:
        language: `sh` or `python`.
        code: The command.
        printed: The text below it.
    """

    language: str
    code: str
    printed: str

    @property
    def needs_pictures(self) -> bool:
        """Whether it needs more than the repository: the data sets' pictures, or a network that is not in it."""
        return "pictures/" in self.code or "untrained" in self.code or "load(" in self.code


def blocks() -> list[Block]:
    """Return the commands whose output stands below them, in order."""
    return [Block(*found) for found in PAIR.findall(LESSONS.read_text("utf-8"))]


def printed(block: Block, url: str) -> str:
    """Run a block from the current folder, and return what it prints, less where it saved something."""
    if block.language == "python":
        command = [sys.executable, "-c", block.code.replace(DEFAULT, url)]
    else:
        [line] = block.code.splitlines()
        command = ["bash", "-c", f"{line.replace('.venv/bin/convscope', f'{sys.executable} -m convscope')} --url {url}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return without_saved(done.stdout)


def without_saved(output: str) -> str:
    """Return what a command prints without the line that says where things were saved."""
    return re.sub(r"\nsaved .*", "", output).rstrip() + "\n"


def differences(before: str, now: str) -> str:
    """Return how two outputs differ, as a diff of their lines; empty if only roundings do.

    The line that names the device is left out, and widths of columns do not count.
    """
    lines = [
        [" ".join(line.split()) for line in text.splitlines() if not line.startswith("runs on")]
        for text in (before, now)
    ]
    if len(lines[0]) == len(lines[1]) and all(map(_alike, *lines)):
        return ""
    return "\n".join(difflib.unified_diff(*lines, "the text", "now", n=0, lineterm=""))


def _alike(before: str, now: str) -> bool:
    """Tell whether two lines are the same but for roundings."""
    numbers = [
        [float(number.replace(",", "").replace("−", "-")) for number in NUMBER.findall(line)] for line in (before, now)
    ]
    return NUMBER.sub("#", before) == NUMBER.sub("#", now) and all(
        abs(one - other) <= max(TOLERANCE, 0.02 * abs(one)) for one, other in zip(*numbers, strict=True)
    )


def prepare() -> None:
    """Write the digits of the test half as pictures, and all networks with the untrained twins into a store."""
    from PIL import Image

    from experiments.learning import CLASSES
    from handlers.images.preprocessing import Preprocessing
    from training import data

    digits = data.digits(Preprocessing(1, 28, 28)).test
    for number, (pixels, label) in enumerate(zip(digits.images[:, 0].numpy(), digits.labels.tolist(), strict=True)):
        file = DATA / "digits" / str(label) / f"{number:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    print(f"{len(digits.labels):,} digits are in {DATA / 'digits'}")
    STORE.mkdir(parents=True, exist_ok=True)
    for archive in (ROOT / "model_store").glob("*.mar"):
        shutil.copy(archive, STORE / archive.name)
    (STORE.parent / "classes.txt").write_text("\n".join(CLASSES) + "\n", "utf-8")
    for name, network in TWINS.items():
        _archive(name, network)
        print(f"{name} is in {STORE}")


def _archive(name: str, network: str) -> None:
    """Archive one of our networks for CIFAR-10 with its first weights, under a name of its own."""
    import handlers.networks
    from experiments.learning import INPUT

    layers = getattr(handlers.networks, network).layers
    options = {
        "--arch": f"handlers.networks.{network.lower()}:{network}",
        "--name": name,
        "--store": str(STORE),
        "--classes": str(STORE.parent / "classes.txt"),
        "--size": "32x32",
        "--mean": ",".join(map(str, INPUT.mean)),
        "--std": ",".join(map(str, INPUT.std)),
        "--layers": ",".join(f"{public}={node}" for public, node in layers.items()),
    }
    command = [sys.executable, "-m", "archiver", "--quiet", "--random-weights", "0"]
    subprocess.run([*command, *(text for pair in options.items() for text in pair)], check=True)


def run(url: str, about: str, *, check: bool) -> int:
    """Run the chosen blocks, and rewrite the text or compare it; return the exit status."""
    from convscope import Client, ModelNotFound

    text, status = LESSONS.read_text("utf-8"), 0
    with Client(url) as client:
        for block in blocks():
            if about not in block.code:
                continue
            started = time.monotonic()
            missing = []
            for name in re.findall(r"--(?:model|against) ([\w-]+)|\"([\w]+-untrained)\"", block.code):
                try:
                    client.model_card(name[0] or name[1])
                except ModelNotFound:
                    missing.append(name[0] or name[1])
            title = block.code.strip().splitlines()[0 if block.language == "sh" else -1]
            if missing:
                print(f"skipped, as {', '.join(missing)} is not served: {title}", flush=True)
                continue
            now = printed(block, url)
            changed = differences(block.printed, now)
            print(f"{time.monotonic() - started:5.1f} s  {title}", flush=True)
            if check and changed:
                print(changed, flush=True)
                status = 1
            if not check:
                old = f"```{block.language}\n{block.code}```\n\n```text\n{block.printed}```"
                text = text.replace(old, f"```{block.language}\n{block.code}```\n\n```text\n{now}```")
                LESSONS.write_text(text, "utf-8")
        if not check:
            draw(client)
    return status


def draw(client: Client) -> None:
    """Draw the pictures beside their maps, and copy the figures that the commands saved."""
    DRAWN.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(client).items():
        figure.savefig(DRAWN / f"{name}.png", dpi=80)
    for name in re.findall(r"\(pictures/lessons/([\w-]+\.png)\)", LESSONS.read_text("utf-8")):
        if (DRAWN / name).exists():
            shutil.copy(DRAWN / name, PICTURES / name)


def figures(client: Client) -> dict[str, Figure]:
    """Return the figures that show a changed picture beside its map, by the name of their file."""
    from PIL import Image
    from scipy.ndimage import gaussian_filter

    def sample(name: str) -> NDArray[np.float32]:
        return np.asarray(Image.open(ROOT / f"samples/{name}.png").convert("RGB"), np.float32) / np.float32(255)

    def maps(pictures: Sequence[NDArray[np.float32]], layer: str, model: str = "cifar") -> list[NDArray[np.float32]]:
        return [seen.maps[layer] for seen in client.predict(list(pictures), model=model, layers=layer)]

    def moved(picture: NDArray[np.float32], down: int, right: int) -> NDArray[np.float32]:
        return np.pad(picture, ((down, 0), (right, 0), (0, 0)), mode="reflect")[:32, :32].copy()

    cat, ship = sample("cat"), sample("ship")
    drawn: dict[str, Figure] = {}

    square = np.asarray(Image.open(ROOT / "samples/square.png"), np.float32) / 255
    [[kernel]] = client.filters("edges", "conv1")
    [edges] = client.predict(square, model="edges", layers="conv1").maps["conv1"]
    drawn["square"] = _tiles([[("picture", square), ("filter", kernel), ("map", edges)]], numbers=True)

    rows: list[list[Tile]] = []
    for layer, stride in (("conv1", 1), ("conv2", 2)):
        before, by_three, by_four = maps([cat, moved(cat, 0, 3), moved(cat, 0, 4)], layer)
        channel = _telling(before)
        rows.append([("picture", cat), (f"{layer}, channel {channel}", before[channel])])
        for pixels, after in ((3, by_three), (4, by_four)):
            cells = round(pixels / stride)  # The nearest whole number.
            kept = after[channel][:, cells:] - before[channel][:, : before.shape[2] - cells]
            rows[-1] += [(f"moved {pixels} px", moved(cat, 0, pixels)), ("its map", after[channel])]
            rows[-1] += [(f"less the map {cells} to the right", np.pad(kept, ((0, 0), (cells, 0))))]
    drawn["moved"] = _tiles(rows)

    before, turned = maps([cat, np.rot90(cat).copy()], "conv1")
    rows = []
    for channel in np.argsort(-np.var(before, axis=(1, 2)))[:3].tolist():
        back = np.rot90(turned[channel], -1)
        rows.append([("picture", cat), (f"conv1, channel {channel}", before[channel])])
        rows[-1] += [("turned by 90°", np.rot90(cat)), ("its map, turned back", back)]
        rows[-1] += [("less the map", back - before[channel])]
    drawn["turned"] = _tiles(rows)

    before, after, other = maps([cat, moved(cat, 0, 1), ship], "conv1")
    channel = _telling(before)
    rows = [
        [(name, picture)] for name, picture in (("picture", cat), ("moved 1 px", moved(cat, 0, 1)), ("another", ship))
    ]
    for window in (1, 2, 4, 8, 16):
        for row, each in zip(rows, (before, after, other), strict=True):
            pooled = each[channel].reshape(32 // window, window, 32 // window, window).max(axis=(1, 3))
            row.append((f"largest of {window}×{window}" if window > 1 else "conv1", pooled))
    drawn["pooled"] = _tiles(rows)

    grey = np.full((32, 32, 3), 0.5, np.float32)
    frames: list[Tile] = [("grey picture", grey)]
    for layer, model in (("conv1", "cifar"), ("conv2", "cifar"), ("block4", "deep"), ("block7", "deep")):
        [each] = maps([grey], layer, model)
        frames.append((f"{model}, {layer}", each[_telling(each)]))
    drawn["frame"] = _tiles([frames])

    seen = client.predict(sample("frog"), model="deep", layers=["block1", "block3", "block5", "block7"], channels=7)
    rows = []
    for name in seen.maps:
        rows.append([(f"picture; {name}", sample("frog"))] + [("", each) for each in seen.maps[name]])
    drawn["frog-blocks"] = _tiles(rows)

    blurred = [
        cat if not sigma else gaussian_filter(cat, (sigma, sigma, 0), mode="mirror") for sigma in (0, 0.5, 1, 2, 4)
    ]
    each_map = maps(blurred, "conv1")
    channel = _telling(each_map[0])
    names = ["as it is", *(f"sigma {sigma} px" for sigma in (0.5, 1, 2, 4))]
    drawn["blurred"] = _tiles(
        [
            list(zip(names, blurred, strict=True)),
            [(f"conv1, channel {channel}", each[channel]) for each in each_map],
        ],
        shared=True,
    )

    jumbles: list[Tile] = [("as it is", cat)]
    for block in (16, 8, 4):
        jumbles.append((f"blocks of {block}", _shuffled(cat, block)))
    for name, picture in (("grid of 4", cat), ("grid, blocks of 4", _shuffled(cat, 4))):
        lined = picture.copy()
        lined[4::4] = lined[:, 4::4] = cat.mean(axis=(0, 1))
        jumbles.append((name, lined))
    each_map = maps([picture for _, picture in jumbles], "conv1")
    channel = _telling(each_map[0])
    drawn["shuffled"] = _tiles(
        [jumbles, [(f"conv1, channel {channel}", each[channel]) for each in each_map]], shared=True
    )
    return drawn


def _telling(feature_map: NDArray[np.float32]) -> int:
    """Return the channel of a map (C, h, w) with the largest variance."""
    return int(feature_map.var(axis=(1, 2)).argmax())


def _shuffled(picture: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """Return a picture whose blocks have changed places at random, none staying where it was."""
    side = picture.shape[0] // block
    parts = picture.reshape(side, block, side, block, -1).swapaxes(1, 2).reshape(side * side, block, block, -1)
    order = np.roll(rng_order := np.random.default_rng(0).permutation(side * side), 1)
    parts = parts[order[np.argsort(rng_order)]]  # Each block takes the place of its neighbour in a random circle.
    return parts.reshape(side, side, block, block, -1).swapaxes(1, 2).reshape(picture.shape).copy()


def _tiles(rows: Sequence[Sequence[Tile]], *, numbers: bool = False, shared: bool = False) -> Figure:
    """Draw rows of tiles: pictures (H, W, 3) as they are, maps (h, w) in grey, differences and filters in blue and red.

    Args:
        rows: Titles and arrays; a title that begins with "less" or "filter" is of a signed array.
        numbers: Whether to write every value into its cell.
        shared: Whether the maps of a row share the scale of the first.
    """
    from convscope.figures import new_figure

    columns = max(map(len, rows))
    figure = new_figure("", width_inches=1.5 * columns, height_inches=1.75 * len(rows))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, tiles in zip(axes, rows, strict=True):
        for ax in row:
            ax.set_axis_off()
        limits: dict[str, float] = {}
        for ax, (title, values) in zip(row, tiles, strict=False):
            ax.set_title(title, fontsize="x-small")
            if values.ndim == 3:
                ax.imshow(values.clip(0, 1), interpolation="nearest")
            elif title.startswith(("less", "filter")):
                reach = float(max(abs(values).max(), *(abs(each).max() for _, each in tiles if each.ndim == 2), 1e-9))
                ax.imshow(values, cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest")
            else:
                if shared:
                    limits = limits or {"vmin": float(values.min()), "vmax": float(values.max())}
                ax.imshow(values, cmap="gray", interpolation="nearest", **limits)
            if numbers:
                middle = (float(values.min()) + float(values.max())) / 2
                for (y, x), value in np.ndenumerate(values.astype(float)):
                    colour = "black" if title.startswith("filter") or value > middle else "white"
                    ax.text(x, y, f"{value:g}", ha="center", va="center", color=colour, fontsize="small")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for."""
    options = argparse.ArgumentParser(prog="python docs/lessons.py", description=__doc__.partition("\n")[0])
    options.add_argument("what", choices=("prepare", "run", "check", "draw"))
    options.add_argument("--url", default=DEFAULT, help=f"where the models are served (default {DEFAULT})")
    options.add_argument("--about", default="", metavar="WORD", help="only commands with this word in them")
    chosen = options.parse_args(arguments)
    if chosen.what == "prepare":
        prepare()
        return 0
    if chosen.what == "draw":
        from convscope import Client

        with Client(chosen.url) as client:
            draw(client)
        return 0
    return run(chosen.url, chosen.about, check=chosen.what == "check")


if __name__ == "__main__":
    sys.exit(main())
