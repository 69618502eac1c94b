"""Times captioning jobs: `python -m bench.end_to_end caption`, or `python -m bench.captioning MODE` for one part.

host: the pipeline with a model that costs nothing, beside `ClipLoader` alone on the same threads.
device: the pipeline with a decoder that costs nothing, beside `generate` alone.
both: the pipeline with both real, each on a core of its own in all that is timed: beside the longer of the two alone,
    and beside the longer while the other runs, unconnected, on its core (cores share caches, memory and clocks).
bookkeeping: a job of many clips with neither: splitting, rows, files and resuming, in time and memory for each clip.

Ratios are medians over interleaved rounds. Weights are random.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from bench.common import (
    ROOT,
    Spread,
    Timing,
    append_rows,
    environment,
    format_table,
    interleave,
    measure,
    peak_memory_bytes,
    progress,
    ratio,
)
from pyvdl.caption import Captioner, Decoded, clip_request, clip_seed
from pyvdl.columns import carried
from pyvdl.config import ClipConfig, GemmaConfig, ViTConfig, VLMConfig
from pyvdl.data import Record
from pyvdl.decoder_process import DecoderProcess, Frames
from pyvdl.generate import generate
from pyvdl.jobs import Job, open_job
from pyvdl.models import VLM
from pyvdl.pipeline import Tally, run_shards
from pyvdl.rows import CaptionRow
from pyvdl.sharding import make_mesh
from pyvdl.step import create
from pyvdl.storage import Folder
from pyvdl.text import CAPTION_PROMPT, NUM_SPECIAL_IDS, WordTokenizer, split_words

MODES = ("host", "device", "both", "bookkeeping")
BATCH, PREFETCH, SHARD = 8, 2, 64
SAMPLES, TOKENS = 4, 16
CLIPS = 1_000_000  # of the bookkeeping
VIDEOS = {"240p, 4 s": (426, 240, 4.0), "720p, 1 s": (1280, 720, 1.0)}
WORDS = sorted(set(split_words(f"{CAPTION_PROMPT} a red ball moves left then right and a blue star turns")))
NAMES = {"model_sha256": "bench"}
# One thread for all of XLA; where it runs is up to the system, so that processes are bound to a core, too.
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def small(tokenizer: WordTokenizer, frames: int) -> VLM:
    vision = ViTConfig(image_size=56, width=192, depth=4, num_heads=3, mlp_dim=768, dtype="float32")
    language = GemmaConfig(
        vocab_size=tokenizer.vocab_size, width=256, depth=4, num_heads=4, head_dim=64, mlp_dim=1024, dtype="float32"
    )
    return VLM(VLMConfig(vision=vision, language=language, num_frames=frames), rngs=nnx.Rngs(0))


def paligemma(tokenizer: WordTokenizer, frames: int) -> VLM:
    vision = ViTConfig(width=1152, depth=27, num_heads=16, mlp_dim=4304)
    config = VLMConfig(vision=vision, language=GemmaConfig(vocab_size=tokenizer.vocab_size), num_frames=frames)
    return create(lambda: VLM(config, rngs=nnx.Rngs(0)), make_mesh(), "bfloat16")


class _FreeModel:
    """Rows at no cost; a Captioner in what `run_shards` asks of it."""

    tokens = 0

    def __init__(self, clip: ClipConfig, batch_size: int) -> None:
        self.clip, self.batch_size = clip, batch_size

    def groups(self, records: Sequence[Record]) -> list[list[int]]:
        return [list(range(len(records)))]

    def rows(self, batches: Iterable[Decoded], **names: str) -> Iterator[list[CaptionRow]]:
        for batch in batches:
            batch.release()
            yield [row_of(record) for record in batch.records]


class _FreeDecoder:
    """The same frames again and again; a DecoderProcess in what `run_shards` asks of it."""

    def __init__(self, frames: np.ndarray) -> None:
        self._frames = frames

    def decode(self, batches: Iterable[Sequence[Any]]) -> Iterator[Frames]:
        return (Frames(self._frames, [None] * len(batch), lambda: None) for batch in batches)


def row_of(record: Record) -> CaptionRow:
    return CaptionRow(
        key=record.key,
        video=record.video,
        start_seconds=record.start_seconds,
        end_seconds=record.end_seconds,
        captions=["a red ball moves left, then right", "a blue star turns"],
        log_probs=[-12.5, -10.25],
        prompt=CAPTION_PROMPT,
        status="ok",
        error=None,
        seed=0,
        extra=carried(record),
    )


def job_of(folder: str, video: Path, clips: int) -> Job:
    records = [Record(key=str(i), video=str(copy)) for i, copy in enumerate(copies(video, clips))]
    return open_job(Folder(folder), NAMES, records, shard_size=SHARD, format="parquet")


def video_of(width: int, height: int, seconds: float, folder: Path) -> Path:
    from bench.corpus import Case, make_clip  # it wants PyAV

    return make_clip(Case(f"h264-{height}p", ".mp4", "libx264", width, height, seconds=seconds), folder)


def copies(video: Path, clips: int) -> list[Path]:
    """Names of their own for one file: clips of one file would share their decoding."""
    found = [video.with_name(f"{video.stem}-{i}{video.suffix}") for i in range(clips)]
    for path in found:
        if not path.exists():
            os.link(video, path)
    return found


def run(captioner: Any, decoder: Any, job: Job, tally: Tally | None = None) -> None:
    for shard, rows in run_shards(captioner, decoder, job, range(job.shards), tally):
        job.finish(shard, rows)


def decode_alone(job: Job, clip: ClipConfig, threads: int) -> None:
    from pyvdl import ClipLoader  # the C++ module, which what needs no video does without

    requests = [clip_request(record) for shard in range(job.shards) for record in job.work(shard)]
    loader = ClipLoader(requests, batch_size=BATCH, num_threads=threads, prefetch=PREFETCH, **dataclasses.asdict(clip))
    assert all(batch.ok.all() for batch in loader)


def decoding(clip: ClipConfig, threads: int) -> DecoderProcess:
    return DecoderProcess(clip, batch_size=BATCH, num_threads=threads, prefetch=PREFETCH, timeout_seconds=60.0)


def host(rounds: int, clips: int = 64) -> list[dict[str, Any]]:
    """Rows and a table of the pipeline with a free model beside the loader alone."""
    clip = ClipConfig(sampling="uniform")
    threads = len(os.sched_getaffinity(0))
    rows = []
    for name, (width, height, seconds) in VIDEOS.items():
        progress(f"caption, host: {name}")
        with tempfile.TemporaryDirectory() as folder, decoding(clip, threads) as decoder:
            video = video_of(width, height, seconds, Path(folder))
            job = job_of(f"{folder}/job", video, clips)
            model = _FreeModel(clip, BATCH)
            parts: dict[str, Callable[[], None]] = {
                "ClipLoader": functools.partial(decode_alone, job, clip, threads),
                "pipeline": functools.partial(run, model, decoder, job),
            }
            timings = compare(parts, rounds)
        rows.append(told("host", name, clips, timings, {"threads": threads}))
    return rows


def device(rounds: int) -> list[dict[str, Any]]:
    if jax.default_backend() == "cpu":
        return [_device("small PaliGemma", model_of(8), rounds, 24)]
    large = model_of(8, paligemma, [f"w{i}" for i in range(GemmaConfig().vocab_size - NUM_SPECIAL_IDS)])
    drawing = [large.drawing | {"num_samples": samples, "max_length": 32} for samples in (1, 10)]
    found = []
    for large.drawing in drawing:
        samples = large.drawing["num_samples"]
        found.append(_device(f"PaliGemma 3B's shape, {samples} captions, frames made up", large, rounds, 8))
    return found


def _device(name: str, captioner: Captioner, rounds: int, batches: int) -> dict[str, Any]:
    size, count = captioner.clip.size, captioner.clip.num_frames
    frames = np.random.default_rng(0).integers(0, 256, (BATCH, count, size, size, 3), np.uint8)
    progress(f"caption, device: {name}")
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        job = open_job(
            Folder(folder),
            NAMES,
            [Record(key=str(i), video=f"/{i}") for i in range(batches * BATCH)],
            shard_size=SHARD,
            format="parquet",
        )
        parts = {
            "generate": lambda: generate_alone(captioner, frames, job),
            "pipeline": lambda: run(captioner, _FreeDecoder(frames), job, tally),
        }
        timings = compare(parts, rounds)
    waited = tally.wait_seconds / sum(timings["pipeline"])  # of one run more: the warm-up's
    more = {"device": jax.devices()[0].device_kind, "waited_for_frames": waited}
    return told("device", name, batches * BATCH, timings, more)


def model_of(frames: int, make: Callable[[WordTokenizer, int], VLM] = small, words: Sequence[str] = WORDS) -> Captioner:
    tokenizer = WordTokenizer(words)
    model = make(tokenizer, frames)
    size = model.config.vision.image_size
    clip = ClipConfig(num_frames=frames, sampling="uniform", short_side=size * 8 // 7, size=size)
    return Captioner(model, tokenizer, clip=clip, num_samples=SAMPLES, max_length=TOKENS, batch_size=BATCH)


def generate_alone(captioner: Captioner, frames: np.ndarray, job: Job) -> None:
    """As fast as `generate` goes: the next call is made before the last one's tokens are read.

    Seeds and batches are those of the job: captions that end early would make other work of others.
    """
    previous = None
    works = [job.work(shard) for shard in range(job.shards)]
    for records in (work[i : i + BATCH] for work in works for i in range(0, len(work), BATCH)):
        seeds = np.zeros(BATCH, np.uint32)
        seeds[: len(records)] = [clip_seed(record, captioner.seed) for record in records]
        samples = generate(captioner.model, frames, captioner.prompts(records), seeds=seeds, **captioner.drawing)
        if previous is not None:
            np.asarray(previous.tokens)
        previous = samples
    assert previous is not None
    np.asarray(previous.tokens)


def both(rounds: int) -> list[dict[str, Any]]:
    """In a process whose XLA has one thread, bound to a core: its threads do not count as those of two."""
    command = [sys.executable, "-m", "bench.captioning", "both-here", "--rounds", str(rounds)]
    found = subprocess.run(
        command,
        env=os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]


def both_here(rounds: int, batches: int = 32) -> list[dict[str, Any]]:
    """Few batches would count the first one's decoding and the last one's captions, which nothing overlaps."""
    decoding_core, device_core = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, [device_core])  # before JAX begins its threads
    captioner = model_of(8)
    clip = captioner.clip
    frames = np.zeros((BATCH, 8, 56, 56, 3), np.uint8)

    @contextlib.contextmanager
    def elsewhere() -> Iterator[None]:
        """Threads and processes that begin here decode."""
        os.sched_setaffinity(0, [decoding_core])
        yield
        os.sched_setaffinity(0, [device_core])

    with tempfile.TemporaryDirectory() as folder, decoding(clip, 1) as decoder, ThreadPoolExecutor(1) as other:
        progress("caption, both")
        video = video_of(854, 480, 2.0, Path(folder))
        job = job_of(f"{folder}/job", video, batches * BATCH)
        requests = [clip_request(record) for shard in range(job.shards) for record in job.work(shard)]

        def decode() -> None:
            for found in decoder.decode(itertools.batched(requests, BATCH)):
                assert found.errors == [None] * BATCH
                found.release()

        def beside() -> None:
            decoded = other.submit(decode)
            generate_alone(captioner, frames, job)
            decoded.result()

        with elsewhere():
            next(decoder.decode([requests[:BATCH]])).release()  # its process begins
        parts = {
            "decoding": decode,
            "generate": lambda: generate_alone(captioner, frames, job),
            "both_unconnected": beside,
            "pipeline": lambda: run(captioner, decoder, job),
        }
        timings = compare(parts, rounds)
    longer = [max(a, b) for a, b in zip(timings["decoding"], timings["generate"], strict=True)]
    row = told("both", "480p, 2 s; small PaliGemma", batches * BATCH, timings, {"threads": 1})
    return [
        row
        | {"over_the_longer": ratio(timings["pipeline"], longer)}
        | {"over_the_longer_beside_the_other": ratio(timings["pipeline"], timings["both_unconnected"])}
    ]


def compare(parts: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each part, one a round, after one that does not count."""

    def timed(name: str, _: int) -> Timing:
        return measure(parts[name])[1]

    for name in parts:
        timed(name, 0)
    return {name: [t.wall_seconds for t in found] for name, found in interleave(list(parts), timed, rounds).items()}


