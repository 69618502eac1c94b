"""Gemma 1 and 2 as the decoder of a prefix language model (PaliGemma).

RMSNorm with weights around 1, rotary positions, few key heads, gated MLP, the embedding as the head. Tokens of a prefix
all see each other; those of the text after it see the prefix and what stands before them. Positions start at 1. A row's
padding, at the end of its prefix, takes no position, and nobody attends to it.

In a model with `config.window`, layers 0, 2, 4, ... let a token of the text see only what is nearer than the window;
within the prefix it does not count. transformers does the same, big_vision has no window at all: they differ where
prefix and text together are longer than the window.

The texts of a clip share its prefix: its keys and values exist once, and attention over prefix and text is one softmax
over two products, not one product over a concatenation that each text would need for itself.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from pyvdl.config import GemmaConfig

from .layers import Stack, attention, take_samples, valid_lengths

Rotation = tuple[Array, Array]  # cosines and sines, float32[..., 1, D / 2]


class RMSNorm(nnx.Module):
    """Root-mean-square norm times 1 + `scale`, in float32."""

    def __init__(self, width: int, epsilon: float) -> None:
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * (1 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


def rotation(positions: Array, head_dim: int, theta: float) -> Rotation:
    """Angles of the pairs of a head at int32[...] positions."""
    # In float32 from the start, as published code computes them: at a position of thousands the rounding of a
    # frequency shows in the angle.
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = np.float32(1) / np.float32(theta) ** exponent
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, turn: Rotation) -> Array:
    """x [..., N, D]: entry i turns with entry i + D / 2."""
    cos, sin = turn
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def shared_prefix_attention(
    q: Array,
    prefix: tuple[Array, Array],
    suffix: tuple[Array, Array],
    *,
    prefix_lengths: Array,
    start: int | Array,
    scale: float,
    softcap: float | None,
    window: Array | None,
) -> Array:
    """Attention of each text over the prefix it shares with the others of its clip, and over its own tokens.

    Args:
        q: [B, n, S, N, D], the tokens at places `start` to start + S - 1 of the texts.
        prefix: keys and values, [B, Nkv, K, D] each.
        suffix: keys and values of the texts, [B, n, Nkv, M, D] each; a token sees those at its place and before.
        prefix_lengths: int32[B], the number of valid keys of the prefix.
        start: int or int32[].
        scale, softcap: as in `pyvdl.kernels.attention`.
        window: int32[], keys nearer than this are seen; None: all.

    Returns:
        [B, n, S, N, D].
    """
    batch, samples, count, heads, head_dim = q.shape
    kv_heads, prefix_keys = prefix[0].shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # The texts and the queries that share a key head are the rows of one product with the prefix: b batch, g key heads,
    # n texts, s places, r query heads of a key head.
    q = q.reshape(batch, samples, count, kv_heads, heads // kv_heads, head_dim)
    place = (start + jnp.arange(count))[:, None]
    key, own_key = jnp.arange(prefix_keys), jnp.arange(suffix[0].shape[3])
    lengths = prefix_lengths[:, None, None]
    seen, own_seen = key < lengths, own_key <= place  # [B, 1, K] and [S, M]
    if window is not None:
        seen &= key > lengths + place - window  # [B, S, K]
        own_seen &= own_key > place - window

    def scores(product: str, keys: Array, allowed: Array) -> Array:
        result = jnp.einsum(product, q, keys, preferred_element_type=wide) * scale
        if softcap is not None:
            result = softcap * jnp.tanh(result / softcap)
        return jnp.where(allowed, result, jnp.finfo(wide).min)  # [b, g, n, s, r, keys]

    of_prefix = scores("bnsgrd,bgkd->bgnsrk", prefix[0], seen[:, None, None, :, None])
    of_suffix = scores("bnsgrd,bngkd->bgnsrk", suffix[0], own_seen[:, None])
    top = jnp.maximum(of_prefix.max(axis=-1, keepdims=True), of_suffix.max(axis=-1, keepdims=True))
    top = jax.lax.stop_gradient(top)  # a token sees itself, so the top is a true score
    of_prefix, of_suffix = jnp.exp(of_prefix - top), jnp.exp(of_suffix - top)
    total = of_prefix.sum(axis=-1, keepdims=True) + of_suffix.sum(axis=-1, keepdims=True)

    def mixed(product: str, weights: Array, values: Array) -> Array:
        return jnp.einsum(product, weights.astype(values.dtype), values, preferred_element_type=wide)

    out = mixed("bgnsrk,bgkd->bgnsrd", of_prefix, prefix[1]) + mixed("bgnsrk,bngkd->bgnsrd", of_suffix, suffix[1])
    out = (out / total).astype(suffix[1].dtype)
    return out.transpose(0, 2, 3, 1, 4, 5).reshape(batch, samples, count, heads, head_dim)


def _dense(shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(shape[0] ** -0.5 * jax.random.normal(rngs.params(), shape))


class GemmaBlock(nnx.Module):
    """One layer, in two halves: attention itself depends on what the tokens are."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, inner = config.width, config.num_heads * config.head_dim
        self.norm_attention = RMSNorm(width, config.norm_epsilon)
        self.qkv = _dense((width, inner + 2 * config.num_kv_heads * config.head_dim), rngs)
        self.out = _dense((inner, width), rngs)
        self.norm_mlp = RMSNorm(width, config.norm_epsilon)
        self.up = _dense((width, 2 * config.mlp_dim), rngs)  # gate, then value
        self.down = _dense((config.mlp_dim, width), rngs)
        if config.post_norms:
            self.post_attention = RMSNorm(width, config.norm_epsilon)
            self.post_mlp = RMSNorm(width, config.norm_epsilon)

    def project(self, x: Array, turn: Rotation) -> tuple[Array, Array, Array]:
        """[..., E] -> q [..., N, D], k and v [..., Nkv, D]."""
        config = self.config
        ends = [config.num_heads * config.head_dim, (config.num_heads + config.num_kv_heads) * config.head_dim]
        parts = jnp.split(self.norm_attention(x) @ self.qkv[...].astype(x.dtype), ends, axis=-1)
        q, k, v = (part.reshape(*x.shape[:-1], -1, config.head_dim) for part in parts)
        return rotate(q, turn), rotate(k, turn), v

    def finish(self, x: Array, mixed: Array) -> Array:
        """The layer's input [..., E] and what attention made of it [..., N, D] -> the layer's output [..., E]."""
        config = self.config
        added = mixed.reshape(*x.shape[:-1], -1) @ self.out[...].astype(x.dtype)
        x = x + (self.post_attention(added) if config.post_norms else added)
        gate, value = jnp.split(self.norm_mlp(x) @ self.up[...].astype(x.dtype), 2, axis=-1)
        added = (nnx.gelu(gate, approximate=True) * value) @ self.down[...].astype(x.dtype)
        return x + (self.post_mlp(added) if config.post_norms else added)


