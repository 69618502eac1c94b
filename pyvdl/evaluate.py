"""Scores of a trained model on a test set: captions, questions, retrieval, zero-shot classes.

All scores are in percent points (x100) with 95% bootstrap intervals over test clips. A clip that cannot be decoded
counts as a miss, never as absent, and its number is reported as `failed`. Rows that pad the last batch never count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from pyvdl import metrics
from pyvdl.caption import caption_records, clip_batches, encode_prompts
from pyvdl.config import ClipConfig
from pyvdl.data import Record
from pyvdl.generate import generate
from pyvdl.models.dual_encoder import DualEncoder
from pyvdl.models.vlm import VLM
from pyvdl.progress import Report
from pyvdl.text import CAPTION_PROMPT, QUESTION_PROMPT, split_words
from pyvdl.tokenizers import Tokenizer

Interval = tuple[float, float]
RECALL_AT = (1, 5, 10)
_SLOW_RESAMPLES = 500  # for medians, which have no fast path


@dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """Greedy captions of N clips against their references."""

    cider: float  # CIDEr-D x100
    interval: Interval  # (low, high) of `cider`
    per_item: np.ndarray  # float64[N], x100
    captions: list[str]  # "" for a failed clip
    mean_length: float  # words
    failed: int


@dataclass(frozen=True, kw_only=True)
class QuestionScores:
    """Greedy answers to the questions of N clips, in the records' order."""

    exact_match: float
    exact_match_normalised: float  # after lower-casing and stripping
    wups: float
    intervals: dict[str, Interval]  # by the names of the three fields above
    by_family: dict[str, float]  # exact match
    predictions: list[str]  # "" for a failed clip
    questions: int
    failed: int  # clips


@dataclass(frozen=True, kw_only=True)
class RetrievalScores:
    """Both directions: "R@1", "R@5", "R@10" in percent, "median_rank" counted from 1. A tie counts as a miss."""

    t2v: dict[str, float]
    v2t: dict[str, float]
    intervals: dict[str, dict[str, Interval]]  # by direction, then as above
    t2v_ranks: np.ndarray  # float64 of each text, from 1
    v2t_ranks: np.ndarray  # float64 of each video; a failed one ranks last
    failed: int  # videos


@dataclass(frozen=True, kw_only=True)
class ZeroShotScores:
    """Accuracy of the nearest class embeddings."""

    top1: float
    top5: float
    intervals: dict[str, Interval]  # "top1", "top5"
    predictions: np.ndarray  # int64[N], -1 for a failed clip
    failed: int


def evaluate_captions(
    model: VLM,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    *,
    clip: ClipConfig,
    prompt: str = CAPTION_PROMPT,
    max_length: int = 32,
    batch_size: int = 8,
    num_threads: int = 2,
    prefetch: int = 2,
    seed: int = 0,
    progress: Report | None = None,
) -> CaptionScores:
    """CIDEr-D of greedy captions; the references are the captions of each record. `seed` is that of the bootstrap."""
    without = [record.key for record in records if not record.captions]
    if without or not records:
        raise ValueError(f"{len(without)} of {len(records)} records have no captions to compare with {without[:3]}")
    rows = list(
        caption_records(
            model,
            tokenizer,
            records,
            clip=clip,
            prompt=prompt,
            max_length=max_length,
            temperature=0.0,
            batch_size=batch_size,
            num_threads=num_threads,
            prefetch=prefetch,
            progress=progress,
        )
    )
    captions = [row.captions[0] if row.captions else "" for row in rows]
    scores = metrics.cider(captions, [list(record.captions) for record in records])
    return CaptionScores(
        cider=100 * scores.score,
        interval=metrics.bootstrap_interval(100 * scores.per_item, seed=seed),
        per_item=100 * scores.per_item,
        captions=captions,
        mean_length=float(np.mean([len(split_words(text)) for text in captions])),
        failed=sum(row.status == "failed" for row in rows),
    )


