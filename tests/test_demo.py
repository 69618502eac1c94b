"""The whole demo at the smallest size: every figure of the schema is there, and a second start trains nothing again."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyvdl import config, demo, starts
from pyvdl.config import Preset, T5Config, TrainConfig
from pyvdl.data import Question, Record
from pyvdl.metrics.wordnet import wordnet
from pyvdl.train import History

pytest.importorskip("pyvdl._core", reason="the C++ module is not built")

CLIPS = 40
STEPS = 20
PRETRAIN_STEPS = 50  # more than the warm-up, which is fixed there


def tiny(vocab_size: int) -> Preset:
    """The demo's settings at a width and with steps for which only compiling takes time."""
    found = config.demo(vocab_size)
    vision = dataclasses.replace(
        found.vlm.vision, patch_size=found.vlm.vision.image_size // 2, width=32, depth=1, num_heads=2, mlp_dim=32
    )
    assert isinstance(found.vlm.language, T5Config)
    language = dataclasses.replace(
        found.vlm.language, width=32, encoder_layers=1, decoder_layers=1, num_heads=2, head_dim=16, mlp_dim=32
    )
    shape = found.dual_encoder
    dual_encoder = dataclasses.replace(
        shape,
        vision=dataclasses.replace(vision, num_frames=shape.vision.num_frames, class_token=True),
        text=dataclasses.replace(shape.text, width=32, depth=1, num_heads=2, mlp_dim=32),
        embed_dim=32,
    )

    def short(stage: TrainConfig) -> TrainConfig:
        optim = dataclasses.replace(stage.optim, warmup_steps=5)
        return dataclasses.replace(stage, steps=STEPS, batch_size=8, checkpoint_every=STEPS, optim=optim)

    return dataclasses.replace(
        found,
        vlm=dataclasses.replace(found.vlm, vision=vision, language=language),
        dual_encoder=dual_encoder,
        visual=short(found.visual),
        language=short(found.language),
        contrastive=short(found.contrastive),
    )


@dataclasses.dataclass
class Ran:
    """A demo that ended, and what it printed."""

    directory: Path
    page: Path
    report: dict[str, Any]
    printed: str


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starts, "CLIPS", CLIPS)
        for name in ("ENCODER_STEPS", "TEXT_STEPS", "IMAGE_STEPS"):
            patch.setattr(starts, name, PRETRAIN_STEPS)
        patch.setattr(starts, "SAMPLES", 2)
        patch.setattr(starts, "BATCH", 8)
        patch.setitem(config.PRESETS, "demo", tiny)
        yield


def run(directory: Path, capture: pytest.CaptureFixture[str] | None = None) -> Ran:
    page = demo.run_demo(directory, seed=1)
    printed = capture.readouterr().out if capture else ""
    return Ran(directory, page, json.loads((directory / "report.json").read_text()), printed)


