"""Jobs on disk: how clips become shards, what is refused, what is left to do."""

from __future__ import annotations

import dataclasses
import os
import random
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pyvdl import jobs
from pyvdl.columns import carried, prompt_values
from pyvdl.data import Question, Record
from pyvdl.jobs import Job, Spill, load_job, open_job
from pyvdl.rows import JOB_FILE, CaptionRow, read_captions
from pyvdl.storage import Folder

RECIPE = {"seed": 3, "model_sha256": "m"}
ONCE = uuid.uuid4().hex
# What a kill leaves behind.
HALF_WRITTEN = [
    f".captions-00001-of-00008.jsonl.{ONCE}",
    f".job.json.{ONCE}",
    f".probe.{ONCE}",
    f"..probe.{ONCE}.{ONCE}",
]


def clips(videos: int = 20, each: int = 3) -> list[Record]:
    return [
        Record(key=f"{video}-{i}", video=f"/v/{video}.mp4", start_seconds=float(i), end_seconds=i + 1.0)
        for video in range(videos)
        for i in range(each)
    ]


def begin(folder: Folder | Path, records: Iterable[Record], **changes: Any) -> Job:
    folder = folder if isinstance(folder, Folder) else Folder(folder)
    options: dict[str, Any] = dict(shard_size=8, format="jsonl") | changes
    return open_job(folder, options.pop("recipe", RECIPE), records, **options)


def row(record: Record) -> CaptionRow:
    return CaptionRow(
        key=record.key,
        video=record.video,
        start_seconds=record.start_seconds,
        end_seconds=record.end_seconds,
        captions=["c"],
        log_probs=[-1.0],
        prompt="p",
        status="ok",
        error=None,
        seed=0,
        extra=carried(record),
    )


def test_every_clip_is_in_one_shard_and_files_stay_together(tmp_path: Path) -> None:
    records = [dataclasses.replace(r, key=f"{r.key[:-1]}{9 - int(r.start_seconds)}") for r in clips()]  # not by keys
    job = begin(tmp_path, iter(records))
    lists = [job.work(shard) for shard in range(job.shards)]
    assert [len(work) for work in lists] == [8] * 7 + [4] == [job.size(shard) for shard in range(8)]
    found = [record for work in lists for record in work]
    assert sorted(found, key=lambda r: r.key) == sorted(records, key=lambda r: r.key)
    assert [(r.video, r.start_seconds) for r in found] == [
        (f"/v/{video}.mp4", float(i)) for video in dict.fromkeys(r.key.split("-")[0] for r in found) for i in range(3)
    ]
    assert job.missing() == list(range(8))


def test_members_of_a_tar_stand_as_they_lie_in_it(tmp_path: Path) -> None:
    records = [
        Record(key=f"{tar}{i}", video=f"tar://{i}.mp4::/t/{tar}.tar", byte_range=(10**i, 5))
        for tar in "abc"
        for i in range(4)
    ]
    job = begin(tmp_path, records[::-1])
    found = [record for shard in range(job.shards) for record in job.work(shard)]
    assert sorted(found, key=lambda r: r.key) == records
    for tar in "abc":
        at = [i for i, record in enumerate(found) if record.key[0] == tar]
        assert at == list(range(at[0], at[0] + 4))
        assert [found[i].key for i in at] == [f"{tar}{i}" for i in range(4)]


def test_the_order_of_the_manifest_and_memory_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = clips()
    first = begin(tmp_path / "a", records)
    random.Random(0).shuffle(records)
    monkeypatch.setattr(jobs, "_SPILL_BYTES", 500)
    second = begin(tmp_path / "b", records)
    assert first.digests == second.digests
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [JOB_FILE, "work"]


def test_lines_beyond_the_memory_wait_on_disk(tmp_path: Path) -> None:
    spill = Spill(tmp_path / "lines", limit_bytes=200)
    numbers = [(i * 0x9E3779B97F4A7C15) % (1 << 64) for i in range(40)]
    for number in numbers:
        spill.add(number, f"{number:016x}".encode())
    assert len(list((tmp_path / "lines").iterdir())) > 10
    found = [line for lines in spill.buckets() for line in sorted(lines)]
    assert found == [f"{number:016x}".encode() for number in sorted(numbers)]


