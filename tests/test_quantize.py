"""Models whose matrices are int8, beside the same models as they were."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from pyvdl.caption import model_digest
from pyvdl.checkpoint import save_model
from pyvdl.config import DualEncoderConfig, GemmaConfig, T5Config, TextTowerConfig, ViTConfig, VLMConfig
from pyvdl.generate import _generate, generate, score
from pyvdl.models import VLM, DualEncoder
from pyvdl.quantize import Int8, quantize
from pyvdl.sharding import AXES, tree_shardings
from pyvdl.text import WordTokenizer
from tests.models import random_vlm

VISION = ViTConfig(image_size=16, patch_size=8, width=64, depth=2, num_heads=4, mlp_dim=128, dtype="float32")
GEMMA = GemmaConfig(
    vocab_size=200, width=128, depth=3, num_heads=4, num_kv_heads=2, head_dim=32, mlp_dim=256, dtype="float32"
)
T5 = T5Config(
    vocab_size=200,
    width=128,
    encoder_layers=2,
    decoder_layers=2,
    num_heads=4,
    head_dim=8,  # random queries of wider heads make attention so sharp that it turns over
    mlp_dim=256,
    num_buckets=8,
    max_distance=16,
    dtype="float32",
)
PROMPT = np.array([[5, 6, 0], [7, 8, 9]], np.int32)
VIDEO = np.random.default_rng(0).integers(0, 256, (2, 2, 16, 16, 3), dtype=np.uint8)


def make(language: GemmaConfig | T5Config, dtype: str = "float32") -> VLM:
    model = random_vlm(VLMConfig(vision=VISION, language=language, num_frames=2))
    nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model)))
    return model


@pytest.fixture(scope="module", params=[GEMMA, T5], ids=["gemma", "t5"])
def pair(request: pytest.FixtureRequest) -> tuple[VLM, VLM]:
    """A model, and its like in int8."""
    small = make(request.param)
    quantize(small)
    return make(request.param), small


def held(model: nnx.Module) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


@functools.partial(jax.jit, static_argnums=0)
def _call(graphdef: Any, state: Any, *inputs: Any) -> Any:
    return nnx.merge(graphdef, state)(*inputs)


def distance(got: Any, wanted: Any) -> float:
    return float(np.sqrt(np.mean(np.square(got - wanted)) / np.mean(np.square(wanted))))


def test_matrices_are_int8_with_a_scale_for_each_output_of_each_layer(pair: tuple[VLM, VLM]) -> None:
    wide, small = (dict(nnx.to_flat_state(nnx.state(model))) for model in pair)
    assert wide.keys() == small.keys()
    kept = {path[-1] for path, value in small.items() if not isinstance(value, Int8)}
    assert kept <= {"bias", "scale", "position", "table"}
    for path, value in small.items():
        before = np.asarray(wide[path][...])
        if not isinstance(value, Int8):
            np.testing.assert_array_equal(value[...], before)
            continue
        array = value.get_raw_value()
        summed = before.ndim - (1 if path[-1] == "embedding" else 2)
        assert array.qvalue.dtype == jnp.int8
        assert array.scale.shape == tuple(1 if i == summed else n for i, n in enumerate(before.shape))
        assert value[...].dtype == before.dtype
        if path[-1] == "embedding":
            np.testing.assert_array_equal(value[jnp.asarray(PROMPT)], np.asarray(value[...])[PROMPT])
        assert (np.abs(value[...] - before) <= 0.501 * np.asarray(array.scale)).all(), path


@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.275), ("bfloat16", 0.525)])
def test_parameters_take_a_quarter_or_half(dtype: str, share: float) -> None:
    model = make(GEMMA, dtype)
    before = held(model)
    quantize(model)
    assert held(model) < share * before
    assert "int8" in repr(model)


def test_logits_are_near(pair: tuple[VLM, VLM]) -> None:
    target = np.random.default_rng(1).integers(1, 200, (2, 6), dtype=np.int32)
    wanted, got = (np.asarray(_call(*nnx.split(model), VIDEO, PROMPT, target)) for model in pair)
    assert 1e-4 < distance(got, wanted) < 0.05


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"num_beams": 4}], ids=["drawn", "beams"])
def test_texts_have_the_scores_that_the_same_model_gives_them(pair: tuple[VLM, VLM], settings: dict[str, Any]) -> None:
    _, small = pair
    compiled: Any = _generate
    out = generate(small, VIDEO, PROMPT, num_samples=3, max_length=6, **settings)
    programs = compiled._cache_size()
    np.testing.assert_allclose(score(small, VIDEO, PROMPT, out.tokens), out.log_probs, atol=1e-3)
    again = generate(small, VIDEO, PROMPT, num_samples=3, max_length=6, **settings)
    np.testing.assert_array_equal(again.tokens, out.tokens)
    assert compiled._cache_size() == programs


@pytest.mark.parametrize("pool", ["class", "mean", "map"])
def test_every_matrix_of_a_dual_encoder_is_found(pool: Literal["class", "mean", "map"]) -> None:
    vision = dataclasses.replace(VISION, class_token=pool == "class", num_frames=2, attention="divided", pre_norm=True)
    text = TextTowerConfig(vocab_size=50, width=32, depth=2, num_heads=2, mlp_dim=64)
    config = DualEncoderConfig(vision=vision, text=text, embed_dim=32, pool=pool, kind="sigmoid")

    def make() -> DualEncoder:
        model = DualEncoder(config, rngs=nnx.Rngs(0))
        quantize(model)
        return model

    parameters = dict(nnx.to_flat_state(nnx.state(nnx.eval_shape(make))))
    kept = {path[-1] for path, value in parameters.items() if not isinstance(value, Int8)}
    assert kept <= {"bias", "scale", "position", "temporal", "class_token", "probe", "logit_scale", "logit_bias"}


def test_on_a_mesh_they_are_split_as_the_matrices_were(pair: tuple[VLM, VLM]) -> None:
    mesh: Any = AbstractMesh((1, 2, 4), AXES)
    wide, small = (dict(nnx.to_flat_state(tree_shardings(nnx.state(model), mesh))) for model in pair)
    split = 0
    for path, value in small.items():
        wanted, found = wide[path].get_raw_value().spec, value.get_raw_value()
        if isinstance(value, Int8):
            assert found.qvalue.spec == wanted, path
            summed = -1 if path[-1] == "embedding" else -2
            kept = [None if i == len(wanted) + summed else axis for i, axis in enumerate(wanted)]
            assert tuple(found.scale.spec) == tuple(kept), path
            split += set(wanted) != {None}
        else:
            assert found.spec == wanted, path
    assert split > 5


def test_a_second_time_changes_nothing_and_another_model_has_another_name(pair: tuple[VLM, VLM]) -> None:
    wide, small = pair
    words = WordTokenizer.from_texts(["a b"])
    before = model_digest(small, words)
    quantize(small)
    assert model_digest(small, words) == before != model_digest(wide, words)


def test_saving_is_refused(pair: tuple[VLM, VLM], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="int8 weights cannot be saved"):
        save_model(tmp_path / "model", pair[1], pair[1].config, WordTokenizer.from_texts(["a b"]))
    assert list(tmp_path.iterdir()) == []


def test_without_qwix_the_line_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qwix", None)
    monkeypatch.delitem(sys.modules, "pyvdl.quantize")
    with pytest.raises(ImportError, match=r"pip install 'qwix>="):
        importlib.import_module("pyvdl.quantize")
