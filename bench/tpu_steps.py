"""Training steps as programs for bench.tpu_static: loss and gradients of all parameters, without the optimizer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bench.end_to_end import accelerator_cases
from bench.tpu_static import Program


def step(number: int, clips: int) -> Program:
    """One of bench.end_to_end's steps for accelerators."""
    make, _ = list(accelerator_cases().values())[number]
    model, loss, batch, flops = make(nnx.eval_shape, clips)
    graph, state = nnx.split(model)

    def gradients(state: Any, batch: Any) -> Any:
        return jax.grad(lambda state: loss(nnx.merge(graph, state), batch)[0])(state)

    # Without the mesh that they were made under: the compilation sets its own.
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype)), (state, batch))
    parameters = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(args[0]))
    return Program(fn=gradients, args=args, flops=flops, products=(), hbm_bytes=2 * parameters)
