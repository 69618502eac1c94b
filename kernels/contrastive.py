"""Contrastive loss of paired video and text embeddings: argument checks, dispatch, derivative, XLA tiles.

Both implementations walk the score matrix in tiles, forward and backward, and never store it whole. Across devices the
text rows go around a ring, together with what is summed up for them: a device holds its own rows and one visiting
block, however many devices there are. The ring is in `contrastive_ring.py`, the tiles for
TPU are in `contrastive_tpu.py`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from . import contrastive_ring, contrastive_tpu, reference

KINDS = ("softmax", "sigmoid")
IMPLEMENTATIONS = ("pallas_tpu", "xla", "reference")
ELSEWHERE = ("pallas_gpu", "cudnn")  # implementations of other ops
TILE = 1024  # rows and columns of a tile at most: 4 MiB of float32 scores
CUDA_TILE = 8192  # a GPU is filled by large products only: these take a third of the time of tiles of 1024
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
        implementation: "pallas_tpu" (bfloat16 and float32), "xla" or "reference"; None takes the kernels for TPU where
            the program is lowered for one, and "xla" elsewhere.

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
    groups = None if groups is None else jnp.asarray(groups)
    if groups is not None and (groups.shape != video.shape[:1] or not jnp.issubdtype(groups.dtype, jnp.integer)):
        raise ValueError(f"groups must be int32[{video.shape[0]}], not {groups.dtype}{groups.shape}")
    wide = jnp.promote_types(video.dtype, jnp.float32)
    scale = jnp.asarray(scale, wide)
    bias = jnp.asarray(0 if bias is None else bias, wide)
    for name, x in (("scale", scale), ("bias", bias)):
        if x.shape != ():
            raise ValueError(f"{name} must be a number or a scalar array, not of shape {x.shape}")
    _check_implementation(implementation, video, text)
    if implementation == "reference":
        if axis_name is not None:
            raise NotImplementedError("implementation 'reference' takes all rows on one device: axis_name must be None")
        return reference.contrastive_loss(video, text, scale, bias, kind=kind, groups=groups)
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    if implementation is None and not _for_tpu(video, text):
        implementation = "xla"
    return _loss(video, text, scale, bias, groups, kind, axes, implementation)


def _for_tpu(video: Array, text: Array) -> bool:
    return all(str(x.dtype) in contrastive_tpu.DTYPES for x in (video, text))


def _check_implementation(implementation: str | None, video: Array, text: Array) -> None:
    if implementation in ELSEWHERE:
        raise NotImplementedError(
            f"implementation {implementation!r} has no contrastive loss; it must be None or one of {IMPLEMENTATIONS}"
        )
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation must be None or one of {IMPLEMENTATIONS}, not {implementation!r}")
    if implementation == "pallas_tpu" and not _for_tpu(video, text):
        raise NotImplementedError(
            f"implementation 'pallas_tpu' takes embeddings of {contrastive_tpu.DTYPES}, not {video.dtype}, {text.dtype}"
        )


# --- value and derivative


def _choose(implementation: str | None, for_tpu: Any, by_xla: Any, *arguments: Any) -> Any:
    """The platform is that of lowering, not of this process: a program may be compiled for a TPU that is not here."""
    if implementation == "pallas_tpu":
        return for_tpu(*arguments)
    branches = {"default": functools.partial(by_xla, tile_rows=TILE)}
    if arguments[0].shape[0] > TILE:
        branches["cuda"] = functools.partial(by_xla, tile_rows=min(CUDA_TILE, -(-arguments[0].shape[0] // 2)))
    if implementation is None:
        branches["tpu"] = for_tpu
    if len(branches) == 1:
        return branches["default"](*arguments)
    return jax.lax.platform_dependent(*arguments, **branches)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _loss(
    video: Array,
    text: Array,
    scale: Array,
    bias: Array,
    groups: Array | None,
    kind: str,
    axes: tuple[str, ...],
    implementation: str | None,
) -> Array:
    if kind == "softmax":
        return _forward(video, text, scale, bias, groups, kind, axes, implementation)[0]
    losses, _ = _choose(
        implementation,
        functools.partial(contrastive_ring.statistics, kind=kind, axes=axes),
        functools.partial(_xla_statistics, kind=kind, axes=axes),
        *(video, text, scale, bias, groups),
    )
    return _total(losses, video, text, scale, bias, axes)


def _total(losses: Array, video: Array, text: Array, scale: Array, bias: Array, axes: tuple[str, ...]) -> Array:
    """Mean of the losses of all rows."""
    wide = scale.dtype
    loss = jnp.sum(losses) / _global_size(video.shape[0], axes)
    # A masked or saturated term could hide a broken number: none of them passes for a loss.
    checked = jnp.sum(video.astype(wide)) + jnp.sum(text.astype(wide)) + scale + bias
    loss = jnp.where(jnp.isfinite(checked), loss, jnp.nan)
    return jax.lax.psum(loss, axes) if axes else loss


def _forward(
    video: Array,
    text: Array,
    scale: Array,
    bias: Array,
    groups: Array | None,
    kind: str,
    axes: tuple[str, ...],
    implementation: str | None,
) -> tuple[Array, Any]:
    arguments = (video, text, scale, bias, groups)
    if kind == "softmax":
        rows, columns = _choose(
            implementation,
            functools.partial(contrastive_ring.statistics, kind=kind, axes=axes),
            functools.partial(_xla_statistics, kind=kind, axes=axes),
            *arguments,
        )
        losses = (rows + columns) / 2 - scale * contrastive_ring.products(video, text)
        return _total(losses, video, text, scale, bias, axes), (*arguments, rows, columns)
    # The derivative of a score is known from the score alone: value and gradients take one pass.
    d_video, d_text, losses, d_bias = _choose(
        implementation,
        functools.partial(contrastive_ring.gradients, kind=kind, axes=axes),
        functools.partial(_xla_gradients, kind=kind, axes=axes),
        *(*arguments, None, None),
    )
    saved = *arguments, (d_video, d_text), d_bias
    return _total(losses, video, text, scale, bias, axes), saved


def _backward(
    kind: str, axes: tuple[str, ...], implementation: str | None, saved: Any, gradient: Array
) -> tuple[Any, ...]:
    video, text, scale, bias, groups, first, second = saved
    unit = gradient / _global_size(video.shape[0], axes)
    if kind == "softmax":
        unit = unit / 2
        d_video, d_text, _, d_bias = _choose(
            implementation,
            functools.partial(contrastive_ring.gradients, kind=kind, axes=axes),
            functools.partial(_xla_gradients, kind=kind, axes=axes),
            *(video, text, scale, bias, groups, first, second),
        )
    else:
        (d_video, d_text), d_bias = first, second
    d_scale = jnp.sum(d_video * video.astype(d_video.dtype))
    if axes:
        d_scale, d_bias = jax.lax.psum((d_scale, d_bias), axes)
    factor = unit * scale
    return (
        (factor * d_video).astype(video.dtype),
        (factor * d_text).astype(text.dtype),
        unit * d_scale,
        unit * d_bias,
        None,
    )


_loss.defvjp(_forward, _backward)


def _global_size(batch: int, axes: tuple[str, ...]) -> int:
    return batch * jax.lax.axis_size(axes) if axes else batch


# --- XLA


class _Rows(NamedTuple):
    """Rows of one side cut into tiles; leading axes [tiles, rows of a tile]."""

    embeddings: Array  # [..., E]
    place: Array  # int32 in the global batch, -1 for padding
    group: Array | None  # int32


def _over_tiles(
    tile: Any, own: _Rows, visitors: _Rows, of_rows: Any, of_columns: Any, axes: tuple[str, ...]
) -> tuple[Any, Any]:
    """of_row, of_column = tile(row, column, of_row, of_column) for the device's own rows with all devices' visitors."""

    def step(of_rows: Any, _: int, columns: _Rows, of_columns: Any, home: Any) -> tuple[Any, Any]:
        def over_rows(of_columns: Any, rows: Any) -> tuple[Any, Any]:
            row, of_row = rows

            def over_columns(of_row: Any, columns: Any) -> tuple[Any, Any]:
                return tile(row, columns[0], of_row, columns[1])

            of_row, of_columns = jax.lax.scan(over_columns, of_row, (columns, of_columns))
            return of_columns, of_row

        of_columns, of_rows = jax.lax.scan(over_rows, of_columns, (own, of_rows))
        return of_rows, of_columns

    of_rows, (of_columns,) = contrastive_ring.around(step, of_rows, [(visitors, of_columns)], axes)
    return of_rows, of_columns


def _tiles(x: Array, tile_rows: int, fill: int = 0) -> Array:
    """[B, ...] -> [tiles, rows, ...], padded with `fill`; rows are tile_rows at most."""
    count = -(-x.shape[0] // tile_rows)
    rows = -(-x.shape[0] // count)
    x = jnp.pad(x, [(0, count * rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
    return x.reshape(count, rows, *x.shape[1:])


def _untile(x: Array, rows: int) -> Array:
    return x.reshape(-1, *x.shape[2:])[:rows]


def _sides(
    video: Array, text: Array, groups: Array | None, axes: tuple[str, ...], tile_rows: int
) -> tuple[_Rows, _Rows]:
    batch = video.shape[0]
    first = jax.lax.axis_index(axes) * batch if axes else 0
    index = _tiles(first + jnp.arange(batch, dtype=jnp.int32), tile_rows, fill=-1)
    group = None if groups is None else _tiles(groups, tile_rows)
    return _Rows(_tiles(video, tile_rows), index, group), _Rows(_tiles(text, tile_rows), index, group)


def _sigmoid_terms(video: _Rows, text: _Rows, scale: Array, bias: Array) -> tuple[Array, Array]:
    """Losses of one tile [r, c] and their derivative by the score."""
    scores, positive, counts = _scores(video, text, scale, bias)
    sign = jnp.where(positive, -1, 1).astype(scores.dtype)
    losses, slope = jax.nn.softplus(sign * scores), sign * jax.nn.sigmoid(sign * scores)
    return jnp.where(counts, losses, 0), jnp.where(counts, slope, 0)


def _scores(video: _Rows, text: _Rows, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
    """Scores of one tile [r, c], which pairs are true ones, and which count."""
    wide = jnp.promote_types(video.embeddings.dtype, jnp.float32)
    products = jnp.einsum(
        "re,ce->rc",
        video.embeddings,
        text.embeddings,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=wide,
    )
    positive = video.place[:, None] == text.place[None, :]
    counts = (video.place >= 0)[:, None] & (text.place >= 0)[None, :]
    if video.group is not None and text.group is not None:
        counts &= (video.group[:, None] != text.group[None, :]) | positive
    return scale * products + bias, positive, counts


def _xla_statistics(
    video: Array,
    text: Array,
    scale: Array,
    bias: Array,
    groups: Array | None,
    kind: str,
    axes: tuple[str, ...],
    tile_rows: int,
) -> tuple[Array, Array]:
    """One pass over all tiles. softmax: log-sum-exp by row and by column; sigmoid: loss by row, and nothing by column.

    Both are [B]; those by column are of the text rows that are here.
    """
    batch, wide = video.shape[0], scale.dtype
    own, visitors = _sides(video, text, groups, axes, tile_rows)
    shape = own.embeddings.shape[:2]

    def add(state: tuple[Array, Array], scores: Array, axis: int) -> tuple[Array, Array]:
        top, total = state
        new = jnp.maximum(top, jnp.max(scores, axis=axis))
        shifted = jnp.exp(scores - jnp.expand_dims(new, axis))
        return new, total * jnp.exp(top - new) + jnp.sum(shifted, axis=axis)

    def softmax_tile(row: _Rows, column: _Rows, of_row: Any, of_column: Any) -> tuple[Any, Any]:
        scores, _, counts = _scores(row, column, scale, bias)
        scores = jnp.where(counts, scores, MASKED)
        return add(of_row, scores, 1), add(of_column, scores, 0)

    def sigmoid_tile(row: _Rows, column: _Rows, loss: Array, nothing: tuple[()]) -> tuple[Any, Any]:
        return loss + jnp.sum(_sigmoid_terms(row, column, scale, bias)[0], axis=1), nothing

    zero = contrastive_ring.fresh(jnp.zeros(shape, wide), axes)
    if kind == "sigmoid":
        losses, _ = _over_tiles(sigmoid_tile, own, visitors, zero, (), axes)
        return _untile(losses, batch), jnp.zeros(batch, wide)
    start = contrastive_ring.fresh(jnp.full(shape, MASKED, wide), axes), zero
    rows, columns = _over_tiles(softmax_tile, own, visitors, start, start, axes)
    return _untile(rows[0] + jnp.log(rows[1]), batch), _untile(columns[0] + jnp.log(columns[1]), batch)


def _xla_gradients(
    video: Array,
    text: Array,
    scale: Array,
    bias: Array,
    groups: Array | None,
    row_lse: Array | None,
    column_lse: Array | None,
    kind: str,
    axes: tuple[str, ...],
    tile_rows: int,
) -> tuple[Array, Array, Array, Array]:
    """P @ text and P.T @ video, with P the derivative of the sum of losses by the scores, and for "sigmoid" the loss.

    Returns:
        wide[B, E] twice, then the sums of losses and of P, wide[]; for "softmax" nothing is in these two.
    """
    batch, wide = video.shape[0], scale.dtype
    own, visitors = _sides(video, text, groups, axes, tile_rows)

    def tile(row: _Rows, column: _Rows, of_row: Any, of_column: Any) -> tuple[Any, Any]:
        d_row, lse, loss, d_bias = of_row
        d_column, other_lse = of_column
        if kind == "softmax":
            scores, positive, counts = _scores(row, column, scale, bias)
            p = jnp.exp(scores - lse[:, None]) + jnp.exp(scores - other_lse[None, :])
            # The true pair's part belongs in here: P is close to 2 there, and only what is left counts.
            p = jnp.where(counts, jnp.where(positive, p - 2, p), 0)
        else:
            losses, p = _sigmoid_terms(row, column, scale, bias)
            loss, d_bias = loss + jnp.sum(losses, axis=1), d_bias + jnp.sum(p, axis=1)
        p = p.astype(row.embeddings.dtype)
        product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide)
        d_row = d_row + product("rc,ce->re", p, column.embeddings)
        d_column = d_column + product("rc,re->ce", p, row.embeddings)
        return (d_row, lse, loss, d_bias), (d_column, other_lse)

    shape = own.embeddings.shape
    zeros, zero = contrastive_ring.fresh((jnp.zeros(shape, wide), jnp.zeros(shape[:2], wide)), axes)
    lse, other_lse = (zero if x is None else _tiles(x, tile_rows) for x in (row_lse, column_lse))
    rows, columns = _over_tiles(tile, own, visitors, (zeros, lse, zero, zero), (zeros, other_lse), axes)
    d_video, d_text = _untile(rows[0], batch), _untile(columns[0], batch)
    return d_video, d_text, jnp.sum(rows[2]), jnp.sum(rows[3])
