"""Reads what libtpu leaves of a program that it compiled: the scheduled HLO, the simulator's profile, its bundles."""

from __future__ import annotations

import collections
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from pyvdl.hlo import UnreadableError, result_sizes, scheduled


class EstimateError(RuntimeError):
    """A program that gives no estimate. The text says why."""


class Instruction(NamedTuple):
    """A scheduled instruction of the compiled program. cycles is None where libtpu gives no estimate."""

    name: str
    kind: str  # "pallas" or the opcode
    cycles: int | None
    trips: int
    vmem_bytes: int


VMEM = re.compile(r'used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')


def instructions(hlo: str) -> list[Instruction]:
    """All that is scheduled from the entry on, with the number of times it runs."""
    rows: list[Instruction] = []
    try:
        for label, opcode, line, trips in scheduled(hlo):
            if trips is None:  # a body counted once would pass for an estimate
                rows.append(Instruction(label, "while of unknown trip count", None, 1, 0))
                continue
            cycles = re.findall(r'"?estimated_cycles"?:"?(\d+)', line)
            pallas = opcode == "custom-call" and "tpu_custom_call" in line
            if cycles or pallas:
                vmem = max(map(int, VMEM.findall(line)), default=0)
                kind = "pallas" if pallas else opcode
                rows.append(Instruction(label, kind, int(cycles[-1]) if cycles else None, trips, vmem))
    except UnreadableError as error:
        raise EstimateError(str(error)) from error
    return rows


NO_WORK = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "custom-call", "while")


def uncounted(hlo: str, simulated: Collection[str]) -> list[str]:
    """Instructions that give a mebibyte or more and have no estimate: what they take is missing in the sum."""
    found = []
    for label, opcode, line, trips in scheduled(hlo):
        size = max(result_sizes(line), default=0)
        none = not re.search(r'"?estimated_cycles"?:"?\d', line) and label not in simulated
        if none and size >= 1 << 20 and opcode not in NO_WORK and not opcode.endswith(("-start", "-done")):
            times = f", {trips} times" if trips != 1 else ""
            found.append(f"{label} ({size / 2**20:.0f} MiB{times})")
    return found


EUP = ("vexp2", "vpow2", "vrcp", "vlog2", "vrsqrt", "vtanh", "verf", "vsin", "vcos", "vsigshft")
XLU = ("vrot", "vxpose", "vperm", "vcombine", "vset.permute", "vset.pattern", "vbcast.lane")
NO_SLOT = ("vsync", "vtrace", "vnop", "vdelay", "vsettm", "vfence", "vmatprep")
OPERATION = re.compile(rb"^  (?:%\S+ = )?([a-z][\w.]*)")


def slot_of(operation: str) -> str | None:
    """The slot of a bundle that a vector instruction takes."""
    prefixes = {
        ("vmatmul", "vdwg"): "MATMUL",
        ("vmatpush",): "MATPUSH",
        ("vpop",): "VPOP",
        ("vld",): "VLD",
        ("vst",): "VST",
        EUP: "EUP",
        XLU: "XLU",
        NO_SLOT: None,
    }
    for starts, slot in prefixes.items():
        if operation.startswith(starts):
            return slot
    if ".xlane" in operation:
        return "XLU"
    return "VALU" if operation.startswith("v") else None


def rows_of(operation: str) -> int:
    """Rows that one vmatmul streams: a vector register is float32[8, 128], bfloat16[16, 128] or int8[32, 128].

    ".lmr" streams what the matrix unit itself has transposed, eight rows at a time.
    """
    if ".lmr" in operation:
        return 8
    return 16 if ".bf16" in operation else 32 if ".s8" in operation or ".u8" in operation else 8


def executed(bundles: Iterable[bytes]) -> collections.Counter[str]:
    """Executed instructions of each slot, "rows" streamed through MXUs, and "spills", in a dump of all bundles."""
    operations: collections.Counter[bytes] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for line in bundles:
        if match := OPERATION.match(line):
            operations[match.group(1)] += 1
            counts["spills"] += match.group(1)[:1] == b"v" and b"_spill" in line
    for name, count in operations.items():
        if slot := slot_of(name.decode()):
            counts[slot] += count
            if slot == "MATMUL":
                counts["rows"] += count * rows_of(name.decode())
    return counts


class Simulated(NamedTuple):
    """What the simulator tells of one kernel."""

    cycles: int
    bundles: Path  # all that it executed, where the kernel is one of Pallas


def profile(folder: Path) -> dict[str, Simulated]:
    """The simulated kernels by the names of their instructions."""
    found: dict[str, Simulated] = {}
    for path in folder.glob("*.textproto"):
        text = path.read_text(encoding="utf-8")
        for name, cycles in re.findall(r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)', text):
            found[name] = Simulated(int(cycles), folder / f"{name}_bundles.txt")
    return found


def pallas_names(rows: Iterable[Instruction]) -> set[str]:
    return {row.name for row in rows if row.kind == "pallas"}
