"""Operations by formula: parts add up to wholes."""

from __future__ import annotations

import dataclasses

import pytest

from pyvdl.config import DualEncoderConfig, GemmaConfig, T5Config, TextTowerConfig, ViTConfig, VLMConfig
from pyvdl.flops import (
    caption_flops,
    dual_encoder_flops,
    prefill_flops,
    training_flops,
    vision_flops,
    vit_flops,
    vlm_flops,
)

VISION = ViTConfig(image_size=28, width=8, depth=2, num_heads=2, mlp_dim=16)
T5_MODEL = VLMConfig(vision=VISION, language=T5Config(vocab_size=32, width=8, num_heads=2, head_dim=4, mlp_dim=16))
GEMMA_MODEL = VLMConfig(vision=VISION, language=GemmaConfig(vocab_size=32, width=8, depth=2, head_dim=4, mlp_dim=16))


def test_one_caption_costs_a_forward_pass_of_an_encoder_decoder() -> None:
    assert caption_flops(T5_MODEL, 16, 1, 5) == pytest.approx(vlm_flops(T5_MODEL, 16, 5))


@pytest.mark.parametrize("config", [T5_MODEL, GEMMA_MODEL])
def test_captions_share_their_prefix(config: VLMConfig) -> None:
    one, two, three = (caption_flops(config, 16, samples, 5) for samples in (1, 2, 3))
    assert three - two == pytest.approx(two - one)
    assert two - one < one - vision_flops(config)


def test_a_token_of_a_decoder_sees_the_prefix() -> None:
    language = GEMMA_MODEL.language
    assert isinstance(language, GemmaConfig)
    tokens, inner = 8 * 4 + 16, language.num_heads * language.head_dim
    projections = (2 * language.num_heads + 2 * language.num_kv_heads) * language.head_dim * language.width
    token = 2 * language.depth * (projections + 3 * language.width * language.mlp_dim)
    token += 4 * language.depth * (tokens + 1) * inner + 2 * language.width * language.vocab_size
    assert caption_flops(GEMMA_MODEL, 16, 1, 1) == pytest.approx(prefill_flops(GEMMA_MODEL, 16) + token)
    soft = dataclasses.replace(GEMMA_MODEL, soft_prompt=4)
    assert caption_flops(soft, 12, 2, 3) == pytest.approx(caption_flops(GEMMA_MODEL, 16, 2, 3))


def test_a_step_costs_what_the_trained_parts_need() -> None:
    def step(config: VLMConfig, *trainable: str) -> float:
        return training_flops(config, trainable, 3, 16, 5)

    seen = vision_flops(T5_MODEL)
    heard = vlm_flops(T5_MODEL, 16, 5) - seen
    assert step(T5_MODEL, "") == pytest.approx(3 * 3 * (seen + heard))
    assert step(T5_MODEL, "vision", "projection") == pytest.approx(3 * (3 * seen + 2 * heard))
    assert step(T5_MODEL, "language/decoder") == pytest.approx(3 * (seen + 3 * heard))
    longer = vlm_flops(T5_MODEL, 20, 5) - seen
    soft = dataclasses.replace(T5_MODEL, soft_prompt=4)
    assert step(soft, "soft_prompt") == pytest.approx(3 * (seen + 2 * longer))
    vision = dataclasses.replace(VISION, num_frames=2, class_token=True)
    pair = DualEncoderConfig(vision=vision, text=TextTowerConfig(vocab_size=32, width=8, num_heads=2, mlp_dim=16))
    assert training_flops(pair, ("",), 4) == pytest.approx(3 * dual_encoder_flops(pair, 4))
    tower = 4 * vit_flops(vision)
    assert training_flops(pair, ("text", "text_projection"), 4) == pytest.approx(
        3 * dual_encoder_flops(pair, 4) - 2 * tower
    )
