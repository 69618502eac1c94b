"""Attention as XLA runs it: dense products, and space-time attention with the residuals that all platforms share."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

ATTENTION_RESIDUALS = "attention"  # what policies of `jax.checkpoint` know output and statistics by


def dense(
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


def _scores(q: Array, k: Array, scale: float) -> Array:
    """[B, N, S, K], float32 or wider, scaled."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    if q.dtype == wide:  # no rounding to fear: scaling q spares a pass over the scores
        return jnp.einsum("bqnd,bknd->bnqk", q * scale, k)
    return jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=wide) * scale


def _dense_forward(q: Array, k: Array, v: Array, scale: float) -> tuple[Array, Array]:
    """The output and the logarithms of the rows' sums, [B, N, S], float32 or wider."""
    scores = _scores(q, k, scale)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bnqk,bknd->bqnd", weights.astype(v.dtype), v, preferred_element_type=scores.dtype)
    out = (out / total[..., 0].swapaxes(1, 2)[..., None]).astype(v.dtype)
    return out, (top + jnp.log(total))[..., 0]


def _dense_backward(
    q: Array, k: Array, v: Array, out: Array, lse: Array, do: Array, scale: float
) -> tuple[Array, Array, Array]:
    """Gradients of q, k, v, float32 or wider, from probabilities computed again."""
    wide = lse.dtype
    weights = jnp.exp(_scores(q, k, scale) - lse[..., None])
    change = jnp.einsum("bqnd,bknd->bnqk", do, v, preferred_element_type=wide)
    mean = jnp.einsum("bqnd,bqnd->bnq", do, out, preferred_element_type=wide)
    change = (weights * (change - mean[..., None])).astype(q.dtype)
    dq = jnp.einsum("bnqk,bknd->bqnd", change, k, preferred_element_type=wide) * scale
    dk = jnp.einsum("bnqk,bqnd->bknd", change, q, preferred_element_type=wide) * scale
    dv = jnp.einsum("bnqk,bqnd->bknd", weights.astype(q.dtype), do, preferred_element_type=wide)
    return dq, dk, dv


def grouping(
    shape: tuple[int, ...], frames: int, mode: str, class_tokens: int
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Functions of [B, S, N, D]: the patch tokens as [B * groups, group size, N, D]; the same with the class token."""
    batch, tokens, heads, _ = shape
    patches = (tokens - class_tokens) // frames

    def split(x: Array) -> Array:
        x = x[:, : frames * patches].reshape(batch, frames, patches, heads, x.shape[3])
        if mode == "time":
            x = x.swapaxes(1, 2)
        return x.reshape(-1, *x.shape[2:])

    def with_class(x: Array) -> Array:
        grouped = split(x)
        if not class_tokens:
            return grouped
        last = jnp.repeat(x[:, -1:], grouped.shape[0] // batch, axis=0)
        return jnp.concatenate([grouped, last], axis=1)

    return split, with_class


def whole(x: Array, batch: int, frames: int, mode: str) -> Array:
    """[B * groups, group size, N, D] back to [B, T*P, N, D]."""
    x = x.reshape(batch, -1, *x.shape[1:])
    if mode == "time":
        x = x.swapaxes(1, 2)
    return x.reshape(batch, -1, *x.shape[3:])


def space_time(q: Array, k: Array, v: Array, *, frames: int, mode: str, class_tokens: int, scale: float) -> Array:
    """The output, with gradients as XLA derives them: faster where no other implementation shares the residuals."""
    if mode == "joint":
        return dense(q, k, v, scale)
    split, with_class = grouping(q.shape, frames, mode, class_tokens)
    out = whole(dense(split(q), with_class(k), with_class(v), scale), q.shape[0], frames, mode)
    if not class_tokens:
        return out
    return jnp.concatenate([out, dense(q[:, -1:], k, v, scale)], axis=1)


def forward(
    q: Array, k: Array, v: Array, *, frames: int, mode: str, class_tokens: int, scale: float
) -> tuple[Array, Array]:
    """The output [B, S, N, D] and the logarithms of the rows' sums, [B, N, S], float32 or wider.

    Groups become the batch of one dense attention, so the work is that of the groups and no mask is needed.
    """
    if mode == "joint":
        return _dense_forward(q, k, v, scale)
    split, with_class = grouping(q.shape, frames, mode, class_tokens)
    out, lse = _dense_forward(split(q), with_class(k), with_class(v), scale)
    out = whole(out, q.shape[0], frames, mode)
    lse = whole(lse.swapaxes(1, 2)[..., None], q.shape[0], frames, mode)[..., 0].swapaxes(1, 2)
    if not class_tokens:
        return out, lse
    out_of_class, lse_of_class = _dense_forward(q[:, -1:], k, v, scale)
    return jnp.concatenate([out, out_of_class], 1), jnp.concatenate([lse, lse_of_class], 2)


def backward(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    do: Array,
    *,
    frames: int,
    mode: str,
    class_tokens: int,
    scale: float,
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v for the gradient `do` of `out`; out and lse as `forward` gives them."""
    if mode == "joint":
        dq, dk, dv = _dense_backward(q, k, v, out, lse, do, scale)
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
    split, with_class = grouping(q.shape, frames, mode, class_tokens)
    (keys, to_keys), (values, to_values) = (jax.vjp(with_class, x.astype(lse.dtype)) for x in (k, v))
    split_lse = split(lse.swapaxes(1, 2)[..., None])[..., 0].swapaxes(1, 2)
    dq, dk, dv = _dense_backward(
        split(q), keys.astype(k.dtype), values.astype(v.dtype), split(out), split_lse, split(do), scale
    )
    dq, (dk,), (dv,) = whole(dq, q.shape[0], frames, mode), to_keys(dk), to_values(dv)
    if class_tokens:
        more = _dense_backward(q[:, -1:], k, v, out[:, -1:], lse[..., -1:], do[:, -1:], scale)
        dq, dk, dv = jnp.concatenate([dq, more[0]], 1), dk + more[1], dv + more[2]
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
