"""Which decoder, and which filter to resize with: how fast, and on which files not Pillow's pixels.

Type: python -m benchmarks.decoders --rounds 20

Compared are Pillow, our way to its decoders, OpenCV and torchvision; and for resizing Pillow's filter and torch's.
The contract (proto/README.md) fixes what a picture decodes to, and Pillow is what fixes it. A decoder is compared on
whole files of every kind; then on damaged ones, in a process of its own, since one of them does not survive that. A
decoder that takes a damaged file which Pillow refuses would have the service answer for pixels that are not there.
Times are microseconds of CPU time a file, least / median of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import queue
import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from benchmarks.engines import alternate
from handlers.images.decoding import decode_file
from handlers.images.preprocessing import resize_by_torch

Decoder = Callable[[bytes], NDArray[np.uint8]]

MAX_PIXELS = 10**8
RESIZED = (((40, 40), (32, 32)), ((375, 500), (32, 32)), ((375, 500), (224, 224)), ((3000, 4000), (224, 224)))
CAT = Path(__file__).resolve().parents[1] / "samples/cat.png"


def pillow(data: bytes) -> NDArray[np.uint8]:
    """Pillow's own readers, as its documentation has it, over white."""
    with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode == "I;16":
        return np.rint(np.asarray(image) / 257).astype(np.uint8)[..., np.newaxis].repeat(3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(image.convert("RGB"))


def ours(data: bytes) -> NDArray[np.uint8]:
    """As served."""
    return decode_file(data, 3, max_pixels=MAX_PIXELS)


def opencv(data: bytes) -> NDArray[np.uint8]:
    """OpenCV, as its documentation has it; it turns pictures by their EXIF itself."""
    import cv2

    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if decoded is None:
        raise ValueError("not decoded")
    return np.asarray(decoded)


def torchvision(data: bytes) -> NDArray[np.uint8]:
    """Torchvision's own decoders, deprecated since 0.29."""
    from torchvision.io import ImageReadMode, decode_image

    read = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    pixels = decode_image(read, ImageReadMode.RGB, apply_exif_orientation=True)
    return np.asarray(pixels.permute(1, 2, 0))


DECODERS: dict[str, Decoder] = {"Pillow": pillow, "ours": ours, "OpenCV": opencv, "torchvision": torchvision}


def photograph(height: int, width: int) -> Image.Image:
    """Return smooth colours with a little noise, which compress like a photograph."""
    generator = np.random.default_rng(0)
    rough = Image.fromarray(generator.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8))
    array = np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray(np.clip(array + generator.integers(-4, 5, array.shape), 0, 255).astype(np.uint8))


def saved(image: Image.Image, name: str, **options: object) -> bytes:
    """Return the image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def speed_files() -> dict[str, bytes]:
    """Return what speed is measured on."""
    found = {"PNG 32×32": CAT.read_bytes()}
    for height, width in ((32, 32), (375, 500)):
        image = photograph(height, width)
        found |= {
            f"{name} {width}×{height}": saved(image, name, **options)
            for name, options in (("PNG", {}), ("JPEG", {"quality": 90}), ("WEBP", {"quality": 90}))
            if (name, height) != ("PNG", 32)
        }
    return found


def kinds() -> dict[str, bytes]:
    """Return one file of every kind the contract speaks of."""
    image = photograph(40, 56)
    alpha = image.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "PNG RGB": saved(image, "PNG"),
        "PNG grey": saved(image.convert("L"), "PNG"),
        "PNG alpha": saved(alpha, "PNG"),
        "PNG grey and alpha": saved(alpha.convert("LA"), "PNG"),
        "PNG palette": saved(image.quantize(32), "PNG"),
        "PNG palette, one transparent": saved(image.quantize(32), "PNG", transparency=0),
        "PNG 1 bit": saved(image.convert("1"), "PNG"),
        "PNG 16-bit grey": saved(Image.fromarray(np.arange(2240, dtype=np.uint16).reshape(40, 56) * 29), "PNG"),
        "PNG turned by EXIF": saved(image, "PNG", exif=exif),
        "JPEG 4:2:0": saved(image, "JPEG"),
        "JPEG 4:4:4 progressive": saved(image, "JPEG", subsampling=0, progressive=True),
        "JPEG grey": saved(image.convert("L"), "JPEG"),
        "JPEG CMYK": saved(image.convert("CMYK"), "JPEG"),
        "JPEG turned by EXIF": saved(image, "JPEG", exif=exif),
        "WEBP": saved(image, "WEBP"),
        "WEBP alpha": saved(alpha, "WEBP", lossless=True),
    }


def damaged(count: int) -> Iterator[bytes]:
    """Yield files with some bytes changed or the end cut off, the same ones each time."""
    chance = random.Random(0)  # noqa: S311
    seeds = [kinds()[name] for name in ("PNG RGB", "PNG grey", "JPEG 4:2:0", "JPEG 4:4:4 progressive")]
    for _ in range(count):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(0, 3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        yield bytes(data if chance.random() < 0.6 else data[: chance.randrange(40, len(data))])


def attempt(decoder: Decoder, data: bytes) -> NDArray[np.uint8] | None:
    """Decode, or return None where the file is refused."""
    try:
        return decoder(data)
    except Exception:  # Each has its own.
        return None


def survive(name: str, count: int, found: multiprocessing.Queue[tuple[int, int, int]]) -> None:
    """Count damaged files: seen, taken though Pillow refuses them, and decoded to other pixels than Pillow's."""
    wrongly = otherwise = 0
    for number, data in enumerate(damaged(count), 1):
        expected, got = attempt(pillow, data), attempt(DECODERS[name], data)
        wrongly += expected is None and got is not None
        otherwise += expected is not None and got is not None and not np.array_equal(expected, got)
        found.put((number, wrongly, otherwise))


