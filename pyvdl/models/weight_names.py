"""What the parameters of public checkpoints are called, and how they become pyvdl's.

A rule names some of our parameters and some of theirs, with a function each way. "{}" in a name stands for the layer:
ours hold all layers on axis 0, theirs one each. Our names are paths in a model's state, joined by dots.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyvdl.config import DualEncoderConfig, GemmaConfig, T5Config, ViTConfig, VLMConfig

type Arrays = tuple[np.ndarray, ...]
type Convert = Callable[[np.ndarray], np.ndarray]


class Rule(NamedTuple):
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    join: Callable[..., Arrays]  # theirs, of one layer, to ours
    split: Callable[..., Arrays]  # and back
    depth: int = 0  # layers; 0 where there are none
    stacked: bool = False  # theirs hold all layers on axis 0 too


class Codec(NamedTuple):
    """One of their arrays to a piece of ours, and back."""

    read: Convert
    write: Convert


SAME = Codec(lambda x: x, lambda x: x)
LINEAR = Codec(lambda x: x.T, lambda x: x.T)  # PyTorch's [out, in]
SCALAR = Codec(lambda x: x.reshape(()), lambda x: x)
LIST = Codec(SCALAR.read, lambda x: x.reshape(1))  # a number in a list of one
ROW = Codec(lambda x: x[0], lambda x: x[None])
ROWS = Codec(lambda x: x[0, 0], lambda x: x[None, None])


def _conv(patch: int) -> Codec:
    """[E, 3, p, p] -> [p * p * 3, E]."""
    return Codec(
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
        lambda x: x.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1),
    )


def _flax_conv(patch: int) -> Codec:
    """[p, p, 3, E] -> [p * p * 3, E]."""
    return Codec(lambda x: x.reshape(-1, x.shape[-1]), lambda x: x.reshape(patch, patch, 3, -1))


def _heads(dim: int) -> Codec:
    """Heads apart: [E, N, D] -> [E, N * D], or [N, D] -> [N * D]."""
    return Codec(lambda x: x.reshape(*x.shape[:-2], -1), lambda x: x.reshape(*x.shape[:-1], -1, dim))


def _heads_first(dim: int) -> Codec:
    """[N, D, E] -> [N * D, E]."""
    return Codec(lambda x: x.reshape(-1, x.shape[-1]), lambda x: x.reshape(-1, dim, x.shape[-1]))


def _gemma_heads(dim: int) -> Codec:
    """[N, E, D] -> [E, N * D]."""
    return Codec(
        lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1), lambda x: x.reshape(len(x), -1, dim).swapaxes(0, 1)
    )


def rule(
    ours: str,
    *theirs: str,
    codec: Codec = SAME,
    parts: Sequence[int] | None = None,
    depth: int = 0,
    stacked: bool = False,
) -> Rule:
    """Pieces side by side on the last axis; `parts` are their sizes there where they are not alike."""

    def join(*pieces: np.ndarray) -> Arrays:
        read = [codec.read(piece) for piece in pieces]
        return (read[0] if len(read) == 1 else np.concatenate(read, axis=-1),)

    def split(x: np.ndarray) -> Arrays:
        if len(theirs) == 1:
            return (codec.write(x),)
        ends = list(itertools.accumulate(parts[:-1])) if parts else len(theirs)
        return tuple(codec.write(piece) for piece in np.split(x, ends, axis=-1))

    return Rule((ours,), theirs, join, split, depth, stacked)


def _norm(ours: str, theirs: str, depth: int = 0, scale: str = "weight", **more: Any) -> Iterator[Rule]:
    yield rule(f"{ours}.scale", f"{theirs}.{scale}", depth=depth, **more)
    yield rule(f"{ours}.bias", f"{theirs}.bias", depth=depth, **more)


def _torch_linear(ours: str, *theirs: str, depth: int = 0) -> Iterator[Rule]:
    yield rule(f"{ours}.kernel", *(f"{name}.weight" for name in theirs), codec=LINEAR, depth=depth)
    yield rule(f"{ours}.bias", *(f"{name}.bias" for name in theirs), depth=depth)


def _class_and_positions(theirs_class: str, theirs_positions: str) -> Rule:
    """CLIP gives its class token a place, first: one sum of two vectors that are both learned. Back, the place is 0."""

    def join(token: np.ndarray, positions: np.ndarray) -> Arrays:
        # Not in half precision, which a file may have: the sum is no number of the file's.
        return token.astype(np.float32) + positions[0].astype(np.float32), positions[1:]

    def split(token: np.ndarray, positions: np.ndarray) -> Arrays:
        return token, np.concatenate([np.zeros_like(positions[:1]), positions])

    return Rule(("vision.class_token", "vision.position"), (theirs_class, theirs_positions), join, split)


# --- transformers: CLIP and SigLIP


def _hf_blocks(ours: str, theirs: str, depth: int) -> Iterator[Rule]:
    ours, theirs = f"{ours}blocks.blocks", f"{theirs}.encoder.layers.{{}}"
    projections = (f"{theirs}.self_attn.{name}_proj" for name in "qkv")
    yield from _torch_linear(f"{ours}.mixer.qkv", *projections, depth=depth)
    yield from _torch_linear(f"{ours}.mixer.out", f"{theirs}.self_attn.out_proj", depth=depth)
    yield from _norm(f"{ours}.mixer.norm", f"{theirs}.layer_norm1", depth)
    yield from _norm(f"{ours}.norm", f"{theirs}.layer_norm2", depth)
    yield from _torch_linear(f"{ours}.mlp.up", f"{theirs}.mlp.fc1", depth=depth)
    yield from _torch_linear(f"{ours}.mlp.down", f"{theirs}.mlp.fc2", depth=depth)


def hf_siglip_tower(config: ViTConfig, theirs: str, ours: str = "vision.") -> Iterator[Rule]:
    embeddings = f"{theirs}.embeddings"
    yield rule(f"{ours}patch.kernel", f"{embeddings}.patch_embedding.weight", codec=_conv(config.patch_size))
    yield rule(f"{ours}patch.bias", f"{embeddings}.patch_embedding.bias")
    yield rule(f"{ours}position", f"{embeddings}.position_embedding.weight")
    yield from _hf_blocks(ours, theirs, config.depth)
    yield from _norm(f"{ours}norm", f"{theirs}.post_layernorm")


def hf_clip(config: DualEncoderConfig) -> Iterator[Rule]:
    vision, text = "vision_model", "text_model"
    patch = _conv(config.vision.patch_size)
    yield rule("vision.patch.kernel", f"{vision}.embeddings.patch_embedding.weight", codec=patch)
    yield _class_and_positions(f"{vision}.embeddings.class_embedding", f"{vision}.embeddings.position_embedding.weight")
    yield from _norm("vision.pre_norm", f"{vision}.pre_layrnorm")
    yield from _hf_blocks("vision.", vision, config.vision.depth)
    yield from _norm("vision.norm", f"{vision}.post_layernorm")
    yield rule("text.embedding", f"{text}.embeddings.token_embedding.weight")
    yield rule("text.position", f"{text}.embeddings.position_embedding.weight")
    yield from _hf_blocks("text.", text, config.text.depth)
    yield from _norm("text.norm", f"{text}.final_layer_norm")
    yield rule("vision_projection.kernel", "visual_projection.weight", codec=LINEAR)
    yield rule("text_projection.kernel", "text_projection.weight", codec=LINEAR)
    yield rule("logit_scale", "logit_scale", codec=SCALAR)


def hf_siglip(config: DualEncoderConfig) -> Iterator[Rule]:
    yield from hf_siglip_tower(config.vision, "vision_model")
    head, text = "vision_model.head", "text_model"
    yield rule("pool.probe", f"{head}.probe", codec=ROWS)
    width = config.vision.width
    # PyTorch fuses all three; here the query stands apart, since it is one.
    for ours, theirs, axis in (("kernel", "in_proj_weight", 1), ("bias", "in_proj_bias", 0)):

        def join(x: np.ndarray) -> Arrays:
            return x[:width].T, x[width:].T

        def split(query: np.ndarray, rest: np.ndarray, axis: int = axis) -> Arrays:
            return (np.concatenate([query, rest], axis=axis).T,)

        names = (f"pool.query.{ours}", f"pool.key_value.{ours}")
        yield Rule(names, (f"{head}.attention.{theirs}",), join, split)
    yield from _torch_linear("pool.out", f"{head}.attention.out_proj")
    yield from _norm("pool.norm", f"{head}.layernorm")
    yield from _torch_linear("pool.mlp.up", f"{head}.mlp.fc1")
    yield from _torch_linear("pool.mlp.down", f"{head}.mlp.fc2")
    yield rule("text.embedding", f"{text}.embeddings.token_embedding.weight")
    yield rule("text.position", f"{text}.embeddings.position_embedding.weight")
    yield from _hf_blocks("text.", text, config.text.depth)
    yield from _norm("text.norm", f"{text}.final_layer_norm")
    yield from _torch_linear("text_projection", f"{text}.head")
    yield rule("logit_scale", "logit_scale", codec=LIST)
    yield rule("logit_bias", "logit_bias", codec=LIST)


# --- OpenAI's CLIP and OpenCLIP


def _openai_blocks(ours: str, theirs: str, depth: int) -> Iterator[Rule]:
    ours, theirs = f"{ours}.blocks.blocks", f"{theirs}.resblocks.{{}}"
    yield rule(f"{ours}.mixer.qkv.kernel", f"{theirs}.attn.in_proj_weight", codec=LINEAR, depth=depth)
    yield rule(f"{ours}.mixer.qkv.bias", f"{theirs}.attn.in_proj_bias", depth=depth)
    yield from _torch_linear(f"{ours}.mixer.out", f"{theirs}.attn.out_proj", depth=depth)
    yield from _norm(f"{ours}.mixer.norm", f"{theirs}.ln_1", depth)
    yield from _norm(f"{ours}.norm", f"{theirs}.ln_2", depth)
    yield from _torch_linear(f"{ours}.mlp.up", f"{theirs}.mlp.c_fc", depth=depth)
    yield from _torch_linear(f"{ours}.mlp.down", f"{theirs}.mlp.c_proj", depth=depth)


def openai_clip(config: DualEncoderConfig) -> Iterator[Rule]:
    yield rule("vision.patch.kernel", "visual.conv1.weight", codec=_conv(config.vision.patch_size))
    yield _class_and_positions("visual.class_embedding", "visual.positional_embedding")
    yield from _norm("vision.pre_norm", "visual.ln_pre")
    yield from _openai_blocks("vision", "visual.transformer", config.vision.depth)
    yield from _norm("vision.norm", "visual.ln_post")
    yield rule("text.embedding", "token_embedding.weight")
    yield rule("text.position", "positional_embedding")
    yield from _openai_blocks("text", "transformer", config.text.depth)
    yield from _norm("text.norm", "ln_final")
    yield rule("vision_projection.kernel", "visual.proj")
    yield rule("text_projection.kernel", "text_projection")
    yield rule("logit_scale", "logit_scale", codec=SCALAR)


# --- big_vision: SigLIP and PaliGemma


def _flax_linear(ours: str, theirs: str, **more: Any) -> Iterator[Rule]:
    yield rule(f"{ours}.kernel", f"{theirs}/kernel", **more)
    yield rule(f"{ours}.bias", f"{theirs}/bias", **more)


def _flax_norm(ours: str, theirs: str, **more: Any) -> Iterator[Rule]:
    yield rule(f"{ours}.scale", f"{theirs}/scale", **more)
    yield rule(f"{ours}.bias", f"{theirs}/bias", **more)


def _flax_attention(qkv: Sequence[tuple[str, str]], out: str, theirs: str, dim: int, **more: Any) -> Iterator[Rule]:
    """qkv: our names, and the initials of theirs that stand side by side in them."""
    for ours, initials in qkv:
        names = [f"{theirs}/{ {'q': 'query', 'k': 'key', 'v': 'value'}[initial] }" for initial in initials]
        for part in ("kernel", "bias"):
            yield rule(f"{ours}.{part}", *(f"{name}/{part}" for name in names), codec=_heads(dim), **more)
    yield rule(f"{out}.kernel", f"{theirs}/out/kernel", codec=_heads_first(dim), **more)
    yield rule(f"{out}.bias", f"{theirs}/out/bias", **more)


def _flax_blocks(ours: str, theirs: str, depth: int, dim: int, stacked: bool) -> Iterator[Rule]:
    ours, theirs = f"{ours}.blocks.blocks", f"{theirs}/encoderblock" + ("" if stacked else "_{}")
    attention, mlp = f"{theirs}/MultiHeadDotProductAttention_0", f"{theirs}/MlpBlock_0"
    more: dict[str, Any] = {"depth": depth, "stacked": stacked}
    yield from _flax_norm(f"{ours}.mixer.norm", f"{theirs}/LayerNorm_0", **more)
    yield from _flax_attention([(f"{ours}.mixer.qkv", "qkv")], f"{ours}.mixer.out", attention, dim, **more)
    yield from _flax_norm(f"{ours}.norm", f"{theirs}/LayerNorm_1", **more)
    yield from _flax_linear(f"{ours}.mlp.up", f"{mlp}/Dense_0", **more)
    yield from _flax_linear(f"{ours}.mlp.down", f"{mlp}/Dense_1", **more)


def _flax_tower(config: ViTConfig, stacked: bool) -> Iterator[Rule]:
    yield rule("vision.patch.kernel", "img/embedding/kernel", codec=_flax_conv(config.patch_size))
    yield rule("vision.patch.bias", "img/embedding/bias")
    yield rule("vision.position", "img/pos_embedding", codec=ROW)
    yield from _flax_blocks("vision", "img/Transformer", config.depth, config.head_dim, stacked)
    yield from _flax_norm("vision.norm", "img/Transformer/encoder_norm")


def flax_siglip(config: DualEncoderConfig, stacked: Sequence[str]) -> Iterator[Rule]:
    """stacked: of "img" and "txt", those whose layers stand on axis 0."""
    yield from _flax_tower(config.vision, "img" in stacked)
    head = "img/MAPHead_0"
    yield rule("pool.probe", f"{head}/probe", codec=ROWS)
    attention = f"{head}/MultiHeadDotProductAttention_0"
    names = [("pool.query", "q"), ("pool.key_value", "kv")]
    yield from _flax_attention(names, "pool.out", attention, config.vision.head_dim)
    yield from _flax_norm("pool.norm", f"{head}/LayerNorm_0")
    yield from _flax_linear("pool.mlp.up", f"{head}/MlpBlock_0/Dense_0")
    yield from _flax_linear("pool.mlp.down", f"{head}/MlpBlock_0/Dense_1")
    text = config.text
    yield rule("text.embedding", "txt/Embed_0/embedding")
    yield rule("text.position", "txt/pos_embedding", codec=ROW)
    yield from _flax_blocks("text", "txt/Encoder_0", text.depth, text.width // text.num_heads, "txt" in stacked)
    yield from _flax_norm("text.norm", "txt/Encoder_0/encoder_norm")
    yield from _flax_linear("text_projection", "txt/head")
    yield rule("logit_scale", "t", codec=LIST)
    yield rule("logit_bias", "b", codec=LIST)


def flax_paligemma(config: VLMConfig, stacked: Sequence[str]) -> Iterator[Rule]:
    language = config.language
    assert isinstance(language, GemmaConfig)
    yield from _flax_tower(config.vision, "img" in stacked)
    yield from _flax_linear("projection", "img/head")
    layers, ours = "llm/layers", "language.blocks.blocks"
    more: dict[str, Any] = {"depth": language.depth, "stacked": True}
    yield rule("language.embedding", "llm/embedder/input_embedding")
    yield rule("language.norm.scale", "llm/final_norm/scale")
    norms = {"norm_attention": "pre_attention_norm", "norm_mlp": "pre_ffw_norm"}
    if language.post_norms:
        norms |= {"post_attention": "post_attention_norm", "post_mlp": "post_ffw_norm"}
    for mine, their in norms.items():
        yield rule(f"{ours}.{mine}.scale", f"{layers}/{their}/scale", **more)
    yield _flax_gemma_qkv(f"{ours}.qkv", layers, language)
    out = _heads_first(language.head_dim)
    yield rule(f"{ours}.out", f"{layers}/attn/attn_vec_einsum/w", codec=out, **more)

    def join(gating: np.ndarray) -> Arrays:
        return (np.concatenate(list(gating), axis=-1),)

    def split(x: np.ndarray) -> Arrays:
        return (np.stack(np.split(x, 2, axis=-1)),)

    yield Rule((f"{ours}.up",), (f"{layers}/mlp/gating_einsum",), join, split, language.depth, True)
    yield rule(f"{ours}.down", f"{layers}/mlp/linear", **more)


def _flax_gemma_qkv(ours: str, layers: str, language: GemmaConfig) -> Rule:
    codec, dim = _gemma_heads(language.head_dim), language.head_dim

    def join(query: np.ndarray, key_value: np.ndarray) -> Arrays:
        return (np.concatenate([codec.read(x) for x in (query, *key_value)], axis=-1),)

    def split(x: np.ndarray) -> Arrays:
        ends = [language.num_heads * dim, (language.num_heads + language.num_kv_heads) * dim]
        query, key, value = (codec.write(piece) for piece in np.split(x, ends, axis=-1))
        return query, np.stack([key, value])

    names = (f"{layers}/attn/q_einsum/w", f"{layers}/attn/kv_einsum/w")
    return Rule((ours,), names, join, split, language.depth, True)


# --- transformers: PaliGemma and T5


def hf_paligemma(config: VLMConfig) -> Iterator[Rule]:
    language = config.language
    assert isinstance(language, GemmaConfig)
    yield from hf_siglip_tower(config.vision, "vision_tower.vision_model")
    yield from _torch_linear("projection", "multi_modal_projector.linear")
    theirs, ours, depth = "language_model.model.layers.{}", "language.blocks.blocks", language.depth
    yield rule("language.embedding", "language_model.model.embed_tokens.weight")
    yield rule("language.norm.scale", "language_model.model.norm.weight")
    norms = {"norm_attention": "input_layernorm", "norm_mlp": "post_attention_layernorm"}
    if language.post_norms:
        norms |= {"post_attention": "post_attention_layernorm", "norm_mlp": "pre_feedforward_layernorm"}
        norms |= {"post_mlp": "post_feedforward_layernorm"}
    for mine, their in norms.items():
        yield rule(f"{ours}.{mine}.scale", f"{theirs}.{their}.weight", depth=depth)
    linear = functools.partial(rule, codec=LINEAR, depth=depth)
    widths = [n * language.head_dim for n in (language.num_heads, language.num_kv_heads, language.num_kv_heads)]
    projections = (f"{theirs}.self_attn.{name}_proj.weight" for name in "qkv")
    yield linear(f"{ours}.qkv", *projections, parts=widths)
    yield linear(f"{ours}.out", f"{theirs}.self_attn.o_proj.weight")
    yield linear(f"{ours}.up", f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight")
    yield linear(f"{ours}.down", f"{theirs}.mlp.down_proj.weight")


def hf_t5(config: T5Config) -> Iterator[Rule]:
    yield rule("embedding", "shared.weight")
    yield rule("head", "lm_head.weight", codec=LINEAR)
    for side, depth in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        layer, block = f"{side}.block.{{}}.layer", f"{side}.blocks"
        linear = functools.partial(rule, codec=LINEAR, depth=depth)
        mine = f"{layer}.0.SelfAttention"
        yield rule(f"{side}_bias.table", f"{mine.format(0)}.relative_attention_bias.weight")
        yield rule(f"{side}_norm.scale", f"{side}.final_layer_norm.weight")
        yield linear(f"{block}.attention.qkv", *(f"{mine}.{name}.weight" for name in "qkv"))
        yield linear(f"{block}.attention.out", f"{mine}.o.weight")
        yield rule(f"{block}.attention.norm.scale", f"{layer}.0.layer_norm.weight", depth=depth)
        last = 1
        if side == "decoder":
            last, cross = 2, f"{layer}.1.EncDecAttention"
            yield linear(f"{block}.cross.query", f"{cross}.q.weight")
            yield linear(f"{block}.cross.key_value", f"{cross}.k.weight", f"{cross}.v.weight")
            yield linear(f"{block}.cross.out", f"{cross}.o.weight")
            yield rule(f"{block}.cross.norm.scale", f"{layer}.1.layer_norm.weight", depth=depth)
        mlp = f"{layer}.{last}.DenseReluDense"
        yield linear(f"{block}.mlp.up", f"{mlp}.wi_0.weight", f"{mlp}.wi_1.weight")
        yield linear(f"{block}.mlp.down", f"{mlp}.wo.weight")
        yield rule(f"{block}.mlp.norm.scale", f"{layer}.{last}.layer_norm.weight", depth=depth)
