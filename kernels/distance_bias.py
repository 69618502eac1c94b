"""A bias on scores by the distance from query to key, as T5 has it, laid out as products want it."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

_ROWS = 128  # that are laid out one by one: windows of these begin at whole registers of a TPU


def stretch(by_distance: Array, low: int, length: int) -> Array:
    """[N, 2F + 1] -> [N, length]: the values of distances low, low + 1, ..., beyond F that of F."""
    far = by_distance.shape[1] // 2
    before, behind = max(0, -far - low), max(0, low + length - 1 - far)
    padded = jnp.pad(by_distance, ((0, 0), (before, behind)), mode="edge")
    return padded[:, low + far + before :][:, :length]


def matrix(by_distance: Array, queries: int, keys: int) -> Array:
    """[N, 2F + 1] -> [1, N, S, K]: at query i and key j the value of distance j - i, beyond F that of F.

    Up to `_ROWS` rows by rolling one vector, and the rows below are windows of these. In the backward pass that is
    sums, where indexing by a matrix would be a scatter. The vector repeated and reshaped would give the same in one
    step, which the compiler for TPUs takes minutes to lay out.
    """
    blocks = -(-queries // _ROWS)
    laid = stretch(by_distance, -blocks * _ROWS, blocks * _ROWS + keys)[:, None]
    while laid.shape[1] < min(queries, _ROWS):
        laid = jnp.concatenate([laid, jnp.roll(laid, laid.shape[1], axis=-1)], axis=1)
    windows = [laid[:, : queries - i * _ROWS, at : at + keys] for i, at in enumerate(range(blocks * _ROWS, 0, -_ROWS))]
    return jnp.concatenate(windows, axis=1)[None]
