"""Which captions of a clip are kept, and why the others are not.

All follows from the clip's own captions, their log-probabilities and its own frames: neighbours play no part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from pyvdl.models.dual_encoder import DualEncoder
from pyvdl.sharding import batch_sharding, put, tree_shardings
from pyvdl.text import split_words
from pyvdl.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What a caption must reach to be kept; None asks for nothing. They are applied in this order.

    The better of two captions is the one with the higher CLIP-score where there are such, else with the higher mean
    log-probability; of equal ones the one drawn first.
    """

    min_log_prob: float | None = None  # mean over the tokens and the end: a long caption is not worse for its length
    max_repetition: float | None = None  # share of its bigrams that stood in the caption before
    min_clip_score: float | None = None  # cosine of clip and caption
    max_overlap: float | None = None  # of its bigrams with those of a better caption that is kept (Jaccard index)
    keep_best: int | None = None

    def __post_init__(self) -> None:
        if self.min_log_prob is not None and not -math.inf < self.min_log_prob <= 0:
            raise ValueError(f"min_log_prob must be finite and at most 0, not {self.min_log_prob}")
        for name in ("max_repetition", "max_overlap"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {value}")
        if self.min_clip_score is not None and not -1 <= self.min_clip_score <= 1:
            raise ValueError(f"min_clip_score must be a cosine, from -1 to 1, not {self.min_clip_score}")
        if self.keep_best is not None and self.keep_best < 1:
            raise ValueError(f"keep_best must be at least 1, not {self.keep_best}")


@dataclass(frozen=True)
class Sample:
    """A caption as it was drawn."""

    text: str
    log_prob: float  # natural log, summed over the tokens and the end
    tokens: int  # the end included
    clip_score: float | None = None

    @property
    def mean_log_prob(self) -> float:
        return self.log_prob / self.tokens


def reasons(samples: Sequence[Sample], filters: Filters) -> list[str | None]:
    """Of each sample of a clip the first filter that drops it, by name; None: it is kept."""
    found: list[str | None] = [_own_reason(sample, filters) for sample in samples]

    def worth(i: int) -> tuple[float, int]:
        score = samples[i].clip_score
        return -(samples[i].mean_log_prob if score is None else score), i

    ranked = sorted((i for i, reason in enumerate(found) if reason is None), key=worth)
    kept: list[set[tuple[str, str]]] = []
    for i in ranked:
        pairs = set(_bigrams(["", *split_words(samples[i].text), ""]))  # so that one word, or none, has bigrams too
        if filters.max_overlap is not None and any(_jaccard(pairs, other) > filters.max_overlap for other in kept):
            found[i] = "max_overlap"
        elif filters.keep_best is not None and len(kept) == filters.keep_best:
            found[i] = "keep_best"
        else:
            kept.append(pairs)
    return found


def repetition(text: str) -> float:
    """The share of a text's bigrams (of lower-case words and marks) that stood in it before."""
    pairs = _bigrams(split_words(text))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def _own_reason(sample: Sample, filters: Filters) -> str | None:
    if filters.min_log_prob is not None and sample.mean_log_prob < filters.min_log_prob:
        return "min_log_prob"
    if filters.max_repetition is not None and repetition(sample.text) > filters.max_repetition:
        return "max_repetition"
    if filters.min_clip_score is not None:
        if sample.clip_score is None:
            raise ValueError("min_clip_score goes with a dual encoder: there is nothing else to score captions by")
        if sample.clip_score < filters.min_clip_score:
            return "min_clip_score"
    return None


def _bigrams(words: Sequence[str]) -> list[tuple[str, str]]:
    return list(itertools.pairwise(words))


def _jaccard(first: set[tuple[str, str]], second: set[tuple[str, str]]) -> float:
    return len(first & second) / len(first | second)


class ClipEncoder:
    """Embeddings of clips by a dual encoder: of T frames so many as it takes, spread evenly, and resized where it takes
    another size."""

    def __init__(self, model: DualEncoder, *, mesh: Mesh | None = None) -> None:
        self.model = model
        self._mesh = mesh
        self._graphdef, self._state = nnx.split(model)
        if mesh is not None:
            shardings = tree_shardings(self._state, mesh)
            self._state = jax.tree.map(functools.partial(put, copy=False), self._state, shardings)

    def embed(self, frames: np.ndarray | Array) -> Array:
        """uint8[B, T, H, W, 3] -> float32[B, E]. Returns at once: the device works on."""
        with self._devices():
            rows = frames if self._mesh is None else jax.device_put(frames, batch_sharding(self._mesh))
            return _embed_frames(self._state, rows, graphdef=self._graphdef)

    def _devices(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


class ClipScorer(ClipEncoder):
    """CLIP-scores of clips and captions, by a dual encoder: the plain cosine, without CLIPScore's factor of 2.5.

    It sees the frames that the captions were written from.
    """

    def __init__(self, model: DualEncoder, tokenizer: Tokenizer, *, mesh: Mesh | None = None) -> None:
        super().__init__(model, mesh=mesh)
        self.tokenizer = tokenizer

    def scores(self, clips: Array, texts: Sequence[Sequence[str]]) -> np.ndarray:
        """float32[B, n]: of the embeddings of B clips with n texts each."""
        length = self.model.config.text.context_length
        ids = self.tokenizer.encode_batch([text for row in texts for text in row], length, bos=True)
        with self._devices():
            rows = jnp.asarray(ids) if self._mesh is None else jax.device_put(ids, batch_sharding(self._mesh))
            return np.asarray(_score_texts(self._state, clips, rows, graphdef=self._graphdef))


@jax.jit(static_argnames="graphdef")
def _embed_frames(state: nnx.State, frames: Array, *, graphdef: nnx.GraphDef[DualEncoder]) -> Array:
    model = nnx.merge(graphdef, state)
    vision = model.config.vision
    batch, count, height, width, channels = frames.shape
    if vision.num_frames > 1:
        frames = frames[:, (np.arange(vision.num_frames) * 2 + 1) * count // (2 * vision.num_frames)]
    if (height, width) != (vision.image_size, vision.image_size):
        shape = (batch, frames.shape[1], vision.image_size, vision.image_size, channels)
        resized = jax.image.resize(frames.astype(jnp.float32), shape, "linear")
        frames = jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)
    return model.encode_video(frames)


@jax.jit(static_argnames="graphdef")
def _score_texts(state: nnx.State, clips: Array, ids: Array, *, graphdef: nnx.GraphDef[DualEncoder]) -> Array:
    texts = nnx.merge(graphdef, state).encode_text(ids)
    return jnp.einsum("be,bne->bn", clips, texts.reshape(len(clips), -1, texts.shape[-1]), precision="highest")


def recorded(filters: Filters) -> dict[str, float]:
    """Those that are asked for, for a job's recipe."""
    return {name: value for name, value in dataclasses.asdict(filters).items() if value is not None}
