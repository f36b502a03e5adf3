"""The zoo: torchvision's classifiers by name, with what the weights published for them take and mean.

Nothing is downloaded: the facts come with the package, weights from a file.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from torchvision import models

from archiver.packing import ArchiveError
from handlers.images.preprocessing import Preprocessing


@dataclass(frozen=True)
class Published:
    """A network of torchvision's and one set of its weights.

    Attributes:
        architecture: The builder, as `--arch` takes it.
        weights: The name of those weights, such as `IMAGENET1K_V1`.
        preprocessing: What a picture becomes. torchvision first scales the shorter side and crops the middle; here the
            whole picture is brought to the same size.
        classes: Labels in the order of the outputs.
    """

    architecture: str
    weights: str
    preprocessing: Preprocessing
    classes: tuple[str, ...]


def look_up(name: str, state_dict: Path | None = None) -> Published:
    """Look a classifier up.

    Args:
        name: Such as `resnet18`.
        state_dict: A weights file; if it still has the name it is published under, the facts are of those weights, else
            of torchvision's default ones.

    Raises:
        ArchiveError: torchvision has no such classifier.
    """
    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.4)
        raise ArchiveError(f"torchvision has no classifier {name!r}; it has {', '.join(near or known)}")
    entries = list(models.get_model_weights(name))
    default = models.get_model_weights(name).DEFAULT
    named = (entry for entry in entries if state_dict is not None and Path(entry.url).name == state_dict.name)
    entry = next(named, default)
    transforms = entry.transforms()
    height = width = transforms.crop_size[0]
    preprocessing = Preprocessing(3, height, width, tuple(transforms.mean), tuple(transforms.std))
    return Published(f"torchvision.models:{name}", entry.name, preprocessing, tuple(entry.meta["categories"]))
