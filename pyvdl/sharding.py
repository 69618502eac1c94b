"""The device mesh: where parameters stand and how a process's share of a batch becomes one global array."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"
MODEL_AXIS = "model"
# The axis, from the end, over which a parameter of this name is split: products with these need no sums across devices
# but one after `out` and one after `down`.
_SPLIT = {"qkv": 1, "query": 1, "key_value": 1, "up": 1, "head": 1, "out": 2, "down": 2, "embedding": 2}


def make_mesh(model: int = 1) -> Mesh:
    """Returns a mesh of all devices of all processes: the axis "data", and "model" of `model` devices.

    Batches are split over "data", see `put_batch`; parameters over "model", see `place`.
    """
    count = jax.device_count()
    if model < 1 or count % model:
        raise ValueError(f"model must divide the {count} devices, not {model}")
    return jax.make_mesh((count // model, model), (DATA_AXIS, MODEL_AXIS), (AxisType.Auto,) * 2)


def place(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Returns what `load_pretrained` asks: the sharding of a parameter, by its name and shape.

    Matrices of attention and MLP, embeddings and heads are split over the axis "model" where their sizes allow it, the
    rest is whole on every device.
    """
    devices = mesh.shape[MODEL_AXIS]

    def sharding(name: str, shape: tuple[int, ...]) -> NamedSharding:
        parts = name.split(".")
        if parts[-1] == "kernel":
            parts.pop()
        axis = _SPLIT.get(parts[-1], 0)
        if not axis or len(shape) < 2 or shape[-axis] % devices:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - axis), MODEL_AXIS))

    return sharding


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Starts the copies to the devices and returns global arrays whose first axis is split over the data axis.

    `batch` is this process's share; every process holds an equal one.
    """
    count = mesh.local_mesh.shape[DATA_AXIS]
    for name, value in batch.items():
        if len(value) % count:
            raise ValueError(f"{name}: {len(value)} rows do not divide over the {count} shares of this process")
    sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns a copy of `tree` on every device; the buffers given stay the caller's, whatever is donated later."""
    return jax.tree.map(lambda value: jax.device_put(value, replicated(mesh), may_alias=False), tree)
