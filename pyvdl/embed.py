"""Embeds clips with a dual encoder, for jobs: one row a clip.

As with captions, a clip's row does not depend on its neighbours, nor on who made it: batches of a job have one shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pyvdl.caption import Decoded, check_shares, model_digest, overlapped
from pyvdl.columns import carried
from pyvdl.config import ClipConfig
from pyvdl.data import Record
from pyvdl.filters import ClipEncoder
from pyvdl.models.dual_encoder import DualEncoder
from pyvdl.rows import EmbeddingRow, RowKind


class Embedder:
    """A dual encoder ready to embed clips, on which devices of this process: what `Captioner` is for captions.

    A model of images gives the mean of its embeddings of a clip's frames, of length 1. mesh: of devices of this
    process; the model and each batch are split over it.
    """

    kind: RowKind = "embeddings"
    tokens = 0  # drawn so far

    def __init__(self, model: DualEncoder, *, clip: ClipConfig, batch_size: int = 8, mesh: Mesh | None = None) -> None:
        if mesh is not None:
            check_shares(batch_size, mesh)
        self.clip, self.batch_size = clip, batch_size
        self._model = model
        self._encoder = ClipEncoder(model, mesh=mesh)

    def recipe(self) -> dict[str, Any]:
        """All that the embeddings depend on besides the clips; the batch size in their last bits."""
        clip = dataclasses.asdict(self.clip)
        return {"model_sha256": model_digest(self._model, None), "clip": clip, "batch_size": self.batch_size}

    def groups(self, records: Sequence[Record]) -> list[list[int]]:
        """Which of `records` may be in one batch: all."""
        return [list(range(len(records)))]

    def rows(self, batches: Iterable[Decoded], **names: str) -> Iterator[list[EmbeddingRow]]:
        """The rows of each batch. names: what else is said in each row, model_sha256 and recipe_sha256."""
        return overlapped(batches, lambda batch: self._encoder.embed(batch.data), partial(self._told, names=names))

    def _told(self, batch: Decoded, found: jax.Array | None, *, names: dict[str, str]) -> list[EmbeddingRow]:
        shape = (self.batch_size, self._model.config.embed_dim)
        embeddings = np.full(shape, np.nan, np.float32) if found is None else np.array(found, np.float32)
        batch.release()
        rows = []
        for record, error, embedding in zip(batch.records, batch.errors, embeddings):
            if error is not None:
                embedding[:] = np.nan
            rows.append(
                EmbeddingRow(
                    key=record.key,
                    video=record.video,
                    start_seconds=record.start_seconds,
                    end_seconds=record.end_seconds,
                    status="ok" if error is None else "failed",
                    error=error,
                    embedding=embedding,
                    extra=carried(record),
                    **names,
                )
            )
        return rows
