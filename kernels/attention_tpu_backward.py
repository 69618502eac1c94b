"""Gradients of joint space-time attention for TPU, in one kernel; `attention_tpu.py` says how scores and heads lie.

Probabilities are computed again from the rows' sums. The products that make gradients stream D rows each; those of keys
and values are summed in VMEM, transposed, in float32, over all queries of a head.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import tuning
from .attention_tpu import (
    LANES,
    LOG2E,
    Input,
    Output,
    Plan,
    dot,
    flat,
    grid,
    make_plan,
    of_head,
    pieces,
    row,
    run_heads,
    specs,
    zero_after,
)

LONE = 16  # rows that are read for the lone one: a tile of bfloat16


def _backward_kernel(*refs: Any, plan: Plan, scale: float) -> None:
    p = plan
    wide = 2 if p.loose else 1
    q, k, v, out, do = (Input(p, refs[i * wide : (i + 1) * wide]) for i in range(5))
    lse_ref, dq_ref, dk_ref, dv_ref, kt_ref, dkt_ref, dvt_ref, *more = refs[5 * wide :]
    lone_ref: Any = more.pop() if p.lone else None
    kh_ref: Any
    vh_ref: Any
    kh_ref, vh_ref, *carries = more if p.loose else [None] * 5
    dq, dk, dv = (Output(p, ref, carry) for ref, carry in zip((dq_ref, dk_ref, dv_ref), carries))
    dim, step, part = p.head_dim, pl.program_id(1), pl.program_id(2)
    first_query = pl.multiple_of(part * (p.chunks * p.query_chunk), LANES)
    key_pieces = pieces(p.keys, p.key_chunk)
    dtype = kt_ref.dtype
    ragged_queries = p.ranges * p.chunks * p.query_chunk > p.tokens
    ragged_keys = not p.lone and p.keys > p.tokens

    def keys(start: Any, size: int) -> Array:
        return kh_ref[pl.ds(start, size), :] if p.loose else k.whole(pl.ds(start, size))

    def values(start: Any, size: int) -> Array:
        return vh_ref[pl.ds(start, size), :] if p.loose else v.whole(pl.ds(start, size))

    def own(u: int) -> slice:
        return slice(u * dim, (u + 1) * dim)

    def lane_of(x: Array, u: int) -> Array:
        return jnp.where(of_head(x, u, dim), x, jnp.zeros_like(x)) if p.together > 1 else x

    def prepare() -> None:
        for start, size in pieces(p.keys, LANES):
            rows = k.whole(pl.ds(start, size))
            kt_ref[:, start : start + size] = (zero_after(rows, start, p.tokens) if ragged_keys else rows).T
            if p.loose:
                kh_ref[start : start + size, :] = rows
                vh_ref[start : start + size, :] = v.whole(pl.ds(start, size))
        if p.loose and p.lone:
            kh_ref[p.keys : p.keys + LONE, :] = k.whole(pl.ds(p.keys, LONE))
            vh_ref[p.keys : p.keys + LONE, :] = v.whole(pl.ds(p.keys, LONE))
        if p.lone_query:
            lone_query()
        else:
            dkt_ref[...] = jnp.zeros_like(dkt_ref)
            dvt_ref[...] = jnp.zeros_like(dvt_ref)
            if p.lone:
                lone_ref[...] = jnp.zeros_like(lone_ref)

    def lone_query() -> None:
        """The last row as a query. What it adds to dk and dv is what their sums start from."""
        rows = pl.ds(p.keys, LONE)
        if p.lanes > dim * p.together:
            dkt_ref[dim:, :] = jnp.zeros((p.lanes - dim, p.keys), jnp.float32)
            dvt_ref[dim:, :] = jnp.zeros((p.lanes - dim, p.keys), jnp.float32)
        kx, vx = (zero_after(x(p.keys, LONE), 0, 1).astype(jnp.float32) for x in (keys, values))
        sums = [jnp.zeros((LONE, p.lanes), jnp.float32)] * 3
        for u in range(p.together):
            qx, dox, outx = (zero_after(x.head(rows, u), 0, 1) for x in (q, do, out))
            lse = LOG2E * lse_ref[0, :, p.keys : p.keys + LANES]
            lse = jnp.where(row(lse.shape) == step * p.together + u, lse, 0.0)[:, :1].sum(0, keepdims=True)
            q32, do32 = qx.astype(jnp.float32), dox.astype(jnp.float32)
            di = (do32 * outx.astype(jnp.float32)).sum(0, keepdims=True).sum(1, keepdims=True)
            # Alone with itself.
            weight = jnp.exp2((q32 * kx).sum(0, keepdims=True).sum(1, keepdims=True) * (scale * LOG2E) - lse)
            change = weight * ((do32 * vx).sum(0, keepdims=True).sum(1, keepdims=True) - di)
            sums = [sums[0] + change * lane_of(kx, u), sums[1] + change * q32, sums[2] + weight * do32]
            q_column, do_column = (x.astype(jnp.float32).T[own(u), :1] for x in (_tall(qx), _tall(dox)))
            for start, size in key_pieces:
                s = dot(qx, keys(start, size), nt=True).sum(0, keepdims=True) * (scale * LOG2E) - lse
                weights = jnp.exp2(s)
                change = dot(dox, values(start, size), nt=True).sum(0, keepdims=True) - di
                change = weights * change
                dvt_ref[own(u), start : start + size] = do_column * weights
                dkt_ref[own(u), start : start + size] = q_column * change
                part = dot(zero_after(jnp.broadcast_to(change, (LONE, size)), 0, 1).astype(dtype), keys(start, size))
                sums[0] += lane_of(part, u)
        dq.write(rows, sums[0] * scale)
        lone_ref[0], lone_ref[1] = sums[1], sums[2]

    def chunk(first: Any) -> None:
        """The queries from `first` on."""
        n = p.query_chunk
        rows = pl.ds(first, n)
        q_rows, do_rows, out_rows = (x.whole(rows) for x in (q, do, out))
        if ragged_queries:
            q_rows, do_rows, out_rows = (zero_after(x, first, p.tokens) for x in (q_rows, do_rows, out_rows))
        q_columns, do_columns, out_columns = q_rows.T, do_rows.T, out_rows.T
        outs = []
        for u in range(p.together):
            qh, doh = lane_of(q_rows, u), lane_of(do_rows, u)
            di = do_columns[own(u)].astype(jnp.float32) * out_columns[own(u)].astype(jnp.float32)
            di = di.sum(0, keepdims=True)
            lse = LOG2E * lse_ref[0, pl.ds(step * p.together + u, 1), rows]
            if ragged_queries:
                lse = jnp.where(jax.lax.broadcasted_iota(jnp.int32, lse.shape, 1) + first < p.tokens, lse, jnp.inf)
            acc = jnp.zeros((dim, n), jnp.float32)
            for start, size in key_pieces:
                span = slice(start, start + size)
                weights = jnp.exp2(dot(keys(start, size), qh, nt=True) * (scale * LOG2E) - lse)
                change = weights * (dot(values(start, size), doh, nt=True) - di)
                if ragged_keys and start + size > p.tokens:
                    there = row(weights.shape) + start < p.tokens
                    weights, change = jnp.where(there, weights, 0.0), jnp.where(there, change, 0.0)
                weights, change = weights.astype(dtype), change.astype(dtype)
                dvt_ref[own(u), span] += dot(do_columns[own(u)], weights, nt=True)
                dkt_ref[own(u), span] += dot(q_columns[own(u)], change, nt=True)
                acc += dot(kt_ref[own(u), span], change)
            if p.lone:
                kx, vx = (zero_after(x(p.keys, LONE), 0, 1) for x in (keys, values))
                weights = jnp.exp2(dot(kx, qh, nt=True).sum(0, keepdims=True) * (scale * LOG2E) - lse)
                change = weights * (dot(vx, doh, nt=True).sum(0, keepdims=True) - di)
                acc += _tall(kx).astype(jnp.float32).T[own(u), :1] * change
                for i, (x, y) in enumerate(((change, qh), (weights, doh))):
                    x = zero_after(jnp.broadcast_to(x, (LONE, n)), 0, 1).astype(dtype)
                    lone_ref[i] += dot(x, y)
            outs.append(acc * scale)
        dq.write_transposed(first, outs)

    def finish() -> None:
        for start, size in pieces(p.keys, LANES):
            dk.write_transposed(start, [dkt_ref[:, start : start + size] * scale])
            dv.write_transposed(start, [dvt_ref[:, start : start + size]])
        if p.lone:
            dk.write(pl.ds(p.keys, LONE), lone_ref[0] * scale)
            dv.write(pl.ds(p.keys, LONE), lone_ref[1])

    def compute() -> None:
        if p.ranges == 1:
            prepare()
        else:
            pl.when(part == 0)(prepare)
        for i in range(p.chunks):
            chunk(pl.multiple_of(first_query + i * p.query_chunk, LANES))
        if p.ranges == 1:
            finish()
        else:
            pl.when(part == p.ranges - 1)(finish)

    run_heads(p, compute, [dq, dk, dv])


def _tall(x: Array) -> Array:
    """Row 0 as each of 128 rows: what transposes well."""
    return jnp.broadcast_to(x.astype(jnp.float32)[:1], (LANES, x.shape[1]))


def backward(
    q: Array, k: Array, v: Array, out: Array, lse: Array, do: Array, *, scale: float
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v, [B, S, N, D] each, for the gradient `do` of out; out and lse as `forward` gives them."""
    p = make_plan(q, 3, tuning.cuts(tuning.JOINT_BACKWARD))
    inputs, output, statistics = specs(p)
    scratch = [pltpu.VMEM((p.lanes, p.keys), q.dtype), *[pltpu.VMEM((p.lanes, p.keys), jnp.float32)] * 2]
    if p.loose:
        scratch += [pltpu.VMEM((p.rows, LANES), q.dtype)] * 5
    if p.lone:
        scratch.append(pltpu.VMEM((2, LONE, p.lanes), jnp.float32))
    shape = jax.ShapeDtypeStruct((p.batch, p.tokens, p.heads * p.head_dim), q.dtype)
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
