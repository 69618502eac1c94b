"""Contrastive loss between paired video and text embeddings: argument checks and dispatch."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from . import reference
from .attention import resolve_implementation

KINDS = ("softmax", "sigmoid")


def contrastive_loss(
    video: Array,
    text: Array,
    scale: Array | float,
    bias: Array | float | None = None,
    *,
    kind: str = "softmax",
    groups: Array | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: str | None = None,
) -> Array:
    """placeholder."""
    del axis_name
    resolve_implementation(implementation)
    return reference.contrastive_loss(
        video, text, jnp.asarray(scale), jnp.asarray(0.0 if bias is None else bias), kind=kind, groups=groups
    )
