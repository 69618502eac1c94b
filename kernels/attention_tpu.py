"""Joint space-time attention for TPU: Pallas bodies that read and write [B, S, N*D] in place.

Scores stand transposed, keys along sublanes and queries along lanes: the products with V stream D rows through the
matrix unit and not 128, and sums over keys run along sublanes. A step holds all rows of its heads in VMEM, so that
nothing is rescaled on the way.

One row behind the part that divides by 128 (the class token) stands apart: as a key it is one more row of the scores,
as a query one row of its own. Rows short of a multiple of 128 otherwise are masked.

Heads lie side by side in 128 lanes when D divides 128. For other D ("loose" heads) the lanes of a head are turned to
the front, out of the two tiles that it may lie across; its output is merged into those tiles, one step carrying the
unfinished one to the next.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import tuning

LANES = 128
LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
# Sums of exponentials outside this range are taken again with the maximum subtracted. Inside, float32 loses nothing:
# each term is below the sum, and what underflows to zero is below 2**-126.
SMALLEST_SUM, LARGEST_SUM = 2.0**-64, 2.0**64

Spec = pl.BlockSpec
NT = (((1,), (1,)), ((), ()))  # a[m, c], b[n, c] -> [m, n]


class Plan(NamedTuple):
    """How one call is cut. Counts of rows, lanes, heads and steps."""

    batch: int
    tokens: int  # S
    heads: int
    head_dim: int
    lone: bool  # the last row stands apart from the `keys` before it
    keys: int  # rows of the transposed arrays, a multiple of 128; those at `tokens` and after are masked
    query_chunk: int  # columns of the scores that are worked on at a time
    key_chunk: int  # rows of the scores that are worked on at a time
    chunks: int  # of queries in a grid step
    ranges: int  # of queries, one a grid step
    rows: int  # of a block: all rows of the array and what the chunks read beyond
    loose: bool  # heads are not aligned to lanes

    @property
    def together(self) -> int:
        """Heads of a grid step."""
        return 1 if self.loose else max(1, LANES // self.head_dim)

    @property
    def lanes(self) -> int:
        """Lanes of a block, and of a head moved to the front."""
        return max(LANES, self.head_dim)

    @property
    def lone_query(self) -> bool:
        """The lone row is no column of the ranges."""
        return self.lone and self.ranges * self.chunks * self.query_chunk == self.keys


def make_plan(q: Array, narrow: int, sizes: tuning.Cuts) -> Plan:
    """Cuts for q [B, S, N, D].

    narrow: products of which D rows stream, for each that streams all keys.
    """
    work, query_chunk, key_chunk = sizes
    batch, tokens, heads, head_dim = q.shape
    lone = tokens > LANES and tokens % LANES == 1
    keys = tokens - 1 if lone else pl.cdiv(tokens, LANES) * LANES
    query_chunk, key_chunk = (min(x, keys) for x in (query_chunk, key_chunk))
    loose = head_dim % LANES != 0 and (LANES % head_dim != 0 or heads * head_dim % LANES != 0)
    plan = Plan(batch, tokens, heads, head_dim, lone, keys, query_chunk, key_chunk, 1, 1, 0, loose)
    total = pl.cdiv(keys, query_chunk)
    cycles = plan.together * query_chunk * keys * (2 + 2 * narrow * head_dim // LANES) // 1024
    most = max(1, work // max(1, cycles))
    ranges = pl.cdiv(total, most)
    chunks = pl.cdiv(total, ranges)
    rows = max(keys + (16 if lone else 0), ranges * chunks * query_chunk)
    return plan._replace(ranges=ranges, chunks=chunks, rows=rows)


def pieces(length: int, size: int) -> list[tuple[int, int]]:
    """(start, size) of the pieces of at most `size`."""
    return [(i, min(size, length - i)) for i in range(0, length, size)]


def dot(a: Array, b: Array, *, nt: bool = False) -> Array:
    """a @ b, or a @ b.T, in float32; inputs of float32 are not rounded to bfloat16."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = NT if nt else (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def lane(shape: tuple[int, ...]) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def of_head(x: Array, u: int | Array, dim: int) -> Array:
    """Where the lanes of x are those of head u. Division of vectors would ask the compiler for a chip's name."""
    at = lane(x.shape)
    return (at >= u * dim) & (at < (u + 1) * dim)


def row(shape: tuple[int, ...]) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 2)


def zero_after(x: Array, first: Any, count: int) -> Array:
    """x with its rows zero from row `count` on, x's first row being row `first`."""
    return jnp.where(row(x.shape) + first < count, x, jnp.zeros_like(x))


