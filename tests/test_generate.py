"""Generation against teacher-forced passes of the same model."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pyvdl.config import GemmaConfig, T5Config, ViTConfig, VLMConfig
from pyvdl.generate import Samples, _generate, _Settings, bucket, generate, score
from pyvdl.models import T5, VLM, Gemma
from pyvdl.sampling import ban_repeats, keep_nucleus, keep_top_k
from tests.models import random_vlm

LENGTH = 12
VOCABULARY = 20
VISION = ViTConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32, dtype="float32")
T5_LANGUAGE = T5Config(
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
GEMMA_LANGUAGE = GemmaConfig(
    vocab_size=VOCABULARY,
    width=16,
    depth=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    post_norms=True,
    attention_softcap=5.0,
    final_softcap=6.0,
    window=7,
    dtype="float32",
)


@functools.cache
def make(language: T5Config | GemmaConfig) -> VLM:
    """Distributions are made sharper and less alike, so that greedy and sampled texts differ and have ends."""
    model = random_vlm(VLMConfig(vision=VISION, language=language, num_frames=2))
    if isinstance(model.language, T5):
        model.language.head[...] *= 2
    else:
        assert isinstance(model.language, Gemma)
        model.language.norm.scale[...] += 1.5
    return model


@pytest.fixture(scope="module", params=[T5_LANGUAGE, GEMMA_LANGUAGE], ids=["t5", "gemma"])
def model(request: pytest.FixtureRequest) -> VLM:
    return make(request.param)


@pytest.fixture(scope="module")
def t5() -> VLM:
    return make(T5_LANGUAGE)


@pytest.fixture(scope="module")
def clips() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (4, 2, 16, 16, 3), dtype=np.uint8)
    prompt = np.array([[5, 6, 7], [8, 0, 0], [9, 10, 0], [3, 2, 4]], np.int32)
    return video, prompt


@functools.partial(jax.jit, static_argnums=0)
def _call(graphdef: Any, state: Any, *inputs: Any) -> jax.Array:
    return nnx.merge(graphdef, state)(*inputs)


def full_pass(model: VLM, video: Any, prompt: Any, tokens: Any) -> np.ndarray:
    """Logits [B, n, M, V] of whole texts, each sample with a copy of its clip."""
    samples = tokens.shape[1]
    graphdef, state = nnx.split(model)
    prompt = np.repeat(prompt, samples, axis=0)
    video = None if video is None else np.repeat(video, samples, axis=0)
    logits = _call(graphdef, state, video, prompt, np.asarray(tokens).reshape(-1, tokens.shape[2]))
    return np.asarray(logits).reshape(*tokens.shape, -1)


def drawn(model: VLM, clips: tuple[Any, Any], **settings: Any) -> Samples:
    """Three texts of each clip, by default sampled. Tests share its settings, and so the programs."""
    return generate(
        model, *clips, **{"num_samples": 3, "max_length": LENGTH, "temperature": 1.5, "seeds": 5} | settings
    )


def check_shape_of_texts(tokens: Any, lengths: Any) -> None:
    for text, length in zip(np.asarray(tokens).reshape(-1, tokens.shape[2]), np.asarray(lengths).ravel()):
        assert (text[length:] == 0).all()
        assert 1 not in text[: length - 1]
        assert length == len(text) or text[length - 1] == 1


def test_greedy_is_the_argmax_of_the_full_pass(model: VLM, clips: tuple[Any, Any]) -> None:
    out = drawn(model, clips, temperature=0)
    check_shape_of_texts(out.tokens, out.lengths)
    logits = full_pass(model, *clips, out.tokens)
    valid = np.arange(LENGTH) < np.asarray(out.lengths)[..., None]
    np.testing.assert_array_equal(logits.argmax(axis=-1)[valid], np.asarray(out.tokens)[valid])
    assert out.tokens.shape == (4, 3, LENGTH)
    assert out.tokens.dtype == out.lengths.dtype == jnp.int32


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.5}, {"temperature": 1.2, "top_p": 0.8}])
def test_log_probabilities_are_those_of_the_plain_model(
    model: VLM, clips: tuple[Any, Any], settings: dict[str, Any]
) -> None:
    out = drawn(model, clips, **settings)
    check_shape_of_texts(out.tokens, out.lengths)
    logits = full_pass(model, *clips, out.tokens)
    log_probs = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(out.tokens)[..., None], axis=-1)
    valid = np.arange(LENGTH) < np.asarray(out.lengths)[..., None]
    np.testing.assert_allclose(out.log_probs, np.where(valid, log_probs[..., 0], 0).sum(axis=-1), rtol=1e-4, atol=1e-4)
    if settings["temperature"] > 0:
        assert len({tuple(t) for t in np.asarray(out.tokens).reshape(-1, LENGTH)}) > 6
        assert len(set(np.asarray(out.lengths).ravel())) > 1


def test_a_text_does_not_depend_on_other_clips_nor_on_the_number_of_texts(model: VLM, clips: tuple[Any, Any]) -> None:
    video, prompt = clips
    seeds = np.array([7, 8, 9, 10], np.uint32)
    whole = drawn(model, clips, top_p=0.9, seeds=seeds)
    again = drawn(model, clips, top_p=0.9, seeds=7)  # stands for 7, 8, 9, 10
    np.testing.assert_array_equal(whole.tokens, again.tokens)
    order = [2, 0, 3, 1]
    moved = drawn(model, (video[order], prompt[order]), top_p=0.9, seeds=seeds[order])
    np.testing.assert_array_equal(moved.tokens, whole.tokens[np.array(order)])
    np.testing.assert_allclose(moved.log_probs, whole.log_probs[np.array(order)], rtol=1e-5)
    alone = drawn(model, (video[2:3], prompt[2:3]), num_samples=2, top_p=0.9, seeds=seeds[2:3])
    np.testing.assert_array_equal(alone.tokens[0], whole.tokens[2, :2])
    other = drawn(model, clips, top_p=0.9, seeds=seeds + 100)
    assert (np.asarray(other.tokens) != np.asarray(whole.tokens)).any(axis=(1, 2)).all()


def test_samples_follow_the_distribution_of_the_model(t5: VLM, clips: tuple[Any, Any]) -> None:
    video, prompt = clips[0][:1], clips[1][:1]

    def shares(**settings: Any) -> np.ndarray:
        out = generate(t5, video, prompt, num_samples=4000, max_length=1, temperature=1.3, **settings)
        return np.bincount(np.asarray(out.tokens).ravel(), minlength=VOCABULARY) / 4000

    logits = full_pass(t5, video, prompt, np.zeros((1, 1, 1), np.int32))[0, 0, 0]
    wanted = np.asarray(jax.nn.softmax(logits / 1.3))
    assert np.abs(shares() - wanted).max() < 4 * np.sqrt(0.25 / 4000)
    # A nucleus among the likeliest: nothing outside of it, all of it, in the proportions of the model.
    among = np.argsort(-wanted)[:5]
    top_p = float(wanted[among[:2]].sum() / wanted[among].sum()) - 1e-3  # of all tokens, two are less
    assert wanted[among[:2]].sum() < top_p
    kept = among[:2]
    got = shares(top_k=5, top_p=top_p)
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
    assert kept(1 - 1e-9)[0] == [0, 1, 2, 3]  # more than rounding lets them sum to


def test_the_likeliest() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 500)).astype(np.float32)
    for count in (1, 17, 499, 500, 600):
        kept = np.isfinite(keep_top_k(jnp.asarray(logits), count))
        np.testing.assert_array_equal(kept, logits >= np.sort(logits)[:, ::-1][:, min(count, 500) - 1 :][:, :1])
    assert np.isfinite(keep_top_k(jnp.asarray([[1.0, 2.0, 2.0, 0.0]]), 1)).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("ngram", [1, 2, 3])
def test_bans_of_repeats(ngram: int) -> None:
    tokens = np.random.default_rng(ngram).integers(0, 4, (2, 3, 9))
    for length in (0, 1, 2, 5, 9):
        got = np.isneginf(ban_repeats(jnp.zeros((2, 3, 4)), jnp.asarray(tokens), jnp.int32(length), ngram))
        for text, banned in zip(tokens.reshape(6, 9)[:, :length].tolist(), got.reshape(6, 4)):
            had = {tuple(text[i : i + ngram]) for i in range(length - ngram + 1)}
            wanted = [length >= ngram - 1 and (*text[length - ngram + 1 :], token) in had for token in range(4)]
            assert banned.tolist() == wanted, (text, ngram)
    assert not np.isneginf(ban_repeats(jnp.zeros((2, 3, 4)), jnp.asarray(tokens[:, :, :2]), jnp.int32(2), 3)).any()


@pytest.mark.parametrize(
    ("beams", "last"), [(1, [[2, 1], [0, 0], [1, 3], [2, 2]]), (2, [[2, 2], [1, 1], [1, 1], [2, 2]])]
)
def test_it_stops_when_all_texts_have_ended(
    t5: VLM, clips: tuple[Any, Any], beams: int, last: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """last: where each text is made to end."""
    steps = []
    step = T5.step

    def forced(self: T5, ids: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        jax.debug.callback(lambda position: steps.append(int(position)), cache.position)
        logits, after = step(self, ids, cache)
        end = (jnp.asarray(last) == cache.position)[..., None] & (jnp.arange(VOCABULARY) == 1)
        return jnp.where(end, 50.0, logits.at[..., 1].set(-50.0)), after

    monkeypatch.setattr(T5, "step", forced)
    options: dict[str, Any] = {"num_samples": 2, "num_beams": beams, "temperature": 0}
    out = generate(t5, *clips, **options, max_length=LENGTH + 1)  # a length no other test compiles
    jax.effects_barrier()
    np.testing.assert_array_equal(out.lengths, np.asarray(last) + 1)
    check_shape_of_texts(out.tokens, out.lengths)
    assert sorted(steps) == list(range(np.max(last) + 1))


def test_text_alone(t5: VLM, clips: tuple[Any, Any]) -> None:
    out = generate(t5, None, clips[1], max_length=4, temperature=0)
    logits = full_pass(t5, None, clips[1], out.tokens)
    valid = np.arange(4) < np.asarray(out.lengths)[..., None]
    np.testing.assert_array_equal(logits.argmax(axis=-1)[valid], np.asarray(out.tokens)[valid])


# --- options


def test_several_end_ids_and_another_padding(t5: VLM, clips: tuple[Any, Any]) -> None:
    one = drawn(t5, clips, end_ids=np.int64(1))
    out = drawn(t5, clips, end_ids=(1, 7, 12), pad_id=3)
    for text, whole, length in zip(*(np.asarray(x).reshape(12, -1) for x in (out.tokens, one.tokens, out.lengths))):
        ends = np.flatnonzero(np.isin(whole, (1, 7, 12)))
        wanted = whole.copy()
        if len(ends):
            wanted[ends[0] + 1 :] = 3
        np.testing.assert_array_equal(text, wanted)
        assert length == (ends[0] + 1 if len(ends) else LENGTH)
    np.testing.assert_allclose(
        score(t5, *clips, out.tokens, end_ids=(1, 7, 12), pad_id=3), out.log_probs, rtol=1e-4, atol=1e-4
    )


def test_no_bigram_is_repeated(clips: tuple[Any, Any]) -> None:
    model = make(GEMMA_LANGUAGE)
    free = drawn(model, clips, temperature=0)
    out = drawn(model, clips, temperature=0, no_repeat_ngram=2)
    logits = full_pass(model, *clips, out.tokens)
    repeated = False
    for clip in range(4):
        text = np.asarray(out.tokens[clip, 0])[: out.lengths[clip, 0]].tolist()
        for i, token in enumerate(text):
            banned = [b for a, b in itertools.pairwise(text[:i]) if a == text[i - 1]]
            allowed = np.where(np.isin(np.arange(VOCABULARY), banned), -np.inf, logits[clip, 0, i])
            assert token == allowed.argmax()
        said = np.asarray(free.tokens[clip, 0])[: free.lengths[clip, 0]].tolist()
        repeated |= len(set(itertools.pairwise(said))) < len(said) - 1
    assert repeated, "without the option there is nothing to see here"


def test_scores_of_given_texts_are_the_log_probabilities_of_drawing_them(model: VLM, clips: tuple[Any, Any]) -> None:
    out = drawn(model, clips)
    tokens = np.asarray(out.tokens).copy()
    whole = (tokens[:, :, -1] != 0) | (np.asarray(out.lengths) < LENGTH)  # a drawn 0 at the end looks like padding
    got = np.asarray(score(model, *clips, tokens))
    np.testing.assert_allclose(got[whole], out.log_probs[whole], rtol=1e-4, atol=1e-4)
    tokens[np.arange(LENGTH) >= np.asarray(out.lengths)[..., None]] = 9  # after an end nothing counts
    ended = np.asarray(out.lengths) < LENGTH
    np.testing.assert_allclose(np.asarray(score(model, *clips, tokens))[ended], got[ended], rtol=1e-5)
    assert ended.any()
    assert whole.sum() > 9


# --- beam search


def test_enough_beams_find_the_best_of_all_texts(clips: tuple[Any, Any]) -> None:
    """All 361 * 20 + 19 + 1 texts of up to 3 tokens, scored one by one, against 400 beams: no text is ever cut off."""
    model, video, prompt = make(GEMMA_LANGUAGE), clips[0][:1], clips[1][:1]
    grid = np.stack(np.meshgrid(*[np.arange(VOCABULARY)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    ends = np.where((grid == 1).any(axis=1), (grid == 1).argmax(axis=1) + 1, 3)
    every = np.unique(np.where(np.arange(3) < ends[:, None], grid, 0), axis=0).astype(np.int32)
    lengths = np.where((every == 1).any(axis=1), (every == 1).argmax(axis=1) + 1, 3)
    log_probs = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(full_pass(model, video, prompt, every[None])))[0], every[..., None], axis=-1
    )[..., 0]
    total = np.where(np.arange(3) < lengths[:, None], log_probs, 0).sum(axis=1)
    best = np.argsort(-total / lengths, kind="stable")[:5]
    out = generate(model, video, prompt, num_beams=400, num_samples=5, max_length=3)
    np.testing.assert_array_equal(out.tokens[0], every[best])
    np.testing.assert_allclose(out.log_probs[0], total[best], rtol=1e-4)
    np.testing.assert_array_equal(out.lengths[0], lengths[best])


def plain_beam_search(
    model: VLM, video: Any, prompt: Any, beams: int, length: int, ends: tuple[int, ...], ngram: int
) -> list[tuple[float, list[int]]]:
    """One clip, step by step over whole texts: (mean log-probability of a token, text), the best first."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for step in range(length):
        tokens = np.zeros((1, beams, length), np.int32)
        for i, (_, text) in enumerate(live):
            tokens[0, i, :step] = text
        log_probs = np.asarray(jax.nn.log_softmax(full_pass(model, video, prompt, tokens)))[0, :, step]
        options = [
            (s + float(log_probs[i, t]), [*text, t])
            for i, (s, text) in enumerate(live)
            for t in range(VOCABULARY)
            if not ngram or (*text, t)[-ngram:] not in set(zip(*(text[k:] for k in range(ngram))))
        ]
        options = sorted(options, reverse=True)[: (1 + len(ends)) * beams]
        last = step + 1 == length
        finished += [(s / (step + 1), text) for s, text in options[:beams] if text[-1] in ends or last]
        finished = sorted(finished, reverse=True)[:beams]
        live = [(s, text) for s, text in options if text[-1] not in ends][:beams]
        if len(finished) == beams and live[0][0] / (step + 1) <= finished[-1][0]:
            break
    return finished


