"""Attention on TPU by JAX's own splash kernel: long sequences of language models, without score matrices in HBM."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash

DTYPES = (jnp.bfloat16, jnp.float32)
BLOCK = 128  # the kernel takes queries and keys in multiples of it; others are padded
LEAST_SCORES = 1024 * 1024  # of a head: below, XLA is as fast, by the models there are
BLOCK_QUERIES, BLOCK_KEYS, BLOCK_COMPUTED = 512, 2048, 512  # at most; the fastest of eight in libtpu's simulator


def refusal_of_options(q: Array, k: Array, options: dict[str, Any]) -> str | None:
    """The reason, in words, why the kernel does not take this; None if it does. Options: of `attention.attention`."""
    if q.dtype not in DTYPES:
        return f"takes bfloat16 and float32, not {q.dtype}"
    if 0 in q.shape or 0 in k.shape:
        return f"takes no empty arrays, {q.shape} and {k.shape}"
    for name in ("bias", "prefix_lengths"):
        if options[name] is not None:
            return f"does not take {name}"
    if not isinstance(options["q_offset"], int):
        return "takes a q_offset that is a Python int"
    return None


def _block(length: int, limit: int) -> int:
    return next(block for block in range(min(length, limit), 0, -BLOCK) if length % block == 0)


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool,
    q_offset: int,
    kv_lengths: Array | None,
    softcap: float | None,
    window: int | None,
    scale: float,
    **_: Any,
) -> Array:
    """q [B, S, N, D], k and v [B, K, Nkv, D]; see `attention.attention`."""
    batch, wanted, heads = q.shape[:3]
    if k.shape[1] % BLOCK and kv_lengths is None:
        kv_lengths = jnp.full(batch, k.shape[1], jnp.int32)
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK), (0, 0), (0, 0))) for x in (q, k, v))
    queries, keys = q.shape[1], k.shape[1]
    mask: splash.Mask
    if window is not None:
        reach = (window - 1, 0 if causal else window - 1)
        mask = splash.LocalMask((queries, keys), reach, q_offset)
    elif causal:
        mask = splash.CausalMask((queries, keys), q_offset)
    else:
        mask = splash.FullMask((queries, keys))
    block_q, block_kv = _block(queries, BLOCK_QUERIES), _block(keys, BLOCK_KEYS)
    compute = _block(block_kv, BLOCK_COMPUTED)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_kv_compute=compute,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_kv_dkv_compute=compute,
            use_fused_bwd_kernel=True,
        ),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
    )
    q, k, v = (x.swapaxes(1, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    if kv_lengths is None:
        return jax.vmap(kernel)(q, k, v)[:, :, :wanted].swapaxes(1, 2)

    def of_row(q: Array, k: Array, v: Array, length: Array) -> Array:
        valid = (jnp.arange(keys) < length).astype(jnp.int32)
        return kernel(q, k, v, segment_ids=splash.SegmentIds(jnp.ones(queries, jnp.int32), valid))

    out = jax.vmap(of_row)(q, k, v, kv_lengths)[:, :, :wanted]
    # With no key at all the kernel gives the mean of the values.
    return jnp.where(kv_lengths[:, None, None, None] > 0, out, 0).swapaxes(1, 2)
