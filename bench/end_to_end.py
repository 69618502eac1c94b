"""Times whole models on the device at hand: `python -m bench.end_to_end`.

generate: several captions a clip, clips and tokens a second, beside transformers' generate with the same weights (where
`make parity` has made its environment); memory with ten captions a clip beside one; the share of the device's peak in
the prefill, where the peak is known.
input: training from video files, with the share of the time in which the step waited for them, beside the decoder alone
and the same steps without files; where decoding has much capacity to spare, and where it has too little; and what a
large manifest costs.
caption: captioning jobs, see bench.captioning.
step: training steps of the dual encoder and of the video-language model: floating-point operations that the model needs
for a step, its time, and the share of the peak. Where there is no accelerator, the compiler's estimates for a TPU v5e
stand beside it.

Weights are random. Operations are counted by formula, for what the model needs and not for what is computed again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench import captioning, tpu_static
from bench.common import (
    ROOT,
    Spread,
    Timing,
    append_rows,
    environment,
    format_table,
    interleave,
    measure,
    progress,
    ratio,
)
from bench.input import Repeated, time_input, time_manifest
from bench.plain import PlainDualEncoder, plain_loss
from pyvdl.config import (
    DualEncoderConfig,
    GemmaConfig,
    OptimConfig,
    T5Config,
    TrainConfig,
    ViTConfig,
    VLMConfig,
    demo,
    paper,
)
from pyvdl.flops import PEAK_FLOPS, dual_encoder_flops, prefill_flops, vlm_flops
from pyvdl.generate import Samples, generate
from pyvdl.models import VLM, DualEncoder, save_pretrained
from pyvdl.train import contrastive_loss_fn, fit, vlm_loss

MODES = ("generate", "step", "input", "caption")
REFERENCE = ROOT / "build" / "parity" / "env" / "bin" / "python"
SAMPLES, TOKENS = 10, 32
MEMORY_PREFIX = 2048  # tokens
ESTIMATED = {"dual encoder, ViT-L/14, rematerialised": 32, "VLM, So400m and T5-Large, rematerialised": 2}  # clips

SO400M = ViTConfig(width=1152, depth=27, num_heads=16, mlp_dim=4304)
PALIGEMMA = VLMConfig(vision=SO400M, language=GemmaConfig())
SMALL = VLMConfig(
    vision=ViTConfig(image_size=56, width=192, depth=4, num_heads=3, mlp_dim=768, dtype="float32"),
    language=GemmaConfig(vocab_size=2048, width=256, depth=4, num_heads=4, head_dim=64, mlp_dim=1024, dtype="float32"),
)
GENERATE = {"gpu": (PALIGEMMA, 8), "tpu": (PALIGEMMA, 8), "cpu": (SMALL, 4)}  # model, clips at a time


# --- generation


class _Transformers:
    """The process that runs transformers on the same weights and inputs."""

    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        # -P: our own modules must not be taken for libraries of the same name.
        self._process = subprocess.Popen(
            [REFERENCE, "-P", ROOT / "bench" / "transformers_worker.py"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        start = {"model": str(folder / "model"), "inputs": str(folder / "inputs.npz"), "dtype": dtype, "device": device}
        self.versions = self.ask(start)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"transformers' process ended with code {self._process.wait()}; its message is above")
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate()


def inputs_of(config: VLMConfig, clips: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    size, vocab = config.vision.image_size, config.language.vocab_size
    video = rng.integers(0, 256, (clips, config.num_frames, size, size, 3), np.uint8)
    return {"video": video, "prompt": rng.integers(4, vocab - 64, (clips, length), np.int32)}


def _captions(model: VLM, inputs: dict[str, np.ndarray], num_samples: int, greedy: bool) -> Samples:
    """All of TOKENS tokens: no id ends a text."""
    found = generate(
        model,
        inputs["video"],
        inputs["prompt"],
        num_samples=1 if greedy else num_samples,
        max_length=TOKENS,
        temperature=0.0 if greedy else 1.0,
        top_p=1.0 if greedy else 0.95,
        end_ids=-1,
    )
    return jax.block_until_ready(found)


def compare_generation(config: VLMConfig, clips: int, rounds: int) -> list[dict[str, Any]]:
    """pyvdl and transformers in turns, on weights and inputs of one folder."""
    platform = jax.default_backend()
    dtype = "float32" if platform == "cpu" else "bfloat16"
    graph, state = nnx.split(VLM(config, rngs=nnx.Rngs(0)))
    # Spread wider than usual: the likeliest token then stands out, and greedy texts are not all of one token.
    state = jax.tree.map(lambda x: (2.0 * x if x.ndim > 2 else x).astype(dtype), state)
    model = nnx.merge(graph, state)
    inputs = inputs_of(config, clips, 16)
    row: dict[str, Any] = {"bench": "generate", "clips": clips, "samples": SAMPLES, "tokens": TOKENS, "dtype": dtype}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        contenders: dict[str, Callable[[], Timing]] = {
            "pyvdl": lambda: measure(lambda: _captions(model, inputs, SAMPLES, greedy=False))[1]
        }
        if REFERENCE.exists():
            save_pretrained(model, folder / "model")
            np.savez(folder / "inputs.npz", **inputs)  # type: ignore[arg-type]
            progress("generate: transformers starts")
            device = "cuda" if platform == "gpu" else "cpu"
            reference = stack.enter_context(contextlib.closing(_Transformers(folder, dtype, device)))
            row["reference"] = reference.versions
            wanted = np.array(reference.ask({"num_samples": 1, "max_length": TOKENS, "greedy": True})["tokens"])
            found = np.asarray(_captions(model, inputs, 1, greedy=True).tokens)[:, 0]
            row["greedy_tokens_alike"] = float((found == wanted).mean())
            ask = {"num_samples": SAMPLES, "max_length": TOKENS, "greedy": False}

            def theirs() -> Timing:
                told = reference.ask(ask)
                return Timing(told["cpu_seconds"], told["wall_seconds"])

            contenders["transformers"] = theirs
        else:
            progress("generate: transformers is not there: `make parity` makes its environment")
        for name, run in contenders.items():
            progress(f"generate: {name} warms up")
            run()
        timings = interleave(list(contenders), lambda name, _: contenders[name](), rounds)
    seconds = {name: [timing.wall_seconds for timing in taken] for name, taken in timings.items()}
    prefill = _prefill_seconds(model, inputs, rounds)
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    row |= {f"{name}_seconds": asdict(Spread.of(values)) for name, values in seconds.items()}
    row |= {"prefill_seconds": asdict(prefill), "prefill_flops": clips * prefill_flops(config, 16)}
    row["prefill_share_of_peak"] = peak and row["prefill_flops"] / prefill.median / peak
    table = [["generate", "seconds", "clips/s", "tokens/s", "times as fast"]]
    for name, values in seconds.items():
        median = Spread.of(values).median
        times = f"{ratio(values, seconds['pyvdl']):.2f}" if name != "pyvdl" else ""
        cells = [f"{median:.3f}", f"{clips / median:.2f}", f"{clips * SAMPLES * TOKENS / median:.0f}", times]
        table.append([name, *cells])
    if "transformers" in seconds:
        row["times_faster"] = ratio(seconds["transformers"], seconds["pyvdl"])
    print(f"\n{format_table(table)}")
    print(f"prefill: {1000 * prefill.median:.1f} ms, {row['prefill_flops'] / 1e12:.3f} TFLOP", end="")
    print(f", {row['prefill_share_of_peak']:.0%} of peak" if peak else ", the device's peak is not known")
    if "greedy_tokens_alike" in row:
        print(f"greedy tokens alike: {row['greedy_tokens_alike']:.1%}")
    return [row]


def compiled_prefill(model: VLM, inputs: dict[str, np.ndarray]) -> Callable[[], Any]:
    """Starts the prefill of these inputs, on the device already."""
    graph, state = nnx.split(model)

    @jax.jit
    def prefill(state: Any, video: jax.Array, prompt: jax.Array) -> Any:
        made = nnx.merge(graph, state)
        return made.language.start(*made.prefix(video, prompt), 1, TOKENS)

    return functools.partial(prefill, state, *(jax.device_put(inputs[name]) for name in ("video", "prompt")))


def _prefill_seconds(model: VLM, inputs: dict[str, np.ndarray], rounds: int) -> Spread:
    run = compiled_prefill(model, inputs)
    jax.block_until_ready(run())
    return Spread.of([measure(lambda: jax.block_until_ready(run()))[1].wall_seconds for _ in range(rounds)])


def compare_memory(config: VLMConfig) -> list[dict[str, Any]]:
    """What the compiler plans for ten captions of a clip and for one, with a prefix of MEMORY_PREFIX tokens."""
    frames = -(-(MEMORY_PREFIX - 16) // config.vision.num_patches)
    size = config.vision.image_size
    video = jax.ShapeDtypeStruct((1, frames, size, size, 3), jnp.uint8)
    prompt = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    graph, state = nnx.split(nnx.eval_shape(lambda: VLM(config, rngs=nnx.Rngs(0))))

    def planned_bytes(num_samples: int) -> int:
        def run(state: Any, video: jax.Array, prompt: jax.Array) -> Samples:
            model = nnx.merge(graph, state)
            return generate(model, video, prompt, num_samples=num_samples, max_length=TOKENS, top_p=0.95)

        memory: Any = jax.jit(run).lower(state, video, prompt).compile().memory_analysis()
        return memory.temp_size_in_bytes

    one, ten = planned_bytes(1), planned_bytes(SAMPLES)
    language = config.language
    assert isinstance(language, GemmaConfig)
    token = 2 * language.depth * language.num_kv_heads * language.head_dim * jnp.dtype(language.dtype).itemsize
    suffixes = (SAMPLES - 1) * TOKENS * token
    row = {"bench": "generate-memory", "one_bytes": one, "ten_bytes": ten, "suffix_bytes": suffixes}
    row["times"] = (ten - suffixes) / one
    prefix = frames * config.vision.num_patches + 16
    print(
        f"\nmemory beside the weights, prefix of {prefix} tokens: {one / 2**20:.1f} MiB for 1 caption, "
        f"{ten / 2**20:.1f} for {SAMPLES}, of which {suffixes / 2**20:.1f} for their own tokens: "
        f"{row['times']:.2f} times without these"
    )
    return [row]


# --- training steps


type Case = tuple[Any, Any, dict[str, np.ndarray], float]
type Make = Callable[[Callable[[], Any]], Any]  # nnx.eval_shape, or a call
type Sized = Callable[[Make, int], Case]  # by the number of clips


def _dual_encoder(make: Make, batch: int, config: DualEncoderConfig, plain: bool = False) -> Case:
    """Model, loss, a batch, and the operations of a step: backward has two products for each of forward's."""
    rng = np.random.default_rng(0)
    vision, text = config.vision, config.text
    shape = (batch, vision.num_frames, vision.image_size, vision.image_size, 3)
    ids = rng.integers(4, text.vocab_size - 1, (batch, text.context_length), np.int32)
    ids[:, -1] = text.end_id
    data = {"video": rng.integers(0, 256, shape, np.uint8), "text": ids, "ok": np.ones(batch, bool)}
    forward = dual_encoder_flops(config, batch)
    kind, loss = (PlainDualEncoder, plain_loss) if plain else (DualEncoder, contrastive_loss_fn)
    return make(lambda: kind(config, rngs=nnx.Rngs(0))), loss, data, 3 * forward


