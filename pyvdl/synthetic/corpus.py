"""Makes the synthetic corpus on disk: labelled clips, encoded as real video files of several codecs and containers.

Three disjoint parts, as in the paper: `train` (human captions, narratives, questions), `unlabelled` (clips found with
alt-text; their human captions are kept apart, as the upper bound) and `test`. A seed fixes every scene and every word.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from pyvdl.data import Question, Record, write_manifest
from pyvdl.synthetic import words
from pyvdl.synthetic.render import render
from pyvdl.synthetic.scene import Scene, sample_scene

SIZE = 128  # pixels, square
FPS = 12
PARTS = {"train": 0.5, "unlabelled": 0.3, "test": 0.2}  # shares of the clips
PICTURES = 4  # single frames with a caption each, at the centres of as many parts of a window of a train clip
WINDOWS = 3  # overlapping windows of a train clip that pictures are taken from
SEGMENTS = 4  # clips in one long video


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How one file is written; `share` is its share of the files."""

    codec: str  # FFmpeg's encoder
    suffix: str
    share: float
    options: dict[str, str]


X264 = {"preset": "veryfast", "crf": "27", "bf": "2", "g": "12"}
ENCODINGS = (
    Encoding("libx264", ".mp4", 0.45, X264),
    Encoding("libx264", ".mkv", 0.2, X264),
    Encoding(
        "libx265", ".mp4", 0.1, {"preset": "ultrafast", "crf": "30", "x265-params": "log-level=none:pools=1:keyint=12"}
    ),
    Encoding("libvpx-vp9", ".webm", 0.1, {"deadline": "realtime", "cpu-used": "8", "crf": "36", "b": "0", "g": "12"}),
    Encoding("mpeg4", ".mp4", 0.15, {"qscale": "6", "bf": "2", "g": "12"}),
)
LONG = Encoding("libx264", ".mp4", 0.0, X264)
LONG_SHARE = 0.15  # of the clips stand, four together, in long videos


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Where the parts are and what was made."""

    directory: Path
    train: list[Record]
    unlabelled: list[Record]
    test: list[Record]
    pictures: list[Record]  # windows of train clips with a caption for each of their frames
    num_files: int
    codecs: dict[str, int]


def encode(path: Path, frames: Iterator[np.ndarray], encoding: Encoding) -> None:
    """Writes uint8[H, W, 3] `frames` as a video file that appears whole or not at all."""
    try:
        import av
    except ImportError as error:
        raise ImportError("writing video files needs PyAV: pip install av") from error
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        with av.open(str(partial), "w") as container:
            stream: Any = container.add_stream(encoding.codec, rate=FPS, options=encoding.options)
            stream.width = stream.height = SIZE
            stream.pix_fmt = "yuv420p"
            stream.codec_context.thread_count = 1
            stream.codec_context.time_base = Fraction(1, FPS)
            for i, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts = i
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class _Job:
    """One file to write and the clips in it."""

    path: str  # relative to the corpus
    encoding: Encoding
    clips: tuple[int, ...]


def _plan(num_clips: int, seed: int) -> list[_Job]:
    """Which clips go into which file; long videos never mix parts, so their clips are neighbours within one part."""
    rng = np.random.default_rng([seed, 1])
    jobs = []
    start = 0
    for part, count in part_sizes(num_clips).items():
        clips = list(range(start, start + count))
        start += count
        num_long = int(count * LONG_SHARE) // SEGMENTS
        for i in range(num_long):
            group, clips = tuple(clips[:SEGMENTS]), clips[SEGMENTS:]
            jobs.append(_Job(f"videos/{part}_long_{i:03d}{LONG.suffix}", LONG, group))
        choices = rng.choice(len(ENCODINGS), size=len(clips), p=[encoding.share for encoding in ENCODINGS])
        for clip, choice in zip(clips, choices, strict=True):
            encoding = ENCODINGS[choice]
            jobs.append(_Job(f"videos/{part}_{clip:05d}{encoding.suffix}", encoding, (clip,)))
    return jobs


def part_sizes(num_clips: int) -> dict[str, int]:
    """Clips of each part; they add up to `num_clips`."""
    sizes = {part: int(num_clips * share) for part, share in PARTS.items()}
    sizes["train"] += num_clips - sum(sizes.values())
    return sizes


def _scene(seed: int, clip: int) -> tuple[Scene, np.random.Generator]:
    rng = np.random.default_rng([seed, 2, clip])
    return sample_scene(rng), rng


def _num_frames(scene: Scene) -> int:
    return round(scene.duration_seconds * FPS)


def _write(job: _Job, directory: str, seed: int) -> None:
    def frames() -> Iterator[np.ndarray]:
        for clip in job.clips:
            scene = _scene(seed, clip)[0]
            yield from render(scene, np.arange(_num_frames(scene)) / FPS, size=SIZE)

    encode(Path(directory) / job.path, frames(), job.encoding)


def _records(job: _Job, directory: Path, part_of: Sequence[str], seed: int) -> tuple[list[Record], list[Record]]:
    """The clips of one file, and the pictures taken from its train clips."""
    records, pictures = [], []
    start_frame = 0
    for clip in job.clips:
        scene, rng = _scene(seed, clip)
        num_frames = _num_frames(scene)
        whole = len(job.clips) == 1
        start, end = start_frame / FPS, (start_frame + num_frames) / FPS
        start_frame += num_frames
        part = part_of[clip]
        record = Record(
            key=f"{part}-{clip:05d}",
            video=str(directory / job.path),
            start_seconds=start,
            end_seconds=None if whole else end,
            captions=tuple(words.caption(scene, rng) for _ in range(3)),
            narrative=words.narrative(scene),
            alt_text=words.alt_text(scene, rng),
            questions=tuple(Question(**question._asdict()) for question in words.questions(scene)),
            label=words.label(scene),
            split=part,
            group=job.path,
            extra={"facts": words.facts(scene)},
        )
        records.append(record)
        if part != "train":
            continue
        for window in range(WINDOWS):
            begin, length = scene.duration_seconds * window / 10, scene.duration_seconds * (11 - WINDOWS) / 10
            instants = [begin + (i + 0.5) / PICTURES * length for i in range(PICTURES)]
            pictures.append(
                Record(
                    key=f"{record.key}-pictures-{window}",
                    video=record.video,
                    start_seconds=start + begin,
                    end_seconds=start + begin + length,
                    captions=tuple(words.image_caption(scene, instant) for instant in instants),
                    split="pictures",
                    group=record.key,
                )
            )
    return records, pictures


def make_corpus(
    directory: str | os.PathLike[str],
    *,
    num_clips: int = 1500,
    seed: int = 0,
    num_workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Renders and encodes the corpus into `directory`; its manifests are train, unlabelled, test and pictures.jsonl.

    Files that are there already are kept, so a stopped run goes on where it was. `progress` is called with (files done,
    files in all). Raises ValueError when there are too few clips for three parts.
    """
    if num_clips < 10:
        raise ValueError(f"num_clips must be at least 10, not {num_clips}")
    directory = Path(directory)
    (directory / "videos").mkdir(parents=True, exist_ok=True)
    stamp = directory / "corpus.txt"
    made_of = f"pyvdl synthetic corpus: {num_clips} clips, seed {seed}\n"
    if stamp.exists() and stamp.read_text() != made_of:
        raise ValueError(f"{directory} holds another corpus ({stamp.read_text().strip()}); choose another directory")
    stamp.write_text(made_of)
    jobs = _plan(num_clips, seed)
    missing = [job for job in jobs if not (directory / job.path).exists()]
    done = len(jobs) - len(missing)
    with ProcessPoolExecutor(num_workers or os.cpu_count() or 1, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(_write, missing, [str(directory)] * len(missing), [seed] * len(missing), chunksize=4):
            done += 1
            if progress:
                progress(done, len(jobs))
    part_of = [part for part, count in part_sizes(num_clips).items() for _ in range(count)]
    parts: dict[str, list[Record]] = {part: [] for part in (*PARTS, "pictures")}
    for job in jobs:
        records, pictures = _records(job, directory, part_of, seed)
        for record in records:
            parts[record.split or ""].append(record)
        parts["pictures"] += pictures
    for part, records in parts.items():
        write_manifest(directory / f"{part}.jsonl", records)
    codecs = Counter(
        {"libx264": "h264", "libx265": "hevc", "libvpx-vp9": "vp9"}.get(j.encoding.codec, j.encoding.codec)
        for j in jobs
    )
    return Corpus(directory, **parts, num_files=len(jobs), codecs=dict(codecs))
