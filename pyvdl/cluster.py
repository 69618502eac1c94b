"""Jobs on a Ray cluster, whose hosts may come and go; the rows are those of `pyvdl.pipeline`.

The driver lists the clips and gives out shards. Each worker, a Ray actor, holds the model, works on the shards it is
given and writes them itself: of rows, frames and parameters nothing passes through Ray.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import socket
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import ModuleType
from typing import Any, Self

from pyvdl.data import Record
from pyvdl.decoder_process import DecoderProcess
from pyvdl.jobs import Job, is_listed, load_cuts, load_job, open_cuts, open_job
from pyvdl.manifests import Cut
from pyvdl.pipeline import JobSummary, Maker, Tally, run_shards, summary
from pyvdl.progress import Report
from pyvdl.rows import Counts, Format, Row
from pyvdl.sources import is_url
from pyvdl.storage import Folder, hold, refuse_another

_AHEAD = 2  # shards that a worker has at a time: it decodes the second while the device is at the first
_LOSSES = 5  # workers over one shard, or in one worker's place before one finishes a shard, until it is given up
_NOTE_SECONDS = 10.0  # between notes while no shard ends
_TOLD = 3  # failed shards whose reasons an error tells


class UnwrittenShard(OSError):
    """A shard could not be written: the next ones could not either."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a worker tells of a shard that it has written."""

    counts: Counts
    tokens: int
    wait_seconds: float  # for the decoder


@dataclass(frozen=True)
class _Task:
    shard: int
    done: Future[Share]


class Worker:
    """A host's part of a job: a model, a decoder, and shards that it works on one after the other.

    Made by Ray, in a process that may end at any time; `start` and `work_on` are called in several threads.
    """

    def __init__(
        self, load: Callable[[], Maker], out: str, decoding: Mapping[str, Any], cut: Cut | None = None
    ) -> None:
        self._load, self._out, self._decoding, self._cut = load, out, decoding, cut
        self._lock = threading.Lock()
        self._maker: Maker | None = None
        self._job: Job | None = None
        self._asked: SimpleQueue[_Task] = SimpleQueue()
        self._tally = Tally()
        self._told = (0, 0.0)  # tokens and seconds of the tally

    def start(self) -> dict[str, Any]:
        """Loads the model, once; returns all that its rows depend on, and their kind."""
        with self._lock:
            if self._maker is None:
                maker = self._load()
                self._recipe = maker.recipe() | {"kind": maker.kind}
                self._maker = maker
        return self._recipe

    def work_on(self, shard: int) -> Share:
        """Makes the rows of a shard and writes them; raises what went wrong, UnwrittenShard where that was writing."""
        recipe = self.start()
        with self._lock:
            if self._job is None:
                job = load_job(Folder(self._out))
                there = dict(job.recipe)
                refuse_another(f"{self._out} (seen from {socket.gethostname()})", there, there | recipe)
                decoder = self._new_decoder()
                threading.Thread(target=self._run, args=[job, decoder], daemon=True).start()
                self._job = job
        task = _Task(shard, Future())
        self._asked.put(task)
        return task.done.result()

    def cut(self, shard: int) -> Share:
        """Cuts the clips of a list and writes their parts, one list at a time; raises what `work_on` does."""
        assert self._cut is not None
        with self._lock:
            job = load_cuts(Folder(self._out))
            parts = list(self._cut(job.work(shard)))
            try:
                job.finish_parts(shard, parts)
            except OSError as error:
                raise UnwrittenShard(str(error)) from error
        return Share(counts=Counts(job.size(shard)), tokens=0, wait_seconds=0.0)

    def _new_decoder(self) -> DecoderProcess:
        assert self._maker is not None
        return DecoderProcess(self._maker.clip, batch_size=self._maker.batch_size, **self._decoding)

    def _run(self, job: Job, decoder: DecoderProcess) -> None:
        apart: deque[_Task] = deque()  # they were under way together when something failed
        try:
            with ThreadPoolExecutor(1) as disk:
                while True:
                    begun: deque[_Task] = deque()
                    try:
                        tasks = [apart.popleft()] if apart else self._waiting()
                        for task, rows, share in self._made(job, decoder, tasks, begun):
                            disk.submit(_finish, job, task, rows, share)
                    except Exception as error:
                        if not begun:
                            raise
                        decoder.close()  # it holds batches that nobody takes any more
                        decoder = self._new_decoder()
                        if len(begun) == 1:
                            begun[0].done.set_exception(error)
                        else:
                            apart += begun
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # nobody would get an answer any more: the driver sees a process that ends, and begins another

    def _made(
        self, job: Job, decoder: DecoderProcess, tasks: Iterable[_Task], begun: deque[_Task]
    ) -> Iterator[tuple[_Task, list[Row], Share]]:
        """The rows of the shards of `tasks`; those that are under way are in `begun`."""
        assert self._maker is not None

        def shards() -> Iterator[int]:
            for task in tasks:
                begun.append(task)
                yield task.shard

        for _, rows in run_shards(self._maker, decoder, job, shards(), self._tally):
            tokens, wait_seconds = self._tally.tokens, self._tally.wait_seconds
            counts = Counts()
            for row in rows:
                counts.add(row)
            yield (
                begun.popleft(),
                rows,
                Share(counts=counts, tokens=tokens - self._told[0], wait_seconds=wait_seconds - self._told[1]),
            )
            self._told = tokens, wait_seconds

    def _waiting(self) -> Iterator[_Task]:
        """Waits for a shard, and takes those that have come until it is read: to wait for more would hold it up."""
        yield self._asked.get()
        with contextlib.suppress(Empty):
            while True:
                yield self._asked.get_nowait()


