"""Joint space-time attention for TPU: Pallas bodies that read and write [B, S, N*D] in place.

Scores stand transposed, keys along sublanes and queries along lanes: the products with V stream D rows through the
matrix unit and not 128, and sums over keys run along sublanes. A step holds all rows of its heads in VMEM, so that
nothing is rescaled on the way.

One row behind the part that divides by 128 (the class token) stands apart: as a key it is one more row of the scores,
as a query one row of its own. Rows short of a multiple of 128 otherwise are masked.

Heads lie side by side in 128 lanes when D divides 128. A head of another D ("loose") may lie across two tiles, in lanes
that differ modulo 128: one select puts it into one tile, and a rotation brings it to the front, as float32, since v5e
would repack bfloat16 for either. Its output is merged into the two tiles, one step carrying the unfinished one to the
next.
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

LONE = 16  # rows that are read for the lone one: a tile of bfloat16

Spec = pl.BlockSpec
NT = (((1,), (1,)), ((), ()))  # a[m, c], b[n, c] -> [m, n]


class Plan(NamedTuple):
    """How one call is cut. Counts of rows, lanes, heads and steps."""

    batch: int
    tokens: int  # S
    heads: int
    head_dim: int
    loose: bool  # heads are not aligned to lanes
    lone: bool  # the last row stands apart from the `keys` before it
    keys: int  # rows of the transposed arrays, a multiple of 128; those at `tokens` and after are masked
    query_chunk: int  # columns of the scores that are worked on at a time
    key_chunk: int  # rows of the scores that are worked on at a time
    ranges: int = 1  # of queries, one a grid step
    columns: int = 0  # queries of a range
    rows: int = 0  # of a block: all rows of the array and what the ranges read beyond
    tiles: int = 1  # of lanes in a block

    @property
    def together(self) -> int:
        """Heads of a tile."""
        return 1 if self.loose else max(1, LANES // self.head_dim)

    @property
    def lanes(self) -> int:
        """Lanes of a tile, and of a head moved to the front."""
        return max(LANES, self.head_dim)

    @property
    def places(self) -> list[tuple[int, int]]:
        """(tile, place in it) of the heads of a step."""
        return [(t, u) for t in range(self.tiles) for u in range(self.together)]

    @property
    def unfinished(self) -> bool:
        """The last "loose" head reaches into a tile after its first."""
        return self.loose and (self.heads - 1) * self.head_dim % LANES + self.head_dim > LANES

    @property
    def lone_query(self) -> bool:
        """The lone row is no column of the ranges."""
        return self.lone and self.ranges * self.columns == self.keys


def make_plan(q: Array, wide: int, narrow: int, aligned_cuts: tuning.Table, loose_cuts: tuning.Table) -> Plan:
    """Cuts for q [B, S, N, D]. wide, narrow: products of which all keys stream, and of which D rows stream."""
    batch, tokens, heads, head_dim = q.shape
    lone = tokens > LANES and tokens % LANES == 1
    keys = tokens - 1 if lone else pl.cdiv(tokens, LANES) * LANES
    loose = head_dim % LANES != 0 and (LANES % head_dim != 0 or heads * head_dim % LANES != 0)
    sizes = tuning.cuts(loose_cuts if loose else aligned_cuts)
    query_chunk, key_chunk = min(sizes.queries, keys), min(sizes.keys, keys)
    plan = Plan(batch, tokens, heads, head_dim, loose, lone, keys, query_chunk, key_chunk)
    # The matrix unit of v5e gives 512 numbers a cycle, of a product over up to 128.
    cycles = plan.together * keys * (wide * plan.lanes + narrow * head_dim) / (512 * LANES)  # for one query
    chunks = pl.cdiv(keys, query_chunk)
    ranges = pl.cdiv(chunks, max(1, int(sizes.cycles / (cycles * query_chunk))))
    columns = keys if ranges == 1 else pl.cdiv(chunks, ranges) * query_chunk
    rows = max(keys + (LONE if lone else 0), ranges * columns)
    # What a step costs beside its products is shared by more heads where one tile's are little work.
    most = 1 if loose else max(1, int(sizes.cycles / (2 * cycles * columns)))
    tiles = max(n for n in range(1, most + 1) if loose or heads * head_dim % (n * plan.lanes) == 0)
    return plan._replace(ranges=ranges, columns=columns, rows=rows, tiles=tiles)


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


def store_row(ref: Any, index: Any, start: Any, x: Array) -> None:
    """ref[0, index, start:start + n] = x [1, n]."""
    at = pl.ds(start, x.shape[1])
    if x.shape[1] > LANES:
        ref[0, pl.ds(index, 1), at] = x
    else:  # the compiler stores no single tile at a row that it does not know
        block = ref[0, :, at]
        ref[0, :, at] = jnp.where(row(block.shape) == index, x, block)


def load_row(ref: Any, index: Any, start: Any, n: int) -> Array:
    """ref[0, index, start:start + n], as [1, n]."""
    at = pl.ds(start, n)
    if n > LANES:
        found: Array = ref[0, pl.ds(index, 1), at]
        return found
    block = ref[0, :, at]
    return jnp.where(row(block.shape) == index, block, 0.0).sum(0, keepdims=True)


def start_lane(plan: Plan) -> Array:
    """Where in its first tile the "loose" head of this step starts."""
    return jax.lax.rem(pl.program_id(1) * plan.head_dim, LANES)


class Input:
    """One of q, k, v, ... in VMEM: gives rows of a head with other heads' lanes zero."""

    def __init__(self, plan: Plan, refs: tuple[Any, ...], head: Any):
        self.plan, self.refs, self.head = plan, refs, head

    def gather(self, first: Any, n: int) -> None:
        """Brings n rows of this step's "loose" head to the front, the other lanes zero."""
        start, rows = start_lane(self.plan), pl.ds(first, n)
        low, high = (ref[0, rows, :].astype(jnp.float32) for ref in self.refs)
        at = lane(low.shape)
        x = pltpu.roll(jnp.where(at >= start, low, high), jax.lax.rem(LANES - start, LANES), 1)
        self.head[rows, :] = jnp.where(at < self.plan.head_dim, x, 0.0).astype(self.head.dtype)

    def rows(self, first: Any, n: int, tile: int = 0) -> Array:
        """n rows of a tile's lanes; of "loose" heads, what was gathered."""
        at, lanes = pl.ds(first, n), self.plan.lanes
        found: Array = self.head[at, :] if self.plan.loose else self.refs[0][0, at, tile * lanes : (tile + 1) * lanes]
        return found

    def take(self, first: Any, n: int, tile: int = 0) -> Array:
        """The same, gathered first: each row of a "loose" head once before it is read."""
        if self.plan.loose:
            self.gather(first, n)
        return self.rows(first, n, tile)


