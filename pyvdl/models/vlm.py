"""The paper's video-language model: a per-frame vision tower, a projection, and an encoder-decoder language model."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from pyvdl.config import VLMConfig

from .t5 import T5
from .vit import ViT


class VLM(nnx.Module):
    """Frames go through `vision` one by one; their tokens, projected, stand before the prompt (paper, section 4.1)."""

    def __init__(self, config: VLMConfig, *, rngs: nnx.Rngs) -> None:
        if config.vision.num_frames != 1:
            raise ValueError(
                f"the vision tower of a VLM encodes frames one by one: vision.num_frames must be 1, not "
                f"{config.vision.num_frames} (the clip's number of frames is VLMConfig.num_frames)"
            )
        self.config = config
        self.vision = ViT(config.vision, rngs=rngs)
        self.projection = nnx.Linear(
            config.vision.width, config.language.width, dtype=jnp.dtype(config.language.dtype), rngs=rngs
        )
        self.language = T5(config.language, rngs=rngs)

    def encode(self, video: Array | None, prompt: Array) -> tuple[Array, Array]:
        """uint8[B, T, H, W, 3] (None: text only) and int32[B, L] padded with 0 -> memory [B, T*P + L, E], bool mask."""
        tokens = self.language.embed(prompt)
        mask = prompt != 0
        if video is not None:
            if video.ndim != 5:
                raise ValueError(f"video must be uint8[B, T, H, W, 3], not {video.dtype}{video.shape}")
            batch, frames = video.shape[:2]
            visual = self.vision(video.reshape(batch * frames, *video.shape[2:]))[:, : self.config.vision.num_patches]
            visual = self.projection(visual.reshape(batch, frames * self.config.vision.num_patches, -1))
            tokens = jnp.concatenate([visual, tokens], axis=1)
            mask = jnp.concatenate([jnp.ones(visual.shape[:2], bool), mask], axis=1)
        return self.language.encode(tokens, mask), mask

    def __call__(self, video: Array | None, prompt: Array, target: Array) -> Array:
        """As `encode`, and int32[B, M] -> float32 logits [B, M, V]; position i predicts target[:, i]."""
        memory, mask = self.encode(video, prompt)
        shifted = jnp.pad(target[:, :-1], ((0, 0), (1, 0)))  # the decoder starts from id 0
        return self.language.decode(shifted, memory, mask)
