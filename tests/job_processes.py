"""Jobs without a model on long videos that are cut, for tests: `python -m tests.job_processes VIDEOS OUT` is one of
several processes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax.experimental import multihost_utils

from pyvdl import jobs
from pyvdl.caption import Decoded
from pyvdl.columns import carried
from pyvdl.config import ClipConfig
from pyvdl.data import Record
from pyvdl.jobs import Job
from pyvdl.manifests import Cut, Input
from pyvdl.pipeline import run_job
from pyvdl.progress import Report
from pyvdl.rows import CaptionRow, Row, RowKind
from pyvdl.sharding import join
from pyvdl.shots import Shots

CUT = Cut(window_seconds=2.0, shots=Shots(min_seconds=0.5))


class Free:
    """Rows at no cost; a Captioner in what a job asks of it."""

    kind: RowKind = "captions"
    clip = ClipConfig(num_frames=2, sampling="uniform", short_side=32, size=32)
    batch_size = 2
    tokens = 0

    def recipe(self) -> dict[str, Any]:
        return {"model_sha256": "m"}

    def groups(self, records: Sequence[Record]) -> list[list[int]]:
        return [list(range(len(records)))]

    def rows(self, batches: Iterable[Decoded], **names: Any) -> Iterator[list[CaptionRow]]:
        for batch in batches:
            batch.release()
            yield [
                CaptionRow(
                    key=record.key,
                    video=record.video,
                    start_seconds=record.start_seconds,
                    end_seconds=record.end_seconds,
                    captions=["a ball"] if error is None else [],
                    log_probs=[-1.0] if error is None else [],
                    prompt="p",
                    status="ok" if error is None else "failed",
                    error=error,
                    seed=0,
                    extra=carried(record),
                    **names,
                )
                for record, error in zip(batch.records, batch.errors)
            ]


def run(records: Iterable[Record], out: Path, cut: Cut = CUT, progress: Report | None = None) -> None:
    run_job(Free, records, out, cut=cut, shard_size=3, input_sha256="i", num_threads=1, progress=progress)


def main() -> None:
    videos, out = map(Path, sys.argv[1:])
    join()
    import jax

    index, notes = jax.process_index(), out / "notes"
    notes.mkdir(parents=True, exist_ok=True)
    calls = 0
    broadcast, finish_parts, finish = multihost_utils.broadcast_one_to_all, Job.finish_parts, Job.finish

    def noted_broadcast(in_tree: Any, is_source: bool | None = None) -> Any:
        nonlocal calls
        calls += 1
        (notes / f"collective-{index}-{calls}").touch()
        return broadcast(in_tree, is_source)

    def noted_parts(self: Job, shard: int, parts: Iterable[Record]) -> None:
        finish_parts(self, shard, parts)
        (notes / f"cut-{shard}-by-{index}").touch()

    def noted_rows(self: Job, shard: int, rows: Sequence[Row]) -> None:
        finish(self, shard, rows)
        (notes / f"made-{shard}-by-{index}").touch()

    def slow() -> Iterator[Record]:
        """Only the first process lists: the other must not wait for that in a collective, which would give up."""
        while not (notes / "collective-1-1").exists():
            time.sleep(0.01)
        time.sleep(1.0)
        if (notes / f"collective-1-{calls + 1}").exists():
            raise ValueError("the other waits in a collective")
        yield from Input([videos])

    multihost_utils.broadcast_one_to_all = noted_broadcast
    Job.finish_parts, Job.finish = noted_parts, noted_rows  # type: ignore[method-assign]
    jobs._CUT_AT_ONCE = 2
    run(slow(), out)


if __name__ == "__main__":
    main()
