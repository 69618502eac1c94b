"""What stands where on a mesh, and whole trainings on meshes of 8 forced devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from pyvdl.plan import compiler_environment
from pyvdl.sharding import (
    AXES,
    BATCH_AXES,
    make_mesh,
    optimizer_shardings,
    place,
    put,
    put_batch,
    replicated,
    shares_of_a_process,
)


def test_a_batch_becomes_global_arrays() -> None:
    mesh = make_mesh()
    assert mesh.axis_names == AXES
    video = np.arange(24, dtype=np.uint8).reshape(4, 6)
    video.flags.writeable = False  # as the loader gives it
    placed = put_batch({"video": video, "ok": np.ones(4, bool)}, mesh)
    np.testing.assert_array_equal(placed["video"], video)
    assert placed["video"].sharding == NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def test_what_is_put_does_not_share_memory_with_the_original() -> None:
    original = jax.device_put(jnp.arange(100.0), replicated(make_mesh()))
    copy = put(original, replicated(make_mesh()))
    assert copy.unsafe_buffer_pointer() != original.unsafe_buffer_pointer()
    copy.delete()
    assert float(original.sum()) == 4950.0
    assert put(original, replicated(make_mesh()), copy=False) is original


def test_random_keys_are_put_by_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    key = jax.random.key(7, impl="rbg")
    found = put(key, replicated(make_mesh()))
    assert found.sharding == replicated(make_mesh())
    assert jax.random.bits(found) == jax.random.bits(key)


class Devices:
    """A mesh whose devices are of these processes."""

    def __init__(self, *processes: int, fsdp: int = 1, tensor: int = 1) -> None:
        found = [SimpleNamespace(process_index=process) for process in processes]
        self.devices = np.array(found, object).reshape(-1, fsdp, tensor)
        self.shape = dict(zip(AXES, self.devices.shape))


def test_rows_must_divide_over_the_devices() -> None:
    with pytest.raises(ValueError, match=r"ok: 3 rows do not divide over the 2 shares.*batch_size to a multiple of 2"):
        put_batch({"ok": np.ones(3, bool)}, Devices(0, 0, fsdp=2))  # type: ignore[arg-type]


def test_processes_hold_shares_of_their_own_and_as_many() -> None:
    """Next to each other or not; else each would take its own rows for those of another."""
    assert shares_of_a_process(Devices(0, 0, 1, 1)) == 2
    assert shares_of_a_process(Devices(0, 1, 2, 1, 0, 2, fsdp=3)) == 2
    assert shares_of_a_process(Devices(1, 1, 0, 0, tensor=2)) == 1
    torn = Devices(0, 0, 1, 1, 2, 2, 3, 3, fsdp=2, tensor=4)
    with pytest.raises(ValueError, match=r"data 1 x fsdp 2 x tensor 4, .* of several processes: set a smaller tensor"):
        put_batch({"ok": np.ones(4, bool)}, torn)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="processes hold 1 to 2 shares"):
        shares_of_a_process(Devices(0, 0, 1))


MESHES = """
import json
from jax.experimental import topologies
from pyvdl.sharding import make_mesh, shares_of_a_process

found = {}
for name in ("v5e:4x4", "v5e:8x16", "v6e:8x16", "v5p:4x4x4"):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    for tensor in (1, 2):
        for fsdp in (1, 2, 4, 8, 16, 32, 64, 128):
            if fsdp * tensor <= len(devices):
                mesh = make_mesh(fsdp, tensor, devices)
                found[f"{name} {fsdp} {tensor}"] = list(mesh.shape.values()), shares_of_a_process(mesh) * tensor
    try:
        shares_of_a_process(make_mesh(1, 4, devices))
    except ValueError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def test_slices_of_several_hosts_take_every_mesh() -> None:
    """A host's four chips are a square of the slice, which most meshes tear apart."""
    found = json.loads(run_on(1, MESHES, environment=compiler_environment("v5litepod-4")))
    refused = {name for name, told in found.items() if isinstance(told, str) and "set a smaller tensor" in told}
    assert refused == {"v5e:4x4", "v5e:8x16", "v6e:8x16", "v5p:4x4x4"}  # four chips in a row
    meshes = {name: told for name, told in found.items() if name not in refused}
    assert len(meshes) == 9 + 15 + 15 + 13
    for name, (shape, chips) in meshes.items():
        assert shape[1:] == [int(size) for size in name.split()[1:]]
        assert chips == 4, name


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


# --- whole trainings on forced devices

