"""Prepares answers for WUPS in the steps of NExT-OE: tokens, tags, lemmas, stems, stop list.

The steps are NExT-OE's, tokenizer and tagger are ours: prepared strings can differ from those of pywsd, which it used.
"""

from functools import cache, lru_cache
from typing import Any, Final

from .ptb import ptb_tokenize
from .tagging import tag_words
from .wordnet import PartOfSpeech, wordnet

# NExT-OE's stop list, verbatim: stopwords.txt of github.com/doc-doc/NExT-OE, MIT License, Copyright (c) 2021 Junbin.
# (Permission is granted to use, copy, modify and distribute it provided this notice stays with it.)
# Not in it, though in most such lists: no, not, up, down, before, after, in, out, on, off, over, under.
_STOP_WORDS: Final = (
    "i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves he him his "
    "himself she she's her hers herself it it's its itself they them their theirs themselves what which who whom "
    "this that that'll these those am is are was were be been being have has had having do does did doing a an the "
    "and but if or because as until while to from of at for with about into through during again further then here "
    "there when where why how all any each most other some such only own so than too very s t can will just don "
    "don't should should've now d ll m o re ve y ain aren aren't couldn couldn't didn didn't doesn doesn't hadn "
    "hadn't hasn hasn't haven haven't isn isn't ma mightn mightn't mustn mustn't needn needn't shan shan't shouldn "
    "shouldn't wasn wasn't weren weren't won won't wouldn wouldn't"
)
STOP_WORDS: Final = frozenset(_STOP_WORDS.split())


@lru_cache(maxsize=65536)
def prepare_answer(text: str) -> str:
    """Returns the words of an answer as WUPS compares them: lower-case lemmas without stop words, parted by spaces."""
    lemmas = (_lemma(tagged.word, tagged.pos) for tagged in tag_words(ptb_tokenize(text, punctuation=True)))
    return " ".join(lemma for lemma in lemmas if lemma not in STOP_WORDS)


def _lemma(word: str, pos: PartOfSpeech | None) -> str:
    """The shortest WordNet lemma of the word; where that has no sense, the Porter stem if it has one, else the word."""
    if pos is None:
        return word
    database = wordnet()
    lemma = min(database.lemmas(word, pos), key=len, default=word)
    if database.first_synset(lemma) is None:
        stem = _stemmer().stem(word)
        return stem if database.first_synset(stem) is not None else word
    return lemma


@cache
def _stemmer() -> Any:
    """NLTK's Porter stemmer, imported at the first word that WordNet lacks: importing NLTK takes seconds."""
    try:
        from nltk.stem.porter import PorterStemmer
    except ModuleNotFoundError as error:
        message = (
            "words that WordNet lacks are stemmed with NLTK (no NLTK data). Install it with: pip install 'nltk>=3.9'"
        )
        raise ImportError(message) from error
    return PorterStemmer()
