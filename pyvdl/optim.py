"""Learning-rate schedules and optimizers, put together from Optax parts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from pyvdl.config import OptimConfig

_MIN_FACTORED_DIM = 32  # big_vision's; Optax would factor only from 128
_NOT_DECAYED = frozenset({"bias", "scale"})  # of layers; stacked over depth they have two axes as matrices do


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Returns step (0 the first) -> learning rate: linear warm-up to the peak, then the decay of `config.schedule`.

    The first step already moves (peak / warmup_steps, not 0) and step `warmup_steps - 1` has the peak. "inverse_sqrt"
    is peak * sqrt(warmup_steps / (step + 1)); "cosine" would reach 0 at step `total_steps`, the one after the last.
    """
    warmup, peak = config.warmup_steps, config.peak_learning_rate
    after: optax.Schedule
    match config.schedule:
        case "inverse_sqrt":
            timescale = max(1, warmup)
            after = lambda step: peak * jnp.sqrt(timescale / (timescale + jnp.asarray(step)))  # noqa: E731
        case "cosine":
            if total_steps <= warmup:
                raise ValueError(f"warmup_steps={warmup}: the cosine schedule needs fewer than the {total_steps} steps")
            after = optax.cosine_decay_schedule(peak, total_steps - max(0, warmup - 1))
        case "constant":
            after = optax.constant_schedule(peak)
        case unknown:
            raise ValueError(f"schedule={unknown!r}: expected 'inverse_sqrt', 'cosine' or 'constant'")
    if warmup == 0:
        return after
    ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    # `after` begins one step past the peak, so that the peak itself stands once.
    return optax.join_schedules([ramp, lambda step: after(step + 1)], [warmup])


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """Returns clipping of the global gradient norm, the optimizer's scaling, decoupled weight decay, learning rate.

    "adafactor": factored second moments with decay min(b2, 1 - t**-decay_exponent), no parameter scale, no clipping of
    single updates, bfloat16 momentum when b1 > 0: the recipe of big_vision, which `optax.adafactor` is not. "adamw": b1
    and b2. "sgd": b1 is the momentum. Weight decay is multiplied by the learning rate and touches matrices only: not
    biases, not normalisation scales, not anything of fewer than two axes.
    """
    parts: list[optax.GradientTransformation] = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    match config.name:
        case "adafactor":
            parts.append(_factored_rms(config))
            if config.b1:
                parts.append(optax.ema(config.b1, debias=False, accumulator_dtype=jnp.bfloat16))
        case "adamw":
            parts.append(optax.scale_by_adam(config.b1, config.b2))
        case "sgd":
            if config.b1:
                parts.append(optax.trace(config.b1))
        case unknown:
            raise ValueError(f"name={unknown!r}: expected 'adafactor', 'adamw' or 'sgd'")
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_decayed))
    parts.append(optax.scale_by_learning_rate(make_schedule(config, total_steps)))
    return optax.chain(*parts)


def _factored_rms(config: OptimConfig) -> optax.GradientTransformation:
    def decay(step: jax.typing.ArrayLike, exponent: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(step, jnp.float32) + 1.0
        return jnp.minimum(config.b2, 1.0 - jnp.power(count, -jnp.asarray(exponent)))

    return optax.scale_by_factored_rms(
        decay_rate=config.decay_exponent, min_dim_size_to_factor=_MIN_FACTORED_DIM, decay_rate_fn=decay
    )


def _decayed(params: Any) -> Any:
    """Returns a tree of booleans: which parameters are matrices."""

    def is_matrix(path: tuple[Any, ...], value: Any) -> bool:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return value.ndim >= 2 and not _NOT_DECAYED.intersection(names[-2:])

    return jax.tree_util.tree_map_with_path(is_matrix, params)
