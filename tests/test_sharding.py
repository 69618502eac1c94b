"""What stands where on a mesh, and whole trainings on meshes of 8 forced devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from pyvdl.sharding import AXES, BATCH_AXES, make_mesh, optimizer_shardings, place, put, put_batch, replicated


def test_a_batch_becomes_global_arrays() -> None:
    mesh = make_mesh()
    assert mesh.axis_names == AXES
    video = np.arange(24, dtype=np.uint8).reshape(4, 6)
    video.flags.writeable = False  # as the loader gives it
    placed = put_batch({"video": video, "ok": np.ones(4, bool)}, mesh)
    np.testing.assert_array_equal(placed["video"], video)
    assert placed["video"].sharding == NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def test_what_is_put_does_not_share_memory_with_the_original() -> None:
    original = {"x": jnp.arange(100.0)}
    copy = put(original, {"x": replicated(make_mesh())})["x"]
    assert copy.unsafe_buffer_pointer() != original["x"].unsafe_buffer_pointer()
    copy.delete()
    assert float(original["x"].sum()) == 4950.0


class Shares:
    """A mesh of two devices on the batch axes, of which this process has some."""

    def __init__(self, here: int) -> None:
        self.shape = {"data": 1, "fsdp": 2, "tensor": 4}
        self.local_mesh = AbstractMesh((1, here, 1), AXES)


def test_rows_must_divide_over_the_devices() -> None:
    with pytest.raises(ValueError, match=r"ok: 3 rows do not divide over the 2 shares.*batch_size to a multiple of 2"):
        put_batch({"ok": np.ones(3, bool)}, Shares(2))  # type: ignore[arg-type]


def test_a_tensor_axis_over_several_processes_is_refused() -> None:
    """Each would take its own rows for the same ones."""
    with pytest.raises(ValueError, match="tensor=4 reaches over devices of several processes"):
        put_batch({"ok": np.ones(4, bool)}, Shares(1))  # type: ignore[arg-type]


def test_parameters_are_split_by_name() -> None:
    of = place(AbstractMesh((1, 2, 4), AXES))  # type: ignore[arg-type]
    split = {
        ("vision.blocks.blocks.mixer.qkv.kernel", (3, 8, 24)): (None, "fsdp", "tensor"),
        ("language.blocks.blocks.down", (3, 16, 8)): (None, "tensor", "fsdp"),
        ("vision.blocks.blocks.mlp.down.kernel", (3, 16, 8)): (None, "tensor", "fsdp"),
        ("language.embedding", (40, 8)): ("tensor", "fsdp"),
        ("language.embedding", (41, 8)): (None, "fsdp"),  # 41 does not divide
        ("vision.norm.scale", (8,)): (),
        ("vision.blocks.blocks.mlp.down.bias", (3, 8)): (),
    }
    assert {key: tuple(of(*key).spec) for key in split} == split
    with pytest.raises(ValueError, match=r"fsdp \* tensor must divide the 1 devices, not be 2 \* 1"):
        make_mesh(2)


def test_optimizer_state_stands_as_its_parameters() -> None:
    """Adafactor keeps one moment without the last axis and one without the other; small arrays have a whole one."""
    params = {"block": {"qkv": {"kernel": jnp.zeros((3, 64, 192)), "bias": jnp.zeros((3, 192))}}}
    state = jax.eval_shape(optax.scale_by_factored_rms(min_dim_size_to_factor=32).init, params)
    mesh = AbstractMesh((1, 2, 4), AXES)
    found = optimizer_shardings(state, params, mesh)  # type: ignore[arg-type]
    kernel = {name: getattr(found, name)["block"]["qkv"]["kernel"].spec for name in ("v_row", "v_col")}
    shapes = {name: getattr(state, name)["block"]["qkv"]["kernel"].shape for name in ("v_row", "v_col")}
    assert shapes == {"v_row": (3, 64), "v_col": (3, 192)}
    assert kernel == {"v_row": PartitionSpec(None, "fsdp"), "v_col": PartitionSpec(None, "tensor")}
    assert found.v["block"]["qkv"]["bias"].spec == PartitionSpec()
    moments = jax.eval_shape(optax.scale_by_adam().init, params)
    assert optimizer_shardings(moments, params, mesh).mu["block"]["qkv"]["kernel"].spec == PartitionSpec(  # type: ignore[arg-type]
        None, "fsdp", "tensor"
    )


# --- whole trainings on 8 forced devices

EIGHT_DEVICES = """
import dataclasses, json, sys
import jax, numpy as np
from flax import nnx
from pyvdl.config import OptimConfig, TrainConfig, toy
from pyvdl.models import VLM, DualEncoder
from pyvdl.train import contrastive_loss_fn, fit, vlm_loss

