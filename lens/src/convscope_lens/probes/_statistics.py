"""Ratios of sums over pictures, with the interval that another sample of pictures would give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Curve: TypeAlias = NDArray[np.float64]  # (S,): a number per step.
Sums: TypeAlias = NDArray[np.float64]  # (N, S, 2): a numerator and a denominator per picture and step.

CHANCE, ANOTHER = "chance", "another picture"
RESAMPLES = 1000
_VALUES_AT_A_TIME = 2_000_000


class Figures(NamedTuple):
    """Figures of one kind, as sums over pictures.

    Attributes:
        sums: Layer or score → (N, S, 2): numerators and denominators.
        root: Whether a figure is the root of the ratio.
        baseline: What the baseline is; empty without one.
        baselines: Layer or score → (S,).
        varies: Whether the figure depends on the pictures, so that it has an interval.
    """

    sums: Mapping[str, Sums]
    root: bool = True
    baseline: str = ""
    baselines: Mapping[str, Curve] = {}
    varies: bool = True


def ratio(sums: Sums, *, root: bool) -> Curve:
    """Return Σ numerator / Σ denominator over the pictures, or its square root; NaN where nothing was added."""
    return _divide(sums[..., 0].sum(axis=0), sums[..., 1].sum(axis=0), root=root)


def _divide(numerator: NDArray[np.float64], denominator: NDArray[np.float64], *, root: bool) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = numerator / denominator
        return np.asarray(np.sqrt(quotient) if root else quotient)


def interval(sums: Sums, *, root: bool, minus: Sums | None = None, seed: int = 0) -> NDArray[np.float64]:
    """Return the 95 % bootstrap interval of `ratio`, or of the difference of two ratios over the same pictures.

    Pictures are drawn with replacement, `RESAMPLES` times, each with all its copies: the interval says how far the
    figure depends on which pictures were drawn, and nothing of other trainings of the network.

    Args:
        sums: (N, S, 2), float64.
        root: Whether the figure is the root of the ratio.
        minus: (N, S, 2), float64, of the same pictures: the difference of the ratios is resampled, both with the same
            pictures.
        seed: Seed of the resampling.

    Returns:
        (S, 2), float64: the lower and the upper end of each step's interval; NaN for fewer than two pictures.
    """
    ends = np.full((sums.shape[1], 2), np.nan)
    values = ratio(sums, root=root) if minus is None else ratio(sums, root=root) - ratio(minus, root=root)
    defined = np.isfinite(values)
    if len(sums) < 2 or not defined.any():
        return ends
    from scipy.stats import bootstrap  # Imported here: scipy.stats is slow to import.

    def statistic(*parts: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        totals = [part.sum(axis=axis) for part in parts]
        value = _divide(totals[0], totals[1], root=root)
        return value - _divide(totals[2], totals[3], root=root) if len(totals) > 2 else value

    pairs = [pair[:, defined] for pair in (sums, minus) if pair is not None]
    data = [part for pair in pairs for part in (pair[..., 0], pair[..., 1])]
    result = bootstrap(
        data,
        statistic,
        paired=True,
        vectorized=True,
        axis=0,
        n_resamples=RESAMPLES,
        batch=max(1, _VALUES_AT_A_TIME // data[0].size),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    ends[defined, 0], ends[defined, 1] = result.confidence_interval
    return ends
