"""Percentile bootstrap over test items."""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

_CHUNK_ELEMENTS: Final = 1 << 22  # resampled scores held at once


def bootstrap_interval(
    scores: Sequence[float] | np.ndarray,
    *,
    statistic: Callable[[np.ndarray], float] | None = None,
    clusters: Sequence[int] | np.ndarray | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the interval (low, high) of the mean of `scores`, or of `statistic`, over resampled items.

    For CIDEr pass `CiderScore.per_item`: the document frequencies then stay those of the whole set.

    Args:
        scores: float[N], one per item.
        statistic: of a float[N] resample, for instance `np.median` for ranks. None is the mean, and much faster.
        clusters: int[N], for instance the clip of each question: whole clusters are drawn, since their items are not
            independent. The mean stays one over items.
        confidence: share of the resampled values inside.
        resamples: how often the set is drawn anew, with replacement.
        seed: equal arguments give the equal interval.
    """
    values = _checked(scores, "scores")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: expected a number between 0 and 1")
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: expected a positive number")
    rng = np.random.default_rng(seed)
    if clusters is None:
        members = np.arange(len(values))
    else:
        found = np.asarray(clusters)
        if found.shape != values.shape:
            raise ValueError(f"clusters of shape {found.shape}: expected one for each of {len(values)} scores")
        members = np.unique(found, return_inverse=True)[1]
    sizes = np.bincount(members)
    if statistic is not None:
        ordered = values[np.argsort(members, kind="stable")]
        drawn = (rng.integers(0, len(sizes), len(sizes)) for _ in range(resamples))
        if len(sizes) == len(values):
            found_values = np.array([statistic(ordered[picks]) for picks in drawn])
        else:
            grouped = np.split(ordered, np.cumsum(sizes)[:-1])
            found_values = np.array([statistic(np.concatenate([grouped[i] for i in picks])) for picks in drawn])
    else:
        sums = np.bincount(members, values)
        found_values = np.empty(resamples)
        step = max(1, _CHUNK_ELEMENTS // len(sizes))
        for start in range(0, resamples, step):
            picks = rng.integers(0, len(sizes), (min(step, resamples - start), len(sizes)))
            found_values[start : start + step] = sums[picks].sum(1) / sizes[picks].sum(1)
    low, high = np.quantile(found_values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    *,
    clusters: Sequence[int] | np.ndarray | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the interval of mean(first - second) for two systems scored on the same items, drawn together (paired).

    An interval without 0 says more than two separate intervals that overlap: what is hard for both cancels.
    """
    a, b = _checked(first, "first"), _checked(second, "second")
    if len(a) != len(b):
        raise ValueError(f"{len(a)} first and {len(b)} second scores: expected those of the same items")
    return bootstrap_interval(a - b, clusters=clusters, confidence=confidence, resamples=resamples, seed=seed)


def _checked(scores: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(scores, float)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name} of shape {values.shape}: expected one number for each of at least one item")
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"{name}[{bad}]={values[bad]}: expected finite numbers")
    return values