def _vlm(make: Make, batch: int, config: VLMConfig, prompt: int, target: int) -> Case:
    """The same; all is trained."""
    rng = np.random.default_rng(0)
    vision, language = config.vision, config.language
    assert isinstance(language, T5Config)
    shape = (batch, config.num_frames, vision.image_size, vision.image_size, 3)
    data: dict[str, np.ndarray] = {"video": rng.integers(0, 256, shape, np.uint8), "ok": np.ones(batch, bool)}
    for name, length in (("prompt", prompt), ("target", target)):
        data[name] = rng.integers(4, language.vocab_size, (batch, length), np.int32)
    forward = batch * vlm_flops(config, prompt, target)
    return make(lambda: VLM(config, rngs=nnx.Rngs(0))), vlm_loss, data, 3 * forward


def small_cases() -> dict[str, tuple[Sized, tuple[int, ...]]]:
    """Each with the numbers of clips to try, the largest first."""
    small = demo(512)
    return {
        "dual encoder, demo": (functools.partial(_dual_encoder, config=small.dual_encoder), (48,)),
        "dual encoder, demo, plain Flax": (
            functools.partial(_dual_encoder, config=small.dual_encoder, plain=True),
            (48,),
        ),
        "VLM, demo": (functools.partial(_vlm, config=small.vlm, prompt=16, target=24), (16,)),
    }


