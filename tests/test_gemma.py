"""Gemma against a plain definition in NumPy, one row and one layer at a time; and the prefix that texts share."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pyvdl.config import GemmaConfig, ViTConfig, VLMConfig
from pyvdl.models import VLM, Gemma
from tests.models import random_vlm

VISION = ViTConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32, dtype="float32")
GEMMA_1 = GemmaConfig(
    vocab_size=40, width=24, depth=3, num_heads=4, num_kv_heads=1, head_dim=8, mlp_dim=48, dtype="float32"
)
GEMMA_2 = dataclasses.replace(
    GEMMA_1,
    num_kv_heads=2,
    post_norms=True,
    attention_softcap=2.0,
    final_softcap=3.0,
    window=5,  # of 8 visual tokens, up to 4 of the prompt and 6 of text
    query_scale=0.5,
)
PROMPT = np.array([[5, 6, 0, 0], [7, 8, 9, 3]], np.int32)


def make(language: GemmaConfig) -> VLM:
    return random_vlm(VLMConfig(vision=VISION, language=language, num_frames=2))


@pytest.fixture(scope="module", params=[GEMMA_1, GEMMA_2], ids=["gemma1", "gemma2"])
def vlm(request: pytest.FixtureRequest) -> VLM:
    return make(request.param)


@pytest.fixture(scope="module")
def video() -> Any:
    return np.random.default_rng(0).integers(0, 256, (2, 2, 16, 16, 3), dtype=np.uint8)


def texts(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).integers(1, 40, shape, dtype=np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("num_samples", "length"))
def _apply(graphdef: Any, method: str, state: Any, *inputs: Any, **static: Any) -> Any:
    model = nnx.merge(graphdef, state)
    return functools.reduce(getattr, method.split("."), model)(*inputs, **static)


def apply(model: nnx.Module, method: str, *inputs: Any, **static: Any) -> Any:
    """model.method(*inputs), compiled once for each structure and shape."""
    graphdef, state = nnx.split(model)
    return _apply(graphdef, method, state, *inputs, **static)


def plain(model: VLM, prefix: np.ndarray, text: np.ndarray) -> np.ndarray:
    """float64 logits [M + 1, V] after the prefix [S, E] and after each token of the text int32[M]: the definition."""
    gemma = model.language
    assert isinstance(gemma, Gemma)
    config = gemma.config
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim

    def norm(x: Any, scale: Any) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * (1 + np.asarray(scale, np.float64))

    def capped(x: np.ndarray, cap: float | None) -> np.ndarray:
        return x if cap is None else cap * np.tanh(x / cap)

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    embedding = np.asarray(gemma.embedding[...], np.float64)
    x = np.concatenate([np.asarray(prefix, np.float64), embedding[text] * np.sqrt(config.width)])
    count, start = len(x), len(prefix)
    position = np.arange(1, count + 1)
    turn = np.exp(1j * position[:, None] * config.rope_theta ** (-2.0 * np.arange(dim // 2) / dim))

    def rotated(x: np.ndarray) -> np.ndarray:  # [S, D]
        pairs = (x[:, : dim // 2] + 1j * x[:, dim // 2 :]) * turn
        return np.concatenate([pairs.real, pairs.imag], axis=1)

    distance = position[:, None] - position
    both_of_prefix = np.maximum(position[:, None], position) <= start
    scale = dim**-0.5 if config.query_scale is None else config.query_scale
    blocks = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(gemma.blocks.blocks)))
    for layer in range(config.depth):
        block = jax.tree.map(operator.itemgetter(layer), blocks)
        seen = distance >= 0
        if config.window is not None and layer % 2 == 0:
            seen &= distance < config.window
        seen |= both_of_prefix
        qkv = norm(x, block["norm_attention"]["scale"]) @ block["qkv"]
        split = qkv.reshape(count, heads + 2 * kv_heads, dim).swapaxes(0, 1)
        mixed = []
        for head in range(heads):
            shared = heads + head // (heads // kv_heads)
            scores = capped(rotated(split[head]) @ rotated(split[shared]).T * scale, config.attention_softcap)
            weights = np.where(seen, np.exp(scores), 0)
            mixed.append(weights / weights.sum(-1, keepdims=True) @ split[shared + kv_heads])
        added = np.concatenate(mixed, axis=1) @ block["out"]
        x = x + (norm(added, block["post_attention"]["scale"]) if config.post_norms else added)
        gate, value = np.split(norm(x, block["norm_mlp"]["scale"]) @ block["up"], 2, axis=1)
        added = (gelu(gate) * value) @ block["down"]
        x = x + (norm(added, block["post_mlp"]["scale"]) if config.post_norms else added)
    return capped(norm(x[start - 1 :], gemma.norm.scale[...]) @ embedding.T, config.final_softcap)


def test_a_clip_of_several_frames_with_prompts_of_mixed_lengths(vlm: VLM, video: Any) -> None:
    target = texts(1, 2, 6)
    tokens, mask = apply(vlm, "prefix", video, PROMPT)
    got = apply(vlm, "__call__", video, PROMPT, target)
    assert (got.shape, got.dtype) == ((2, 6, 40), jnp.float32)
    for row in range(2):
        wanted = plain(vlm, np.asarray(tokens[row])[np.asarray(mask[row])], target[row, :-1])
        np.testing.assert_allclose(got[row], wanted, atol=1e-5)
    padded = np.pad(PROMPT, ((0, 0), (0, 3)))
    np.testing.assert_allclose(apply(vlm, "__call__", video, padded, target), got, atol=1e-5)


def test_visual_tokens_stand_first_and_are_not_scaled(vlm: VLM, video: Any) -> None:
    tokens, mask = apply(vlm, "prefix", video, PROMPT)
    frames = apply(vlm, "vision", video.reshape(4, 16, 16, 3))
    np.testing.assert_allclose(tokens[:, :8], apply(vlm, "projection", frames).reshape(2, 8, 24), atol=1e-6)
    assert isinstance(vlm.language, Gemma)
    embedding = np.asarray(vlm.language.embedding[...])
    np.testing.assert_allclose(tokens[:, 8:], embedding[PROMPT] * np.sqrt(24), rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(mask).sum(axis=1), [10, 12])


def test_cached_steps_equal_the_full_pass(vlm: VLM, video: Any) -> None:
    target = texts(2, 2, 3, 6)  # three texts of each clip
    tokens, mask = apply(vlm, "prefix", video, PROMPT)
    states = apply(vlm, "language.forced", tokens, mask, target)
    wanted = apply(vlm, "language.logits", states)
    for text in range(3):
        alone = apply(vlm, "__call__", video, PROMPT, target[:, text])
        np.testing.assert_allclose(wanted[:, text], alone, atol=1e-5)
    logits, cache = apply(vlm, "language.start", tokens, mask, num_samples=3, length=8)
    np.testing.assert_allclose(logits, wanted[:, 0, 0], atol=1e-5)
    assert isinstance(vlm.language, Gemma)
    assert cache.prefix_keys.shape == (3, 2, vlm.language.config.num_kv_heads, 12, 8)  # one for all texts
    for i in range(5):
        if i == 3:  # what goes on from another text is that text
            parents = jnp.asarray([[2, 2, 0], [1, 0, 2]])
            cache = vlm.language.reorder(cache, parents)
            target = np.take_along_axis(target, np.asarray(parents)[..., None], axis=1)
            wanted = np.take_along_axis(np.asarray(wanted), np.asarray(parents)[..., None, None], axis=1)
        logits, cache = apply(vlm, "language.step", target[:, :, i], cache)
        np.testing.assert_allclose(logits, wanted[:, :, i + 1], atol=1e-5)


def test_text_alone_and_texts_of_one_token(vlm: VLM) -> None:
    target = texts(3, 2, 1)
    got = apply(vlm, "__call__", None, PROMPT, target)
    for row, prompt in enumerate(PROMPT):
        assert isinstance(vlm.language, Gemma)
        prefix = np.asarray(vlm.language.embed(jnp.asarray(prompt[prompt != 0])))
        np.testing.assert_allclose(got[row], plain(vlm, prefix, target[row, :-1]), atol=1e-5)


def test_every_parameter_gets_a_gradient_that_leads_down(vlm: VLM, video: Any) -> None:
    target = texts(4, 2, 6)
    graphdef, state = nnx.split(vlm)

    @jax.jit
    @jax.value_and_grad
    def loss(state: Any) -> jax.Array:
        logits = nnx.merge(graphdef, state)(video, jnp.asarray(PROMPT), target)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1))

    first, gradient = loss(state)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
    second, _ = loss(jax.tree.map(lambda p, g: p - 0.001 * g / norm, state, gradient))
    np.testing.assert_allclose(first - second, 0.001 * norm, rtol=0.1)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        by_layer = np.abs(leaf).reshape(leaf.shape[0], -1).max(axis=1)
        assert np.isfinite(by_layer).all(), path
        assert (by_layer > 0).all() if "blocks" in str(path) else by_layer.max() > 0, path


def test_bfloat16_is_the_same_model_less_exactly(video: Any) -> None:
    """Parameters in bfloat16 too, as checkpoints come."""
    target = texts(5, 2, 6)
    model = make(GEMMA_2)
    wanted = np.asarray(apply(model, "__call__", video, PROMPT, target))
    model = make(dataclasses.replace(GEMMA_2, dtype="bfloat16"))
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model, nnx.Param)))
    got = apply(model, "__call__", video, PROMPT, target)
    assert got.dtype == jnp.float32
    assert 1e-4 < np.abs(got - wanted).max() < 0.2 < np.std(wanted)
    tokens, mask = apply(model, "prefix", video, PROMPT)
    logits, cache = apply(model, "language.start", tokens, mask, num_samples=2, length=3)
    assert (logits.dtype, cache.keys.dtype, cache.prefix_keys.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    logits, cache = apply(model, "language.step", np.repeat(target[:, :1], 2, axis=1), cache)
    np.testing.assert_allclose(logits[:, 0], got[:, 1], atol=0.1)
    assert (logits.dtype, cache.keys.dtype) == (jnp.float32, jnp.bfloat16)


def test_the_window_is_left_out_where_it_cannot_matter() -> None:
    def operations(window: int) -> str:
        model = Gemma(dataclasses.replace(GEMMA_2, window=window), rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(model)
        inputs = jnp.zeros((1, 10, 24)), jnp.ones((1, 10), bool), jnp.zeros((1, 1, 6), jnp.int32)
        return str(jax.make_jaxpr(lambda s, *x: nnx.merge(graphdef, s).forced(*x))(state, *inputs))

    assert operations(16) == operations(1000)
    assert operations(15) != operations(1000)
