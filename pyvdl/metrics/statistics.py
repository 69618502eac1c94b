"""What a set of captions looks like: how long they are and how many different words they use."""

import random
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass

from .taggers import Tagger, WordNetTagger


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
    captions: Iterable[str],
    *,
    tagger: Tagger | None = None,
    lemmas: bool = True,
    proper_nouns: bool = False,
    punctuation: bool = False,
    sample_size: int | None = None,
    seed: int = 0,
) -> CaptionStatistics:
    """Counts tokens, and different words, nouns and verbs, in memory that grows with these but not with the captions.

    Table 7 of the paper is by spaCy; it does not say by which pipeline, whether forms or lemmas, names and marks count,
    nor how many captions of each set: all that is an argument here.

    Args:
        captions: the captions, one string each. With sample_size they are read twice, unless they have a length.
        tagger: what tells words, nouns and verbs; None is `WordNetTagger()`, which needs no model.
        lemmas: True counts run, runs and ran as one word in `unique_nouns` and `unique_verbs`, False as three.
        proper_nouns: whether names count as nouns; for a tagger that tells them (spaCy).
        punctuation: whether marks count as tokens.
        sample_size: take so many captions at random (without repetition), to compare sets of different sizes.
        seed: of that sample.
    """
    if isinstance(captions, str):
        raise ValueError(f"captions={captions!r}: expected strings, one for each caption")
    tagger = WordNetTagger() if tagger is None else tagger
    if proper_nouns and not tagger.tells_names:
        raise ValueError(f"proper_nouns=True: {tagger.name} does not tell names from other nouns, a SpacyTagger does")
    chosen = captions if sample_size is None else _sample(captions, sample_size, seed)
    num_captions = num_tokens = 0
    vocabulary: set[str] = set()
    nouns: set[str] = set()
    verbs: set[str] = set()
    counted = {"noun": nouns, "verb": verbs} | ({"name": nouns} if proper_nouns else {})
    for tokens in tagger(chosen, punctuation=punctuation):
        num_captions += 1
        num_tokens += len(tokens)
        for word, lemma, kind in tokens:
            vocabulary.add(word)
            if kind in counted:
                if lemmas and not lemma:
                    raise ValueError(
                        f"{tagger.name} gives no lemma of {word!r}: name a pipeline that has a lemmatizer, or count "
                        "forms (lemmas=False)"
                    )
                counted[kind].add(lemma if lemmas else word)
    if num_captions == 0:
        raise ValueError(f"captions={captions!r}: expected at least one string")
    return CaptionStatistics(
        captions=num_captions,
        tokens=num_tokens,
        mean_length=num_tokens / num_captions,
        vocabulary=len(vocabulary),
        unique_nouns=len(nouns),
        unique_verbs=len(verbs),
    )


def _sample(captions: Iterable[str], size: int, seed: int) -> Iterator[str]:
    """`size` of the captions in their order, each set of so many equally likely (Knuth's algorithm S)."""
    if iter(captions) is captions:
        raise ValueError("sample_size: captions that can be read only once cannot be counted before: give a list")
    left = len(captions) if isinstance(captions, Sized) else sum(1 for _ in captions)
    if not 1 <= size <= left:
        raise ValueError(f"sample_size={size}: expected 1 to {left}, the number of captions")
    draw = random.Random(seed).random
    for caption in captions:
        if draw() * left < size:
            yield caption
            size -= 1
        left -= 1
