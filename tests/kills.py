"""Captioning jobs as commands of their own, killed at random moments; for tests and `make soak`."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from pyvdl.checkpoint import save_model
from pyvdl.data import Record, write_manifest
from pyvdl.text import CAPTION_PROMPT, WordTokenizer
from tests.clips import write_clip
from tests.models import tiny_vlm

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


def start(scene: Scene, out: Path, processes: int = 1) -> list[subprocess.Popen[str]]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "pyvdl", "caption", str(scene.manifest), "--model", str(scene.model)]
    command += ["--out", str(out), "--shard-size", str(SHARD), "--batch-size", "2", "--num-samples", "2"]
    command += ["--max-length", "6", "--num-threads", "1"]
    started = []
    for number in range(processes):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(scene.cache)}
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


def run_killed(scene: Scene, out: Path, kills: int, seed: int, processes: int = 1) -> list[int]:
    """Starts the job until it ends, killing it `kills` times: one process first, the others as a scheduler would.

    A kill comes a random while after a random number of new shards, or at any time while the job starts. Returns how
    many shards there were at each.
    """
    rng = random.Random(seed)
    found = []
    for number in range(kills):
        running = start(scene, out, processes)
        have = len(shards(out))
        # Some for each kill that is to come, so that there is work left for the last.
        goal = have + rng.randint(0, max(0, (scene.shards - have) // (kills - number + 1)))
        patience = rng.uniform(0.0, 8.0) if goal == have else rng.uniform(0.0, 0.2)
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while len(shards(out)) < goal and all(process.poll() is None for process in running):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(patience)
        rng.shuffle(running)
        running[0].send_signal(signal.SIGKILL)
        for process in running[1:]:
            process.kill()
        for process in running:
            process.communicate()
        found.append(len(shards(out)))
    finish(start(scene, out, processes))
    return found
