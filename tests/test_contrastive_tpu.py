"""The contrastive loss on TPU: in JAX's TPU interpreter, on several devices of it, and compiled by libtpu."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pyvdl.kernels import contrastive_loss, tuning
from pyvdl.plan import compiler_environment

ROOT = Path(__file__).resolve().parents[1]


def unit_rows(seed: int, rows: int, width: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def value_and_gradients(implementation: str, kind: str, groups: Any, *arguments: jax.Array) -> Any:
    def loss(*arguments: jax.Array) -> jax.Array:
        return contrastive_loss(*arguments, kind=kind, groups=groups, implementation=implementation)

    return jax.jit(jax.value_and_grad(loss, tuple(range(len(arguments)))))(*arguments)


def arguments(kind: str, batch: int, width: int, dtype: str, scale: float = 20.0) -> tuple[jax.Array, ...]:
    rows = tuple(jnp.asarray(unit_rows(i, batch, width), dtype) for i in range(2))
    numbers = (scale,) if kind == "softmax" else (scale, -5.0)
    return *rows, *(jnp.float32(x) for x in numbers)


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Several tiles each way from a few rows."""
    with tuning.override(rows=128, columns=128):
        yield


def no_races() -> bool:
    return interpret_pallas_call.races is not None and not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(
    ("kind", "dtype", "batch", "width", "grouped"),
    [
        ("softmax", "float32", 300, 96, True),
        ("softmax", "bfloat16", 256, 130, False),
        ("softmax", "float32", 1, 5, False),
        ("sigmoid", "float32", 260, 130, False),
        ("sigmoid", "bfloat16", 200, 64, True),
    ],
)
@pytest.mark.usefixtures("small_tiles")
def test_value_and_gradients(kind: str, dtype: str, batch: int, width: int, grouped: bool) -> None:
    given = arguments(kind, batch, width, dtype)
    groups = jnp.arange(batch, dtype=jnp.int32) % 7 if grouped else None
    value, gradients = value_and_gradients("reference", kind, groups, *(x.astype(jnp.float32) for x in given))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        got, got_gradients = value_and_gradients("pallas_tpu", kind, groups, *given)
        assert no_races()
        alone = contrastive_loss(*given, kind=kind, groups=groups, implementation="pallas_tpu")
        assert no_races()
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, value, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(alone, value, rtol=1e-6, atol=1e-6)
    # P is rounded to bfloat16 with embeddings of that type, and so are gradients at the end.
    tolerance = 1e-2 if dtype == "bfloat16" else 1e-5
    for wanted, found, of in zip(gradients, got_gradients, given, strict=True):
        assert found.dtype == of.dtype
        scale = float(jnp.max(jnp.abs(wanted)))
        np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=0, atol=tolerance * scale + 1e-9)


@pytest.mark.parametrize("lengths", ["one", "far from one"])
@pytest.mark.usefixtures("small_tiles")
def test_scores_whose_maxima_are_not_known_beforehand(lengths: str) -> None:
    """A common maximum would let the sums of some rows vanish: each row and column keeps its own."""
    video, text, _ = arguments("softmax", 200, 16, "float32")
    if lengths == "one":
        text = -video  # the true pair has the lowest score of all
    else:
        video = video * jnp.exp(jnp.linspace(-2.0, 2.0, 200))[:, None]
    given = video, text, jnp.float32(100.0)
    value, gradients = value_and_gradients("reference", "softmax", None, *given)
    with pltpu.force_tpu_interpret_mode():
        got, got_gradients = value_and_gradients("pallas_tpu", "softmax", None, *given)
    np.testing.assert_allclose(got, value, rtol=1e-6)
    for wanted, found in zip(gradients, got_gradients, strict=True):  # scores in the hundreds are known to 1e-4 at best
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4 * float(jnp.max(jnp.abs(wanted))))


