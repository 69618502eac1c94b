"""embed: videos as vectors."""

from __future__ import annotations

import argparse

from pyvdl.commands.common import asked_input, encoder_clip, finisher, listed, loading_options, make_way


def embed(arguments: argparse.Namespace) -> int:
    import numpy as np

    from pyvdl.checkpoint import load_weights
    from pyvdl.evaluate import embed_videos
    from pyvdl.evaluate.array_predictions import write_arrays
    from pyvdl.models.dual_encoder import DualEncoder
    from pyvdl.progress import reporting

    records = listed(asked_input(arguments))
    make_way(arguments.out)
    finish = finisher(arguments)
    model = load_weights(arguments.model)
    if not isinstance(model, DualEncoder):
        raise ValueError(f"{arguments.model} holds a {type(model).__name__}: embeddings need a dual encoder")
    finish(model)
    errors = {}
    with reporting("embed") as report:
        embeddings = embed_videos(
            model,
            records,
            clip=encoder_clip(arguments, model.config),
            clips=arguments.clips,
            progress=report,
            on_error=lambda record, error: errors.update({record.key: error}),
            **loading_options(arguments),
        )
    keys = [record.key for record in records]
    write_arrays(
        arguments.out,
        {"keys": np.array(keys), "embeddings": embeddings, "errors": np.array([errors.get(key, "") for key in keys])},
    )
    print(
        f"{arguments.out}: {len(keys)} embeddings of {embeddings.shape[1]} numbers, {len(errors)} failed (rows of NaN)"
    )
    return 0
