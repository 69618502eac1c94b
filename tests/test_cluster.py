"""Captioning on a Ray cluster: workers that are killed, shards that fail, and the rows of a job on one machine."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pyvdl import cluster, jobs
from pyvdl.__main__ import main
from pyvdl.caption import Captioner
from pyvdl.checkpoint import save_model
from pyvdl.cluster import Share, UnwrittenShard, Worker, run_on_cluster
from pyvdl.data import Record, write_manifest
from pyvdl.jobs import Job, open_job
from pyvdl.manifests import Cut
from pyvdl.pipeline import JobSummary, caption_job, run_job
from pyvdl.storage import Folder
from tests.clips import write_clip
from tests.cluster_workers import DRAWING, POISON, WORDS, absent, deadly, dying, frail
from tests.job_processes import Free
from tests.models import tiny_vlm

FILES, EACH, SHARD = 12, 3, 4


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("clips")
    found = []
    for i in range(FILES):
        path = folder / f"{i}.mp4"
        if i == 2:
            path.write_bytes(b"this is not a video" * 100)
        else:
            write_clip(path, seed=i)
        for j in range(EACH):
            found.append(Record(key=f"{i}-{j}", video=str(path), start_seconds=0.2 * j, end_seconds=0.2 * j + 0.4))
    return found


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("captions-*")}


@pytest.fixture(scope="module")
def whole(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job on this process's devices."""
    out = tmp_path_factory.mktemp("whole")
    done = caption_job(tiny_vlm(WORDS), WORDS, records, out, shard_size=SHARD, **DRAWING)
    assert done == JobSummary(rows=FILES * EACH, failed=EACH, dropped={}, shards=9, shards_skipped=0)
    return out


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster of this machine; its processes share compiled programs."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray") as folder:
        patch.setenv("RAY_ADDRESS", "local")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_TMPDIR", folder)  # a short path: sockets stand in it
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        found = cluster._ray()
        with cluster._connected(found):
            yield found


