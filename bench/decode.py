"""Times pyvdl's decoder against its peers on sparse clips: `python -m bench.decode`.

Every contender is a process of its own (see contenders.py): their FFmpegs do not meet, and a crash is one failure. They
take turns at every clip, and what they deliver is held against a full decode, so that a wrong frame cannot win.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import math
import queue
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import numpy.typing as npt

from bench.common import (
    Spread,
    Timing,
    append_rows,
    environment,
    format_table,
    geometric_mean,
    interleave,
    parser_of,
    progress,
    ratio,
)
from bench.contenders import CONTENDERS, SHORT_SIDE, SIZE, THUMB_FACTOR, Contender, Job, center, thumbnails
from bench.corpus import CASES, FPS, Case, MissingEncoderError, make_clip
from bench.workers import ContenderError, Worker, set_up_peers

type Clock = Literal["cpu_seconds", "wall_seconds"]

NUM_FRAMES = 16
BASE = "pyvdl"
LIMITS = ("limit-b", "limit-a")
ALL_FAMILIES = "all"
MODES = ("cases", "mixed", "batch")
CLOCKS: dict[Clock, str] = {"cpu_seconds": "CPU time", "wall_seconds": "Wall clock"}
TOLERANCE_LEVELS = 3.0  # mean absolute difference that other filters and roundings explain
BATCH_COPIES = 2  # of each clip in a batch


@dataclass(frozen=True)
class Check:
    """How a contender's frames compare with a full decode."""

    right: int  # frames to which the wanted frame is the nearest of all frames
    wanted: int
    difference_levels: float  # mean absolute, to the wanted frames

    @property
    def good(self) -> bool:
        return self.right == self.wanted and self.difference_levels <= TOLERANCE_LEVELS


def plainly_resized(frame: npt.NDArray[np.uint8], width: int, height: int) -> npt.NDArray[np.uint8]:
    """Bilinear between the four nearest pixels whatever the scale: what decoders give that do not average."""

    def places(size: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        at = np.clip((np.arange(count) + 0.5) * size / count - 0.5, 0, size - 1.001)
        return at.astype(np.int64), (at % 1).astype(np.float32)

    (y, dy), (x, dx) = places(frame.shape[0], height), places(frame.shape[1], width)
    rows = frame[y] + dy[:, None, None] * (frame[y + 1].astype(np.float32) - frame[y])
    return (rows[:, x] + dx[:, None] * (rows[:, x + 1] - rows[:, x]) + 0.5).astype(np.uint8)


class Reference:
    """Thumbnails of every frame of a file, decoded from the start to the end, in the order of their pts.

    Each by two filters, as decoders differ in it: averaging, as pyvdl does, and not.
    """

    def __init__(self, path: Path) -> None:
        times: list[int] = []
        pictures: list[list[npt.NDArray[np.uint8]]] = []
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            for frame in container.decode(stream):
                if frame.pts is None:
                    raise ValueError(f"{path}: a frame without pts")
                width, height = resized(frame.width, frame.height)
                averaged = frame.reformat(width, height, format="rgb24", interpolation="BILINEAR").to_ndarray()
                plain = plainly_resized(frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False), width, height)
                both = np.stack([center(averaged.astype(np.uint8, copy=False)), center(plain)])
                pictures.append(list(thumbnails(both)))
                times.append(frame.pts)
            self._frame_ticks = float(1 / (FPS * stream.time_base)) if stream.time_base else 1.0
        self._pts = np.sort(times)
        self._thumbnails = np.array(pictures)[np.argsort(times)].swapaxes(0, 1)  # uint8[filters, N, H, W, 3]

    def wanted(self, count: int) -> npt.NDArray[np.int64]:
        """int64[count]: the frames shown at the centres of equal segments."""
        start, end = self._pts[0], self._pts[-1] + self._frame_ticks
        centers = start + (np.arange(count) + 0.5) / count * (end - start)
        return np.searchsorted(self._pts, centers, side="right") - 1

    def check(self, thumbs: npt.NDArray[np.uint8]) -> Check:
        """Compares uint8[T, H, W, 3] thumbnails of the frames that a contender took for the wanted ones."""
        return min(
            (self._check(thumbs, every) for every in self._thumbnails), key=lambda check: check.difference_levels
        )

    def _check(self, thumbs: npt.NDArray[np.uint8], every: npt.NDArray[np.uint8]) -> Check:
        wanted = self.wanted(len(thumbs))
        right, difference = 0, 0.0
        for thumb, number in zip(thumbs, wanted):
            gaps = every - thumb.astype(np.float32)
            difference += float(np.abs(gaps[number]).mean())
            # Another colour matrix shifts the whole picture: that shows in the difference, not as another frame.
            gaps -= gaps.mean((1, 2), keepdims=True)
            right += int(np.abs(gaps).mean((1, 2, 3)).argmin() == number)
        return Check(right, len(thumbs), difference / len(thumbs))


