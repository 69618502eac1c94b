"""Scores of texts however they were made: captions, answers, chosen options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pyvdl import metrics
from pyvdl.data import Question
from pyvdl.text import split_words

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """Captions of N clips against their references."""

    cider: float  # CIDEr-D x100
    interval: Interval  # (low, high) of `cider`
    per_item: np.ndarray  # float64[N], x100
    captions: list[str]  # "" for a failed clip
    mean_length: float  # words
    failed: int


@dataclass(frozen=True, kw_only=True)
class QuestionScores:
    """Answers to the questions of N clips, in the records' order."""

    exact_match: float
    exact_match_normalised: float  # after lower-casing and stripping
    wups: float  # at 0; by NExT-OE's rules for its types where all questions have one
    intervals: dict[str, Interval]  # by the names of the three fields above
    by_family: dict[str, float]  # exact match
    predictions: list[str]  # "" for a failed clip
    questions: int
    failed: int  # clips


@dataclass(frozen=True, kw_only=True)
class ChoiceScores:
    """Options chosen for the questions of N clips, in the records' order."""

    accuracy: float
    interval: Interval
    predictions: np.ndarray  # int64[Q], -1 for a failed clip
    per_question: np.ndarray  # float64[Q], 0 or 100
    failed: int  # clips


def score_captions(
    captions: list[str], references: Sequence[Sequence[str]], failed: int = 0, seed: int = 0
) -> CaptionScores:
    """Scores one caption a clip; `seed` is that of the bootstrap."""
    scores = metrics.cider(captions, references)
    return CaptionScores(
        cider=100 * scores.score,
        interval=metrics.bootstrap_interval(100 * scores.per_item, seed=seed),
        per_item=100 * scores.per_item,
        captions=captions,
        mean_length=float(np.mean([len(split_words(text)) for text in captions])),
        failed=failed,
    )


def score_answers(
    predictions: list[str],
    answers: Sequence[str | Sequence[str]],
    families: Sequence[str | None],
    owner: np.ndarray,
    failed: int = 0,
    seed: int = 0,
    types: Sequence[str | None] | None = None,
) -> QuestionScores:
    """Scores answers; of each question one is right, or any of several. `owner` int[Q] is the clip of each question
    (for the bootstrap), `types` are the data set's own."""
    per_question = answer_points(predictions, answers, types)
    del per_question["wups_09"]
    family = np.array(families, dtype=object)
    return QuestionScores(
        **{name: float(values.mean()) for name, values in per_question.items()},
        intervals={
            name: metrics.bootstrap_interval(values, clusters=owner, seed=seed) for name, values in per_question.items()
        },
        by_family={
            f: float(per_question["exact_match"][family == f].mean()) for f in sorted(filter(None, set(families)))
        },
        predictions=predictions,
        questions=len(predictions),
        failed=failed,
    )


def answer_points(
    predictions: Sequence[str], answers: Sequence[str | Sequence[str]], types: Sequence[str | None] | None = None
) -> dict[str, np.ndarray]:
    """Of each question float64[Q], 0 to 100: "exact_match", "exact_match_normalised", "wups" and "wups_09"."""
    matches = metrics.exact_match(predictions, answers)
    known = [kind for kind in types or () if kind in metrics.QUESTION_TYPES]
    rules = known if len(known) == len(predictions) else None
    return {
        "exact_match": 100.0 * matches.per_item,
        "exact_match_normalised": 100.0 * matches.per_item_normalised,
        "wups": 100.0 * metrics.wups(predictions, answers, types=rules).per_item,
        "wups_09": 100.0 * metrics.wups(predictions, answers, alpha=0.9, types=rules).per_item,
    }


def score_choices(
    chosen: np.ndarray, questions: Sequence[Question], owner: np.ndarray, failed: int = 0, seed: int = 0
) -> ChoiceScores:
    """Scores options int[Q], -1 for none; `owner` as in `score_answers`."""
    points = 100.0 * np.array([question.correct == choice for question, choice in zip(questions, chosen, strict=True)])
    return ChoiceScores(
        accuracy=float(points.mean()),
        interval=metrics.bootstrap_interval(points, clusters=owner, seed=seed),
        predictions=np.asarray(chosen, np.int64),
        per_question=points,
        failed=failed,
    )


def owners(counts: Sequence[int]) -> np.ndarray:
    """int64[sum of counts]: item i has counts[i] in a row."""
    return np.repeat(np.arange(len(counts)), counts)
