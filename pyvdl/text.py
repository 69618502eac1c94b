"""Task prompts and the small built-in word tokenizer (for demo and tests: checkpoints bring their own)."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Self

import numpy as np

PAD_ID: Final = 0  # also the decoder's start id
EOS_ID: Final = 1
UNKNOWN_ID: Final = 2
BOS_ID: Final = 3  # only the dual encoder's text tower asks for it
NUM_SPECIAL_IDS: Final = 4

CAPTION_PROMPT: Final = "Generate the alt-text:"
PALIGEMMA_PROMPT: Final = "caption en"  # what its public checkpoints were taught
PALIGEMMA_QUESTION_PROMPT: Final = "answer en {question}"
QUESTION_PROMPT: Final = "Answer in en: {question}"
DETAIL_PROMPT: Final = "Describe the video in detail:"


def prompts_for(public: bool) -> tuple[str, str]:
    """For captions, and for answers with "{question}" in it; `public`: a checkpoint of others, not one made here."""
    return (PALIGEMMA_PROMPT, PALIGEMMA_QUESTION_PROMPT) if public else (CAPTION_PROMPT, QUESTION_PROMPT)


# An apostrophe or a hyphen inside a word belongs to it; any other mark is a token of its own.
_PIECE = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
_NO_SPACE_BEFORE = frozenset(".,!?:;)]}%")
_NO_SPACE_AFTER = frozenset("([{")


def split_words(text: str) -> list[str]:
    """Lower-cases `text` and splits it into words and punctuation marks."""
    return _PIECE.findall(text.lower())


class WordTokenizer:
    """Maps words to ids: 0 pad, 1 end of sequence, 2 unknown, 3 beginning of text, then the given words."""

    def __init__(self, words: Sequence[str]) -> None:
        for word in words:
            if split_words(word) != [word]:
                raise ValueError(f"word {word!r}: expected one lower-case word or one punctuation mark")
        self.words = tuple(words)
        self._ids = {word: NUM_SPECIAL_IDS + i for i, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            repeated = [word for word, count in Counter(self.words).items() if count > 1]
            raise ValueError(f"words {repeated[:5]!r} occur more than once: expected a set of distinct words")

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> Self:
        """Takes all words, the most frequent first; equal counts in alphabetical order."""
        counts = Counter(word for text in texts for word in split_words(text))
        return cls(sorted(counts, key=lambda word: (-counts[word], word)))

    @property
    def vocab_size(self) -> int:
        """Number of ids, the special ones included."""
        return NUM_SPECIAL_IDS + len(self.words)

    @property
    def pad_id(self) -> int:
        return PAD_ID

    @property
    def end_id(self) -> int:
        return EOS_ID

    def digest(self) -> str:
        """Names the tokenizer by its words."""
        return hashlib.sha256(json.dumps(self.words).encode()).hexdigest()

    def encode(self, text: str, length: int, *, bos: bool = False) -> np.ndarray:
        """Returns int32[length]: the ids of `text`, end of sequence, padding. A long text never loses its end."""
        shortest = 2 if bos else 1
        if length < shortest:
            raise ValueError(f"length={length}: expected at least {shortest} (bos={bos})")
        pieces = [self._ids.get(word, UNKNOWN_ID) for word in split_words(text)]
        ids = ([BOS_ID] if bos else []) + pieces[: length - shortest] + [EOS_ID]
        out = np.full(length, PAD_ID, np.int32)
        out[: len(ids)] = ids
        return out

    def encode_batch(self, texts: Sequence[str], length: int, *, bos: bool = False) -> np.ndarray:
        """Returns int32[N, length], one row per text."""
        out = np.empty((len(texts), length), np.int32)
        for row, text in zip(out, texts):
            row[:] = self.encode(text, length, bos=bos)
        return out

    def encode_prompts(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Returns int32[N, length]: a prompt is a text like others here."""
        return self.encode_batch(texts, length)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the words up to the first end of sequence, special ids dropped, marks set against their words."""
        text, glue = "", True
        for value in np.asarray(ids).tolist():
            if value == EOS_ID:
                break
            if 0 <= value < NUM_SPECIAL_IDS:
                continue
            if not 0 <= value < self.vocab_size:
                raise ValueError(f"token id {value}: expected 0 to {self.vocab_size - 1}")
            word = self.words[value - NUM_SPECIAL_IDS]
            text += word if glue or word in _NO_SPACE_BEFORE else " " + word
            glue = word in _NO_SPACE_AFTER
        return text

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the word list into a folder as tokenizer.json, which appears whole or not at all."""
        target = Path(folder) / "tokenizer.json"
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        content = {"format": "pyvdl-word-tokenizer", "words": self.words}
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=0), encoding="utf-8")
        temporary.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what `save` wrote."""
        remedy = "copy the file again from where the words were made, or save the model again"
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is damaged, it is not JSON ({error}): {remedy}") from None
        if not isinstance(found, dict) or found.get("format") != "pyvdl-word-tokenizer":
            raise ValueError(f"{os.fspath(path)}: expected a JSON object with format 'pyvdl-word-tokenizer'; {remedy}")
        words = found.get("words")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f'{os.fspath(path)} is damaged, its "words" are no list of strings: {remedy}')
        return cls(words)
