"""Preprocessing: from pixels to the tensor that a network takes, the same way in training and in serving.

A network's recipe says how a picture is resized and cropped; sizes and offsets are rounded as torchvision and timm
round them. Without a recipe the picture is squashed to the network's size, bilinear with antialiasing. torch's
bilinear filter differs from Pillow's by up to two levels of 255 in a few values of 100,000, and takes a sixth to four
fifths of the time for colour
(docs/decisions/0002-pillow-decodes.md). Axes: `N` batch, `C` channels, `H, W` picture pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handlers import optional_torch
from handlers.images import resizing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ANY_SIZE = (32, 32)  # (H, W) of the trial picture for a network of any size.

_WHITE = np.float32(255)

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Pillow's filter by the name of an interpolation."""

PLAIN = ("bilinear", "bicubic")
"""Interpolations that can do without antialiasing; `nearest` never has it, and the others always."""

COVER, CONTAIN = "cover", "contain"

Picture = NDArray[np.uint8] | NDArray[np.float32]
"""One picture, (H, W, C): uint8 in 0..255, or float32 on the 0..1 scale."""


Box = tuple[float, float, float, float]
"""(left, top, right, bottom) of a part of a picture, in pixels."""


class Scaled(NamedTuple):
    """Geometry of a picture that was decoded at a reduced scale.

    Attributes:
        original: (H, W) of the picture in the file, upright.
        box: The whole picture's place in the decoded one, whose last row or column may be only partly covered.
    """

    original: tuple[int, int]
    box: Box


