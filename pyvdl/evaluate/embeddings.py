"""What a dual encoder makes of videos, texts and names of classes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import jax
import numpy as np
from flax import nnx

from pyvdl.caption import clip_batches
from pyvdl.config import ClipConfig
from pyvdl.data import Record
from pyvdl.manifests import measured
from pyvdl.models.dual_encoder import DualEncoder
from pyvdl.progress import Report
from pyvdl.sources import is_row
from pyvdl.tokenizers import Tokenizer


@functools.cache
def _encoders() -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """The two towers, compiled once a shape and process."""
    video = nnx.jit(lambda model, frames: model.encode_video(frames))
    text = nnx.jit(lambda model, ids: model.encode_text(ids))
    return video, text


def embed_videos(
    model: DualEncoder,
    records: Sequence[Record],
    *,
    clip: ClipConfig,
    clips: int = 1,
    batch_size: int = 16,
    num_threads: int = 2,
    prefetch: int = 2,
    progress: Report | None = None,
    on_error: Callable[[Record, str], Any] | None = None,
) -> np.ndarray:
    """float32[N, E], L2-normalised; the row of a clip that cannot be decoded is NaN and `on_error` hears why.

    clips: above 1, each is cut into so many equal parts, and its row is the mean of theirs, normalised.
    """
    encode = _encoders()[0]
    parts = records if clips == 1 else _parts(records, clips)
    out = np.full((len(parts), model.config.embed_dim), np.nan, np.float32)
    batches = clip_batches(
        parts,
        clip=clip,
        batch_size=max(1, min(batch_size, len(parts))),
        num_threads=num_threads,
        prefetch=prefetch,
    )
    done = 0
    with closing(batches):
        for batch in batches:
            for row in np.flatnonzero((batch.index >= 0) & ~batch.ok):
                if on_error is not None:
                    on_error(records[batch.index[row] // clips], batch.errors[row] or "no frames")
            if batch.ok.any():
                out[batch.index[batch.ok]] = np.asarray(encode(model, batch.data))[batch.ok]
            done += int((batch.index >= 0).sum())
            if progress is not None:
                progress(done // clips, len(records))
    if clips == 1:
        return out
    mean = out.reshape(len(records), clips, -1).mean(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def _parts(records: Sequence[Record], clips: int) -> list[Record]:
    """Each clip in equal parts; of one that cannot be measured so often the whole, which will say why."""
    found = []
    for record, end in measured(records):
        if is_row(record.video):
            raise ValueError(f"{record.video} holds the frames of one clip: name the videos to have {clips} clips each")
        if end is None or end <= record.start_seconds:
            found += [record] * clips
            continue
        found += record.equal_parts(end, clips)
    return found


def embed_texts(model: DualEncoder, tokenizer: Tokenizer, texts: Sequence[str], *, batch_size: int = 64) -> np.ndarray:
    """float32[N, E], L2-normalised."""
    if isinstance(texts, str):
        raise TypeError(f"texts={texts[:80]!r} is one string: pass a list, [text] for a single one")
    encode = _encoders()[1]
    length = model.config.text.context_length
    out = np.empty((len(texts), model.config.embed_dim), np.float32)
    for start in range(0, len(texts), batch_size):
        chunk = list(texts[start : start + batch_size])
        ids = tokenizer.encode_batch(chunk + [""] * (batch_size - len(chunk)), length, bos=True)
        out[start : start + len(chunk)] = np.asarray(encode(model, ids))[: len(chunk)]
    return out


def class_embeddings(
    model: DualEncoder,
    tokenizer: Tokenizer,
    names: Sequence[str],
    templates: Sequence[str] = ("{}",),
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """float32[C, E]: for each class the mean of its normalised template embeddings, normalised again."""
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise ValueError(f"templates {wrong}: expected at least one, each with one '{{}}' for the class name")
    texts = [template.format(name) for name in names for template in templates]
    each = embed_texts(model, tokenizer, texts, batch_size=batch_size)
    mean = each.reshape(len(names), len(templates), -1).mean(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)