def resized(width: int, height: int) -> tuple[int, int]:
    """Width and height with SHORT_SIDE pixels on the shorter side."""
    scale = SHORT_SIDE / min(width, height)
    return round(width * scale), round(height * scale)


def job_for(case: Case, path: Path) -> Job:
    width, height = resized(case.width, case.height)
    frames = [int((i + 0.5) * case.num_frames / NUM_FRAMES) for i in range(NUM_FRAMES)]
    return Job(path=str(path), frames=frames, fps=FPS, height=height, width=width)


def check_outputs(reference: Reference, job: Job, group: dict[str, Worker]) -> dict[str, Check | str]:
    """For each contender its check, or why it failed. It is also the warm-up."""
    side = SIZE // THUMB_FACTOR
    results: dict[str, Check | str] = {}
    for name, worker in group.items():
        try:
            reply = worker.ask({"job": asdict(job), "thumbnails": True})
            pixels = np.frombuffer(base64.b64decode(reply["thumbnails"]), dtype=np.uint8)
            results[name] = reference.check(pixels.reshape(-1, side, side, 3))
        except ContenderError as error:
            results[name] = str(error)
    return results


def time_clip(worker: Worker, job: Job) -> Timing:
    reply = worker.ask({"job": asdict(job)})
    return Timing(reply["cpu_seconds"], reply["wall_seconds"])


@dataclass(frozen=True)
class Line:
    """One line of the tables."""

    name: str
    timings: dict[str, list[Timing]]  # of each contender, of one clip (mixed: the mean over clips), one a round
    failures: dict[str, str]  # why others have none
    checks: dict[str, Check]
    details: dict[str, dict[str, Any]] = field(default_factory=dict)  # what else is known of a contender

    def values(self, name: str, clock: Clock) -> list[float]:
        return [getattr(timing, clock) for timing in self.timings[name]]

    def ratio(self, name: str, clock: Clock, base: str = BASE) -> float:
        """How many times as long as `base` it takes."""
        return ratio(self.values(name, clock), self.values(base, clock))

    def rows(self) -> Iterator[dict[str, Any]]:
        """What is kept of it, one row a contender."""
        for name in [*self.timings, *self.failures]:
            row: dict[str, Any] = {"bench": "decode", "case": self.name, "contender": name}
            if name in self.failures:
                yield row | {"failure": self.failures[name]}
                continue
            for clock in CLOCKS:
                row[clock] = asdict(Spread.of(self.values(name, clock)))
                row[f"{clock}_ratio"] = self.ratio(name, clock)
            if name in self.checks:
                row["check"] = asdict(self.checks[name])
            yield row | self.details.get(name, {})


def time_case(name: str, job: Job, group: dict[str, Worker], checks: dict[str, Check | str], rounds: int) -> Line:
    """The contenders take turns at the same clip."""
    failures = {contender: check for contender, check in checks.items() if isinstance(check, str)}
    good = {contender: check for contender, check in checks.items() if isinstance(check, Check)}
    timings = interleave(list(good), lambda contender, _: time_clip(group[contender], job), rounds)
    return Line(name, timings, failures, good)


