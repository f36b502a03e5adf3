"""Preprocessing: from pixels to the tensor that a network takes, the same way in training and in serving.

Resizing is bilinear with antialiasing; the aspect ratio is not kept. torch's filter is Pillow's, to within one level of
255, and takes a sixth to four fifths of the time for colour (docs/decisions/0002-pillow-decodes.md). Axes: `N` batch,
`C` channels, `H, W` picture pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

ANY_SIZE = (32, 32)  # (H, W) of the trial picture for a network of any size.

_WHITE = np.float32(255)

Picture = NDArray[np.uint8] | NDArray[np.float32]
"""One picture, (H, W, C): uint8 in 0..255, or float32 on the 0..1 scale."""


@dataclass(frozen=True)
class Preprocessing:
    """A network's input, and how a picture is converted to it.

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
        """Check that the fields fit together.

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
    """Return the input for pictures of one size: what `normalise` returns, bit for bit, without tensors.

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
    with np.errstate(over="ignore"):  # A caller's float32 may be any finite number.
        return preprocessing.normalise(values)


def stack_on(
    device: torch.device, pictures: Sequence[Picture], preprocessing: Preprocessing
) -> NDArray[np.float32] | Tensor:
    """Do as `stack`, for a network on that device.

    If all pictures are bytes, a GPU is sent these, a quarter of the float32 data, and scales and normalises them to the
    same values.

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
    """Return pictures for a trial of a network.

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


# torch resizes across first: of a column of 16 million pixels, to 224 pixels across, it would hold 11 GB in between.
# A picture with more pixels than this in between is resized down the columns first.
_MOST_BETWEEN = 2**24


def resize(picture: Picture, size: tuple[int, int]) -> Picture:
    """Resize on the CPU.

    Args:
        picture: (H, W, C).
        size: (H, W) wanted.

    Returns:
        (H, W, C) of that size, in the same dtype.
    """
    if picture.dtype == np.uint8 and picture.shape[2] == 1:  # Of grey bytes torch's takes up to three times as long.
        grey = Image.fromarray(picture[:, :, 0]).resize(size[::-1], Image.Resampling.BILINEAR)
        return np.asarray(grey)[:, :, np.newaxis]
    return resize_by_torch(picture, size)


def resize_by_torch(picture: Picture, size: tuple[int, int]) -> Picture:
    """Do as `resize`, always with torch's filter."""
    height, width, _ = picture.shape
    if height * size[1] > _MOST_BETWEEN and height != size[0]:
        picture = resize_by_torch(picture, (size[0], width))
    own = picture if picture.flags.writeable else picture.copy()  # torch warns of what it may not write to.
    images = torch.from_numpy(own).permute(2, 0, 1)[None]  # (1, C, H, W), of which channels lie side by side.
    resized = functional.interpolate(images, size, mode="bilinear", antialias=True)
    return np.asarray(resized[0].permute(1, 2, 0).numpy())
