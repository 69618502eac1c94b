"""Ranks of embeddings, a block of similarities at a time: on the device there is never more than one block."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pyvdl.metrics.retrieval import Ahead, check_offered, checked_groups

BLOCK = 4096  # queries of a block at most, and BLOCK**2 similarities of each with each: 64 MiB
_TILE = 128  # sizes of blocks are multiples: all of a block is then computed by the same instructions
_NO_QUERY, _NO_CANDIDATE = -1, -2  # groups of what fills blocks up


def count_ahead_in_blocks(
    queries: np.ndarray,
    candidates: np.ndarray,
    query_groups: Sequence[int] | np.ndarray | None = None,
    candidate_groups: Sequence[int] | np.ndarray | None = None,
    *,
    pool_candidates: bool = False,
    block: int = BLOCK,
) -> Ahead:
    """`pyvdl.metrics.count_ahead` of queries @ candidates.T, for float32[Q, E] and float32[C, E].

    A similarity comes out the same in whichever block it stands, so that equal embeddings tie. A candidate with NaN is
    behind all that have none, and a query whose right candidates all have NaN, or that has NaN itself, ranks last.
    """
    if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1]:
        raise ValueError(f"queries {queries.shape}, candidates {candidates.shape}: expected [Q, E] and [C, E]")
    wanted = checked_groups(query_groups, len(queries), "query_groups")
    offered = checked_groups(candidate_groups, len(candidates), "candidate_groups")
    check_offered(wanted, offered)
    offered, wanted = _numbered(offered, wanted)
    columns = _columns(offered, pool_candidates)
    groups = offered[columns[:, 0]]
    # In the order of their groups, queries find their right candidates in few blocks.
    order = np.argsort(wanted, kind="stable")
    width = min(_up(len(columns), _TILE), max(_TILE, block // columns.shape[1] // _TILE * _TILE))
    height = min(_up(len(order), _TILE), max(_TILE, block**2 // (width * columns.shape[1]) // _TILE * _TILE), block)
    firsts = range(0, len(columns), width)
    bounds = [(groups[i], groups[min(i + width, len(groups)) - 1]) for i in firsts]

    def compared(rows: np.ndarray, mine: np.ndarray, best: jax.Array, chosen: Iterable[int]) -> Iterator[Any]:
        """What `_compare` says of these queries and of the columns from each of `chosen` on."""
        for i in chosen:
            values = np.asarray(candidates[_filled(columns[i : i + width], width).ravel()], np.float32)
            theirs = _filled(groups[i : i + width], width, _NO_CANDIDATE)
            yield _compare(rows, values, mine, theirs, best, pooled=columns.shape[1])

    found = np.empty((3, len(queries)), np.int64)
    for start in range(0, len(order), height):
        picked = order[start : start + height]
        mine = _filled(wanted[picked], height, _NO_QUERY)
        rows = _filled(np.asarray(queries[picked], np.float32), height)
        best = jnp.full(height, -jnp.inf, jnp.float32)
        low, high = wanted[picked[0]], wanted[picked[-1]]
        own = [i for i, (first, last) in zip(firsts, bounds) if first <= high and last >= low]
        for own_best, *_ in compared(rows, mine, best, own):
            best = jnp.maximum(best, own_best)
        # The same program as before, so that a similarity is compared with itself bit by bit.
        counts: list[jax.Array] = [jnp.zeros(height, jnp.int32)] * 3
        for _, *some in compared(rows, mine, best, firsts):
            counts = [total + more for total, more in zip(counts, some)]
        found[:, picked] = np.stack(jax.device_get(counts))[:, : len(picked)]
    above, equal, right = found
    # Of a query without any similarity all candidates count as equal: it ranks last by every rule.
    last = broken(queries) | ~np.isin(wanted, offered[~broken(candidates)])
    own_columns = np.bincount(groups, minlength=int(wanted.max()) + 1)[wanted]
    above[last], equal[last], right[last] = (len(columns) - own_columns)[last], own_columns[last], own_columns[last]
    return Ahead(above, equal, right)


def broken(embeddings: np.ndarray) -> np.ndarray:
    """bool[N]: rows with NaN, without an array of the embeddings' size."""
    return np.isnan(embeddings.sum(axis=1))


@functools.partial(jax.jit, static_argnames="pooled")
def _compare(
    queries: jax.Array, candidates: jax.Array, mine: jax.Array, groups: jax.Array, best: jax.Array, *, pooled: int
) -> tuple[jax.Array, ...]:
    """Of each query: the best right similarity here, and how many are above `best`, equal to it, right among these."""
    scores = jnp.matmul(queries, candidates.T, precision=jax.lax.Precision.HIGHEST)
    scores = scores.reshape(len(queries), -1, pooled)
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores).max(axis=2)
    own = mine[:, None] == groups[None, :]
    there = groups[None, :] != _NO_CANDIDATE
    level = (scores == best[:, None]) & there
    counts = ((scores > best[:, None]) & there, level, level & own)
    return jnp.max(jnp.where(own, scores, -jnp.inf), axis=1), *(jnp.sum(x, axis=1, dtype=jnp.int32) for x in counts)


def _numbered(offered: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The groups as int32 from 0 on, in their order."""
    names, numbers = np.unique(offered, return_inverse=True)
    return numbers.astype(np.int32), np.searchsorted(names, wanted).astype(np.int32)


def _columns(offered: np.ndarray, pool: bool) -> np.ndarray:
    """int64[columns, n]: which candidates are ranked as one, in the order of groups; a smaller group repeats one."""
    order = np.argsort(offered, kind="stable")
    if not pool:
        return order[:, None]
    sizes = np.bincount(offered)
    ends = np.cumsum(sizes)
    return order[np.minimum(ends[:, None] - sizes[:, None] + np.arange(sizes.max()), ends[:, None] - 1)]


def _filled(rows: np.ndarray, length: int, value: int = 0) -> np.ndarray:
    return np.pad(rows, ((0, length - len(rows)), *((0, 0),) * (rows.ndim - 1)), constant_values=value)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
