"""Attention ops: argument checks, dispatch by implementation, and the XLA implementation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from . import reference

MODES = ("joint", "space", "time")
IMPLEMENTATIONS = ("pallas_tpu", "pallas_gpu", "cudnn", "xla", "reference")


def resolve_implementation(implementation: str | None) -> str:
    """The implementation that runs: "xla" or "reference". Raises for names that are unknown or not there yet."""
    if implementation is None:
        return "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be None or one of {IMPLEMENTATIONS}, not {implementation!r}")
    if implementation not in ("xla", "reference"):
        raise NotImplementedError(f"implementation {implementation!r} is not built yet; use 'xla' or None")
    return implementation


def _check_float(**arrays: Array) -> None:
    for name, x in arrays.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be of a floating type (bfloat16, float32), not {x.dtype}")


def _check_lengths(name: str, lengths: Array | None, batch: int) -> None:
    if lengths is None:
        return
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"{name} must be int32[{batch}] (one for each row), not {lengths.dtype}{list(lengths.shape)}")


def space_time_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    frames: int,
    mode: str = "joint",
    class_tokens: int = 1,
    scale: float | None = None,
    implementation: str | None = None,
) -> Array:
    """Attention among the tokens of a clip.

    Tokens are ordered frame by frame, then the class token if there is one: S = T*P + class_tokens. Modes: "joint",
    all tokens attend to all; "space", a patch attends to the patches of its frame; "time", a patch attends to the
    patches at its place in all frames. In "space" and "time" patches attend to the class token too, and the class
    token to all.

    Args:
        q, k, v: [B, S, N, D] of one floating type. Softmax statistics are float32.
        frames: T.
        mode: "joint", "space" or "time".
        class_tokens: 0 or 1.
        scale: of the scores; None is D ** -0.5.
        implementation: see the package docstring.

    Returns:
        [B, S, N, D] of q's type.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, not {mode!r}")
    if class_tokens not in (0, 1):
        raise ValueError(f"class_tokens must be 0 or 1, not {class_tokens!r}")
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(f"q, k and v must be of one shape [B, S, N, D], not {q.shape}, {k.shape}, {v.shape}")
    _check_float(q=q, k=k, v=v)
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q, k and v must be of one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    patches = q.shape[1] - class_tokens
    if frames < 1 or patches < frames or patches % frames:
        raise ValueError(
            f"S must be frames * patches + class_tokens with frames, patches >= 1; S is {q.shape[1]}, frames {frames}, "
            f"class_tokens {class_tokens}"
        )
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if resolve_implementation(implementation) == "reference":
        return reference.space_time_attention(q, k, v, frames=frames, mode=mode, class_tokens=class_tokens, scale=scale)
    return _space_time_xla(q, k, v, frames, mode, class_tokens, scale)


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    prefix_lengths: Array | None = None,
    q_offset: int | Array = 0,
    kv_lengths: Array | None = None,
    bias: Array | None = None,
    softcap: float | None = None,
    window: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Array:
    """Attention as language models need it. A query with no key to attend to gives zeros.

    Query i stands at position q_offset + i, key j at position j. A key is attended to when all that is given allows it.

    Args:
        q: [B, S, N, D].
        k, v: [B, K, Nkv, D]; N is a multiple of Nkv, query head n reads key head n // (N // Nkv).
        causal: keys at or before the query's position.
        prefix_lengths: int32[B]; with `causal`, the first keys that every query sees (prefix-LM).
        q_offset: int, int32[] or int32[B], the position of the first query.
        kv_lengths: int32[B], the number of valid keys.
        bias: broadcastable to [B, N, S, K], added to the scaled (and capped) scores.
        softcap: scores become softcap * tanh(scores / softcap).
        window: keys nearer than this to the query, on either side.
        scale: of the scores; None is D ** -0.5.
        implementation: see the package docstring.

    Returns:
        [B, S, N, D] of q's type.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"q must be [B, S, N, D] and k, v [B, K, Nkv, D], not {q.shape}, {k.shape}, {v.shape}")
    batch, queries, heads, head_dim = q.shape
    _, keys, kv_heads, _ = k.shape
    if k.shape[0] != batch or k.shape[3] != head_dim or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k and v must be [{batch}, K, a divisor of {heads}, {head_dim}], not {k.shape}")
    _check_float(q=q, k=k, v=v)
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q, k and v must be of one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    _check_lengths("prefix_lengths", prefix_lengths, batch)
    _check_lengths("kv_lengths", kv_lengths, batch)
    if prefix_lengths is not None and not causal:
        raise ValueError("prefix_lengths needs causal=True: without it every key is visible already")
    if isinstance(q_offset, int):
        if q_offset < 0:
            raise ValueError(f"q_offset must be at least 0, not {q_offset}")
    elif q_offset.shape not in ((), (batch,)) or not jnp.issubdtype(q_offset.dtype, jnp.integer):
        raise ValueError(f"q_offset must be an int, int32[] or int32[{batch}], not {q_offset.dtype}{q_offset.shape}")
    if bias is not None:
        wanted = (batch, heads, queries, keys)
        if bias.ndim != 4 or any(b not in (1, w) for b, w in zip(bias.shape, wanted)):
            raise ValueError(f"bias must be broadcastable to [B, N, S, K] = {wanted} and have 4 axes, not {bias.shape}")
        _check_float(bias=bias)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, not {softcap}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window}")
    scale = head_dim**-0.5 if scale is None else scale
    options: dict[str, Any] = {
        "causal": causal,
        "prefix_lengths": prefix_lengths,
        "q_offset": q_offset,
        "kv_lengths": kv_lengths,
        "bias": bias,
        "softcap": softcap,
        "window": window,
        "scale": scale,
    }
    if resolve_implementation(implementation) == "reference":
        return reference.attention(q, k, v, **options)
    return _attention_xla(q, k, v, **options)


def _dense(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    *,
    bias: Array | None = None,
    mask: Array | None = None,
    softcap: float | None = None,
) -> Array:
    """All queries against all keys; mask is bool, broadcastable to [B, N, S, K]."""
    batch, queries, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = heads != kv_heads
    wide = jnp.promote_types(q.dtype, jnp.float32)
    if grouped:
        # The queries that share a key head become rows of one product: no copy of the keys.
        group = heads // kv_heads
        q = q.reshape(batch, queries, kv_heads, group, head_dim)
        scores = jnp.einsum("bqngd,bknd->bngqk", q, k, preferred_element_type=wide)
        scores = scores.reshape(batch, heads, queries, k.shape[1])
    else:
        scores = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=wide)
    if scale != 1:
        scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if mask is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        # A finite floor keeps gradients of fully masked rows free of NaN; the mask after it makes such rows zero.
        weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(wide).min), axis=-1)
        weights = jnp.where(mask, weights, 0)
    weights = weights.astype(v.dtype)
    if grouped:
        weights = weights.reshape(batch, kv_heads, group, queries, k.shape[1])
        out = jnp.einsum("bngqk,bknd->bqngd", weights, v, preferred_element_type=wide)
        return out.reshape(batch, queries, heads, head_dim).astype(v.dtype)
    return jnp.einsum("bnqk,bknd->bqnd", weights, v, preferred_element_type=wide).astype(v.dtype)


def _attention_xla(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool,
    prefix_lengths: Array | None,
    q_offset: int | Array,
    kv_lengths: Array | None,
    bias: Array | None,
    softcap: float | None,
    window: int | None,
    scale: float,
) -> Array:
    mask = None
    if causal or window is not None or kv_lengths is not None:
        mask = reference.attention_mask(
            q.shape[0] if any(getattr(x, "ndim", 0) for x in (prefix_lengths, q_offset, kv_lengths)) else 1,
            q.shape[1],
            k.shape[1],
            causal=causal,
            prefix_lengths=prefix_lengths,
            q_offset=q_offset,
            kv_lengths=kv_lengths,
            window=window,
        )[:, None]
    return _dense(q, k, v, scale, bias=bias, mask=mask, softcap=softcap)


def _space_time_xla(q: Array, k: Array, v: Array, frames: int, mode: str, class_tokens: int, scale: float) -> Array:
    """Groups become the batch of one dense attention, so the work is that of the groups and no mask is needed."""
    if mode == "joint":
        return _dense(q, k, v, scale)
    batch, tokens, heads, head_dim = q.shape
    patches = (tokens - class_tokens) // frames

    def split(x: Array) -> Array:
        """The patch tokens, [B * groups, group size, N, D]."""
        x = x[:, : frames * patches].reshape(batch, frames, patches, heads, head_dim)
        if mode == "time":
            x = x.swapaxes(1, 2)
        return x.reshape(-1, *x.shape[2:])

    def with_class(x: Array) -> Array:
        """Each group's tokens and the class token after them."""
        grouped = split(x)
        if not class_tokens:
            return grouped
        last = jnp.repeat(x[:, -1:], grouped.shape[0] // batch, axis=0)
        return jnp.concatenate([grouped, last], axis=1)

    out = _dense(split(q), with_class(k), with_class(v), scale)
    out = out.reshape(batch, -1, *out.shape[1:])
    if mode == "time":
        out = out.swapaxes(1, 2)
    out = out.reshape(batch, frames * patches, heads, head_dim)
    if not class_tokens:
        return out
    return jnp.concatenate([out, _dense(q[:, -1:], k, v, scale)], axis=1)