def _finish(job: Job, task: _Task, rows: Sequence[Row], share: Share) -> None:
    try:
        job.finish(task.shard, rows)
        task.done.set_result(share)
    except OSError as error:
        task.done.set_exception(UnwrittenShard(str(error)))
    except Exception as error:
        task.done.set_exception(error)


def run_on_cluster(
    load: Callable[[], Maker],
    records: Iterable[Record],
    out: str | os.PathLike[str],
    *,
    workers: int | None = None,
    needs: Mapping[str, float] | None = None,
    shard_size: int = 1000,
    format: Format = "parquet",
    num_threads: int = 2,
    prefetch: int = 2,
    timeout_seconds: float = 60.0,
    input_sha256: str | None = None,
    cut: Cut | None = None,
    progress: Report | None = None,
) -> JobSummary:
    """Does with the workers of a Ray cluster what `pyvdl.pipeline.run_job` does; the same call again resumes.

    The cluster is the one this process is connected to, or that of RAY_ADDRESS, or one on this machine for as long as
    the job takes. `out`, the videos and what `load` reads must be the same for all its hosts. `load` is pickled and
    called by each worker; rows are the same to the bit where the devices are of one kind.

    workers: how many to ask for; who finds no place yet begins when there is one (None: as many as have a place now).
    needs: what one of them takes of a host, by Ray's names: CPU (1 unless it is named), GPU, TPU, memory, ...

    In the place of a worker that is lost another begins on whatever host has room, and its shards go to the next that
    is free. After five in a row that were lost before they had finished a shard, while they loaded the model perhaps,
    no other begins; RuntimeError when none is left. A shard that fails by itself is tried by another worker, where
    there is one, then left out: RuntimeError names it when all others are done. OSError where a shard cannot be
    written.
    """
    ray = _ray()
    folder = Folder(out if is_url(out) else os.path.abspath(out))
    folder.make()
    decoding = {"num_threads": num_threads, "prefetch": prefetch, "timeout_seconds": timeout_seconds}
    with hold(folder), _connected(ray), _Pool(ray, workers, needs or {}, (load, folder.name, decoding, cut)) as pool:
        recipe = pool.recipe()
        if cut is not None and not is_listed(folder, input_sha256):
            cuts = open_cuts(folder, cut.recipe(), records, input_sha256, recipe.get("prompt", ""))
            uncut = pool.run(cuts, cuts.missing(), progress)
            if uncut:
                again = _reasons(", the same command tries them again: ", uncut)
                raise RuntimeError(f"{len(uncut)} of {cuts.shards} lists of clips could not be cut{again}")
            records = cuts.parts()
        listing = {"kind": recipe["kind"], "shard_size": shard_size, "format": format, "input_sha256": input_sha256}
        job = open_job(folder, recipe, records, **listing)
        todo = job.missing()
        failed = pool.run(job, todo, progress)
        counts = job.counts(shard for shard in range(job.shards) if shard not in failed)
    if failed:
        again = _reasons(", the same command tries them again: ", failed)
        raise RuntimeError(f"{len(failed)} of {job.shards} shards failed{again}")
    return summary(job, counts, len(todo))


