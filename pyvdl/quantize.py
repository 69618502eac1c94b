"""A model's matrices in int8, by qwix, for generation and embedding in less memory."""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import nnx
from jax import Array

try:
    import qwix
except ImportError as error:
    raise ImportError("int8 weights need qwix: pip install 'qwix>=0.1.8'") from error

# Parameters that are matrices [..., in, out]. Norms, biases and positions are small: they stay as they are.
_MATRICES = frozenset({"kernel", "qkv", "out", "up", "down", "query", "key_value", "head"})


class Int8(nnx.Param[Any]):
    """A matrix kept as `qwix.QArray`; `[...]`, or rows by `[ids]`, have the type that it had: models need not know."""

    def __getitem__(self, index: Any) -> Array:
        return qwix.dequantize(super().__getitem__(index))


def quantize(model: nnx.Module) -> None:
    """Puts int8 in the place of every matrix of `model`, a `VLM`, a `DualEncoder` or a part of one.

    Each output channel of each layer has a scale of its own, in the type that the matrix had; so has each row of an
    embedding, which is an output channel where the embedding is the head. Activations and products stay in the model's
    own type. Such a model generates, scores and embeds; it cannot be trained, nor saved by `save_model`.

    qwix's own `quantize_model` finds parameters while the model runs, which it cannot do within the scan of a `Stack`.
    """
    for _, module in nnx.iter_modules(model):
        # By name, one at a time: a matrix is freed when its int8 has taken its place.
        for name in list(vars(module)):
            parameter = getattr(module, name)
            if type(parameter) is nnx.Param and (name in _MATRICES or name == "embedding"):
                summed = parameter.ndim - (1 if name == "embedding" else 2)
                setattr(module, name, Int8(_quantized(parameter[...], summed)))


@functools.partial(jax.jit, static_argnums=1)
def _quantized(matrix: Array, summed: int) -> Any:
    """The axis `summed` shares a scale."""
    others = [axis for axis in range(matrix.ndim) if axis != summed]
    return qwix.quantize(matrix, "int8", channelwise_axes=others)
