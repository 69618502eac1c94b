"""Captions clips with a video-language model: one row a clip, several samples a row, shards that can be resumed.

A clip's captions depend on the clip, its key and the job's seed: not on its neighbours in the batch, nor on which
process captioned it, nor on what was killed before. Every batch of a job has one shape, or where
prompts differ one of a few, and none reaches over two shards, so that this holds to the last bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from pyvdl.arrays import clip_loader
from pyvdl.clip_prompts import ClipPrompt, Prompts
from pyvdl.columns import carried, prompt_values
from pyvdl.config import ClipConfig
from pyvdl.data import Record
from pyvdl.filters import ClipScorer, Filters, Sample, reasons, recorded
from pyvdl.generate import Samples, bucket, check_drawing, generate
from pyvdl.models.dual_encoder import DualEncoder
from pyvdl.models.vlm import VLM
from pyvdl.progress import Report
from pyvdl.rows import CaptionRow, Dropped, RowKind
from pyvdl.sharding import BATCH_AXES, batch_sharding, host_pieces, put, tree_shardings
from pyvdl.sources import writable
from pyvdl.text import CAPTION_PROMPT
from pyvdl.tokenizers import Tokenizer
from pyvdl.video import ClipRequest


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
    requests = map(clip_request, records)
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


def clip_request(record: Record) -> ClipRequest:
    """What the decoder is asked for; all that is random follows from the record alone."""
    return ClipRequest(record.source, record.start_seconds, record.end_seconds, clip_seed(record, 0))


def clip_seed(record: Record, seed: int) -> int:
    """The uint32 seed of one clip in a job with `seed`: a stable hash of the clip's name and times."""
    name = f"{seed}\0{record.key}\0{record.start_seconds!r}\0{record.end_seconds!r}"
    return int.from_bytes(hashlib.blake2b(writable(name).encode(), digest_size=4).digest(), "little")


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Frames of some records; rows past the last record are padding."""

    records: Sequence[Record]
    data: np.ndarray  # uint8[B, T, H, W, 3]
    errors: Sequence[str | None]  # one for each record; None: it has frames
    release: Callable[[], None] = lambda: None  # says that `data` is not needed any more


def overlapped[T, R](
    batches: Iterable[Decoded], begin: Callable[[Decoded], T], end: Callable[[Decoded, T | None], R]
) -> Iterator[R]:
    """What comes of each batch: one is begun on the device before the last one is ended on the host.

    A batch without one good clip is not begun, and costs no device time.
    """
    previous: tuple[Decoded, T | None] | None = None
    for batch in batches:
        begun = begin(batch) if None in batch.errors else None
        if previous is not None:  # dispatch is asynchronous
            yield end(*previous)
        previous = batch, begun
    if previous is not None:
        yield end(*previous)


def check_shares(batch_size: int, mesh: Mesh) -> None:
    """ValueError where batches cannot be split over the mesh."""
    shares = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % shares:
        raise ValueError(f"batch_size={batch_size}: expected a multiple of the {shares} shares of this mesh")


@dataclass(frozen=True)
class _Drawn:
    """What the device works on for a batch."""

    samples: Samples
    clips: jax.Array | None  # float32[B, E] of the dual encoder, if there is one


class Captioner:
    """A model ready to caption: what it is told, how it draws, and on which devices of this process.

    prompt: `{NAME}` in it is the clip's column of that name, or its key, video, start_seconds or end_seconds; a clip
    without it is a failed row. Clips whose prompts are padded to the same length are captioned together.

    The captions are drawn with nucleus sampling (`temperature` 0 is greedy), `num_samples` of at most `max_length`
    tokens. mesh: of devices of this process; the model and each batch are split over it.

    encoder: a dual encoder and its tokenizer, for the CLIP-score of each caption. filters: which captions are kept; the
    others stand in the row's `dropped`.
    """

    kind: RowKind = "captions"

    def __init__(
        self,
        model: VLM,
        tokenizer: Tokenizer,
        *,
        clip: ClipConfig,
        prompt: str = CAPTION_PROMPT,
        num_samples: int = 1,
        max_length: int = 32,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 8,
        mesh: Mesh | None = None,
        filters: Filters | None = None,
        encoder: tuple[DualEncoder, Tokenizer] | None = None,
    ) -> None:
        if filters is not None and filters.min_clip_score is not None and encoder is None:
            raise ValueError(f"min_clip_score={filters.min_clip_score}: expected a dual encoder to score captions by")
        if clip.size != model.config.vision.image_size:
            raise ValueError(f"clip size {clip.size}: this model reads {model.config.vision.image_size} pixels")
        self.clip, self.seed, self.batch_size = clip, seed, batch_size
        self.tokens = 0  # drawn so far
        self.model, self._tokenizer, self._mesh = model, tokenizer, mesh
        self.drawing: dict[str, Any] = {"num_samples": num_samples, "max_length": max_length}
        self.drawing |= {"temperature": temperature, "top_p": top_p}
        check_drawing(**self.drawing)
        self._prompts = Prompts(tokenizer, prompt)
        if mesh is not None:
            check_shares(batch_size, mesh)
            graphdef, state = nnx.split(model)
            placed = jax.tree.map(partial(put, copy=False), state, tree_shardings(state, mesh))
            self.model = nnx.merge(graphdef, placed)
        self._filters = filters
        self._scorer = None if encoder is None else ClipScorer(*encoder, mesh=mesh)

    def recipe(self) -> dict[str, Any]:
        """All that the captions depend on besides the clips; the batch size in their last bits."""
        asked = {"prompt": self._prompts.template, "seed": self.seed, "batch_size": self.batch_size} | self.drawing
        asked |= {"model_sha256": model_digest(self.model, self._tokenizer), "clip": dataclasses.asdict(self.clip)}
        if self._filters is not None:
            asked["filters"] = recorded(self._filters)
        if self._scorer is not None:
            asked["clip_score_sha256"] = model_digest(self._scorer.model, self._scorer.tokenizer)
        return asked

    def groups(self, records: Sequence[Record]) -> list[list[int]]:
        """Which of `records` may be in one batch: those whose prompts are padded to the same length."""
        if not self._prompts.columns:
            return [list(range(len(records)))]
        found: dict[int, list[int]] = {}
        for i, record in enumerate(records):
            found.setdefault(bucket(len(self._prompt(record).ids)), []).append(i)
        return [found[length] for length in sorted(found)]

    def prompts(self, records: Sequence[Record]) -> np.ndarray:
        """int32[batch_size, L]: what the model is told beside each clip of a batch, and the rows that fill it up."""
        ids = [self._prompt(record).ids for record in records]
        told = np.zeros((self.batch_size, max(map(len, ids))), np.int32)
        for row, found in zip(told, ids):
            row[: len(found)] = found
        told[len(ids) :] = told[0]
        return told

    def rows(self, batches: Iterable[Decoded], **names: str) -> Iterator[list[CaptionRow]]:
        """The rows of each batch. One batch turns into text while the device works on the next.

        names: what else is said in each row, model_sha256 and recipe_sha256.
        """
        return overlapped(map(self._asked, batches), self._draw, lambda batch, drawn: self._told(batch, drawn, names))

    def _asked(self, batch: Decoded) -> Decoded:
        """With the errors of prompts."""
        if not self._prompts.columns:
            return batch
        errors = [error or self._prompt(record).error for record, error in zip(batch.records, batch.errors)]
        return dataclasses.replace(batch, errors=errors)

    def _prompt(self, record: Record) -> ClipPrompt:
        return self._prompts.of(prompt_values(record) if self._prompts.columns else {})

    def _draw(self, batch: Decoded) -> _Drawn:
        seeds = np.zeros(self.batch_size, np.uint32)
        seeds[: len(batch.records)] = [clip_seed(record, self.seed) for record in batch.records]
        frames: np.ndarray | jax.Array = batch.data
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            if self._mesh is not None:
                frames = jax.device_put(frames, batch_sharding(self._mesh))
            samples = generate(self.model, frames, self.prompts(batch.records), seeds=seeds, **self.drawing)
        return _Drawn(samples, None if self._scorer is None else self._scorer.embed(frames))

    def _told(self, batch: Decoded, drawn: _Drawn | None, names: dict[str, str]) -> list[CaptionRow]:
        clips = [[] for _ in batch.records] if drawn is None else self._samples(batch, drawn)
        batch.release()
        rows = []
        for record, error, samples in zip(batch.records, batch.errors, clips):
            why = [None] * len(samples) if self._filters is None else reasons(samples, self._filters)
            kept = [sample for sample, reason in zip(samples, why) if reason is None]
            scores = [sample.clip_score for sample in kept if sample.clip_score is not None]
            rows.append(
                CaptionRow(
                    key=record.key,
                    video=record.video,
                    start_seconds=record.start_seconds,
                    end_seconds=record.end_seconds,
                    captions=[sample.text for sample in kept],
                    log_probs=[sample.log_prob for sample in kept],
                    prompt=self._prompt(record).text,
                    status="ok" if error is None else "failed",
                    error=error,
                    seed=clip_seed(record, self.seed),
                    clip_scores=None if self._scorer is None else scores,
                    dropped=None if self._filters is None else list(_dropped(samples, why)),
                    extra=carried(record),
                    **names,
                )
            )
        return rows

    def _samples(self, batch: Decoded, drawn: _Drawn) -> list[list[Sample]]:
        """What was drawn for each record of a batch; nothing for those without frames."""
        tokens, log_probs, lengths = (np.asarray(array) for array in drawn.samples)
        good = [i for i, error in enumerate(batch.errors) if error is None]
        texts = [[""] * tokens.shape[1] for _ in range(self.batch_size)]  # of all rows: one shape is compiled
        for i in good:
            texts[i] = [self._tokenizer.decode(ids) for ids in tokens[i]]
        scores = None
        if self._scorer is not None and drawn.clips is not None:
            scores = self._scorer.scores(drawn.clips, texts)
        found: list[list[Sample]] = [[] for _ in batch.records]
        for i in good:
            self.tokens += int(lengths[i].sum())
            for n, text in enumerate(texts[i]):
                score = None if scores is None else float(scores[i, n])
                found[i].append(Sample(text, float(log_probs[i, n]), int(lengths[i, n]), score))
        return found


def _dropped(samples: Sequence[Sample], why: Sequence[str | None]) -> Iterator[Dropped]:
    for sample, reason in zip(samples, why):
        if reason is not None:
            yield {
                "caption": sample.text,
                "log_prob": sample.log_prob,
                "clip_score": sample.clip_score,
                "reason": reason,
            }


def caption_records(
    model: VLM,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    *,
    clip: ClipConfig,
    batch_size: int = 8,
    num_threads: int = 2,
    prefetch: int = 2,
    progress: Report | None = None,
    **options: Any,
) -> Generator[CaptionRow]:
    """Yields one row for each record, in order; a clip that cannot be decoded is a row with status "failed".

    `options` are those of `Captioner`. The next batch decodes and the last one turns into text while the device works.
    """
    if not records:
        return
    captioner = Captioner(model, tokenizer, clip=clip, batch_size=min(batch_size, len(records)), **options)
    waiting: dict[int, CaptionRow] = {}  # for those before them
    done = told = 0
    for group in captioner.groups(records):
        own = [records[i] for i in group]
        places = iter(group)
        batches = clip_batches(
            own, clip=clip, batch_size=captioner.batch_size, num_threads=num_threads, prefetch=prefetch
        )
        with closing(batches):
            for rows in captioner.rows(_decoded(own, batches)):
                for row in rows:
                    waiting[next(places)] = row
                done += len(rows)
                if progress is not None:
                    progress(done, len(records))
                while told in waiting:
                    yield waiting.pop(told)
                    told += 1


def _decoded(records: Sequence[Record], batches: Iterable[ClipRows]) -> Iterator[Decoded]:
    for batch in batches:
        found = [records[i] for i in batch.index if i >= 0]
        yield Decoded(records=found, data=batch.data, errors=batch.errors[: len(found)])


def model_digest(model: nnx.Module, tokenizer: Tokenizer | None) -> str:
    """Names a model by its weights and words, if it is used with words, wherever it was loaded from."""
    digest = hashlib.sha256(b"" if tokenizer is None else tokenizer.digest().encode())
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        array = value[...]
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        for piece in host_pieces(array):
            digest.update(np.ascontiguousarray(piece).view(np.uint8).data)
    return digest.hexdigest()
