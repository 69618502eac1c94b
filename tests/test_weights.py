"""Public checkpoints in and out, without the models that wrote them: what is told, placed and kept. See test_parity."""

from __future__ import annotations

import dataclasses
import json
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
from safetensors.numpy import load_file, save_file

from pyvdl.config import DualEncoderConfig, GemmaConfig, T5Config, TextTowerConfig, ViTConfig, VLMConfig
from pyvdl.models import T5, VLM, DualEncoder, ViT, assemble, load_pretrained, save_pretrained, weight_configs
from pyvdl.models.vit import patchify, resample_patches, resample_positions

GOLDEN = Path(__file__).parent / "parity" / "golden"
VISION = ViTConfig(image_size=32, patch_size=8, width=32, depth=2, num_heads=2, mlp_dim=48, dtype="float32")
TEXT = TextTowerConfig(vocab_size=60, context_length=8, width=24, depth=3, num_heads=2, mlp_dim=40, dtype="float32")
CLIP = DualEncoderConfig(
    vision=dataclasses.replace(
        VISION,
        class_token=True,
        pre_norm=True,
        patch_bias=False,
        activation="quick_gelu",
        pixel_mean=(0.4, 0.5, 0.6),
        pixel_std=(0.2, 0.3, 0.4),
    ),
    text=dataclasses.replace(TEXT, activation="quick_gelu", norm_epsilon=1e-5, end_id=59),
    embed_dim=16,
)
SIGLIP = DualEncoderConfig(
    vision=VISION,
    text=dataclasses.replace(TEXT, causal=False, pool="last"),
    embed_dim=32,
    pool="map",
    vision_projection=False,
    text_projection_bias=True,
    kind="sigmoid",
)
LANGUAGE = T5Config(
    vocab_size=50,
    width=24,
    encoder_layers=2,
    decoder_layers=3,
    num_heads=2,
    head_dim=8,
    mlp_dim=40,
    activation="silu",
    dtype="float32",
)


def filled(kind: Any, config: Any) -> Any:
    """A model with every parameter random, so that none can be taken for another."""
    model: Any = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    nnx.update(
        model, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2 + 0.1, x.dtype), nnx.state(model))
    )
    return model


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[DualEncoder, Path]:
    model = filled(DualEncoder, CLIP)
    path = tmp_path_factory.mktemp("clip") / "model"
    save_pretrained(model, path)
    return model, path


@pytest.mark.parametrize("config", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_a_written_dual_encoder_is_read_as_it_was(config: DualEncoderConfig, tmp_path: Path) -> None:
    model = filled(DualEncoder, config)
    save_pretrained(model, tmp_path / "model")
    found = load_pretrained(tmp_path / "model", dtype="float32")
    assert isinstance(found, DualEncoder)
    assert found.config == config
    for (path, a), (_, b) in zip(nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(found)), strict=True):
        np.testing.assert_array_equal(a[...], b[...], str(path))


def test_a_written_t5_is_read_as_it_was(tmp_path: Path) -> None:
    config = dataclasses.replace(LANGUAGE, norm_epsilon=1e-3)
    model = filled(T5, config)
    save_pretrained(model, tmp_path / "model")
    found = load_pretrained(tmp_path / "model", dtype="float32")
    assert isinstance(found, T5)
    assert found.config == config
    assert {norm.epsilon for _, norm in nnx.iter_graph(found) if isinstance(norm, nnx.RMSNorm)} == {1e-3}
    jax.tree.map(np.testing.assert_array_equal, nnx.state(found), nnx.state(model))


