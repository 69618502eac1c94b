"""What tells the words of captions and their parts of speech for `caption_statistics`: WordNet, or a spaCy pipeline."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Final, Literal, NamedTuple, Protocol

from .ptb import ptb_tokenize
from .tagging import tag_words
from .wordnet import wordnet

Kind = Literal["noun", "name", "verb"]
_KINDS: Final[dict[str, Kind]] = {"NOUN": "noun", "PROPN": "name", "VERB": "verb"}  # of spaCy's parts of speech
_AT_ONCE: Final = 1000  # captions


class Token(NamedTuple):
    """A word of a caption, or a mark where those are asked for."""

    word: str  # in lower case
    lemma: str  # in lower case; "" where the tagger has none
    kind: Kind | None


class Tagger(Protocol):
    """Splits captions into words and tags them."""

    name: str  # with the versions that its results depend on
    tells_names: bool  # whether it parts proper nouns from others

    def __call__(self, captions: Iterable[str], *, punctuation: bool) -> Iterator[list[Token]]:
        """The tokens of each caption; of its marks those that count as such are left out unless `punctuation`."""


class WordNetTagger:
    """The Penn Treebank's words, tagged by a small tagger of our own (`tag_words`) that needs no model.

    Nouns and verbs are those that WordNet lists; auxiliaries are no verbs, and names are nouns where it lists them.
    """

    name = "WordNet"
    tells_names = False

    def __call__(self, captions: Iterable[str], *, punctuation: bool) -> Iterator[list[Token]]:
        database = wordnet()
        for caption in captions:
            found = []
            for tagged in tag_words(ptb_tokenize(caption, punctuation=punctuation)):
                kind: Kind | None = None
                if tagged.pos in ("n", "v") and database.offsets(tagged.lemma, tagged.pos):
                    kind = "noun" if tagged.pos == "n" else "verb"
                found.append(Token(tagged.word, tagged.lemma, kind))
            yield found


class SpacyTagger:
    """A pipeline of spaCy: nouns are its NOUN, names its PROPN, verbs its VERB (auxiliaries are AUX there).

    All of the pipeline runs but the recognition of entities; spaCy's English tags lean on its parser.

    pipeline: the name of an installed one, such as en_core_web_sm, or a folder.
    """

    tells_names = True

    def __init__(self, pipeline: str) -> None:
        try:
            import spacy
        except ImportError as error:
            raise ImportError("spaCy is not installed: pip install 'spacy>=3.8'") from error
        try:
            self._pipeline = spacy.load(pipeline, exclude=["ner"])
        except OSError as error:
            raise ValueError(
                f"spaCy has no pipeline {pipeline!r}: fetch it with `python -m spacy download {pipeline}`, or name the "
                "folder of one"
            ) from error
        meta = self._pipeline.meta
        self.name = f"spaCy {spacy.__version__}, {meta['lang']}_{meta['name']} {meta['version']}"

    def __call__(self, captions: Iterable[str], *, punctuation: bool) -> Iterator[list[Token]]:
        tagged = False
        for texts in itertools.batched(captions, _AT_ONCE):
            found = []
            with self._pipeline.memory_zone():  # so that words met once do not stay in spaCy's memory
                for document in self._pipeline.pipe(texts, batch_size=_AT_ONCE):
                    words = [word for word in document if not word.is_space and (punctuation or not word.is_punct)]
                    found.append([Token(word.lower_, word.lemma_.lower(), _KINDS.get(word.pos_)) for word in words])
                    tagged = tagged or any(word.pos for word in words)
            if not tagged and any(found):
                raise ValueError(f"{self.name} gives no parts of speech: name a pipeline that has a tagger")
            yield from found
