"""What a recipe of an ablation is made of: trainings and captioning jobs that name what they begin with.

A step is a value: equal steps are the same work, and two grids that share one share its result. Nothing is done here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Stage = Literal["visual", "language", "prompt"]
# What the labelled clips teach: their captions; questions and captions and descriptions ("instructions"); parts of
# those; or other sources of instruction data, which have stand-ins at toy size (see `stand_ins`).
Lesson = Literal["captions", "instructions", "reasoning", "reasoning and captions", "pictures", "long answers"]


@dataclass(frozen=True, kw_only=True)
class Adapt:
    """One stage of the VLM, as `pyvdl adapt` trains it."""

    stage: Stage
    lesson: Lesson
    start: Adapt | None = None  # None: the image model
    trainable: tuple[str, ...] | None = None  # prefixes of parameters; None: what the stage trains
    pseudo: Captions | None = None  # self-training: the clips captioned there are half of the rows
    again: int = 0  # the same with another seed of its training


@dataclass(frozen=True, kw_only=True)
class Captions:
    """A captioning job over the unlabelled clips, as `pyvdl caption --out` runs it."""

    model: Adapt | None  # None: the image model
    frames: int = 0  # so many single frames of a clip, one greedy caption each; 0: the clip, several nucleus samples


@dataclass(frozen=True)
class Said:
    """Texts of the unlabelled clips, out of a captioning job."""

    by: Captions
    how: Literal["all", "first", "middle frame", "summary"]


Texts = (
    Literal["alt-text", "human", "labelled"] | Said
)  # human: of the unlabelled clips; labelled: those that have them


@dataclass(frozen=True, kw_only=True)
class Train:
    """The dual encoder on one kind of texts, as `pyvdl train` trains it."""

    texts: Texts
    share: float = 1.0  # of the clips
    again: int = 0


@dataclass(frozen=True)
class ImageModel:
    """The image model as it is: nothing is trained."""


Step = Adapt | Captions | Train
Scored = Adapt | Train | ImageModel  # what a cell of a table is the score of


def inputs(step: Step) -> list[Step]:
    """The steps that this one begins with."""
    match step:
        case Adapt():
            found = [step.start, step.pseudo]
        case Captions():
            found = [step.model]
        case Train(texts=Said(by=job)):
            found = [job]
        case Train():
            found = []
    return [one for one in found if one is not None]


def order(step: Step) -> Iterator[Step]:
    """The step's whole ancestry, each step once, what a step begins with before it."""
    seen: set[Step] = set()

    def walk(one: Step) -> Iterator[Step]:
        if one not in seen:
            seen.add(one)
            for before in inputs(one):
                yield from walk(before)
            yield one

    return walk(step)


def digest(step: Step | ImageModel, facts: Callable[[Step | ImageModel], Mapping[str, Any]]) -> str:
    """Names a step by all that its outcome depends on: itself, its ancestry, and what `facts` tells of each of them."""

    def plain(value: Any) -> Any:
        if isinstance(value, Adapt | Captions | Train):
            return digest(value, facts)
        if isinstance(value, Said):
            return {"by": plain(value.by), "how": value.how}
        return value

    own = {field.name: plain(getattr(step, field.name)) for field in dataclasses.fields(step)}
    text = json.dumps([type(step).__name__, own, facts(step)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def describe(step: Scored | Captions) -> str:
    """The recipe in one sentence, from its beginning."""
    match step:
        case ImageModel():
            return "the image model as it is"
        case Adapt():
            names = {"visual": "visual stage", "language": "language stage", "prompt": "prompt tuning"}
            start = describe(step.start) if step.start else "image model"
            trained = f", training {_parts(step.trainable)}" if step.trainable is not None else ""
            pseudo = ", half of the rows captioned by a model" if step.pseudo else ""
            return f"{start} → {names[step.stage]} on {step.lesson}{trained}{pseudo}{_again(step.again)}"
        case Captions():
            made = f"{step.frames} frames, each captioned" if step.frames else "clips captioned"
            return f"{describe(step.model) if step.model else 'image model'} → {made}"
        case Train():
            share = "" if step.share == 1 else f", {100 * step.share:g}% of the clips"
            return f"{_texts(step.texts)} → dual encoder{share}{_again(step.again)}"


def _parts(prefixes: tuple[str, ...]) -> str:
    return "all parts" if prefixes == ("",) else " and ".join(prefixes)


def _again(again: int) -> str:
    return ", with another seed" if again else ""


def _texts(texts: Texts) -> str:
    if isinstance(texts, Said):
        how = {"all": "all samples", "first": "one sample", "middle frame": "the middle one", "summary": "merged"}
        return f"{describe(texts.by)}, {how[texts.how]}"
    return {"alt-text": "alt-text", "human": "human captions", "labelled": "human captions of the labelled clips"}[
        texts
    ]
