"""The video-language model: a per-frame vision tower, a projection, and a language model of either kind."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from pyvdl.config import T5Config, VLMConfig

from .gemma import Gemma
from .t5 import T5
from .vit import ViT


class LanguageModel(Protocol):
    """What a language model does for a VLM and for generation, whether it is an encoder-decoder or a decoder.

    The prefix (visual tokens, then the prompt) comes as tokens [B, S, E] and mask bool[B, S], False for the padding at
    the end. Its n texts share it: whatever is computed from the prefix exists once a clip.
    """

    def embed(self, ids: Array) -> Array:
        """int32[...] -> [..., E], as they stand in a prefix."""

    def forced(self, tokens: Array, mask: Array, target: Array) -> Array:
        """The prefix and given texts int32[B, n, M] -> [B, n, M, E], the states that predict each of their tokens."""

    def logits(self, x: Array) -> Array:
        """Such states [..., E] -> float32[..., V]."""

    def start(self, tokens: Array, mask: Array, num_samples: int, length: int) -> tuple[Array, Any]:
        """The prefix -> float32 logits [B, V] of the first token, and a cache for n texts of up to `length` tokens."""

    def step(self, ids: Array, cache: Any) -> tuple[Array, Any]:
        """int32[B, n], the next token of each text -> float32 logits [B, n, V] after it, and the cache with it."""

    def reorder(self, cache: Any, parents: Array) -> Any:
        """The cache in which text i of a clip goes on from its text parents[:, i]; int32[B, n]."""


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
        if config.soft_prompt:
            # Embedded words have a deviation of about 1.
            shape = (config.soft_prompt, config.language.width)
            self.soft_prompt = nnx.Param(jax.random.normal(rngs.params(), shape))
        language = config.language
        self.language: LanguageModel = (
            T5(language, rngs=rngs) if isinstance(language, T5Config) else Gemma(language, rngs=rngs)
        )

    def prefix(self, video: Array | None, prompt: Array) -> tuple[Array, Array]:
        """uint8[B, T, H, W, 3] (None: text only), int32[B, L] padded with 0 -> tokens [B, T*P + L, E], bool mask.

        With a soft prompt of K tokens, T*P + K + L.
        """
        tokens = self.language.embed(prompt)
        mask = prompt != 0
        if soft := self.config.soft_prompt:
            learned = jnp.broadcast_to(
                self.soft_prompt[...].astype(tokens.dtype), (len(tokens), soft, tokens.shape[-1])
            )
            tokens = jnp.concatenate([learned, tokens], axis=1)
            mask = jnp.pad(mask, ((0, 0), (soft, 0)), constant_values=True)
        if video is not None:
            if video.ndim != 5:
                raise ValueError(f"video must be uint8[B, T, H, W, 3], not {video.dtype}{video.shape}")
            batch, frames = video.shape[:2]
            visual = self.vision(video.reshape(batch * frames, *video.shape[2:]))[:, : self.config.vision.num_patches]
            visual = self.projection(visual.reshape(batch, frames * self.config.vision.num_patches, -1))
            tokens = jnp.concatenate([visual, tokens], axis=1)
            mask = jnp.concatenate([jnp.ones(visual.shape[:2], bool), mask], axis=1)
        return tokens, mask

    def __call__(self, video: Array | None, prompt: Array, target: Array) -> Array:
        """As `prefix`, and int32[B, M] -> float32 logits [B, M, V]; position i predicts target[:, i]."""
        states = self.language.forced(*self.prefix(video, prompt), target[:, None])
        return self.language.logits(states[:, 0])


def with_soft_prompt(model: VLM, length: int, *, rngs: nnx.Rngs) -> VLM:
    """The model with a new soft prompt of `length` tokens for prompt tuning; its other parts are taken, not copied."""
    if model.config.soft_prompt:
        raise ValueError(f"the model has a soft prompt of {model.config.soft_prompt} tokens already")
    config = dataclasses.replace(model.config, soft_prompt=length)
    made = nnx.eval_shape(lambda: VLM(config, rngs=nnx.Rngs(0)))
    made.soft_prompt = nnx.Param(jax.random.normal(rngs.params(), (length, config.language.width)))
    made.vision, made.projection, made.language = model.vision, model.projection, model.language
    return made


def assemble(vision: ViT, language: T5 | Gemma, *, num_frames: int = 8, fps: float = 2.0, rngs: nnx.Rngs) -> VLM:
    """A VLM of a tower and a language model that were trained apart, with a new projection between them.

    PaLI-3's shape: `assemble(siglip.vision, ul2, rngs=...)`. The parts are taken as they are, not copied.
    """
    config = VLMConfig(vision=vision.config, language=language.config, num_frames=num_frames, fps=fps)
    model = nnx.eval_shape(lambda: VLM(config, rngs=nnx.Rngs(0)))
    dtype = jnp.dtype(language.config.dtype)
    model.projection = nnx.Linear(vision.config.width, language.config.width, dtype=dtype, rngs=rngs)
    model.vision, model.language = vision, language
    return model
