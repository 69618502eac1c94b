"""Pallas bodies of the contrastive loss for TPU: local video rows against one block of visiting text rows.

A call walks the tiles of the [R, C] block of scores and never stores them. Two kernels:

* `statistics`: one matmul a tile. "softmax": maximum and sum of exponentials, for rows and columns from one set of
  scores; "sigmoid": the loss alone.
* `gradients`: three matmuls a tile. Scores again, their derivative P, then d_video += P @ text, d_text += P.T @ video.
  "sigmoid" needs nothing but the scores for P and gives the loss in the same pass.

Exponentials and logarithms are those of base 2, which is what the hardware computes. Statistics stay spread over the
128 lanes (rows) or 8 sublanes (columns) of a register, so that no kernel reduces across them: `merged` does at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .manual_axes import alike
from .tuning import CONTRASTIVE_VMEM_BYTES, LANES, LOG2E, ContrastiveLayout

SUBLANES = 8
MASKED = -1e30  # score of a pair that does not count
DTYPES = ("bfloat16", "float32")
ROW_BY_COLUMN = (((1,), (1,)), ((), ()))  # [r, e], [c, e] -> [r, c]
COLUMN_BY_ROW = (((0,), (0,)), ((), ()))  # [r, c], [r, e] -> [c, e]


def padded(x: Array, sizes: ContrastiveLayout) -> Array:
    """[B, E] -> [rows, width], or [B] -> [rows]."""
    pads = [(0, sizes.rows - x.shape[0])] + [(0, sizes.width - n) for n in x.shape[1:]]
    return jnp.pad(x, pads) if any(after for _, after in pads) else x


def by_row(x: Array) -> Array:
    """[rows] -> [rows, 128], as the kernels read a number of each row."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], LANES))


# --- shared by the kernels


class Visit(NamedTuple):
    """What a call needs to know beside the embeddings."""

    # float32[2], times log2(e): factor of the products; their bias (sigmoid) or the fixed maximum (softmax)
    numbers: Array
    places: Array  # int32[3]: are the visitors the device's own rows; place of the first of them; 0 if maxima are fixed
    row_groups: Array | None  # int32[rows, 128]
    column_groups: Array | None  # int32[1, columns]


class _Masks(NamedTuple):
    """Which pairs of a tile are true ones, and which count. Only some tiles have any that are or do not."""

    sizes: ContrastiveLayout
    places: Any  # int32[3] in SMEM
    row_groups: Any  # int32[row_block, 128] or None
    column_groups: Any  # int32[1, column_block] or None

    def needed(self, i: Any, j: Any, positives: bool) -> Any:
        """bool[]: has tile (i, j) pairs that do not count or, if asked for, true pairs."""
        row, column = i * self.sizes.row_block, self.places[1] + j * self.sizes.column_block
        needed = (row + self.sizes.row_block > self.sizes.batch) | (column + self.sizes.column_block > self.sizes.batch)
        if positives:
            crosses = (row < column + self.sizes.column_block) & (column < row + self.sizes.row_block)
            needed |= (self.places[0] == 1) & crosses
        return needed

    def of(self, i: Any, j: Any, first: Any, count: int) -> tuple[Array, Array]:
        """positive, counts: bool[row_block, count] of the tile's columns from `first` on."""
        row = i * self.sizes.row_block + jax.lax.broadcasted_iota(jnp.int32, (self.sizes.row_block, count), 0)
        column = self.places[1] + j * self.sizes.column_block + first
        column = column + jax.lax.broadcasted_iota(jnp.int32, (self.sizes.row_block, count), 1)
        positive = (row == column) & (self.places[0] == 1)
        counts = (row < self.sizes.batch) & (column < self.sizes.batch)
        if self.row_groups is not None:
            other = self.row_groups[:, :1] != self.column_groups[:, pl.ds(first, count)]
            counts &= other | positive
        return positive, counts


def _softplus(x: Array) -> Array:
    """log2(1 + 2**x). Small terms matter, as there are as many as pairs: 1 + small would lose them."""
    small = jnp.exp2(-jnp.abs(x))
    series = small * (LOG2E - small * (LOG2E / 2))
    return jnp.maximum(x, 0) + jnp.where(small < 2**-11, series, jnp.log2(1 + small))