class Random:
    def __init__(self, preset):
        self.rng, self.preset = np.random.default_rng(0), preset
    def __next__(self):
        rng, rows = self.rng, 16
        video = rng.integers(0, 256, (rows, 2, 32, 32, 3), np.uint8)
        ok = np.ones(rows, bool)
        ok[3] = False
        ids = lambda length: rng.integers(4, 64, (rows, length), np.int32)
        target = ids(6)
        target[::3, 4:] = 0
        text = ids(8)
        text[:, -1] = 1
        return {"video": video, "prompt": ids(5), "target": target, "text": text, "ok": ok,
                "group": np.arange(rows, dtype=np.int32) // 2}
    def get_state(self): return {}
    def set_state(self, state): pass

sizes = toy(64)
vision = dataclasses.replace(sizes.vlm.vision, image_size=32, width=32, num_heads=4, mlp_dim=64)
language = dataclasses.replace(sizes.vlm.language, width=32, num_heads=4, head_dim=8, mlp_dim=64)
made = {
    "vlm": (dataclasses.replace(sizes.vlm, vision=vision, language=language, num_frames=2), VLM, vlm_loss),
    "dual": (dataclasses.replace(
        sizes.dual_encoder, vision=dataclasses.replace(vision, num_frames=2, class_token=True),
        text=dataclasses.replace(sizes.dual_encoder.text, width=32, num_heads=4, mlp_dim=64)),
        DualEncoder, contrastive_loss_fn),
}
found = {}
for kind, (config, make, loss) in made.items():
    for fsdp, tensor, accumulate in json.loads(sys.argv[1]):
        model = make(config, rngs=nnx.Rngs(0))
        optim = OptimConfig(name="adamw", warmup_steps=1, peak_learning_rate=1e-3)
        train = TrainConfig(steps=4, batch_size=16, optim=optim, log_every=2,
                            fsdp=fsdp, tensor=tensor, accumulate=accumulate)
        batches = Random(sizes)
        history = fit(model, loss, batches, train, progress=False)
        params = jax.tree.leaves(nnx.state(model, nnx.Param))
        norm = sum(float((x * x).sum()) for x in params)
        name = f"{kind} {fsdp} {tensor} {accumulate}"
        found[name] = [*map(float, history.losses), *map(float, history.grad_norms), norm]
        one = next(x for x in params if x.ndim == 3)
        assert len(one.sharding.device_set) == jax.device_count()
print(json.dumps(found))
"""


def train_on(devices: int, meshes: list[tuple[int, int, int]]) -> dict[str, list[float]]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EIGHT_DEVICES), json.dumps(meshes)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_every_mesh_gives_the_losses_of_one_device() -> None:
    """Both stages' loss and the contrastive one; batches whole and in parts."""
    alone = train_on(1, [(1, 1, 1)])
    meshes = [(1, 1, 1), (2, 1, 2), (2, 2, 2), (1, 8, 1)]
    for name, found in train_on(8, meshes).items():
        np.testing.assert_allclose(found, alone[f"{name.split()[0]} 1 1 1"], rtol=2e-4, err_msg=name)