def test_what_a_trained_model_has_left_to_learn_survives_bfloat16() -> None:
    """Close to the optimum all of a gradient is what P lacks of 1 at the true pair; bfloat16 alone rounds it away."""
    video = jnp.asarray(np.eye(128), jnp.bfloat16)
    given = video, video, jnp.float32(11.0)
    _, wanted = value_and_gradients("reference", "softmax", None, *(x.astype(jnp.float32) for x in given))
    with pltpu.force_tpu_interpret_mode():
        _, found = value_and_gradients("pallas_tpu", "softmax", None, *given)
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_allclose(b.astype(jnp.float32), a, rtol=0, atol=1e-2 * float(jnp.max(jnp.abs(a))))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_broken_numbers_give_nan(kind: str) -> None:
    video, text, *numbers = arguments(kind, 130, 8, "float32")
    broken = [
        (video.at[129, 1].set(jnp.nan), text, *numbers),
        (video, text.at[0, 3].set(jnp.inf), *numbers),
        (video, text, jnp.float32(jnp.nan), *numbers[1:]),
    ]
    with pltpu.force_tpu_interpret_mode():
        for given in broken:
            assert jnp.isnan(contrastive_loss(*given, kind=kind, implementation="pallas_tpu"))


# --- dispatch


def lowered(platform: str, implementation: str | None, dtype: str = "float32") -> str:
    x = jax.ShapeDtypeStruct((256, 32), dtype)

    def gradients(video: jax.Array, text: jax.Array) -> Any:
        return jax.grad(lambda x: contrastive_loss(x, text, 10.0, implementation=implementation))(video)

    return jax.jit(gradients).trace(x, x).lower(lowering_platforms=(platform,)).as_text()


def test_the_platform_of_lowering_decides() -> None:
    assert "tpu_custom_call" in lowered("tpu", None)
    assert "tpu_custom_call" not in lowered("cpu", None)
    assert "tpu_custom_call" not in lowered("cuda", None)
    assert "tpu_custom_call" not in lowered("tpu", "xla")
    assert "tpu_custom_call" not in lowered("tpu", None, "float16")
    with jax.enable_x64(True):
        assert "tpu_custom_call" in lowered("tpu", None)


def test_the_tpu_kernels_trace_anywhere_and_lower_for_tpu_only() -> None:
    x = jnp.zeros((4, 8))
    jax.make_jaxpr(lambda x: contrastive_loss(x, x, 1.0, implementation="pallas_tpu"))(x)
    with pytest.raises(ValueError, match=r"[Ii]nterpret"):
        lowered("cpu", "pallas_tpu")


def test_types_that_the_kernels_do_not_take() -> None:
    x = jnp.zeros((4, 8), jnp.float16)
    with pytest.raises(NotImplementedError, match=r"'bfloat16', 'float32'.*float16"):
        contrastive_loss(x, x, 1.0, implementation="pallas_tpu")


@pytest.mark.parametrize("batch", [1, 100, 128, 129, 1000, 4096, 5000, 65536])
@pytest.mark.parametrize("width", [1, 512, 768, 4096])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_layouts_cover_the_batch(batch: int, width: int, dtype: str) -> None:
    for split in (False, True):
        sizes = tuning.contrastive_layout(batch, width, dtype, split)
        assert sizes.rows >= batch
        assert sizes.width >= width
        assert sizes.rows % sizes.row_block == sizes.columns % sizes.column_block == 0
        assert sizes.column_block % sizes.chunk == 0
        assert sizes.columns * sizes.streams == sizes.rows
        assert sizes.columns * sizes.width * 4 <= 12 << 20
        assert sizes.rows <= 1.13 * batch + 256 * sizes.streams


# --- several devices

RING = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec as P
from pyvdl.kernels import contrastive_loss, tuning
tuning.CONTRASTIVE_FLOAT32 = tuning.Tiles(128, 128, 128)

devices = np.array(jax.devices())
count, kind, batch = len(devices), sys.argv[1], int(sys.argv[2])
checked, grouped = sys.argv[3] == "checked", sys.argv[4] == "groups"
mesh, axis = Mesh(devices, ("data",)), "data"
if count == 4:
    mesh, axis = Mesh(devices.reshape(2, 2), ("slice", "data")), ("slice", "data")
rng = np.random.default_rng(0)
embeddings = rng.standard_normal((2, batch * count, 16)).astype(np.float32)
video, text = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
groups = rng.integers(0, 40, batch * count).astype(np.int32) if grouped else None
numbers = (jnp.float32(20.0),) if kind == "softmax" else (jnp.float32(20.0), jnp.float32(-5.0))

def value_and_gradients(video, text, groups, *numbers, **options):
    def loss(*inputs):
        return contrastive_loss(*inputs, kind=kind, groups=groups, **options)
    return jax.value_and_grad(loss, tuple(range(2 + len(numbers))))(video, text, *numbers)

