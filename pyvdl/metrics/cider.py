"""CIDEr-D as the caption-evaluation tools report it (there called CIDEr): n = 1 to 4, sigma = 6, clipped, times 10."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from .ptb import ptb_tokenize

MAX_N: Final = 4
SIGMA: Final = 6.0


@dataclass(frozen=True)
class CiderScore:
    """`score` is the mean of `per_item` float64[N]. Papers print it x100: 0.482 here is their 48.2."""

    score: float
    per_item: np.ndarray


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many of `num_items` items the references hold an n-gram (n = 1 to 4). What is not in `counts` counts 0."""

    counts: Mapping[tuple[str, ...], int]
    num_items: int


def cider(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenize: bool = True,
    document_frequencies: DocumentFrequencies | None = None,
) -> CiderScore:
    """Scores one hypothesis per item against that item's references.

    Args:
        hypotheses: N captions.
        references: for each item its human captions, at least one; their number may differ.
        tokenize: False takes the texts as already tokenized, words parted by white space.
        document_frequencies: None takes them from `references`, as every published figure does (one item alone then
            scores 0, since every idf is 0). Give those of a larger set to score a few items on its scale.
    """
    hypothesis_words, reference_words = tokenized(hypotheses, references, tokenize)
    num_items = len(hypothesis_words)
    counts = np.array([len(texts) for texts in reference_words])
    item_of_reference = np.repeat(np.arange(num_items), counts)
    # Texts in one row: hypothesis i is text i, the references follow.
    grams = _count_grams(hypothesis_words + [words for texts in reference_words for words in texts])
    item_of_text = np.concatenate([np.arange(num_items), item_of_reference])
    log_items = np.log(float(num_items if document_frequencies is None else document_frequencies.num_items))
    bigrams_of_text = np.bincount(grams[1].text, grams[1].count, len(item_of_text))
    length_gap = bigrams_of_text[item_of_reference] - bigrams_of_text[num_items:]
    penalty = np.exp(-(length_gap**2) / (2 * SIGMA**2))
    total = np.zeros(len(item_of_reference))
    for gram in grams:
        if document_frequencies is None:
            frequency = _item_counts(gram, item_of_text, num_items)
        else:
            frequency = np.array([document_frequencies.counts.get(key, 0) for key in gram.spelled()], float)
        weight = gram.count * (log_items - np.log(np.maximum(1.0, frequency)))[gram.gram]
        norm = np.sqrt(np.bincount(gram.text, weight**2, len(item_of_text)))
        similarity = _clipped_products(gram, weight, item_of_text, num_items)
        product = norm[item_of_reference] * norm[num_items:]
        total += np.divide(similarity, product, out=np.zeros_like(similarity), where=product != 0)
    mean_over_references = np.bincount(item_of_reference, total * penalty / MAX_N, num_items) / counts
    per_item = 10.0 * mean_over_references
    return CiderScore(float(per_item.mean()), per_item)


def document_frequencies(references: Sequence[Sequence[str]], *, tokenize: bool = True) -> DocumentFrequencies:
    """Counts n-grams over the references of a whole set, for `cider(..., document_frequencies=...)`."""
    words = _reference_words(references, tokenize)
    item_of_text = np.repeat(np.arange(len(words)), [len(texts) for texts in words])
    counts: dict[tuple[str, ...], int] = {}
    for gram in _count_grams([text for texts in words for text in texts]):
        frequency = _item_counts(gram, item_of_text, 0)
        counts.update(zip(gram.spelled(), frequency.tolist()))
    return DocumentFrequencies(counts, len(words))


@dataclass(frozen=True)
class _Grams:
    """All n-grams of one n: for each (text, distinct n-gram) pair, sorted by text, its count."""

    text: np.ndarray  # int64[K]
    gram: np.ndarray  # int64[K]
    count: np.ndarray  # float64[K]
    word_ids: np.ndarray  # int64[G, n], the words of each distinct n-gram
    vocabulary: list[str]

    def spelled(self) -> list[tuple[str, ...]]:
        return [tuple(self.vocabulary[i] for i in row) for row in self.word_ids.tolist()]


