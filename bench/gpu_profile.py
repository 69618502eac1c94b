"""Where the time of a GPU goes, by kind of kernel: `python -m bench.gpu_profile`.

prefill: of PaliGemma 3B's shape, as `bench.end_to_end generate` times it. step: training the ViT-L/14 dual encoder, as
`bench.end_to_end step` does. The rates beside them are what the libraries reach at the same products and attention when
nothing else runs: what a step without anything but these would take is its floor.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.common import ROOT, append_rows, environment, format_table, progress
from bench.end_to_end import GENERATE, accelerator_cases, compiled_prefill, inputs_of
from pyvdl.config import OptimConfig, TrainConfig
from pyvdl.flops import PEAK_FLOPS, prefill_flops
from pyvdl.models import VLM
from pyvdl.sharding import make_mesh, put_batch
from pyvdl.step import begin, create, make_step, split

CASES = ("prefill", "step")
KINDS = {  # the first whose expression finds the kernel's name
    "products (cuBLAS, Triton)": re.compile("nvjet|gemm|cutlass|cublas"),
    "attention (cuDNN)": re.compile("sdpa|cudnn|fmha"),
    "copies and fills": re.compile("mem(cpy|set)|pad|slice|concatenate|broadcast|copy|transpose", re.IGNORECASE),
    "all else (norms, activations, sums, optimizer)": re.compile(""),
}


def kernel_seconds(run: Callable[[], Any], times: int = 2) -> Counter[str]:
    """Seconds of each GPU kernel by name, of one call of `run`."""
    jax.block_until_ready(run())
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(times):
                result = run()
            jax.block_until_ready(result)
        (file,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if plane.name.startswith("/device:GPU"):
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        for event in line.events:
                            found[event.name] += event.duration_ns / 1e9 / times
    return found


def prefill() -> tuple[str, Callable[[], Any], float]:
    """What is run, and the operations that it needs."""
    config, clips = GENERATE["gpu"]
    model = create(lambda: VLM(config, rngs=nnx.Rngs(0)), make_mesh(), "bfloat16")
    call = compiled_prefill(model, inputs_of(config, clips, 16))
    return (
        f"prefill, PaliGemma 3B, {clips} clips of {config.num_frames} frames",
        call,
        clips * prefill_flops(config, 16),
    )


def step(clips: int = 64) -> tuple[str, Callable[[], Any], float]:
    name = "dual encoder, ViT-L/14"
    model, loss, data, flops = accelerator_cases()[name][0](lambda create: create(), clips)
    config = TrainConfig(steps=10, batch_size=clips, optim=OptimConfig(name="adafactor", warmup_steps=2))
    mesh = make_mesh()
    graph, *_ = split(model, config.trainable)
    state = list(begin(model, config, mesh))
    batch = put_batch(data, mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(make_step(graph, loss, config, mesh), donate_argnums=(0, 1)).lower(*state, batch).compile()

    def call() -> Any:
        *state[:3], scalars = compiled(*state, batch)
        return scalars

    return f"training step, {name}, {clips} clips", call, flops


def rates() -> dict[str, float]:
    """Operations a second of single calls at the step's shapes: 64 clips of 1,025 tokens, width 1024, heads of 64."""
    rows, heads = 64 * 1025, (64, 16, 64)
    key = jax.random.key(0)

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(key, shape, jnp.bfloat16)

    def attend(q: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, q, q, implementation="cudnn")

    def backward(q: jax.Array) -> jax.Array:
        return jax.grad(lambda q: attend(q).astype(jnp.float32).sum())(q)

    found = {}
    x, up = normal(rows, 1024), normal(1024, 4096)
    found["product 65,600 x 1,024 x 4,096"] = 2 * rows * 1024 * 4096 / _seconds(jnp.matmul, x, up)
    for tokens in (1024, 1026):  # an odd number of tokens is padded by one before JAX 0.12
        q = normal(heads[0], tokens, *heads[1:])
        flops = 4 * heads[0] * heads[1] * tokens**2 * heads[2]
        found[f"attention of {tokens:,} tokens, forward"] = flops / _seconds(attend, q)
        found[f"attention of {tokens:,} tokens, forward and backward"] = 3.5 * flops / _seconds(backward, q)
    return found


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
    compiled = jax.jit(function)
    return sum(kernel_seconds(lambda: compiled(*arguments), times=10).values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_profile", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="*", choices=CASES, default=CASES)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu_profile.jsonl")
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    if device.platform != "gpu":
        parser.error(f"needs a GPU; the first device here is a {device.device_kind}")
    env = environment(("jax", "jaxlib", "flax", "numpy")) | {"device": device.device_kind}
    print(f"{env['device']}, {', '.join(f'{name} {version}' for name, version in env['packages'].items())}")
    peak = PEAK_FLOPS.get(device.device_kind, np.nan)
    rows: list[dict[str, Any]] = []
    for case in options.cases:
        progress(f"profile: {case}")
        name, run, flops = {"prefill": prefill, "step": step}[case]()
        kernels = kernel_seconds(run)
        del run
        total = sum(kernels.values())
        seconds = dict.fromkeys(KINDS, 0.0)
        for kernel, spent in kernels.items():
            seconds[next(kind for kind, names in KINDS.items() if names.search(kernel))] += spent
        table = [[name, "ms", "of the time"]]
        table += [[kind, f"{1000 * spent:.1f}", f"{spent / total:.0%}"] for kind, spent in seconds.items()]
        print(f"\n{format_table(table)}")
        print(f"kernels {1000 * total:.1f} ms, {flops / 1e12:.1f} TFLOP, {flops / total / peak:.0%} of peak")
        print("\n".join(f"{1000 * spent:9.3f} ms  {kernel[:110]}" for kernel, spent in kernels.most_common(12)))
        rows.append({"bench": "gpu_profile", "case": name, "flops": flops, "seconds": seconds, "total": total})
    if "step" in options.cases:
        found = rates()
        table = [["alone", "TFLOP/s", "of peak"]]
        table += [[name, f"{rate / 1e12:.0f}", f"{rate / peak:.0%}"] for name, rate in found.items()]
        print(f"\n{format_table(table)}")
        rows.append({"bench": "gpu_rates", "flops_a_second": found})
    append_rows(options.out, {"environment": env}, rows)
    print(f"\nrows: {options.out}")


if __name__ == "__main__":
    main()
