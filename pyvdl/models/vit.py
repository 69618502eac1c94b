"""Vision transformer over single frames or over clips, and the resampling of its weights to other resolutions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from pyvdl.config import ViTConfig

from .layers import Block, Mixer, Stack, space_time_attention


def patchify(frames: Array, patch_size: int) -> Array:
    """[B, H, W, 3] -> [B, P, patch_size * patch_size * 3], patches in reading order.

    What is left right and below of whole patches is cut off, as by the convolution of published models: SigLIP So400m
    has patches of 14 and images of 384.
    """
    batch, height, width, channels = frames.shape
    rows, columns = height // patch_size, width // patch_size
    whole = frames[:, : rows * patch_size, : columns * patch_size]
    x = whole.reshape(batch, rows, patch_size, columns, patch_size * channels)
    return x.swapaxes(2, 3).reshape(batch, rows * columns, patch_size * patch_size * channels)


class PatchEmbedding(nnx.Module):
    """Pixels to tokens. Parameters are those of a product with normalised pixels."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        inputs = 3 * config.patch_size**2
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (inputs, config.width)))
        if config.patch_bias:
            self.bias = nnx.Param(jnp.zeros(config.width))

    def __call__(self, frames: Array) -> Array:
        """uint8[B, H, W, 3] -> [B, P, E]."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        # Normalisation is folded into the weights: the product then takes whole numbers up to 255, which bfloat16
        # holds exactly, and nothing as large as the pixels is computed before it.
        pixels = config.patch_size**2
        slope = jnp.tile(1 / (255 * jnp.asarray(config.pixel_std, jnp.float32)), pixels)
        shift = jnp.tile(jnp.asarray(config.pixel_mean, jnp.float32) / jnp.asarray(config.pixel_std), pixels)
        kernel = self.kernel[...].astype(jnp.float32)
        bias = -jnp.einsum("p,pe->e", shift, kernel, precision="highest")
        if config.patch_bias:
            bias += self.bias[...]
        x = patchify(frames, config.patch_size).astype(dtype) @ (slope[:, None] * kernel).astype(dtype)
        return x + bias.astype(dtype)


class DividedBlock(Block):
    """Attention over time, then over space, each with projections of its own (TimeSformer, "divided")."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs=rngs)
        # Starts at zero: inflated from an image model, the block then does what it did for images.
        self.time = Mixer(
            config.width,
            config.num_heads,
            norm_epsilon=config.norm_epsilon,
            zero=True,
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )

    def __call__(self, x: Array, attend: Callable[..., Array]) -> Array:
        """x [B, S, E]; `attend` takes a `mode` too."""
        x = x + self.time(x, functools.partial(attend, mode="time"))
        return super().__call__(x, functools.partial(attend, mode="space"))


def _factorised(q: Array, k: Array, v: Array, *, frames: int, class_tokens: int) -> Array:
    """Half of the heads over space, half over time (ViViT, "factorised dot-product attention")."""
    half = q.shape[2] // 2
    attend = functools.partial(space_time_attention, frames=frames, class_tokens=class_tokens)
    space = attend(q[:, :, :half], k[:, :, :half], v[:, :, :half], mode="space")
    time = attend(q[:, :, half:], k[:, :, half:], v[:, :, half:], mode="time")
    return jnp.concatenate([space, time], axis=2)


