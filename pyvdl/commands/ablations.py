"""ablate: the paper's tables as grids of recipes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pyvdl.commands.common import UsageError, print_table

if TYPE_CHECKING:
    from pyvdl.ablate.world import World


def ablate(arguments: argparse.Namespace) -> int:
    from pyvdl.ablate import GRIDS

    if arguments.name is None:
        print_table(
            ["name", "rows", "of the paper", "asks"],
            [[grid.name, len(grid.rows), grid.source, grid.asks] for grid in GRIDS.values()],
        )
        return 0
    make_world = _checked(arguments)
    from pyvdl.ablate.page import table, write_results
    from pyvdl.ablate.run import run_grid
    from pyvdl.page import check_packages
    from pyvdl.storage import Folder, hold

    check_packages()
    grid = GRIDS[arguments.name]
    arguments.out.mkdir(parents=True, exist_ok=True)
    with hold(Folder(arguments.out)):
        world = make_world()
        outcome = run_grid(grid, world, arguments.out)
        page = write_results(outcome, world, arguments.out)
    print(table(outcome))
    print(f"\npage: {page}")
    return 0


def _checked(arguments: argparse.Namespace) -> Callable[[], World]:
    """Tells the mistakes in the command; then what makes that which the grid begins with."""
    from pyvdl.ablate.world import SOURCES, TOY_PRESET, read_changes, toy_world, user_world

    preset = (arguments.preset or "paper") if arguments.test is not None else TOY_PRESET
    try:
        read_changes(arguments.set, preset)
    except ValueError as error:
        raise UsageError(f"--set {error}") from None
    settings = {"seed": arguments.seed, "assignments": arguments.set}
    brought = {
        "labelled": arguments.data,
        "unlabelled": arguments.unlabelled,
        "vlm": arguments.vlm,
        "encoder": arguments.encoder,
    }
    sources = {}
    for text in arguments.source:
        name, separator, path = text.partition("=")
        if not separator or name not in SOURCES:
            raise UsageError(f"--source {text}: expected NAME=DATA with one of {', '.join(SOURCES)}")
        sources[name] = Path(path)
    if arguments.test is not None:
        return partial(
            user_world, arguments.out, test=arguments.test, preset=preset, sources=sources, **brought, **settings
        )
    if sources or arguments.preset or any(brought.values()):
        raise UsageError("a preset, data and models of your own need --test, the clips to measure them on")
    return partial(toy_world, arguments.out, **settings)