TRAININGS = """
import dataclasses, json, shutil, sys
import jax, numpy as np
from flax import nnx
from pyvdl.config import OptimConfig, TrainConfig, toy
from pyvdl.models import VLM, DualEncoder
from pyvdl.train import contrastive_loss_fn, fit, vlm_loss

class Random:
    def __init__(self, length):
        self.number, self.length = 0, length
    def __next__(self):
        if self.number == self.length:
            raise StopIteration
        rng, rows = np.random.default_rng(self.number), 16
        self.number += 1
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
    def get_state(self): return {"number": self.number}
    def set_state(self, state): self.number = state["number"]

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
optim = OptimConfig(name="adamw", warmup_steps=1, peak_learning_rate=1e-3)
found = {}
for kind, fsdp, tensor, accumulate, length, start, workdir in json.loads(sys.argv[1]):
    config, make, loss = made[kind]
    model = make(config, rngs=nnx.Rngs(0))
    train = TrainConfig(steps=3, batch_size=16, optim=optim, log_every=2, checkpoint_every=2,
                        fsdp=fsdp, tensor=tensor, accumulate=accumulate)
    if start:
        shutil.copytree(start, workdir)
    try:
        history = fit(model, loss, Random(length), train, progress=False, workdir=workdir)
    except ValueError as error:
        assert "batches ended after 2" in str(error)
        continue
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    norm = sum(float((x * x).sum()) for x in params)
    name = f"{kind} on {jax.device_count()}: {fsdp} {tensor} {accumulate} {'resumed' if start else ''}"
    found[name] = [*map(float, history.losses), *map(float, history.grad_norms), norm]
    one = next(x for x in params if x.ndim == 3)
    assert len(one.sharding.device_set) == jax.device_count()
    assert one.addressable_shards[0].data.nbytes <= one.nbytes // fsdp
print(json.dumps(found))
"""
ALL = 99  # batches


def run_on(devices: int, code: str, *arguments: str, environment: Mapping[str, str] = os.environ) -> str:
    environment = {**environment, "JAX_PLATFORMS": "cpu"}
    # Programs of three steps are compiled for nothing but these.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} {quick}"
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()[-1]


