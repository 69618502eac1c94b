"""Carries out the steps of a grid, each once: what is done stands in a folder named by its digest, for every grid.

Trainings and jobs go on where they were stopped, as those of the commands do; scores are kept with their items, so that
two rows can be compared on the same clips.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyvdl.checkpoint import is_public, load_model
from pyvdl.clock import Clock
from pyvdl.data import Record
from pyvdl.manifests import measured
from pyvdl.models.vlm import VLM
from pyvdl.pipeline import caption_job
from pyvdl.progress import reporting
from pyvdl.recipes import adapt, fraction, model_clip, train
from pyvdl.rows import captions_by_key, read_captions
from pyvdl.storage import read_object, write_whole
from pyvdl.text import prompts_for

from .grids import SCORES, Grid
from .judge import Items, Judged, judge
from .measure import measure, steady
from .stand_ins import merge
from .steps import Adapt, Captions, ImageModel, Said, Scored, Step, Train, describe, digest, order
from .world import World

_AGAIN = 1000  # what a repeated training's seed lies above the first one's


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A grid that was run."""

    grid: Grid  # with the scores that the test clips allow
    scores: Mapping[str, Mapping[str, Items]]  # by row, then by score
    again: Mapping[str, Items]  # of the row that was trained again
    left_out: Mapping[str, str]  # rows that were not run, and what they need
    judged: Sequence[Judged]
    seconds: Mapping[str, float]  # of the grid's steps and scores, by what was done, all starts together
    clips: int  # of the test


