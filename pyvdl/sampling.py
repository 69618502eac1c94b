"""What may come next in a text: cuts and bans on float32 logits [..., V] of the next token."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def keep_top_k(logits: Array, top_k: Array | int) -> Array:
    """The logits with -inf outside the `top_k` likeliest tokens; tokens as likely as the last of them stay in."""
    probs = jax.nn.softmax(logits, axis=-1)
    least = _threshold(probs, lambda kept: jnp.sum(kept, axis=-1, keepdims=True) >= top_k)
    return jnp.where(probs >= least, logits, -jnp.inf)


def keep_nucleus(logits: Array, top_p: Array | float) -> Array:
    """The logits with -inf outside the smallest set of likeliest tokens whose probability reaches `top_p`.

    Tokens as likely as the least likely one of the set stay in.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    least = _threshold(probs, lambda kept: jnp.sum(jnp.where(kept, probs, 0), axis=-1, keepdims=True) >= top_p)
    return jnp.where(probs >= least, logits, -jnp.inf)


def _threshold(probs: Array, enough: Callable[[Array], Array]) -> Array:
    """[..., V] -> [..., 1], the largest value for which the tokens at least as likely, bool[..., V], are enough.

    0 where all tokens together are not. Found by halving: the bits of floats from 0 to 1 are ordered as the floats are,
    so 31 passes over the vocabulary find it exactly, where sorting the vocabulary takes several times as long.
    """
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # enough at low, not enough at high
        middle = low + (high - low) // 2
        is_enough = enough(bits >= middle)
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

    low = jnp.zeros((*probs.shape[:-1], 1), jnp.int32)
    high = jnp.full_like(low, jnp.iinfo(jnp.int32).max)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def ban_repeats(logits: Array, tokens: Array, length: Array, ngram: int) -> Array:
    """The logits with -inf for tokens that would make an n-gram of `ngram` tokens which the text has already.

    logits: [B, n, V]. tokens: int32[B, n, M], of which the first `length`, int32[], are the texts so far.
    """
    windows = tokens.shape[2] - ngram + 1
    if windows < 1:
        return logits
    # The last ngram - 1 tokens; where there are not as many yet, no window is whole either.
    start = jnp.maximum(length - (ngram - 1), 0)
    last = jax.lax.dynamic_slice_in_dim(tokens, start, ngram - 1, axis=2)
    same = jnp.arange(windows) + ngram <= length  # whole windows, then those that begin with the last tokens
    same = jnp.broadcast_to(same, (*tokens.shape[:2], windows))
    for i in range(ngram - 1):
        same &= tokens[:, :, i : i + windows] == last[:, :, i : i + 1]
    batch, text = jnp.ogrid[: tokens.shape[0], : tokens.shape[1]]
    ban = jnp.where(same, -jnp.inf, jnp.inf)
    return logits.at[batch[..., None], text[..., None], tokens[:, :, ngram - 1 :]].min(ban)


def token_log_probs(logits: Array, tokens: Array) -> Array:
    """float32[..., V] and int32[...] -> float32[...], log-probabilities of the tokens."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def is_any(tokens: Array, ids: tuple[int, ...]) -> Array:
    """bool of tokens' shape: whether a token is one of `ids`."""
    return jnp.any(tokens[..., None] == jnp.asarray(ids, tokens.dtype), axis=-1)
