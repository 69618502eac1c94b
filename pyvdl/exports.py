"""A finished job in the formats of others, one file or folder inside the job's own."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pyvdl.archives import Sample, write_archive
from pyvdl.data import Record
from pyvdl.jobs import Job, load_job
from pyvdl.rows import CaptionRow, RowKind
from pyvdl.sources import VIDEO_SUFFIXES, FileSlice, Source, is_url, read_whole
from pyvdl.storage import Folder, write_arrays, write_whole

_MAX_BYTES = 4 << 30  # of one video
_OF_FILES = re.compile(r"^(.*_)?file_names?(_carried)*$", re.DOTALL)  # to Hugging Face, but for what is carried


def export(out: str | os.PathLike[str], kind: str) -> Path:
    """Writes a finished job once more: returns the file or folder, whose name is that of the kind.

    Of captions, rows without any are left out; where one caption is wanted it is the likeliest one.

    "coco": captions.json, COCO's results, [{"image_id": key, "caption": text}, ...].
    "videofolder": Hugging Face's folder: links to the videos, and metadata.jsonl with all columns; a carried
        column whose name would make a file of it there, such as file_name, is file_name_carried.
    "webdataset": a tar for each shard: the video, its caption as text, and all columns as JSON. Clips that are parts
        of a video are copied with all of it.

    Of embeddings, in memory for all of them:

    "npz": embeddings.npz, a NumPy archive of keys [N], embeddings float32[N, E] (NaN where a clip failed), errors [N].
    """
    folder = Folder(out)
    if folder.local is None:
        raise ValueError(f"{folder.name}: exports are made of jobs in local folders")
    job = load_job(folder)
    kinds = _KINDS[job.kind]
    if kind not in kinds:
        raise ValueError(f"export {kind!r}: expected one of {', '.join(kinds)}")
    if missing := job.missing():
        raise ValueError(f"{folder.name} lacks {len(missing)} of {job.shards} shards: run its command again")
    return kinds[kind](job, folder.local)


def _best(row: CaptionRow) -> str:
    return row.captions[max(range(len(row.captions)), key=lambda i: row.log_probs[i])]


def _good(job: Job, shard: int) -> Iterator[tuple[Record, CaptionRow]]:
    for record, row in zip(job.work(shard), job.captions(shard), strict=True):
        if row.captions:  # neither failed nor, by filters, left without any
            yield record, row


def _coco(job: Job, out: Path) -> Path:
    def lines() -> Iterator[str]:
        before = "["
        for shard in range(job.shards):
            for _, row in _good(job, shard):
                yield before + json.dumps({"image_id": row.key, "caption": _best(row)}, ensure_ascii=False)
                before = ",\n"
        yield "]\n" if before != "[" else "[]\n"

    path = out / "captions.json"
    write_whole(path, lines())
    return path


def _videofolder(job: Job, out: Path) -> Path:
    folder = out / "videofolder"
    folder.mkdir(exist_ok=True)

    def lines() -> Iterator[str]:
        for shard in range(job.shards):
            for number, (record, row) in enumerate(_good(job, shard)):
                if is_url(record.video):
                    raise ValueError(f"{record.video}: a folder of videos takes files, not URLs or members of tars")
                name = f"{shard:05d}-{number:06d}.{_suffix(record.video)}"
                (folder / name).unlink(missing_ok=True)
                (folder / name).symlink_to(record.video)
                told = {_OF_FILES.sub(r"\g<0>_carried", n): value for n, value in json.loads(row.to_json()).items()}
                yield json.dumps({"file_name": name} | told, ensure_ascii=False) + "\n"

    write_whole(folder / "metadata.jsonl", lines())  # the last: without it the folder is none
    return folder


def _webdataset(job: Job, out: Path) -> Path:
    folder = out / "webdataset"
    folder.mkdir(exist_ok=True)
    for shard in range(job.shards):
        samples = (
            Sample(
                key=f"{shard:05d}{number:06d}",
                video=_content(record.source),
                suffix=_suffix(record.video),
                text=_best(row),
                fields=json.loads(row.to_json()),
            )
            for number, (record, row) in enumerate(_good(job, shard))
        )
        write_archive(folder / f"{shard:05d}.tar", samples)
    return folder


def _suffix(video: str) -> str:
    """Without the dot; "mp4" where it is none of videos, as at the end of a URL with a query."""
    found = Path(video.partition("::")[0]).suffix.lower()
    return found.removeprefix(".") if found in VIDEO_SUFFIXES else "mp4"


def _content(source: Source) -> bytes | str:
    """The path of a whole file, else the bytes."""
    if isinstance(source, str) and not is_url(source):
        return source
    if isinstance(source, FileSlice) and not is_url(source.path):
        with open(source.path, "rb") as file:
            file.seek(source.offset)
            return file.read(source.length)
    assert isinstance(source, str | FileSlice)
    return read_whole(source, _MAX_BYTES)


def _npz(job: Job, out: Path) -> Path:
    keys: list[str] = []
    errors: list[str] = []
    embeddings = np.empty((0, 0), np.float32)
    for shard in range(job.shards):
        names, found, failures = job.embeddings(shard)
        if not shard:  # says how wide they are
            embeddings = np.empty((job.records, found.shape[1]), np.float32)
        embeddings[len(keys) : len(keys) + len(names)] = found
        keys += names
        errors += [error or "" for error in failures]
    path = out / "embeddings.npz"
    write_arrays(path, {"keys": np.array(keys), "embeddings": embeddings, "errors": np.array(errors)})
    return path


_KINDS: dict[RowKind, dict[str, Callable[[Job, Path], Path]]] = {
    "captions": {"coco": _coco, "videofolder": _videofolder, "webdataset": _webdataset},
    "embeddings": {"npz": _npz},
}
