"""The device mesh: where parameters stand and how a process's share of a batch becomes one global array."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"


def make_mesh() -> Mesh:
    """Returns a mesh of all devices of all processes with the single axis "data"."""
    return jax.make_mesh((jax.device_count(),), (DATA_AXIS,), (AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Starts the copies to the devices and returns global arrays whose first axis is split over the data axis.

    `batch` is this process's share; every process holds an equal one.
    """
    count = len(mesh.local_devices)
    for name, value in batch.items():
        if len(value) % count:
            raise ValueError(f"{name}: {len(value)} rows do not divide over the {count} devices of this process")
    sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns a copy of `tree` on every device; the buffers given stay the caller's, whatever is donated later."""
    return jax.tree.map(lambda value: jax.device_put(value, replicated(mesh), may_alias=False), tree)
