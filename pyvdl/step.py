"""One training step on a mesh: the gradient of a loss, of the batch at once or in parts, and the optimizer's update.

A batch larger than what fits goes through the model in `accumulate` parts, and the step is that of the whole batch.
Where the loss is a mean over rows or tokens, gradients of the parts add up. A contrastive loss compares all rows with
all others: there the embeddings of all parts are computed first, the loss and its gradients by the embeddings next, and
then each part goes through the model again with those (the cached gradients of arXiv 2101.06983).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from pyvdl.config import TrainConfig
from pyvdl.models.layers import Stack
from pyvdl.optim import make_optimizer
from pyvdl.sharding import optimizer_shardings, place, put, replicated, split_rows, tree_shardings

Batch = dict[str, Array]
Scalars = dict[str, Array]
LossFunction = Callable[[Any, Batch], tuple[Array, Scalars]]
# The scalar of a loss that tells how much of a larger batch's means it and its other scalars are; without it, its rows.
WEIGHT = "weight"
FAILED_SHARE = "failed_share"  # the scalar that is a mean over rows, whatever the weight
FINITE = "finite"  # the scalar of a step that says whether the state moved on


@dataclasses.dataclass(frozen=True)
class PairedLoss:
    """A loss of a whole batch's embeddings: `of(embed(model, batch), batch)`.

    embed: -> (rows, numbers): trees of arrays with one row for each of the batch, and of what does not depend on it.
    """

    embed: Callable[[Any, Batch], tuple[Any, Any]]
    of: Callable[[Any, Any, Batch], tuple[Array, Scalars]]

    def __call__(self, model: Any, batch: Batch) -> tuple[Array, Scalars]:
        return self.of(*self.embed(model, batch), batch)


class State(NamedTuple):
    """What a step changes, and the parameters that it does not."""

    params: Any
    opt_state: Any
    rest: Any  # what of the model is not a parameter
    frozen: Any


def split(model: nnx.Module, prefixes: tuple[str, ...]) -> tuple[Any, Any, Any, Any]:
    """Returns graph, parameters below `prefixes`, other parameters, other state; every prefix must name a parameter."""
    wanted = [tuple(filter(None, prefix.split("/"))) for prefix in prefixes]
    paths = [tuple(map(str, path)) for path in nnx.to_flat_state(nnx.state(model, nnx.Param)).paths]
    for prefix, parts in zip(prefixes, wanted):
        if not any(path[: len(parts)] == parts for path in paths):
            raise ValueError(f"trainable={prefix!r} names no parameter; the model has {sorted({p[0] for p in paths})}")

    def accepts(path: tuple[Any, ...], value: Any) -> bool:
        names = tuple(map(str, path))
        return isinstance(value, nnx.Param) and any(names[: len(parts)] == parts for parts in wanted)

    graph, params, frozen, rest = nnx.split(model, accepts, nnx.Param, ...)  # type: ignore[misc]
    return graph, params, frozen, rest


def shardings(state: State, mesh: Mesh) -> State:
    """Where the arrays of a state (or their shapes) stand."""
    return State(
        params=tree_shardings(state.params, mesh),
        opt_state=optimizer_shardings(state.opt_state, state.params, mesh),
        rest=jax.tree.map(lambda _: replicated(mesh), state.rest),
        frozen=tree_shardings(state.frozen, mesh),
    )


def shapes(model: nnx.Module, config: TrainConfig) -> State:
    """Shapes and types of the state that a training of `model` begins with."""
    _, params, frozen, rest = split(model, config.trainable)
    params, frozen = (
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, config.param_dtype), tree) for tree in (params, frozen)
    )
    rest = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rest)
    return State(params, jax.eval_shape(_optimizer_begin(config), params), rest, frozen)


def placed(state: State, mesh: Mesh) -> State:
    """The same shapes and types with their shardings."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, shardings(state, mesh)
    )


