"""What lies in a chip's memory when a compiled training step needs the most of it, read from the program's text.

The compiler tells the size of all temporaries together. The text tells the order of the instructions and the size of
what each gives: from that follows what is alive at which time, and from the names that JAX gave to the instructions,
which pass made it. An estimate: the compiler's own assignment of memory, which may find better places, is not in the
text.
"""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyvdl.hlo import OPCODE, UnreadableError, computations

_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_BITS = {"pred": 8}  # of an element, where the name does not say it
_SAME = ("bitcast", "optimization-barrier", "opt-barrier")  # other names of what they are given


class Alive(NamedTuple):
    """Bytes on each chip."""

    activations: int = 0  # made of the batch by the forward pass, still to be read by the backward pass
    gradients: int = 0  # made by the backward pass, still to be read by the optimizer
    others: int = 0

    @property
    def total(self) -> int:
        return sum(self)


@dataclass
class _Buffer:
    size: int
    start: int  # the first and the last place in the order of the instructions
    end: int
    of_batch: bool  # made of the batch
    of_backward: bool  # made of what the backward pass gives
    written: set[str]  # the passes that write it
    read: set[str]  # and read it

    @property
    def kind(self) -> str:
        if self.of_batch and "forward" in self.written and "backward" in self.read:
            return "activations"
        if "backward" in self.written and self.read & {"optimizer", ""}:
            return "gradients"
        return "others"


type _Value = _Buffer | list[Any]  # of an instruction that gives a tuple: its elements


def at_peak(text: str) -> Alive:
    """Of a compiled step whose argument `batch` holds the data. Arguments and results of the step do not count."""
    found, entry = computations(text)
    if not any(map(_of_batch, found.get(entry, ()))):
        raise UnreadableError("no argument of the program is named batch")
    return _walk(found, entry, None)[1]


def _walk(found: Mapping[str, Sequence[str]], name: str, argument: _Value | None) -> tuple[_Value, Alive]:
    """What a computation gives, and what it needs at most beside its argument. argument: None for the entry."""
    values: dict[str, _Value] = {}
    buffers: list[_Buffer] = []
    loops: dict[int, Alive] = {}
    result: _Value = []
    for place, line in enumerate(found[name]):
        match = OPCODE.match(line)
        if match is None:
            raise UnreadableError(f"cannot read the instruction {line[:200]}")
        label, opcode = match.groups()
        operands = [values[operand] for operand in _operands(line, match.end()) if operand in values]
        leaves = [leaf for operand in operands for leaf in _leaves(operand)]
        value: _Value
        if opcode == "parameter" and argument is not None:
            value = argument
        elif opcode == "parameter":
            value = _new(line, place, [], set(), size=0)
            for leaf in _leaves(value):
                leaf.of_batch = _of_batch(line)
        elif opcode == "get-tuple-element" and isinstance(operands[0], list):
            value = operands[0][int(re.findall(r"index=(\d+)", line)[0])]
        elif opcode == "tuple":
            value = operands
        elif opcode in _SAME:
            value = operands[0]
        else:
            own = _pass_of(line)
            for leaf in leaves:
                leaf.end = place
                leaf.read.add(own)
            if opcode == "while":  # its state changes in place
                value = operands[0]
                loops[place] = _loop(found, line, leaves)
            else:
                # XLA's own copies and conversions have no name: they go with what they are made of.
                origins = {own} if own else set().union(*(leaf.written for leaf in leaves))
                # What begins a copy gives its source too; the memory counts where the copy ends.
                value = _new(line, place, leaves, origins, size=0 if opcode.endswith("-start") else None)
                value = _in_place(value, operands, line, opcode)
                buffers += [leaf for leaf in _leaves(value) if leaf.start == place]
        values[label] = value
        if line.startswith("ROOT"):
            result = value
    end = len(found[name])
    for leaf in _leaves(result):  # the state of a loop takes it, or the caller
        leaf.end, leaf.size = end, 0
    return result, _peak(buffers, loops, end)


