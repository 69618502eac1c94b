"""pyvdl's TPU kernels and public ones beside them, compiled ahead of time and simulated: `python -m bench.tpu_aot`.

No TPU is needed, and nothing is measured: see tpu_static.py for what the numbers are.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.common import ROOT, append_rows, environment, package_versions, progress
from bench.tpu_dumps import EstimateError
from bench.tpu_static import CHIPS, Estimate, Mode, estimate, libtpu_version

NOTHING_MEASURED = (
    "Nothing here was measured on a TPU: these are estimates by libtpu's compiler and its static simulator."
)
ANCHORS = ROOT / "build" / "bench" / "anchors"  # environment of the public kernels
SETUP = "python -m bench.tpu_aot --setup"
RECORD = ROOT / "tests" / "tpu_cycles.json"
SIMULATED_CHIPS = [name for name, chip in CHIPS.items() if chip.simulated]
RING_CHIPS = 16
LARGE_RING = 512  # chips, of 128 rows each
MODES = {
    "simulate": "",
    "partly": "what is not Pallas by XLA's model",
    "model": "XLA's model, not to be compared with simulated rows",
    "compile": "memory only",
}


@dataclass(frozen=True)
class Case:
    """One row of the table, on each chip."""

    name: str
    spec: str
    mode: Mode = "simulate"
    chips: int = 1  # that the program runs on
    only: str | None = None  # the chip that has slices of so many, in place of those asked for

    @property
    def is_anchor(self) -> bool:
        return self.spec.startswith("bench.tpu_anchors:")


def _joint() -> Iterator[Case]:
    """Joint attention: pyvdl's, then the libraries that take the shape, at the best blocks known of them."""
    shapes = {  # tokens, head_dim: frames, patches, class tokens, heads of the slice, (padded, blocks) of the libraries
        (2048, 64): (8, 256, 0, 16, (0, "512,2048,512")),
        (1025, 64): (4, 256, 1, 16, (1152, "384,1152,384")),
        (4096, 64): (16, 256, 0, 8, (0, "512,2048,512")),
        (785, 64): (4, 196, 1, 16, (896, "896,896,896")),
        (2048, 72): (8, 256, 0, 16, (0, "512,2048,512")),
        (2048, 88): (8, 256, 0, 16, (0, "512,2048,512")),
        (2048, 104): (8, 256, 0, 16, (0, "512,2048,512")),
        (2048, 128): (8, 256, 0, 16, (0, "512,2048,512")),
    }
    for (tokens, head_dim), (frames, patches, class_tokens, heads, (padded, blocks)) in shapes.items():
        for what in ("fwd", "fwd+bwd"):
            name = f"joint {what} {tokens}x{head_dim}"
            arguments = f"{frames},{patches},{class_tokens},{head_dim},heads={heads}"
            yield Case(f"{name} pyvdl", f"bench.tpu_ops:attention(joint,{what},{arguments})")
            note = f" on {padded} tokens" if padded else ""
            # Heads of 72, 88 and 104 are padded to 128 by all of them alike: one library stands for them.
            libraries = ("tokamax", "splash", "flash") if head_dim in (64, 128) else ("tokamax",)
            for library in libraries:
                arguments = f"{tokens},{head_dim},{blocks},padded={padded},heads={heads}"
                yield Case(f"{name} {library}{note}", f"bench.tpu_anchors:attention({library},{what},{arguments})")
            yield Case(f"{name} xla", f"bench.tpu_anchors:attention(xla,{what},{tokens},{head_dim})", "model")
    # Ours alone: class tokens behind full tiles, the other heads, a long clip.
    more = {(2049, 64): (8, 256, 1, 16), (4097, 64): (16, 256, 1, 8), (16384, 64): (64, 256, 0, 2)}
    more |= {(2048, head_dim): (8, 256, 0, heads) for head_dim, heads in ((80, 16), (96, 16), (256, 8))}
    for (tokens, head_dim), (frames, patches, class_tokens, heads) in more.items():
        for what in ("fwd", "fwd+bwd"):
            arguments = f"joint,{what},{frames},{patches},{class_tokens},{head_dim},heads={heads}"
            yield Case(f"joint {what} {tokens}x{head_dim} pyvdl", f"bench.tpu_ops:attention({arguments})")


def _grouped() -> Iterator[Case]:
    for mode in ("space", "time"):
        for frames in (4, 8):
            for class_tokens in (0, 1):
                for what in ("fwd", "fwd+bwd"):
                    name = f"{mode} {what} {frames}x256+{class_tokens}"
                    arguments = f"{mode},{what},{frames},256,{class_tokens},64"
                    yield Case(f"{name} pyvdl", f"bench.tpu_ops:attention({arguments},rows=8)")
                    yield Case(f"{name} pyvdl xla", f"bench.tpu_ops:attention({arguments},xla,rows=8)", "model")


def _language() -> Iterator[Case]:
    for tokens in (512, 1024, 2048):
        for what in ("fwd", "fwd+bwd"):
            name = f"causal {what} {tokens}x64"
            yield Case(f"{name} pyvdl", f"bench.tpu_ops:language({what},{tokens},64)")
            yield Case(f"{name} pyvdl xla", f"bench.tpu_ops:language({what},{tokens},64,xla)", "model")


