"""Towers, language model, VLM and dual encoder at toy size: shapes, who depends on whom, decoding from a cache."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pyvdl.config import DualEncoderConfig, T5Config, TextTowerConfig, ViTConfig, VLMConfig
from pyvdl.models import T5, VLM, DualEncoder, ViT, assemble, inflate
from pyvdl.models.layers import RelativeBias, relative_buckets
from pyvdl.models.vit import patchify

VISION = ViTConfig(image_size=32, patch_size=8, width=32, depth=2, num_heads=2, mlp_dim=64, dtype="float32")
LANGUAGE = T5Config(
    vocab_size=40,
    width=24,
    encoder_layers=2,
    decoder_layers=3,
    num_heads=3,
    head_dim=8,
    mlp_dim=48,
    num_buckets=8,
    max_distance=16,
    dtype="float32",
)
TEXT = TextTowerConfig(vocab_size=40, context_length=10, width=32, depth=2, num_heads=2, mlp_dim=64, dtype="float32")
DUAL = DualEncoderConfig(vision=dataclasses.replace(VISION, num_frames=3, class_token=True), text=TEXT, embed_dim=16)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(graphdef: Any, method: str, state: Any, *inputs: Any) -> Any:
    return getattr(nnx.merge(graphdef, state), method)(*inputs)


def apply(model: nnx.Module, method: str, *inputs: Any) -> Any:
    """model.method(*inputs), compiled once for each structure and shape."""
    graphdef, state = nnx.split(model)
    return _apply(graphdef, method, state, *inputs)


def frames(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 32, 32, 3), dtype=np.uint8)


def ids(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).integers(2, 40, shape, dtype=np.int32)


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return VLM(VLMConfig(vision=VISION, language=LANGUAGE, num_frames=3), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def dual() -> DualEncoder:
    return DualEncoder(DUAL, rngs=nnx.Rngs(0))


# --- vision tower


def test_patches_are_squares_in_reading_order() -> None:
    image = np.arange(4 * 6 * 3).reshape(1, 4, 6, 3)
    patches = patchify(jnp.asarray(image), 2)
    assert patches.shape == (1, 6, 12)
    np.testing.assert_array_equal(patches[0, 4], image[0, 2:4, 2:4].ravel())
    wider = np.pad(image, ((0, 0), (0, 1), (0, 1), (0, 0)))  # less than a patch more is cut off
    np.testing.assert_array_equal(patchify(jnp.asarray(wider), 2), patches)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("num_frames", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tower_shapes_and_types(num_frames: int, class_token: bool, dtype: Any) -> None:
    config = dataclasses.replace(VISION, num_frames=num_frames, class_token=class_token, dtype=dtype)
    tower = nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))
    assert {p.dtype for p in jax.tree.leaves(nnx.state(tower))} == {jnp.dtype("float32")}
    graphdef, state = nnx.split(tower)
    shape = (2, 32, 32, 3) if num_frames == 1 else (2, num_frames, 32, 32, 3)
    out = jax.eval_shape(lambda s, x: nnx.merge(graphdef, s)(x), state, jax.ShapeDtypeStruct(shape, jnp.uint8))
    assert out.shape == (2, num_frames * 16 + class_token, 32)
    assert out.dtype == jnp.dtype(dtype)


def test_tower_refuses_other_sizes_and_floats() -> None:
    tower = ViT(VISION, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"uint8\[B, 32, 32, 3\]"):
        tower(jnp.zeros((2, 32, 40, 3), jnp.uint8))
    with pytest.raises(ValueError, match="float32"):
        tower(jnp.zeros((2, 32, 32, 3)))


def test_remat_and_unrolling_change_nothing_but_memory() -> None:
    video = frames(0, 2)

    def value_and_gradient(remat: bool, unroll: bool, on_gpu: bool = False) -> tuple[Any, int]:
        tower = ViT(dataclasses.replace(VISION, width=128, num_heads=2, remat=remat), rngs=nnx.Rngs(0))
        tower.blocks.unroll, tower.blocks.on_gpu = unroll, on_gpu
        graphdef, state = nnx.split(tower)
        function = jax.value_and_grad(lambda s: jnp.mean(nnx.merge(graphdef, s)(video) ** 3))
        return jax.jit(function)(state), str(jax.make_jaxpr(function)(state)).count("= exp ")

    (plain, exps), (remat, more_exps) = value_and_gradient(False, False), value_and_gradient(True, False)
    assert 0 < exps < more_exps  # attention's forward pass is not computed again unless asked for
    unrolled = [value_and_gradient(*which)[0] for which in ((False, True), (True, True), (False, True, True))]
    for other in (remat, *unrolled):
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("unroll", "remat", "on_gpu", "at_once"),
    [
        (None, False, False, 1),
        (None, False, True, 2),
        (None, True, True, 1),
        (True, True, False, 2),
        (False, False, True, 1),
    ],
)
def test_layers_are_unrolled_on_a_gpu_and_where_asked_for(
    unroll: bool | None, remat: bool, on_gpu: bool, at_once: int
) -> None:
    tower = ViT(dataclasses.replace(VISION, remat=remat), rngs=nnx.Rngs(0))
    tower.blocks.unroll, tower.blocks.on_gpu = unroll, on_gpu
    graphdef, state = nnx.split(tower)
    text = str(jax.make_jaxpr(lambda s: nnx.merge(graphdef, s)(frames(0, 2)))(state))
    assert re.findall(r"unroll=(\d+)", text) == [str(at_once)]


def test_layers_differ_at_the_start(vlm: VLM) -> None:
    kernel = vlm.vision.blocks.blocks.mixer.qkv.kernel[...]
    assert kernel.shape == (2, 32, 96)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01


# --- relative positions


def test_buckets_of_the_t5_paper_code() -> None:
    """Values of the published T5 code for 32 buckets and a largest distance of 128."""
    distance = np.array([-200, -128, -90, -20, -16, -15, -8, -7, -1, 0, 1, 7, 8, 15, 16, 20, 90, 128, 200])
    both = relative_buckets(distance, causal=False, num_buckets=32, max_distance=128)
    assert both.tolist() == [15, 15, 14, 10, 10, 9, 8, 7, 1, 0, 17, 23, 24, 25, 26, 26, 30, 31, 31]
    causal = relative_buckets(distance, causal=True, num_buckets=32, max_distance=128)
    assert causal.tolist() == [31, 31, 29, 17, 16, 15, 8, 7, 1] + [0] * 10


@pytest.mark.parametrize("causal", [False, True])
def test_relative_bias_is_a_table_of_buckets(causal: bool) -> None:
    bias = RelativeBias(3, causal=causal, num_buckets=8, max_distance=16, init_scale=1.0, rngs=nnx.Rngs(0))
    table = np.asarray(bias.table[...])
    bucket = relative_buckets(np.arange(-16, 17), causal=causal, num_buckets=8, max_distance=16)
    np.testing.assert_allclose(bias(), table[bucket].T, rtol=1e-6)
    length, row = 40, 18  # with keys beyond the largest distance on both sides
    bucket = relative_buckets(np.arange(length) - row, causal=causal, num_buckets=8, max_distance=16)
    np.testing.assert_allclose(bias.row(jnp.int32(row), length)[0, :, 0], table[bucket].T, rtol=1e-6)
    np.testing.assert_allclose(bias()[:, np.clip(np.arange(length) - row, -16, 16) + 16], table[bucket].T, rtol=1e-6)


def test_gradients_of_a_relative_bias_are_sums_by_bucket() -> None:
    bias = RelativeBias(2, causal=False, num_buckets=8, max_distance=16, init_scale=1.0, rngs=nnx.Rngs(0))
    weight = np.random.default_rng(0).standard_normal((2, 33)).astype(np.float32)
    graph, state = nnx.split(bias)
    found = jax.tree.leaves(jax.grad(lambda state: jnp.vdot(nnx.merge(graph, state)(), weight))(state))[0]
    bucket = relative_buckets(np.arange(-16, 17), causal=False, num_buckets=8, max_distance=16)
    wanted = [[weight[head][bucket == number].sum(dtype=np.float64) for head in range(2)] for number in range(8)]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


# --- language model and VLM


def test_vlm_shapes(vlm: VLM) -> None:
    tokens, mask = apply(vlm, "prefix", jnp.asarray(frames(0, 2, 3)), jnp.asarray([[5, 6, 0], [7, 8, 9]]))
    assert tokens.shape == (2, 3 * 16 + 3, 24)
    assert mask[:, -3:].tolist() == [[True, True, False], [True] * 3]
    assert mask[:, :-3].all()
    logits = apply(vlm, "__call__", frames(0, 2, 3), jnp.asarray([[5, 6, 0], [7, 8, 9]]), jnp.asarray(ids(0, 2, 7)))
    assert (logits.shape, logits.dtype) == ((2, 7, 40), jnp.float32)


def test_frames_of_the_vlm_do_not_see_each_other_before_the_language_model(vlm: VLM) -> None:
    video, order = frames(0, 1, 3), [2, 0, 1]
    seen = [apply(vlm, "prefix", v, jnp.asarray([[5]]))[0] for v in (video, video[:, order])]
    tokens, permuted = (np.asarray(x[0, :48]).reshape(3, 16, 24) for x in seen)
    np.testing.assert_allclose(permuted, tokens[order], atol=1e-5)
    assert np.abs(tokens[0] - tokens[1]).max() > 0.01


def test_a_video_tower_is_refused_in_the_vlm() -> None:
    with pytest.raises(ValueError, match=r"vision\.num_frames"):
        VLM(VLMConfig(vision=dataclasses.replace(VISION, num_frames=2), language=LANGUAGE), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("with_video", [True, False])
def test_padding_of_the_prompt_changes_nothing(vlm: VLM, with_video: bool) -> None:
    video = frames(0, 2, 3) if with_video else None
    prompt, target = ids(0, 2, 4), ids(1, 2, 6)
    padded = np.pad(prompt, ((0, 0), (0, 3)))
    np.testing.assert_allclose(
        apply(vlm, "__call__", video, padded, target), apply(vlm, "__call__", video, prompt, target), atol=1e-5
    )


def test_logits_depend_on_earlier_targets_only(vlm: VLM) -> None:
    video, prompt, target = frames(0, 1, 3), ids(0, 1, 4), ids(1, 1, 6)
    changed = target.copy()
    changed[0, 3] = 1 + target[0, 3] % 30
    difference = np.abs(
        apply(vlm, "__call__", video, prompt, target) - apply(vlm, "__call__", video, prompt, changed)
    ).max(axis=(0, 2))
    assert (difference[:4] == 0).all()
    assert (difference[4:] > 1e-4).all()


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
def test_cached_steps_equal_the_full_pass(activation: Any) -> None:
    model = T5(dataclasses.replace(LANGUAGE, activation=activation), rngs=nnx.Rngs(0))
    memory = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 24)), jnp.float32)
    mask = jnp.arange(9) < jnp.asarray([[9], [4]])
    tokens = ids(1, 2, 3, 7)  # three samples of each of two rows
    tokens[:, :, 0] = 0
    graphdef, state = nnx.split(model)
    step = jax.jit(lambda s, t, c: nnx.merge(graphdef, s).step(t, c))
    cache = model.start_cache(memory, mask, 3, 8)
    assert cache.memory_keys.shape == (3, 2, 9, 3, 8)  # one memory for all samples of a row
    wanted = apply(
        model, "decode", jnp.asarray(tokens.reshape(6, 7)), jnp.repeat(memory, 3, axis=0), jnp.repeat(mask, 3, axis=0)
    ).reshape(2, 3, 7, 40)
    for i in range(7):
        logits, cache = step(state, jnp.asarray(tokens[:, :, i]), cache)
        np.testing.assert_allclose(logits, wanted[:, :, i], atol=2e-5)


def test_initial_loss_is_that_of_a_uniform_guess_or_little_more(vlm: VLM) -> None:
    target = ids(1, 8, 6)
    logits = apply(vlm, "__call__", frames(0, 8, 3), ids(0, 8, 4), target)
    loss = -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1))
    assert np.log(40) - 0.3 < loss < np.log(40) + 1.0


def test_every_parameter_of_the_vlm_gets_a_gradient_that_leads_down(vlm: VLM) -> None:
    video, prompt, target = frames(0, 4, 3), ids(0, 4, 4), ids(1, 4, 6)
    graphdef, state = nnx.split(vlm)

    @jax.jit
    @jax.value_and_grad
    def loss(state: Any) -> jax.Array:
        logits = nnx.merge(graphdef, state)(video, prompt, target)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1))

    first, gradient = loss(state)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
    second, _ = loss(jax.tree.map(lambda p, g: p - 0.01 * g / norm, state, gradient))
    np.testing.assert_allclose(first - second, 0.01 * norm, rtol=0.1)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        by_layer = np.abs(leaf).reshape(leaf.shape[0], -1).max(axis=1)
        stacked = "blocks" in str(path)
        assert np.isfinite(by_layer).all(), path
        assert (by_layer > 0).all() if stacked else by_layer.max() > 0, path


def test_bfloat16_is_the_same_model_less_exactly(vlm: VLM) -> None:
    config = VLMConfig(
        vision=dataclasses.replace(VISION, dtype="bfloat16"), language=dataclasses.replace(LANGUAGE, dtype="bfloat16")
    )
    inputs = frames(0, 4, 3), ids(0, 4, 4), ids(1, 4, 6)
    wanted = apply(vlm, "__call__", *inputs)
    got = apply(VLM(config, rngs=nnx.Rngs(0)), "__call__", *inputs)
    assert got.dtype == jnp.float32
    assert 1e-4 < np.abs(got - wanted).max() < 0.2 < np.std(wanted)


# --- dual encoder


def test_dual_encoder_embeddings_are_of_unit_length(dual: DualEncoder) -> None:
    text = ids(0, 2, 8)
    text[:, 5] = 1
    found = apply(dual, "__call__", jnp.asarray(frames(0, 2, 3)), jnp.asarray(text))
    video_embedding, text_embedding, scale, bias = found
    assert bias is None
    for x in (video_embedding, text_embedding):
        assert (x.shape, x.dtype) == ((2, 16), jnp.float32)
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(scale, 1 / 0.07, rtol=1e-5)


def test_text_is_pooled_at_its_first_end_and_does_not_see_what_follows(dual: DualEncoder) -> None:
    text = ids(0, 1, 9)
    text[0, 4] = 1
    other = text.copy()
    other[0, 5:] = [0, 1, 0, 0]  # another end does not count
    np.testing.assert_allclose(apply(dual, "encode_text", other), apply(dual, "encode_text", text), atol=1e-6)
    np.testing.assert_allclose(apply(dual, "encode_text", text[:, :5]), apply(dual, "encode_text", text), atol=1e-6)
    other[0, 2] += 1
    assert np.abs(apply(dual, "encode_text", other) - apply(dual, "encode_text", text)).max() > 1e-3
    with pytest.raises(ValueError, match="context_length = 10"):
        apply(dual, "encode_text", jnp.ones((1, 11), jnp.int32))


def test_the_video_embedding_knows_the_order_of_frames(dual: DualEncoder) -> None:
    video = frames(0, 1, 3)
    assert np.abs(apply(dual, "encode_video", video) - apply(dual, "encode_video", video[:, ::-1])).max() > 1e-3
    with pytest.raises(ValueError, match=r"uint8\[B, 3, H, W, 3\]"):
        apply(dual, "encode_video", video[:, :2])


def test_the_scale_is_bounded_and_can_come_back(dual: DualEncoder) -> None:
    model = nnx.clone(dual)
    model.logit_scale[...] = jnp.asarray(7.0)
    graphdef, state = nnx.split(model)
    text = jnp.ones((1, 3), jnp.int32)
    scale, gradient = jax.jit(jax.value_and_grad(lambda s: nnx.merge(graphdef, s)(frames(0, 1, 3), text)[2]))(state)
    np.testing.assert_allclose(scale, 100.0, rtol=1e-5)
    assert gradient["logit_scale"][...] > 0


@pytest.mark.parametrize("class_token", [True, False])
def test_inflation(class_token: bool) -> None:
    pool: Any = "class" if class_token else "mean"
    config = dataclasses.replace(DUAL, vision=dataclasses.replace(VISION, class_token=class_token), pool=pool)
    image_model = DualEncoder(config, rngs=nnx.Rngs(0))
    video = frames(0, 2, 1)
    wanted = apply(image_model, "encode_video", video)
    np.testing.assert_array_equal(apply(inflate(image_model, 1, rngs=nnx.Rngs(1)), "encode_video", video), wanted)
    still = np.repeat(video, 3, axis=1)
    zero = inflate(image_model, 3, rngs=nnx.Rngs(1), temporal="zero")
    if not class_token:  # softmax over three copies of all keys
        np.testing.assert_allclose(apply(zero, "encode_video", still), wanted, atol=1e-5)
    random = inflate(image_model, 3, rngs=nnx.Rngs(1))
    assert np.abs(apply(random, "encode_video", still) - apply(zero, "encode_video", still)).max() > 1e-4
    text = np.array([[5, 6, 1]])
    np.testing.assert_array_equal(apply(random, "encode_text", text), apply(image_model, "encode_text", text))
    image_model.vision.position[...] *= 0.01  # as small as in public checkpoints
    small = inflate(image_model, 3, rngs=nnx.Rngs(1)).vision
    np.testing.assert_allclose(jnp.std(small.temporal[...]), jnp.std(small.position[...]), rtol=1e-4)
    # The inflated model has arrays of its own: training it may donate them.
    mine, theirs = (jax.tree.leaves(nnx.state(m)) for m in (random, image_model))
    assert not {x.unsafe_buffer_pointer() for x in mine} & {x.unsafe_buffer_pointer() for x in theirs}
    with pytest.raises(ValueError, match="image model"):
        inflate(random, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'zero' or 'random'"):
        inflate(image_model, 4, rngs=nnx.Rngs(0), temporal="sine")  # type: ignore[arg-type]


def test_an_image_model_takes_the_mean_of_the_frames_embeddings() -> None:
    config = dataclasses.replace(DUAL, vision=dataclasses.replace(VISION, class_token=True))
    model = DualEncoder(config, rngs=nnx.Rngs(0))
    video = frames(0, 2, 3)
    alone = np.stack([apply(model, "encode_video", video[:, i : i + 1]) for i in range(3)], axis=1).mean(1)
    wanted = alone / np.linalg.norm(alone, axis=1, keepdims=True)
    np.testing.assert_allclose(apply(model, "encode_video", video), wanted, atol=1e-6)


def test_divided_attention_starts_as_the_image_model() -> None:
    """What it adds over time is zero at first, whatever the frames are; a gradient moves it."""
    config = dataclasses.replace(DUAL, vision=VISION, pool="mean")
    image_model = DualEncoder(config, rngs=nnx.Rngs(0))
    image_model.vision.blocks.blocks.mixer.norm.scale[...] *= 1.5
    model = inflate(image_model, 3, rngs=nnx.Rngs(1), temporal="zero", attention="divided")
    video = frames(0, 2, 3)
    each = apply(image_model, "_pooled", video.reshape(6, *video.shape[2:]))
    graphdef, state = nnx.split(model.vision)
    tokens, vjp = jax.vjp(lambda s: nnx.merge(graphdef, s)(video), state)
    of_frames = apply(image_model.vision, "__call__", video.reshape(6, *video.shape[2:]))
    np.testing.assert_allclose(tokens.reshape(of_frames.shape), of_frames, atol=2e-5)
    (gradient,) = vjp(jnp.cos(tokens))
    assert np.abs(gradient.blocks.blocks.time.out.kernel[...]).max() > 1e-3
    assert each.shape == (6, DUAL.embed_dim)
    time, mixer = model.vision.blocks.blocks.time, image_model.vision.blocks.blocks.mixer
    np.testing.assert_array_equal(time.qkv.kernel[...], mixer.qkv.kernel[...])
    np.testing.assert_array_equal(time.norm.scale[...], mixer.norm.scale[...])


@pytest.mark.parametrize(("attention", "reaches"), [("joint", True), ("divided", True), ("factorised", False)])
def test_who_sees_whom_over_space_and_time(attention: Any, reaches: bool) -> None:
    """In one block of factorised attention a patch sees its frame and its place in the others, and nothing else; of
    divided, over time and then over space, all."""
    config = dataclasses.replace(VISION, num_frames=3, depth=1, attention=attention)
    tower = ViT(config, rngs=nnx.Rngs(0))
    if attention == "divided":  # which starts at zero over time
        tower.blocks.blocks.time.out.kernel[...] = jnp.eye(config.width)[None]
    video = frames(0, 1, 3)
    changed = video.copy()
    changed[0, 1, :8, 8:16] ^= 255  # frame 1, patch 1
    difference = np.abs(apply(tower, "__call__", changed) - apply(tower, "__call__", video)).max(-1).reshape(3, 16)
    assert (difference[1] > 1e-4).all()
    assert (difference[:, 1] > 1e-4).all()
    others = np.delete(difference, 1, axis=1)[[0, 2]]
    assert (others > 1e-5).all() if reaches else (others < 1e-7).all()


def test_siglip_is_pooled_by_attention_and_has_a_bias() -> None:
    text = dataclasses.replace(TEXT, causal=False, pool="last")
    config = dataclasses.replace(
        DUAL, vision=VISION, text=text, embed_dim=32, pool="map", vision_projection=False, kind="sigmoid"
    )
    model = DualEncoder(config, rngs=nnx.Rngs(0))
    words = ids(0, 2, 8)
    video, found, scale, bias = apply(model, "__call__", frames(0, 2, 1), words)
    assert video.shape == found.shape == (2, 32)
    np.testing.assert_allclose([scale, bias], [10, -10], rtol=1e-6)
    changed = words.copy()
    changed[:, 2] = 3  # every token is seen by the last
    assert np.abs(apply(model, "encode_text", changed) - found).max() > 1e-4
    with pytest.raises(ValueError, match=r"pool 'class' with vision\.class_token False"):
        dataclasses.replace(config, pool="class")
    with pytest.raises(ValueError, match=r"embed_dim must be vision\.width"):
        dataclasses.replace(config, embed_dim=16)


def test_normalisation_is_folded_into_the_patches() -> None:
    """The product with the pixels as they are equals that with normalised ones."""
    config = dataclasses.replace(VISION, pixel_mean=(0.4, 0.5, 0.6), pixel_std=(0.2, 0.3, 0.4))
    tower = ViT(config, rngs=nnx.Rngs(0))
    image = frames(0, 1)
    normal = (image / 255 - np.array(config.pixel_mean)) / np.array(config.pixel_std)
    kernel = np.asarray(tower.patch.kernel[...], np.float64)
    patches = normal.reshape(1, 4, 8, 4, 24).swapaxes(2, 3).reshape(1, 16, -1)
    np.testing.assert_allclose(apply(tower.patch, "__call__", image), patches @ kernel, atol=2e-5)


def test_a_vlm_is_assembled_of_parts_trained_apart() -> None:
    tower, language = ViT(VISION, rngs=nnx.Rngs(0)), T5(LANGUAGE, rngs=nnx.Rngs(1))
    model = assemble(tower, language, num_frames=2, rngs=nnx.Rngs(2))
    assert model.config == VLMConfig(vision=VISION, language=LANGUAGE, num_frames=2)
    assert model.vision is tower
    assert model.language is language
    logits = apply(model, "__call__", frames(0, 2, 2), ids(0, 2, 5), ids(1, 2, 6))
    assert logits.shape == (2, 6, LANGUAGE.vocab_size)
    other = assemble(tower, language, num_frames=2, rngs=nnx.Rngs(3))
    assert np.abs(apply(other, "__call__", frames(0, 2, 2), ids(0, 2, 5), ids(1, 2, 6)) - logits).max() > 1e-4
