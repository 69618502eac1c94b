"""Decoding in a process of its own, which can be ended when a codec hangs or crashes. No jax here.

`pyvdl.ClipLoader` ends what FFmpeg lets it end. What stays stuck inside a codec, a file system or a pipe, and what
takes the whole process down, costs the clip that does it, and no other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from typing import Self

import numpy as np

from pyvdl.config import ClipConfig
from pyvdl.decoder_child import Beat, Done, Setup, Task
from pyvdl.sources import Source, source_name
from pyvdl.video import ClipRequest

_GRACE_SECONDS = 5.0  # beyond a clip's limit, in which the child's own limit comes first
_START_SECONDS = 120.0  # for an interpreter and its imports on a busy machine
_CORE_SECONDS = 20.0  # that a crashed process may take to leave its core
_MEASURED = 64  # videos that the child is told at once
_HELD = 2  # batches that the caller may hold while it asks for the next


@dataclasses.dataclass(frozen=True, eq=False)
class Frames:
    """A decoded batch in shared memory. `data` is overwritten some time after `release()`."""

    data: np.ndarray  # uint8[B, T, H, W, 3]; rows that failed or were not asked for are zeros
    errors: list[str | None]  # of the rows asked for
    release: Callable[[], None]


class DecoderProcess:
    """Decodes batches of up to `batch_size` clips in a child process, `prefetch` of them ahead.

    timeout_seconds: for one clip. When nothing moves for longer the child is ended, and the clips under way are decoded
    again one by one: the one that hangs fails with "timed out", one that takes the process down twice with "crashed".
    Clips of one file are given the time of all of them.

    Memory: prefetch + 3 batches of frames shared with the child, prefetch + 1 of its own.
    """

    def __init__(
        self, clip: ClipConfig, *, batch_size: int, num_threads: int, prefetch: int, timeout_seconds: float
    ) -> None:
        self._limit = timeout_seconds
        options = dataclasses.asdict(clip) | {"num_threads": num_threads, "prefetch": prefetch}
        count = prefetch + 1 + _HELD
        shape = (count, batch_size, clip.num_frames, clip.size, clip.size, 3)
        self._setup = Setup(options | {"timeout_seconds": timeout_seconds}, shape)
        self._memory = _shared_memory(int(np.prod(shape)))
        self._slots = np.ndarray(shape, np.uint8, mmap.mmap(self._memory, int(np.prod(shape))))
        self._free = deque(range(count))
        self._under_way: deque[Task] = deque()  # in the child, the oldest first
        self._suspects: deque[Task] = deque()  # that were under way when a child was lost, to be decoded one by one
        self._child: _Child | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child."""
        self._end(0.5)
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    @property
    def pid(self) -> int | None:
        """Of the child, while there is one."""
        return None if self._child is None else self._child.pid

    def decode(self, batches: Iterable[Sequence[ClipRequest]]) -> Iterator[Frames]:
        """The frames of each batch, in order. `batches` is read ahead, as far as there are slots."""
        waiting = iter(batches)
        ended = False
        while True:
            while self._free and not ended and not self._suspects:
                if (batch := next(waiting, None)) is None:
                    ended = True
                else:
                    self._send(Task(self._free.popleft(), dict(enumerate(batch)), alone=False))
            if self._suspects:
                yield self._decode_alone(self._suspects.popleft())
            elif self._under_way:
                task = self._under_way[0]
                if isinstance(done := self._wait(task), Done):
                    self._under_way.popleft()
                    yield self._frames(task, done.errors)
                else:
                    self._suspects, self._under_way = self._under_way, deque()
            elif ended:
                return
            else:
                raise RuntimeError(f"all {len(self._slots)} batches are held: release() them before the next")

    def _decode_alone(self, batch: Task) -> Frames:
        errors: dict[int, str] = {}
        self._slots[batch.slot] = 0
        for row, request in batch.rows.items():
            task = Task(batch.slot, {row: request}, alone=True)
            for _ in range(2):  # who ends the child from outside does so once
                self._send(task)
                done = self._wait(task)
                self._under_way.clear()
                if isinstance(done, Done):
                    errors.pop(row, None)
                    errors.update(done.errors)
                    break
                errors[row] = done
                self._slots[batch.slot, row] = 0
                if done.startswith("timed out"):
                    break
        return self._frames(batch, errors)

    def _frames(self, task: Task, errors: dict[int, str]) -> Frames:
        def release() -> None:
            self._free.append(task.slot)

        return Frames(self._slots[task.slot], [errors.get(row) for row in task.rows], release)

    def _end(self, patience_seconds: float) -> None:
        if self._child is not None:
            self._child.end(patience_seconds)
            self._child = None

    def _send(self, task: Task) -> None:
        self._under_way.append(task)
        if self._child is None:
            self._child = _Child("decode", self._setup, self._memory)
        with contextlib.suppress(OSError):  # it has ended: the wait for its answer finds out why
            self._child.link.send(task)

    def _wait(self, task: Task) -> Done | str:
        """The answer to the oldest task under way, or why there will be none: the child is gone then."""
        assert self._child is not None
        link = self._child.link
        files = Counter(source_name(request.source) for t in self._under_way for request in t.rows.values())
        limit = self._limit * max(files.values(), default=1) + _GRACE_SECONDS
        deadline = time.monotonic() + limit
        while True:
            try:
                if not link.poll(max(0.0, deadline - time.monotonic())):
                    self._end(0)
                    return f"timed out: nothing came for {limit:g} s, the decoder's process was ended"
                message = link.recv()
            except (EOFError, OSError):
                child, self._child = self._child, None
                return f"crashed: the decoder's process was ended by {child.cause()}"
            if isinstance(message, Done):
                assert message.slot == task.slot
                return message
            deadline = time.monotonic() + limit


