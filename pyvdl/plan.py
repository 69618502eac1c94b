"""What a recipe needs on a TPU slice that is not there: `pyvdl plan`.

libtpu holds the whole TPU compiler and compiles for a topology that is only described. The whole training step of a
recipe, sharded as `fit` shards it, is compiled in a process of its own (`pyvdl.aot`); its memory is the compiler's
account, its exchanges are read from the compiled program. What of the temporaries are activations and gradients is an
estimate from its text (`pyvdl.liveness`). The step's time is an estimate: the longest of four bounds, three by the
chips' data sheets, and one by the compiler's own estimates of its fusions. Nothing is measured.

Captioning needs no exchanges between hosts: each has a model of its own and captions its own shards. So a batch of
captions is compiled for the chips of one host, and a slice does that as many times over.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyvdl.config import PRESETS, CaptionConfig, Preset, TrainConfig
from pyvdl.flops import PEAK_FLOPS
from pyvdl.overrides import override_training

RECIPES = ("visual", "language", "train", "caption")
PATIENCE_SECONDS = 600.0
# Clips a second of one core: 16 frames of clips of 240p to 1080p, `python -m bench.decode --modes batch`.
DECODE_CLIPS_PER_CORE = 1.75
STATE_SHARE = 0.2  # of a chip's memory, for parameters, gradients and the optimizer's state, where nothing is set
CAPTION_SHARE = 0.5  # of a chip's memory, for the parameters of a model that captions


@dataclass(frozen=True)
class Chip:
    """Figures of the data sheets: cloud.google.com/tpu/docs/v5e, v5p and v6e."""

    flops_per_second: float  # bfloat16
    hbm_bytes: int
    hbm_bytes_per_second: float
    link_bytes_per_second: float  # all links of a chip together, one direction
    clock_hz: float  # the peak over the operations of a cycle
    mxu_width: int  # contraction and columns of one product of a matrix unit
    accelerator: str  # what libtpu is told to compile for
    host: str  # the topology of one host of a larger slice


CHIPS = {
    "v5e": Chip(PEAK_FLOPS["TPU v5 lite"], 16 << 30, 819e9, 200e9, 1.5e9, 128, "v5litepod-4", "v5e:2x2"),
    "v5p": Chip(PEAK_FLOPS["TPU v5"], 95 << 30, 2765e9, 600e9, 1.75e9, 128, "v5p-8", "v5p:2x2x1"),
    "v6e": Chip(PEAK_FLOPS["TPU v6 lite"], 32 << 30, 1640e9, 448e9, 1.75e9, 256, "v6e-4", "v6e:2x2"),
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


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each chip. The last three together are the compiler's account of its temporaries."""

    parameters: int = 0  # that are trained
    frozen: int = 0  # those that are not
    optimizer: int = 0
    batch: int = 0
    program: int = 0
    caches: int = 0  # of keys and values, of captions
    activations: int = 0  # kept for the backward pass, when most memory is needed
    gradients: int = 0  # there at the same time
    temporaries: int  # all else

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Plan:
    """What the compiler said of a step, or of a batch of captions, and what follows."""

    request: Request
    mesh: dict[str, int]
    copies: int  # of the mesh, each with a batch of its own: the hosts where they caption, else 1
    hosts: int
    batch_size: int
    steps: int
    memory: Memory
    compiled: bool  # else the temporaries alone are more than a chip has, and only they are known of the program
    flops: float  # of the whole step on all chips of a mesh, that the model needs
    bounds: dict[str, float]  # seconds of a step that each would take alone
    collectives: dict[str, float]  # bytes that a chip sends, by kind
    compile_seconds: float
    peak_compile_bytes: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.request.topology.partition(":")[0]]

    @property
    def chips(self) -> int:
        return self.copies * math.prod(self.mesh.values())

    @property
    def fits(self) -> bool:
        return self.compiled and self.memory.total <= self.chip.hbm_bytes

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
        memory, half = self.memory, self.chip.hbm_bytes / 2
        state = memory.parameters + memory.frozen + memory.optimizer
        data, fsdp, tensor = self.mesh["data"], self.mesh["fsdp"], self.mesh["tensor"]
        shape, run, _ = resolve(self.request)
        found = []
        if self.request.recipe == "caption":
            rows = data * fsdp
            if memory.total - state > half and self.batch_size > rows:
                found.append(f"--set batch_size={max(rows, self.batch_size // 2)}: fewer clips at a time")
        else:
            assert isinstance(run, TrainConfig)
            if memory.activations + memory.gradients + memory.temporaries > half:
                towers = ("vision", "text" if self.request.recipe == "train" else "language")
                if keeping := [name for name in towers if not getattr(shape, name).remat]:
                    found.append(" ".join(f"--set model.{name}.remat=True" for name in keeping) + ": keeps less")
                parts = 2 * run.accumulate
                if self.batch_size % (parts * data * fsdp) == 0:
                    found.append(f"--set accumulate={parts}: parts of the batch one after the other")
            if state > self.chip.hbm_bytes / 4 and data % 2 == 0:
                text = f"{state / 2**30:.1f} GiB of state are split further"
                found.append(f"--set fsdp={2 * fsdp} --set tensor={tensor}: {text}")
        if data * fsdp % 2 == 0:
            rest = fsdp if data % 2 == 0 else fsdp // 2
            found.append(f"--set fsdp={rest} --set tensor={2 * tensor}: matrices and activations are split")
        found.append("a larger slice, or chips with more memory")
        return found


