"""Pictures: from bytes to the tensor a network takes, the same way in training and in serving.

It knows file formats and one network's input, and nothing of requests, layers or replies. Axes: `N` batch,
`C` channels, `H, W` picture pixels.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handlers.containers import ACCEPTED
from handlers.errors import BadImage, ImageTooLarge, TooManyImages, WrongChannels
from handlers.files import Budget, check_pixels, decode_file
from handlers.resizing import resize

DEFAULT_MAX_IMAGES = 64
DEFAULT_MAX_BYTES = 16 * 2**20
DEFAULT_MAX_PIXELS = 16_000_000
ANY_SIZE = (32, 32)  # (H, W) of the picture that a network of any size is tried on.

_NPY_MAGIC = b"\x93NUMPY"
# numpy's own reader runs Python's tokenizer and parser on whatever stands there, and may log what they think of it.
_NPY_HEADER = re.compile(
    rb"\{ ?'descr': ?'(?P<descr>[^']*)', ?'fortran_order': ?(?P<fortran_order>True|False), ?"
    rb"'shape': ?\((?P<shape>(?:\d{1,10}, ?){0,32}(?:\d{1,10})?)\),? ?\}\s*"
)
_NPY_DTYPES: dict[bytes, np.dtype[Any]] = {
    **dict.fromkeys((b"|u1", b"<u1", b">u1"), np.dtype(np.uint8)),
    b"<f4": np.dtype("<f4"),
    b">f4": np.dtype(">f4"),
}
_WHITE = np.float32(255)

Picture = NDArray[np.uint8] | NDArray[np.float32]
"""One picture, (H, W, C): uint8 in 0..255, or float32 on the 0..1 scale."""


@dataclass(frozen=True)
class Preprocessing:
    """What a network takes, and what happens to a picture before it gets there.

    Attributes:
        channels: C; encoded pictures are converted to 1 (grey) or 3 (RGB).
        height: H in pixels, or None for a network that takes any size.
        width: W in pixels, or None likewise.
        mean: Subtracted per channel from values in 0..1; empty for no normalisation.
        std: Divided by afterwards, per channel; empty together with `mean`.
    """

    channels: int
    height: int | None
    width: int | None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no picture could satisfy.

        Raises:
            ValueError: The fields contradict each other.
        """
        if self.channels < 1 or (self.height is None) != (self.width is None):
            raise ValueError("channels must be positive, height and width both set or both None")
        if self.mean and (len(self.mean) != self.channels or len(self.std) != self.channels or 0 in self.std):
            raise ValueError(f"mean and std need {self.channels} values each, std none that is 0")

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) in pixels, or None for any size."""
        return None if self.height is None or self.width is None else (self.height, self.width)

    def normalise(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Subtract `mean` and divide by `std`, in place.

        Args:
            values: (N, C, H, W) on the 0..1 scale.
        """
        if self.mean:
            mean, std = self._statistics
            values -= mean
            values /= std
        return values

    @cached_property
    def _statistics(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """`mean` and `std`, each (C, 1, 1)."""
        shape = (self.channels, 1, 1)
        return np.array(self.mean, np.float32).reshape(shape), np.array(self.std, np.float32).reshape(shape)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON or a checkpoint."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """Rebuild from `to_dict`."""
        mean, std = (tuple(float(number) for number in values[key]) for key in ("mean", "std"))
        return cls(values["channels"], values["height"], values["width"], mean, std)


def decode(
    data: bytes | bytearray | memoryview,
    preprocessing: Preprocessing,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_images: int = DEFAULT_MAX_IMAGES,
    budget: Budget | None = None,
) -> list[Picture]:
    """Read one file into pictures of the network's channels and size.

    Args:
        data: Content of a PNG, JPEG or WebP file, or of a .npy file of uint8 or float32 shaped (H, W), (H, W, C) or
            (N, H, W, C). The first bytes say which.
        preprocessing: The network's input.
        max_bytes: Largest accepted `data`.
        max_pixels: Largest accepted H·W, counted before anything is decoded.
        max_images: Largest accepted N of an array.
        budget: Of pixels in picture files, for this one and others; None for no such limit.

    Returns:
        One picture, or N of a four-dimensional array; each (H, W, C), uint8 in 0..255 or float32 on the 0..1 scale.

    Raises:
        BadImage: `data` is none of these formats, damaged, empty, or holds values no picture has.
        ImageTooLarge: More bytes or pixels than allowed, or pixels than `budget` has.
        TooManyImages: An array of more than `max_images` pictures.
        WrongChannels: An array without the network's channels.
    """
    if not data:
        raise BadImage(f"the picture is empty; send {ACCEPTED}")
    if len(data) > max_bytes:
        raise ImageTooLarge(f"the picture has {len(data):,} bytes; at most {max_bytes:,} are accepted")
    if data[:6] == _NPY_MAGIC:
        return _decode_array(data, preprocessing, max_pixels=max_pixels, max_images=max_images)
    picture = decode_file(data, preprocessing.channels, max_pixels=max_pixels, budget=budget)
    return [_fit(picture, preprocessing.size)]


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Scale uint8 to 0..1 and apply the network's normalisation.

    Args:
        images: (N, C, H, W), uint8 in 0..255 or float32 on the 0..1 scale, on any device.
        preprocessing: The network's input.

    Returns:
        (N, C, H, W), float32, contiguous, on the same device; a new tensor.
    """
    white, mean, std = _statistics(preprocessing, images.device)
    values = images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if images.dtype == torch.uint8:
        values.div_(white)
    return values.sub_(mean).div_(std) if preprocessing.mean else values


@lru_cache(maxsize=16)
def _statistics(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """255, mean and std, each to be divided by or subtracted on the device.

    255 is a tensor, as CUDA divides by a number by multiplying with its inverse, which rounds otherwise.
    """
    with torch.inference_mode(False):  # Training uses them too.
        white, mean, std = (
            torch.tensor(values, device=device) for values in ([255.0], preprocessing.mean, preprocessing.std)
        )
    return white, mean.view(-1, 1, 1), std.view(-1, 1, 1)


def stack(pictures: Sequence[Picture], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Make what the network takes out of pictures of one size: `normalise`, bit for bit, without tensors.

    Args:
        pictures: N pictures (H, W, C) of the same H and W, uint8 and float32 in any mixture.
        preprocessing: The network's input.

    Returns:
        (N, C, H, W), float32, normalised, contiguous.
    """
    height, width, channels = pictures[0].shape
    values = np.empty((len(pictures), channels, height, width), np.float32)
    for number, picture in enumerate(pictures):
        values[number] = picture.transpose(2, 0, 1)
    if all(picture.dtype == np.uint8 for picture in pictures):
        values /= _WHITE
        return preprocessing.normalise(values)
    for number, picture in enumerate(pictures):
        if picture.dtype == np.uint8:
            values[number] /= _WHITE
    with np.errstate(over="ignore"):  # A caller's float32 may be anything finite; the scores will show it.
        return preprocessing.normalise(values)


def stack_on(
    device: torch.device, pictures: Sequence[Picture], preprocessing: Preprocessing
) -> NDArray[np.float32] | Tensor:
    """Do as `stack`, for a network on that device.

    A GPU is sent pictures as bytes, where all of them are: a quarter of what it would be sent, and it scales and
    normalises them itself, to the same values.

    Returns:
        As `stack`; a tensor on the GPU, or else an array.
    """
    if device.type != "cuda" or any(picture.dtype != np.uint8 for picture in pictures):
        return stack(pictures, preprocessing)
    return normalise(_send(pictures, device).permute(0, 3, 1, 2), preprocessing)


def _send(pictures: Sequence[Picture], device: torch.device) -> Tensor:
    """Return uint8 pictures on a GPU, (N, H, W, C). Not run here, for want of one."""
    shape = (len(pictures), *pictures[0].shape)
    host = torch.empty(shape, dtype=torch.uint8, pin_memory=True)  # The copy of pinned memory need not be waited for.
    np.stack(pictures, out=host.numpy())
    return host.to(device, non_blocking=True)


def noise(preprocessing: Preprocessing, count: int = 1) -> Tensor:
    """Return pictures to try a network on.

    Args:
        preprocessing: The network's input.
        count: N.

    Returns:
        (N, C, H, W), float32, normalised, contiguous, on the CPU: the same noise every time, 32×32 for any size.
    """
    height, width = preprocessing.size or ANY_SIZE
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand((count, height, width, preprocessing.channels), generator=generator)
    return torch.from_numpy(stack(list(pixels.numpy()), preprocessing))


def _decode_array(
    data: bytes | bytearray | memoryview, preprocessing: Preprocessing, *, max_pixels: int, max_images: int
) -> list[Picture]:
    """Read a .npy file, without pickle and without a copy, into pictures of the network's size."""
    array = _read_npy(data)
    shape = array.shape
    if array.ndim == 2:
        array = array[:, :, np.newaxis]
    if array.ndim == 3:
        array = array[np.newaxis]
    count, height, width, channels = array.shape
    if count > max_images:  # Before the loop below: a million pictures of one pixel are few bytes.
        raise TooManyImages(f"the array holds {count:,} pictures; at most {max_images} are accepted in a request")
    if channels != preprocessing.channels:
        raise WrongChannels(
            f"the array of shape {shape} has {channels} channel{'s' if channels > 1 else ''} in its last axis; "
            f"this network takes {preprocessing.channels}"
        )
    check_pixels(height, width, max_pixels)
    if array.dtype == np.float32 and not np.isfinite(array).all():
        raise BadImage("the array holds NaN or infinity; send finite values on the 0..1 scale")
    return [_fit(picture, preprocessing.size) for picture in array]


def _read_npy(data: bytes | bytearray | memoryview) -> Picture:
    """View the cells of a .npy file as an array; what its header claims is checked against the bytes that are there."""
    lengths = {b"\1\0": "<8xH", b"\2\0": "<8xI"}.get(bytes(data[6:8]))  # By version.
    header = None
    if lengths is not None and len(data) >= struct.calcsize(lengths):
        [length] = struct.unpack_from(lengths, data)
        start = struct.calcsize(lengths) + length
        header = _NPY_HEADER.fullmatch(data, start - length, start)
    if header is None or start > len(data):
        raise BadImage("the .npy header is not that of a uint8 or float32 array; write it with numpy.save")
    dtype = _NPY_DTYPES.get(header["descr"])
    if dtype is None:
        raise BadImage("the array must be uint8 (0..255) or float32 (0..1 scale)")
    shape = tuple(int(length) for length in header["shape"].split(b",") if length.strip())
    if len(shape) not in (2, 3, 4) or not all(0 < length < 2**31 for length in shape):
        raise BadImage("the array must be (H, W), (H, W, C) or (N, H, W, C), none of them 0")
    expected = math.prod(shape) * dtype.itemsize
    if len(data) - start != expected:
        raise BadImage(f"the .npy header promises {expected:,} bytes of cells, {len(data) - start:,} are there")
    cells = np.frombuffer(data, dtype=dtype, offset=start)
    array = cells.reshape(shape, order="F" if header["fortran_order"] == b"True" else "C")
    picture: Picture = array.astype(dtype.newbyteorder("="), copy=False)
    return picture


def _fit(picture: Picture, size: tuple[int, int] | None) -> Picture:
    """Bring (H, W, C) to the network's size, if it has one."""
    if size is None or picture.shape[:2] == size:
        return picture
    return resize(picture, size)
