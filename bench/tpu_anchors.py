"""Public TPU kernels as programs for bench.tpu_static: what pyvdl's are held against.

Attention as a whole op, from [B, S, N*D] to [B, S, N*D], with the transposes and the padding that a library asks for.
tokamax lives in an environment of its own: see REQUIREMENTS and `python -m bench.tpu_aot --setup`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bench.tpu_ops import BATCH, HEADS, Core, Program, loss_program, score_products, whole_attention

REQUIREMENTS = ("jax", "libtpu", "tokamax")  # jax and libtpu as constraints.txt has them: one compiler for all
LOG2_E = math.log2(math.e)


def matmul(size: int) -> Program:
    """JAX's example of a Pallas matrix product: a check of the method."""
    from jax.experimental.pallas.ops.tpu.matmul import matmul as product

    from bench.tpu_static import Product

    x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    return Program(
        fn=lambda x, y: product(x, y, block_shape=(1024, 1024), block_k=512),
        args=(x, x),
        flops=2 * size**3,
        products=(Product(size, size, size, 1),),
        hbm_bytes=3 * 2 * size**2,
    )


def _xla() -> Core:
    def core(q: Array, k: Array, v: Array) -> Array:
        return jax.nn.dot_product_attention(q, k, v, implementation="xla")

    return core


def _flash(block_q: int, block_kv: int, block_compute: int) -> Core:
    """jax.experimental.pallas.ops.tpu.flash_attention; lengths that are no multiple of the blocks are not taken."""
    from jax.experimental.pallas.ops.tpu import flash_attention as library

    blocks = library.BlockSizes(
        block_q=block_q,
        block_k_major=block_kv,
        block_k=block_compute,
        block_b=1,
        block_q_major_dkv=block_q,
        block_k_major_dkv=block_kv,
        block_k_dkv=block_compute,
        block_q_dkv=block_q,
        block_k_major_dq=block_kv,
        block_k_dq=block_compute,
        block_q_dq=block_q,
    )

    def core(q: Array, k: Array, v: Array) -> Array:
        heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
        return library.flash_attention(*heads_first, sm_scale=q.shape[-1] ** -0.5, block_sizes=blocks).swapaxes(1, 2)

    return core


def _splash(block_q: int, block_kv: int, block_compute: int) -> Core:
    """jax.experimental.pallas.ops.tpu.splash_attention, its backward fused."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    blocks = library.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_compute,
        use_fused_bwd_kernel=True,
    )

    def core(q: Array, k: Array, v: Array) -> Array:
        q, k, v = (x.swapaxes(1, 2) for x in (q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), k, v))
        mask = masks.MultiHeadMask([masks.FullMask((q.shape[2],) * 2)] * q.shape[1])
        kernel = library.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)
        # The tables of a mask are data, which the simulator takes for zeros: it would skip every block. Without tables
        # every block counts, as it does here.
        tables = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
        kernel = library.SplashAttentionKernel(*jax.tree.map(lambda _: None, tables), **kernel.kwargs)
        out: Any = jax.vmap(kernel)(q, k, v)
        return out.swapaxes(1, 2)

    return core


def _tokamax(block_q: int, block_kv: int, block_compute: int) -> Core:
    """The splash kernel inside tokamax, called as its TPU backend calls it, but with q in units of log2.

    (With the scaling inside its kernel the simulator aborts.)
    """
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as library
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    layout = next(iter(library.QKVLayout))
    config = library.SplashConfig(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_compute,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
        q_prescaled_log2e=True,
    )

    def core(q: Array, k: Array, v: Array) -> Array:
        scale = jnp.asarray(q.shape[-1] ** -0.5 * LOG2_E, q.dtype)
        q, k, v = (x.swapaxes(1, 2) for x in (q * scale, k, v))
        kernel = library.make_splash_mha(masks.FullMask((q.shape[2],) * 2), config=config, q_seq_shards=1)
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)

    return core


LIBRARIES = {"flash": _flash, "splash": _splash, "tokamax": _tokamax}


def attention(
    library: str,
    what: str,
    tokens: int,
    head_dim: int,
    block_q: int = 0,
    block_kv: int = 0,
    block_compute: int = 0,
    padded: int = 0,
    heads: int = HEADS,
) -> Program:
    """Attention of all tokens with all.

    padded: length of the arguments, where a library does not take `tokens`. What is told is a bound from below: the
        padding itself and the mask are left out (libtpu simulates neither).
    """
    core = _xla() if library == "xla" else LIBRARIES[library](block_q, block_kv, block_compute)
    products = score_products(what, tokens, tokens, head_dim, BATCH * HEADS)
    program = whole_attention(core, what, padded or tokens, head_dim, heads=heads, pairs=tokens**2, products=products)
    if library == "xla":
        # A slice is not the problem to XLA, which lays programs out by their size.
        assert program.whole_args is not None
        program = dataclasses.replace(program, args=program.whole_args, scale=1.0, whole_args=None)
    return program


def loss(kind: str, rows: int) -> Program:
    """The plain definition: a matrix of float32 scores that XLA keeps in HBM."""

    def softmax(video: Array, text: Array, scale: Array) -> Array:
        scores = scale * jnp.dot(video, text.T, preferred_element_type=jnp.float32)
        true = jnp.diagonal(scores)
        return jnp.mean((jax.nn.logsumexp(scores, 0) + jax.nn.logsumexp(scores, 1)) / 2 - true)

    def sigmoid(video: Array, text: Array, scale: Array) -> Array:
        scores = scale * jnp.dot(video, text.T, preferred_element_type=jnp.float32) - 10.0
        signs = 2 * jnp.eye(rows, dtype=scores.dtype) - 1
        return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(signs * scores), 1))

    return loss_program({"softmax": softmax, "sigmoid": sigmoid}[kind], kind, rows)
