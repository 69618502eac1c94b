"""embed: videos as vectors."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pyvdl.commands.common import asked_job, asked_mesh, encoder_clip, export_asked, finisher

if TYPE_CHECKING:
    from pyvdl.embed import Embedder


def embed(arguments: argparse.Namespace) -> int:
    asked_job(arguments, _embedder, "parquet")
    export_asked(arguments)
    return 0


def _embedder(arguments: argparse.Namespace) -> Embedder:
    from pyvdl.checkpoint import load_weights
    from pyvdl.embed import Embedder
    from pyvdl.models.dual_encoder import DualEncoder
    from pyvdl.sharding import place

    mesh = asked_mesh(arguments)
    finish = finisher(arguments)
    model = load_weights(arguments.model, place=None if mesh is None else place(mesh))
    if not isinstance(model, DualEncoder):
        raise ValueError(f"{arguments.model} holds a {type(model).__name__}: embeddings need a dual encoder")
    finish(model)
    clip = encoder_clip(arguments, model.config)
    return Embedder(model, clip=clip, batch_size=arguments.batch_size, mesh=mesh)
