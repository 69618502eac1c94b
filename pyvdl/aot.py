"""Compiles a training step, or a batch of captions, for a TPU slice that is only described, and tells what is in it.

`python -m pyvdl.aot REQUEST` is the process that `pyvdl.plan` starts: libtpu reads its environment when it is loaded.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh

from pyvdl import hlo, liveness, train
from pyvdl.config import CaptionConfig, DualEncoderConfig, GemmaConfig, TrainConfig, VLMConfig
from pyvdl.flops import caption_flops, training_flops
from pyvdl.generate import bucket, generate
from pyvdl.models import VLM, DualEncoder
from pyvdl.plan import CHIPS, Chip, Request, captioning_tensor, parse_topology, resolve, suitable_mesh
from pyvdl.recipes import text_lengths
from pyvdl.sharding import BATCH_AXES, TENSOR_AXIS, batch_sharding, make_mesh, shares_of_a_process, tree_shardings
from pyvdl.step import make_step, placed, shapes, split

# Of their floor that attention kernels reach on v5e by the simulator, `python -m bench.tpu_aot`: the towers', T5's with
# a bias on the scores, and JAX's splash.
KERNEL_SHARES = {"joint_attention_": 0.95, "biased_attention_": 0.65, "splash_mha_": 0.4}
CAPTION_TOP_P = 0.95  # the command line's: the nucleus is sorted out whatever its size


def training(request: Request) -> dict[str, Any]:
    """The whole step, sharded over the slice as `pyvdl.train.fit` shards it -> fields of a Plan."""
    shape, run, sizes = resolve(request)
    assert isinstance(run, TrainConfig)
    chip, devices = _described(request)
    make: Any = DualEncoder if request.recipe == "train" else VLM
    model = nnx.eval_shape(lambda: make(shape, rngs=nnx.Rngs(0)))
    graph, *_ = split(model, run.trainable)
    state = shapes(model, run)
    if not _mesh_is_set(request):
        whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state, state.params)))
        fsdp, tensor = suitable_mesh(run, len(devices), whole, chip.hbm_bytes)
        run = dataclasses.replace(run, fsdp=fsdp, tensor=tensor)
    mesh = make_mesh(run.fsdp, run.tensor, devices=devices)
    rows = _rows(mesh)
    if run.batch_size // run.accumulate % rows:
        raise ValueError(
            f"batch_size = {run.batch_size} in {run.accumulate} parts does not divide over {rows} shares: "
            "set fsdp and tensor, or another batch_size"
        )
    shares_of_a_process(mesh)
    state = placed(state, mesh)
    frames = shape.vision.num_frames if request.recipe == "train" else shape.num_frames
    size, batch = shape.vision.image_size, run.batch_size
    arrays = {"video": ((batch, frames, size, size, 3), np.uint8), "ok": ((batch,), np.bool_)}
    if request.recipe == "train":
        arrays |= {"text": ((batch, shape.text.context_length), np.int32), "group": ((batch,), np.int32)}
        loss: Any = train.contrastive_loss_fn
        flops = training_flops(shape, run.trainable, batch)
    else:
        prompt, target = text_lengths("visual" if request.recipe == "visual" else "language", sizes)
        arrays |= {"prompt": ((batch, prompt), np.int32), "target": ((batch, target), np.int32)}
        loss = train.vlm_loss
        flops = training_flops(shape, run.trainable, batch, prompt, target)
    data = _data(arrays, mesh)
    step = make_step(graph, loss, run, mesh)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        text, temporaries, program = _compile(jax.jit(step, donate_argnums=(0, 1)).lower(*state, data))
    seconds = time.perf_counter() - start
    alive = liveness.at_peak(text) if text else liveness.Alive()
    activations = min(alive.activations, temporaries)
    gradients = min(alive.gradients, temporaries - activations)
    trained = _on_a_chip(state.params)
    state_bytes = trained + _on_a_chip(state.frozen) + 2 * _on_a_chip(state.opt_state)
    return {
        "mesh": dict(mesh.shape),
        "copies": 1,
        "hosts": _hosts(devices),
        "batch_size": batch,
        "steps": run.steps,
        "memory": {
            "parameters": trained,
            "frozen": _on_a_chip(state.frozen),
            "optimizer": _on_a_chip(state.opt_state),
            "batch": _on_a_chip(data),
            "program": program,
            "activations": activations,
            "gradients": gradients,
            "temporaries": temporaries - activations - gradients,
        },
        "flops": flops,
        "compile_seconds": seconds,
        **_bounds(text, flops, state_bytes + 2 * trained, chip, mesh, shape),
    }


def captions(request: Request) -> dict[str, Any]:
    """A batch of captions on the chips of one host: hosts caption by themselves -> fields of a Plan."""
    shape, run, sizes = resolve(request)
    assert isinstance(run, CaptionConfig)
    chip, every = _described(request)
    hosts = _hosts(every)
    # The compiler takes whole slices only.
    devices = every if hosts == 1 else topologies.get_topology_desc(platform="tpu", topology_name=chip.host).devices
    graph, state = nnx.split(nnx.eval_shape(lambda: VLM(shape, rngs=nnx.Rngs(0))))
    state = _typed(state, run.param_dtype)
    if not _mesh_is_set(request):
        whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        run = dataclasses.replace(run, tensor=captioning_tensor(len(devices), whole, chip.hbm_bytes))
    mesh = make_mesh(run.fsdp, run.tensor, devices=devices)
    batch, size, rows = run.batch_size, shape.vision.image_size, _rows(mesh)
    if batch % rows:
        raise ValueError(f"batch_size = {batch} does not divide over {rows} shares: set a multiple, or tensor")
    prompt = bucket(sizes.prompt_length)
    arrays = {"video": ((batch, shape.num_frames, size, size, 3), np.uint8), "prompt": ((batch, prompt), np.int32)}
    data = _data(arrays | {"seeds": ((batch,), np.uint32)}, mesh)
    placed = jax.tree.map(_placed, state, tree_shardings(state, mesh))

    def caption(state: Any, batch: Any) -> Any:
        return generate(
            nnx.merge(graph, state),
            batch["video"],
            batch["prompt"],
            seeds=batch["seeds"],
            num_samples=run.num_samples,
            max_length=run.max_length,
            top_p=CAPTION_TOP_P,
        )

    start = time.perf_counter()
    with jax.set_mesh(mesh):
        text, temporaries, program = _compile(jax.jit(caption).lower(placed, data))
    seconds = time.perf_counter() - start
    prefix, suffix = _caches(graph, state, shape, run, mesh, prompt)
    read = _on_a_chip(placed) + run.max_length * (_read_for_a_token(placed, shape) + prefix + suffix // 2)
    flops = batch * caption_flops(shape, prompt, run.num_samples, run.max_length)
    return {
        "mesh": dict(mesh.shape),
        "copies": hosts,
        "hosts": hosts,
        "batch_size": batch,
        "steps": -(-run.clips // (batch * hosts)),
        "memory": {
            "frozen": _on_a_chip(placed),
            "batch": _on_a_chip(data),
            "program": program,
            "caches": prefix + suffix,
            "temporaries": max(temporaries - prefix - suffix, 0),
        },
        "flops": flops,
        "compile_seconds": seconds,
        **_bounds(text, flops, read, chip, mesh, shape),
    }


def _caches(graph: Any, state: Any, shape: VLMConfig, run: CaptionConfig, mesh: Mesh, prompt: int) -> tuple[int, int]:
    """Bytes on a chip of the keys and values of the prefixes, and of the captions' own tokens."""
    language = shape.language
    tokens = shape.num_frames * shape.vision.num_patches + shape.soft_prompt + prompt
    prefix = jax.ShapeDtypeStruct((run.batch_size, tokens, language.width), jnp.dtype(language.dtype))
    mask = jax.ShapeDtypeStruct(prefix.shape[:2], jnp.bool_)

    def start(state: Any, prefix: Any, mask: Any) -> Any:
        return nnx.merge(graph, state).language.start(prefix, mask, run.num_samples, run.max_length)[1]

    cache = jax.eval_shape(start, state, prefix, mask)
    heads = language.num_kv_heads if isinstance(language, GemmaConfig) else language.num_heads
    split = mesh.shape[TENSOR_AXIS] if heads % mesh.shape[TENSOR_AXIS] == 0 else 1
    own = cache.keys.size * cache.keys.dtype.itemsize * 2
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    return (whole - own) // _rows(mesh) // split, own // _rows(mesh) // split