def create[M: nnx.Module](make: Callable[[], M], mesh: Mesh, dtype: str = "float32") -> M:
    """The model that `make` returns, its parameters as `dtype`: each device makes its own part of them and no other.

    Random numbers are those of `make()`, whatever the mesh.
    """

    def state() -> Any:
        made = nnx.state(make())
        return jax.tree.map(
            lambda x: x.replace(x.get_value().astype(dtype)) if isinstance(x, nnx.Param) else x,
            made,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )

    graph, known = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, jax.jit(state, out_shardings=tree_shardings(known, mesh))())


def begin(model: nnx.Module, config: TrainConfig, mesh: Mesh) -> State:
    """The state before the first step, whose arrays are those of `model` from then on.

    They are moved one after the other, so that there is never much more than one model. What a step donates are copies,
    also of what stands right already: others may hold the arrays that the model had.
    """
    _, params, frozen, rest = split(model, config.trainable)
    of = place(mesh)
    for tree, donated in ((params, True), (rest, True), (frozen, False)):
        for path, variable in nnx.to_flat_state(tree):
            x = variable.get_value()
            if isinstance(variable, nnx.Param):
                x = x.astype(config.param_dtype)
            x = put(x, of(".".join(map(str, path)), x.shape), copy=donated)
            variable.set_value(x.block_until_ready())
    init = _optimizer_begin(config)
    wanted = optimizer_shardings(jax.eval_shape(init, params), params, mesh)
    return State(params, jax.jit(init, out_shardings=wanted)(params), rest, frozen)


def _optimizer_begin(config: TrainConfig) -> Callable[[Any], Any]:
    """params -> the optimizer's state, as for float32 ones: a moment in bfloat16 that loses 0.1% loses nothing."""
    optimizer = make_optimizer(config.optim, config.steps)
    return lambda params: optimizer.init(_float32(params))


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def make_step(
    graph: Any, loss_fn: LossFunction, config: TrainConfig, mesh: Mesh
) -> Callable[..., tuple[Any, Any, Any, Scalars]]:
    """-> step(params, opt_state, rest, frozen, batch, going) -> the first three after it, and scalars; not compiled.

    A step whose loss or gradient is not finite leaves the state as it was. So do those after it, unless skip_nonfinite:
    `going` is the scalar FINITE of the step before, True for the first.

    To be traced under `jax.set_mesh(mesh)`. Of `config` it reads optim, steps, accumulate, unroll and skip_nonfinite.
    """
    accumulate = config.accumulate
    optimizer = make_optimizer(config.optim, config.steps)
    on_gpu = mesh.devices.flat[0].platform == "gpu"

    def step(
        params: Any, opt_state: Any, rest: Any, frozen: Any, batch: Batch, going: Array | bool = True
    ) -> tuple[Any, Any, Any, Scalars]:
        def model_of(params: Any) -> Any:
            model = nnx.merge(graph, params, frozen, rest, copy=True)  # variables of this trace
            model.set_attributes(Stack, unroll=config.unroll, on_gpu=on_gpu, raise_if_not_found=False)
            return model

        if accumulate > 1 and jax.tree.leaves(rest):
            raise ValueError(
                f"accumulate={accumulate}: a model with state beside its parameters takes whole batches only"
            )
        if accumulate == 1:
            (loss, (scalars, new_rest)), gradients = jax.value_and_grad(
                functools.partial(_objective, model_of, loss_fn), has_aux=True
            )(params, batch)
        elif isinstance(loss_fn, PairedLoss):
            new_rest = rest
            loss, scalars, gradients = _cached(model_of, loss_fn, params, batch, accumulate)
        else:
            new_rest = rest
            loss, scalars, gradients = _summed(model_of, loss_fn, params, batch, accumulate)
        gradients = _float32(gradients)  # a norm in bfloat16 stops growing at 16
        updates, new_opt_state = optimizer.update(gradients, opt_state, _float32(params))
        scalars = {**scalars, "loss": loss, "grad_norm": optax.tree.norm(gradients)}
        scalars.pop(WEIGHT, None)
        after = State(optax.apply_updates(params, updates), new_opt_state, new_rest, frozen)
        good = jnp.isfinite(loss) & jnp.isfinite(scalars["grad_norm"])
        if not config.skip_nonfinite:
            good &= going
        scalars[FINITE] = jax.lax.with_sharding_constraint(good, replicated(mesh))
        before = State(params, opt_state, rest, frozen)
        after = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)
        wanted = shardings(after, mesh)
        params, opt_state, new_rest = (
            jax.lax.with_sharding_constraint(getattr(after, name), getattr(wanted, name))
            for name in ("params", "opt_state", "rest")
        )
        return params, opt_state, new_rest, scalars

    return step


