"""Finished jobs in the formats of others."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import tracemalloc
from pathlib import Path

import datasets
import jax
import numpy as np
import pytest

from pyvdl import sharding
from pyvdl.archives import Sample, read_archive, write_archive
from pyvdl.commands.common import export_asked
from pyvdl.data import Record
from pyvdl.exports import export
from pyvdl.jobs import Job, open_job
from pyvdl.rows import CaptionRow, Dropped, EmbeddingRow
from pyvdl.storage import Folder
from tests.test_jobs import row

OF_FILES = {"file_name": "of the manifest", "file_name_carried": "before", "sound_file_name": "a.wav"}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Two files and a member of a tar; the second file failed."""
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(name.encode() * 10)
    write_archive(tmp_path / "t.tar", [Sample(key="member", video=b"member of a tar", suffix="mkv")])
    files = [Record(key=f"{n}/1.0", video=str(tmp_path / f"{n}.mp4"), extra={"views": 7}) for n in "ab"]
    records = [*files, *read_archive(tmp_path / "t.tar")]
    return open_job(Folder(tmp_path / "job"), {"seed": 0}, records, shard_size=2, format="jsonl")


def captioned(record: Record) -> CaptionRow:
    if record.key == "b/1.0":
        return dataclasses.replace(row(record), status="failed", error="open: gone", captions=[], log_probs=[])
    return dataclasses.replace(row(record), captions=["likely", "likelier"], log_probs=[-3.0, -2.0])


def finish(job: Job) -> Path:
    for shard in job.missing():
        job.finish(shard, [captioned(record) for record in job.work(shard)])
    assert job.folder.local is not None
    return job.folder.local


def test_results_of_coco(job: Job) -> None:
    path = export(finish(job), "coco")
    found = sorted(json.loads(path.read_text()), key=lambda result: result["image_id"])
    assert found == [{"image_id": "a/1.0", "caption": "likelier"}, {"image_id": "member", "caption": "likelier"}]


def test_clips_whose_captions_were_all_dropped_are_left_out(job: Job) -> None:
    gone: Dropped = {"caption": "a a a", "log_prob": -1.0, "clip_score": None, "reason": "max_repetition"}
    for shard in job.missing():
        rows = [captioned(record) for record in job.work(shard)]
        job.finish(shard, [dataclasses.replace(row, captions=[], log_probs=[], dropped=[gone]) for row in rows])
    assert job.folder.local is not None
    assert json.loads(export(job.folder.local, "coco").read_text()) == []


def test_tars_hold_videos_captions_and_columns(job: Job) -> None:
    folder = export(finish(job), "webdataset")
    found = {record.key: record for path in sorted(folder.iterdir()) for record in read_archive(path)}
    assert set(found) == {"a/1.0", "member"}
    for key, content in (("a/1.0", b"a.mp4" * 10), ("member", b"member of a tar")):
        assert found[key].captions == ("likely", "likelier")
        source = found[key].source
        assert not isinstance(source, str)
        with open(source.path, "rb") as file:
            file.seek(source.offset)
            assert file.read(source.length) == content
    assert found["a/1.0"].extra["views"] == 7
    assert found["member"].video.startswith("tar://")
    assert ".mkv::" in found["member"].video


def test_a_suffix_that_no_video_has_ends_no_export(tmp_path: Path) -> None:
    names = ("a.v2", "b.mp4?token=1.2", "c", "d.MKV")
    for name in names:
        (tmp_path / name).write_bytes(b"video")
    records = [Record(key=name, video=str(tmp_path / name)) for name in names]
    there = finish(open_job(Folder(tmp_path / "job"), {"seed": 0}, records, shard_size=4, format="jsonl"))
    (tar,) = export(there, "webdataset").iterdir()
    videos = {record.key: record.video for record in read_archive(tar)}
    assert {key: video.partition("::")[0].rpartition(".")[2] for key, video in videos.items()} == dict(
        zip(names, ("mp4", "mp4", "mp4", "mkv"))
    )
    links = {path.resolve().name: path.suffix for path in export(there, "videofolder").glob("0*")}
    assert links == dict(zip(names, (".mp4", ".mp4", ".mp4", ".mkv")))


def test_a_folder_of_videos(job: Job, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a folder of videos takes files, not URLs or members of tars"):
        export(finish(job), "videofolder")
    assert not (tmp_path / "job" / "videofolder" / "metadata.jsonl").exists()
    files = [record for shard in range(job.shards) for record in job.work(shard) if record.byte_range is None]
    files = [dataclasses.replace(file, extra=OF_FILES | dict(file.extra)) for file in files]
    plain = open_job(Folder(tmp_path / "plain"), {"seed": 0}, files, shard_size=2, format="jsonl")
    folder = export(finish(plain), "videofolder")
    (line,) = (folder / "metadata.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["key"], found["captions"], found["views"]) == ("a/1.0", ["likely", "likelier"], 7)
    assert (folder / found["file_name"]).read_bytes() == b"a.mp4" * 10
    assert {name: found[f"{name}_carried"] for name in OF_FILES} == OF_FILES
    read = datasets.load_dataset("videofolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert read.remove_columns("video").to_list() == [
        {name: value for name, value in found.items() if name not in ("file_name", "video")}
    ]


def test_an_archive_of_embeddings_is_made_in_little_more_than_its_memory(tmp_path: Path) -> None:
    records = [Record(key=f"{i:05d}", video=f"/v/{i}.mp4", end_seconds=1.0) for i in range(2000)]
    job = open_job(Folder(tmp_path), {}, records, shard_size=300, format="parquet", kind="embeddings")
    wanted = np.random.default_rng(0).normal(size=(2000, 256)).astype(np.float32)
    wanted[7] = np.nan
    for shard in range(job.shards):
        rows = [
            EmbeddingRow(
                key=record.key,
                video=record.video,
                start_seconds=0.0,
                end_seconds=1.0,
                status="failed" if record.key == "00007" else "ok",
                error="open: gone" if record.key == "00007" else None,
                embedding=wanted[int(record.key)],
            )
            for record in job.work(shard)
        ]
        job.finish(shard, rows)
    assert job.embeddings(0)[1].dtype == np.float32
    tracemalloc.start()
    path = export(tmp_path, "npz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * wanted.nbytes
    with np.load(path) as found:
        order = found["keys"].astype(int)
        assert sorted(order) == list(range(2000))
        np.testing.assert_array_equal(found["embeddings"], wanted[order])
        assert {key: error for key, error in zip(found["keys"], found["errors"]) if error} == {"00007": "open: gone"}


@pytest.mark.parametrize(("process", "fails"), [(0, False), (0, True), (1, False)])
def test_processes_meet_when_the_first_has_exported(
    process: int, fails: bool, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX ends them all five minutes after the first has come to its end, and an export may take longer."""
    there = job.folder.local if fails else finish(job)
    wrote = there / "captions.json" if there else Path()
    met: list[bool] = []
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(sharding, "meet", lambda name: met.append(wrote.exists()))
    with pytest.raises(ValueError, match="lacks 2 of 2 shards") if fails else contextlib.nullcontext():
        export_asked(argparse.Namespace(distributed=True, out=str(there), export=["coco"]))
    assert met == [process == 0 and not fails]


def test_what_cannot_be_exported_is_told(job: Job, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lacks 2 of 2 shards"):
        export(tmp_path / "job", "coco")
    with pytest.raises(ValueError, match=r"export 'xml': expected one of coco, videofolder, webdataset"):
        export(tmp_path / "job", "xml")
    with pytest.raises(ValueError, match="exports are made of jobs in local folders"):
        export("memory://job", "coco")