def lone_column(plan: Plan, rows: Array) -> Array:
    """float32[lanes, 128]: the first row as a column, in all lanes."""
    return jnp.broadcast_to(rows.astype(jnp.float32)[:1], (LANES, plan.lanes)).T


def outer(column: Array, x: Array) -> Array:
    """[D, n]: a column, given in all of 128 lanes, times x [1, n]."""
    return jnp.concatenate([column * x[:, i : i + n] for i, n in pieces(x.shape[1], LANES)], 1)


def own_lanes(x: Array, plan: Plan, u: int) -> Array:
    """x with other heads' lanes zero, for the head at place u of its tile."""
    return jnp.where(of_head(x, u, plan.head_dim), x, jnp.zeros_like(x)) if plan.together > 1 else x


def own_rows(plan: Plan, place: tuple[int, int]) -> slice:
    """A head's rows in a transposed block."""
    start = place[0] * plan.lanes + place[1] * plan.head_dim
    return slice(start, start + plan.head_dim)


def store_transposed(ref: Any, plan: Plan, tile: int, start: int, x: Array) -> None:
    """Rows of an Input become columns from `start` on."""
    used = plan.together * plan.head_dim
    ref[tile * plan.lanes : tile * plan.lanes + used, start : start + x.shape[0]] = x.T[:used]


class Output:
    """One of out, dq, ... in VMEM: takes rows of the heads of this step."""

    def __init__(self, plan: Plan, ref: Any, carry: Any):
        self.plan, self.ref, self.carry = plan, ref, carry

    def write(self, rows: Any, x: Array, tile: int = 0) -> None:
        """x: float32[rows, lanes] of a tile; of a "loose" head, the head at the front."""
        plan = self.plan
        if plan.loose:
            start = start_lane(plan)
            # Steps read one carry and write the other: rows may be written twice.
            old = jax.lax.rem(pl.program_id(1) + 1, 2)
            before, x = self.carry[old, rows, :], pltpu.roll(x, start, 1)
            # Where the head ends in the next tile, that one is to come.
            kept = jnp.where(start + plan.head_dim > LANES, 0, start)
            self.carry[1 - old, rows, :] = jnp.where(lane(x.shape) < kept, before, x)
            x = jnp.where(lane(x.shape) < start, before, x)
        self.ref[0, rows, tile * plan.lanes : (tile + 1) * plan.lanes] = x.astype(self.ref.dtype)

    def write_transposed(self, first: Any, heads: list[Array], tile: int) -> None:
        """heads: float32[D, n] each, a tile's, for the n rows from `first` on."""
        x = jnp.concatenate(heads, 0) if len(heads) > 1 else heads[0]
        if x.shape[0] < self.plan.lanes:
            x = jnp.concatenate([x, jnp.zeros((self.plan.lanes - x.shape[0], x.shape[1]), jnp.float32)], 0)
        self.write(pl.ds(first, x.shape[1]), x.T, tile)

    def flush(self) -> None:
        """In the step after the last head: the tile that it left unfinished."""
        self.ref[0] = self.carry[jax.lax.rem(pl.program_id(1) + 1, 2)].astype(self.ref.dtype)


