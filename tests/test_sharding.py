"""The mesh of one device; several devices and whole trainings on them are in test_train."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from pyvdl.sharding import DATA_AXIS, MODEL_AXIS, make_mesh, place, put_batch, replicate


def test_a_batch_becomes_global_arrays() -> None:
    mesh = make_mesh()
    assert mesh.axis_names == (DATA_AXIS, MODEL_AXIS)
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
    class TwoShares:
        local_mesh = AbstractMesh((2, 1), (DATA_AXIS, MODEL_AXIS))

    with pytest.raises(ValueError, match="ok: 3 rows do not divide over the 2 shares"):
        put_batch({"ok": np.ones(3, bool)}, TwoShares())  # type: ignore[arg-type]


def test_parameters_are_split_by_name() -> None:
    mesh = AbstractMesh((2, 4), (DATA_AXIS, MODEL_AXIS))
    of = place(mesh)  # type: ignore[arg-type]
    split = {
        ("vision.blocks.blocks.mixer.qkv.kernel", (3, 8, 24)): (None, None, MODEL_AXIS),
        ("language.blocks.blocks.down", (3, 16, 8)): (None, MODEL_AXIS),
        ("vision.blocks.blocks.mlp.down.kernel", (3, 16, 8)): (None, MODEL_AXIS),
        ("language.embedding", (40, 8)): (MODEL_AXIS,),
        ("language.embedding", (41, 8)): (),  # does not divide
        ("vision.norm.scale", (8,)): (),
        ("vision.blocks.blocks.mlp.down.bias", (3, 8)): (),
    }
    assert {key: tuple(of(*key).spec) for key in split} == split
    with pytest.raises(ValueError, match="model must divide the 1 devices, not 2"):
        make_mesh(2)
