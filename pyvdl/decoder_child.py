"""The process that decodes for `pyvdl.decoder_process`: its messages, and what it does.

Frames go into slots of shared memory, all else over the link. It loads no jax, and ends when its parent does.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, Self

import numpy as np

from pyvdl.sources import DecodeError, FileSlice, Source, is_url, read_whole
from pyvdl.video import ClipLoader, ClipRequest, Limits, VideoDecoder

_BEAT_SECONDS = 0.25


@dataclass(frozen=True)
class Setup:
    """What the child is told first."""

    options: dict[str, Any]  # of ClipLoader
    shape: tuple[int, ...]  # of all slots: uint8[slots, B, T, H, W, 3]


@dataclass(frozen=True)
class Task:
    """Clips to decode into rows of a slot. A task of one row leaves the others of the slot as they are."""

    slot: int
    rows: dict[int, ClipRequest]
    alone: bool


@dataclass(frozen=True)
class Done:
    """What became of a task: errors of rows that failed."""

    slot: int
    errors: dict[int, str]


@dataclass(frozen=True)
class Beat:
    """Something was done: clips and downloads so far."""

    count: int


class _Requests(Iterator[ClipRequest]):
    """The requests of the tasks, each filled up to whole batches.

    It ends whenever there is nothing to be read and something to be waited for, and goes on afterwards: `ClipLoader`
    asks again after each batch. Videos at URLs are downloaded on threads of their own.
    """

    def __init__(self, link: Connection, batch_size: int, num_threads: int) -> None:
        self.tasks: deque[Task] = deque()  # under way
        self.refused: dict[tuple[int, int], str] = {}  # slot and row -> why there was nothing to decode
        self.fetched = 0
        self._link = link
        self._batch_size = batch_size
        self._ready: deque[tuple[tuple[int, int], ClipRequest | Future[bytes], ClipRequest]] = deque()
        self._pool = ThreadPoolExecutor(4 * num_threads)  # they wait for a network

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ClipRequest:
        if not self._ready:
            self._receive()
        place, found, request = self._ready.popleft()
        if isinstance(found, ClipRequest):
            return found
        try:
            request = replace(request, source=found.result())
        except DecodeError as error:
            self.refused[place] = f"{error.stage}: {error.message}"
            request = _EMPTY
        self.fetched += 1
        return request

    def _receive(self) -> None:
        if self.tasks and not self._link.poll():
            raise StopIteration
        try:
            task: Task = self._link.recv()
        except (EOFError, OSError):  # the parent wants no more
            raise StopIteration from None
        self.tasks.append(task)
        for row in range(self._batch_size):
            request = task.rows.get(row, _EMPTY)
            found: ClipRequest | Future[bytes] = request
            if isinstance(request.source, str | FileSlice) and is_url(request.source):
                found = self._pool.submit(read_whole, request.source, Limits().max_bytes)
            self._ready.append(((task.slot, row), found, request))


_EMPTY = ClipRequest(b"")  # fails at once; its frames are zeros


def measure() -> None:
    """Takes the link's descriptor as an argument, and answers each list of videos with their lengths in seconds."""
    link = Connection(int(sys.argv[1]))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    link.send(Beat(0))
    while True:
        try:
            sources: list[Source] = link.recv()
        except (EOFError, OSError):
            os._exit(0)
        for source in sources:
            try:
                link.send(VideoDecoder(source).metadata.duration_seconds)
            except DecodeError:
                link.send(None)


def decode() -> None:
    """Takes two descriptors as arguments: of the link, and of the memory."""
    link, memory = Connection(int(sys.argv[1])), int(sys.argv[2])
    lock = threading.Lock()

    def send(message: Done | Beat) -> None:
        try:
            with lock:
                link.send(message)
        except OSError:  # the parent is gone, or wants no more
            os._exit(1)

    setup: Setup = link.recv()
    slots = np.ndarray(setup.shape, np.uint8, mmap.mmap(memory, int(np.prod(setup.shape))))
    requests = _Requests(link, setup.shape[1], setup.options["num_threads"])
    loader = ClipLoader(requests, batch_size=setup.shape[1], **setup.options)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    threading.Thread(target=_beat, args=(loader, requests, send), daemon=True).start()
    send(Beat(0))
    for batch in loader:
        task = requests.tasks.popleft()
        errors = {}
        for row in task.rows:
            if task.alone:
                slots[task.slot, row] = batch.data[row]
            if (error := batch.errors[row]) is not None:
                errors[row] = requests.refused.pop((task.slot, row), error)
        if not task.alone:
            slots[task.slot] = batch.data
        send(Done(task.slot, errors))
    loader.close()
    os._exit(0)  # without a wait for downloads that nobody wants any more


def _beat(loader: ClipLoader, requests: _Requests, send: Any) -> None:
    """Tells the parent that something moves, which the main thread cannot while the loader waits for a batch."""
    told = 0
    while True:
        time.sleep(_BEAT_SECONDS)
        count = loader.clips_done + requests.fetched
        if count != told:
            told = count
            send(Beat(count))


def _end_with_parent() -> None:
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(_BEAT_SECONDS)
    os._exit(1)