def parse_topology(text: str) -> tuple[str, int]:
    """ "v5e:8x16" -> ("v5e", 128)."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    if not match or match[1] not in CHIPS:
        raise ValueError(f"topology must be CHIP:AxB, CHIP one of {', '.join(CHIPS)} (v5e:8x16), not {text!r}")
    return match[1], math.prod(int(part) for part in match[2].split("x"))


def resolve(request: Request) -> tuple[Any, TrainConfig | CaptionConfig, Preset]:
    """The model's settings, the run's, and the preset."""
    if request.recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, not {request.recipe!r}")
    if request.preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {request.preset!r}")
    sizes = PRESETS[request.preset]()
    if request.recipe == "caption":
        job, model = override_training(CaptionConfig(), sizes.vlm, request.assignments)
        return model, job, sizes
    chosen = {"visual": sizes.visual, "language": sizes.language, "train": sizes.contrastive}[request.recipe]
    shape: Any = sizes.dual_encoder if request.recipe == "train" else sizes.vlm
    run, shape = override_training(chosen, shape, request.assignments)
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


def captioning_tensor(chips: int, parameter_bytes: int, hbm_bytes: int) -> int:
    """Chips of a host that a model has to be split over; the host's other chips take clips of their own."""
    candidates = [tensor for tensor in range(1, chips + 1) if chips % tensor == 0]
    enough = (tensor for tensor in candidates if parameter_bytes / tensor <= CAPTION_SHARE * hbm_bytes)
    return next(enough, chips)


def plan(request: Request) -> Plan:
    """Compiles the step in a process of its own. Raises PlanError, or ValueError for what cannot be asked for."""
    chip, _ = parse_topology(request.topology)
    resolve(request)
    environment = compiler_environment(CHIPS[chip].accelerator)
    command = [sys.executable, "-m", "pyvdl.aot", json.dumps(dataclasses.asdict(request))]
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


def describe(found: Plan) -> str:
    """A plan for the eye."""
    chip, memory, gib = found.chip, found.memory, 2**30
    captions = found.request.recipe == "caption"
    clips = found.copies * found.batch_size / found.step_seconds
    cores = clips / DECODE_CLIPS_PER_CORE / found.hosts
    hours = found.steps * found.step_seconds / 3600
    mesh = " x ".join(f"{name} {size}" for name, size in found.mesh.items())
    parts = {
        "parameters" if captions else "parameters trained": memory.frozen if captions else memory.parameters,
        "parameters frozen": 0 if captions else memory.frozen,
        "optimizer": memory.optimizer,
        "batch": memory.batch,
        "program": memory.program,
        "keys and values": memory.caches,
        "activations, at the peak (estimate)": memory.activations,
        "gradients, at the peak (estimate)": memory.gradients,
        "other temporaries": memory.temporaries,
    }
    one = "batch" if captions else "step"
    where = f"each of {found.copies} hosts: {mesh}" if captions else mesh
    lines = [
        f"{found.request.recipe} ({found.request.preset}) on {found.request.topology}: {found.chips} chips, {where}",
        f"batch {found.batch_size}, {found.flops / 1e12:.0f} TFLOP a {one}; nothing was measured on a TPU",
    ]
    if captions:
        _, job, _ = resolve(found.request)
        assert isinstance(job, CaptionConfig)
        lines.append(f"{job.clips} clips, {job.num_samples} captions of at most {job.max_length} tokens for each")
    else:
        fsdp, tensor = found.mesh["fsdp"], found.mesh["tensor"]
        lines.append(f"training takes --set fsdp={fsdp} --set tensor={tensor} for this mesh")
    lines += [
        "",
        *(f"  {name:<38}{size / gib:8.2f} GiB a chip" for name, size in parts.items() if size),
        f"  {'total':<38}{memory.total / gib:8.2f} of {chip.hbm_bytes / gib:.0f} GiB: "
        f"{'fits' if found.fits else 'DOES NOT FIT'}",
        *([] if found.compiled else ["  the compiler stopped there: what the program sends is not known"]),
        "",
        *(f"  {name:<38}{size / 1e6:8.0f} MB sent by a chip, each {one}" for name, size in found.collectives.items()),
        *([""] if found.collectives else []),
        *(f"  {f'time by {name}':<38}{1000 * seconds:8.1f} ms" for name, seconds in found.bounds.items()),
        f"  {one:<38}{1000 * found.step_seconds:8.1f} ms at least, bound by {found.binding}",
        *([f"  {'share of peak':<38}{found.bounds['MXU'] / found.step_seconds:8.0%}"] if found.compiled else []),
        "",
        f"  {clips:.0f} clips a second: {cores:.0f} decoding cores on each of {found.hosts} hosts "
        f"({DECODE_CLIPS_PER_CORE} clips a second of a core)",
        f"  {found.steps} {'batches on each host' if captions else 'steps'}: {hours:.1f} hours, "
        f"{hours * found.chips:.0f} chip-hours",
        f"  compiled in {found.compile_seconds:.0f} s with {found.peak_compile_bytes / gib:.1f} GiB of memory here",
    ]
    lines += [f"  to make it fit: {advice}" for advice in found.advice()]
    return "\n".join(lines)