class _Pool:
    """The workers of a job, as its driver sees them."""

    def __init__(self, ray: Any, workers: int | None, needs: Mapping[str, float], arguments: tuple[Any, ...]) -> None:
        self._ray = ray
        needs = {"CPU": 1.0} | dict(needs)
        self._count = workers or _places(ray.cluster_resources(), needs)
        named = {"num_cpus": needs.get("CPU"), "num_gpus": needs.get("GPU"), "memory": needs.get("memory")}
        others = {name: amount for name, amount in needs.items() if name not in ("CPU", "GPU", "memory")}
        # Ray could start them again by itself, but would not say how often it did.
        actor = ray.remote(Worker).options(
            max_concurrency=_AHEAD + 1, scheduling_strategy="SPREAD", resources=others, **named
        )
        self._new_actor = functools.partial(actor.remote, *arguments)
        self._actors: dict[int, Any] = {}  # by numbers, of which each has its own
        self._numbers = itertools.count()
        self._asked: dict[Any, tuple[int, int | None]] = {}  # by Ray's reference: worker, shard (None: it starts)
        self._ready: set[int] = set()
        self._recipe: dict[str, Any] | None = None
        self._lost = 0
        self._why = ""  # the last worker was given up
        self._barren: dict[int, int] = {}  # of each worker how many were lost in its place since one finished a shard

    def __enter__(self) -> Self:
        for _ in range(self._count):
            self._begin(0)
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)

    def recipe(self) -> dict[str, Any]:
        """All that rows depend on, and their kind, as the first worker that is ready tells; each compares its own."""
        while self._recipe is None:
            self._check({})
            list(self._answers(None))
        return self._recipe

    def run(self, job: Job, shards: Sequence[int], progress: Report | None) -> dict[int, str]:
        """Has the shards done; returns those that failed, and why. Of a job of parts that is to cut them."""
        self._call = "cut" if job.kind == "parts" else "work_on"
        waiting = deque(shards)
        left, total = len(shards), sum(map(job.size, shards))
        failed: dict[int, str] = {}
        tried: dict[int, int] = {}  # the worker at which a shard failed
        losses: Counter[int] = Counter()
        tally = Tally()
        while left:
            self._check(failed)
            self._give_out(waiting, tried)
            for worker, shard, answer in self._answers(_NOTE_SECONDS):
                if isinstance(answer, Share):
                    tally.counts += answer.counts
                    tally.tokens += answer.tokens
                    tally.wait_seconds += answer.wait_seconds / self._count
                    self._barren[worker] = 0
                    left -= 1
                elif answer is None:
                    losses[shard] += 1
                    if losses[shard] < _LOSSES:
                        waiting.appendleft(shard)
                    else:
                        failed[shard] = f"{_LOSSES} workers were lost over it"
                        left -= 1
                elif isinstance(answer, UnwrittenShard):
                    raise OSError(str(answer))
                elif shard in tried or len(self._actors) == 1:
                    failed[shard] = _one_line(answer)
                    left -= 1
                else:
                    tried[shard] = worker
                    waiting.append(shard)
            if progress is not None:
                what = "cutting clips" if job.kind == "parts" else tally.note()
                progress(tally.counts.rows, total, f"{self._note(failed)}, {what}")
        return failed

    def _note(self, failed: Mapping[int, str]) -> str:
        lost = f" ({self._lost} lost so far)" if self._lost else ""
        left_out = f", shards failed: {', '.join(map(str, sorted(failed)))}" if failed else ""
        return f"{len(self._ready)} of {self._count} workers{lost}{left_out}"

    def _give_out(self, waiting: deque[int], tried: Mapping[int, int]) -> None:
        """Gives each worker that is ready what it lacks; a shard that has failed goes to another than it failed at."""
        held = Counter(worker for worker, shard in self._asked.values() if shard is not None)
        for ahead in range(_AHEAD):
            for worker in self._ready:
                shard = next((shard for shard in waiting if tried.get(shard) != worker), None)
                if shard is not None and held[worker] <= ahead:
                    waiting.remove(shard)
                    self._ask(worker, shard)
                    held[worker] += 1
        if waiting and self._ready and not held.total():  # there is no other
            self._ask(next(iter(self._ready)), waiting.popleft())

    def _ask(self, worker: int, shard: int) -> None:
        self._asked[getattr(self._actors[worker], self._call).remote(shard)] = worker, shard

    def _begin(self, barren: int) -> None:
        """Asks Ray for a worker, which is made when there is a place, and the worker to say when it is ready."""
        worker = next(self._numbers)
        self._actors[worker] = self._new_actor()
        self._barren[worker] = barren
        self._asked[self._actors[worker].start.remote()] = worker, None

    def _answers(self, timeout_seconds: float | None) -> Iterator[tuple[int, int, Share | Exception | None]]:
        """Waits for answers, and yields those about shards: worker, shard, and what came of it (None: lost)."""
        from ray.exceptions import RayError, RayTaskError

        done, _ = self._ray.wait(list(self._asked), timeout=timeout_seconds)
        for reference in done:
            worker, shard = self._asked.pop(reference)
            lost: Exception | None = None
            try:
                answer = self._ray.get(reference)
            except RayTaskError as error:
                answer = error.cause
            except RayError as error:  # of the worker's process, its host or the network
                answer, lost = None, error
            if shard is not None:
                yield worker, shard, answer
            elif isinstance(answer, dict):
                self._recipe = self._recipe or answer
                self._ready.add(worker)
            elif answer is not None:
                self._give_up(worker, _one_line(answer))
            if lost is not None and worker in self._actors:  # now that the loss counts as the shard's
                self._replace(worker, "loaded the model" if shard is None else "worked", lost)

    def _check(self, failed: Mapping[int, str]) -> None:
        """RuntimeError when no worker is left, once all that the last one held counts as lost."""
        if not self._actors and not self._asked:
            raise RuntimeError(f"no worker is left, the last one: {self._why}{_reasons('; shards failed: ', failed)}")

    def _replace(self, worker: int, at: str, error: Exception) -> None:
        """Has another worker made for one that is lost, unless too many were lost there without a shard finished."""
        self._lost += 1
        if (barren := self._barren[worker] + 1) < _LOSSES:
            self._begin(barren)
            self._end(worker)
        else:
            self._give_up(worker, f"{_LOSSES} in a row were lost, this one while it {at}: {_one_line(error)}")

    def _give_up(self, worker: int, why: str) -> None:
        self._why = why
        self._end(worker)

    def _end(self, worker: int) -> None:
        self._ready.discard(worker)
        self._ray.kill(self._actors.pop(worker))


