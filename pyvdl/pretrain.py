"""Stand-ins for the published models the method starts from: an image-text encoder and an image vision-language model.

The paper starts from CLIP and PaLI-3, which have seen the web. At toy size the same is made from nothing, as those
were: single pictures with captions train an image-text encoder; its vision tower, joined to a language model that has
read text alone, becomes an image vision-language model on the same pictures. No clip and no question is seen here, nor
any scene that a clip shows.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pyvdl.checkpoint import load_model, save_model
from pyvdl.config import OptimConfig, Preset, TrainConfig
from pyvdl.data import Batches, Record
from pyvdl.models.dual_encoder import DualEncoder
from pyvdl.models.vlm import VLM
from pyvdl.synthetic import words
from pyvdl.synthetic.scene import sample_scene
from pyvdl.text import CAPTION_PROMPT, WordTokenizer
from pyvdl.train import History, contrastive_loss_fn, fit, vlm_loss

PICTURES = 4  # told in one story; or one, of which the same is to be said
COPY_SHARE = 0.3  # of the stories, told of one picture
PICTURE_LENGTH = 16  # tokens of a picture's caption, its end included
STORY_LENGTH = 72  # tokens
PROMPT_LENGTH = 8  # tokens
CAPTION_LENGTH = 28  # tokens of what is said of a story


def story(rng: np.random.Generator) -> tuple[str, str]:
    """Text alone, of a scene that is in no corpus: (what successive pictures show, what happened).

    A picture takes as many words as a vision tower gives tokens, so that the language model meets the next picture at
    the same distance in text and in video. A story of one picture ends in what it shows: nothing happened.
    """
    scene = sample_scene(rng)
    if rng.random() < COPY_SHARE:
        shown = words.image_caption(scene, rng.random() * scene.duration_seconds)
        return f"{_filled_up(shown)} {CAPTION_PROMPT}", shown
    instants = (np.arange(PICTURES) + rng.uniform(0.3, 0.7, PICTURES)) / PICTURES * scene.duration_seconds
    shown = " ".join(_filled_up(words.image_caption(scene, float(instant))) for instant in instants)
    return f"{shown} {CAPTION_PROMPT}", words.caption(scene, rng)


def _filled_up(caption: str) -> str:
    said = caption.split()
    return " ".join([*said, *["."] * (PICTURE_LENGTH - len(said))])


class Stories:
    """Endless batches of stories: prompt int32[B, STORY_LENGTH], target int32[B, CAPTION_LENGTH], ok bool[B]."""

    def __init__(self, tokenizer: WordTokenizer, *, batch_size: int, seed: int) -> None:
        self._tokenizer, self._batch_size, self._seed = tokenizer, batch_size, seed
        self._position = 0

    def __next__(self) -> dict[str, np.ndarray]:
        texts = [story(np.random.default_rng([self._seed, 3, self._position + i])) for i in range(self._batch_size)]
        self._position += self._batch_size
        return {
            "prompt": self._tokenizer.encode_batch([text for text, _ in texts], STORY_LENGTH),
            "target": self._tokenizer.encode_batch([caption for _, caption in texts], CAPTION_LENGTH),
            "ok": np.ones(self._batch_size, bool),
        }

    def get_state(self) -> dict[str, Any]:
        """The number of stories told."""
        return {"position": self._position}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on after so many stories."""
        self._position = state["position"]


