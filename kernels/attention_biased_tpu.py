"""Attention with a bias on the scores for TPU: T5's encoder, whose scores would be several GB in HBM.

A step has some queries of the heads of one tile of lanes, and all keys. The batch is the innermost axis of the grid, so
that the part of the bias which a step adds is fetched once, and its gradient summed over the batch in VMEM. Scores
stand transposed, keys along sublanes, as in `attention_tpu.py`. The backward pass makes them again from the inputs:
nothing is kept for it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import attention_xla, tuning
from .attention_tpu_tiles import LANES, dot, of_head, pieces, row, zero_after
from .manual_axes import alike, shape_like

HEAD_DIMS = (32, 64, 128)  # heads fill tiles of lanes
LEAST_SCORES = 1024 * 1024  # of a head: fewer are small in HBM, too
QUERIES = 256  # of a step
KEYS = 256  # that are worked on at a time
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # a score that no other is below, and whose differences are finite


class _Cut(NamedTuple):
    """How a call is cut."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    scale: float
    columns: int  # queries of a step
    rows: int  # keys with padding, a multiple of LANES

    @property
    def together(self) -> int:
        """Heads of a tile."""
        return LANES // self.head_dim

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.heads // self.together, pl.cdiv(self.queries, self.columns), self.batch


def _cut(q: Array, k: Array, scale: float) -> _Cut:
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    columns = min(QUERIES, pl.cdiv(queries, LANES) * LANES)
    return _Cut(batch, queries, keys, heads, head_dim, scale, columns, pl.cdiv(keys, LANES) * LANES)


def _backward_bytes(p: _Cut, size: int) -> int:
    """VMEM of the backward kernel, which holds more than the forward one."""
    scores = 4 * p.rows * p.columns
    # The bias in two blocks and transposed, its gradient so and as it is sent; scores, weights and their gradients.
    of_scores = p.together * scores * 5 + 4 * scores
    # q, k, v, do, dq, dk and dv in two blocks each, K transposed, and the sums of dk and dv of all clips.
    return of_scores + LANES * p.rows * (15 * size + 8 * p.batch)


def refusal_of_options(q: Array, k: Array, options: dict[str, Any]) -> str | None:
    """The reason, in words, why the kernel does not take this; None if it does. Options: of `attention.attention`."""
    bias, heads, head_dim = options["bias"], *q.shape[2:]
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 and float32, not {q.dtype}"
    if 0 in q.shape or 0 in k.shape:
        return f"takes no empty arrays, {q.shape} and {k.shape}"
    if bias.shape != (1, heads, q.shape[1], k.shape[1]):
        return f"takes a bias of shape {(1, heads, q.shape[1], k.shape[1])}, not {bias.shape}"
    if head_dim not in HEAD_DIMS or heads * head_dim % LANES or heads != k.shape[2]:
        return f"takes head dims {HEAD_DIMS} and heads that fill {LANES} lanes, not {heads} of {head_dim}"
    for name in ("causal", "prefix_lengths", "softcap", "window"):
        if options[name]:
            return f"does not take {name} with a bias"
    needed, there = _backward_bytes(_cut(q, k, 1.0), q.dtype.itemsize), tuning.vmem_bytes()
    if needed > there:
        return f"needs {needed >> 20} MiB of the chip's vector memory at {q.shape}, {there >> 20} MiB are there"
    return None


def _transpose_bias(p: _Cut, bias_refs: Sequence[Any], scratch: Any) -> None:
    """Into scratch [heads of a tile, keys, queries], zero at queries that are not there."""
    left = p.queries - pl.program_id(1) * p.columns
    for u in range(p.together):
        for start, n in pieces(p.rows, LANES):
            x = bias_refs[u][0, :, start : start + n].astype(jnp.float32).T
            at = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
            scratch[u, start : start + n, :] = jnp.where(at < left, x, 0.0)


