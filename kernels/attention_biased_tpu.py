"""Attention with a bias by distance for TPU: T5's encoder, whose scores would be several GB in HBM.

A step has some queries of the heads of one tile of lanes, and all keys. Cut into squares of queries i and keys j, the
bias of a head has tile j - i of five, the first or the last where j - i is farther off: there all distances are alike.
Tiles are laid out from one vector, and stay in VMEM while the heads' clips and queries pass. So do their gradients,
which are summed along diagonals to that of the vector in the end. Scores stand transposed, keys along sublanes, and
sums of their exponentials are taken without the maximum first, as in `attention_tpu.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import attention_xla, distance_bias, tuning
from .attention_tpu import LARGEST_SUM, SMALLEST_SUM, in_advance
from .attention_tpu_tiles import dot, lane, of_head, pieces, row, zero_after
from .manual_axes import alike, shape_like
from .tuning import LANES, LOG2E

HEAD_DIMS = (32, 64, 128)  # heads fill tiles of lanes
AHEAD = 3  # pieces of scores that are made before the weights of those before them
LEAST_SCORES = 1024 * 1024  # of a head: fewer are small in HBM, too
KEYS = 256  # that are worked on at a time
TILES = 5
SQUARE = 256  # queries of a step, and keys that have one tile of the bias, at most
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # a score that no other is below, and whose differences are finite


class _Cut(NamedTuple):
    """How a call is cut."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    scale: float
    square: int  # queries of a step, and keys that have one tile of the bias
    rows: int  # keys with padding, a multiple of LANES

    @property
    def together(self) -> int:
        """Heads of a tile."""
        return LANES // self.head_dim

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.heads // self.together, self.batch, pl.cdiv(self.queries, self.square)


def _cut(q: Array, k: Array, scale: float) -> _Cut:
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    square = min(SQUARE, pl.cdiv(queries, LANES) * LANES)
    return _Cut(batch, queries, keys, heads, head_dim, scale, square, pl.cdiv(keys, LANES) * LANES)


def _backward_bytes(p: _Cut, size: int) -> int:
    """VMEM of the backward kernel, which holds more than the forward one."""
    # Of the bias and of its gradient.
    tiles = 2 * 4 * p.together * TILES * p.square**2
    # k, v, dk and dv in two blocks each, K transposed, sums of dk and dv; q, out, do and dq; scores, which spill.
    return tiles + LANES * (p.rows * (9 * size + 8) + p.square * 8 * size) + 12 * 4 * p.square**2


def refusal_of_options(q: Array, k: Array, options: dict[str, Any]) -> str | None:
    """The reason, in words, why the kernel does not take this; None if it does. Options: of `attention.attention`."""
    bias, heads, head_dim = options["distance_bias"], *q.shape[2:]
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 and float32, not {q.dtype}"
    if 0 in q.shape or 0 in k.shape:
        return f"takes no empty arrays, {q.shape} and {k.shape}"
    if options["bias"] is not None:
        return "takes no bias but distance_bias"
    if head_dim not in HEAD_DIMS or heads * head_dim % LANES or heads != k.shape[2]:
        return f"takes head dims {HEAD_DIMS} and heads that fill {LANES} lanes, not {heads} of {head_dim}"
    for name in ("causal", "prefix_lengths", "softcap", "window"):
        if options[name]:
            return f"does not take {name} with distance_bias"
    cut = _cut(q, k, 1.0)
    if bias.shape[1] // 2 > cut.square + 1:
        return f"takes distances up to {cut.square + 1}, not {bias.shape[1] // 2}"
    needed, there = _backward_bytes(cut, q.dtype.itemsize), tuning.vmem_bytes()
    if needed > there:
        return f"needs {needed >> 20} MiB of the chip's vector memory at {q.shape}, {there >> 20} MiB are there"
    return None


def _windows(p: _Cut) -> Iterator[tuple[slice, slice]]:
    """Some rows of a head's tiles, and the distances that lie in them: one row's are the next one's, one lane off."""
    rows = TILES * p.square
    for start in range(0, rows, LANES):
        yield slice(start, start + LANES), slice(rows - LANES - start, rows - start + p.square)


