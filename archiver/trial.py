"""Pictures of noise for testing a network, as tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from handlers.images import preprocessing as pictures
from handlers.images.preprocessing import Preprocessing


def noise(preprocessing: Preprocessing, count: int = 1) -> Tensor:
    """Return pictures of noise, (N, C, H, W), float32, normalised, on the CPU; see `preprocessing.noise`."""
    return torch.from_numpy(pictures.noise(preprocessing, count))
