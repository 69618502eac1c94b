"""The same weights under the names of other projects: big_vision's npz files and OpenCLIP's safetensors. NumPy only.

Takes the state dict of a model of `transformers`, as float32 arrays.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def _linear(state: Arrays, name: str) -> Arrays:
    return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}


def _norm(state: Arrays, name: str) -> Arrays:
    return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}


def _flat(tree: dict[str, Any], prefix: str = "") -> Arrays:
    """Nested dictionaries -> one with names joined by "/"."""
    out: Arrays = {}
    for name, value in tree.items():
        out |= _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out


def _attention(state: Arrays, names: dict[str, tuple[np.ndarray, np.ndarray]], out: str, heads: int) -> dict[str, Any]:
    """`names`: weight [N * D, E] and bias [N * D] of query, key and value; `out`: the name of the output projection."""
    width = state[f"{out}.weight"].shape[0]
    inner = {
        name: {"kernel": weight.T.reshape(width, heads, -1), "bias": bias.reshape(heads, -1)}
        for name, (weight, bias) in names.items()
    }
    merge = {"kernel": state[f"{out}.weight"].T.reshape(heads, -1, width), "bias": state[f"{out}.bias"]}
    return {**inner, "out": merge}


def _mlp(state: Arrays, name: str) -> dict[str, Any]:
    return {"Dense_0": _linear(state, f"{name}.fc1"), "Dense_1": _linear(state, f"{name}.fc2")}


def _encoder(state: Arrays, name: str, norm: str, heads: int, scan: bool) -> dict[str, Any]:
    """A stack of blocks, one entry a layer or (scan) one for all with layers on axis 0."""
    depth = 1 + max(int(m[1]) for m in (re.match(rf"{re.escape(name)}\.layers\.(\d+)\.", key) for key in state) if m)
    blocks = []
    for layer in range(depth):
        here = f"{name}.layers.{layer}"
        projections = {
            long: (state[f"{here}.self_attn.{short}_proj.weight"], state[f"{here}.self_attn.{short}_proj.bias"])
            for long, short in (("query", "q"), ("key", "k"), ("value", "v"))
        }
        block = {
            "LayerNorm_0": _norm(state, f"{here}.layer_norm1"),
            "LayerNorm_1": _norm(state, f"{here}.layer_norm2"),
            "MultiHeadDotProductAttention_0": _attention(state, projections, f"{here}.self_attn.out_proj", heads),
            "MlpBlock_0": _mlp(state, f"{here}.mlp"),
        }
        blocks.append(_flat(block))
    last = {"encoder_norm": _norm(state, norm)}
    if scan:
        return {"encoderblock": {key: np.stack([block[key] for block in blocks]) for key in blocks[0]}, **last}
    return {**{f"encoderblock_{layer}": block for layer, block in enumerate(blocks)}, **last}


def _vision(state: Arrays, name: str, heads: int, scan: bool) -> dict[str, Any]:
    embeddings = f"{name}.embeddings"
    tower: dict[str, Any] = {
        "embedding": {
            "kernel": state[f"{embeddings}.patch_embedding.weight"].transpose(2, 3, 1, 0),
            "bias": state[f"{embeddings}.patch_embedding.bias"],
        },
        "pos_embedding": state[f"{embeddings}.position_embedding.weight"][None],
        "Transformer": _encoder(state, f"{name}.encoder", f"{name}.post_layernorm", heads, scan),
    }
    head = f"{name}.head"
    if f"{head}.probe" in state:
        weights = np.split(state[f"{head}.attention.in_proj_weight"], 3)
        biases = np.split(state[f"{head}.attention.in_proj_bias"], 3)
        projections = dict(zip(("query", "key", "value"), zip(weights, biases)))
        tower["MAPHead_0"] = {
            "probe": state[f"{head}.probe"],
            "MultiHeadDotProductAttention_0": _attention(state, projections, f"{head}.attention.out_proj", heads),
            "LayerNorm_0": _norm(state, f"{head}.layernorm"),
            "MlpBlock_0": _mlp(state, f"{head}.mlp"),
        }
    return tower


def big_vision_siglip(state: Arrays, *, vision_heads: int, text_heads: int, scan: bool) -> Arrays:
    text = {
        "Embed_0": {"embedding": state["text_model.embeddings.token_embedding.weight"]},
        "pos_embedding": state["text_model.embeddings.position_embedding.weight"][None],
        "Encoder_0": _encoder(state, "text_model.encoder", "text_model.final_layer_norm", text_heads, scan),
        "head": _linear(state, "text_model.head"),
    }
    tree = {
        "img": _vision(state, "vision_model", vision_heads, scan),
        "txt": text,
        "t": state["logit_scale"],
        "b": state["logit_bias"],
    }
    return _flat({"params": tree})


def big_vision_paligemma(state: Arrays, *, vision_heads: int, heads: int, kv_heads: int, vocab: int) -> Arrays:
    """`vocab`: rows of the embedding that are kept; `transformers` pads it."""
    model = "model.language_model"
    depth = 1 + max(int(m[1]) for m in (re.match(rf"{model}\.layers\.(\d+)\.", key) for key in state) if m)

    def stacked(name: str) -> np.ndarray:
        return np.stack([state[f"{model}.layers.{layer}.{name}.weight"] for layer in range(depth)])

    def heads_first(name: str, count: int) -> np.ndarray:
        """[L, N * D, E] -> [L, N, E, D]."""
        weight = stacked(name)
        return weight.reshape(depth, count, -1, weight.shape[-1]).swapaxes(2, 3)

    out = stacked("self_attn.o_proj").swapaxes(1, 2)
    layers = {
        "attn": {
            "q_einsum": {"w": heads_first("self_attn.q_proj", heads)},
            "kv_einsum": {
                "w": np.stack(
                    [heads_first("self_attn.k_proj", kv_heads), heads_first("self_attn.v_proj", kv_heads)], axis=1
                )
            },
            "attn_vec_einsum": {"w": out.reshape(depth, heads, -1, out.shape[-1])},
        },
        "mlp": {
            "gating_einsum": np.stack(
                [stacked("mlp.gate_proj").swapaxes(1, 2), stacked("mlp.up_proj").swapaxes(1, 2)], axis=1
            ),
            "linear": stacked("mlp.down_proj").swapaxes(1, 2),
        },
        "pre_attention_norm": {"scale": stacked("input_layernorm")},
    }
    if f"{model}.layers.0.pre_feedforward_layernorm.weight" in state:  # Gemma 2
        layers |= {
            "post_attention_norm": {"scale": stacked("post_attention_layernorm")},
            "pre_ffw_norm": {"scale": stacked("pre_feedforward_layernorm")},
            "post_ffw_norm": {"scale": stacked("post_feedforward_layernorm")},
        }
    else:
        layers["pre_ffw_norm"] = {"scale": stacked("post_attention_layernorm")}
    vision = _vision(state, "model.vision_tower", vision_heads, scan=True)
    tree = {
        "img": {**vision, "head": _linear(state, "model.multi_modal_projector.linear")},
        "llm": {
            "embedder": {"input_embedding": state[f"{model}.embed_tokens.weight"][:vocab]},
            "layers": layers,
            "final_norm": {"scale": state[f"{model}.norm.weight"]},
        },
    }
    return _flat({"params": tree})


def open_clip(state: Arrays) -> Arrays:
    """CLIP as OpenAI and OpenCLIP name it."""
    out = {"logit_scale": state["logit_scale"]}
    for source, target, kept in (("vision_model", "visual.", "class_embedding"), ("text_model", "", "")):
        embeddings = f"{source}.embeddings"
        out[f"{target}positional_embedding"] = state[f"{embeddings}.position_embedding.weight"]
        if kept:
            out[f"{target}{kept}"] = state[f"{embeddings}.{kept}"]
        for key in state:
            if match := re.match(rf"{source}\.encoder\.layers\.(\d+)\.layer_norm1\.weight", key):
                out |= _open_clip_block(
                    state, f"{source}.encoder.layers.{match[1]}", f"{target}transformer.resblocks.{match[1]}"
                )
    norms = {
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
        "text_model.final_layer_norm": "ln_final",
    }
    for name, target in norms.items():
        out |= {f"{target}.{leaf}": state[f"{name}.{leaf}"] for leaf in ("weight", "bias")}
    out["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    out["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    out["visual.proj"] = state["visual_projection.weight"].T
    out["text_projection"] = state["text_projection.weight"].T
    return out


def _open_clip_block(state: Arrays, name: str, target: str) -> Arrays:
    out = {}
    for leaf in ("weight", "bias"):
        parts = [state[f"{name}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
        out[f"{target}.attn.in_proj_{leaf}"] = np.concatenate(parts)
        for here, there in (
            ("self_attn.out_proj", "attn.out_proj"),
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
        ):
            out[f"{target}.{there}.{leaf}"] = state[f"{name}.{here}.{leaf}"]
    return out
