"""Joint space-time attention for TPU: Pallas bodies that read and write [B, S, N*D] in place.

Scores stand transposed, keys along sublanes and queries along lanes: the products with V stream D rows through the
matrix unit and not 128, and sums over keys run along sublanes. A step holds all rows of its heads in VMEM, so that
nothing is rescaled on the way.

One row behind the part that divides by 128 (the class token) stands apart: as a key it is one more row of the scores,
as a query one row of its own. Rows short of a multiple of 128 otherwise are masked.

`attention_tpu_tiles.py` says how heads lie in the arrays.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import tuning
from .attention_tpu_tiles import (
    LONE,
    Input,
    Output,
    Plan,
    collected,
    dot,
    flat,
    grid,
    lane,
    lone_column,
    make_plan,
    outer,
    own_lanes,
    own_rows,
    pieces,
    row,
    run_heads,
    specs,
    store_row,
    store_transposed,
    zero_after,
)
from .manual_axes import shape_like
from .tuning import LANES, LN2, LOG2E

# Sums of exponentials outside this range are taken again with the maximum subtracted. Inside, float32 loses nothing:
# each term is below the sum, and what underflows to zero is below 2**-126.
SMALLEST_SUM, LARGEST_SUM = 2.0**-64, 2.0**64

AHEAD = 512  # rows of scores that are made before the weights of those before them


def in_advance[T](items: Iterator[T], count: int) -> Iterator[T]:
    """The same, each given when `count` more have been made."""
    made: collections.deque[T] = collections.deque()
    for item in items:
        made.append(item)
        if len(made) > count:
            yield made.popleft()
    yield from made


def _forward_kernel(*refs: Any, plan: Plan, factor: float) -> None:
    """One range of queries of the heads of a step. factor: of the scores, to powers of two."""
    p = plan
    wide = 2 if p.loose else 1
    out_ref, lse_ref, vt_ref, lone_ref, *more = refs[3 * wide :]
    collected_ref, *gathered = more if p.loose else [None] * 4
    q, k, v = (Input(p, refs[i * wide : (i + 1) * wide], ref) for i, ref in enumerate(gathered))
    output = Output(p, out_ref, collected_ref)
    dim, part = p.head_dim, pl.program_id(2)
    first_head = pl.program_id(1) * len(p.places)
    first_query: Any = pl.multiple_of(part * p.columns, LANES) if p.ranges > 1 else 0
    key_pieces = pieces(p.keys, p.key_chunk)

    def prepare(tile: int, start: int, size: int) -> None:
        """V transposed, rows that are not there zero; "loose" keys in one tile."""
        for at, n in pieces(size, LANES):
            rows = v.take(start + at, n, tile)
            if start + at + n > p.tokens:
                rows = zero_after(rows, start + at, p.tokens)
            store_transposed(vt_ref, p, tile, start + at, rows)
        if p.loose:
            size += LONE if p.lone and start + size == p.keys else 0
            k.gather(start, size)

    def prepare_lone() -> None:
        for tile in range(p.tiles):
            column = lone_column(p, v.take(p.keys, LONE, tile))
            lone_ref[tile * p.lanes : (tile + 1) * p.lanes, :] = column

    def keys(tile: int, start: Any, size: int) -> Array:
        return k.rows(start, size, tile)

    def queries(first: Any, n: int, place: tuple[int, int]) -> Array:
        x = own_lanes(q.take(first, n, place[0]), p, place[1])
        return zero_after(x, first, p.tokens) if p.ranges * p.columns > p.tokens else x

    def scores(tile: int, start: Any, size: int, qh: Array) -> Array:
        """[size, queries] in powers of two; -inf at keys that are not there."""
        s = dot(keys(tile, start, size), qh, nt=True) * factor
        if not p.lone and p.keys > p.tokens and not (isinstance(start, int) and start + size <= p.tokens):
            s = jnp.where(row(s.shape) + start < p.tokens, s, -jnp.inf)
        return s

    chunks = [(tile, at, n) for tile in range(p.tiles) for at, n in pieces(p.columns, p.query_chunk)]

    def first_of(at: int) -> Any:
        return pl.multiple_of(first_query + at, LANES) if p.ranges > 1 else at

    def all_scores() -> Iterator[Array]:
        """Of each chunk of queries, each head of its tile, each piece of the keys."""
        for tile, at, n in chunks:
            if p.loose:
                output.complete(first_of(at), n)
            for u in range(p.together):
                qh = queries(first_of(at), n, (tile, u))
                for start, size in key_pieces:
                    if p.ranges == 1 and at == u == 0:
                        prepare(tile, start, size)
                    # The lone key rides behind the last piece: a product of its own would load all queries for one row.
                    yield scores(tile, start, size + (LONE if p.lone and start + size == p.keys else 0), qh)

    def attend(made: Iterator[Array], columns: int, place: tuple[int, int]) -> tuple[Array, Array]:
        """float32[D, n] and [1, n]: sums of values and of weights, no maximum subtracted. made: scores."""
        mine = own_rows(p, place)
        acc = jnp.zeros((dim, columns), jnp.float32)
        total = jnp.zeros((8, columns), jnp.float32)
        for start, size in key_pieces:
            s = next(made)
            weights = jnp.exp2(s[:size])
            total += weights.reshape(size // 8, 8, columns).sum(0)
            acc += dot(vt_ref[mine, start : start + size], weights.astype(vt_ref.dtype))
        total = total.sum(0, keepdims=True)
        if p.lone:
            weight = jnp.exp2(s[size : size + 1])
            total += weight
            acc += outer(lone_ref[mine, :], weight)
        return acc, total

    def attend_carefully(qh: Array, place: tuple[int, int]) -> tuple[Array, Array, Array]:
        """The same with the maximum subtracted, and the maximum [1, n]."""
        columns, size, tile, mine = qh.shape[0], LANES, place[0], own_rows(p, place)

        def maximum(i: Array, top: Array) -> Array:
            return jnp.maximum(top, scores(tile, pl.multiple_of(i * size, size), size, qh).max(0, keepdims=True))

        top = jnp.full((1, columns), -jnp.inf, jnp.float32)
        top = jax.lax.fori_loop(0, p.keys // size, maximum, top)
        alone = scores(tile, p.keys, LONE, qh)[:1] if p.lone else None
        if alone is not None:
            top = jnp.maximum(top, alone)

        def add(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            start = pl.multiple_of(i * size, size)
            weights = jnp.exp2(scores(tile, start, size, qh) - top)
            part = dot(vt_ref[mine, pl.ds(start, size)], weights.astype(vt_ref.dtype))
            return sums[0] + part, sums[1] + weights.sum(0, keepdims=True)

        sums = jnp.zeros((dim, columns), jnp.float32), jnp.zeros((1, columns), jnp.float32)
        acc, total = jax.lax.fori_loop(0, p.keys // size, add, sums)
        if alone is not None:
            weight = jnp.exp2(alone - top)
            total += weight
            acc += outer(lone_ref[mine, :], weight)
        return acc, total, top

    def finish(first: Any, tile: int, heads: list[tuple[Array, Array, Array | float]]) -> None:
        outs = []
        for u, (acc, total, top) in enumerate(heads):
            outs.append(acc * (1.0 / total))
            store_row(lse_ref, first_head + tile * p.together + u, first, LN2 * (jnp.log2(total) + top))
        output.write(first, outs, tile)

    def lone_query() -> None:
        """The last row as a query, in the usual form: the scores of a tile's heads are rows, which stream."""
        for tile in range(p.tiles):
            qx, kx = (x.astype(jnp.float32)[:1] for x in (q.take(p.keys, LONE, tile), keys(tile, p.keys, LONE)))
            rows = slice(tile * p.lanes, (tile + 1) * p.lanes)
            vx = lone_ref[rows, :].T[:1]
            qx = jnp.broadcast_to(qx, (LONE, p.lanes))
            heads = row(qx.shape)  # row u is the head at place u, the others are zero
            if p.together > 1:
                qx = jnp.where((lane(qx.shape) >= heads * dim) & (lane(qx.shape) < (heads + 1) * dim), qx, 0.0)
            else:
                qx = jnp.where(heads == 0, qx, 0.0)
            alone = (qx * kx).sum(-1, keepdims=True) * factor
            qx = qx.astype(vt_ref.dtype)
            parts = [dot(qx, keys(tile, *piece), nt=True) * factor for piece in key_pieces]
            top = functools.reduce(jnp.maximum, [s.max(-1, keepdims=True) for s in parts], alone)
            weight = jnp.exp2(alone - top)
            total, out = weight, weight * vx
            for s, (start, size) in zip(parts, key_pieces, strict=True):
                weights = jnp.exp2(s - top)
                total += weights.sum(-1, keepdims=True)
                out += dot(weights.astype(vt_ref.dtype), vt_ref[rows, start : start + size], nt=True)
            out *= 1.0 / total
            statistic = LN2 * (jnp.log2(total) + top)
            mine = (lane(out.shape) >= heads * dim) & (lane(out.shape) < (heads + 1) * dim)
            out = jnp.where(mine, out, 0.0).sum(0, keepdims=True)
            output.write_lone(out, tile)
            for u in range(p.together):
                found = jnp.broadcast_to(statistic[u : u + 1], (1, LANES))
                store_row(lse_ref, first_head + tile * p.together + u, p.keys, found)

    def compute() -> None:
        if p.lone:
            pl.when(part == 0)(prepare_lone) if p.ranges > 1 else prepare_lone()
        if p.ranges > 1:

            @pl.when(part == 0)
            def _() -> None:
                for tile in range(p.tiles):
                    prepare(tile, 0, p.keys)

        bad = jnp.zeros((1, LANES), jnp.float32)
        # The matrix unit takes products in the order of the program. Scores that come some pieces before their weights
        # are asked for keep it busy while those are made.
        made = in_advance(all_scores(), AHEAD // p.key_chunk)
        for tile, at, n in chunks:
            heads: list[tuple[Array, Array, Array | float]] = []
            for u in range(p.together):
                acc, total = attend(made, n, (tile, u))
                fine = (total >= SMALLEST_SUM) & (total <= LARGEST_SUM)
                bad = functools.reduce(
                    jnp.maximum, [jnp.where(fine[:, i : i + LANES], 0.0, 1.0) for i in range(0, n, LANES)], bad
                )
                heads.append((acc, total, 0.0))
            finish(first_of(at), tile, heads)
        if p.lone_query:
            pl.when(part == p.ranges - 1)(lone_query) if p.ranges > 1 else lone_query()

        @pl.when(jnp.max(bad) > 0)
        def _() -> None:
            def again(i: Array, _: None) -> None:
                first = pl.multiple_of(first_query + i * LANES, LANES)
                for tile in range(p.tiles):
                    places = [(tile, u) for u in range(p.together)]
                    finish(first, tile, [attend_carefully(queries(first, LANES, x), x) for x in places])

            jax.lax.fori_loop(0, p.columns // LANES, again, None)

    run_heads(p, compute, [output])


def forward(q: Array, k: Array, v: Array, *, scale: float) -> tuple[Array, Array]:
    """q, k, v [B, S, N, D] -> the output [B, S, N, D] and the logarithms of the rows' sums, float32[B, N, S]."""
    p = make_plan(q, 1, 1, tuning.JOINT_FORWARD, tuning.JOINT_FORWARD)
    inputs, output, statistics = specs(p)
    scratch = [pltpu.VMEM((p.tiles * p.lanes, p.keys), q.dtype), pltpu.VMEM((p.tiles * p.lanes, LANES), jnp.float32)]
    if p.loose:
        gathered = pltpu.VMEM((p.rows, LANES), q.dtype)
        scratch += [collected(p), *[gathered] * 3]
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, plan=p, factor=scale * LOG2E),
        out_shape=(
            shape_like(q, (p.batch, p.tokens, p.heads * p.head_dim), q.dtype),
            shape_like(q, (p.batch, p.heads, p.tokens), jnp.float32),
        ),
        grid=grid(p),
        in_specs=inputs * 3,
        out_specs=(output, statistics),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tuning.vmem_bytes()
        ),
        name="joint_attention_forward",
    )(*(x for y in flat(p, q, k, v) for x in [y] * len(inputs)))
    return out.reshape(q.shape), lse