def _registers(x: Array) -> Array:
    """[r, c] -> [8, 128]: sums over whole registers."""
    x = jnp.sum(x.reshape(x.shape[0] // SUBLANES, SUBLANES, x.shape[1]), axis=0)
    return functools.reduce(jnp.add, (x[:, n : n + LANES] for n in range(0, x.shape[1], LANES)))


def _precision(x: Any) -> jax.lax.Precision:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _scores(rows: Array, columns: Array) -> Array:
    return jax.lax.dot_general(
        rows, columns, ROW_BY_COLUMN, precision=_precision(rows), preferred_element_type=jnp.float32
    )


def _over_chunks(chunk: Callable[[Any, bool], None], sizes: ContrastiveLayout, masked: Any, always: bool) -> None:
    """chunk(first column, masked) for all chunks of a tile; `masked` says whether this tile needs masks.

    Laid out one after another, so that the MXU works on a chunk while another one is reduced; tiles that need masks
    are few unless there are groups (`always`), and take a loop to be short.
    """

    def laid_out() -> None:
        for first in range(0, sizes.column_block, sizes.chunk):
            chunk(first, always)

    def looped() -> None:
        @pl.loop(0, sizes.column_block // sizes.chunk)
        def _(n: Any) -> None:
            chunk(pl.multiple_of(n * sizes.chunk, LANES), True)

    if always:
        laid_out()
    elif masked is True:
        looped()
    else:
        pl.when(jnp.logical_not(masked))(laid_out)
        pl.when(masked)(looped)


def _cost(video: Array, sizes: ContrastiveLayout, matmuls: int, exponentials: int) -> pl.CostEstimate:
    """Of one call, so that the compiler knows how much of an exchange it hides."""
    pairs = sizes.rows * sizes.columns
    passes = 6 if video.dtype == jnp.float32 else 1  # of the MXU, whose numbers are bfloat16
    embeddings = (sizes.rows + sizes.columns) * sizes.width
    return pl.CostEstimate(
        flops=2 * passes * matmuls * pairs * sizes.width,
        transcendentals=exponentials * pairs,
        bytes_accessed=embeddings * (2 if matmuls == 1 else 10),
    )


_SMEM = pl.BlockSpec(memory_space=pltpu.SMEM)
_HBM = pl.BlockSpec(memory_space=pl.ANY)


def _call(
    body: Callable[..., None],
    name: str,
    grid: tuple[int, ...],
    inputs: list[tuple[Any, pl.BlockSpec]],
    outputs: list[tuple[tuple[int, ...], pl.BlockSpec]],
    aliases: dict[int, int],
    scratch: list[Any],
    cost: pl.CostEstimate,
) -> list[Array]:
    """pallas_call of float32 outputs; inputs that are None are left out of the call and given to the body as None."""
    there = [x is not None for x, _ in inputs]
    arrays = alike([x for x, _ in inputs if x is not None])
    like = jax.typeof(arrays[0])

    def kernel(*refs: Any) -> None:
        rest = list(refs)
        body(*(rest.pop(0) if present else None for present in there), *rest)

    call = pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=[spec for x, spec in inputs if x is not None],
        out_specs=[spec for _, spec in outputs],
        out_shape=[like.update(shape=shape, dtype=jnp.dtype("float32"), weak_type=False) for shape, _ in outputs],
        input_output_aliases={sum(there[:n]): out for n, out in aliases.items()},
        scratch_shapes=scratch,
        cost_estimate=cost,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(pltpu.GridDimensionSemantics.ARBITRARY,) * len(grid),
            vmem_limit_bytes=CONTRASTIVE_VMEM_BYTES,
        ),
    )
    with jax.enable_x64(False):  # constants of the body must not become 64-bit numbers, which the chip lacks
        return call(*arrays)


# --- statistics


def start_of_statistics(sizes: ContrastiveLayout, kind: str, top: Array | float = MASKED) -> tuple[Any, Any]:
    """State of the rows, [rows, 128] each, and of one part of the columns, [8, columns] each.

    softmax: maximum so far and sum of exponentials of what is above it; sigmoid: loss / log(2), of the rows only.
    """
    rows, columns = (sizes.rows, LANES), (SUBLANES, sizes.columns)
    if kind == "sigmoid":
        return (jnp.zeros(rows, jnp.float32),), ()
    first, second = ((jnp.full(shape, top, jnp.float32), jnp.zeros(shape, jnp.float32)) for shape in (rows, columns))
    return first, second


def merged(state: tuple[Array, Array], axis: int) -> Array:
    """Natural log-sum-exp, over the lanes (axis 1) of the state of rows or the sublanes (axis 0) of that of columns."""
    top, total = state
    highest = jnp.max(top, axis=axis)
    total = jnp.sum(total * jnp.exp2(top - jnp.expand_dims(highest, axis)), axis=axis)
    return (highest + jnp.log2(total)) / LOG2E


def statistics(
    video: Array,
    text: Array,
    visit: Visit,
    rows: tuple[Array, ...],
    columns: tuple[Array, ...],
    sizes: ContrastiveLayout,
    kind: str,
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """video [rows, width] and text [columns, width] taken into the state of rows and columns.

    With "softmax" and visit.places[2] == 0 all maxima stay what they were at the start: the caller knows that neither
    does any exponential overflow nor any sum vanish. One exponential then serves rows and columns.
    """
    softmax = kind == "softmax"

    def body(numbers: Any, places: Any, row_groups: Any, column_groups: Any, video: Any, text: Any, *refs: Any) -> None:
        state_in, state = refs[: len(refs) // 2], refs[len(refs) // 2 :]
        i, j = pl.program_id(0), pl.program_id(1)
        masks = _Masks(sizes, places, row_groups, column_groups)

        def start(inputs: Any, outputs: Any) -> None:
            for source, target in zip(inputs, outputs, strict=True):
                target[...] = source[...]

        pl.when(j == 0)(lambda: start(state_in[: len(rows)], state[: len(rows)]))
        pl.when((i == 0) & (j == 0))(lambda: start(state_in[len(rows) :], state[len(rows) :]))

        def lanes(x: Array) -> list[Array]:
            return [x[:, n : n + LANES] for n in range(0, sizes.chunk, LANES)]

        def loss(x: Array, first: Any, masked: bool) -> None:
            if masked:
                positive, counts = masks.of(i, j, first, sizes.chunk)
                x = jnp.where(counts, jnp.where(positive, -x, x), MASKED)
            state[0][...] += functools.reduce(jnp.add, lanes(_softplus(x)))

        def fixed(x: Array, first: Any, masked: bool) -> None:
            if masked:
                x = jnp.where(masks.of(i, j, first, sizes.chunk)[1], x, MASKED)
            _, row_total, _, column_total = state
            x = jnp.exp2(x - numbers[1])
            row_total[...] += functools.reduce(jnp.add, lanes(x))
            part = pl.ds(pl.multiple_of(j * sizes.column_block, LANES) + first, sizes.chunk)
            column_total[:, part] += jnp.sum(x.reshape(-1, SUBLANES, sizes.chunk), axis=0)

        def running(x: Array, first: Any, masked: bool) -> None:
            if masked:
                x = jnp.where(masks.of(i, j, first, sizes.chunk)[1], x, MASKED)
            row_top, row_total, column_top, column_total = state
            before = row_top[...]
            top = functools.reduce(jnp.maximum, lanes(x), before)
            terms = functools.reduce(jnp.add, (jnp.exp2(y - top) for y in lanes(x)))
            row_total[...] = row_total[...] * jnp.exp2(before - top) + terms
            row_top[...] = top
            part = pl.ds(pl.multiple_of(j * sizes.column_block, LANES) + first, sizes.chunk)
            x = x.reshape(-1, SUBLANES, sizes.chunk)
            before = column_top[:, part]
            top = jnp.maximum(before, jnp.max(x, axis=0))
            column_total[:, part] = column_total[:, part] * jnp.exp2(before - top) + jnp.sum(jnp.exp2(x - top), axis=0)
            column_top[:, part] = top

        def work(take: Callable[[Array, Any, bool], None]) -> Callable[[Any, bool], None]:
            def chunk(first: Any, masked: bool) -> None:
                products = _scores(video[...], text[pl.ds(first, sizes.chunk), :])
                take(products * numbers[0] + (0 if softmax else numbers[1]), first, masked)

            return chunk

        needed = masks.needed(i, j, positives=not softmax)
        if softmax:
            pl.when(places[2] == 0)(lambda: _over_chunks(work(fixed), sizes, needed, row_groups is not None))
            pl.when(places[2] != 0)(lambda: _over_chunks(work(running), sizes, True, row_groups is not None))
        else:
            _over_chunks(work(loss), sizes, needed, row_groups is not None)

    row_state = pl.BlockSpec((sizes.row_block, LANES), lambda i, j: (i, 0))
    column_state = pl.BlockSpec((SUBLANES, sizes.columns), lambda i, j: (0, 0))
    specs = [row_state] * len(rows) + [column_state] * len(columns)
    states = [*rows, *columns]
    out = _call(
        body,
        f"contrastive_{kind}_statistics",
        (sizes.rows // sizes.row_block, sizes.columns // sizes.column_block),
        [
            (visit.numbers, _SMEM),
            (visit.places, _SMEM),
            (visit.row_groups, row_state),
            (visit.column_groups, pl.BlockSpec((1, sizes.column_block), lambda i, j: (0, j))),
            (video, pl.BlockSpec((sizes.row_block, sizes.width), lambda i, j: (i, 0))),
            (text, pl.BlockSpec((sizes.column_block, sizes.width), lambda i, j: (j, 0))),
            *zip(states, specs, strict=True),
        ],
        [(x.shape, spec) for x, spec in zip(states, specs, strict=True)],
        {6 + n: n for n in range(len(states))},
        [],
        _cost(video, sizes, 1, 1 if softmax else 3),
    )
    return tuple(out[: len(rows)]), tuple(out[len(rows) :])


# --- gradients


def gradients(
    video: Array,
    text: Array,
    visit: Visit,
    row_lse: Array | None,
    column_lse: Array | None,
    d_video: Array,
    d_text: Array,
    sizes: ContrastiveLayout,
) -> tuple[Array, Array, Array | None]:
    """d_video [rows, width] += P @ text and d_text [columns, width] += P.T @ video, where P is the scores' derivative.

    softmax: row_lse [rows, 128] and column_lse [1, columns] are log-sum-exps of base 2; the loss is taken to be the sum
    over rows and columns of log-sum-exp less score of the true pair, with no division by two. sigmoid: they are None,
    and the third result is float32[2, 8, 128], parts of the sums of loss / log(2) and of P.
    """
    softmax = row_lse is not None
    down, across = sizes.rows // sizes.row_block, sizes.columns // sizes.column_block

    def body(
        numbers: Any,
        places: Any,
        row_groups: Any,
        column_groups: Any,
        video: Any,
        text: Any,
        row_lse: Any,
        column_lse: Any,
        d_video_in: Any,
        d_text_in: Any,
        d_video_out: Any,
        d_text_out: Any,
        *rest: Any,
    ) -> None:
        sums, scratch = rest[:-8], rest[-8:]
        d_rows, d_columns, late_rows, late_columns, rows_in, rows_out, columns_in, columns_out = scratch
        i, j = pl.program_id(0), pl.program_id(1)
        masks = _Masks(sizes, places, row_groups, column_groups)
        slot = i % 2

        # Both gradients live in scratch while they grow. Those of the visitors stay for the whole call, each block read
        # just before its first use and written after its last. Those of the rows take turns in two slots.

        # The first tile does not wait for what it adds to, which would have nothing to hide behind.

        def of_rows(n: Any, back: bool) -> Any:
            turn = jnp.int32(n % 2)
            here, there = d_rows.at[turn], pl.ds(n * sizes.row_block, sizes.row_block)
            if back:
                return pltpu.make_async_copy(here, d_video_out.at[there], rows_out.at[turn])
            return pltpu.make_async_copy(d_video_in.at[there], here, rows_in.at[turn])

        def of_columns(n: Any, back: bool) -> Any:
            part = pl.ds(n * sizes.column_block, sizes.column_block)
            if back:
                return pltpu.make_async_copy(d_columns.at[part], d_text_out.at[part], columns_out)
            return pltpu.make_async_copy(d_text_in.at[part], d_columns.at[part], columns_in.at[jnp.int32(n % 2)])

        first_tile = (i == 0) & (j == 0)
        zero = jnp.int32(0)
        first_blocks = (
            (d_video_in, d_rows.at[zero], late_rows, rows_in.at[zero]),
            (d_text_in, d_columns.at[pl.ds(0, sizes.column_block)], late_columns, columns_in.at[zero]),
        )

        @pl.when(first_tile)
        def _() -> None:
            for source, target, late, arrived in first_blocks:
                pltpu.make_async_copy(source.at[pl.ds(0, late.shape[0])], late, arrived).start()
                target[...] = jnp.zeros(target.shape, jnp.float32)
            for x in sums:
                x[...] = jnp.zeros(x.shape, jnp.float32)

        @pl.when((i == 0) & (j + 1 < across))
        def _() -> None:
            of_columns(j + 1, False).start()

        pl.when((i > 0) & (j == 0))(lambda: of_rows(i, False).wait())
        pl.when((i == 0) & (j > 0))(lambda: of_columns(j, False).wait())

        @pl.when((j == across - 1) & (i + 1 < down))
        def _() -> None:
            pl.when(i > 0)(lambda: of_rows(i - 1, True).wait())
            of_rows(i + 1, False).start()

        def softmax_derivative(products: Array, first: Any, masked: bool) -> Array:
            x = products * numbers[0]
            p = jnp.exp2(x - row_lse[:, :1]) + jnp.exp2(x - column_lse[:, pl.ds(first, sizes.chunk)])
            if masked:
                # The true pair belongs in here: P is close to 2 there, and only what is left counts.
                positive, counts = masks.of(i, j, first, sizes.chunk)
                p = jnp.where(counts, jnp.where(positive, p - 2, p), 0)
            return p

        def sigmoid_derivative(products: Array, first: Any, masked: bool) -> Array:
            x = products * numbers[0] + numbers[1]
            if masked:
                positive, counts = masks.of(i, j, first, sizes.chunk)
                x = jnp.where(counts, jnp.where(positive, -x, x), MASKED)
            loss = _softplus(x)
            p = jnp.exp2(x - loss)
            if masked:
                p = jnp.where(positive, -p, p)
            (total,) = sums
            total[0] += _registers(loss)
            total[1] += _registers(p)
            return p

        def chunk(first: Any, masked: bool) -> None:
            rows, columns = video[...], text[pl.ds(first, sizes.chunk), :]
            derivative = softmax_derivative if softmax else sigmoid_derivative
            p = derivative(_scores(rows, columns), first, masked).astype(rows.dtype)
            precision = _precision(rows)
            d_rows[slot] += jnp.dot(p, columns, precision=precision, preferred_element_type=jnp.float32)
            part = pl.ds(pl.multiple_of(j * sizes.column_block, LANES) + first, sizes.chunk)
            d_columns[part, :] += jax.lax.dot_general(
                p, rows, COLUMN_BY_ROW, precision=precision, preferred_element_type=jnp.float32
            )

        _over_chunks(chunk, sizes, masks.needed(i, j, positives=True), row_groups is not None)

        @pl.when(first_tile)
        def _() -> None:
            for source, target, late, arrived in first_blocks:
                pltpu.make_async_copy(source.at[pl.ds(0, late.shape[0])], late, arrived).wait()
                target[...] += late[...]

        pl.when(j == across - 1)(lambda: of_rows(i, True).start())
        pl.when(i == down - 1)(lambda: of_columns(j, True).start())

        @pl.when((i == down - 1) & (j == across - 1))
        def _() -> None:
            for n in range(max(down - 2, 0), down):
                of_rows(n, True).wait()
            for n in range(across):
                of_columns(n, True).wait()

    row_number = pl.BlockSpec((sizes.row_block, LANES), lambda i, j: (i, 0))
    column_number = pl.BlockSpec((1, sizes.column_block), lambda i, j: (0, j))
    outputs: list[tuple[tuple[int, ...], pl.BlockSpec]] = [(d_video.shape, _HBM), (d_text.shape, _HBM)]
    if not softmax:
        outputs.append(((2, SUBLANES, LANES), pl.BlockSpec((2, SUBLANES, LANES), lambda i, j: (0, 0, 0))))
    out = _call(
        body,
        f"contrastive_{'softmax' if softmax else 'sigmoid'}_gradients",
        (down, across),
        [
            (visit.numbers, _SMEM),
            (visit.places, _SMEM),
            (visit.row_groups, row_number),
            (visit.column_groups, column_number),
            (video, pl.BlockSpec((sizes.row_block, sizes.width), lambda i, j: (i, 0))),
            (text, pl.BlockSpec((sizes.column_block, sizes.width), lambda i, j: (j, 0))),
            (row_lse, row_number),
            (column_lse, column_number),
            (d_video, _HBM),
            (d_text, _HBM),
        ],
        outputs,
        {8: 0, 9: 1},
        [
            pltpu.VMEM((2, sizes.row_block, sizes.width), jnp.float32),
            pltpu.VMEM((sizes.columns, sizes.width), jnp.float32),
            pltpu.VMEM((sizes.row_block, sizes.width), jnp.float32),
            pltpu.VMEM((sizes.column_block, sizes.width), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA(()),
        ],
        _cost(video, sizes, 3, 2 if softmax else 3),
    )
    return out[0], out[1], None if softmax else out[2]
