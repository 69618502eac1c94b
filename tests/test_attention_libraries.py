"""`attention` by kernels of others: splash (JAX) on TPU, cuDNN on CUDA. What they take, and that they agree."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pyvdl.kernels import attention, attention_cudnn, attention_splash, reference

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True, "q_offset": 128},
    "lengths": {"kv_lengths": jnp.array([200, 0])},
    "window": {"window": 100, "causal": True},
    "window, offset": {"window": 100, "causal": True, "q_offset": 128},
    "both sides": {"window": 64},
    "softcap": {"softcap": 5.0, "causal": True},
}
# Options, queries and keys; the kernel takes multiples of 128, the rest is padding.
UNEVEN = [("full", 130, 131), ("causal", 100, 228), ("lengths", 200, 300), ("both sides", 129, 129)]


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(("name", "queries", "keys"), [*((name, 256, 384) for name in OPTIONS), *UNEVEN])
def test_splash_agrees_with_the_definition(name: str, queries: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Pallas' general interpreter: that for TPUs does not know the kernel's backward grid."""
    module = attention_splash.splash
    monkeypatch.setattr(module, "make_splash_mha", functools.partial(module.make_splash_mha, interpret=True))
    q, k, v, gradient = (
        normal(0, 2, queries, 4, 64),
        normal(1, 2, keys, 2, 64),
        normal(2, 2, keys, 2, 64),
        normal(3, 2, queries, 4, 64),
    )

    def run(implementation: str) -> list[np.ndarray]:
        out, pull = jax.vjp(lambda *x: attention(*x, implementation=implementation, **OPTIONS[name]), q, k, v)
        return [np.asarray(x) for x in (out, *pull(gradient))]

    for got, wanted in zip(run("pallas_tpu"), run("reference"), strict=True):
        np.testing.assert_allclose(got, wanted, atol=5e-6)


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((1, 0, 1, 64), {}, "empty"),
        ((1, 128, 1, 64), {"causal": True, "prefix_lengths": jnp.zeros(1, jnp.int32)}, "prefix_lengths"),
        ((1, 128, 1, 64), {"bias": jnp.zeros((1, 1, 128, 128))}, "bias"),
        ((1, 128, 1, 64), {"q_offset": jnp.int32(0)}, "Python int"),
    ],
)
def test_splash_refuses_what_it_does_not_take(shape: tuple[int, ...], options: dict[str, Any], reason: str) -> None:
    x = jnp.zeros(shape)
    with pytest.raises(NotImplementedError, match=reason):
        attention(x, x, x, implementation="pallas_tpu", **options)
    attention(x, x, x, **options)  # the best for the platform is another one


@pytest.mark.parametrize(
    ("dtype", "head_dim", "options", "reason"),
    [
        ("float32", 64, {}, "bfloat16 and float16"),
        ("bfloat16", 60, {}, "multiples of 8"),
        ("bfloat16", 136, {}, "multiples of 8 up to 128, not 136"),
        ("bfloat16", 64, {"softcap": 3.0}, "softcap"),
        ("bfloat16", 64, {"bias": jnp.zeros((1, 1, 8, 8))}, "take bias"),
        ("bfloat16", 64, {"distance_bias": jnp.zeros((1, 3))}, "distance_bias"),
        ("bfloat16", 64, {"causal": True, "prefix_lengths": jnp.array([3])}, "prefix_lengths"),
        ("bfloat16", 64, {"causal": True, "window": 3, "kv_lengths": jnp.array([3])}, "window"),
        ("bfloat16", 64, {"window": 3}, "window"),
        ("bfloat16", 64, {"causal": True, "q_offset": 2}, "q_offset"),
    ],
)
def test_cudnn_refuses_what_it_does_not_take(dtype: str, head_dim: int, options: dict[str, Any], reason: str) -> None:
    x = jnp.zeros((1, 8, 1, head_dim), dtype)
    with pytest.raises(NotImplementedError, match=reason):
        attention(x, x, x, implementation="cudnn", **options)


def test_cudnn_is_causal_from_the_first_query_only() -> None:
    q, k = (jnp.zeros((1, length, 1, 64), jnp.bfloat16) for length in (4, 8))
    with pytest.raises(NotImplementedError, match="as many queries as keys, not 4 and 8"):
        attention(q, k, k, implementation="cudnn", causal=True)


@pytest.fixture
def cudnn_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """XLA stands in for cuDNN, which is not here; the shapes of the queries that it was called with."""
    call = jax.nn.dot_product_attention
    seen: list[tuple[int, ...]] = []

    def by_xla(q: jax.Array, *rest: jax.Array, implementation: str, **options: Any) -> jax.Array:
        assert implementation == "cudnn"
        seen.append(q.shape)
        return call(q, *rest, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    return seen


def test_odd_lengths_for_cudnn_are_padded_and_cut(
    cudnn_calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with JAX 0.11."""
    monkeypatch.setattr(attention_cudnn, "ODD_LENGTHS", False)
    q, k, v = (normal(seed, 2, 3 * 5 + 1, 2, 8).astype(jnp.bfloat16) for seed in range(3))
    for mode in ("joint", "space", "time"):
        options: dict[str, Any] = {"frames": 3, "mode": mode, "class_tokens": 1, "scale": 0.3}
        got = attention_cudnn.space_time(q, k, v, **options)
        wide = (x.astype(jnp.float32) for x in (q, k, v))
        np.testing.assert_allclose(got.astype(jnp.float32), reference.space_time_attention(*wide, **options), atol=2e-2)
    assert all(shape[1] % 2 == 0 for shape in cudnn_calls)


def test_a_window_for_cudnn_is_as_long_as_ours(cudnn_calls: list[tuple[int, ...]]) -> None:
    q, k, v = (normal(seed, 2, 9, 2, 8).astype(jnp.bfloat16) for seed in range(3))
    options: dict[str, Any] = {"causal": True, "window": 3}
    got = attention(q, k, v, implementation="cudnn", **options).astype(jnp.float32)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    np.testing.assert_allclose(got, attention(*wide, implementation="reference", **options), atol=2e-2)
    assert cudnn_calls


@pytest.mark.parametrize("pads", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_for_cudnn_clear_rows_without_a_key(
    causal: bool, pads: bool, cudnn_calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_cudnn, "ODD_LENGTHS", not pads)
    q, gradient = (normal(seed, 3, 9, 4, 8).astype(jnp.bfloat16) for seed in (0, 3))
    k, v = (normal(seed, 3, 9, 2, 8).astype(jnp.bfloat16) for seed in (1, 2))
    options: dict[str, Any] = {"causal": causal, "kv_lengths": jnp.array([0, 4, 9], jnp.int32)}

    def run(implementation: str) -> list[np.ndarray]:
        out, pull = jax.vjp(lambda *x: attention(*x, implementation=implementation, **options), q, k, v)
        return [np.asarray(x, np.float32) for x in (out, *pull(gradient))]

    for got, wanted in zip(run("cudnn"), run("reference"), strict=True):
        np.testing.assert_allclose(got, wanted, atol=5e-2)
        assert not got[0].any()
    assert cudnn_calls
