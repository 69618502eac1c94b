"""An ablation on paper: the table as text, and the page with the paper's figures beside ours, both from its outcome."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyvdl
from pyvdl.overrides import override
from pyvdl.page import draw, write_page
from pyvdl.storage import write_whole

from .grids import SCORES, Grid, Row
from .judge import Judged, summary
from .plots import figures
from .run import Outcome
from .steps import Adapt, Captions, Train, describe
from .world import World

HOW = (
    "A direction is told where the 95% interval of the difference leaves out 0 (paired bootstrap over the test clips) "
    "and the difference is larger than what another seed changes in the row that was trained twice. All else is "
    "undecided. The paper gives no intervals."
)
_MARKS = {"agrees": "yes", "does not": "no", "undecided": "open"}


def write_results(outcome: Outcome, world: World, out: Path) -> Path:
    """Writes NAME.json, plots and NAME.html into `out`; returns the page's path."""
    grid = outcome.grid
    plots = draw(lambda colours: figures(outcome, colours))
    for name, files in plots.items():
        (out / f"{grid.name}-{name}.png").write_bytes(files["light"])
    write_whole(out / f"{grid.name}.json", [json.dumps(_facts(grid, outcome, world), indent=1) + "\n"])
    path = out / f"{grid.name}.html"
    write_page(
        path,
        "ablation.html.j2",
        plots=plots,
        version=pyvdl.__version__,
        grid=grid,
        outcome=outcome,
        world=world,
        size=_size(world),
        verdict=summary(outcome.judged),
        rows=[_shown(grid, outcome, row) for row in grid.rows],
        directions=[_direction(grid, one) for one in outcome.judged],
        how=HOW,
        stand_ins=_stand_ins(grid),
        scores={score: SCORES[score] for score in grid.scores},
        seconds=sum(outcome.seconds.values()),
        settings=_settings(grid, world),
        command=_command(grid),
    )
    return path


