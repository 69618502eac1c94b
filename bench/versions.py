"""How fast two versions of FFmpeg decode: `python -m bench.versions`.

The system's, which pyvdl is built with, and the newer one that PyAV brings. All frames, on one thread, nothing done
with them. Where a peer of `bench.decode` that brings its own FFmpeg comes near pyvdl or before it, this tells how much
of that is FFmpeg's.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av

from bench.common import Spread, append_rows, environment, format_table, interleave, measure, parser_of, progress, ratio
from bench.corpus import CASES, make_clip
from bench.natives import load_limits


def by_system(limits: ctypes.CDLL, path: Path) -> int:
    """The number of frames."""
    frames = ctypes.c_int64()
    error = limits.limit_decode(os.fsencode(path), ctypes.byref(frames))
    if error is not None:
        raise RuntimeError(error.decode())
    return frames.value


def by_pyav(path: Path) -> int:
    """The same."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        return sum(1 for _ in container.decode(stream))


def main() -> None:
    options = parser_of(
        "bench.versions", "Times two versions of FFmpeg at decoding whole files.", CASES, ("decode",), "decode: all"
    ).parse_args()
    limits = load_limits()
    names = {"system": limits.limit_ffmpeg().decode(), "pyav": av.ffmpeg_version_info}
    env = environment(("av",))
    print(
        f"{env['cpu']}, {env['cores']} cores (load {env['load']}), {env['system']}; CPU time, {options.rounds} rounds"
    )
    table = [["all frames, CPU ms", names["system"], f"PyAV's {names['pyav']}", "times as long"]]
    rows: list[dict[str, Any]] = []
    for case in options.cases:
        path = make_clip(CASES[case], options.corpus)
        progress(f"versions: {case}")
        calls = {"system": functools.partial(by_system, limits, path), "pyav": functools.partial(by_pyav, path)}
        counts = {who: call() for who, call in calls.items()}
        if len(set(counts.values())) != 1:
            raise RuntimeError(f"{case}: {counts} frames")
        timings = interleave(list(calls), lambda who, _: measure(calls[who])[1], options.rounds)  # noqa: B023
        seconds = {who: [timing.cpu_seconds for timing in taken] for who, taken in timings.items()}
        times = ratio(seconds["system"], seconds["pyav"])
        table.append([case, *(f"{1000 * Spread.of(taken).median:.0f}" for taken in seconds.values()), f"{times:.2f}"])
        row = {"bench": "versions", "case": case, "frames": counts["system"], "times": times, "versions": names}
        rows.append(row | {f"{who}_cpu_seconds": asdict(Spread.of(taken)) for who, taken in seconds.items()})
    print(f"\n{format_table(table)}")
    append_rows(options.out, {"environment": env}, rows)
    print(f"rows: {options.out}")


if __name__ == "__main__":
    main()
