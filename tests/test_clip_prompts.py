"""Prompts filled in from a clip's columns: each clip's own, whatever stands beside it, in batches of few shapes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from pyvdl import caption as caption_module
from pyvdl.__main__ import main
from pyvdl.caption import Captioner, caption_records
from pyvdl.clip_prompts import MAX_PROMPT_TOKENS, Prompts, encode_prompts, prompt_columns
from pyvdl.config import ClipConfig
from pyvdl.data import Record
from pyvdl.generate import bucket
from pyvdl.models.vlm import VLM
from pyvdl.pipeline import JobSummary, caption_job
from pyvdl.rows import CaptionRow, read_captions
from pyvdl.text import CAPTION_PROMPT, WordTokenizer
from tests.clips import write_clips
from tests.kills import stopping
from tests.models import tiny_vlm, tokenizer_of

CLIP = ClipConfig(num_frames=2, sampling="uniform", short_side=32, size=32)
OPTIONS: dict[str, Any] = dict(clip=CLIP, num_samples=2, max_length=6, seed=3, batch_size=2)
TEMPLATE = "what does the {noun} do {more}"
WORDS = "a red ball moves left then right and blue star turns what does the do"
MORE = (
    "",
    "then left then right",
    "and a red ball turns " * 3,
    "and a blue star moves left " * 6,
)  # 16, 32 and 64 tokens
NUM_CLIPS, BAD, MUTE = 11, 2, 5


@pytest.fixture(scope="module")
def tokenizer() -> WordTokenizer:
    return WordTokenizer.from_texts([CAPTION_PROMPT, WORDS])


@pytest.fixture(scope="module")
def model(tokenizer: WordTokenizer) -> VLM:
    """Whose words depend on what it is told, though nothing was learned."""
    model = tiny_vlm(tokenizer)
    for _, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value[...] = value[...] * 3.0
    return model


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Clip `BAD` is not a video, clip `MUTE` has no noun."""
    paths = write_clips(tmp_path_factory.mktemp("clips"), NUM_CLIPS, BAD)
    found = []
    for i, path in enumerate(paths):
        columns = {"noun": ("ball", "star")[i % 2], "more": MORE[i % 4], "views": i}
        if i == MUTE:
            del columns["noun"]
        found.append(Record(key=f"clip-{i}", video=str(path), extra=columns))
    return found


def job(model: VLM, tokenizer: WordTokenizer, records: list[Record], out: Path, **changes: Any) -> JobSummary:
    options: dict[str, Any] = OPTIONS | {"shard_size": 5, "prompt": TEMPLATE}
    return caption_job(model, tokenizer, records, out, **(options | changes))


