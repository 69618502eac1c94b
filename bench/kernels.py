"""Times the kernels on the device at hand, beside what JAX offers: `python -m bench.kernels`.

attention: space-time attention from [B, S, N, D] to [B, S, N, D], forward, and forward with backward, beside
jax.nn.dot_product_attention (cuDNN where there is a GPU; XLA with a mask for the factorised modes).
contrastive: the loss with the gradients of both embeddings, beside the plain loss that stores the score matrix.

Each row tells the time of a call and how many times as long the others take, the temporary memory that the compiler
plans, and the largest difference of the outputs from the float32 definitions, in units of their largest value.
"""

from __future__ import annotations

import argparse
import functools
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bench.common import ROOT, Spread, Timing, append_rows, environment, format_table, interleave, progress, ratio
from pyvdl.kernels import attention, contrastive_loss, reference, space_time_attention

MODES = ("attention", "contrastive")
OTHERS = ("cudnn", "xla")  # implementations, of pyvdl and of jax.nn.dot_product_attention
LEAST_SECONDS = 0.1  # of a measurement
# (B, S, N, D, frames, mode), the class token included in S
ATTENTION = {
    "gpu": [
        (8, 785, 16, 64, 4, "joint"),
        (8, 1025, 16, 64, 4, "joint"),
        (8, 2048, 16, 64, 8, "joint"),
        (8, 4096, 16, 64, 16, "joint"),
        (8, 2049, 16, 88, 8, "joint"),
        (8, 2048, 8, 128, 8, "joint"),
        (8, 2049, 16, 64, 8, "space"),
        (8, 2049, 16, 64, 8, "time"),
    ],
    "cpu": [(1, 197, 4, 32, 4, "joint"), (1, 197, 4, 32, 4, "space"), (1, 197, 4, 32, 4, "time")],
}
# (B, E, kind)
CONTRASTIVE = {
    "gpu": [(b, 768, kind) for kind in ("softmax", "sigmoid") for b in (4096, 16384, 32768, 65536)],
    "cpu": [(512, 128, "softmax"), (512, 128, "sigmoid")],
}
# (B, S, K, N, Nkv, D, causal): a language model's prefill, and cross-attention
LANGUAGE = {
    "gpu": [(8, 2048, 2048, 16, 16, 64, True), (8, 1024, 1024, 8, 1, 256, True), (8, 64, 2048, 32, 32, 64, False)],
    "cpu": [(2, 128, 128, 4, 1, 32, True)],
}
CHECKED_ROWS = 2048  # of a contrastive batch, and of a clip's tokens: the definitions store whole matrices

Call = Callable[..., Any]


def device_memory_bytes() -> int:
    statistics = jax.local_devices()[0].memory_stats()
    return int(statistics["bytes_limit"]) if statistics else 8 << 30


def per_call(compiled: Call, arguments: Sequence[Array]) -> Callable[[], Timing]:
    """A measurement that repeats the call until it is long enough to time."""
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    once = time.perf_counter() - start
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    once = min(once, time.perf_counter() - start)
    repeats = max(1, round(LEAST_SECONDS / once))

    def run() -> Timing:
        start = time.perf_counter()
        for _ in range(repeats):
            out = compiled(*arguments)
        jax.block_until_ready(out)
        return Timing(0.0, (time.perf_counter() - start) / repeats)

    return run


def compare(name: str, calls: dict[str, Call], arguments: Sequence[Array], rounds: int) -> list[dict[str, Any]]:
    """A row for each call: those that do not compile, or whose memory does not fit, tell why."""
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], Timing]] = {}
    for who, call in calls.items():
        row = rows[who] = {"case": name, "who": who}
        try:
            compiled = jax.jit(call).lower(*arguments).compile()
            analysis = compiled.memory_analysis()
            row["temporary_bytes"] = analysis.temp_size_in_bytes if analysis else None
            if analysis and analysis.temp_size_in_bytes > 0.8 * device_memory_bytes():
                row["failed"] = "does not fit"
                continue
            runs[who] = per_call(compiled, arguments)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    timings = interleave(list(runs), lambda who, _: runs[who](), rounds)
    first = next(iter(calls))
    for who, times in timings.items():
        seconds = [timing.wall_seconds for timing in times]
        rows[who]["seconds"] = Spread.of(seconds).median
        if first in timings:
            rows[who]["ratio"] = ratio(seconds, [timing.wall_seconds for timing in timings[first]])
    told = (
        f"{who} {row['failed'] if 'failed' in row else f'{1e3 * row["seconds"]:.3f} ms'}" for who, row in rows.items()
    )
    progress(f"{name}: {', '.join(told)}")
    return list(rows.values())


