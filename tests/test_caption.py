"""Captioning: rows, independence of batches and restarts, shards."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from pyvdl import caption
from pyvdl.caption import (
    CaptionRow,
    caption_job,
    caption_records,
    captions_by_key,
    clip_batches,
    clip_seed,
    encode_prompts,
    read_captions,
)
from pyvdl.config import ClipConfig, T5Config, toy
from pyvdl.data import Record
from pyvdl.models.vlm import VLM
from pyvdl.text import CAPTION_PROMPT, WordTokenizer
from tests.clips import write_clip

CLIP = ClipConfig(num_frames=2, sampling="uniform", short_side=32, size=32)
NUM_CLIPS = 5
BAD = 2  # its file is not a video


@pytest.fixture(scope="module")
def tokenizer() -> WordTokenizer:
    return WordTokenizer.from_texts([CAPTION_PROMPT, "a red ball moves left then right and a blue star turns"])


@pytest.fixture(scope="module")
def model(tokenizer: WordTokenizer) -> VLM:
    return tiny_vlm(tokenizer)


def tiny_vlm(tokenizer: WordTokenizer) -> VLM:
    config = toy(tokenizer.vocab_size).vlm
    vision = dataclasses.replace(config.vision, image_size=32, width=32, mlp_dim=64, depth=1)
    assert isinstance(config.language, T5Config)
    language = dataclasses.replace(
        config.language, width=32, head_dim=16, mlp_dim=64, encoder_layers=1, decoder_layers=1
    )
    return VLM(dataclasses.replace(config, vision=vision, language=language, num_frames=2), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("clips")
    paths = [folder / f"{i}.mp4" for i in range(NUM_CLIPS)]
    for i, path in enumerate(paths):
        if i == BAD:
            path.write_bytes(b"this is not a video" * 100)
        else:
            write_clip(path, seed=i)
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


def test_clip_seeds_follow_from_key_times_and_seed() -> None:
    record = Record(key="a", video="x.mp4")
    assert clip_seed(record, 0) == clip_seed(Record(key="a", video="moved/x.mp4"), 0)
    others = [dataclasses.replace(record, key="b"), dataclasses.replace(record, start_seconds=1.0)]
    seeds = {clip_seed(record, 0), clip_seed(record, 1), *(clip_seed(other, 0) for other in others)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_prompts_are_as_long_as_the_longest(tokenizer: WordTokenizer) -> None:
    ids = encode_prompts(tokenizer, ["a red ball", "a"])
    assert ids.shape == (2, 4)
    assert (ids[1, 2:] == 0).all()


def job(model: VLM, tokenizer: WordTokenizer, records: list[Record], out: Path, **changes: Any) -> caption.JobSummary:
    options: dict[str, Any] = dict(
        shard_size=2, clip=CLIP, num_samples=2, max_length=6, temperature=1.0, seed=3, batch_size=2
    )
    return caption_job(model, tokenizer, records, out, **(options | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_job_writes_whole_shards(model: VLM, tokenizer: WordTokenizer, records: list[Record], tmp_path: Path) -> None:
    done = job(model, tokenizer, records, tmp_path)
    assert (done.rows, done.failed, done.shards, done.shards_skipped) == (5, 1, 3, 0)
    assert sorted(contents(tmp_path)) == [*(f"captions-0000{i}-of-00003.jsonl" for i in range(3)), "job.json"]
    rows = list(read_captions(tmp_path))
    assert [row.key for row in rows] == [record.key for record in records]
    assert rows == run(model, tokenizer, records, num_samples=2, max_length=6, seed=3, top_p=1.0)
    found = captions_by_key(rows)
    assert set(found) == {row.key for row in rows if row.status == "ok"}
    assert found["clip-0"] == tuple(rows[0].captions)


def test_a_stopped_job_goes_on_and_ends_the_same(
    model: VLM,
    tokenizer: WordTokenizer,
    records: list[Record],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job(model, tokenizer, records, tmp_path / "whole")
    original = caption.caption_records

    def stops_after_three(*args: Any, **kwargs: Any) -> Iterator[CaptionRow]:
        for number, row in enumerate(original(*args, **kwargs)):
            if number == 3:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(caption, "caption_records", stops_after_three)
    with pytest.raises(KeyboardInterrupt):
        job(model, tokenizer, records, tmp_path / "cut")
    assert sorted(contents(tmp_path / "cut")) == ["captions-00000-of-00003.jsonl", "job.json"]
    with pytest.raises(ValueError, match="not a whole job"):
        list(read_captions(tmp_path / "cut"))

    asked: list[str] = []

    def watched(model: VLM, tokenizer: WordTokenizer, records: list[Record], **kwargs: Any) -> Iterator[CaptionRow]:
        asked.extend(record.key for record in records)
        return original(model, tokenizer, records, **kwargs)

    monkeypatch.setattr(caption, "caption_records", watched)
    done = job(model, tokenizer, records, tmp_path / "cut", batch_size=3)  # how it runs may change
    assert asked == ["clip-2", "clip-3", "clip-4"]
    assert done.shards_skipped == 1
    whole, cut = contents(tmp_path / "whole"), contents(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    for name in whole.keys() - {"job.json"}:
        for a, b in zip(whole[name].splitlines(), cut[name].splitlines(), strict=True):
            a_row, b_row = json.loads(a), json.loads(b)
            np.testing.assert_allclose(a_row.pop("log_probs"), b_row.pop("log_probs"), rtol=1e-4)
            assert a_row == b_row


def test_another_job_in_the_same_folder_is_refused(
    model: VLM, tokenizer: WordTokenizer, records: list[Record], tmp_path: Path
) -> None:
    job(model, tokenizer, records[:2], tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="seed was 3, now 4"):
        job(model, tokenizer, records[:2], tmp_path, seed=4)
    other = nnx.clone(model)
    other.projection.kernel[...] += 1
    with pytest.raises(ValueError, match="model_sha256"):
        job(other, tokenizer, records[:2], tmp_path)
    with pytest.raises(ValueError, match="records_sha256"):
        job(model, tokenizer, records[1:3], tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["[]", '{"job": "tra', ""])
def test_a_damaged_recipe_of_a_job_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is damaged.*choose another folder"):
        caption.claim(tmp_path / "run.json", {"job": "train"})


def row(key: str, **changes: Any) -> CaptionRow:
    fields: dict[str, Any] = dict(
        key=key, video="v.mp4", start_seconds=0.0, end_seconds=None, captions=["a ball"], log_probs=[-1.0]
    )
    rest: dict[str, Any] = dict(prompt="p", status="ok", error=None, seed=1)
    return CaptionRow(**(fields | rest | changes))


def test_rows_survive_json() -> None:
    made = row("ключ", captions=["un caffè"], end_seconds=2.5)
    assert CaptionRow.from_json(made.to_json()) == made
    with pytest.raises(ValueError, match="expected a JSON object with captions"):
        CaptionRow.from_json('{"key": "a"}')


def test_a_broken_row_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for broken in (b"{broken", b"caf\xe9"):
        path.write_bytes(row("a").to_json().encode() + b"\n" + broken + b"\n")
        with pytest.raises(ValueError, match=r"rows\.jsonl, line 2"):
            list(read_captions(path))


def test_a_key_with_two_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' has more than one row"):
        captions_by_key([row("a"), row("a")])
    assert captions_by_key([row("a"), row("b", status="failed", captions=[])]) == {"a": ("a ball",)}
