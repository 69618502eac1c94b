"""Captioning by the command line: killed or not, by one process or two, always the same rows; damaged files. More by
`make soak`."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from pyvdl.data import Record, read_manifest, write_manifest
from pyvdl.rows import read_captions
from tests.kills import Scene, finish, make_scene, run_damaged, run_killed, shards, start

CLIPS = 24


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"), CLIPS)


@pytest.fixture(scope="module")
def undisturbed(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    assert f"{CLIPS} rows (3 failed) in 12 shards, 0 of them from an earlier run" in finish(start(scene, out))
    rows = list(read_captions(out))
    assert sorted(int(row.key) for row in rows) == list(range(CLIPS))
    assert len({tuple(row.captions) for row in rows}) > 12
    return shards(out)


def test_killed_at_random_moments_it_ends_the_same(scene: Scene, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    have = run_killed(scene, tmp_path, kills=2, seed=1)
    assert have == sorted(have)
    assert shards(tmp_path) == undisturbed


def test_two_processes_write_what_one_does_killed_or_not(
    scene: Scene, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    run_killed(scene, tmp_path, kills=1, seed=2, processes=2)
    assert shards(tmp_path) == undisturbed
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in undisturbed) == [
        ".lock",
        "job.json",
        "work",
    ]


def test_sigterm_ends_a_job_that_joined_others(scene: Scene, tmp_path: Path) -> None:
    clips = read_manifest(scene.manifest)[:2]
    os.mkfifo(tmp_path / "hangs.mp4")  # so that the job cannot end before
    write_manifest(tmp_path / "clips.jsonl", [*clips, Record(key="hangs", video=str(tmp_path / "hangs.mp4"))])
    scene, out = dataclasses.replace(scene, manifest=tmp_path / "clips.jsonl"), tmp_path / "out"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    more = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    (process,) = start(scene, out, options=["--distributed"], more=more)
    while not (out / "job.json").exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.002)
    process.terminate()
    process.communicate()
    assert process.returncode == -signal.SIGTERM
    assert len(shards(out)) < 2


def test_a_job_over_damaged_files_ends_with_a_row_for_every_clip(scene: Scene, tmp_path: Path) -> None:
    keys, rows = run_damaged(scene, tmp_path / "damaged", mutations=30)
    assert sorted(row.key for row in rows) == sorted(keys)
    assert {row.status for row in rows} == {"ok", "failed"}