def turn(x: Array, shift: Array) -> Array:
    """Lanes turned to the right by `shift` of 128."""
    if x.dtype == jnp.float32:
        return pltpu.roll(x, shift, 1)
    if x.shape[0] <= 16:  # XLA for CPU, which the interpreter runs on, cannot multiply what a few rows become below
        return pltpu.roll(x.astype(jnp.float32), shift, 1).astype(x.dtype)
    # Rotation works on 32 bits; two rows of bfloat16 in one word turn together.
    return pltpu.bitcast(pltpu.roll(pltpu.bitcast(x, jnp.int32), shift, 1), x.dtype)


class Input:
    """One of q, k, v, ... in VMEM: gives rows of a head with other heads' lanes zero."""

    def __init__(self, plan: Plan, refs: tuple[Any, ...]):
        self.plan, self.refs = plan, refs

    def whole(self, rows: Any) -> Array:
        """All lanes as they lie; of "loose" heads, the head of this step at the front."""
        plan = self.plan
        if not plan.loose:
            return self.refs[0][0, rows, :]
        shift = jax.lax.rem(pl.program_id(1) * plan.head_dim, LANES)
        low, high = (ref[0, rows, :] for ref in self.refs)
        at = lane(low.shape)
        head = turn(jnp.where(at >= shift, low, high), jax.lax.rem(LANES - shift, LANES))
        return jnp.where(at < plan.head_dim, head, jnp.zeros_like(head))

    def head(self, rows: Any, u: int) -> Array:
        """Head u of the step, in its lanes."""
        x = self.whole(rows)
        if self.plan.together == 1:
            return x
        return jnp.where(of_head(x, u, self.plan.head_dim), x, jnp.zeros_like(x))


class Output:
    """One of out, dq, ... in VMEM: takes rows of the heads of this step."""

    def __init__(self, plan: Plan, ref: Any, carry: Any):
        self.plan, self.ref, self.carry = plan, ref, carry

    def write(self, rows: Any, x: Array) -> None:
        """x: [rows, lanes]; of a "loose" head, the head at the front."""
        if self.plan.loose:
            shift = jax.lax.rem(pl.program_id(1) * self.plan.head_dim, LANES)
            x = turn(x.astype(self.ref.dtype), shift)
            merged = jnp.where(lane(x.shape) < shift, self.carry[rows, :], x)
            # What lies in front of the head's end belongs to the next tile, when the head reaches into it.
            self.carry[rows, :] = jnp.where(shift + self.plan.head_dim > LANES, x, merged)
            x = merged
        self.ref[0, rows, :] = x.astype(self.ref.dtype)

    def write_transposed(self, first: Any, heads: list[Array]) -> None:
        """heads: float32[D, n] each, for the n rows from `first` on."""
        x = jnp.concatenate(heads, 0) if len(heads) > 1 else heads[0]
        if x.shape[0] < self.plan.lanes:
            x = jnp.concatenate([x, jnp.zeros((self.plan.lanes - x.shape[0], x.shape[1]), jnp.float32)], 0)
        self.write(pl.ds(first, x.shape[1]), x.T)

    def flush(self) -> None:
        """In the step after the last head: the tile that it left unfinished."""
        self.ref[0] = self.carry[...]


