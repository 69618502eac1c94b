"""What a language model is asked about one record: a brief instruction, two examples, and the record's texts.

The structure is the paper's (section 4.2 and its appendix), the words are ours: `prompts.toml` holds them, and says how
a file of your own looks.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pyvdl.data import Family, Record

FAMILIES: tuple[Family, ...] = ("temporal", "causal", "short")  # those of the paper
_LAYOUT = 'Begin the line of each question with "Q:" and that of its answer, the next, with "A:". Write no more.'


@dataclass(frozen=True)
class Pair:
    """A question with its answer; either may be empty in what a model wrote."""

    question: str
    answer: str


@dataclass(frozen=True)
class Example:
    """What is told of a video, and what one would ask about it."""

    captions: tuple[str, ...]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Template:
    """How questions of one family are asked for."""

    instruction: str
    examples: tuple[Example, ...]  # two or more
    max_answer_words: int


Templates = Mapping[Family, Template]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One request's text, and what it was made of."""

    family: Family
    text: str
    seed: int  # of the record: it drew the examples, and is the request's
    captions: tuple[str, ...]  # the record's
    examples: tuple[Example, ...]  # those shown
    max_answer_words: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_templates(path: str | os.PathLike[str] | None = None) -> Templates:
    """Reads a file of templates, or ours; ValueError names the place in the file and what is expected there."""
    data = (resources.files("pyvdl.instruct") / "prompts.toml" if path is None else Path(path)).read_bytes()
    where = "prompts.toml" if path is None else os.fspath(path)
    try:
        found = tomllib.loads(data.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{where}: expected TOML in UTF-8: {error}") from error
    if not found or set(found) - set(FAMILIES):
        raise ValueError(f"{where}: tables {', '.join(found) or 'none'}: expected some of {', '.join(FAMILIES)}")
    try:
        return {family: _template(family, found[family]) for family in FAMILIES if family in found}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def texts_of(record: Record) -> tuple[str, ...]:
    """What is told of a record's video: its captions and its narrative, each once, on one line."""
    texts = (" ".join(text.split()) for text in (*record.captions, record.narrative or ""))
    return tuple(dict.fromkeys(text for text in texts if text))


def record_seed(record: Record, seed: int) -> int:
    """The record's own seed, 31 bits, in a job with `seed`: it does not depend on other records or their order."""
    return _hash(f"{seed}\0{record.key}") >> 1


def make_prompt(record: Record, family: Family, template: Template, seed: int) -> Prompt:
    """The prompt of a record that has texts; the same for the same record, template and job's `seed`."""
    own = record_seed(record, seed)
    draws = list(itertools.permutations(template.examples, 2))
    examples = draws[_hash(f"{own}\0{family}") % len(draws)]
    captions = texts_of(record)
    parts = [f"{template.instruction} {_LAYOUT}"]
    for number, example in enumerate(examples, 1):
        pairs = "\n".join(f"Q: {pair.question}\nA: {pair.answer}" for pair in example.pairs)
        parts.append(f"Example {number}\n{_listed(example.captions)}\n{pairs}")
    parts.append(f"Now this one\n{_listed(captions)}")
    return Prompt(
        family=family,
        text="\n\n".join(parts),
        seed=own,
        captions=captions,
        examples=examples,
        max_answer_words=template.max_answer_words,
    )


def _listed(captions: tuple[str, ...]) -> str:
    return "\n".join(["Captions:", *(f"- {caption}" for caption in captions)])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def _template(place: str, found: Any) -> Template:
    _keys(place, found, "instruction", "max_answer_words", "examples")
    words = found["max_answer_words"]
    if isinstance(words, bool) or not isinstance(words, int) or words < 1:
        raise ValueError(f"{place}.max_answer_words is {words!r:.80}: expected a whole number above 0")
    examples = _list(f"{place}.examples", found["examples"], 2)
    return Template(
        instruction=_text(f"{place}.instruction", found["instruction"]).strip(),
        examples=tuple(_example(f"{place}.examples[{i}]", example) for i, example in enumerate(examples)),
        max_answer_words=words,
    )


def _example(place: str, found: Any) -> Example:
    _keys(place, found, "captions", "pairs")
    pairs = []
    for i, pair in enumerate(_list(f"{place}.pairs", found["pairs"], 1)):
        _keys(f"{place}.pairs[{i}]", pair, "question", "answer")
        pairs.append(Pair(**{name: _line(f"{place}.pairs[{i}].{name}", text) for name, text in pair.items()}))
    captions = _list(f"{place}.captions", found["captions"], 1)
    return Example(tuple(_line(f"{place}.captions[{i}]", text) for i, text in enumerate(captions)), tuple(pairs))


def _keys(place: str, found: Any, *names: str) -> None:
    if not isinstance(found, dict) or set(found) != set(names):
        got = ", ".join(found) if isinstance(found, dict) else repr(found)
        raise ValueError(f"{place} has {got or 'nothing':.80}: expected {', '.join(names)}")


def _list(place: str, found: Any, least: int) -> list[Any]:
    if not isinstance(found, list) or len(found) < least:
        raise ValueError(f"{place} is {found!r:.80}: expected a list of at least {least}")
    return found


def _text(place: str, found: Any) -> str:
    if not isinstance(found, str) or not found.strip():
        raise ValueError(f"{place} is {found!r:.80}: expected a text that is not empty")
    return found


def _line(place: str, found: Any) -> str:
    return " ".join(_text(place, found).split())
