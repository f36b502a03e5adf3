"""Compares decoders of JPEG on photographs, and measures what scaled decoding changes.

Type: python -m benchmarks.decoders [FOLDER]

Photographs of 0.3, 3 and 12 megapixels are generated: shapes of every size, blurred as by a lens, sensor noise, 4:2:0.
Given are the median of this thread's processor time in ms, and how the pixels differ from Pillow's. What is not
installed is left out. The last table has the levels of 255 by which decoding to a half or a quarter changes the
input of a network, by how many times as large the decoded picture still is: of a generated photograph, or of FOLDER's
JPEGs. Between them: pictures decoded by one thread and by two, median and least wall time in ms.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from handlers.images.containers import read
from handlers.images.decoding import Encoded, decode
from handlers.images.preprocessing import Preprocessing

SIZES = ((480, 640, 31), (1536, 2048, 11), (3024, 4032, 7))  # H, W, rounds.
RECIPE = Preprocessing(3, 224, 224, resize=(256,))
BICUBIC = Preprocessing(3, 224, 224, resize=(256,), interpolation="bicubic")
SQUASHED = Preprocessing(3, 224, 224)


def photograph(height: int, width: int) -> bytes:
    """Return a generated photograph as a JPEG."""
    random = np.random.default_rng(height)
    light = np.full((height, width, 3), 128, np.float32)
    for cell in (width // 4, width // 10, width // 30, width // 100, 6):
        rough = random.integers(0, 256, (height // cell + 2, width // cell + 2, 3), np.uint8)
        smooth = Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)
        light += (np.asarray(smooth, np.float32) - 127.5) * min(1, (cell / width * 4) ** 0.5)
    rows, columns = np.mgrid[:height, :width].astype(np.float32) / width
    for _ in range(12):
        y, x, radius = random.random(3) * (height / width, 1, 0.15)
        light[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] += random.uniform(-90, 90, 3)
    seen = Image.fromarray(np.clip(light, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7))
    values = np.asarray(seen, np.float32)
    noisy = values + random.standard_normal(values.shape, np.float32) * 5 * np.sqrt(values / 128 + 0.15)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def by_pillow(data: bytes) -> NDArray[np.uint8]:
    """Return (H, W, 3), decoded as Pillow's documentation says to."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def by_pillow_alone(data: bytes) -> Image.Image:
    """Decode without the copy to an array."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def decoders() -> dict[str, Callable[[bytes], Any]]:
    """Return what decodes a JPEG to (H, W, 3), by name."""
    found: dict[str, Callable[[bytes], Any]] = {"Pillow, no array": by_pillow_alone, "Pillow": by_pillow}
    if find_spec("cv2"):
        import cv2

        cv2.setNumThreads(1)
        found["OpenCV"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if find_spec("simplejpeg"):
        import simplejpeg

        found["simplejpeg"] = lambda data: simplejpeg.decode_jpeg(data, "RGB")
    for module in ("torchvision.io", "torchcodec.decoders"):
        if find_spec(module.split(".")[0]):
            package = __import__(module, fromlist=["decode_jpeg"])
            found[module.split(".")[0]] = lambda data, package=package: (
                package.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)).permute(1, 2, 0).numpy()
            )
    return found


def time_all(calls: dict[str, Callable[[bytes], Any]], data: bytes, rounds: int) -> dict[str, float]:
    """Return the median processor time of each call, in ms; the order turns from round to round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.thread_time()
            calls[name](data)
            times[name].append((time.thread_time() - began) * 1000)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def show_decoders(files: list[bytes]) -> None:
    """Print the first table."""
    calls = decoders()
    ours = {
        f"ours, {what}{', scaled' * scaled}": lambda data, preprocessing=preprocessing, scaled=scaled: decode(
            data, preprocessing, scaled=scaled
        )
        for what, preprocessing in (("bilinear recipe", RECIPE), ("bicubic recipe", BICUBIC), ("squashed", SQUASHED))
        for scaled in (False, True)
    }
    columns = [time_all(calls | ours, data, rounds) for data, (*_, rounds) in zip(files, SIZES, strict=True)]
    for name in calls | ours:
        row = " | ".join(f"{column[name]:.1f}" for column in columns)
        same = "–"
        if name in calls:
            off = max(int(np.abs(np.asarray(calls[name](data)).astype(int) - by_pillow(data)).max()) for data in files)
            same = "equal" if not off else f"up to {off} levels"
        print(f"| {name} | {row} | {same} |")


def show_threads(files: list[bytes]) -> None:
    """Print wall time of pictures decoded by one thread and by two, in turns."""
    for data, (height, width, rounds), count in zip(files, SIZES, (32, 8, 4), strict=True):
        times: dict[int, list[float]] = {1: [], 2: []}
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(2) as two:
            for number in range(2 * min(rounds, 9)):
                threads = 1 + number % 2
                began = time.perf_counter()
                list((one, two)[number % 2].map(lambda file: decode(file, RECIPE), [data] * count))
                times[threads].append((time.perf_counter() - began) * 1000)
        row = " | ".join(f"{statistics.median(taken):.0f} ({min(taken):.0f})" for taken in times.values())
        print(f"| {count} of {width}×{height} | {row} |")


def show_differences(files: list[bytes]) -> None:
    """Print the second table."""
    for interpolation in ("bilinear", "bicubic", "lanczos", "box"):
        for scale, margin in ((2, 2), (2, 3), (2, 4), (2, 6), (2, 8), (4, 2), (4, 3), (4, 4)):
            off = []
            for data in files:
                file = read(data)
                side = min(file.size) // (scale * margin)
                preprocessing = Preprocessing(3, side, side, resize=(side,), interpolation=interpolation)
                [exact], [scaled] = (Encoded(file, preprocessing, by).decode() for by in (1, scale))
                off.append(np.abs(exact.astype(int) - scaled))
            most = [int(one.max()) for one in off]
            mean, above = np.mean([one.mean() for one in off]), np.mean([(one > 1).mean() for one in off])
            print(
                f"| {interpolation} | 1/{scale} | {margin} | {mean:.2f} | {100 * above:.2f} % | "
                f"{statistics.median(most):g} / {max(most)} | {sum(one <= 1 for one in most)} of {len(most)} |"
            )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoders", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="JPEGs for the last table")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    files = [photograph(height, width) for height, width, _ in SIZES]
    print("| decoder | 640×480 | 2048×1536 | 4032×3024 | pixels |\n|---|---|---|---|---|")
    show_decoders(files)
    print("\n| pictures | one thread | two threads |\n|---|---|---|")
    show_threads(files)
    print("\n| filter | decoded at | times the size | mean | above one | most: median / of all | files within one |")
    print("|---|---|---|---|---|---|---|")
    show_differences(files[1:2] if folder is None else [path.read_bytes() for path in sorted(folder.glob("*.jp*g"))])


if __name__ == "__main__":
    main()
