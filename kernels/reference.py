"""Plain definitions of every op: the specification that all implementations are held against.

Clarity over speed: whole score matrices, explicit masks, one device, float32 (float64 where the inputs are). Arguments
mean what the public functions in `attention.py` and `contrastive.py` say; nothing is checked here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

HIGHEST = jax.lax.Precision.HIGHEST


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _softmax(scores: Array, allowed: Array) -> Array:
    """Softmax over the last axis of the allowed scores; a row with nothing allowed is all zeros."""
    scores = jnp.where(allowed, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(allowed, jnp.exp(scores - jnp.where(jnp.isneginf(top), 0, top)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)


def space_time_mask(frames: int, patches: int, mode: str, class_tokens: int) -> Array:
    """bool[S, S]: may the row's token attend to the column's. Patches stand frame by frame, the class token last."""
    index = jnp.arange(frames * patches)
    if mode == "joint":
        group = jnp.zeros_like(index)
    elif mode == "space":
        group = index // patches
    else:
        group = index % patches
    mask = group[:, None] == group[None, :]
    return jnp.pad(mask, (0, class_tokens), constant_values=True)


def space_time_attention(
    q: Array, k: Array, v: Array, *, frames: int, mode: str = "joint", class_tokens: int = 1, scale: float
) -> Array:
    """[B, S, N, D] each; see `attention.space_time_attention`."""
    patches = (q.shape[1] - class_tokens) // frames
    mask = space_time_mask(frames, patches, mode, class_tokens)
    scores = jnp.einsum("bqnd,bknd->bnqk", _wide(q), _wide(k), precision=HIGHEST) * scale
    return jnp.einsum("bnqk,bknd->bqnd", _softmax(scores, mask), _wide(v), precision=HIGHEST).astype(q.dtype)


def attention_mask(
    batch: int,
    queries: int,
    keys: int,
    *,
    causal: bool,
    prefix_lengths: Array | None,
    q_offset: int | Array,
    kv_lengths: Array | None,
    window: int | None,
) -> Array:
    """bool[B, S, K]: may the query attend to the key."""
    position = jnp.broadcast_to(jnp.asarray(q_offset), (batch,))[:, None, None] + jnp.arange(queries)[None, :, None]
    key = jnp.arange(keys)[None, None, :]
    mask = jnp.ones((batch, queries, keys), bool)
    if causal:
        visible = key <= position
        if prefix_lengths is not None:
            visible |= key < prefix_lengths[:, None, None]
        mask &= visible
    if window is not None:
        mask &= (key > position - window) & (key < position + window)
    if kv_lengths is not None:
        mask &= key < kv_lengths[:, None, None]
    return mask


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
    distance_bias: Array | None = None,
    softcap: float | None = None,
    window: int | None = None,
    scale: float,
) -> Array:
    """q [B, S, N, D]; k, v [B, K, Nkv, D]; see `attention.attention`."""
    groups = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(_wide(k), groups, axis=2), jnp.repeat(_wide(v), groups, axis=2)
    scores = jnp.einsum("bqnd,bknd->bnqk", _wide(q), k, precision=HIGHEST) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if distance_bias is not None:
        far = distance_bias.shape[1] // 2
        distance = jnp.arange(k.shape[1]) - jnp.arange(q.shape[1])[:, None]
        scores = scores + distance_bias[:, jnp.clip(distance, -far, far) + far]
    mask = attention_mask(
        q.shape[0],
        q.shape[1],
        k.shape[1],
        causal=causal,
        prefix_lengths=prefix_lengths,
        q_offset=q_offset,
        kv_lengths=kv_lengths,
        window=window,
    )
    weights = _softmax(scores, mask[:, None])
    return jnp.einsum("bnqk,bknd->bqnd", weights, v, precision=HIGHEST).astype(q.dtype)


def contrastive_loss(
    video: Array, text: Array, scale: Array, bias: Array, *, kind: str = "softmax", groups: Array | None = None
) -> Array:
    """video, text [B, E]; see `contrastive.contrastive_loss`. All rows are here: there is no `axis_name`."""
    batch = video.shape[0]
    logits = jnp.einsum("ie,je->ij", _wide(video), _wide(text), precision=HIGHEST) * scale + bias
    positive = jnp.eye(batch, dtype=bool)
    allowed = jnp.ones((batch, batch), bool) if groups is None else (groups[:, None] != groups[None, :]) | positive
    if kind == "sigmoid":
        terms = -jax.nn.log_sigmoid(jnp.where(positive, logits, -logits))
        loss = jnp.sum(jnp.where(allowed, terms, 0)) / batch
    else:
        masked = jnp.where(allowed, logits, -jnp.inf)
        rows = jax.nn.logsumexp(masked, axis=1)
        columns = jax.nn.logsumexp(masked, axis=0)
        loss = jnp.mean((rows + columns) / 2 - jnp.diagonal(logits))
    checked = jnp.sum(_wide(video)) + jnp.sum(_wide(text)) + scale + bias
    return jnp.where(jnp.isfinite(checked), loss, jnp.nan)