@pytest.mark.parametrize(("ends", "ngram"), [((1,), 0), (tuple(range(1, 20, 2)), 2)])
def test_beams_are_those_of_a_plain_search(
    model: VLM, clips: tuple[Any, Any], ends: tuple[int, ...], ngram: int
) -> None:
    options: dict[str, Any] = {"num_beams": 3, "num_samples": 3, "max_length": 8}
    out = generate(model, *clips, **options, end_ids=ends, no_repeat_ngram=ngram)
    for clip in range(4):
        one = clips[0][clip : clip + 1], clips[1][clip : clip + 1]
        wanted = plain_beam_search(model, *one, 3, 8, ends, ngram)
        for beam, (mean, text) in enumerate(wanted):
            length = int(out.lengths[clip, beam])
            assert np.asarray(out.tokens)[clip, beam].tolist() == text + [0] * (8 - len(text))
            assert length == len(text)
            np.testing.assert_allclose(out.log_probs[clip, beam] / length, mean, rtol=1e-4)


# --- shapes and memory


def test_settings_and_lengths_of_prompts_do_not_compile_again(t5: VLM, clips: tuple[Any, Any]) -> None:
    _, prompt = clips
    compiled: Any = _generate

    def programs(width: int, **settings: Any) -> int:
        prompts = np.zeros((4, width), np.int32)
        prompts[:, : min(3, width)] = prompt[:, : min(3, width)]
        generate(t5, None, prompts, max_length=5, **settings)
        return compiled._cache_size()

    before = programs(3, temperature=0.7, top_p=0.9, top_k=4, seeds=0)
    assert [programs(width, temperature=1.1, top_p=0.5, top_k=2, seeds=3) for width in (1, 3, 9, 16)] == [before] * 4
    assert programs(17, temperature=1.1, top_p=0.5, top_k=2) == before + 1
    assert [programs(width, temperature=0.9, top_p=0.1, top_k=3) for width in (18, 32)] == [before + 1] * 2
    assert [bucket(n) for n in (1, 16, 17, 48, 64, 65, 128, 129)] == [16, 16, 32, 48, 64, 128, 128, 256]


