"""What a model scores on the test clips, item by item."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from pyvdl import metrics
from pyvdl.checkpoint import load_model
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
from pyvdl.models.dual_encoder import DualEncoder
from pyvdl.models.vlm import VLM
from pyvdl.recipes import model_clip

from .judge import Items
from .world import World


def vlm_scores(path: Path, world: World) -> dict[str, Items]:
    """Captions and answers of a saved VLM on the test clips that have such texts: "cider", "exact_match", "wups"."""
    model, tokenizer = load_model(path)
    if not isinstance(model, VLM):
        raise ValueError(f"{path} holds a {type(model).__name__}: this grid needs a VLM")
    clip = steady(model_clip(model.config, world.sizes.visual.clip))
    options: dict[str, Any] = {"clip": clip, "batch_size": world.drawing.batch_size}
    captioned = [record for record in world.test if record.captions]
    asked = [record for record in world.test if record.questions]
    found: dict[str, Items] = {}
    if captioned:
        said = evaluate_captions(model, tokenizer, captioned, max_length=world.drawing.max_length, **options)
        found["cider"] = Items(said.per_item)
    if asked:
        told = evaluate_questions(model, tokenizer, asked, **options).predictions
        answers = [question.answers for record in asked for question in record.questions]
        clips = np.repeat(np.arange(len(asked)), [len(record.questions) for record in asked])
        found["exact_match"] = Items(100.0 * metrics.exact_match(told, answers).per_item, clips)
        found["wups"] = Items(100.0 * metrics.wups(told, answers).per_item, clips)
    return found


def encoder_scores(path: Path, world: World) -> dict[str, Items]:
    """Retrieval by each test clip's first caption ("R@1", ...), and classes of those with a label ("top1", "top5")."""
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
        found |= {f"R@{k}": Items(100.0 * (ranks <= k)) for k in RECALL_AT}
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
