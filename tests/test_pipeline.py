"""Captioning jobs: whole shards, resumed ones, one by one the same rows."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import sys
import tarfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from flax import nnx

from pyvdl import pipeline
from pyvdl.caption import Captioner, caption_records
from pyvdl.config import ClipConfig
from pyvdl.data import Record
from pyvdl.decoder_process import DecoderProcess
from pyvdl.jobs import Job, load_job
from pyvdl.manifests import Input
from pyvdl.models.vlm import VLM
from pyvdl.pipeline import JobSummary, caption_job
from pyvdl.rows import CaptionRow, read_captions, shard_name
from pyvdl.storage import Folder, hold
from pyvdl.text import CAPTION_PROMPT, WordTokenizer
from tests.clips import write_clips
from tests.models import tiny_vlm

CLIP = ClipConfig(num_frames=2, sampling="uniform", short_side=32, size=32)
NUM_CLIPS = 11
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
    return [Record(key=f"clip-{i}", video=str(path), extra={"views": i}) for i, path in enumerate(paths)]


def job(model: VLM, tokenizer: WordTokenizer, records: Iterable[Record], out: str | Path, **changes: Any) -> JobSummary:
    options: dict[str, Any] = dict(shard_size=3, clip=CLIP, num_samples=2, max_length=6, seed=3, batch_size=2)
    return caption_job(model, tokenizer, records, out, **(options | changes))


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("captions-*")}


@pytest.fixture(scope="module")
def whole(
    model: VLM, tokenizer: WordTokenizer, records: list[Record], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a job that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    done = job(model, tokenizer, records, out)
    assert done == JobSummary(rows=NUM_CLIPS, failed=1, dropped={}, shards=4, shards_skipped=0)
    return out


def test_a_job_has_a_row_for_every_clip(
    model: VLM, tokenizer: WordTokenizer, records: list[Record], whole: Path
) -> None:
    assert sorted(shards(whole)) == [shard_name(i, 4, "parquet") for i in range(4)]
    rows = {row.key: row for row in read_captions(whole)}
    assert len(rows) == NUM_CLIPS
    wanted = caption_records(model, tokenizer, records, clip=CLIP, num_samples=2, max_length=6, seed=3, batch_size=2)
    for expected in wanted:
        row = rows[expected.key]
        assert row.model_sha256
        assert row.recipe_sha256
        np.testing.assert_allclose(row.log_probs, expected.log_probs, rtol=1e-4)
        same = dataclasses.replace(row, log_probs=expected.log_probs, model_sha256=None, recipe_sha256=None)
        assert same == expected
    assert rows[f"clip-{BAD}"].status == "failed"
    assert rows["clip-7"].extra == {"views": 7}


def test_text_and_object_stores_hold_the_same_rows(
    model: VLM, tokenizer: WordTokenizer, records: list[Record], whole: Path
) -> None:
    out = f"memory://{uuid.uuid4().hex}"
    seen: list[tuple[int, int]] = []
    notes = []

    def progress(done: int, total: int, note: str = "", /) -> None:
        seen.append((done, total))
        notes.append(note)

    job(model, tokenizer, records, out, format="jsonl", progress=progress)
    found, wanted = list(read_captions(out)), list(read_captions(whole))
    assert [dataclasses.replace(row, recipe_sha256=None) for row in found] == [
        dataclasses.replace(row, recipe_sha256=None) for row in wanted
    ]
    assert seen == [(done, 11) for done in (2, 3, 5, 6, 8, 9, 11)]
    assert "clips/s" in notes[-1]
    assert "failed: 1 " in notes[-1]


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_stopped_job_goes_on_and_ends_the_same_to_the_bit(
    stop: int,
    model: VLM,
    tokenizer: WordTokenizer,
    records: list[Record],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = pipeline.run_shards

    def stops(captioner: Captioner, decoder: DecoderProcess, job: Job, asked: Any, *rest: Any) -> Iterator[Any]:
        for number, found in enumerate(original(captioner, decoder, job, asked, *rest)):
            if number == stop:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(pipeline, "run_shards", stops)
    with pytest.raises(KeyboardInterrupt):
        job(model, tokenizer, records, tmp_path)
    assert len(shards(tmp_path)) == stop
    with pytest.raises(ValueError, match="no whole job"):
        list(read_captions(tmp_path))
    asked: list[int] = []
    monkeypatch.setattr(pipeline, "run_shards", original)
    monkeypatch.setattr(Job, "work", _noting(Job.work, asked))
    done = job(model, tokenizer, records[::-1], tmp_path, num_threads=1, prefetch=0)  # how it runs may change
    assert sorted({*asked}) == [shard for shard in range(4) if shard >= stop]
    assert done.shards_skipped == stop
    assert shards(tmp_path) == shards(whole)


def _noting(original: Callable[..., Any], asked: list[int]) -> Callable[..., Any]:
    def work(self: Job, shard: int) -> Any:
        asked.append(shard)
        return original(self, shard)

    return work


def test_shards_are_the_same_in_any_order_and_company(
    model: VLM, tokenizer: WordTokenizer, records: list[Record], whole: Path, tmp_path: Path
) -> None:
    """What another engine does: a captioner, a decoder, and shards as they come."""
    captioner = Captioner(model, tokenizer, clip=CLIP, num_samples=2, max_length=6, seed=3, batch_size=2)
    there = load_job(Folder(whole))
    with DecoderProcess(CLIP, batch_size=2, num_threads=2, prefetch=2, timeout_seconds=60.0) as decoder:
        found = dict(pipeline.run_shards(captioner, decoder, there, iter([3, 1])))
        found |= dict(pipeline.run_shards(captioner, decoder, there, [2]))
    wanted: dict[str, CaptionRow] = {row.key: row for row in read_captions(whole)}
    assert sorted(found) == [1, 2, 3]
    for rows in found.values():
        assert rows == [wanted[row.key] for row in rows]


def test_a_decoder_that_is_killed_changes_nothing(
    model: VLM,
    tokenizer: WordTokenizer,
    records: list[Record],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send, sent = DecoderProcess._send, []

    def kills(self: DecoderProcess, task: Any) -> None:
        send(self, task)
        sent.append(task)
        if len(sent) == 1 or (task.alone and not sent[-2].alone):  # and its successor at the first clip
            assert self.pid is not None
            os.kill(self.pid, signal.SIGKILL)

    monkeypatch.setattr(DecoderProcess, "_send", kills)
    job(model, tokenizer, records, tmp_path)
    assert shards(tmp_path) == shards(whole)


def test_another_job_in_the_same_folder_is_refused(
    model: VLM, tokenizer: WordTokenizer, records: list[Record], tmp_path: Path
) -> None:
    job(model, tokenizer, records[:2], tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="seed was 3, now 4"):
        job(model, tokenizer, records[:2], tmp_path, seed=4)
    with pytest.raises(ValueError, match=r"\(num_samples was 2, now 3; temperature was 1\.0, now 0\.5\)"):
        job(model, tokenizer, records[:2], tmp_path, num_samples=3, temperature=0.5)
    other = nnx.clone(model)
    other.projection.kernel[...] += 1
    with pytest.raises(ValueError, match="model_sha256"):
        job(other, tokenizer, records[:2], tmp_path)
    with pytest.raises(ValueError, match=r"1 added \('clip-2'\); 1 removed \('clip-0'\)"):
        job(model, tokenizer, records[1:3], tmp_path)
    with hold(Folder(tmp_path)), pytest.raises(RuntimeError, match="another job writes into"):
        job(model, tokenizer, records[:2], tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 1e-7}, {"top_p": 0.0}, {"num_samples": 0}, {"max_length": 0}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_captions_that_cannot_be_drawn_begin_no_job(
    wrong: dict[str, Any], model: VLM, tokenizer: WordTokenizer, records: list[Record], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        job(model, tokenizer, records, tmp_path, **wrong)
    assert not (tmp_path / "job.json").exists()


def test_a_format_that_cannot_be_written_begins_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install 'pyarrow"):
        pipeline.run_job(lambda: pytest.fail("a model is loaded"), [], tmp_path / "job")
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("written", [8, 10])  # a try of each folder, four lists, job.json; then of four shards 1 or 3
def test_a_disk_that_is_full_stops_the_job_and_no_shard_is_lost(
    written: int,
    model: VLM,
    tokenizer: WordTokenizer,
    records: list[Record],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sync, calls = os.fsync, []

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) == written + 1:
            raise OSError(28, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*captions-0000\d-of-00004"):
        job(model, tokenizer, records, tmp_path)
    monkeypatch.setattr(os, "fsync", sync)
    assert 1 <= len(shards(tmp_path)) <= 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".captions")]
    job(model, tokenizer, records, tmp_path)
    assert shards(tmp_path) == shards(whole)


def test_a_video_that_vanishes_costs_its_row(
    model: VLM, tokenizer: WordTokenizer, records: list[Record], tmp_path: Path
) -> None:
    gone = dataclasses.replace(records[1], video=str(tmp_path / "gone.mp4"))
    done = job(model, tokenizer, [records[0], gone], tmp_path / "out")
    assert (done.rows, done.failed) == (2, 1)
    rows = {row.key: row for row in read_captions(tmp_path / "out")}
    assert rows["clip-1"].error == f"open: {os.strerror(2)}"


def test_names_that_are_not_utf8_cost_nothing(
    model: VLM, tokenizer: WordTokenizer, records: list[Record], tmp_path: Path
) -> None:
    video = Path(records[0].video).read_bytes()
    folder = os.fsencode(tmp_path / "videos")
    os.mkdir(folder)
    for name in (b"\xff.mp4", b"\xfe.mp4"):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(video)
    with tarfile.open(tmp_path / "videos" / "t.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        member = tarfile.TarInfo("café.mp4")
        member.size = len(video)
        tar.addfile(member, io.BytesIO(video))
    asked = Input([tmp_path / "videos"], window_seconds=60.0)
    done = job(model, tokenizer, asked, tmp_path / "out", input_sha256=asked.sha256())
    assert (done.rows, done.failed) == (3, 0)
    rows = {row.key: row for row in read_captions(tmp_path / "out")}
    assert set(rows) == {r"caf\udce9#0000", *(rf"{tmp_path}/videos/\udc{byte}.mp4#0000" for byte in ("fe", "ff"))}
    assert rows[r"caf\udce9#0000"].extra == {"group": r"caf\udce9"}


def test_hugging_face_reads_the_shards(whole: Path, tmp_path: Path) -> None:
    files = [str(whole / name) for name in sorted(shards(whole))]
    found = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    wanted = {row.key: row for row in read_captions(whole)}
    assert len(found) == NUM_CLIPS
    for row in found:
        assert row["captions"] == wanted[row["key"]].captions
        assert row["log_probs"] == wanted[row["key"]].log_probs
        assert row["views"] == wanted[row["key"]].extra["views"]
