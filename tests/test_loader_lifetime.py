"""However a ClipLoader is left, its threads end and nothing hangs."""

from __future__ import annotations

import gc
import itertools
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvdl import ClipBatch, ClipLoader, ClipRequest
from tests.clips import write_clip

OPTIONS: dict[str, Any] = {
    "batch_size": 2,
    "num_threads": 2,
    "prefetch": 4,
    "num_frames": 2,
    "short_side": 64,
    "size": 48,
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    write_clip(path, num_frames=40)
    return path


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    def count() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = count()
    yield
    gc.collect()
    deadline = time.monotonic() + 10
    while count() > before:
        assert time.monotonic() < deadline, f"{count() - before} threads stay"
        time.sleep(0.01)


def endless(clip: Path) -> Iterator[ClipRequest]:
    while True:
        yield ClipRequest(clip)


def test_an_exception_of_the_consumer(clip: Path) -> None:
    def consume() -> None:
        for batch in ClipLoader(endless(clip), **OPTIONS):
            raise OSError(f"no room for {len(batch)} clips")

    with pytest.raises(OSError, match="no room for 2 clips"):
        consume()
    loader = ClipLoader(endless(clip), **OPTIONS)

    def consume_in_a_context() -> None:
        with loader:
            raise OSError(f"no room for {len(next(loader))} clips")

    with pytest.raises(OSError, match="no room for 2 clips"):
        consume_in_a_context()
    with pytest.raises(StopIteration):
        next(loader)


def test_a_generator_dropped_in_the_middle(clip: Path) -> None:
    def batches() -> Iterator[ClipBatch]:
        with ClipLoader(endless(clip), **OPTIONS) as loader:
            yield from loader

    generator = batches()
    assert next(generator).ok.all()
    del generator


def test_a_loader_in_a_cycle_of_references(clip: Path) -> None:
    class Holder:
        def __init__(self) -> None:
            self.me = self
            self.loader = ClipLoader(endless(clip), **OPTIONS)

    next(Holder().loader)


def test_a_loader_never_read(clip: Path) -> None:
    ClipLoader(endless(clip), **OPTIONS)
    ClipLoader(endless(clip), **OPTIONS).close()


def test_a_consumer_of_its_own_thread(clip: Path) -> None:
    def consume() -> None:
        assert next(ClipLoader(endless(clip), **OPTIONS)).ok.all()

    thread = threading.Thread(target=consume)
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_ctrl_c_while_clips_are_handed_over(clip: Path) -> None:
    """The bytes that the threads read must not be freed before the threads have let go of them."""
    data = clip.read_bytes()
    loader = ClipLoader((ClipRequest(data) for _ in itertools.count()), **OPTIONS)
    threads = loader._loader

    class Interrupted:
        def submit(self, clips: list[Any]) -> None:
            threads.submit(clips)
            raise KeyboardInterrupt

    loader._loader = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        next(loader)
    loader._loader = threads
    with pytest.raises(StopIteration):  # closed: its threads have ended
        next(loader)


def test_threads_that_cannot_be_started() -> None:
    """An error, after those that were started have ended, and not the end of the process."""
    code = textwrap.dedent(f"""
        import resource
        import pyvdl
        pyvdl.ClipLoader([], **{OPTIONS!r}).close()  # loads what it needs
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
        try:
            pyvdl.ClipLoader([], **{OPTIONS | {"num_threads": 1000}!r})
        except RuntimeError as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"thread \d+ of 1000 cannot be started: .*\n", done.stdout)


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "raise SystemExit(0)",
        "loader.me = loader",  # only the collector could free it
        # A thread that is still waiting for a batch when the interpreter ends.
        "threading.Thread(target=lambda: list(loader), daemon=True).start(); time.sleep(0.2)",
        "atexit.register(loader.close)",
        "atexit.register(lambda: next(loader, None))",  # runs after the loader was closed, or before: both end
    ],
)
def test_the_interpreter_ends(clip: Path, ending: str) -> None:
    code = textwrap.dedent(f"""
        import atexit, faulthandler, itertools, threading, time
        import pyvdl
        faulthandler.dump_traceback_later(30, exit=True)
        requests = (pyvdl.ClipRequest({str(clip)!r}) for _ in itertools.count())
        loader = pyvdl.ClipLoader(requests, **{OPTIONS!r})
        print(next(loader).ok.all(), flush=True)
        {ending}
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "True", "")


@pytest.mark.parametrize("use", ["next(loader)", "loader.close()", "del loader", "loader.clips_done", "pass"])
def test_a_forked_process_does_not_wait_for_the_threads(clip: Path, use: str) -> None:
    code = textwrap.dedent(f"""
        import faulthandler, itertools, os, signal, sys, warnings
        import pyvdl
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, of forks beside threads
        requests = (pyvdl.ClipRequest({str(clip)!r}) for _ in itertools.count())
        loader = pyvdl.ClipLoader(requests, **{OPTIONS!r})
        next(loader)
        if not (child := os.fork()):
            signal.alarm(30)
            try:
                {use}
            except RuntimeError as error:
                print(error)
            print(pyvdl.sample_clip({str(clip)!r}).data.any())
            sys.exit()
        print(os.waitpid(child, 0)[1], next(loader).ok.all())
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    refused = ["the threads of this ClipLoader stayed in the process that made it: make another here"]
    refusal = refused if use in ("next(loader)", "loader.clips_done") else []
    assert (done.stdout.splitlines(), done.stderr) == ([*refusal, "True", "0 True"], "")