class Placement(NamedTuple):
    """The place of a network's input in a picture.

    Attributes:
        resized: (H, W) that the whole picture is resized to.
        offset: First row and column that the network sees; negative where the picture is padded.
        size: (H, W) that the network sees.
    """

    resized: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]

    def region(self, original: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return the part of the original picture that the network sees.

        Args:
            original: (H, W) of the picture before resizing.

        Returns:
            (top, left, bottom, right) of its edges in pixels of the original; beyond its edges where it is padded.
        """
        y, x = original[0] / self.resized[0], original[1] / self.resized[1]
        (top, left), (height, width) = self.offset, self.size
        return top * y, left * x, (top + height) * y, (left + width) * x


@dataclass(frozen=True)
class Preprocessing:
    """A network's input, and how a picture is converted to it.

    Attributes:
        channels: C; encoded pictures are converted to 1 (grey) or 3 (RGB).
        height: H in pixels, or None for a network that takes any size.
        width: W in pixels, or None for any size.
        mean: Subtracted per channel from values in 0..1; empty for no normalisation.
        std: Divided by afterwards, per channel; empty together with `mean`.
        resize: What a picture is resized to before its middle, (height, width), is cut out: the length of the shorter
            side, or (H, W). Empty for straight to (height, width), or not at all for a network of any size.
        fit: How (H, W) is met: empty for exactly, `cover` and `contain` for the same aspect ratio as the picture and at
            least, or at most, that size.
        fill: Levels 0..255 of each channel, where the resized picture is smaller than the network; empty for black.
        interpolation: A name of `FILTERS`.
        antialias: Whether the filter widens where a picture is made smaller.
        bgr: Whether the network takes blue first; `mean` and `std` are in its order, `fill` is in that of pictures.
    """

    channels: int
    height: int | None
    width: int | None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: tuple[int, ...] = ()
    fit: str = ""
    fill: tuple[int, ...] = ()
    interpolation: str = "bilinear"
    antialias: bool = True
    bgr: bool = False

    def __post_init__(self) -> None:
        """Check that the fields fit together.

        Raises:
            ValueError: The fields contradict each other.
        """
        if self.channels < 1:
            raise ValueError("channels must be positive")
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width must both be set or both be None")
        given = len(self.mean), len(self.std)
        if given not in ((0, 0), (self.channels, self.channels)) or 0 in self.std:
            raise ValueError(
                f"mean and std need {self.channels} values each (one a channel), none of std 0, or no values at all; "
                f"got {given[0]} and {given[1]}"
            )
        if len(self.resize) > 2 or any(side < 1 for side in self.resize):
            raise ValueError("resize must be the length of the shorter side, or height and width")
        if len(self.resize) == 2 and self.height is None:
            raise ValueError("resizing to height and width makes every picture that size: it must be the network's too")
        if self.fit not in ("", COVER, CONTAIN) or (self.fit and len(self.resize) != 2):
            raise ValueError(f"fit must be {COVER} or {CONTAIN}, with a height and a width to resize to")
        if self.fill and (len(self.fill) != self.channels or any(not 0 <= level <= 255 for level in self.fill)):
            raise ValueError(f"fill needs {self.channels} levels in 0..255")
        if self.interpolation not in FILTERS:
            raise ValueError(f"interpolation must be one of {', '.join(FILTERS)}, not {self.interpolation!r}")
        if not self.antialias and self.interpolation not in (*PLAIN, "nearest"):
            raise ValueError(f"only {' and '.join(PLAIN)} can do without antialiasing, not {self.interpolation}")
        if self.bgr and self.channels != 3:
            raise ValueError(f"bgr is an order of 3 channels, not of {self.channels}")

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) in pixels, or None for any size."""
        return None if self.height is None or self.width is None else (self.height, self.width)

    def place(self, original: tuple[int, int], *, is_prepared: bool = False) -> Placement:
        """Return where the network's input lies in a picture.

        The longer side is rounded as `torchvision.transforms.Resize` and timm's `ResizeKeepRatio` do, the offset as
        `torchvision.transforms.CenterCrop` does.

        Args:
            original: (H, W) of the picture.
            is_prepared: Whether a picture of the network's size is its input already, as float32 arrays are.

        Returns:
            The placement; a side of `resized` is 0 where `contain` leaves no pixel of it.
        """
        if is_prepared and original == self.size:
            return Placement(original, (0, 0), original)
        height, width = original
        if not self.resize:
            resized = self.size or original
        elif len(self.resize) == 1:
            [short] = self.resize
            resized = (int(short * height / width), short) if width <= height else (short, int(short * width / height))
        elif self.fit:
            ratios = height / self.resize[0], width / self.resize[1]
            ratio = min(ratios) if self.fit == COVER else max(ratios)
            resized = round(height / ratio), round(width / ratio)
        else:
            resized = self.resize[0], self.resize[1]
        size = self.size or resized
        top, left = (
            round((whole - part) / 2) if whole >= part else -((part - whole) // 2)
            for whole, part in zip(resized, size, strict=True)
        )
        return Placement(resized, (top, left), size)

    def describe_placement(self, original: tuple[int, int], *, is_prepared: bool = False) -> tuple[str, ...]:
        """Return what resizing and cropping change of what is seen, in words of proto/README.md; see `place`."""
        if not self.resize and self.size in (None, original):
            return ()
        resized, _, size = self.place(original, is_prepared=is_prepared)
        is_squashed = not self.resize or (len(self.resize) == 2 and not self.fit)
        found = {
            "aspect ratio changed": is_squashed and original[0] * resized[1] != original[1] * resized[0],
            "cropped": any(whole > part for whole, part in zip(resized, size, strict=True)),
            "padded": any(whole < part for whole, part in zip(resized, size, strict=True)),
        }
        return tuple(note for note, is_done in found.items() if is_done)

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
        """Return plain values for JSON or a checkpoint, without fields of the recipe that have their default."""
        given = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        defaults = {field.name: field.default for field in fields(self) if field.name not in _ALWAYS}
        left_out = {key for key, default in defaults.items() if getattr(self, key) == default}
        return {key: value for key, value in given.items() if key not in left_out}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """Rebuild from the values of `to_dict`."""
        mean, std = (tuple(float(number) for number in values[key]) for key in ("mean", "std"))
        recipe = {field.name: values[field.name] for field in fields(cls) if field.name in values.keys() - _ALWAYS}
        recipe |= {key: tuple(recipe[key]) for key in ("resize", "fill") if key in recipe}
        return cls(values["channels"], values["height"], values["width"], mean, std, **recipe)


_ALWAYS = {"channels", "height", "width", "mean", "std"}  # In every card; one from before recipes has no more.


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Scale uint8 to 0..1 and apply the network's normalisation.

    Args:
        images: (N, C, H, W), uint8 in 0..255 or float32 on the 0..1 scale, on any device.
        preprocessing: The network's input.

    Returns:
        (N, C, H, W), float32, contiguous, on the same device; a new tensor.
    """
    import torch

    white, mean, std = _statistics(preprocessing, images.device)
    if preprocessing.bgr:
        images = images.flip(1)
    values = images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if images.dtype == torch.uint8:
        values.div_(white)
    return values.sub_(mean).div_(std) if preprocessing.mean else values


@lru_cache(maxsize=16)
def _statistics(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """255, mean and std, each to be divided by or subtracted on the device.

    255 is a tensor, as CUDA divides by a number by multiplying with its inverse, which rounds otherwise.
    """
    import torch

    with torch.inference_mode(False):  # Training uses them too.
        white, mean, std = (
            torch.tensor(values, device=device) for values in ([255.0], preprocessing.mean, preprocessing.std)
        )
    return white, mean.view(-1, 1, 1), std.view(-1, 1, 1)


def to_input(pictures: Sequence[Picture], preprocessing: Preprocessing) -> NDArray[np.float32]:
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
        values[number] = (picture[..., ::-1] if preprocessing.bgr else picture).transpose(2, 0, 1)
    if all(picture.dtype == np.uint8 for picture in pictures):
        values /= _WHITE
        return preprocessing.normalise(values)
    for number, picture in enumerate(pictures):
        if picture.dtype == np.uint8:
            values[number] /= _WHITE
    with np.errstate(over="ignore"):  # A caller's float32 may be any finite number.
        return preprocessing.normalise(values)


def to_input_on(device: str, pictures: Sequence[Picture], preprocessing: Preprocessing) -> NDArray[np.float32] | Tensor:
    """Return what `to_input` returns, for a network on a device: `cpu`, or `cuda:` and a number.

    If all pictures are bytes, a GPU is sent these, a quarter of the float32 data, and scales and normalises them to the
    same values.

    Returns:
        As for `to_input`; a tensor on the GPU, or else an array.
    """
    if device == "cpu" or any(picture.dtype != np.uint8 for picture in pictures):
        return to_input(pictures, preprocessing)
    return normalise(_send(pictures, device).permute(0, 3, 1, 2), preprocessing)


def _send(pictures: Sequence[Picture], device: str) -> Tensor:
    """Return uint8 pictures on a GPU, (N, H, W, C). Not yet run on a GPU."""
    import torch

    shape = (len(pictures), *pictures[0].shape)
    host = torch.empty(shape, dtype=torch.uint8, pin_memory=True)  # Copies from pinned memory are asynchronous.
    np.stack(pictures, out=host.numpy())
    return host.to(device, non_blocking=True)


def noise(preprocessing: Preprocessing, count: int = 1) -> NDArray[np.float32]:
    """Return pictures for a trial of a network.

    Args:
        preprocessing: The network's input.
        count: N.

    Returns:
        (N, C, H, W), float32, normalised, contiguous: the same noise every time, everywhere; 32×32 for any size.
    """
    height, width = preprocessing.size or ANY_SIZE
    generator = np.random.Generator(np.random.PCG64(0))
    pixels = generator.random((count, height, width, preprocessing.channels), np.float32)
    return to_input(list(pixels), preprocessing)


# Filters resize across first: of a column of 16 million pixels, to 224 pixels across, it would hold 11 GB in between.
# A picture with more pixels than this in between is resized down the columns first.
_MOST_BETWEEN = 2**24

# A file of a few bytes may be a line of pixels, which becomes gigabytes once its shorter side has 256. A resized
# picture of more pixels than this, and than sixteen times the network's, is not made: only its part is.
_MOST_RESIZED = 2**21

_SUPPORT = {"nearest": 1, "box": 0.5, "bilinear": 1, "hamming": 1, "bicubic": 2, "lanczos": 3}  # Pillow's filters.


class TooLarge(ValueError):
    """A picture cannot be resized by the recipe without a huge intermediate picture."""


_SCALABLE = ("bilinear", "bicubic", "lanczos")  # `box` weighs whole pixels, and a scaled picture's are too large.
_SCALED_MARGIN = 2  # How many times as large as the resized picture a scaled one still is, at least.


def largest_scale(original: tuple[int, int], preprocessing: Preprocessing) -> int:
    """Return the 8, 4 or 2 of the smallest picture, a half to an eighth, that can stand in for one to be resized.

    Args:
        original: (H, W) of the picture.
        preprocessing: The network's input.

    Returns:
        1 where the whole picture is needed: it is not larger than that, the network takes any size, or the filter
        depends on single pixels.
    """
    if preprocessing.size is None or not preprocessing.antialias or preprocessing.interpolation not in _SCALABLE:
        return 1
    resized = preprocessing.place(original).resized
    if 0 in resized or not _is_made_whole(resized, preprocessing.size):
        return 1
    ratio = min(whole / part for whole, part in zip(original, resized, strict=True)) / _SCALED_MARGIN
    return next((scale for scale in (8, 4, 2) if ratio >= scale), 1)


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels of an image of mode L or RGB, (H, W, C)."""
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, -1)


def fit(picture: Picture | Image.Image, preprocessing: Preprocessing, scaled: Scaled | None = None) -> Picture:
    """Resize and crop a picture as a network's recipe says.

    Args:
        picture: (H, W, C), or an image of mode L or RGB, which saves copies where Pillow resizes. A float32 picture of
            the network's size is its input already, and is returned as it is.
        preprocessing: The network's input.
        scaled: Geometry of a picture decoded at a reduced scale; None for one of its own size.

    Returns:
        (H, W, C) of the network's size, or resized alone for a network of any size; in the same dtype.

    Raises:
        TooLarge: The picture cannot be resized in bounded memory.
        ValueError: Nothing would be left of the picture's shorter side.
    """
    if isinstance(picture, Image.Image):
        size, is_float = (picture.height, picture.width), False
    else:
        size, is_float = (picture.shape[0], picture.shape[1]), picture.dtype == np.float32
    original, box = (size, None) if scaled is None else scaled
    resized, (top, left), (height, width) = preprocessing.place(original, is_prepared=is_float)
    if 0 in resized:
        raise ValueError("nothing is left of its shorter side once the longer one fits the network")
    offset, part = (max(top, 0), max(left, 0)), (min(height, resized[0]), min(width, resized[1]))
    if original == resized or _is_made_whole(resized, (height, width)):
        if original != resized:
            picture = resize(
                picture,
                resized,
                preprocessing.interpolation,
                preprocessing.antialias,
                by_pillow=bool(preprocessing.resize),
                box=box,
            )
        elif isinstance(picture, Image.Image):
            picture = to_array(picture)
        if part != resized:
            picture = _cut(picture, offset, part).copy()  # A view would keep the whole picture.
    elif preprocessing.antialias:
        if isinstance(picture, Image.Image):
            picture = to_array(picture)
        picture = _resize_part(picture, resized, offset, part, preprocessing.interpolation)
    else:
        raise TooLarge(f"resized it would have {resized[1]:,}×{resized[0]:,} pixels")
    if part == (height, width):
        return picture
    fill = np.array(preprocessing.fill or [0] * preprocessing.channels, np.float32)
    whole: Picture = np.empty((height, width, preprocessing.channels), picture.dtype)
    whole[:] = fill if picture.dtype == np.uint8 else fill / _WHITE
    _cut(whole, (max(-top, 0), max(-left, 0)), part)[:] = picture
    return whole


def _is_made_whole(resized: tuple[int, int], size: tuple[int, int]) -> bool:
    """Return whether all of a resized picture is made, or only the part that a network of that size sees."""
    return math.prod(resized) <= max(_MOST_RESIZED, 16 * math.prod(size))


def _cut(picture: Picture, offset: tuple[int, int], size: tuple[int, int]) -> Picture:
    """Return a view of a part of a picture."""
    return picture[offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]]


