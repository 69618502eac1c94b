"""Block sizes of the TPU kernels: a model of the bytes they hold in VMEM, and sizes found by libtpu's simulator."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LANES = 128
LOG2E = math.log2(math.e)  # scores are kept in units of log 2: exp2 is what the hardware has
LN2 = math.log(2)

# Multiples of 8 (sublanes of a transposed head); below 32 a tile of lanes holds too many heads for one program.
JOINT_HEAD_DIMS = (32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128, 256)

# VMEM of one core by device kind, and what is used where the kind is not known: the least of them.
_VMEM_BYTES = {"TPU v5 lite": 128 << 20, "TPU v6 lite": 128 << 20, "TPU v5": 64 << 20}
_UNKNOWN_VMEM_BYTES = 64 << 20
_RESERVED_BYTES = 6 << 20  # the compiler's own: spills, semaphores, and what stands between the blocks

_overrides: contextvars.ContextVar[Mapping[str, int]] = contextvars.ContextVar(
    "overrides", default=MappingProxyType({})
)


def ceil_to(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@contextlib.contextmanager
def override(**settings: int) -> Iterator[None]:
    """Kernels traced inside take these fields of Cuts and Tiles: for a search. Programs traced before stay."""
    known = (*Cuts._fields, *Tiles._fields)
    if unknown := sorted(settings.keys() - set(known)):
        raise ValueError(f"settings must be of {known}, not {unknown}")
    token = _overrides.set(settings)
    try:
        yield
    finally:
        _overrides.reset(token)


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
    rows, lanes = ceil_to(tokens, LANES) + LANES, max(LANES, head_dim)
    loose = LANES % head_dim and head_dim % LANES
    array = rows * lanes
    # Each block twice, while the next one is fetched: q, k, v, out, do (two tiles of lanes each if loose); dq, dk, dv.
    blocks = 2 * size * array * (13 if loose else 8)
    statistics = 2 * 4 * rows * ceil_to(heads, 8)
    # K transposed and the sums of dk and dv; loose inputs and outputs; three chunks of scores, which spill.
    scratch = array * (size + 8) + ((5 * size + 24) * array if loose else 0) + 3 * 4 * 512 * 512
    return blocks + statistics + scratch


class Cuts(NamedTuple):
    """How a kernel cuts its scores."""

    cycles: int  # of the matrix unit in the straight code of one grid step, at most: bounds the program's size
    queries: int  # columns of scores worked on at a time
    keys: int  # rows of scores worked on at a time


# By the device's kind; "" is v5e, whose sizes chips that the simulator does not know take untested.
type Table = dict[str, Cuts]
JOINT_FORWARD: Table = {"": Cuts(25_000, 256, 128), "TPU v6 lite": Cuts(25_000, 512, 512)}
JOINT_BACKWARD: Table = {"": Cuts(40_000, 512, 512)}
# Of heads that do not lie within tiles of lanes.
JOINT_BACKWARD_LOOSE: Table = {"": Cuts(40_000, 512, 256), "TPU v6 lite": Cuts(40_000, 512, 512)}


def cuts(table: Table) -> Cuts:
    chosen = table.get(device_kind(), table[""])
    return chosen._replace(**{name: value for name, value in _overrides.get().items() if name in Cuts._fields})


# --- the contrastive loss

CONTRASTIVE_VMEM_BYTES = 60 << 20  # of the 64 MiB of the smallest VMEM among the chips this is for
_ROW_SCRATCH_BYTES = 8 << 20  # two blocks of d_video, the one in work and the one on its way
_TEXT_BLOCK_BYTES = 8 << 20  # two blocks of text and one of d_text
_COLUMN_SCRATCH_BYTES = 12 << 20  # d_text of the visitors, which stays in VMEM for a whole call


class Tiles(NamedTuple):
    """Of the scores; larger ones compile for longer and gain nothing."""

    rows: int  # at most
    columns: int  # at most
    chunk: int  # columns that are worked on together


CONTRASTIVE = Tiles(1024, 1024, 256)
CONTRASTIVE_FLOAT32 = Tiles(256, 256, 128)  # six passes of the MXU for one: as many instructions from a smaller tile


class ContrastiveLayout(NamedTuple):
    """How a batch is padded and cut; all sizes but `batch` are multiples of 128."""

    batch: int  # rows that are there
    rows: int  # with padding
    width: int  # E with padding
    streams: int  # parts of the visiting rows
    row_block: int
    column_block: int
    chunk: int  # columns of a tile that are worked on together

    @property
    def columns(self) -> int:
        """Columns of one visiting part."""
        return self.rows // self.streams


def contrastive_layout(batch: int, width: int, dtype: Any, split: bool) -> ContrastiveLayout:
    """`split`: the visiting rows come in two parts, where there are enough."""
    width = ceil_to(width, LANES)
    tiles = CONTRASTIVE_FLOAT32 if jnp.dtype(dtype) == jnp.float32 else CONTRASTIVE
    tiles = tiles._replace(**{name: value for name, value in _overrides.get().items() if name in Tiles._fields})
    limit_rows = min(tiles.rows, max(_ROW_SCRATCH_BYTES // (8 * width), LANES))
    limit_columns = min(tiles.columns, max(_TEXT_BLOCK_BYTES // (8 * width), LANES))
    streams = 2 if split and batch > LANES else 1
    # Columns that do not fit are visited in more parts; a multiple of two, as the ring has two directions.
    while ceil_to(batch, LANES * streams) // streams * width * 4 > _COLUMN_SCRATCH_BYTES:
        streams *= 2
    for row_block in (1024, 512, 256, 128):
        rows = ceil_to(batch, max(row_block, LANES * streams))
        if row_block <= limit_rows and (8 * rows <= 9 * batch or row_block == LANES):  # little of it padding
            break
    row_block = math.gcd(rows, row_block)
    column_block = next(c for c in (1024, 512, 256, 128) if c <= limit_columns and rows // streams % c == 0)
    chunk = min(tiles.chunk, column_block)
    return ContrastiveLayout(batch, rows, width, streams, row_block, column_block, chunk)
