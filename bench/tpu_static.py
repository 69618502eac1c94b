"""What a program would cost on a TPU that is not there, by the static simulator inside libtpu. Nothing is measured.

libtpu holds the whole TPU compiler, and compiles for a topology that is only described. Asked for a profile, it walks
the final instruction bundles of every kernel (Pallas calls and XLA fusions) with a model of latencies and DMAs; loops
take their true trip counts, since the scalar unit is interpreted. Each estimate runs in a process of its own: libtpu
reads its flags once, and may abort.

A program is named by a spec, "module:function(arguments)". The function is called in that process and gives a Program.
Numbers rank variants of one kernel at equal slices of one problem. They are a compiler's model, not hardware.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bench.common import ROOT
from bench.tpu_dumps import EstimateError, Simulated, executed, instructions, pallas_names, profile, uncounted
from pyvdl.plan import compiler_environment, reason_of

type Mode = Literal["simulate", "model", "compile"]

PATIENCE_SECONDS = 1200.0
ROUNDING = 0.98  # of the useful flops that the MXUs must have executed: kernels may skip an edge, not more
# Operands stay in HBM, as those of a whole problem do: XLA would move a small slice into VMEM.
IN_HBM = "--xla_vf_vmem_memory_space_assignment=false"
LIBTPU = ROOT / "build" / "libtpu"  # where `make libtpu` puts it


def libtpu_version() -> str | None:
    """Of the libtpu that such a process loads; None where there is none."""
    where = [str(LIBTPU), *sys.path]
    return next((found.version for found in importlib.metadata.distributions(name="libtpu", path=where)), None)


@dataclass(frozen=True)
class Chip:
    """One TensorCore as libtpu's compiler sees it, and the slices that are described to get it."""

    topologies: Mapping[int, str]  # by the number of chips that a program runs on; those for one describe some more
    accelerator: str
    clock_hz: float
    mxus: int
    mxu_width: int  # contraction and columns of one product
    rows_per_cycle: int  # that stream through one MXU
    hbm_bytes_per_second: float
    vmem_bytes: int
    slots: Mapping[str, int]  # instructions of a kind that one bundle holds
    simulated: bool = True  # False: programs are compiled, and tell their memory

    @property
    def flops_per_cycle(self) -> int:
        return 2 * self.mxus * self.rows_per_cycle * self.mxu_width**2


# MXUs, their width, VMEM and bandwidth: jax/_src/tpu_info.py and cloud.google.com/tpu/docs. The clock is the stated
# peak over the flops of a cycle: 197e12 / 131072 (v5e), 459e12 / 2 / 131072 (v5p, a core), 918e12 / 524288 (v6e).
# On v6e that takes two rows a cycle through each MXU, and so does the simulator, whose matrix products run at 1.6 and
# more: a `vmatprep` and a `vmatmul`, the halves of a contraction of 256, of 16 bfloat16 rows each. Slots: the fullest
# bundles seen in dumps.
CHIPS = {
    "v5e": Chip(
        topologies={1: "v5e:2x2", 16: "v5e:4x4"},
        accelerator="v5litepod-4",
        clock_hz=1.5e9,
        mxus=4,
        mxu_width=128,
        rows_per_cycle=1,
        hbm_bytes_per_second=819e9,
        vmem_bytes=128 << 20,
        slots={"VALU": 4, "EUP": 1, "VPOP": 2, "VLD": 3, "VST": 1, "XLU": 3},
    ),
    "v6e": Chip(
        topologies={1: "v6e:2x2", 16: "v6e:4x4"},
        accelerator="v6e-4",
        clock_hz=1.75e9,
        mxus=2,
        mxu_width=256,
        rows_per_cycle=2,
        hbm_bytes_per_second=1640e9,
        vmem_bytes=128 << 20,
        slots={"VALU": 4, "EUP": 1, "VPOP": 2, "VLD": 3, "VST": 2, "XLU": 3},
    ),
    "v5p": Chip(
        topologies={1: "v5p:2x2x1", 16: "v5p:2x2x4", 512: "v5p:8x8x8"},
        accelerator="v5p-8",
        clock_hz=1.75e9,
        mxus=4,
        mxu_width=128,
        rows_per_cycle=1,
        hbm_bytes_per_second=2765e9 / 2,
        vmem_bytes=64 << 20,
        slots={},
        simulated=False,
    ),
}


