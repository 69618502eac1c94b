"""Building blocks shared by the towers: depth-stacked blocks, pre-norm transformer block, T5's relative positions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from pyvdl.config import TextTowerConfig, ViTConfig
from pyvdl.kernels import ATTENTION_RESIDUALS
from pyvdl.sharding import attention, space_time_attention, split_rows

_HIDDEN = "mlp_hidden"


def _keep(*names: str) -> Callable[..., Any]:
    """Policy of `jax.checkpoint`: keeps products with weights, attention's residuals, and what has one of `names`.

    The rest (norms, activations) is computed again: that costs about the time of writing it out for every layer, and
    memory grows with S, not with S * S.
    """
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    def policy(primitive: Any, *inputs: Any, **params: Any) -> Any:
        if primitive.name == "name":
            return params["name"] in names
        # cuDNN's output and statistics; it gives them no name.
        return "dot_product_attention_fwd" in primitive.name or dots(primitive, *inputs, **params)

    return policy


class Stack(nnx.Module):
    """`depth` blocks of one kind whose parameters are stacked on axis 0 and run by a scan: one block is compiled.

    The blocks hold parameters only (no dropout, no statistics), so that nothing has to be carried out of the scan.

    unroll: all blocks one after the other in place of the scan, which copies what it keeps for the backward pass into
    stacks and out of them; the program takes longer to compile. None: on a GPU, unless `remat` leaves little to copy.
    on_gpu: whether the program is for GPUs, where XLA computes activations in passes of their own: unrolled, their
    outputs are kept for the backward pass.
    """

    def __init__(
        self, make: Callable[[nnx.Rngs], nnx.Module], depth: int, *, remat: bool = False, rngs: nnx.Rngs
    ) -> None:
        self.depth = depth
        self.remat = remat
        self.unroll: bool | None = None
        self.on_gpu = False

        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs: nnx.Rngs) -> nnx.Module:
            return make(rngs)

        self.blocks: Any = create(rngs)

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """Applies block after block: x = block(x, *args, **kwargs)."""

        def body(block: Any, x: Array) -> tuple[Array, None]:
            return split_rows(block(x, *args, **kwargs)), None

        return self.scan(body, split_rows(x))[0]

    def scan(self, body: Callable[..., tuple[Any, Any]], carry: Any, *xs: Any) -> tuple[Any, Any]:
        """carry, y = body(block, carry, *x) over the blocks, x the slices of `xs` on axis 0 -> carry and stacked y."""
        graphdef, state = nnx.split(self.blocks)

        def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
            block_state, x = inputs
            return body(nnx.merge(graphdef, block_state), carry, *x)

        unroll = self.on_gpu and not self.remat if self.unroll is None else self.unroll
        policy = jax.checkpoint_policies.nothing_saveable
        if not self.remat:
            policy = _keep(ATTENTION_RESIDUALS, _HIDDEN) if unroll and self.on_gpu else _keep(ATTENTION_RESIDUALS)
        step = jax.checkpoint(step, prevent_cse=unroll, policy=policy)
        carry, ys = jax.lax.scan(step, carry, (state, xs), unroll=unroll)
        return carry, ys


def valid_lengths(mask: Array) -> Array:
    """bool[B, S] -> int32[B], one past the last True."""
    return jnp.max(jnp.where(mask, jnp.arange(1, mask.shape[1] + 1, dtype=jnp.int32), 0), axis=1)


def take_samples(x: Array, parents: Array) -> Array:
    """x [layers, B, n, ...] with sample i of clip b replaced by its sample parents[b, i]; parents int32[B, n]."""
    # Mapped over the clips, so that a batch split over devices stays where it is.
    return jax.vmap(lambda rows, parent: rows[:, parent], in_axes=(1, 0), out_axes=1)(x, parents)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_tanh": functools.partial(nnx.gelu, approximate=True),
    "gelu": functools.partial(nnx.gelu, approximate=False),
    "quick_gelu": lambda x: x * nnx.sigmoid(1.702 * x),
    "silu": nnx.silu,
}


class Mlp(nnx.Module):
    """Linear, activation, linear."""

    def __init__(self, width: int, mlp_dim: int, *, activation: str, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.xavier_uniform()
        self.activation = activation
        self.up = nnx.Linear(width, mlp_dim, kernel_init=init, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(mlp_dim, width, kernel_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.down(checkpoint_name(ACTIVATIONS[self.activation](self.up(x)), _HIDDEN))


def products(x: Array, matrix: Array, count: int) -> list[Array]:
    """x [..., S, E] times each of `count` equal parts of a matrix [E, count * F] -> [..., S, F] each.

    Part by part: to cut one product, and to join its gradients, are passes over memory of their own on a TPU. x [R, E],
    the next token of each text, takes one product: there the matrix is what is read, and its parts would be copies.
    """
    matrix = matrix.astype(x.dtype)
    if x.ndim == 2:
        return jnp.split(x @ matrix, count, axis=-1)
    return [x @ part for part in jnp.split(matrix, count, axis=-1)]


@jax.custom_vjp
def _add_bias(x: Array, bias: Array) -> Array:
    """x [..., E] + bias [E], in x's type; the bias's gradient is summed in its own: by its compiler's estimate a sum of
    bfloat16 that stands by itself takes a TPU v5e twice as long."""
    return x + bias.astype(x.dtype)


def _add_bias_backward(bias: Array, dx: Array) -> tuple[Array, Array]:
    return dx, jnp.sum(dx, axis=range(dx.ndim - 1), dtype=bias.dtype)


_add_bias.defvjp(lambda x, bias: (_add_bias(x, bias), bias), _add_bias_backward)


class Mixer(nnx.Module):
    """Norm and multi-head attention with a fused query, key and value projection; without the residual.

    zero: what it adds starts at zero.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        norm_epsilon: float,
        zero: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_heads = num_heads
        # By fan-in alone: a fused matrix then starts as three separate ones would.
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        self.norm = nnx.LayerNorm(width, epsilon=norm_epsilon, dtype=dtype, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, kernel_init=init, dtype=dtype, rngs=rngs)
        out_init = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
        self.out = nnx.Linear(width, width, kernel_init=out_init, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, attend: Callable[[Array, Array, Array], Array]) -> Array:
        """x [B, S, E]; `attend` maps q, k, v [B, S, N, D] to [B, S, N, D]."""
        batch, tokens, width = x.shape
        shape = (batch, tokens, self.num_heads, width // self.num_heads)
        assert self.qkv.bias is not None  # for the type checker
        parts = zip(products(self.norm(x), self.qkv.kernel[...], 3), jnp.split(self.qkv.bias[...], 3))
        # Kept for the backward pass with their biases, as it needs them.
        q, k, v = (checkpoint_name(_add_bias(*part), ATTENTION_RESIDUALS).reshape(shape) for part in parts)
        return self.out(attend(q, k, v).reshape(batch, tokens, width))


class Block(nnx.Module):
    """Pre-norm transformer block, as in ViT and CLIP. `config`: a ViTConfig or a TextTowerConfig."""

    def __init__(self, config: ViTConfig | TextTowerConfig, *, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(config.dtype)
        self.mixer = Mixer(config.width, config.num_heads, norm_epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(config.width, config.mlp_dim, activation=config.activation, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, attend: Callable[[Array, Array, Array], Array]) -> Array:
        """x [B, S, E] -> the same; `attend` as in Mixer."""
        x = x + self.mixer(x, attend)
        return x + self.mlp(self.norm(x))


def relative_buckets(distance: np.ndarray | Array, *, causal: bool, num_buckets: int, max_distance: int) -> Array:
    """T5's bucket of each distance (key position - query position), int32 of the same shape.

    Half of the buckets are exact small distances, the rest grow logarithmically up to `max_distance`. Without `causal`,
    one half of all buckets is for keys after the query. Takes and gives NumPy where distances are known ahead.
    """
    xp: Any = np if isinstance(distance, np.ndarray) else jnp
    offset = xp.zeros_like(distance)
    if causal:
        distance = xp.maximum(-distance, 0)
    else:
        num_buckets //= 2
        offset = xp.where(distance > 0, num_buckets, 0)
        distance = xp.abs(distance)
    exact = num_buckets // 2
    ratio = xp.log(xp.maximum(distance, 1).astype(xp.float32) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (num_buckets - exact)).astype(xp.int32)
    return (offset + xp.where(distance < exact, distance, xp.minimum(far, num_buckets - 1))).astype(xp.int32)


class RelativeBias(nnx.Module):
    """T5's learned bias on scores by the relative position of key and query."""

    def __init__(
        self, num_heads: int, *, causal: bool, num_buckets: int, max_distance: int, init_scale: float, rngs: nnx.Rngs
    ) -> None:
        self.causal = causal
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.table = nnx.Param(init_scale * jax.random.normal(rngs.params(), (num_buckets, num_heads)))

    def __call__(self) -> Array:
        """float32[N, 2F + 1], the `distance_bias` of `attention`; F is max_distance, beyond which all are alike."""
        bucket = relative_buckets(
            np.arange(-self.max_distance, self.max_distance + 1),
            causal=self.causal,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        one_hot = np.eye(self.num_buckets, dtype=np.float32)[np.asarray(bucket)]  # in the backward pass no scatter
        return jnp.einsum("pb,bn->np", one_hot, self.table[...], precision=jax.lax.Precision.HIGHEST)

    def row(self, position: Array, length: int) -> Array:
        """float32[1, N, 1, K] for one query at `position` (traced int32) and keys at 0 to K - 1."""
        bucket = relative_buckets(
            jnp.arange(length, dtype=jnp.int32) - position,
            causal=self.causal,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        return self.table[...][bucket].T[None, :, None, :]


__all__ = [
    "ACTIVATIONS",
    "Block",
    "Mixer",
    "Mlp",
    "RelativeBias",
    "Stack",
    "attention",
    "products",
    "relative_buckets",
    "space_time_attention",
    "take_samples",
    "valid_lengths",
]
