"""Settings of public checkpoints, from their config.json or from the shapes of their arrays, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from pyvdl.config import DualEncoderConfig, GemmaConfig, T5Config, TextTowerConfig, ViTConfig, VLMConfig

type Shapes = Mapping[str, tuple[int, ...]]
type Dtype = Literal["bfloat16", "float32"]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def _activation(found: Mapping[str, Any], name: str, default: str) -> Any:
    value = found.get(name, default)
    if value not in _ACTIVATIONS:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def _pixels(preprocessor: Mapping[str, Any], mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
    return {
        "pixel_mean": tuple(preprocessor.get("image_mean", mean)),
        "pixel_std": tuple(preprocessor.get("image_std", std)),
    }


# What transformers takes for what a config.json does not say.
_CLIP_VISION: dict[str, Any] = {"image_size": 224, "patch_size": 32, "hidden_size": 768, "num_hidden_layers": 12}
_CLIP_VISION |= {"num_attention_heads": 12, "intermediate_size": 3072, "layer_norm_eps": 1e-5}
_CLIP_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 512,
    "num_hidden_layers": 12,
}
_CLIP_TEXT |= {"num_attention_heads": 8, "intermediate_size": 2048, "layer_norm_eps": 1e-5, "eos_token_id": 49407}
_SIGLIP_VISION: dict[str, Any] = {"image_size": 224, "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12}
_SIGLIP_VISION |= {"num_attention_heads": 12, "intermediate_size": 3072, "layer_norm_eps": 1e-6}
_SIGLIP_TEXT: dict[str, Any] = {
    "vocab_size": 32000,
    "max_position_embeddings": 64,
    "hidden_size": 768,
    "num_hidden_layers": 12,
}
_SIGLIP_TEXT |= {"num_attention_heads": 12, "intermediate_size": 3072, "layer_norm_eps": 1e-6}
_GEMMA: dict[str, Any] = {"vocab_size": 256_000, "hidden_size": 3072, "num_hidden_layers": 28, "head_dim": 256}
_GEMMA |= {"num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 24576, "rms_norm_eps": 1e-6}
_GEMMA_2 = _GEMMA | {"hidden_size": 2304, "num_hidden_layers": 26, "intermediate_size": 9216}
_GEMMA_2 |= {"num_attention_heads": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096}
_GEMMA_2 |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def _tower(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "width": found["hidden_size"],
        "depth": found["num_hidden_layers"],
        "num_heads": found["num_attention_heads"],
        "mlp_dim": found["intermediate_size"],
        "norm_epsilon": float(found["layer_norm_eps"]),
    }


def _patches(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"image_size": found["image_size"], "patch_size": found["patch_size"]}


def _text(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"vocab_size": found["vocab_size"], "context_length": found["max_position_embeddings"], **_tower(found)}


def clip(config: Mapping[str, Any], preprocessor: Mapping[str, Any], dtype: Dtype) -> DualEncoderConfig:
    """Of transformers' CLIPConfig."""
    vision, text = (
        # What old files say a second time counts, as in transformers.
        defaults | (config.get(name) or {}) | (config.get(f"{name}_dict") or {})
        for defaults, name in ((_CLIP_VISION, "vision_config"), (_CLIP_TEXT, "text_config"))
    )
    # Old configs say 2, which no tokenizer of CLIP's gives: transformers then pools at the largest id, the last one.
    end_id = text["vocab_size"] - 1 if text["eos_token_id"] == 2 else text["eos_token_id"]
    return DualEncoderConfig(
        vision=ViTConfig(
            **_patches(vision),
            **_tower(vision),
            **_pixels(preprocessor, CLIP_MEAN, CLIP_STD),
            class_token=True,
            activation=_activation(vision, "hidden_act", "quick_gelu"),
            pre_norm=True,
            patch_bias=False,
            dtype=dtype,
        ),
        text=TextTowerConfig(
            **_text(text), activation=_activation(text, "hidden_act", "quick_gelu"), end_id=end_id, dtype=dtype
        ),
        embed_dim=config.get("projection_dim", 512),
    )


def siglip_vision(found: Mapping[str, Any], preprocessor: Mapping[str, Any], dtype: Dtype) -> ViTConfig:
    vision = _SIGLIP_VISION | dict(found)
    return ViTConfig(
        **_patches(vision),
        **_tower(vision),
        **_pixels(preprocessor, (0.5,) * 3, (0.5,) * 3),
        activation=_activation(vision, "hidden_act", "gelu_pytorch_tanh"),
        dtype=dtype,
    )