def _forward_kernel(*refs: Any, plan: Plan, factor: float) -> None:
    """One range of queries of the heads of a step. factor: of the scores, to powers of two."""
    p = plan
    wide = 2 if p.loose else 1
    q, k, v = (Input(p, refs[i * wide : (i + 1) * wide]) for i in range(3))
    out_ref, lse_ref, vt_ref, *more = refs[3 * wide :]
    dim, step, part = p.head_dim, pl.program_id(1), pl.program_id(2)
    first_query = pl.multiple_of(part * (p.chunks * p.query_chunk), LANES)
    key_pieces = pieces(p.keys, p.key_chunk)
    kh_ref: Any
    kh_ref, carry_ref = more if p.loose else (None, None)
    output = Output(p, out_ref, carry_ref)

    def prepare() -> None:
        """V transposed, rows that are not there zero; "loose" keys at the front of their lanes."""
        for start, size in pieces(p.keys, LANES):
            rows = v.whole(pl.ds(start, size))
            vt_ref[:, start : start + size] = (zero_after(rows, start, p.tokens)).T
            if p.loose:
                kh_ref[start : start + size, :] = k.whole(pl.ds(start, size))
        if p.loose and p.lone:
            kh_ref[p.keys : p.keys + 16, :] = k.whole(pl.ds(p.keys, 16))

    def keys(start: Any, size: int) -> Array:
        return kh_ref[pl.ds(start, size), :] if p.loose else k.whole(pl.ds(start, size))

    def queries(first: Any, u: int) -> Array:
        x = q.head(pl.ds(first, p.query_chunk), u)
        return zero_after(x, first, p.tokens) if p.ranges * p.chunks * p.query_chunk > p.tokens else x

    def scores(start: Any, size: int, qh: Array) -> Array:
        """[size, queries] in powers of two; -inf at keys that are not there."""
        s = dot(keys(start, size), qh, nt=True) * factor
        if not p.lone and p.keys > p.tokens:
            s = jnp.where(row(s.shape) + start < p.tokens, s, -jnp.inf)
        return s

    def lone_scores(qh: Array) -> Array:
        # The rows after the lone one are zero: sums over them take it out.
        return dot(zero_after(keys(p.keys, 16), 0, 1), qh, nt=True).sum(0, keepdims=True) * factor

    def lone_value(u: int) -> Array:
        """float32[D, 1]: the lone row of V."""
        column = jnp.broadcast_to(v.whole(pl.ds(p.keys, 16)).astype(jnp.float32)[:1], (LANES, p.lanes)).T
        return column[u * dim : (u + 1) * dim, :1]

    def values(u: int, start: Any, size: int) -> Array:
        return vt_ref[u * dim : (u + 1) * dim, pl.ds(start, size)]

    def attend(qh: Array, u: int) -> tuple[Array, Array]:
        """float32[D, n] and [1, n]: sums of values and of weights, no maximum subtracted."""
        columns = qh.shape[0]
        acc = jnp.zeros((dim, columns), jnp.float32)
        total = jnp.zeros((8, columns), jnp.float32)
        for start, size in key_pieces:
            weights = jnp.exp2(scores(start, size, qh))
            total += weights.reshape(size // 8, 8, columns).sum(0)
            acc += dot(values(u, start, size), weights.astype(vt_ref.dtype))
        total = total.sum(0, keepdims=True)
        if p.lone:
            weight = jnp.exp2(lone_scores(qh))
            total += weight
            acc += lone_value(u) * weight
        return acc, total

    def attend_carefully(qh: Array, u: int) -> tuple[Array, Array, Array]:
        """The same with the maximum subtracted, and the maximum [1, n]."""
        columns, size = qh.shape[0], LANES

        def maximum(i: Array, top: Array) -> Array:
            return jnp.maximum(top, scores(i * size, size, qh).max(0, keepdims=True))

        top = jnp.full((1, columns), -jnp.inf, jnp.float32)
        top = jax.lax.fori_loop(0, p.keys // size, maximum, top)
        if p.lone:
            top = jnp.maximum(top, lone_scores(qh))

        def add(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            start = pl.multiple_of(i * size, size)
            weights = jnp.exp2(scores(start, size, qh) - top)
            part = dot(values(u, start, size), weights.astype(vt_ref.dtype))
            return sums[0] + part, sums[1] + weights.sum(0, keepdims=True)

        sums = jnp.zeros((dim, columns), jnp.float32), jnp.zeros((1, columns), jnp.float32)
        acc, total = jax.lax.fori_loop(0, p.keys // size, add, sums)
        if p.lone:
            weight = jnp.exp2(lone_scores(qh) - top)
            total += weight
            acc += lone_value(u) * weight
        return acc, total, top

    def finish(first: Any, heads: list[tuple[Array, Array, Array | float]]) -> None:
        outs = []
        for u, (acc, total, top) in enumerate(heads):
            outs.append(acc * (1.0 / total))
            lse_ref[0, pl.ds(step * p.together + u, 1), pl.ds(first, p.query_chunk)] = LN2 * (jnp.log2(total) + top)
        output.write_transposed(first, outs)

    def lone_query() -> None:
        """The last row as a query, in the usual form: its scores are one row, which streams."""
        rows = pl.ds(p.keys, 16)
        outs = jnp.zeros((16, p.lanes), jnp.float32)
        value = v.whole(rows).astype(jnp.float32)[:1]
        for u in range(p.together):
            qh = zero_after(q.head(rows, u), 0, 1)
            parts = [dot(qh, keys(a, n), nt=True).sum(0, keepdims=True) for a, n in key_pieces]
            s = jnp.concatenate(parts, 1) * factor
            alone = jnp.sum(qh[:1].astype(jnp.float32) * keys(p.keys, 16)[:1].astype(jnp.float32), -1, keepdims=True)
            alone *= factor
            top = jnp.maximum(s.max(-1, keepdims=True), alone)
            weights, weight = jnp.exp2(s - top), jnp.exp2(alone - top)
            total = weights.sum(-1, keepdims=True) + weight
            weights = jnp.broadcast_to(weights, (16, p.keys)).astype(vt_ref.dtype)
            out = (dot(weights, vt_ref[...], nt=True) + weight * value) * (1.0 / total)
            outs = jnp.where(of_head(outs, u, dim), out, outs) if p.together > 1 else out
            # A whole tile: the compiler stores no single number at a row that it does not know.
            tile = lse_ref[0, :, p.keys : p.keys + LANES]
            here = row(tile.shape) == step * p.together + u
            lse_ref[0, :, p.keys : p.keys + LANES] = jnp.where(here, LN2 * (jnp.log2(total) + top), tile)
        output.write(rows, outs)

    def compute() -> None:
        if p.ranges == 1:
            prepare()
        else:
            pl.when(part == 0)(prepare)
        if p.lone_query:
            if p.ranges == 1:
                lone_query()
            else:
                pl.when(part == p.ranges - 1)(lone_query)
        bad = jnp.zeros((1, p.query_chunk), jnp.float32)
        for i in range(p.chunks):
            first = pl.multiple_of(first_query + i * p.query_chunk, LANES)
            heads: list[tuple[Array, Array, Array | float]] = []
            for u in range(p.together):
                acc, total = attend(queries(first, u), u)
                bad = jnp.where((total >= SMALLEST_SUM) & (total <= LARGEST_SUM), bad, 1.0)
                heads.append((acc, total, 0.0))
            finish(first, heads)

        @pl.when(jnp.max(bad) > 0)
        def _() -> None:
            def again(i: Array, _: None) -> None:
                first = pl.multiple_of(first_query + i * p.query_chunk, LANES)
                finish(first, [attend_carefully(queries(first, u), u) for u in range(p.together)])

            jax.lax.fori_loop(0, p.chunks, again, None)

    run_heads(p, compute, [output])


def run_heads(plan: Plan, compute: Callable[[], None], outputs: list[Output]) -> None:
    """Runs `compute` in the steps that have a head."""
    if not plan.loose:
        compute()
        return
    step = pl.program_id(1)
    pl.when(step < plan.heads)(compute)

    @pl.when(step == plan.heads)
    def _() -> None:
        for output in outputs:
            output.flush()


def specs(plan: Plan) -> tuple[list[Spec], Spec, Spec]:
    """Blocks of an input [B, S, N*D], of an output like it, and of statistics [B, N, S]."""
    p = plan
    block, last = (1, p.rows, p.lanes), pl.cdiv(p.heads * p.head_dim, LANES) - 1
    statistics = Spec((1, p.heads, pl.cdiv(p.rows, LANES) * LANES), lambda b, n, _: (b, 0, 0))
    if not p.loose:
        whole = Spec(block, lambda b, n, _: (b, 0, n))
        return [whole], whole, statistics

    def tile(n: Array) -> Array:
        return jnp.minimum(jax.lax.div(n * p.head_dim, LANES), last)

    low = Spec(block, lambda b, n, _: (b, 0, tile(n)))
    high = Spec(block, lambda b, n, _: (b, 0, jnp.minimum(tile(n) + 1, last)))
    return [low, high], low, statistics


def grid(plan: Plan) -> tuple[int, int, int]:
    # The step after the last loose head writes the tile that that head may have left unfinished.
    steps = plan.heads + 1 if plan.loose else plan.heads * plan.head_dim // plan.lanes
    return plan.batch, steps, plan.ranges


def flat(plan: Plan, *arrays: Array) -> list[Array]:
    return [x.reshape(plan.batch, plan.tokens, plan.heads * plan.head_dim) for x in arrays]


def forward(q: Array, k: Array, v: Array, *, scale: float) -> tuple[Array, Array]:
    """q, k, v [B, S, N, D] -> the output [B, S, N, D] and the logarithms of the rows' sums, float32[B, N, S]."""
    p = make_plan(q, 1, tuning.cuts(tuning.JOINT_FORWARD))
    inputs, output, statistics = specs(p)
    scratch = [pltpu.VMEM((p.lanes, p.keys), q.dtype)]
    if p.loose:
        scratch += [pltpu.VMEM((p.rows, LANES), q.dtype)] * 2
    width = p.heads * p.head_dim
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, plan=p, factor=scale * LOG2E),
        out_shape=(
            jax.ShapeDtypeStruct((p.batch, p.tokens, width), q.dtype),
            jax.ShapeDtypeStruct((p.batch, p.heads, p.tokens), jnp.float32),
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
