"""What stands at toy size for sources that are not at hand: a language model's summaries, others' instruction data.

They keep the form of what they stand for, so that a row of a table teaches the kind of thing that it does in the paper;
their scores say nothing about those data sets.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence

from pyvdl.data import Question, Record
from pyvdl.instruct import describe, parse
from pyvdl.text import split_words

_SHOWN = re.compile(r"an? (?P<look>(?:faint|small|large|tilted) )?(?P<name>\S+ \S+) (?P<cell>.+)")


def merge(captions: Sequence[str]) -> str:
    """What the frames of a clip are said to show, in one text: the first caption, then only what is new in each.

    Stands for the summary that a language model writes of them (paper, Table 4).
    """
    told: list[str] = []
    before: list[str] = []
    for caption in captions:
        said = split_words(caption)
        new = [word for word in said if word not in before]
        if new and not told:
            told.append(caption)
        elif new:
            told.append(" ".join(new))
        before = said or before
    return ", then ".join(told)


def about_pictures(pictures: Iterable[Record]) -> list[Record]:
    """Single pictures with questions about what they show, answered by sentences: stands for LLaVA's data.

    pictures: runs of single frames, a caption for each, as the synthetic corpus has them.
    """
    return [single for record in pictures for single in _singles(record)]


def _singles(record: Record) -> Iterator[Record]:
    if record.end_seconds is None:
        raise ValueError(f"{record.key} has no end_seconds: its pictures cannot be told apart")
    parts = record.equal_parts(record.end_seconds, len(record.captions))
    for part, caption in zip(parts, record.captions, strict=True):
        yield dataclasses.replace(part, captions=(caption,), questions=tuple(_shown(caption)))


def _shown(caption: str) -> Iterator[Question]:
    """Questions about a picture of which the corpus says "a small red ball top left and ... over grass"."""
    sprites, _, background = caption.rpartition(" over ")
    for text in sprites.split(" and "):
        if found := _SHOWN.fullmatch(text):
            color, _, kind = found["name"].partition(" ")
            cell = found["cell"]
            where = "in the middle" if cell == "centered" else f"{'at' if ' ' in cell else 'on'} the {cell}"
            yield Question(f"what is {where}?", f"the {found['name']} is {where}", "descriptive")
            yield Question(f"what color is the {kind}?", f"the {kind} is {color}", "descriptive")
    yield Question("what is in the background?", f"{background} is in the background", "descriptive")


def long_answers(records: Iterable[Record]) -> list[Record]:
    """Videos with questions answered by all that is told of them, or by whole sentences: for ActivityNet-Instruct."""
    return [
        dataclasses.replace(record, captions=(), narrative=None, questions=tuple(_sentences(record.narrative)))
        for record in records
        if record.narrative
    ]


def _sentences(narrative: str) -> Iterator[Question]:
    yield Question("what happens?", describe(narrative), "descriptive")
    _, deeds, background = parse(narrative)
    for actor in dict.fromkeys(deed.actor for deed in deeds):
        verbs = [deed.verb for deed in deeds if deed.actor == actor]
        yield Question(f"what does the {actor} do?", f"the {actor} {', then it '.join(verbs)}", "descriptive")
    if background:
        yield Question("what is in the background?", f"{background} is in the background", "descriptive")
