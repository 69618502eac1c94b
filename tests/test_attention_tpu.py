"""Attention's TPU kernels: numbers in the TPU interpreter, and compilation by libtpu at the shapes of real models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from bench.tpu_static import CHIPS
from pyvdl.kernels import attention_xla, reference, space_time_attention, tuning
from pyvdl.plan import compiler_environment

ROOT = Path(__file__).resolve().parents[1]


def interpreter() -> pltpu.InterpretParams:
    """Blocks may reach past an array, there the interpreter reads NaN: what must not matter, shows if it does."""
    return pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="uninitialized")


def inputs(batch: int, tokens: int, heads: int, head_dim: int, dtype: str) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(tokens + head_dim), 4)
    return [jax.random.normal(key, (batch, tokens, heads, head_dim)).astype(dtype) for key in keys]


def attend(implementation: str, class_tokens: int, arrays: list[jax.Array]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The output and the gradients, in float32."""
    frames = 1
    q, k, v, weight = arrays

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        out, pull = jax.vjp(
            lambda *x: space_time_attention(
                *x, frames=frames, class_tokens=class_tokens, implementation=implementation
            ),
            q,
            k,
            v,
        )
        return out, pull(weight)

    if implementation == "pallas_tpu":
        with pltpu.force_tpu_interpret_mode(interpreter()):
            out, gradients = jax.block_until_ready(run(q, k, v))
    else:
        out, gradients = run(q, k, v)
    assert all(x.dtype == q.dtype for x in (out, *gradients))
    return np.asarray(out, np.float32), [np.asarray(x, np.float32) for x in gradients]


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim", "dtype"),
    [
        (2, 257, 2, 64, "float32"),  # the class token alone behind 128-row parts
        (1, 256, 4, 64, "bfloat16"),
        (1, 257, 3, 64, "float32"),  # an odd number of heads: half a tile of lanes is not there
        (1, 200, 2, 64, "float32"),  # masked keys
        (1, 5, 1, 64, "float32"),
        (1, 129, 3, 72, "float32"),
        (1, 257, 3, 88, "bfloat16"),
        (1, 150, 5, 96, "float32"),
        (1, 257, 2, 128, "float32"),
        (1, 130, 1, 256, "bfloat16"),
        (1, 129, 4, 32, "float32"),
    ],
)
def test_kernels_in_the_interpreter(batch: int, tokens: int, heads: int, head_dim: int, dtype: str) -> None:
    arrays = inputs(batch, tokens, heads, head_dim, dtype)
    class_tokens = tokens % 2
    out, gradients = attend("pallas_tpu", class_tokens, arrays)
    wanted, wanted_gradients = attend("reference", class_tokens, [x.astype(jnp.float32) for x in arrays])
    tolerance = 2e-6 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(out, wanted, atol=tolerance)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=tolerance * max(1.0, float(np.abs(want).max())))


@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(257, 3, 72), (300, 2, 64)])
def test_ranges_of_queries(tokens: int, heads: int, head_dim: int) -> None:
    """Long arrays are cut into ranges of queries, one a grid step; here they are short, and so are the ranges."""
    arrays = inputs(2, tokens, heads, head_dim, "float32")
    with tuning.override(cycles=1, queries=128, keys=128):
        out, gradients = attend("pallas_tpu", tokens % 2, arrays)
    wanted, wanted_gradients = attend("reference", tokens % 2, arrays)
    np.testing.assert_allclose(out, wanted, atol=2e-6)
    for got, want in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6 * max(1.0, float(np.abs(want).max())))


