"""Trainings of several processes on this machine, by the command line: they end as one process does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from pyvdl.checkpoint import load_model
from pyvdl.data import Question, Record, write_manifest
from tests.clips import write_clip

STEPS = 12
# SGD: an optimizer that normalises would make noise of gradients that are zero but for rounding, as of keys' biases.
COMMON = [
    "optim.name=sgd",
    "optim.peak_learning_rate=0.05",
    "optim.b1=0.9",
    f"steps={STEPS}",
    "batch_size=4",
    "optim.warmup_steps=1",
    "log_every=2",
    "checkpoint_every=4",
    "num_threads=1",
]
VISION = ["model.vision.image_size=32", "model.vision.depth=1", "model.vision.width=32", "model.vision.mlp_dim=64"]
LANGUAGE = ["model.num_frames=2", "model.language.encoder_layers=1", "model.language.decoder_layers=1"]
# Command and settings of the new model; the language stage takes that of the visual one.
JOBS = {
    "visual": (["adapt", "--stage", "visual"], [*VISION, *LANGUAGE]),
    "language": (["adapt", "--stage", "language"], []),
    "dual encoder": (["train", "--captions", "human"], [*VISION, "model.vision.num_frames=2", "model.text.depth=1"]),
}
COMMAND = ("-m", "pyvdl")
# The same on a mesh in which the devices of two processes take turns, as most meshes of TPU slices have them.
INTERLEAVED = (
    "-c",
    """
import sys
from jax.experimental import mesh_utils
from pyvdl.__main__ import main

in_order = mesh_utils.create_device_mesh

def take_turns(shape, devices, **options):
    found = in_order(shape, devices, **options).flatten()
    return found.reshape(2, -1).T.reshape(shape)

mesh_utils.create_device_mesh = take_turns
sys.exit(main())
""",
)


def held(path: Path) -> tuple[str, ...]:
    """The same, which waits for its tenth batch until there is a file at `path`."""
    return ("-m", "tests.held", str(path), "10")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    words = ["red", "green", "blue", "round", "square", "slow"]
    records = []
    for i, word in enumerate(words):
        write_clip(folder / f"{i}.mp4", seed=i)
        question = Question("what is it ?", word, "short")
        caption = (f"a {word} thing moves", f"{word} things")
        records.append(Record(key=str(i), video=str(folder / f"{i}.mp4"), captions=caption, questions=(question,)))
    write_manifest(folder / "train.jsonl", records)
    return folder / "train.jsonl"


def start_all(
    job: str, manifest: Path, out: Path, count: int, models: Path, *settings: str, program: Sequence[str] = COMMAND
) -> list[subprocess.Popen[str]]:
    """As many processes, which have as many devices in all whatever their number. models: where visual/model is."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    verb, own = JOBS[job]
    command = [sys.executable, *program, *verb, "--data", str(manifest), "--out", str(out)]
    command += [f"--set={setting}" for setting in (*COMMON, *own, *settings)]
    if job == "language":
        command += ["--model", str(models / "visual" / "model")]
    if count > 1:
        command.append("--distributed")
    started = []
    for number in range(count):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 // count}"
        if count > 1:
            environment["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
            environment |= {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(number)}
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    return started


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each process printed; all must end well."""
    try:
        told = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, told, strict=True):
        assert process.returncode == 0, text[-3000:]
    return told


def result(out: Path) -> tuple[list[float], dict[str, Any]]:
    """Losses of all steps, and the parameters."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    model, _ = load_model(out / "model")
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return [loss for line in lines for loss in line["losses"]], {
        "/".join(map(str, path)): np.asarray(x[...]) for path, x in state
    }


def compare(found: Path, wanted: Path) -> None:
    losses, params = result(found)
    wanted_losses, wanted_params = result(wanted)
    assert len(losses) == STEPS
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-4)
    for name, value in wanted_params.items():
        np.testing.assert_allclose(params[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def alone(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of each job's run by one process."""
    folder = tmp_path_factory.mktemp("alone")
    for job in JOBS:
        finish(start_all(job, manifest, folder / job, 1, folder))
    return folder


@pytest.mark.parametrize(
    ("job", "count", "fsdp", "program"),
    [("visual", 4, 1, COMMAND), ("language", 2, 4, COMMAND), ("dual encoder", 2, 1, INTERLEAVED)],
    ids=["visual", "language", "dual encoder"],
)
def test_several_processes_train_as_one(
    job: str, count: int, fsdp: int, program: Sequence[str], manifest: Path, alone: Path, tmp_path: Path
) -> None:
    """With fsdp 4 no process has a whole matrix, neither of the model that it starts from nor of what it saves."""
    finish(start_all(job, manifest, tmp_path / "run", count, alone, f"fsdp={fsdp}", program=program))
    compare(tmp_path / "run", alone / job)


def test_a_killed_process_is_started_again(manifest: Path, alone: Path, tmp_path: Path) -> None:
    """One of two is killed after its first checkpoint; the other is ended, as a scheduler would; both run again."""
    out = tmp_path / "run"
    processes = start_all("dual encoder", manifest, out, 2, alone, program=held(tmp_path / "never"))
    deadline = time.monotonic() + 300
    while not any(path.name.isdigit() for path in (out / "checkpoints").glob("*")):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    time.sleep(0.5)
    for process in processes:
        process.kill()
        process.communicate()
    assert not (out / "model").exists()
    before = (out / "metrics.jsonl").read_text().splitlines()[:2]
    finish(start_all("dual encoder", manifest, out, 2, alone))
    compare(out, alone / "dual encoder")
    assert (out / "metrics.jsonl").read_text().splitlines()[:2] == before  # times and all: nothing was done again


def test_sigterm_to_one_stops_all_after_the_same_step(manifest: Path, alone: Path, tmp_path: Path) -> None:
    """As a preempted host is told. All save that step and exit with 0; started again, they end as if never stopped."""
    out, sent = tmp_path / "run", tmp_path / "sent"
    processes = start_all("dual encoder", manifest, out, 2, alone, program=held(sent))
    deadline = time.monotonic() + 300
    while not (out / "run.json").exists():  # the steps are compiled next
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    sent.touch()
    told = finish(processes)
    saved = max(int(path.name) for path in (out / "checkpoints").iterdir())
    assert saved < STEPS
    assert f"stopped by SIGTERM, saved step {saved}" in told[0]
    assert not (out / "model").exists()
    finish(start_all("dual encoder", manifest, out, 2, alone))
    compare(out, alone / "dual encoder")


def test_a_step_that_is_not_finite_ends_all_processes(manifest: Path, alone: Path, tmp_path: Path) -> None:
    """Each tells its own records, and the state from before is saved."""
    out = tmp_path / "run"
    processes = start_all("dual encoder", manifest, out, 2, alone, "optim.peak_learning_rate=1e38")
    try:
        told = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1], told
    (saved,) = (int(path.name) for path in (out / "checkpoints").iterdir())
    files = [out / f"nonfinite-{saved + 1}-{number}.json" for number in range(2)]
    for text, path in zip(told, files, strict=True):
        assert f"step {saved + 1}: loss " in text
        assert f"all are in {path}, the state after step {saved} is saved" in text
    keys = [json.loads(path.read_text())["records"] for path in files]
    assert [len(own) for own in keys] == [2, 2]
    assert keys[0] != keys[1]
    assert not (out / "model").exists()


def test_joining_nobody_says_what_to_set(manifest: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pyvdl", "train", "--data", str(manifest), "--out", str(tmp_path)]
    command += ["--captions", "human", "--distributed"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID" in done.stderr
    assert jax.process_count() == 1