class _Scores:
    """One head's scores of a step, [rows, columns] in VMEM, made piece by piece; then their exponentials."""

    def __init__(self, p: _Cut, q: Array, k_ref: Any, bias: Any, length: Array, scores: Any) -> None:
        self.p, self.q, self.k_ref, self.bias, self.length, self.scores = p, q, k_ref, bias, length, scores
        self.top = jnp.full((1, p.columns), MASKED, jnp.float32)
        self.total = jnp.zeros((1, p.columns), jnp.float32)

    def make(self, start: int, n: int) -> None:
        s = dot(self.k_ref[0, start : start + n, :], self.q, nt=True)
        s = (s if self.p.scale == 1 else s * self.p.scale) + self.bias[start : start + n, :]
        s = jnp.where(row(s.shape) + start < self.length, s, MASKED)
        self.scores[start : start + n, :] = s
        self.top = jnp.maximum(self.top, s.max(0, keepdims=True))

    def exponentials(self, start: int, n: int) -> Array:
        """When all scores are made."""
        found = jnp.exp(self.scores[start : start + n, :] - self.top)
        self.total += found.sum(0, keepdims=True)
        return found

    @property
    def share(self) -> Array:
        """What all exponentials are to be multiplied by, [1, columns]; with no key at all they are 1, the weights 0."""
        return jnp.where(self.length > 0, 1.0 / self.total, 0.0)


def _forward_kernel(lengths: Any, q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any, p: _Cut) -> None:
    bias_refs, (out_ref, bias, scores, vt) = refs[: p.together], refs[p.together :]
    pl.when(pl.program_id(2) == 0)(lambda: _transpose_bias(p, bias_refs, bias))
    length = lengths[pl.program_id(2)]
    _transpose(p, v_ref, vt)
    heads = [_Scores(p, _own(p, q_ref[0], u), k_ref, bias.at[u], length, scores.at[u % 2]) for u in range(p.together)]
    outs = []
    for start, n in pieces(p.rows, KEYS):
        heads[0].make(start, n)
    for u, head in enumerate(heads):
        acc = jnp.zeros((p.head_dim, p.columns), jnp.float32)
        for start, n in pieces(p.rows, KEYS):
            # The matrix unit makes the next head's scores beside this one's exponentials.
            if u + 1 < p.together:
                heads[u + 1].make(start, n)
            acc += dot(vt[_rows(p, u), start : start + n], head.exponentials(start, n).astype(vt.dtype))
        outs.append(acc * head.share)
    out_ref[0] = jnp.concatenate(outs, 0).T.astype(out_ref.dtype)


def _backward_kernel(lengths: Any, q_ref: Any, k_ref: Any, v_ref: Any, do_ref: Any, *refs: Any, p: _Cut) -> None:
    bias_refs, refs = refs[: p.together], refs[p.together :]
    dq_ref, dk_ref, dv_ref, whole_dbias, bias, weights, dweights, kt, dk, dv, dbias, ready, sent = refs
    tile, part, clip = (pl.program_id(axis) for axis in range(3))
    length = lengths[clip]

    @pl.when(clip == 0)
    def _() -> None:
        _transpose_bias(p, bias_refs, bias)
        dbias[...] = jnp.zeros_like(dbias)

    @pl.when(part == 0)
    def _() -> None:
        dk[clip] = jnp.zeros_like(dk[clip])
        dv[clip] = jnp.zeros_like(dv[clip])

    _transpose(p, k_ref, kt)
    q, do = (zero_after(ref[0], part * p.columns, p.queries) for ref in (q_ref, do_ref))
    dqs = []
    for u in range(p.together):
        own_q, own_do = _own(p, q, u), _own(p, do, u)
        head = _Scores(p, own_q, k_ref, bias.at[u], length, weights)
        for start, n in pieces(p.rows, KEYS):
            head.make(start, n)
        for start, n in pieces(p.rows, KEYS):
            weights[start : start + n, :] = head.exponentials(start, n)
        share = head.share
        mean = jnp.zeros((1, p.columns), jnp.float32)  # of the weights' gradients, by weight
        for start, n in pieces(p.rows, KEYS):
            rows = slice(start, start + n)
            weight = weights[rows, :] * share
            found = dot(zero_after(v_ref[0, rows, :], start, p.keys), own_do, nt=True)
            weights[rows, :], dweights[rows, :] = weight, found
            mean += (weight * found).sum(0, keepdims=True)
            dv[clip, rows, :] += dot(weight.astype(do.dtype), own_do)
        dq = jnp.zeros((p.head_dim, p.columns), jnp.float32)
        for start, n in pieces(p.rows, KEYS):
            rows = slice(start, start + n)
            ds = weights[rows, :] * (dweights[rows, :] - mean)
            dbias[u, rows, :] += ds
            ds = (ds if p.scale == 1 else ds * p.scale).astype(q.dtype)
            dk[clip, rows, :] += dot(ds, own_q)
            dq += dot(kt[_rows(p, u), rows], ds)
        dqs.append(dq)
    dq_ref[0] = jnp.concatenate(dqs, 0).T.astype(dq_ref.dtype)

    @pl.when(part == pl.num_programs(1) - 1)
    def _() -> None:
        dk_ref[0] = dk[clip].astype(dk_ref.dtype)
        dv_ref[0] = dv[clip].astype(dv_ref.dtype)

    def send(u: int) -> Any:
        rows = pl.ds(part * p.columns, p.columns)
        return pltpu.make_async_copy(ready.at[u], whole_dbias.at[tile * p.together + u, rows], sent.at[u])

    @pl.when(clip == p.batch - 1)
    def _() -> None:
        for u in range(p.together):
            pl.when((tile > 0) | (part > 0))(send(u).wait)  # for the part before: all are of one size
            for start, n in pieces(p.rows, LANES):
                ready[u, :, start : start + n] = dbias[u, start : start + n, :].T.astype(ready.dtype)
            send(u).start()
            pl.when((tile == p.grid[0] - 1) & (part == p.grid[1] - 1))(send(u).wait)


