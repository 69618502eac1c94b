"""A small part-of-speech tagger for captions and answers: closed-class words by list, others by WordNet and context.

Each open-class word gets the reading (noun, verb, adjective, adverb) with the largest product of how often its lemma
bears that reading in WordNet's sense-tagged texts, how well the reading follows the word before, and how well the word
after follows it. It needs no model file; it is no match for a trained tagger on long or unusual sentences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from .wordnet import PARTS_OF_SPEECH, PartOfSpeech, wordnet


@dataclass(frozen=True)
class TaggedWord:
    """`pos` is None for closed-class words and marks; `lemma` is the word itself then."""

    word: str
    pos: PartOfSpeech | None
    lemma: str


_CLOSED: Final[dict[str, str]] = {
    word: kind
    for kind, words in {
        "determiner": "a an the this that these those some any each every no another both all half several many much "
        "few more most other such either neither which what",
        "possessive": "my your his her its our their whose",
        "pronoun": "i you he she it we they me him them us who whom himself herself itself themselves myself "
        "yourself ourselves someone somebody something anyone anybody anything everyone everybody "
        "everything nobody nothing none mine yours hers ours theirs there",
        "number": "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
        "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety "
        "hundred thousand million",
        "be": "is are was were be been being am 's 're 'm",
        "auxiliary": "do does did have has had having will would can could shall should may might must ca wo 'll 'd "
        "'ve n't don doesn didn isn aren wasn weren won wouldn couldn shouldn",
        "to": "to",
        "preposition": "of in on at by for from with without into onto over under about around through across along "
        "behind beside besides between among above below beneath near toward towards against during "
        "before after inside outside off up down out upon within past per via until till since amid "
        "amidst amongst atop as than like",
        "conjunction": "and or but nor so yet if because while whilst whereas although though when where whether how "
        "why &",
        "adverb": "not never then next here very too also just only again together away still now soon almost always "
        "often ever even quite rather yes",
    }.items()
    for word in words.split()
}

# How well a reading (noun, verb, adjective, adverb) follows what stands before.
_AFTER: Final[dict[str, tuple[float, float, float, float]]] = {
    "start": (1.0, 2.0, 1.0, 0.5),
    "determiner": (6.0, 0.05, 4.0, 0.3),
    "possessive": (6.0, 0.05, 4.0, 0.1),
    "number": (8.0, 0.1, 2.0, 0.1),
    "pronoun": (0.3, 6.0, 0.5, 1.0),
    "be": (0.5, 0.3, 3.0, 1.0),
    "auxiliary": (0.3, 8.0, 0.3, 1.0),
    "to": (0.6, 4.0, 0.1, 0.3),
    "preposition": (4.0, 0.1, 2.0, 0.2),
    "conjunction": (1.0, 1.0, 1.0, 0.5),
    "adverb": (0.5, 2.0, 2.0, 1.0),
    "mark": (1.0, 1.0, 1.0, 0.5),
    "n": (1.0, 1.0, 0.1, 0.6),
    "v": (1.0, 0.3, 1.0, 1.0),
    "a": (6.0, 0.05, 2.0, 0.1),
    "r": (0.6, 2.0, 2.0, 0.8),
}
# How well what stands behind, where it is a closed-class word, follows a reading.
_BEFORE: Final[dict[str, tuple[float, float, float, float]]] = {
    "determiner": (0.3, 4.0, 0.2, 1.0),
    "possessive": (0.3, 4.0, 0.2, 1.0),
    "pronoun": (0.5, 4.0, 0.2, 1.0),
    "to": (0.7, 1.5, 1.0, 0.7),
}
_COMMON_NOUN: Final = 20  # occurrences in the tagged texts
_EVEN: Final = (1.0, 1.0, 1.0, 1.0)


def tag_words(words: Sequence[str]) -> list[TaggedWord]:
    """Tags one sentence of lower-case words."""
    result: list[TaggedWord] = []
    before = "start"
    for i, word in enumerate(words):
        kind = _kind(word)
        if kind is not None:
            result.append(TaggedWord(word, None, word))
            before = kind
            continue
        after = _kind(words[i + 1]) if i + 1 < len(words) else None
        pos, lemma = _best_reading(word, before, after)
        result.append(TaggedWord(word, pos, lemma))
        before = pos
    return result


def _kind(word: str) -> str | None:
    """The class of a closed-class word or mark; None for open-class words."""
    if word in _CLOSED:
        return _CLOSED[word]
    if not any(letter.isalpha() for letter in word):
        return "number" if any(letter.isdigit() for letter in word) else "mark"
    return None


def _best_reading(word: str, before: str, after: str | None) -> tuple[PartOfSpeech, str]:
    readings = _readings(word)
    follows, leads = _AFTER[before], _BEFORE.get(after or "", _EVEN)
    scores = {}
    for i, pos in enumerate(PARTS_OF_SPEECH):
        if pos not in readings:
            continue
        lemma, count = readings[pos]
        scores[pos] = (count + 0.5) * follows[i] * leads[i] * _form_factor(word, lemma, count, pos, before)
    pos = max(scores, key=scores.__getitem__)
    return pos, readings[pos][0]


def _form_factor(word: str, lemma: str, count: int, pos: PartOfSpeech, before: str) -> float:
    """What the ending says beyond the lemma: participles where a plain verb could not stand, and the like."""
    participle = word.endswith(("ing", "ed", "en")) and word != lemma
    if pos == "v":
        if word.endswith("ing") and word != lemma:
            return {"be": 30.0, "preposition": 20.0, "n": 4.0, "v": 6.0, "determiner": 2.0}.get(before, 2.0)
        if participle:
            return {"be": 20.0, "determiner": 4.0, "n": 4.0}.get(before, 2.0)
        if word != lemma:  # walks, sat
            return {"n": 3.0, "v": 0.05, "to": 0.1, "auxiliary": 0.2}.get(before, 1.0)
        return 0.5 if before == "n" else 1.0
    if pos == "n" and word.endswith("ing") and word == lemma and before not in ("determiner", "possessive", "a"):
        return 1.0 if count >= _COMMON_NOUN else 0.1  # building, morning; watching, which WordNet lists as a noun too
    return 1.0


@lru_cache(maxsize=65536)
def _readings(word: str) -> dict[PartOfSpeech, tuple[str, int]]:
    """For each part of speech the word can be, its shortest lemma and how often that occurs so. Unknown: a noun."""
    database = wordnet()
    readings: dict[PartOfSpeech, tuple[str, int]] = {}
    for pos in PARTS_OF_SPEECH:
        lemmas = database.lemmas(word, pos)
        if lemmas:
            lemma = min(lemmas, key=len)
            readings[pos] = (lemma, max(database.tag_count(found, pos) for found in lemmas))
    return readings or {"n": (word, 0)}