def evaluate_questions(
    model: VLM,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    *,
    clip: ClipConfig,
    prompt: str = QUESTION_PROMPT,
    max_length: int = 16,
    batch_size: int = 8,
    num_threads: int = 2,
    prefetch: int = 2,
    seed: int = 0,
    progress: Report | None = None,
) -> QuestionScores:
    """Greedy answers to every question of `records`; records without questions are left out."""
    records = [record for record in records if record.questions]
    if not records:
        raise ValueError("no record has questions")
    owner = np.concatenate([np.full(len(r.questions), i) for i, r in enumerate(records)])
    first = np.concatenate([[0], np.cumsum([len(r.questions) for r in records])])
    questions = [question for record in records for question in record.questions]
    prompts = encode_prompts(tokenizer, [prompt.format(question=q.question) for q in questions])
    predictions = [""] * len(questions)
    failed = 0
    clips_at_once = min(batch_size, len(records))

    def pairs() -> Iterator[tuple[np.ndarray, int]]:
        """Frames and the question asked about them: a clip is decoded once, whatever number of questions it has."""
        nonlocal failed
        batches = clip_batches(records, clip=clip, batch_size=clips_at_once, num_threads=num_threads, prefetch=prefetch)
        done = 0
        with closing(batches):
            for batch in batches:
                for row in np.flatnonzero(batch.index >= 0):
                    failed += not batch.ok[row]
                    record = batch.index[row]
                    for question in range(first[record], first[record + 1]) if batch.ok[row] else ():
                        yield batch.data[row], question
                done += int((batch.index >= 0).sum())
                if progress is not None:
                    progress(done, len(records))

    def answer(chunk: list[tuple[np.ndarray, int]]) -> None:
        full = [*chunk, *chunk[:1] * (batch_size - len(chunk))]  # padding repeats a row, its answer is dropped
        samples = generate(
            model,
            np.stack([frames for frames, _ in full]),
            prompts[[question for _, question in full]],
            num_samples=1,
            max_length=max_length,
            temperature=0.0,
            seeds=np.zeros(batch_size, np.uint32),
        )
        tokens = np.asarray(samples.tokens)
        for row, (_, question) in enumerate(chunk):
            predictions[question] = tokenizer.decode(tokens[row, 0])

    chunk: list[tuple[np.ndarray, int]] = []
    for pair in pairs():
        chunk.append(pair)
        if len(chunk) == batch_size:
            answer(chunk)
            chunk = []
    if chunk:
        answer(chunk)
    return score_answers(
        predictions, [q.answers for q in questions], [q.family for q in questions], owner, failed, seed
    )


def score_answers(
    predictions: list[str],
    answers: Sequence[str | Sequence[str]],
    families: Sequence[str | None],
    owner: np.ndarray,
    failed: int = 0,
    seed: int = 0,
) -> QuestionScores:
    """Scores answers however they were made; of each question one is right, or any of several. `owner` int[Q] is the
    clip of each question (for the bootstrap)."""
    matches = metrics.exact_match(predictions, answers)
    per_question = {
        "exact_match": 100.0 * matches.per_item,
        "exact_match_normalised": 100.0 * matches.per_item_normalised,
        "wups": 100.0 * metrics.wups(predictions, answers).per_item,
    }
    family = np.array(families, dtype=object)
    return QuestionScores(
        **{name: float(values.mean()) for name, values in per_question.items()},
        intervals={
            name: metrics.bootstrap_interval(values, clusters=owner, seed=seed) for name, values in per_question.items()
        },
        by_family={
            f: float(per_question["exact_match"][family == f].mean()) for f in sorted(filter(None, set(families)))
        },
        predictions=predictions,
        questions=len(predictions),
        failed=failed,
    )


@functools.cache
def _encoders() -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """The two towers, compiled once a shape and process."""
    video = nnx.jit(lambda model, frames: model.encode_video(frames))
    text = nnx.jit(lambda model, ids: model.encode_text(ids))
    return video, text


def embed_videos(
    model: DualEncoder,
    records: Sequence[Record],
    *,
    clip: ClipConfig,
    batch_size: int = 16,
    num_threads: int = 2,
    prefetch: int = 2,
    progress: Report | None = None,
    on_error: Callable[[Record, str], Any] | None = None,
) -> np.ndarray:
    """float32[N, E], L2-normalised; the row of a clip that cannot be decoded is NaN and `on_error` hears why."""
    encode = _encoders()[0]
    out = np.full((len(records), model.config.embed_dim), np.nan, np.float32)
    batches = clip_batches(
        records,
        clip=clip,
        batch_size=max(1, min(batch_size, len(records))),
        num_threads=num_threads,
        prefetch=prefetch,
    )
    done = 0
    with closing(batches):
        for batch in batches:
            for row in np.flatnonzero((batch.index >= 0) & ~batch.ok):
                if on_error is not None:
                    on_error(records[batch.index[row]], batch.errors[row] or "no frames")
            if batch.ok.any():
                out[batch.index[batch.ok]] = np.asarray(encode(model, batch.data))[batch.ok]
            done += int((batch.index >= 0).sum())
            if progress is not None:
                progress(done, len(records))
    return out