class Work:
    """Steps carried out below `out`, in `steps/` and `scores/`."""

    def __init__(self, world: World, out: Path, clock: Clock) -> None:
        self.world, self.out, self.clock = world, out, clock
        self._captions: dict[Captions, dict[str, tuple[str, ...]]] = {}

    def name(self, step: Step | ImageModel) -> str:
        """The kind of step, and its digest."""
        kind = step.stage if isinstance(step, Adapt) else type(step).__name__.lower()
        return f"{kind}-{digest(step, self.world.facts)[:16]}"

    def folder(self, step: Step) -> Path:
        return self.out / "steps" / self.name(step)

    def done(self, step: Step) -> bool:
        """Whether the step's result is there, whole."""
        return (self.folder(step) / ("job.done" if isinstance(step, Captions) else "model")).exists()

    def carry_out(self, step: Step) -> None:
        """Does the step, whose inputs are there; goes on where it was stopped."""
        folder = self.folder(step)
        match step:
            case Adapt():
                self._adapt(step, folder)
            case Captions():
                self._caption(step, folder)
            case Train():
                changes = (*self.world.changes.get("contrastive", ()), f"seed={self._seed(step)}")
                train(
                    self._texts(step), folder, start=self.world.encoder, preset=self.world.preset, assignments=changes
                )

    def _seed(self, step: Adapt | Train) -> int:
        return self.world.seed + _AGAIN * step.again

    def _adapt(self, step: Adapt, folder: Path) -> None:
        world = self.world
        changes = [*world.changes.get("visual" if step.stage == "visual" else "language", ())]
        changes.append(f"seed={self._seed(step)}")
        if step.trainable is not None:
            changes.append(f"trainable={step.trainable!r}")
        pseudo = self._said(Said(step.pseudo, "all")) if step.pseudo else []
        adapt(
            step.stage,
            world.lesson(step.lesson) or [],
            folder,
            start=self._model(step.start),
            preset=world.preset,
            assignments=changes,
            pseudo=pseudo,
        )

    def _model(self, step: Adapt | Train | ImageModel | None) -> Path:
        if step is None or isinstance(step, ImageModel):
            assert self.world.vlm is not None
            return self.world.vlm
        return self.folder(step) / "model"

    def _caption(self, step: Captions, folder: Path) -> None:
        world, drawing = self.world, self.world.drawing
        model, tokenizer = load_model(self._model(step.model))
        if not isinstance(model, VLM):
            raise ValueError(f"{self._model(step.model)} holds a {type(model).__name__}: captions need a VLM")
        clip = steady(model_clip(model.config, world.sizes.visual.clip))
        options: dict[str, Any] = {"temperature": drawing.temperature, "top_p": drawing.top_p}
        options["num_samples"] = drawing.num_samples
        records: Sequence[Record] = world.unlabelled
        if step.frames:
            clip = dataclasses.replace(clip, num_frames=1, sampling="uniform")
            options = {"temperature": 0.0}
            records = _frames(records, step.frames)
        with reporting("clips captioned") as progress:
            caption_job(
                model,
                tokenizer,
                records,
                folder,
                clip=clip,
                prompt=prompts_for(is_public(self._model(step.model)))[0],
                max_length=drawing.max_length,
                batch_size=drawing.batch_size,
                shard_size=min(1000, 2 * drawing.batch_size),
                seed=world.seed,
                progress=progress,
                **options,
            )
        write_whole(folder / "job.done", [""])

    def _said(self, said: Said) -> list[Record]:
        """The unlabelled clips with what was said of them as their captions; those of which nothing was, left out."""
        if said.by not in self._captions:
            self._captions[said.by] = captions_by_key(read_captions(self.folder(said.by)))
        found = self._captions[said.by]
        records = []
        for record in self.world.unlabelled:
            if said.by.frames:
                parts = [found.get(f"{record.key}#{i:04d}", ()) for i in range(said.by.frames)]
                frames = [part[0] if part else "" for part in parts]
            match said.how:
                case "all":
                    texts = found.get(record.key, ())
                case "first":
                    texts = found.get(record.key, ())[:1]
                case "middle frame":
                    texts = (frames[len(frames) // 2],)
                case "summary" if self.world.summaries is not None:
                    texts = (self.world.summaries.get(record.key, ""),)
                case "summary":
                    texts = (merge(frames),)
            records.append(dataclasses.replace(record, captions=tuple(text for text in texts if text)))
        return [record for record in records if record.captions]

    def _texts(self, step: Train) -> list[Record]:
        world = self.world
        match step.texts:
            case "alt-text":
                found = [dataclasses.replace(r, captions=(r.alt_text,) if r.alt_text else ()) for r in world.unlabelled]
            case "human":
                found = list(world.unlabelled)
            case "labelled":
                found = list(world.labelled)
            case said:
                found = self._said(said)
        return fraction(found, step.share)

    def scores(self, recipe: Scored, together: str) -> dict[str, Items]:
        """What the model of a recipe scores on the test clips, item by item; measured once."""
        path = self._scores_path(recipe, together)
        if not path.exists():
            found = measure(together, self._model(recipe), self.world)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, [json.dumps({key: items.to_json() for key, items in found.items()})])
        return {key: Items.from_json(items) for key, items in read_object(path.read_bytes(), path).items()}

    def _scores_path(self, recipe: Scored, together: str) -> Path:
        """Named by the recipe, the test clips, and how they are measured."""
        how = json.dumps([self.world.test_digest, self.world.drawing.max_length, self.world.templates])
        test = hashlib.sha256(how.encode()).hexdigest()
        return self.out / "scores" / f"{self.name(recipe)}-{together}-{test[:8]}.json"

    def measured(self, recipe: Scored, together: str) -> bool:
        return self._scores_path(recipe, together).exists()


def _frames(records: Sequence[Record], count: int) -> list[Record]:
    """Equal parts of each clip; their middles are the frames of uniform sampling.

    One that cannot be measured has parts too: the job then has a failed row for each.
    """
    found: list[Record] = []
    for record, end in measured(records):
        found += record.equal_parts(record.start_seconds + count if end is None else end, count)
    return found


def run_grid(grid: Grid, world: World, out: Path) -> Outcome:
    """Carries out what is missing of the grid below `out`, and judges its directions.

    Rows that need what the world does not have are left out; ValueError where that is all of them, or the row that is
    trained twice. Two runs must not work in `out` at the same time.
    """
    lacking = {row.key: lack for row in grid.rows if (lack := _lacks(row.recipe, world))}
    if len(lacking) == len(grid.rows) or grid.again in lacking:
        raise ValueError(f"{grid.name} needs {lacking.get(grid.again) or next(iter(lacking.values()))}")
    shown = tuple(score for score in grid.scores if world.measures(SCORES[score].by))
    if not shown:
        raise ValueError(f"the test clips have nothing to measure {', '.join(grid.scores)} by, which {grid.name} shows")
    rows = tuple(row if world.stands_in(row.recipe) else dataclasses.replace(row, stand_in=None) for row in grid.rows)
    grid = dataclasses.replace(grid, scores=shown, rows=rows)
    recipes = {row.key: row.recipe for row in grid.rows if row.key not in lacking}
    work = Work(world, out, Clock(out / "ablation-seconds.json"))
    todo = list(dict.fromkeys([*recipes.values(), grid.repeated()]))
    steps = list(dict.fromkeys(s for r in todo if not isinstance(r, ImageModel) for s in order(r)))
    missing = [step for step in steps if not work.done(step)]
    print(f"{grid.name}: {len(steps)} steps, {len(steps) - len(missing)} done before", file=sys.stderr, flush=True)
    for i, step in enumerate(missing, 1):
        with work.clock.phase(work.name(step), f"{i}/{len(missing)}  {describe(step)}"):
            work.carry_out(step)
    measures = [(recipe, part) for recipe in todo for part in dict.fromkeys(SCORES[s].together for s in shown)]
    unmeasured = [one for one in measures if not work.measured(*one)]
    for i, (recipe, part) in enumerate(unmeasured, 1):
        says = f"{i}/{len(unmeasured)}  {part} of the test clips: {describe(recipe)}"
        with work.clock.phase(f"{work.name(recipe)} {part}", says):
            work.scores(recipe, part)
    found: dict[Scored, dict[str, Items]] = {}
    for recipe, part in measures:
        found.setdefault(recipe, {}).update(work.scores(recipe, part))
    scores = {key: found[recipe] for key, recipe in recipes.items()}
    again = found[grid.repeated()]
    names = {work.name(step) for step in steps} | {f"{work.name(recipe)} {part}" for recipe, part in measures}
    return Outcome(
        grid=grid,
        scores=scores,
        again=again,
        left_out=lacking,
        judged=judge(grid, scores, again),
        seconds={name: seconds for name, seconds in work.clock.seconds.items() if name in names},
        clips=len(world.test),
    )


def _lacks(recipe: Scored, world: World) -> str | None:
    if isinstance(recipe, ImageModel):
        return None if world.vlm else "an image model (--vlm)"
    return next((lack for step in order(recipe) if (lack := world.lacks(step))), None)
