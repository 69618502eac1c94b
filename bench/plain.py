"""The dual encoder as one would write it with Flax's own layers and a loss that stores the score matrix: blocks in
`nnx.scan`, each computed again for the backward pass (scores of all tokens would not fit otherwise), none of pyvdl's
kernels. What `bench.end_to_end step` holds pyvdl's steps against."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from pyvdl.config import DualEncoderConfig, TextTowerConfig, ViTConfig


class PlainBlock(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ViTConfig | TextTowerConfig, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(config.dtype)
        self.norm1 = nnx.LayerNorm(config.width, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(config.num_heads, config.width, dtype=dtype, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(config.width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(config.width, config.mlp_dim, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(config.mlp_dim, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class PlainStack(nnx.Module):
    """Blocks one after the other."""

    def __init__(self, config: ViTConfig | TextTowerConfig, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs: nnx.Rngs) -> PlainBlock:
            return PlainBlock(config, rngs)

        self.blocks = create(rngs)

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def forward(block: PlainBlock, x: Array) -> Array:
            return block(x, mask)

        return forward(self.blocks, x)


class PlainDualEncoder(nnx.Module):
    """Joint space-time attention over all patches and a class token; a causal text tower pooled at its last token."""

    def __init__(self, config: DualEncoderConfig, *, rngs: nnx.Rngs) -> None:
        vision, text = config.vision, config.text
        dtype, normal = jnp.dtype(vision.dtype), nnx.initializers.normal(0.02)
        size = vision.patch_size
        self.patch = nnx.Conv(3, vision.width, (size, size), (size, size), dtype=dtype, rngs=rngs)
        tokens = vision.num_frames * vision.num_patches
        self.position = nnx.Param(normal(rngs.params(), (tokens, vision.width)))
        self.class_token = nnx.Param(normal(rngs.params(), (1, vision.width)))
        self.vision = PlainStack(vision, rngs)
        self.vision_norm = nnx.LayerNorm(vision.width, dtype=dtype, rngs=rngs)
        self.vision_projection = nnx.Linear(vision.width, config.embed_dim, dtype=dtype, rngs=rngs)
        self.embedding = nnx.Embed(text.vocab_size, text.width, dtype=dtype, rngs=rngs)
        self.text_position = nnx.Param(normal(rngs.params(), (text.context_length, text.width)))
        self.text = PlainStack(text, rngs)
        self.text_norm = nnx.LayerNorm(text.width, dtype=dtype, rngs=rngs)
        self.text_projection = nnx.Linear(text.width, config.embed_dim, dtype=dtype, rngs=rngs)
        self.scale = nnx.Param(jnp.asarray(2.66))

    def __call__(self, video: Array, text: Array) -> tuple[Array, Array]:
        """uint8[B, T, H, W, 3], int32[B, L] -> two float32[B, E] of unit length."""
        batch, frames = video.shape[:2]
        pixels = video.reshape(batch * frames, *video.shape[2:]).astype(jnp.bfloat16) / 127.5 - 1
        x = self.patch(pixels).reshape(batch, -1, self.patch.out_features)
        x = x + self.position[...].astype(x.dtype)
        first = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (batch, 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1)
        x = self.vision(x)
        y = self.embedding(text) + self.text_position[...].astype(x.dtype)
        mask = nnx.make_causal_mask(text)
        y = self.text(y, mask)
        pooled = (
            self.vision_projection(self.vision_norm(x[:, 0])),
            self.text_projection(self.text_norm(y[:, -1])),
        )
        wide = (z.astype(jnp.float32) for z in pooled)
        of_video, of_text = (z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in wide)
        return of_video, of_text


def plain_loss(model: Any, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """CLIP's loss, both directions."""
    video, text = model(batch["video"], batch["text"])
    scores = jnp.exp(model.scale[...]) * video @ text.T
    labels = jnp.arange(len(scores))
    losses = [optax.softmax_cross_entropy_with_integer_labels(x, labels).mean() for x in (scores, scores.T)]
    return sum(losses) / 2, {}
