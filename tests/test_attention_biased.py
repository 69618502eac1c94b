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

from pyvdl.kernels import attention, attention_biased_tpu, distance_bias
from tests.test_contrastive_tpu import no_races

FAR = 128


def arrays(batch: int, queries: int, keys: int, heads: int, head_dim: int, dtype: str = "float32") -> list[jax.Array]:
    """q, k, v, the bias and the gradient of the output."""
    made = jax.random.split(jax.random.key(0), 5)
    of_queries, of_keys = ((batch, n, heads, head_dim) for n in (queries, keys))
    shapes = [of_queries, of_keys, of_keys, (heads, 2 * FAR + 1), of_queries]
    found = [jax.random.normal(key, shape) for key, shape in zip(made, shapes, strict=True)]
    return [x if i == 3 else x.astype(dtype) for i, x in enumerate(found)]


def results(implementation: str, inputs: list[jax.Array], **options: Any) -> list[np.ndarray]:
    """The output and the gradients of q, k, v and the bias."""

    def call(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
        return attention(q, k, v, distance_bias=bias, implementation=implementation, **options)

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
        ((1, 700, 900, 2, 64), [850], "float32"),  # squares beside the diagonal and far off it, on both sides
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
    tolerance = {"float32": 5e-5, "bfloat16": 6e-2}[dtype]
    *wanted, wanted_bias = results("reference", inputs, **options)
    *got, got_bias = got
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(got_bias, wanted_bias, atol=2 * tolerance, rtol=2 * tolerance)  # sums of many scores


def test_large_scores_take_the_maximum() -> None:
    """Of which the exponentials' sums, taken first without it, are not finite; one clip's, the other's are small."""
    q, k, v, bias, _ = arrays(2, 130, 200, 2, 64)
    q = q.at[0].multiply(30.0)
    options = {"distance_bias": bias, "kv_lengths": jnp.array([150, 200])}
    with pltpu.force_tpu_interpret_mode():
        got = attention(q, k, v, implementation="pallas_tpu", **options)
    np.testing.assert_allclose(got, attention(q, k, v, implementation="reference", **options), atol=2e-4)


@pytest.mark.parametrize(("far", "queries", "keys"), [(3, 7, 9), (128, 300, 130), (16, 1, 40), (5, 260, 3)])
def test_biases_are_laid_out_by_distance(far: int, queries: int, keys: int) -> None:
    by_distance = jax.random.normal(jax.random.key(0), (2, 2 * far + 1))
    distance = np.arange(keys) - np.arange(queries)[:, None]
    wanted = np.asarray(by_distance)[:, np.clip(distance, -far, far) + far]
    np.testing.assert_array_equal(distance_bias.matrix(by_distance, queries, keys)[0], wanted)
    weight = jax.random.normal(jax.random.key(1), (2, queries, keys))
    gradient = jax.grad(lambda x: jnp.vdot(distance_bias.matrix(x, queries, keys)[0], weight))(by_distance)
    sums = [np.where(np.clip(distance, -far, far) == d, weight, 0.0).sum((1, 2)) for d in range(-far, far + 1)]
    np.testing.assert_allclose(gradient, np.transpose(sums), rtol=1e-4, atol=1e-4)


def test_what_is_not_a_tpu_takes_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """By rules of the op's own, under a mesh too: each device adds to the gradient of a bias that they share."""
    monkeypatch.setattr(attention_biased_tpu, "LEAST_SCORES", 0)
    inputs = arrays(2, 24, 16, 4, 32)
    lengths = jnp.array([16, 5])
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    rows, shared = PartitionSpec("data"), PartitionSpec()

    def own(*arrays: jax.Array) -> jax.Array:
        return attention(*arrays[:3], distance_bias=arrays[3], kv_lengths=arrays[4])

    def split(*variables: jax.Array) -> jax.Array:
        specs = (rows, rows, rows, shared, rows)
        return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=rows)(*variables, lengths)

    wanted = results("reference", inputs, kv_lengths=lengths)
    for x, of_definition in zip(pulled(split, inputs), wanted, strict=True):
        np.testing.assert_allclose(x, of_definition, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "far", "options", "reason"),
    [
        ((1, 16, 16, 2, 48), 16, {}, "head dims"),
        ((1, 16, 16, 3, 64), 16, {}, "fill 128 lanes"),
        ((1, 16, 16, 2, 64), 16, {"causal": True}, "causal"),
        ((1, 16, 16, 2, 64), 16, {"softcap": 3.0}, "softcap"),
        ((1, 16, 16, 2, 64), 16, {"bias": jnp.zeros((1, 1, 16, 16))}, "no bias but distance_bias"),
        ((1, 16, 16, 2, 64), 130, {}, "distances up to 129"),
        ((1, 0, 16, 2, 64), 16, {}, "empty"),
        ((1, 32768, 32768, 2, 64), 128, {}, "vector memory"),
    ],
)
def test_what_the_kernels_do_not_take(shape: tuple[int, ...], far: int, options: dict[str, Any], reason: str) -> None:
    batch, queries, keys, heads, head_dim = shape
    q, k = (jax.ShapeDtypeStruct((batch, n, heads, head_dim), jnp.float32) for n in (queries, keys))
    bias = jax.ShapeDtypeStruct((heads, 2 * far + 1), jnp.float32)

    def call(q: jax.Array, k: jax.Array, bias: jax.Array) -> jax.Array:
        return attention(q, k, k, distance_bias=bias, implementation="pallas_tpu", **options)

    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(call, q, k, bias)