def _forward_kernel(*refs: Any, plan: Plan, factor: float) -> None:
    """One range of queries of the heads of a step. factor: of the scores, to powers of two."""
    p = plan
    wide = 2 if p.loose else 1
    out_ref, lse_ref, vt_ref, lone_ref, *more = refs[3 * wide :]
    carry_ref, *gathered = more if p.loose else [None] * 4
    q, k, v = (Input(p, refs[i * wide : (i + 1) * wide], ref) for i, ref in enumerate(gathered))
    output = Output(p, out_ref, carry_ref)
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

    def attend(qh: Array, place: tuple[int, int], first_use: bool) -> tuple[Array, Array]:
        """float32[D, n] and [1, n]: sums of values and of weights, no maximum subtracted."""
        columns, mine = qh.shape[0], own_rows(p, place)
        acc = jnp.zeros((dim, columns), jnp.float32)
        total = jnp.zeros((8, columns), jnp.float32)
        for start, size in key_pieces:
            if first_use:
                prepare(place[0], start, size)
            # The lone key rides behind the last piece: a product of its own would load all queries for one row.
            extra = LONE if p.lone and start + size == p.keys else 0
            s = scores(place[0], start, size + extra, qh)
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
        output.write_transposed(first, outs, tile)

    def lone_query() -> None:
        """The last row as a query, in the usual form: the scores of a tile's heads are rows, which stream."""
        lone = pl.ds(p.keys, LONE)
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
            output.write(lone, jnp.broadcast_to(out, (LONE, p.lanes)), tile)
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
        for tile in range(p.tiles):
            for at, n in pieces(p.columns, p.query_chunk):
                first = pl.multiple_of(first_query + at, LANES) if p.ranges > 1 else at
                heads: list[tuple[Array, Array, Array | float]] = []
                for u in range(p.together):
                    acc, total = attend(queries(first, n, (tile, u)), (tile, u), p.ranges == 1 and at == u == 0)
                    fine = (total >= SMALLEST_SUM) & (total <= LARGEST_SUM)
                    bad = functools.reduce(
                        jnp.maximum, [jnp.where(fine[:, i : i + LANES], 0.0, 1.0) for i in range(0, n, LANES)], bad
                    )
                    heads.append((acc, total, 0.0))
                finish(first, tile, heads)
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


def run_heads(plan: Plan, compute: Callable[[], None], outputs: list[Output]) -> None:
    """Runs `compute` in the steps that have a head."""
    if not plan.unfinished:
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
    block, last = (1, p.rows, p.tiles * p.lanes), pl.cdiv(p.heads * p.head_dim, LANES) - 1
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
    # A step after the last "loose" head writes the tile that it left unfinished.
    steps = plan.heads + plan.unfinished if plan.loose else plan.heads * plan.head_dim // (plan.tiles * plan.lanes)
    return plan.batch, steps, plan.ranges


def flat(plan: Plan, *arrays: Array) -> list[Array]:
    return [x.reshape(plan.batch, plan.tokens, plan.heads * plan.head_dim) for x in arrays]


def shape_like(q: Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An output that varies over the same mesh axes as q, which `jax.shard_map` asks of a kernel."""
    axes: dict[str, Any] = {}
    for name in ("manual_axis_type", "vma"):  # jax 0.12 calls it the former
        if hasattr(jax.typeof(q), name):
            axes = {name: getattr(jax.typeof(q), name)}
            break
    return jax.ShapeDtypeStruct(shape, dtype, **axes)


def forward(q: Array, k: Array, v: Array, *, scale: float) -> tuple[Array, Array]:
    """q, k, v [B, S, N, D] -> the output [B, S, N, D] and the logarithms of the rows' sums, float32[B, N, S]."""
    p = make_plan(q, 1, 1, tuning.JOINT_FORWARD, tuning.JOINT_FORWARD_LOOSE)
    inputs, output, statistics = specs(p)
    scratch = [pltpu.VMEM((p.tiles * p.lanes, p.keys), q.dtype), pltpu.VMEM((p.tiles * p.lanes, LANES), jnp.float32)]
    if p.loose:
        gathered = pltpu.VMEM((p.rows, LANES), q.dtype)
        scratch += [pltpu.VMEM((2, p.rows, LANES), jnp.float32), *[gathered] * 3]
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