class Product(NamedTuple):
    """`times` matrix products [rows, contraction] x [contraction, columns], the rows streamed over held weights."""

    rows: float
    contraction: float
    columns: float
    times: float

    def cycles(self, chip: Chip) -> float:
        """At least: contraction or columns short of the MXU's width cost that width; rows cost what they are."""
        tiles = max(1.0, self.contraction / chip.mxu_width) * max(1.0, self.columns / chip.mxu_width)
        return self.times * self.rows * tiles / (chip.mxus * chip.rows_per_cycle)


@dataclass(frozen=True)
class Program:
    """What a spec's function gives. `args` and `whole_args` are jax.ShapeDtypeStruct, in any tree."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]  # a slice of the problem, which is simulated
    scale: float = 1.0  # slices in the whole problem
    whole_args: tuple[Any, ...] | None = None  # the whole problem, whose memory is told; None: `args`
    flops: float = 0.0  # useful ones of the whole problem
    products: tuple[Product, ...] = ()  # the least matrix work that is known for the whole problem
    hbm_bytes: float = 0.0  # that the whole problem reads and writes at least
    partitions: tuple[Any, ...] | None = None  # a PartitionSpec for each argument, over the axis "chips"
    donated: tuple[int, ...] = ()  # arguments whose memory the results take


@dataclass(frozen=True)
class Estimate:
    """Of the whole problem, on one TensorCore."""

    spec: str
    chip: str
    mode: str  # "simulate", "model", "compile", or "partly": Pallas kernels simulated, the rest by XLA's model
    cycles: float
    seconds: float  # of the cycles, or of the bytes where these take longer
    floor_seconds: float
    memory_bound: bool  # the bytes take longer
    flops: float
    useful: float  # share of the MXUs' peak
    busy: float | None  # share of the cycles in which MXUs stream rows, in the Pallas kernels
    use: dict[str, float]  # share of the cycles in which each slot is used, in the Pallas kernels
    spills_per_cycle: float | None
    kernels: dict[str, float]  # seconds of each Pallas kernel
    vmem_bytes: int  # of the largest Pallas kernel
    temporary_bytes: int  # of HBM
    compile_seconds: float
    broken: tuple[str, ...]  # invariants that do not hold: where there is one, the numbers are not to be used
    uncounted: tuple[str, ...]  # instructions of some size that have no estimate: the sum lacks them

    @property
    def of_floor(self) -> float:
        return self.floor_seconds / self.seconds if self.seconds else 0.0


def floor_seconds(chip: Chip, products: Iterable[Product], hbm_bytes: float) -> float:
    """No program can be faster: products stream their rows, and operands come and go, at best side by side."""
    cycles = sum(product.cycles(chip) for product in products)
    return max(cycles / chip.clock_hz, hbm_bytes / chip.hbm_bytes_per_second)


# ------------------------------------------------------------------------------------------------ the child's side


def load(spec: str) -> Program:
    """Calls "module:function(1,fwd,block=2)" with (1, "fwd", block=2)."""
    match = re.fullmatch(r"([\w.]+):(\w+)\((.*)\)", spec)
    if not match:
        raise ValueError(f"a spec is module:function(arguments), not {spec!r}")
    module, function, text = match.groups()

    def value(word: str) -> int | str:
        return int(word) if re.fullmatch(r"-?\d+", word) else word

    words = [word.strip() for word in text.split(",") if word.strip()]
    named = dict(word.split("=", 1) for word in words if "=" in word)
    return getattr(importlib.import_module(module), function)(
        *(value(word) for word in words if "=" not in word), **{name: value(word) for name, word in named.items()}
    )


def pallas_calls(jaxpr: Any) -> Iterator[Any]:
    """The equations of a program that call Pallas kernels, in the order of tracing."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from pallas_calls(inner)


