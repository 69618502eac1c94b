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

from pyvdl.config import DualEncoderConfig, TextTowerConfig, ViTConfig

from .layers import Block, Mlp, Stack, attention
from .vit import ViT

MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's bound


class TextTower(nnx.Module):
    """Transformer pooled at the first end id or, with `config.pool` "last", at the last token."""

    def __init__(self, config: TextTowerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype = jnp.dtype(config.dtype)
        normal = nnx.initializers.normal
        self.embedding = nnx.Param(normal(0.02)(rngs.params(), (config.vocab_size, config.width)))
        self.position = nnx.Param(normal(0.01)(rngs.params(), (config.context_length, config.width)))
        self.blocks = Stack(lambda rngs: Block(config, rngs=rngs), config.depth, remat=config.remat, rngs=rngs)
        self.norm = nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)

    def __call__(self, ids: Array) -> Array:
        """int32[B, L], L at most the context length, each row with an end id where that is pooled -> [B, E]."""
        length = ids.shape[1]
        if length > self.config.context_length:
            raise ValueError(
                f"text of {length} tokens: at most context_length = {self.config.context_length} are allowed"
            )
        x = (self.embedding[ids] + self.position[...][:length]).astype(self.config.dtype)
        x = self.blocks(x, functools.partial(attention, causal=self.config.causal))
        if self.config.pool == "last":
            return self.norm(x[:, -1])
        end = jnp.argmax(ids == self.config.end_id, axis=1)
        return self.norm(jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0])


class AttentionPool(nnx.Module):
    """One learned query looks at all tokens, a multi-layer perceptron follows (SigLIP's MAP head)."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype = jnp.dtype(config.dtype)
        init = nnx.initializers.xavier_uniform()
        self.probe = nnx.Param(init(rngs.params(), (1, config.width))[0])
        linear = functools.partial(nnx.Linear, config.width, kernel_init=init, dtype=dtype, rngs=rngs)
        self.query, self.key_value, self.out = linear(config.width), linear(2 * config.width), linear(config.width)
        self.norm = nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(config.width, config.mlp_dim, activation=config.activation, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[B, S, E] -> [B, E]."""
        batch, tokens, width = x.shape
        heads = (self.config.num_heads, self.config.head_dim)
        q = self.query(self.probe[...].astype(x.dtype)).reshape(1, 1, *heads)
        kv = self.key_value(x).reshape(batch, tokens, 2, *heads)
        mixed = attention(jnp.broadcast_to(q, (batch, 1, *heads)), kv[:, :, 0], kv[:, :, 1])
        pooled = self.out(mixed.reshape(batch, width))
        return pooled + self.mlp(self.norm(pooled))


class DualEncoder(nnx.Module):
    """Video tower and text tower into one space; embeddings are float32 of unit length."""

    def __init__(self, config: DualEncoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.vision = ViT(config.vision, rngs=rngs)
        self.text = TextTower(config.text, rngs=rngs)
        if config.pool == "map":
            self.pool = AttentionPool(config.vision, rngs=rngs)
        project = functools.partial(nnx.Linear, out_features=config.embed_dim, rngs=rngs)
        if config.vision_projection:
            self.vision_projection = project(config.vision.width, use_bias=False, dtype=jnp.dtype(config.vision.dtype))
        self.text_projection = project(
            config.text.width, use_bias=config.text_projection_bias, dtype=jnp.dtype(config.text.dtype)
        )
        sigmoid = config.kind == "sigmoid"
        self.logit_scale = nnx.Param(jnp.asarray(math.log(10 if sigmoid else 1 / 0.07), jnp.float32))
        if sigmoid:
            self.logit_bias = nnx.Param(jnp.asarray(-10.0, jnp.float32))  # SigLIP, section 3.2

    def encode_video(self, video: Array) -> Array:
        """uint8[B, T, H, W, 3] -> float32[B, E]. T = vision.num_frames.

        Of a model of single images T is free: the embedding is the mean of the frames' own, of unit length again.
        """
        frames = self.config.vision.num_frames
        if video.ndim != 5 or (frames > 1 and video.shape[1] != frames):
            wanted = "T" if frames == 1 else frames
            raise ValueError(f"video must be uint8[B, {wanted}, H, W, 3], not {video.dtype}{video.shape}")
        if frames > 1:
            return self._pooled(video)
        batch, count = video.shape[:2]
        embeddings = self._pooled(video.reshape(batch * count, *video.shape[2:]))
        return embeddings if count == 1 else _normalise(embeddings.reshape(batch, count, -1).mean(axis=1))

    def _pooled(self, video: Array) -> Array:
        tokens = self.vision(video)
        match self.config.pool:
            case "class":
                pooled = tokens[:, -1]
            case "mean":
                pooled = tokens.mean(axis=1)
            case _:
                pooled = self.pool(tokens)
        return _normalise(self.vision_projection(pooled) if self.config.vision_projection else pooled)

    def encode_text(self, text: Array) -> Array:
        """int32[B, L] -> float32[B, E]."""
        return _normalise(self.text_projection(self.text(text)))

    def __call__(self, video: Array, text: Array) -> tuple[Array, Array, Array, Array | None]:
        """-> video float32[B, E], text float32[B, E], the scale of their products, and the bias of sigmoid models."""
        raw = self.logit_scale[...]
        if self.config.kind == "sigmoid":
            return self.encode_video(video), self.encode_text(text), jnp.exp(raw), self.logit_bias[...]
        # CLIP's bound holds for the value only: a gradient cut at the bound would hold the scale there for good.
        over = nnx.relu(raw - MAX_LOGIT_SCALE)
        return self.encode_video(video), self.encode_text(text), jnp.exp(raw - jax.lax.stop_gradient(over)), None


def inflate(
    image_model: DualEncoder,
    num_frames: int,
    *,
    rngs: nnx.Rngs,
    temporal: Literal["zero", "random"] = "random",
    attention: Literal["joint", "divided", "factorised"] = "joint",
) -> DualEncoder:
    """A video dual encoder of `num_frames` with the image model's weights and a new temporal embedding.

    "random" is the paper's start. The class token, where there is one, sees `num_frames` times the patches that it saw
    in the image model, so that even with "zero" a repeated frame does not get exactly the image model's embedding.
    attention: see `ViT`. What "divided" adds over time starts from the weights over space and gives zeros at first.
    """
    if image_model.config.vision.num_frames != 1:
        raise ValueError(
            f"inflate wants vision.num_frames 1 (an image model), not {image_model.config.vision.num_frames}"
        )
    if temporal not in ("zero", "random"):
        raise ValueError(f"temporal must be 'zero' or 'random', not {temporal!r}")
    vision = dataclasses.replace(image_model.config.vision, num_frames=num_frames, attention=attention)
    model = DualEncoder(dataclasses.replace(image_model.config, vision=vision), rngs=rngs)
    # Copies: training donates its model's buffers, and the image model must outlive that.
    nnx.update(model, jax.tree.map(jnp.copy, nnx.state(image_model)))
    if num_frames > 1:
        # A random start is of the size of the image model's own position embedding, whatever its scale.
        drawn = model.vision.temporal[...]
        spread = jnp.std(model.vision.position[...]) / jnp.std(drawn)
        model.vision.temporal[...] = jnp.zeros_like(drawn) if temporal == "zero" else spread * drawn
        if attention == "divided":
            block = model.vision.blocks.blocks
            for part in ("norm", "qkv"):
                nnx.update(getattr(block.time, part), jax.tree.map(jnp.copy, nnx.state(getattr(block.mixer, part))))
    return model


def _normalise(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