def _own(p: _Cut, x: Array, u: int) -> Array:
    """x with the lanes of the tile's other heads zero."""
    return x if p.together == 1 else jnp.where(of_head(x, u, p.head_dim), x, jnp.zeros_like(x))


def _rows(p: _Cut, u: int) -> slice:
    return slice(u * p.head_dim, (u + 1) * p.head_dim)


def _transpose(p: _Cut, ref: Any, scratch: Any) -> None:
    """Keys or values into scratch [LANES, rows], zero at those that are not there."""
    for start, n in pieces(p.rows, LANES):
        scratch[:, start : start + n] = zero_after(ref[0, start : start + n, :], start, p.keys).T


def _specs(p: _Cut) -> dict[str, pl.BlockSpec]:
    return {
        "lengths": pl.BlockSpec(memory_space=pltpu.SMEM),
        "queries": pl.BlockSpec((1, p.columns, LANES), lambda g, i, b: (b, i, g)),
        "keys": pl.BlockSpec((1, p.rows, LANES), lambda g, i, b: (b, 0, g)),
        # Of the whole bias [N, S, K], whose heads of a tile are taken one by one.
        **{
            f"bias {u}": pl.BlockSpec((1, p.columns, p.rows), lambda g, i, b, u=u: (g * p.together + u, i, 0))
            for u in range(p.together)
        },
        "dbias": pl.BlockSpec(memory_space=pltpu.HBM),
        # Until the sums are whole, one block stands for all.
        "sums": pl.BlockSpec((1, p.rows, LANES), lambda g, i, b: (jnp.where(i == p.grid[1] - 1, b, 0), 0, g)),
    }


def _scratch(p: _Cut, dtype: Any) -> tuple[Any, Any, Any]:
    """The bias of a step, one head's scores, and a matrix of keys or values, all transposed."""
    scores = (p.rows, p.columns)
    return (
        pltpu.VMEM((p.together, *scores), jnp.float32),
        pltpu.VMEM(scores, jnp.float32),
        pltpu.VMEM((LANES, p.rows), dtype),
    )


def _flat(*arrays: Array) -> list[Array]:
    return [x.reshape(*x.shape[:2], -1) for x in arrays]


def _call(kernel: Any, p: _Cut, inputs: Sequence[str], outputs: Sequence[str], **options: Any) -> Any:
    specs = _specs(p)
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


def _biases(p: _Cut) -> list[str]:
    return [f"bias {u}" for u in range(p.together)]


def _forward(q: Array, k: Array, v: Array, bias: Array, lengths: Array, *, scale: float) -> Array:
    p = _cut(q, k, scale)
    flat = _flat(q, k, v)
    bias_scratch, _, transposed = _scratch(p, q.dtype)
    (out,) = _call(
        _forward_kernel,
        p,
        ["lengths", "queries", "keys", "keys", *_biases(p)],
        ["queries"],
        scratch_shapes=(bias_scratch, pltpu.VMEM((2, p.rows, p.columns), jnp.float32), transposed),
        out_shape=[shape_like(q, flat[0].shape, q.dtype)],
        name="biased_attention_forward",
    )(jnp.minimum(lengths, p.keys), *flat, *[bias[0]] * p.together)
    return out.reshape(q.shape)