class Cache(NamedTuple):
    """What decoding carries from token to token. The texts of a clip share its prefix: it is held once a clip."""

    keys: Array  # [layers, B, n, Nkv, M, D] of the tokens decoded so far
    values: Array  # [layers, B, n, Nkv, M, D]
    prefix_keys: Array  # [layers, B, Nkv, K, D]
    prefix_values: Array  # [layers, B, Nkv, K, D]
    prefix_lengths: Array  # int32[B]
    position: Array  # int32[], tokens decoded so far


class Gemma(nnx.Module):
    """Decoder over a prefix and the texts that continue it; a `LanguageModel`."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        # By width: scaled embeddings start with a deviation of 1, and so do logits.
        normal = jax.random.normal(rngs.params(), (config.vocab_size, config.width))
        self.embedding = nnx.Param(config.width**-0.5 * normal)
        self.blocks = Stack(lambda rngs: GemmaBlock(config, rngs=rngs), config.depth, remat=config.remat, rngs=rngs)
        self.norm = RMSNorm(config.width, config.norm_epsilon)

    def embed(self, ids: Array) -> Array:
        """See `LanguageModel`; scaled by sqrt(E), rounded to the activations' type as in transformers."""
        dtype = jnp.dtype(self.config.dtype)
        return self.embedding[ids].astype(dtype) * jnp.asarray(self.config.width**0.5, dtype)

    def prefill(self, tokens: Array, lengths: Array) -> tuple[Array, Array, Array]:
        """Prefix [B, K, E] of int32[B] valid tokens -> states [B, K, E], keys and values [layers, B, Nkv, K, D]."""
        turn = self._rotation(jnp.arange(tokens.shape[1]))

        def body(block: GemmaBlock, x: Array) -> tuple[Array, tuple[Array, Array]]:
            q, k, v = block.project(x, turn)
            mixed = attention(
                q, k, v, kv_lengths=lengths, softcap=self.config.attention_softcap, scale=self._query_scale
            )
            return block.finish(x, mixed), (k.swapaxes(1, 2), v.swapaxes(1, 2))

        x, (keys, values) = self.blocks.scan(body, tokens.astype(self.config.dtype))
        return self.norm(x), keys, values

    def forced(self, tokens: Array, mask: Array, target: Array) -> Array:
        """See `LanguageModel`."""
        lengths = valid_lengths(mask)
        states, keys, values = self.prefill(tokens, lengths)
        turn = self._rotation(lengths[:, None, None] + jnp.arange(target.shape[2]))

        def body(
            block: GemmaBlock, x: Array, window: Array | None, keys: Array, values: Array
        ) -> tuple[Array, None]:  # x [B, n, M, E]
            q, k, v = block.project(x, turn)
            own = k.swapaxes(2, 3), v.swapaxes(2, 3)
            return block.finish(x, self._attend(q, (keys, values), own, lengths, 0, window)), None

        # The last token predicts nothing that is asked for; with it the texts are never empty.
        x, _ = self.blocks.scan(body, self.embed(target), self._windows(keys, target.shape[2]), keys, values)
        first = jnp.broadcast_to(_last(states, lengths)[:, None, None], (*target.shape[:2], 1, x.shape[-1]))
        return jnp.concatenate([first, self.norm(x[:, :, :-1])], axis=2)

    def start(self, tokens: Array, mask: Array, num_samples: int, length: int) -> tuple[Array, Cache]:
        """See `LanguageModel`."""
        config = self.config
        lengths = valid_lengths(mask)
        states, keys, values = self.prefill(tokens, lengths)
        shape = (config.depth, tokens.shape[0], num_samples, config.num_kv_heads, length, config.head_dim)
        zeros = jnp.zeros(shape, keys.dtype)
        cache = Cache(zeros, zeros, keys, values, lengths, jnp.zeros((), jnp.int32))
        return self.logits(_last(states, lengths)), cache

    def step(self, ids: Array, cache: Cache) -> tuple[Array, Cache]:
        """See `LanguageModel`."""
        position, shape = cache.position, ids.shape
        # Products with weights take all texts as rows of one matrix: TPUs pad the last two dimensions of what they
        # store, and the texts of a clip are few.
        turn = self._rotation(jnp.repeat(cache.prefix_lengths + position, shape[1]))

        def body(
            block: GemmaBlock,
            carry: tuple[Array, Array, Array],
            layer: Array,
            window: Array | None,
            prefix_keys: Array,
            prefix_values: Array,
        ) -> tuple[tuple[Array, Array, Array], None]:
            x, keys, values = carry  # x [B * n, E]
            q, k, v = (part.reshape(*shape, 1, *part.shape[1:]) for part in block.project(x, turn))
            # The caches are carried whole and written in place, one token of one layer at a time.
            place = (layer, 0, 0, 0, position, 0)
            keys = jax.lax.dynamic_update_slice(keys, k.swapaxes(2, 3)[None], place)
            values = jax.lax.dynamic_update_slice(values, v.swapaxes(2, 3)[None], place)
            prefix, own = (prefix_keys, prefix_values), (keys[layer], values[layer])
            mixed = self._attend(q, prefix, own, cache.prefix_lengths, position, window)
            return (block.finish(x, mixed.reshape(len(x), *mixed.shape[3:])), keys, values), None

        layers = jnp.arange(self.config.depth)
        windows = self._windows(cache.prefix_keys, cache.keys.shape[4])
        carry = (self.embed(ids.reshape(-1)), cache.keys, cache.values)
        (x, keys, values), _ = self.blocks.scan(body, carry, layers, windows, cache.prefix_keys, cache.prefix_values)
        logits = self.logits(self.norm(x)).reshape(*shape, -1)
        return logits, cache._replace(keys=keys, values=values, position=position + 1)

    def reorder(self, cache: Cache, parents: Array) -> Cache:
        """See `LanguageModel`."""
        return cache._replace(keys=take_samples(cache.keys, parents), values=take_samples(cache.values, parents))

    def logits(self, x: Array) -> Array:
        """See `LanguageModel`."""
        head = self.embedding[...].astype(x.dtype)
        logits = jnp.einsum("...e,ve->...v", x, head, preferred_element_type=jnp.float32)
        cap = self.config.final_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    @property
    def _query_scale(self) -> float:
        scale = self.config.query_scale
        return self.config.head_dim**-0.5 if scale is None else scale

    def _rotation(self, places: Array) -> Rotation:
        """Of tokens at int32[...] places, counted from 0 at the beginning of the prefix."""
        return rotation(places + 1, self.config.head_dim, self.config.rope_theta)

    def _windows(self, prefix_keys: Array, length: int) -> Array | None:
        """int32[layers], the window of each; None where none is shorter than prefix and text together."""
        total = prefix_keys.shape[3] + length
        if self.config.window is None or total <= self.config.window:
            return None
        return jnp.where(jnp.arange(self.config.depth) % 2 == 0, self.config.window, total)

    def _attend(
        self,
        q: Array,
        prefix: tuple[Array, Array],
        suffix: tuple[Array, Array],
        prefix_lengths: Array,
        start: int | Array,
        window: Array | None,
    ) -> Array:
        return shared_prefix_attention(
            q,
            prefix,
            suffix,
            prefix_lengths=prefix_lengths,
            start=start,
            scale=self._query_scale,
            softcap=self.config.attention_softcap,
            window=window,
        )


def _last(states: Array, lengths: Array) -> Array:
    """[B, K, E] -> [B, E], the last valid one of each row."""
    return jnp.take_along_axis(states, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