@pytest.fixture(scope="module")
def whole(
    model: VLM, tokenizer: WordTokenizer, records: list[Record], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert job(model, tokenizer, records, out) == JobSummary(rows=11, failed=2, dropped={}, shards=3, shards_skipped=0)
    return out


def bare(row: CaptionRow) -> CaptionRow:
    """Without what differs between jobs and calls: digests, last bits, and columns that other rows of a file have."""
    return dataclasses.replace(row, log_probs=[], model_sha256=None, recipe_sha256=None, extra={})


def test_each_clip_is_asked_with_its_own_words(
    model: VLM, tokenizer: WordTokenizer, records: list[Record], whole: Path
) -> None:
    """What a job says of a clip is what is said of it alone, with its prompt written out."""
    rows = {row.key: row for row in read_captions(whole)}
    for i, record in enumerate(records):
        row = rows[record.key]
        if i == MUTE:
            assert (row.status, row.error) == ("failed", "prompt: the clip has no column 'noun'")
            assert (row.captions, row.prompt) == ([], TEMPLATE)
            continue
        prompt = f"what does the {('ball', 'star')[i % 2]} do {MORE[i % 4]}"
        (alone,) = caption_records(model, tokenizer, [record], **OPTIONS, prompt=prompt)
        assert bare(row) == bare(alone)
        assert row.prompt == prompt
        assert row.extra["views"] == i
        np.testing.assert_allclose(row.log_probs, alone.log_probs, rtol=2e-3)  # in batches of one
    fixed = caption_records(model, tokenizer, records, **OPTIONS)
    assert [row.captions for row in fixed] != [rows[record.key].captions for record in records], "prompts say nothing"


def test_rows_come_in_order_without_a_job(
    model: VLM, tokenizer: WordTokenizer, records: list[Record], whole: Path
) -> None:
    seen: list[int] = []
    rows = caption_records(
        model,
        tokenizer,
        records,
        **OPTIONS,
        prompt=TEMPLATE,
        progress=lambda done, total, note="", /: seen.append(done),
    )
    wanted = {row.key: bare(row) for row in read_captions(whole)}
    assert [bare(row) for row in rows] == [wanted[record.key] for record in records]
    assert seen == sorted(seen)
    assert seen[-1] == NUM_CLIPS


def test_batches_have_the_room_that_their_prompts_take(
    model: VLM, tokenizer: WordTokenizer, records: list[Record], whole: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """No batch of short prompts is padded for a long one elsewhere, and every batch is of the same number of clips."""
    generate = caption_module.generate
    shapes: Counter[tuple[int, int]] = Counter()

    def noted(model: VLM, frames: Any, prompt: np.ndarray, **options: Any) -> Any:
        shapes[len(prompt), bucket(prompt.shape[1])] += 1
        return generate(model, frames, prompt, **options)

    monkeypatch.setattr(caption_module, "generate", noted)
    job(model, tokenizer, records, tmp_path)
    assert {size for size, _ in shapes} == {2}
    assert {length for _, length in shapes} == {16, 32, 48}
    assert sum(shapes.values()) <= NUM_CLIPS / 2 + 3 * 3  # of three shards, each with three lengths
    assert [path.read_bytes() for path in sorted(tmp_path.glob("captions-*"))] == [
        path.read_bytes() for path in sorted(whole.glob("captions-*"))
    ]


def test_a_stopped_job_goes_on_and_ends_the_same_to_the_bit(
    model: VLM, tokenizer: WordTokenizer, records: list[Record], whole: Path, tmp_path: Path
) -> None:
    with stopping():
        job(model, tokenizer, records, tmp_path)
    assert job(model, tokenizer, records[::-1], tmp_path).shards_skipped == 1
    assert [path.read_bytes() for path in sorted(tmp_path.glob("captions-*"))] == [
        path.read_bytes() for path in sorted(whole.glob("captions-*"))
    ]


def test_a_column_that_no_clip_has_is_told_before_anything_is_written(
    model: VLM, tokenizer: WordTokenizer, records: list[Record], tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"names 'verb', and no clip has such a column; there are: .*, more, noun, .*views$"
    ):
        job(model, tokenizer, records, tmp_path, prompt="{verb}")
    assert not (tmp_path / "job.json").exists()
    job(model, tokenizer, records, tmp_path, prompt="{key}")  # which every clip has
    assert {row.prompt for row in read_captions(tmp_path)} == {record.key for record in records}


def test_columns_of_a_prompt() -> None:
    assert prompt_columns("caption en") == ()
    assert prompt_columns("{a.b} {{c}} and {d e}, {a.b} again") == ("a.b", "d e")
    for wrong in ("{", "a } b", "{}", "{a!r}", "{a:>5}"):
        with pytest.raises(ValueError, match=r"a column is \{NAME\}, a brace itself \{\{ or \}\}"):
            prompt_columns(wrong)


def test_a_clip_without_a_prompt_is_told_why(tokenizer: WordTokenizer) -> None:
    prompts = Prompts(tokenizer, "a {x}")
    assert prompts.of({"x": "ball"}).text == "a ball"
    for number in (2.5, np.float32(2.5)):
        assert prompts.of({"x": number}).text == "a 2.5"
    assert prompts.of({"x": np.int64(2)}).text == "a 2"
    assert prompts.of({"x": "\udcff"}).text == r"a \udcff"
    assert prompts.of({"x": None}).error == "prompt: the clip has no column 'x'"
    assert prompts.of({"x": ["ball"]}).error == "prompt: column 'x' is a list, no text and no number"
    longest = prompts.of({"x": "ball " * (MAX_PROMPT_TOKENS - 2)})  # and its end
    assert (longest.error, len(longest.ids)) == (None, MAX_PROMPT_TOKENS)
    assert (prompts.of({"x": "ball " * (MAX_PROMPT_TOKENS - 1)}).error or "").startswith("prompt: more than 256 tokens")
    with pytest.raises(ValueError, match="more than 256 tokens"):
        Prompts(tokenizer, "ball " * MAX_PROMPT_TOKENS)
    assert Prompts(tokenizer, "a {{ball}}").of({}).text == "a {ball}"


def test_the_command_says_what_is_wrong_with_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caption", "video.mp4", "--prompt", "what is {"]) == 2
    assert "a column is {NAME}" in capsys.readouterr().err


def test_a_text_with_the_word_of_padding_keeps_its_end(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, "a dog runs")
    assert Prompts(tokenizer, "a {x} runs").of({"x": "<pad> dog"}).ids.tolist() == [2, 0, 3, 4, 1]
    assert encode_prompts(tokenizer, ["a <pad> dog", "a"]).tolist() == [[2, 0, 3, 1], [2, 1, 0, 0]]


def test_a_column_called_as_one_of_the_row_is_found(model: VLM, tokenizer: WordTokenizer) -> None:
    captioner = Captioner(model, tokenizer, prompt="{prompt} {status} {captions}", **OPTIONS)
    record = Record(key="a", video="v.mp4", extra={"prompt": "red", "status": "ball", "captions": "moves"})
    wanted = Captioner(model, tokenizer, prompt="red ball moves", **OPTIONS)
    np.testing.assert_array_equal(captioner.prompts([record]), wanted.prompts([record]))


def test_groups_are_those_of_one_length(model: VLM, tokenizer: WordTokenizer, records: list[Record]) -> None:
    captioner = Captioner(model, tokenizer, prompt=TEMPLATE, **OPTIONS)
    groups = captioner.groups(records)
    assert sorted(i for group in groups for i in group) == list(range(NUM_CLIPS))
    assert [{len(captioner.prompts([records[i]])[0]) for i in group} for group in groups] == [{1, 6, 10}, {21}, {42}]
    told = captioner.prompts([records[0]])
    np.testing.assert_array_equal(told[0], told[1])  # what fills a batch up
