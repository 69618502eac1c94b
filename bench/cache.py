"""What rewriting a data set once gains in each epoch: `python -m bench.loader --modes cache`.

The same clips as they are, as the short videos of `pyvdl prepare --to tars`, and as the arrays of `--to arrays`, read
in turns; CPU time of a clip. What comes out is held against what the originals give.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import Spread, Timing, format_table, geometric_mean, interleave, measure, progress, ratio
from bench.convert import psnr
from pyvdl.cache import CacheSummary, to_arrays, to_tars
from pyvdl.config import ClipConfig
from pyvdl.data import Batches, Record, read_manifest

CLIPS = 4  # of each case, every one a file of its own name
CLIP = ClipConfig(sampling="uniform")
FORMS = ("original", "tars", "arrays")


def compare_cache(paths: dict[str, Path], rounds: int) -> list[dict[str, Any]]:
    head = ["an epoch, CPU ms a clip", "original", "tars", "faster", "dB", "arrays", "faster"]
    table = [[*head, "MB a clip", "tars", "arrays", "pays after", "arrays"]]
    rows: list[dict[str, Any]] = []
    for case, path in paths.items():
        progress(f"cache: {case}")
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            row = _compare(path, Path(folder), rounds)
        rows.append({"bench": "loader-cache", "case": case} | row)
        table.append([case, *_cells(row)])
    gains = {form: geometric_mean([row["times_faster"][form] for row in rows]) for form in FORMS[1:]}
    means = ["", "", f"{gains['tars']:.1f}x", "", "", f"{gains['arrays']:.0f}x"]
    table.append(["geometric mean", *means, *[""] * (len(table[0]) - 1 - len(means))])
    print(f"\n{format_table(table)}\nevery row of the arrays was, byte for byte, the clip that decoding gives")
    return rows


def _compare(path: Path, folder: Path, rounds: int) -> dict[str, Any]:
    records = []
    for i in range(CLIPS):
        link = folder / f"{i}{path.suffix}"
        os.link(path, link)
        records.append(Record(key=str(i), video=str(link)))
    jobs = {
        "tars": functools.partial(to_tars, records, folder / "tars", num_threads=1),
        "arrays": functools.partial(to_arrays, records, folder / "arrays", clip=CLIP, num_threads=1),
    }
    prepared: dict[str, float] = {}
    forms: dict[str, Sequence[Record]] = {"original": records}
    for form, job in jobs.items():
        done, timing = measure(job)
        assert isinstance(done, CacheSummary)
        prepared[form] = timing.cpu_seconds / CLIPS
        forms[form] = read_manifest(done.manifest)
    clips = {form: epoch(found) for form, found in forms.items()}
    if not np.array_equal(clips["arrays"], clips["original"]):
        raise RuntimeError(f"{path}: the array's rows are not the clips that decoding gives")

    def run(form: str, _: int) -> Timing:
        timing = measure(lambda: epoch(forms[form]))[1]
        return Timing(timing.cpu_seconds / CLIPS, timing.wall_seconds / CLIPS)

    timings = interleave(FORMS, run, rounds)
    seconds = {form: [timing.cpu_seconds for timing in taken] for form, taken in timings.items()}
    sizes = {"original": path.stat().st_size}
    sizes |= {form: sum(p.stat().st_size for p in (folder / form).rglob("*") if p.is_file()) // CLIPS for form in jobs}
    spreads = {form: Spread.of(taken) for form, taken in seconds.items()}
    return {
        "cpu_seconds": {form: asdict(spread) for form, spread in spreads.items()},
        "times_faster": {form: ratio(seconds["original"], seconds[form]) for form in jobs},
        "prepare_cpu_seconds": prepared,
        "pays_after_epochs": {
            form: prepared[form] / (spreads["original"].median - spreads[form].median) for form in jobs
        },
        "bytes": sizes,
        "tars_psnr_db": psnr(clips["tars"], clips["original"]),
    }


def epoch(records: Sequence[Record]) -> np.ndarray:
    """uint8[N, T, H, W, 3]: all clips in their order."""
    options: dict[str, Any] = {"batch_size": 1, "seed": 0, "num_epochs": 1, "shuffle": False, "num_threads": 1}
    with closing(Batches(records, encode=lambda *_: {"none": np.zeros(())}, clip=CLIP, **options)) as batches:
        found = list(batches)
    if not all(batch["ok"].all() for batch in found):
        raise RuntimeError("some clips could not be read")
    return np.concatenate([batch["video"] for batch in found])


def _cells(row: dict[str, Any]) -> list[str]:
    original, tars, arrays = (f"{1000 * row['cpu_seconds'][form]['median']:.2f}" for form in FORMS)
    faster, pays = row["times_faster"], row["pays_after_epochs"]
    sizes = [f"{row['bytes'][form] / 1e6:.2f}" for form in FORMS]
    cells = [original, tars, f"{faster['tars']:.1f}x", f"{row['tars_psnr_db']:.1f}", arrays, f"{faster['arrays']:.0f}x"]
    return [*cells, *sizes, f"{pays['tars']:.1f} epochs", f"{pays['arrays']:.1f} epochs"]
