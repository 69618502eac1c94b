"""What a test comes to: scores with intervals, counts, and the words of a score file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np

from pyvdl import metrics
from pyvdl.benchmarks import BY_NAME, Table, Task
from pyvdl.metrics import bootstrap_interval

_PACKAGES = ("pyvdl", "jax", "numpy", "wn", "nltk")


class Score(NamedTuple):
    """In percent points, or a rank from 1; with the 95% bootstrap interval."""

    value: float
    low: float
    high: float


def mean_score(points: np.ndarray, owner: np.ndarray | None = None, seed: int = 0) -> Score:
    """The mean of float64[N], and its interval over clips: `owner` int[N] is the clip of each."""
    return Score(float(points.mean()), *bootstrap_interval(points, clusters=owner, seed=seed))


@dataclass(frozen=True, kw_only=True)
class Result:
    """One test of one system."""

    task: Task
    metrics: tuple[str, ...]  # names in `pyvdl.metrics.DEFINITIONS`
    scores: dict[str, Score]  # in the order of print
    counts: dict[str, int]
    more: dict[str, Score] = field(default_factory=dict)  # for the score file alone
    rows: list[dict[str, Any]] = field(default_factory=list)  # of a text task: predictions with their scores
    benchmark: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        paper = {} if self.benchmark is None else BY_NAME[self.benchmark].paper
        source = {} if not paper or self.benchmark is None else {"paper_source": BY_NAME[self.benchmark].source}
        return {
            "benchmark": self.benchmark,
            "task": self.task,
            "options": self.options,
            "counts": self.counts,
            "metrics": {name: metrics.DEFINITIONS[name] for name in self.metrics},
            "scores": {name: score._asdict() for name, score in (self.scores | self.more).items()},
            "paper": dict(paper),
        } | source


def score_file(results: Sequence[Result], left_out: Mapping[str, str], seed: int) -> dict[str, Any]:
    """What is written of several tests."""
    return {
        "versions": _versions(),
        "interval": {
            "share": 0.95,
            "method": "percentile bootstrap over clips",
            "resamples": "2000; 500 of medians and BLEU",
            "seed": seed,
        },
        "results": [result.to_json() for result in results],
        "left_out": dict(left_out),
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def filled(table: Table, results: Sequence[Result]) -> list[list[Any]]:
    """The rows of the paper's table and ours beneath, None where there is no figure."""
    ours = {result.benchmark: result.scores for result in results}
    mine = [
        ours[benchmark][score].value if benchmark in ours and score in ours[benchmark] else None
        for _, benchmark, score in table.columns
    ]
    return [*([name, *figures] for name, figures in table.rows), ["ours", *mine]]
