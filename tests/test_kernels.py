"""Kernels against plain float64 NumPy, finite differences, and on four devices."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from pyvdl.kernels import attention, attention_xla, contrastive_loss, space_time_attention

IMPLEMENTATIONS = ("reference", "xla")
ROOT = Path(__file__).resolve().parents[1]
contrastive_module = sys.modules["pyvdl.kernels.contrastive"]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def naive_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, allowed: Any, score: Any) -> np.ndarray:
    """One query, one head at a time. allowed(b, i, j) -> bool; score(b, n, i, j, product) -> float."""
    batch, queries, heads, _ = q.shape
    group = heads // k.shape[2]
    out = np.zeros(q.shape)
    for b, i, n in itertools.product(range(batch), range(queries), range(heads)):
        keys = [j for j in range(k.shape[1]) if allowed(b, i, j)]
        if not keys:
            continue
        scores = np.array([score(b, n, i, j, q[b, i, n] @ k[b, j, n // group]) for j in keys])
        weights = np.exp(scores - scores.max())
        out[b, i, n] = weights / weights.sum() @ v[b, keys, n // group]
    return out


# --- space-time attention


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("class_tokens", [0, 1])
@pytest.mark.parametrize("mode", ["joint", "space", "time"])
def test_space_time_attention_is_attention_within_groups(mode: str, class_tokens: int, implementation: str) -> None:
    frames, patches = 3, 4
    tokens = frames * patches + class_tokens
    q, k, v = (normal(i, 2, tokens, 2, 6) for i in range(3))

    def allowed(_: int, i: int, j: int) -> bool:
        if mode == "joint" or max(i, j) == frames * patches:  # the class token stands last
            return True
        return i // patches == j // patches if mode == "space" else i % patches == j % patches

    wanted = naive_attention(q, k, v, allowed, lambda b, n, i, j, product: 0.3 * product)
    got = space_time_attention(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)),
        frames=frames,
        mode=mode,
        class_tokens=class_tokens,
        scale=0.3,
        implementation=implementation,
    )
    np.testing.assert_allclose(got, wanted, atol=2e-6)


@pytest.mark.parametrize("class_tokens", [0, 1])
@pytest.mark.parametrize("mode", ["joint", "space", "time"])
def test_space_time_gradients(mode: str, class_tokens: int) -> None:
    q, k, v, weight = (jnp.asarray(normal(i, 2, 6 + class_tokens, 2, 4), jnp.float32) for i in range(4))

    def loss(implementation: str, *inputs: jax.Array) -> jax.Array:
        out = space_time_attention(
            *inputs, frames=3, mode=mode, class_tokens=class_tokens, implementation=implementation
        )
        return jnp.sum(out * weight)

    wanted = jax.jit(jax.grad(lambda *x: loss("reference", *x), argnums=(0, 1, 2)))(q, k, v)
    got = jax.jit(jax.grad(lambda *x: loss("xla", *x), argnums=(0, 1, 2)))(q, k, v)
    # The rule that stands beside the kernels for TPUs, whose residuals it shares.
    options: dict[str, Any] = {"frames": 3, "mode": mode, "class_tokens": class_tokens, "scale": 4**-0.5}
    by_rule = attention_xla.backward(q, k, v, *attention_xla.forward(q, k, v, **options), weight, **options)
    for a, b, c in zip(got, wanted, by_rule, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
        np.testing.assert_allclose(c, b, atol=2e-6)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (q, k, v)]
        jax.test_util.check_grads(
            jax.jit(lambda *x: loss("xla", *x)), wide, order=1, modes=["rev"], atol=1e-6, rtol=1e-6
        )


def test_the_class_token_carries_news_between_frames_in_two_layers_only() -> None:
    """In "space" a patch hears of another frame through the class token alone, hence not within one layer."""
    x = jnp.asarray(normal(0, 1, 7, 1, 4), jnp.float32)
    changed = x.at[0, 0].add(1.0)  # a patch of frame 0; frames of 3 patches

    def layer(x: jax.Array) -> jax.Array:
        return space_time_attention(x, x, x, frames=2, mode="space", class_tokens=1)

    one = np.abs(layer(changed) - layer(x)).max(axis=(0, 2, 3))
    two = np.abs(layer(layer(changed)) - layer(layer(x))).max(axis=(0, 2, 3))
    assert (one[3:6] == 0).all()
    assert (one[[0, 1, 2, 6]] > 1e-4).all()
    assert (two > 1e-6).all()


def test_one_frame_or_one_patch_makes_modes_agree() -> None:
    q, k, v = (jnp.asarray(normal(i, 2, 6, 2, 4), jnp.float32) for i in range(3))
    joint = space_time_attention(q, k, v, frames=1, mode="joint", class_tokens=0)
    scaled = space_time_attention(q, k, v, frames=1, mode="joint", class_tokens=0, scale=0.5)  # by default 4 ** -0.5
    np.testing.assert_allclose(scaled, joint, atol=1e-6)
    np.testing.assert_allclose(space_time_attention(q, k, v, frames=1, mode="space", class_tokens=0), joint, atol=1e-6)
    np.testing.assert_allclose(space_time_attention(q, k, v, frames=6, mode="time", class_tokens=0), joint, atol=1e-6)
    alone = space_time_attention(q, k, v, frames=1, mode="time", class_tokens=0)
    np.testing.assert_allclose(alone, v, atol=1e-6)


def test_bfloat16_keeps_float32_statistics() -> None:
    """Scores of 1,000 equal keys: a bfloat16 sum would stop growing at 256."""
    q = jnp.zeros((1, 1000, 1, 8), jnp.bfloat16)
    v = jnp.ones((1, 1000, 1, 8), jnp.bfloat16)
    for implementation in IMPLEMENTATIONS:
        out = space_time_attention(q, q, v, frames=1, class_tokens=0, implementation=implementation)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(jnp.float32), 1.0, atol=0.01)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "spatial"}, "'joint', 'space', 'time'"),
        ({"class_tokens": 2}, "0 or 1"),
        ({"frames": 4}, "frames \\* patches"),
        ({"frames": 0}, "frames \\* patches"),
        ({"implementation": "triton"}, "pallas_tpu"),
        ({"k": jnp.zeros((1, 7, 2, 3))}, "one shape"),
        ({"q": jnp.zeros((7, 2, 4))}, "one shape"),
        ({"v": jnp.zeros((1, 7, 2, 4), jnp.bfloat16)}, "one dtype"),
    ],
)
def test_space_time_attention_refuses(changes: dict[str, Any], words: str) -> None:
    x = jnp.zeros((1, 7, 2, 4))
    arguments = {"q": x, "k": x, "v": x, "frames": 3, **changes}
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: space_time_attention(**arguments))


def test_integers_are_refused() -> None:
    x = jnp.zeros((1, 7, 2, 4), jnp.int32)
    with pytest.raises(ValueError, match="floating"):
        space_time_attention(x, x, x, frames=3)


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu", "cudnn"])
def test_an_implementation_that_is_not_there_says_so(name: str) -> None:
    x = jnp.zeros((1, 7, 2, 4))
    with pytest.raises(NotImplementedError, match=name):
        space_time_attention(x, x, x, frames=3, implementation=name)


@pytest.mark.parametrize("name", ["pallas_gpu", "cudnn"])
def test_an_implementation_of_other_ops_says_what_the_loss_has(name: str) -> None:
    x = jnp.zeros((7, 4))
    with pytest.raises(NotImplementedError, match=f"{name}.*'pallas_tpu', 'xla', 'reference'"):
        contrastive_loss(x, x, 1.0, implementation=name)


# --- attention of language models

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "prefix": {"causal": True, "prefix_lengths": [2, 4]},
    "offset": {"causal": True, "q_offset": 3},
    "offsets": {"causal": True, "q_offset": [1, 4]},
    "lengths": {"kv_lengths": [7, 3]},
    "nothing to see": {"kv_lengths": [0, 5]},
    "window": {"causal": True, "window": 2},
    "window both sides": {"window": 3},
    "softcap and bias": {"softcap": 1.5, "bias": (1, 4, 5, 7)},
    "bias by row": {"bias": (2, 1, 1, 7), "causal": True},
    "biases by place and distance": {"bias": (2, 4, 5, 7), "distance_bias": (4, 5)},
    "all": {
        "causal": True,
        "prefix_lengths": [1, 2],
        "q_offset": [2, 1],
        "kv_lengths": [6, 7],
        "bias": (2, 4, 5, 7),
        "softcap": 2.0,
        "window": 4,
    },
}


def attention_arguments(case: dict[str, Any]) -> dict[str, Any]:
    made = dict(case)
    for name in ("prefix_lengths", "q_offset", "kv_lengths"):
        if isinstance(made.get(name), list):
            made[name] = jnp.asarray(made[name], jnp.int32)
    for seed, name in ((9, "bias"), (8, "distance_bias")):
        if name in made:
            made[name] = jnp.asarray(normal(seed, *made[name]), jnp.float32)
    return made


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_the_definition(case: str, kv_heads: int, implementation: str) -> None:
    made = attention_arguments(CASES[case])
    q, k, v = normal(0, 2, 5, 4, 6), normal(1, 2, 7, kv_heads, 6), normal(2, 2, 7, kv_heads, 6)
    offset = np.broadcast_to(np.asarray(made.get("q_offset", 0)), 2)
    bias = None if "bias" not in made else np.broadcast_to(np.asarray(made["bias"]), (2, 4, 5, 7))

    def allowed(b: int, i: int, j: int) -> bool:
        position = offset[b] + i
        seen = True
        if made.get("causal"):
            seen = j <= position or ("prefix_lengths" in made and j < made["prefix_lengths"][b])
        if "window" in made:
            seen = seen and abs(position - j) < made["window"]
        if "kv_lengths" in made:
            seen = seen and j < made["kv_lengths"][b]
        return bool(seen)

    def score(b: int, n: int, i: int, j: int, product: float) -> float:
        s = product * 6**-0.5
        if "softcap" in made:
            s = made["softcap"] * np.tanh(s / made["softcap"])
        if "distance_bias" in made:
            s += float(made["distance_bias"][n, np.clip(j - i, -2, 2) + 2])
        return s if bias is None else s + bias[b, n, i, j]

    wanted = naive_attention(q, k, v, allowed, score)
    got = attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), implementation=implementation, **made)
    np.testing.assert_allclose(got, wanted, atol=3e-6)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("case", ["plain", "nothing to see", "all"])
def test_attention_gradients(case: str, kv_heads: int) -> None:
    with jax.enable_x64(True):
        made = attention_arguments(CASES[case])
        bias = jnp.asarray(normal(9, 2, 4, 5, 7))
        weight = jnp.asarray(normal(3, 2, 5, 4, 6))
        inputs = (
            jnp.asarray(normal(0, 2, 5, 4, 6)),
            jnp.asarray(normal(1, 2, 7, kv_heads, 6)),
            jnp.asarray(normal(2, 2, 7, kv_heads, 6)),
            bias,
        )

        def loss(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
            return jnp.sum(weight * attention(q, k, v, **{**made, "bias": bias}))

        jax.test_util.check_grads(jax.jit(loss), inputs, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_decode_steps_equal_one_causal_pass() -> None:
    q, k, v = (jnp.asarray(normal(i, 2, 6, 2, 4), jnp.float32) for i in range(3))
    wanted = attention(q, k, v, causal=True)

    @jax.jit
    def step(q: jax.Array, position: jax.Array) -> jax.Array:
        return attention(q, k, v, causal=True, q_offset=position)

    for i in range(6):
        np.testing.assert_allclose(step(q[:, i : i + 1], jnp.int32(i))[:, 0], wanted[:, i], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prefix_lengths": jnp.zeros(2, jnp.int32)}, "causal"),
        ({"kv_lengths": jnp.zeros(3, jnp.int32)}, "int32\\[2\\]"),
        ({"kv_lengths": jnp.zeros(2)}, "int32\\[2\\]"),
        ({"bias": jnp.zeros((2, 3, 5, 7))}, "broadcastable"),
        ({"window": 0}, "at least 1"),
        ({"softcap": 0.0}, "positive"),
        ({"q_offset": -1}, "at least 0"),
        ({"k": jnp.zeros((2, 7, 3, 6)), "v": jnp.zeros((2, 7, 3, 6))}, "divisor of 4"),
        ({"implementation": "flash"}, "'xla'"),
    ],
)
def test_attention_refuses(changes: dict[str, Any], words: str) -> None:
    arguments = {"q": jnp.zeros((2, 5, 4, 6)), "k": jnp.zeros((2, 7, 4, 6)), "v": jnp.zeros((2, 7, 4, 6)), **changes}
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: attention(**arguments))


# --- contrastive loss


def naive_contrastive(
    video: np.ndarray, text: np.ndarray, scale: float, bias: float, kind: str, groups: np.ndarray | None
) -> float:
    batch, total = len(video), 0.0
    logits = scale * video @ text.T + bias
    for i in range(batch):
        pairs = [j for j in range(batch) if j == i or groups is None or groups[i] != groups[j]]
        if kind == "softmax":
            rows = np.log(np.exp(logits[i, pairs]).sum()) - logits[i, i]
            columns = np.log(np.exp(logits[pairs, i]).sum()) - logits[i, i]
            total += (rows + columns) / 2
        else:
            total += sum(np.log1p(np.exp(-logits[i, j] if i == j else logits[i, j])) for j in pairs)
    return total / batch


def unit_rows(seed: int, rows: int, width: int = 5) -> np.ndarray:
    x = normal(seed, rows, width)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("batch", "tile"), [(1, 1024), (6, 1024), (6, 3), (7, 3), (9, 2)])
def test_contrastive_loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch, batch: int, tile: int, kind: str, grouped: bool
) -> None:
    monkeypatch.setattr(contrastive_module, "TILE", tile)
    video, text = unit_rows(0, batch), unit_rows(1, batch)
    groups = np.arange(batch, dtype=np.int32) % 4 if grouped else None
    bias = -1.5 if kind == "sigmoid" else None
    wanted = naive_contrastive(video, text, 8.0, bias or 0.0, kind, groups)
    for implementation in IMPLEMENTATIONS:
        got = contrastive_loss(
            jnp.asarray(video, jnp.float32),
            jnp.asarray(text, jnp.float32),
            8.0,
            bias,
            kind=kind,
            groups=None if groups is None else jnp.asarray(groups),
            implementation=implementation,
        )
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, wanted, rtol=3e-6, atol=3e-6)

    with jax.enable_x64(True):
        inputs = [jnp.asarray(video), jnp.asarray(text), jnp.asarray(8.0)]
        if bias is not None:
            inputs.append(jnp.asarray(bias))

        def loss(*inputs: jax.Array) -> jax.Array:
            return 3.0 * contrastive_loss(*inputs, kind=kind, groups=groups)

        jax.test_util.check_grads(jax.jit(loss), inputs, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_false_negatives_do_not_count(kind: str) -> None:
    """With a duplicate of every row, in one group with it, the rows that are duplicated are not pushed apart."""
    video, text = unit_rows(0, 4), unit_rows(1, 4)
    doubled = [jnp.asarray(np.concatenate([x, x]), jnp.float32) for x in (video, text)]
    groups = jnp.asarray([0, 1, 2, 3] * 2, jnp.int32)
    bias = None if kind == "softmax" else -1.0
    # Each row has six negatives, its three of before twice; softmax counts them in a denominator, sigmoid in a sum.
    logits = 5.0 * video @ text.T + (bias or 0.0)
    if kind == "softmax":
        weights = np.exp(logits) * (2 - np.eye(4))
        wanted = np.mean((np.log(weights.sum(0)) + np.log(weights.sum(1))) / 2 - np.diag(logits))
    else:
        terms = np.log1p(np.exp(np.where(np.eye(4) > 0, -logits, logits)))
        wanted = (terms * (2 - np.eye(4))).sum() / 4
    got = contrastive_loss(doubled[0], doubled[1], 5.0, bias, kind=kind, groups=groups)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert contrastive_loss(doubled[0], doubled[1], 5.0, bias, kind=kind) > got


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_numbers_give_nan(kind: str, bad: float) -> None:
    video, text = (jnp.asarray(unit_rows(i, 6), jnp.float32) for i in range(2))
    bias = None if kind == "softmax" else -10.0
    for implementation in IMPLEMENTATIONS:

        def loss(video: jax.Array, text: jax.Array, scale: float, implementation: str = implementation) -> jax.Array:
            return contrastive_loss(video, text, scale, bias, kind=kind, implementation=implementation)

        assert jnp.isnan(loss(video.at[2, 1].set(bad), text, 10.0))
        assert jnp.isnan(loss(video, text.at[0, 3].set(bad), 10.0))
        assert jnp.isnan(loss(video, text, bad))


def test_large_scores_do_not_overflow() -> None:
    video = jnp.asarray(unit_rows(0, 6), jnp.float32)
    loss, gradient = jax.value_and_grad(contrastive_loss)(video, video, 1e4)
    np.testing.assert_allclose(loss, 0.0, atol=1e-2)
    assert jnp.isfinite(gradient).all()


def test_bfloat16_embeddings() -> None:
    video, text = (jnp.asarray(unit_rows(i, 12), jnp.bfloat16) for i in range(2))
    wanted = naive_contrastive(np.asarray(video, np.float64), np.asarray(text, np.float64), 10.0, 0.0, "softmax", None)
    loss, gradient = jax.value_and_grad(contrastive_loss)(video, text, 10.0)
    assert (loss.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_no_score_matrix_is_stored(kind: str) -> None:
    batch, width = 8192, 16
    x = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    groups = jax.ShapeDtypeStruct((batch,), jnp.int32)
    bias = None if kind == "softmax" else -10.0

    def gradients(video: jax.Array, text: jax.Array, groups: jax.Array) -> Any:
        def loss(video: jax.Array, text: jax.Array) -> jax.Array:
            return contrastive_loss(video, text, 10.0, bias, kind=kind, groups=groups)

        return jax.value_and_grad(loss, argnums=(0, 1))(video, text)

    memory = jax.jit(gradients).lower(x, x, groups).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 32 * 2**20  # the matrix takes 256 MiB


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "clip"}, "'softmax', 'sigmoid'"),
        ({"text": jnp.zeros((5, 4))}, "one shape"),
        ({"video": jnp.zeros((6, 2, 2))}, "one shape"),
        ({"video": jnp.zeros((6, 4), jnp.int32)}, "floating"),
        ({"bias": 1.0}, "softmax"),
        ({"scale": jnp.zeros(6)}, "scalar"),
        ({"groups": jnp.zeros(5, jnp.int32)}, "int32\\[6\\]"),
        ({"groups": jnp.zeros(6)}, "int32\\[6\\]"),
        ({"implementation": "triton"}, "'xla'"),
    ],
)
def test_contrastive_loss_refuses(changes: dict[str, Any], words: str) -> None:
    arguments = {"video": jnp.zeros((6, 4)), "text": jnp.zeros((6, 4)), "scale": 1.0, **changes}
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: contrastive_loss(**arguments))


FOUR_DEVICES = """
import itertools, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from pyvdl.kernels import contrastive_loss
sys.modules["pyvdl.kernels.contrastive"].TILE = 4

