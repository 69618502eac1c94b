"""Decoding in a child process: the frames of ClipLoader, whatever happens to the child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from pyvdl import decoder_process
from pyvdl.config import ClipConfig
from pyvdl.decoder_child import Task
from pyvdl.decoder_process import DecoderProcess, measure_seconds
from pyvdl.video import ClipLoader, ClipRequest
from tests.clips import write_clip

CLIP = ClipConfig(num_frames=2, sampling="uniform", short_side=32, size=32)
LIMIT_SECONDS = 3.0  # where something hangs; good clips must not reach it, however the machine stalls


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("videos")
    paths = [folder / f"{i}.mp4" for i in range(6)]
    for i, path in enumerate(paths):
        write_clip(path, seed=i)
    return paths


def requests(paths: list[Path]) -> list[ClipRequest]:
    return [ClipRequest(str(path), 0.0, None, i) for i, path in enumerate(paths)]


def wanted(paths: list[Path]) -> np.ndarray:
    (batch,) = ClipLoader(requests(paths), batch_size=len(paths), num_frames=2, short_side=32, size=32)
    assert batch.ok.all()
    return batch.data


@pytest.fixture
def decoder() -> Iterator[DecoderProcess]:
    with started() as made:
        yield made


def started(**changes: Any) -> DecoderProcess:
    options: dict[str, Any] = dict(batch_size=2, num_threads=2, prefetch=1, timeout_seconds=30.0)
    return DecoderProcess(CLIP, **(options | changes))


def test_frames_are_those_of_the_loader(decoder: DecoderProcess, videos: list[Path]) -> None:
    asked = requests(videos)
    found = []
    for frames in decoder.decode([asked[:2], asked[2:3], asked[3:5], asked[5:]]):
        assert frames.data.shape == (2, 2, 32, 32, 3)
        assert frames.errors == [None] * len(frames.errors)
        assert not frames.data[len(frames.errors) :].any()
        found += list(frames.data[: len(frames.errors)].copy())
        frames.release()
    np.testing.assert_array_equal(found, wanted(videos))


def test_bad_clips_are_zeros_with_the_loaders_error(decoder: DecoderProcess, videos: list[Path]) -> None:
    (frames,) = decoder.decode([[ClipRequest("no/such.mp4"), requests(videos)[0]]])
    assert frames.errors[0] is not None
    assert frames.errors[0].startswith("open: ")
    assert frames.errors[1] is None
    assert not frames.data[0].any()


def test_one_child_serves_one_list_after_the_other(decoder: DecoderProcess, videos: list[Path]) -> None:
    for _ in range(2):
        (frames,) = decoder.decode([requests(videos)[:1]])
        frames.release()
    first = decoder.pid
    assert list(decoder.decode([])) == []
    assert decoder.pid == first


def test_urls_are_read_by_the_child_and_told_apart(decoder: DecoderProcess, videos: list[Path], tmp_path: Path) -> None:
    url = f"file://{videos[0]}"
    asked = [ClipRequest(url, 0.0, None, 0), ClipRequest(f"file://{tmp_path}/none.mp4")]
    (frames,) = decoder.decode([asked])
    assert frames.errors[0] is None
    assert "FileNotFoundError" in str(frames.errors[1])
    np.testing.assert_array_equal(frames.data[0], wanted(videos)[0])
    assert fsspec.open(url).fs.protocol[0] == "file"


@pytest.mark.parametrize(
    ("place", "prefix", "grace_seconds", "error"),
    [
        (0, "", 30.0, "timeout: not finished within 3 s"),  # FFmpeg can be interrupted there
        (0, "file://", 0.0, "timed out: nothing came for 3 s"),  # a download, of which nobody can say when it ends
        (3, "file://", 0.0, "timed out: nothing came for 3 s"),
    ],
)
def test_a_video_that_hangs_costs_its_own_row(
    place: int,
    prefix: str,
    grace_seconds: float,
    error: str,
    videos: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoder_process, "_GRACE_SECONDS", grace_seconds)
    fifo = tmp_path / "hangs.mp4"
    os.mkfifo(fifo)  # opening it waits for somebody who writes
    asked = requests(videos)
    asked[place] = ClipRequest(f"{prefix}{fifo}")
    found, errors = [], []
    with started(timeout_seconds=LIMIT_SECONDS) as decoder:
        for frames in decoder.decode([asked[:2], asked[2:4], asked[4:]]):
            found += list(frames.data.copy())
            errors += frames.errors
            frames.release()
    assert [bool(text) for text in errors] == [i == place for i in range(6)]
    assert str(errors[place]).startswith(error)
    good = [i for i in range(6) if i != place]
    np.testing.assert_array_equal([found[i] for i in good], wanted(videos)[good])
    assert not found[place].any()


def test_a_child_that_stands_still_costs_nothing(videos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_process, "_GRACE_SECONDS", 0.0)
    asked = requests(videos)
    found = []
    with started(timeout_seconds=LIMIT_SECONDS) as decoder:
        for number, frames in enumerate(decoder.decode([asked[:2], asked[2:4], asked[4:]])):
            assert frames.errors == [None, None]
            found += list(frames.data.copy())
            frames.release()
            if number == 0:
                assert decoder.pid is not None
                os.kill(decoder.pid, signal.SIGSTOP)
    np.testing.assert_array_equal(found, wanted(videos))


def test_a_child_that_crashes_once_costs_nothing(decoder: DecoderProcess, videos: list[Path]) -> None:
    asked = requests(videos)
    found = []
    for number, frames in enumerate(decoder.decode([asked[:2], asked[2:4], asked[4:]])):
        assert frames.errors == [None, None]
        found += list(frames.data.copy())
        frames.release()
        if number == 0:
            assert decoder.pid is not None
            os.kill(decoder.pid, signal.SIGSEGV)
    np.testing.assert_array_equal(found, wanted(videos))


def test_a_clip_that_crashes_once_when_alone_is_decoded(
    decoder: DecoderProcess, videos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    send, kills = DecoderProcess._send, [False, True]  # with the batch, and with its first clip

    def sends(self: DecoderProcess, task: Task) -> None:
        send(self, task)
        if kills and task.alone == kills[0]:
            assert self.pid is not None
            os.kill(self.pid, signal.SIGKILL)
            del kills[0]

    monkeypatch.setattr(DecoderProcess, "_send", sends)
    (frames,) = decoder.decode([requests(videos[:2])])
    assert (frames.errors, kills) == ([None, None], [])
    np.testing.assert_array_equal(frames.data, wanted(videos[:2]))


def test_a_child_whose_parent_wants_no_more_ends_in_silence(
    decoder: DecoderProcess, videos: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """While it decodes: it has something to tell then, and nobody to tell it to."""
    next(decoder.decode([requests(videos[:1])])).release()
    child = decoder._child
    assert child is not None
    os.kill(child.pid, signal.SIGSTOP)
    decoder._send(Task(0, dict(enumerate(requests(videos[:2]))), alone=False))
    child.link.close()
    os.kill(child.pid, signal.SIGCONT)
    assert child.end(60.0) == 1
    assert capfd.readouterr().err == ""


def test_a_clip_that_always_crashes_fails_alone(videos: list[Path], tmp_path: Path) -> None:
    """The child is killed whenever it opens the one file, which is a pipe to see it by."""
    fifo = tmp_path / "crashes.mp4"
    os.mkfifo(fifo)
    asked = requests([videos[0], fifo, videos[2], videos[3]])
    with started() as decoder:
        stop = threading.Event()

        def kill() -> None:
            while not stop.is_set():
                try:
                    writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
                except OSError:  # nobody reads yet
                    time.sleep(0.01)
                    continue
                if (pid := decoder.pid) is not None:
                    os.kill(pid, signal.SIGSEGV)
                    time.sleep(0.05)
                os.close(writer)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            errors = []
            for frames in decoder.decode([asked[:2], asked[2:]]):
                errors += frames.errors
                frames.release()
        finally:
            stop.set()
            killer.join()
    assert errors[1] == "crashed: the decoder's process was ended by SIGSEGV"
    assert errors[:1] + errors[2:] == [None] * 3


def test_batches_that_are_never_released_are_told(decoder: DecoderProcess, videos: list[Path]) -> None:
    asked = requests(videos)
    with pytest.raises(RuntimeError, match=r"all 4 batches are held: release\(\)"):
        for _ in decoder.decode([asked[:1]] * 6):
            pass


def test_a_child_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch, videos: list[Path]) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with started() as decoder, pytest.raises(RuntimeError, match="does not start: it ended by exit code 1"):
        list(decoder.decode([requests(videos)[:1]]))


def test_the_child_loads_no_jax_and_ends_with_its_parent(tmp_path: Path, videos: list[Path]) -> None:
    code = f"""if True:
        import sys
        from pyvdl.config import ClipConfig
        from pyvdl.decoder_process import DecoderProcess
        from pyvdl.video import ClipRequest
        decoder = DecoderProcess(ClipConfig(), batch_size=1, num_threads=1, prefetch=1, timeout_seconds=9)
        next(decoder.decode([[ClipRequest({str(videos[0])!r})]]))
        print(decoder.pid, "jax" in sys.modules, flush=True)
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid, jax = done.stdout.split()
    assert jax == "False"
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_is_heard_by_the_parent_alone(videos: list[Path]) -> None:
    """A terminal sends it to all processes of the group that stands before it."""
    code = f"""if True:
        import signal, sys, time
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from pyvdl.config import ClipConfig
        from pyvdl.decoder_process import DecoderProcess
        from pyvdl.video import ClipRequest
        with DecoderProcess(ClipConfig(), batch_size=1, num_threads=1, prefetch=1, timeout_seconds=9) as decoder:
            next(decoder.decode([[ClipRequest({str(videos[0])!r})]]))
            try:
                print("decoded", flush=True)
                time.sleep(60)
            except KeyboardInterrupt:
                time.sleep(0.5)  # in which a child that heard it would tell"""
    asked: Any = dict(start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", code], **asked) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "decoded\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate()[1] == ""
    assert process.returncode == 0


def test_lengths_are_measured_whatever_hangs(videos: list[Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hangs.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"bad")
    asked = [videos[0], tmp_path / "bad.mp4", f"file://{tmp_path}/hangs.mp4", videos[1]]
    assert list(measure_seconds(map(str, asked), timeout_seconds=LIMIT_SECONDS)) == [1.0, None, None, 1.0]
    assert list(measure_seconds([], timeout_seconds=1.0)) == []
