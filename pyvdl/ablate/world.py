"""What the recipes of a grid begin with: clips, models and settings; the small corpus, or those of the user."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyvdl
from pyvdl import starts
from pyvdl.archives import read_records
from pyvdl.checkpoint import is_public, load_config
from pyvdl.config import PRESETS, DualEncoderConfig, Preset
from pyvdl.data import Record, digest
from pyvdl.overrides import override, override_training
from pyvdl.progress import reporting
from pyvdl.synthetic import make_corpus
from pyvdl.text import WordTokenizer

from .stand_ins import about_pictures, long_answers
from .steps import Adapt, Captions, ImageModel, Lesson, Said, Scored, Stage, Step, Train

SOURCES = ("pictures", "long answers", "summary")  # of the paper's, which have stand-ins at toy size
TOY_PRESET = "demo"
TOY_CHANGES: dict[str, tuple[str, ...]] = {  # the demo has 600, 800, 120
    "visual": ("steps=400",),
    "language": ("steps=500",),
    "contrastive": ("steps=80",),
}
_KIND: dict[Stage, Literal["visual", "language"]] = {"visual": "visual", "language": "language", "prompt": "language"}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How clips are captioned; the defaults are those of LaViLa's narrator, since the paper states none."""

    num_samples: int = 10  # captions a clip
    max_length: int = 77  # tokens
    temperature: float = 0.7
    top_p: float = 0.95
    batch_size: int = 8  # clips, in evaluation, too


@dataclass(frozen=True, kw_only=True)
class World:
    """Everything outside of the recipes that their outcome depends on."""

    labelled: Sequence[Record]  # with human captions, narratives and questions
    unlabelled: Sequence[Record]  # with alt-text
    test: Sequence[Record]
    vlm: Path | None  # the image model
    encoder: Path | None  # the dual encoder that all begin with, of video
    preset: str
    seed: int
    changes: Mapping[str, tuple[str, ...]]  # by the kind of training: visual, language, contrastive
    drawing: Drawing
    lessons: Mapping[Lesson, Sequence[Record]] = field(default_factory=dict)  # instruction data of other sources
    summaries: Mapping[str, str] | None = None  # of each clip, by a language model; None: the template merges
    templates: tuple[str, ...] = ("{}",)  # around the names of classes
    toy: bool = False

    @functools.cached_property
    def sizes(self) -> Preset:
        return PRESETS[self.preset](1)

    def lesson(self, name: Lesson) -> Sequence[Record] | None:
        """The records that a stage reads; None where nobody brought them."""
        match name:
            case "captions" | "instructions":
                return self.labelled
            case "reasoning":
                return [_reasoning(dataclasses.replace(record, captions=())) for record in self.labelled]
            case "reasoning and captions":
                return [_reasoning(record) for record in self.labelled]
            case _:
                return self.lessons.get(name)

    def lacks(self, step: Step) -> str | None:
        """What the step needs and the user did not bring, or None."""
        match step:
            case Adapt(start=None) | Captions(model=None) if self.vlm is None:
                return "an image model (--vlm)"
            case Adapt() if not self.lesson(step.lesson):
                return f"data (--source '{step.lesson}=DATA')" if step.lesson in SOURCES else "labelled clips (--data)"
            case Captions() | Train(texts="alt-text" | "human") if not self.unlabelled:
                return "clips without labels (--unlabelled)"
            case Train() if self.encoder is None:
                return "a dual encoder to begin with (--encoder)"
            case Train(texts="alt-text") if not any(record.alt_text for record in self.unlabelled):
                return "unlabelled clips with alt-text"
            case Train(texts="human") if not any(record.captions for record in self.unlabelled):
                return "human captions of the unlabelled clips"
        return None

    def measures(self, by: str) -> bool:
        """Whether the test clips have what a score is measured by (see `grids.SCORES`)."""
        match by:
            case "captions" | "text to video":
                return any(record.captions for record in self.test)
            case "questions":
                return any(record.questions for record in self.test)
        return any(record.label is not None for record in self.test)

    def stands_in(self, recipe: Scored) -> bool:
        """Whether a stand-in is in place of the paper's source, where a recipe has one."""
        return self.toy or (_merged(recipe) and self.summaries is None)

    def facts(self, step: Step | ImageModel) -> dict[str, Any]:
        """What of this world the step itself depends on; its inputs have facts of their own."""
        found: dict[str, Any] = {"pyvdl": pyvdl.__version__, "seed": self.seed}
        match step:
            case ImageModel():
                found |= {"start": _files(self.vlm), "clip": repr(self.sizes.visual.clip)}
            case Adapt():
                kind = _KIND[step.stage]
                found |= {"data": self._lesson_digest(step.lesson), "changes": self.changes.get(kind, ())}
                found |= {"sizes": repr((self.sizes.vlm, getattr(self.sizes, kind), self._lengths))}
                found |= {"pseudo": self._unlabelled_digest if step.pseudo else None}
                found |= {"start": None if step.start else _files(self.vlm)}
            case Captions():
                found |= {"data": self._unlabelled_digest, "drawing": dataclasses.asdict(self.drawing)}
                found |= {"start": None if step.model else _files(self.vlm), "clip": repr(self.sizes.visual.clip)}
            case Train():
                data = self._lesson_digest("captions") if step.texts == "labelled" else self._unlabelled_digest
                found |= {"data": data, "changes": self.changes.get("contrastive", ()), "start": _files(self.encoder)}
                found |= {"sizes": repr(self.sizes.contrastive)}
                found |= {"summaries": self.summaries if _merged(step) else None}
        return found

    @functools.cached_property
    def _lengths(self) -> tuple[int, int, int]:
        return self.sizes.prompt_length, self.sizes.caption_length, self.sizes.target_length

    @functools.cached_property
    def _unlabelled_digest(self) -> str:
        return digest(self.unlabelled)

    @functools.cached_property
    def test_digest(self) -> str:
        return digest(self.test)

    @functools.cached_property
    def _lesson_digests(self) -> dict[Lesson, str]:
        return {}

    def _lesson_digest(self, name: Lesson) -> str:
        if name not in self._lesson_digests:
            self._lesson_digests[name] = digest(self.lesson(name) or ())
        return self._lesson_digests[name]


