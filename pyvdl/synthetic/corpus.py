"""Makes the synthetic corpus on disk: labelled clips, encoded as real video files of several codecs and containers.

Three disjoint parts, as in the paper: `train` (human captions, narratives, questions), `unlabelled` (clips found with
alt-text; their human captions are kept apart, as the upper bound) and `test`. Beside them stand `pictures`: single
frames of other scenes with image captions, what image models have seen before they meet a video. A seed fixes every
scene and every word.
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
from pyvdl.storage import write_whole
from pyvdl.synthetic import words
from pyvdl.synthetic.render import render
from pyvdl.synthetic.scene import Scene, sample_scene

SIZE = 128  # pixels, square
FPS = 12
PARTS = {"train": 0.5, "unlabelled": 0.3, "test": 0.2}  # shares of the clips
SEGMENTS = 4  # clips in one long video
PICTURES = 4  # single frames with a caption each in one record
PICTURES_PER_CLIP = 3  # how many there are, about, for each clip of the corpus
ALBUM = 200  # pictures in one file, one after another


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
STILLS = Encoding("libx264", ".mp4", 0.0, X264 | {"g": "1"})
LONG_SHARE = 0.15  # of the clips stand, four together, in long videos


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Where the parts are and what was made."""

    directory: Path
    train: list[Record]
    unlabelled: list[Record]
    test: list[Record]
    pictures: list[Record]  # runs of single frames, a caption for each
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
    """One file to write and the clips, or the single pictures, in it."""

    path: str  # relative to the corpus
    encoding: Encoding
    clips: tuple[int, ...] = ()
    pictures: tuple[int, ...] = ()


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
    num_pictures = PICTURES_PER_CLIP * num_clips // PICTURES * PICTURES
    for start in range(0, num_pictures, ALBUM):
        pictures = tuple(range(start, min(start + ALBUM, num_pictures)))
        jobs.append(_Job(f"videos/pictures_{start:05d}{STILLS.suffix}", STILLS, pictures=pictures))
    return jobs


def part_sizes(num_clips: int) -> dict[str, int]:
    """Clips of each part; they add up to `num_clips`."""
    sizes = {part: int(num_clips * share) for part, share in PARTS.items()}
    sizes["train"] += num_clips - sum(sizes.values())
    return sizes


def _scene(seed: int, clip: int) -> tuple[Scene, np.random.Generator]:
    rng = np.random.default_rng([seed, 2, clip])
    return sample_scene(rng), rng


def _picture(seed: int, number: int) -> tuple[Scene, float]:
    """A scene that is in no clip, and the instant in seconds that its picture was taken."""
    rng = np.random.default_rng([seed, 4, number])
    scene = sample_scene(rng)
    return scene, float(rng.uniform(0, scene.duration_seconds))


def _num_frames(scene: Scene) -> int:
    return round(scene.duration_seconds * FPS)


def _write(job: _Job, directory: str, seed: int) -> None:
    def frames() -> Iterator[np.ndarray]:
        for clip in job.clips:
            scene = _scene(seed, clip)[0]
            yield from render(scene, np.arange(_num_frames(scene)) / FPS, size=SIZE)
        for number in job.pictures:
            scene, instant = _picture(seed, number)
            yield from render(scene, [instant], size=SIZE)

    encode(Path(directory) / job.path, frames(), job.encoding)


def _pictures(job: _Job, directory: Path, seed: int) -> Iterator[Record]:
    """The single frames of one file, four to a record."""
    for first in range(0, len(job.pictures), PICTURES):
        numbers = job.pictures[first : first + PICTURES]
        yield Record(
            key=f"pictures-{numbers[0]:05d}",
            video=str(directory / job.path),
            start_seconds=first / FPS,
            end_seconds=(first + len(numbers)) / FPS,
            captions=tuple(words.image_caption(*_picture(seed, number)) for number in numbers),
            split="pictures",
            group=job.path,
        )


def _records(job: _Job, directory: Path, part_of: Sequence[str], seed: int) -> Iterator[Record]:
    """The clips of one file."""
    start_frame = 0
    for clip in job.clips:
        scene, rng = _scene(seed, clip)
        num_frames = _num_frames(scene)
        whole = len(job.clips) == 1
        start, end = start_frame / FPS, (start_frame + num_frames) / FPS
        start_frame += num_frames
        yield Record(
            key=f"{part_of[clip]}-{clip:05d}",
            video=str(directory / job.path),
            start_seconds=start,
            end_seconds=None if whole else end,
            captions=tuple(words.caption(scene, rng) for _ in range(3)),
            narrative=words.narrative(scene),
            alt_text=words.alt_text(scene, rng),
            questions=tuple(Question(**question._asdict()) for question in words.questions(scene)),
            label=words.label(scene),
            split=part_of[clip],
            group=job.path,
            extra={"facts": words.facts(scene)},
        )


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
    if not stamp.exists():
        write_whole(stamp, [made_of])
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
        for record in _records(job, directory, part_of, seed):
            parts[record.split or ""].append(record)
        parts["pictures"] += _pictures(job, directory, seed)
    for part, records in parts.items():
        write_manifest(directory / f"{part}.jsonl", records)
    codecs = Counter(
        {"libx264": "h264", "libx265": "hevc", "libvpx-vp9": "vp9"}.get(j.encoding.codec, j.encoding.codec)
        for j in jobs
    )
    return Corpus(directory, **parts, num_files=len(jobs), codecs=dict(codecs))
