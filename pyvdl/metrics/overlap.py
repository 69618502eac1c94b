"""BLEU and ROUGE-L as the caption-evaluation tools report them beside CIDEr, on tokens of the same tokenizer."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from .cider import tokenized

MAX_N: Final = 4
BETA: Final = 1.2  # of ROUGE-L: how much more recall counts
_TINY, _SMALL = 1e-15, 1e-9  # what those tools add, so that nothing is divided by zero


@dataclass(frozen=True)
class BleuScore:
    """`score` has BLEU-1 to BLEU-4 of the whole set, which is no mean over items. `counts` int64[N, 2 + 2 * 4] are
    what it is made from, see `bleu_of_counts`."""

    score: tuple[float, float, float, float]
    counts: np.ndarray


@dataclass(frozen=True)
class RougeScore:
    """`score` is the mean of `per_item` float64[N]."""

    score: float
    per_item: np.ndarray


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: bool = True) -> BleuScore:
    """BLEU with n-grams of one size to four, the brevity penalty by the reference closest in length (of two the
    shorter). Arguments as for `cider`."""
    texts, found = tokenized(hypotheses, references, tokenize)
    counts = np.array([_bleu_counts(words, others) for words, others in zip(texts, found)], np.int64)
    return BleuScore(bleu_of_counts(counts), counts)


def bleu_of_counts(counts: np.ndarray) -> tuple[float, float, float, float]:
    """BLEU-1 to 4 of int[N, 10]: of each item its length, that of its closest reference, n-grams right, and n-grams."""
    totals = counts.sum(0).astype(float)
    right, all_ = totals[2 : 2 + MAX_N], totals[2 + MAX_N :]
    precision = np.exp(np.cumsum(np.log((right + _TINY) / (all_ + _SMALL))) / np.arange(1, MAX_N + 1))
    ratio = (totals[0] + _TINY) / (totals[1] + _SMALL)
    one, two, three, four = (precision * (np.exp(1 - 1 / ratio) if ratio < 1 else 1.0)).tolist()
    return one, two, three, four


def rouge_l(hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: bool = True) -> RougeScore:
    """F-measure of the longest common subsequence; best precision and best recall may be of two references."""
    texts, found = tokenized(hypotheses, references, tokenize)
    per_item = np.array([_rouge(words, others) for words, others in zip(texts, found)])
    return RougeScore(float(per_item.mean()), per_item)


def _bleu_counts(words: list[str], references: list[list[str]]) -> list[int]:
    lengths = [len(reference) for reference in references]
    closest = min((abs(length - len(words)), length) for length in lengths)[1]
    right, all_ = [], []
    for n in range(1, MAX_N + 1):
        most: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            most |= _grams(reference, n)
        right.append((_grams(words, n) & most).total())
        all_.append(max(0, len(words) - n + 1))
    return [len(words), closest, *right, *all_]


def _grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n))))


def _rouge(words: list[str], references: list[list[str]]) -> float:
    common = [_common(words, reference) for reference in references]
    precision = max(found / max(1, len(words)) for found in common)
    recall = max(found / max(1, len(reference)) for found, reference in zip(common, references))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence."""
    best = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for i, other in enumerate(second, 1):
            diagonal, best[i] = best[i], diagonal + 1 if word == other else max(best[i], best[i - 1])
    return best[-1]
