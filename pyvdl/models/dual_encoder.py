"""CLIP-like video-text dual encoder, and the inflation of an image-text one to video."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from pyvdl.config import DualEncoderConfig, TextTowerConfig

from .layers import Block, Stack, attention
from .vit import ViT

END_ID = 1  # of sequence; the text is pooled here
MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's bound


class TextTower(nnx.Module):
    """Causal transformer pooled at the first end-of-sequence token."""

    def __init__(self, config: TextTowerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype = jnp.dtype(config.dtype)
        normal = nnx.initializers.normal
        self.embedding = nnx.Param(normal(0.02)(rngs.params(), (config.vocab_size, config.width)))
        self.position = nnx.Param(normal(0.01)(rngs.params(), (config.context_length, config.width)))
        make = functools.partial(Block, config.width, config.num_heads, config.mlp_dim, dtype=dtype)
        self.blocks = Stack(lambda rngs: make(rngs=rngs), config.depth, remat=config.remat, rngs=rngs)
        self.norm = nnx.LayerNorm(config.width, epsilon=1e-6, dtype=dtype, rngs=rngs)

    def __call__(self, ids: Array) -> Array:
        """int32[B, L], L at most the context length, each row with an end id -> [B, E]."""
        length = ids.shape[1]
        if length > self.config.context_length:
            raise ValueError(
                f"text of {length} tokens: at most context_length = {self.config.context_length} are allowed"
            )
        x = (self.embedding[...][ids] + self.position[...][:length]).astype(self.config.dtype)
        x = self.blocks(x, functools.partial(attention, causal=True))
        end = jnp.argmax(ids == END_ID, axis=1)
        return self.norm(jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0])


class DualEncoder(nnx.Module):
    """Video tower and text tower into one space; embeddings are float32 of unit length."""

    def __init__(self, config: DualEncoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.vision = ViT(config.vision, rngs=rngs)
        self.text = TextTower(config.text, rngs=rngs)
        project = functools.partial(nnx.Linear, out_features=config.embed_dim, use_bias=False, rngs=rngs)
        self.vision_projection = project(config.vision.width, dtype=jnp.dtype(config.vision.dtype))
        self.text_projection = project(config.text.width, dtype=jnp.dtype(config.text.dtype))
        self.logit_scale = nnx.Param(jnp.asarray(math.log(1 / 0.07), jnp.float32))

    def encode_video(self, video: Array) -> Array:
        """uint8[B, T, H, W, 3] with T = vision.num_frames -> float32[B, E]."""
        frames = self.config.vision.num_frames
        if video.ndim != 5 or video.shape[1] != frames:
            raise ValueError(f"video must be uint8[B, {frames}, H, W, 3], not {video.dtype}{video.shape}")
        tokens = self.vision(video[:, 0] if frames == 1 else video)
        pooled = tokens[:, -1] if self.config.vision.class_token else tokens.mean(axis=1)
        return _normalise(self.vision_projection(pooled))

    def encode_text(self, text: Array) -> Array:
        """int32[B, L] -> float32[B, E]."""
        return _normalise(self.text_projection(self.text(text)))

    def __call__(self, video: Array, text: Array) -> tuple[Array, Array, Array]:
        """-> video float32[B, E], text float32[B, E], and the scale of their products (at most 100)."""
        # The bound holds for the value only: a gradient that is cut at the bound would hold the scale there for good.
        raw = self.logit_scale[...]
        over = nnx.relu(raw - MAX_LOGIT_SCALE)
        return self.encode_video(video), self.encode_text(text), jnp.exp(raw - jax.lax.stop_gradient(over))


def inflate(
    image_model: DualEncoder,
    num_frames: int,
    *,
    rngs: nnx.Rngs,
    temporal: Literal["zero", "random"] = "random",
) -> DualEncoder:
    """A video dual encoder of `num_frames` with the image model's weights and a new temporal embedding.

    "random" is the paper's start. The class token, where there is one, sees `num_frames` times the patches that it saw
    in the image model, so that even with "zero" a repeated frame does not get exactly the image model's embedding.
    """
    if image_model.config.vision.num_frames != 1:
        raise ValueError(
            f"inflate wants vision.num_frames 1 (an image model), not {image_model.config.vision.num_frames}"
        )
    if temporal not in ("zero", "random"):
        raise ValueError(f"temporal must be 'zero' or 'random', not {temporal!r}")
    vision = dataclasses.replace(image_model.config.vision, num_frames=num_frames)
    model = DualEncoder(dataclasses.replace(image_model.config, vision=vision), rngs=rngs)
    # Copies: training donates its model's buffers, and the image model must outlive that.
    nnx.update(model, jax.tree.map(jnp.copy, nnx.state(image_model)))
    if num_frames > 1:
        # A random start is of the size of the image model's own position embedding, whatever its scale.
        drawn = model.vision.temporal[...]
        spread = jnp.std(model.vision.position[...]) / jnp.std(drawn)
        model.vision.temporal[...] = jnp.zeros_like(drawn) if temporal == "zero" else spread * drawn
    return model


def _normalise(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