def accelerator_cases() -> dict[str, tuple[Sized, tuple[int, ...]]]:
    """The same; of those not rematerialised, layers keep their products with weights."""
    sizes = paper(32_128).dual_encoder
    remat = dataclasses.replace(sizes, vision=dataclasses.replace(sizes.vision, remat=True))
    language = T5Config(width=1024, encoder_layers=24, decoder_layers=24, num_heads=16, mlp_dim=2816, remat=True)
    vlm = VLMConfig(vision=dataclasses.replace(SO400M, remat=True), language=language)
    return {
        "dual encoder, ViT-L/14": (functools.partial(_dual_encoder, config=sizes), (128, 96, 64)),
        "dual encoder, ViT-L/14, plain Flax": (
            functools.partial(_dual_encoder, config=sizes, plain=True),
            (128, 64, 32),
        ),
        "VLM, So400m and T5-Large, rematerialised": (
            functools.partial(_vlm, config=vlm, prompt=64, target=64),
            (16, 8),
        ),
        "dual encoder, ViT-L/14, rematerialised": (functools.partial(_dual_encoder, config=remat), (512, 256)),
    }


def _largest(case: tuple[Sized, tuple[int, ...]], steps: int) -> tuple[float, float, int, float]:
    """Operations, seconds a step, clips and the last loss, at the largest batch that fits."""
    make, batches = case
    for batch in batches:
        model, loss, data, flops = make(lambda create: create(), batch)
        optim = OptimConfig(name="adafactor", warmup_steps=2)
        config = TrainConfig(steps=steps, batch_size=batch, optim=optim, log_every=steps)
        try:
            history = fit(model, loss, Repeated(data), config, progress=False)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or batch == batches[-1]:
                raise
            progress(f"step: {batch} clips do not fit")
            continue
        # The first step compiles, and is not timed.
        return flops, history.seconds / (steps - 1), batch, float(history.losses[-1])
    raise AssertionError("no batches")


