"""Attention on CUDA devices by cuDNN, as `jax.nn.dot_product_attention` calls it.

cuDNN keeps residuals of its own between forward and backward, so these functions stand for whole ops.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from . import attention_xla

DTYPES = (jnp.bfloat16, jnp.float16)
ODD_LENGTHS = jax.__version_info__ >= (0, 12)  # JAX before that refuses them where gradients are wanted


@functools.cache
def is_here() -> bool:
    """cuDNN asks for its version when a program is traced, so a process without a CUDA device cannot trace it."""
    try:
        return any(device.platform == "gpu" and "cuda" in device.client.platform_version for device in jax.devices())
    except RuntimeError:
        return False


@functools.cache
def max_head_dim() -> int:
    """256 from Hopper on."""
    capabilities = [device.compute_capability for device in jax.devices()] if is_here() else []
    return 256 if capabilities and all(float(capability) >= 9 for capability in capabilities) else 128


def refusal(q: Array) -> str | None:
    """The reason, in words, why cuDNN does not take this; None if it does."""
    if q.dtype not in DTYPES:
        return f"takes bfloat16 and float16, not {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > max_head_dim():
        return f"takes head dims that are multiples of 8 up to {max_head_dim()}, not {q.shape[3]}"
    return None


def refusal_of_options(q: Array, k: Array, options: dict[str, Any]) -> str | None:
    """The same for `attention.attention` with its options."""
    if reason := refusal(q):
        return reason
    for name in ("bias", "distance_bias", "softcap", "prefix_lengths"):
        if options[name] is not None:
            return f"does not take {name}"
    if not isinstance(options["q_offset"], int) or options["q_offset"] != 0:
        return "takes no q_offset"
    if options["causal"] and q.shape[1] != k.shape[1]:
        return f"takes causal with as many queries as keys, not {q.shape[1]} and {k.shape[1]}"
    if options["window"] is not None and (not options["causal"] or options["kv_lengths"] is not None):
        return "takes a window with causal and without kv_lengths only"
    return None


def _call(q: Array, k: Array, v: Array, *, kv_lengths: Array | None = None, **options: Any) -> Array:
    call = functools.partial(jax.nn.dot_product_attention, implementation="cudnn", **options)
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    if ODD_LENGTHS or not (queries % 2 or keys % 2):
        return call(q, k, v, key_value_seq_lengths=kv_lengths)
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    kv_lengths = jnp.full(batch, keys, jnp.int32) if kv_lengths is None else kv_lengths
    query_lengths = jnp.full(batch, queries, jnp.int32)
    return call(q, k, v, query_seq_lengths=query_lengths, key_value_seq_lengths=kv_lengths)[:, :queries]


def space_time(q: Array, k: Array, v: Array, *, frames: int, mode: str, class_tokens: int, scale: float) -> Array:
    """[B, S, N, D]; see `attention.space_time_attention`. Groups are the batch of one call; the class token's one query
    takes plain products."""
    if mode == "joint":
        return _call(q, k, v, scale=scale)
    split, with_class = attention_xla.grouping(q.shape, frames, mode, class_tokens)
    out = attention_xla.whole(_call(split(q), with_class(k), with_class(v), scale=scale), q.shape[0], frames, mode)
    if not class_tokens:
        return out
    return jnp.concatenate([out, attention_xla.dense(q[:, -1:], k, v, scale)], axis=1)


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool,
    kv_lengths: Array | None,
    window: int | None,
    scale: float,
    **_: Any,
) -> Array:
    """q [B, S, N, D], k and v [B, K, Nkv, D]; see `attention.attention`."""
    reach = None if window is None else (window - 1, 0)
    options: dict[str, Any] = {"scale": scale, "is_causal": causal, "local_window_size": reach}
    if kv_lengths is None:
        return _call(q, k, v, **options)
    # With no key valid cuDNN does not give zeros, so such a row attends to its first key, and is cleared.
    lengths = kv_lengths.astype(jnp.int32)
    out = _call(q, k, v, kv_lengths=jnp.maximum(lengths, 1), **options)
    return jnp.where((lengths > 0)[:, None, None, None], out, 0)