def difference(got: Any, wanted: Any) -> float:
    """The largest over all outputs, in units of the output's largest value."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        x, y = np.asarray(a, np.float32), np.asarray(b, np.float32)
        worst = max(worst, float(np.max(np.abs(x - y)) / np.max(np.abs(y))))
    return worst


def public(how: Any, mask: Array | None) -> Call:
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=how)


def with_backward(call: Call) -> Call:
    def run(q: Array, k: Array, v: Array, gradient: Array) -> Any:
        out, pull = jax.vjp(call, q, k, v)
        return out, pull(gradient)

    return run


def attention_rows(platform: str, rounds: int, wanted: re.Pattern[str]) -> Iterator[list[dict[str, Any]]]:
    for batch, tokens, heads, width, frames, mode in ATTENTION[platform]:
        name = f"{mode} B={batch} S={tokens} N={heads} D={width}"
        if not wanted.search(name):
            continue
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v, gradient = (jax.random.normal(key, (batch, tokens, heads, width), jnp.bfloat16) for key in keys)
        class_tokens = tokens % 2
        patches = (tokens - class_tokens) // frames

        ours = functools.partial(space_time_attention, frames=frames, mode=mode, class_tokens=class_tokens)
        mask = None if mode == "joint" else reference.space_time_mask(frames, patches, mode, class_tokens)

        forward: dict[str, Call] = {"pyvdl": ours}
        forward |= {f"pyvdl {how}": functools.partial(ours, implementation=how) for how in OTHERS}
        forward |= {f"jax {how}": public(how, mask) for how in OTHERS}
        both = {who: with_backward(call) for who, call in forward.items()}
        found = compare(f"{name} forward", forward, (q, k, v), rounds)
        found += compare(f"{name} both", both, (q, k, v, gradient), rounds)
        small = tuple(x[:1, :, :2] for x in (q, k, v, gradient))

        def definition(q: Array, k: Array, v: Array, f: int = frames, m: str = mode, c: int = class_tokens) -> Array:
            wide = (x.astype(jnp.float32) for x in (q, k, v))
            return reference.space_time_attention(*wide, frames=f, mode=m, class_tokens=c, scale=q.shape[3] ** -0.5)

        wide = tuple(x.astype(jnp.float32) for x in small)
        error = difference(jax.jit(with_backward(ours))(*small), jax.jit(with_backward(definition))(*wide))
        found[0]["difference"] = found[len(forward)]["difference"] = error
        yield found


def language_rows(platform: str, rounds: int, wanted: re.Pattern[str]) -> Iterator[list[dict[str, Any]]]:
    for batch, queries, keys, heads, kv_heads, width, causal in LANGUAGE[platform]:
        name = f"attention B={batch} S={queries} K={keys} N={heads}/{kv_heads} D={width}{' causal' * causal} both"
        if not wanted.search(name):
            continue
        shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads))
        q, k, v, gradient = (
            jax.random.normal(key, (batch, length, n, width), jnp.bfloat16)
            for key, (length, n) in zip(jax.random.split(jax.random.key(0), 4), shapes, strict=True)
        )
        ours = functools.partial(attention, causal=causal)
        calls: dict[str, Call] = {"pyvdl": with_backward(ours)}
        for how in OTHERS:
            calls[f"pyvdl {how}"] = with_backward(functools.partial(ours, implementation=how))
        found = compare(name, calls, (q, k, v, gradient), rounds)
        definition = functools.partial(reference.attention, causal=causal, scale=width**-0.5)
        small = (q[:1], k[:1], v[:1], gradient[:1])
        wide = tuple(x.astype(jnp.float32) for x in small)
        exact = jax.jit(with_backward(definition))(*wide)
        found[0]["difference"] = difference(jax.jit(calls["pyvdl"])(*small), exact)
        yield found


def contrastive_rows(platform: str, rounds: int, wanted: re.Pattern[str]) -> Iterator[list[dict[str, Any]]]:
    for batch, width, kind in CONTRASTIVE[platform]:
        name = f"{kind} B={batch} E={width}"
        if not wanted.search(name):
            continue
        keys = jax.random.split(jax.random.key(0), 2)
        video, text = (jax.random.normal(key, (batch, width)) for key in keys)
        video, text = (
            (x / jnp.linalg.norm(x, axis=1, keepdims=True)).astype(jnp.bfloat16) for x in (video, 0.5 * video + text)
        )
        scale, bias = jnp.float32(10.0), None if kind == "softmax" else jnp.float32(-10.0)

        def ours(video: Array, text: Array, scale: Array, kind: str = kind, bias: Array | None = bias) -> Array:
            return contrastive_loss(video, text, scale, bias, kind=kind)

        def dense(video: Array, text: Array, scale: Array, kind: str = kind, bias: Array | None = bias) -> Array:
            scores = scale * jnp.einsum("ie,je->ij", video, text, preferred_element_type=jnp.float32)
            if kind == "sigmoid":
                sign = 2 * jnp.eye(scores.shape[0]) - 1
                return -jnp.sum(jax.nn.log_sigmoid(sign * (scores + (0 if bias is None else bias)))) / scores.shape[0]
            by_row, by_column = (jax.nn.logsumexp(scores, axis=axis) for axis in (1, 0))
            return jnp.mean((by_row + by_column) / 2 - jnp.diagonal(scores))

        def definition(video: Array, text: Array, scale: Array, kind: str = kind, bias: Array | None = bias) -> Array:
            wide = (x.astype(jnp.float32) for x in (video, text))
            return reference.contrastive_loss(*wide, scale, jnp.float32(0) if bias is None else bias, kind=kind)

        calls = {who: jax.value_and_grad(call, argnums=(0, 1, 2)) for who, call in (("pyvdl", ours), ("dense", dense))}
        found = compare(name, calls, (video, text, scale), rounds)
        small = (video[:CHECKED_ROWS], text[:CHECKED_ROWS], scale)
        exact = jax.jit(jax.value_and_grad(definition, argnums=(0, 1, 2)))(*small)
        found[0]["difference"] = difference(jax.jit(calls["pyvdl"])(*small), exact)
        yield found


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [["case", "who", "ms", "times pyvdl", "temporary MiB", "difference"]]
    for row in rows:
        failed = row.get("failed")
        lines.append(
            [
                row["case"],
                row["who"],
                failed or f"{1e3 * row['seconds']:.3f}",
                f"{row['ratio']:.2f}" if "ratio" in row else "",
                f"{row['temporary_bytes'] / 2**20:.0f}" if row.get("temporary_bytes") is not None else "",
                f"{row['difference']:.1e}" if "difference" in row else "",
            ]
        )
    return format_table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--cases", type=re.compile, default="", help="only those whose name this expression finds")
    parser.add_argument("--rounds", type=int, default=5, help="times that everybody does everything")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "kernels.jsonl")
    arguments = parser.parse_args()
    device = jax.local_devices()[0]
    platform = "cpu" if device.platform == "cpu" else "gpu"
    run = {"bench": "kernels", "device": device.device_kind} | environment(["jax", "jaxlib", "pyvdl"])
    progress(f"{device.device_kind}, jax {jax.__version__}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("cut off"))  # a time limit does not lose what is there
    rows: list[dict[str, Any]] = []
    parts = {"attention": (attention_rows, language_rows), "contrastive": (contrastive_rows,)}
    try:
        for mode in arguments.modes:
            for part in parts[mode]:
                for found in part(platform, arguments.rounds, arguments.cases):
                    rows += found
    finally:
        print(f"{device.device_kind}, jax {jax.__version__}, medians of {arguments.rounds} rounds\n")
        print(table(rows))
        append_rows(arguments.out, run, rows)


if __name__ == "__main__":
    main()
