"""Shards of a job through decoder, device and disk at once.

`run_shards` is the work of every engine: shards in, rows out, on the devices of this process. `run_job` runs it here:
alone, or as one of several processes that share the shards between them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from pyvdl.caption import Captioner, Decoded, clip_request
from pyvdl.config import ClipConfig
from pyvdl.data import Record
from pyvdl.decoder_process import DecoderProcess
from pyvdl.jobs import Job, is_listed, load_cuts, load_job, open_cuts, open_job
from pyvdl.manifests import Cut
from pyvdl.models.vlm import VLM
from pyvdl.progress import Report
from pyvdl.rows import Counts, Format, Row, RowKind, check_format
from pyvdl.sharding import meet
from pyvdl.sources import is_row
from pyvdl.storage import Folder, hold, refuse_another
from pyvdl.tokenizers import Tokenizer

_WRITES = 2  # finished shards that may wait for the disk
_OBJECTS = 10_000  # between two searches for garbage


class Maker(Protocol):
    """What makes rows of clips: a `Captioner`, or an `Embedder` of `pyvdl.embed`."""

    kind: RowKind
    clip: ClipConfig
    batch_size: int
    tokens: int  # drawn so far

    def recipe(self) -> dict[str, Any]: ...

    def groups(self, records: Sequence[Record]) -> list[list[int]]:
        """Which of `records` may be in one batch."""

    def rows(self, batches: Iterable[Decoded], **names: str) -> Iterator[Sequence[Row]]: ...


@dataclass
class Tally:
    """How a process fares."""

    counts: Counts = field(default_factory=Counts)
    tokens: int = 0
    wait_seconds: float = 0.0  # for the decoder
    begin: float = field(default_factory=time.monotonic)
    watch: Callable[[], None] = lambda: None  # called after each batch

    def note(self) -> str:
        """Rates, the share of time without work for the device, and errors by kind."""
        seconds = max(1e-9, time.monotonic() - self.begin)
        failed = ", ".join(f"{count} {kind}" for kind, count in self.counts.failed.most_common())
        rates = f"{self.counts.rows / seconds:.1f} clips/s"
        rates += f", {self.tokens / seconds:.0f} tokens/s" if self.tokens else ""
        note = f"{rates}, waited for frames {self.wait_seconds / seconds:.0%}"
        return f"{note}; failed: {failed}" if failed else note


def run_shards(
    maker: Maker, decoder: DecoderProcess, job: Job, shards: Iterable[int], tally: Tally | None = None
) -> Iterator[tuple[int, list[Row]]]:
    """Yields (shard, its rows), in order. `shards` is read as far ahead as the decoder is, and may be endless.

    No batch reaches over two shards or two of the maker's groups, and each has the shape of its group: a shard's rows
    are the same wherever, and with whatever others, they are made.
    """
    tally = tally or Tally()
    sizes: deque[tuple[int, int]] = deque()
    under_way: deque[list[Record]] = deque()
    places: deque[list[int]] = deque()  # of a batch's rows in its shard
    names = {"model_sha256": job.recipe["model_sha256"], "recipe_sha256": job.recipe_sha256}

    def requests() -> Iterator[Sequence[Any]]:
        for shard in shards:
            records = job.work(shard)
            for record in records:
                if is_row(record.video):
                    raise ValueError(f"{record.video}: jobs decode videos, not rows of arrays")
            sizes.append((shard, len(records)))
            for group in maker.groups(records):
                for start in range(0, len(group), maker.batch_size):
                    places.append(group[start : start + maker.batch_size])
                    under_way.append([records[i] for i in places[-1]])
                    yield [clip_request(record) for record in under_way[-1]]

    def decoded() -> Iterator[Decoded]:
        frames = decoder.decode(requests())
        while True:
            begin = time.monotonic()
            batch = next(frames, None)
            tally.wait_seconds += time.monotonic() - begin
            if batch is None:
                return
            yield Decoded(records=under_way.popleft(), data=batch.data, errors=batch.errors, release=batch.release)

    rows: dict[int, Row] = {}
    with _searched_seldom():
        for found in maker.rows(decoded(), **names):
            tally.tokens = maker.tokens
            rows.update(zip(places.popleft(), found, strict=True))
            for row in found:
                tally.counts.add(row)
            tally.watch()
            shard, size = sizes[0]
            if len(rows) == size:
                sizes.popleft()
                yield shard, [rows[i] for i in range(size)]
                rows = {}


@contextlib.contextmanager
def _searched_seldom() -> Iterator[None]:
    """Python looks for garbage in cycles less often: rows are none, but set that off, a quarter of what they cost."""
    before = gc.get_threshold()
    gc.set_threshold(before[0] and max(before[0], _OBJECTS))  # 0: never
    try:
        yield
    finally:
        gc.set_threshold(*before)


@dataclass(frozen=True, kw_only=True)
class JobSummary:
    """What a job left behind."""

    rows: int
    failed: int
    dropped: Mapping[str, int]  # captions, by the name of the filter
    shards: int
    shards_skipped: int  # finished by an earlier run of the same command


def summary(job: Job, counts: Counts, done_now: int) -> JobSummary:
    """Of a job whose rows are `counts`, after a run that finished `done_now` of its shards."""
    return JobSummary(
        rows=counts.rows,
        failed=counts.failed.total(),
        dropped=dict(counts.dropped.most_common()),
        shards=job.shards,
        shards_skipped=job.shards - done_now,
    )


def caption_job(
    model: VLM,
    tokenizer: Tokenizer,
    records: Iterable[Record],
    out: str | os.PathLike[str],
    *,
    shard_size: int = 1000,
    format: Format = "parquet",
    num_threads: int = 2,
    prefetch: int = 2,
    timeout_seconds: float = 60.0,
    input_sha256: str | None = None,
    progress: Report | None = None,
    **options: Any,
) -> JobSummary:
    """Captions `records` with a model that is at hand: `run_job` with a `Captioner` of these options."""
    return run_job(
        lambda: Captioner(model, tokenizer, **options),
        records,
        out,
        shard_size=shard_size,
        format=format,
        num_threads=num_threads,
        prefetch=prefetch,
        timeout_seconds=timeout_seconds,
        input_sha256=input_sha256,
        progress=progress,
    )


def run_job(
    load: Callable[[], Maker],
    records: Iterable[Record],
    out: str | os.PathLike[str],
    *,
    shard_size: int = 1000,
    format: Format = "parquet",
    num_threads: int = 2,
    prefetch: int = 2,
    timeout_seconds: float = 60.0,
    input_sha256: str | None = None,
    cut: Cut | None = None,
    progress: Report | None = None,
) -> JobSummary:
    """Captions or embeds `records` into `out/captions-00000-of-00004.parquet`, or embeddings-..., and so on; the same
    call again resumes.

    A shard appears whole or not at all, a finished one is not touched again. `out/job.json` holds what was asked for:
    a call with other settings, another model or other records is refused with the difference, and so is a second one
    while the first runs. `load` is called once the folder is known to be ours and fit to be written into.
    timeout_seconds is for one clip, input_sha256 see `open_job`. cut: captions or embeds the parts that it makes of
    `records`; it is done first, in `out/cuts`, and goes on where it stopped, too.

    Of several processes (`pyvdl.sharding.join`) each takes every so-many-th list of what is cut and every so-many-th
    shard, on its own devices. The first one lists the clips; all meet once these are listed, cut, and done. They may be
    more or fewer when the job goes on.
    """
    check_format(format)
    folder = Folder(out)
    folder.make()
    index, count = jax.process_index(), jax.process_count()
    listing: dict[str, Any] = {"shard_size": shard_size, "format": format, "input_sha256": input_sha256}
    with contextlib.ExitStack() as held:
        _first(lambda: held.enter_context(hold(folder)))
        maker = load()
        recipe = maker.recipe()
        if cut is not None and _first(lambda: not is_listed(folder, input_sha256)):
            records = _cut(folder, records, cut, input_sha256, recipe.get("prompt", ""), progress)
        _first(lambda: open_job(folder, recipe, records, kind=maker.kind, **listing))
        job = load_job(folder)
        refuse_another(folder.name, dict(job.recipe), dict(job.recipe) | dict(recipe))
        todo = job.missing()
        own = [shard for shard in todo if shard % count == index]
        waiting = sum(job.size(shard) for shard in own)
        tally = Tally()
        if progress is not None:
            tally.watch = lambda: progress(tally.counts.rows, waiting, tally.note())
        decoder = DecoderProcess(
            maker.clip,
            batch_size=maker.batch_size,
            num_threads=num_threads,
            prefetch=prefetch,
            timeout_seconds=timeout_seconds,
        )
        with decoder, ThreadPoolExecutor(1) as disk:
            writes: deque[Future[None]] = deque()
            for shard, rows in run_shards(maker, decoder, job, own, tally):
                if len(writes) == _WRITES:
                    writes.popleft().result()
                writes.append(disk.submit(job.finish, shard, rows))
            for write in writes:
                write.result()
        meet("all shards are done")
        counts = job.counts(range(job.shards))
    return summary(job, counts, len(todo))


def _cut(
    folder: Folder, records: Iterable[Record], cut: Cut, input_sha256: str | None, prompt: str, progress: Report | None
) -> Iterator[Record]:
    """The parts of `records`: each process cuts every so-many-th list of clips, but for those that are cut already."""
    _first(lambda: open_cuts(folder, cut.recipe(), records, input_sha256, prompt))
    job = load_cuts(folder)
    own = [shard for shard in job.missing() if shard % jax.process_count() == jax.process_index()]
    done, waiting = 0, sum(map(job.size, own))
    for shard in own:
        if progress is not None:
            progress(done, waiting, "cutting clips")
        job.finish_parts(shard, cut(job.work(shard)))
        done += job.size(shard)
    meet("clips are cut")
    return job.parts()


def _first(act: Callable[[], object]) -> bool:
    """Whether `act`, called in the first process alone, gave something; where it failed there, all processes fail."""
    failure: Exception | None = None
    found = False
    if jax.process_index() == 0:
        try:
            found = bool(act())
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            failure = error
    meet("the first process is done")
    told = multihost_utils.broadcast_one_to_all(np.int32(-1 if failure else found))
    if failure is not None:
        raise failure
    if told < 0:
        raise RuntimeError("the first process could not begin the job: it tells why")
    return bool(told)
