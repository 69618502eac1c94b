"""Plots of an ablation: the paper's figures beside ours, row by row or as curves over the data; the directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from pyvdl.page import new_figure, new_panels

from .grids import SCORES, Grid, Row
from .run import Outcome
from .steps import Train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAPER_MARKS = "oDs"  # of the paper's columns that are held against one score
_CURVE_COLOURS = ("alt_text", "human_captions", "pseudo_captions")


def figures(outcome: Outcome, colours: Mapping[str, str]) -> dict[str, Figure]:
    """Of each score the rows, as `rows-SCORE`, and where directions are judged by it, `directions-SCORE`."""
    grid = outcome.grid
    found = {}
    for score in grid.scores:
        name = score.replace("@", "")
        show = _curves if any(row.curve for row in grid.rows) else _rows
        found[f"rows-{name}"] = show(grid, outcome, score, colours)
        if any(one.score == score for one in outcome.judged):
            found[f"directions-{name}"] = _directions(grid, outcome, score, colours)
    return found


def _run(grid: Grid, outcome: Outcome) -> list[Row]:
    return [row for row in grid.rows if row.key in outcome.scores]


def _rows(grid: Grid, outcome: Outcome, score: str, colours: Mapping[str, str]) -> Figure:
    """A line a row: the paper's figures on the left, ours with 95% intervals on the right."""
    rows = _run(grid, outcome)
    columns = [i for i, column in enumerate(grid.columns) if column.score == score]
    figure, axes = new_panels(2 if columns else 1)
    ours = axes[-1]
    at = np.arange(len(rows))[::-1]
    for y, row in zip(at, rows):
        found = outcome.scores[row.key][score].score()
        colour = colours["pseudo_captions" if row.key == grid.again else "visual"]
        ours.plot([found.low, found.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt", alpha=0.55)
        ours.plot(found.value, y, "o", color=colour, markersize=6)
        ours.annotate(
            f"{found.value:.1f}", (found.value, y), (0, 6), textcoords="offset points", ha="center", fontsize=8
        )
    ours.set_title("ours", fontsize=9.5, color=colours["muted"])
    if columns:
        paper = axes[0]
        for mark, column in zip(_PAPER_MARKS, columns):
            values = [grid.paper(row)[column] for row in rows]
            known = [(value, y, row) for value, y, row in zip(values, at, rows) if value is not None]
            tint = [colours["pseudo_captions" if row.key == grid.again else "ink"] for *_, row in known]
            paper.scatter([value for value, *_ in known], [y for _, y, _ in known], marker=mark, s=30, c=tint, zorder=3)
            paper.plot([], [], mark, color=colours["muted"], markersize=5, label=grid.columns[column].title)
            for value, y, _ in known:
                paper.annotate(f"{value:.1f}", (value, y), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        paper.set_title("the paper", fontsize=9.5, color=colours["muted"])
        figure.legend(loc="outside lower left", ncols=len(columns), handlelength=0.8, fontsize=8.5)
    for axis in axes:
        axis.set_ylim(-0.6, len(rows) - 0.25)
        axis.grid(axis="y", linewidth=0.7)
        axis.margins(x=0.16)
    axes[0].set_yticks(
        at, [_wrapped(row.label + (" *" if row.stand_in else "")) for row in rows], fontsize=8.5, color=colours["ink"]
    )
    return figure


def _curves(grid: Grid, outcome: Outcome, score: str, colours: Mapping[str, str]) -> Figure:
    """Ours over the share of the clips, on a log scale, each curve with its band of 95% intervals; the paper's ends."""
    column = next((i for i, column in enumerate(grid.columns) if column.score == score), None)
    figure, axes = new_panels(1) if column is None else new_panels(2, widths=(1, 3.2), share=False)
    ours = axes[-1]
    names = list(dict.fromkeys(row.curve for row in grid.rows if row.curve))
    for name, colour in zip(names, _CURVE_COLOURS):
        points = []
        for row in _run(grid, outcome):
            if row.curve == name and isinstance(row.recipe, Train):
                found = outcome.scores[row.key][score].score()
                points.append((100 * row.recipe.share, found.value, found.low, found.high))
                value = None if column is None else grid.paper(row)[column]
                if value is not None:
                    axes[0].plot(0, value, "D", color=colours[colour], markersize=6)
                    axes[0].annotate(f"{value:.1f}", (0, value), (8, -3), textcoords="offset points", fontsize=8.5)
        if points:
            x, values, low, high = np.array(points).T
            ours.fill_between(x, low, high, color=colours[colour], alpha=0.16, linewidth=0)
            ours.plot(x, values, "-o", color=colours[colour], linewidth=1.8, markersize=5, label=name)
            ours.set_xscale("log")
            ours.set_xticks(x, [f"{share:g}%" for share in x])
    ours.minorticks_off()
    ours.set_xlabel("share of the clips")
    ours.set_ylabel(f"{SCORES[score].title}, ours")
    ours.grid(linewidth=0.7)
    if column is not None:
        paper = axes[0]
        paper.set_xticks([0], ["all"])
        paper.set_xlim(-0.4, 0.9)
        paper.margins(y=0.2)
        paper.grid(axis="y", linewidth=0.7)
        paper.set_ylabel(f"{grid.columns[column].title}, the paper")
    figure.legend(loc="outside upper right", ncols=len(names), handlelength=1.2, columnspacing=1.4)
    return figure


def _directions(grid: Grid, outcome: Outcome, score: str, colours: Mapping[str, str]) -> Figure:
    """Our differences of rows that the paper has in this order, with paired 95% intervals; the band is the seed's."""
    judged = [one for one in outcome.judged if one.score == score]
    figure, axes = new_figure()
    seed = judged[0].seed
    axes.axvspan(-seed, seed, color=colours["line"], alpha=0.9, linewidth=0)
    axes.axvline(0, color=colours["muted"], linewidth=1)
    tint = {"agrees": colours["good"], "does not": colours["bad"], "undecided": colours["muted"]}
    at = np.arange(len(judged))[::-1]
    for y, one in zip(at, judged):
        colour = tint[one.verdict]
        axes.plot([one.ours.low, one.ours.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt", alpha=0.6)
        axes.plot(one.ours.value, y, "o", color=colour, markersize=6)
        text = f"{one.ours.value:+.1f}  {one.verdict}"
        axes.annotate(text, (one.ours.value, y), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    labels = [f"{grid.row(one.better).label}\nabove {grid.row(one.worse).label}" for one in judged]
    axes.set_yticks(at, labels, fontsize=8, color=colours["ink"])
    axes.set_ylim(-0.6, len(judged) - 0.25)
    axes.margins(x=0.12)
    axes.set_xlabel(f"difference in {SCORES[score].title}, ours", fontsize=9)
    axes.grid(axis="x", linewidth=0.7)
    return figure


def _wrapped(label: str) -> str:
    """On two lines where it is long."""
    if len(label) <= 20:
        return label
    middle = min((i for i, letter in enumerate(label) if letter == " "), key=lambda i: abs(i - len(label) / 2))
    return f"{label[:middle]}\n{label[middle + 1 :]}"
