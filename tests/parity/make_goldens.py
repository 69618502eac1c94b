"""Makes checkpoints with random weights, and what `transformers` computes with them: the goldens of the parity tests.

Runs in the environment of `make parity` (torch, transformers), imports nothing of pyvdl. Not from the top of the tree:
its `kernels` would pass for the package of that name, which transformers looks for.
    PYTHONPATH=tests python -P -m parity.make_goldens tests/parity/golden                # the committed ones
    PYTHONPATH=tests python -P -m parity.make_goldens build/parity/live --seed 7 --real  # others, real layer shapes too
Each case is a folder as users have it, and `<case>.npz` beside it with inputs and outputs.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from . import formats
from .families import PIXELS, Arrays, Case, build, compute, paligemma_logits, settle
from .make_tokenizers import CLIP_VOCAB, GEMMA_VOCAB, T5_VOCAB, make_tokenizers

PACKAGES = ("torch", "transformers", "tokenizers", "sentencepiece", "safetensors", "numpy")
IMAGE_TOKEN = GEMMA_VOCAB  # first id after the tokenizer's, as PaliGemma has it


def _clip(vision: dict[str, Any], text: dict[str, Any], width: int, **changes: Any) -> Case:
    config = {"vision_config": vision, "text_config": text, "projection_dim": width}
    return Case(family="clip", config=config, **changes)


def _gemma(width: int, heads: int, kv_heads: int, head_dim: int, mlp_dim: int, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": "gemma",
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": mlp_dim,
        **changes,
    }


def _tower(
    image: int, patch: int, width: int, heads: int, mlp_dim: int, depth: int = 2, **changes: Any
) -> dict[str, Any]:
    return {
        "image_size": image,
        "patch_size": patch,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": mlp_dim,
        "num_hidden_layers": depth,
        **changes,
    }


def _text(
    vocab: int, length: int, width: int, heads: int, mlp_dim: int, depth: int = 2, **changes: Any
) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "max_position_embeddings": length,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": mlp_dim,
        "num_hidden_layers": depth,
        **changes,
    }


def _paligemma(vision: dict[str, Any], text: dict[str, Any], vocab: int, **changes: Any) -> Case:
    """`vocab`: of the tokenizer; the image token follows, and the embedding has some rows more."""
    width, size = text["hidden_size"], vocab + 16
    config = {
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **vision},
        "text_config": {**text, "vocab_size": size},
        "image_token_index": vocab,
        "projection_dim": width,
        "hidden_size": width,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return Case(family="paligemma", config=config, vocab=vocab, **changes)


def _t5(width: int, heads: int, head_dim: int, mlp_dim: int, depth: int = 2, **changes: Any) -> dict[str, Any]:
    return {
        "d_model": width,
        "num_heads": heads,
        "d_kv": head_dim,
        "d_ff": mlp_dim,
        "num_layers": depth,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        **changes,
    }


HALF = torch.float16
BRAIN = torch.bfloat16
TINY = {
    # As openai/clip-vit-*: the end that the configuration names is not the end.
    "clip-openai": _clip(
        _tower(32, 8, 48, 3, 96),
        _text(CLIP_VOCAB, 20, 40, 2, 80, bos_token_id=0, eos_token_id=2, pad_token_id=1),
        44,
        vocab=CLIP_VOCAB,
        dtype=HALF,
    ),
    # As laion/CLIP-*: exact GELU, towers of different depth.
    "clip-laion": _clip(
        _tower(28, 7, 36, 4, 60, hidden_act="gelu"),
        _text(
            CLIP_VOCAB,
            18,
            32,
            2,
            64,
            3,
            hidden_act="gelu",
            bos_token_id=CLIP_VOCAB - 2,
            eos_token_id=CLIP_VOCAB - 1,
            pad_token_id=1,
        ),
        32,
        vocab=CLIP_VOCAB,
        dtype=HALF,
    ),
    "siglip": Case(
        family="siglip",
        config={"vision_config": _tower(28, 7, 36, 4, 52), "text_config": _text(T5_VOCAB, 16, 36, 3, 52)},
        vocab=T5_VOCAB,
        pad=1,
        dtype=HALF,
    ),
    # As SigLIP 2's giant: the text tower is narrower than the image tower, and projected. Images as So400m's of 384
    # pixels: the last ones are not enough for a patch.
    "siglip2": Case(
        family="siglip",
        config={
            "vision_config": _tower(27, 6, 72, 2, 88),
            "text_config": _text(GEMMA_VOCAB, 12, 40, 2, 48, 3, projection_size=72),
        },
        vocab=GEMMA_VOCAB,
        dtype=HALF,
    ),
    "paligemma": _paligemma(
        _tower(28, 7, 36, 2, 44), _gemma(48, 4, 1, 16, 80), GEMMA_VOCAB, frames=2, dtype=HALF, shard_size="60KB"
    ),
    # Soft caps low and window short enough to be felt; the scale of queries is not that of their heads.
    "paligemma2": _paligemma(
        _tower(21, 7, 36, 3, 44),
        _gemma(
            40,
            4,
            2,
            12,
            64,
            model_type="gemma2",
            query_pre_attn_scalar=10,
            attn_logit_softcapping=4.0,
            final_logit_softcapping=1.0,
            sliding_window=9,
        ),
        GEMMA_VOCAB,
        frames=3,
        dtype=BRAIN,
    ),
    "t5": Case(
        family="t5",
        config=_t5(48, 3, 16, 72, 3, vocab_size=T5_VOCAB + 28, num_decoder_layers=2),
        vocab=T5_VOCAB,
        prompt=40,
        dtype=HALF,
    ),
    "ul2": Case(
        family="t5",
        config=_t5(
            40,
            4,
            16,
            56,
            vocab_size=T5_VOCAB,
            feed_forward_proj="gated-silu",
            relative_attention_num_buckets=8,
            relative_attention_max_distance=20,
        ),
        vocab=T5_VOCAB,
        prompt=36,
        dtype=BRAIN,
    ),
}
SO400M = (1152, 16, 4304)  # width, heads, mlp
# Large layers: few rows, frames of 64 patches where a language model reads them, few tokens to continue with.
CHEAP: dict[str, Any] = {"rows": 2, "greedy": 8, "any_text": True}
REAL = {
    "clip-l14": _clip(
        _tower(224, 14, 1024, 16, 4096, 1),
        _text(1024, 77, 768, 12, 3072, 1, eos_token_id=1023),
        768,
        vocab=1024,
        gain=1.0,
    ),
    "siglip-so400m-14": Case(
        family="siglip",
        config={"vision_config": _tower(224, 14, *SO400M, 1), "text_config": _text(1024, 64, 1152, 16, 4304, 1)},
        vocab=1024,
        pad=1,
        gain=1.0,
    ),
    "paligemma-3b": _paligemma(
        _tower(112, 14, *SO400M, 1),
        _gemma(2048, 8, 1, 256, 16384, num_hidden_layers=1),
        1024,
        frames=2,
        shard_size="200MB",
        **CHEAP,
    ),
    "paligemma2-3b": _paligemma(
        _tower(112, 14, *SO400M, 1), _gemma(2304, 8, 4, 256, 9216, model_type="gemma2"), 1024, frames=2, **CHEAP
    ),
    "t5-xl": Case(family="t5", config=_t5(2048, 32, 64, 5120, 1, vocab_size=1024), vocab=1024, prompt=160, **CHEAP),
}


def state_arrays(model: Any) -> Arrays:
    return {name: value.float().numpy() for name, value in model.state_dict().items()}


def save_checkpoint(case: Case, model: Any, folder: Path) -> None:
    """A folder as the hub has it."""
    shutil.rmtree(folder, ignore_errors=True)
    stored = copy.deepcopy(model).to(case.dtype)
    stored.save_pretrained(folder, max_shard_size=case.shard_size)
    settings = json.loads((folder / "config.json").read_text())
    if case.family == "t5":
        # What v1.1's configurations say; the library turns it into a scale of its own when it reads them.
        settings["tie_word_embeddings"] = False
        del settings["scale_decoder_outputs"]
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)
    if case.family in PIXELS:
        mean, std = PIXELS[case.family]
        size = model.config.vision_config.image_size
        pixels = {"image_mean": mean, "image_std": std, "size": {"height": size, "width": size}}
        (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n")


def save_open_clip(case: Case, model: Any, folder: Path) -> None:
    """CLIP as OpenCLIP's folders have it."""
    vision, text = model.config.vision_config, model.config.text_config
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    named = formats.open_clip(state_arrays(model))
    numpy_dtype = {torch.float16: np.float16, torch.float32: np.float32}[case.dtype]
    # Contiguous: safetensors writes an array's memory as it lies.
    save_file(
        {name: np.array(value, numpy_dtype, order="C") for name, value in named.items()},
        folder / "open_clip_model.safetensors",
    )
    settings = {
        "model_cfg": {
            "embed_dim": model.config.projection_dim,
            "quick_gelu": vision.hidden_act == "quick_gelu",
            "vision_cfg": {
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "layers": vision.num_hidden_layers,
                "width": vision.hidden_size,
                "head_width": vision.hidden_size // vision.num_attention_heads,
                "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            },
            "text_cfg": {
                "context_length": text.max_position_embeddings,
                "vocab_size": text.vocab_size,
                "width": text.hidden_size,
                "heads": text.num_attention_heads,
                "layers": text.num_hidden_layers,
                "mlp_ratio": text.intermediate_size / text.hidden_size,
            },
        },
        "preprocess_cfg": dict(zip(("mean", "std"), PIXELS["clip"])),
    }
    (folder / "open_clip_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def save_big_vision(case: Case, model: Any, path: Path) -> None:
    """`<path>.npz`, for SigLIP one with a block for each layer and one with all layers in one block."""
    state, vision_heads = state_arrays(model), model.config.vision_config.num_attention_heads
    if case.family == "siglip":
        heads = {"vision_heads": vision_heads, "text_heads": model.config.text_config.num_attention_heads}
        for style, scan in (("", False), ("-scan", True)):
            named = formats.big_vision_siglip(state, **heads, scan=scan)
            np.savez(path.with_name(f"{path.name}{style}.npz"), **named)  # type: ignore[arg-type]
        return
    text = model.config.text_config
    named = formats.big_vision_paligemma(
        state,
        vision_heads=vision_heads,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        vocab=case.vocab,
    )
    np.savez(path.with_name(f"{path.name}.npz"), **{name: _stored(case, value) for name, value in named.items()})  # type: ignore[arg-type]


def _stored(case: Case, value: np.ndarray) -> np.ndarray:
    """In the precision of the checkpoint; bfloat16, which NumPy has not, as two bytes without a meaning."""
    if case.dtype == BRAIN:
        return torch.from_numpy(value.copy()).to(BRAIN).view(torch.int16).numpy().view("V2")
    return value.astype(np.float16 if case.dtype == HALF else np.float32)


def as_big_vision_runs_it(case: Case, model: Any, inputs: Arrays) -> np.ndarray:
    """PaliGemma's logits with what its npz files cannot say: caps of 50 and 30, no window, queries scaled by head."""
    standard = copy.deepcopy(case.config)
    if standard["text_config"]["model_type"] == "gemma2":
        standard["text_config"] |= {
            "query_pre_attn_scalar": standard["text_config"]["head_dim"],
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        }
    twin = build(Case(family="paligemma", config=standard), 0)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = paligemma_logits(twin, inputs["images"], inputs["prompt"], inputs["target"])
    return logits[..., : case.vocab].numpy()


def make(name: str, case: Case, out: Path, seed: int) -> None:
    model, inputs = settle(case, seed)
    outputs = compute(case, model, inputs)
    save_checkpoint(case, model, out / name)
    if case.family == "clip":
        save_open_clip(case, model, out / f"{name}-open-clip")
    if name in ("siglip", "paligemma", "paligemma2"):
        save_big_vision(case, model, out / f"{name}-big-vision")
    if name in ("paligemma", "paligemma2"):
        outputs["big_vision_logits"] = as_big_vision_runs_it(case, model, inputs)
    np.savez_compressed(out / f"{name}.npz", **inputs, **outputs)  # type: ignore[arg-type]
    print(f"{name}: " + ", ".join(f"{key} {value.shape}" for key, value in outputs.items()), flush=True)


def difference(made: Path, wanted: Path) -> float:
    """The largest difference of two goldens relative to the output's root mean square; raises where ids differ."""
    worst = 0.0
    with np.load(made) as new, np.load(wanted) as old:
        assert set(new) == set(old), set(new) ^ set(old)
        for name in old:
            if np.issubdtype(old[name].dtype, np.floating):
                worst = max(worst, float(np.abs(new[name] - old[name]).max() / np.sqrt(np.mean(old[name] ** 2))))
            else:
                np.testing.assert_array_equal(new[name], old[name], err_msg=f"{made}: {name}")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the goldens of the parity tests.")
    parser.add_argument("out", type=Path, help="folder to fill")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs; 0 makes the committed ones")
    parser.add_argument("--real", action="store_true", help="real layer shapes too, one or two layers (some GB)")
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--against", type=Path, help="goldens that must come out again, to 1e-4")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    arguments.out.mkdir(parents=True, exist_ok=True)
    cases = TINY | (REAL if arguments.real else {})
    for name, case in cases.items():
        if arguments.only and name not in arguments.only:
            continue
        make(name, case, arguments.out, arguments.seed)
        if arguments.against:
            error = difference(arguments.out / f"{name}.npz", arguments.against / f"{name}.npz")
            print(f"{name}: {error:.1e} from {arguments.against}")
            if error > 1e-4:
                raise SystemExit(f"{name}: the goldens do not come out again")
    make_tokenizers(arguments.out)
    versions = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    (arguments.out / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