def _reasons(before: str, failed: Mapping[int, str]) -> str:
    """The first of the shards that failed and why, after `before`; nothing where none did."""
    reasons = [f"{shard} ({why})" for shard, why in sorted(failed.items())]
    more = f" and {len(reasons) - _TOLD} more" if len(reasons) > _TOLD else ""
    return f"{before}{'; '.join(reasons[:_TOLD])}{more}" if reasons else ""


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _places(found: Mapping[str, float], needs: Mapping[str, float]) -> int:
    """How many workers have a place on a cluster now."""
    places = min(int(found.get(name, 0.0) // amount) for name, amount in needs.items() if amount)
    if not places:
        has = ", ".join(f"{name}={found.get(name, 0.0):g}" for name in needs)
        wanted = ", ".join(f"{name}={amount:g}" for name, amount in needs.items())
        raise ValueError(
            f"a worker needs {wanted}, and the cluster has {has}: ask for less, or name a number of workers, "
            "which begin when there is place"
        )
    return places


@contextlib.contextmanager
def _connected(ray: Any) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    local = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if address == "local" else {}
    ray.init(address=address, log_to_driver=False, logging_level="error", **local)
    try:
        yield
    finally:
        ray.shutdown()


def _ray() -> ModuleType:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when Ray is imported, and by what it starts
    try:
        import ray
    except ImportError as error:
        raise ImportError("a job on a cluster needs Ray: pip install 'ray>=2.60'") from error
    return ray