def embed_texts(model: DualEncoder, tokenizer: Tokenizer, texts: Sequence[str], *, batch_size: int = 64) -> np.ndarray:
    """float32[N, E], L2-normalised."""
    encode = _encoders()[1]
    length = model.config.text.context_length
    out = np.empty((len(texts), model.config.embed_dim), np.float32)
    for start in range(0, len(texts), batch_size):
        chunk = list(texts[start : start + batch_size])
        ids = tokenizer.encode_batch(chunk + [""] * (batch_size - len(chunk)), length, bos=True)
        out[start : start + len(chunk)] = np.asarray(encode(model, ids))[: len(chunk)]
    return out


def evaluate_retrieval(
    video_embeddings: np.ndarray,
    text_embeddings: np.ndarray,
    *,
    video_of_text: np.ndarray | None = None,
    seed: int = 0,
) -> RetrievalScores:
    """Recall and median rank in both directions.

    video_embeddings: float32[N, E], NaN rows failed. text_embeddings: float32[M, E]. video_of_text: int[M], the video
    each text describes (None: text i describes video i). A video with several texts finds the best of them.
    """
    videos, texts = len(video_embeddings), len(text_embeddings)
    if video_of_text is None:
        if videos != texts:
            raise ValueError(f"{videos} videos and {texts} texts do not pair up one to one: pass video_of_text")
        video_of_text = np.arange(videos)
    bad = np.isnan(video_embeddings).any(axis=1)
    similarity = np.where(bad[:, None], 0, video_embeddings) @ text_embeddings.T
    similarity[bad] = -np.inf
    owners = np.asarray(video_of_text)
    found = {
        "t2v": (metrics.recall_at_k(similarity.T, ks=RECALL_AT, query_groups=owners), owners),
        "v2t": (metrics.recall_at_k(similarity, ks=RECALL_AT, candidate_groups=owners), np.arange(videos)),
    }
    values: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, Interval]] = {}
    for direction, (scores, video) in found.items():
        hits = {f"R@{k}": 100 * hit * ~bad[video] for k, hit in scores.per_query.items()}
        values[direction] = {name: float(hit.mean()) for name, hit in hits.items()} | {
            "median_rank": scores.median_rank
        }
        intervals[direction] = {
            name: metrics.bootstrap_interval(hit, clusters=video, seed=seed) for name, hit in hits.items()
        } | {
            "median_rank": metrics.bootstrap_interval(
                scores.ranks, statistic=_median, clusters=video, resamples=_SLOW_RESAMPLES, seed=seed
            )
        }
    return RetrievalScores(
        t2v=values["t2v"],
        v2t=values["v2t"],
        intervals=intervals,
        t2v_ranks=found["t2v"][0].ranks,
        v2t_ranks=found["v2t"][0].ranks,
        failed=int(bad.sum()),
    )


def _median(ranks: np.ndarray) -> float:
    return float(np.median(ranks))


def class_embeddings(
    model: DualEncoder,
    tokenizer: Tokenizer,
    names: Sequence[str],
    templates: Sequence[str] = ("{}",),
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """float32[C, E]: for each class the mean of its normalised template embeddings, normalised again."""
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong or not templates:
        raise ValueError(f"templates {wrong}: expected at least one, each with one '{{}}' for the class name")
    texts = [template.format(name) for name in names for template in templates]
    each = embed_texts(model, tokenizer, texts, batch_size=batch_size)
    mean = each.reshape(len(names), len(templates), -1).mean(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def evaluate_zero_shot(
    video_embeddings: np.ndarray, class_embeddings: np.ndarray, labels: np.ndarray | Sequence[int], *, seed: int = 0
) -> ZeroShotScores:
    """Top-1 and top-5 accuracy: float32[N, E] (NaN rows failed) against float32[C, E], labels int[N]."""
    labels = np.asarray(labels)
    bad = np.isnan(video_embeddings).any(axis=1)
    similarity = np.where(bad[:, None], 0, video_embeddings) @ class_embeddings.T
    scores = metrics.top_k_accuracy(similarity, labels, ks=(1, 5))
    hits = {f"top{k}": 100 * hit * ~bad for k, hit in scores.per_query.items()}
    return ZeroShotScores(
        **{name: float(hit.mean()) for name, hit in hits.items()},
        intervals={name: metrics.bootstrap_interval(hit, seed=seed) for name, hit in hits.items()},
        predictions=np.where(bad, -1, similarity.argmax(1)),
        failed=int(bad.sum()),
    )
