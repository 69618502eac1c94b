"""Captions clips with a video-language model: one row a clip, several samples a row, shards that can be resumed.

A clip's captions depend on the clip, its key and the job's seed only: not on its neighbours in the batch, nor on where
a shard or a restart cut the list.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx

from pyvdl.arrays import clip_loader
from pyvdl.config import ClipConfig
from pyvdl.data import Record
from pyvdl.generate import Samples, generate
from pyvdl.models.vlm import VLM
from pyvdl.sharding import host_pieces
from pyvdl.sources import absolute
from pyvdl.text import CAPTION_PROMPT
from pyvdl.tokenizers import Tokenizer
from pyvdl.video import ClipRequest

ProgressCallback = Callable[[int, int], None]  # (done, total), called now and then
JOB_FILE = "job.json"
_SHARD_NAME = re.compile(r"captions-(\d{5})-of-(\d{5})\.jsonl")
_MAX_PROMPT_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class CaptionRow:
    """What captioning says about one clip; `captions` is empty and `error` says why when `status` is "failed"."""

    key: str
    video: str
    start_seconds: float
    end_seconds: float | None
    captions: list[str]
    log_probs: list[float]  # natural log, summed over the tokens of a caption and its end
    prompt: str
    status: Literal["ok", "failed"]
    error: str | None
    seed: int  # of this clip's samples

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> CaptionRow:
        """Reads what `to_json` wrote; ValueError says what is missing or unknown."""
        found = json.loads(line)
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(found, dict) or set(found) != names:
            got = sorted(found) if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"expected a JSON object with {', '.join(sorted(names))}, not {got}")
        return cls(**found)


@dataclass(frozen=True, kw_only=True)
class ClipRows:
    """A decoded batch that knows its records: rows past the last record are padding, `index` -1 and not ok."""

    data: np.ndarray  # uint8[B, T, H, W, 3]
    ok: np.ndarray  # bool[B]
    index: np.ndarray  # int64[B], into the records
    errors: list[str | None]


def clip_batches(
    records: Sequence[Record], *, clip: ClipConfig, batch_size: int, num_threads: int, prefetch: int
) -> Generator[ClipRows]:
    """Decodes the clips of `records` in order, always `batch_size` rows at a time so that one shape is compiled."""
    requests = (ClipRequest(r.source, r.start_seconds, r.end_seconds, clip_seed(r, 0)) for r in records)
    loader = clip_loader(records, requests, clip, batch_size=batch_size, num_threads=num_threads, prefetch=prefetch)
    for batch in loader:
        missing = batch_size - len(batch.index)
        if not missing:
            yield ClipRows(data=batch.data, ok=batch.ok, index=batch.index, errors=list(batch.errors))
            continue
        yield ClipRows(
            data=np.concatenate([batch.data, np.zeros((missing, *batch.data.shape[1:]), np.uint8)]),
            ok=np.concatenate([batch.ok, np.zeros(missing, bool)]),
            index=np.concatenate([batch.index, np.full(missing, -1, np.int64)]),
            errors=[*batch.errors, *[None] * missing],
        )


def clip_seed(record: Record, seed: int) -> int:
    """The uint32 seed of one clip in a job with `seed`: a stable hash of the clip's name and times."""
    name = f"{seed}\0{record.key}\0{record.start_seconds!r}\0{record.end_seconds!r}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> np.ndarray:
    """int32[N, L] with L as short as the longest prompt allows: one shape for the set, whatever the batches."""
    ids = tokenizer.encode_prompts(prompts, _MAX_PROMPT_TOKENS)
    return ids[:, : max(1, int((ids != tokenizer.pad_id).sum(1).max(initial=0)))]


