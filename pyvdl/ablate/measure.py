"""What a model scores on the test clips, item by item."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from pyvdl import metrics
from pyvdl.checkpoint import is_public, load_model
from pyvdl.config import ClipConfig
from pyvdl.evaluate import (
    RECALL_AT,
    class_embeddings,
    embed_texts,
    embed_videos,
    evaluate_captions,
    evaluate_questions,
    evaluate_retrieval,
)
from pyvdl.evaluate.scores import answer_points, owners
from pyvdl.models.dual_encoder import DualEncoder
from pyvdl.models.vlm import VLM
from pyvdl.recipes import model_clip
from pyvdl.text import prompts_for

from .judge import Items
from .world import World


def measure(together: str, path: Path, world: World) -> dict[str, Items]:
    """Scores of a saved model on the test clips that have what they are measured by; see `grids.SCORES`.

    "captions" of a VLM: "cider"; its "answers": "exact_match" and "wups"; "embeddings" of a dual encoder: "R@1", "R@5"
    and "R@10" by each clip's first caption, "top1" and "top5" of those with a label.
    """
    if together == "embeddings":
        return _embeddings(path, world)
    model, tokenizer = load_model(path)
    if not isinstance(model, VLM):
        raise ValueError(f"{path} holds a {type(model).__name__}: this grid needs a VLM")
    clip = steady(model_clip(model.config, world.sizes.visual.clip))
    options: dict[str, Any] = {"clip": clip, "batch_size": world.drawing.batch_size}
    caption, question = prompts_for(is_public(path))
    if together == "captions":
        captioned = [record for record in world.test if record.captions]
        options |= {"prompt": caption, "max_length": world.drawing.max_length}
        said = evaluate_captions(model, tokenizer, captioned, **options)
        return {"cider": Items(said.per_item)}
    asked = [record for record in world.test if record.questions]
    told = evaluate_questions(model, tokenizer, asked, prompt=question, **options).predictions
    questions = [question for record in asked for question in record.questions]
    points = answer_points(told, [q.answers for q in questions], [q.type for q in questions])
    clips = owners([len(record.questions) for record in asked])
    return {name: Items(points[name], clips) for name in ("exact_match", "wups")}


def _embeddings(path: Path, world: World) -> dict[str, Items]:
    model, tokenizer = load_model(path)
    if not isinstance(model, DualEncoder):
        raise ValueError(f"{path} holds a {type(model).__name__}: this grid needs a dual encoder")
    clip = steady(model_clip(model.config, world.sizes.contrastive.clip))
    videos = embed_videos(model, world.test, clip=clip, batch_size=world.drawing.batch_size)
    captioned = np.array([bool(record.captions) for record in world.test])
    labelled = np.array([record.label is not None for record in world.test])
    found: dict[str, Items] = {}
    if captioned.any():
        texts = embed_texts(model, tokenizer, [record.captions[0] for record in world.test if record.captions])
        ranks = evaluate_retrieval(videos[captioned], texts).t2v_ranks
        there = ~np.isnan(videos[captioned]).any(axis=1)
        found |= {f"R@{k}": Items(100.0 * ((ranks <= k) & there)) for k in RECALL_AT}
    if labelled.any():
        names = sorted({record.label for record in world.test if record.label is not None})
        labels = np.array([names.index(record.label) for record in world.test if record.label is not None])
        classes = class_embeddings(model, tokenizer, names, world.templates)
        seen = videos[labelled]
        bad = np.isnan(seen).any(axis=1)
        hits = metrics.top_k_accuracy(np.where(bad[:, None], 0, seen) @ classes.T, labels, ks=(1, 5)).per_query
        found |= {f"top{k}": Items(100.0 * hit * ~bad) for k, hit in hits.items()}
    return found


def steady(clip: ClipConfig) -> ClipConfig:
    """The same without what is random."""
    sampling = "uniform" if clip.sampling == "random" else clip.sampling
    return dataclasses.replace(clip, crop="center", scale_jitter=None, sampling=sampling)
