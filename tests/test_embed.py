"""Jobs of embeddings: whole shards, resumed ones, archives of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest

from pyvdl.config import ClipConfig
from pyvdl.data import Record
from pyvdl.embed import Embedder
from pyvdl.evaluate import embed_videos
from pyvdl.exports import export
from pyvdl.job_page import write_job_page
from pyvdl.jobs import load_job
from pyvdl.models.dual_encoder import DualEncoder
from pyvdl.pipeline import JobSummary, run_job
from pyvdl.rows import EmbeddingRow, read_captions, read_shard
from pyvdl.storage import Folder
from pyvdl.text import WordTokenizer
from tests.clips import write_clips
from tests.kills import stopping
from tests.models import tiny_dual_encoder

CLIP = ClipConfig(num_frames=2, sampling="uniform", short_side=32, size=32)
NUM_CLIPS, SHARD = 7, 3
BAD = 2  # its file is not a video


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return tiny_dual_encoder(WordTokenizer.from_texts(["a red ball"]), num_frames=2, image_size=32)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    paths = write_clips(tmp_path_factory.mktemp("clips"), NUM_CLIPS, BAD)
    return [Record(key=f"clip-{i}", video=str(path), extra={"views": i}) for i, path in enumerate(paths)]


@pytest.fixture(scope="module")
def load(model: DualEncoder) -> Callable[[], Embedder]:
    return lambda: Embedder(model, clip=CLIP, batch_size=2)


@pytest.fixture(scope="module")
def whole(load: Callable[[], Embedder], records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    done = run_job(load, records, out, shard_size=SHARD)
    assert done == JobSummary(rows=NUM_CLIPS, failed=1, dropped={}, shards=3, shards_skipped=0)
    return out


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("embeddings-*")}


def test_a_job_has_an_embedding_for_every_clip(model: DualEncoder, records: list[Record], whole: Path) -> None:
    wanted = embed_videos(model, records, clip=CLIP, batch_size=2)
    job = load_job(Folder(whole))
    rows = {row.key: row for name in shards(whole) for row in read_shard(job.folder, name, EmbeddingRow)}
    assert len(rows) == NUM_CLIPS
    for i, record in enumerate(records):
        row = rows[record.key]
        np.testing.assert_allclose(row.embedding, wanted[i], atol=2e-6)
        assert (row.video, row.extra) == (record.video, {"views": i})
        assert row.model_sha256 == job.recipe["model_sha256"]
        assert row.recipe_sha256 == job.recipe_sha256
        assert (row.status == "failed") == (row.error is not None) == np.isnan(row.embedding).all() == (i == BAD)
    with pytest.raises(ValueError, match="is a job of embeddings: pages are of captions"):
        write_job_page(job, whole / "page.html")
    with pytest.raises(ValueError, match=r"embeddings-0.*\.parquet: expected captions, .*, not \['embedding', "):
        list(read_captions(whole / min(shards(whole))))


def test_a_stopped_job_goes_on_and_ends_the_same_to_the_bit(
    load: Callable[[], Embedder],
    records: list[Record],
    whole: Path,
    tmp_path: Path,
) -> None:
    with stopping():
        run_job(load, records, tmp_path, shard_size=SHARD)
    assert len(shards(tmp_path)) == 1
    with pytest.raises(ValueError, match="batch_size was 2, now 4"):
        run_job(lambda: Embedder(load()._model, clip=CLIP, batch_size=4), records, tmp_path, shard_size=SHARD)
    assert run_job(load, records, tmp_path, shard_size=SHARD).shards_skipped == 1
    assert shards(tmp_path) == shards(whole)


def test_others_read_the_shards_and_the_archive(whole: Path, tmp_path: Path) -> None:
    files = [str(whole / name) for name in sorted(shards(whole))]
    found = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    with np.load(export(whole, "npz")) as arrays:
        assert list(arrays["keys"]) == found["key"][:]
        np.testing.assert_array_equal(arrays["embeddings"], np.array(found["embedding"][:], np.float32))
        assert arrays["embeddings"].dtype == np.float32
        assert [bool(error) for error in arrays["errors"]] == [key == f"clip-{BAD}" for key in found["key"]]
    with pytest.raises(ValueError, match="export 'coco': expected one of npz"):
        export(whole, "coco")
