"""What a recipe needs on a TPU slice that is not there: `pyvdl plan`.

libtpu holds the whole TPU compiler and compiles for a topology that is only described. The whole training step of a
recipe, sharded as `fit` shards it, is compiled in a process of its own; its memory is the compiler's account, its
exchanges are read from the compiled program. The step's time is an estimate: the longest of four bounds, three by the
chips' data sheets, and one by the compiler's own estimates of its fusions. Nothing is measured.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyvdl import config as settings
from pyvdl.config import Preset, TrainConfig
from pyvdl.flops import dual_encoder_flops, vision_flops, vlm_flops

RECIPES = ("visual", "language", "train")
PATIENCE_SECONDS = 600.0
# Clips a second of one core: 16 frames of clips of 240p to 1080p, `python -m bench.decode --modes batch`.
DECODE_CLIPS_PER_CORE = 1.75
STATE_SHARE = 0.2  # of a chip's memory, for parameters, gradients and the optimizer's state, where nothing is set
KERNEL_SHARE = 0.95  # of their floor that the attention kernels reach by the simulator, `python -m bench.tpu_aot`


@dataclass(frozen=True)
class Chip:
    """Figures of the data sheets: cloud.google.com/tpu/docs/v5e, v5p and v6e."""

    flops_per_second: float  # bfloat16
    hbm_bytes: int
    hbm_bytes_per_second: float
    link_bytes_per_second: float  # all links of a chip together, one direction
    clock_hz: float  # the peak over the operations of a cycle
    accelerator: str  # what libtpu is told to compile for


CHIPS = {
    "v5e": Chip(197e12, 16 << 30, 819e9, 200e9, 1.5e9, "v5litepod-4"),
    "v5p": Chip(459e12, 95 << 30, 2765e9, 600e9, 1.75e9, "v5p-8"),
    "v6e": Chip(918e12, 32 << 30, 1640e9, 448e9, 1.75e9, "v6e-4"),
}


class PlanError(RuntimeError):
    """A recipe that cannot be planned. The text says why and what to change."""


@dataclass(frozen=True)
class Request:
    """What is to be compiled."""

    recipe: str
    preset: str
    topology: str  # "v5e:8x16"
    assignments: tuple[str, ...] = ()
    vocab_size: int = 32_128


@dataclass(frozen=True)
class Memory:
    """Bytes on each chip."""

    parameters: int
    frozen: int
    optimizer: int
    batch: int
    temporaries: int  # activations, gradients and what the step needs meanwhile, by the compiler's account

    @property
    def total(self) -> int:
        return self.parameters + self.frozen + self.optimizer + self.batch + self.temporaries


@dataclass(frozen=True)
class Plan:
    """What the compiler said of a step, and what follows."""

    request: Request
    chips: int
    hosts: int
    mesh: dict[str, int]
    batch_size: int
    steps: int
    memory: Memory
    flops: float  # of the whole step on all chips, that the model needs
    bounds: dict[str, float]  # seconds of a step that each would take alone
    collectives: dict[str, float]  # bytes that a chip sends, by kind
    compile_seconds: float
    peak_compile_bytes: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.request.topology.partition(":")[0]]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.chip.hbm_bytes

    @property
    def step_seconds(self) -> float:
        return max(self.bounds.values())

    @property
    def binding(self) -> str:
        return max(self.bounds, key=lambda name: self.bounds[name])

    def advice(self) -> list[str]:
        """What would make it fit, the likeliest first."""
        if self.fits:
            return []
        state = self.memory.parameters + self.memory.frozen + self.memory.optimizer
        found = []
        if self.memory.temporaries > self.chip.hbm_bytes / 2:
            found.append("--set model.vision.remat=True (and model.language.remat or model.text.remat): keeps less")
            found.append("--set accumulate=2 (or 4, ...): parts of the batch one after the other")
        fsdp, tensor = self.mesh["fsdp"], self.mesh["tensor"]
        if state > self.chip.hbm_bytes / 4 and self.mesh["data"] % 2 == 0:
            text = f"{state / 2**30:.1f} GiB of state are split further"
            found.append(f"--set fsdp={2 * fsdp} --set tensor={tensor}: {text}")
        found.append(f"--set fsdp={fsdp} --set tensor={2 * tensor}: matrices and activations are split")
        found.append("a larger slice, or chips with more memory")
        return found


def parse_topology(text: str) -> tuple[str, int]:
    """ "v5e:8x16" -> ("v5e", 128)."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    if not match or match[1] not in CHIPS:
        raise ValueError(f"topology must be CHIP:AxB, CHIP one of {', '.join(CHIPS)} (v5e:8x16), not {text!r}")
    return match[1], math.prod(int(part) for part in match[2].split("x"))