def lowered(model: VLM, *, batch: int, prompt: int, samples: int, length: int) -> Any:
    """The traced program of greedy texts after prompts without video."""
    graphdef, state = nnx.split(model)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    return _generate.trace(
        graphdef,
        state,
        None,
        jax.ShapeDtypeStruct((batch, prompt), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.uint32),
        scalar,
        scalar,
        jax.ShapeDtypeStruct((), jnp.int32),
        settings=_Settings(
            num_samples=samples,
            max_length=length,
            end_ids=(1,),
            pad_id=0,
            greedy=True,
            top_k=False,
            nucleus=False,
            num_beams=1,
            no_repeat_ngram=0,
        ),
    )


def arrays_of(jaxpr: Any) -> set[tuple[int, ...]]:
    """Shapes of everything a program computes, in its loops and branches too."""
    found = {v.aval.shape for equation in jaxpr.eqns for v in equation.outvars}
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found |= arrays_of(inner)
    return found


def test_no_array_holds_the_prefix_of_each_text(model: VLM) -> None:
    """Seven texts of each of three clips: nothing else has a factor 7, and scores are smaller than keys."""
    shapes = arrays_of(lowered(model, batch=3, prompt=64, samples=7, length=5).jaxpr.jaxpr)
    sizes = {int(np.prod(shape)) for shape in shapes}
    assert max(size for size in sizes if size % 7 == 0) < 3 * 7 * 64 * 8  # the keys of one head
    assert max(sizes) >= 3 * 64 * 16  # the walk does reach the prefix