def test_openai_names_and_settings(clip: tuple[DualEncoder, Path], tmp_path: Path) -> None:
    """OpenAI's names hold the same numbers; without settings the activation is quick_gelu."""
    arrays = load_file(clip[1] / "model.safetensors")
    renamed: dict[str, np.ndarray] = {}
    for ours, theirs in (("vision_model", "visual."), ("text_model", "")):
        for layer in range(2 if theirs else 3):
            old, new = f"{ours}.encoder.layers.{layer}", f"{theirs}transformer.resblocks.{layer}"
            for kind in ("weight", "bias"):
                fused = [arrays[f"{old}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
                renamed[f"{new}.attn.in_proj_{kind}"] = np.concatenate(fused)
                for a, b in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2")):
                    renamed[f"{new}.{b}.{kind}"] = arrays[f"{old}.{a}.{kind}"]
                for a, b in (("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):
                    renamed[f"{new}.{b}.{kind}"] = arrays[f"{old}.{a}.{kind}"]
    pairs = {
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "logit_scale": "logit_scale",
    }
    for a, b in (("visual.ln_pre", "vision_model.pre_layrnorm"), ("visual.ln_post", "vision_model.post_layernorm")):
        pairs |= {f"{a}.{kind}": f"{b}.{kind}" for kind in ("weight", "bias")}
    pairs |= {f"ln_final.{kind}": f"text_model.final_layer_norm.{kind}" for kind in ("weight", "bias")}
    renamed |= {new: arrays[old] for new, old in pairs.items()}
    renamed["visual.proj"] = np.ascontiguousarray(arrays["visual_projection.weight"].T)
    renamed["text_projection"] = np.ascontiguousarray(arrays["text_projection.weight"].T)
    renamed |= {name: np.array(8) for name in ("input_resolution", "context_length", "vocab_size")}  # in OpenAI's files
    save_file(renamed, tmp_path / "open_clip_model.safetensors")
    settings: dict[str, Any] = {
        "model_cfg": {"quick_gelu": True, "vision_cfg": {"head_width": 16}, "text_cfg": {"heads": 2}},
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    found = load_pretrained(tmp_path, dtype="float32")
    assert isinstance(found, DualEncoder)
    assert found.config == dataclasses.replace(CLIP, vision=dataclasses.replace(CLIP.vision, norm_epsilon=1e-5))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(found), nnx.state(clip[0]))
    del settings["model_cfg"]["quick_gelu"]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    assert load_pretrained(tmp_path).config.text.activation == "gelu"  # type: ignore[union-attr]
    for part, name, value in (("vision_cfg", "pool_type", "avg"), ("text_cfg", "no_causal_mask", True)):
        changed = settings["model_cfg"] | {part: settings["model_cfg"][part] | {name: value}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": changed}))
        with pytest.raises(ValueError, match=f"{name} {value!r} in open_clip_config.json"):
            load_pretrained(tmp_path)


def test_all_faults_are_told_at_once(clip: tuple[DualEncoder, Path], tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((clip[1] / name).read_bytes())
    arrays = load_file(clip[1] / "model.safetensors")
    del arrays["logit_scale"]
    arrays["text_model.final_layer_norm.bias"] = np.zeros(7, np.float32)
    arrays["adapter.weight"] = np.zeros(2, np.float32)
    arrays["text_model.embeddings.position_ids"] = np.arange(8)[None]  # a buffer of old files, no weight
    save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing logit_scale") as raised:
        load_pretrained(tmp_path)
    text = str(raised.value)
    assert "unknown adapter.weight" in text
    assert "text_model.final_layer_norm.bias is [7], not [24]" in text
    assert "position_ids" not in text


def test_arrays_that_settings_are_read_from_are_told_at_once(tmp_path: Path) -> None:
    """Where there is no config.json, or it says too little."""
    arrays = load_file(GOLDEN / "clip-openai-open-clip" / "open_clip_model.safetensors")
    for name in ("visual.conv1.weight", "text_projection"):
        del arrays[name]
    arrays["positional_embedding"] = np.zeros(3, np.float32)
    save_file(arrays, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=r"missing visual.conv1.*; missing text_projection; pos.* is \[3\], which"):
        load_pretrained(tmp_path)
    for name, lost in (("siglip", ("img/pos_embedding", "txt/head/kernel")), ("paligemma", ("llm/layers/mlp/linear",))):
        with np.load(GOLDEN / f"{name}-big-vision.npz") as file:
            kept = {key: array for key, array in file.items() if not key.endswith(lost)}
        np.savez(tmp_path / "model.npz", **kept)
        with pytest.raises(ValueError, match=rf"model\.npz: {'; '.join(f'missing {key}' for key in lost)}"):
            load_pretrained(tmp_path / "model.npz")


def test_what_config_json_leaves_out_is_what_transformers_takes() -> None:
    """Settings at their defaults are left out by several of its versions."""
    found = weight_configs.paligemma({"text_config": {"model_type": "gemma2"}, "vision_config": {}}, {}, "float32")
    language = GemmaConfig(
        vocab_size=256_000, width=2304, depth=26, num_heads=8, num_kv_heads=4, head_dim=256, mlp_dim=9216,
        post_norms=True, attention_softcap=50.0, final_softcap=30.0, window=4096, query_scale=1 / 16, dtype="float32",
    )  # fmt: skip
    assert found.language == language
    first = weight_configs.paligemma({"text_config": {"num_key_value_heads": 1}, "vision_config": {}}, {}, "float32")
    assert isinstance(first.language, GemmaConfig)
    assert (first.language.width, first.language.num_heads, first.language.num_kv_heads) == (3072, 16, 1)
    old = {
        "text_config": {"hidden_act": "quick_gelu"},
        "text_config_dict": {"hidden_act": "gelu"},
        "vision_config": None,
    }
    assert weight_configs.clip({"vision_config": None, **old}, {}, "float32").text.activation == "gelu"


def test_what_is_no_checkpoint_is_refused(clip: tuple[DualEncoder, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pickles are not read"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no such format")
    with pytest.raises(ValueError, match="download it again"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((clip[1] / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert' is not one of clip, siglip"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    save_file({"lm_head.weight": np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json: feed_forward_proj 'relu': only gated-gelu"):
        load_pretrained(tmp_path)
    for more, told in (
        ({}, "tie_word_embeddings true: the logits are scaled"),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, "the logits are scaled"),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, r"config\.json does not say 'vocab_size'"),
    ):
        described = {"model_type": "t5", "feed_forward_proj": "gated-gelu", **more}
        (tmp_path / "config.json").write_text(json.dumps(described))
        with pytest.raises(ValueError, match=told):
            load_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load_pretrained(tmp_path)
    (tmp_path / "model.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="cannot be read as npz"):
        load_pretrained(tmp_path / "model.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(2))
    with pytest.raises(ValueError, match="neither SigLIP nor PaliGemma"):
        load_pretrained(tmp_path / "other.npz")


def test_several_files(clip: tuple[DualEncoder, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvdl.models.weights._SHARD_BYTES", 20_000)
    save_pretrained(clip[0], tmp_path / "model")
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load_pretrained(tmp_path / "model")), nnx.state(clip[0]))
    (tmp_path / "model" / files[1]).unlink()
    with pytest.raises(ValueError, match=f"lacks {files[1]}"):
        load_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="is there already"):
        save_pretrained(clip[0], tmp_path / "model")


def test_a_model_over_time_is_no_model_of_transformers(tmp_path: Path) -> None:
    config = dataclasses.replace(CLIP, vision=dataclasses.replace(CLIP.vision, num_frames=2))
    with pytest.raises(ValueError, match="2 frames at once"):
        save_pretrained(filled(DualEncoder, config), tmp_path / "model")
    assert not list(tmp_path.iterdir())


GEMMA = GemmaConfig(vocab_size=50, width=16, depth=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32)


@pytest.mark.parametrize(
    ("config", "lost"),
    [
        (
            dataclasses.replace(CLIP, text=dataclasses.replace(CLIP.text, causal=False)),
            "CLIPModel .* text.causal False",
        ),
        (dataclasses.replace(CLIP, text_projection_bias=True), "CLIPModel .* text_projection_bias True"),
        (dataclasses.replace(CLIP, vision_projection=False, embed_dim=32), "CLIPModel .* vision_projection False"),
        (dataclasses.replace(CLIP, vision=dataclasses.replace(CLIP.vision, pre_norm=False)), "vision.pre_norm False"),
        (dataclasses.replace(SIGLIP, text=TEXT), "SiglipModel .* text.causal True, text.pool end"),
        (dataclasses.replace(SIGLIP, text_projection_bias=False), "SiglipModel .* text_projection_bias False"),
        (VLMConfig(vision=CLIP.vision, language=GEMMA), "PaliGemma.* vision.class_token True"),
        (VLMConfig(vision=VISION, language=dataclasses.replace(GEMMA, window=5)), "PaliGemma.* language.window 5"),
        (VLMConfig(vision=VISION, language=dataclasses.replace(GEMMA, query_scale=0.5)), "language.query_scale 0.5"),
        (VLMConfig(vision=VISION, language=GEMMA, soft_prompt=3), "soft_prompt 3"),
        (VLMConfig(vision=VISION, language=LANGUAGE), "export its parts"),
        (CLIP.vision, "SiglipVisionModel .* class_token True"),
    ],
)
def test_what_transformers_would_run_otherwise_is_not_written(config: Any, lost: str, tmp_path: Path) -> None:
    kinds = {DualEncoderConfig: DualEncoder, VLMConfig: VLM, ViTConfig: ViT}
    with pytest.raises(ValueError, match=lost):
        save_pretrained(filled(kinds[type(config)], config), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_the_parts_of_a_vlm_with_a_t5_are_written(tmp_path: Path) -> None:
    """Its tower has the names and numbers of the tower in SigLIP's files; see tests/parity/check_exports.py too."""
    siglip = filled(DualEncoder, SIGLIP)
    model = assemble(siglip.vision, filled(T5, LANGUAGE), rngs=nnx.Rngs(1))
    assert isinstance(model.language, T5)
    save_pretrained(siglip, tmp_path / "siglip")
    save_pretrained(model.vision, tmp_path / "tower")
    save_pretrained(model.language, tmp_path / "t5")
    whole, tower = (load_file(tmp_path / name / "model.safetensors") for name in ("siglip", "tower"))
    wanted = {name for name in whole if name.startswith("vision_model.") and ".head." not in name}
    assert set(tower) == wanted
    for name in wanted:
        np.testing.assert_array_equal(tower[name], whole[name])
    settings = json.loads((tmp_path / "tower" / "config.json").read_text())
    described = json.loads((tmp_path / "siglip" / "config.json").read_text())["vision_config"]
    assert settings == described | {"architectures": ["SiglipVisionModel"], "vision_use_head": False}
    assert isinstance(load_pretrained(tmp_path / "t5"), T5)


def test_parameters_in_bfloat16(clip: tuple[DualEncoder, Path]) -> None:
    found = load_pretrained(clip[1], param_dtype="bfloat16")
    assert found.config.vision.dtype == "bfloat16"  # type: ignore[union-attr]
    assert {x.dtype for x in jax.tree.leaves(nnx.state(found))} == {jnp.dtype("bfloat16")}
    video = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 1, 32, 32, 3), np.uint8))
    assert isinstance(found, DualEncoder)
    cosine = jnp.sum(found.encode_video(video) * clip[0].encode_video(video), axis=-1)
    assert float(cosine.min()) > 0.99


def test_another_resolution(clip: tuple[DualEncoder, Path]) -> None:
    """Patches and positions are resampled; an even picture keeps the embedding of its patches."""
    found = load_pretrained(clip[1], dtype="float32", image_size=72, patch_size=12)
    assert isinstance(found, DualEncoder)
    assert found.vision.position.shape == (36, 32)
    grey = np.full((1, 72, 72, 3), 77, np.uint8)
    small = clip[0].vision.patch(jnp.asarray(grey[:, :32, :32]))[0, 0]
    np.testing.assert_allclose(found.vision.patch(jnp.asarray(grey))[0, 0], small, rtol=1e-4, atol=1e-5)


def test_resampling() -> None:
    rng = np.random.default_rng(0)
    positions = rng.normal(size=(16, 3)).astype(np.float32)
    assert resample_positions(positions, 16) is positions
    np.testing.assert_allclose(resample_positions(np.ones((16, 3), np.float32), 49), 1, rtol=1e-6)
    # PyTorch's weights of four rows at a quarter between the middle two.
    of_row = np.repeat(np.eye(8, dtype=np.float32), 8, axis=0)
    found = resample_positions(of_row, 256).reshape(16, 16, 8)[5, 7]
    np.testing.assert_allclose(found, [0, -0.10546875, 0.87890625, 0.26171875, -0.03515625, 0, 0, 0], atol=1e-6)
    with pytest.raises(ValueError, match="squares"):
        resample_positions(positions, 20)
    # A patch that is enlarged bilinearly gets the embedding of the small one.
    kernel = rng.normal(size=(3 * 36, 5)).astype(np.float32)
    patch = rng.normal(size=(6, 6, 3)).astype(np.float32)
    large = jax.image.resize(jnp.asarray(patch), (9, 9, 3), "linear")
    embedded = patchify(large[None], 9)[0] @ resample_patches(kernel, 9)
    np.testing.assert_allclose(embedded, patchify(jnp.asarray(patch)[None], 6)[0] @ kernel, rtol=1e-3, atol=1e-4)


MESH = """
import sys, jax, numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from pyvdl.models import load_pretrained
from pyvdl.sharding import make_mesh, place, put_batch
mesh = make_mesh(tensor=2)
whole = load_pretrained(sys.argv[1], dtype="float32")
split = load_pretrained(sys.argv[1], dtype="float32", place=place(mesh))
kernel = split.vision.blocks.blocks.mlp.up.kernel[...]
assert kernel.sharding.spec == P(None, "fsdp", "tensor"), kernel.sharding
assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 32, 24)}
jax.tree.map(np.testing.assert_array_equal, nnx.state(split), nnx.state(whole))
video = np.random.default_rng(0).integers(0, 256, (4, 1, 32, 32, 3), np.uint8)
encode = nnx.jit(lambda model, video: model.encode_video(video))
with jax.set_mesh(mesh):
    found = encode(split, put_batch({"video": video}, mesh)["video"])
np.testing.assert_allclose(found, encode(whole, video), atol=1e-5)
"""


def test_parameters_on_a_mesh(clip: tuple[DualEncoder, Path]) -> None:
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", MESH, clip[1]], check=True, env=env)


MEMORY = """
import sys, threading, time, jax
from flax import nnx
from pyvdl.models import load_pretrained
def now():
    # Of its own: pages of the mapped files are the system's, which takes them back when it wants to.
    (line,) = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10
def watch():
    while not done.wait(0.001):
        seen.append(now())
load_pretrained(sys.argv[1])  # libraries, and the programs of the small model
before, seen, done = now(), [], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
model = load_pretrained(sys.argv[2], dtype="float32")
jax.block_until_ready(nnx.state(model))
done.set()
watcher.join()
stay = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
print(max(seen) - before, stay)
"""


def test_memory_of_loading(tmp_path: Path) -> None:
    """At most 1.3 times the largest tensor beside the model itself."""
    large = dataclasses.replace(LANGUAGE, vocab_size=40_000, width=512, num_heads=8, head_dim=64, mlp_dim=2048)
    for name, config in (("small", LANGUAGE), ("large", large)):
        save_pretrained(filled(T5, config), tmp_path / name)
    paths = [str(tmp_path / name) for name in ("small", "large")]
    done = subprocess.run([sys.executable, "-c", MEMORY, *paths], check=True, capture_output=True, text=True)
    grown, stay = map(int, done.stdout.split())
    largest = 40_000 * 512 * 4
    assert stay > 2.5 * largest
    assert 0.9 * stay < grown < stay + 1.3 * largest, (grown / 2**20, stay / 2**20)
