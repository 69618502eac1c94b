"""Models of random parameters for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pyvdl.config import GemmaConfig, T5Config, VLMConfig, toy
from pyvdl.models import VLM
from pyvdl.text import WordTokenizer


def random_vlm(config: VLMConfig, seed: int = 0) -> VLM:
    """A VLM filled by NumPy: JAX would compile a program for each shape of a parameter, ten seconds in all."""
    rng = np.random.default_rng(seed)
    gemma = isinstance(config.language, GemmaConfig)

    def values(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        noise = rng.standard_normal(x.shape)
        if name.endswith("scale"):
            base = 0.0 if gemma and name.startswith("language") else 1.0
            return jnp.asarray(base + 0.3 * noise, x.dtype)
        if name.endswith("bias"):
            return jnp.asarray(0.1 * noise, x.dtype)
        if name.endswith("embedding"):
            return jnp.asarray(noise * (config.language.width**-0.5 if gemma else 1.0), x.dtype)
        return jnp.asarray(noise * x.shape[-2] ** -0.5, x.dtype)

    graphdef, state = nnx.split(nnx.eval_shape(lambda: VLM(config, rngs=nnx.Rngs(0))))
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
