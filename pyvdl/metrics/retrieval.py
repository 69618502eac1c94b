"""Ranks: retrieval recall in both directions and zero-shot top-k, with ties decided by an explicit rule."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np

Ties = Literal["strict", "loose", "expected"]
_CHUNK_ELEMENTS: Final = 1 << 22  # similarity entries compared at once; bounds the memory of the comparisons


@dataclass(frozen=True)
class Ahead:
    """Of each of Q queries, int64[Q] each: candidates above the best right one, those equal to it, and the right ones
    among these."""

    above: np.ndarray
    equal: np.ndarray
    right: np.ndarray


@dataclass(frozen=True)
class RankingScores:
    """How early each query finds a right candidate. Fractions of 1 (papers print x100); ranks count from 1.

    `at[k]` is the mean of `per_query[k]` float64[Q] (0 or 1, or in between where ties are counted by expectation).
    `median_rank` is numpy's: the mean of the two middle ranks for an even number of queries.
    """

    at: dict[int, float]
    per_query: dict[int, np.ndarray]
    ranks: np.ndarray  # float64[Q], of the best right candidate
    median_rank: float
    mean_rank: float


def recall_at_k(
    similarity: np.ndarray,
    *,
    ks: Sequence[int] = (1, 5, 10),
    query_groups: Sequence[int] | np.ndarray | None = None,
    candidate_groups: Sequence[int] | np.ndarray | None = None,
    pool_candidates: bool = False,
    ties: Ties = "strict",
) -> RankingScores:
    """Ranks candidates by similarity; a query is found when a candidate of its own group is among the first k.

    Args:
        similarity: float[Q, C], larger is closer. Pass the transpose for the other direction.
        ks: cut-offs.
        query_groups, candidate_groups: int[Q], int[C], by default 0, 1, 2, ... With several captions a video,
            text to video takes `query_groups=video_of_caption`, video to text `candidate_groups=video_of_caption`.
        pool_candidates: False ranks every candidate (the best of the own group counts); True first reduces each group
            of candidates to its maximum and ranks groups.
        ties: "strict" lets every candidate with an equal score stand ahead of the right one (a constant model scores
            0), "loose" lets it stand behind (a constant model scores 1), "expected" averages over random orders.
    """
    ahead = count_ahead(similarity, query_groups, candidate_groups, pool_candidates=pool_candidates)
    return rank(ahead, ks=ks, ties=ties)


def top_k_accuracy(
    scores: np.ndarray, labels: Sequence[int] | np.ndarray, *, ks: Sequence[int] = (1, 5), ties: Ties = "strict"
) -> RankingScores:
    """Classification: a sample is right at k when its label is among the k best classes.

    Args:
        scores: float[N, C], larger is more likely.
        labels: int[N] in [0, C).
        ks, ties: as in `recall_at_k`.
    """
    scores = _checked_scores(scores, "scores")
    wanted = checked_groups(labels, len(scores), "labels")
    outside = wanted[(wanted < 0) | (wanted >= scores.shape[1])]
    if outside.size:
        raise ValueError(f"label {outside[0]}: expected 0 to {scores.shape[1] - 1}")
    return rank(count_ahead(scores, wanted), ks=ks, ties=ties)


def _checked_scores(scores: np.ndarray, name: str) -> np.ndarray:
    scores = np.asarray(scores)
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"{name} of shape {scores.shape}: expected a matrix with at least one row and one column")
    bad = np.argwhere(np.isnan(scores))
    if len(bad):
        raise ValueError(f"{name}[{bad[0, 0]}, {bad[0, 1]}] is NaN ({len(bad)} in all): expected numbers")
    return scores


def checked_groups(groups: Sequence[int] | np.ndarray | None, length: int, name: str) -> np.ndarray:
    """int[length], 0, 1, 2, ... for None."""
    if groups is None:
        return np.arange(length)
    found = np.asarray(groups)
    if found.shape != (length,) or found.dtype.kind not in "iu":
        raise ValueError(f"{name} of shape {found.shape} and type {found.dtype}: expected {length} integers")
    return found


def check_offered(wanted: np.ndarray, offered: np.ndarray) -> None:
    """ValueError where a query's group has no candidate."""
    missing = np.flatnonzero(~np.isin(wanted, offered))
    if len(missing):
        raise ValueError(f"query {missing[0]} of group {wanted[missing[0]]}: no candidate belongs to that group")


def count_ahead(
    similarity: np.ndarray,
    query_groups: Sequence[int] | np.ndarray | None = None,
    candidate_groups: Sequence[int] | np.ndarray | None = None,
    *,
    pool_candidates: bool = False,
) -> Ahead:
    """What ranks are made of, by any rule for ties; arguments as for `recall_at_k`."""
    scores = _checked_scores(similarity, "similarity")
    num_queries, num_candidates = scores.shape
    wanted = checked_groups(query_groups, num_queries, "query_groups")
    offered = checked_groups(candidate_groups, num_candidates, "candidate_groups")
    check_offered(wanted, offered)
    if pool_candidates:
        order = np.argsort(offered, kind="stable")
        offered, starts = np.unique(offered[order], return_index=True)
        scores = np.maximum.reduceat(scores[:, order], starts, axis=1)
    above, equal, right = (np.empty(len(scores), np.int64) for _ in range(3))
    step = max(1, _CHUNK_ELEMENTS // scores.shape[1])
    for start in range(0, len(scores), step):
        rows = slice(start, start + step)
        own = wanted[rows, None] == offered[None, :]
        best = np.max(np.where(own, scores[rows], -np.inf), axis=1, keepdims=True)
        level = scores[rows] == best
        above[rows] = (scores[rows] > best).sum(1)
        equal[rows] = level.sum(1)
        right[rows] = (level & own).sum(1)
    return Ahead(above, equal, right)


def rank(ahead: Ahead, *, ks: Sequence[int] = (1, 5, 10), ties: Ties = "strict") -> RankingScores:
    """Ranks by one rule for ties; arguments as for `recall_at_k`."""
    if ties not in get_args(Ties):
        raise ValueError(f"ties={ties!r}: expected one of {get_args(Ties)}")
    for k in ks:
        if k < 1:
            raise ValueError(f"k={k}: expected a positive number")
    above, equal, right = ahead.above, ahead.equal, ahead.right
    if ties == "strict":
        ranks = (above + equal - right + 1).astype(float)
    elif ties == "loose":
        ranks = above + 1.0
    else:
        ranks = above + (equal + 1) / (right + 1)
    if ties == "expected":
        per_query = {k: _chance_of_hit(above, equal, right, k) for k in ks}
    else:
        per_query = {k: (ranks <= k).astype(float) for k in ks}
    at = {k: float(hits.mean()) for k, hits in per_query.items()}
    return RankingScores(at, per_query, ranks, float(np.median(ranks)), float(ranks.mean()))


def _chance_of_hit(above: np.ndarray, equal: np.ndarray, right: np.ndarray, k: int) -> np.ndarray:
    """Returns float64[Q]: the chance that, of `equal` tied candidates, one of the `right` falls within the first k."""
    places = np.clip(k - above, 0, equal)
    miss = np.ones(len(above))
    for drawn in range(int(places.max(initial=0))):
        wrong_left = np.maximum(equal - right - drawn, 0)
        miss *= np.where(drawn < places, wrong_left / np.maximum(equal - drawn, 1), 1.0)
    return 1.0 - miss