def resolve(request: Request) -> tuple[Any, TrainConfig, Preset]:
    """The model's settings, the run's, and the preset."""
    if request.recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, not {request.recipe!r}")
    if request.preset not in settings.PRESETS:
        raise ValueError(f"preset must be one of {', '.join(settings.PRESETS)}, not {request.preset!r}")
    sizes = settings.PRESETS[request.preset](request.vocab_size)
    chosen = {"visual": sizes.visual, "language": sizes.language, "train": sizes.contrastive}[request.recipe]
    shape: Any = sizes.dual_encoder if request.recipe == "train" else sizes.vlm
    run, shape = settings.override_training(chosen, shape, request.assignments)
    return shape, run, sizes


def suitable_mesh(run: TrainConfig, chips: int, state_bytes: int, hbm_bytes: int) -> tuple[int, int]:
    """-> fsdp, tensor: clips for as many chips as there can be, and no more splitting of the state than it needs.

    state_bytes: parameters, gradients and the optimizer's state together.
    """
    rows = math.gcd(chips, run.batch_size // run.accumulate)  # chips that get clips of their own
    tensor = chips // rows
    candidates = [fsdp for fsdp in range(1, rows + 1) if rows % fsdp == 0]
    enough = (fsdp for fsdp in candidates if state_bytes / (fsdp * tensor) <= STATE_SHARE * hbm_bytes)
    fsdp = next(enough, rows)
    return fsdp, tensor


def plan(request: Request) -> Plan:
    """Compiles the step in a process of its own. Raises PlanError, or ValueError for what cannot be asked for."""
    chip, _ = parse_topology(request.topology)
    resolve(request)
    environment = compiler_environment(CHIPS[chip].accelerator)
    command = [sys.executable, "-m", "pyvdl.plan", json.dumps(dataclasses.asdict(request))]
    try:
        done = subprocess.run(command, env=environment, timeout=PATIENCE_SECONDS, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        raise PlanError(f"the compiler gave no answer in {PATIENCE_SECONDS:.0f} s") from None
    if done.returncode:
        reason = reason_of(done.stderr) or f"the compiler's process ended with code {done.returncode}"
        raise PlanError(f"{request.recipe} does not compile for {request.topology}: {reason}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Plan(**found | {"request": request, "memory": Memory(**found["memory"])})


def compiler_environment(accelerator: str) -> dict[str, str]:
    """Of a process that compiles for a TPU which is not there. libtpu reads it when it is loaded."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_ACCELERATOR_TYPE": accelerator,
        # libtpu must not look for this machine's TPU, nor take the lock that guards one.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "PYTHONPATH": os.pathsep.join(filter(None, [_libtpu(), os.environ.get("PYTHONPATH", "")])),
    }


def reason_of(errors: str) -> str:
    """The line of such a process that says what went wrong: the exception's, or libtpu's check."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    told = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception): |F\d{4} ", line)]
    return (told or lines or [""])[-1][:400]


def _libtpu() -> str:
    """The folder to look for libtpu in; empty where it is installed."""
    if any(True for _ in importlib.metadata.distributions(name="libtpu")):
        return ""
    folder = Path(__file__).resolve().parents[1] / "build" / "libtpu"
    if not folder.is_dir():
        raise PlanError("planning needs libtpu, TPU's compiler: `make libtpu`, or pip install libtpu; no TPU is needed")
    return str(folder)


# --- the process that compiles


def _compile(request: Request) -> dict[str, Any]:
    import jax
    import numpy as np
    from flax import nnx
    from jax.experimental import topologies

    from pyvdl import hlo, train
    from pyvdl.models import VLM, DualEncoder
    from pyvdl.optim import make_optimizer
    from pyvdl.sharding import BATCH_AXES, batch_sharding, make_mesh
    from pyvdl.step import State, make_step, shardings, split

    shape, run, sizes = resolve(request)
    chip, _ = parse_topology(request.topology)
    described = topologies.get_topology_desc(platform="tpu", topology_name=request.topology)
    make: Any = DualEncoder if request.recipe == "train" else VLM
    model = nnx.eval_shape(lambda: make(shape, rngs=nnx.Rngs(0)))
    graph, params, frozen, rest = split(model, run.trainable)
    params, frozen = (
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, run.param_dtype), tree) for tree in (params, frozen)
    )
    opt_state = jax.eval_shape(make_optimizer(run.optim, run.steps).init, params)
    state = State(params, opt_state, rest, frozen)
    if not any(re.match(r"(fsdp|tensor)=", change) for change in request.assignments):
        whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state, params)))
        fsdp, tensor = suitable_mesh(run, len(described.devices), whole, CHIPS[chip].hbm_bytes)
        run = dataclasses.replace(run, fsdp=fsdp, tensor=tensor)
    mesh = make_mesh(run.fsdp, run.tensor, devices=described.devices)
    rows = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if run.batch_size // run.accumulate % rows:
        raise ValueError(
            f"batch_size = {run.batch_size} in {run.accumulate} parts does not divide over {rows} shares: "
            "set fsdp and tensor, or another batch_size"
        )
    placed = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, shardings(state, mesh)
    )
    frames = shape.vision.num_frames if request.recipe == "train" else shape.num_frames
    size, batch = shape.vision.image_size, run.batch_size
    arrays = {"video": ((batch, frames, size, size, 3), np.uint8), "ok": ((batch,), np.bool_)}
    if request.recipe == "train":
        arrays |= {"text": ((batch, shape.text.context_length), np.int32), "group": ((batch,), np.int32)}
        loss: Any = train.contrastive_loss_fn
        flops = 3 * dual_encoder_flops(shape, batch)
    else:
        prompt = sizes.prompt_length
        target = sizes.caption_length if request.recipe == "visual" else sizes.target_length
        arrays |= {"prompt": ((batch, prompt), np.int32), "target": ((batch, target), np.int32)}
        loss = train.vlm_loss
        seen = vision_flops(shape)
        heard = vlm_flops(shape, prompt, target) - seen
        # Backward there are as many again for the inputs and for the weights. A frozen language model in front of a
        # trained tower needs the former only, a frozen tower neither.
        flops = batch * (3 * seen + 2 * heard if request.recipe == "visual" else seen + 3 * heard)
    data = {
        name: jax.ShapeDtypeStruct(wanted, dtype, sharding=batch_sharding(mesh))
        for name, (wanted, dtype) in arrays.items()
    }
    start = time.perf_counter()
    step = make_step(graph, loss, run, mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*placed, data).compile()
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None

    def on_a_chip(tree: Any) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves)

    sent: dict[str, float] = collections.defaultdict(float)
    for row in hlo.collectives(text):
        sent[row.kind] += row.sent_bytes
    cycles, kernels = 0, 0
    for _, opcode, line, trips in hlo.scheduled(text):
        if estimated := re.findall(r'"?estimated_cycles"?:"?(\d+)', line):
            cycles += int(estimated[-1]) * (trips or 1)
        kernels += opcode == "custom-call" and "tpu_custom_call" in line
    figures = CHIPS[chip]
    peak = figures.flops_per_second * mesh.size
    state_bytes = on_a_chip(placed.params) + on_a_chip(placed.frozen) + 2 * on_a_chip(placed.opt_state)
    bounds = {
        "MXU": flops / peak,
        "HBM": (state_bytes + 2 * on_a_chip(placed.params)) / figures.hbm_bytes_per_second,
        "interconnect": sum(sent.values()) / figures.link_bytes_per_second,
        "compiler": cycles / figures.clock_hz + (_kernel_seconds(shape, run, figures, mesh.size) if kernels else 0),
    }
    import resource

    return {
        "chips": mesh.size,
        "hosts": len({getattr(device, "process_index") for device in described.devices}),  # noqa: B009
        "mesh": dict(mesh.shape),
        "batch_size": batch,
        "steps": run.steps,
        "memory": {
            "parameters": on_a_chip(placed.params),
            "frozen": on_a_chip(placed.frozen),
            "optimizer": on_a_chip(placed.opt_state),
            "batch": on_a_chip(data),
            "temporaries": memory.temp_size_in_bytes,
        },
        "flops": flops,
        "bounds": bounds,
        "collectives": dict(sent),
        "compile_seconds": seconds,
        "peak_compile_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _kernel_seconds(shape: Any, run: TrainConfig, chip: Chip, chips: int) -> float:
    """Of the attention kernels, which the compiler does not estimate: their floors, by `KERNEL_SHARE`.

    Heads of up to 128 fill D of 128 columns of a matrix unit in one product of two (kernels/attention_tpu.py).
    """
    vision = shape.vision
    clips = run.batch_size * (1 if vision.num_frames > 1 else shape.num_frames)
    tokens = vision.num_frames * vision.num_patches + vision.class_token
    head_dim = min(vision.head_dim, 128)
    products = 2.0 * clips * vision.depth * vision.num_heads * tokens**2 * 128  # of one padded product
    passes = (1 + head_dim / 128) * (2 if vision.remat else 1)
    if any(prefix in ("", "vision") for prefix in run.trainable):
        passes += 2 + 3 * head_dim / 128
    return products * passes / (chip.flops_per_second * chips) / KERNEL_SHARE


def describe(found: Plan, decode_rate: float = DECODE_CLIPS_PER_CORE) -> str:
    """A plan for the eye."""
    chip, memory, gib = found.chip, found.memory, 2**30
    clips = found.batch_size / found.step_seconds
    cores = clips / decode_rate / found.hosts
    hours = found.steps * found.step_seconds / 3600
    mesh = " x ".join(f"{name} {size}" for name, size in found.mesh.items())
    parts = [
        ("parameters trained", memory.parameters),
        ("parameters frozen", memory.frozen),
        ("optimizer", memory.optimizer),
        ("batch", memory.batch),
        ("activations, gradients, temporaries", memory.temporaries),
    ]
    verdict = "fits" if found.fits else "DOES NOT FIT"
    lines = [
        f"{found.request.recipe} ({found.request.preset}) on {found.request.topology}: {found.chips} chips, {mesh}",
        f"batch {found.batch_size}, {found.flops / 1e12:.0f} TFLOP a step; nothing was measured on a TPU",
        f"training takes --set fsdp={found.mesh['fsdp']} --set tensor={found.mesh['tensor']} for this mesh",
        "",
        *(f"  {name:<38}{size / gib:8.2f} GiB a chip" for name, size in parts),
        f"  {'total':<38}{memory.total / gib:8.2f} of {chip.hbm_bytes / gib:.0f} GiB: {verdict}",
        "",
        *(f"  {name:<38}{size / 1e6:8.0f} MB sent by a chip, each step" for name, size in found.collectives.items()),
        "",
        *(f"  {f'time by {name}':<38}{1000 * seconds:8.1f} ms" for name, seconds in found.bounds.items()),
        f"  {'step':<38}{1000 * found.step_seconds:8.1f} ms at least, bound by {found.binding}",
        f"  {'share of peak':<38}{found.bounds['MXU'] / found.step_seconds:8.0%}",
        "",
        f"  {clips:.0f} clips a second: {cores:.0f} decoding cores on each of {found.hosts} hosts "
        f"({decode_rate} clips a second of a core)",
        f"  {found.steps} steps: {hours:.1f} hours, {hours * found.chips:.0f} chip-hours",
        f"  compiled in {found.compile_seconds:.0f} s with {found.peak_compile_bytes / gib:.1f} GiB of memory here",
    ]
    lines += [f"  to make it fit: {advice}" for advice in found.advice()]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """The process that `plan` starts: a request as JSON; the last line it prints is the answer."""
    request = json.loads(arguments[0])
    request["assignments"] = tuple(request["assignments"])
    print(json.dumps(_compile(Request(**request))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