def _biased() -> Iterator[Case]:
    """The encoder of a T5 over the tokens of eight frames and a prompt."""
    for what in ("fwd", "fwd+bwd"):
        yield Case(f"biased {what} 2064x64 pyvdl", f"bench.tpu_ops:biased({what},2064,64)")
        yield Case(f"biased {what} 2064x64 pyvdl xla", f"bench.tpu_ops:biased({what},2064,64,xla,16)", "model")


def _contrastive() -> Iterator[Case]:
    for kind in ("softmax", "sigmoid"):
        name = f"contrastive {kind} 4096x4096x768"
        yield Case(f"{name} pyvdl", f"bench.tpu_ops:contrastive({kind},4096)")
        yield Case(f"{name} step pyvdl", f"bench.tpu_ops:contrastive_step({kind},4096)")
        yield Case(f"{name} xla", f"bench.tpu_anchors:loss({kind},4096)", "model")
        for implementation in ("pallas_tpu", "xla"):
            yield Case(
                f"contrastive {kind} {RING_CHIPS} chips x 4096 pyvdl {implementation}",
                f"bench.tpu_ops:contrastive_ring({kind},4096,{RING_CHIPS},{implementation})",
                "compile",
                RING_CHIPS,
            )
        spec = f"bench.tpu_ops:contrastive_ring({kind},128,{LARGE_RING})"
        yield Case(f"contrastive {kind} {LARGE_RING} chips x 128 pyvdl pallas_tpu", spec, "compile", LARGE_RING, "v5p")


CASES = (
    Case("matrix product 4096", "bench.tpu_anchors:matmul(4096)"),
    *_joint(),
    *_grouped(),
    *_language(),
    *_biased(),
    *_contrastive(),
)

# What tests/test_tpu_gate.py holds against the record: the main shapes, as slices that take seconds each.
GATE = (
    Case("matrix product 1024", "bench.tpu_anchors:matmul(1024)"),  # the simulator itself
    Case("joint fwd 2048x64", "bench.tpu_ops:attention(joint,fwd,8,256,0,64,heads=2)"),
    Case("joint fwd+bwd 2048x64", "bench.tpu_ops:attention(joint,fwd+bwd,8,256,0,64,heads=2)"),
    Case("joint fwd+bwd 1025x64", "bench.tpu_ops:attention(joint,fwd+bwd,4,256,1,64,heads=2)"),
    Case("space fwd+bwd 8x256+1", "bench.tpu_ops:attention(space,fwd+bwd,8,256,1,64,heads=2)"),
    Case("time fwd+bwd 8x256+1", "bench.tpu_ops:attention(time,fwd+bwd,8,256,1,64,heads=2)"),
    Case("contrastive softmax 1024", "bench.tpu_ops:contrastive(softmax,1024)"),
    Case("contrastive sigmoid 1024", "bench.tpu_ops:contrastive(sigmoid,1024)"),
)
GATE_CHIP = "v5e"


