"""Vision transformer over single frames or, with joint space-time attention, over clips."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from flax import nnx
from jax import Array

from pyvdl.config import ViTConfig

from .layers import Block, Stack, space_time_attention


def patchify(frames: Array, patch_size: int) -> Array:
    """[B, H, W, 3] -> [B, P, patch_size * patch_size * 3], patches in reading order."""
    batch, height, width, channels = frames.shape
    rows, columns = height // patch_size, width // patch_size
    x = frames.reshape(batch, rows, patch_size, columns, patch_size * channels)
    return x.swapaxes(2, 3).reshape(batch, rows * columns, patch_size * patch_size * channels)


class ViT(nnx.Module):
    """Pre-norm vision transformer; the class token, where there is one, stands last.

    With `config.num_frames` above 1, all patches of all frames attend to each other, and a temporal embedding is added
    to the spatial one; the class token has no place in space or time.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype = jnp.dtype(config.dtype)
        normal = nnx.initializers.normal
        self.patch = nnx.Linear(3 * config.patch_size**2, config.width, dtype=dtype, rngs=rngs)
        # Patch embeddings start with a deviation of about 1. Places that started at the usual 0.02 would drown in them,
        # and a short training would never learn where things are, let alone that they move.
        self.position = nnx.Param(normal(1.0)(rngs.params(), (config.num_patches, config.width)))
        if config.num_frames > 1:
            self.temporal = nnx.Param(normal(1.0)(rngs.params(), (config.num_frames, config.width)))
        if config.class_token:
            self.class_token = nnx.Param(normal(0.02)(rngs.params(), (config.width,)))
        make = functools.partial(Block, config.width, config.num_heads, config.mlp_dim, dtype=dtype)
        self.blocks = Stack(lambda rngs: make(rngs=rngs), config.depth, remat=config.remat, rngs=rngs)
        self.norm = nnx.LayerNorm(config.width, epsilon=1e-6, dtype=dtype, rngs=rngs)

    def __call__(self, video: Array) -> Array:
        """uint8[B, H, W, 3] (one frame) or uint8[B, T, H, W, 3] -> [B, T * P + class tokens, E]."""
        config = self.config
        size, frames = config.image_size, config.num_frames
        wanted = (size, size, 3) if frames == 1 else (frames, size, size, 3)
        if video.shape[1:] != wanted or video.dtype != jnp.uint8:
            raise ValueError(f"video must be uint8[B, {', '.join(map(str, wanted))}], not {video.dtype}{video.shape}")
        batch, dtype = video.shape[0], jnp.dtype(config.dtype)
        pixels = patchify(video.reshape(batch * frames, size, size, 3), config.patch_size)
        x = self.patch(pixels.astype(dtype) / 127.5 - 1)
        embedding = self.position[...]
        if frames > 1:
            embedding = (self.temporal[...][:, None] + embedding).reshape(frames * config.num_patches, config.width)
        x = x.reshape(batch, frames * config.num_patches, config.width) + embedding.astype(dtype)
        if config.class_token:
            last = jnp.broadcast_to(self.class_token[...].astype(dtype), (batch, 1, config.width))
            x = jnp.concatenate([x, last], axis=1)
        attend = functools.partial(space_time_attention, frames=frames, class_tokens=int(config.class_token))
        return self.norm(self.blocks(x, attend))
