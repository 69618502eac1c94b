"""Floating-point operations that the models need, by formula: two for each multiplication with a weight, scores and
values by all tokens. What is computed again for a backward pass does not count."""

from __future__ import annotations

from collections.abc import Sequence

from pyvdl.config import DualEncoderConfig, GemmaConfig, T5Config, TextTowerConfig, ViTConfig, VLMConfig

# Dense bfloat16, float32 sums, without sparsity, a second, by JAX's names of devices: the makers' data sheets.
PEAK_FLOPS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def tower_flops(config: ViTConfig | TextTowerConfig, tokens: int) -> float:
    """Of a forward pass over a sequence."""
    weights = config.depth * (4 * config.width**2 + 2 * config.width * config.mlp_dim)
    return 2.0 * tokens * weights + 4.0 * config.depth * tokens**2 * config.width


def vit_flops(config: ViTConfig) -> float:
    """Of a ViT over its frames."""
    patches = config.num_frames * config.num_patches
    return tower_flops(config, patches + config.class_token) + 2.0 * patches * 3 * config.patch_size**2 * config.width


def dual_encoder_flops(config: DualEncoderConfig, batch: int) -> float:
    """Of a forward pass of a batch, with the scores of all pairs."""
    towers = vit_flops(config.vision) + tower_flops(config.text, config.text.context_length)
    return batch * towers + 2.0 * batch**2 * config.embed_dim


def gemma_flops(config: GemmaConfig, tokens: int) -> float:
    """Of a forward pass over a prefix, without the head."""
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim * config.width
    weights = config.depth * (attention + 3 * config.width * config.mlp_dim)
    return 2.0 * tokens * weights + 4.0 * config.depth * tokens**2 * config.num_heads * config.head_dim


def t5_flops(config: T5Config, tokens: int, target: int) -> float:
    """Of a forward pass over a sequence and its target, with the head."""
    inner = config.num_heads * config.head_dim
    attention, mlp = 4 * config.width * inner, 3 * config.width * config.mlp_dim
    encoder = config.encoder_layers * (2.0 * tokens * (attention + mlp) + 4.0 * tokens**2 * inner)
    cross = 2.0 * 2 * config.width * inner * (tokens + target) + 4.0 * tokens * target * inner
    decoder = config.decoder_layers * (2.0 * target * (attention + mlp) + 4.0 * target**2 * inner + cross)
    return encoder + decoder + 2.0 * target * config.width * config.vocab_size


def vision_flops(config: VLMConfig) -> float:
    """Of the frames of one clip, with the projection of their tokens."""
    patches = config.num_frames * config.vision.num_patches
    return config.num_frames * vit_flops(config.vision) + 2.0 * patches * config.vision.width * config.language.width


def prefill_flops(config: VLMConfig, prompt: int) -> float:
    """Of one clip, with a Gemma."""
    assert isinstance(config.language, GemmaConfig)
    tokens = config.num_frames * config.vision.num_patches + prompt
    return vision_flops(config) + gemma_flops(config.language, tokens)


def vlm_flops(config: VLMConfig, prompt: int, target: int) -> float:
    """Of a forward pass of one clip with one text."""
    language, tokens = config.language, config.num_frames * config.vision.num_patches + prompt
    if isinstance(language, T5Config):
        return vision_flops(config) + t5_flops(language, tokens, target)
    head = 2.0 * target * language.width * language.vocab_size
    return vision_flops(config) + gemma_flops(language, tokens + target) + head


def caption_flops(config: VLMConfig, prompt: int, samples: int, length: int) -> float:
    """Of one clip and `samples` texts of `length` tokens over its shared prefix."""
    language, tokens = config.language, config.num_frames * config.vision.num_patches + config.soft_prompt + prompt
    if isinstance(language, T5Config):
        prefix = t5_flops(language, tokens, 0)
        return vision_flops(config) + prefix + samples * (t5_flops(language, tokens, length) - prefix)
    attention = 4.0 * language.depth * length * (tokens + length) * language.num_heads * language.head_dim
    own = gemma_flops(language, length) - 4.0 * language.depth * length**2 * language.num_heads * language.head_dim
    head = 2.0 * length * language.width * language.vocab_size
    return vision_flops(config) + gemma_flops(language, tokens) + samples * (own + attention + head)


def training_flops(
    config: VLMConfig | DualEncoderConfig, trainable: Sequence[str], batch: int, prompt: int = 0, target: int = 0
) -> float:
    """Of a training step: backward there are as many again for the inputs of products and for their weights.

    trainable: prefixes of parameters. A frozen part that stands after a trained one needs the inputs' alone, one that
    stands before all trained ones neither. prompt, target: tokens of a VLM's texts.
    """

    def moves(*parts: str) -> bool:
        return any(not prefix or prefix.split("/")[0] in parts for prefix in trainable)

    if isinstance(config, DualEncoderConfig):
        video = vit_flops(config.vision) * (3 if moves("vision", "pool", "vision_projection") else 1)
        text = tower_flops(config.text, config.text.context_length) * (3 if moves("text", "text_projection") else 1)
        return batch * (video + text) + 3 * 2.0 * batch**2 * config.embed_dim
    seen = vision_flops(config)
    heard = vlm_flops(config, config.soft_prompt + prompt, target) - seen
    sees, hears = moves("vision", "projection"), moves("language")
    through = 3 if hears else 2 if sees or moves("soft_prompt") else 1
    return batch * ((3 if sees else 1) * seen + through * heard)
