"""WUPS, the soft word match of open-ended question answering, by the rules of NExT-OE.

From equally prepared strings the scores are those of its own code with today's NLTK. From raw answers they are not its
published ones, since the preparing chain is ours: for the validation answers it provides (model HGA) this gives 20.6,
its table 21.5. Compare systems scored by one tool.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from .answers import Answers, paired_references
from .preparing import prepare_answer
from .wordnet import WordNet, wordnet

QUESTION_TYPES: Final = ("CW", "CH", "TN", "TC", "TP", "DB", "DC", "DL", "DO")
_EXACT_TYPES: Final = ("DB", "DC")  # yes or no, and counts: nothing is half right
_FAMILIES: Final = {"C": "causal", "T": "temporal", "D": "descriptive"}


@dataclass(frozen=True)
class WupsScore:
    """`score` is the mean of `per_item` float64[N]; papers print it x100. Where question types were given, `by_type`
    has the means of NExT-OE's types (TP counted as TN, as there), `by_family` those of the three families."""

    score: float
    per_item: np.ndarray
    by_type: dict[str, float]
    by_family: dict[str, float]


def wups(
    predictions: Sequence[str],
    answers: Answers,
    *,
    alpha: float = 0.0,
    types: Sequence[str] | None = None,
    prepare: bool = True,
) -> WupsScore:
    """Scores predicted answers by the Wu-Palmer similarity of their words, for each the best over its references.

    In each direction every word is matched with the most similar one; words that match nothing are skipped; the product
    of the rest is the direction's score, 0 where nothing is left; the lower of both directions is the answer's score.

    Args:
        predictions: N answers.
        answers: for each question one answer or several.
        alpha: similarities below it count a tenth. Published figures have 0.
        types: NExT-OE's question types; "DB" and "DC" are scored by equality. None scores all by similarity.
        prepare: False takes all strings as prepared, words parted by white space; True applies `prepare_answer`.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: expected a number from 0 to 1")
    references = paired_references(predictions, answers)
    if types is not None:
        if len(types) != len(predictions):
            raise ValueError(f"{len(types)} types for {len(predictions)} predictions: expected equal numbers")
        for i, found in enumerate(types):
            if found not in QUESTION_TYPES:
                raise ValueError(f"types[{i}]={found!r}: expected one of {QUESTION_TYPES}")
    database = wordnet()
    cleaned = prepare_answer if prepare else str
    per_item = np.empty(len(predictions))
    for i, (prediction, texts) in enumerate(zip(predictions, references)):
        words = cleaned(prediction).split()
        candidates = [cleaned(text).split() for text in texts]
        if types is not None and types[i] in _EXACT_TYPES:
            per_item[i] = float(words in candidates)
        else:
            per_item[i] = max(_score(words, candidate, alpha, database) for candidate in candidates)
    merged = ["TN" if found == "TP" else found for found in types or ()]
    by_type = _means(merged, per_item)
    by_family = _means([_FAMILIES[found[0]] for found in merged], per_item)
    return WupsScore(float(per_item.mean()), per_item, by_type, by_family)


def _means(labels: Sequence[str], scores: np.ndarray) -> dict[str, float]:
    found = np.array(labels)
    return {label: float(scores[found == label].mean()) for label in dict.fromkeys(labels)}


def _score(first: Sequence[str], second: Sequence[str], alpha: float, database: WordNet) -> float:
    return min(_direction(first, second, alpha, database), _direction(second, first, alpha, database))


def _direction(words: Sequence[str], others: Sequence[str], alpha: float, database: WordNet) -> float:
    best = (max(_damped(database.similarity(word, other), alpha) for other in others) for word in words if others)
    return _product(value for value in best if value > 0)


def _damped(similarity: float, alpha: float) -> float:
    return similarity if similarity >= alpha else 0.1 * similarity


def _product(values: Iterable[float]) -> float:
    """The product; 0 of nothing."""
    result, found = 1.0, False
    for value in values:
        result, found = result * value, True
    return result if found else 0.0
