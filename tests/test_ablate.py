"""The paper's ablations: whole grids, steps that are done once, directions that are told only where there are any."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from pyvdl import config, starts
from pyvdl.__main__ import main
from pyvdl.ablate import GRIDS, Grid, run
from pyvdl.ablate.grids import SCORES, Column, Row
from pyvdl.ablate.judge import Items, judge, summary, verdict
from pyvdl.ablate.page import table, write_results
from pyvdl.ablate.run import Outcome, Work, run_grid
from pyvdl.ablate.stand_ins import about_pictures, long_answers, merge
from pyvdl.ablate.steps import Adapt, Captions, ImageModel, Said, Train, describe, digest, inputs
from pyvdl.ablate.world import Drawing, World, read_changes, toy_world, user_world
from pyvdl.checkpoint import save_model
from pyvdl.claims import Score
from pyvdl.clock import Clock
from pyvdl.data import Record, read_manifest
from pyvdl.models.dual_encoder import DualEncoder
from pyvdl.models.vlm import VLM
from pyvdl.overrides import override, override_training
from pyvdl.synthetic import make_corpus
from pyvdl.text import WordTokenizer
from tests.test_demo import tiny

EACH = pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
VISUAL = Adapt(stage="visual", lesson="captions")


# Grids.


def test_every_table_has_its_grid() -> None:
    sources = " ".join(grid.source for grid in GRIDS.values())
    assert set(re.findall(r"\d+", sources.partition("Table 2's")[0] + " 9 ")) >= {"4", "5", "6", "8", "9"}
    for wanted in ("Table 4", "Table 5", "Table 6", "Table 8", "Table 9", "Tables 10 and 11", "Figure 5"):
        assert wanted in sources


@EACH
def test_a_grid_is_whole(grid: Grid) -> None:
    keys = [row.key for row in grid.rows]
    assert len(set(keys)) == len(keys)
    assert {column.score for column in grid.columns} <= set(grid.scores) <= set(SCORES)
    named = {key for pair in grid.pairs for key in pair} | {grid.again}
    named |= {key for told in grid.told for key in (told.better, told.worse)}
    assert named <= set(keys)
    assert {told.score for told in grid.told} <= set(grid.scores)
    for row in grid.rows:
        assert len(grid.paper(row)) == len(grid.columns)
        encoder = isinstance(row.recipe, Train)
        assert encoder == ("R@1" in grid.scores), row.key  # what a model scores goes by its kind
    # A figure that is not at hand is told of, in a note or by the row's place in a curve.
    if any(value is None for row in grid.rows for value in grid.paper(row)):
        assert re.search(r"at hand|not in the paper", " ".join(grid.notes))


@EACH
def test_every_recipe_is_one_that_the_trainings_take(grid: Grid) -> None:
    done: set[Any] = set()
    for step in grid.steps():
        assert set(inputs(step)) <= done, describe(step)  # what it begins with was done before
        done.add(step)
        if isinstance(step, Adapt) and step.trainable is not None:
            for preset in ("demo", "toy", "paper", "paligemma"):
                sizes = config.PRESETS[preset](8)
                change = f"trainable={step.trainable!r}"
                training, _ = override_training(getattr(sizes, step.stage), sizes.vlm, [change])
                assert training.trainable == step.trainable
    assert grid.repeated() not in [row.recipe for row in grid.rows]


def test_grids_agree_on_the_figures_they_share() -> None:
    source, scale, labels = (GRIDS[name] for name in ("caption-source", "data-scale", "labels"))
    for one, other in (
        ("alt-text", "alt-text 1"),
        ("summary", "frames + summary 1"),
        ("V+L samples", "pseudo-captions 1"),
    ):
        assert source.row(one).recipe == scale.row(other).recipe
        assert source.row(one).paper == scale.row(other).paper
    assert labels.row("alt-text").paper[0] == source.row("alt-text").paper[0]
    order, instructions = GRIDS["order"], GRIDS["instruction-source"]
    for one, other in (("none", "none"), ("VL", "instructions")):
        assert order.row(one).recipe == instructions.row(other).recipe
        cider, activity, *_, wups = order.row(one).paper
        assert (cider, activity, wups) == instructions.row(other).paper
    trained, selves = GRIDS["trained-part"], GRIDS["self-training"]
    assert (trained.row("vision").recipe, trained.row("vision").paper) == (selves.row("without").recipe, (42.3,))


# Steps and their names.


def test_a_step_is_named_by_its_ancestry_and_what_they_depend_on() -> None:
    facts = {"adapt": 0, "train": 0}

    def told(step: Any) -> dict[str, Any]:
        return {"fact": facts["train" if isinstance(step, Train) else "adapt"]}

    def name(step: Any) -> str:
        return digest(step, told)

    language = Adapt(stage="language", lesson="instructions", start=VISUAL)
    encoder = Train(texts=Said(Captions(model=language), "all"))
    before = {step: name(step) for step in (VISUAL, language, encoder)}
    assert len(set(before.values())) == 3
    assert name(Adapt(stage="visual", lesson="captions")) == before[VISUAL]
    other = dataclasses.replace(language, start=dataclasses.replace(VISUAL, again=1))
    assert name(dataclasses.replace(encoder, texts=Said(Captions(model=other), "all"))) != before[encoder]
    assert name(dataclasses.replace(encoder, texts=Said(Captions(model=language), "first"))) != before[encoder]
    facts["train"] = 1
    assert (name(language), name(encoder) == before[encoder]) == (before[language], False)
    facts["train"], facts["adapt"] = 0, 1
    assert not set(before.values()) & {name(step) for step in before}


def test_settings_belong_to_a_kind_of_training() -> None:
    changes, drawing = read_changes(["visual.steps=7", "contrastive.batch_size=9", "caption.num_samples=2"], "demo")
    assert changes == {"visual": ("steps=7",), "contrastive": ("batch_size=9",)}
    assert override(Drawing(), drawing).num_samples == 2
    for wrong, says in (
        ("steps=7", "begins with none of visual"),
        ("visual.seed=7", "the grid sets that"),
        ("language.stepz=7", "stepz"),
        ("caption.beams=7", "beams"),
    ):
        with pytest.raises(ValueError, match=says):
            read_changes([wrong], "demo")


# Stand-ins.


def test_frames_are_merged_by_what_is_new_in_each() -> None:
    frames = [
        "a red ball left over sand",
        "a red ball left over sand",
        "a red ball centered over sand",
        "",
        "a red ball right over sand",
    ]
    assert merge(frames) == "a red ball left over sand, then centered, then right"
    assert merge(["", "nothing over sand"]) == "nothing over sand"
    assert merge(["", ""]) == ""


def test_pictures_are_asked_about_one_by_one() -> None:
    captions = ("a small red ball top left and a cyan badge centered over grass", "nothing over brick")
    record = Record(key="p", video="p.mp4", start_seconds=1.0, end_seconds=2.0, captions=captions)
    first, second = about_pictures([record])
    assert (first.start_seconds, first.end_seconds, second.start_seconds) == (1.0, 1.5, 1.5)
    assert first.captions == captions[:1]
    assert [(q.question, q.answer) for q in first.questions] == [
        ("what is at the top left?", "the red ball is at the top left"),
        ("what color is the ball?", "the ball is red"),
        ("what is in the middle?", "the cyan badge is in the middle"),
        ("what color is the badge?", "the badge is cyan"),
        ("what is in the background?", "grass is in the background"),
    ]
    assert [q.answer for q in second.questions] == ["brick is in the background"]


def test_long_answers_are_whole_sentences_of_the_narrative() -> None:
    told = (
        "<red ball> a red ball is on the left, first it slides right slowly, then it grows. <background> sand drifts."
    )
    (record,) = long_answers([Record(key="a", video="a.mp4", narrative=told), Record(key="b", video="b.mp4")])
    assert record.narrative is None
    answers = {q.question: q.answer for q in record.questions}
    assert answers["what does the red ball do?"] == "the red ball slides right, then it grows"
    assert answers["what happens?"].startswith("a red ball is on the left, first")


# Directions.


def test_a_direction_needs_an_interval_without_0_and_more_than_another_seed_changes() -> None:
    assert verdict(Score(5, 1, 9), 4) == "agrees"
    assert verdict(Score(5, 1, 9), 5) == "undecided"
    assert verdict(Score(5, -1, 11), 0) == "undecided"
    assert verdict(Score(-5, -9, -1), 4) == "does not"
    assert verdict(Score(-5, -9, -1), 6) == "undecided"


def grid_of(*papers: tuple[float | None, ...]) -> Grid:
    rows = tuple(
        Row(f"r{i}", f"row {i}", Adapt(stage="visual", lesson="captions", again=i), p) for i, p in enumerate(papers)
    )
    columns = (Column("A CIDEr", "cider"), Column("B CIDEr", "cider"))
    pairs = tuple((f"r{i}", f"r{i - 1}") for i in range(1, len(rows)))
    return dataclasses.replace(
        GRIDS["trained-part"], rows=rows, columns=columns, pairs=pairs, again=rows[0].key, scores=("cider",), notes=()
    )


def test_directions_follow_the_papers_figures() -> None:
    """Columns that agree are one direction; those that do not are none, and without a figure there is none."""
    grid = grid_of((1.0, 5.0), (2.0, 4.0), (3.0, 6.0), (None, 7.0), ())
    base = np.arange(50.0)
    scores = {row.key: {"cider": Items(base + i)} for i, row in enumerate(grid.rows)}
    found = judge(grid, scores, {"cider": Items(base + 0.5)})
    assert [(one.better, one.worse, one.paper, one.verdict) for one in found] == [
        ("r2", "r1", (("A CIDEr", 1.0), ("B CIDEr", 2.0)), "agrees"),
        ("r3", "r2", (("B CIDEr", 1.0),), "agrees"),
    ]
    assert all(one.seed == 0.5 for one in found)
    assert [one.verdict for one in judge(grid, scores, {"cider": Items(base + 1.0)})] == ["undecided"] * 2
    assert summary(found) == "Of 2 directions of the paper, 2 agree at this size, 0 do not, 0 are undecided."
    del scores["r2"]  # left out
    assert [(one.better, one.worse) for one in judge(grid, scores, {"cider": Items(base)})] == []


def test_differences_are_paired_and_go_by_clips() -> None:
    """Hard and easy clips cancel; many questions of few clips are no more sure than the clips are many."""
    rng = np.random.default_rng(0)
    hard = 50 * rng.random(200)
    better, worse = Items(hard + 2), Items(hard + rng.normal(0, 1, 200))
    assert better.score().low < worse.score().high  # apart they overlap
    assert better.minus(worse).low > 1
    values = np.repeat(rng.normal(0, 1, 10), 30)
    alone, by_clip = Items(values).score(), Items(values, np.repeat(np.arange(10), 30)).score()
    assert by_clip.high - by_clip.low > 3 * (alone.high - alone.low)
    again = Items.from_json(json.loads(json.dumps(Items(values, np.repeat(np.arange(10), 30)).to_json())))
    assert again.score().low == pytest.approx(by_clip.low, abs=1e-5)


# From end to end, at the smallest size.

STEPS = ["visual.steps=3", "language.steps=3", "contrastive.steps=3", "contrastive.optim.warmup_steps=1"]
DRAWING = ["caption.num_samples=2", "caption.max_length=6", "caption.batch_size=4"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a corpus and random image models, as the demo leaves trained ones."""
    pytest.importorskip("pyvdl._core", reason="the C++ module is not built")
    folder = tmp_path_factory.mktemp("ablations")
    corpus = make_corpus(folder / "corpus", num_clips=20, seed=1)
    tokenizer = WordTokenizer.from_texts(starts.texts(corpus))
    sizes = tiny(tokenizer.vocab_size)
    save_model(folder / "image" / "model", VLM(sizes.vlm, rngs=nnx.Rngs(0)), sizes.vlm, tokenizer)
    shape = dataclasses.replace(sizes.dual_encoder, vision=dataclasses.replace(sizes.dual_encoder.vision, num_frames=1))
    save_model(folder / "encoder" / "model", DualEncoder(shape, rngs=nnx.Rngs(0)), shape, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starts, "CLIPS", 20)
        patch.setitem(config.PRESETS, "demo", tiny)
        yield folder


