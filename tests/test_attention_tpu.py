"""Attention's TPU kernels: numbers in the TPU interpreter, and compilation by libtpu at the shapes of real models."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pyvdl.kernels import space_time_attention

ROOT = Path(__file__).resolve().parents[1]


def interpreter() -> pltpu.InterpretParams:
    """Blocks may reach past an array, there the interpreter reads NaN: what must not matter, shows if it does."""
    return pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="uninitialized")


def inputs(batch: int, tokens: int, heads: int, head_dim: int, dtype: str) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(tokens + head_dim), 4)
    return [jax.random.normal(key, (batch, tokens, heads, head_dim)).astype(dtype) for key in keys]


def attend(implementation: str, class_tokens: int, arrays: list[jax.Array]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The output and the gradients, in float32."""
    frames = 1
    q, k, v, weight = arrays

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        out, pull = jax.vjp(
            lambda *x: space_time_attention(
                *x, frames=frames, class_tokens=class_tokens, implementation=implementation
            ),
            q,
            k,
            v,
        )
        return out, pull(weight)

    if implementation == "pallas_tpu":
        with pltpu.force_tpu_interpret_mode(interpreter()):
            out, gradients = jax.block_until_ready(run(q, k, v))
    else:
        out, gradients = run(q, k, v)
    assert all(x.dtype == q.dtype for x in (out, *gradients))
    return np.asarray(out, np.float32), [np.asarray(x, np.float32) for x in gradients]


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim", "dtype"),
    [
        (2, 257, 2, 64, "float32"),  # the class token alone behind 128-row parts
        (1, 256, 4, 64, "bfloat16"),
        (1, 257, 3, 64, "float32"),  # an odd number of heads: half a tile of lanes is not there
        (1, 200, 2, 64, "float32"),  # masked keys
        (1, 5, 1, 64, "float32"),
        (1, 129, 3, 72, "float32"),
        (1, 257, 3, 88, "bfloat16"),
        (1, 150, 5, 96, "float32"),
        (1, 257, 2, 128, "float32"),
        (1, 130, 1, 256, "bfloat16"),
        (1, 129, 4, 32, "float32"),
    ],
)
def test_kernels_in_the_interpreter(batch: int, tokens: int, heads: int, head_dim: int, dtype: str) -> None:
    arrays = inputs(batch, tokens, heads, head_dim, dtype)
    class_tokens = tokens % 2
    out, gradients = attend("pallas_tpu", class_tokens, arrays)
    wanted, wanted_gradients = attend("reference", class_tokens, [x.astype(jnp.float32) for x in arrays])
    tolerance = 2e-6 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(out, wanted, atol=tolerance)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=tolerance * max(1.0, float(np.abs(want).max())))
