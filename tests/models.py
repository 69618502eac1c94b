"""Models of random parameters for tests."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pyvdl.config import GemmaConfig, T5Config, VLMConfig, toy
from pyvdl.models import VLM
from pyvdl.models.dual_encoder import DualEncoder
from pyvdl.text import WordTokenizer
from pyvdl.tokenizers import Tokenizer, load_tokenizer


def random_vlm(config: VLMConfig, seed: int = 0) -> VLM:
    """A VLM of random parameters."""
    gemma_width = config.language.width if isinstance(config.language, GemmaConfig) else None
    return _filled(lambda: VLM(config, rngs=nnx.Rngs(0)), seed, gemma_width)


def tokenizer_of(folder: Path, words: str) -> Tokenizer:
    """One of a library's, whose ids are 0 for "<pad>" in a text, 1 for its end, and from 2 on for `words`."""
    import tokenizers

    ids = {word: i for i, word in enumerate(["<pad>", "</s>", *words.split()])}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=words.split()[0]))
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["<pad>"])
    library.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder, "t5")


def _filled[M: nnx.Module](make: Callable[[], M], seed: int, gemma_width: int | None = None) -> M:
    """A model filled by NumPy: JAX would compile a program for each shape of a parameter, ten seconds in all."""
    rng = np.random.default_rng(seed)
    gemma = gemma_width is not None

    def values(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        noise = rng.standard_normal(x.shape)
        if name.endswith("scale"):
            base = 0.0 if gemma and name.startswith("language") else 1.0
            return jnp.asarray(base + 0.3 * noise, x.dtype)
        if name.endswith("bias"):
            return jnp.asarray(0.1 * noise, x.dtype)
        if name.endswith("embedding"):
            return jnp.asarray(noise * (gemma_width**-0.5 if gemma_width else 1.0), x.dtype)
        return jnp.asarray(noise * math.prod(x.shape[-2:-1]) ** -0.5, x.dtype)

    graphdef, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(values, state))


def tiny_vlm(tokenizer: WordTokenizer) -> VLM:
    """A VLM of 2 frames of 32 pixels that compiles in seconds."""
    config = toy(tokenizer.vocab_size).vlm
    vision = dataclasses.replace(config.vision, image_size=32, width=32, mlp_dim=64, depth=1)
    assert isinstance(config.language, T5Config)
    language = dataclasses.replace(
        config.language, width=32, head_dim=16, mlp_dim=64, encoder_layers=1, decoder_layers=1
    )
    return random_vlm(dataclasses.replace(config, vision=vision, language=language, num_frames=2))


def tiny_dual_encoder(tokenizer: WordTokenizer, *, num_frames: int, image_size: int) -> DualEncoder:
    """A dual encoder that compiles in seconds."""
    config = toy(tokenizer.vocab_size).dual_encoder
    vision = dataclasses.replace(
        config.vision, num_frames=num_frames, image_size=image_size, width=32, mlp_dim=64, depth=1
    )
    text = dataclasses.replace(config.text, width=32, mlp_dim=64, depth=1)
    config = dataclasses.replace(config, vision=vision, text=text)
    return _filled(lambda: DualEncoder(config, rngs=nnx.Rngs(0)), 0)
