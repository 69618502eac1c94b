"""Jobs on long videos that are cut: by all processes, each once, into the same parts."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from pyvdl import jobs
from pyvdl.data import Record
from pyvdl.jobs import Job, load_job
from pyvdl.manifests import Cut, Input
from pyvdl.storage import Folder
from tests.job_processes import CUT, Free, run
from tests.test_shots import write_shots

LISTS = 2


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(3):
        write_shots(folder / f"{i}.mp4", [20 + 5 * i, 40, 30], fps=25)
    (folder / "bad.mp4").write_bytes(b"this is not a video")
    return folder


def results(out: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in (*out.glob("captions-*"), *out.glob("work/*"), *out.glob("cuts/parts-*"))
    }


@pytest.fixture(scope="module")
def whole(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job by one process."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "_CUT_AT_ONCE", 2)
        run(Input([videos]), out)
    return out


def test_the_parts_are_those_of_the_input_cut_at_once(videos: Path, whole: Path, tmp_path: Path) -> None:
    job = load_job(Folder(whole))
    wanted = {record.key: record for record in Input([videos], window_seconds=CUT.window_seconds, shots=CUT.shots)}
    assert {record.key: record for shard in range(job.shards) for record in job.work(shard)} == wanted
    assert len(wanted) == 3 * 3 + 1
    assert len(list(whole.glob("cuts/parts-*"))) == LISTS


def test_two_processes_cut_what_one_does(videos: Path, whole: Path, tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "tests.job_processes", str(videos), str(tmp_path)]
    cluster = {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    running = [
        subprocess.Popen(
            command,
            env=os.environ | cluster | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        told = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(told)[-3000:]
    assert results(tmp_path) == results(whole)
    for what, count in (("cut", LISTS), ("made", load_job(Folder(tmp_path)).shards)):
        by = sorted(path.name for path in (tmp_path / "notes").glob(f"{what}-*"))
        assert by == [f"{what}-{shard}-by-{shard % 2}" for shard in range(count)]


def test_a_prompt_is_looked_at_before_anything_is_cut(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Free, "recipe", lambda self: {"model_sha256": "m", "prompt": "{key} of {gruop}"})
    with pytest.raises(ValueError, match=r"the prompt names 'gruop', and no clip has such a column; .*, group, "):
        run(Input([videos]), tmp_path)
    assert not list(tmp_path.glob("cuts/parts-*"))
    monkeypatch.setattr(Free, "recipe", lambda self: {"model_sha256": "m", "prompt": "{key} of {group}"})
    run(Input([videos]), tmp_path)  # in the same folder


def test_what_was_cut_is_not_cut_again(
    videos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for path in (*out.glob("captions-*"), out / "job.json", *out.glob("cuts/parts-00001-*")):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"out: 1 of 2 lists of long clips are cut \(.*/out/cuts\), the job begins when"
    ):
        load_job(Folder(out))
    status = load_job(Folder(out / "cuts")).status()
    assert (status.shards_done, status.shards, status.rows, status.records) == (1, 2, 2, 4)
    finish, again, notes = Job.finish_parts, [], []

    def noted(self: Job, shard: int, parts: Iterable[Record]) -> None:
        again.append(shard)
        finish(self, shard, parts)

    def progress(done: int, total: int, note: str = "") -> None:
        notes.append((done, total, note))

    monkeypatch.setattr(jobs, "_CUT_AT_ONCE", 2)
    monkeypatch.setattr(Job, "finish_parts", noted)
    run(Input([videos]), out, progress=progress)
    assert again == [1]
    assert notes[0] == (0, 2, "cutting clips")
    assert results(out) == results(whole)
    run(iter(()), out)  # nothing is listed or cut where the input is known
    (out / "job.json").unlink()
    with pytest.raises(ValueError, match=r"cuts holds another job \(window_seconds was 2\.0, now 3\.0\)"):
        run(Input([videos]), out, Cut(window_seconds=3.0, shots=CUT.shots))
