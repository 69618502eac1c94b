"""Statistics of captions by a spaCy pipeline: a small one made here, of rules, since the English models are no packages
of an index. What en_core_web_sm gives is not tested."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvdl.metrics import SpacyTagger, WordNetTagger, caption_statistics

spacy = pytest.importorskip("spacy", reason="spaCy is not installed (the extra stats)")

WORDS = {  # form: part of speech, lemma
    "dog": ("NOUN", "dog"),
    "dogs": ("NOUN", "dog"),
    "london": ("PROPN", "London"),
    "is": ("AUX", "be"),
    "running": ("VERB", "run"),
    "ran": ("VERB", "run"),
}
CAPTIONS = ["A dog is running in London.", "Two dogs ran!", "London"]


def save(folder: Path, *, lemmas: bool) -> str:
    pipeline = spacy.blank("en")
    ruler = pipeline.add_pipe("attribute_ruler")
    for form, (pos, lemma) in WORDS.items():
        ruler.add([[{"LOWER": form}]], {"POS": pos, "LEMMA": lemma} if lemmas else {"POS": pos})
    pipeline.meta |= {"name": "rules", "version": "1.2"}
    pipeline.to_disk(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> SpacyTagger:
    return SpacyTagger(save(tmp_path_factory.mktemp("pipeline"), lemmas=True))


def test_what_the_paper_leaves_open_is_a_choice(tagger: SpacyTagger) -> None:
    assert tagger.name == f"spaCy {spacy.__version__}, en_rules 1.2"
    found = caption_statistics(CAPTIONS, tagger=tagger)
    assert (found.captions, found.tokens, found.mean_length) == (3, 10, 10 / 3)
    assert (found.unique_nouns, found.unique_verbs) == (1, 1)  # dog; run, and not the auxiliary
    assert found.vocabulary == len({"a", "dog", "is", "running", "in", "london", "two", "dogs", "ran"})
    forms = caption_statistics(CAPTIONS, tagger=tagger, lemmas=False)
    assert (forms.unique_nouns, forms.unique_verbs) == (2, 2)
    assert caption_statistics(CAPTIONS, tagger=tagger, proper_nouns=True).unique_nouns == 2
    assert caption_statistics(CAPTIONS, tagger=tagger, punctuation=True).tokens == 12
    sample = caption_statistics(CAPTIONS, tagger=tagger, sample_size=1, seed=2)
    assert sample == caption_statistics(CAPTIONS, tagger=tagger, sample_size=1, seed=2)


def test_pipelines_that_lack_something_are_refused(tmp_path: Path) -> None:
    forms_only = SpacyTagger(save(tmp_path / "forms", lemmas=False))
    assert caption_statistics(CAPTIONS, tagger=forms_only, lemmas=False).unique_verbs == 2
    with pytest.raises(ValueError, match=r"en_rules 1\.2 gives no lemma of 'dog': name a pipeline that has a lemma"):
        caption_statistics(CAPTIONS, tagger=forms_only)
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(ValueError, match="gives no parts of speech: name a pipeline that has a tagger"):
        caption_statistics(CAPTIONS, tagger=SpacyTagger(str(tmp_path / "blank")))
    with pytest.raises(ValueError, match="'nowhere': fetch it with `python -m spacy download nowhere`"):
        SpacyTagger("nowhere")
    with pytest.raises(ValueError, match="proper_nouns=True: WordNet does not tell names"):
        caption_statistics(CAPTIONS, proper_nouns=True)


class Repeated:
    """A few captions, many times over, never in a list."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[str]:
        return (f"a dog chases the ball {i % 7} times" for i in range(self.count))


@pytest.mark.parametrize("sample_size", [None, 500])
def test_memory_does_not_grow_with_the_captions(sample_size: int | None) -> None:
    caption_statistics(Repeated(7))  # what is read once: WordNet
    peaks = []
    for count in (500, 4000):
        tracemalloc.start()
        found = caption_statistics(Repeated(count), sample_size=sample_size, tagger=WordNetTagger())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found.captions == (sample_size or count)
    assert peaks[1] < peaks[0] + 100_000  # bytes; the captions are 300,000 more


def test_a_sample_wants_captions_that_can_be_counted() -> None:
    with pytest.raises(ValueError, match="read only once"):
        caption_statistics(iter(CAPTIONS), sample_size=1)
    assert caption_statistics(iter(CAPTIONS)).captions == 3
