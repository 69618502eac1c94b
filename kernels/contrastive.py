"""Contrastive loss of paired video and text embeddings: argument checks, dispatch, and the XLA implementation.

The XLA implementation walks the score matrix in tiles, forward and backward, and never stores it whole. Across devices
it passes the text blocks around a ring: a device holds its own rows and one visiting block, however many devices there
are.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from . import reference
from .attention import resolve_implementation

KINDS = ("softmax", "sigmoid")
TILE = 1024  # rows and columns of a tile at most: 4 MiB of float32 scores
MASKED = -1e30  # score of a pair that does not count; finite, so that a tile without any pair does no harm


def contrastive_loss(
    video: Array,
    text: Array,
    scale: Array | float,
    bias: Array | float | None = None,
    *,
    kind: str = "softmax",
    groups: Array | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: str | None = None,
) -> Array:
    """Loss of pairs (video[i], text[i]) against all other pairings; scores are scale * video @ text.T + bias.

    "softmax" (CLIP): the mean cross-entropy of finding i's text among all texts and i's video among all videos.
    "sigmoid" (SigLIP): each pairing is classified on its own as true or not, summed over a row, mean over rows.
    NaN or Inf anywhere in the arguments gives NaN.

    Args:
        video, text: [B, E], of unit length (the caller's business).
        scale: multiplies the products; a number or a scalar array (for CLIP, exp of its logit_scale).
        bias: added to the scores of "sigmoid" (None is 0). A softmax does not see it: with "softmax" it must be None.
        kind: "softmax" or "sigmoid".
        groups: int32[B]; two rows of one group (clips of one video, say) are not each other's negatives.
        axis_name: the mesh axis, or axes, over which the batch is split, inside `jax.shard_map`. B rows are here; the
            loss is that of the rows of all devices and is the same on all of them. Gradients of video and text are
            those of that global loss by the rows that are here, gradients of scale and bias are complete: add no psum.
        implementation: see the package docstring.

    Returns:
        float32[].
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, not {kind!r}")
    if video.ndim != 2 or video.shape != text.shape or 0 in video.shape:
        raise ValueError(f"video and text must be of one shape [B, E], not {video.shape} and {text.shape}")
    for name, x in (("video", video), ("text", text)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be of a floating type (bfloat16, float32), not {x.dtype}")
    if kind == "softmax" and bias is not None:
        raise ValueError("bias must be None with kind 'softmax', which a constant on all scores does not change")
    if groups is not None and (groups.shape != video.shape[:1] or not jnp.issubdtype(groups.dtype, jnp.integer)):
        raise ValueError(f"groups must be int32[{video.shape[0]}], not {groups.dtype}{groups.shape}")
    wide = jnp.promote_types(video.dtype, jnp.float32)
    scale = jnp.asarray(scale, wide)
    bias = jnp.asarray(0 if bias is None else bias, wide)
    for name, x in (("scale", scale), ("bias", bias)):
        if x.shape != ():
            raise ValueError(f"{name} must be a number or a scalar array, not of shape {x.shape}")
    if resolve_implementation(implementation) == "reference":
        if axis_name is not None:
            raise NotImplementedError("implementation 'reference' takes all rows on one device: axis_name must be None")
        return reference.contrastive_loss(video, text, scale, bias, kind=kind, groups=groups)
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    return _loss(video, text, scale, bias, groups, kind, axes)


class _Rows(NamedTuple):
    """Rows of one side cut into tiles; leading axes [tiles, rows of a tile]."""

    embeddings: Array  # [..., E]
    place: Array | None  # int32 in the global batch, -1 for padding; None: all pairs count
    group: Array | None  # int32


def _tile_count(rows: int) -> int:
    return -(-rows // TILE)


def _tiles(x: Array, fill: int = 0) -> Array:
    """[B, ...] -> [tiles, rows, ...], padded with `fill`."""
    count = _tile_count(x.shape[0])
    rows = -(-x.shape[0] // count)
    x = jnp.pad(x, [(0, count * rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
    return x.reshape(count, rows, *x.shape[1:])


def _untile(x: Array, rows: int) -> Array:
    return x.reshape(-1, *x.shape[2:])[:rows]


def _sides(video: Array, text: Array, groups: Array | None, kind: str, axes: tuple[str, ...]) -> tuple[_Rows, _Rows]:
    batch = video.shape[0]
    index = group = None
    if groups is not None or kind == "sigmoid" or batch % _tile_count(batch):
        first = jax.lax.axis_index(axes) * batch if axes else 0
        index = _tiles(first + jnp.arange(batch, dtype=jnp.int32), fill=-1)
        group = None if groups is None else _tiles(groups)
    return _Rows(_tiles(video), index, group), _Rows(_tiles(text), index, group)


def _scores(video: _Rows, text: _Rows, scale: Array, bias: Array) -> tuple[Array, Array, Array | None]:
    """Products and scores of one tile [r, c], and which pairs count (None: all)."""
    wide = jnp.promote_types(video.embeddings.dtype, jnp.float32)
    products = jnp.einsum(
        "re,ce->rc",
        video.embeddings,
        text.embeddings,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=wide,
    )
    counts = None
    if video.place is not None and text.place is not None:
        counts = (video.place >= 0)[:, None] & (text.place >= 0)[None, :]
        if video.group is not None and text.group is not None:
            counts &= (video.group[:, None] != text.group[None, :]) | (video.place[:, None] == text.place[None, :])
    return products, scale * products + bias, counts


def _ring(body: Any, carry: Any, visitors: Any, axes: tuple[str, ...]) -> tuple[Any, Any]:
    """carry, visitors = body(carry, visitors) once for each device's visitors, which end where they began."""
    if not axes:
        return body(carry, visitors)
    size = jax.lax.axis_size(axes)
    forward = [(i, (i + 1) % size) for i in range(size)]

    def step(state: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        carry, visitors = body(*state)
        return (carry, jax.tree.map(lambda x: jax.lax.ppermute(x, axes, forward), visitors)), None

    return jax.lax.scan(step, (carry, visitors), None, length=size)[0]


def _fresh(x: Array, axes: tuple[str, ...]) -> Array:
    """Marks a constant as differing from device to device, as what is accumulated in it will."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _global_size(batch: int, axes: tuple[str, ...]) -> int:
    return batch * jax.lax.axis_size(axes) if axes else batch


def _statistics(
    video: _Rows, text: _Rows, scale: Array, bias: Array, kind: str, axes: tuple[str, ...]
) -> tuple[Array, Array]:
    """One pass over all tiles. softmax: log-sum-exp by row and by column; sigmoid: loss by row, and nothing by column.

    Both are [tiles, rows]; those by column are of the text rows that are here.
    """
    shape, wide = video.embeddings.shape[:2], scale.dtype
    start = _fresh(jnp.full(shape, MASKED, wide), axes)
    zero = _fresh(jnp.zeros(shape, wide), axes)

    def add(top: Array, total: Array, scores: Array, axis: int) -> tuple[Array, Array]:
        new = jnp.maximum(top, jnp.max(scores, axis=axis))
        shifted = jnp.exp(scores - jnp.expand_dims(new, axis))
        return new, total * jnp.exp(top - new) + jnp.sum(shifted, axis=axis)

    def softmax_tile(row: tuple[_Rows, Array, Array], column: tuple[_Rows, Array, Array]) -> tuple[Any, Any]:
        rows, row_top, row_total = row
        columns, column_top, column_total = column
        _, scores, counts = _scores(rows, columns, scale, bias)
        if counts is not None:
            scores = jnp.where(counts, scores, MASKED)
        return (rows, *add(row_top, row_total, scores, 1)), (columns, *add(column_top, column_total, scores, 0))

    def sigmoid_tile(row: tuple[_Rows, Array], column: tuple[_Rows]) -> tuple[Any, Any]:
        rows, loss = row
        (columns,) = column
        _, scores, counts = _scores(rows, columns, scale, bias)
        assert counts is not None  # sigmoid always has places
        assert rows.place is not None
        assert columns.place is not None
        positive = rows.place[:, None] == columns.place[None, :]
        terms = jnp.where(counts, jax.nn.softplus(jnp.where(positive, -scores, scores)), 0)
        return (rows, loss + jnp.sum(terms, axis=1)), column

    tile: Any
    rows: Any
    columns: Any
    if kind == "softmax":
        tile, rows, columns = softmax_tile, (video, start, zero), (text, start, zero)
    else:
        tile, rows, columns = sigmoid_tile, (video, zero), (text,)

    def block(rows: Any, columns: Any) -> tuple[Any, Any]:
        def over_rows(columns: Any, row: Any) -> tuple[Any, Any]:
            row, columns = jax.lax.scan(tile, row, columns)
            return columns, row

        columns, rows = jax.lax.scan(over_rows, columns, rows)
        return rows, columns

    rows, columns = _ring(block, rows, columns, axes)
    if kind == "sigmoid":
        return rows[1], zero
    return rows[1] + jnp.log(rows[2]), columns[1] + jnp.log(columns[2])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _loss(
    video: Array, text: Array, scale: Array, bias: Array, groups: Array | None, kind: str, axes: tuple[str, ...]
) -> Array:
    return _forward(video, text, scale, bias, groups, kind, axes)[0]


def _forward(
    video: Array, text: Array, scale: Array, bias: Array, groups: Array | None, kind: str, axes: tuple[str, ...]
) -> tuple[Array, Any]:
    batch, wide = video.shape[0], scale.dtype
    rows, columns = _statistics(*_sides(video, text, groups, kind, axes), scale, bias, kind, axes)
    losses = _untile(rows, batch)
    if kind == "softmax":
        positives = scale * jnp.sum(video.astype(wide) * text.astype(wide), axis=1)
        losses = (losses + _untile(columns, batch)) / 2 - positives
    loss = jnp.sum(losses) / _global_size(batch, axes)
    # A masked or saturated term could hide a broken number: none of them passes for a loss.
    checked = jnp.sum(video.astype(wide)) + jnp.sum(text.astype(wide)) + scale + bias
    loss = jnp.where(jnp.isfinite(checked), loss, jnp.nan)
    if axes:
        loss = jax.lax.psum(loss, axes)
    return loss, (video, text, scale, bias, groups, rows, columns)


def _backward(kind: str, axes: tuple[str, ...], saved: Any, gradient: Array) -> tuple[Any, ...]:
    video, text, scale, bias, groups, row_statistics, column_statistics = saved
    batch, wide = video.shape[0], scale.dtype
    unit = gradient / _global_size(batch, axes)
    rows, columns = _sides(video, text, groups, kind, axes)

    def tile(state: Any, column: Any) -> tuple[Any, Any]:
        row, row_statistic, d_row, d_scale, d_bias = state
        column, column_statistic, d_column = column
        products, scores, counts = _scores(row, column, scale, bias)
        if kind == "softmax":
            # The -1 at the true pairs is added after all tiles.
            d_scores = jnp.exp(scores - row_statistic[:, None]) + jnp.exp(scores - column_statistic[None, :])
            d_scores = d_scores * (unit / 2)
        else:
            positive = row.place[:, None] == column.place[None, :]
            d_scores = unit * jnp.where(positive, -jax.nn.sigmoid(-scores), jax.nn.sigmoid(scores))
        if counts is not None:
            d_scores = jnp.where(counts, d_scores, 0)
        product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        d_row = d_row + scale * product("rc,ce->re", d_scores, column.embeddings.astype(wide))
        d_column = d_column + scale * product("rc,re->ce", d_scores, row.embeddings.astype(wide))
        d_scale = d_scale + jnp.sum(d_scores * products)
        d_bias = d_bias + jnp.sum(d_scores)
        return (row, row_statistic, d_row, d_scale, d_bias), (column, column_statistic, d_column)

    def block(carry: Any, columns: Any) -> tuple[Any, Any]:
        rows, d_rows, d_scale, d_bias = carry

        def over_rows(state: Any, row: Any) -> tuple[Any, Any]:
            columns, d_scale, d_bias = state
            (_, _, d_row, d_scale, d_bias), columns = jax.lax.scan(tile, (*row, d_scale, d_bias), columns)
            return (columns, d_scale, d_bias), d_row

        (columns, d_scale, d_bias), d_rows = jax.lax.scan(
            over_rows, (columns, d_scale, d_bias), (rows, row_statistics, d_rows)
        )
        return (rows, d_rows, d_scale, d_bias), columns

    zero = _fresh(jnp.zeros((), wide), axes)
    zeros = _fresh(jnp.zeros(rows.embeddings.shape, wide), axes)
    carry, visitors = _ring(block, (rows, zeros, zero, zero), (columns, column_statistics, zeros), axes)
    _, d_video, d_scale, d_bias = carry
    d_video, d_text = _untile(d_video, batch), _untile(visitors[2], batch)
    if kind == "softmax":
        d_video = d_video - unit * scale * text.astype(wide)
        d_text = d_text - unit * scale * video.astype(wide)
        d_scale = d_scale - unit * jnp.sum(video.astype(wide) * text.astype(wide))
        d_bias = jnp.zeros_like(d_bias)
    if axes:
        d_scale, d_bias = jax.lax.psum((d_scale, d_bias), axes)
    return d_video.astype(video.dtype), d_text.astype(text.dtype), d_scale, d_bias, None


_loss.defvjp(_forward, _backward)
