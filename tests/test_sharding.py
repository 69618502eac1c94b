"""The mesh of one device; several devices and whole trainings on them are in test_train."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pyvdl.sharding import DATA_AXIS, make_mesh, put_batch, replicate


def test_a_batch_becomes_global_arrays() -> None:
    mesh = make_mesh()
    assert mesh.axis_names == (DATA_AXIS,)
    video = np.arange(24, dtype=np.uint8).reshape(4, 6)
    video.flags.writeable = False  # as the loader gives it
    placed = put_batch({"video": video, "ok": np.ones(4, bool)}, mesh)
    np.testing.assert_array_equal(placed["video"], video)
    assert placed["video"].sharding == NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def test_replicas_do_not_share_memory_with_the_original() -> None:
    original = jnp.arange(100.0)
    copy = replicate({"x": original}, make_mesh())["x"]
    assert copy.unsafe_buffer_pointer() != original.unsafe_buffer_pointer()
    copy.delete()
    assert float(original.sum()) == 4950.0


def test_rows_must_divide_over_the_devices() -> None:
    class TwoDevices:
        local_devices = (0, 1)

    with pytest.raises(ValueError, match="ok: 3 rows do not divide over the 2 devices"):
        put_batch({"ok": np.ones(3, bool)}, TwoDevices())  # type: ignore[arg-type]
