"""Explanation methods that take gradients, in torch: from a class's score back to the picture.

Each takes one picture and returns a heat map. Axes: `N` batch, `C` channels, `H, W` picture
pixels, `h, w` map cells, `K` classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handlers.outputs.explanation_methods import pictures_at_once

Scores = Callable[[Tensor], Tensor]
"""Images (N, C, H, W), float32, normalised → logits (N, K)."""


def grad_cam(
    made: Tensor, logits: Tensor, target: int, to_maps: Callable[[Tensor], Tensor] = lambda values: values
) -> Tensor | None:
    """Weigh each channel by the mean gradient of the class's logit over its cells; keep what is positive.

    Selvaraju et al., "Grad-CAM", ICCV 2017, equations 1 and 2.

    Args:
        made: The layer's tensor as the network computed it, from the graph of `logits`.
        logits: (1, K).
        target: The class's index.
        to_maps: Makes maps (1, C, h, w) of that tensor and of its gradient.

    Returns:
        (1, h, w), nowhere negative; None where the logit has no gradient with respect to the maps, or only to another
        part of what the layer made: of a transformer's last patches a class often needs no more than the class token.
    """
    whole = _gradient(logits[0, target], made)
    if whole is None:
        return None
    gradient = to_maps(whole)
    if whole.any() and not gradient.any():
        return None
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return (weights * to_maps(made.detach())).sum(dim=1).relu()


def input_gradient(network: Scores, image: Tensor, target: int) -> Tensor | None:
    """Return how much the logit grows with each normalised value of the picture.

    Simonyan et al., "Deep Inside Convolutional Networks", 2014, section 3, with its sign.

    Args:
        network: The network, differentiable.
        image: (1, C, H, W).
        target: The class's index.

    Returns:
        (C, H, W); None where the logit has no gradient with respect to the picture.
    """
    gradients = _gradients(network, image, target)
    return None if gradients is None else gradients[0]


def integrated_gradients(
    network: Scores, image: Tensor, target: int, steps: int, check: Callable[[], None]
) -> tuple[Tensor, float] | None:
    """Attribute the change of the logit, from a picture of zeros to this one, to the values that changed.

    Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017; the integral by Gauss's and Legendre's
    rule, as in captum.

    Args:
        network: The network, differentiable.
        image: (1, C, H, W). Zero is what normalisation makes of the mean colour.
        target: The class's index.
        steps: Points of the rule.
        check: Called between runs; may raise to end the work.

    Returns:
        (C, H, W), and by how much its sum exceeds the change of the logit: 0 but for errors of the rule and rounding.
        None where the logit has no gradient with respect to the picture.
    """
    points, weights = _rule(steps)
    shares = torch.tensor((points + 1) / 2, dtype=image.dtype, device=image.device).view(-1, 1, 1, 1)
    parts = torch.tensor(weights / 2, dtype=image.dtype, device=image.device).view(-1, 1, 1, 1)
    mean = torch.zeros_like(image[0])
    chunk = pictures_at_once(image.nbytes)
    for start in range(0, steps, chunk):
        gradients = _gradients(network, shares[start : start + chunk] * image, target)
        if gradients is None:
            return None
        mean += (gradients * parts[start : start + chunk]).sum(dim=0)
        check()
    heat = mean * image[0]
    with torch.no_grad():
        start, end = network(torch.cat([torch.zeros_like(image), image]))[:, target].tolist()
    return heat, heat.double().sum().item() - (end - start)


def _gradients(network: Scores, images: Tensor, target: int) -> Tensor | None:
    """Return the logit's gradient with respect to each image, (N, C, H, W); None where it has none."""
    leaf = images.detach().clone().requires_grad_(True)
    # The network gets a copy: one that changes its input in place could not change a leaf.
    return _gradient(network(leaf.clone())[:, target].sum(), leaf)


def _gradient(score: Tensor, values: Tensor) -> Tensor | None:
    """Return a score's gradient; None where it does not come from these values, or was computed without gradients."""
    if not (score.requires_grad and values.requires_grad):
        return None
    return torch.autograd.grad(score, values, allow_unused=True)[0]


@lru_cache(maxsize=16)  # Its time grows with the third power of the points: 0.1 s for 512.
def _rule(steps: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return points in -1..1 and weights of Gauss's and Legendre's rule."""
    return np.polynomial.legendre.leggauss(steps)