def resize(
    picture: Picture | Image.Image,
    size: tuple[int, int],
    interpolation: str = "bilinear",
    antialias: bool = True,
    *,
    by_pillow: bool = False,
    box: Box | None = None,
) -> Picture:
    """Resize on the CPU.

    Args:
        picture: (H, W, C), or an image of mode L or RGB.
        size: (H, W) wanted.
        interpolation: A name of `FILTERS`.
        antialias: Whether the filter widens where the picture is made smaller.
        by_pillow: Whether bytes are resized by Pillow's own filter, as published recipes have it, and numbers always
            are. torch's is up to two levels off in a few values of 100,000.
        box: The part of a picture of bytes that becomes the result, by Pillow's filter; None for the whole picture.

    Returns:
        (H, W, C) of that size, in the same dtype.
    """
    if isinstance(picture, Image.Image):
        is_grey, is_bytes = picture.mode == "L", True
    else:
        is_grey, is_bytes = picture.shape[2] == 1, picture.dtype == np.uint8
    # Of grey bytes torch's filter takes up to three times as long.
    uses_pillow = by_pillow or is_grey or interpolation == "bicubic" or box is not None or not is_bytes
    if interpolation not in PLAIN or (antialias and uses_pillow):
        return _resize_by_pillow(picture, size, interpolation, box)
    if isinstance(picture, Image.Image):
        picture = to_array(picture)
    height, width, _ = picture.shape
    if antialias and height * size[1] > _MOST_BETWEEN and height != size[0]:
        picture = _resize_as_torch(picture, (size[0], width), interpolation, antialias)
    return _resize_as_torch(picture, size, interpolation, antialias)