class _Child:
    """A process that runs a function of `pyvdl.decoder_child`, and the link to it."""

    def __init__(self, entry: str, first: Setup | None = None, memory: int | None = None) -> None:
        """Starts it; raises RuntimeError where that cannot be. `first` is the first thing it is told."""
        ours, theirs = socketpair()
        root = str(Path(__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        descriptors = [theirs.fileno(), *([] if memory is None else [memory])]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from pyvdl.decoder_child import {entry}; {entry}()", *map(str, descriptors)],
                stdin=subprocess.DEVNULL,
                pass_fds=descriptors,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                process_group=0,  # a terminal's Ctrl-C is the parent's to hear: it ends when the link is closed
            )
        self.link = Connection(ours.detach())
        try:
            if first is not None:
                self.link.send(first)
            if self.link.poll(_START_SECONDS) and isinstance(self.link.recv(), Beat):
                return
        except (EOFError, OSError):
            pass
        raise RuntimeError(f"the decoder's process does not start: it ended by {self.cause()}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def cause(self) -> str:
        """What ended it, once the link is broken."""
        code = self.end(_CORE_SECONDS)
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def end(self, patience_seconds: float) -> int:
        """Ends it and returns how it ended. Of itself it does so when the link is closed."""
        self.link.close()
        try:
            return self._process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def measure_seconds(sources: Iterable[Source], *, timeout_seconds: float) -> Generator[float | None]:
    """How long each video is; None where nobody can tell, be it that it hangs or takes its process down."""
    waiting = iter(sources)
    child: _Child | None = None
    try:
        while chunk := list(itertools.islice(waiting, _MEASURED)):
            while chunk:
                if child is None:
                    child = _Child("measure")
                with contextlib.suppress(OSError):
                    child.link.send(chunk)
                while chunk and child is not None:
                    found: float | None = None
                    try:
                        good = child.link.poll(timeout_seconds)
                        found = child.link.recv() if good else None
                    except (EOFError, OSError):
                        good = False
                    if not good:  # the first without an answer is the one that it was at
                        child.end(0)
                        child = None
                    del chunk[0]
                    yield found
    finally:
        if child is not None:
            child.end(0.5)


def _shared_memory(size: int) -> int:
    """The descriptor of so many bytes that no other process can find, and that go with their last user."""
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("pyvdl-frames")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(memory, 0, size)  # too little memory is told here, and not by a signal
    else:
        os.ftruncate(memory, size)
    return memory