def time_mixed(
    jobs: dict[str, Job], group: dict[str, Worker], checks: dict[str, dict[str, Check | str]], rounds: int
) -> Line:
    """Every request is for another clip than the one before. Who fails at one clip cannot do the mixture."""
    failures: dict[str, str] = {}
    for contender in group:
        if failed := [name for name in jobs if isinstance(checks[name][contender], str)]:
            failures[contender] = f"cannot decode {', '.join(failed)}"
    able = [contender for contender in group if contender not in failures]
    order = random.Random(0)
    sequence = [job for _ in range(rounds) for job in order.sample(list(jobs.values()), len(jobs))]
    turns = interleave(able, lambda contender, i: time_clip(group[contender], sequence[i]), len(sequence))
    timings = {
        contender: [mean_timing(taken[i : i + len(jobs)]) for i in range(0, len(taken), len(jobs))]
        for contender, taken in turns.items()
    }
    return Line("mixed", timings, failures, {})


def mean_timing(timings: Sequence[Timing]) -> Timing:
    return Timing(
        sum(timing.cpu_seconds for timing in timings) / len(timings),
        sum(timing.wall_seconds for timing in timings) / len(timings),
    )


def time_batch(jobs: Sequence[Job], kinds: Iterable[type[Contender]], cores: int, rounds: int) -> Line:
    """All clips at once on all cores, per clip; each contender in each of its ways to use them.

    A library without a loader of its own runs as a pool of threads in one process, and as one process a core.
    """
    batch = sorted(jobs, key=lambda job: -len(job.frames) * job.frames[-1]) * BATCH_COPIES
    ways: dict[str, list[Worker]] = {}
    failures: dict[str, str] = {}
    peaks: dict[str, int] = {}

    def run(way: str, _: int) -> Timing:
        if way in failures:
            return Timing(math.nan, math.nan)
        try:
            timing, peaks[way] = run_batch(ways[way], batch, cores)
        except ContenderError as error:
            failures[way] = str(error)
            return Timing(math.nan, math.nan)
        return Timing(timing.cpu_seconds / len(batch), timing.wall_seconds / len(batch))

    with contextlib.ExitStack() as stack:
        for kind in kinds:
            if kind.is_limit:
                continue
            with contextlib.suppress(ContenderError):  # reported when the bench started
                counts = (
                    {kind.name: 1} if kind.has_loader else {f"{kind.name} threads": 1, f"{kind.name} processes": cores}
                )
                for way, count in counts.items():
                    ways[way] = [stack.enter_context(contextlib.closing(Worker(kind))) for _ in range(count)]
        timings = interleave(list(ways), run, rounds)
    details = {way: {"memory_bytes": peak} for way, peak in peaks.items()}
    return Line("batch", {way: taken for way, taken in timings.items() if way not in failures}, failures, {}, details)


def run_batch(pool: Sequence[Worker], jobs: Sequence[Job], cores: int) -> tuple[Timing, int]:
    """Decodes the jobs in one process with `cores` threads, or in several with one job each at a time.

    Gives also how many bytes of memory the processes took at most over what they had after importing their library.
    """
    if len(pool) == 1:
        reply = pool[0].ask({"jobs": [asdict(job) for job in jobs], "threads": cores})
        if reply["failures"]:
            raise ContenderError(f"{reply['failures']} of {len(jobs)} clips failed")
        memory = reply["peak_memory_bytes"] - pool[0].hello["peak_memory_bytes"]
        return Timing(reply["cpu_seconds"], reply["wall_seconds"]), memory
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)

    def work(worker: Worker) -> tuple[float, int]:
        cpu_seconds, memory = 0.0, 0
        with contextlib.suppress(queue.Empty):
            while True:
                reply = worker.ask({"job": asdict(waiting.get_nowait())})
                cpu_seconds += reply["cpu_seconds"]
                memory = reply["peak_memory_bytes"] - worker.hello["peak_memory_bytes"]
        return cpu_seconds, memory

    start = time.perf_counter()
    with ThreadPoolExecutor(len(pool)) as threads:
        results = list(threads.map(work, pool))
    wall_seconds = time.perf_counter() - start
    return Timing(sum(cpu for cpu, _ in results), wall_seconds), sum(memory for _, memory in results)