def _resize_as_torch(picture: Picture, size: tuple[int, int], interpolation: str, antialias: bool) -> Picture:
    """Resize as torch does, in torch where it is imported, which is faster.

    Without antialiasing, bytes are resized as numbers and rounded, as torchvision resizes tensors.
    """
    torch = optional_torch.imported()
    if torch is None and antialias:
        return resizing.bilinear(picture.view(np.uint8), size)
    if torch is None:
        return resizing.without_antialiasing(picture, size, interpolation)
    own = picture if picture.flags.writeable else picture.copy()  # torch warns of what it may not write to.
    images = torch.from_numpy(own).permute(2, 0, 1)[None]  # (1, C, H, W), of which channels lie side by side.
    if not antialias:
        images = images.float()
    resized = torch.nn.functional.interpolate(images, size, mode=interpolation, antialias=antialias)
    if not antialias and picture.dtype == np.uint8:
        resized = resized.round_().clamp_(0, 255).to(torch.uint8)
    return np.asarray(resized[0].permute(1, 2, 0).numpy())


def _resize_by_pillow(
    picture: Picture | Image.Image, size: tuple[int, int], interpolation: str, box: Box | None = None
) -> Picture:
    """Resize as `resize` does, with Pillow's filter, which is always antialiased.

    Args:
        picture: (H, W, C), or an image of mode L or RGB.
        size: (H, W) wanted.
        interpolation: A name of `FILTERS`.
        box: The part that becomes the result; pixels around it count as they do for the whole. None for the whole
            picture.
    """
    height, width = (picture.height, picture.width) if isinstance(picture, Image.Image) else picture.shape[:2]
    if box is None and height * size[1] > _MOST_BETWEEN and height != size[0]:
        picture = _resize_by_pillow(picture, (size[0], width), interpolation)
    if isinstance(picture, Image.Image):
        return to_array(picture.resize(size[::-1], FILTERS[interpolation], box))
    count = picture.shape[2]
    parts = [picture] if picture.dtype == np.uint8 and count == 3 else [picture[:, :, one] for one in range(count)]
    images = [Image.fromarray(np.ascontiguousarray(part)) for part in parts]
    resized = [np.asarray(image.resize(size[::-1], FILTERS[interpolation], box)) for image in images]
    return resized[0].reshape(*size, count) if len(parts) == 1 else np.stack(resized, axis=2)


def _resize_part(
    picture: Picture, resized: tuple[int, int], offset: tuple[int, int], size: tuple[int, int], interpolation: str
) -> Picture:
    """Return a part of a resized picture without resizing all of it, which may be a thousand times as large.

    Args:
        picture: (H, W, C).
        resized: (H, W) of the whole resized picture.
        offset: First row and column of the part.
        size: (H, W) of the part.
        interpolation: A name of `FILTERS`.
    """
    starts, edges = [], []
    for axis in (0, 1):
        scale = picture.shape[axis] / resized[axis]
        first, last = offset[axis] * scale, (offset[axis] + size[axis]) * scale
        margin = _SUPPORT[interpolation] * max(scale, 1) + 1
        start, end = max(math.floor(first - margin), 0), min(math.ceil(last + margin), picture.shape[axis])
        starts.append(slice(start, end))
        edges.append((first - start, min(last - start, end - start)))
    (top, bottom), (left, right) = edges
    return _resize_by_pillow(picture[starts[0], starts[1]], size, interpolation, (left, top, right, bottom))
