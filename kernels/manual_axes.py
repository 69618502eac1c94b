"""The mesh axes of `jax.shard_map` over which values differ from device to device, which kernels have to be told."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array


def _axes_of(x: Array) -> frozenset[str]:
    """The mesh axes over which x is marked as differing from device to device."""
    return frozenset(jax.typeof(x).mat.varying)


def alike(arrays: list[Array]) -> list[Array]:
    """All marked as differing over the axes over which any of them does, as pallas_call wants them."""
    axes = frozenset[str]().union(*map(_axes_of, arrays))
    missing = [tuple(axes - _axes_of(x)) for x in arrays]
    return [jax.lax.pcast(x, new, to="varying") if new else x for x, new in zip(arrays, missing, strict=True)]


def shape_like(q: Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An output that varies over the same mesh axes as q, which `jax.shard_map` asks of a kernel."""
    axes: dict[str, Any] = {}
    for name in ("manual_axis_type", "vma"):  # jax 0.12 calls it the former
        if hasattr(jax.typeof(q), name):
            axes = {name: getattr(jax.typeof(q), name)}
            break
    return jax.ShapeDtypeStruct(shape, dtype, **axes)
