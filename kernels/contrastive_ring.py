"""Contrastive loss across devices: the ring that text rows go around, and the TPU kernels along it.

Visitors are text rows on their way, as they are seen by the device whose video rows they meet.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from . import contrastive_tpu as kernels
from .tuning import LOG2E, ContrastiveLayout, contrastive_layout


def around(step: Any, carry: Any, visitors: list[tuple[Any, Any]], axes: tuple[str, ...], unroll: int = 1) -> Any:
    """Takes every device's visitors to every device. Returns carry and what was summed up for each of the visitors.

    visitors: one or two of (embeddings and the like, what is summed up for them). The second, if there is one, goes the
    other way around, so that each travels while the other is at work.
    carry, sums = step(carry, index, embeddings, sums, home): `home` tells that these visitors are of this device.
    """
    sums: Any
    if not axes:
        ends = []
        for index, (embeddings, sums) in enumerate(visitors):
            carry, sums = step(carry, index, embeddings, sums, True)
            ends.append(sums)
        return carry, ends
    size = jax.lax.axis_size(axes)

    def shifted(x: Any, by: int) -> Any:
        return jax.tree.map(lambda y: jax.lax.ppermute(y, axes, [(i, (i + by) % size) for i in range(size)]), x)

    def turn(state: Any, count: Array) -> tuple[Any, None]:
        carry, first, *others = state
        others = [shifted(x, -1) for x in others]
        embeddings, sums = first
        carry, sums = step(carry, 0, embeddings, sums, count == 0)
        first = shifted((embeddings, sums), 1)
        for index, (embeddings, sums) in enumerate(others):  # set out before the first turn, hence are home in the last
            carry, sums = step(carry, index + 1, embeddings, sums, count == size - 1)
            others[index] = embeddings, sums
        return (carry, first, *others), None

    state, _ = jax.lax.scan(turn, (carry, *visitors), jnp.arange(size, dtype=jnp.int32), unroll=unroll)
    carry, *visitors = state
    return carry, [sums for _, sums in visitors]


def products(video: Array, text: Array) -> Array:
    """Of the true pairs, [B]."""
    wide = jnp.promote_types(video.dtype, jnp.float32)
    return jnp.sum(video.astype(wide) * text.astype(wide), axis=1)


def fresh(x: Any, axes: tuple[str, ...]) -> Any:
    """Marks constants as differing from device to device, as what is accumulated in them will."""
    return jax.tree.map(lambda y: jax.lax.pcast(y, axes, to="varying"), x) if axes else x


def _tpu_sides(
    video: Array, text: Array, groups: Array | None, axes: tuple[str, ...]
) -> tuple[ContrastiveLayout, Array, Array | None, list[tuple[Array, Array | None]]]:
    """Sizes; the rows of the device and their groups; the same of the visitors, [parts, columns, ...] a direction."""
    dtype = jnp.promote_types(video.dtype, text.dtype)
    sizes = contrastive_layout(video.shape[0], video.shape[1], dtype, split=bool(axes))
    video, text = (kernels.padded(x.astype(dtype), sizes) for x in (video, text))
    text = text.reshape(sizes.streams, sizes.columns, sizes.width)
    row_groups = column_groups = None
    if groups is not None:
        groups = kernels.padded(groups.astype(jnp.int32), sizes)
        row_groups = kernels.by_row(groups)
        column_groups = groups.reshape(sizes.streams, 1, sizes.columns)
    visitors = [(text[part], None if column_groups is None else column_groups[part]) for part in _directions(sizes)]
    return sizes, video, row_groups, visitors


def _directions(sizes: ContrastiveLayout) -> list[slice]:
    half = sizes.streams // 2
    return [slice(0, half), slice(half, sizes.streams)] if half else [slice(0, 1)]


def _over_parts(step: Any, carry: Any, visitors: Any) -> tuple[Any, Any]:
    """carry, sums = step(carry, number, visitors[number]) for all parts; visitors are [parts, ...], and so are sums."""
    parts = jax.tree.leaves(visitors)[0].shape[0]
    if parts == 1:
        carry, sums = step(carry, 0, jax.tree.map(lambda x: x[0], visitors))
        return carry, jax.tree.map(lambda x: x[None], sums)

    def body(carry: Any, part: Any) -> tuple[Any, Any]:
        return step(carry, *part)

    return jax.lax.scan(body, carry, (jnp.arange(parts, dtype=jnp.int32), visitors))


def _tpu_visit(
    sizes: ContrastiveLayout, numbers: Array, index: int, part: Any, home: Any, running: Any, *groups: Any
) -> kernels.Visit:
    first = (index * (sizes.streams // 2) + part) * sizes.columns
    places = jnp.stack([jnp.asarray(x, jnp.int32) for x in (home, first, running)])
    return kernels.Visit(numbers, places, *groups)


def _fixed_maximum(video: Array, text: Array, factor: Array, axes: tuple[str, ...]) -> tuple[Array, Array]:
    """A number that may stand for the maximum of every row and column, and whether it may not.

    In powers of 2, `factor` times the products. No score is above the product of the longest rows, and no maximum below
    the lowest score of a true pair: 2**100 times the rows of a batch is still a number, and so is 2**-100.
    """
    lengths = [jnp.max(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=1)) for x in (video, text)]
    extremes = jnp.stack([*lengths, -jnp.min(factor * products(video, text))])
    if axes:
        extremes = jax.lax.pmax(extremes, axes)
    highest = jnp.abs(factor) * jnp.sqrt(extremes[0] * extremes[1])
    fixed = jnp.maximum(highest - 100, 0)
    return fixed, ~(-extremes[2] >= fixed - 100)


def statistics(
    video: Array, text: Array, scale: Array, bias: Array, groups: Array | None, kind: str, axes: tuple[str, ...]
) -> tuple[Array, Array]:
    batch = video.shape[0]
    softmax = kind == "softmax"
    top, running = jnp.float32(0), jnp.bool_(True)
    scale, bias = scale * LOG2E, bias * LOG2E
    if softmax:
        bias, running = _fixed_maximum(video, text, scale, axes)
        top = jnp.where(running, kernels.MASKED, bias)
    sizes, video, row_groups, visitors = _tpu_sides(video, text, groups, axes)
    numbers = jnp.stack([scale, bias])

    def step(rows: Any, index: int, visitors: Any, columns: Any, home: Any) -> tuple[Any, Any]:
        def part(rows: Any, number: Any, visitors: Any) -> tuple[Any, Any]:
            (text, column_groups), columns = visitors
            visit = _tpu_visit(sizes, numbers, index, number, home, running, row_groups, column_groups)
            return kernels.statistics(video, text, visit, rows, columns, sizes, kind)

        return _over_parts(part, rows, (visitors, columns))

    rows, columns = fresh(kernels.start_of_statistics(sizes, kind, top), axes)
    starts = [jax.tree.map(lambda x, n=x[0].shape[0]: jnp.stack([x] * n), columns) for x in visitors]
    rows, ends = around(step, rows, list(zip(visitors, starts)), axes, unroll=2)
    if not softmax:
        return jnp.sum(rows[0], axis=1)[:batch] / LOG2E, jnp.zeros(batch, jnp.float32)
    of_columns = jnp.concatenate([jax.vmap(lambda *x: kernels.merged(x, 0))(*end) for end in ends])
    return kernels.merged(rows, 1)[:batch], of_columns.reshape(-1)[:batch]


def gradients(
    video: Array,
    text: Array,
    scale: Array,
    bias: Array,
    groups: Array | None,
    row_lse: Array | None,
    column_lse: Array | None,
    kind: str,
    axes: tuple[str, ...],
) -> tuple[Array, Array, Array, Array]:
    batch, width = video.shape
    sizes, video, row_groups, visitors = _tpu_sides(video, text, groups, axes)
    lses: list[Any] = [None] * len(visitors)
    if row_lse is not None and column_lse is not None:
        row_lse, column_lse = (kernels.padded(x * LOG2E, sizes) for x in (row_lse, column_lse))
        row_lse = kernels.by_row(row_lse)
        column_lse = column_lse.reshape(sizes.streams, 1, sizes.columns)
        lses = [column_lse[part] for part in _directions(sizes)]
    numbers = jnp.stack([scale, bias]) * LOG2E

    def step(carry: Any, index: int, visitors: Any, d_text: Array, home: Any) -> tuple[Any, Any]:
        def part(carry: Any, number: Any, visitors: Any) -> tuple[Any, Any]:
            d_video, sums = carry
            (text, column_groups), lse, d_text = visitors
            visit = _tpu_visit(sizes, numbers, index, number, home, True, row_groups, column_groups)
            d_video, d_text, new = kernels.gradients(video, text, visit, row_lse, lse, d_video, d_text, sizes)
            return (d_video, sums if new is None else sums + jnp.sum(new, axis=(1, 2))), d_text

        return _over_parts(part, carry, (*visitors, d_text))

    starts = [fresh(jnp.zeros(x[0].shape, jnp.float32), axes) for x in visitors]
    carry = fresh((jnp.zeros(video.shape, jnp.float32), jnp.zeros(2, jnp.float32)), axes)
    (d_video, sums), ends = around(step, carry, list(zip(zip(visitors, lses), starts)), axes, unroll=2)
    d_text = jnp.concatenate(ends).reshape(sizes.rows, sizes.width)
    return d_video[:batch, :width], d_text[:batch, :width], sums[0] / LOG2E, sums[1]