def _lay_out(p: _Cut, distances: Any, tiles: Any) -> None:
    for u in range(p.together):
        for rows, window in _windows(p):
            x = distances[0, u : u + 1, window]
            x = pltpu.roll(jnp.broadcast_to(x, (LANES, x.shape[1])), 0, 1, stride=1, stride_axis=0)
            tiles[u, rows, :] = x[:, LANES:]


def _sum_up(p: _Cut, tiles: Any, distances: Any) -> None:
    """The transpose of `_lay_out`."""
    distances[...] = jnp.zeros_like(distances)
    for u in range(p.together):
        for rows, window in _windows(p):
            x = jnp.concatenate([jnp.zeros((LANES, LANES), jnp.float32), tiles[u, rows, :]], 1)
            lanes, n = x.shape[1], LANES
            while n > 8:
                n //= 2
                x = x[:n] + pltpu.roll(x[n:], lanes - n, 1)
            shifted = [x, *(pltpu.roll(x, lanes - i, 1) for i in range(1, n))]
            own = [jnp.where(row(x.shape) == i, y, 0.0) for i, y in enumerate(shifted)]
            distances[0, u : u + 1, window] += sum(own[1:], own[0]).sum(0, keepdims=True)


def _of_tile(p: _Cut, start: Any, n: int) -> Any:
    """The rows of a head's tiles that the keys from `start` on have with a step's queries."""
    tile = jnp.clip(start // p.square - pl.program_id(2), -(TILES // 2), TILES // 2) + TILES // 2
    return pl.ds(pl.multiple_of(tile * p.square + start % p.square, LANES), n)


def _forward_kernel(lengths: Any, *refs: Any, p: _Cut) -> None:
    q_ref, k_ref, v_ref, distances, out_ref, lse_ref, bias, vt = refs
    clip, part = pl.program_id(1), pl.program_id(2)
    pl.when((clip == 0) & (part == 0))(lambda: _lay_out(p, distances, bias))
    pl.when(part == 0)(lambda: _transpose(p, v_ref, vt))
    length = lengths[clip]
    queries = [_own(p, q_ref[0], u) for u in range(p.together)]
    heads = range(p.together)

    def scores(u: int, start: Any, n: int, absent: float = -jnp.inf) -> Array:
        """[n, square] in powers of two; `absent` at keys that are not there."""
        s = (
            dot(k_ref[0, pl.ds(start, n), :], queries[u], nt=True) * (p.scale * LOG2E)
            + bias[u, _of_tile(p, start, n), :]
        )
        return jnp.where(row(s.shape) + start < length, s, absent)

    def attend(u: int, made: Iterator[Array]) -> tuple[Array, Array]:
        """float32[D, square] and [1, square]: sums of values and of weights, no maximum subtracted."""
        acc = jnp.zeros((p.head_dim, p.square), jnp.float32)
        total = jnp.zeros((8, p.square), jnp.float32)
        for start, n in pieces(p.rows, KEYS):
            weights = jnp.exp2(next(made))
            total += weights.reshape(n // 8, 8, p.square).sum(0)
            acc += dot(vt[_rows(p, u), start : start + n], weights.astype(vt.dtype))
        return acc, total.sum(0, keepdims=True)

    def attend_carefully(u: int) -> tuple[Array, Array, Array]:
        """The same with the maximum subtracted, and the maximum [1, square]; zeros where there is no key at all."""

        def maximum(i: Array, top: Array) -> Array:
            return jnp.maximum(top, scores(u, pl.multiple_of(i * LANES, LANES), LANES, MASKED).max(0, keepdims=True))

        top = jax.lax.fori_loop(0, p.rows // LANES, maximum, jnp.full((1, p.square), MASKED, jnp.float32))

        def add(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            start = pl.multiple_of(i * LANES, LANES)
            weights = jnp.exp2(scores(u, start, LANES, MASKED) - top)
            part = dot(vt[_rows(p, u), pl.ds(start, LANES)], weights.astype(vt.dtype))
            return sums[0] + part, sums[1] + weights.sum(0, keepdims=True)

        sums = jnp.zeros((p.head_dim, p.square), jnp.float32), jnp.zeros((1, p.square), jnp.float32)
        acc, total = jax.lax.fori_loop(0, p.rows // LANES, add, sums)
        return jnp.where(length > 0, acc, 0.0), total, top

    def finish(found: list[tuple[Array, Array, Array | float]]) -> None:
        out_ref[0] = jnp.concatenate([acc * (1.0 / total) for acc, total, _ in found], 0).T.astype(out_ref.dtype)
        lse_ref[0, 0] = jnp.concatenate([jnp.log2(total) + top for _, total, top in found], 0)

    # The matrix unit takes products in the order of the program: scores that come before their weights keep it busy.
    made = in_advance((scores(u, *piece) for u in heads for piece in pieces(p.rows, KEYS)), AHEAD)
    found = [attend(u, made) for u in heads]
    finish([(acc, total, 0.0) for acc, total in found])
    fine = [(total >= SMALLEST_SUM) & (total <= LARGEST_SUM) for _, total in found]
    bad = jnp.where(functools.reduce(jnp.logical_and, fine), 0.0, 1.0)
    pl.when(jnp.max(bad) > 0)(lambda: finish([attend_carefully(u) for u in heads]))


def _backward_kernel(lengths: Any, q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, *refs: Any, p: _Cut) -> None:
    do_ref, lse_ref, distances, dq_ref, dk_ref, dv_ref, ddistances, bias, dbias, kt, dkt, dvt = refs
    clip, part = pl.program_id(1), pl.program_id(2)
    length = lengths[clip]

    @pl.when((clip == 0) & (part == 0))
    def _() -> None:
        _lay_out(p, distances, bias)
        dbias[...] = jnp.zeros_like(dbias)

    @pl.when(part == 0)
    def _() -> None:
        dkt[...] = jnp.zeros_like(dkt)
        dvt[...] = jnp.zeros_like(dvt)
        _transpose(p, k_ref, kt)

    first = part * p.square
    q, out, do = (zero_after(ref[0], first, p.queries) for ref in (q_ref, out_ref, do_ref))
    q_columns, out_columns, do_columns = q.T, out.T, do.T
    lse = lse_ref[0, 0]
    lse = jnp.where(lane(lse.shape) + first < p.queries, lse, jnp.inf)

    def products(u: int) -> Iterator[tuple[Array, Array]]:
        """Scores in powers of two, their maxima subtracted, and the gradients of weights."""
        own_q, own_do = _own(p, q, u), _own(p, do, u)
        for start, n in pieces(p.rows, KEYS):
            s = dot(k_ref[0, start : start + n, :], own_q, nt=True) * (p.scale * LOG2E)
            s += bias[u, _of_tile(p, start, n), :] - lse[u : u + 1]
            yield s, dot(v_ref[0, start : start + n, :], own_do, nt=True)

    made = in_advance((found for u in range(p.together) for found in products(u)), 1)
    dqs = []
    for u in range(p.together):
        rows = _rows(p, u)
        mean = do_columns[rows].astype(jnp.float32) * out_columns[rows].astype(jnp.float32)
        mean = mean.sum(0, keepdims=True)  # of the weights' gradients, by weight
        dq = jnp.zeros((p.head_dim, p.square), jnp.float32)
        for start, n in pieces(p.rows, KEYS):
            span, tile = slice(start, start + n), _of_tile(p, start, n)
            s, change = next(made)
            weights = jnp.exp2(s)
            change = weights * (change - mean)
            there = row(s.shape) + start < length
            weights, change = jnp.where(there, weights, 0.0), jnp.where(there, change, 0.0)
            dbias[u, tile, :] += change
            weights, change = weights.astype(q.dtype), change.astype(q.dtype)
            dvt[rows, span] += dot(do_columns[rows], weights, nt=True)
            dkt[rows, span] += dot(q_columns[rows], change, nt=True)
            dq += dot(kt[rows, span], change)
        dqs.append(dq * p.scale)
    dq_ref[0] = jnp.concatenate(dqs, 0).T.astype(dq_ref.dtype)

    @pl.when(part == p.grid[2] - 1)
    def _() -> None:
        for start, n in pieces(p.rows, LANES):
            span = slice(start, start + n)
            dk_ref[0, span, :] = (dkt[:, span] * p.scale).T.astype(dk_ref.dtype)
            dv_ref[0, span, :] = dvt[:, span].T.astype(dv_ref.dtype)

    pl.when((clip == p.batch - 1) & (part == p.grid[2] - 1))(lambda: _sum_up(p, dbias, ddistances))


def _own(p: _Cut, x: Array, u: int) -> Array:
    """x with the lanes of the tile's other heads zero."""
    return x if p.together == 1 else jnp.where(of_head(x, u, p.head_dim), x, jnp.zeros_like(x))


def _rows(p: _Cut, u: int) -> slice:
    return slice(u * p.head_dim, (u + 1) * p.head_dim)


def _transpose(p: _Cut, ref: Any, scratch: Any) -> None:
    """Keys or values into scratch [LANES, rows], zero at those that are not there."""
    for start, n in pieces(p.rows, LANES):
        scratch[:, start : start + n] = zero_after(ref[0, start : start + n, :], start, p.keys).T


def _call(kernel: Any, p: _Cut, inputs: Sequence[str], outputs: Sequence[str], **options: Any) -> Any:
    specs = {
        "lengths": pl.BlockSpec(memory_space=pltpu.SMEM),
        "queries": pl.BlockSpec((1, p.square, LANES), lambda g, b, i: (b, i, g)),
        "keys": pl.BlockSpec((1, p.rows, LANES), lambda g, b, i: (b, 0, g)),
        "statistics": pl.BlockSpec((1, 1, p.together, p.square), lambda g, b, i: (g, b, 0, i)),
        "distances": pl.BlockSpec((1, p.together, (TILES + 1) * p.square), lambda g, b, i: (g, 0, 0)),
    }
    return pl.pallas_call(
        functools.partial(kernel, p=p),
        grid=p.grid,
        in_specs=[specs[name] for name in inputs],
        out_specs=[specs[name] for name in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 3, vmem_limit_bytes=tuning.vmem_bytes()
        ),
        **options,
    )


def _flat(*arrays: Array) -> list[Array]:
    return [x.reshape(*x.shape[:2], -1) for x in arrays]


def _forward(q: Array, k: Array, v: Array, bias: Array, lengths: Array, *, scale: float) -> tuple[Array, Array]:
    """The output, and the base-2 logarithms of the rows' sums, in an order of the kernels' own."""
    p = _cut(q, k, scale)
    flat = _flat(q, k, v)
    out, lse = _call(
        _forward_kernel,
        p,
        ["lengths", "queries", "keys", "keys", "distances"],
        ["queries", "statistics"],
        scratch_shapes=[_tiles(p), pltpu.VMEM((LANES, p.rows), q.dtype)],
        out_shape=[shape_like(q, flat[0].shape, q.dtype), shape_like(q, _statistics(p), jnp.float32)],
        name="biased_attention_forward",
    )(jnp.minimum(lengths, p.keys), *flat, _distances(p, bias) * LOG2E)
    return out.reshape(q.shape), lse


def _backward(*inputs: Array, scale: float) -> tuple[Array, ...]:
    q, k, v, bias, lengths, out, lse, do = inputs
    p = _cut(q, k, scale)
    flat = _flat(q, k, v)
    distances, pull = jax.vjp(functools.partial(_distances, p), bias)
    sums = pltpu.VMEM((LANES, p.rows), jnp.float32)
    dq, dk, dv, ddistances = _call(
        _backward_kernel,
        p,
        ["lengths", "queries", "keys", "keys", "queries", "queries", "statistics", "distances"],
        ["queries", "keys", "keys", "distances"],
        scratch_shapes=[_tiles(p), _tiles(p), pltpu.VMEM((LANES, p.rows), q.dtype), sums, sums],
        out_shape=[shape_like(q, x.shape, x.dtype) for x in (*flat, distances)],
        name="biased_attention_backward",
    )(jnp.minimum(lengths, p.keys), *flat, *_flat(out, do), lse, distances * LOG2E)
    grads = (x.reshape(like.shape) for x, like in zip((dq, dk, dv), (q, k, v), strict=True))
    return *grads, *pull(ddistances)


def _statistics(p: _Cut) -> tuple[int, ...]:
    return p.grid[0], p.batch, p.together, p.grid[2] * p.square


def _distances(p: _Cut, bias: Array) -> Array:
    """float32[G, heads of a tile, L], the bias of those distances that tiles have, from keys behind to keys before."""
    length = (TILES + 1) * p.square
    found = distance_bias.stretch(bias[:, ::-1].astype(jnp.float32), -length // 2, length)
    return found.reshape(p.grid[0], p.together, -1)


def _tiles(p: _Cut) -> Any:
    return pltpu.VMEM((p.together, TILES * p.square, p.square), jnp.float32)


class _Options(NamedTuple):
    scale: float
    by_platform: bool  # the kernels on a TPU only


def _dense(q: Array, k: Array, v: Array, bias: Array, lengths: Array, *, scale: float) -> Array:
    mask = (jnp.arange(k.shape[1]) < lengths[:, None])[:, None, None]
    return attention_xla.dense(q, k, v, scale, bias=distance_bias.matrix(bias, q.shape[1], k.shape[1]), mask=mask)


def _dense_forward(*inputs: Array, scale: float) -> tuple[Array, Array]:
    """With statistics that stand in for those of the kernels."""
    q, k = inputs[:2]
    (stand_in, _) = alike([jnp.zeros(_statistics(_cut(q, k, scale)), jnp.float32), q])
    return _dense(*inputs, scale=scale), stand_in


def _dense_backward(*inputs: Array, scale: float) -> tuple[Array, ...]:
    q, k, v, bias, lengths, _, _, do = inputs
    _, pull = jax.vjp(lambda q, k, v, bias: _dense(q, k, v, bias, lengths, scale=scale), q, k, v, bias)
    found: tuple[Array, ...] = pull(do)
    return found


def _choose(options: _Options, tpu: Any, xla: Any, *arrays: Array) -> Any:
    tpu, xla = (functools.partial(rule, scale=options.scale) for rule in (tpu, xla))
    # Inside the rules, so that the residuals are the same whichever platform a program is lowered for.
    return jax.lax.platform_dependent(*arrays, tpu=tpu, default=xla) if options.by_platform else tpu(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: _Options, q: Array, k: Array, v: Array, bias: Array, lengths: Array) -> Array:
    found: Array = _choose(options, _forward, _dense_forward, q, k, v, bias, lengths)[0]
    return found


def _attend_forward(options: _Options, *inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    out, lse = _choose(options, _forward, _dense_forward, *inputs)
    # Kept with heads side by side, as the kernels have it: a TPU pads the last dimension of what it stores to 128.
    flat, lse = (checkpoint_name(x, attention_xla.ATTENTION_RESIDUALS) for x in (*_flat(out), lse))
    out = flat.reshape(out.shape)
    return out, (*inputs, out, lse)


def _attend_backward(options: _Options, residuals: tuple[Array, ...], do: Array) -> tuple[Any, ...]:
    return (*_choose(options, _backward, _dense_backward, *residuals, do), None)


_attend.defvjp(_attend_forward, _attend_backward)


def attention(
    q: Array, k: Array, v: Array, *, distance_bias: Array, kv_lengths: Array | None, scale: float, **_: Any
) -> Array:
    """q, k, v [B, S or K, N, D], distance_bias [N, 2F + 1]; see `attention.attention`."""
    return _attend(_Options(scale, by_platform=False), *alike([q, k, v, distance_bias, _lengths(k, kv_lengths)]))


def by_platform(
    q: Array, k: Array, v: Array, *, distance_bias: Array, kv_lengths: Array | None, scale: float, **_: Any
) -> Array:
    """The same; by XLA's products where the platform is no TPU."""
    return _attend(_Options(scale, by_platform=True), *alike([q, k, v, distance_bias, _lengths(k, kv_lengths)]))


def _lengths(k: Array, kv_lengths: Array | None) -> Array:
    return jnp.full(k.shape[0], k.shape[1], jnp.int32) if kv_lengths is None else kv_lengths.astype(jnp.int32)
