"""What every benchmark needs: where it ran, interleaved timing, ratios, rows and tables.

Contenders take turns and a ratio is the median of the ratios within each round, so that what else the machine does
falls on all of them alike. This module imports the standard library alone: workers of other environments use it, too.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Timing:
    """What one run of a job took."""

    cpu_seconds: float  # user and system, of all threads of the process
    wall_seconds: float


@dataclass(frozen=True)
class Spread:
    """The middle of repeated measurements."""

    median: float
    p25: float
    p75: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        p25, median, p75 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, p25, p75)


def measure[T](job: Callable[[], T]) -> tuple[T, Timing]:
    """Runs the job; gives its result and its time in this process, threads included."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    result = job()
    wall_seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return result, Timing(cpu_seconds, wall_seconds)


def interleave(names: Sequence[str], run: Callable[[str, int], Timing], rounds: int) -> dict[str, list[Timing]]:
    """Timings run(name, round) of each contender, one a round. They take turns; each round starts with another one."""
    timings: dict[str, list[Timing]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % max(len(names), 1)
        for name in [*names[first:], *names[:first]]:
            timings[name].append(run(name, i))
    return timings


def ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Median of values / base, round by round."""
    return statistics.median(value / unit for value, unit in zip(values, base, strict=True))


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(math.fsum(logarithms) / len(logarithms))


def peak_memory_bytes() -> int:
    """The most memory this process ever had resident."""
    try:  # what rusage tells includes what the parent had when it started this process
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def resident_bytes() -> int:
    """The memory that this process has now; Linux alone tells."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Of each distribution; None where it is not installed."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """The machine and the versions that a measurement belongs to."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": package_versions(packages),
        "load": round(os.getloadavg()[0], 2),  # of the minute before: above 0.5 or so, the timings are doubtful
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def append_rows(path: Path, run: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds a run to a file of JSON lines: one line on the run itself, then its rows, which name it by its time."""
    name = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"run": name} | dict(row)) + "\n" for row in (run, *rows))


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser_of(
    program: str, description: str, cases: Iterable[str], modes: Sequence[str], told: str
) -> argparse.ArgumentParser:
    """The arguments that benchmarks over the corpus share; `told` is the help of `modes`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}", description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    names = list(cases)
    help_of_cases = f"clips to decode, of {', '.join(names)}"
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE", help=help_of_cases)
    parser.add_argument("--modes", nargs="+", choices=modes, default=list(modes), help=told)
    parser.add_argument("--rounds", type=_at_least_one, default=5, help="times that everybody does everything")
    parser.add_argument(
        "--corpus", type=Path, default=ROOT / "build" / "bench" / "decode", help="folder in which the clips are kept"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results" / "decode.jsonl", help="file that rows are added to"
    )
    return parser


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned text; the first row is the head, the first column is aligned to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(line))
        for line in ([*zip(row, widths)] for row in rows)
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)
