"""How joint attention's TPU kernels cut a call, and how they read and write heads in [B, S, N*D].

Heads lie side by side in 128 lanes when D divides 128. A head of another D ("loose") may lie across two tiles, in lanes
that differ modulo 128: one select puts it into one tile, and a rotation brings it to the front, as float32, since v5e
would repack bfloat16 for either. Its output is collected transposed, and written a step later: see Output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import tuning
from .tuning import LANES

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


def first_tile(plan: Plan, head: Any) -> Array:
    """The tile in which a "loose" head starts; the last one for heads that are not there."""
    last = pl.cdiv(plan.heads * plan.head_dim, LANES) - 1
    return jnp.minimum(jax.lax.div(head * plan.head_dim, LANES), last)


def output_tile(plan: Plan, step: Any) -> Array:
    """Of "loose" heads: the tile that is written in a step."""
    return first_tile(plan, jnp.maximum(step - 1, 0))


class Input:
    """One of q, k, v, ... in VMEM: gives rows of a head with other heads' lanes zero."""

    def __init__(self, plan: Plan, refs: tuple[Any, ...], head: Any):
        self.plan, self.refs, self.head = plan, refs, head

    def gather(self, first: Any, n: int) -> None:
        """Brings n rows of this step's "loose" head to the front, the other lanes zero."""
        start, rows = jax.lax.rem(pl.program_id(1) * self.plan.head_dim, LANES), pl.ds(first, n)
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
    """One of out, dq, ... in VMEM: takes rows of the heads of this step.

    "Loose" heads are collected transposed, where they start at a multiple of eight sublanes: lane i of the array is
    row i modulo 256. The step after a head writes the tile that it starts in, between its own head's products.
    """

    def __init__(self, plan: Plan, ref: Any, collected: Any):
        self.plan, self.ref, self.collected = plan, ref, collected

    def write(self, first: Any, heads: list[Array], tile: int = 0) -> None:
        """heads: float32[D, n] each, a tile's, for the n rows from `first` on."""
        plan, n = self.plan, heads[0].shape[1]
        if plan.loose:
            for i in range(0, plan.head_dim, 8):
                at = jax.lax.rem(pl.program_id(1) * plan.head_dim + i, 2 * LANES)
                self.collected[pl.ds(pl.multiple_of(at, 8), 8), pl.ds(first, n)] = heads[0][i : i + 8]
            return
        x = jnp.concatenate(heads, 0) if len(heads) > 1 else heads[0]
        if x.shape[0] < plan.lanes:
            x = jnp.concatenate([x, jnp.zeros((plan.lanes - x.shape[0], n), jnp.float32)], 0)
        self.ref[0, pl.ds(first, n), tile * plan.lanes : (tile + 1) * plan.lanes] = x.T.astype(self.ref.dtype)

    def write_lone(self, x: Array, tile: int = 0) -> None:
        """x: float32[1, lanes] of a tile, of the lone row."""
        plan, at = self.plan, pl.ds(self.plan.keys, LONE)
        if plan.loose:
            self.complete(plan.keys, LONE)
            self.write(plan.keys, [lone_column(plan, x)[: plan.head_dim]])
            return
        x = jnp.broadcast_to(x, (LONE, plan.lanes))
        self.ref[0, at, tile * plan.lanes : (tile + 1) * plan.lanes] = x.astype(self.ref.dtype)

    def complete(self, first: Any, n: int) -> None:
        """Writes n rows of the tile in which the "loose" head before this step's starts: before this step's come."""
        at = pl.multiple_of(jax.lax.rem(output_tile(self.plan, pl.program_id(1)), 2) * LANES, LANES)
        x = self.collected[pl.ds(at, LANES), pl.ds(first, pl.cdiv(n, LANES) * LANES)]
        self.ref[0, pl.ds(first, n), :] = x.T[:n].astype(self.ref.dtype)

    def flush(self) -> None:
        """The same of all rows, in the steps after the last head."""
        for at, n in pieces(self.plan.rows, LANES):
            self.complete(at, n)


def run_heads(plan: Plan, compute: Callable[[], None], outputs: list[Output]) -> None:
    """Runs `compute` in the steps that have a head."""
    if not plan.loose:
        compute()
        return
    step = pl.program_id(1)
    pl.when(step < plan.heads)(compute)

    @pl.when(step >= plan.heads)
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

    whole = Spec(block, lambda b, n, _: (b, 0, output_tile(p, n)))
    low = Spec(block, lambda b, n, _: (b, 0, first_tile(p, n)))
    high = Spec(block, lambda b, n, _: (b, 0, jnp.minimum(first_tile(p, n) + 1, last)))
    return [low, high], whole, statistics


def grid(plan: Plan) -> tuple[int, int, int]:
    # Steps after the last "loose" head write the tiles that it lies in.
    steps = plan.heads + 1 + plan.unfinished if plan.loose else plan.heads * plan.head_dim // (plan.tiles * plan.lanes)
    return plan.batch, steps, plan.ranges


def collected(plan: Plan) -> Any:
    """Scratch of an Output."""
    return pltpu.VMEM((2 * LANES, pl.cdiv(plan.rows, LANES) * LANES), jnp.float32)


def flat(plan: Plan, *arrays: Array) -> list[Array]:
    return [x.reshape(plan.batch, plan.tokens, plan.heads * plan.head_dim) for x in arrays]