def _backward(
    q: Array, k: Array, v: Array, bias: Array, lengths: Array, do: Array, *, scale: float
) -> tuple[Array, ...]:
    p = _cut(q, k, scale)
    flat = _flat(q, k, v)
    bias_scratch, scores, transposed = _scratch(p, q.dtype)
    sums = pltpu.VMEM((p.batch, p.rows, LANES), jnp.float32)
    # The heads of a tile go to HBM one by one, into one array: put together by XLA, several would be copied twice.
    ready = pltpu.VMEM((p.together, p.columns, p.rows), bias.dtype)
    of_bias = shape_like(q, (p.heads, p.grid[1] * p.columns, p.rows), bias.dtype)
    dq, dk, dv, dbias = _call(
        _backward_kernel,
        p,
        ["lengths", "queries", "keys", "keys", "queries", *_biases(p)],
        ["queries", "sums", "sums", "dbias"],
        scratch_shapes=(
            *(bias_scratch, scores, scores, transposed, sums, sums, bias_scratch),
            *(ready, pltpu.SemaphoreType.DMA((p.together,))),
        ),
        out_shape=[*(shape_like(q, x.shape, x.dtype) for x in flat), of_bias],
        name="biased_attention_backward",
    )(jnp.minimum(lengths, p.keys), *flat, *_flat(do), *[bias[0]] * p.together)
    grads = (x.reshape(like.shape) for x, like in zip((dq, dk, dv), (q, k, v), strict=True))
    return *grads, dbias[None, :, : p.queries, : p.keys]


class _Options(NamedTuple):
    scale: float
    by_platform: bool  # the kernels on a TPU only


def _dense(q: Array, k: Array, v: Array, bias: Array, lengths: Array, *, scale: float) -> Array:
    mask = (jnp.arange(k.shape[1]) < lengths[:, None])[:, None, None]
    return attention_xla.dense(q, k, v, scale, bias=bias, mask=mask)


def _dense_backward(*inputs: Array, scale: float) -> tuple[Array, ...]:
    q, k, v, bias, lengths, do = inputs
    _, pull = jax.vjp(lambda q, k, v, bias: _dense(q, k, v, bias, lengths, scale=scale), q, k, v, bias)
    found: tuple[Array, ...] = pull(do)
    return found


def _choose(options: _Options, tpu: Any, xla: Any, *arrays: Array) -> Any:
    tpu, xla = (functools.partial(rule, scale=options.scale) for rule in (tpu, xla))
    # Inside the rules, so that nothing is kept between them on any platform.
    return jax.lax.platform_dependent(*arrays, tpu=tpu, default=xla) if options.by_platform else tpu(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: _Options, q: Array, k: Array, v: Array, bias: Array, lengths: Array) -> Array:
    found: Array = _choose(options, _forward, _dense, q, k, v, bias, lengths)
    return found


def _attend_forward(options: _Options, *inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    return _attend(options, *inputs), inputs


def _attend_backward(options: _Options, inputs: tuple[Array, ...], do: Array) -> tuple[Any, ...]:
    return (*_choose(options, _backward, _dense_backward, *inputs, do), None)


_attend.defvjp(_attend_forward, _attend_backward)


def attention(q: Array, k: Array, v: Array, *, bias: Array, kv_lengths: Array | None, scale: float, **_: Any) -> Array:
    """q, k, v [B, S or K, N, D], bias [1, N, S, K]; see `attention.attention`."""
    return _attend(_Options(scale, by_platform=False), *alike([q, k, v, bias, _lengths(k, kv_lengths)]))


def by_platform(
    q: Array, k: Array, v: Array, *, bias: Array, kv_lengths: Array | None, scale: float, **_: Any
) -> Array:
    """The same; by XLA's products where the platform is no TPU."""
    return _attend(_Options(scale, by_platform=True), *alike([q, k, v, bias, _lengths(k, kv_lengths)]))


def _lengths(k: Array, kv_lengths: Array | None) -> Array:
    return jnp.full(k.shape[0], k.shape[1], jnp.int32) if kv_lengths is None else kv_lengths.astype(jnp.int32)
