"""What a set of captions looks like: how long they are and how many different words they use."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .ptb import ptb_tokenize
from .tagging import tag_words
from .wordnet import wordnet


@dataclass(frozen=True)
class CaptionStatistics:
    """Counts over `captions` captions. Numbers of different words grow with that number: compare sets of equal size."""

    captions: int
    tokens: int
    mean_length: float
    vocabulary: int
    unique_nouns: int
    unique_verbs: int


def caption_statistics(
    captions: Sequence[str],
    *,
    lemmas: bool = True,
    punctuation: bool = False,
    sample_size: int | None = None,
    seed: int = 0,
) -> CaptionStatistics:
    """Counts tokens, and nouns and verbs by WordNet and a small tagger of our own (not spaCy, which papers use).

    Nouns and verbs are those that WordNet lists; auxiliaries are not counted, and names are nouns where it lists them.

    Args:
        captions: the captions, one string each.
        lemmas: True counts run, runs and ran as one word in `unique_nouns` and `unique_verbs`, False as three.
        punctuation: whether marks count as tokens.
        sample_size: take so many captions at random (without repetition), to compare sets of different sizes.
        seed: of that sample.
    """
    if isinstance(captions, str) or len(captions) == 0:
        raise ValueError(f"captions={captions!r}: expected a sequence of at least one string")
    chosen = captions
    if sample_size is not None:
        if not 1 <= sample_size <= len(captions):
            raise ValueError(f"sample_size={sample_size}: expected 1 to {len(captions)}, the number of captions")
        picks = np.random.default_rng(seed).choice(len(captions), sample_size, replace=False)
        chosen = [captions[i] for i in picks]
    database = wordnet()
    num_tokens = 0
    vocabulary: set[str] = set()
    nouns: set[str] = set()
    verbs: set[str] = set()
    for caption in chosen:
        tokens = ptb_tokenize(caption, punctuation=punctuation)
        num_tokens += len(tokens)
        vocabulary.update(tokens)
        for tagged in tag_words(tokens):
            if tagged.pos in ("n", "v") and database.offsets(tagged.lemma, tagged.pos):
                (nouns if tagged.pos == "n" else verbs).add(tagged.lemma if lemmas else tagged.word)
    return CaptionStatistics(
        captions=len(chosen),
        tokens=num_tokens,
        mean_length=num_tokens / len(chosen),
        vocabulary=len(vocabulary),
        unique_nouns=len(nouns),
        unique_verbs=len(verbs),
    )