def caption_records(
    model: VLM,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    *,
    clip: ClipConfig,
    prompt: str = CAPTION_PROMPT,
    num_samples: int = 1,
    max_length: int = 32,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    num_threads: int = 2,
    prefetch: int = 2,
    progress: ProgressCallback | None = None,
) -> Generator[CaptionRow]:
    """Yields one row for each record, in order; a clip that cannot be decoded is a row with status "failed".

    The clip is sampled by `clip`, `num_samples` captions of at most `max_length` tokens are drawn with nucleus sampling
    (`temperature` 0 is greedy). The next batch decodes and the last one turns into text while the device works.
    """
    if not records:
        return
    _check_shape(model, clip)
    prompt_ids = encode_prompts(tokenizer, [prompt])
    batch_size = min(batch_size, len(records))

    def rows(batch: ClipRows, samples: Samples | None) -> Iterator[CaptionRow]:
        for i in np.flatnonzero(batch.index >= 0):
            record = records[batch.index[i]]
            captions: list[str] = []
            log_probs: list[float] = []
            error: str | None = batch.errors[i] or "no frames"
            if batch.ok[i] and samples is not None:
                captions = [tokenizer.decode(ids) for ids in np.asarray(samples.tokens)[i]]
                log_probs = [float(value) for value in np.asarray(samples.log_probs)[i]]
                error = None
            yield CaptionRow(
                key=record.key,
                video=record.video,
                start_seconds=record.start_seconds,
                end_seconds=record.end_seconds,
                captions=captions,
                log_probs=log_probs,
                prompt=prompt,
                status="ok" if error is None else "failed",
                error=error,
                seed=clip_seed(record, seed),
            )

    done = 0
    previous: tuple[ClipRows, Samples | None] | None = None
    batches = clip_batches(records, clip=clip, batch_size=batch_size, num_threads=num_threads, prefetch=prefetch)
    with closing(batches):
        for batch in batches:
            samples = None
            if batch.ok.any():  # a batch without one good clip costs no device time
                samples = generate(
                    model,
                    batch.data,
                    np.broadcast_to(prompt_ids, (batch_size, prompt_ids.shape[1])),
                    num_samples=num_samples,
                    max_length=max_length,
                    temperature=temperature,
                    top_p=top_p,
                    seeds=np.array([clip_seed(records[max(0, i)], seed) for i in batch.index], np.uint32),
                )
            if previous is not None:  # dispatch is asynchronous: this text is made while the device works
                yield from rows(*previous)
            previous = batch, samples
            done += int((batch.index >= 0).sum())
            if progress is not None:
                progress(done, len(records))
    if previous is not None:
        yield from rows(*previous)


def _check_shape(model: VLM, clip: ClipConfig) -> None:
    if clip.size != model.config.vision.image_size:
        raise ValueError(f"clip size {clip.size}: this model reads {model.config.vision.image_size} pixels")


@dataclass(frozen=True, kw_only=True)
class JobSummary:
    """What a captioning job left behind."""

    rows: int
    failed: int
    shards: int
    shards_skipped: int  # finished by an earlier run of the same command