def time_steps(steps: int, wanted: re.Pattern[str]) -> Iterator[dict[str, Any]]:
    """Whole steps of `pyvdl.train.fit`, host and optimizer included."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    for name, case in (small_cases() if jax.default_backend() == "cpu" else accelerator_cases()).items():
        if not wanted.search(name):
            continue
        progress(f"step: {name}")
        flops, seconds, clips, loss = _largest(case, steps)
        row = {"bench": "step", "case": name, "clips": clips, "flops": flops, "seconds": seconds}
        yield row | {"share_of_peak": peak and flops / seconds / peak, "loss": loss}


def table_of_steps(rows: Iterable[dict[str, Any]]) -> str:
    table = [["training step", "clips", "TFLOP", "ms", "clips/s", "TFLOP/s", "of peak"]]
    for row in rows:
        flops, seconds, clips, share = (row[name] for name in ("flops", "seconds", "clips", "share_of_peak"))
        cells = [f"{flops / 1e12:.3f}", f"{1000 * seconds:.1f}", f"{clips / seconds:.1f}"]
        cells += [f"{flops / seconds / 1e12:.2f}", f"{share:.0%}" if share else "not known"]
        table.append([row["case"], str(clips), *cells])
    return format_table(table)


def estimate_steps(wanted: re.Pattern[str]) -> list[dict[str, Any]]:
    """What a step would take on a TPU v5e, without the optimizer."""
    table = [["step on TPU v5e: an estimate, not measured", "clips", "TFLOP", "ms", "of peak", "HBM temporaries"]]
    rows = []
    for name, clips in ESTIMATED.items():
        if not wanted.search(name):
            continue
        progress(f"step on TPU v5e: {name}")
        number = list(accelerator_cases()).index(name)
        try:
            found = tpu_static.estimate(f"bench.tpu_steps:step({number},{clips})", "v5e")
        except tpu_static.EstimateError as error:
            print(f"step on TPU v5e, {name}: no estimate: {error}")
            continue
        cells = [f"{found.flops / 1e12:.2f}", f"{1000 * found.seconds:.0f}", f"{found.useful:.0%}"]
        table.append([name, str(clips), *cells, f"{found.temporary_bytes / 2**30:.1f} GiB"])
        rows.append({"bench": "step-v5e", "case": name, "nothing_measured": True, **asdict(found)})
        if found.broken:
            print(f"step on TPU v5e, {name}: INVALID: {'; '.join(found.broken)}")
        if found.uncounted:
            print(f"step on TPU v5e, {name}: without an estimate, not counted: {', '.join(found.uncounted)}")
    print(f"\n{format_table(table)}")
    print("Pallas kernels by libtpu's simulator, all else by XLA's own estimates of its fusions.")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.end_to_end",
        description="Times generation, training steps and their input on the device at hand.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("modes", nargs="*", choices=MODES, default=MODES, help="what to time")
    parser.add_argument("--cases", type=re.compile, default="", help="steps: those whose name this expression finds")
    parser.add_argument("--clips", type=int, default=captioning.CLIPS, help="caption: of the simulated job")
    parser.add_argument("--rounds", type=int, default=5, help="times that everybody does everything")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results" / "end_to_end.jsonl", help="file that rows are added to"
    )
    options = parser.parse_args(arguments)
    env = environment(("jax", "jaxlib", "flax", "numpy")) | {"device": jax.devices()[0].device_kind}
    print(f"{env['device']}, {env['cpu']}, {env['cores']} cores (load {env['load']}), {env['system']}")
    print(", ".join(f"{name} {version}" for name, version in env["packages"].items()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("cut off"))  # a time limit does not lose what is there
    rows: list[dict[str, Any]] = []
    try:
        if "generate" in options.modes:
            config, clips = GENERATE[jax.default_backend()]
            rows += compare_generation(config, clips, options.rounds)
            rows += compare_memory(config)
        if "input" in options.modes:
            rows += time_manifest()
            rows += time_input(options.rounds)
        if "caption" in options.modes:
            rows += captioning.time_captioning(captioning.MODES, options.rounds, options.clips)
        if "step" in options.modes:
            steps: list[dict[str, Any]] = []
            try:
                steps.extend(time_steps(2 * options.rounds + 1, options.cases))
            finally:
                rows += steps
                print(f"\n{table_of_steps(steps)}")
            if jax.default_backend() == "cpu":
                rows += estimate_steps(options.cases)
    finally:
        append_rows(options.out, {"environment": env}, rows)
        print(f"\nrows: {options.out}")


if __name__ == "__main__":
    main()