def test_ten_texts_take_little_more_memory_than_one() -> None:
    """After 2,048 tokens: peak temporaries at most 1.15 times those of one text, and the texts' own caches."""

    def temporaries(samples: int) -> int:
        memory = (
            lowered(make(GEMMA_LANGUAGE), batch=2, prompt=2048, samples=samples, length=32)
            .lower()
            .compile()
            .memory_analysis()
        )
        assert memory is not None
        return memory.temp_size_in_bytes

    caches = 2 * 2 * 2 * 10 * 32 * 16 * 4  # keys and values, layers, clips, texts, tokens, heads * D, bytes
    assert temporaries(10) <= 1.15 * temporaries(1) + caches


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"max_length": 0}, "max_length"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e-38}, "temperature must be 0 .greedy. or at least 1e-06"),
        ({"top_p": 0.0}, r"\(0, 1\]"),
        ({"top_p": 1.1}, r"\(0, 1\]"),
        ({"top_k": 0}, "top_k"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2, "num_samples": 3}, "at most num_beams = 2"),
        ({"num_beams": 2, "top_p": 0.5}, "draws nothing"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram"),
        ({"end_ids": ()}, "end_ids"),
        ({"seeds": np.zeros(3, np.uint32)}, r"uint32\[4\]"),
        ({"prompt": np.zeros((3, 2), np.int32)}, "video's B"),
    ],
)
def test_generate_refuses(t5: VLM, clips: tuple[Any, Any], changes: dict[str, Any], words: str) -> None:
    arguments = {"video": clips[0], "prompt": clips[1], "max_length": 4, **changes}
    with pytest.raises(ValueError, match=words):
        generate(t5, **arguments)


