"""`space` and `time` attention of a clip on a TPU, forward and backward: [B, S, N*D] is read and written in place.

One grid step holds all tokens of a clip and one block of whole heads (two of 64 lanes, sixteen of 72) in VMEM, and
walks over its tiles (see `grouped_tpu_tiles.py`). Inside a tile, 128 queries of one head at a time are a *unit*:

    logits^T = K Q^T          [keys, 128]   keys stream through the MXU, queries are its weights
    P^T = softmax over keys   [keys, 128]   whole rows: no running maximum; sums run along sublanes
    O^T = V^T P^T             [D, 128]      D rows stream, not 128: nothing is lost to lanes that a head does not fill

Heads that share lanes are told apart by zeros in the queries, so that nothing is ever sliced across lanes. The class
token as a key is one more row of K; what it adds to outputs is a product of a column and a row, on the vector unit. As
a query it sees every token: all its heads are rows of one small product with each tile.

Units are short and each is one chain of dependent steps, so the kernels are written as pipelines: logits of a unit
are asked for some units before they are used.

The backward pass computes logits anew, and softmax statistics with them: that costs less than reading them would.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .grouped_tpu_tiles import (
    CLASS_ROWS,
    STEP_UNITS,
    Plan,
    Ref,
    close_blocks,
    columns,
    first_row,
    head_lanes,
    load_tile,
    make_plan,
    memory_of,
    open_blocks,
    own_lanes,
    store_tile,
    take,
    tokens_mask,
    write_mask,
)
from .tuning import LANES, LN2, LOG2E, ceil_to

NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))


def _dot(a: Array, b: Array, dims: Any = NN) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _pipeline(units: Sequence[Any], stages: Sequence[Callable[..., Any]], lags: Sequence[int]) -> list[Any]:
    """stages[-1](...stages[0](unit)) of all units, in order; lags[n - 1] is how many units stage n runs behind."""
    results: list[list[Any]] = [list(units), *([] for _ in stages)]
    delays = [sum(lags[:n]) for n in range(len(stages))]
    for time in range(len(units) + delays[-1]):
        for n, stage in enumerate(stages):
            index = time - delays[n]
            if 0 <= index < len(units):
                results[n + 1].append(stage(results[n][index], units[index]))
                if n:
                    results[n][index] = None
    return results[-1]


def _units(plan: Plan, tile: Any) -> list[Any]:
    """(tile, first query, number of queries, head), heads innermost."""
    return [
        (tile, first, min(LANES, plan.rows - first), head)
        for first in range(0, plan.rows, LANES)
        for head in range(plan.heads)
    ]


def _unroll(plan: Plan) -> int:
    """Tiles of one loop step: enough units to hide how long each takes, within what compiles soon."""
    wanted = max(1, STEP_UNITS // len(_units(plan, None)))
    return max(n for n in range(1, wanted + 1) if plan.tiles % n == 0)


def _feature_rows(plan: Plan, transposed: Array, head: int) -> tuple[Array, slice]:
    """Rows of a head in a transposed tile, widened to whole bfloat16 register tiles; the head's place among them."""
    own = plan.features(head)
    first = own.start // 16 * 16
    last = min(ceil_to(own.stop, 16), plan.lanes)
    return transposed[first:last], slice(own.start - first, own.stop - first)


