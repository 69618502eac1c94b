"""Groups of tokens as tiles in VMEM: which rows make one, how they are read and written, what sees what, what fits.

A kernel of `grouped_tpu.py` holds all S tokens of one row of the batch and of some whole heads in VMEM, as they stand
in [B, S, N*D]. They form *runs* of equal length: the frames, or, for `time` over many frames, the places. A *tile* is
what is computed at once. Where a group of tokens that see each other is a run, the tile is one or more whole runs;
where it runs across (`time` over few frames), the tile is `step` neighbouring places in every run: 16 rows of bfloat16
are a whole register tile, so that such a tile is gathered without moving anything, at the price of logits between
different places that a mask throws away.

Runs that do not start at whole register tiles, and places that must become runs, are first copied within VMEM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .tuning import LANES, ceil_to

LEAST_HEAD_DIM = 32  # below, a tile of lanes holds too many heads for one program
CLASS_ROWS = 16  # one bfloat16 register tile: row h is the class token as head h sees it
STEP_UNITS = 32  # of one loop step, where a clip has as many; a unit is 128 queries of one head
MOST_FRAMES_ACROSS = 16  # above, logits between places that a mask throws away cost more than moving the places
MASKED = -1e30  # added to a logit; finite, so that NaN and infinity of a logit stay visible
_LEAST_VMEM_BYTES = 64 * 2**20  # of a v5p's core; v5e and v6e have twice that
# What the compiler takes for itself, spilled registers above all: needed at least, and allowed where there is room.
_VMEM_SLACK_BYTES = 12 * 2**20
_VMEM_SPILL_BYTES = 24 * 2**20

Ref = Any


@dataclass(frozen=True)
class Plan:
    """Everything static about one call. Lengths are in rows (tokens) or lanes (features of some heads)."""

    frames: int
    patches: int
    class_tokens: int
    scale: float
    head_dim: int
    lanes: int
    dtype: Any
    runs: int
    run: int
    run_stored: int  # rows that a run occupies; more than `run` only where runs are staged
    runs_stored: int
    step: int  # rows that a tile takes from each of its pieces
    places_are_runs: bool  # else frames are
    across: bool  # whether groups run across runs; then a tile takes rows of all of them
    staged: bool

    @property
    def heads(self) -> int:
        """Heads of one block of lanes."""
        return self.lanes // self.head_dim

    @property
    def tokens(self) -> int:
        return self.frames * self.patches + self.class_tokens

    @property
    def pieces(self) -> int:
        """Stretches of rows that make a tile."""
        return self.runs if self.across else 1

    @property
    def rows(self) -> int:
        """Of one tile."""
        return self.step * self.pieces

    @property
    def rows_stored(self) -> int:
        return self.runs_stored * self.run_stored

    @property
    def tiles(self) -> int:
        return self.rows_stored // self.rows

    @property
    def masked(self) -> bool:
        """Whether a tile holds keys that some query of it must not see."""
        if self.across:
            return True
        return self.step > self.run_stored or self.run < self.run_stored

    def window(self, head: int) -> slice:
        """The whole lane tiles that hold a head."""
        return slice(head * self.head_dim // LANES * LANES, min(ceil_to((head + 1) * self.head_dim, LANES), self.lanes))

    def features(self, head: int) -> slice:
        """The head's features, as rows of a transposed tile."""
        return slice(head * self.head_dim, (head + 1) * self.head_dim)