def case_table(lines: Sequence[Line], contenders: Sequence[str], clock: Clock) -> str:
    """Milliseconds a clip and the ratio to pyvdl; "!" marks frames that are not the wanted ones or look different."""
    table = [["case", *contenders]]
    for line in lines:
        cells = [line.name]
        for name in contenders:
            if name in line.failures:
                cells.append("fails")
                continue
            cell = f"{1000 * Spread.of(line.values(name, clock)).median:.1f}"
            if name != BASE:
                cell += f" {line.ratio(name, clock):5.2f}x"
            cells.append(cell + (" " if name not in line.checks or line.checks[name].good else "!"))
        table.append(cells)
    single = [line for line in lines if line.checks]
    if len(single) > 1:
        means = ["geometric mean"]
        for name in contenders:
            ratios = [line.ratio(name, clock) for line in single if name in line.timings]
            means.append(f"{geometric_mean(ratios):.2f}x " if ratios else "")
        table.append(means)
    return format_table(table)


@dataclass(frozen=True)
class FamilyRatio:
    """How many times as long as a limit a contender takes in the cases of a family: geometric mean."""

    contender: str
    limit: str
    family: str
    clock: Clock
    cases: tuple[str, ...]  # those that both can do
    geometric_mean: float


def family_ratios(lines: Sequence[Line], contenders: Sequence[str], clock: Clock) -> list[FamilyRatio]:
    """Of each contender over each limit, in each family of the cases and in all of them."""
    families = {ALL_FAMILIES: [line for line in lines if line.name in CASES]}
    for line in families[ALL_FAMILIES]:
        families.setdefault(CASES[line.name].family, []).append(line)
    found = []
    for limit, contender in itertools.product(LIMITS, contenders):
        for family, members in families.items():
            both = [line for line in members if contender in line.timings and limit in line.timings]
            if both and contender != limit:
                mean = geometric_mean(line.ratio(contender, clock, limit) for line in both)
                cases = tuple(line.name for line in both)
                found.append(FamilyRatio(contender, limit, family, clock, cases, mean))
    return found


def family_table(ratios: Sequence[FamilyRatio]) -> str:
    """One line a contender; in brackets what does not cover all cases of a family."""
    most: dict[str, int] = {}
    for found in ratios:
        most[found.family] = max(len(found.cases), most.get(found.family, 0))
    table = [["contender", *(f"{family} ({count})" for family, count in most.items())]]
    for contender in dict.fromkeys(found.contender for found in ratios):
        cells = dict.fromkeys(most, "-")
        for found in ratios:
            if found.contender == contender:
                text = f"{found.geometric_mean:.2f}"
                cells[found.family] = text if len(found.cases) == most[found.family] else f"({text})"
        table.append([contender, *cells.values()])
    return format_table(table)


def batch_table(line: Line) -> str:
    """One line a way of using all cores."""
    table = [["all cores", "clips/s", "time", "CPU ms a clip", "memory MB"]]
    for way in sorted(line.timings, key=lambda way: line.ratio(way, "wall_seconds")):
        table.append(
            [
                way,
                f"{1 / Spread.of(line.values(way, 'wall_seconds')).median:.1f}",
                f"{line.ratio(way, 'wall_seconds'):.2f}x",
                f"{1000 * Spread.of(line.values(way, 'cpu_seconds')).median:.0f}",
                f"{line.details[way]['memory_bytes'] / 1e6:.0f}",
            ]
        )
    return format_table(table)


def check_report(lines: Sequence[Line]) -> str:
    """What the output check found, and the failures."""
    found = [(line.name, name, check) for line in lines for name, check in line.checks.items()]
    text = [f"Output check: {sum(check.good for _, _, check in found)} of {len(found)} agree with a full decode."]
    for case, name, check in found:
        if not check.good:
            text.append(
                f"  {case}, {name}: {check.right} of {check.wanted} frames are the wanted ones, "
                f"mean difference to those {check.difference_levels:.1f} levels"
            )
    text += [f"  {line.name}, {name}: fails: {why}" for line in lines for name, why in line.failures.items()]
    return "\n".join(text)


