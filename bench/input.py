"""Training from files: `python -m bench.end_to_end input`. Does the step wait for its clips?"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from bench.common import Spread, Timing, format_table, interleave, measure, progress, ratio, resident_bytes
from pyvdl.config import ClipConfig, DualEncoderConfig, OptimConfig, TrainConfig, demo, paper
from pyvdl.data import Batches, Record, digest, read_manifest, write_manifest
from pyvdl.models import DualEncoder
from pyvdl.train import contrastive_loss_fn, fit


class Repeated:
    """One batch, again and again."""

    def __init__(self, batch: dict[str, np.ndarray]) -> None:
        self._batch = batch

    def __next__(self) -> dict[str, np.ndarray]:
        return self._batch

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class _Input:
    """Clips of one length and size, and what trains on them."""

    width: int
    height: int
    seconds: float
    model: DualEncoderConfig
    batch: int
    threads: int


def _input_cases() -> dict[str, _Input]:
    """In the first a step takes many times as long as decoding its clips, also where other jobs disturb both; in the
    second it is the other way round."""
    small = demo(512).dual_encoder
    if jax.default_backend() == "cpu":
        vision = dataclasses.replace(small.vision, width=384, depth=6, num_heads=6, mlp_dim=1536)
        large, batch, threads = dataclasses.replace(small, vision=vision), 8, 1
    else:
        large, batch, threads = paper(32_128).dual_encoder, 64, os.cpu_count() or 1
    return {
        "short clips, 128p": _Input(160, 128, 0.5, large, batch, threads),
        "two seconds of 720p": _Input(1280, 720, 2.0, small, 16, 1),
    }


def time_input(rounds: int, steps: int = 8) -> list[dict[str, Any]]:
    """`fit` on files, beside the decoder alone and the same steps on a batch that is there, in turns."""
    from bench.corpus import Case, make_clip  # PyAV: other modes do without

    table = [["training from files", "decoder alone, clips/s", "steps alone", "spare", "both", "waited", "slower by"]]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, case in _input_cases().items():
            progress(f"input: {name}")
            video = Case(f"h264-{case.height}p", ".mp4", "libx264", case.width, case.height, seconds=case.seconds)
            path = make_clip(video, Path(folder))
            row: dict[str, Any] = {"bench": "input", "case": name, "batch": case.batch, "threads": case.threads}
            row |= _time_input(case, path, rounds, steps)
            rows.append(row)
            alone = [f"{row[rate]:.1f}" for rate in ("decoder_alone", "steps_alone")]
            shares = [f"{row[share]:.1%}" for share in ("wait_share", "slower_by")]
            table.append([name, *alone, f"{row['spare']:.2f}x", f"{row['clips_a_second']:.1f}", *shares])
    print(f"\n{format_table(table)}")
    for row in rows:
        print(
            f"{row['case']}: decoding has {row['spare']:.2f} times the steps' rate, they wait {row['wait_share']:.1%}"
        )
    return rows


def _time_input(case: _Input, path: Path, rounds: int, steps: int) -> dict[str, Any]:
    records = [Record(key=str(i), video=str(path), captions=("a",)) for i in range(case.batch)]
    size = case.model.vision.image_size
    clip = ClipConfig(num_frames=case.model.vision.num_frames, short_side=size, size=size)
    text = np.full(case.model.text.context_length, 1, np.int32)
    optim = OptimConfig(name="adamw", warmup_steps=2)
    config = TrainConfig(steps=steps, batch_size=case.batch, optim=optim, log_every=steps)

    def batches() -> Batches:
        options: dict[str, Any] = {"batch_size": case.batch, "seed": 0, "num_threads": case.threads}
        return Batches(records, encode=lambda *_: {"text": text}, clip=clip, **options)

    with contextlib.closing(batches()) as source:
        batch = next(source)
    assert batch["ok"].all()
    shares: list[float] = []

    def run(what: str, _: int) -> Timing:
        if what == "decoder_alone":
            with contextlib.closing(batches()) as source:
                next(source)  # threads and files are warm, as in the steps after the first
                return measure(functools.partial(list, itertools.islice(source, steps - 1)))[1]
        model = DualEncoder(case.model, rngs=nnx.Rngs(0))
        with contextlib.closing(batches()) as source:
            given = source if what == "clips_a_second" else Repeated(batch)
            history = fit(model, contrastive_loss_fn, given, config, progress=False)
        if what == "clips_a_second":
            shares.append(history.wait_share)
        return Timing(0.0, history.seconds)

    timings = interleave(("decoder_alone", "steps_alone", "clips_a_second"), run, rounds)
    clips = (steps - 1) * case.batch  # the first step compiles
    seconds = {what: [timing.wall_seconds for timing in taken] for what, taken in timings.items()}
    found: dict[str, Any] = {what: clips / Spread.of(taken).median for what, taken in seconds.items()}
    found["spare"] = ratio(seconds["steps_alone"], seconds["decoder_alone"])
    # Where decoder and model share processors, steps also get slower without waiting for anything.
    found["slower_by"] = 1 - ratio(seconds["steps_alone"], seconds["clips_a_second"])
    return found | {"wait_share": Spread.of(shares).median, "wait_shares": shares}


def time_manifest(count: int = 200_000) -> list[dict[str, Any]]:
    """Start and memory of a large manifest, and what the order of its records costs; CPU time."""
    progress(f"input: a manifest of {count} clips")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clips.jsonl"
        write_manifest(path, (_record(i, folder) for i in range(count)))
        before = resident_bytes()
        records, reading = measure(lambda: read_manifest(path))
        memory = resident_bytes() - before
    naming = measure(lambda: digest(records))[1]
    options: dict[str, Any] = {"encode": lambda *_: {}, "clip": None, "batch_size": 1024, "seed": 0}
    batches, starting = measure(lambda: Batches(records, **options))
    ordering = measure(lambda: next(batches))[1]
    row: dict[str, Any] = {"bench": "manifest", "records": count, "bytes_a_record": memory / count}
    row |= {f"{name}_us_a_record": 1e6 * t.cpu_seconds / count for name, t in (("read", reading), ("digest", naming))}
    row |= {"start_ms": 1e3 * starting.cpu_seconds, "order_us_a_row": 1e6 * ordering.cpu_seconds / 1024}
    print(
        f"\na million records: {row['read_us_a_record']:.0f} s of CPU time to read, {row['digest_us_a_record']:.0f} s "
        f"to name, {row['bytes_a_record'] / 1e3:.2f} GB; batches begin in {row['start_ms']:.1f} ms, their order takes "
        f"{row['order_us_a_row']:.0f} us a row"
    )
    return [row]


def _record(number: int, folder: str) -> Record:
    shard, place = divmod(number, 10_000)
    return Record(
        key=f"{shard:05d}_{number:09d}",
        video=f"tar://{shard:05d}_{number:09d}.mp4::{folder}/{shard:05d}.tar",
        byte_range=(512 + place * 700_000, 690_000),
        captions=(f"a man walks his dog along a beach at sunset, with number {number}",),
    )