class ViT(nnx.Module):
    """Pre-norm vision transformer; the class token, where there is one, stands last.

    With `config.num_frames` above 1, a temporal embedding is added to the spatial one (the class token has no place in
    space or time), and `config.attention` tells who attends to whom: "joint", all patches of all frames to each other;
    "divided", each block over time and then over space; "factorised", half of the heads over space and half over time.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype = jnp.dtype(config.dtype)
        normal = nnx.initializers.normal
        self.patch = PatchEmbedding(config, rngs=rngs)
        # Patch embeddings start with a deviation of about 1. Places that started at the usual 0.02 would drown in them,
        # and a short training would never learn where things are, let alone that they move.
        self.position = nnx.Param(normal(1.0)(rngs.params(), (config.num_patches, config.width)))
        if config.num_frames > 1:
            self.temporal = nnx.Param(normal(1.0)(rngs.params(), (config.num_frames, config.width)))
        if config.class_token:
            self.class_token = nnx.Param(normal(0.02)(rngs.params(), (config.width,)))
        norm = functools.partial(nnx.LayerNorm, config.width, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)
        if config.pre_norm:
            self.pre_norm = norm()
        divided = config.attention == "divided" and config.num_frames > 1
        make = DividedBlock if divided else Block
        self.blocks = Stack(lambda rngs: make(config, rngs=rngs), config.depth, remat=config.remat, rngs=rngs)
        self.norm = norm()

    def __call__(self, video: Array) -> Array:
        """uint8[B, H, W, 3] (one frame) or uint8[B, T, H, W, 3] -> [B, T * P + class tokens, E]."""
        config = self.config
        size, frames = config.image_size, config.num_frames
        wanted = (size, size, 3) if frames == 1 else (frames, size, size, 3)
        if video.shape[1:] != wanted or video.dtype != jnp.uint8:
            raise ValueError(f"video must be uint8[B, {', '.join(map(str, wanted))}], not {video.dtype}{video.shape}")
        batch, dtype = video.shape[0], jnp.dtype(config.dtype)
        x = self.patch(video.reshape(batch * frames, size, size, 3))
        embedding = self.position[...]
        if frames > 1:
            embedding = (self.temporal[...][:, None] + embedding).reshape(frames * config.num_patches, config.width)
        x = x.reshape(batch, frames * config.num_patches, config.width) + embedding.astype(dtype)
        if config.class_token:
            last = jnp.broadcast_to(self.class_token[...].astype(dtype), (batch, 1, config.width))
            x = jnp.concatenate([x, last], axis=1)
        if config.pre_norm:
            x = self.pre_norm(x)
        factorised = config.attention == "factorised" and frames > 1
        attend = functools.partial(
            _factorised if factorised else space_time_attention, frames=frames, class_tokens=int(config.class_token)
        )
        return self.norm(self.blocks(x, attend))


def resample_positions(positions: np.ndarray, count: int) -> np.ndarray:
    """float32[P, E] of a square grid -> float32[count, E] of another: bicubic, as PyTorch's models do it."""
    old, new = math.isqrt(len(positions)), math.isqrt(count)
    if old**2 != len(positions) or new**2 != count:
        raise ValueError(f"{len(positions)} positions cannot become {count}: both must be squares")
    if old == new:
        return positions
    at = (np.arange(new) + 0.5) * old / new - 0.5
    matrix = np.zeros((new, old), np.float32)
    for tap in range(-1, 3):
        place = np.floor(at) + tap
        weights = _cubic(np.abs(at - place))
        np.add.at(matrix, (np.arange(new), np.clip(place, 0, old - 1).astype(int)), weights)
    grid = positions.reshape(old, old, -1).astype(np.float32)
    return np.einsum("io,jp,ope->ije", matrix, matrix, grid).reshape(count, -1)


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Cubic convolution with the parameter -0.75."""
    a, x = -0.75, distance
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    return np.where(x <= 1, near, a * (x**3 - 5 * x**2 + 8 * x - 4))


def resample_patches(kernel: np.ndarray, patch_size: int) -> np.ndarray:
    """float32[3 * old**2, E] -> float32[3 * patch_size**2, E], so that a resized patch is embedded about alike.

    The pseudo-inverse of bilinear resizing (FlexiViT, section 3.4).
    """
    old = math.isqrt(len(kernel) // 3)
    if old == patch_size:
        return kernel
    resize = np.asarray(jax.image.resize(jnp.eye(old), (patch_size, old), "linear"))
    inverse = np.linalg.pinv(resize.T)
    pixels = kernel.reshape(old, old, 3, -1).astype(np.float32)
    return np.einsum("io,jp,opce->ijce", inverse, inverse, pixels).reshape(3 * patch_size**2, -1)
