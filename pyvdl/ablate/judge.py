"""Directions of a table: which of two rows is better, in the paper's figures and in ours, and whether they agree.

Ours is told by the paired bootstrap over the test clips (the same clips for both rows, which cancels what is hard for
both) and by what another seed of the training alone changes: only a difference whose 95% interval leaves out 0, and
that is larger than the change by the seed, has a direction. All else is undecided.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pyvdl.claims import Score
from pyvdl.metrics import bootstrap_difference, bootstrap_interval

from .grids import Grid

Verdict = Literal["agrees", "does not", "undecided"]


@dataclass(frozen=True)
class Items:
    """A score item by item, in percent points."""

    values: np.ndarray  # float64[N]
    clips: np.ndarray | None = None  # int[N], the clip of each; None: one item a clip

    def score(self) -> Score:
        low, high = bootstrap_interval(self.values, clusters=self.clips)
        return Score(float(self.values.mean()), low, high)

    def minus(self, other: Items) -> Score:
        """The difference of the means, with the interval of the paired bootstrap."""
        low, high = bootstrap_difference(self.values, other.values, clusters=self.clips)
        return Score(float(self.values.mean() - other.values.mean()), low, high)

    def to_json(self) -> dict[str, Any]:
        clips = None if self.clips is None else self.clips.tolist()
        return {"values": [round(value, 6) for value in self.values.tolist()], "clips": clips}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Items:
        clips = None if found["clips"] is None else np.array(found["clips"])
        return cls(np.array(found["values"], float), clips)


@dataclass(frozen=True)
class Judged:
    """One direction: the paper has `better` above `worse`."""

    better: str  # keys of rows
    worse: str
    score: str
    paper: tuple[tuple[str, float], ...]  # columns, and how much it is above there; (): told without figures
    told: str | None  # the words it is told by
    ours: Score  # better minus worse
    seed: float  # what another seed alone changes in this score
    verdict: Verdict


def judge(grid: Grid, scores: Mapping[str, Mapping[str, Items]], again: Mapping[str, Items]) -> list[Judged]:
    """The directions of the grid's pairs in each column that has figures of both rows, then those told in words.

    Where the paper's columns of one score disagree on a pair, that has no direction in it.

    scores: of the rows that were run, by row and score; directions of others are left out. again: of the row
    `grid.again`, trained with another seed.
    """
    found: dict[tuple[str, str, str], list[tuple[str, float]]] = {}
    for one, other in grid.pairs:
        for i, column in enumerate(grid.columns):
            first, second = (grid.paper(grid.row(key))[i] for key in (one, other))
            if first is not None and second is not None and first != second and column.score in grid.scores:
                way = (one, other) if first > second else (other, one)
                found.setdefault((*way, column.score), []).append((column.title, abs(first - second)))
    words = {(told.better, told.worse, told.score): told.source for told in grid.told if told.score in grid.scores}
    return [
        _judged(grid, scores, again, way, tuple(found.get(way, ())), words.get(way))
        for way in (*found, *words)
        if {*way[:2]} <= set(scores) and (way[1], way[0], way[2]) not in found
    ]


def _judged(
    grid: Grid,
    scores: Mapping[str, Mapping[str, Items]],
    again: Mapping[str, Items],
    way: tuple[str, str, str],
    paper: tuple[tuple[str, float], ...],
    told: str | None,
) -> Judged:
    better, worse, score = way
    ours = scores[better][score].minus(scores[worse][score])
    seed = abs(float(scores[grid.again][score].values.mean() - again[score].values.mean()))
    return Judged(better, worse, score, paper, told, ours, seed, verdict(ours, seed))


def verdict(ours: Score, seed: float) -> Verdict:
    """Of the difference that the paper has above 0."""
    if ours.low > 0 and ours.value > seed:
        return "agrees"
    if ours.high < 0 and -ours.value > seed:
        return "does not"
    return "undecided"


def summary(judged: Sequence[Judged]) -> str:
    """One sentence on how many directions agree."""
    if not judged:
        return "The paper tells no direction that could be held against these rows."
    counts = Counter(one.verdict for one in judged)
    if len(judged) == 1:
        ends = {"agrees": "agrees", "does not": "does not agree", "undecided": "is undecided"}
        return f"The paper's one direction {ends[judged[0].verdict]} at this size."
    total = f"{len(judged)} directions of the paper"
    agree, against, unsure = (counts[name] for name in ("agrees", "does not", "undecided"))
    agreeing = f"{agree} {'agrees' if agree == 1 else 'agree'} at this size"
    opposed = f"{against} {'does' if against == 1 else 'do'} not"
    return f"Of {total}, {agreeing}, {opposed}, {unsure} {'is' if unsure == 1 else 'are'} undecided."