def siglip(config: Mapping[str, Any], preprocessor: Mapping[str, Any], dtype: Dtype) -> DualEncoderConfig:
    """Of transformers' SiglipConfig, which SigLIP 2 at fixed resolutions has too."""
    vision = siglip_vision(config.get("vision_config") or {}, preprocessor, dtype)
    text = _SIGLIP_TEXT | (config.get("text_config") or {})
    return DualEncoderConfig(
        vision=vision,
        text=TextTowerConfig(
            **_text(text),
            activation=_activation(text, "hidden_act", "gelu_pytorch_tanh"),
            causal=False,
            pool="last",
            dtype=dtype,
        ),
        embed_dim=text.get("projection_size") or vision.width,
        pool="map",
        vision_projection=False,
        text_projection_bias=True,
        kind="sigmoid",
    )


def paligemma(config: Mapping[str, Any], preprocessor: Mapping[str, Any], dtype: Dtype) -> VLMConfig:
    """Of transformers' PaliGemmaConfig, with a Gemma or a Gemma 2."""
    second = config["text_config"].get("model_type", "gemma") == "gemma2"
    text = (_GEMMA_2 if second else _GEMMA) | config["text_config"]
    more: dict[str, Any] = {}
    if second:
        more = {
            "post_norms": True,
            "attention_softcap": text["attn_logit_softcapping"],
            "final_softcap": text["final_logit_softcapping"],
            "window": text["sliding_window"],
            "query_scale": float(text["query_pre_attn_scalar"]) ** -0.5,
        }
    rope = text.get("rope_theta") or (text.get("rope_parameters") or {}).get("rope_theta", 10_000.0)
    return VLMConfig(
        vision=siglip_vision(config["vision_config"], preprocessor, dtype),
        language=GemmaConfig(
            vocab_size=text["vocab_size"],
            width=text["hidden_size"],
            depth=text["num_hidden_layers"],
            num_heads=text["num_attention_heads"],
            num_kv_heads=text["num_key_value_heads"],
            head_dim=text["head_dim"],
            mlp_dim=text["intermediate_size"],
            rope_theta=float(rope),
            norm_epsilon=float(text["rms_norm_eps"]),
            dtype=dtype,
            **more,
        ),
    )


def t5(config: Mapping[str, Any], dtype: Dtype) -> T5Config:
    """Of transformers' T5Config: v1.1, Flan and UL2, whose output head is their own."""
    feed_forward = config.get("feed_forward_proj", "relu")
    activations: dict[str, Any] = {"gated-gelu": "gelu_tanh", "gated-silu": "silu"}
    if feed_forward not in activations:
        raise ValueError(f"feed_forward_proj {feed_forward!r}: only {', '.join(activations)} are read, not T5 v1.0")
    # transformers 5 says by its own name what older ones said by that of the tie.
    if config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)):
        raise ValueError("tie_word_embeddings true: the logits are scaled as in T5 v1.0, which is not read")
    return T5Config(
        vocab_size=config["vocab_size"],
        width=config["d_model"],
        encoder_layers=config["num_layers"],
        decoder_layers=config.get("num_decoder_layers") or config["num_layers"],
        num_heads=config["num_heads"],
        head_dim=config["d_kv"],
        mlp_dim=config["d_ff"],
        activation=activations[feed_forward],
        num_buckets=config.get("relative_attention_num_buckets", 32),
        max_distance=config.get("relative_attention_max_distance", 128),
        norm_epsilon=float(config.get("layer_norm_epsilon", 1e-6)),
        dtype=dtype,
    )


# --- from shapes, where no config.json says more


def _require(shapes: Shapes, axes: Mapping[str, int]) -> None:
    """Raises with all that are missing or have not so many axes, of the arrays that settings are read from."""
    faults = [f"missing {name}" for name in axes if name not in shapes]
    faults += [
        f"{name} is {list(shapes[name])}, which should have {count} axes"
        for name, count in axes.items()
        if name in shapes and len(shapes[name]) != count
    ]
    if faults:
        raise ValueError("; ".join(faults))


def _count(shapes: Shapes, pattern: str) -> int:
    """Layers: one more than the largest number that `pattern` finds."""
    return 1 + max((int(found[1]) for name in shapes if (found := re.match(pattern, name))), default=-1)


