"""T5 v1.1 style encoder-decoder with a key-value cache for decoding.

RMSNorm before each block, gated MLP, bias on scores by relative position (shared by the layers of a side), no biases in
projections, no 1/sqrt(D) in attention (the initial scale of queries makes up for it), untied output head.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from pyvdl.config import T5Config

from .layers import ACTIVATIONS, RelativeBias, Stack, attention, products, take_samples, valid_lengths

# Deviation of the initial position biases. At T5's own width**-0.5 a short training cannot move them far enough for
# heads to look at chosen distances, and does not learn in which order things stand; checkpoints bring their own.
_BIAS_SCALE = 4.0
START_ID = 0  # of the decoder; also padding


def _dense(shape: tuple[int, ...], scale: float, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape))


def last_token_attention(q: Array, keys: Array, values: Array, bias: Array) -> Array:
    """Attention of one token of each text over the text's own tokens, whose heads lie side by side.

    q [R, N * D], keys and values [R, M, N * D], bias float32[M, N], -inf at keys that are not seen -> [R, N * D]. Sums
    over a head, and spreading a weight over one, are products with a matrix of zeros and ones: an axis of few heads and
    one of a few numbers would be padded by TPUs to several times the cache, and each head's product be one of its own.
    """
    heads, head_dim = bias.shape[1], q.shape[1] // bias.shape[1]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    member = jnp.asarray(np.repeat(np.eye(heads), head_dim, axis=0), wide)  # [N * D, N]
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("rme,en->rmn", q.astype(wide)[:, None] * keys.astype(wide), member, precision=exact) + bias
    weights = jax.nn.softmax(scores, axis=1)
    spread = jnp.einsum("rmn,en->rme", weights, member, precision=exact)
    return jnp.sum(spread * values.astype(wide), axis=1).astype(q.dtype)


class GatedMlp(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        self.activation = config.activation
        self.norm = nnx.RMSNorm(config.width, epsilon=config.norm_epsilon, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.up = _dense((config.width, 2 * config.mlp_dim), config.width**-0.5, rngs)  # gate, then value
        self.down = _dense((config.mlp_dim, config.width), config.mlp_dim**-0.5, rngs)

    def __call__(self, x: Array) -> Array:
        """[B, S, E] -> [B, S, E], without the residual."""
        gate, value = products(self.norm(x), self.up[...], 2)
        return (ACTIVATIONS[self.activation](gate) * value) @ self.down[...].astype(x.dtype)


class SelfAttention(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        width, heads, head_dim = config.width, config.num_heads, config.head_dim
        self.heads = (heads, head_dim)
        self.norm = nnx.RMSNorm(width, epsilon=config.norm_epsilon, dtype=jnp.dtype(config.dtype), rngs=rngs)
        scale = jnp.asarray([(width * head_dim) ** -0.5, width**-0.5, width**-0.5])
        qkv = jax.random.normal(rngs.params(), (width, 3, heads * head_dim)) * scale[:, None]
        self.qkv = nnx.Param(qkv.reshape(width, 3 * heads * head_dim))
        self.out = _dense((heads * head_dim, width), (heads * head_dim) ** -0.5, rngs)

    def project(self, x: Array) -> list[Array]:
        """[..., E] -> q, k, v [..., N * D]."""
        return products(self.norm(x), self.qkv[...], 3)

    def merge(self, mixed: Array) -> Array:
        """[..., N * D] -> [..., E]."""
        return mixed @ self.out[...].astype(mixed.dtype)

    def __call__(self, x: Array, **options: Any) -> Array:
        """x [B, S, E] looks at itself -> as x. options: of `attention`."""
        q, k, v = (part.reshape(*x.shape[:2], *self.heads) for part in self.project(x))
        return self.merge(attention(q, k, v, scale=1.0, **options).reshape(*x.shape[:2], -1))


class CrossAttention(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        width, heads, head_dim = config.width, config.num_heads, config.head_dim
        self.heads = (heads, head_dim)
        self.norm = nnx.RMSNorm(width, epsilon=config.norm_epsilon, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.query = _dense((width, heads * head_dim), (width * head_dim) ** -0.5, rngs)
        self.key_value = _dense((width, 2 * heads * head_dim), width**-0.5, rngs)
        self.out = _dense((heads * head_dim, width), (heads * head_dim) ** -0.5, rngs)

    def keys_values(self, memory: Array) -> tuple[Array, Array]:
        """[B, S, E] -> k, v [B, S, N, D]."""
        # One product: apart, what is kept of them would have the shape of what the encoder keeps, and XLA for TPUs
        # would fill all that with zeros first.
        keys, values = jnp.split(memory @ self.key_value[...].astype(memory.dtype), 2, axis=-1)
        return keys.reshape(*memory.shape[:2], *self.heads), values.reshape(*memory.shape[:2], *self.heads)

    def __call__(self, x: Array, keys: Array, values: Array, lengths: Array) -> Array:
        """x [B * n, ..., E] looks at keys and values [B, S, N, D], of which `lengths` int32[B] are valid -> as x."""
        # The n texts of a clip are the queries of one attention over its memory.
        q = (self.norm(x) @ self.query[...].astype(x.dtype)).reshape(keys.shape[0], -1, *self.heads)
        mixed = attention(q, keys, values, kv_lengths=lengths, scale=1.0)
        return mixed.reshape(*x.shape[:-1], -1) @ self.out[...].astype(x.dtype)


class EncoderBlock(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        self.attention = SelfAttention(config, rngs=rngs)
        self.mlp = GatedMlp(config, rngs=rngs)

    def __call__(self, x: Array, bias: Array, lengths: Array) -> Array:
        """x [B, S, E], bias float32[N, 2F + 1] by distance, `lengths` int32[B] of valid tokens -> [B, S, E]."""
        x = x + self.attention(x, distance_bias=bias, kv_lengths=lengths)
        return x + self.mlp(x)


class DecoderBlock(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        self.attention = SelfAttention(config, rngs=rngs)
        self.cross = CrossAttention(config, rngs=rngs)
        self.mlp = GatedMlp(config, rngs=rngs)

    def __call__(self, x: Array, memory: Array, bias: Array, lengths: Array) -> Array:
        """x [B * n, M, E], bias float32[N, 2F + 1], memory [B, S, E] of `lengths` int32[B] valid tokens -> as x."""
        x = x + self.attention(x, causal=True, distance_bias=bias)
        x = x + self.cross(x, *self.cross.keys_values(memory), lengths)
        return x + self.mlp(x)


class Cache(NamedTuple):
    """What decoding carries from token to token. The samples of a clip share its memory: it is held once a clip."""

    keys: Array  # [layers, B, n, M, N * D] of the tokens decoded so far
    values: Array  # [layers, B, n, M, N * D]
    memory_keys: Array  # [layers, B, S, N, D]
    memory_values: Array  # [layers, B, S, N, D]
    memory_lengths: Array  # int32[B]
    position: Array  # int32[], tokens decoded so far


class T5(nnx.Module):
    """Encoder-decoder language model; which token ends a text is the caller's business."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype = jnp.dtype(config.dtype)
        self.embedding = _dense((config.vocab_size, config.width), 1.0, rngs)
        bias = functools.partial(
            RelativeBias,
            config.num_heads,
            num_buckets=config.num_buckets,
            max_distance=config.max_distance,
            init_scale=_BIAS_SCALE,
            rngs=rngs,
        )
        norm = functools.partial(nnx.RMSNorm, config.width, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)
        self.encoder_bias = bias(causal=False)
        self.encoder = Stack(
            lambda rngs: EncoderBlock(config, rngs=rngs), config.encoder_layers, remat=config.remat, rngs=rngs
        )
        self.encoder_norm = norm()
        self.decoder_bias = bias(causal=True)
        self.decoder = Stack(
            lambda rngs: DecoderBlock(config, rngs=rngs), config.decoder_layers, remat=config.remat, rngs=rngs
        )
        self.decoder_norm = norm()
        self.head = _dense((config.width, config.vocab_size), config.width**-0.5, rngs)

    def embed(self, ids: Array) -> Array:
        """int32[...] -> [..., E]."""
        return self.embedding[ids].astype(self.config.dtype)

    def encode(self, x: Array, mask: Array) -> Array:
        """[B, S, E] and bool[B, S], True for tokens and False for the padding after them -> [B, S, E]."""
        x = x.astype(self.config.dtype)
        return self.encoder_norm(self.encoder(x, self.encoder_bias(), valid_lengths(mask)))

    def decode(self, ids: Array, memory: Array, memory_mask: Array) -> Array:
        """int32[B * n, M] already shifted right, [B, S, E], bool[B, S] -> float32 logits [B * n, M, V]."""
        return self.logits(self._decode(ids, memory, memory_mask))

    def forced(self, tokens: Array, mask: Array, target: Array) -> Array:
        """See `LanguageModel`."""
        shifted = jnp.pad(target[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=START_ID)
        x = self._decode(shifted.reshape(-1, target.shape[2]), self.encode(tokens, mask), mask)
        return x.reshape(*target.shape, -1)

    def start(self, tokens: Array, mask: Array, num_samples: int, length: int) -> tuple[Array, Cache]:
        """See `LanguageModel`."""
        cache = self.start_cache(self.encode(tokens, mask), mask, num_samples, length)
        logits, cache = self.step(jnp.full((tokens.shape[0], num_samples), START_ID, jnp.int32), cache)
        return logits[:, 0], cache

    def start_cache(self, memory: Array, memory_mask: Array, num_samples: int, length: int) -> Cache:
        """Cache for `num_samples` continuations of up to `length` tokens of each row of memory [B, S, E]."""
        config = self.config
        memory = memory.astype(config.dtype)
        kernels = self.decoder.blocks.cross.key_value[...].astype(config.dtype)
        kv = jnp.einsum("bse,leh->lbsh", memory, kernels)
        kv = kv.reshape(*kv.shape[:3], 2, config.num_heads, config.head_dim)
        memory_keys, memory_values = kv[:, :, :, 0], kv[:, :, :, 1]
        shape = (config.decoder_layers, memory.shape[0], num_samples, length, config.num_heads * config.head_dim)
        zeros = jnp.zeros(shape, config.dtype)
        return Cache(zeros, zeros, memory_keys, memory_values, valid_lengths(memory_mask), jnp.zeros((), jnp.int32))

    def step(self, ids: Array, cache: Cache) -> tuple[Array, Cache]:
        """See `LanguageModel`."""
        batch, samples = ids.shape
        position, length = cache.position, cache.keys.shape[3]
        bias = jnp.where(jnp.arange(length) <= position, self.decoder_bias.row(position, length)[0, :, 0], -jnp.inf).T

        def step(
            block: DecoderBlock,
            carry: tuple[Array, Array, Array],
            layer: Array,
            memory_keys: Array,
            memory_values: Array,
        ) -> tuple[tuple[Array, Array, Array], None]:
            x, keys, values = carry  # x [B * n, E]
            q, k, v = block.attention.project(x)
            # The caches are carried whole and written in place, one token of one layer at a time.
            place = (layer, 0, 0, position, 0)
            keys = jax.lax.dynamic_update_slice(keys, k.reshape(1, batch, samples, 1, -1), place)
            values = jax.lax.dynamic_update_slice(values, v.reshape(1, batch, samples, 1, -1), place)
            own_keys, own_values = (part[layer].reshape(batch * samples, length, -1) for part in (keys, values))
            x = x + block.attention.merge(last_token_attention(q, own_keys, own_values, bias))
            x = x + block.cross(x, memory_keys, memory_values, cache.memory_lengths)
            return (x + block.mlp(x), keys, values), None

        layers = jnp.arange(self.config.decoder_layers)
        (x, keys, values), _ = self.decoder.scan(
            step,
            (self.embed(ids.reshape(-1)), cache.keys, cache.values),
            layers,
            cache.memory_keys,
            cache.memory_values,
        )
        logits = self.logits(self.decoder_norm(x)).reshape(batch, samples, -1)
        return logits, cache._replace(keys=keys, values=values, position=position + 1)

    def reorder(self, cache: Cache, parents: Array) -> Cache:
        """See `LanguageModel`."""
        return cache._replace(keys=take_samples(cache.keys, parents), values=take_samples(cache.values, parents))

    def logits(self, x: Array) -> Array:
        """See `LanguageModel`."""
        return jnp.einsum("...e,ev->...v", x, self.head[...].astype(x.dtype), preferred_element_type=jnp.float32)

    def _decode(self, ids: Array, memory: Array, memory_mask: Array) -> Array:
        """As `decode`, the states before the head."""
        memory = memory.astype(self.config.dtype)
        return self.decoder_norm(self.decoder(self.embed(ids), memory, self.decoder_bias(), valid_lengths(memory_mask)))