def make_plan(shape: tuple[int, ...], dtype: Any, frames: int, mode: str, class_tokens: int, scale: float) -> Plan:
    """shape is [B, S, N, D]."""
    _, tokens, heads, head_dim = shape
    if head_dim % 8 or head_dim < LEAST_HEAD_DIM:
        raise NotImplementedError(
            f"takes head dims that 8 divides, from {LEAST_HEAD_DIM} on, in mode {mode!r}, not {head_dim}"
        )
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"takes bfloat16 and float32, not {dtype}")
    lanes = math.lcm(head_dim, LANES)
    if heads * head_dim % lanes:
        lanes = heads * head_dim
    if lanes // head_dim > CLASS_ROWS:
        raise NotImplementedError(
            f"takes at most {CLASS_ROWS} heads at once in mode {mode!r}; {heads} heads of {head_dim} do not "
            "divide into such blocks of whole 128-lane tiles"
        )
    sublanes = 32 // jnp.dtype(dtype).itemsize
    patches = (tokens - class_tokens) // frames
    across = mode == "time" and frames <= MOST_FRAMES_ACROSS
    places_are_runs = mode == "time" and not across
    runs, run = (patches, frames) if places_are_runs else (frames, patches)
    staged = places_are_runs or run % sublanes != 0
    if across:
        step = 16 * max(1, LANES // (16 * frames))
        run_stored = ceil_to(run, step) if staged else run
        step, runs_stored = math.gcd(step, run_stored), runs
    else:
        run_stored = ceil_to(run, 16) if staged else run
        together = max(1, LANES // run_stored)
        if not staged:
            together = math.gcd(together, runs)
        step, runs_stored = together * run_stored, ceil_to(runs, together)
    # A clip of few tiles takes more heads at a time, for the sake of loop steps that are long enough.
    units = runs_stored * run_stored // min(LANES, step * (runs if across else 1)) * (lanes // head_dim)
    blocks, most = heads * head_dim // lanes, min(CLASS_ROWS * head_dim // lanes, max(1, STEP_UNITS // units))
    lanes *= max(n for n in range(1, most + 1) if blocks % n == 0)
    return Plan(
        frames, patches, class_tokens, scale, head_dim, lanes, jnp.dtype(dtype),
        runs, run, run_stored, runs_stored, step, places_are_runs, across, staged,
    )  # fmt: skip


# --- memory


def _vmem_bytes() -> int:
    """Of the chip the program is made for, where that is known: not when lowering for a TPU from elsewhere."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        return _LEAST_VMEM_BYTES


class Memory(NamedTuple):
    """What a kernel holds in VMEM."""

    scratch: list[tuple[tuple[int, ...], Any]]
    buffers: int  # of each block of tokens
    limit_bytes: int  # that the compiler is given


def memory_of(plan: Plan, mode: str, arrays: int, whole_count: int, extra_outputs: Any, columns: int) -> Memory:
    """arrays: of [B, S, N*D], whole_count of them outputs. Raises NotImplementedError where they do not fit."""
    tokens = plan.tokens
    scratch: list[tuple[tuple[int, ...], Any]] = []
    if plan.masked:
        scratch.append(((plan.rows, plan.rows), jnp.float32))
    if plan.class_tokens:
        kept = 1 if whole_count == 1 else 2
        scratch += [((plan.tiles, CLASS_ROWS, plan.rows), jnp.float32)] * kept
        scratch += [((plan.lanes, LANES), jnp.float32)] * columns
    if plan.staged:
        scratch.append(((ceil_to(tokens, 8), plan.lanes), jnp.float32))
        scratch += [((plan.rows_stored, plan.lanes), plan.dtype)] * arrays

    def size(shape: tuple[int, ...], dtype: Any) -> int:
        *outer, rows, lanes = shape
        size = ceil_to(rows, 16) * ceil_to(lanes, LANES) * jnp.dtype(dtype).itemsize
        for n in outer:
            size *= n
        return size

    one_buffer = arrays * size((tokens, plan.lanes), plan.dtype)
    used = sum(2 * size(shape, jnp.float32) for shape in extra_outputs) + sum(size(*x) for x in scratch)
    there = _vmem_bytes()
    available = there - _VMEM_SLACK_BYTES
    # Two buffers let the next block arrive while this one is computed; one is better than no kernel.
    buffers = 2 if used + 2 * one_buffer <= available else 1
    used += buffers * one_buffer
    if used > available:
        raise NotImplementedError(
            f"holds all tokens of a clip in VMEM in mode {mode!r}: {tokens} tokens of {plan.lanes} features "
            f"need {used / 2**20:.0f} MiB, and {available / 2**20:.0f} are there"
        )
    return Memory(scratch, buffers, min(used + _VMEM_SPILL_BYTES, there - 2**20))


# --- tiles


def _piece(plan: Plan, tile: Array, piece: int) -> Any:
    start = piece * plan.run_stored + tile * plan.step
    return pl.ds(pl.multiple_of(start, math.gcd(plan.run_stored, plan.step)), plan.step)


def load_tile(plan: Plan, ref: Ref, tile: Array) -> Array:
    """[rows, lanes]."""
    parts = [ref[_piece(plan, tile, piece), :] for piece in range(plan.pieces)]
    return parts[0] if plan.pieces == 1 else jnp.concatenate(parts, axis=0)


def store_tile(plan: Plan, ref: Ref, tile: Array, value: Array) -> None:
    for piece in range(plan.pieces):
        ref[_piece(plan, tile, piece), :] = value[piece * plan.step : (piece + 1) * plan.step]


def _split(index: Array, length: int) -> tuple[Array, Array]:
    """Quotient and remainder of an index that is not negative; `//` asks for the device, which may not be there."""
    return jax.lax.div(index, jnp.int32(length)), jax.lax.rem(index, jnp.int32(length))


def write_mask(plan: Plan, ref: Ref) -> None:
    """float32[rows, rows]: what is added to a tile's logits, [keys, queries]."""
    shape = (plan.rows, plan.rows)
    key, query = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    if plan.across:
        seen = _split(key, plan.step)[1] == _split(query, plan.step)[1]
    else:
        (key_run, key), (query_run, _) = _split(key, plan.run_stored), _split(query, plan.run_stored)
        seen = (key_run == query_run) & (key < plan.run)
    ref[...] = jnp.where(seen, 0.0, MASKED)


def tokens_mask(plan: Plan, tile: Array) -> Array:
    """float32[1, rows]: what is added to the class token's logits with a tile, whose last rows may be no tokens."""
    row = jax.lax.broadcasted_iota(jnp.int32, (1, plan.rows), 1)
    if plan.across:
        real = tile * plan.step + _split(row, plan.step)[1] < plan.run
    else:
        run, row = _split(row, plan.run_stored)
        real = (row < plan.run) & (tile * (plan.step // plan.run_stored) + run < plan.runs)
    return jnp.where(real, 0.0, MASKED)


def head_lanes(plan: Plan, x: Array, head: int) -> Array:
    """The head's window of x, with lanes of other heads zero: contracting it over the window gives this head alone."""
    window = plan.window(head)
    x = x[:, window]
    if x.shape[1] == plan.head_dim:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1) + window.start
    own = (lane >= head * plan.head_dim) & (lane < (head + 1) * plan.head_dim)
    if x.dtype == jnp.bfloat16 and x.shape[0] % 16 == 0:
        # Two rows share a word; a bitwise and takes one operation for both, a select would unpack them.
        words = pltpu.bitcast(x, jnp.uint32)
        kept = jnp.where(own, jnp.uint32(0xFFFFFFFF), jnp.uint32(0))
        return pltpu.bitcast(words & jnp.broadcast_to(kept, words.shape), jnp.bfloat16)
    return jnp.where(own, x, jnp.zeros_like(x))


def own_lanes(plan: Plan, x: Array) -> Array:
    """x [CLASS_ROWS, lanes], or [1, lanes] for every row: row h keeps the lanes of head h, the rest is zero."""
    shape = (CLASS_ROWS, plan.lanes)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    first = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * plan.head_dim
    kept = (lane >= first) & (lane < first + plan.head_dim)
    return jnp.where(kept, jnp.broadcast_to(x.astype(jnp.float32), shape), 0.0)


def first_row(x: Array) -> Array:
    """[1, lanes] as the first of CLASS_ROWS rows, the rest zero."""
    shape = (CLASS_ROWS, x.shape[1])
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return jnp.where(row == 0, jnp.broadcast_to(x.astype(jnp.float32), shape), 0.0).astype(x.dtype)


def columns(x: Array) -> Array:
    """[1, lanes] -> float32[lanes, 128]: the row as a column, repeated along lanes."""
    return jnp.broadcast_to(x.astype(jnp.float32), (LANES, x.shape[1])).T


# --- staging: runs that do not stand at whole register tiles

COPY_ROWS = 256


def _copy(source: Ref, target: Ref, rows: int) -> None:
    """The first rows of source into target, converted; both start at a whole register tile."""

    def chunk(index: Array, _: None) -> None:
        part = pl.ds(pl.multiple_of(index * COPY_ROWS, COPY_ROWS), COPY_ROWS)
        target[part, :] = source[part, :].astype(target.dtype)

    whole = rows // COPY_ROWS
    if whole:
        jax.lax.fori_loop(0, whole, chunk, None)
    if rows % COPY_ROWS:
        target[whole * COPY_ROWS : rows, :] = source[whole * COPY_ROWS : rows, :].astype(target.dtype)


def _run_of(plan: Plan, run: Any) -> Any:
    """Where a run stands among the tokens."""
    if plan.places_are_runs:
        return pl.ds(run, plan.run, stride=plan.runs)
    return pl.ds(run * plan.run, plan.run)


def _each_run(plan: Plan, body: Any) -> None:
    """body(run) for every run: unrolled where runs are frames, which may start at any row."""
    if plan.places_are_runs:
        jax.lax.fori_loop(0, plan.runs, lambda run, _: body(run), None)
    else:
        for run in range(plan.runs):
            body(run)


def stage_in(plan: Plan, ref: Ref, wide: Ref, staged: Ref) -> None:
    """ref [S, lanes] into runs; `wide` float32[S, lanes] is left with ref's values.

    Single rows can be addressed in 32-bit words only, hence the way through float32.
    """
    _copy(ref, wide, plan.tokens)
    # Rows that are no tokens must hold numbers: they are masked, and NaN * 0 is NaN.
    staged[...] = jnp.zeros(staged.shape, staged.dtype)

    def one(run: Any) -> None:
        start = run * plan.run_stored
        if not isinstance(run, int):
            start = pl.multiple_of(start, 16)
        for lane in range(0, plan.lanes, LANES):
            part = slice(lane, min(lane + LANES, plan.lanes))
            staged[pl.ds(start, plan.run), part] = wide[_run_of(plan, run), part].astype(staged.dtype)

    _each_run(plan, one)


def stage_out(plan: Plan, staged: Ref, wide: Ref, ref: Ref, class_row: Array | None) -> None:
    """Back from runs to [S, lanes]; class_row is float32[1, lanes]."""

    def one(run: Any) -> None:
        start = run * plan.run_stored
        if not isinstance(run, int):
            start = pl.multiple_of(start, 16)
        for lane in range(0, plan.lanes, LANES):
            part = slice(lane, min(lane + LANES, plan.lanes))
            wide[_run_of(plan, run), part] = staged[pl.ds(start, plan.run), part].astype(jnp.float32)

    _each_run(plan, one)
    if class_row is not None:
        wide[plan.tokens - 1 : plan.tokens, :] = class_row
    _copy(wide, ref, plan.tokens)


# --- a kernel's references, from beginning to end


def take(refs: list[Ref], count: int) -> list[Ref]:
    taken, refs[:] = refs[:count], refs[count:]
    return taken


def open_blocks(plan: Plan, inputs: list[Ref], outputs: list[Ref], refs: list[Ref]) -> tuple[list[Ref], list[Ref], Any]:
    """Inputs and outputs as tiles are read and written, and the inputs' class tokens [1, lanes]; scratch is taken."""
    inputs, outputs = [ref.at[0] for ref in inputs], [ref.at[0] for ref in outputs]
    last = slice(plan.tokens - 1, plan.tokens)
    if not plan.staged:
        return inputs, outputs, [ref[last, :] for ref in inputs] if plan.class_tokens else None
    (wide,) = take(refs, 1)
    staged, classes = take(refs, len(inputs)), []
    for ref, target in zip(inputs, staged):
        stage_in(plan, ref, wide, target)
        if plan.class_tokens:
            classes.append(wide[last, :].astype(plan.dtype))
    return staged, take(refs, len(outputs)), classes


def close_blocks(
    plan: Plan, written: list[Ref], outputs: list[Ref], wide: Ref, class_rows: Sequence[Array | None]
) -> None:
    """What `open_blocks` began, undone for the outputs; class_rows are float32[1, lanes]."""
    for source, output, row in zip(written, outputs, class_rows):
        target = output.at[0]
        if plan.staged:
            stage_out(plan, source, wide, target, row)
        elif row is not None:
            target[plan.tokens - 1 : plan.tokens, :] = row.astype(plan.dtype)
