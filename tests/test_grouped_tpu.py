"""`space` and `time` attention for TPU: against the reference in the TPU interpreter, and compiled for real chips."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from bench.tpu_static import CHIPS
from pyvdl.kernels import grouped_tpu_tiles, reference, space_time_attention
from pyvdl.kernels.grouped_tpu import backward, forward
from pyvdl.plan import compiler_environment

# mode, frames, patches, class tokens, heads, head dim, dtype
CASES = [
    ("space", 1, 16, 1, 2, 64, "bfloat16"),
    ("space", 2, 144, 1, 3, 64, "bfloat16"),  # two blocks of queries, the second short; lanes that no head fills
    ("space", 3, 5, 1, 1, 88, "bfloat16"),  # runs that start at any row, several in one tile, heads across lane tiles
    ("space", 5, 49, 0, 2, 72, "bfloat16"),
    ("space", 2, 32, 0, 2, 128, "bfloat16"),
    ("space", 3, 8, 1, 6, 64, "float32"),
    ("time", 1, 16, 1, 2, 64, "bfloat16"),
    ("time", 2, 32, 0, 3, 64, "bfloat16"),
    ("time", 8, 48, 1, 4, 64, "bfloat16"),  # three tiles of sixteen places, four grid steps
    ("time", 5, 7, 1, 1, 72, "bfloat16"),  # places that are no tokens
    ("time", 3, 16, 0, 1, 256, "bfloat16"),
    ("time", 3, 5, 0, 1, 88, "float32"),
    ("time", 17, 9, 1, 2, 64, "bfloat16"),  # many frames: places become runs
    ("time", 17, 17, 0, 1, 128, "float32"),
]


def normal(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def scale_of(case: tuple[Any, ...]) -> float:
    """The usual one, and one that turns the order of the keys round."""
    return -0.1 if case[3:5] == (0, 2) else case[5] ** -0.5


@functools.cache
def interpreted(case: tuple[Any, ...]) -> Callable[..., tuple[jax.Array, ...]]:
    """(q, k, v, do) -> out, lse, dq, dk, dv."""
    mode, frames, _, class_tokens, *_ = case
    options: dict[str, Any] = {"frames": frames, "mode": mode, "class_tokens": class_tokens, "scale": scale_of(case)}

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> tuple[jax.Array, ...]:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
            out, lse = forward(q, k, v, **options)
            return out, lse, *backward(q, k, v, out, lse, do, **options)

    return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_interpreted_against_the_reference(case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    mode, frames, patches, class_tokens, heads, head_dim, dtype = case
    if heads == 4:  # blocks of heads as small as those of longer clips
        monkeypatch.setattr(grouped_tpu_tiles, "STEP_UNITS", 1)
    shape = (2 if heads == 4 else 1, frames * patches + class_tokens, heads, head_dim)
    q, k, v, do = (normal(seed, shape, dtype) for seed in range(4))
    wide = [x.astype(jnp.float32) for x in (q, k, v)]

    def wanted_out(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return reference.space_time_attention(
            q, k, v, frames=frames, mode=mode, class_tokens=class_tokens, scale=scale_of(case)
        )

    mask = reference.space_time_mask(frames, patches, mode, class_tokens)
    logits = jnp.einsum("bqnd,bknd->bnqk", *wide[:2], precision=reference.HIGHEST) * scale_of(case)
    wanted_lse = jax.nn.logsumexp(jnp.where(mask, logits, -jnp.inf), axis=-1)
    wanted, pullback = jax.vjp(wanted_out, *wide)

    out, lse, *gradients = interpreted(case)(q, k, v, do)
    assert out.dtype == q.dtype
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, wanted_lse, atol=1e-5)
    tolerance = 1e-5 if dtype == "float32" else 2**-7
    for got, want in zip((out, *gradients), (wanted, *pullback(do.astype(jnp.float32)))):
        assert got.shape == shape
        # Of the largest number: bfloat16 probabilities leave an error that does not shrink with the result.
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=tolerance * float(jnp.abs(want).max()))


@pytest.mark.parametrize("mode", ["space", "time"])
@pytest.mark.parametrize(
    ("spoiled", "bad"), [("q", np.nan), ("q", np.inf), ("k", np.nan), ("v", np.nan), ("v", np.inf)]
)
def test_what_is_no_number_stays_visible(mode: str, spoiled: str, bad: float) -> None:
    frames, patches, head_dim, token = 2, 16, 64, 3
    tensors = {name: normal(n, (1, frames * patches + 1, 2, head_dim), "float32") for n, name in enumerate("qkvo")}
    tensors[spoiled] = tensors[spoiled].at[0, token, 1, 5].set(bad)
    out, _, dq, dk, dv = interpreted((mode, frames, patches, 1, 2, head_dim, "float32"))(*tensors.values())
    mask = np.asarray(reference.space_time_mask(frames, patches, mode, 1))
    others = np.arange(len(mask)) == token if spoiled == "q" else mask[:, token]
    # One number spoils the logits (or outputs) of the queries that see it, and whatever those have gradients for.
    spoils = [(out, others), (dq, others), (dk, mask[token])] + ([(dv, mask[token])] if spoiled != "v" else [])
    for values, tokens in spoils:
        assert not np.isfinite(np.asarray(values)[0, tokens, 1]).all(axis=-1).any()


@pytest.mark.parametrize("mode", ["space", "time"])
def test_the_public_op_takes_them(mode: str) -> None:
    q, k, v, do = (normal(seed, (1, 33, 2, 64), "float32") for seed in range(4))

    def run(implementation: str) -> list[np.ndarray]:
        def attend(*x: jax.Array) -> jax.Array:
            return space_time_attention(*x, frames=2, mode=mode, class_tokens=1, implementation=implementation)

        out, pull = jax.vjp(jax.jit(attend), q, k, v)
        return [np.asarray(x) for x in (out, *pull(do))]

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        found = run("pallas_tpu")
    for got, wanted in zip(found, run("reference"), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    small = jnp.zeros((1, 33, 2, 20))
    with pytest.raises(NotImplementedError, match=r"'pallas_tpu' .* head dims"):
        space_time_attention(small, small, small, frames=2, mode=mode, implementation="pallas_tpu")


def test_shapes_that_are_not_taken() -> None:
    with pytest.raises(NotImplementedError, match="head dims that 8 divides"):
        forward(*[jnp.zeros((1, 8, 1, 20))] * 3, frames=2, mode="space", class_tokens=0, scale=1.0)
    many = jax.ShapeDtypeStruct((1, 64 * 784, 16, 72), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="MiB"):
        jax.eval_shape(
            lambda x: forward(x, x, x, frames=64, mode="time", class_tokens=0, scale=1.0)[0], many
        )  # fmt: skip


# --- ahead of time, at the sizes of models: what Mosaic and the TPU compiler refuse, the interpreter may take

# mode, frames, patches, class tokens, heads, head dim, dtype, what
COMPILED = {
    "v5e": [
        ("space", 8, 256, 1, 16, 64, "bfloat16", "both"),
        ("time", 8, 256, 1, 16, 64, "bfloat16", "both"),
        ("space", 4, 196, 1, 12, 64, "bfloat16", "forward"),
        ("time", 4, 256, 0, 16, 72, "bfloat16", "forward"),
        ("time", 32, 49, 0, 12, 64, "bfloat16", "forward"),
    ],
    "v6e": [
        ("time", 4, 196, 1, 12, 64, "bfloat16", "both"),
        ("space", 4, 256, 0, 8, 256, "bfloat16", "forward"),
        ("space", 2, 784, 1, 16, 80, "bfloat16", "forward"),
        ("time", 8, 49, 1, 12, 64, "float32", "forward"),
    ],
    "v5p": [
        ("space", 4, 256, 1, 16, 128, "bfloat16", "both"),
        ("time", 16, 256, 0, 16, 96, "bfloat16", "forward"),
        ("space", 8, 49, 1, 3, 104, "bfloat16", "forward"),
    ],
}

CHILD = """
    import json, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from pyvdl.kernels.grouped_tpu import backward, forward

    topology, cases = json.loads(sys.argv[1])
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    chip = NamedSharding(Mesh(np.array(devices)[:1], ("chip",)), PartitionSpec())
    for mode, frames, patches, class_tokens, heads, head_dim, dtype, what in cases:
        shape = (2, frames * patches + class_tokens, heads, head_dim)
        x = jax.ShapeDtypeStruct(shape, dtype, sharding=chip)
        options = dict(frames=frames, mode=mode, class_tokens=class_tokens, scale=head_dim**-0.5)

        def attend(q, k, v, do):
            out, lse = forward(q, k, v, **options)
            return (out, lse, *backward(q, k, v, out, lse, do, **options)) if what == "both" else (out, lse)

        text = jax.jit(attend).lower(x, x, x, x).compile().as_text()
        print(json.dumps([mode, text.count("tpu_custom_call")]), flush=True)
"""


@pytest.mark.parametrize("chip", COMPILED)
def test_compiled_ahead_of_time(chip: str) -> None:
    cases = COMPILED[chip]
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), json.dumps([CHIPS[chip].topologies[1], cases])],
        env=compiler_environment(CHIPS[chip].accelerator),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    made = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("[")]
    assert len(made) == len(cases)
    for (mode, calls), case in zip(made, cases):
        assert mode == case[0]
        assert calls >= (2 if case[-1] == "both" else 1)
