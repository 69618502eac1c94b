"""Generation against teacher-forced passes of the same model."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pyvdl.config import T5Config, ViTConfig, VLMConfig
from pyvdl.generate import _generate, generate, keep_nucleus
from pyvdl.models import T5, VLM

LENGTH = 12
VOCABULARY = 20


@pytest.fixture(scope="module")
def model() -> VLM:
    vision = ViTConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32, dtype="float32")
    language = T5Config(
        vocab_size=VOCABULARY,
        width=16,
        encoder_layers=1,
        decoder_layers=2,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        num_buckets=8,
        max_distance=16,
        dtype="float32",
    )
    model = VLM(VLMConfig(vision=vision, language=language, num_frames=2), rngs=nnx.Rngs(3))
    model.language.head[...] *= 2  # a sharper distribution, so that greedy and sampled texts have ends
    return model


@pytest.fixture(scope="module")
def clips() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (4, 2, 16, 16, 3), dtype=np.uint8)
    prompt = np.array([[5, 6, 7], [8, 0, 0], [9, 10, 0], [3, 2, 4]], np.int32)
    return video, prompt


def full_pass(model: VLM, video: Any, prompt: Any, tokens: Any) -> np.ndarray:
    """Logits [B, n, M, V] of whole texts, each sample with a copy of its clip."""
    samples = tokens.shape[1]
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda s, *x: nnx.merge(graphdef, s)(*x))
    video, prompt = np.repeat(video, samples, axis=0), np.repeat(prompt, samples, axis=0)
    logits = call(state, video, prompt, np.asarray(tokens).reshape(-1, tokens.shape[2]))
    return np.asarray(logits).reshape(*tokens.shape, -1)


def check_shape_of_texts(tokens: Any, lengths: Any) -> None:
    for text, length in zip(np.asarray(tokens).reshape(-1, tokens.shape[2]), np.asarray(lengths).ravel()):
        assert (text[length:] == 0).all()
        assert 1 not in text[: length - 1]
        assert length == len(text) or text[length - 1] == 1


def test_greedy_is_the_argmax_of_the_full_pass(model: VLM, clips: tuple[Any, Any]) -> None:
    out = generate(model, *clips, max_length=LENGTH, temperature=0)
    check_shape_of_texts(out.tokens, out.lengths)
    logits = full_pass(model, *clips, out.tokens)
    valid = np.arange(LENGTH) < np.asarray(out.lengths)[..., None]
    np.testing.assert_array_equal(logits.argmax(axis=-1)[valid], np.asarray(out.tokens)[valid])
    assert out.tokens.shape == (4, 1, LENGTH)
    assert out.tokens.dtype == out.lengths.dtype == jnp.int32


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.5}, {"temperature": 0.8, "top_p": 0.7}])
def test_log_probabilities_are_those_of_the_plain_model(
    model: VLM, clips: tuple[Any, Any], settings: dict[str, Any]
) -> None:
    out = generate(model, *clips, num_samples=3, max_length=LENGTH, seeds=5, **settings)
    check_shape_of_texts(out.tokens, out.lengths)
    logits = full_pass(model, *clips, out.tokens)
    log_probs = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(out.tokens)[..., None], axis=-1)
    valid = np.arange(LENGTH) < np.asarray(out.lengths)[..., None]
    np.testing.assert_allclose(out.log_probs, np.where(valid, log_probs[..., 0], 0).sum(axis=-1), rtol=1e-4, atol=1e-4)
    if settings["temperature"] > 0:
        assert len({tuple(t) for t in np.asarray(out.tokens).reshape(-1, LENGTH)}) > 6
        assert len(set(np.asarray(out.lengths).ravel())) > 1


def test_a_clip_does_not_depend_on_its_neighbours(model: VLM, clips: tuple[Any, Any]) -> None:
    video, prompt = clips
    seeds = np.array([7, 8, 9, 10], np.uint32)
    settings: dict[str, Any] = {"num_samples": 2, "max_length": LENGTH, "top_p": 0.9}
    whole = generate(model, video, prompt, seeds=seeds, **settings)
    again = generate(model, video, prompt, seeds=7, **settings)  # stands for 7, 8, 9, 10
    np.testing.assert_array_equal(whole.tokens, again.tokens)
    order = [2, 0, 3, 1]
    moved = generate(model, video[order], prompt[order], seeds=seeds[order], **settings)
    np.testing.assert_array_equal(moved.tokens, whole.tokens[np.array(order)])
    np.testing.assert_allclose(moved.log_probs, whole.log_probs[np.array(order)], rtol=1e-5)
    alone = generate(model, video[2:3], prompt[2:3], seeds=seeds[2:3], **settings)
    np.testing.assert_array_equal(alone.tokens[0], whole.tokens[2])
    other = generate(model, video, prompt, seeds=seeds + 100, **settings)
    assert (np.asarray(other.tokens) != np.asarray(whole.tokens)).any(axis=(1, 2)).all()


def test_more_samples_leave_the_first_ones_as_they_are(model: VLM, clips: tuple[Any, Any]) -> None:
    two = generate(model, *clips, num_samples=2, max_length=LENGTH, seeds=1)
    five = generate(model, *clips, num_samples=5, max_length=LENGTH, seeds=1)
    np.testing.assert_array_equal(five.tokens[:, :2], two.tokens)


def test_samples_follow_the_distribution_of_the_model(model: VLM, clips: tuple[Any, Any]) -> None:
    video, prompt = clips[0][:1], clips[1][:1]
    out = generate(model, video, prompt, num_samples=4000, max_length=1, temperature=1.3)
    logits = full_pass(model, video, prompt, out.tokens[:, :1])[0, 0, 0]
    wanted = np.asarray(jax.nn.softmax(logits / 1.3))
    got = np.bincount(np.asarray(out.tokens).ravel(), minlength=VOCABULARY) / 4000
    assert np.abs(got - wanted).max() < 4 * np.sqrt(0.25 / 4000)
    # The nucleus: nothing outside of it, all of it, in the proportions of the model.
    out = generate(model, video, prompt, num_samples=4000, max_length=1, temperature=1.3, top_p=0.6)
    order = np.argsort(-wanted)
    kept = order[: 1 + int(np.searchsorted(np.cumsum(wanted[order]), 0.6))]
    got = np.bincount(np.asarray(out.tokens).ravel(), minlength=VOCABULARY) / 4000
    assert set(np.flatnonzero(got)) == set(kept)
    np.testing.assert_allclose(got[kept], wanted[kept] / wanted[kept].sum(), atol=0.032)


def test_the_nucleus() -> None:
    probs = np.array([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]])
    logits = jnp.asarray(np.log(probs), jnp.float32)

    def kept(top_p: float) -> list[list[int]]:
        return [np.flatnonzero(np.isfinite(row)).tolist() for row in keep_nucleus(logits, top_p)]

    assert kept(0.65) == [[1, 2], [0, 1, 2, 3], [0]]  # equals stay together
    assert kept(0.75) == [[1, 2, 3], [0, 1, 2, 3], [0]]
    assert kept(1e-6) == [[1], [0, 1, 2, 3], [0]]
    assert kept(0.98)[2] == [0, 1, 2, 3]


def test_it_stops_when_all_texts_have_ended(
    model: VLM, clips: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    decode_step = T5.decode_step
    last = jnp.asarray([[2, 1], [0, 3], [1, 1], [2, 0]])  # where each text is made to end

    def forced(self: T5, ids: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        jax.debug.callback(lambda position: steps.append(int(position)), cache.position)
        logits, after = decode_step(self, ids, cache)
        end = (last == cache.position)[..., None] & (jnp.arange(VOCABULARY) == 1)
        return jnp.where(end, 50.0, logits.at[..., 1].set(-50.0)), after

    monkeypatch.setattr(T5, "decode_step", forced)
    out = generate(
        model, *clips, num_samples=2, max_length=LENGTH + 1, temperature=0
    )  # a length no other test compiles
    jax.effects_barrier()
    np.testing.assert_array_equal(out.lengths, last + 1)
    check_shape_of_texts(out.tokens, out.lengths)
    assert sorted(steps) == [0, 1, 2, 3]


def test_text_alone(model: VLM, clips: tuple[Any, Any]) -> None:
    out = generate(model, None, clips[1], max_length=4, temperature=0)
    logits = np.asarray(model(None, jnp.asarray(clips[1]), out.tokens[:, 0]))
    valid = np.arange(4) < np.asarray(out.lengths)[..., None]
    np.testing.assert_array_equal(logits.argmax(axis=-1)[valid[:, 0]], np.asarray(out.tokens)[valid])


def test_settings_do_not_compile_again(model: VLM, clips: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    generate(model, *clips, max_length=5, temperature=0.7, top_p=0.9, seeds=0)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        generate(model, *clips, max_length=5, temperature=1.1, top_p=0.5, seeds=3)
    assert "_generate" not in caplog.text
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        generate(model, *clips, max_length=6, temperature=1.1, top_p=0.5, seeds=3)
    assert "_generate" in caplog.text


def test_samples_share_the_memory_of_their_clip(model: VLM, clips: tuple[Any, Any]) -> None:
    """Ten times the samples must not cost ten times the memory of a clip: here 512 tokens of prompt, 2 of text."""
    graphdef, state = nnx.split(model)
    prompt = jax.ShapeDtypeStruct((2, 512), jnp.int32)

    def temporaries(samples: int) -> int:
        lowered = _generate.lower(
            graphdef,
            state,
            None,
            prompt,
            jax.ShapeDtypeStruct((2,), jnp.uint32),
            jax.ShapeDtypeStruct((), jnp.float32),
            jax.ShapeDtypeStruct((), jnp.float32),
            num_samples=samples,
            max_length=2,
            greedy=True,
            nucleus=False,
        )
        memory = lowered.compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    one, ten = temporaries(1), temporaries(10)
    copy_of_memory = 2 * 2 * 2 * 512 * 16 * 4  # keys and values, layers, clips, tokens, width, bytes
    assert ten - one < 2 * copy_of_memory


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"max_length": 0}, "max_length"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, r"\(0, 1\]"),
        ({"top_p": 1.1}, r"\(0, 1\]"),
        ({"seeds": np.zeros(3, np.uint32)}, r"uint32\[4\]"),
        ({"prompt": np.zeros((3, 2), np.int32)}, "video's B"),
    ],
)
def test_generate_refuses(model: VLM, clips: tuple[Any, Any], changes: dict[str, Any], words: str) -> None:
    arguments = {"video": clips[0], "prompt": clips[1], "max_length": 4, **changes}
    with pytest.raises(ValueError, match=words):
        generate(model, **arguments)
