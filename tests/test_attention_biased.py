"""`attention` with a bias by its TPU kernels: numbers in the TPU interpreter, and compilation by libtpu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from pyvdl.kernels import attention, attention_biased_tpu
from tests.test_contrastive_tpu import no_races


def arrays(batch: int, queries: int, keys: int, heads: int, head_dim: int, dtype: str = "float32") -> list[jax.Array]:
    """q, k, v, bias and the gradient of the output."""
    made = jax.random.split(jax.random.key(0), 5)
    of_queries, of_keys = ((batch, n, heads, head_dim) for n in (queries, keys))
    shapes = [of_queries, of_keys, of_keys, (1, heads, queries, keys), of_queries]
    found = [jax.random.normal(key, shape) for key, shape in zip(made, shapes, strict=True)]
    return [x if i == 3 else x.astype(dtype) for i, x in enumerate(found)]


def results(implementation: str, inputs: list[jax.Array], **options: Any) -> list[np.ndarray]:
    """The output and the gradients of q, k, v and the bias."""

    def call(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
        return attention(q, k, v, bias=bias, implementation=implementation, **options)

    return pulled(call, inputs)


def pulled(call: Callable[..., jax.Array], inputs: list[jax.Array]) -> list[np.ndarray]:
    *variables, gradient = inputs

    @jax.jit
    def both(*variables: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(call, *variables)
        return out, *pull(gradient)

    return [np.asarray(x, np.float32) for x in both(*variables)]


@pytest.mark.parametrize(
    ("shape", "lengths", "dtype"),
    [
        ((2, 130, 200, 4, 64), [200, 70], "float32"),  # two steps of heads, the last rows past the arrays
        ((3, 300, 129, 2, 128), [0, 129, 1], "float32"),  # two steps of heads and of queries, a clip without a key
        ((1, 128, 128, 4, 32), None, "bfloat16"),
    ],
)
def test_kernels_in_the_interpreter(
    shape: tuple[int, int, int, int, int], lengths: list[int] | None, dtype: str
) -> None:
    """What blocks hold past the arrays is NaN there."""
    inputs = arrays(*shape, dtype)
    options = {"scale": 0.3, "kv_lengths": None if lengths is None else jnp.array(lengths)}
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="uninitialized")):
        got = results("pallas_tpu", inputs, **options)
        assert no_races()
    tolerance = {"float32": 2e-5, "bfloat16": 6e-2}[dtype]
    for x, wanted in zip(got, results("reference", inputs, **options), strict=True):
        np.testing.assert_allclose(x, wanted, atol=tolerance, rtol=tolerance)


def test_what_is_not_a_tpu_takes_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """By rules of the op's own, under a mesh too: each device adds to the gradient of a bias that they share."""
    monkeypatch.setattr(attention_biased_tpu, "LEAST_SCORES", 0)
    inputs = arrays(2, 24, 16, 4, 32)
    lengths = jnp.array([16, 5])
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    rows, shared = PartitionSpec("data"), PartitionSpec()

    def own(*arrays: jax.Array) -> jax.Array:
        return attention(*arrays[:3], bias=arrays[3], kv_lengths=arrays[4])

    def split(*variables: jax.Array) -> jax.Array:
        specs = (rows, rows, rows, shared, rows)
        return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=rows)(*variables, lengths)

    wanted = results("reference", inputs, kv_lengths=lengths)
    for x, of_definition in zip(pulled(split, inputs), wanted, strict=True):
        np.testing.assert_allclose(x, of_definition, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((1, 16, 16, 2, 48), {}, "head dims"),
        ((1, 16, 16, 3, 64), {}, "fill 128 lanes"),
        ((1, 16, 16, 2, 64), {"causal": True}, "causal"),
        ((1, 16, 16, 2, 64), {"softcap": 3.0}, "softcap"),
        ((1, 0, 16, 2, 64), {}, "empty"),
        ((60, 4096, 4096, 2, 64), {}, "vector memory"),
    ],
)
def test_what_the_kernels_do_not_take(shape: tuple[int, ...], options: dict[str, Any], reason: str) -> None:
    batch, queries, keys, heads, head_dim = shape
    q, k = (jax.ShapeDtypeStruct((batch, n, heads, head_dim), jnp.float32) for n in (queries, keys))
    bias = jax.ShapeDtypeStruct((1, heads, queries, keys), jnp.float32)

    def call(q: jax.Array, k: jax.Array, bias: jax.Array) -> jax.Array:
        return attention(q, k, k, bias=bias, implementation="pallas_tpu", **options)

    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(call, q, k, bias)
