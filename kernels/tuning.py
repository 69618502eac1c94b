"""Block sizes of the TPU kernels: a model of the bytes they hold in VMEM, and sizes found by libtpu's simulator."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Multiples of 8 (sublanes of a transposed head); below 32 a tile of lanes holds too many heads for one program.
JOINT_HEAD_DIMS = (32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128, 256)

# VMEM of one core by device kind, and what is used where the kind is not known: the least of them.
_VMEM_BYTES = {"TPU v5 lite": 128 << 20, "TPU v6 lite": 128 << 20, "TPU v5": 64 << 20}
_UNKNOWN_VMEM_BYTES = 64 << 20
_RESERVED_BYTES = 6 << 20  # the compiler's own: spills, semaphores, and what stands between the blocks


def device_kind() -> str:
    """The chip's kind; "" when a program is traced on another platform and no abstract mesh tells."""
    if device := jax.sharding.get_abstract_mesh().abstract_device:
        return device.device_kind
    return jax.devices()[0].device_kind if jax.default_backend() == "tpu" else ""


def vmem_bytes() -> int:
    """Bytes a kernel may use."""
    return _VMEM_BYTES.get(device_kind(), _UNKNOWN_VMEM_BYTES) - _RESERVED_BYTES


def joint_backward_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """VMEM of the joint mode's backward kernel, which holds more than its forward, for q [B, S, N, D]."""
    _, tokens, heads, head_dim = shape
    size = jnp.dtype(dtype).itemsize
    rows, lanes = -(-tokens // 128) * 128 + 128, max(128, head_dim)
    loose = 128 % head_dim and head_dim % 128
    array = rows * lanes
    # Each block twice, while the next one is fetched: q, k, v, out, do (two tiles of lanes each if loose); dq, dk, dv.
    blocks = 2 * size * array * (13 if loose else 8)
    statistics = 2 * 4 * rows * -(-heads // 8) * 8
    # K transposed and the sums of dk and dv; loose keys, values, unfinished tiles; three chunks of scores, which spill.
    scratch = array * (size + 8) + (8 * size * array if loose else 0) + 3 * 4 * 512 * 512
    return blocks + statistics + scratch


class Cuts(NamedTuple):
    """How a kernel cuts its scores."""

    cycles: int  # of the matrix unit in the straight code of one grid step, at most: bounds the program's size
    queries: int  # columns of scores worked on at a time
    keys: int  # rows of scores worked on at a time


# By the device's kind; "" is for chips not tried. The simulator knows v5e: the others take its sizes untested.
JOINT_FORWARD = {"": Cuts(25_000, 512, 512)}
JOINT_BACKWARD = {"": Cuts(30_000, 512, 512)}


def cuts(table: dict[str, Cuts]) -> Cuts:
    return table.get(device_kind(), table[""])