def run(case_names: Sequence[str], modes: Sequence[str], rounds: int, corpus: Path, out: Path) -> None:
    """The whole benchmark: prints tables, keeps rows."""
    env = environment(["pyvdl", "av", "numpy"])
    print(f"{env['cpu']}, {env['cores']} cores (load {env['load']}), {env['system']}, Python {env['python']}")
    print(f"Job: {NUM_FRAMES} frames of each clip, shorter side {SHORT_SIDE}, centre crop {SIZE}, uint8 RGB.")
    jobs: dict[str, Job] = {}
    paths: dict[str, Path] = {}
    for name in case_names:
        try:
            paths[name] = make_clip(CASES[name], corpus)
            jobs[name] = job_for(CASES[name], paths[name])
        except MissingEncoderError as error:
            print(f"{name}: skipped, {error}")
    lines: list[Line] = []
    loaded: list[type[Contender]] = []
    with contextlib.ExitStack() as stack:
        group: dict[str, Worker] = {}
        for kind in CONTENDERS.values():
            try:
                group[kind.name] = stack.enter_context(contextlib.closing(Worker(kind)))
                loaded.append(kind)
                print(f"{kind.name} {group[kind.name].hello['version']}, FFmpeg: {group[kind.name].hello['ffmpeg']}")
            except ContenderError as error:
                print(f"{kind.name}: {error}")
        env["contenders"] = {name: worker.hello for name, worker in group.items()}
        checks: dict[str, dict[str, Check | str]] = {}
        for name, job in jobs.items():
            progress(f"{name}: output check")
            checks[name] = check_outputs(Reference(paths[name]), job, group)
            if "cases" in modes:
                progress(f"{name}: {rounds} rounds")
                lines.append(time_case(name, job, group, checks[name], rounds))
        if "mixed" in modes:
            progress(f"mixed: {rounds} rounds")
            lines.append(time_mixed(jobs, group, checks, rounds))
    rows: list[dict[str, Any]] = []
    if lines:
        for clock, title in CLOCKS.items():
            print(f"\n{title}, ms a clip on one thread, median of {rounds} rounds, and times that of {BASE}:")
            print(case_table(lines, [kind.name for kind in loaded], clock))
        ratios = [found for clock in CLOCKS for found in family_ratios(lines, [kind.name for kind in loaded], clock)]
        rows += [{"bench": "decode-ratios", **asdict(found)} for found in ratios]
        for clock, title in CLOCKS.items():
            for limit in LIMITS:
                if chosen := [found for found in ratios if found.limit == limit and found.clock == clock]:
                    print(f"\n{title} over {limit}, geometric means (cases):\n{family_table(chosen)}")
        print(f"\n{check_report(lines)}")
    if "batch" in modes:
        progress(f"batch: {rounds} rounds")
        lines.append(time_batch(list(jobs.values()), loaded, env["cores"], rounds))
        print(f"\n{batch_table(lines[-1])}")
        print("\n".join(f"{way}: fails: {why}" for way, why in lines[-1].failures.items()))
    rows += [row for line in lines for row in line.rows()]
    append_rows(out, {"rounds": rounds, "environment": env}, rows)
    print(f"rows: {out}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(
        "bench.decode",
        "Times pyvdl's decoder against its peers on sparse clips and checks everybody's frames against a full decode. "
        "The clips are made at the first run, which takes some minutes.",
        CASES,
        MODES,
        "cases: each clip by itself; mixed: another clip with every request; batch: all clips on all cores",
    )
    parser.add_argument(
        "--setup", action="store_true", help="install the peers into build/bench/peers (several GB with torch) and stop"
    )
    options = parser.parse_args(arguments)
    if options.setup:
        set_up_peers()
    else:
        run(options.cases, options.modes, options.rounds, options.corpus, options.out)


if __name__ == "__main__":
    main()