def damage(name: str, count: int) -> str:
    """Run `survive` in another process and say how it ended."""
    context = multiprocessing.get_context("fork")
    found: multiprocessing.Queue[tuple[int, int, int]] = context.Queue()
    process = context.Process(target=survive, args=(name, count, found))
    process.start()
    last = (0, 0, 0)
    while process.is_alive() or not found.empty():
        with contextlib.suppress(queue.Empty):  # Not there yet, or dead.
            last = found.get(timeout=0.2)
    process.join()
    seen, wrongly, otherwise = last
    died = "" if process.exitcode == 0 else f"; the process died with {process.exitcode} on file {seen + 1}"
    return f"{seen} damaged files: {wrongly} taken that Pillow refuses, {otherwise} to other pixels{died}"


def resized_by_pillow(array: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize by Pillow's filter, one channel or three."""
    image = Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0])
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR)).reshape(*size, array.shape[2])


def resizing(rounds: int) -> Iterator[str]:
    """Measure both filters on pictures as they leave the decoder, and yield the lines of a table."""
    yield "| picture | becomes | Pillow | torch | cells that differ, by one level |\n|---|---|---|---|---|"
    for (height, width), size in RESIZED:
        for mode in ("RGB", "L"):
            image = photograph(height, width).convert(mode)
            array = np.frombuffer(image.tobytes(), np.uint8).reshape(height, width, -1)
            ways = {"Pillow": partial(resized_by_pillow, array, size), "torch": partial(resize_by_torch, array, size)}
            times = alternate(ways, rounds)
            off = np.abs(ways["torch"]().astype(int) - ways["Pillow"]())
            if off.max() > 1:
                raise RuntimeError(f"{width}×{height} {mode} differs from Pillow's by {off.max()} levels")
            figures = " | ".join(f"{least:,.0f} / {median:,.0f}" for least, median in times.values())
            yield f"| {width}×{height} {mode} | {size[1]}×{size[0]} | {figures} | {np.mean(off > 0):.1%} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--damaged", type=int, default=20_000)
    parser.add_argument("--decoders", default=",".join(DECODERS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = [name for name in options.decoders.split(",") if attempt(DECODERS[name], CAT.read_bytes()) is not None]
    print("| file | bytes | " + " | ".join(names) + " |\n|---|---|" + "---|" * len(names))
    for what, data in speed_files().items():
        times = alternate({name: partial(DECODERS[name], data) for name in names}, options.rounds)
        cells = " | ".join(f"{least:,.0f} / {median:,.0f}" for least, median in times.values())
        print(f"| {what} | {len(data):,} | {cells} |")
    print("\n" + "\n".join(resizing(options.rounds)))
    for name in names:
        other = []
        for what, data in kinds().items():
            got, expected = attempt(DECODERS[name], data), pillow(data)
            if got is None or not np.array_equal(got, expected):
                other.append(what)
        print(f"\n{name}: not Pillow's pixels for: {', '.join(other) or 'none'}\n{damage(name, options.damaged)}")


if __name__ == "__main__":
    main()
