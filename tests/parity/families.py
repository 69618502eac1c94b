"""The reference side: small random models of `transformers`, and what it computes with them. Needs torch.

Weights are drawn here and not by the library: every parameter is off its start (norms, biases, scales), so that none
can be left out or misplaced without showing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
    T5Config,
    T5ForConditionalGeneration,
)

Arrays = dict[str, np.ndarray]
NEAR_TIE = 2e-3  # of the two likeliest tokens' logits, relative to the spread of all
PIXELS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "paligemma": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
MODELS = {
    "clip": (CLIPConfig, CLIPModel),
    "siglip": (SiglipConfig, SiglipModel),
    "paligemma": (PaliGemmaConfig, PaliGemmaForConditionalGeneration),
    "t5": (T5Config, T5ForConditionalGeneration),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One checkpoint and the sizes of its inputs."""

    family: str
    config: dict[str, Any]  # of the library's configuration class
    dtype: torch.dtype = torch.float32  # of the weights on disk; they are rounded to it, computation is in float32
    shard_size: str = "50GB"
    vocab: int = 0  # ids of inputs are below it
    pad: int = 0  # SigLIP pads texts with their end
    prompt: int = 12  # most tokens of a prompt
    target: int = 10  # most tokens of a target
    frames: int = 1
    gain: float = 1.5  # of matrices: attention is then sharp, and continuations change from token to token
    rows: int = 3
    greedy: int = 32  # tokens of a continuation
    any_text: bool = False  # one continuation will do, however dull, up to its first near tie


def build(case: Case, seed: int) -> Any:
    """The model with random weights that `case.dtype` holds exactly, in float32."""
    config_class, model_class = MODELS[case.family]
    model = model_class._from_config(config_class(**copy.deepcopy(case.config)), attn_implementation="eager").eval()
    if case.family == "t5":
        # The library ties the head to the embedding whatever the configuration says; v1.1 has a head of its own.
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
        model.all_tied_weights_keys.pop("lm_head.weight")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator)
            value = _drawn(case, name, noise)
            parameter.copy_(value.to(case.dtype).float())
    return model


def _drawn(case: Case, name: str, noise: torch.Tensor) -> torch.Tensor:
    module, _, leaf = name.rpartition(".")
    if leaf == "logit_scale":
        return torch.full_like(noise, math.log(20.0))
    if leaf == "logit_bias":
        return torch.full_like(noise, -3.25)
    if leaf in ("class_embedding", "probe") or module.endswith(
        ("token_embedding", "shared", "relative_attention_bias")
    ):
        return noise
    if module.endswith("position_embedding"):
        return 0.5 * noise
    if module.endswith("embed_tokens"):
        # Gemma multiplies by the root of the width, and its head is the same matrix: a token that weighed more in the
        # residual would be likeliest to follow itself.
        return 0.3 * noise * noise.shape[1] ** -0.5
    if noise.ndim == 1:
        centre = 1.0 if leaf == "weight" and "language_model" not in name else 0.0  # Gemma's norms scale by 1 + weight
        return centre + 0.2 * noise
    fan_in = math.prod(noise.shape[1:])
    if module.endswith("Attention.q") and case.family == "t5":  # scores are not divided by the root of the head dim
        fan_in *= case.config["d_kv"]
    return case.gain * fan_in**-0.5 * noise


