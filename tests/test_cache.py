"""Data sets rewritten once: short videos in tars, clips as arrays; both resume, both train."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyvdl._core", reason="the C++ module is not built")

from pyvdl import DecodeError, VideoDecoder, arrays, cache, sample_clip
from pyvdl.__main__ import main
from pyvdl.archives import read_records
from pyvdl.cache import shortened, to_arrays, to_tars
from pyvdl.caption import clip_batches, clip_seed
from pyvdl.config import ClipConfig, ShortVideoConfig
from pyvdl.data import Batches, Question, Record, read_manifest, write_manifest
from tests.clips import write_clip

CLIP = ClipConfig(num_frames=3, sampling="random", short_side=36, size=32, crop="random")
SMALL = ShortVideoConfig(short_side=32, gop=4)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Seven clips of five files; the fourth file is damaged and the fifth is not there."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(4):
        write_clip(folder / f"{i}.mp4", seed=i, size=(96, 64))
    (folder / "3.mp4").write_bytes((folder / "3.mp4").read_bytes()[:300])
    texts: dict[str, Any] = {
        "captions": ("Ein Bär läuft.", "a bear"),
        "narrative": "<Bear> walks.",
        "questions": (Question("what?", "a bear", "causal"),),
        "label": "walks",
        "group": "g",
        "extra": {"views": 3},
    }
    found = [Record(key=f"videos/{i}.mp4", video=str(folder / f"{i}.mp4"), **texts) for i in range(5)]
    found.insert(1, Record(key="first", video=found[0].video, end_seconds=0.5, captions=("x",)))
    found.insert(2, Record(key="rest", video=found[0].video, start_seconds=0.52))
    return found


GOOD = ["videos/0.mp4", "first", "rest", "videos/1.mp4", "videos/2.mp4"]


def psnr(x: np.ndarray, y: np.ndarray) -> float:
    """Decibels of the brightness of uint8[..., 3]: colours are kept at half the size."""
    difference = (x.astype(float) - y) @ [0.299, 0.587, 0.114]
    return float(10 * np.log10(255**2 / np.mean(difference**2)))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_tars_hold_the_segments_and_the_texts(records: list[Record], tmp_path: Path) -> None:
    done = to_tars(records, tmp_path, video=SMALL, shard_size=3)
    assert (done.records, done.shards, done.shards_skipped) == (5, 3, 0)
    assert sorted(done.failed) == ["videos/3.mp4", "videos/4.mp4"]
    assert done.failed["videos/4.mp4"].startswith("open:")
    found = read_manifest(done.manifest)
    assert found == read_records(tmp_path)
    assert [record.key for record in found] == GOOD
    assert [record.source.path for record in found] == [str(tmp_path / f"0000{i}.tar") for i in (0, 0, 0, 1, 1)]  # type: ignore[union-attr]
    for made, original in zip(found, [records[i] for i in (0, 1, 2, 3, 4)]):
        alone: dict[str, Any] = {
            "video": made.video,
            "byte_range": made.byte_range,
            "start_seconds": 0.0,
            "end_seconds": None,
        }
        assert made == dataclasses.replace(original, **alone)
        decoder = VideoDecoder(made.source)
        assert (decoder.metadata.width, decoder.metadata.height, decoder.metadata.codec) == (48, 32, "h264")
        np.testing.assert_array_equal(decoder.key_frames, range(0, len(decoder), 4))
        options: dict[str, Any] = {"num_frames": 5, "short_side": 32, "size": 32, "sampling": "uniform"}
        wanted = sample_clip(
            original.source, start_seconds=original.start_seconds, end_seconds=original.end_seconds, **options
        )
        assert psnr(sample_clip(made.source, **options).data, wanted.data) > 30


def test_frames_keep_their_times(tmp_path: Path) -> None:
    """Frames of uneven length; the segment begins and ends within one."""
    write_clip(tmp_path / "v.mp4", num_frames=6, fps=10, pts=[0, 1, 3, 4, 8, 9])
    record = Record(key="v", video=str(tmp_path / "v.mp4"), start_seconds=0.15, end_seconds=0.65)
    decoder = VideoDecoder(shortened(record, SMALL))
    np.testing.assert_allclose(decoder.pts_seconds, [0, 0.15, 0.25], atol=1e-4)
    assert decoder.metadata.duration_seconds == pytest.approx(0.5, abs=1e-4)
    for late in (1.0, 5.0):
        with pytest.raises(DecodeError, match=rf"sample: the video ends at 1\.0 s, before {late} s"):
            shortened(dataclasses.replace(record, start_seconds=late, end_seconds=None), SMALL)


def test_what_cannot_be_encoded_costs_its_record_only(tmp_path: Path, records: list[Record]) -> None:
    """H.264 has no pictures so wide."""
    write_clip(tmp_path / "wide.avi", size=(17_000, 16), num_frames=1, codec="mjpeg", pix_fmt="yuvj420p", b_frames=0)
    wide = Record(key="wide", video=str(tmp_path / "wide.avi"))
    done = to_tars([wide, records[0]], tmp_path / "out", video=SMALL)
    assert done.failed["wide"].startswith("encode: ")
    assert [record.key for record in read_manifest(done.manifest)] == [records[0].key]


def test_an_odd_size_is_cut_not_stretched_and_a_small_one_kept(tmp_path: Path) -> None:
    write_clip(tmp_path / "v.mp4", size=(74, 48), num_frames=3)
    record = Record(key="v", video=str(tmp_path / "v.mp4"))
    found = VideoDecoder(shortened(record, ShortVideoConfig(short_side=33, crf=1)))  # resized to 51 x 33
    assert (found.metadata.width, found.metadata.height) == (50, 32)
    view: dict[str, Any] = {
        "num_frames": 1,
        "short_side": 33,
        "size": 33,
        "crop": (0, 0, 32, 50),
        "sampling": "uniform",
    }
    assert psnr(found[1], sample_clip(record.source, **view).data[0]) > 35
    kept = VideoDecoder(shortened(record, ShortVideoConfig(short_side=256))).metadata
    assert (kept.width, kept.height) == (74, 48)


def test_rows_of_an_array_are_the_clips(records: list[Record], tmp_path: Path) -> None:
    done = to_arrays(records, tmp_path, clip=CLIP, seed=5, shard_size=3)
    assert (done.records, done.shards, sorted(done.failed)) == (5, 3, ["videos/3.mp4", "videos/4.mp4"])
    found = read_manifest(done.manifest)
    assert [record.video for record in found] == [f"array://{i}::{tmp_path / cache.ARRAY}" for i in (0, 1, 2, 3, 4)]
    assert found[0] == dataclasses.replace(records[0], video=found[0].video)
    options: dict[str, Any] = {"encode": lambda *_: {}, "clip": CLIP, "batch_size": 2, "seed": 3, "num_epochs": 2}
    seen = 0
    for batch in Batches(found, **options):
        assert batch["ok"].all()
        for video, index in zip(batch["video"], batch["index"]):
            record = records[index]
            window = {"start_seconds": record.start_seconds, "end_seconds": record.end_seconds}
            wanted = sample_clip(record.source, **window, **dataclasses.asdict(CLIP), seed=clip_seed(record, 5))
            np.testing.assert_array_equal(video, wanted.data)
            seen += 1
    assert seen == 10
    (rows,) = clip_batches(found, clip=CLIP, batch_size=8, num_threads=1, prefetch=1)  # captions and scores, too
    assert rows.ok.tolist() == [True] * 5 + [False] * 3


def test_rows_that_cannot_be_read_are_told(records: list[Record], tmp_path: Path) -> None:
    to_arrays(records[:4], tmp_path, clip=CLIP, shard_size=2)
    found = read_manifest(tmp_path / cache.MANIFEST)
    os.unlink(tmp_path / cache.ARRAY / "c" / "1" / "0" / "0" / "0" / "0")
    options: dict[str, Any] = {"encode": lambda *_: {}, "batch_size": 4, "seed": 3, "shuffle": False}
    batches = Batches(found, clip=CLIP, **options)
    batch = next(batches)
    assert batch["ok"].tolist() == [True, True, False, False]
    assert not batch["video"][2:].any()
    assert batches.failed_clips == 2
    wrong = Batches(found, clip=dataclasses.replace(CLIP, num_frames=4), **options)
    with pytest.raises(ValueError, match=r"\(3, 32, 32, 3\); \(4, 32, 32, 3\) are asked for: .* num_frames=4"):
        next(wrong)
    with pytest.raises(ValueError, match="some records are rows of an array and some are videos"):
        next(Batches([*found, records[0]], clip=CLIP, **options))
    beyond = arrays.row_name(tmp_path / cache.ARRAY, 9)
    (batch,) = Batches([Record(key="x", video=beyond)], clip=CLIP, drop_remainder=False, num_epochs=1, **options)
    assert not batch["ok"].any()


def test_a_position_in_an_array_goes_on(records: list[Record], tmp_path: Path) -> None:
    to_arrays(records, tmp_path, clip=CLIP)
    found = read_manifest(tmp_path / cache.MANIFEST)
    options: dict[str, Any] = {"encode": lambda *_: {}, "clip": CLIP, "batch_size": 2, "seed": 3}
    whole = [next(batches) for batches in [Batches(found, **options)] for _ in range(5)]
    first = Batches(found, **options)
    next(first)
    second = Batches(found, **options)
    second.set_state(first.get_state())
    for batch in whole[1:]:
        again = next(second)
        np.testing.assert_array_equal(again["video"], batch["video"])
        np.testing.assert_array_equal(again["index"], batch["index"])


def test_a_killed_job_goes_on(records: list[Record], tmp_path: Path) -> None:
    """Killed when its first tar is there, the same command makes what an undisturbed one does, not all anew."""
    write_manifest(tmp_path / "m.jsonl", records)

    def command(out: Path) -> list[str]:
        words = ["prepare", "--data", tmp_path / "m.jsonl", "--to", "tars", "--out", out, "--shard-size", "1"]
        return [str(word) for word in words]

    assert main(command(tmp_path / "whole")) == 0
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", "pyvdl", *command(out)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "00000_stats.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = (out / "00000.tar").stat().st_mtime_ns
    assert main(command(out)) == 0
    assert (out / "00000.tar").stat().st_mtime_ns == before
    found, wanted = files(out), files(tmp_path / "whole")
    assert all(name.startswith(".") for name in found.keys() - wanted.keys())  # what was half written
    assert wanted.keys() <= found.keys()
    made = read_manifest(out / "clips.jsonl")
    assert [record.key for record in made] == GOOD
    frames = [len(VideoDecoder(record.source)) for record in made]
    assert frames == [len(VideoDecoder(record.source)) for record in read_manifest(tmp_path / "whole" / "clips.jsonl")]


def test_an_array_goes_on_where_it_was_stopped(records: list[Record], tmp_path: Path) -> None:
    def stop(done: int, total: int, note: str = "") -> None:
        raise KeyboardInterrupt

    options: dict[str, Any] = {"clip": CLIP, "shard_size": 3}
    to_arrays(records, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        to_arrays(records, tmp_path / "stopped", **options, progress=stop)
    assert (tmp_path / "stopped" / "00000_stats.json").exists()
    told: list[tuple[int, int]] = []
    done = to_arrays(records, tmp_path / "stopped", **options, progress=lambda *count: told.append(count))
    assert (done.shards_skipped, told) == (1, [(6, 7), (7, 7)])
    wanted = {name: data for name, data in files(tmp_path / "whole").items() if name != "clips.jsonl"}
    assert {name: data for name, data in files(tmp_path / "stopped").items() if name != "clips.jsonl"} == wanted


def test_what_is_finished_is_not_done_again(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    to_tars(records, tmp_path, video=SMALL, shard_size=3, progress=lambda *count: told.append(count))
    assert told == [(i, 7) for i in range(1, 8)]
    before = files(tmp_path)
    (tmp_path / "00001_stats.json").unlink()
    made: list[str] = []

    def short(record: Record, config: ShortVideoConfig) -> bytes:
        made.append(record.key)
        return shortened(record, config)

    monkeypatch.setattr(cache, "shortened", short)
    done = to_tars(records, tmp_path, video=SMALL, shard_size=3)
    assert (done.shards_skipped, sorted(made)) == (2, ["videos/1.mp4", "videos/2.mp4", "videos/3.mp4"])
    assert sorted(done.failed) == ["videos/3.mp4", "videos/4.mp4"]
    after = files(tmp_path)
    assert after.keys() == before.keys()
    assert {name for name in before if after[name] != before[name]} <= {"00001.tar", "clips.jsonl"}


def test_another_job_in_the_same_folder_is_refused(records: list[Record], tmp_path: Path) -> None:
    to_tars(records[:1], tmp_path, video=SMALL)
    with pytest.raises(ValueError, match=r"holds another job \(video\.gop was 4, now 8\)"):
        to_tars(records[:1], tmp_path, video=dataclasses.replace(SMALL, gop=8))
    with pytest.raises(ValueError, match=r"holds another job.*records was 1, now 2"):
        to_tars(records[:2], tmp_path, video=SMALL)
    with pytest.raises(ValueError, match=r"holds another job.*to was 'tars', now 'arrays'"):
        to_arrays(records[:1], tmp_path, clip=CLIP)


def test_what_cannot_be_meant_is_named(records: list[Record], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 records have 1 keys"):
        to_tars([records[0], records[0]], tmp_path)
    with pytest.raises(ValueError, match=r"none of the 2 clips could be decoded, the first is videos/3\.mp4: "):
        to_tars(records[5:], tmp_path / "bad")
    with pytest.raises(ValueError, match="records is empty"):
        to_arrays([], tmp_path, clip=CLIP)
    with pytest.raises(ValueError, match="shard_size=0"):
        to_arrays(records, tmp_path, clip=CLIP, shard_size=0)
