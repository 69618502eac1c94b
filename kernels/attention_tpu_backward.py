"""Gradients of joint space-time attention for TPU, in one kernel; `attention_tpu.py` says how scores lie.

Probabilities are computed again from the rows' sums. The products that make gradients stream D rows each; those of keys
and values are summed in VMEM, transposed, in float32, over all queries of a head.
"""

from __future__ import annotations

import functools
from typing import Any

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
    load_row,
    lone_column,
    make_plan,
    outer,
    own_lanes,
    own_rows,
    pieces,
    row,
    run_heads,
    specs,
    store_transposed,
    zero_after,
)
from .manual_axes import shape_like
from .tuning import LANES, LOG2E


def _backward_kernel(*refs: Any, plan: Plan, scale: float) -> None:
    p = plan
    wide = 2 if p.loose else 1
    lse_ref, dq_ref, dk_ref, dv_ref, kt_ref, dkt_ref, dvt_ref, lone_ref, kx_ref, *more = refs[5 * wide :]
    rings, gathered = (more[:3], more[3:]) if p.loose else ([None] * 3, [None] * 5)
    q, k, v, out, do = (Input(p, refs[i * wide : (i + 1) * wide], ref) for i, ref in enumerate(gathered))
    dq, dk, dv = (Output(p, ref, ring) for ref, ring in zip((dq_ref, dk_ref, dv_ref), rings, strict=True))
    dim, part, factor = p.head_dim, pl.program_id(2), scale * LOG2E
    first_head = pl.program_id(1) * len(p.places)
    key_pieces = pieces(p.keys, p.key_chunk)
    dtype = kt_ref.dtype
    ragged_queries = p.ranges * p.columns > p.tokens
    ragged_keys = not p.lone and p.keys > p.tokens

    def prepare(tile: int, start: int, size: int) -> None:
        """K transposed, rows that are not there zero."""
        if p.loose:
            v.gather(start, size)
        for at, n in pieces(size, LANES):
            rows = k.take(start + at, n, tile)
            if ragged_keys and start + at + n > p.tokens:
                rows = zero_after(rows, start + at, p.tokens)
            store_transposed(kt_ref, p, tile, start + at, rows)

    def prepare_lone() -> None:
        """The lone row as a key."""
        if p.loose:
            v.gather(p.keys, LONE)
        for tile in range(p.tiles):
            column = lone_column(p, k.take(p.keys, LONE, tile))
            kx_ref[tile * p.lanes : (tile + 1) * p.lanes, :] = column

    def prepare_all() -> None:
        for tile in range(p.tiles):
            prepare(tile, 0, p.keys)
            if p.lone_query:
                lone_query(tile)
        if not p.lone_query:
            dkt_ref[...] = jnp.zeros_like(dkt_ref)
            dvt_ref[...] = jnp.zeros_like(dvt_ref)
            lone_ref[...] = jnp.zeros_like(lone_ref)

    def lone_query(tile: int) -> None:
        """The last row as a query. What it adds to dk and dv is what their sums start from."""
        qx, outx, dox = (x.take(p.keys, LONE, tile) for x in (q, out, do))
        kx, vx = (x.rows(p.keys, LONE, tile) for x in (k, v))
        q_column, do_column = lone_column(p, qx), lone_column(p, dox)
        qx, kx, vx, outx, dox = (x.astype(jnp.float32)[:1] for x in (qx, kx, vx, outx, dox))
        # Row u is the head at place u, the others are zero.
        shape = (LONE, p.lanes)
        mine = row(shape) < p.together
        if p.together > 1:
            mine &= (lane(shape) >= row(shape) * dim) & (lane(shape) < (row(shape) + 1) * dim)
        qx, dox = (jnp.where(mine, x, 0.0) for x in (qx, dox))
        di = (dox * outx).sum(-1, keepdims=True)
        lse = jnp.zeros((LONE, 1), jnp.float32)
        for u in range(p.together):
            found = load_row(lse_ref, first_head + tile * p.together + u, p.keys, LANES)[:, :1]
            lse = jnp.where(row(lse.shape) == u, LOG2E * found, lse)
        weight = jnp.exp2((qx * kx).sum(-1, keepdims=True) * factor - lse)
        change = weight * ((dox * vx).sum(-1, keepdims=True) - di)
        of_q = change * kx
        for u in range(p.together):
            rows, inside = own_rows(p, (tile, u)), slice(u * dim, (u + 1) * dim)
            for i, (x, column) in enumerate(((change, q_column), (weight, do_column))):
                x = column[inside] * jnp.broadcast_to(x[u : u + 1], (1, LANES))
                lone_ref[i, rows, :] = jnp.where(lane(x.shape) == 0, x, 0.0)
        qx, dox = qx.astype(dtype), dox.astype(dtype)
        for start, size in key_pieces:
            weights = jnp.exp2(dot(qx, k.rows(start, size, tile), nt=True) * factor - lse)
            changes = weights * (dot(dox, v.rows(start, size, tile), nt=True) - di)
            of_q += dot(changes.astype(dtype), k.rows(start, size, tile))
            for u in range(p.together):
                rows, inside = own_rows(p, (tile, u)), slice(u * dim, (u + 1) * dim)
                for i, n in pieces(size, LANES):
                    span, part_of = slice(start + i, start + i + n), slice(i, i + n)
                    dvt_ref[rows, span] = do_column[inside] * weights[u : u + 1, part_of]
                    dkt_ref[rows, span] = q_column[inside] * changes[u : u + 1, part_of]
        of_q = jnp.where(mine, of_q, 0.0).sum(0, keepdims=True)
        dq.write_lone(of_q * scale, tile)

    def chunk(first: Any, n: int, tile: int, opens: bool, closes: bool) -> None:
        """The n queries from `first` on, of a tile's heads. opens, closes: prepares keys, finishes their gradients."""
        q_rows, do_rows, out_rows = (x.take(first, n, tile) for x in (q, do, out))
        if ragged_queries:
            q_rows, do_rows, out_rows = (zero_after(x, first, p.tokens) for x in (q_rows, do_rows, out_rows))
        q_columns, do_columns, out_columns = q_rows.T, do_rows.T, out_rows.T
        if p.loose:
            for output in (dq, dk, dv):
                output.complete(first, n)
        outs = []
        for u in range(p.together):
            qh, doh = own_lanes(q_rows, p, u), own_lanes(do_rows, p, u)
            rows, inside = own_rows(p, (tile, u)), slice(u * dim, (u + 1) * dim)
            di = do_columns[inside].astype(jnp.float32) * out_columns[inside].astype(jnp.float32)
            di = di.sum(0, keepdims=True)
            lse = LOG2E * load_row(lse_ref, first_head + tile * p.together + u, first, n)
            if ragged_queries:
                lse = jnp.where(lane(lse.shape) + first < p.tokens, lse, jnp.inf)
            acc = jnp.zeros((dim, n), jnp.float32)
            for start, size in key_pieces:
                span = slice(start, start + size)
                if opens and u == 0:
                    prepare(tile, start, size)
                # The lone key rides behind the last piece: a product of its own would load all queries for one row.
                extra = LONE if p.lone and start + size == p.keys else 0
                weights = jnp.exp2(dot(k.rows(start, size + extra, tile), qh, nt=True) * factor - lse)
                change = weights * (dot(v.rows(start, size + extra, tile), doh, nt=True) - di)
                if extra:
                    weight_of_lone, change_of_lone = weights[size : size + 1], change[size : size + 1]
                    weights, change = weights[:size], change[:size]
                if ragged_keys and start + size > p.tokens:
                    there = row(weights.shape) + start < p.tokens
                    weights, change = jnp.where(there, weights, 0.0), jnp.where(there, change, 0.0)
                weights, change = weights.astype(dtype), change.astype(dtype)
                for ref, columns, x in ((dvt_ref, do_columns, weights), (dkt_ref, q_columns, change)):
                    part_of_sum = dot(columns[inside], x, nt=True)
                    ref[rows, span] = part_of_sum if opens else ref[rows, span] + part_of_sum
                acc += dot(kt_ref[rows, span], change)
                if closes and u == p.together - 1:
                    finish(tile, start, size)
            if p.lone:
                acc += outer(kx_ref[rows, :], change_of_lone)
                for i, (x, columns) in enumerate(((change_of_lone, q_columns), (weight_of_lone, do_columns))):
                    x = columns[inside].astype(jnp.float32) * x
                    lone_ref[i, rows, :] += sum(x[:, j : j + LANES] for j in range(0, n, LANES))
            outs.append(acc * scale)
        dq.write(first, outs, tile)

    def finish(tile: int, start: int, size: int) -> None:
        rows = slice(tile * p.lanes, tile * p.lanes + p.together * dim)
        for at, n in pieces(size, LANES):
            span = slice(start + at, start + at + n)
            dk.write(start + at, [dkt_ref[rows, span] * scale], tile)
            dv.write(start + at, [dvt_ref[rows, span]], tile)

    def finish_lone() -> None:
        for tile in range(p.tiles):
            for of_x, i, times in ((dk, 0, scale), (dv, 1, 1.0)):
                of_lone = lone_ref[i, tile * p.lanes : (tile + 1) * p.lanes, :].T.sum(0, keepdims=True) * times
                of_x.write_lone(of_lone, tile)

    def finish_all() -> None:
        for tile in range(p.tiles):
            finish(tile, 0, p.keys)

    def compute() -> None:
        # Between products of a range that is the only one, what comes before them and after costs little.
        opens, closes = p.ranges == 1 and not p.lone_query, p.ranges == 1
        if p.lone:
            pl.when(part == 0)(prepare_lone) if p.ranges > 1 else prepare_lone()
        if not opens:
            pl.when(part == 0)(prepare_all) if p.ranges > 1 else prepare_all()
        cuts = pieces(p.columns, p.query_chunk)
        for tile in range(p.tiles):
            for i, (at, n) in enumerate(cuts):
                first = at if p.ranges == 1 else pl.multiple_of(part * p.columns + at, LANES)
                chunk(first, n, tile, opens and i == 0, closes and i == len(cuts) - 1)
        if not closes:
            pl.when(part == p.ranges - 1)(finish_all)
        if p.lone:
            pl.when(part == p.ranges - 1)(finish_lone) if p.ranges > 1 else finish_lone()

    run_heads(p, compute, [dq, dk, dv])