def tokenized(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], tokenize: bool
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """The words of each hypothesis and of its references, after checking that they belong together."""
    if isinstance(hypotheses, str):
        raise TypeError(f"hypotheses={hypotheses[:80]!r} is one string: pass a list, [hypothesis] for a single one")
    hypothesis_words = [_words(text, tokenize) for text in hypotheses]
    reference_words = _reference_words(references, tokenize)
    if len(hypothesis_words) != len(reference_words):
        raise ValueError(f"{len(hypothesis_words)} hypotheses for {len(reference_words)} items: expected equal numbers")
    return hypothesis_words, reference_words


def _words(text: str, tokenize: bool) -> list[str]:
    if not isinstance(text, str):
        raise ValueError(f"caption {text!r}: expected a string")
    return ptb_tokenize(text) if tokenize else text.split()


def _reference_words(references: Sequence[Sequence[str]], tokenize: bool) -> list[list[list[str]]]:
    if isinstance(references, str):
        raise TypeError(f"references={references[:80]!r} is one string: pass a list of captions for each item")
    if len(references) == 0:
        raise ValueError("0 items: expected at least one")
    for i, texts in enumerate(references):
        if isinstance(texts, str) or len(texts) == 0:
            raise ValueError(f"references[{i}]={texts!r}: expected a sequence of at least one caption")
    return [[_words(text, tokenize) for text in texts] for texts in references]


def _count_grams(texts: list[list[str]]) -> list[_Grams]:
    """Counts the n-grams of every text, n = 1 to 4, by numbering them: an n-gram is an (n-1)-gram and a word."""
    number: dict[str, int] = {}
    word = np.array([number.setdefault(word, len(number)) for text in texts for word in text], np.int64)
    vocabulary = list(number)
    lengths = np.array([len(text) for text in texts], np.int64)
    text = np.repeat(np.arange(len(texts)), lengths)
    words_left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(word))  # in the text, this one included
    gram_at, word_ids = word, np.arange(len(vocabulary))[:, None]
    result = []
    for n in range(1, MAX_N + 1):
        here = np.flatnonzero(words_left >= n)
        if n > 1:
            pairs, inverse = np.unique(gram_at[here] * len(vocabulary) + word[here + n - 1], return_inverse=True)
            previous, last = np.divmod(pairs, max(1, len(vocabulary)))
            word_ids = np.concatenate([word_ids[previous], last[:, None]], axis=1)
            gram_at = np.zeros(len(word), np.int64)
            gram_at[here] = inverse
        num_grams = max(1, len(word_ids))
        keys, count = np.unique(text[here] * num_grams + gram_at[here], return_counts=True)
        result.append(_Grams(*np.divmod(keys, num_grams), count.astype(float), word_ids, vocabulary))
    return result


def _item_counts(grams: _Grams, item_of_text: np.ndarray, first_reference: int) -> np.ndarray:
    """Returns float64[G]: in how many items a reference has the n-gram. References start at text `first_reference`."""
    num_grams = max(1, len(grams.word_ids))
    kept = grams.text >= first_reference
    pairs = np.unique(item_of_text[grams.text[kept]] * num_grams + grams.gram[kept])
    return np.bincount(pairs % num_grams, minlength=len(grams.word_ids)).astype(float)


def _clipped_products(grams: _Grams, weight: np.ndarray, item_of_text: np.ndarray, num_items: int) -> np.ndarray:
    """Returns float64[R]: for each reference, the sum over shared n-grams of min(hypothesis, reference) * reference."""
    num_references = len(item_of_text) - num_items
    num_grams = max(1, len(grams.word_ids))
    split = np.searchsorted(grams.text, num_items)  # hypotheses come first, and the pairs are sorted by text
    if split == 0 or split == len(weight):
        return np.zeros(num_references)
    hypothesis_key = grams.text[:split] * num_grams + grams.gram[:split]
    wanted = item_of_text[grams.text[split:]] * num_grams + grams.gram[split:]
    at = np.minimum(np.searchsorted(hypothesis_key, wanted), split - 1)
    shared = hypothesis_key[at] == wanted
    product = np.where(shared, np.minimum(weight[at], weight[split:]) * weight[split:], 0.0)
    return np.bincount(grams.text[split:] - num_items, product, num_references)
