"""Exact match of answers, and how answers with one or several references are given."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Answers = Sequence[str | Sequence[str]]  # of each question one answer, or several of which any will do


@dataclass(frozen=True)
class ExactMatchScore:
    """Shares of answers met. `score` compares the strings as they are (as PaLI's evaluation does: the headline figure),
    `normalised` after lower-casing and stripping white space; both with their bool[N] per item."""

    score: float
    normalised: float
    per_item: np.ndarray
    per_item_normalised: np.ndarray


def exact_match(predictions: Sequence[str], answers: Answers) -> ExactMatchScore:
    """Compares each predicted answer with the question's answer, or with any of its answers."""
    references = paired_references(predictions, answers)
    raw = np.array([text in texts for text, texts in zip(predictions, references)])
    normalised = np.array([_normalise(text) in map(_normalise, texts) for text, texts in zip(predictions, references)])
    return ExactMatchScore(float(raw.mean()), float(normalised.mean()), raw, normalised)


def paired_references(predictions: Sequence[str], answers: Answers) -> list[tuple[str, ...]]:
    """The answers of each prediction as a tuple, after checking that they belong together."""
    for name, texts in (("predictions", predictions), ("answers", answers)):
        if isinstance(texts, str):
            raise TypeError(f"{name}={texts[:80]!r} is one string: pass a list, [text] for a single one")
    if len(predictions) != len(answers):
        raise ValueError(f"{len(predictions)} predictions for {len(answers)} answers: expected equal numbers")
    if len(predictions) == 0:
        raise ValueError("0 predictions: expected at least one")
    references = [(found,) if isinstance(found, str) else tuple(found) for found in answers]
    for i, (prediction, texts) in enumerate(zip(predictions, references)):
        if not isinstance(prediction, str):
            raise ValueError(f"predictions[{i}]={prediction!r}: expected a string")
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"answers[{i}]={answers[i]!r}: expected a string or a sequence of at least one string")
    return references


def _normalise(text: str) -> str:
    return text.strip().lower()