@pytest.fixture(scope="module")
def world(start: Path) -> World:
    return toy_world(start, seed=1, assignments=[*STEPS, *DRAWING])


ENCODERS = dataclasses.replace(
    GRIDS["caption-source"],
    name="encoders",
    rows=tuple(GRIDS["caption-source"].row(key) for key in ("alt-text", "summary", "V")),
    pairs=(("summary", "alt-text"), ("V", "summary")),
    again="alt-text",
    scores=("R@1",),
)
MODELS = dataclasses.replace(
    GRIDS["self-training"],
    name="models",
    rows=(
        Row("none", "no adaptation", ImageModel()),
        GRIDS["self-training"].row("without"),
        Row("with", "with", dataclasses.replace(VISUAL, pseudo=Captions(model=VISUAL)), (43.5,)),
    ),
    again="without",
)


def done(folder: Path) -> dict[str, int]:
    """Files of finished steps and scores, with their times."""
    files = [*folder.glob("steps/*/metrics.jsonl"), *folder.glob("steps/*/captions-*"), *folder.glob("scores/*.json")]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def outcomes(start: Path, world: World) -> dict[str, Outcome]:
    """A grid stopped in the midst and started again, and a second one that shares steps with it."""
    real, calls = run.train, []

    def stopped(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_grid(ENCODERS, world, start)
    before = done(start)
    assert before
    found = {"encoders": run_grid(ENCODERS, world, start)}
    between = done(start)
    assert {name: between[name] for name in before} == before  # nothing of it was done again
    found["models"] = run_grid(MODELS, world, start)
    after = done(start)
    assert {name: after[name] for name in between} == between
    names = [name for name in after if name.startswith("steps/visual") and name.endswith("metrics.jsonl")]
    assert len(names) == 3  # V, once for both grids; again; self-trained
    return found


def test_a_grid_that_was_stopped_goes_on_and_shares_its_steps(
    start: Path, world: World, outcomes: dict[str, Outcome]
) -> None:
    files = done(start)
    again = run_grid(ENCODERS, world, start)
    assert done(start) == files
    assert again.judged == outcomes["encoders"].judged
    assert set(outcomes["encoders"].scores) == {"alt-text", "summary", "V"}
    assert {"R@1", "R@5", "R@10", "top1", "top5"} <= set(again.scores["V"])
    assert {"cider"} == set(outcomes["models"].scores["none"])  # nobody asked for answers
    assert not list(start.glob("scores/*answers*"))
    assert all(len(items["R@1"].values) == len(world.test) for items in again.scores.values())
    assert again.seconds["train-" + digest(ENCODERS.row("alt-text").recipe, world.facts)[:16]] > 0
    drawing = dataclasses.replace(world.drawing, num_samples=3)
    for other, same in (
        (dataclasses.replace(world, seed=2), False),
        (dataclasses.replace(world, drawing=drawing), True),
    ):
        work = Work(other, start, Clock(start / "other.json"))  # another world has other steps
        assert not work.done(Captions(model=VISUAL))
        assert work.done(VISUAL) == same


def test_texts_of_the_clips_are_those_of_their_source(start: Path, world: World, outcomes: dict[str, Outcome]) -> None:
    work = Work(world, start, Clock(start / "other.json"))
    by_key = {record.key: record for record in world.unlabelled}
    samples = work._said(Said(Captions(model=VISUAL), "all"))
    first = work._said(Said(Captions(model=VISUAL), "first"))
    assert {len(record.captions) for record in samples} <= {1, 2}
    assert [record.captions for record in first] == [record.captions[:1] for record in samples]
    for record in work._texts(Train(texts="alt-text")):
        assert record.captions == (by_key[record.key].alt_text,)
    assert work._texts(Train(texts="human")) == world.unlabelled
    some = work._texts(Train(texts="human", share=0.5))
    assert 0 < len(some) < len(world.unlabelled)
    summaries = {record.key: f"all of {record.key}" for record in world.unlabelled}
    work.world = dataclasses.replace(world, summaries=summaries)
    merged = work._said(Said(Captions(model=None, frames=4), "summary"))
    assert [record.captions for record in merged] == [(summaries[record.key],) for record in merged]


def test_a_step_says_to_the_training_what_it_is(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(run, "adapt", lambda *arguments, **options: asked.append((arguments, options)))
    monkeypatch.setattr(run, "train", lambda *arguments, **options: asked.append((arguments, options)))
    work = Work(world, tmp_path, Clock(tmp_path / "seconds.json"))
    tuned = Adapt(
        stage="prompt", lesson="reasoning", start=dataclasses.replace(VISUAL, trainable=("language",)), again=1
    )
    assert tuned.start is not None
    encoder = Train(texts="labelled", share=0.5)
    for step in (tuned.start, tuned, encoder):
        work.carry_out(step)
    (visual, first), (prompt, second), (texts, third) = asked
    assert visual[0] == "visual"
    assert first["start"] == world.vlm
    assert first["assignments"][-3:] == ["steps=3", "seed=1", "trainable=('language',)"]
    assert prompt[0] == "prompt"
    assert prompt[2] == work.folder(tuned)
    assert {q.family for record in prompt[1] for q in record.questions} == {"temporal", "causal"}
    assert not any(record.captions for record in prompt[1])
    assert second["start"] == work.folder(tuned.start) / "model"
    assert second["assignments"][-2:] == ["steps=3", "seed=1001"]
    assert 0 < len(texts[0]) < len(world.labelled)
    assert third["start"] == world.encoder


def test_table_and_page_show_both_sides_and_what_stands_in(
    start: Path, world: World, outcomes: dict[str, Outcome]
) -> None:
    for grid, name in ((ENCODERS, "encoders"), (MODELS, "models")):
        outcome = outcomes[name]
        printed = table(outcome)
        page = write_results(outcome, world, start)
        text = html.unescape(page.read_text())
        assert page == start / f"{name}.html"
        for row in grid.rows:
            line = next(line for line in printed.splitlines() if line.startswith(row.label))
            shown = [f"{value:.1f}" for value in row.paper] + [
                f"{outcome.scores[row.key][grid.scores[0]].score().value:.1f}"
            ]
            for figure in shown or ["-"]:
                assert figure in line
                assert figure in text
            assert row.label in text
            assert describe(row.recipe) in text
        assert summary(outcome.judged) in printed
        assert summary(outcome.judged) in text
        assert "Toy size" in text
        assert f"pyvdl ablate {name}" in text
        assert "<script" not in text
        facts = json.loads((start / f"{name}.json").read_text())
        assert len(facts["directions"]) == len(outcome.judged) > 0
        assert list(start.glob(f"{name}-rows-*.png"))
    stand_in = GRIDS["caption-source"].row("summary").stand_in
    assert stand_in is not None
    assert stand_in in " ".join(table(outcomes["encoders"]).split())
    assert not list(start.glob("*.partial"))


def test_the_command_runs_a_grid_on_data_of_the_user(
    start: Path, outcomes: dict[str, Outcome], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All programs are those that are compiled already. Rows whose data nobody brought are left out, and told."""
    grid = GRIDS["trained-part"]
    monkeypatch.setitem(GRIDS, grid.name, dataclasses.replace(grid, rows=(grid.row("vision"),), pairs=()))
    corpus, out = start / "corpus", start / "own"
    data = [
        "--test",
        corpus / "test.jsonl",
        "--data",
        corpus / "train.jsonl",
        "--unlabelled",
        corpus / "unlabelled.jsonl",
    ]
    models = ["--vlm", start / "image" / "model", "--encoder", start / "encoder" / "model", "--preset", "demo"]
    settings = [f"--set={change}" for change in (*STEPS, *DRAWING)]
    argv = ["ablate", "trained-part", "--out", out, *data, *models, *settings]
    assert main([str(word) for word in argv]) == 0
    printed = capsys.readouterr().out
    assert "Table 5, rows 1 to 3" in printed
    assert (out / "trained-part.html").exists()
    runs = [json.loads(path.read_text()) for path in out.glob("steps/*/run.json")]
    assert [one["train"]["trainable"] for one in runs] == [["vision", "projection"]] * 2
    assert sorted(one["train"]["seed"] for one in runs) == [0, 1000]
    assert all(one["train"]["steps"] == 3 for one in runs)
    world = user_world(out, test=corpus / "test.jsonl", labelled=corpus / "train.jsonl", preset="demo")
    assert world.lacks(VISUAL) == "an image model (--vlm)"
    with pytest.raises(ValueError, match="order needs an image model"):
        run_grid(GRIDS["order"], world, out)
    world = dataclasses.replace(world, vlm=start / "image" / "model")
    lacking = {row.key for row in GRIDS["instruction-source"].rows if run._lacks(row.recipe, world)}
    assert lacking == {"pictures", "long answers"}
    assert len(read_manifest(corpus / "test.jsonl")) == len(world.test)


def test_mistakes_in_the_command_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ablate"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed and grid.source in listed for name, grid in GRIDS.items())
    for argv, says in (
        (["nothing"], "invalid choice: 'nothing'"),
        (["order", "--data", "a.jsonl"], "need --test"),
        (["order", "--preset", "toy"], "need --test"),
        (["order", "--set", "visual.stepz=3"], "stepz"),
        (["order", "--test", "t.jsonl", "--source", "laava=a.jsonl"], "expected NAME=DATA with one of pictures"),
    ):
        assert main(["ablate", *argv, "--out", str(tmp_path / "out")]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