def set_up_anchors() -> None:
    """Makes the public kernels' environment, with the compiler that constraints.txt names."""
    from bench.tpu_anchors import REQUIREMENTS

    python = ANCHORS / "bin" / "python"
    wanted = ["--constraint", str(ROOT / "constraints.txt"), *REQUIREMENTS]
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv:
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, ANCHORS], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--python", python, *wanted], check=True)
    else:
        subprocess.run([sys.executable, "-m", "venv", "--clear", ANCHORS], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    print(f"ready: {anchor_versions()}")


def compiler_versions() -> dict[str, str | None]:
    return {**package_versions(("jax", "jaxlib")), "libtpu": libtpu_version()}


@functools.cache
def anchor_versions() -> dict[str, str | None]:
    """Of the packages in the public kernels' environment; empty where there is none."""
    python = ANCHORS / "bin" / "python"
    if not python.exists():
        return {}
    names = ("jax", "jaxlib", "libtpu", "tokamax")
    code = f"import json; from bench.common import package_versions; print(json.dumps(package_versions({names!r})))"
    told = subprocess.run([python, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return json.loads(told)


def anchor_python() -> Path:
    """Its interpreter. Raises where it is not there, or has another compiler than this environment."""
    there = anchor_versions()
    if not there:
        raise EstimateError(f"public kernels are not installed: {SETUP}")
    here = compiler_versions()
    for name in here:
        if there[name] != here[name]:
            raise EstimateError(f"public kernels have {name} {there[name]}, pyvdl {here[name]}: {SETUP}")
    return ANCHORS / "bin" / "python"


def run_case(case: Case, chip: str, *, memory: bool = True, own_python: bool = False) -> Estimate:
    """Estimates it. own_python: an anchor that is part of JAX needs no other environment."""
    python = anchor_python() if case.is_anchor and not own_python else None
    return estimate(case.spec, chip, mode=case.mode, chips=case.chips, memory=memory, python=python)


HEAD = (
    "case",
    "chip",
    "floor us",
    "time us",
    "of floor",
    "useful MXU",
    "MXU busy",
    "spills/cycle",
    "VMEM MiB",
    "HBM temp MiB",
    "notes",
)


def cells(case: Case, chip: str, found: Estimate | str) -> list[str]:
    """A row of the table: an estimate, or why there is none."""
    if isinstance(found, str):
        return [case.name, chip, *[""] * (len(HEAD) - 3), f"no estimate: {found.replace('|', '/')}"]
    notes = [f"INVALID: {'; '.join(found.broken)}"] if found.broken else []
    if MODES[found.mode]:
        notes.append(MODES[found.mode])
    if found.memory_bound:
        notes.append(f"as long as its bytes take; instructions {1e6 * found.cycles / CHIPS[chip].clock_hz:.0f} us")
    timed = found.seconds > 0
    return [
        case.name,
        chip,
        f"{1e6 * found.floor_seconds:.0f}" if timed else "",
        f"{1e6 * found.seconds:.0f}" if timed else "",
        f"{found.of_floor:.0%}" if timed else "",
        f"{found.useful:.0%}" if timed else "",
        "" if found.busy is None else f"{found.busy:.0%}",
        "" if found.spills_per_cycle is None else f"{found.spills_per_cycle:.2f}",
        f"{found.vmem_bytes / 2**20:.1f}" if found.vmem_bytes else "",
        f"{found.temporary_bytes / 2**20:.1f}",
        "; ".join(notes),
    ]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head; the first column, the chip and the notes are aligned to the left."""
    rule = ["---" if name in ("case", "chip", "notes") else "---:" for name in rows[0]]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def run(cases: Sequence[Case], chips: Sequence[str], out: Path) -> None:
    """Estimates all, one at a time; prints the table, keeps rows."""
    print(NOTHING_MEASURED)
    env = environment(()) | {"packages": compiler_versions()}
    versions = ", ".join(f"{name} {version}" for name, version in env["packages"].items())
    print(f"{versions}; tokamax {anchor_versions().get('tokamax')}. A slice of each problem is simulated.\n")
    table: list[Sequence[str]] = [HEAD]
    rows: list[dict[str, Any]] = []
    pairs = [(case, chip) for case in cases for chip in ([case.only] if case.only else chips)]
    try:
        for case, chip in pairs:
            start = time.perf_counter()
            row: dict[str, Any] = {"bench": "tpu_aot", "case": case.name, "chip": chip}
            found: Estimate | str
            try:
                found = run_case(case, chip)
                row |= asdict(found)
            except EstimateError as error:
                found = row["failure"] = str(error)
            table.append(cells(case, chip, found))
            rows.append(row)
            progress(f"{' | '.join(table[-1])} ({time.perf_counter() - start:.0f} s)")
    except KeyboardInterrupt:
        progress("interrupted: what is done is kept")
    print(markdown(table))
    append_rows(out, {"environment": env | {"anchors": anchor_versions()}, "nothing_measured": True}, rows)
    print(f"\nrows: {out}")


def record(path: Path) -> None:
    """Writes the cycles that the gate expects from now on. Programs that give no estimate are told and left out."""
    cycles: dict[str, float] = {}
    for case in GATE:
        try:
            found = run_case(case, GATE_CHIP, memory=False, own_python=True)
            if found.broken:
                raise EstimateError("; ".join(found.broken))
            cycles[case.name] = round(found.cycles)
            progress(f"{case.name}: {cycles[case.name]} cycles")
        except EstimateError as error:
            progress(f"{case.name}: not recorded: {error}")
    versions = compiler_versions()
    path.write_text(json.dumps({"chip": GATE_CHIP, **versions, "cycles": cycles}, indent=2) + "\n", encoding="utf-8")
    print(f"recorded {len(cycles)} of {len(GATE)} programs: {path}")


def chosen(cases: Iterable[Case], patterns: Sequence[str]) -> list[Case]:
    """Those whose name has one of the regular expressions."""
    return [case for case in cases if any(re.search(pattern, case.name) for pattern in patterns)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tpu_aot",
        description="Estimates what pyvdl's TPU kernels and public ones would cost, without a TPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", default=["."], metavar="REGEX", help="rows whose name has one of these")
    parser.add_argument(
        "--chips", nargs="+", choices=CHIPS, default=SIMULATED_CHIPS, help="to estimate for (v5p: only to compile for)"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results" / "tpu_aot.jsonl", help="file that rows are added to"
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    modes.add_argument("--record", action="store_true", help=f"write {RECORD.name}, which the tests hold to, and stop")
    modes.add_argument("--setup", action="store_true", help="install the public kernels into build/bench/anchors, stop")
    options = parser.parse_args(arguments)
    cases = chosen(CASES, options.cases)
    if options.setup:
        set_up_anchors()
    elif options.record:
        record(RECORD)
    elif options.list:
        print("\n".join(case.name for case in cases))
    elif not cases:
        parser.error(f"no row's name has {' or '.join(options.cases)}: see --list")
    else:
        run(cases, options.chips, options.out)


if __name__ == "__main__":
    main()
