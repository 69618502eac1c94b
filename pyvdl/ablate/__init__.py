"""The paper's ablations: grids of recipes, run through the same trainings as the commands, beside the paper's tables.

`steps` are what a recipe is made of, `grids` the paper's tables as recipes, `world` what they begin with (the small
corpus, or data and checkpoints of the user), `stand_ins` the sources that the toy size replaces, `run` carries steps
out, each once, `judge` holds the directions against the paper's, `page` shows them.
"""

from .grids import GRIDS, Grid

__all__ = ["GRIDS", "Grid"]