def caption_job(
    model: VLM,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    out: str | os.PathLike[str],
    *,
    shard_size: int = 1000,
    progress: ProgressCallback | None = None,
    clip: ClipConfig,
    **options: Any,
) -> JobSummary:
    """Captions `records` into `out/captions-00000-of-00004.jsonl` and so on; the same call again resumes.

    A shard appears whole or not at all, a finished one is not touched again. `out/job.json` holds what was asked for:
    a call with other settings, another model or other records is refused with the difference. `options` are those of
    `caption_records`.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size}: expected at least 1")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    counts = range(0, len(records), shard_size)
    paths = [folder / f"captions-{i:05d}-of-{len(counts):05d}.jsonl" for i in range(len(counts))]
    recipe: dict[str, Any] = {"model_sha256": model_digest(model, tokenizer), "shard_size": shard_size}
    recipe |= {"records": len(records), "records_sha256": _digest(records)}
    scheduling = {"batch_size", "num_threads", "prefetch"}  # how the work runs, not what comes out
    recipe |= {"clip": dataclasses.asdict(clip)} | {k: v for k, v in options.items() if k not in scheduling}
    claim(folder / JOB_FILE, recipe)

    todo = [i for i, path in enumerate(paths) if not path.exists()]
    waiting = [record for i in todo for record in records[i * shard_size : (i + 1) * shard_size]]
    skipped = len(records) - len(waiting)
    report = None if progress is None else lambda done, total: progress(skipped + done, len(records))
    rows = caption_records(model, tokenizer, waiting, clip=clip, progress=report, **options)
    with closing(rows):
        for i in todo:
            size = len(records[i * shard_size : (i + 1) * shard_size])
            write_whole(paths[i], (next(rows).to_json() + "\n" for _ in range(size)))
    failed = sum(row.status == "failed" for path in paths for row in _read_shard(path))
    return JobSummary(rows=len(records), failed=failed, shards=len(paths), shards_skipped=len(paths) - len(todo))


def model_digest(model: nnx.Module, tokenizer: Tokenizer) -> str:
    """Names a model by its weights and words, wherever it was loaded from."""
    digest = hashlib.sha256(tokenizer.digest().encode())
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        array = value[...]
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        for piece in host_pieces(array):
            digest.update(np.ascontiguousarray(piece).view(np.uint8).data)
    return digest.hexdigest()


def _digest(records: Iterable[Record]) -> str:
    digest = hashlib.sha256()
    for r in records:
        # However the path was spelled, it is the same job. Not by content: to read millions of videos at each start
        # would take as long as the job. Links are not followed, since one may come to lead to another video.
        digest.update(json.dumps([r.key, absolute(r.video), r.start_seconds, r.end_seconds]).encode())
    return digest.hexdigest()


def claim(path: Path, recipe: dict[str, Any], how: dict[str, Any] | None = None) -> None:
    """Writes the recipe of a new job, or holds it against that of the job found there.

    `how` stands in the file, too, as it was the last time: how the work is done, which may change, and not what comes
    out.
    """
    recipe, how = json.loads(json.dumps((recipe, how or {})))  # tuples become lists, as in what is read back
    whole = [json.dumps(recipe | how, indent=1) + "\n"]
    if not path.exists():
        write_whole(path, whole)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} is damaged: nobody knows what this folder holds; choose another folder, or delete this one"
        )
    compared = {*found, *recipe} - {*how}
    changed = [name for name in sorted(compared) if found.get(name) != recipe.get(name)]
    if changed:
        differences = "; ".join(f"{name} was {found.get(name)!r}, now {recipe.get(name)!r}" for name in changed)
        raise ValueError(f"{path.parent} holds another job ({differences}); choose another folder")
    if any(found.get(name) != value for name, value in how.items()):
        write_whole(path, whole)


def write_whole(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # on several hosts processes have the same number
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_shard(path: Path) -> Iterator[CaptionRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield CaptionRow.from_json(line.decode("utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None


def read_captions(path: str | os.PathLike[str]) -> Iterator[CaptionRow]:
    """Reads one file of caption rows, or every shard of a job's folder; ValueError when shards are missing."""
    source = Path(path)
    if not source.is_dir():
        yield from _read_shard(source)
        return
    shards = {p: match for p in sorted(source.iterdir()) if (match := _SHARD_NAME.fullmatch(p.name))}
    counts = {int(match[2]) for match in shards.values()}
    if len(counts) != 1 or len(shards) != counts.pop():
        raise ValueError(f"{source} holds {len(shards)} caption shards, not a whole job: run the same command again")
    for shard in shards:
        yield from _read_shard(shard)


def captions_by_key(rows: Iterable[CaptionRow]) -> dict[str, tuple[str, ...]]:
    """The captions of each clip that was captioned; ValueError when two rows have one key."""
    found: dict[str, tuple[str, ...]] = {}
    for row in rows:
        if row.key in found:
            raise ValueError(f"key {row.key!r} has more than one row of captions")
        if row.status == "ok":
            found[row.key] = tuple(row.captions)
    return found
