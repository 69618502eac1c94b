"""The page of a captioning job, made from its folder: how it went, how long the captions are, clips, errors.

Failures are counted over all clips, from the ends of the shards; what needs rows is taken from shards drawn at random,
so that neither time nor memory grows with the captions of millions of clips.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import pyvdl
from pyvdl.caption import clip_request
from pyvdl.config import ClipConfig
from pyvdl.data import Record
from pyvdl.decoder_process import DecoderProcess
from pyvdl.jobs import Job
from pyvdl.page import draw, frame_image, new_figure, photograph_uri, write_page
from pyvdl.rows import CaptionRow, Counts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SAMPLED_ROWS = 20_000  # that lengths and log-probabilities are taken from, a shard more or less
_CLIPS = 12
_FRAMES = 8  # of a film strip
_FRAME_SIDE = 160  # pixels
_EXAMPLES = 5  # of each kind of error
_BINS = 40  # of time, and of log-probabilities
_TIMEOUT_SECONDS = 30.0  # for the frames of a clip
_UNITS = ((2 * 86400, "days", 86400), (2 * 3600, "hours", 3600), (2 * 60, "minutes", 60), (0, "seconds", 1))


@dataclass
class _Sample:
    """What rows drawn at random say."""

    rows: int = 0
    captioned: int = 0
    captions: int = 0
    different: int = 0  # captions of a clip, summed
    words: Counter[int] = field(default_factory=Counter)  # captions of so many words
    log_probs: list[float] = field(default_factory=list)
    clips: list[tuple[int, CaptionRow]] = field(default_factory=list)  # with their shards


def write_job_page(job: Job, path: Path, *, seed: int = 0) -> None:
    """Writes the page of a job, or of what is done of it, into one HTML file. ValueError while no shard is finished.

    seed: of the clips and shards that it shows. Their frames are decoded anew; where that fails, the page says so.
    """
    if job.kind != "captions":
        raise ValueError(f"{job.folder.name} is a job of {job.kind}: pages are of captions")
    missing = set(job.missing())
    done = [shard for shard in range(job.shards) if shard not in missing]
    if not done:
        raise ValueError(f"{job.folder.name}: no shard is finished yet, there is nothing to show")
    counts, kinds = _count(job, done)
    times = job.finished(done)
    draws = random.Random(seed)
    sample = _draw_rows(job, done, draws)
    write_page(
        path,
        "job_page.html.j2",
        plots=draw(lambda colours: _figures(job, times, sample, colours)),
        version=pyvdl.__version__,
        job=job,
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        rows=counts.rows,
        failed=counts.failed.total(),
        emptied=counts.emptied,
        shards_done=len(done),
        sample=sample,
        mean_words=_mean(sample.words),
        samples=job.recipe["num_samples"],
        rate=_rate(job, times),
        seconds=times[-1][0] - times[0][0],
        films=_films(job, sample.clips),
        errors=[
            {"kind": kind, "count": count, "examples": _examples(job, kinds[kind], kind)}
            for kind, count in counts.failed.most_common()
        ],
        facts=_facts(job),
    )


def _count(job: Job, done: Sequence[int]) -> tuple[Counts, dict[str, list[int]]]:
    """Rows and failures, and the first shards with each kind of failure."""
    counts = Counts()
    kinds: dict[str, list[int]] = {}
    for shard in done:
        found = job.counts([shard])
        counts += found
        for kind in found.failed:
            if len(kinds.setdefault(kind, [])) < _EXAMPLES:
                kinds[kind].append(shard)
    return counts, kinds


def _draw_rows(job: Job, done: Sequence[int], draws: random.Random) -> _Sample:
    """Reads shards in a random order until there are rows enough; keeps a few clips, each with the same chance."""
    sample = _Sample()
    for shard in draws.sample(done, len(done)):
        if sample.rows >= _SAMPLED_ROWS:
            break
        for row in job.captions(shard):
            sample.rows += 1
            if not row.captions:
                continue
            sample.captioned += 1
            sample.captions += len(row.captions)
            sample.different += len(set(row.captions))
            sample.words.update(len(caption.split()) for caption in row.captions)
            sample.log_probs += row.log_probs
            if len(sample.clips) < _CLIPS:
                sample.clips.append((shard, row))
            elif (place := draws.randrange(sample.captioned)) < _CLIPS:
                sample.clips[place] = shard, row
    return sample


def _examples(job: Job, shards: Sequence[int], kind: str) -> list[CaptionRow]:
    found: list[CaptionRow] = []
    for shard in shards:
        found += [row for row in job.captions(shard) if row.error is not None and row.error.partition(":")[0] == kind]
        if len(found) >= _EXAMPLES:
            break
    return found[:_EXAMPLES]


def _films(job: Job, clips: Sequence[tuple[int, CaptionRow]]) -> list[dict[str, Any]]:
    """Frames of each clip as the model saw them, or why there are none any more; captions, the likeliest first."""
    wanted = {row.key for _, row in clips}
    records: dict[str, Record] = {}
    for shard in {shard for shard, _ in clips}:
        records |= {record.key: record for record in job.work(shard) if record.key in wanted}
    films = []
    clip = ClipConfig(**job.recipe["clip"])
    with DecoderProcess(clip, batch_size=1, num_threads=1, prefetch=0, timeout_seconds=_TIMEOUT_SECONDS) as decoder:
        frames = decoder.decode([clip_request(records[row.key])] for _, row in clips)
        for (_, row), batch in zip(clips, frames):
            said = Counter(row.captions)
            scores = dict(zip(row.captions, row.log_probs))
            films.append(
                {
                    "row": row,
                    "frames": [] if batch.errors[0] else [_thumbnail(frame) for frame in _spread(batch.data[0])],
                    "error": batch.errors[0],
                    "said": [(text, scores[text], said[text]) for text in sorted(said, key=lambda t: -scores[t])],
                }
            )
            batch.release()
    return films


def _spread(frames: np.ndarray) -> np.ndarray:
    """At most so many frames, uint8[T, H, W, 3], as stand in a strip."""
    if len(frames) <= _FRAMES:
        return frames
    chosen: np.ndarray = frames[np.linspace(0, len(frames) - 1, _FRAMES).round().astype(int)]
    return chosen


def _thumbnail(frame: np.ndarray) -> str:
    image = frame_image(frame)
    image.thumbnail((_FRAME_SIDE, _FRAME_SIDE))
    return photograph_uri(image)


def _facts(job: Job) -> dict[str, str]:
    """What was asked for, in words."""
    told = {name.replace("_", " "): value for name, value in job.recipe.items() if name != "clip"}
    clip = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in job.recipe["clip"].items())
    return {name: str(value) for name, value in told.items()} | {"clip": clip, "recipe sha256": job.recipe_sha256}


def _mean(counts: Mapping[int, int]) -> float:
    return sum(value * count for value, count in counts.items()) / max(1, sum(counts.values()))


def _rate(job: Job, times: Sequence[tuple[float, int]]) -> float | None:
    """Clips a second between the first and the last shard; None where that was no time."""
    seconds = times[-1][0] - times[0][0]
    return sum(job.size(shard) for _, shard in times[1:]) / seconds if seconds > 0 else None


# Plots --------------------------------------------------------------------------------------------------------------


def _figures(
    job: Job, times: Sequence[tuple[float, int]], sample: _Sample, colours: Mapping[str, str]
) -> dict[str, Figure]:
    figures = {}
    if times[-1][0] > times[0][0]:
        figures = {"rate": _rate_figure(job, times, colours), "done": _done_figure(job, times, colours)}
    if sample.captions:
        figures |= {"words": _words_figure(sample, colours), "log-probs": _log_probs_figure(sample, colours)}
    return figures


def _elapsed(times: Sequence[tuple[float, int]]) -> tuple[np.ndarray, str, float]:
    """Times since the first shard in a unit that fits them, its name, and its seconds."""
    seconds = np.array([moment - times[0][0] for moment, _ in times])
    name, unit = next((name, unit) for least, name, unit in _UNITS if seconds[-1] >= least)
    return seconds / unit, name, unit


def _rate_figure(job: Job, times: Sequence[tuple[float, int]], colours: Mapping[str, str]) -> Figure:
    """Clips a second in equal parts of the time since the first shard was finished."""
    figure, axes = new_figure()
    at, name, unit = _elapsed(times)
    sizes = [job.size(shard) for _, shard in times]
    clips, edges = np.histogram(at[1:], min(_BINS, len(times) - 1), (0.0, at[-1]), weights=sizes[1:])
    axes.stairs(clips / (edges[1] * unit), edges, fill=True, color=colours["visual"])
    axes.set_xlabel(f"{name} since the first shard")
    axes.set_ylabel("clips a second")
    axes.margins(x=0)
    axes.grid(axis="y", linewidth=0.7)
    return figure


def _done_figure(job: Job, times: Sequence[tuple[float, int]], colours: Mapping[str, str]) -> Figure:
    figure, axes = new_figure()
    at, name, _ = _elapsed(times)
    clips = np.cumsum([job.size(shard) for _, shard in times])
    axes.step(at, clips, where="post", color=colours["visual"], linewidth=1.8)
    axes.axhline(job.records, color=colours["muted"], linewidth=1, linestyle=(0, (4, 4)))
    axes.set_ylim(0, 1.08 * job.records)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel(f"{name} since the first shard")
    axes.set_ylabel("clips done")
    axes.margins(x=0)
    axes.grid(axis="y", linewidth=0.7)
    return figure


def _words_figure(sample: _Sample, colours: Mapping[str, str]) -> Figure:
    figure, axes = new_figure()
    lengths = range(max(sample.words) + 1)
    axes.bar(lengths, [100 * sample.words[n] / sample.captions for n in lengths], 0.9, color=colours["language"])
    axes.axvline(_mean(sample.words), color=colours["ink"], linewidth=1, linestyle=(0, (4, 4)))
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("words a caption")
    axes.set_ylabel("% of captions")
    axes.grid(axis="y", linewidth=0.7)
    return figure


def _log_probs_figure(sample: _Sample, colours: Mapping[str, str]) -> Figure:
    figure, axes = new_figure()
    shares, edges = np.histogram(sample.log_probs, _BINS)
    axes.stairs(100 * shares / sample.captions, edges, fill=True, color=colours["language"])
    axes.set_xlabel("log-probability of a caption (natural log)")
    axes.set_ylabel("% of captions")
    axes.grid(axis="y", linewidth=0.7)
    return figure
