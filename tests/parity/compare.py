"""pyvdl's side of the parity tests: loads a checkpoint, computes what its golden holds, and tells the differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from pyvdl.generate import generate
from pyvdl.models import T5, VLM, DualEncoder
from pyvdl.models.weights import load_pretrained

TOLERANCE = 1e-4  # of every output, relative to its root mean square


class Difference(NamedTuple):
    """How far one output is from its golden."""

    output: str
    shape: tuple[int, ...]
    error: float  # the largest difference, relative to the golden's root mean square; for ids, the share that differs

    @property
    def agrees(self) -> bool:
        return self.error <= (0 if self.output == "greedy" else TOLERANCE)


def compare(checkpoint: Path, golden: Path) -> tuple[Any, list[Difference]]:
    """The model that `checkpoint` holds, and how its outputs differ from those in `golden`."""
    model: Any = load_pretrained(checkpoint, dtype="float32")
    with np.load(golden) as file:
        arrays = dict(file)
    found = differences(model, arrays)
    if "images_larger" in arrays:
        images = arrays["images_larger"]
        larger: Any = load_pretrained(checkpoint, dtype="float32", image_size=images.shape[1])
        found.append(_difference("image_embeds_larger", np.asarray(_see(larger, images)), arrays))
    return model, found


def differences(model: Any, golden: dict[str, np.ndarray], *, big_vision: bool = False) -> list[Difference]:
    """`big_vision`: the model comes from an npz file, which holds no window, caps or padding of the vocabulary."""
    if isinstance(model, DualEncoder):
        found = _dual_encoder(model, golden)
    elif isinstance(model, T5):
        found = _t5(model, golden)
    else:
        found = _vlm(model, golden, big_vision)
    return [_difference(name, value, golden) for name, value in found.items()]


def _difference(name: str, value: np.ndarray, golden: dict[str, np.ndarray]) -> Difference:
    wanted = golden[name]
    if value.shape != wanted.shape:
        raise AssertionError(f"{name}: {value.shape}, not {wanted.shape}")
    if name == "greedy":
        # -1: behind a near tie, which rounding may turn.
        return Difference(name, wanted.shape, float(np.mean((value != wanted) & (wanted >= 0))))
    # Nothing is compared at places of padding.
    if "logits" in name and "target" in golden:
        value = value * (golden["target"] != 0)[..., None]
    if name == "memory":
        value = value * (golden["prompt"] != 0)[..., None]
    return Difference(name, wanted.shape, float(np.abs(value - wanted).max() / np.sqrt(np.mean(np.square(wanted)))))


def _dual_encoder(model: DualEncoder, golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tokens, pooled, video, texts, logits = _run_dual_encoder(model, golden["images"], golden["text"])
    if model.config.vision.class_token:
        tokens = np.roll(tokens, 1, axis=1)  # stands last here and first there
    return {
        "vision_tokens": np.asarray(tokens),
        "image_embeds": np.asarray(video),
        "text_pooled": np.asarray(pooled),
        "text_embeds": np.asarray(texts),
        "logits_per_image": np.asarray(logits),
    }


# Compiled once for all models of one structure: a checkpoint is read in several formats.
@nnx.jit
def _run_dual_encoder(model: DualEncoder, images: Any, text: Any) -> tuple[Any, ...]:
    video, texts, scale, bias = model(images[:, None], text)
    logits = scale * jnp.dot(video, texts.T) + (0 if bias is None else bias)
    return model.vision(images), model.text(text), video, texts, logits


@nnx.jit
def _see(model: DualEncoder, images: Any) -> Any:
    return model.encode_video(images[:, None])


def _vlm(model: VLM, golden: dict[str, np.ndarray], big_vision: bool) -> dict[str, np.ndarray]:
    images, prompt, target = golden["images"], golden["prompt"], golden["target"]
    tokens, projected, logits = _run_vlm(model, images, prompt, target)
    out = {
        "vision_tokens": np.asarray(tokens).reshape(golden["vision_tokens"].shape),
        "projected": np.asarray(projected).reshape(golden["projected"].shape),
    }
    if big_vision:
        return out | {"big_vision_logits": np.asarray(logits)}
    return out | {
        "logits": np.asarray(logits),
        "logits_one_frame": np.asarray(_run_vlm(model, images[:, :1], prompt, target)[-1]),
        "greedy": _greedy(model, images, prompt, golden),
    }


@nnx.jit
def _run_vlm(model: VLM, images: Any, prompt: Any, target: Any) -> tuple[Any, Any, Any]:
    tokens = model.vision(images.reshape(-1, *images.shape[2:]))
    return tokens, model.projection(tokens), model(images, prompt, target)


def _t5(model: T5, golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    memory, logits = _run_t5(model, golden["prompt"], golden["target"])
    return {
        "memory": np.asarray(memory),
        "logits": np.asarray(logits),
        "greedy": _greedy(model, None, golden["prompt"], golden),
    }


@nnx.jit
def _run_t5(model: T5, prompt: Any, target: Any) -> tuple[Any, Any]:
    mask = prompt != 0
    memory = model.encode(model.embed(prompt), mask)
    return memory, model.decode(jnp.pad(target[:, :-1], ((0, 0), (1, 0))), memory, mask)


def _greedy(model: VLM | T5, video: np.ndarray | None, prompt: np.ndarray, golden: dict[str, np.ndarray]) -> np.ndarray:
    length = golden["greedy"].shape[1]
    return np.asarray(generate(model, video, prompt, max_length=length, temperature=0).tokens)[:, 0]


def cases(folder: Path) -> list[str]:
    """Names of the checkpoints in `folder` that have a golden."""
    return sorted(path.stem for path in folder.glob("*.npz") if (folder / path.stem / "config.json").exists())


def versions(folder: Path) -> dict[str, str]:
    """What made the goldens in `folder`."""
    return json.loads((folder / "versions.json").read_text())
