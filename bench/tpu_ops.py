"""pyvdl's ops as programs for bench.tpu_static, at the paper's shapes: whole ops, from [B, S, N*D] to [B, S, N*D].

A ViT holds its tokens as [B, S, N*D]; what an op needs to change that for its kernels is part of its cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from bench.tpu_static import Product, Program

BATCH = 8
MAX_DISTANCE = 128  # of T5
HEADS = 16
EMBEDDING = 768
WHATS = ("fwd", "fwd+bwd")

type Core = Callable[[Array, Array, Array], Array]  # of q, k, v [B, S, N, D]


def score_products(what: str, queries: int, keys: int, head_dim: int, count: int) -> tuple[Product, ...]:
    """The matrix work of `count` attentions with the least rows that stream.

    Scores are held as [keys, queries], so that the other products, transposed too, stream head_dim rows over them.
    """
    scores = Product(keys, head_dim, queries, count)
    others = Product(head_dim, keys, queries, count)  # outputs, and dQ, dK, dV
    if what == "fwd":
        return scores, others
    # Backward has the scores again and their gradient.
    return scores, others, scores, scores, others, others, others


def whole_attention(
    core: Core,
    what: str,
    tokens: int,
    head_dim: int,
    *,
    heads: int,
    pairs: int,
    products: tuple[Product, ...],
    rows: int = 1,
) -> Program:
    """A core as a whole op on bfloat16[BATCH, tokens, HEADS * head_dim]; simulated are `rows` with `heads` heads.

    What a call pays once, the first fetch and the last write, counts for each slice: short kernels want more rows.

    pairs: of a query and a key, of one head of one row.
    """
    if what not in WHATS:
        raise ValueError(f"what must be one of {WHATS}, not {what!r}")

    def op(q: Array, k: Array, v: Array) -> Array:
        out = core(*(x.reshape(*x.shape[:2], -1, head_dim) for x in (q, k, v)))
        return out.reshape(q.shape)

    def both(q: Array, k: Array, v: Array, gradient: Array) -> tuple[Array, ...]:
        out, pull = jax.vjp(op, q, k, v)
        return out, *pull(gradient)

    forward = what == "fwd"

    def args(batch: int, heads: int) -> tuple[Any, ...]:
        x = jax.ShapeDtypeStruct((batch, tokens, heads * head_dim), jnp.bfloat16)
        return (x,) * (3 if forward else 4)

    return Program(
        fn=op if forward else both,
        args=args(rows, heads),
        scale=BATCH * HEADS / heads / rows,
        whole_args=args(BATCH, HEADS),
        flops=(4 if forward else 14) * BATCH * HEADS * pairs * head_dim,
        products=products,
        hbm_bytes=(4 if forward else 8) * 2 * BATCH * tokens * HEADS * head_dim,
    )


def attention(
    mode: str,
    what: str,
    frames: int,
    patches: int,
    class_tokens: int,
    head_dim: int,
    implementation: str = "pallas_tpu",
    heads: int = HEADS,
    rows: int = 1,
) -> Program:
    """pyvdl.kernels.space_time_attention."""
    from pyvdl.kernels import space_time_attention

    def core(q: Array, k: Array, v: Array) -> Array:
        return space_time_attention(
            q, k, v, frames=frames, mode=mode, class_tokens=class_tokens, implementation=implementation
        )

    tokens = frames * patches + class_tokens
    count = BATCH * HEADS
    if mode == "joint":
        pairs = tokens**2
        products = score_products(what, tokens, tokens, head_dim, count)
    elif mode == "space":
        pairs = frames * patches * (patches + class_tokens) + class_tokens * tokens
        products = score_products(what, patches, patches + class_tokens, head_dim, count * frames)
    else:
        # Products of a few rows and columns need no MXU: only the bytes are a bound.
        pairs = patches * frames * (frames + class_tokens) + class_tokens * tokens
        products = ()
    return whole_attention(core, what, tokens, head_dim, heads=heads, pairs=pairs, products=products, rows=rows)


def language(what: str, tokens: int, head_dim: int, implementation: str = "pallas_tpu") -> Program:
    """pyvdl.kernels.attention, causal, as many key heads as query heads."""
    from pyvdl.kernels import attention

    def core(q: Array, k: Array, v: Array) -> Array:
        return attention(q, k, v, causal=True, implementation=implementation)

    # Half the scores are looked at; kernels that skip by blocks do somewhat more.
    pairs = tokens * (tokens + 1) // 2
    products = tuple(p._replace(times=p.times / 2) for p in score_products(what, tokens, tokens, head_dim, 128))
    return whole_attention(core, what, tokens, head_dim, heads=HEADS, pairs=pairs, products=products)


def biased(what: str, tokens: int, head_dim: int, implementation: str = "pallas_tpu", heads: int = 2) -> Program:
    """pyvdl.kernels.attention with a bias by distance, as T5's encoder has it; backward has the bias's gradient."""
    from pyvdl.kernels import attention

    def op(q: Array, k: Array, v: Array, bias: Array) -> Array:
        q, k, v = (x.reshape(*x.shape[:2], -1, head_dim) for x in (q, k, v))
        mixed = attention(q, k, v, distance_bias=bias, scale=1.0, implementation=implementation)
        return mixed.reshape(BATCH, tokens, -1)

    def both(*inputs: Array) -> tuple[Array, ...]:
        out, pull = jax.vjp(op, *inputs[:-1])
        return out, *pull(inputs[-1])

    forward = what == "fwd"

    def args(heads: int) -> tuple[Any, ...]:
        x = jax.ShapeDtypeStruct((BATCH, tokens, heads * head_dim), jnp.bfloat16)
        bias = jax.ShapeDtypeStruct((heads, 2 * MAX_DISTANCE + 1), jnp.float32)
        return (x, x, x, bias) if forward else (x, x, x, bias, x)

    # The batch shares the bias: rows are not cut off.
    array = 2 * BATCH * tokens * HEADS * head_dim
    bias_bytes = 4 * HEADS * (2 * MAX_DISTANCE + 1)
    return Program(
        fn=op if forward else both,
        args=args(heads),
        scale=HEADS / heads,
        whole_args=args(HEADS),
        flops=(4 if forward else 14) * BATCH * HEADS * tokens**2 * head_dim,
        products=score_products(what, tokens, tokens, head_dim, BATCH * HEADS),
        hbm_bytes=(4 if forward else 8) * array + (1 if forward else 2) * bias_bytes,
    )


def contrastive(kind: str, rows: int, implementation: str = "pallas_tpu") -> Program:
    """pyvdl.kernels.contrastive_loss of one chip, value and both gradients: one step of the ring."""
    return loss_program(_loss(kind, implementation, None), kind, rows)


def contrastive_step(kind: str, rows: int) -> Program:
    """One step of the ring between chips, value and both gradients: the kernels alone, a call for each direction.

    What the op does once for all steps (norms, casts, merging) is left out, and so is the exchange beside the kernels.
    """
    from pyvdl.kernels import contrastive_tpu as kernels
    from pyvdl.kernels.tuning import contrastive_layout

    sizes = contrastive_layout(rows, EMBEDDING, jnp.bfloat16, split=True)
    softmax = kind == "softmax"

    def half(video: Array, text: Array, numbers: Array, places: Array, states: Any) -> Any:
        visit = kernels.Visit(numbers, places, None, None)
        of_rows, of_columns, row_lse, column_lse, d_video, d_text = states
        if softmax:
            of_rows, of_columns = kernels.statistics(video, text, visit, of_rows, of_columns, sizes, kind)
        out = kernels.gradients(video, text, visit, row_lse, column_lse, d_video, d_text, sizes)
        return of_rows, of_columns, out

    def of(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    states = (
        *jax.eval_shape(lambda: kernels.start_of_statistics(sizes, kind)),
        of(sizes.rows, 128) if softmax else None,
        of(1, sizes.columns) if softmax else None,
        of(sizes.rows, sizes.width),
        of(sizes.columns, sizes.width),
    )
    video = of(sizes.rows, sizes.width, dtype=jnp.bfloat16)
    text = of(sizes.columns, sizes.width, dtype=jnp.bfloat16)
    whole = loss_program(lambda *_: jnp.float32(0), kind, rows)
    return Program(
        fn=half,
        args=(video, text, of(2), of(3, dtype=jnp.int32), states),
        donated=(4,),
        scale=sizes.streams,
        flops=whole.flops,
        products=whole.products,
        hbm_bytes=whole.hbm_bytes,
    )


def contrastive_ring(kind: str, rows: int, chips: int, implementation: str = "pallas_tpu") -> Program:
    """The same over chips with `rows` rows each; what is told is of one chip."""
    batch = PartitionSpec("chips")
    scalar = PartitionSpec()
    ring = jax.shard_map(
        jax.value_and_grad(_loss(kind, implementation, "chips"), argnums=(0, 1)),
        in_specs=(batch, batch, scalar),
        out_specs=(scalar, (batch, batch)),
    )
    x = jax.ShapeDtypeStruct((rows * chips, EMBEDDING), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    return Program(fn=ring, args=(x, x, scale), partitions=(batch, batch, scalar))


def _loss(kind: str, implementation: str, axis_name: str | None) -> Callable[..., Array]:
    from pyvdl.kernels import contrastive_loss

    bias = None if kind == "softmax" else -10.0

    def loss(video: Array, text: Array, scale: Array) -> Array:
        return contrastive_loss(video, text, scale, bias, kind=kind, axis_name=axis_name, implementation=implementation)

    return loss


def loss_program(loss: Callable[..., Array], kind: str, rows: int) -> Program:
    """Value and gradients by video and text of a loss(video, text, scale) on bfloat16[rows, EMBEDDING]."""
    x = jax.ShapeDtypeStruct((rows, EMBEDDING), jnp.bfloat16)
    scores = Product(rows, EMBEDDING, rows, 1)
    gradient = Product(EMBEDDING, rows, rows, 1)  # of one side
    # A softmax needs all scores before the first gradient: without storing them they are computed twice.
    passes = (2 if kind == "softmax" else 1) * (scores,) + 2 * (gradient,)
    return Program(
        fn=jax.value_and_grad(loss, argnums=(0, 1)),
        args=(x, x, jax.ShapeDtypeStruct((), jnp.float32)),
        flops=3 * 2 * rows * rows * EMBEDDING,
        products=passes,
        hbm_bytes=4 * 2 * rows * EMBEDDING,
    )
