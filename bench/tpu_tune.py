"""Searches block sizes of pyvdl's TPU kernels with the static simulator: `python -m bench.tpu_tune`.

    python -m bench.tpu_tune --case "joint fwd 2048x64" --set queries=256,512,1024 --set keys=256,512

Every combination is one simulation of a slice of the case, in a process of its own. The kernels take a setting through
one hook, `pyvdl.kernels.tuning.override(name=value, ...)`: a context manager under which the op is traced, forward and
backward, and which raises for a name that it does not know. What is printed last is the device's entry in a table of
kernels/tuning.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bench import tpu_ops
from bench.common import progress
from bench.tpu_aot import CASES, NOTHING_MEASURED, SIMULATED_CHIPS, Case, markdown
from bench.tpu_dumps import EstimateError
from bench.tpu_static import Estimate, Program, estimate

DEVICE_KINDS = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite"}  # as jax.Device.device_kind has them
TUNABLE = {case.name.removesuffix(" pyvdl"): case for case in CASES if case.name.endswith(" pyvdl")}

type Settings = dict[str, int]
type Found = list[tuple[Settings, Estimate | str]]  # the text says why there is none


def tuned(function: str, *args: int | str, **named: int | str) -> Program:
    """The program of tpu_ops.<function>, for a spec; what is named and is no parameter of it is a setting."""
    target: Callable[..., Program] = getattr(tpu_ops, function)
    parameters = inspect.signature(target).parameters
    own = {name: value for name, value in named.items() if name in parameters}
    return under(target(*args, **own), {name: value for name, value in named.items() if name not in parameters})


def under(program: Program, settings: Mapping[str, Any]) -> Program:
    """The program with all of it, backward too, traced under the hook."""
    from pyvdl.kernels import tuning

    override: Callable[..., contextlib.AbstractContextManager[Any]] = tuning.override

    def fn(*args: Any) -> Any:
        with override(**settings):
            return program.fn(*args)

    return dataclasses.replace(program, fn=fn)


def tuned_spec(case: Case, settings: Settings) -> str:
    """The case's spec, "bench.tpu_ops:function(arguments)", under settings."""
    function, _, arguments = case.spec.removeprefix("bench.tpu_ops:").removesuffix(")").partition("(")
    given = [f"{name}={value}" for name, value in settings.items()]
    return f"bench.tpu_tune:tuned({','.join([function, arguments, *given])})"


def combinations(choices: Mapping[str, Sequence[int]]) -> Iterator[Settings]:
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values))


def search(case: Case, chip: str, choices: Mapping[str, Sequence[int]], heads: int | None = None) -> Found:
    """Every combination with its estimate, or why it has none; the fastest first. heads: of the slice."""
    found: Found = []
    slice_of = {} if heads is None else {"heads": heads}
    for settings in combinations(choices):
        result: Estimate | str
        try:
            result = estimate(tuned_spec(case, slice_of | settings), chip, memory=False)
            if result.broken:
                result = "; ".join(result.broken)
        except EstimateError as error:
            result = str(error)
        found.append((settings, result))
        progress(f"{settings}: {result if isinstance(result, str) else f'{result.cycles:.0f} cycles'}")
    return sorted(found, key=lambda pair: float("inf") if isinstance(pair[1], str) else pair[1].cycles)


def table(found: Found) -> str:
    rows = [[*found[0][0], "time us", "of floor", "spills/cycle", "VMEM MiB", "notes"]]
    for settings, result in found:
        told = ["", "", "", "", result] if isinstance(result, str) else _told(result)
        rows.append([*map(str, settings.values()), *told])
    return markdown(rows)


def _told(found: Estimate) -> list[str]:
    spills = "" if found.spills_per_cycle is None else f"{found.spills_per_cycle:.2f}"
    return [f"{1e6 * found.seconds:.0f}", f"{found.of_floor:.0%}", spills, f"{found.vmem_bytes / 2**20:.1f}", ""]


def choice(text: str) -> tuple[str, list[int]]:
    """name=1,2,3"""
    name, _, values = text.partition("=")
    try:
        return name, [int(value) for value in values.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be name=1,2,3, not {text!r}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tpu_tune",
        description="Searches block sizes of a TPU kernel with the static simulator.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--case", required=True, choices=TUNABLE, metavar="CASE", help="of bench.tpu_aot --list, pyvdl's"
    )
    parser.add_argument("--chip", choices=SIMULATED_CHIPS, default="v5e", help="to tune for")
    parser.add_argument(
        "--set", required=True, action="append", type=choice, metavar="NAME=1,2,3", help="a setting and its candidates"
    )
    parser.add_argument("--heads", type=int, help="of the slice that is simulated, in place of the case's own")
    options = parser.parse_args(arguments)
    print(NOTHING_MEASURED)
    found = search(TUNABLE[options.case], options.chip, dict(options.set), options.heads)
    print(table(found))
    best, result = found[0]
    if isinstance(result, str):
        raise SystemExit("no combination gives an estimate")
    cuts = ", ".join(f"{name}={value}" for name, value in best.items())
    print(f'\n"{DEVICE_KINDS[options.chip]}": Cuts({cuts}),  # {options.case}')


if __name__ == "__main__":
    main()
