"""Filters of captions: each rule by hand, CLIP-scores by the encoder alone, and what rows and jobs tell of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pyvdl.caption import caption_records
from pyvdl.config import ClipConfig
from pyvdl.data import Record
from pyvdl.evaluate import embed_texts
from pyvdl.filters import ClipScorer, Filters, Sample, reasons, repetition
from pyvdl.models.dual_encoder import DualEncoder
from pyvdl.models.vlm import VLM
from pyvdl.pipeline import caption_job
from pyvdl.rows import CaptionRow, read_captions
from pyvdl.text import CAPTION_PROMPT, WordTokenizer
from pyvdl.video import sample_clip
from tests.clips import write_clips
from tests.models import tiny_dual_encoder, tiny_vlm

CLIP = ClipConfig(num_frames=2, sampling="uniform", short_side=32, size=32)
BAD = 2  # its file is not a video


def why(*samples: Sample, **filters: Any) -> list[str | None]:
    return reasons(samples, Filters(**filters))


def drawn(text: str, mean: float = -1.0, clip_score: float | None = None) -> Sample:
    tokens = len(text.split()) + 1
    return Sample(text, mean * tokens, tokens, clip_score)


def test_nothing_asked_for_drops_nothing() -> None:
    assert why(drawn("a dog"), drawn("a dog"), drawn("")) == [None, None, None]
    assert why() == []


def test_log_probability_is_the_mean_of_a_token() -> None:
    long, short = Sample("a dog runs over the green grass", -8.0, 8), Sample("dog", -4.0, 2)
    assert why(long, short, min_log_prob=-1.5) == [None, "min_log_prob"]
    assert why(long, short, min_log_prob=-1.0) == [None, "min_log_prob"]  # at least so much is kept
    assert why(long, short, min_log_prob=-0.9) == ["min_log_prob"] * 2


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0.0), ("dog", 0.0), ("a dog runs", 0.0), ("a dog a dog", 1 / 3), ("Dog dog dog dog", 2 / 3)],
)
def test_repetition_is_the_share_of_bigrams_seen_before(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share)
    assert why(drawn(text), max_repetition=0.3) == ["max_repetition" if share > 0.3 else None]


def test_of_captions_alike_the_better_one_is_kept() -> None:
    dogs = drawn("a dog runs", -2.0), drawn("A dog runs", -1.0), drawn("a cat sleeps", -3.0)
    assert why(*dogs, max_overlap=0.9) == ["max_overlap", None, None]
    assert why(*dogs[:2], drawn("a dog runs fast", -1.5), max_overlap=0.4) == ["max_overlap", None, "max_overlap"]
    assert why(*dogs[:2], drawn("a dog runs fast", -1.5), max_overlap=0.5) == ["max_overlap", None, None]
    equal = drawn("dog"), drawn("dog"), drawn(""), drawn("")
    assert why(*equal, max_overlap=0.9) == [None, "max_overlap", None, "max_overlap"]
    scored = drawn("a dog", -1.0, 0.1), drawn("a dog", -2.0, 0.2)
    assert why(*scored, max_overlap=0.9) == ["max_overlap", None]  # the CLIP-score tells which is better


def test_the_best_are_chosen_among_those_left() -> None:
    samples = drawn("a dog", -1.0), drawn("a dog", -1.1), drawn("a cat", -1.2), drawn("a fox", -1.3)
    assert why(*samples, keep_best=2) == [None, None, "keep_best", "keep_best"]
    assert why(*samples, keep_best=2, max_overlap=0.9) == [None, "max_overlap", None, "keep_best"]
    assert why(*samples, keep_best=9) == [None] * 4


def test_the_first_filter_that_drops_is_told() -> None:
    bad = drawn("dog dog dog", -9.0, -0.5)
    order: dict[str, Any] = dict(min_log_prob=-1.0, max_repetition=0.1, min_clip_score=0.0)
    for name in list(order):
        assert why(bad, **order) == [name]
        del order[name]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("min_log_prob", 0.1, "finite and at most 0"),
        ("min_log_prob", -math.inf, "finite"),
        ("max_repetition", 1.0, "at least 0 and below 1"),
        ("max_overlap", -0.1, "at least 0 and below 1"),
        ("min_clip_score", 2.5, "from -1 to 1"),
        ("keep_best", 0, "at least 1"),
    ],
)
def test_filters_that_cannot_be_meant_are_refused(name: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*{says}.*{value}"):
        Filters(**{name: value})


# --- with models


@pytest.fixture(scope="module")
def tokenizer() -> WordTokenizer:
    return WordTokenizer.from_texts([CAPTION_PROMPT, "a red ball moves left then right and a blue star turns"])


@pytest.fixture(scope="module")
def model(tokenizer: WordTokenizer) -> VLM:
    return tiny_vlm(tokenizer)


@pytest.fixture(scope="module")
def encoder(tokenizer: WordTokenizer) -> DualEncoder:
    return tiny_dual_encoder(tokenizer, num_frames=2, image_size=32)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("clips")
    return [Record(key=f"clip-{path.stem}", video=str(path)) for path in write_clips(folder, 5, BAD)]


def run(model: VLM, tokenizer: WordTokenizer, records: list[Record], **changes: Any) -> list[CaptionRow]:
    options: dict[str, Any] = dict(clip=CLIP, num_samples=4, max_length=6, top_p=0.9, seed=7, batch_size=2) | changes
    return list(caption_records(model, tokenizer, records, **options))


def test_rows_hold_what_was_kept_and_what_was_dropped(
    model: VLM, tokenizer: WordTokenizer, encoder: DualEncoder, records: list[Record]
) -> None:
    plain = run(model, tokenizer, records)
    assert all(row.dropped is None and row.clip_scores is None for row in plain)
    scored = run(model, tokenizer, records, encoder=(encoder, tokenizer))
    assert [row.captions for row in scored] == [row.captions for row in plain]
    best = run(model, tokenizer, records, encoder=(encoder, tokenizer), filters=Filters(keep_best=1))
    for all_of_it, row in zip(scored, best, strict=True):
        if row.status == "failed":
            assert row.dropped == row.clip_scores == row.captions == []
            continue
        assert all_of_it.clip_scores is not None
        assert row.dropped is not None
        assert all_of_it.dropped is None
        assert row.clip_scores == [max(all_of_it.clip_scores)]
        assert row.captions == [all_of_it.captions[int(np.argmax(all_of_it.clip_scores))]]
        assert {caption["reason"] for caption in row.dropped} == {"keep_best"}
        told = {(c["caption"], c["log_prob"], c["clip_score"]) for c in row.dropped}
        told |= set(zip(row.captions, row.log_probs, row.clip_scores))
        assert told == set(zip(all_of_it.captions, all_of_it.log_probs, all_of_it.clip_scores))
    nothing = run(model, tokenizer, records[:1], filters=Filters(min_log_prob=0.0))[0]
    assert (nothing.status, nothing.captions, nothing.log_probs, len(nothing.dropped or ())) == ("ok", [], [], 4)


def test_scores_are_those_of_the_encoder_whatever_the_neighbours(
    model: VLM, tokenizer: WordTokenizer, encoder: DualEncoder, records: list[Record]
) -> None:
    rows = {row.key: row for row in run(model, tokenizer, records, encoder=(encoder, tokenizer))}
    for row in run(model, tokenizer, records[::-1], encoder=(encoder, tokenizer)):
        assert row == rows[row.key]
    frames = sample_clip(records[0].video, num_frames=2, sampling="uniform", short_side=32, size=32).data
    wanted = (
        embed_texts(encoder, tokenizer, rows["clip-0"].captions, batch_size=4) @ of_frames(encoder, frames[None])[0]
    )
    np.testing.assert_allclose(rows["clip-0"].clip_scores or [], wanted, atol=1e-5)


def of_frames(model: DualEncoder, frames: np.ndarray) -> np.ndarray:
    return np.asarray(nnx.jit(lambda model, frames: model.encode_video(frames))(model, jnp.asarray(frames)))


def test_an_encoder_of_other_frames_and_sizes_sees_some_of_them_resized(
    tokenizer: WordTokenizer, encoder: DualEncoder
) -> None:
    of_images = tiny_dual_encoder(tokenizer, num_frames=1, image_size=16)
    scorer = ClipScorer(of_images, tokenizer)
    shades = np.array([10, 90, 170, 250], np.uint8)
    less = np.tile(np.array([[1, 0], [0, 0]], np.uint8), (16, 16))[:, :, None]  # a quarter on average: rounded away
    frames = shades[None, :, None, None, None] - np.broadcast_to(less, (1, 4, 32, 32, 3))
    wanted = of_frames(of_images, np.broadcast_to(shades[None, :, None, None, None], (1, 4, 16, 16, 3)))
    np.testing.assert_allclose(scorer.embed(frames), wanted, atol=1e-5)
    found = ClipScorer(encoder, tokenizer).embed(frames)
    np.testing.assert_allclose(found, of_frames(encoder, frames[:, [1, 3]]), atol=1e-5)


def test_a_minimum_score_wants_an_encoder(model: VLM, tokenizer: WordTokenizer, records: list[Record]) -> None:
    with pytest.raises(ValueError, match=r"min_clip_score=0\.2: expected a dual encoder"):
        run(model, tokenizer, records, filters=Filters(min_clip_score=0.2))


def test_a_job_records_its_filters_and_counts_what_they_drop(
    model: VLM, tokenizer: WordTokenizer, encoder: DualEncoder, records: list[Record], tmp_path: Path
) -> None:
    options: dict[str, Any] = dict(
        shard_size=3, clip=CLIP, num_samples=4, max_length=6, top_p=0.9, seed=7, batch_size=2
    )
    options |= dict(shard_size=3, encoder=(encoder, tokenizer), filters=Filters(keep_best=2, max_overlap=0.9))
    done = caption_job(model, tokenizer, records, tmp_path, **options)
    rows = list(read_captions(tmp_path))
    names = [caption["reason"] for row in rows for caption in row.dropped or ()]
    assert done.dropped == {name: names.count(name) for name in set(names)}
    assert sum(len(row.captions) for row in rows) + len(names) == 4 * 4
    assert all(len(row.captions) == len(row.clip_scores or ()) <= 2 for row in rows)
    with pytest.raises(ValueError, match=r"filters.keep_best was 2, now None; filters.max_overlap was 0.9, now None"):
        caption_job(model, tokenizer, records, tmp_path, **(options | {"filters": None}))
    with pytest.raises(ValueError, match=r"clip_score_sha256 was '\w+', now None"):
        caption_job(model, tokenizer, records, tmp_path, **(options | {"encoder": None}))
