"""Captioning: rows, and their independence of batches and neighbours."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from pyvdl import caption
from pyvdl.caption import caption_records, clip_batches, clip_seed
from pyvdl.clip_prompts import encode_prompts
from pyvdl.config import ClipConfig
from pyvdl.data import Record
from pyvdl.filters import Filters
from pyvdl.generate import Samples, generate
from pyvdl.models.vlm import VLM
from pyvdl.rows import CaptionRow
from pyvdl.text import CAPTION_PROMPT, WordTokenizer
from pyvdl.video import sample_clip
from tests.clips import write_clips
from tests.models import tiny_vlm

CLIP = ClipConfig(num_frames=2, sampling="uniform", short_side=32, size=32)
NUM_CLIPS = 5
BAD = 2  # its file is not a video


@pytest.fixture(scope="module")
def tokenizer() -> WordTokenizer:
    return WordTokenizer.from_texts([CAPTION_PROMPT, "a red ball moves left then right and a blue star turns"])


@pytest.fixture(scope="module")
def model(tokenizer: WordTokenizer) -> VLM:
    return tiny_vlm(tokenizer)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("clips")
    paths = write_clips(folder, NUM_CLIPS, BAD)
    return [Record(key=f"clip-{i}", video=str(path)) for i, path in enumerate(paths)]


def run(model: VLM, tokenizer: WordTokenizer, records: list[Record], **changes: Any) -> list[CaptionRow]:
    options: dict[str, Any] = dict(clip=CLIP, num_samples=3, max_length=8, top_p=0.9, seed=7, batch_size=2) | changes
    return list(caption_records(model, tokenizer, records, **options))


def test_every_record_has_a_row_in_order(model: VLM, tokenizer: WordTokenizer, records: list[Record]) -> None:
    seen: list[tuple[int, int]] = []
    rows = run(model, tokenizer, records, progress=lambda done, total: seen.append((done, total)))
    assert [row.key for row in rows] == [record.key for record in records]
    assert [row.status for row in rows] == ["failed" if i == BAD else "ok" for i in range(NUM_CLIPS)]
    assert seen == [(2, 5), (4, 5), (5, 5)]
    for row in rows:
        assert row.prompt == CAPTION_PROMPT
        if row.status == "ok":
            assert len(row.captions) == len(row.log_probs) == 3
            assert row.error is None
            assert all(np.isfinite(p) and p < 0 for p in row.log_probs)
        else:
            assert row.captions == row.log_probs == []
            assert row.error
    texts = [tuple(row.captions) for row in rows if row.status == "ok"]
    assert len(set(texts)) > 1, "different clips and seeds draw different captions"


def test_captions_do_not_depend_on_batches_or_neighbours(
    model: VLM, tokenizer: WordTokenizer, records: list[Record]
) -> None:
    whole = {row.key: row for row in run(model, tokenizer, records)}
    for batch_size in (1, 3):
        for row in run(model, tokenizer, records, batch_size=batch_size):
            assert row.captions == whole[row.key].captions
            np.testing.assert_allclose(row.log_probs, whole[row.key].log_probs, rtol=1e-4)
    reverse = run(model, tokenizer, records[::-1])
    assert [row.captions for row in reverse] == [whole[row.key].captions for row in reverse]


def test_the_seed_draws_other_captions_and_greedy_has_none(
    model: VLM, tokenizer: WordTokenizer, records: list[Record]
) -> None:
    good = [record for i, record in enumerate(records) if i != BAD]
    first, second = (run(model, tokenizer, good, seed=seed) for seed in (1, 2))
    assert [row.captions for row in first] != [row.captions for row in second]
    first, second = (run(model, tokenizer, good, seed=seed, temperature=0.0) for seed in (1, 2))
    assert [row.captions for row in first] == [row.captions for row in second]
    assert all(len(set(row.captions)) == 1 for row in first)


def test_each_caption_has_the_log_probability_and_length_it_was_drawn_with(
    model: VLM, tokenizer: WordTokenizer, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [record for i, record in enumerate(records) if i != BAD]
    drawn: list[Samples] = []

    def noted(*arguments: Any, **options: Any) -> Samples:
        drawn.append(generate(*arguments, **options))
        return drawn[-1]

    monkeypatch.setattr(caption, "generate", noted)
    rows = run(model, tokenizer, good)
    tokens, log_probs, lengths = (np.concatenate(list(map(np.asarray, x))) for x in zip(*drawn))
    assert [row.captions for row in rows] == [[tokenizer.decode(text) for text in texts] for texts in tokens]
    np.testing.assert_array_equal([row.log_probs for row in rows], log_probs)
    means = log_probs / lengths
    at_least = float(means[lengths < lengths.max()].min()) + 1e-6  # a short text is just below, by its own length
    kept = run(model, tokenizer, good, filters=Filters(min_log_prob=at_least))
    assert [row.log_probs for row in kept] == [list(x[mean >= at_least]) for x, mean in zip(log_probs, means)]


def test_a_batch_of_bad_clips_costs_no_generation(
    model: VLM, tokenizer: WordTokenizer, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caption, "generate", lambda *a, **k: pytest.fail("generate was called"))
    missing = Record(key="missing", video="no/such/file.mp4")
    rows = run(model, tokenizer, [records[BAD], missing])
    assert [row.status for row in rows] == ["failed", "failed"]
    assert all(row.error for row in rows)


def test_no_records_no_rows(model: VLM, tokenizer: WordTokenizer) -> None:
    assert run(model, tokenizer, []) == []


def test_a_clip_of_another_size_is_refused(model: VLM, tokenizer: WordTokenizer, records: list[Record]) -> None:
    with pytest.raises(ValueError, match=r"64.*32"):
        run(model, tokenizer, records, clip=dataclasses.replace(CLIP, size=64, short_side=64))


def test_clip_batches_have_one_shape_and_mark_their_padding(records: list[Record]) -> None:
    batches = list(clip_batches(records, clip=CLIP, batch_size=3, num_threads=1, prefetch=1))
    assert [batch.data.shape for batch in batches] == [(3, 2, 32, 32, 3)] * 2
    assert np.concatenate([batch.index for batch in batches]).tolist() == [0, 1, 2, 3, 4, -1]
    assert np.concatenate([batch.ok for batch in batches]).tolist() == [True, True, False, True, True, False]


def test_a_clip_is_its_segment_of_the_video(records: list[Record]) -> None:
    windows: list[dict[str, Any]] = [
        {"start_seconds": 0.3, "end_seconds": 0.6},
        {"start_seconds": 0.5, "end_seconds": None},
    ]
    found = [dataclasses.replace(records[0], key=str(window), **window) for window in windows]
    (batch,) = clip_batches(found, clip=CLIP, batch_size=2, num_threads=1, prefetch=0)
    for clip, window in zip(batch.data, windows, strict=True):
        wanted = sample_clip(records[0].video, **dataclasses.asdict(CLIP), **window)
        np.testing.assert_array_equal(clip, wanted.data)


def test_clip_seeds_follow_from_key_times_and_seed() -> None:
    record = Record(key="a", video="x.mp4")
    assert clip_seed(record, 0) == clip_seed(Record(key="a", video="moved/x.mp4"), 0)
    others = [
        dataclasses.replace(record, **changes)
        for changes in ({"key": "b"}, {"start_seconds": 1.0}, {"end_seconds": 1.0})
    ]
    seeds = {clip_seed(record, 0), clip_seed(record, 1), *(clip_seed(other, 0) for other in others)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_prompts_are_as_long_as_the_longest(tokenizer: WordTokenizer) -> None:
    ids = encode_prompts(tokenizer, ["a red ball", "a"])
    assert ids.shape == (2, 4)
    assert (ids[1, 2:] == 0).all()