def told(part: str, case: str, clips: int, timings: dict[str, list[float]], more: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"bench": f"caption {part}", "case": case, "clips": clips} | more
    for name, seconds in timings.items():
        row[f"{name}_clips_a_second"] = clips / Spread.of(seconds).median
        if name != "pipeline":
            row[f"pipeline_over_{name}"] = ratio(seconds, timings["pipeline"])  # of rates
    return row


def bookkeeping(clips: int, shard_size: int = 10_000) -> list[dict[str, Any]]:
    """A job of `clips` clips, four of each video, whose frames and captions cost nothing."""

    def records() -> Iterator[Record]:
        for i in range(clips):
            start = 10.0 * (i % 4)
            path = f"/videos/{i // 4 % 1000:03d}/{i // 4:09d}.mp4"
            yield Record(key=f"{i:010d}", video=path, start_seconds=start, end_seconds=start + 10.0, extra={"n": i})

    steps: dict[str, tuple[float, float]] = {}  # wall and processor time, microseconds a clip
    memory = [memory_bytes()]
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:

        def step[T](name: str, work: Callable[[], T]) -> T:
            progress(f"caption, bookkeeping: {name}")
            found, timing = measure(work)
            steps[name] = (1e6 * timing.wall_seconds / clips, 1e6 * timing.cpu_seconds / clips)
            memory.append(memory_bytes())
            return found

        def opened(records: Iterable[Record]) -> Job:
            return open_job(
                Folder(folder), NAMES, records, shard_size=shard_size, format="parquet", input_sha256="bench"
            )

        def captioned(shards: Iterable[int]) -> None:
            decoder: Any = _FreeDecoder(np.zeros((BATCH, 1), np.uint8))
            model: Any = _FreeModel(ClipConfig(), BATCH)
            for shard, rows in run_shards(model, decoder, job, shards):
                job.finish(shard, rows)

        job = step("split", lambda: opened(records()))
        step("caption", lambda: captioned(range(job.shards)))
        left = step("resume", lambda: opened([]).missing())
        counts = step("count", lambda: job.status())
    assert (left, counts.rows) == ([], clips)
    total = sum(cpu for _, cpu in steps.values())
    table = [["bookkeeping, us a clip", "wall", "processor"]]
    table += [[name, f"{wall:.2f}", f"{cpu:.2f}"] for name, (wall, cpu) in steps.items()]
    print(f"\n{format_table(table)}")
    print(
        f"{clips} clips; memory {memory[0] >> 20} MiB before, {', '.join(str(m >> 20) for m in memory[1:])} after each"
    )
    row: dict[str, Any] = {"bench": "caption bookkeeping", "clips": clips, "microseconds": steps, "total": total}
    return [row | {"memory_bytes": memory}]