def test_seeds_and_prompts_may_be_lists(t5: VLM, clips: tuple[Any, Any]) -> None:
    video, prompt = clips
    seeds = list(range(len(prompt)))
    wanted = generate(t5, video, prompt, max_length=4, seeds=np.array(seeds, np.uint32))
    found = generate(t5, video, np.asarray(prompt).tolist(), max_length=4, seeds=seeds)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.tokens, wanted.tokens)


def test_a_model_that_writes_no_texts_is_named(clips: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match="model must be a VLM or a T5, which write texts, not a Linear"):
        generate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), clips[0], clips[1], max_length=4)  # type: ignore[arg-type]


MESH = """
import sys, jax, numpy as np
from jax.sharding import PartitionSpec as P
from pyvdl.generate import generate
from pyvdl.models import load_pretrained
from pyvdl.sharding import make_mesh, place, put_batch
mesh = make_mesh(tensor=2)
whole = load_pretrained(sys.argv[1], dtype="float32")
split = load_pretrained(sys.argv[1], dtype="float32", place=place(mesh))
assert split.language.blocks.blocks.up[...].sharding.spec == P(None, "fsdp", "tensor")
rng = np.random.default_rng(0)
size = whole.config.vision.image_size
video = rng.integers(0, 256, (4, 2, size, size, 3), np.uint8)
batch = {"video": video, "prompt": rng.integers(4, 400, (4, 6), np.int32)}
options = {"num_samples": 3, "max_length": 6, "top_p": 0.9}
wanted = generate(whole, **batch, **options)
with jax.set_mesh(mesh):
    found = generate(split, **put_batch(batch, mesh), **options)
assert found.tokens.sharding.shard_shape(found.tokens.shape) == (2, 3, 6)
np.testing.assert_array_equal(found.tokens, wanted.tokens)
np.testing.assert_allclose(found.log_probs, wanted.log_probs, rtol=1e-4)
"""


def test_a_mesh_gives_the_same_texts() -> None:
    """Clips over one axis of the devices, matrices over the other."""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    golden = Path(__file__).parent / "parity" / "golden" / "paligemma"
    subprocess.run([sys.executable, "-c", MESH, golden], check=True, env=env)