def _loop(found: Mapping[str, Sequence[str]], line: str, state: Sequence[_Buffer]) -> Alive:
    """Notes what the loop does to its state; what it needs beside that."""
    own, body = _pass_of(line), re.findall(r"body=%?([\w.\-]+)", line)[0]
    seen = [_Buffer(0, 0, 0, leaf.of_batch, leaf.of_backward, set(), set()) for leaf in state]
    after, inside = _walk(found, body, list(seen))
    for outer, before, now in zip(state, seen, _leaves(after), strict=True):
        if now is not before or before.written:
            outer.written.add(own)
            outer.of_batch |= now.of_batch
            outer.of_backward |= now.of_backward
            if own == "optimizer" and now.of_backward:  # gradients are summed over the parts of a batch
                outer.written.add("backward")
    return inside if own == "optimizer" else Alive(others=inside.total)


def _peak(buffers: Sequence[_Buffer], loops: Mapping[int, Alive], end: int) -> Alive:
    changes: dict[int, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for buffer in buffers:
        changes[buffer.start][buffer.kind] += buffer.size
        changes[buffer.end + 1][buffer.kind] -= buffer.size
    alive: collections.Counter[str] = collections.Counter()
    most = Alive()
    for place in range(end + 1):
        alive.update(changes[place])
        here = Alive(*(alive[name] + more for name, more in zip(Alive._fields, loops.get(place, Alive()))))
        most = max(most, here, key=lambda found: found.total)
    return most


def _new(line: str, place: int, operands: Sequence[_Buffer], origins: set[str], size: int | None = None) -> _Value:
    """What an instruction makes of its operands, in memory of its own. size: of each array, in place of the text's."""
    of_batch = any(leaf.of_batch for leaf in operands)
    of_backward = "backward" in origins or any(leaf.of_backward for leaf in operands)
    match = OPCODE.match(line)
    assert match is not None
    given = line[: match.end(2)].split(" = ", 1)[1]
    made = [
        _Buffer(_size(*shape) if size is None else size, place, place, of_batch, of_backward, set(origins), set())
        for shape in _SHAPE.findall(given)
    ]
    return made if given.startswith("(") or len(made) != 1 else made[0]


def _in_place(value: _Value, operands: Sequence[_Value], line: str, opcode: str) -> _Value:
    """The value, with the memory of the operands that the compiler puts results into."""
    pairs = [(0, 0)] if opcode == "dynamic-update-slice" else []
    listed = re.search(r'"aliasing_operands":\{"lists":\[(.*?)\]\}', line)
    for group in re.findall(r'"indices":\[([^\]]*)\]', listed[1] if listed else ""):
        indices = [int(index) for index in re.findall(r"\d+", group)]
        if len(indices) == 2 and indices[0] < len(operands) <= indices[1]:  # results are counted after the operands
            pairs.append((indices[0], indices[1] - len(operands)))
    results = value if isinstance(value, list) else [value]
    for operand, output in pairs:
        taken, made = operands[operand], results[output]
        if isinstance(taken, _Buffer):
            taken.written |= made.written
            taken.of_batch |= made.of_batch
            taken.of_backward |= made.of_backward
            results[output] = taken
    return results if isinstance(value, list) else results[0]


def _leaves(value: _Value) -> Iterator[_Buffer]:
    if isinstance(value, _Buffer):
        yield value
    else:
        for part in value:
            yield from _leaves(part)


def _operands(line: str, begin: int) -> list[str]:
    return re.findall(r"%([\w.\-]+)", line[begin : line.find(")", begin)])


def _of_batch(line: str) -> bool:
    return bool(re.search(r' parameter\(.*op_name="batch\b', line))


def _pass_of(line: str) -> str:
    name = re.search(r'op_name="([^"]*)"', line)
    if name is None or not name[1]:
        return ""
    if "transpose(" in name[1]:
        return "backward"
    return "forward" if "jvp(" in name[1] else "optimizer"


def _size(kind: str, shape: str, order: str, layout: str) -> int:
    """Bytes in HBM, padded to whole tiles; 0 of what stands in VMEM or other memory."""
    if "S(" in layout:
        return 0
    sizes = [int(n) for n in shape.split(",") if n]
    sizes = [sizes[int(axis)] for axis in order.split(",") if axis] or sizes[::-1]  # the one that runs fastest first
    if tile := re.match(r"T\(([\d,]+)\)", layout):
        widths = [int(n) for n in tile[1].split(",")][::-1]
        sizes = [-(-size // width) * width for size, width in itertools.zip_longest(sizes, widths, fillvalue=1)]
    digits = re.search(r"\d+", kind)
    bits = _BITS.get(kind, int(digits[0]) if digits else 0)
    return math.prod(sizes) * bits // 8