wanted = value_and_gradients(video, text, groups, *numbers, implementation="reference")
rows = P(axis)
out = P() if checked else rows  # unchecked, each device shows what it holds of the loss and of the numbers' gradients
def local(*x):
    found = value_and_gradients(*x, axis_name=axis, implementation="pallas_tpu")
    return jax.tree.map(lambda y: y if checked or y.ndim else y[None], found)
split = jax.jit(jax.shard_map(
    local, mesh=mesh, in_specs=(rows, rows, rows if grouped else None) + (P(),) * len(numbers),
    out_specs=(out, (rows, rows) + (out,) * len(numbers)), check_vma=checked,
))
with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
    found = jax.block_until_ready(split(video, text, groups, *numbers))
assert not interpret_pallas_call.races.races_found
for want, got in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
    np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), rtol=2e-5, atol=2e-6)
print("all equal")
"""


def child(program: str, *arguments: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        cwd=ROOT,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.mark.parametrize(
    ("count", "kind", "batch", "checked", "grouped"),
    [
        (2, "softmax", 130, "checked", "groups"),  # two directions, two tiles on a device
        (4, "sigmoid", 130, "unchecked", "groups"),
        (8, "softmax", 20, "unchecked", ""),  # too few rows for two directions
        (8, "sigmoid", 130, "checked", ""),
    ],
)
def test_several_devices_give_the_loss_of_one(count: int, kind: str, batch: int, checked: str, grouped: str) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    assert "all equal" in child(RING, kind, str(batch), checked, grouped, XLA_FLAGS=flags)


# --- compiled by libtpu for chips that are not here

COMPILED = """
import re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from pyvdl.kernels import contrastive_loss

topology, kind, batch, dtype, grouped = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5] == "groups"
mesh = Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices), ("data",))
numbers = 1 if kind == "softmax" else 2

def value_and_gradients(video, text, groups, *numbers):
    def loss(*inputs):
        return contrastive_loss(*inputs, kind=kind, groups=groups, axis_name="data")
    return jax.value_and_grad(loss, tuple(range(2 + len(numbers))))(video, text, *numbers)

rows, same = P("data"), P()
split = jax.shard_map(
    value_and_gradients, mesh=mesh, in_specs=(rows, rows, rows if grouped else None) + (same,) * numbers,
    out_specs=(same, (rows, rows) + (same,) * numbers),
)
def shape(shape, dtype, spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
total = batch * mesh.size
compiled = jax.jit(split).lower(
    *[shape((total, 768), dtype, rows)] * 2,
    shape((total,), jnp.int32, rows) if grouped else None,
    *[shape((), jnp.float32, same)] * numbers,
).compile()
temporary = compiled.memory_analysis().temp_size_in_bytes
assert temporary <= 64 * 2**20, temporary
# In the order that the compiler chose, has every large exchange a kernel at work between its start and its end?
under_way, hidden, bare, calls = {}, 0, 0, 0
for line in compiled.as_text().splitlines():
    name = re.match(r"\\s+(?:ROOT )?%(\\S+) = ", line)
    if not name:
        continue
    if "tpu_custom_call" in line:
        calls += 1
    elif " collective-permute-start(" in line and f",{768}]" in line:
        under_way[name[1]] = calls
    elif match := re.search(r" collective-permute-done\\(%?([^,)]+)", line):
        if match[1] in under_way:
            began = under_way.pop(match[1])
            hidden, bare = hidden + (calls > began), bare + (calls == began)
assert calls
if topology == "v5e:4x4":  # where a call takes longer than an exchange
    assert hidden and not bare
print("temporary bytes", temporary, "kernels", calls, "exchanges hidden", hidden, "bare", bare)
"""


@pytest.mark.parametrize(
    ("accelerator", "topology", "kind", "batch", "dtype", "grouped"),
    [
        ("v5litepod-16", "v5e:4x4", "softmax", 4096, "bfloat16", ""),
        ("v5litepod-16", "v5e:4x4", "sigmoid", 4096, "bfloat16", ""),
        ("v6e-16", "v6e:4x4", "softmax", 4096, "bfloat16", "groups"),
        ("v5p-32", "v5p:2x2x4", "sigmoid", 4096, "bfloat16", "groups"),
        ("v5litepod-4", "v5e:2x2", "softmax", 1000, "float32", ""),
    ],
)
def test_compiles_for(accelerator: str, topology: str, kind: str, batch: int, dtype: str, grouped: str) -> None:
    print(child(COMPILED, topology, kind, str(batch), dtype, grouped, **compiler_environment(accelerator)))