def draw_inputs(case: Case, model: Any, seed: int) -> Arrays:
    """Pixels and ids of mixed lengths, padded on the right."""
    rng = np.random.default_rng(seed)
    config = model.config
    if case.family == "t5":
        return {
            "prompt": _texts(rng, (case.prompt, 3, case.prompt // 2)[: case.rows], case, end=1),
            "target": _texts(rng, (case.target // 2, case.target, 1)[: case.rows], case, end=1),
        }
    size = config.vision_config.image_size
    if case.family == "paligemma":
        return {
            "images": rng.integers(0, 256, (case.rows, case.frames, size, size, 3), dtype=np.uint8),
            "prompt": _texts(rng, (case.prompt // 2, case.prompt, 2)[: case.rows], case, begin=2),
            "target": _texts(rng, (case.target, 2, case.target // 2)[: case.rows], case, end=1),
        }
    length = config.text_config.max_position_embeddings
    grid = size // config.vision_config.patch_size
    larger = grid * 3 // 2 * config.vision_config.patch_size
    images = {
        "images": rng.integers(0, 256, (3, size, size, 3), dtype=np.uint8),
        "images_larger": rng.integers(0, 256, (1, larger, larger, 3), dtype=np.uint8),
    }
    if case.family == "siglip":
        return images | {"text": _texts(rng, (length, 1, 5, length // 2), case, end=1)}
    begin, end = case.vocab - 2, case.vocab - 1
    text = _texts(rng, (length, 2, 6, length // 2, 6), case, begin=begin, end=end)
    text[0, 1] = 2  # the end that old configurations name, but that ends nothing
    text[-1][np.argmax(text[-1] == end) :] = end  # the other way of padding
    return images | {"text": text}


def _texts(
    rng: np.random.Generator, lengths: tuple[int, ...], case: Case, *, begin: int | None = None, end: int | None = None
) -> np.ndarray:
    texts = np.full((len(lengths), max(lengths)), case.pad, np.int32)
    for row, length in zip(texts, lengths):
        row[:length] = rng.integers(4, case.vocab - 2, length)
        if begin is not None:
            row[0] = begin
        if end is not None:
            row[length - 1] = end
    return texts


@torch.no_grad()
def compute(case: Case, model: Any, inputs: Arrays) -> Arrays:
    """Everything that is compared, float32; ids as int32."""
    kinds: dict[str, Callable[..., dict[str, torch.Tensor]]] = {
        "clip": _dual_encoder,
        "siglip": _dual_encoder,
        "paligemma": _paligemma,
        "t5": _t5,
    }
    return {name: _numpy(value) for name, value in kinds[case.family](case, model, inputs).items()}


def _numpy(value: torch.Tensor) -> np.ndarray:
    return value.numpy().astype(np.float32 if value.is_floating_point() else np.int32)


def pixel_values(family: str, images: np.ndarray) -> torch.Tensor:
    """uint8[..., H, W, 3] -> float32[B, 3, H, W]."""
    mean, std = (torch.tensor(x) for x in PIXELS[family])
    flat = torch.from_numpy(images.reshape(-1, *images.shape[-3:]))
    return ((flat.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def _dual_encoder(case: Case, model: Any, inputs: Arrays) -> dict[str, torch.Tensor]:
    pixels, ids = pixel_values(case.family, inputs["images"]), torch.from_numpy(inputs["text"]).long()
    vision, text = model.vision_model(pixel_values=pixels), model.text_model(input_ids=ids)
    both = model(input_ids=ids, pixel_values=pixels)
    larger = model.get_image_features(pixel_values(case.family, inputs["images_larger"]), interpolate_pos_encoding=True)
    clip = case.family == "clip"
    tokens = vision.last_hidden_state
    return {
        "vision_tokens": model.vision_model.post_layernorm(tokens) if clip else tokens,
        "image_embeds": both.image_embeds,
        "text_pooled": text.pooler_output if clip else text.last_hidden_state[:, -1],
        "text_embeds": both.text_embeds,
        "logits_per_image": both.logits_per_image,
        "image_embeds_larger": torch.nn.functional.normalize(larger.pooler_output, dim=-1),
    }


def _paligemma(case: Case, model: Any, inputs: Arrays) -> dict[str, torch.Tensor]:
    images = inputs["images"]
    batch, frames = images.shape[:2]
    vision = model.model.vision_tower(pixel_values("paligemma", images)).last_hidden_state
    projected = model.model.multi_modal_projector(vision)
    patches = vision.shape[1]
    greedy = continue_paligemma(case, model, images, inputs["prompt"])
    for row in range(batch):  # padding on the left must not matter
        (alone,) = continue_paligemma(case, model, images[row : row + 1], inputs["prompt"][row : row + 1])
        sure = (alone >= 0) & (greedy[row] >= 0)
        assert torch.equal(alone[sure], greedy[row][sure]), (alone, greedy[row])
    return {
        "vision_tokens": vision.reshape(batch, frames * patches, -1),
        "projected": projected.reshape(batch, frames * patches, -1),
        "logits": paligemma_logits(model, images, inputs["prompt"], inputs["target"]),
        "logits_one_frame": paligemma_logits(model, images[:, :1], inputs["prompt"], inputs["target"]),
        "greedy": greedy,
    }


def paligemma_logits(model: Any, images: np.ndarray, prompt: np.ndarray, target: np.ndarray) -> torch.Tensor:
    """float32[B, M, V]: place i predicts target[:, i]; 0 behind the target's end. Rows are computed without padding."""
    out = torch.zeros(*target.shape, model.config.text_config.vocab_size)
    for row, frames in enumerate(images):
        prefix = _prefix(model, frames, prompt[row])
        suffix = target[row][target[row] != 0]
        ids = torch.from_numpy(np.concatenate([prefix, suffix]))[None]
        kinds = torch.zeros_like(ids)
        kinds[:, len(prefix) :] = 1  # seen by later ones only; the prefix sees all of itself
        logits = model(input_ids=ids, pixel_values=pixel_values("paligemma", frames), token_type_ids=kinds).logits
        out[row, : len(suffix)] = logits[0, len(prefix) - 1 : -1]
    return out


def continue_paligemma(case: Case, model: Any, images: np.ndarray, prompt: np.ndarray) -> torch.Tensor:
    """int64[B, `case.greedy`] of the likeliest tokens; -1 from the first one on that rounding could turn."""
    prefixes = [_prefix(model, frames, row) for frames, row in zip(images, prompt)]
    length = max(map(len, prefixes))
    ids = torch.from_numpy(np.stack([np.pad(prefix, (length - len(prefix), 0)) for prefix in prefixes]))
    return _continue(
        case,
        model,
        input_ids=ids,
        pixel_values=pixel_values("paligemma", images),
        attention_mask=(ids != 0).long(),
        token_type_ids=torch.zeros_like(ids),
    )


def _prefix(model: Any, frames: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """int64[S]: image tokens of all frames, then the prompt without its padding."""
    vision = model.config.vision_config
    tokens = len(frames) * (vision.image_size // vision.patch_size) ** 2
    return np.concatenate([np.full(tokens, model.config.image_token_id), prompt[prompt != 0]]).astype(np.int64)


def _t5(case: Case, model: Any, inputs: Arrays) -> dict[str, torch.Tensor]:
    ids, target = (torch.from_numpy(inputs[name]).long() for name in ("prompt", "target"))
    mask = (ids != 0).long()
    start = torch.nn.functional.pad(target[:, :-1], (1, 0))
    both = model(input_ids=ids, attention_mask=mask, decoder_input_ids=start)
    return {
        "memory": both.encoder_last_hidden_state * mask[..., None],
        "logits": both.logits * (target != 0)[..., None],
        "greedy": continue_t5(case, model, inputs["prompt"]),
    }


def continue_t5(case: Case, model: Any, prompt: np.ndarray) -> torch.Tensor:
    """As `continue_paligemma`; the decoder's start is left out."""
    ids = torch.from_numpy(prompt).long()
    return _continue(case, model, input_ids=ids, attention_mask=(ids != 0).long())


def _continue(case: Case, model: Any, *, input_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    out = model.generate(
        input_ids=input_ids,
        **inputs,
        max_new_tokens=case.greedy,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    made = out.sequences[:, 1 if model.config.is_encoder_decoder else input_ids.shape[1] :]
    logits = torch.stack(out.logits, dim=1)
    best = logits.topk(2, dim=-1).values
    gaps = (best[..., 0] - best[..., 1]) / logits.std(dim=-1)
    ended = torch.nn.functional.pad((made == 1).cumsum(dim=1), (1, 0))[:, :-1] > 0
    tokens, close = torch.zeros(2, len(made), case.greedy, dtype=torch.long)
    tokens[:, : made.shape[1]] = made
    close[:, : made.shape[1]] = (gaps < NEAR_TIE) & ~ended
    return tokens.masked_fill(close.cumsum(dim=1) > 0, -1)


def settle(case: Case, seed: int) -> tuple[Any, Arrays]:
    """A model and inputs whose greedy continuations are lively and without near ties, or of which half is sure."""
    model = build(case, seed)
    for attempt in range(300):
        if attempt and not case.any_text:
            model = build(case, seed + 1000 * attempt)
        inputs = draw_inputs(case, model, seed + 1000 * attempt)
        if case.family in ("clip", "siglip"):
            return model, inputs
        if case.family == "paligemma":
            tokens = continue_paligemma(case, model, inputs["images"], inputs["prompt"])
        else:
            tokens = continue_t5(case, model, inputs["prompt"])
        sure = tokens >= 0
        lively = min(len(set(row.tolist())) for row in tokens) >= case.greedy // 4
        if (lively and sure.all()) or (case.any_text and sure.float().mean() >= 0.5):
            return model, inputs
    raise RuntimeError(f"{case.family}: no continuation without near ties in 300 draws from seed {seed}")
