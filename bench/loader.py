"""Times pyvdl against itself: `python -m bench.loader`. What its options and its loader give, for the same clips.

quality: "fast" in place of "exact", and how far the pictures are apart.
keyframe: sampling="keyframe" in place of uniform.
open: the first opening of a file beside libavformat's own reading of its header, and later openings of the same file.
scaling: a batch on two threads beside one.
memory: of a ClipLoader, for each thread, and whether it grows with the number of clips.
cache: an epoch over clips as they are, and as `pyvdl prepare` rewrites them.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.cache import compare_cache
from bench.common import (
    Spread,
    Timing,
    append_rows,
    environment,
    format_table,
    geometric_mean,
    interleave,
    measure,
    parser_of,
    progress,
)
from bench.common import ratio as median_ratio
from bench.contenders import SHORT_SIDE, SIZE
from bench.convert import psnr
from bench.corpus import CASES, Case, MissingEncoderError, make_clip
from bench.decode import NUM_FRAMES, mean_timing
from bench.natives import ROOT, load_limits
from pyvdl import ClipLoader, ClipRequest, VideoDecoder, sample_clip
from pyvdl.video import ffmpeg_versions

MODES = ("quality", "keyframe", "open", "scaling", "memory", "cache")
VIEW: dict[str, Any] = {"short_side": SHORT_SIDE, "size": SIZE}
LEAST_SECONDS = 0.1  # what is shorter is repeated and divided
OPENINGS = 8  # of fresh copies of a file, in a round
BATCH_COPIES = 4  # of each clip in a batch
THREADS = (1, 2)
MEMORY_CASE = "h264-1080p"
MEMORY_CLIPS = 6  # a thread
SMALL = Case("h264-128p", ".mp4", "libx264", 160, 128, seconds=0.5)
SMALL_VIEW: dict[str, Any] = {"num_frames": 4, "short_side": 64, "size": 56}
MARKS = (1_000, 10_000)  # clips

type Rows = list[dict[str, Any]]
type Clip = npt.NDArray[np.uint8]


def mean_time(job: Callable[[], object]) -> Timing:
    """Of one run, over enough runs."""
    _, first = measure(job)
    count = max(1, round(LEAST_SECONDS / max(first.wall_seconds, 1e-6)))
    if count == 1:
        return first

    def repeat() -> None:
        for _ in range(count):
            job()

    _, timing = measure(repeat)
    return Timing(timing.cpu_seconds / count, timing.wall_seconds / count)


def sample(path: Path, **options: Any) -> Clip:
    return sample_clip(path, num_frames=NUM_FRAMES, **VIEW, **options).data


def compare_options(paths: dict[str, Path], rounds: int, name: str, option: dict[str, Any], alike: bool) -> Rows:
    """Each case as it is by default and with another option, in turns; CPU time.

    alike: the frames are the same ones, so that decibels tell how far the pictures are apart.
    """
    table = [["CPU time", "default ms", f"{name} ms", "faster", "dB to default"]]
    rows: Rows = []
    gains = []
    variants: dict[str, dict[str, Any]] = {"default": {}, name: option}
    for case, path in paths.items():
        progress(f"{name}: {case}")
        decibels = psnr(sample(path, **option), sample(path)) if alike else None

        def run(variant: str, _: int, path: Path = path) -> Timing:
            return mean_time(lambda: sample(path, **variants[variant]))

        timings = interleave(list(variants), run, rounds)
        seconds = {variant: [timing.cpu_seconds for timing in taken] for variant, taken in timings.items()}
        gains.append(median_ratio(seconds["default"], seconds[name]))
        spreads = {variant: Spread.of(values) for variant, values in seconds.items()}
        cells = [f"{1000 * spread.median:.1f}" for spread in spreads.values()]
        table.append([case, *cells, f"{gains[-1]:.2f}x", "" if decibels is None else f"{decibels:.1f}"])
        rows.append({"bench": f"loader-{name}", "case": case, "times_faster": gains[-1]})
        if decibels is not None:
            rows[-1]["psnr_db"] = decibels if math.isfinite(decibels) else None  # none: no pixel differs
        rows[-1] |= {f"{variant}_cpu_seconds": asdict(spread) for variant, spread in spreads.items()}
    table.append(["geometric mean", "", "", f"{geometric_mean(gains):.2f}x", ""])
    print(f"\n{format_table(table)}")
    return rows


def compare_quality(paths: dict[str, Path], rounds: int) -> Rows:
    return compare_options(paths, rounds, "fast", {"quality": "fast"}, alike=True)


def compare_keyframe(paths: dict[str, Path], rounds: int) -> Rows:
    return compare_options(paths, rounds, "keyframe", {"sampling": "keyframe"}, alike=False)


def time_openings(paths: dict[str, Path], rounds: int) -> Rows:
    """CPU time: the files are in the system's cache, so that opening is work, not waiting.

    A later opening is one by a decoder of its own, after others of the same file, as when a loader has had other files
    in between: where it has not, its thread goes on with the decoder it has, and opens nothing.
    """
    limits = load_limits()
    table = [["opening, CPU ms", "first", "header alone", "more by", "later"]]
    rows: Rows = []
    for case, path in paths.items():
        progress(f"open: {case}")
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:

            def run(name: str, i: int, path: Path = path, folder: str = folder) -> Timing:
                if name == "later":
                    return later_openings(path)
                copy = copies(path, Path(folder), i)
                return openings_of(copy) if name == "first" else header_readings(limits, copy)

            timings = interleave(["first", "header", "later"], run, rounds)
        milliseconds = {name: [1000 * timing.cpu_seconds for timing in taken] for name, taken in timings.items()}
        more = Spread.of([first - header for first, header in zip(milliseconds["first"], milliseconds["header"])])
        spreads = {name: Spread.of(values) for name, values in milliseconds.items()}
        cells = [spreads["first"], spreads["header"], more, spreads["later"]]
        table.append([case, *(f"{cell.median:.2f}" for cell in cells)])
        rows.append({"bench": "loader-open", "case": case, "first_more_ms": asdict(more)})
        rows[-1] |= {f"{name}_ms": asdict(spread) for name, spread in spreads.items()}
    print(f"\n{format_table(table)}")
    return rows


def copies(path: Path, folder: Path, number: int) -> list[Path]:
    """Files that nobody has opened before: what is remembered of other files does not help."""
    result = [folder / f"{number}-{i}{path.suffix}" for i in range(OPENINGS)]
    for copy in result:
        copy.unlink(missing_ok=True)
        shutil.copyfile(path, copy)
    return result


def openings_of(paths: Sequence[Path]) -> Timing:
    timings = [measure(functools.partial(VideoDecoder, path))[1] for path in paths]
    return mean_timing(timings)


def header_readings(limits: ctypes.CDLL, paths: Sequence[Path]) -> Timing:
    timings = []
    for path in paths:
        opened = ctypes.c_void_p()
        error, timing = measure(functools.partial(limits.limit_open, os.fsencode(path), ctypes.byref(opened)))
        if error is not None:
            raise RuntimeError(error.decode())
        limits.limit_close(opened)
        timings.append(timing)
    return mean_timing(timings)


def later_openings(path: Path) -> Timing:
    VideoDecoder(path)  # remembers the file
    return openings_of([path] * OPENINGS)


def take(loader: ClipLoader, count: int) -> None:
    for _ in range(count):
        batch = next(loader)
        if not batch.ok.all():
            raise RuntimeError(f"clips failed: {[error for error in batch.errors if error]}")


def compare_threads(paths: dict[str, Path], rounds: int) -> Rows:
    """All cases in one batch, the long ones first."""
    order = sorted(paths, key=lambda case: -paths[case].stat().st_size)
    clips = [paths[case] for case in order] * BATCH_COPIES

    def run(name: str, _: int) -> Timing:
        progress(f"scaling: {name} threads")
        requests = [ClipRequest(path, seed=0) for path in clips]
        options: dict[str, Any] = {"num_frames": NUM_FRAMES, **VIEW}
        with ClipLoader(requests, batch_size=1, num_threads=int(name), prefetch=8, **options) as loader:
            return measure(lambda: take(loader, len(clips)))[1]

    timings = interleave([str(threads) for threads in THREADS], run, rounds)
    seconds = {name: [timing.wall_seconds for timing in taken] for name, taken in timings.items()}
    one, two = (str(threads) for threads in THREADS)
    scaling = median_ratio(seconds[one], seconds[two]) / 2
    table = [["threads", "clips/s"]]
    rates = {name: len(clips) / Spread.of(values).median for name, values in seconds.items()}
    table += [[name, f"{rate:.2f}"] for name, rate in rates.items()]
    print(f"\n{format_table(table)}\nscaling from 1 to 2 threads: {scaling:.2f} of twice as fast")
    return [{"bench": "loader-scaling", "cases": order, "clips_a_second": rates, "scaling": scaling}]


def compare_memory(paths: dict[str, Path], corpus: Path) -> Rows:
    """For each number of threads, at 1080p; and after many small clips, each a file of its own name.

    A thread's share is told over what the process had after `import pyvdl`, and over what it had once the C++ module
    and with it FFmpeg's libraries were loaded, which happens once however many threads there are.
    """
    rows: Rows = []
    table = [["memory, MB", "import", "C++ module", "peak", "output slots", "a thread", "without module", "growth"]]
    if MEMORY_CASE in paths:
        for threads in THREADS:
            progress(f"memory: {threads} threads")
            many = [str(paths[MEMORY_CASE])] * (MEMORY_CLIPS * threads)
            found = footprint(many, threads, [len(many)], {"num_frames": NUM_FRAMES, **VIEW})
            beside = found["peak_bytes"][-1] - found["slots_bytes"]
            more = [(beside - found[base]) / threads for base in ("imported_bytes", "loaded_bytes")]
            name = f"{MEMORY_CASE}, {threads} thread{'s' if threads > 1 else ''}"
            table.append([name, *_memory_cells(found), *(f"{share / 1e6:.1f}" for share in more), ""])
            rows.append({"bench": "loader-memory", "case": MEMORY_CASE, "threads": threads})
            rows[-1] |= found | {"bytes_a_thread": more[0], "bytes_a_thread_without_module": more[1]}
    else:
        print(f"memory a thread: skipped, it needs {MEMORY_CASE}")
    progress(f"memory: {MARKS[-1]} clips")
    with tempfile.TemporaryDirectory(dir=corpus) as folder:
        many = list(links(make_clip(SMALL, corpus), Path(folder), MARKS[-1]))
        found = footprint(many, THREADS[-1], list(MARKS), SMALL_VIEW)
    growth = found["peak_bytes"][-1] - found["peak_bytes"][0]
    table.append([f"{MARKS[0]} to {MARKS[-1]} small clips", *_memory_cells(found), "", "", f"{growth / 1e6:.1f}"])
    rows.append({"bench": "loader-memory", "case": SMALL.name, "threads": THREADS[-1], "clips": MARKS})
    rows[-1] |= found | {"growth_bytes": growth}
    print(f"\n{format_table(table)}")
    return rows


def _memory_cells(found: dict[str, Any]) -> list[str]:
    steps = [found["imported_bytes"], found["loaded_bytes"] - found["imported_bytes"], found["peak_bytes"][-1]]
    return [f"{step / 1e6:.1f}" for step in [*steps, found["slots_bytes"]]]


def links(path: Path, folder: Path, count: int) -> Iterator[str]:
    """Names of one file: whoever remembers files by name has that many to remember."""
    for i in range(count):
        link = folder / f"{i}{path.suffix}"
        os.link(path, link)
        yield str(link)


def footprint(paths: list[str], threads: int, marks: list[int], options: dict[str, Any]) -> dict[str, Any]:
    """measure_loader() of footprint.py in a process of its own."""
    request = json.dumps({"paths": paths, "threads": threads, "marks": marks, "options": options})
    command = [sys.executable, "-m", "bench.footprint"]
    done = subprocess.run(command, cwd=ROOT, input=request + "\n", capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process ended with code {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def run(case_names: Sequence[str], modes: Sequence[str], rounds: int, corpus: Path, out: Path) -> None:
    """The chosen modes: prints tables, keeps rows."""
    env = environment(["pyvdl", "numpy"])
    env["ffmpeg"] = ffmpeg_versions()["ffmpeg"][1]
    print(f"{env['cpu']}, {env['cores']} cores (load {env['load']}), {env['system']}, Python {env['python']}")
    print(f"pyvdl {env['packages']['pyvdl']}, FFmpeg {env['ffmpeg']}; medians of {rounds} rounds")
    paths: dict[str, Path] = {}
    for name in case_names:
        try:
            paths[name] = make_clip(CASES[name], corpus)
        except MissingEncoderError as error:
            print(f"{name}: skipped, {error}")
    rows: Rows = []
    if "quality" in modes:
        rows += compare_quality(paths, rounds)
    if "keyframe" in modes:
        rows += compare_keyframe(paths, rounds)
    if "open" in modes:
        rows += time_openings(paths, rounds)
    if "scaling" in modes:
        rows += compare_threads(paths, rounds)
    if "memory" in modes:
        rows += compare_memory(paths, corpus)
    if "cache" in modes:
        rows += compare_cache(paths, rounds)
    append_rows(out, {"rounds": rounds, "environment": env}, rows)
    print(f"rows: {out}")


def main(arguments: Sequence[str] | None = None) -> None:
    description = "Times what pyvdl's options and its loader give. The clips are those of bench.decode."
    options = parser_of("bench.loader", description, CASES, MODES, "what to compare").parse_args(arguments)
    run(options.cases, options.modes, options.rounds, options.corpus, options.out)


if __name__ == "__main__":
    main()
