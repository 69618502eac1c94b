"""Schedules and optimizers against their definitions written out in NumPy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pyvdl.config import OptimConfig
from pyvdl.optim import make_optimizer, make_schedule

PLAIN = OptimConfig(peak_learning_rate=0.1, warmup_steps=0, schedule="constant", clip_norm=None)


def updates(config: OptimConfig, params: Any, gradients: list[Any], total_steps: int = 100) -> list[Any]:
    """Returns the parameter change of each step."""
    optimizer = make_optimizer(config, total_steps)
    state = optimizer.init(params)
    result = []
    for gradient in gradients:
        change, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, change)
        result.append(jax.tree.map(np.asarray, change))
    return result


@pytest.mark.parametrize("name", ["inverse_sqrt", "cosine", "constant"])
def test_warm_up_is_linear_to_the_peak(name: Any) -> None:
    schedule = make_schedule(OptimConfig(peak_learning_rate=2.0, warmup_steps=4, schedule=name), 104)
    np.testing.assert_allclose([schedule(step) for step in range(4)], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    assert float(schedule(4)) <= 2.0


def test_decays() -> None:
    config = OptimConfig(peak_learning_rate=2.0, warmup_steps=4)
    inverse = make_schedule(config, 100)
    np.testing.assert_allclose(
        [inverse(step) for step in (4, 15, 399)], 2 * np.sqrt(4 / np.array([5, 16, 400])), rtol=1e-6
    )
    cosine = make_schedule(dataclasses.replace(config, schedule="cosine"), 104)
    for step in (4, 53, 103):  # from the peak at step 3 to 0 at step 104
        assert float(cosine(step)) == pytest.approx(1 + np.cos(np.pi * (step - 3) / 101), abs=1e-6)
    constant = make_schedule(dataclasses.replace(config, schedule="constant"), 100)
    assert float(constant(99)) == 2.0


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    for name in ("inverse_sqrt", "cosine", "constant"):
        assert float(make_schedule(dataclasses.replace(PLAIN, schedule=name), 10)(0)) == pytest.approx(0.1)


def test_adafactor_is_factored_rms_with_a_capped_decay() -> None:
    """Second moments by row and column with decay min(b2, 1 - t**-0.6); no parameter scale, no momentum."""
    rng = np.random.default_rng(0)
    shape, rate, cap = (40, 64), 0.1, 0.5
    gradients = [rng.normal(size=shape).astype(np.float32) for _ in range(6)]
    params = {"w": jnp.full(shape, 7.0), "b": jnp.zeros(5)}
    small = [rng.normal(size=5).astype(np.float32) for _ in gradients]
    config = dataclasses.replace(PLAIN, b2=cap, decay_exponent=0.6)
    got = updates(config, params, [{"w": w, "b": b} for w, b in zip(gradients, small)], len(gradients))
    rows, columns, plain = np.zeros(40), np.zeros(64), np.zeros(5)
    for t, (gradient, vector, change) in enumerate(zip(gradients, small, got), 1):
        decay = min(cap, 1 - t**-0.6)
        square = gradient.astype(np.float64) ** 2
        rows = decay * rows + (1 - decay) * square.mean(1)
        columns = decay * columns + (1 - decay) * square.mean(0)
        plain = decay * plain + (1 - decay) * vector.astype(np.float64) ** 2
        second = rows[:, None] * columns[None, :] / rows.mean()
        np.testing.assert_allclose(change["w"], -rate * gradient / np.sqrt(second), rtol=2e-5)
        np.testing.assert_allclose(change["b"], -rate * vector / np.sqrt(plain), rtol=2e-5)


def test_adafactor_momentum_is_kept_in_bfloat16() -> None:
    config = dataclasses.replace(PLAIN, b1=0.9)
    params = {"w": jnp.ones((2, 2))}
    state = make_optimizer(config, 10).init(params)
    assert any(leaf.dtype == jnp.bfloat16 and leaf.shape == (2, 2) for leaf in jax.tree.leaves(state))
    assert not any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(make_optimizer(PLAIN, 10).init(params)))
    change = updates(config, params, [{"w": jnp.full((2, 2), 3.0)}])[0]
    np.testing.assert_allclose(change["w"], -0.1 * 0.1, rtol=1e-2)  # a tenth of the sign of the gradient


def test_sgd_momentum() -> None:
    config = dataclasses.replace(PLAIN, name="sgd", b1=0.9)
    got = updates(config, {"w": jnp.zeros(2)}, [{"w": jnp.array([1.0, -2.0])}] * 3)
    np.testing.assert_allclose([change["w"][0] for change in got], [-0.1, -0.19, -0.271], rtol=1e-6)


def test_adamw_decays_matrices_only() -> None:
    config = dataclasses.replace(PLAIN, name="adamw", b1=0.9, weight_decay=0.5)
    params = {
        "dense": {"kernel": jnp.full((3, 4), 2.0), "bias": jnp.full(4, 2.0)},
        "norm": {"scale": jnp.full((6, 4), 2.0)},  # of six layers, stacked
        "stacked": {"bias": jnp.full((6, 4), 2.0)},
        "logit_scale": jnp.array(2.0),
    }
    got = updates(config, params, [jax.tree.map(jnp.zeros_like, params)])[0]
    np.testing.assert_allclose(got["dense"]["kernel"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    for part in (got["dense"]["bias"], got["norm"]["scale"], got["stacked"]["bias"], got["logit_scale"]):
        assert not np.any(part)


def test_adamw_has_moments_of_its_own_rates() -> None:
    config = dataclasses.replace(PLAIN, name="adamw", b1=0.9, b2=0.5)
    got = updates(config, {"w": jnp.zeros(2)}, [{"w": jnp.array([5.0, -0.1])}, {"w": jnp.array([1.0, 0.2])}])
    np.testing.assert_allclose(got[0]["w"], [-0.1, 0.1], rtol=1e-4)  # bias-corrected: the sign of the gradient
    first, second = np.array([5.0, -0.1]), np.array([1.0, 0.2])
    mean = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
    square = (0.5 * 0.5 * first**2 + 0.5 * second**2) / (1 - 0.5**2)
    np.testing.assert_allclose(got[1]["w"], -0.1 * mean / np.sqrt(square), rtol=1e-4)


class Stacked(nnx.Module):
    """Two layers."""

    def __init__(self) -> None:
        self.kernel = nnx.Param(jnp.ones((2, 3, 3)))
        self.bias = nnx.Param(jnp.ones((2, 3)))


def test_biases_of_stacked_layers_do_not_decay() -> None:
    """In the state of a model, where names end otherwise than in a plain tree."""
    params = nnx.state(Stacked(), nnx.Param)
    config = dataclasses.replace(PLAIN, name="adamw", weight_decay=0.5)
    got = updates(config, params, [jax.tree.map(jnp.zeros_like, params)])[0]
    np.testing.assert_allclose(got.kernel[...], -0.1 * 0.5, rtol=1e-6)
    assert not np.any(got.bias[...])


def test_the_global_norm_is_clipped() -> None:
    config = dataclasses.replace(PLAIN, name="sgd", clip_norm=1.0)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    got = updates(config, params, [{"a": jnp.array([3.0]), "b": jnp.array([4.0])}])[0]
    np.testing.assert_allclose([got["a"][0], got["b"][0]], [-0.06, -0.08], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "adam"}, "name='adam'.*'adafactor', 'adamw' or 'sgd'"),
        ({"schedule": "linear"}, "schedule='linear'.*'inverse_sqrt', 'cosine' or 'constant'"),
        ({"schedule": "cosine", "warmup_steps": 10}, "warmup_steps=10.*fewer than the 10 steps"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_optimizer(dataclasses.replace(PLAIN, **change), 10)
