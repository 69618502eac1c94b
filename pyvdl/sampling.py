"""What may come next in a text: cuts and bans on float32 logits [..., V] of the next token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def keep_top_k(logits: Array, top_k: Array | int) -> Array:
    """The logits with -inf outside the `top_k` likeliest tokens; tokens as likely as the last of them stay in."""
    weights = _weights(logits)
    least = _least(weights, jnp.ones_like(weights), jnp.full(logits.shape[:-1], top_k, weights.dtype))
    return jnp.where(weights >= least, logits, -jnp.inf)


def keep_nucleus(logits: Array, top_p: Array | float) -> Array:
    """The logits with -inf outside the smallest set of likeliest tokens whose probability reaches `top_p`.

    Tokens as likely as the least likely one of the set stay in.
    """
    weights = _weights(logits)
    least = _least(weights, weights, top_p * jnp.sum(weights, axis=-1))
    return jnp.where(weights >= least, logits, -jnp.inf)


def _weights(logits: Array) -> Array:
    """Probabilities, each by the largest one."""
    return jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))


def _least(weights: Array, counted: Array, enough: Array) -> Array:
    """weights [..., V] in [0, 1] -> [..., 1], the largest value for which the tokens at least as likely are enough:
    their `counted`, [..., V], add up to `enough`, [...]. 0 where those of all tokens do not.

    Floats from 0 to 1 are ordered as their 30 bits are. These are found three at a time, in ten passes over the
    vocabulary that add up seven sums each; sorting it takes several times as long.
    """

    def add(sums: tuple[Array, ...], more: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(map(jnp.add, sums, more))

    def narrow(i: Array, bits: Array) -> Array:
        place = 27 - 3 * i
        kept = tuple(
            jnp.where(weights >= _as_float(bits + (digit << place))[..., None], counted, 0) for digit in range(1, 8)
        )
        # One reduction of all seven, so that they share the pass.
        sums = jax.lax.reduce(kept, (jnp.zeros((), counted.dtype),) * len(kept), add, (weights.ndim - 1,))
        digit = sum((found >= enough).astype(jnp.int32) for found in sums)
        return bits + (digit << place)

    return _as_float(jax.lax.fori_loop(0, 10, narrow, jnp.zeros(weights.shape[:-1], jnp.int32)))[..., None]


def _as_float(bits: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


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