def _loop(plan: Plan, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """body(tiles, carry) over all tiles, some at a time."""
    unroll = _unroll(plan)
    return jax.lax.fori_loop(
        0, plan.tiles // unroll, lambda i, carry: body([i * unroll + n for n in range(unroll)], carry), carry
    )


def _softmax(plan: Plan, logits: Array, mask: Ref | None, first: int) -> tuple[Array, Array | None, Array, Array]:
    """logits [keys (and CLASS_ROWS), queries] -> exponentials, the class key's, maxima (of log 2), sums."""
    own, factor = None, plan.scale * LOG2E
    if plan.class_tokens:
        logits, own = logits[: plan.rows], logits[plan.rows : plan.rows + 1] * factor
    logits = logits * factor
    if mask is not None:
        logits = logits + mask[:, first : first + logits.shape[1]]
    top = jnp.max(logits, axis=0, keepdims=True)
    if own is not None:
        top = jnp.maximum(top, own)
    weights = jnp.exp2(logits - top)
    total = jnp.sum(weights, axis=0, keepdims=True)
    if own is not None:
        own = jnp.exp2(own - top)
        total = total + own
    return weights, own, top, total


def _class_logits(plan: Plan, rows: Array, k: Array, tile: Any) -> Array:
    """float32[CLASS_ROWS, rows]: the class token's logits with a tile."""
    logits = _dot(rows, k, NT) * (plan.scale * LOG2E)
    return logits + tokens_mask(plan, tile) if plan.staged else logits


def _forward_kernel(*all_refs: Ref, plan: Plan) -> None:
    refs = list(all_refs)
    inputs, outputs, (lse_ref,) = take(refs, 3), take(refs, 1), take(refs, 1)
    class_lse_ref: Ref = take(refs, 1)[0] if plan.class_tokens else None
    mask: Ref = take(refs, 1)[0] if plan.masked else None
    class_scratch: list[Ref] = take(refs, 2) if plan.class_tokens else [None] * 2
    logits_ref, v_column = class_scratch
    wide = refs[0] if plan.staged else None
    (q_ref, k_ref, v_ref), written, classes = open_blocks(plan, inputs, outputs, refs)
    if mask is not None:
        write_mask(plan, mask)

    carry: Any = ()
    if classes:
        q_class, k_class, v_class = classes
        q_rows, k_row = own_lanes(plan, q_class).astype(plan.dtype), first_row(k_class)
        v_column[...] = columns(v_class)
        to_itself = _dot(q_rows, k_row, NT)[:, :1] * (plan.scale * LOG2E)

        def class_logits(tiles: list[Any], top: Array) -> Array:
            for tile in tiles:
                logits = _class_logits(plan, q_rows, load_tile(plan, k_ref, tile), tile)
                logits_ref[tile] = logits
                top = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
            return top

        class_top = _loop(plan, class_logits, to_itself)
        own = jnp.exp2(to_itself - class_top)
        carry = own, own * own_lanes(plan, v_class)

    def read(tile: Any, carry: Any) -> tuple[Any, tuple[Array, Array, Array]]:
        q, k, v = (load_tile(plan, ref, tile) for ref in (q_ref, k_ref, v_ref))
        if classes:
            weights = jnp.exp2(logits_ref[tile] - class_top)
            total = carry[0] + jnp.sum(weights, axis=1, keepdims=True)
            carry = total, carry[1] + _dot(weights.astype(plan.dtype), v)
            k = jnp.concatenate([k, k_row], axis=0)
        return carry, (q, k, v.T)

    def logits(unit: Any, _: Any) -> Array:
        (q, k, _), first, queries, head = unit
        return _dot(k[:, plan.window(head)], head_lanes(plan, q[first : first + queries], head), NT)

    def softmax(logits: Array, unit: Any) -> Any:
        weights, own, top, total = _softmax(plan, logits, mask, unit[1])
        return weights.astype(plan.dtype), own, top, total

    def output(state: Any, unit: Any) -> tuple[Array, Array]:
        (_, _, v_t), _, queries, head = unit
        weights, own, top, total = state
        values, place = _feature_rows(plan, v_t, head)
        out = _dot(values, weights)[place]
        if own is not None:
            out = out + v_column[plan.features(head), :queries] * own
        return out * (1 / total), top * LN2 + jnp.log(total)

    def step(tiles: list[Any], carry: Any) -> Any:
        units = []
        for tile in tiles:
            carry, tensors = read(tile, carry)
            units += _units(plan, tensors)
        results = _pipeline(units, (logits, softmax, output), (max(2, 1536 // plan.rows), 2))
        for tile in tiles:
            out = []
            for first in range(0, plan.rows, LANES):
                here, results = results[: plan.heads], results[plan.heads :]
                out.append(jnp.concatenate([o for o, _ in here], axis=0).astype(plan.dtype).T)
                lse_ref[0, 0, tile, :, first : first + LANES] = jnp.concatenate([lse for _, lse in here], axis=0)
            store_tile(plan, written[0], tile, jnp.concatenate(out, axis=0))
        return carry

    carry = _loop(plan, step, carry)
    row = None
    if classes:
        total, out = carry
        row = jnp.sum(own_lanes(plan, out * (1 / total)), axis=0, keepdims=True)
        class_lse_ref[0, 0] = jnp.broadcast_to(class_top * LN2 + jnp.log(total), (CLASS_ROWS, LANES))
    close_blocks(plan, written, outputs, wide, [row])


def _backward_kernel(*all_refs: Ref, plan: Plan) -> None:
    refs = list(all_refs)
    inputs, outputs = take(refs, 4), take(refs, 3)
    mask: Ref = take(refs, 1)[0] if plan.masked else None
    class_scratch: list[Ref] = take(refs, 5) if plan.class_tokens else [None] * 5
    logits_ref, dp_ref, q_column, k_column, do_column = class_scratch
    wide = refs[0] if plan.staged else None
    (q_ref, k_ref, v_ref, do_ref), written, classes = open_blocks(plan, inputs, outputs, refs)
    if mask is not None:
        write_mask(plan, mask)

    carry: Any = ()
    if classes:
        q_class, k_class, v_class, do_class = classes
        q_rows, do_rows = (own_lanes(plan, x).astype(plan.dtype) for x in (q_class, do_class))
        k_row, v_row = first_row(k_class), first_row(v_class)
        for column, row in ((q_column, q_class), (k_column, k_class), (do_column, do_class)):
            column[...] = columns(row)
        to_itself = _dot(q_rows, k_row, NT)[:, :1] * (plan.scale * LOG2E)
        dp_itself = _dot(do_rows, v_row, NT)[:, :1]

        def class_logits(tiles: list[Any], top: Array) -> Array:
            for tile in tiles:
                logits = _class_logits(plan, q_rows, load_tile(plan, k_ref, tile), tile)
                logits_ref[tile], dp_ref[tile] = logits, _dot(do_rows, load_tile(plan, v_ref, tile), NT)
                top = jnp.maximum(top, jnp.max(logits, axis=1, keepdims=True))
            return top

        def class_sums(tiles: list[Any], sums: tuple[Array, Array]) -> tuple[Array, Array]:
            for tile in tiles:
                weights = jnp.exp2(logits_ref[tile] - class_top)
                total = sums[0] + jnp.sum(weights, axis=1, keepdims=True)
                sums = total, sums[1] + jnp.sum(weights * dp_ref[tile], axis=1, keepdims=True)
            return sums

        class_top = _loop(plan, class_logits, to_itself)
        own = jnp.exp2(to_itself - class_top)
        class_total, class_delta = _loop(plan, class_sums, (own, own * dp_itself))
        class_inverse = 1 / class_total
        class_delta = class_delta * class_inverse
        own = own * class_inverse
        d_own = own * (dp_itself - class_delta) * plan.scale
        carry = d_own * own_lanes(plan, k_class), d_own * own_lanes(plan, q_class), own * own_lanes(plan, do_class)

    def read(tile: Any, carry: Any) -> tuple[Any, Any]:
        q, k, v, do = (load_tile(plan, ref, tile) for ref in (q_ref, k_ref, v_ref, do_ref))
        transposed = q.T, k.T, do.T
        by_class = None
        if classes:
            weights = jnp.exp2(logits_ref[tile] - class_top) * class_inverse
            d_logits = weights * (dp_ref[tile] - class_delta) * plan.scale
            carry = carry[0] + _dot(d_logits.astype(plan.dtype), k), carry[1], carry[2]
            by_class = weights, d_logits
            k, v = jnp.concatenate([k, k_row], axis=0), jnp.concatenate([v, v_row], axis=0)
        return carry, ((q, k, v, do), transposed, by_class)

    def logits(unit: Any, _: Any) -> tuple[Array, Array]:
        ((q, k, v, do), _, _), first, queries, head = unit
        part, window = slice(first, first + queries), plan.window(head)
        return (
            _dot(k[:, window], head_lanes(plan, q[part], head), NT),
            _dot(v[:, window], head_lanes(plan, do[part], head), NT),
        )

    def softmax(state: tuple[Array, Array], unit: Any) -> Any:
        logits, dp = state
        weights, own, _, total = _softmax(plan, logits, mask, unit[1])
        inverse = 1 / total
        weights = weights * inverse
        delta = jnp.sum(weights * dp[: plan.rows], axis=0, keepdims=True)
        d_own = None
        if own is not None:
            own = own * inverse
            dp_own = dp[plan.rows : plan.rows + 1]
            delta = delta + own * dp_own
            d_own = own * (dp_own - delta) * plan.scale
        d_logits = weights * (dp[: plan.rows] - delta)
        return weights.astype(plan.dtype), d_logits.astype(plan.dtype), own, d_own

    def gradients(state: Any, unit: Any) -> Any:
        (_, (q_t, k_t, do_t), _), first, queries, head = unit
        weights, d_logits, own, d_own = state
        part = slice(first, first + queries)
        keys, place = _feature_rows(plan, k_t, head)
        dq = _dot(keys, d_logits)[place] * plan.scale
        if d_own is not None:
            dq = dq + k_column[plan.features(head), :queries] * d_own
        dk = _dot(_feature_rows(plan, q_t, head)[0][:, part], d_logits, NT)[place]
        dv = _dot(_feature_rows(plan, do_t, head)[0][:, part], weights, NT)[place]
        return dq, dk, dv, own, d_own

    def finish(tile: Any, tensors: Any, results: list[Any], carry: Any) -> Any:
        (q, _, _, do), _, by_class = tensors
        dq: list[Array] = []
        dk: list[Any] = [0.0] * plan.heads
        dv: list[Any] = [0.0] * plan.heads
        for first in range(0, plan.rows, LANES):
            here, results = results[: plan.heads], results[plan.heads :]
            dq.append(jnp.concatenate([x[0] for x in here], axis=0).astype(plan.dtype).T)
            dk, dv = [a + x[1] for a, x in zip(dk, here)], [a + x[2] for a, x in zip(dv, here)]
            if classes:
                part = slice(first, first + LANES)
                rows = [jnp.concatenate([x[n] for x in here], axis=0) for n in (4, 3)]
                if plan.heads < CLASS_ROWS:
                    pad = jnp.zeros((CLASS_ROWS - plan.heads, rows[0].shape[1]), jnp.float32)
                    rows = [jnp.concatenate([x, pad], axis=0) for x in rows]
                d_logits, weights = (x.astype(plan.dtype) for x in rows)
                carry = carry[0], carry[1] + _dot(d_logits, q[part]), carry[2] + _dot(weights, do[part])
        dk = [x * plan.scale for x in dk]
        if classes:
            weights, d_logits = by_class

            def outer(column: Ref, row: Array, head: int) -> Array:
                parts = [
                    column[plan.features(head), : min(LANES, plan.rows - n)] * row[head : head + 1, n : n + LANES]
                    for n in range(0, plan.rows, LANES)
                ]
                return jnp.concatenate(parts, axis=1)

            dk = [x + outer(q_column, d_logits, head) for head, x in enumerate(dk)]
            dv = [x + outer(do_column, weights, head) for head, x in enumerate(dv)]
        store_tile(plan, written[0], tile, jnp.concatenate(dq, axis=0))
        for ref, parts in zip(written[1:], (dk, dv)):
            store_tile(plan, ref, tile, jnp.concatenate(parts, axis=0).astype(plan.dtype).T)
        return carry

    def step(tiles: list[Any], carry: Any) -> Any:
        units, tensors = [], []
        for tile in tiles:
            carry, read_tile = read(tile, carry)
            tensors.append(read_tile)
            units += _units(plan, read_tile)
        results = _pipeline(units, (logits, softmax, gradients), (max(1, 640 // plan.rows), max(1, 256 // plan.rows)))
        per_tile = len(units) // len(tiles)
        for n, tile in enumerate(tiles):
            carry = finish(tile, tensors[n], results[n * per_tile : (n + 1) * per_tile], carry)
        return carry

    carry = _loop(plan, step, carry)
    rows: list[Array | None] = [None] * 3
    if classes:
        rows = [jnp.sum(own_lanes(plan, x), axis=0, keepdims=True) for x in carry]
    close_blocks(plan, written, outputs, wide, rows)


def _call(
    kernel: Any, plan: Plan, inputs: list[Array], extra_outputs: list[tuple[int, ...]], columns: int, mode: str
) -> list[Array]:
    """inputs [B, S, N, D]; outputs: as many of that shape as the kernel has, flat, then float32[B, blocks, *extra]."""
    batch, tokens, heads, head_dim = inputs[0].shape
    features, blocks = heads * head_dim, heads * head_dim // plan.lanes
    whole_count = 1 if extra_outputs else 3
    scratch, buffers, limit_bytes = memory_of(
        plan, mode, len(inputs) + whole_count, whole_count, extra_outputs, columns
    )
    pipelined = None if buffers == 2 else pl.Buffered(1)
    block = pl.BlockSpec((1, tokens, plan.lanes), lambda b, j: (b, 0, j), pipeline_mode=pipelined)

    def whole(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, *shape), lambda b, j: (b, j, *[0] * len(shape)))

    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid=(batch, blocks),
        in_specs=[block] * len(inputs),
        out_specs=[block] * whole_count + [whole(shape) for shape in extra_outputs],
        out_shape=[jax.ShapeDtypeStruct((batch, tokens, features), plan.dtype)] * whole_count
        + [jax.ShapeDtypeStruct((batch, blocks, *shape), jnp.float32) for shape in extra_outputs],
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=limit_bytes,
        ),
        name=f"{mode}_attention_{'forward' if whole_count == 1 else 'backward'}",
    )(*(x.reshape(batch, tokens, features) for x in inputs))


def _lse(plan: Plan, tiles: Array, of_class: Array | None, heads: int) -> Array:
    """From the kernel's order, [B, blocks, tiles, heads of a block, rows], to float32[B, N, S]."""
    batch = tiles.shape[0]
    lse = tiles.swapaxes(2, 3).reshape(batch, heads, plan.tiles, plan.rows)
    if plan.across:
        lse = lse.reshape(batch, heads, plan.tiles, plan.pieces, plan.step).swapaxes(2, 3)
    lse = lse.reshape(batch, heads, plan.runs_stored, plan.run_stored)[:, :, : plan.runs, : plan.run]
    if plan.places_are_runs:
        lse = lse.swapaxes(2, 3)
    lse = lse.reshape(batch, heads, plan.frames * plan.patches)
    if of_class is None:
        return lse
    return jnp.concatenate([lse, of_class[:, :, : plan.heads, 0].reshape(batch, heads, 1)], axis=2)


def refusal(shape: tuple[int, ...], dtype: Any, frames: int, mode: str, class_tokens: int) -> str | None:
    """The reason, in words, why the kernels do not take q, k and v of this shape [B, S, N, D]; None if they do."""
    try:
        # The backward kernel holds the most.
        memory_of(make_plan(shape, dtype, frames, mode, class_tokens, 1.0), mode, 7, 3, [], 3)
    except NotImplementedError as reason:
        return str(reason)
    return None


def forward(
    q: Array, k: Array, v: Array, *, frames: int, mode: str, class_tokens: int, scale: float
) -> tuple[Array, Array]:
    """Attention within frames ("space") or places ("time"); arguments as in `attention.space_time_attention`.

    Returns:
        The output [B, S, N, D] of q's type, and float32[B, N, S], the logarithm of each query's sum of exponentials.

    Raises:
        NotImplementedError: shapes that these kernels do not take; says why.
    """
    plan = make_plan(q.shape, q.dtype, frames, mode, class_tokens, scale)
    extra: list[tuple[int, ...]] = [(plan.tiles, plan.heads, plan.rows)]
    if class_tokens:
        extra.append((CLASS_ROWS, LANES))
    out, lse, *of_class = _call(_forward_kernel, plan, [q, k, v], extra, 1, mode)
    return out.reshape(q.shape), _lse(plan, lse, of_class[0] if of_class else None, q.shape[2])


def backward(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    do: Array,
    *,
    frames: int,
    mode: str,
    class_tokens: int,
    scale: float,
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v for `do`, that of `forward`'s output; out and lse are not read.

    All are [B, S, N, D].
    """
    del out, lse
    plan = make_plan(q.shape, q.dtype, frames, mode, class_tokens, scale)
    dq, dk, dv = _call(_backward_kernel, plan, [q, k, v, do], [], 3, mode)
    return dq.reshape(q.shape), dk.reshape(q.shape), dv.reshape(q.shape)