@pytest.mark.parametrize("class_tokens", [0, 1])
@pytest.mark.parametrize("mode", ["joint", "space", "time"])
def test_rules_of_xla_share_the_residuals(mode: str, class_tokens: int) -> None:
    arrays = inputs(2, 12 + class_tokens, 2, 8, "float32")
    static = {"frames": 3, "mode": mode, "class_tokens": class_tokens, "scale": 0.3}
    wanted, pull = jax.vjp(lambda *x: reference.space_time_attention(*x, **static), *arrays[:3])
    out, lse = attention_xla.forward(*arrays[:3], **static)
    assert lse.shape == (2, 2, 12 + class_tokens)
    np.testing.assert_allclose(out, wanted, atol=2e-6)
    gradients = attention_xla.backward(*arrays[:3], out, lse, arrays[3], **static)
    for got, want in zip(gradients, pull(arrays[3]), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("head_dim", [64, 88])
def test_large_scores_take_the_maximum(head_dim: int) -> None:
    """exp of these scores overflows: the rows are worked on again with their maxima subtracted."""
    q, k, v, _ = inputs(1, 257, 2, head_dim, "float32")
    arrays = [q * 100, k, v]
    wanted = space_time_attention(*arrays, frames=1, implementation="reference")
    with pltpu.force_tpu_interpret_mode(interpreter()):
        out = space_time_attention(*arrays, frames=1, implementation="pallas_tpu")
        small = space_time_attention(q - 30, k - 30, v, frames=1, implementation="pallas_tpu", scale=-1.0)
    # The order of a sum of products of thousands, which is the processor's, moves scores by 1e-4.
    np.testing.assert_allclose(out, wanted, atol=5e-4)
    wanted = space_time_attention(q - 30, k - 30, v, frames=1, implementation="reference", scale=-1.0)
    np.testing.assert_allclose(small, wanted, atol=5e-2)  # float32 rounds scores of 79,200 to 0.008


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_numbers_give_nan(bad: float) -> None:
    q, k, v, weight = inputs(1, 130, 2, 64, "float32")
    broken = k.at[0, 3, 1].set(bad)

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return space_time_attention(q, k, v, frames=1, class_tokens=0, implementation="pallas_tpu")

    with pltpu.force_tpu_interpret_mode(interpreter()):
        out, pull = jax.vjp(run, q, broken, v)
        gradients = pull(weight)
    assert jnp.isnan(out[0, :, 1]).all()
    assert all(jnp.isnan(x[0, :, 1]).all() for x in gradients[:2])


def test_named_implementations_run_or_raise() -> None:
    q = jnp.zeros((1, 9, 2, 64))

    def attend_as(implementation: str, x: jax.Array = q, mode: str = "joint") -> jax.Array:
        return space_time_attention(x, x, x, frames=2, mode=mode, implementation=implementation)

    for implementation, x, mode, words in [
        ("pallas_tpu", q[..., :7], "joint", "head dims"),
        ("pallas_tpu", q.astype(jnp.float16), "joint", "bfloat16 and float32"),
        ("pallas_tpu", jnp.zeros((1, 200_001, 2, 64)), "joint", "MiB"),
        ("cudnn", q, "joint", "bfloat16 and float16"),
        ("pallas_gpu", q, "joint", "not built"),
    ]:
        with pytest.raises(NotImplementedError, match=words):
            jax.eval_shape(lambda x=x, i=implementation, m=mode: attend_as(i, x, m))
    jax.eval_shape(lambda: attend_as("pallas_tpu"))  # traces anywhere
    with pytest.raises(ValueError, match="interpret"):
        jax.jit(lambda: attend_as("pallas_tpu")).lower()  # and is refused when lowered for something else


SHAPES = {  # B, S, N, D, dtype, class tokens
    "v5e": [(8, 1025, 16, 64, "bfloat16", 1), (8, 2048, 16, 64, "bfloat16", 0), (8, 785, 12, 64, "float32", 1)],
    "v6e": [(8, 1025, 16, 88, "bfloat16", 1), (8, 785, 16, 72, "bfloat16", 1)],
    "v5p": [(8, 785, 12, 64, "bfloat16", 1), (2, 1025, 16, 104, "bfloat16", 1), (2, 256, 8, 256, "bfloat16", 0)],
}


@pytest.mark.parametrize("chip", SHAPES)
def test_kernels_compile_for_chips_that_are_not_here(chip: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.tpu_aot", chip, json.dumps(SHAPES[chip])],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=compiler_environment(CHIPS[chip].accelerator),
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    programs = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(programs) == len(SHAPES[chip])
    for program, shape in zip(programs, SHAPES[chip], strict=True):
        assert program["kernels"] == ["joint_attention_backward", "joint_attention_forward"], shape


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    mode=st.sampled_from(["joint", "space", "time"]),
    frames=st.integers(1, 5),
    patches=st.integers(1, 40),
    class_tokens=st.integers(0, 1),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([64, 72, 128]),
)
def test_ragged_sizes(mode: str, frames: int, patches: int, class_tokens: int, heads: int, head_dim: int) -> None:
    q, k, v, weight = inputs(1, frames * patches + class_tokens, heads, head_dim, "float32")

    def run(implementation: str) -> list[np.ndarray]:
        def attend(*x: jax.Array) -> jax.Array:
            return space_time_attention(
                *x, frames=frames, mode=mode, class_tokens=class_tokens, implementation=implementation
            )

        out, pull = jax.vjp(jax.jit(attend), q, k, v)
        return [np.asarray(x) for x in (out, *pull(weight))]

    with pltpu.force_tpu_interpret_mode(interpreter()):
        found = run("pallas_tpu")
    for got, wanted in zip(found, run("reference"), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_cuts_can_be_overridden_for_a_search() -> None:
    with tuning.override(queries=128, keys=256):
        assert tuning.cuts(tuning.JOINT_FORWARD)[1:] == (128, 256)
    assert tuning.cuts(tuning.JOINT_FORWARD) == tuning.JOINT_FORWARD[""]
    with pytest.raises(ValueError, match=r"not \['blocks'\]"), tuning.override(blocks=3):
        pass
