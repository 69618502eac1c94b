"""Captioning jobs between object stores: in memory, and through S3's protocol with a server on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from pyvdl import storage
from pyvdl.archives import Sample, write_archive
from pyvdl.config import ClipConfig
from pyvdl.data import Record, write_manifest
from pyvdl.jobs import load_job
from pyvdl.manifests import Input
from pyvdl.models.vlm import VLM
from pyvdl.pipeline import JobSummary, caption_job
from pyvdl.rows import CaptionRow, read_captions
from pyvdl.storage import Folder
from pyvdl.text import CAPTION_PROMPT, WordTokenizer
from tests.clips import write_clip
from tests.models import tiny_vlm

CLIP = ClipConfig(num_frames=2, sampling="uniform", short_side=32, size=32)
WORDS = WordTokenizer.from_texts([CAPTION_PROMPT, "a red ball moves left then right and a blue star turns"])
NUM_CLIPS = 5
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def model() -> VLM:
    return tiny_vlm(WORDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, a manifest of three of them, and a tar of the others."""
    folder = tmp_path_factory.mktemp("clips")
    records = [Record(key=f"clip{i}", video=str(folder / f"{i}.mp4")) for i in range(NUM_CLIPS)]
    for i, record in enumerate(records):
        write_clip(record.video, seed=i)
    write_manifest(folder / "some.jsonl", records[:3])
    write_archive(folder / "others.tar", [Sample(key=record.key, video=record.video) for record in records[3:]])
    return folder


@pytest.fixture(autouse=True)
def quick_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BEAT_SECONDS", 0.4)


@pytest.fixture(scope="module")
def bucket(folder: Path) -> Iterator[str]:
    """A bucket with what the folder holds, by a server that ends with its standard input."""
    command = [sys.executable, "-c", SERVER]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        assert server.stdout is not None
        host, port = server.stdout.readline().split()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        store = fsspec.filesystem("s3", skip_instance_cache=True)
        store.mkdir("clips")
        for path in folder.iterdir():
            store.pipe_file(f"clips/in/{path.name}", path.read_bytes())
        yield "s3://clips"


def job(model: VLM, paths: list[Any], out: str | Path) -> JobSummary:
    options: dict[str, Any] = dict(clip=CLIP, num_samples=2, max_length=6, seed=3, batch_size=2, shard_size=2)
    asked = Input(paths)
    return caption_job(model, WORDS, asked, out, input_sha256=asked.sha256(), **options)


@pytest.fixture(scope="module")
def wanted(model: VLM, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, CaptionRow]:
    out = tmp_path_factory.mktemp("local")
    assert job(model, [folder / "some.jsonl", folder / "others.tar"], out).rows == NUM_CLIPS
    return {row.key: row for row in read_captions(out)}


def compare(found: dict[str, CaptionRow], wanted: dict[str, CaptionRow]) -> None:
    """Shards follow from where the videos lie: other batches may differ in the last bits."""
    assert found.keys() == wanted.keys()
    for key, row in found.items():
        assert (row.status, row.captions, row.seed) == ("ok", wanted[key].captions, wanted[key].seed)
        np.testing.assert_allclose(row.log_probs, wanted[key].log_probs, rtol=1e-4)


def test_a_job_in_memory(model: VLM, folder: Path, wanted: dict[str, CaptionRow]) -> None:
    """Manifest and output; the decoder is another process, to which this one's memory is closed."""
    store = f"memory://{uuid.uuid4().hex}"
    lines = [json.loads(line) for line in (folder / "some.jsonl").read_text().splitlines()]
    for line in lines:
        line["video"] = str(folder / line["video"])
    Folder(store).write("some.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    done = job(model, [f"{store}/some.jsonl", folder / "others.tar"], f"{store}/out")
    assert done == JobSummary(rows=NUM_CLIPS, failed=0, dropped={}, shards=3, shards_skipped=0)
    compare({row.key: row for row in read_captions(f"{store}/out")}, wanted)


def test_a_job_on_s3_goes_on(model: VLM, bucket: str, wanted: dict[str, CaptionRow]) -> None:
    out = Folder(f"{bucket}/out")
    inputs = [f"{bucket}/in/some.jsonl", f"{bucket}/in/others.tar"]
    assert job(model, inputs, out.name) == JobSummary(rows=NUM_CLIPS, failed=0, dropped={}, shards=3, shards_skipped=0)
    rows = list(read_captions(out.name))
    compare({row.key: row for row in rows}, wanted)
    assert {row.video.partition("s3://")[2].split("/")[0] for row in rows} == {"clips"}
    assert load_job(out).status().rows == NUM_CLIPS

    name = next(name for name in out.names() if name.startswith("captions-"))
    before = out.read(name)
    out.remove(name)
    with pytest.raises(ValueError, match="2 caption shards, no whole job"):
        list(read_captions(out.name))
    assert job(model, inputs, out.name).shards_skipped == 2
    assert out.read(name) == before
    with pytest.raises(ValueError, match="is a job on other clips: 2 removed"):
        job(model, inputs[:1], out.name)
