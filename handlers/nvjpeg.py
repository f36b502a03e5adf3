"""nvJPEG: plain colour JPEGs decoded and resized on the GPU, where `--jpeg gpu` asks for it.

A photograph takes a CPU longer to decode than a GPU takes to run most networks on it. nvJPEG comes with torchvision.
Its pixels are near Pillow's and not the same: colour that a file stores at half the resolution it repeats, where Pillow
interpolates. So nothing goes there unless asked for, and of that only baseline JPEGs that are stored upright in usual
colours and are large enough to be worth the way; every other file is Pillow's, and every one that nvJPEG refuses.
No GPU was at hand: `decode_on_gpu` was never run. Axes: `C` channels, `H, W` picture pixels.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from handlers.containers import BASELINE, Bytes, Jpeg, read
from handlers.errors import BadImage
from handlers.files import Budget, decode_file
from handlers.maps import to_host
from handlers.resizing import resize, resize_anywhere
from handlers.vision import RGB

if TYPE_CHECKING:
    from handlers.images import Picture

logger = logging.getLogger(__name__)

LEAST_PIXELS = 2**16  # Smaller pictures take Pillow less than a millisecond. Not measured, for want of a GPU.
_PIXELS_AT_ONCE = 2**25  # They are held in the GPU's memory, three bytes each, until they are resized.
_MOST_OFF = 3.0  # Levels of 255 from Pillow's, on average over the trial's pictures.

Decode = Callable[[list[Tensor], torch.device], list[Tensor]]
"""Takes files, each (bytes,) uint8 on the CPU, and returns pictures, each (3, H, W) uint8 on the device."""


def decode_on_gpu(files: list[Tensor], device: torch.device) -> list[Tensor]:
    """Decode by nvJPEG; see `Decode`.

    Its hardware decoder does not heed the stream it is given: what is queued there must be done before, or memory that
    is still in use may be written to (TorchCodec's `DecodeJpegCuda.cpp`, which saw it on an H100).

    Raises:
        RuntimeError: One of the files cannot be decoded; none is returned then.
    """
    torch.cuda.current_stream(device).synchronize()
    decoded: list[Tensor] = torch.ops.image.decode_jpegs_cuda(files, RGB, device)
    return decoded


class JpegDecoder:
    """Decodes on a GPU what of a request's files belongs there, for a network that takes colour.

    Args:
        device: The GPU.
        size: (H, W) that the network takes, None for any.
        decode: What decodes, `decode_on_gpu` but for tests.
    """

    def __init__(self, device: torch.device, size: tuple[int, int] | None, *, decode: Decode = decode_on_gpu) -> None:
        self._device, self._size, self._files_to_pictures = device, size, decode
        self._has_failed = False

    @classmethod
    def proven(cls, device: torch.device, size: tuple[int, int] | None) -> JpegDecoder:
        """Return a decoder that gave nearly Pillow's pixels on that device.

        Args:
            device: Where the network runs.
            size: As in `JpegDecoder`.

        Raises:
            RuntimeError: The device is no GPU, or nvJPEG does not work there.
        """
        if device.type != "cuda":
            raise RuntimeError("decoding JPEG on the GPU was asked for, and this worker has none; ask for --jpeg cpu")
        decoder = cls(device, size)
        decoder.prove()
        return decoder

    def prove(self) -> None:
        """Decode a picture here and with Pillow.

        Raises:
            RuntimeError: They differ by more than files of this kind may, or it cannot be decoded here.
        """
        for subsampling in ("4:4:4", "4:2:0"):
            file = _sample(subsampling)
            expected: Picture = decode_file(file, 3, max_pixels=2**20)
            if self._size is not None:
                expected = resize(expected, self._size)
            try:
                [found] = self._decode([file])
            except Exception as err:
                raise RuntimeError(f"decoding JPEG on the GPU was asked for and fails: {err}") from err
            off = float(np.abs(found.astype(np.float32) - expected).mean())
            if found.shape != expected.shape or off > _MOST_OFF:
                raise RuntimeError(f"nvJPEG's pixels of a {subsampling} file are {off:.1f} levels from Pillow's")
            logger.info("nvJPEG decodes a %s file to %.2f levels from Pillow's pixels, on average", subsampling, off)

    def decode(
        self, files: Sequence[Bytes], *, max_bytes: int, max_pixels: int, budget: Budget
    ) -> dict[int, NDArray[np.uint8]]:
        """Decode those of a request's files that belong on the GPU; all others are left to Pillow, errors too.

        Args:
            files: As sent, of any kind.
            max_bytes: Of a file; a longer one is left alone.
            max_pixels: Of a picture; a larger one is left alone.
            budget: Of pixels; what is decoded here is taken from it.

        Returns:
            By its place in `files` each picture decoded, (H, W, 3), of the network's size.
        """
        pixels: dict[int, int] = {}
        left = budget.left
        for place, file in enumerate(files):
            count = _pixels(file) if len(file) <= max_bytes else 0
            if LEAST_PIXELS <= count <= min(max_pixels, left):
                pixels[place] = count
                left -= count
        found: dict[int, NDArray[np.uint8]] = {}
        for places in _portions(pixels):
            found |= self._attempt(files, places)
        for place in found:
            budget.take(pixels[place])
        return found

    def _attempt(self, files: Sequence[Bytes], places: list[int]) -> dict[int, NDArray[np.uint8]]:
        """Decode files together, or each alone if one of them spoils it; what fails alone is left out."""
        try:
            return dict(zip(places, self._decode([files[place] for place in places]), strict=True))
        except Exception as err:  # nvJPEG's errors, and those of a GPU whose memory is full.
            if not self._has_failed:
                logger.warning("nvJPEG refuses a file, which Pillow decodes: %s: %s", type(err).__name__, err)
                self._has_failed = True
        if len(places) == 1:
            return {}
        return {place: picture for alone in places for place, picture in self._attempt(files, [alone]).items()}

    @torch.inference_mode()
    def _decode(self, files: Sequence[Bytes]) -> list[NDArray[np.uint8]]:
        read = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
        pictures = self._files_to_pictures(read, self._device)
        if self._size is None:
            return [to_host(picture.permute(1, 2, 0).contiguous()).numpy() for picture in pictures]
        resized = torch.stack([resize_anywhere(picture, self._size) for picture in pictures])  # (N, 3, H, W)
        return list(to_host(resized.permute(0, 2, 3, 1).contiguous()).numpy())


def _pixels(file: Bytes) -> int:
    """Return how many pixels a file has that belongs on the GPU, 0 for any other."""
    if bytes(file[:3]) != b"\xff\xd8\xff":
        return 0
    try:
        found = read(file)
    except BadImage:  # Pillow's way says so of that picture.
        return 0
    if not isinstance(found, Jpeg) or (found.frame, found.channels, found.scans, found.orientation) != (
        BASELINE,
        3,
        1,
        1,
    ):
        return 0
    height, width = found.size
    return height * width if found.transform in (None, 1) else 0


def _portions(pixels: dict[int, int]) -> Iterator[list[int]]:
    """Yield places of files that may be decoded together."""
    portion: list[int] = []
    held = 0
    for place, count in pixels.items():
        if portion and held + count > _PIXELS_AT_ONCE:
            yield portion
            portion, held = [], 0
        portion.append(place)
        held += count
    if portion:
        yield portion


def _sample(subsampling: str) -> bytes:
    """Return a JPEG of soft colours, 384×512."""
    row, column = np.mgrid[0:384, 0:512] / 64
    waves = np.stack([np.sin(row + column), np.cos(row - column), np.sin(2 * column)], axis=2)
    buffer = io.BytesIO()
    picture = Image.fromarray((127.5 + 100 * waves).astype(np.uint8))
    picture.save(buffer, "JPEG", quality=90, subsampling=subsampling)
    return buffer.getvalue()
