"""The page of a captioning job: what it shows, what it reads, what it needs not."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest

from pyvdl import job_page
from pyvdl.config import ClipConfig
from pyvdl.data import Record
from pyvdl.job_page import write_job_page
from pyvdl.jobs import Job, open_job
from pyvdl.rows import CaptionRow, Dropped
from pyvdl.storage import Folder
from tests.clips import write_clip

RECIPE = {
    "clip": dataclasses.asdict(ClipConfig(num_frames=10, size=32, short_side=32)),
    "num_samples": 2,
    "prompt": "<p>",
}
FAILURES = {7: "open: no such file", 20: "timed out: nothing came", 21: "open: it is <empty>"}
EMPTIED = 9  # a clip whose captions were dropped
CLIPS, SHARD = 40, 8
GONE: Dropped = {"caption": "a a a", "log_prob": -1.0, "clip_score": None, "reason": "max_repetition"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(3):
        write_clip(folder / f"{i}.mp4", seed=i)
    return folder


@pytest.fixture
def job(videos: Path, tmp_path: Path) -> Job:
    """A job of which nothing is done; every other clip's video is gone."""
    records = [
        Record(key=f"clip{i}", video=str(videos / f"{i % 6}.mp4"), start_seconds=0.01 * i, end_seconds=1.0)
        for i in range(CLIPS)
    ]
    return open_job(Folder(tmp_path), RECIPE, records, shard_size=SHARD, format="jsonl")


def finish(job: Job, shards: int) -> None:
    """Writes the first shards, ten seconds after each other."""
    for shard in range(shards):
        rows = []
        for record in job.work(shard):
            number = int(record.key.removeprefix("clip"))
            error = FAILURES.get(number)
            captions = [] if error or number == EMPTIED else [f"{record.key} & more", "a ball"]
            rows.append(
                CaptionRow(
                    key=record.key,
                    video=record.video,
                    start_seconds=record.start_seconds,
                    end_seconds=record.end_seconds,
                    captions=captions,
                    log_probs=[-3.0, -1.5][: len(captions)],
                    prompt=f"is it <{number}>?" if number % 2 else "<p>",
                    status="failed" if error else "ok",
                    error=error,
                    seed=0,
                    dropped=[GONE] if number == EMPTIED else [],
                )
            )
        job.finish(shard, rows)
        (path,) = Path(job.folder.name).glob(f"captions-{shard:05d}-*")
        os.utime(path, (1000 + 10 * shard,) * 2)


def test_the_page_of_a_finished_job(job: Job, tmp_path: Path) -> None:
    finish(job, 5)
    write_job_page(job, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    words = " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL).split())
    assert "36 of 40 clips have captions, 3 failed (7.5% of those done), filters left 1 without any." in words
    assert "72 captions of 36 clips" in words
    assert "0.8 clips a second over the 40 s from the first shard to the last" in words
    assert "2.5 words a caption 2 captions a clip, 2.0 of them different" in words
    assert "open: 2 clips" in words
    assert "timed out: 1 clip " in words
    for i, error in FAILURES.items():
        assert f"clip{i} " in words
        assert error.replace("<", "&lt;").replace(">", "&gt;") in words
    assert "prompt &lt;p&gt;" in words

    films = page.split('<article class="card clip">')[1:]
    assert len(films) == 12
    for film in films:
        key = re.search(r'class="key">clip(\d+) ', film)
        assert key is not None
        assert f"<dd>clip{key[1]} &amp; more</dd>" in film
        assert film.index("-1.5") < film.index("-3.0")
        assert (f"<p>is it &lt;{key[1]}&gt;?</p>" in film) == bool(int(key[1]) % 2)
        there = int(key[1]) % 6 < 3
        assert film.count("data:image/jpeg") == (8 if there else 0)
        assert ("No frames any more: open: " in film) != there
    assert page.count("data:image/png") == 8, "four plots in two themes"
    assert set(re.findall(r'(?:src|href)="(.{11})', page)) == {"data:image/"}
    assert "<script" not in page


def test_the_page_of_what_is_done_reads_few_shards(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no shard is finished yet"):
        write_job_page(job, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    finish(job, 4)
    for path in tmp_path.glob("captions-*"):
        os.utime(path, (1000, 1000))
    read: list[int] = []
    rows = Job.captions

    def noted(self: Job, shard: int) -> list[CaptionRow]:
        read.append(shard)
        return rows(self, shard)

    monkeypatch.setattr(Job, "captions", noted)
    monkeypatch.setattr(job_page, "_SAMPLED_ROWS", 10)
    monkeypatch.setattr(job_page, "_CLIPS", 2)
    monkeypatch.setattr(job_page, "_examples", lambda *_: [])
    write_job_page(job, tmp_path / "page.html")
    assert len(read) == 2
    page = " ".join((tmp_path / "page.html").read_text().split())
    assert "counted over 16 clips, of shards drawn at random" in page
    assert "1 of 5 shards are still to do" in page
    assert "All shards were written at one time" in page
    assert page.count("<article") == 2
