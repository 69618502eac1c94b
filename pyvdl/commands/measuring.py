"""evaluate and embed."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING

from pyvdl.commands.common import (
    asked_input,
    finisher,
    listed,
    load_asked,
    loading_options,
    make_way,
    print_table,
    read_all,
    sampled,
)

if TYPE_CHECKING:
    from pyvdl.config import ClipConfig, DualEncoderConfig
    from pyvdl.data import Record
    from pyvdl.models.dual_encoder import DualEncoder
    from pyvdl.models.vlm import VLM
    from pyvdl.progress import Report
    from pyvdl.tokenizers import Tokenizer

Scores = list[tuple[str, float, float, float]]  # name, value, low, high


def evaluate(arguments: argparse.Namespace) -> int:
    from pyvdl.models.vlm import VLM
    from pyvdl.progress import reporting
    from pyvdl.storage import write_whole

    records = read_all(arguments.data)
    if arguments.out is not None:
        make_way(arguments.out)
    model, tokenizer = load_asked(arguments)
    with reporting("evaluate") as report:
        if isinstance(model, VLM):
            scores, failed = _vlm_scores(model, tokenizer, records, arguments, report)
        else:
            scores, failed = _dual_encoder_scores(model, tokenizer, records, arguments, report)
    print_table(["score", "value", "95% interval"], [[k, v, f"{low:.1f} to {high:.1f}"] for k, v, low, high in scores])
    print(f"{len(records)} clips, {failed} failed")
    if arguments.out is not None:
        found = {
            "model": str(arguments.model),
            "data": str(arguments.data),
            "clips": len(records),
            "failed": failed,
            "scores": {name: {"value": value, "low": low, "high": high} for name, value, low, high in scores},
        }
        write_whole(arguments.out, [json.dumps(found, indent=1) + "\n"])
    return 0


def _vlm_scores(
    model: VLM, tokenizer: Tokenizer, records: list[Record], arguments: argparse.Namespace, report: Report
) -> tuple[Scores, int]:
    from pyvdl.evaluate import evaluate_captions, evaluate_questions
    from pyvdl.recipes import model_clip

    clip = sampled(arguments, model_clip(model.config))
    captioned = [record for record in records if record.captions]
    asked = [record for record in records if record.questions]
    if not captioned and not asked:
        raise ValueError(f"{arguments.data}: no record has captions or questions")
    scores: Scores = []
    failed = 0
    if captioned:
        found = evaluate_captions(model, tokenizer, captioned, clip=clip, progress=report, **loading_options(arguments))
        scores.append(("CIDEr-D", found.cider, *found.interval))
        failed = found.failed
    if asked:
        answers = evaluate_questions(model, tokenizer, asked, clip=clip, progress=report, **loading_options(arguments))
        for title, name in (
            ("exact match", "exact_match"),
            ("exact match, lower and strip", "exact_match_normalised"),
            ("WUPS", "wups"),
        ):
            scores.append((title, getattr(answers, name), *answers.intervals[name]))
        failed = max(failed, answers.failed)
    return scores, failed


def _dual_encoder_scores(
    model: DualEncoder, tokenizer: Tokenizer, records: list[Record], arguments: argparse.Namespace, report: Report
) -> tuple[Scores, int]:
    import numpy as np

    from pyvdl.evaluate import class_embeddings, embed_texts, embed_videos, evaluate_retrieval, evaluate_zero_shot

    captioned = np.array([bool(record.captions) for record in records])
    labelled = np.array([record.label is not None for record in records])
    if not (captioned | labelled).any():
        raise ValueError(f"{arguments.data}: no record has captions (for retrieval) or a label (for zero-shot classes)")
    clip = _encoder_clip(arguments, model.config)
    videos = embed_videos(model, records, clip=clip, progress=report, **loading_options(arguments))
    scores: Scores = []
    if captioned.any():
        texts = embed_texts(model, tokenizer, [record.captions[0] for record in records if record.captions])
        found = evaluate_retrieval(videos[captioned], texts)
        for direction, title in (("t2v", "text to video"), ("v2t", "video to text")):
            for name, value in getattr(found, direction).items():
                scores.append((f"{title} {name.replace('_', ' ')}", value, *found.intervals[direction][name]))
    if labelled.any():
        names = sorted({record.label for record in records if record.label is not None})
        labels = [names.index(record.label) for record in records if record.label is not None]
        zero_shot = evaluate_zero_shot(videos[labelled], class_embeddings(model, tokenizer, names), labels)
        scores += [
            (f"zero-shot top-{k}", getattr(zero_shot, f"top{k}"), *zero_shot.intervals[f"top{k}"]) for k in (1, 5)
        ]
    return scores, int(np.isnan(videos).any(axis=1).sum())


def embed(arguments: argparse.Namespace) -> int:
    import numpy as np

    from pyvdl.checkpoint import load_weights
    from pyvdl.evaluate import embed_videos
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
            clip=_encoder_clip(arguments, model.config),
            progress=report,
            on_error=lambda record, error: errors.update({record.key: error}),
            **loading_options(arguments),
        )
    keys = [record.key for record in records]
    temporary = arguments.out.with_name(f".{arguments.out.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        np.savez(
            file, keys=np.array(keys), embeddings=embeddings, errors=np.array([errors.get(key, "") for key in keys])
        )
    temporary.replace(arguments.out)
    print(
        f"{arguments.out}: {len(keys)} embeddings of {embeddings.shape[1]} numbers, {len(errors)} failed (rows of NaN)"
    )
    return 0


def _encoder_clip(arguments: argparse.Namespace, config: DualEncoderConfig) -> ClipConfig:
    """Of a model of images the frames are embedded one by one: as many as clips have by default."""
    import dataclasses

    from pyvdl.config import ClipConfig
    from pyvdl.recipes import model_clip

    clip = sampled(arguments, model_clip(config))
    return dataclasses.replace(clip, num_frames=ClipConfig().num_frames) if config.vision.num_frames == 1 else clip