def table(outcome: Outcome) -> str:
    """The paper's table beside ours as aligned plain text, the directions, and what is not the paper's about it."""
    grid = outcome.grid
    rows = [
        ["", *("the paper" for _ in grid.columns), *("ours" for _ in grid.scores)],
        ["", *(column.title.rpartition(" ")[0] for column in grid.columns), *("" for _ in grid.scores)],
        [grid.source, *(column.title.rpartition(" ")[2] for column in grid.columns)],
    ]
    rows[-1] += [SCORES[score].title for score in grid.scores]
    for row in grid.rows:
        shown = _shown(grid, outcome, row)
        ours = [f"{cell['value']} {cell['interval']}".strip() for cell in shown["ours"]]
        rows.append([f"{row.label}{' *' if row.stand_in else ''}", *shown["paper"], *ours])
    widths = [max(len(line[i]) for line in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in rows]
    lines.insert(3, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    lines += ["", summary(outcome.judged)]
    for one in outcome.judged:
        shown = _direction(grid, one)
        lines.append(f"  {one.verdict:9}  {shown['claim']}: {shown['figures']}")
    told = [HOW, *grid.notes]
    told += [f"* {name}: {stand_in}." for stand_in, name in _stand_ins(grid).items()]
    told += [f"{grid.row(key).label} was left out: it needs {lack}." for key, lack in outcome.left_out.items()]
    for note in dict.fromkeys(told):
        lines += ["", *textwrap.wrap(note, 118)]
    return "\n".join(lines)


def _stand_ins(grid: Grid) -> dict[str, str]:
    """What stands for the paper's source at toy size, each once, and the row or curve that it is in."""
    found: dict[str, str] = {}
    for row in grid.rows:
        if row.stand_in:
            found.setdefault(row.stand_in, row.curve or row.label)
    return found


def _shown(grid: Grid, outcome: Outcome, row: Row) -> dict[str, Any]:
    scores = outcome.scores.get(row.key, {})
    ours = []
    for score in grid.scores:
        cell = {"value": "-", "interval": ""}
        if score in scores:
            found = scores[score].score()
            cell = {"value": f"{found.value:.1f}", "interval": f"[{found.low:.1f}, {found.high:.1f}]"}
        ours.append(cell)
    return {
        "label": row.label,
        "stand_in": row.stand_in,
        "left_out": outcome.left_out.get(row.key),
        "method": row.key == grid.again,
        "paper": ["-" if value is None else f"{value:.1f}" for value in grid.paper(row)],
        "ours": ours,
        "recipe": describe(row.recipe),
    }


def _direction(grid: Grid, one: Judged) -> dict[str, str]:
    better, worse = grid.row(one.better).label, grid.row(one.worse).label
    columns = ", ".join(f"{difference:+.1f} in {column}" for column, difference in one.paper)
    paper = f"the paper {columns}" if columns else f"the paper without figures ({one.told})"
    ours = f"ours {one.ours.value:+.1f} [{one.ours.low:+.1f}, {one.ours.high:+.1f}]"
    return {
        "mark": _MARKS[one.verdict],
        "verdict": one.verdict,
        "claim": f"{better} above {worse} in {SCORES[one.score].title}",
        "figures": f"{paper}, {ours}; another seed changes {one.seed:.1f}",
    }


def _size(world: World) -> str:
    if world.toy:
        return "Toy size: the small synthetic corpus, with stand-ins for the published models."
    return f"Preset {world.preset}, on data and models of the user."


def _kinds(grid: Grid) -> set[type]:
    return {type(step) for step in grid.steps()}


def _settings(grid: Grid, world: World) -> dict[str, str]:
    """What was asked for, of the kinds of steps that the grid has."""
    sizes = world.sizes
    found = {"preset": world.preset, "seed": str(world.seed), "test clips": f"{len(world.test):,}"}
    kinds = _kinds(grid)
    stages = sorted(
        {"language" if step.stage == "prompt" else step.stage for step in grid.steps() if isinstance(step, Adapt)}
    )
    trainings = [*reversed(stages), *(["contrastive"] if Train in kinds else [])]
    if stages:
        found["labelled clips"] = f"{len(world.labelled):,}"
    if kinds & {Captions, Train}:
        found["unlabelled clips"] = f"{len(world.unlabelled):,}"
    for name in trainings:
        config = override(getattr(sizes, name), world.changes.get(name, ()))
        how = f"{config.optim.name} {config.optim.peak_learning_rate:g}"
        found[f"{name} training"] = f"{config.steps:,} steps of {config.batch_size} clips, {how}"
    if Captions in kinds:
        drawing = world.drawing
        found["captions"] = (
            f"{drawing.num_samples} a clip, nucleus {drawing.top_p:g}, temperature {drawing.temperature:g}, "
            f"at most {drawing.max_length} tokens"
        )
    return found


def _command(grid: Grid) -> str:
    """The same grid at full size, with the data and models that it takes."""
    kinds = _kinds(grid)
    asked = [f"pyvdl ablate {grid.name} --out full", "--test test.jsonl"]
    recipes = [row.recipe for row in grid.rows]
    if Adapt in kinds or any(isinstance(recipe, Train) and recipe.texts == "labelled" for recipe in recipes):
        asked.append("--data labelled.jsonl")
    if kinds & {Captions, Train}:
        asked.append("--unlabelled unlabelled.jsonl")
    if Adapt in kinds or Captions in kinds:
        asked.append("--preset paligemma --vlm paligemma-3b-pt-224")
    if Train in kinds:
        asked.append("--encoder clip-vit-large-patch14")
    lessons = [r.lesson for r in recipes if isinstance(r, Adapt) and r.lesson in ("pictures", "long answers")]
    asked += [f"--source '{lesson}={lesson.replace(' ', '-')}.jsonl'" for lesson in lessons]
    return " \\\n    ".join(asked)


def _facts(grid: Grid, outcome: Outcome, world: World) -> dict[str, Any]:
    """All figures, for other programs."""

    def scores(found: Mapping[str, Any]) -> dict[str, Any]:
        return {name: dataclasses.asdict(items.score()) for name, items in found.items()}

    return {
        "pyvdl": pyvdl.__version__,
        "ablation": grid.name,
        "source": grid.source,
        "toy": world.toy,
        "settings": _settings(grid, world),
        "rows": [
            {
                "key": row.key,
                "label": row.label,
                "recipe": describe(row.recipe),
                "stand_in": row.stand_in,
                "left_out": outcome.left_out.get(row.key),
                "paper": dict(zip((column.title for column in grid.columns), grid.paper(row), strict=True)),
                "ours": scores(outcome.scores.get(row.key, {})),
            }
            for row in grid.rows
        ],
        "again": {"row": grid.again, "ours": scores(outcome.again)},
        "directions": [dataclasses.asdict(one) for one in outcome.judged],
        "verdict": summary(outcome.judged),
        "seconds": dict(outcome.seconds),
    }