def test_all_of_a_record_comes_back(tmp_path: Path) -> None:
    record = Record(
        key="a",
        video="/v/a.mp4",
        captions=("x", "y"),
        narrative="n",
        alt_text="t",
        questions=(Question("q", "a", "short", references=("b",)),),
        label="l",
        split="s",
        group="g",
        extra={"views": 3, "seed": 9, "when": [1, 2]},
    )
    bare = Record(key="b", video="http://host/b.mp4", end_seconds=2.0)
    job = begin(tmp_path, [record, bare])
    assert sorted(job.work(0), key=lambda r: r.key) == [record, bare]
    assert carried(record)["source_seed"] == 9
    assert job.columns == {
        "alt_text": "string",
        "group": "string",
        "label": "string",
        "narrative": "string",
        "questions": "json",
        "source_captions": "strings",
        "source_seed": "int",
        "split": "string",
        "views": "int",
        "when": "json",
    }


def test_a_column_is_as_wide_as_all_clips_need(tmp_path: Path) -> None:
    records = [Record(key=str(i), video="/v/a.mp4", extra={"x": value}) for i, value in enumerate((1, None, 0.5, 2))]
    assert begin(tmp_path, records).columns == {"x": "float"}


def test_what_was_carried_once_is_carried_again() -> None:
    """Rows of a job that are captioned by another."""
    again = {
        "seed": 9,
        "source_seed": 8,
        "source_source_seed": 7,
        "captions": ["a"],
        "source_captions": ["b"],
        "source": "c",
    }
    assert carried(Record(key="a", video="v.mp4", extra=again)) == {
        "source_seed": 9,
        "source_source_seed": 8,
        "source_source_source_seed": 7,
        "source_captions": ["a"],
        "source_source_captions": ["b"],
        "source": "c",
    }


def test_a_prompt_names_columns_as_the_manifest_does(tmp_path: Path) -> None:
    record = Record(key="a", video="/v/a.mp4", end_seconds=2.0, extra={"seed": 9, "question": "q"})
    place = {"key": "a", "video": "/v/a.mp4", "start_seconds": 0.0, "end_seconds": 2.0}
    assert prompt_values(record) == place | dict(record.extra)
    begin(tmp_path / "good", [record], recipe={"prompt": "{seed} {question} {key} {video} {end_seconds}"})
    for name in ("source_seed", "prompt"):
        with pytest.raises(ValueError, match=f"'{name}', .*; there are: end_seconds, key, question, seed, start_s"):
            begin(tmp_path / "bad", [record], recipe={"prompt": f"{{{name}}}"})


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_the_same_call_goes_on(where: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path if where == "disk" else f"memory://{uuid.uuid4().hex}")
    records = clips()
    job = begin(folder, records, input_sha256="i")
    for shard in (0, 3):
        job.finish(shard, [row(record) for record in job.work(shard)])
    before = (folder.read(JOB_FILE), (folder / "work").names())
    for left in (*HALF_WRITTEN, ".notes"):
        folder.write(left, b"half")
    again = begin(folder, records)  # compared clip by clip
    unread: Any = None
    assert begin(folder, unread, input_sha256="i") == again == dataclasses.replace(job, folder=again.folder)
    assert again.missing() == [1, 2, 4, 5, 6, 7]
    assert not {*HALF_WRITTEN} & {*folder.names()}
    assert ".notes" in folder.names()
    assert (folder.read(JOB_FILE), (folder / "work").names()) == before
    for shard in again.missing():
        again.finish(shard, [row(record) for record in again.work(shard)])
    assert again.missing() == []
    assert again.counts(range(8)).rows == 60
    assert {found.key for found in read_captions(folder.name)} == {record.key for record in records}