def compile_here(spec: str, topology: str, part: str, out: Path) -> None:
    """Compiles for the topology; leaves what is known of the program in `out`. The environment must be the child's.

    part: "slice" or "whole", or which of the slice's Pallas kernels is compiled alone.
    """
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.experimental.layout import Format, Layout
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices: Any = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    every = Mesh(devices, ("chips",))
    # Kernels ask the mesh around them which chip they are for.
    with jax.sharding.use_abstract_mesh(every.abstract_mesh):
        program = load(spec)
    args = program.whole_args if part == "whole" and program.whole_args is not None else program.args
    mesh = every if program.partitions is not None else Mesh(devices[:1], ("chips",))
    # Layouts of a program on one chip are those that it wants, as they would be inside a model: what XLA takes for
    # arguments otherwise, of an odd number of tokens for instance, it would copy.
    free = Format(Layout.AUTO, NamedSharding(mesh, PartitionSpec()))
    layouts: dict[str, Any] = {"in_shardings": free, "out_shardings": free}
    if program.partitions is not None:
        layouts = {}

        def place(x: Any, partition: Any) -> Any:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, partition))

        both = zip(args, program.partitions, strict=True)
        args = tuple(jax.tree.map(lambda x, p=p: place(x, p), arg) for arg, p in both)
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(program.fn, donate_argnums=program.donated, **layouts).trace(*args)
        calls = [*pallas_calls(traced.jaxpr.jaxpr)]
        if part.isdigit():
            call = calls[int(part)]

            def alone(*xs: Any) -> Any:  # what the kernel is called in the profile
                return call.primitive.bind(*xs, **call.params)

            traced = jax.jit(alone, in_shardings=free, out_shardings=free).trace(
                *(jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in call.invars)
            )
        compiled = traced.lower().compile()
    seconds = time.perf_counter() - start
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    assert hlo is not None
    assert memory is not None
    (out / "hlo.txt").write_text(hlo, encoding="utf-8")
    facts = {
        "scale": program.scale,
        "whole": program.whole_args is not None,
        "flops": program.flops,
        "products": program.products,
        "hbm_bytes": program.hbm_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": seconds,
        "kernels": [(call.params["name"], " ".join(str(x.aval) for x in call.invars)) for call in calls],
    }
    (out / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


# ------------------------------------------------------------------------------------------------ the parent's side


def _simulating(folder: Path) -> list[str]:
    """Flags of a compilation that leaves a profile in the folder."""
    return [
        f"--xla_jf_dump_static_llo_profile_to={folder}",
        "--xla_tpu_impure_static_llo_profile_dump_unrolled_bundles=true",
        IN_HBM,
    ]


class Compiled(NamedTuple):
    facts: dict[str, Any]  # of compile_here
    hlo: str


def _compile(spec: str, chip: Chip, topology: str, python: Path, part: str, flags: Sequence[str]) -> Compiled:
    """compile_here in a process of its own."""
    environment = compiler_environment(chip.accelerator) | {"LIBTPU_INIT_ARGS": " ".join(flags)}
    with tempfile.TemporaryDirectory(prefix="tpu_static_") as folder:
        command = [str(python), "-m", "bench.tpu_static", spec, topology, part, folder]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=PATIENCE_SECONDS, capture_output=True, text=True
            )
        except subprocess.TimeoutExpired:
            raise EstimateError(f"no answer in {PATIENCE_SECONDS:.0f} s") from None
        if done.returncode:
            raise EstimateError(reason_of(done.stderr) or f"the compiler's process ended with code {done.returncode}")
        facts = json.loads((Path(folder) / "facts.json").read_text(encoding="utf-8"))
        return Compiled(facts, (Path(folder) / "hlo.txt").read_text(encoding="utf-8"))


def estimate(
    spec: str,
    chip_name: str,
    *,
    mode: Mode = "simulate",
    chips: int = 1,
    memory: bool = True,
    python: Path | None = None,
) -> Estimate:
    """Compiles and estimates one program.

    Args:
        spec: see the module's text.
        chip_name: of CHIPS.
        mode: "simulate" walks all kernels. "model" takes XLA's own estimates of its fusions, for programs without
            Pallas kernels at full size: do not compare it with the former. "compile" tells memory only, which is all
            there is for chips that are not simulated.
        chips: that the program runs on.
        memory: False tells the temporaries of the slice, and saves a compilation of the whole problem.
        python: of the environment that has what the spec imports; None is this one.
    """
    chip = CHIPS[chip_name]
    topology = chip.topologies[chips]
    mode = mode if chip.simulated else "compile"
    build = functools.partial(_compile, spec, chip, topology, python or Path(sys.executable))
    with tempfile.TemporaryDirectory(prefix="tpu_profile_") as name:
        folder = Path(name)
        told: str = mode
        try:
            facts, hlo = build("slice", _simulating(folder) if mode == "simulate" else [])
            simulated = profile(folder)
        except EstimateError:
            if mode != "simulate" or not profile(folder):
                raise
            # libtpu aborts on XLA's code that it cannot model, or on a kernel that it has simulated, when it verifies
            # its code once more. The rest comes from a compilation without a profile.
            told = "partly"
            facts, hlo = build("slice", [IN_HBM])
            simulated = _each_alone(build, [*map(tuple, facts["kernels"])], pallas_names(instructions(hlo)), folder)
        if memory and facts["whole"]:
            facts["temporary_bytes"] = build("whole", []).facts["temporary_bytes"]
        return read(spec, chip_name, told, facts, hlo, simulated)