def _merged(recipe: Scored | Step) -> bool:
    return isinstance(recipe, Train) and isinstance(recipe.texts, Said) and recipe.texts.how == "summary"


def _reasoning(record: Record) -> Record:
    kept = tuple(q for q in record.questions if q.family in ("temporal", "causal"))
    return dataclasses.replace(record, questions=kept)


def _files(folder: Path | None) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a model's files: another model in the same place is another start."""
    if folder is None:
        return []
    files = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
    return [(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]


def read_changes(assignments: Iterable[str], preset: str) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """KIND.a.b=c of the command line, by kind: those of trainings, checked, and those of `Drawing` ("a=c")."""
    sizes = PRESETS[preset](8)
    changes: dict[str, tuple[str, ...]] = {}
    for assignment in assignments:
        kind, _, change = assignment.partition(".")
        if kind not in ("visual", "language", "contrastive", "caption"):
            raise ValueError(f"{assignment!r} begins with none of visual., language., contrastive., caption.")
        if change.startswith(("seed=", "trainable=", "model.")):
            raise ValueError(f"{assignment}: the grid sets that")
        changes[kind] = (*changes.get(kind, ()), change)
    drawing = list(changes.pop("caption", ()))
    override(Drawing(), drawing)
    for kind, found in changes.items():
        if kind == "contrastive":
            override_training(sizes.contrastive, sizes.dual_encoder, found)
        else:
            override_training(getattr(sizes, kind), sizes.vlm, found)
    return changes, drawing


def toy_world(directory: Path, *, seed: int = 0, assignments: Iterable[str] = ()) -> World:
    """The small corpus and the stand-ins for published models, made below `directory` where they are not there yet.

    They stand where the demo puts its own, which are the same: in its folder nothing of this is done again. The stages
    are shorter than the demo's (`TOY_CHANGES`), since a grid has many of them.
    """
    asked, drawing = read_changes(assignments, TOY_PRESET)
    changes = {kind: (*shorter, *asked.get(kind, ())) for kind, shorter in TOY_CHANGES.items()}
    with reporting("video files") as progress:
        corpus = make_corpus(directory / "corpus", num_clips=starts.CLIPS, seed=seed, progress=progress)
    tokenizer = WordTokenizer.from_texts(starts.texts(corpus))
    sizes = PRESETS[TOY_PRESET](tokenizer.vocab_size)
    image, encoder = directory / "image" / "model", directory / "dual_start"
    if not image.exists():
        starts.image_models(corpus, tokenizer, sizes, directory, seed)
    if not encoder.exists():
        starts.inflated(directory / "encoder" / "model", encoder, sizes, seed)
    drawn = Drawing(
        num_samples=starts.SAMPLES,
        max_length=starts.CAPTION_LENGTH,
        temperature=starts.TEMPERATURE,
        top_p=starts.TOP_P,
        batch_size=starts.BATCH,
    )
    return World(
        labelled=[starts.instructed(record) for record in corpus.train],
        unlabelled=corpus.unlabelled,
        test=corpus.test,
        vlm=image,
        encoder=encoder,
        preset=TOY_PRESET,
        seed=seed,
        changes=changes,
        drawing=override(drawn, drawing),
        lessons={"pictures": about_pictures(corpus.pictures), "long answers": long_answers(corpus.train)},
        templates=starts.TEMPLATES,
        toy=True,
    )


def user_world(
    directory: Path,
    *,
    test: Path,
    labelled: Path | None = None,
    unlabelled: Path | None = None,
    vlm: Path | None = None,
    encoder: Path | None = None,
    sources: Mapping[str, Path] | None = None,
    preset: str = "paper",
    seed: int = 0,
    assignments: Iterable[str] = (),
) -> World:
    """Data and checkpoints of the user. An encoder of images is made one of video below `directory`."""
    changes, drawing = read_changes(assignments, preset)
    sources = sources or {}
    if unknown := sorted(set(sources) - set(SOURCES)):
        raise ValueError(f"unknown source {unknown[0]!r}: expected one of {', '.join(SOURCES)}")
    if encoder is not None:
        encoder = _of_video(encoder, directory / "dual_start", PRESETS[preset](1), seed)
    summaries = None
    if "summary" in sources:
        summaries = {record.key: record.captions[0] for record in read_records(sources["summary"]) if record.captions}
    return World(
        labelled=read_records(labelled) if labelled else [],
        unlabelled=read_records(unlabelled) if unlabelled else [],
        test=read_records(test),
        vlm=vlm,
        encoder=encoder,
        preset=preset,
        seed=seed,
        changes=changes,
        drawing=override(Drawing(), drawing),
        lessons={name: read_records(sources[name]) for name in ("pictures", "long answers") if name in sources},
        summaries=summaries,
    )


def _of_video(encoder: Path, out: Path, sizes: Preset, seed: int) -> Path:
    if not is_public(encoder):
        config = load_config(encoder)
        if isinstance(config, DualEncoderConfig) and config.vision.num_frames > 1:
            return encoder
    name = hashlib.sha256(repr((_files(encoder), sizes.dual_encoder.vision.num_frames, seed)).encode()).hexdigest()[:16]
    made = out.with_name(f"{out.name}-{name}")
    if not made.exists():
        starts.inflated(encoder, made, sizes, seed)
    return made
