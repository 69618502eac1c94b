"""Captions clips with a video-language model: one row a clip, several samples a row, shards that can be resumed.

A clip's captions depend on the clip, its key and the job's seed: not on its neighbours in the batch, nor on which
process captioned it, nor on what was killed before. Every batch of a job has one shape, and none reaches over two
shards, so that this holds to the last bit.
"""

from __future__ import annotations

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
from pyvdl.config import ClipConfig
from pyvdl.data import Record
from pyvdl.generate import Samples, generate
from pyvdl.jobs import carried
from pyvdl.models.vlm import VLM
from pyvdl.progress import Report
from pyvdl.rows import CaptionRow
from pyvdl.sharding import BATCH_AXES, batch_sharding, host_pieces, put, tree_shardings
from pyvdl.text import CAPTION_PROMPT
from pyvdl.tokenizers import Tokenizer
from pyvdl.video import ClipRequest

_MAX_PROMPT_TOKENS = 256


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
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> np.ndarray:
    """int32[N, L] with L as short as the longest prompt allows: one shape for the set, whatever the batches."""
    ids = tokenizer.encode_prompts(prompts, _MAX_PROMPT_TOKENS)
    return ids[:, : max(1, int((ids != tokenizer.pad_id).sum(1).max(initial=0)))]


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Frames of some records; rows past the last record are padding."""

    records: Sequence[Record]
    data: np.ndarray  # uint8[B, T, H, W, 3]
    errors: Sequence[str | None]  # one for each record; None: it has frames
    release: Callable[[], None] = lambda: None  # says that `data` is not needed any more


class Captioner:
    """A model ready to caption: what it is told, how it draws, and on which devices of this process.

    The captions are drawn with nucleus sampling (`temperature` 0 is greedy), `num_samples` of at most `max_length`
    tokens. mesh: of devices of this process; the model and each batch are split over it.
    """

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
    ) -> None:
        if clip.size != model.config.vision.image_size:
            raise ValueError(f"clip size {clip.size}: this model reads {model.config.vision.image_size} pixels")
        self.clip, self.prompt, self.seed, self.batch_size = clip, prompt, seed, batch_size
        self.tokens = 0  # drawn so far
        self.model, self._tokenizer, self._mesh = model, tokenizer, mesh
        self.drawing: dict[str, Any] = {"num_samples": num_samples, "max_length": max_length}
        self.drawing |= {"temperature": temperature, "top_p": top_p}
        ids = encode_prompts(tokenizer, [prompt])
        self.prompts = np.broadcast_to(ids, (batch_size, ids.shape[1]))
        if mesh is not None:
            shares = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
            if batch_size % shares:
                raise ValueError(f"batch_size={batch_size}: expected a multiple of the {shares} shares of this mesh")
            graphdef, state = nnx.split(model)
            placed = jax.tree.map(partial(put, copy=False), state, tree_shardings(state, mesh))
            self.model = nnx.merge(graphdef, placed)

    def recipe(self) -> dict[str, Any]:
        """All that the captions depend on besides the clips; the batch size in their last bits."""
        asked = {"prompt": self.prompt, "seed": self.seed, "batch_size": self.batch_size} | self.drawing
        model = model_digest(self.model, self._tokenizer)
        return {"model_sha256": model, "clip": dataclasses.asdict(self.clip)} | asked

    def rows(self, batches: Iterable[Decoded], **names: str) -> Iterator[list[CaptionRow]]:
        """The rows of each batch. One batch turns into text while the device works on the next.

        names: what else is said in each row, model_sha256 and recipe_sha256.
        """
        previous: tuple[Decoded, Samples | None] | None = None
        for batch in batches:
            # A batch without one good clip costs no device time.
            samples = self._draw(batch) if None in batch.errors else None
            if previous is not None:  # dispatch is asynchronous
                yield self._told(*previous, names)
            previous = batch, samples
        if previous is not None:
            yield self._told(*previous, names)

    def _draw(self, batch: Decoded) -> Samples:
        seeds = np.zeros(self.batch_size, np.uint32)
        seeds[: len(batch.records)] = [clip_seed(record, self.seed) for record in batch.records]
        if self._mesh is None:
            return generate(self.model, batch.data, self.prompts, seeds=seeds, **self.drawing)
        with jax.set_mesh(self._mesh):
            frames = jax.device_put(batch.data, batch_sharding(self._mesh))
            return generate(self.model, frames, self.prompts, seeds=seeds, **self.drawing)

    def _told(self, batch: Decoded, samples: Samples | None, names: dict[str, str]) -> list[CaptionRow]:
        rows = []
        if samples is not None:
            tokens, log_probs, lengths = (np.asarray(array) for array in samples)
        batch.release()
        for i, record in enumerate(batch.records):
            captions: list[str] = []
            scores: list[float] = []
            if batch.errors[i] is None:
                captions = [self._tokenizer.decode(ids) for ids in tokens[i]]
                scores = [float(value) for value in log_probs[i]]
                self.tokens += int(lengths[i].sum())
            rows.append(
                CaptionRow(
                    key=record.key,
                    video=record.video,
                    start_seconds=record.start_seconds,
                    end_seconds=record.end_seconds,
                    captions=captions,
                    log_probs=scores,
                    prompt=self.prompt,
                    status="ok" if batch.errors[i] is None else "failed",
                    error=batch.errors[i],
                    seed=clip_seed(record, self.seed),
                    extra=carried(record),
                    **names,
                )
            )
        return rows


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
    batches = clip_batches(
        records, clip=clip, batch_size=captioner.batch_size, num_threads=num_threads, prefetch=prefetch
    )
    done = 0

    def decoded() -> Iterator[Decoded]:
        for batch in batches:
            found = [records[i] for i in batch.index if i >= 0]
            yield Decoded(records=found, data=batch.data, errors=batch.errors[: len(found)])

    with closing(batches):
        for rows in captioner.rows(decoded()):
            done += len(rows)
            if progress is not None:
                progress(done, len(records))
            yield from rows


def model_digest(model: nnx.Module, tokenizer: Tokenizer) -> str:
    """Names a model by its weights and words, wherever it was loaded from."""
    digest = hashlib.sha256(tokenizer.digest().encode())
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        array = value[...]
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        for piece in host_pieces(array):
            digest.update(np.ascontiguousarray(piece).view(np.uint8).data)
    return digest.hexdigest()