def test_workers_that_are_killed_and_shards_that_fail_change_no_row(
    ray: Any, records: list[Record], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scars, out = tmp_path / "scars", tmp_path / "out"
    scars.mkdir()
    notes = []

    def progress(done: int, total: int, note: str = "") -> None:
        assert total == FILES * EACH
        notes.append((done, note))

    with pytest.raises(RuntimeError, match=r"1 of 9 shards failed, .*: \d \(ArithmeticError: no words for 7-1\)$"):
        run_on_cluster(
            partial(frail, scars), records, out, workers=2, needs={"CPU": 1}, shard_size=SHARD, progress=progress
        )
    assert (scars / "killed").exists()
    assert len((scars / "poisoned").read_text().split()) > 1, "what fails by itself is tried twice"
    done, wanted = shards(out), shards(whole)
    assert len(done) == 8
    assert done.items() <= wanted.items()
    assert notes[-1][0] == FILES * EACH - SHARD
    assert re.match(r"[12] of 2 workers \(1 lost so far\), shards failed: \d, ", notes[-1][1])
    assert "clips/s" in notes[-1][1]

    model = tiny_vlm(WORDS)
    save_model(tmp_path / "model", model, model.config, WORDS)
    write_manifest(tmp_path / "clips.jsonl", records)
    words = ["--num-samples=2", "--max-length=6", "--top-p=1", "--seed=3", "--batch-size=2", f"--shard-size={SHARD}"]
    words += [f"--model={tmp_path}/model", f"--out={out}", "--engine=ray", "--workers=1"]
    assert main(["caption", str(tmp_path / "clips.jsonl"), *words]) == 0
    assert f"{FILES * EACH} rows ({EACH} failed) in 9 shards, 8 of them from an earlier run" in capsys.readouterr().out
    assert shards(out) == wanted


def test_a_worker_tells_what_is_the_shard_s_fault_and_what_the_disk_s(
    records: list[Record], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker in this process, without Ray."""
    (tmp_path / "killed").touch()
    captioner = frail(tmp_path)
    job = open_job(Folder(tmp_path), captioner.recipe(), records, shard_size=SHARD, format="parquet")
    bad = next(shard for shard in range(9) if POISON in [record.key for record in job.work(shard)])
    worker = Worker(lambda: captioner, str(tmp_path), dict(num_threads=1, prefetch=1, timeout_seconds=60.0))
    with ThreadPoolExecutor(9) as threads:
        answers = list(threads.map(partial(answer, worker), range(9)))
    assert str(answers.pop(bad)) == f"no words for {POISON}"
    shares = [share for share in answers if isinstance(share, Share)]
    assert sum(share.counts.rows for share in shares) == FILES * EACH - SHARD
    assert sum(share.tokens for share in shares) > 0
    done, wanted = shards(tmp_path), shards(whole)
    assert len(done) == 8
    assert done.items() <= wanted.items()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "a shard")

    monkeypatch.setattr(Job, "finish", full)
    with pytest.raises(UnwrittenShard, match="No space left on device: 'a shard'"):
        worker.work_on((bad + 1) % 9)
    another = Worker(partial(replaced, captioner), str(tmp_path), {})
    with pytest.raises(ValueError, match=r"seen from .*\) holds another job \(seed was 3, now 4\)"):
        another.work_on(0)


def answer(worker: Worker, shard: int) -> Share | Exception:
    try:
        return worker.work_on(shard)
    except ArithmeticError as error:
        return error


def replaced(captioner: Captioner) -> Captioner:
    """What a host with another idea of the job has."""
    other = copy.copy(captioner)
    other.seed = 4
    return other


def test_long_clips_are_cut_by_the_workers(
    ray: Any, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_CUT_AT_ONCE", 3)
    options: dict[str, Any] = dict(cut=Cut(window_seconds=0.2), shard_size=SHARD)
    run_job(Free, records[:9], tmp_path / "alone", **options)
    notes = []

    def progress(done: int, total: int, note: str = "") -> None:
        notes.append((total, note))

    done = run_on_cluster(Free, records[:9], tmp_path / "out", workers=2, progress=progress, **options)
    assert (done.rows, done.failed) == (18, 6)
    assert notes[0][0] == 9
    assert notes[0][1].endswith("of 2 workers, cutting clips")
    wanted = shards(tmp_path / "alone")
    assert len(wanted) == 5
    assert shards(tmp_path / "out") == wanted


def test_a_job_that_cannot_begin_says_why(ray: Any, records: list[Record], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no worker is left, the last one: FileNotFoundError: no model here$"):
        run_on_cluster(absent, records, tmp_path, workers=1)
    with pytest.raises(
        ValueError, match=r"a worker needs CPU=1, GPU=1, and the cluster has CPU=\d+, GPU=0: ask for less"
    ):
        run_on_cluster(absent, records, tmp_path, needs={"GPU": 1})
    assert not list(tmp_path.glob("captions-*"))


def test_a_worker_that_dies_whenever_it_loads_the_model_is_given_up(
    ray: Any, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_LOSSES", 2)
    with pytest.raises(
        RuntimeError, match="no worker is left, the last one: 2 in a row were lost, this one while it loaded the model"
    ):
        run_on_cluster(partial(dying, tmp_path), records, tmp_path / "out", workers=1)
    assert len((tmp_path / "starts").read_text().split()) == 2


@pytest.mark.parametrize(
    ("count", "says"),
    [
        (2, "^2 of 2 shards failed, the same command tries them again: 0 {lost}; 1 {lost}$"),
        (
            3,
            r"^no worker is left, .*: 2 in a row .* while it worked: .*; shards failed: \d {lost}; \d {lost}$",
        ),
    ],
)
def test_shards_that_kill_the_only_worker_are_named(
    ray: Any, records: list[Record], count: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_LOSSES", 2)
    with pytest.raises(RuntimeError, match=says.format(lost=r"\(2 workers were lost over it\)")):
        run_on_cluster(deadly, records[: count * EACH], tmp_path, workers=1, shard_size=EACH)