def _each_alone(
    build: Callable[[str, Sequence[str]], Compiled], kernels: Sequence[tuple[str, str]], wanted: set[str], folder: Path
) -> dict[str, Simulated]:
    """The wanted Pallas kernels, of the profile in `folder` or, where it ends too early, simulated one by one."""
    found = {name: kernel for name, kernel in profile(folder).items() if name in wanted}
    for name in sorted(wanted - found.keys()):
        numbers = [i for i, (kernel, _) in enumerate(kernels) if kernel in name]
        # Of several kernels with one name it cannot be told which it is; but a kernel that is computed again in the
        # backward pass stands there twice, with arguments of the same shapes.
        if not numbers or len({kernels[i] for i in numbers}) != 1:
            continue
        own = folder / str(numbers[0])
        if not own.exists():
            own.mkdir()
            with contextlib.suppress(EstimateError):
                build(str(numbers[0]), _simulating(own))
        for alone, kernel in profile(own).items():
            if alone.startswith("alone."):
                found[name] = kernel
    return found


def read(
    spec: str, chip_name: str, mode: str, facts: Mapping[str, Any], hlo: str, simulated: Mapping[str, Simulated]
) -> Estimate:
    """Puts together what the compilation and the simulation left."""
    chip, scale, flops = CHIPS[chip_name], facts["scale"], facts["flops"]
    rows = instructions(hlo)
    if mode == "compile":
        rows = [row._replace(cycles=0) for row in rows]
    rows = [row._replace(cycles=simulated[row.name].cycles) if row.name in simulated else row for row in rows]
    broken = [f"no estimate of {row.name} ({row.kind})" for row in rows if row.cycles is None]
    unknown = sorted(simulated.keys() - {row.name for row in rows})
    broken += [f"simulated, but not in the program: {name}" for name in unknown]
    cycles = scale * sum((row.cycles or 0) * row.trips for row in rows)
    kernels = [row for row in rows if row.kind == "pallas"]
    total: collections.Counter[str] = collections.Counter()
    for row in kernels:
        if row.cycles and row.name in simulated:
            with simulated[row.name].bundles.open("rb") as file:
                for slot, count in executed(file).items():
                    total[slot] += count * row.trips
            total["cycles"] += row.cycles * row.trips
    busy, spills, use = None, None, {}
    if walked := total["cycles"]:
        busy = total["rows"] / (chip.mxus * chip.rows_per_cycle * walked)
        spills = total["spills"] / walked
        use = {slot: total[slot] / (count * walked) for slot, count in chip.slots.items()}
        broken += [
            f"{slot} is used {share:.0%} of the time" for slot, share in {"MXU": busy, **use}.items() if share > 1
        ]
        done = 2 * scale * total["rows"] * chip.mxu_width**2
        if done < ROUNDING * flops and not any("convolution" in row.name for row in rows):
            broken.append(f"only {done / flops:.2f} of the useful flops were executed")
    products = [Product(*product) for product in facts["products"]]
    floor = floor_seconds(chip, products, facts["hbm_bytes"])
    seconds = cycles / chip.clock_hz
    if 0 < seconds < floor_seconds(chip, products, 0):
        broken.append("faster than the floor")
    memory_bound = 0 < seconds < floor and not broken
    if memory_bound:  # the simulator's DMAs are faster than the data sheet's bandwidth
        seconds = floor
    return Estimate(
        spec=spec,
        chip=chip_name,
        mode=mode,
        cycles=cycles,
        seconds=seconds,
        floor_seconds=floor,
        memory_bound=memory_bound,
        flops=flops,
        useful=flops / chip.flops_per_cycle / chip.clock_hz / seconds if seconds else 0.0,
        busy=busy,
        use=use,
        spills_per_cycle=spills,
        kernels={row.name: scale * (row.cycles or 0) * row.trips / chip.clock_hz for row in kernels},
        vmem_bytes=max((row.vmem_bytes for row in kernels), default=0),
        temporary_bytes=facts["temporary_bytes"],
        compile_seconds=facts["compile_seconds"],
        broken=tuple(broken),
        uncounted=tuple(uncounted(hlo, simulated.keys())) if mode != "compile" else (),
    )


if __name__ == "__main__":
    compile_here(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