def _objective(
    model_of: Callable[[Any], Any], loss_fn: LossFunction, params: Any, batch: Batch
) -> tuple[Array, tuple[Scalars, Any]]:
    model = model_of(params)
    loss, scalars = loss_fn(model, batch)
    return loss, (scalars, nnx.state(model, nnx.Not(nnx.Param)))


def _parts(batch: Any, count: int) -> Any:
    """[B, ...] -> [count, B / count, ...]; part i has rows i, i + count, ..., so that each device keeps its own."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def _whole(parts: Any) -> Any:
    """What `_parts` took apart."""
    return jax.tree.map(lambda x: split_rows(x.swapaxes(0, 1).reshape(-1, *x.shape[2:])), parts)


def _summed(
    model_of: Callable[[Any], Any], loss_fn: LossFunction, params: Any, batch: Batch, count: int
) -> tuple[Array, Scalars, Any]:
    """Loss and gradient of the whole batch, by parts: means weighted by the losses' WEIGHT, its scalars too."""

    def gradient(batch: Batch) -> tuple[Array, Scalars, Array, Any]:
        objective = functools.partial(_objective, model_of, loss_fn)
        (loss, (scalars, _)), gradients = jax.value_and_grad(objective, has_aux=True)(params, batch)
        weight = scalars.pop(WEIGHT, jnp.float32(1))
        scalars = {name: x if name == FAILED_SHARE else x * weight for name, x in scalars.items()}
        return loss * weight, scalars, weight, jax.tree.map(lambda g: (g * weight).astype(jnp.float32), gradients)

    def part(total: Any, batch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(batch)), None

    parts = _parts(batch, count)
    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (loss, scalars, weight, gradients), _ = jax.lax.scan(part, zeros, parts)
    weight = jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)  # a batch without any token teaches nothing
    gradients = jax.tree.map(lambda g: g / weight, gradients)
    scalars = {name: x / (count if name == FAILED_SHARE else weight) for name, x in scalars.items()}
    return loss / weight, scalars, gradients


def _cached(
    model_of: Callable[[Any], Any], loss_fn: PairedLoss, params: Any, batch: Batch, count: int
) -> tuple[Array, Scalars, Any]:
    """The same of a loss that compares all rows with all others: forward, loss, and forward again with backward."""

    def embed(params: Any, batch: Batch) -> tuple[Any, Any]:
        return loss_fn.embed(model_of(params), batch)

    parts = _parts(batch, count)
    _, (rows, numbers) = jax.lax.scan(lambda _, part: (None, embed(params, part)), None, parts)
    numbers = jax.tree.map(lambda x: x[0], numbers)  # the same of all parts
    (loss, scalars), (of_rows, of_numbers) = jax.value_and_grad(loss_fn.of, argnums=(0, 1), has_aux=True)(
        _whole(rows), numbers, batch
    )
    of_numbers = jax.tree.map(lambda g: g / count, of_numbers)

    def part(total: Any, inputs: Any) -> tuple[Any, None]:
        batch, of_rows = inputs
        _, pull = jax.vjp(lambda params: embed(params, batch), params)
        (gradients,) = pull((of_rows, of_numbers))
        return jax.tree.map(lambda a, g: a + g.astype(jnp.float32), total, gradients), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    gradients, _ = jax.lax.scan(part, zeros, (parts, _parts(of_rows, count)))
    return loss, scalars, gradients
