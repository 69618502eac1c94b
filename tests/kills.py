"""Jobs that are stopped, or killed at random moments as commands, or have damaged files; for tests and soak."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pyvdl import pipeline
from pyvdl.checkpoint import save_model
from pyvdl.data import Record, write_manifest
from pyvdl.rows import CaptionRow, read_captions
from pyvdl.text import CAPTION_PROMPT, WordTokenizer
from tests.clips import write_clip
from tests.models import tiny_vlm
from tests.soak.seeds import REAL_VIDEOS, write_seeds

SHARD = 2
_DEADLINE_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Scene:
    """A model and clips, one of which is not a video."""

    model: Path
    manifest: Path
    clips: int
    cache: Path  # of compiled programs: most of a start otherwise

    @property
    def shards(self) -> int:
        return -(-self.clips // SHARD)


def make_scene(folder: Path, clips: int) -> Scene:
    tokenizer = WordTokenizer.from_texts([CAPTION_PROMPT, "a red ball moves left then right and a blue star turns"])
    model = tiny_vlm(tokenizer)
    save_model(folder / "model", model, model.config, tokenizer)
    records = []
    for i in range(clips):
        path = folder / f"{i % 8}.mp4"
        if i == 3:
            path.write_bytes(b"this is not a video")
        elif i < 8:
            write_clip(path, seed=i)
        records.append(Record(key=str(i), video=str(path), start_seconds=0.01 * (i // 8)))
    write_manifest(folder / "clips.jsonl", records)
    return Scene(folder / "model", folder / "clips.jsonl", clips, folder / "compiled")


def start(
    scene: Scene, out: Path, processes: int = 1, options: Sequence[str] = (), more: Mapping[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """Begins the job, with further options and environment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "pyvdl", "caption", str(scene.manifest), "--model", str(scene.model)]
    command += ["--out", str(out), "--shard-size", str(SHARD), "--batch-size", "2", "--num-samples", "2"]
    command += ["--max-length", "6", "--num-threads", "1", *options]
    started = []
    for number in range(processes):
        environment = {
            **os.environ,
            **(more or {}),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(scene.cache),
        }
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1", "XLA_FLAGS": ""}
        if processes > 1:
            environment["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
            environment |= {"JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(number)}
        started.append(
            subprocess.Popen(
                [*command, "--distributed"] if processes > 1 else command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def finish(processes: list[subprocess.Popen[str]]) -> str:
    """What all of them said; AssertionError unless they end well."""
    try:
        told = [process.communicate(timeout=_DEADLINE_SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, told, strict=True):
        assert process.returncode == 0, text[-3000:]
    return "\n".join(told)


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("captions-*")}


def _count(out: Path) -> int:
    return sum(1 for _ in out.glob("captions-*"))


def run_killed(scene: Scene, out: Path, kills: int, seed: int, processes: int = 1) -> list[int]:
    """Starts the job until it ends, killing it `kills` times: one process first, the others as a scheduler would.

    Returns how many shards there were at each kill.
    """
    rng = random.Random(seed)
    found = []
    for number in range(kills):
        running = start(scene, out, processes)
        _wait(scene, out, rng, kills - number, running)
        rng.shuffle(running)
        running[0].send_signal(signal.SIGKILL)
        for process in running[1:]:
            process.kill()
        for process in running:
            process.communicate()
        found.append(_count(out))
    finish(start(scene, out, processes))
    return found


def _wait(
    scene: Scene, out: Path, rng: random.Random, kills: int, running: Sequence[subprocess.Popen[str]], idle: bool = True
) -> None:
    """Waits for the first of `kills` moments: so long that there is work left for the others.

    It comes a random while after a random number of new shards, or, with processes that start (`idle`), at any time.
    """
    have = _count(out)
    most = min(scene.shards, have + max(1, (scene.shards - have) // (kills + 1)))
    goal = rng.randint(have, most)
    patience = rng.uniform(0.0, 8.0 if idle and goal == have else 0.2)
    begin = time.monotonic()
    end = math.inf  # once the goal is reached
    while time.monotonic() < end and all(process.poll() is None for process in running):
        now = _count(out)
        if now >= goal:
            end = min(end, time.monotonic() + (patience if now < most else min(patience, 0.05)))
        assert time.monotonic() < begin + _DEADLINE_SECONDS
        time.sleep(0.002)


def run_ray_killed(scene: Scene, out: Path, kills: int, seed: int) -> list[int]:
    """Runs the job on a Ray cluster of its own, killing one of its two workers, or both, at `kills` moments.

    Returns how many shards there were at each.
    """
    rng = random.Random(seed)
    found = []
    options = ["--engine", "ray", "--workers", "2", "--worker-resources", "CPU=1"]
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # a short path: sockets stand in it
        more = {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder}
        (driver,) = start(scene, out, options=options, more=more)
        idle = True  # nobody captions
        for number in range(kills):
            while not _ray_workers(driver.pid):
                assert driver.poll() is None, driver.communicate()[0][-3000:]
                time.sleep(0.01)
            _wait(scene, out, rng, kills - number, [driver], idle)
            workers = _ray_workers(driver.pid)
            victims = rng.sample(workers, min(len(workers), rng.randint(1, 2)))
            for worker in victims:
                os.kill(worker, signal.SIGKILL)
            idle = len(victims) == len(workers)
            found.append(_count(out))
        said = driver.communicate(timeout=_DEADLINE_SECONDS)[0]
        # A shard over which one worker after the other is lost is left out, for the same command to do.
        assert driver.returncode == 0 or "the same command tries them again" in said, said[-3000:]
        finish(start(scene, out, options=options, more=more))
    return found


def _ray_workers(driver: int) -> list[int]:
    """The processes below the driver's that hold a model or load it."""
    found = []
    for task in Path(f"/proc/{driver}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # they come and go
            for child in map(int, task.read_text().split()):
                name = Path(f"/proc/{child}/cmdline").read_bytes()
                found += [child] if name.startswith(b"ray::Worker") else _ray_workers(child)
    return found


def run_damaged(scene: Scene, folder: Path, mutations: int) -> tuple[list[str], list[CaptionRow]]:
    """One job over the videos beside the repository, or where there are none over small ones of each kind, and so many
    mutations of them: the keys of its clips, and its rows."""
    folder.mkdir()
    sources = sorted(path for path in REAL_VIDEOS.glob("*.*") if path.suffix not in (".md", ".json"))
    if not sources:
        write_seeds(folder)
        sources = sorted(folder.iterdir())
    records = [Record(key=path.name, video=str(path)) for path in sources]
    for number in range(mutations):
        rng = random.Random(number)
        source = sources[number % len(sources)]
        path = folder / f"mutation-{number:03d}{source.suffix}"
        path.write_bytes(_mutated(source.read_bytes(), rng))
        records.append(Record(key=path.name, video=str(path)))
    write_manifest(folder / "clips.jsonl", records)
    finish(start(Scene(scene.model, folder / "clips.jsonl", len(records), scene.cache), folder / "out"))
    return [record.key for record in records], list(read_captions(folder / "out"))


def _mutated(data: bytes, rng: random.Random) -> bytes:
    """The file with bytes flipped, cut off, cut out or written twice."""
    found = bytearray(data)
    at = rng.randrange(len(found))
    length = min(len(found) - at, rng.randint(1, 1 << rng.randint(1, 16)))
    match rng.randrange(4):
        case 0:
            for _ in range(rng.randint(1, 64)):
                found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
        case 1:
            del found[at:]
        case 2:
            del found[at : at + length]
        case 3:
            found[at:at] = found[at : at + length]
    return bytes(found)


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Jobs of this process are stopped inside when the first of their shards is there."""
    original = pipeline.run_shards

    def stops(*arguments: Any) -> Iterator[Any]:
        yield next(original(*arguments))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "run_shards", stops)
        with pytest.raises(KeyboardInterrupt):
            yield