def _read_for_a_token(placed: Any, shape: VLMConfig) -> int:
    """Bytes of the parameters on a chip that one more token of every caption needs: the decoder with its head."""
    language = placed["language"]
    if isinstance(shape.language, GemmaConfig):
        return _on_a_chip(language)  # the head is the embedding
    return sum(_on_a_chip(language[name]) for name in ("decoder", "decoder_norm", "head"))


def _described(request: Request) -> tuple[Chip, Sequence[Any]]:
    name, _ = parse_topology(request.topology)
    return CHIPS[name], topologies.get_topology_desc(platform="tpu", topology_name=request.topology).devices


def _hosts(devices: Sequence[Any]) -> int:
    return len({device.process_index for device in devices})


def _mesh_is_set(request: Request) -> bool:
    return any(re.match(r"\s*(fsdp|tensor)\s*=", change) for change in request.assignments)


def _typed(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


def _placed(x: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _data(arrays: dict[str, tuple[tuple[int, ...], Any]], mesh: Mesh) -> dict[str, Any]:
    sharding = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, (shape, dtype) in arrays.items()}


def _rows(mesh: Mesh) -> int:
    """Shares of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _on_a_chip(tree: Any) -> int:
    """Bytes of placed arrays on each chip."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves)


def _compile(lowered: Any) -> tuple[str, int, int]:
    """The text of the compiled program, and the bytes of its temporaries and of itself on a chip.

    Of one whose temporaries are larger than a chip's memory the compiler tells these alone: no text then.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"CompileTimeHbmOom.*?([\d.]+)([KMGT])\)? exceeds", str(error), re.DOTALL)
        if not found:
            raise
        return "", round(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2]))), 0
    memory = compiled.memory_analysis()
    return compiled.as_text(), memory.temp_size_in_bytes, memory.generated_code_size_in_bytes


def _bounds(
    text: str, flops: float, hbm_bytes: float, chip: Chip, mesh: Mesh, shape: DualEncoderConfig | VLMConfig
) -> dict[str, Any]:
    """Exchanges, and the seconds that each part of the machine would need alone; fields of a Plan.

    text: of the program, if the compiler gave one. hbm_bytes: that a chip reads and writes at least.
    """
    bounds = {"MXU": flops / mesh.size / chip.flops_per_second, "HBM": hbm_bytes / chip.hbm_bytes_per_second}
    if not text:
        return {"compiled": False, "collectives": {}, "bounds": bounds}
    sent: dict[str, float] = collections.defaultdict(float)
    for row in hlo.collectives(text):
        sent[row.kind] += row.sent_bytes
    cycles, kernel_seconds = 0, 0.0
    head_dim = shape.language.head_dim if isinstance(shape, VLMConfig) else shape.text.width // shape.text.num_heads
    head_dims = dict.fromkeys(KERNEL_SHARES, head_dim) | {"joint_attention_": shape.vision.head_dim}
    for label, opcode, line, trips in hlo.scheduled(text):
        if trips is None:
            raise hlo.UnreadableError(f"how often does the loop {label} run?")
        if estimated := re.findall(r'"?estimated_cycles"?:"?(\d+)', line):
            cycles += int(estimated[-1]) * trips
        if opcode == "custom-call" and (name := next((name for name in KERNEL_SHARES if name in label), None)):
            kernel_seconds += trips * _kernel_floor(label, line, head_dims[name], chip) / KERNEL_SHARES[name]
    return {
        "compiled": True,
        "collectives": dict(sent),
        "bounds": bounds
        | {
            "interconnect": sum(sent.values()) / chip.link_bytes_per_second,
            "compiler": cycles / chip.clock_hz + kernel_seconds,
        },
    }


def _kernel_floor(label: str, line: str, head_dim: int, chip: Chip) -> float:
    """Least seconds of a call of an attention kernel, which the compiler does not estimate.

    Heads fill D columns of a matrix unit in one product of two (kernels/attention_tpu.py).
    """
    shape = re.search(r"\[(\d+),(\d+),(\d+)(?:,(\d+))?\]", line)  # of the first result: [B, S, N * D] or [B, N, S, D]
    if shape is None:
        raise hlo.UnreadableError(f"cannot read the instruction {line[:200]}")
    rows, second, third = map(int, shape.groups()[:3])
    heads, tokens = (second, third) if shape[4] else (third // head_dim, second)
    filled = min(head_dim / chip.mxu_width, 1)
    product = 2.0 * rows * heads * tokens**2 * max(chip.mxu_width, head_dim)
    products = 2 + 3 * filled if "backward" in label else 1 + filled
    return product * products / chip.flops_per_second


def main(arguments: Sequence[str]) -> None:
    """The process that `pyvdl.plan.plan` starts: a request as JSON; the last line it prints is the answer."""
    fields = json.loads(arguments[0])
    request = Request(**fields | {"assignments": tuple(fields["assignments"])})
    found = captions(request) if request.recipe == "caption" else training(request)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(found | {"peak_compile_bytes": peak}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