@pytest.fixture(scope="module")
def first(small: None, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return run(tmp_path_factory.mktemp("demo"))


SCORE = {"value", "low", "high"}


def numbers(node: Any) -> Iterator[float]:
    if isinstance(node, dict):
        for value in node.values():
            yield from numbers(value)
    elif isinstance(node, list):
        for value in node:
            yield from numbers(value)
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield node


def test_report_has_every_key_of_the_schema(first: Ran) -> None:
    report = first.report
    assert set(report) == {
        "pyvdl", "machine", "versions", "seed", "seconds", "corpus", "vlm", "dual_encoder", "caption_statistics",
        "recovered_gain", "claims", "verdict", "losses", "throughput", "examples",
    }  # fmt: skip
    assert report["seed"] == 1
    steps = {"corpus", "pretrain", "visual", "language", "caption", "dual_encoder", "evaluate"}
    assert steps | {"total"} <= set(report["seconds"])
    assert report["seconds"]["total"] >= sum(report["seconds"][step] for step in steps) - 0.01

    corpus = report["corpus"]
    assert corpus["train"] + corpus["unlabelled"] + corpus["test"] == CLIPS
    assert sum(corpus["codecs"].values()) == corpus["files"]
    assert {"wrong", "missing", "vague"} <= set(corpus["alt_text_noise"])

    assert set(report["vlm"]) == {"image", "visual", "language"}
    for stage in report["vlm"].values():
        for name in ("cider", "exact_match", "wups", "detail_recall"):
            assert set(stage[name]) == SCORE
        assert set(stage["exact_match_by_family"]) == {"temporal", "causal", "short"}
        assert {"mean_length", "detail_length"} <= set(stage)

    texts = {"alt_text", "pseudo_captions", "human_captions"}
    assert set(report["dual_encoder"]) == set(report["caption_statistics"]) == texts
    for scores in report["dual_encoder"].values():
        for direction in ("t2v", "v2t"):
            assert set(scores[direction]) == {"R@1", "R@5", "R@10", "median_rank", "mean_rank"}
            assert all(set(scores[direction][name]) == SCORE for name in ("R@1", "R@5", "R@10"))
        assert set(scores["top1"]) == set(scores["top5"]) == SCORE
    for counted in report["caption_statistics"].values():
        assert set(counted) == {"captions", "mean_length", "unique_nouns", "unique_verbs", "vocabulary"}
    assert report["caption_statistics"]["alt_text"]["captions"] == corpus["unlabelled"]
    assert report["caption_statistics"]["human_captions"]["captions"] == 3 * corpus["unlabelled"]

    losses = {"visual", "language", *(f"dual_{text}" for text in texts)}
    assert losses | {"pretrain"} <= set(report["losses"])
    assert all(report["losses"][name][-1][0] == STEPS for name in losses)
    throughput = report["throughput"]
    assert set(throughput) == {"decode", "wait_share", "caption"}
    assert throughput["decode"]["clips_per_second"] > 0
    assert set(throughput["wait_share"]) == {"visual", "language", "dual_encoder"}
    assert all(0 <= share <= 1 for share in throughput["wait_share"].values())
    assert throughput["caption"]["tokens_per_second"] > throughput["caption"]["clips_per_second"] > 0

    assert len(report["claims"]) == 4
    assert all({"claim", "holds", "figures"} <= set(claim) for claim in report["claims"])
    assert all(math.isfinite(number) for number in numbers(report))


def test_scores_are_percent_points_within_their_intervals(first: Ran) -> None:
    found = [score for stage in first.report["vlm"].values() for score in stage.values() if isinstance(score, dict)]
    found += [
        score
        for scores in first.report["dual_encoder"].values()
        for score in (*scores["t2v"].values(), *scores["v2t"].values(), scores["top1"], scores["top5"])
        if isinstance(score, dict)
    ]
    scores = [score for score in found if set(score) == SCORE]
    assert len(scores) == 3 * 4 + 3 * 8
    for score in scores:
        assert 0 <= score["low"] <= score["value"] <= score["high"]


def test_page_and_examples_are_written(first: Ran) -> None:
    assert first.page == first.directory / "report.html"
    page = first.page.read_text()
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    examples = first.report["examples"]
    assert examples["captions"]
    assert examples["retrieval"]
    for example in examples["captions"]:
        assert {"key", "video", "frames", "human", "image", "visual", "language", "detail", "questions"} == set(example)
        assert all((first.directory / name).is_file() for name in example["frames"])
    for example in examples["retrieval"]:
        assert len(example["ranked"]) == 5
        assert all((first.directory / entry["frame"]).is_file() for entry in example["ranked"])
    assert not list(first.directory.glob("*.partial"))


def test_starting_again_goes_on_from_what_is_done(first: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    """No step is trained, no file encoded, no clip captioned again; the scores are the same, the seconds add up."""
    logs = {path: path.read_bytes() for path in first.directory.rglob("metrics.jsonl")}  # they hold each step's seconds
    files = {path: path.stat().st_mtime_ns for path in first.directory.glob("corpus/videos/*")}
    assert len(logs) >= 7
    assert len(files) == first.report["corpus"]["files"]
    captions = {path: path.stat().st_mtime_ns for path in first.directory.glob("captions/captions-*.parquet")}
    assert captions
    files |= captions
    again = run(first.directory, capsys)
    assert [path.parent.name for path, content in logs.items() if path.read_bytes() != content] == []
    assert [path.name for path, time in files.items() if path.stat().st_mtime_ns != time] == []
    for part in ("vlm", "dual_encoder", "caption_statistics", "corpus", "verdict", "losses", "recovered_gain"):
        assert again.report[part] == first.report[part], part
    for step in ("pretrain", "caption", "total"):
        assert again.report["seconds"][step] > first.report["seconds"][step]
    for label in ("CIDEr-D", "exact match", "WUPS", "text to video R@1", "zero-shot top-1"):
        assert label in again.printed
    assert again.report["verdict"] in again.printed


def test_another_seed_in_the_same_directory_is_refused(first: Ran) -> None:
    with pytest.raises(ValueError, match="holds another corpus"):
        demo.run_demo(first.directory, seed=2)


# Parts.


def record(**texts: Any) -> Record:
    return Record(key="a", video="a.mp4", **texts)


def test_details_are_held_against_whole_words() -> None:
    assert demo._recall("a red ball slides left slowly", ["red ball", "slides left", "slow", "grass"]) == 0.5


def test_language_stage_gets_questions_from_the_narrative_not_from_the_corpus() -> None:
    question = Question("what color is the moon?", "white", "short")
    told = "<red ball> a red ball is in the middle, first it grows slowly. <background> grass drifts up."
    taught = starts.instructed(record(narrative=told, questions=(question,)))
    assert taught.questions
    assert question not in taught.questions


def test_curve_is_the_mean_of_ten_steps() -> None:
    history = History(
        steps=np.arange(1, 26),
        losses=np.arange(25.0),
        grad_norms=np.zeros(25),
        seconds=1.0,
        wait_seconds=0.0,
        compile_seconds=0.0,
    )
    assert demo._curve(history) == [[10, 4.5], [20, 14.5]]


@pytest.mark.parametrize("absent", ["matplotlib", "pyarrow", "wn"])
def test_what_the_end_needs_is_asked_for_at_the_start(
    absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wordnet.cache_clear()
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(ImportError, match=rf"pip install .*{absent}"):
        demo.run_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
