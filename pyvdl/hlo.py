"""Reads the text of a program that XLA compiled: what is scheduled, how often it runs, and what goes between chips."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple


class UnreadableError(RuntimeError):
    """A text that is not understood. The message quotes it."""


class Collective(NamedTuple):
    """An exchange between chips."""

    kind: str  # "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
    sent_bytes: float  # by each chip, in all runs, over a ring
    trips: int
    group: int  # chips that take part


OPCODE = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (?:\((?:[^=]|/\*index=\d+\*/)*?\)|\S+) ([\w\-]+)\(")
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of each computation, and the name of the entry. An instruction may span lines."""
    found: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$", line):
            current = found[head.group(2)] = []
            entry = head.group(2) if head.group(1) else entry
        elif current is None:
            continue
        elif re.match(r"^  (ROOT )?%?[\w.\-]+ = ", line):
            current.append(line.strip())
        elif line.strip() and current:
            current[-1] += " " + line.strip()
    return found, entry


def scheduled(text: str) -> Iterator[tuple[str, str, str, int | None]]:
    """(name, opcode, instruction, times it runs) of all that runs from the entry on; bodies of loops are gone into, and
    all branches, of which one runs.

    A loop whose trips cannot be told is given itself, with None, and its body as if it ran once.
    """
    found, entry = computations(text)

    def walk(name: str, trips: int) -> Iterator[tuple[str, str, str, int | None]]:
        for line in found.get(name, ()):
            match = OPCODE.match(line)
            if not match:
                raise UnreadableError(f"cannot read the instruction {line[:200]}")
            label, opcode = match.groups()
            if opcode == "while":
                count = _trip_count(found, line)
                if count is None:
                    yield label, opcode, line, None
                yield from walk(_callee(line, "body"), trips * (count or 1))
            elif opcode == "call":
                yield from walk(_callee(line, "to_apply"), trips)
            elif opcode == "conditional":
                for branch in _branches(line):
                    yield from walk(branch, trips)
            else:
                yield label, opcode, line, trips
                if opcode == "fusion" and "kind=kCustom" in line:  # XLA for TPU puts collectives into these
                    for inner in found.get(_callee(line, "calls"), ()):
                        if (own := OPCODE.match(inner)) and own.group(2).startswith(KINDS):
                            yield own.group(1), own.group(2), inner, trips

    yield from walk(entry, 1)


def collectives(text: str) -> list[Collective]:
    """All exchanges. A chip sends (n - 1) / n of what is gathered or scattered, and twice that to reduce for all."""
    rows = []
    seen: set[str] = set()  # XLA for TPU writes one exchange into several fusions, whose work hides it
    for _, opcode, line, trips in scheduled(text):
        kind = opcode.removesuffix("-start")
        channel = re.search(r"channel_id=(\d+)", line)
        if kind not in KINDS:
            continue
        if channel and kind != "collective-permute":  # all of those share one channel
            if channel[1] in seen:
                continue
            seen.add(channel[1])
        sizes = result_sizes(line)
        # What begins an exchange gives what went in, too.
        size = max(sizes, default=0) if opcode.endswith("-start") else sum(sizes)
        count = _group(line)
        share = (count - 1) / count
        sent = {
            "all-gather": size * share,
            "all-reduce": 2 * size * share,
            "reduce-scatter": size * (count - 1),  # the result is one part of what goes in
            "all-to-all": size * share,
            "collective-permute": size,
        }[kind]
        if count > 1:
            rows.append(Collective(kind, sent * (trips or 1), trips or 1, count))
    return rows


def _group(line: str) -> int:
    """Chips that exchange with each other."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", match[2]))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    return 2 if "source_target_pairs" in line else 1


def result_sizes(line: str) -> list[int]:
    """Bytes of the arrays that an instruction gives."""
    match = OPCODE.match(line)
    assert match is not None
    result = line[: match.end(2)].split(" = ", 1)[1]
    return [
        _BYTES.get(kind, 4) * math.prod(int(n) for n in shape.split(",") if n)
        for kind, shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", result)
    ]


def _callee(line: str, attribute: str) -> str:
    match = re.search(rf"{attribute}=%?([\w.\-]+)", line)
    if not match:
        raise UnreadableError(f"no {attribute} in the instruction {line[:200]}")
    return match.group(1)


def _branches(line: str) -> list[str]:
    if several := re.search(r"branch_computations=\{([^}]*)\}", line):
        return re.findall(r"[\w.\-]+", several[1])
    return [_callee(line, "true_computation"), _callee(line, "false_computation")]


def _trip_count(found: Mapping[str, Sequence[str]], line: str) -> int | None:
    """Told by XLA, or read from the condition `i < constant`, which scans and fori_loops from 0 have.

    Where more must hold, as in a loop over tokens that ends when all texts have ended, it is what it runs at most.
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known.group(1))
    text = " ".join(found.get(_callee(line, "condition"), ()))
    for name in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", text):
        text += " " + " ".join(found.get(name, ()))
    constants = dict(re.findall(r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)", text))
    limits = re.findall(r" compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT", text)
    compared = [constants[limit] for limit in limits if limit in constants]
    # What is compared inside of a fusion has another name there.
    told = compared or (list(constants.values()) if limits else [])
    return int(told[0]) if len(told) == 1 else None