def memory_bytes() -> int:
    """Resident at the most since the last call, where the kernel can say so; else since the start."""
    peak = peak_memory_bytes()
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def time_captioning(modes: Sequence[str], rounds: int, clips: int) -> list[dict[str, Any]]:
    parts = {"host": host, "device": device, "both": both, "both-here": both_here}
    rows = [row for mode in modes if mode in parts for row in parts[mode](rounds)]
    for row in rows:
        print(
            f"{row['bench']}, {row['case']}: "
            + ", ".join(
                f"{name.replace('_', ' ')} {value:.3g}" for name, value in row.items() if isinstance(value, float)
            )
        )
    if "bookkeeping" in modes:
        rows += bookkeeping(clips)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.captioning", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("modes", nargs="*", choices=(*MODES, "both-here"), default=list(MODES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clips", type=int, default=CLIPS, help="of the bookkeeping")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "captioning.jsonl")
    options = parser.parse_args()
    if options.modes == ["both-here"]:
        print("\n".join(json.dumps(row) for row in both_here(options.rounds)))
        return
    env = environment(("jax", "jaxlib", "numpy", "pyarrow"))
    print(f"{env['cpu']}, {env['cores']} cores (load {env['load']}), {env['system']}")
    begin = time.perf_counter()
    rows = time_captioning(options.modes, options.rounds, options.clips)
    append_rows(options.out, {"environment": env}, rows)
    print(f"rows: {options.out} ({time.perf_counter() - begin:.0f} s)")


if __name__ == "__main__":
    main()