def backward(
    q: Array, k: Array, v: Array, out: Array, lse: Array, do: Array, *, scale: float
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v, [B, S, N, D] each, for the gradient `do` of out; out and lse as `forward` gives them."""
    p = make_plan(q, 2, 3, tuning.JOINT_BACKWARD, tuning.JOINT_BACKWARD_LOOSE)
    inputs, output, statistics = specs(p)
    width = p.tiles * p.lanes
    scratch = [pltpu.VMEM((width, p.keys), q.dtype), *[pltpu.VMEM((width, p.keys), jnp.float32)] * 2]
    scratch += [pltpu.VMEM((2, width, LANES), jnp.float32), pltpu.VMEM((width, LANES), jnp.float32)]
    if p.loose:
        scratch += [collected(p)] * 3 + [pltpu.VMEM((p.rows, LANES), q.dtype)] * 5
    shape = shape_like(q, (p.batch, p.tokens, p.heads * p.head_dim), q.dtype)
    gradients = pl.pallas_call(
        functools.partial(_backward_kernel, plan=p, scale=scale),
        out_shape=(shape, shape, shape),
        grid=grid(p),
        in_specs=[*inputs * 5, statistics],
        out_specs=(output, output, output),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=tuning.vmem_bytes()
        ),
        name="joint_attention_backward",
    )(*(x for y in flat(p, q, k, v, out, do) for x in [y] * len(inputs)), lse)
    dq, dk, dv = (x.reshape(q.shape) for x in gradients)
    return dq, dk, dv