devices = np.array(jax.devices())
assert len(devices) == 4
one_axis = Mesh(devices, ("data",)), "data"
two_axes = Mesh(devices.reshape(2, 2), ("slice", "data")), ("slice", "data")
rng = np.random.default_rng(0)
embeddings = rng.standard_normal((2, 24, 6)).astype(np.float32)
video, text = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
some_groups = rng.integers(0, 8, 24).astype(np.int32)  # they span devices

for kind, (mesh, axis), check, groups in [
    ("softmax", one_axis, True, some_groups),
    ("softmax", two_axes, False, None),
    ("sigmoid", one_axis, False, some_groups),
    ("sigmoid", two_axes, True, None),
]:
    numbers = (jnp.float32(9.0),) if kind == "softmax" else (jnp.float32(9.0), jnp.float32(-3.0))
    argnums = tuple(range(2 + len(numbers)))

    def value_and_gradients(video, text, groups, *numbers, axis_name=None):
        def loss(*inputs):
            return contrastive_loss(*inputs, kind=kind, groups=groups, axis_name=axis_name)
        return jax.value_and_grad(loss, argnums)(video, text, *numbers)

    wanted_loss, (wanted_video, wanted_text, *wanted_numbers) = value_and_gradients(video, text, groups, *numbers)
    rows, same = P(axis), P()
    # Unchecked, each device gives what it holds of the loss and of the numbers' gradients: all must hold the whole.
    out = same if check else rows
    split = jax.jit(jax.shard_map(
        lambda *x: jax.tree.map(
            lambda y: y if check or y.ndim else y[None], value_and_gradients(*x, axis_name=axis)
        ),
        mesh=mesh,
        in_specs=(rows, rows, None if groups is None else rows) + (same,) * len(numbers),
        out_specs=(out, (rows, rows) + (out,) * len(numbers)),
        check_vma=check,
    ))
    loss, (of_video, of_text, *of_numbers) = split(video, text, groups, *numbers)
    assert loss.shape == (() if check else (4,))
    np.testing.assert_allclose(loss, np.broadcast_to(wanted_loss, loss.shape), rtol=2e-6)
    np.testing.assert_allclose(of_video, wanted_video, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(of_text, wanted_text, rtol=2e-5, atol=2e-6)
    for got, want in zip(of_numbers, wanted_numbers, strict=True):
        np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), rtol=2e-5, atol=2e-6)
print("all equal")
"""


def test_four_devices_give_the_loss_and_gradients_of_one() -> None:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4",
    }
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FOUR_DEVICES)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "all equal" in run.stdout


def test_offsets_may_be_numpy_arrays() -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 3, 2, 8)) for i in range(3))
    wanted = attention(q, k, v, causal=True, q_offset=jnp.array([0, 1]))
    found = attention(q, k, v, causal=True, q_offset=np.array([0, 1], np.int32))
    np.testing.assert_array_equal(found, wanted)


def test_lengths_and_groups_may_be_lists() -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 3, 2, 8)) for i in range(3))
    for name, more in (("kv_lengths", {}), ("prefix_lengths", {"causal": True})):
        wanted = attention(q, k, v, **{name: jnp.array([1, 2])}, **more)
        np.testing.assert_array_equal(attention(q, k, v, **{name: [1, 2]}, **more), wanted)
    x = jax.random.normal(jax.random.key(3), (3, 8))
    wanted = contrastive_loss(x, x, 1.0, groups=jnp.array([0, 0, 1]))
    assert contrastive_loss(x, x, 1.0, groups=[0, 0, 1]) == wanted
