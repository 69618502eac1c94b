"""pyvdl's side of the parity tests: loads a checkpoint, computes what its golden holds, and tells the differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from pyvdl.generate import generate
from pyvdl.models import T5, DualEncoder
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
        found.append(_difference("image_embeds_larger", _see(larger, images), arrays))
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
        return Difference(name, wanted.shape, float(np.mean(value != wanted)))
    # Nothing is compared at places of padding.
    if "logits" in name and "target" in golden:
        value = value * (golden["target"] != 0)[..., None]
    if name == "memory":
        value = value * (golden["prompt"] != 0)[..., None]
    return Difference(name, wanted.shape, float(np.abs(value - wanted).max() / np.sqrt(np.mean(np.square(wanted)))))


def _dual_encoder(model: DualEncoder, golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    images, text = golden["images"], golden["text"]
    tokens = np.asarray(nnx.jit(lambda m, x: m.vision(x))(model, images))
    if model.config.vision.class_token:
        tokens = np.roll(tokens, 1, axis=1)  # stands last here and first there
    video, texts, scale, bias = nnx.jit(lambda m, x, y: m(x, y))(model, images[:, None], text)
    logits = scale * jnp.dot(video, texts.T) + (0 if bias is None else bias)
    return {
        "vision_tokens": tokens,
        "image_embeds": _see(model, images),
        "text_pooled": np.asarray(nnx.jit(lambda m, x: m.text(x))(model, text)),
        "text_embeds": np.asarray(nnx.jit(lambda m, x: m.encode_text(x))(model, text)),
        "logits_per_image": np.asarray(logits),
    }


def _see(model: DualEncoder, images: np.ndarray) -> np.ndarray:
    return np.asarray(nnx.jit(lambda m, x: m.encode_video(x))(model, images[:, None]))


def _vlm(model: Any, golden: dict[str, np.ndarray], big_vision: bool) -> dict[str, np.ndarray]:
    images, prompt, target = golden["images"], golden["prompt"], golden["target"]
    batch, frames = images.shape[:2]

    @nnx.jit
    def see(model: Any, images: Any) -> tuple[Any, Any]:
        tokens = model.vision(images)
        return tokens, model.projection(tokens)

    tokens, projected = see(model, images.reshape(batch * frames, *images.shape[2:]))
    out = {
        "vision_tokens": np.asarray(tokens).reshape(golden["vision_tokens"].shape),
        "projected": np.asarray(projected).reshape(golden["projected"].shape),
    }
    answer = nnx.jit(lambda m, v, p, t: m(v, p, t))
    logits = np.asarray(answer(model, images, prompt, target))
    if big_vision:
        return out | {"big_vision_logits": logits}
    return out | {
        "logits": logits,
        "logits_one_frame": np.asarray(answer(model, images[:, :1], prompt, target)),
        "greedy": _greedy(model, images, prompt, golden),
    }


def _t5(model: T5, golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    prompt, target = golden["prompt"], golden["target"]

    @nnx.jit
    def run(model: T5, prompt: Any, target: Any) -> tuple[Any, Any]:
        mask = prompt != 0
        memory = model.encode(model.embed(prompt), mask)
        return memory, model.decode(jnp.pad(target[:, :-1], ((0, 0), (1, 0))), memory, mask)

    memory, logits = run(model, prompt, target)
    return {
        "memory": np.asarray(memory),
        "logits": np.asarray(logits),
        "greedy": _greedy(model, None, prompt, golden),
    }


def _greedy(model: Any, video: np.ndarray | None, prompt: np.ndarray, golden: dict[str, np.ndarray]) -> np.ndarray:
    length = golden["greedy"].shape[1]
    return np.asarray(generate(model, video, prompt, max_length=length, temperature=0).tokens)[:, 0]


def cases(folder: Path) -> list[str]:
    """Names of the checkpoints in `folder` that have a golden."""
    return sorted(path.stem for path in folder.glob("*.npz") if (folder / path.stem / "config.json").exists())


def versions(folder: Path) -> dict[str, str]:
    """What made the goldens in `folder`."""
    return json.loads((folder / "versions.json").read_text())
