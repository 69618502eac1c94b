"""Ranks of embeddings: retrieval in both directions, and zero-shot classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pyvdl import metrics
from pyvdl.evaluate.blocks import broken, count_ahead_in_blocks
from pyvdl.evaluate.scores import Interval

Direction = Literal["t2v", "v2t"]
RECALL_AT = (1, 5, 10)
_SLOW_RESAMPLES = 500  # for medians, which have no fast path


@dataclass(frozen=True, kw_only=True)
class RetrievalScores:
    """Both directions: "R@1", "R@5", "R@10" in percent, "median_rank" and "mean_rank" counted from 1."""

    t2v: dict[str, float]
    v2t: dict[str, float]
    intervals: dict[str, dict[str, Interval]]  # by direction, then as above
    t2v_ranks: np.ndarray  # float64 of each text, from 1
    v2t_ranks: np.ndarray  # float64 of each video that has texts; a failed one ranks last
    failed: int  # videos


@dataclass(frozen=True, kw_only=True)
class ZeroShotScores:
    """Accuracy of the nearest class embeddings."""

    top1: float
    top5: float
    intervals: dict[str, Interval]  # "top1", "top5"
    predictions: np.ndarray  # int64[N], -1 for a failed clip
    failed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """N videos and M texts: their embeddings, or all similarities of both."""

    owners: np.ndarray  # int[M], the video that each text describes
    videos: np.ndarray | None = None  # float32[N, E], NaN rows failed
    texts: np.ndarray | None = None  # float32[M, E]
    similarity: np.ndarray | None = None  # float[M, N]

    @property
    def failed(self) -> np.ndarray:
        """bool[N]."""
        if self.videos is None:
            assert self.similarity is not None
            return np.zeros(self.similarity.shape[1], bool)
        return broken(self.videos)

    @property
    def asked(self) -> np.ndarray:
        """int[Q]: the videos that have texts, the queries of "v2t"."""
        return np.unique(self.owners)

    def some(self, texts: np.ndarray) -> Pairs:
        """The same videos with these of the texts."""
        return Pairs(
            owners=self.owners[texts],
            videos=self.videos,
            texts=None if self.texts is None else self.texts[texts],
            similarity=None if self.similarity is None else self.similarity[texts],
        )

    def ahead(self, direction: Direction, pool: bool = False) -> metrics.Ahead:
        """What the ranks of a direction are made of; `pool`: for a video, another counts once, by its best text."""
        groups = (self.owners, None) if direction == "t2v" else (self.asked, self.owners)
        if self.similarity is not None:
            matrix = self.similarity if direction == "t2v" else self.similarity.T[self.asked]
            return metrics.count_ahead(matrix, *groups, pool_candidates=pool)
        assert self.videos is not None
        assert self.texts is not None
        sides = (self.texts, self.videos) if direction == "t2v" else (self.videos[self.asked], self.texts)
        return count_ahead_in_blocks(*sides, *groups, pool_candidates=pool)


def evaluate_retrieval(
    video_embeddings: np.ndarray,
    text_embeddings: np.ndarray,
    *,
    video_of_text: np.ndarray | None = None,
    ties: metrics.Ties = "strict",
    seed: int = 0,
) -> RetrievalScores:
    """Recall and ranks in both directions.

    video_embeddings: float32[N, E], NaN rows failed. text_embeddings: float32[M, E]. video_of_text: int[M], the video
    each text describes (None: text i describes video i). A video with several texts finds the best of them.
    ties: "strict" counts what is equally near as ahead, see `pyvdl.metrics.recall_at_k`.
    """
    videos, texts = len(video_embeddings), len(text_embeddings)
    if video_of_text is None:
        if videos != texts:
            raise ValueError(f"{videos} videos and {texts} texts do not pair up one to one: pass video_of_text")
        video_of_text = np.arange(videos)
    pairs = Pairs(owners=np.asarray(video_of_text), videos=video_embeddings, texts=text_embeddings)
    found = {}
    values: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, Interval]] = {}
    for direction in ("t2v", "v2t"):
        ahead = pairs.ahead(direction)
        values[direction], intervals[direction], found[direction] = direction_scores(
            pairs, direction, ahead, ties=ties, seed=seed
        )
    return RetrievalScores(
        t2v=values["t2v"],
        v2t=values["v2t"],
        intervals=intervals,
        t2v_ranks=found["t2v"],
        v2t_ranks=found["v2t"],
        failed=int(pairs.failed.sum()),
    )


def direction_scores(
    pairs: Pairs, direction: Direction, ahead: metrics.Ahead, *, ties: metrics.Ties, seed: int = 0
) -> tuple[dict[str, float], dict[str, Interval], np.ndarray]:
    """Values and intervals by name, and the ranks; a query of a failed video is a miss at every rank."""
    video = pairs.owners if direction == "t2v" else pairs.asked
    scores = metrics.rank(ahead, ks=RECALL_AT, ties=ties)
    each = {f"R@{k}": 100 * hit * ~pairs.failed[video] for k, hit in scores.per_query.items()}
    each["mean_rank"] = scores.ranks
    values = {name: float(numbers.mean()) for name, numbers in each.items()} | {"median_rank": scores.median_rank}
    intervals = {name: metrics.bootstrap_interval(x, clusters=video, seed=seed) for name, x in each.items()}
    intervals["median_rank"] = metrics.bootstrap_interval(
        scores.ranks, statistic=_median, clusters=video, resamples=_SLOW_RESAMPLES, seed=seed
    )
    return values, intervals, scores.ranks


def _median(ranks: np.ndarray) -> float:
    return float(np.median(ranks))


def evaluate_zero_shot(
    video_embeddings: np.ndarray, class_embeddings: np.ndarray, labels: np.ndarray | Sequence[int], *, seed: int = 0
) -> ZeroShotScores:
    """Top-1 and top-5 accuracy: float32[N, E] (NaN rows failed) against float32[C, E], labels int[N]."""
    bad = broken(video_embeddings)
    similarity = np.where(bad[:, None], 0, video_embeddings) @ class_embeddings.T
    return score_classes(similarity, labels, failed=bad, seed=seed)


def score_classes(
    similarity: np.ndarray, labels: np.ndarray | Sequence[int], *, failed: np.ndarray | None = None, seed: int = 0
) -> ZeroShotScores:
    """The same of similarities float[N, C]; `failed` bool[N] are misses."""
    bad = np.zeros(len(similarity), bool) if failed is None else failed
    scores = metrics.top_k_accuracy(similarity, labels, ks=(1, 5))
    hits = {f"top{k}": 100 * hit * ~bad for k, hit in scores.per_query.items()}
    return ZeroShotScores(
        **{name: float(hit.mean()) for name, hit in hits.items()},
        intervals={name: metrics.bootstrap_interval(hit, seed=seed) for name, hit in hits.items()},
        predictions=np.where(bad, -1, similarity.argmax(1)),
        failed=int(bad.sum()),
    )
