"""The device mesh: where parameters, optimizer state and batches stand, and what runs on each device by itself.

One mesh for everything, with the axes "data" (batches alone are split over it), "fsdp" (batches and parameters) and
"tensor" (parameters and attention heads). XLA's partitioner does the rest, but for what it cannot split: the kernels
run in `jax.shard_map` over the mesh that `jax.set_mesh` set, see `space_time_attention`, `attention` and
`contrastive_loss` here.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pyvdl import kernels

BATCH_AXES = ("data", "fsdp")
TENSOR_AXIS = "tensor"
AXES = (*BATCH_AXES, TENSOR_AXIS)

# The logical axes of the last two axes of a matrix, by its name: what it multiplies, what it gives.
_LOGICAL = {
    "qkv": ("embed", "heads"),
    "query": ("embed", "heads"),
    "key_value": ("embed", "heads"),
    "out": ("heads", "embed"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "head": ("embed", "vocabulary"),
    "embedding": ("vocabulary", "embed"),
    "projection": ("embed", None),
}
_PIECE_BYTES = 64 << 20
_MEETING_MS = 365 * 86400 * 1000  # no limit
_meetings = itertools.count()  # a name is good for one
# Products with matrices split so need no sum over "tensor" but one after `out` and one after `down`.
_RULES = {"embed": "fsdp", "heads": TENSOR_AXIS, "mlp": TENSOR_AXIS, "vocabulary": TENSOR_AXIS}


def make_mesh(fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of all devices of all processes (or of `devices`); the axis "data" takes what the others leave."""
    count = len(devices) if devices is not None else jax.device_count()
    if fsdp < 1 or tensor < 1 or count % (fsdp * tensor):
        raise ValueError(f"fsdp * tensor must divide the {count} devices, not be {fsdp} * {tensor}")
    shape = (count // (fsdp * tensor), fsdp, tensor)
    # jax.make_mesh does not split an axis of the slice over two of the mesh, but on v5e: 4 x 4 x 4 has no 32 x 2 then.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def join() -> None:
    """Makes this process one of several that train together, before anything else asks JAX for devices.

    On Cloud TPU slices, Slurm and GKE JAX knows the others by itself. Elsewhere the environment names them:
    JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, *numbers = (os.environ.get(name) for name in names)
    try:
        if address is None:
            jax.distributed.initialize()
        else:
            count, number = (int(text) for text in numbers if text is not None)
            jax.distributed.initialize(address, count, number)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"no other processes to join ({error}); set {', '.join(names)}") from error


def meet(name: str) -> None:
    """Waits until all processes are here, however long that takes; all call it the same number of times.

    Before a collective of processes that come at different times: those give up on the others, the first one on CPUs
    after 30 seconds and on GPUs after 10 minutes. It ends, too, when JAX's heartbeats say that one of them is gone.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint.multihost import get_barrier_sync_fn

        get_barrier_sync_fn()(key=f"pyvdl {next(_meetings)} {name}", timeout_ms=_MEETING_MS)


def place(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Returns the sharding of a parameter, by its name and shape; what loads models asks it, too.

    Matrices of attention and MLP, embeddings and heads are split over "fsdp" and "tensor" where their sizes allow it;
    the rest is whole on every device.
    """

    def sharding(name: str, shape: tuple[int, ...]) -> NamedSharding:
        parts = name.split(".")
        if parts[-2:-1] == ["value"]:  # a matrix in int8, or its scales: one for each of what is not summed
            parts = parts[:-2]
        if parts[-1] in ("kernel", "value"):
            parts.pop()
        logical = _LOGICAL.get(parts[-1])
        if logical is None or len(shape) < 2:
            return replicated(mesh)
        axes = [_RULES.get(axis) if axis else None for axis in logical]
        kept = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape[-2:])]
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 2), *kept))

    return sharding


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is split over "data" and "fsdp"."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a model's state, by `place`."""
    of = place(mesh)
    return jax.tree_util.tree_map_with_path(lambda path, x: of(_name(path), x.shape), tree)


def optimizer_shardings(opt_state: Any, params: Any, mesh: Mesh) -> Any:
    """Returns the shardings of an optimizer's state: what belongs to a parameter stands as that does.

    A parameter's factored moments lack one of its axes, and stand as what is left of it. `opt_state` and `params` are
    trees of arrays or of their shapes.
    """
    of = place(mesh)
    known = {_name(path): tuple(x.shape) for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}

    def sharding(path: Any, x: Any) -> NamedSharding:
        name = _name(path)
        parts = name.split(".")
        own = next((rest for i in range(len(parts)) if (rest := ".".join(parts[i:])) in known), None)
        if own is None:
            return replicated(mesh)
        shape = known[own]
        whole = of(own, shape)
        if tuple(x.shape) == shape:
            return whole
        spec = (*whole.spec, *[None] * (len(shape) - len(whole.spec)))
        for axis in reversed(range(len(shape))):
            if tuple(x.shape) == shape[:axis] + shape[axis + 1 :]:
                return NamedSharding(mesh, PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, opt_state)


@functools.cache
def shares_of_a_process(mesh: Mesh) -> int:
    """Returns how many shares of a batch each process of the mesh holds, next to each other or not.

    Raises ValueError where a share is spread over processes, which would take rows of their own for the same ones, or
    where some hold more than others.
    """
    owners = np.array([device.process_index for device in mesh.devices.flat]).reshape(-1, mesh.shape[TENSOR_AXIS])
    counts = np.unique(owners[:, 0], return_counts=True)[1]
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    if (owners != owners[:, :1]).any():
        raise ValueError(
            f"on the mesh {sizes}, devices that take the same rows are of several processes: set a smaller tensor, and "
            "a batch_size that divides over the more shares"
        )
    if len(set(counts.tolist())) > 1:
        raise ValueError(
            f"on the mesh {sizes}, processes hold {min(counts)} to {max(counts)} shares: give each as many"
        )
    return int(counts[0])


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Starts the copies to the devices and returns global arrays whose first axis is split over the batch axes.

    `batch` is this process's share; every process holds an equal one. Its rows go to its devices in the mesh's order,
    which may have those of other processes between them.
    """
    count = shares_of_a_process(mesh)
    shares = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    for name, value in batch.items():
        if len(value) % count:
            raise ValueError(
                f"{name}: {len(value)} rows do not divide over the {count} shares of this process; set batch_size to a "
                f"multiple of {shares}, or a larger tensor"
            )
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def put(x: Array, sharding: NamedSharding, *, copy: bool = True) -> Array:
    """Returns `x` as it is to stand: a copy, whose buffers may be donated; without `copy` x itself if it stands so.

    Where there are several processes, each gives the whole of an array, or one that stands on the mesh already.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):  # of which NumPy knows nothing
        key = put(jax.random.key_data(x), sharding, copy=copy)
        return jax.random.wrap_key_data(key, impl=jax.random.key_impl(x))
    if not copy and x.sharding == sharding:
        return x
    if jax.process_count() == 1:
        return jax.device_put(x, sharding, may_alias=False if copy else None)
    if not x.is_fully_addressable:
        return jax.jit(jnp.copy, out_shardings=sharding)(x)
    whole = np.asarray(x)  # what is on a device of one process cannot be sent to those of others
    return jax.make_array_from_callback(x.shape, sharding, lambda index: whole[index])


def host_pieces(x: Array) -> Iterator[np.ndarray]:
    """Yields the rows of `x` for this process to read, several at a time where other processes have parts of it.

    No device then holds more than _PIECE_BYTES of it, or one row, beside its own part. All processes must ask together.
    """
    if x.is_fully_addressable or x.is_fully_replicated:
        yield np.asarray(x)
    else:
        yield from map(np.asarray, _pieces(x, _PIECE_BYTES))


def _pieces(x: Array, most_bytes: int) -> Iterator[Array]:
    """The rows of `x`, which stands on a mesh, in order, several at a time and whole on every device."""
    own = x.sharding.shard_shape(x.shape)[0]
    rows = max(1, min(own, most_bytes * len(x) // x.nbytes))
    for begin in range(0, len(x), own):
        for first in range(begin, begin + own, rows):
            yield _piece(x, first, min(rows, begin + own - first), x.sharding)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _piece(x: Array, first: Array, rows: int, sharding: NamedSharding) -> Array:
    """Rows of `x` that one device's part has all of: it sends them. XLA's partitioner would gather x for a slice."""
    axes = next(iter(sharding.spec), None) or ()
    bits = jnp.dtype(f"uint{8 * x.dtype.itemsize}")

    def found(own: Array, first: Array) -> Array:
        at = first - len(own) * jax.lax.axis_index(axes) if axes else first
        piece = jax.lax.bitcast_convert_type(jax.lax.dynamic_slice_in_dim(own, at, rows), bits)
        # A sum of bits, not of numbers: -0.0 and NaN stay what they are.
        return jax.lax.psum(jnp.where((at >= 0) & (at < len(own)), piece, 0), axes) if axes else piece

    mesh, rest = sharding.mesh, sharding.spec[1:]
    piece = jax.shard_map(
        found, mesh=mesh, in_specs=(sharding.spec, PartitionSpec()), out_specs=PartitionSpec(None, *rest)
    )(x, first)
    piece = jax.lax.with_sharding_constraint(piece, NamedSharding(mesh, PartitionSpec()))
    return jax.lax.bitcast_convert_type(piece, x.dtype)


# --- what XLA's partitioner cannot split


def split_rows(x: Array) -> Array:
    """x [B, ...] with the hint that B is split over the batch axes, where a mesh is set and B divides."""
    mesh = _mesh()
    if mesh is None or not _batch_axes(mesh, x.shape[0]):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *[None] * (x.ndim - 1)))


def space_time_attention(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """`pyvdl.kernels.space_time_attention`; under a mesh each device takes its clips and its heads."""
    call = functools.partial(kernels.space_time_attention, **options)
    mesh = _mesh()
    if mesh is None:
        return call(q, k, v)
    spec = PartitionSpec(_batch_axes(mesh, q.shape[0]), None, _head_axis(mesh, q.shape[2]))
    head_dim = q.shape[3]

    def local(*parts: Array) -> Array:
        return _flat(call(*(_heads(part, head_dim) for part in parts)))

    return _heads(jax.shard_map(local, in_specs=(spec,) * 3, out_specs=spec)(*map(_flat, (q, k, v))), head_dim)


def _flat(x: Array) -> Array:
    """[B, S, N, D] -> [B, S, N * D]. Arrays cross the border of a `shard_map` so: XLA does not see through it that what
    is reshaped on both sides stays as it was, and a TPU lays out [N, D] anew."""
    return x.reshape(*x.shape[:2], -1)


def _heads(x: Array, head_dim: int) -> Array:
    """[B, S, N * D] -> [B, S, N, D]."""
    return x.reshape(*x.shape[:2], -1, head_dim)


def attention(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """`pyvdl.kernels.attention`; under a mesh each device takes its rows and its heads."""
    mesh = _mesh()
    arrays = {name: x for name, x in options.items() if isinstance(x, jax.Array | np.ndarray)}
    fixed = {name: x for name, x in options.items() if name not in arrays}
    if mesh is None:
        return kernels.attention(q, k, v, **options)
    rows = _batch_axes(mesh, q.shape[0])
    heads = _head_axis(mesh, q.shape[2])
    if heads and k.shape[2] % mesh.shape[heads]:
        # Query heads of a device must find their key heads there: all of them read one, or none are split.
        heads = heads if k.shape[2] == 1 else None
    key_heads = None if k.shape[2] == 1 else heads

    def spec(name: str, x: Any) -> PartitionSpec:
        if name == "distance_bias":
            return PartitionSpec(heads)
        if x.ndim < 2:
            return PartitionSpec(rows if x.ndim else None)
        return PartitionSpec(rows if x.shape[0] > 1 else None, heads if x.shape[1] > 1 else None)

    specs = {name: spec(name, x) for name, x in arrays.items()}
    head_dim = q.shape[3]
    own, others = PartitionSpec(rows, None, heads), PartitionSpec(rows, None, key_heads)

    def local(q: Array, k: Array, v: Array, arrays: dict[str, Array]) -> Array:
        return _flat(kernels.attention(*(_heads(x, head_dim) for x in (q, k, v)), **fixed, **arrays))

    whole = {name: jnp.asarray(x) for name, x in arrays.items()}
    # Unchecked: JAX's splash kernel does not tell over which axes its outputs differ.
    split = jax.shard_map(local, in_specs=(own, others, others, specs), out_specs=own, check_vma=False)
    return _heads(split(_flat(q), _flat(k), _flat(v), whole), head_dim)


def contrastive_loss(
    video: Array, text: Array, scale: Array, bias: Array | None, *, kind: str, groups: Array | None
) -> Array:
    """`pyvdl.kernels.contrastive_loss` of the global batch; under a mesh rows go around the ring of the batch axes."""
    mesh = _mesh()
    call = functools.partial(kernels.contrastive_loss, kind=kind)
    if mesh is None or math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 1:
        return call(video, text, scale, bias, groups=groups)
    if not _batch_axes(mesh, video.shape[0]):
        raise ValueError(f"{video.shape[0]} rows do not divide over the mesh {dict(mesh.shape)}")
    rows, same = PartitionSpec(BATCH_AXES), PartitionSpec()

    def local(video: Array, text: Array, scale: Array, bias: Array | None, groups: Array | None) -> Array:
        return call(video, text, scale, bias, groups=groups, axis_name=BATCH_AXES)

    in_specs = (rows, rows, same, None if bias is None else same, None if groups is None else rows)
    return jax.shard_map(local, in_specs=in_specs, out_specs=same)(video, text, scale, bias, groups)


def _mesh() -> Any:
    """The mesh around the trace, if it is one of ours, has several devices, and is not split by hand already."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or tuple(mesh.axis_names) != AXES or mesh.size == 1 or mesh.manual_axes:
        return None
    return mesh


def _batch_axes(mesh: Any, rows: int) -> tuple[str, ...] | None:
    """The batch axes, where the rows divide over them."""
    return BATCH_AXES if rows % math.prod(mesh.shape[axis] for axis in BATCH_AXES) == 0 else None


def _head_axis(mesh: Any, heads: int) -> str | None:
    return TENSOR_AXIS if heads % mesh.shape[TENSOR_AXIS] == 0 else None


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
