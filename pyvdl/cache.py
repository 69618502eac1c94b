"""Rewrites a data set once, so that epochs cost less: to short videos in WebDataset tars, or to an array of clips.

A job writes shard after shard, each whole or not at all, and goes on where it was stopped. A clip that cannot be
decoded is left out and told. At the end `clips.jsonl` in the job's folder is the manifest of what is there, with the
texts of the records; the tars carry them too.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from pyvdl import arrays
from pyvdl.archives import Sample, read_archive, write_archive
from pyvdl.caption import clip_seed
from pyvdl.config import ClipConfig, ShortVideoConfig
from pyvdl.data import Record, digest, to_fields, write_manifest
from pyvdl.progress import Report
from pyvdl.sources import DecodeError
from pyvdl.storage import claim, write_whole
from pyvdl.video import ClipLoader, ClipRequest, VideoDecoder

JOB_FILE = "job.json"
MANIFEST = "clips.jsonl"
ARRAY = "clips.zarr3"
_TICKS = 90_000  # a second, in the files written
_CHUNK_BYTES = 64 << 20  # of frames decoded at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSummary:
    """What a job left behind."""

    manifest: Path
    records: int  # of the manifest
    failed: dict[str, str]  # key -> why it was left out
    shards: int
    shards_skipped: int  # finished by an earlier run of the same command


def to_tars(
    records: Sequence[Record],
    out: str | os.PathLike[str],
    *,
    video: ShortVideoConfig | None = None,
    shard_size: int = 1000,
    num_threads: int = 2,
    progress: Report | None = None,
) -> CacheSummary:
    """Encodes each record's segment anew, by itself, and writes `shard_size` of them to each of 00000.tar, 00001.tar...

    Frames keep their times. The same call again resumes; with other settings or records it is refused.
    """
    video = video or ShortVideoConfig()
    job = _Job(records, out, shard_size, {"to": "tars", "video": dataclasses.asdict(video)}, progress)

    def shorten(record: Record) -> bytes | DecodeError:
        try:
            return shortened(record, video)
        except DecodeError as error:
            return error

    with closing(_in_order(shorten, job.waiting(), num_threads)) as made:
        for number, first, part in job.todo():
            failed: dict[str, str] = {}
            write_archive(job.folder / f"{number:05d}.tar", _samples(job, first, part, made, failed))
            job.finish(number, failed)
    tars = [job.folder / f"{number:05d}.tar" for number in range(job.shards)]
    return job.end([record for tar in tars for record in read_archive(tar)])


def to_arrays(
    records: Sequence[Record],
    out: str | os.PathLike[str],
    *,
    clip: ClipConfig,
    seed: int = 0,
    shard_size: int = 64,
    num_threads: int = 2,
    progress: Report | None = None,
) -> CacheSummary:
    """Samples each record's clip once and keeps it as a row of a zarr3 array, `shard_size` rows to a file.

    What is random in `clip` is drawn once, by `seed` and the record. The same call again resumes; with other settings
    or records it is refused. Memory: three shards.
    """
    recipe = {"to": "arrays", "clip": dataclasses.asdict(clip), "seed": seed}
    job = _Job(records, out, shard_size, recipe, progress)
    shape = (clip.num_frames, clip.size, clip.size, 3)
    array = arrays.create(job.folder / ARRAY, len(records), shape, shard_size)
    requests = (ClipRequest(r.source, r.start_seconds, r.end_seconds, clip_seed(r, seed)) for r in job.waiting())
    # Only the last shard is smaller than a batch, and it comes last.
    options: dict[str, Any] = {"batch_size": shard_size, "num_threads": num_threads, "prefetch": 1}
    with closing(ClipLoader(requests, **options, **dataclasses.asdict(clip))) as batches:
        for number, first, part in job.todo():
            batch = next(batches)
            array[first : first + len(part)].write(batch.data).result()
            failed = {record.key: error for record, error in zip(part, batch.errors, strict=True) if error}
            job.finish(number, failed)
            job.tell(len(part))
    rows = [
        dataclasses.replace(_alone(record), video=arrays.row_name(job.folder / ARRAY, row))
        for row, record in enumerate(records)
    ]
    return job.end([record for record in rows if record.key not in job.failed])


def shortened(record: Record, config: ShortVideoConfig) -> bytes:
    """The record's segment as an mp4 file of its own. Raises DecodeError where it cannot be decoded, or not encoded.

    It holds the frames that are shown in [start_seconds, end_seconds), at their times; the first and the last may be
    shown shorter.
    """
    decoder = VideoDecoder(record.source)
    found = decoder.metadata
    begins = decoder.pts_seconds - decoder.pts_seconds[0]
    ends = np.append(begins[1:], found.duration_seconds)
    end = min(ends[-1], np.inf if record.end_seconds is None else record.end_seconds)
    if record.start_seconds >= end:
        raise DecodeError(None, "sample", f"the video ends at {ends[-1]} s, before {record.start_seconds} s")
    shown = np.flatnonzero((ends > record.start_seconds) & (begins < end))
    edges = np.append(np.maximum(begins[shown], record.start_seconds), end) - record.start_seconds
    ticks = np.round(edges * _TICKS).astype(np.int64)
    order = np.arange(len(ticks))
    ticks = np.maximum.accumulate(ticks - order) + order  # damaged files have frames at one time, and an mp4 must not
    scale = min(1.0, config.short_side / min(found.width, found.height))
    size = (max(2, round(scale * found.width)), max(2, round(scale * found.height)))

    def frames() -> Iterator[np.ndarray]:
        count = max(1, _CHUNK_BYTES // (3 * found.width * found.height))
        for i in range(0, len(shown), count):
            yield from decoder.get_frames_at(shown[i : i + count]).data

    return _encode(frames(), ticks, size, found.fps, config)


def _encode(
    frames: Iterable[np.ndarray], ticks: np.ndarray, size: tuple[int, int], fps: float, config: ShortVideoConfig
) -> bytes:
    """An mp4 file of frames uint8[H, W, 3], each shown from its tick to the next; `size` is the width and height that
    pyvdl's converter would give them, of which an odd column or row is cut: nothing is stretched.
    """
    try:
        import av
        from av.video.reformatter import ColorRange, Colorspace
    except ImportError as error:
        raise ImportError("writing video files needs PyAV: pip install av") from error
    colors: dict[str, Any] = {"dst_colorspace": Colorspace.ITU601, "dst_color_range": ColorRange.MPEG}
    width, height = (side // 2 * 2 for side in size)
    durations = dict(zip(ticks[:-1].tolist(), np.diff(ticks).tolist()))
    target = io.BytesIO()
    # Encoded fast, and to be decoded fast: CAVLC, no loop filter. Without B frames, since only then an mp4 file can say
    # how long its last frame is shown.
    options = {"crf": str(config.crf), "preset": "veryfast", "tune": "fastdecode", "bf": "0"}
    try:
        with av.open(target, "w", format="mp4") as container:
            stream: Any = container.add_stream("libx264", rate=max(1, round(fps)), options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            codec = stream.codec_context
            codec.gop_size, codec.thread_count = config.gop, 1
            codec.time_base = stream.time_base = Fraction(1, _TICKS)
            codec.colorspace, codec.color_range = Colorspace.ITU601, ColorRange.MPEG

            def write(packets: Iterable[Any]) -> None:
                for packet in packets:
                    packet.duration = durations[packet.pts]
                    container.mux(packet)

            for tick, pixels in zip(ticks, frames):
                small = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(*size, "rgb24", interpolation="BILINEAR")
                even: Any = np.ascontiguousarray(small.to_ndarray()[:height, :width])
                frame = av.VideoFrame.from_ndarray(even, "rgb24").reformat(format="yuv420p", **colors)
                frame.pts, frame.time_base = int(tick), codec.time_base
                write(stream.encode(frame))
            write(stream.encode(None))
    except av.FFmpegError as error:
        raise DecodeError(None, "encode", str(error)) from error
    return target.getvalue()


def _samples(
    job: _Job, first: int, part: Sequence[Record], made: Iterator[bytes | DecodeError], failed: dict[str, str]
) -> Iterator[Sample]:
    """The samples of one tar; what could not be made goes to `failed`.

    Members are called by the records' numbers: keys of records may have dots, those of WebDataset must not.
    """
    for number, (record, video) in enumerate(zip(part, made), first):
        if isinstance(video, DecodeError):
            failed[record.key] = f"{video.stage}: {video.message}"
        else:
            text = record.captions[0] if record.captions else None
            fields = {"key": record.key} | to_fields(_alone(record))
            yield Sample(key=f"{number:09d}", video=video, text=text, fields=fields)
        job.tell(1)


def _alone(record: Record) -> Record:
    """Of a record whose segment is a video by itself."""
    return dataclasses.replace(record, start_seconds=0.0, end_seconds=None, byte_range=None)


def _in_order[A, B](job: Callable[[A], B], items: Iterable[A], num_threads: int) -> Generator[B]:
    """The results in the order of `items`, a few of which are under way."""
    waiting: deque[Future[B]] = deque()
    pool = ThreadPoolExecutor(num_threads)
    try:
        for item in items:
            waiting.append(pool.submit(job, item))
            if len(waiting) > 2 * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Job:
    """The shards of one job: which are done, what failed in them."""

    def __init__(
        self,
        records: Sequence[Record],
        out: str | os.PathLike[str],
        shard_size: int,
        recipe: dict[str, Any],
        progress: Report | None,
    ) -> None:
        if shard_size < 1:
            raise ValueError(f"shard_size={shard_size}: expected at least 1")
        if not records:
            raise ValueError("records is empty: expected at least one")
        keys = {record.key for record in records}
        if len(keys) < len(records):
            raise ValueError(f"{len(records)} records have {len(keys)} keys: expected its own for each")
        self.folder = Path(out)
        self.folder.mkdir(parents=True, exist_ok=True)
        known = {"shard_size": shard_size, "records": len(records), "records_sha256": digest(records)}
        claim(self.folder / JOB_FILE, recipe | known)
        self.failed: dict[str, str] = {}
        self._records, self._size, self._progress = records, shard_size, progress
        self.shards = -(-len(records) // shard_size)
        self._todo: list[int] = []
        for number in range(self.shards):
            try:
                self.failed |= json.loads(self._stats(number).read_text(encoding="utf-8"))["failed"]
            except FileNotFoundError:
                self._todo.append(number)
        self._skipped = self.shards - len(self._todo)
        self._done = len(records) - sum(len(part) for _, _, part in self.todo())

    def todo(self) -> Iterator[tuple[int, int, Sequence[Record]]]:
        """Of each shard to write its number, the number of its first record, and its records."""
        for number in self._todo:
            first = number * self._size
            yield number, first, self._records[first : first + self._size]

    def waiting(self) -> Iterator[Record]:
        """The records of these shards."""
        return itertools.chain.from_iterable(part for _, _, part in self.todo())

    def tell(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, len(self._records))

    def finish(self, number: int, failed: dict[str, str]) -> None:
        """The shard is written; this file, beside it, says so."""
        self.failed |= failed
        write_whole(self._stats(number), [json.dumps({"failed": failed}, ensure_ascii=False) + "\n"])

    def end(self, records: list[Record]) -> CacheSummary:
        if not records:
            key, error = next(iter(self.failed.items()))
            raise ValueError(f"none of the {len(self._records)} clips could be decoded, the first is {key}: {error}")
        write_manifest(self.folder / MANIFEST, records)
        return CacheSummary(
            manifest=self.folder / MANIFEST,
            records=len(records),
            failed=self.failed,
            shards=self.shards,
            shards_skipped=self._skipped,
        )

    def _stats(self, number: int) -> Path:
        return self.folder / f"{number:05d}_stats.json"