def _singly(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Batches of B clips with a text for each of T frames as batches of B * T single pictures."""
    clips, frames = batch["video"].shape[:2]
    single = {
        name: batch[name].reshape(-1, *batch[name].shape[2:])
        for name in ("prompt", "target", "text", "group")
        if name in batch
    }
    return single | {
        "video": batch["video"].reshape(clips * frames, 1, *batch["video"].shape[2:]),
        "ok": jnp.repeat(batch["ok"], frames),
    }


def _picture_loss(model: DualEncoder, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    return contrastive_loss_fn(model, _singly(batch))


def _picture_nll(model: VLM, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    return vlm_loss(model, _singly(batch))


def _run(
    preset: Preset, *, steps: int, batch_size: int, rate: float, seed: int, trainable: tuple[str, ...] = ("",)
) -> TrainConfig:
    """AdamW with a cosine: how these models are made is no part of the method."""
    optim = OptimConfig(
        name="adamw", peak_learning_rate=rate, warmup_steps=40, schedule="cosine", weight_decay=0.02, b1=0.9, b2=0.98
    )
    return dataclasses.replace(
        preset.visual, steps=steps, batch_size=batch_size, seed=seed, trainable=trainable, optim=optim
    )


def image_text_encoder(
    pictures: Sequence[Record], tokenizer: WordTokenizer, preset: Preset, out: Path, *, steps: int, seed: int
) -> History:
    """Trains an image-text dual encoder, the stand-in for CLIP, on single pictures; saves it in `out/model`."""
    config = _run(preset, steps=steps, batch_size=32, rate=4e-3, seed=seed)
    vision = dataclasses.replace(preset.dual_encoder.vision, num_frames=1)
    shape = dataclasses.replace(preset.dual_encoder, vision=vision)
    model = DualEncoder(shape, rngs=nnx.Rngs(seed))

    def encode(record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        # Pictures of which the same is said are no negatives of each other.
        groups = [zlib.crc32(caption.encode()) >> 1 for caption in record.captions]
        texts = tokenizer.encode_batch(record.captions, PICTURE_LENGTH + 1, bos=True)
        return {"text": texts, "group": np.array(groups, np.int32)}

    batches = _pictures(pictures, encode, config)
    history = fit(model, _picture_loss, batches, config, workdir=out, name="image-text encoder")
    save_model(out / "model", model, shape, tokenizer)
    return history


def image_language_model(
    pictures: Sequence[Record],
    tokenizer: WordTokenizer,
    preset: Preset,
    out: Path,
    *,
    encoder: Path,
    text_steps: int,
    steps: int,
    seed: int,
) -> tuple[History, History]:
    """Trains an image VLM, the stand-in for PaLI-3; saves it in `out/model`. Returns the text and the picture run.

    The vision tower is that of the saved image-text encoder `encoder`. The language model reads stories; then it is
    frozen, and the tower learns from pictures with captions to say what words would have said (as PaLI does it).
    """
    model = VLM(preset.vlm, rngs=nnx.Rngs(seed))
    trained, _ = load_model(encoder)
    _copy_tower(trained.vision, model.vision)
    config = _run(preset, steps=text_steps, batch_size=32, rate=2e-3, seed=seed, trainable=("language",))
    stories = Stories(tokenizer, batch_size=config.batch_size, seed=seed)
    read = fit(model, vlm_loss, stories, config, workdir=out / "text", name="language model reads")
    config = _run(preset, steps=steps, batch_size=16, rate=3e-3, seed=seed, trainable=("vision", "projection"))

    def encode(record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        prompts = tokenizer.encode_batch([CAPTION_PROMPT] * len(record.captions), PROMPT_LENGTH)
        return {"prompt": prompts, "target": tokenizer.encode_batch(record.captions, PICTURE_LENGTH)}

    batches = _pictures(pictures, encode, config)
    seen = fit(model, _picture_nll, batches, config, workdir=out, name="image model")
    save_model(out / "model", model, preset.vlm, tokenizer)
    return read, seen


def _pictures(records: Sequence[Record], encode: Any, config: TrainConfig) -> Batches:
    return Batches(
        records,
        encode=encode,
        clip=config.clip,
        batch_size=config.batch_size,
        seed=config.seed,
        num_threads=config.num_threads,
        prefetch=config.prefetch,
    )


def _copy_tower(source: nnx.Module, target: nnx.Module) -> None:
    """Copies the parameters of a tower with a class token into one without."""
    found = {
        path: value for path, value in nnx.to_flat_state(nnx.state(source, nnx.Param)) if "class_token" not in path
    }
    nnx.update(target, nnx.from_flat_state(jax.tree.map(jnp.copy, found)))