def openai_clip(shapes: Shapes, settings: Mapping[str, Any], dtype: Dtype) -> DualEncoderConfig:
    """Of OpenAI's and OpenCLIP's arrays; `settings` is OpenCLIP's open_clip_config.json, {} without one."""
    mlps = [f"{tower}transformer.resblocks.0.mlp.c_fc.weight" for tower in ("visual.", "")]
    embeddings = ("visual.positional_embedding", "positional_embedding", "token_embedding.weight", "text_projection")
    _require(shapes, {"visual.conv1.weight": 4} | dict.fromkeys((*embeddings, *mlps), 2))
    width, _, patch, _ = shapes["visual.conv1.weight"]
    grid = math.isqrt(shapes["visual.positional_embedding"][0] - 1)
    vocab, text_width = shapes["token_embedding.weight"]
    model = settings.get("model_cfg", {})
    vision, text, pixels = model.get("vision_cfg", {}), model.get("text_cfg", {}), settings.get("preprocess_cfg", {})
    # Of OpenCLIP's variants of the towers these alone show in no array.
    for part, name, read in (
        (vision, "pool_type", ("tok",)),
        (vision, "final_ln_after_pool", (False,)),
        (text, "pool_type", ("argmax", "eos")),
        (text, "no_causal_mask", (False,)),
    ):
        if part.get(name, read[0]) not in read:
            raise ValueError(f"{name} {part[name]!r} in open_clip_config.json: only {read[0]!r} is read")
    # OpenAI's own have quick_gelu; OpenCLIP's only where they say so.
    activation: Any = "quick_gelu" if model.get("quick_gelu", not settings) else "gelu"
    return DualEncoderConfig(
        vision=ViTConfig(
            image_size=grid * patch,
            patch_size=patch,
            width=width,
            depth=_count(shapes, r"visual\.transformer\.resblocks\.(\d+)\."),
            num_heads=width // vision.get("head_width", 64),
            mlp_dim=shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
            **_pixels(
                {f"image_{name}": pixels[name] for name in ("mean", "std") if name in pixels}, CLIP_MEAN, CLIP_STD
            ),
            class_token=True,
            activation=activation,
            norm_epsilon=1e-5,
            pre_norm=True,
            patch_bias=False,
            dtype=dtype,
        ),
        text=TextTowerConfig(
            vocab_size=vocab,
            context_length=shapes["positional_embedding"][0],
            width=text_width,
            depth=_count(shapes, r"transformer\.resblocks\.(\d+)\."),
            num_heads=text.get("heads", text_width // 64),
            mlp_dim=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
            activation=activation,
            norm_epsilon=1e-5,
            end_id=vocab - 1,
            dtype=dtype,
        ),
        embed_dim=shapes["text_projection"][1],
    )


_FLAX_TOWERS = {"img": "img/Transformer", "txt": "txt/Encoder_0"}


def stacked_towers(shapes: Shapes) -> list[str]:
    """big_vision's towers whose layers stand on axis 0."""
    blocks = {name: f"{path}/encoderblock/" for name, path in _FLAX_TOWERS.items()}
    return [name for name, block in blocks.items() if any(found.startswith(block) for found in shapes)]


def _flax_axes(shapes: Shapes, *towers: str) -> dict[str, int]:
    """For `_require`, of towers."""
    axes = {"img/embedding/kernel": 4}
    for tower in towers:
        stacked = tower in stacked_towers(shapes)
        block = f"{_FLAX_TOWERS[tower]}/encoderblock{'' if stacked else '_0'}"
        axes |= {f"{tower}/pos_embedding": 3, f"{block}/MlpBlock_0/Dense_0/kernel": 2 + stacked}
        axes[f"{block}/MultiHeadDotProductAttention_0/query/kernel"] = 3 + stacked
    return axes


def _flax_tower(shapes: Shapes, path: str, stacked: bool) -> dict[str, Any]:
    block = f"{path}/encoderblock" if stacked else f"{path}/encoderblock_0"
    query = shapes[f"{block}/MultiHeadDotProductAttention_0/query/kernel"]
    depth = query[0] if stacked else _count(shapes, rf"{path}/encoderblock_(\d+)/")
    width, heads, _ = query[-3:]
    return {
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_dim": shapes[f"{block}/MlpBlock_0/Dense_0/kernel"][-1],
    }


def flax_vision(shapes: Shapes, dtype: Dtype) -> ViTConfig:
    """big_vision's SigLIP tower."""
    patch = shapes["img/embedding/kernel"][0]
    grid = math.isqrt(shapes["img/pos_embedding"][1])
    tower = _flax_tower(shapes, "img/Transformer", "img" in stacked_towers(shapes))
    return ViTConfig(image_size=grid * patch, patch_size=patch, **tower, dtype=dtype)


def flax_siglip(shapes: Shapes, dtype: Dtype) -> DualEncoderConfig:
    _require(shapes, _flax_axes(shapes, "img", "txt") | {"txt/Embed_0/embedding": 2, "txt/head/kernel": 2})
    vision = flax_vision(shapes, dtype)
    return DualEncoderConfig(
        vision=vision,
        text=TextTowerConfig(
            vocab_size=shapes["txt/Embed_0/embedding"][0],
            context_length=shapes["txt/pos_embedding"][1],
            **_flax_tower(shapes, "txt/Encoder_0", "txt" in stacked_towers(shapes)),
            causal=False,
            pool="last",
            dtype=dtype,
        ),
        embed_dim=shapes["txt/head/kernel"][1],
        pool="map",
        vision_projection=False,
        text_projection_bias=True,
        kind="sigmoid",
    )


def flax_paligemma(shapes: Shapes, dtype: Dtype) -> VLMConfig:
    """big_vision's PaliGemma; a Gemma 2 is one with norms behind its parts."""
    layers = {"llm/layers/attn/q_einsum/w": 4, "llm/layers/attn/kv_einsum/w": 5, "llm/layers/mlp/linear": 3}
    _require(shapes, _flax_axes(shapes, "img") | layers | {"llm/embedder/input_embedding": 2})
    depth, heads, width, head_dim = shapes["llm/layers/attn/q_einsum/w"]
    kv_heads = shapes["llm/layers/attn/kv_einsum/w"][2]
    more: dict[str, Any] = {}
    if "llm/layers/post_attention_norm/scale" in shapes:
        # The 27B scales queries by width / heads in place of the head dim (big_vision's gemma2_27b).
        scale = (width // heads) ** -0.5 if width == 4608 else head_dim**-0.5
        more = {
            "post_norms": True,
            "attention_softcap": 50.0,
            "final_softcap": 30.0,
            "window": 4096,
            "query_scale": scale,
        }
    return VLMConfig(
        vision=flax_vision(shapes, dtype),
        language=GemmaConfig(
            vocab_size=shapes["llm/embedder/input_embedding"][0],
            width=width,
            depth=depth,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            mlp_dim=shapes["llm/layers/mlp/linear"][1],
            dtype=dtype,
            **more,
        ),
    )


# --- to config.json


def _to_tower(config: ViTConfig | TextTowerConfig) -> dict[str, Any]:
    activation = {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation)
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "layer_norm_eps": config.norm_epsilon,
        "hidden_act": activation,
    }


def _to_vision(config: ViTConfig, kind: str) -> dict[str, Any]:
    return {
        "model_type": f"{kind}_vision_model",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        **_to_tower(config),
    }


def to_siglip_vision(config: ViTConfig) -> dict[str, Any]:
    return _to_vision(config, "siglip") | {"architectures": ["SiglipVisionModel"], "vision_use_head": False}


def to_dual_encoder(config: DualEncoderConfig) -> dict[str, Any]:
    kind, name = ("clip", "CLIPModel") if config.kind == "softmax" else ("siglip", "SiglipModel")
    text = config.text
    described: dict[str, Any] = {
        "model_type": kind,
        "architectures": [name],
        "vision_config": _to_vision(config.vision, kind),
        "text_config": {
            "model_type": f"{kind}_text_model",
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            **_to_tower(text),
        },
    }
    if kind == "clip":
        described["projection_dim"] = config.embed_dim
        described["text_config"]["eos_token_id"] = text.end_id
        for part in ("vision_config", "text_config"):
            described[part]["projection_dim"] = config.embed_dim
    else:
        described["text_config"]["projection_size"] = config.embed_dim
    return described


def to_paligemma(config: VLMConfig) -> dict[str, Any]:
    language = config.language
    assert isinstance(language, GemmaConfig)
    text: dict[str, Any] = {
        "model_type": "gemma2" if language.post_norms else "gemma",
        "vocab_size": language.vocab_size,
        "hidden_size": language.width,
        "num_hidden_layers": language.depth,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads,
        "head_dim": language.head_dim,
        "intermediate_size": language.mlp_dim,
        "rope_theta": language.rope_theta,
        "rms_norm_eps": language.norm_epsilon,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    if language.post_norms:
        scalar = (language.query_scale or language.head_dim**-0.5) ** -2
        if not math.isclose(scalar, round(scalar)):
            raise ValueError(f"query_scale {language.query_scale}: transformers takes 1 / sqrt(n) with n whole, only")
        text |= {
            "attn_logit_softcapping": language.attention_softcap,
            "final_logit_softcapping": language.final_softcap,
            "sliding_window": language.window,
            "query_pre_attn_scalar": round(scalar),
        }
    vision = _to_vision(config.vision, "siglip") | {"vision_use_head": False, "projection_dim": language.width}
    return {
        "model_type": "paligemma",
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "hidden_size": language.width,
        "projection_dim": language.width,
        # The first id behind the tokenizer's; where the embedding ends before it, behind the embedding: no text has it.
        "image_token_index": min(257_152, language.vocab_size),
        # Of every Gemma; without them transformers' generate does not end a text.
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "vision_config": vision,
        "text_config": text | {"num_image_tokens": config.vision.num_patches},
    }


def to_t5(config: T5Config) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.decoder_layers,
        "num_heads": config.num_heads,
        "feed_forward_proj": {"gelu_tanh": "gated-gelu", "silu": "gated-silu"}[config.activation],
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def to_preprocessor(config: ViTConfig) -> dict[str, Any]:
    size = {"height": config.image_size, "width": config.image_size}
    return {"image_mean": list(config.pixel_mean), "image_std": list(config.pixel_std), "size": size}