def test_every_mesh_gives_the_losses_of_one_device(tmp_path: Path) -> None:
    """Every shape of 8 devices, and fewer devices; both stages' loss and the contrastive one; batches whole and in
    parts; checkpoints of one mesh resumed on others."""
    saved = str(tmp_path / "saved")

    def mesh(kind: str, fsdp: int, tensor: int, accumulate: int = 1) -> list[Any]:
        return [kind, fsdp, tensor, accumulate, ALL, None, None]

    eight = [mesh("dual", fsdp, tensor) for fsdp in (1, 2, 4, 8) for tensor in (1, 2, 4, 8) if fsdp * tensor <= 8]
    # A run of a mesh beside the other, which has been compiled.
    at = eight.index(mesh("dual", 2, 2))
    eight.insert(at + 1, ["dual", 2, 2, 1, 2, None, saved])
    eight.insert(eight.index(mesh("dual", 8, 1)) + 1, ["dual", 8, 1, 1, ALL, saved, str(tmp_path / "eight")])
    eight += [mesh("dual", 2, 1, 2), mesh("vlm", 2, 2, 2), mesh("vlm", 1, 8)]
    found = json.loads(run_on(8, TRAININGS, json.dumps(eight)))
    assert len(found) == 10 + 1 + 3
    one = [mesh("vlm", 1, 1), mesh("dual", 1, 1), ["dual", 1, 1, 1, ALL, saved, str(tmp_path / "one")]]
    alone = json.loads(run_on(1, TRAININGS, json.dumps(one)))
    found |= alone
    for devices in (2, 4):
        found |= json.loads(run_on(devices, TRAININGS, json.dumps([mesh("dual", devices // 2, 1)])))
    for name, values in found.items():
        np.testing.assert_allclose(values, alone[f"{name.split()[0]} on 1: 1 1 1 "], rtol=2e-4, err_msg=name)


START = """
import collections, math, sys, threading, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from pyvdl import recipes
from pyvdl.checkpoint import load_weights, save_model
from pyvdl.config import GemmaConfig, OptimConfig, TrainConfig, ViTConfig, VLMConfig
from pyvdl.data import Record
from pyvdl.models import DualEncoder, save_pretrained
from pyvdl.sharding import make_mesh, place
from pyvdl.step import begin
from pyvdl.text import WordTokenizer
from tests.models import random_vlm

class Peak:
    # The most bytes that one device held at a time, beside what was there before.
    def held(self):
        held = collections.Counter()
        for x in jax.live_arrays():
            for device in x.sharding.device_set:
                held[device] += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        return held
    def look(self):
        self.bytes = max(self.bytes, 0, *(size - self.before[device] for device, size in self.held().items()))
    def watch(self):
        while not self.over:
            self.look()
            time.sleep(0.0005)
    def __enter__(self):
        self.before, self.bytes, self.over = self.held(), 0, False
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self
    def __exit__(self, *_):
        self.over = True
        self.thread.join()
        self.look()

def check(model, dtype, peak, moved=0):
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    whole = sum(x.nbytes for x in params)
    assert all(x.dtype == dtype for x in params)
    for x in params:
        if x.nbytes > whole / 50:  # a large matrix
            assert {shard.data.nbytes for shard in x.addressable_shards} == {x.nbytes // 8}, x.shape
    share = whole / 8
    assert share * 0.9 < peak.bytes < share * 2 + moved, (share, peak.bytes)  # a whole matrix would be more

def same(model, wanted, dtype):
    wanted = dict(nnx.to_flat_state(nnx.state(wanted, nnx.Param)))
    for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        np.testing.assert_array_equal(np.asarray(x[...]), np.asarray(wanted[path][...].astype(dtype)), str(path))

folder = Path(sys.argv[1])
started = []
recipes._run = lambda model, *_: started.append(model)
records = [Record(key="a", video="a.mp4", captions=("a ball",))]
common = ["fsdp=4", "tensor=2"]
shape = [f"model.text.{name}" for name in ("vocab_size=8192", "width=128", "mlp_dim=256")]
shape += [f"model.vision.{name}" for name in ("width=128", "mlp_dim=1024", "image_size=32", "patch_size=8")]

with Peak() as peak:
    recipes.train(records, folder / "new", assignments=[*common, *shape])
new = started.pop()
check(new, jnp.float32, peak)
eager = DualEncoder(new.config, rngs=nnx.Rngs(0))
same(new, eager, jnp.float32)

save_model(folder / "saved", eager, eager.config, WordTokenizer.from_texts(["a ball"]))
with Peak() as peak:
    recipes.train(records, folder / "read", start=folder / "saved", assignments=[*common, "param_dtype=bfloat16"])
read = started.pop()
check(read, jnp.bfloat16, peak)
same(read, eager, jnp.bfloat16)

mesh = make_mesh(4, 2)
config = TrainConfig(optim=OptimConfig(name="sgd", b1=0.0, warmup_steps=1), fsdp=4, tensor=2)
with Peak() as peak:
    begin(eager, config, mesh)
# The device that had it all cuts one array after the other into the parts of all.
check(eager, jnp.float32, peak, moved=eager.text.embedding.get_value().nbytes)
same(eager, new, jnp.float32)
before = [x.unsafe_buffer_pointer() for leaf in jax.tree.leaves(nnx.state(new, nnx.Param))
          for x in (s.data for s in leaf.addressable_shards)]
twin = nnx.merge(*nnx.split(new), copy=True)
state = begin(new, config, mesh)
after = [x.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.params)
         for x in (s.data for s in leaf.addressable_shards)]
assert not {*before} & {*after}, "a step donates what somebody else may hold"
same(twin, eager, jnp.float32)
frozen = begin(read, TrainConfig(trainable=("logit_scale",), param_dtype="bfloat16", optim=config.optim), mesh).frozen
table = frozen["text"]["embedding"].get_value()
assert table is read.text.embedding.get_value()

vision = ViTConfig(image_size=32, patch_size=8, width=64, depth=1, num_heads=2, mlp_dim=128, dtype="float32")
language = GemmaConfig(vocab_size=16384, width=64, depth=1, num_heads=2, head_dim=32, mlp_dim=128, dtype="float32")
public = random_vlm(VLMConfig(vision=vision, language=language, num_frames=2))
save_pretrained(public, folder / "public")
with Peak() as peak:
    found = load_weights(folder / "public", param_dtype="bfloat16", place=place(mesh))
check(found, jnp.bfloat16, peak)
same(found, public, jnp.bfloat16)
print("done")
"""


def test_a_model_stands_split_from_the_start(tmp_path: Path) -> None:
    """New ones, saved ones and public ones: no device ever holds more than its part; the numbers are the same."""
    assert run_on(8, START, str(tmp_path)) == "done"


PIECES = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from pyvdl.sharding import _piece, _pieces, make_mesh

mesh = make_mesh(fsdp=2, tensor=2)
x = np.random.default_rng(0).normal(size=(4096, 32)).astype(np.float32)
x[0, 0], x[-1, -1] = -0.0, np.nan
found = {}
for spec in (P("tensor", "fsdp"), P(("data", "fsdp")), P(None, "tensor"), P("data", None)):
    for dtype in (jnp.float32, jnp.bfloat16):
        whole = x.astype(dtype)
        y = jax.device_put(whole, NamedSharding(mesh, spec))
        pieces = [np.asarray(piece) for piece in _pieces(y, 12_000)]
        same = np.concatenate(pieces).tobytes() == whole.tobytes()
        used = _piece.lower(y, 0, len(pieces[0]), y.sharding).compile().memory_analysis()
        held = used.temp_size_in_bytes + used.output_size_in_bytes
        found[f"{spec} {whole.dtype}"] = same, len(pieces), max(piece.nbytes for piece in pieces), held
print(json.dumps(found))
"""


def test_pieces_of_a_split_array_are_its_rows_and_no_device_gathers_it() -> None:
    for name, (same, count, largest, held) in json.loads(run_on(8, PIECES)).items():
        assert same, name
        assert count > 8, name
        assert largest <= 12_000, name
        assert held < 60_000, name  # bytes on a device, of 262,144 or more in all