def test_a_job_tells_how_far_it_is(tmp_path: Path) -> None:
    job = begin(tmp_path, clips())
    before = job.status()
    assert (before.shards_done, before.rows, before.clips_per_second, before.seconds_left) == (0, 0, None, None)
    for number, shard in enumerate((2, 5, 7)):
        rows = [row(record) for record in job.work(shard)]
        if shard == 5:
            rows[0] = dataclasses.replace(rows[0], captions=[], status="failed", error="open: no such file")
        job.finish(shard, rows)
        os.utime(tmp_path / f"captions-{shard:05d}-of-00008.jsonl", (1000 + 4 * number,) * 2)
    found = load_job(Folder(tmp_path)).status()
    assert (found.shards, found.shards_done, found.records, found.rows) == (8, 3, 60, 20)
    assert found.failed == {"open": 1}
    assert found.clips_per_second == (8 + 4) / 8  # of the second and third, in the seconds since the first
    assert found.seconds_left == 40 / 1.5


def test_clips_that_changed_are_refused_with_the_difference(tmp_path: Path) -> None:
    records = clips()
    begin(tmp_path, records, input_sha256="i")
    changed = [dataclasses.replace(records[1], end_seconds=9.0), *records[6:]]
    changed += [Record(key=f"new {i}", video="/v/new.mp4", start_seconds=float(i)) for i in range(2)]
    with pytest.raises(
        ValueError,
        match=r"2 added \('new 0', 'new 1'\); 5 removed \('0-0', '0-2', '1-0', \.\.\.\); 1 changed \('0-1'\)",
    ):
        begin(tmp_path, changed, input_sha256="j")
    begin(tmp_path, records, input_sha256="j")  # written otherwise, but the same clips


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    begin(tmp_path, clips())
    with pytest.raises(ValueError, match=r"holds another job \(seed was 3, now 4\)"):
        begin(tmp_path, clips(), recipe=RECIPE | {"seed": 4})
    with pytest.raises(ValueError, match="shard_size was 8, now 9"):
        begin(tmp_path, clips(), shard_size=9)


def test_what_is_no_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no clips"):
        begin(tmp_path / "none", [])
    with pytest.raises(ValueError, match=r"2 keys stand for more than one clip \('0-0', '0-1'\)"):
        begin(tmp_path / "twice", [*clips(), *clips()[:2]])
    with pytest.raises(ValueError, match="holds no job, or one"):
        load_job(Folder(tmp_path / "twice"))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "captions-00000-of-00001.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds captions-00000-of-00001\.jsonl but no job\.json"):
        begin(tmp_path / "old", clips())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / JOB_FILE).write_text("{}")
    with pytest.raises(ValueError, match=r"has no 'recipe': it is not that of such a job"):
        load_job(Folder(tmp_path / "other"))


def test_embeddings_are_parquet_and_no_captions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a job of embeddings in the format 'jsonl': expected parquet"):
        begin(tmp_path, clips(), kind="embeddings", format="jsonl")
    assert not list(tmp_path.iterdir())
    begin(tmp_path, clips(), kind="embeddings", format="parquet")
    with pytest.raises(ValueError, match=f"{tmp_path} is a job of embeddings: expected one of captions"):
        list(read_captions(tmp_path))


def test_a_list_that_was_damaged_is_refused(tmp_path: Path) -> None:
    job = begin(tmp_path, clips())
    path = tmp_path / "work" / "00002-of-00008.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"work/00002-of-00008\.jsonl is not what the job wrote"):
        job.work(2)


def test_a_planning_that_was_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    def stops() -> Iterable[Record]:
        yield from clips()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path, stops())
    (tmp_path / ".planning-left").mkdir()
    for left in HALF_WRITTEN:
        (tmp_path / left).write_bytes(b"half")
    (tmp_path / "work" / "00000-of-00099.jsonl").write_bytes(b"")
    (tmp_path / "work" / f".00000-of-00099.jsonl.{uuid.uuid4().hex}").write_bytes(b"half")
    (tmp_path / "work" / "notes.txt").write_text("of somebody who calls a folder so, too")
    begin(tmp_path, clips())
    assert sorted(p.name for p in tmp_path.iterdir()) == [JOB_FILE, "work"]
    assert len(list((tmp_path / "work").iterdir())) == 8 + 1
    assert (tmp_path / "work" / "notes.txt").exists()
