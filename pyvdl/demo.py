"""The whole method on a small corpus, in minutes on two cores: what `make demo` runs.

Corpus -> image model -> visual stage -> language stage -> captions -> three dual encoders -> evaluation -> report. Each
step writes its own folder below one directory, so that a demo that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pyvdl import __version__, starts
from pyvdl.caption import caption_records
from pyvdl.checkpoint import load_model
from pyvdl.claims import claims, recovered_gain, verdict
from pyvdl.clock import Clock
from pyvdl.config import PRESETS, ClipConfig
from pyvdl.data import Record
from pyvdl.evaluate import (
    CaptionScores,
    QuestionScores,
    class_embeddings,
    embed_texts,
    embed_videos,
    evaluate_captions,
    evaluate_questions,
    evaluate_retrieval,
    evaluate_zero_shot,
)
from pyvdl.metrics import bootstrap_interval, caption_statistics
from pyvdl.metrics.wordnet import wordnet
from pyvdl.models.dual_encoder import DualEncoder
from pyvdl.models.vlm import VLM
from pyvdl.page import check_packages
from pyvdl.pipeline import caption_job
from pyvdl.progress import reporting
from pyvdl.recipes import adapt, train
from pyvdl.report import save_thumbnail, table, write_report
from pyvdl.rows import CaptionRow, check_format, read_captions
from pyvdl.storage import write_whole
from pyvdl.synthetic import ALT_TEXT_NOISE, make_corpus
from pyvdl.synthetic.words import LABELS
from pyvdl.text import DETAIL_PROMPT, WordTokenizer, split_words
from pyvdl.train import History
from pyvdl.video import ClipLoader, ClipRequest, sample_clip

STAGES = ("image", "visual", "language")
TEXTS = ("alt_text", "pseudo_captions", "human_captions")
DETAIL_LENGTH = 48  # tokens


@dataclasses.dataclass(frozen=True)
class Stage:
    """The VLM after one stage, and how it does on the test part."""

    model: VLM
    captions: CaptionScores
    questions: QuestionScores
    details: list[str]
    detail_recall: np.ndarray  # float64[N], share of each clip's facts found in its detailed description


def run_demo(directory: str | os.PathLike[str] = "demo", seed: int = 0) -> Path:
    """Runs everything below `directory`, prints the table and returns the path of the report page."""
    check_packages()
    check_format("parquet")
    wordnet()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    clock = Clock(directory / "seconds.json")
    with clock.phase("corpus", f"corpus: {starts.CLIPS} clips, rendered and encoded (seed {seed})"):
        with reporting("video files") as progress:
            corpus = make_corpus(directory / "corpus", num_clips=starts.CLIPS, seed=seed, progress=progress)
        noise = ", ".join(f"{name} {share:.0%}" for name, share in ALT_TEXT_NOISE.items())
        print(f"alt-text noise, fixed beforehand: {noise}", file=sys.stderr)
    tokenizer = WordTokenizer.from_texts(starts.texts(corpus))
    preset = PRESETS["demo"](tokenizer.vocab_size)
    clip = dataclasses.replace(preset.visual.clip, crop="center")
    decode = _decode_speed(corpus.test, clip)

    histories: dict[str, History] = {}
    work = {name: directory / name for name in ("encoder", *STAGES, *(f"dual_{text}" for text in TEXTS))}
    with clock.phase("pretrain", "image models, from single frames and text (stand-ins for CLIP and PaLI-3)"):
        histories |= starts.image_models(corpus, tokenizer, preset, directory, seed)
    changes = (f"seed={seed}",)
    with clock.phase("visual", "visual stage: the vision tower learns from short captions"):
        start = work["image"] / "model"
        histories["visual"] = adapt(
            "visual", corpus.train, work["visual"], start=start, preset="demo", assignments=changes
        )
    with clock.phase("language", "language stage: the language model learns from instruction data"):
        start = work["visual"] / "model"
        taught = [starts.instructed(record) for record in corpus.train]
        histories["language"] = adapt(
            "language", taught, work["language"], start=start, preset="demo", assignments=changes
        )
    with clock.phase("evaluate", "evaluation of the three language models on the test part"):
        stages = {name: _evaluate_stage(work[name] / "model", corpus.test, clip, seed) for name in STAGES}
    with clock.phase("caption", f"captions of the unlabelled clips, {starts.SAMPLES} each by nucleus sampling"):
        rows = _caption(stages["language"].model, tokenizer, corpus.unlabelled, clip, directory / "captions", seed)
    encoders: dict[str, DualEncoder] = {}
    with clock.phase("dual_encoder", "dual encoders, three times from the same start"):
        starts.inflated(work["encoder"] / "model", directory / "dual_start", preset, seed)
        records = dict(zip(TEXTS, _captioned(corpus.unlabelled, rows), strict=True))
        for text in TEXTS:
            out, start = work[f"dual_{text}"], directory / "dual_start"
            histories[f"dual_{text}"] = train(records[text], out, start=start, preset="demo", assignments=changes)
            encoders[text], _ = load_model(out / "model")  # type: ignore[assignment]
    with clock.phase("evaluate", "evaluation of the three encoders"):
        dual = {text: _evaluate_encoder(encoders[text], tokenizer, corpus.test, clip, seed) for text in TEXTS}

    tokens = sum(len(split_words(caption)) + 1 for row in rows for caption in row.captions)  # 1: the end
    report: dict[str, Any] = {
        "pyvdl": __version__,
        "machine": _machine(),
        "versions": {name: metadata.version(name) for name in ("jax", "flax", "optax", "av", "numpy")},
        "seed": seed,
        "corpus": {
            "train": len(corpus.train),
            "unlabelled": len(corpus.unlabelled),
            "test": len(corpus.test),
            "files": corpus.num_files,
            "codecs": corpus.codecs,
            "alt_text_noise": ALT_TEXT_NOISE,
        },
        "vlm": {name: _stage_scores(stage, seed) for name, stage in stages.items()},
        "dual_encoder": {text: result["scores"] for text, result in dual.items()},
        "caption_statistics": {
            text: _statistics([caption for record in records[text] for caption in record.captions]) for text in TEXTS
        },
        "losses": {name: _curve(history) for name, history in histories.items()},
        "throughput": {
            "decode": decode,
            "wait_share": {
                "visual": histories["visual"].wait_share,
                "language": histories["language"].wait_share,
                "dual_encoder": float(np.mean([histories[f"dual_{text}"].wait_share for text in TEXTS])),
            },
            "caption": {
                "clips_per_second": len(rows) / clock.seconds["caption"],
                "tokens_per_second": tokens / clock.seconds["caption"],
            },
        },
    }
    report["recovered_gain"] = recovered_gain(report)
    report["claims"] = claims(report)
    report["verdict"] = verdict(report["claims"])
    report["examples"] = _examples(directory, corpus.test, stages, dual, clip)
    report["seconds"] = {**clock.seconds, "total": clock.total}
    write_whole(directory / "report.json", [json.dumps(report, indent=1)])
    page = write_report(report, directory)
    print(table(report))
    print(report["verdict"])
    print(f"\nreport: {page}  ({clock.total:.0f} s in all)")
    return page


def _decode_speed(records: Sequence[Record], clip: ClipConfig) -> dict[str, Any]:
    """Clips a second of the decoder alone, all cores, on the test part."""
    threads = os.cpu_count() or 1
    requests = [ClipRequest(r.source, r.start_seconds, r.end_seconds, 0) for r in records]
    loader = ClipLoader(requests, batch_size=starts.BATCH, num_threads=threads, prefetch=2, **dataclasses.asdict(clip))
    begin = time.perf_counter()
    good = sum(int(batch.ok.sum()) for batch in loader)
    rate = good / (time.perf_counter() - begin)
    return {"clips_per_second": rate, "frames_per_second": rate * clip.num_frames, "threads": threads}


def _evaluate_stage(path: Path, records: Sequence[Record], clip: ClipConfig, seed: int) -> Stage:
    model, tokenizer = load_model(path)
    assert isinstance(model, VLM)
    options: dict[str, Any] = {"clip": clip, "batch_size": starts.BATCH, "seed": seed}
    captions = evaluate_captions(model, tokenizer, records, max_length=starts.CAPTION_LENGTH, **options)
    questions = evaluate_questions(model, tokenizer, records, max_length=12, **options)
    rows = caption_records(
        model,
        tokenizer,
        records,
        clip=clip,
        prompt=DETAIL_PROMPT,
        max_length=DETAIL_LENGTH,
        temperature=0.0,
        batch_size=starts.BATCH,
    )
    details = [row.captions[0] if row.captions else "" for row in rows]
    recall = [_recall(text, record.extra["facts"]) for text, record in zip(details, records, strict=True)]
    return Stage(model, captions, questions, details, np.array(recall))


def _recall(text: str, facts: Sequence[str]) -> float:
    """Share of `facts`, runs of words, that `text` holds."""
    return float(np.mean([f" {fact} " in f" {text} " for fact in facts]))


def _caption(
    model: VLM, tokenizer: WordTokenizer, records: Sequence[Record], clip: ClipConfig, out: Path, seed: int
) -> list[CaptionRow]:
    with reporting("clips captioned") as report:
        caption_job(
            model,
            tokenizer,
            records,
            out,
            shard_size=2 * starts.BATCH,
            progress=report,
            clip=clip,
            num_samples=starts.SAMPLES,
            max_length=starts.CAPTION_LENGTH,
            temperature=starts.TEMPERATURE,
            top_p=starts.TOP_P,
            seed=seed,
            batch_size=starts.BATCH,
        )
    return list(read_captions(out))


def _captioned(
    records: Sequence[Record], rows: Sequence[CaptionRow]
) -> tuple[list[Record], list[Record], list[Record]]:
    """The unlabelled clips with alt-text, with pseudo-captions and with human captions as their captions."""
    said = {row.key: tuple(caption for caption in row.captions if caption) for row in rows}
    alt = [dataclasses.replace(record, captions=(record.alt_text or "",)) for record in records]
    pseudo = [dataclasses.replace(record, captions=said[record.key]) for record in records if said[record.key]]
    return alt, pseudo, list(records)


def _evaluate_encoder(
    model: DualEncoder, tokenizer: WordTokenizer, records: Sequence[Record], clip: ClipConfig, seed: int
) -> dict[str, Any]:
    """Retrieval with the first caption of each clip as query, zero-shot classes on the clips that have one."""
    videos = embed_videos(model, records, clip=clip, batch_size=starts.BATCH)
    texts = embed_texts(model, tokenizer, [record.captions[0] for record in records])
    found = evaluate_retrieval(videos, texts, seed=seed)
    names = list(LABELS.values())
    labelled = [i for i, record in enumerate(records) if record.label is not None]
    classes = class_embeddings(model, tokenizer, names, starts.TEMPLATES)
    labels = [names.index(records[i].label or "") for i in labelled]
    zero = evaluate_zero_shot(videos[labelled], classes, labels, seed=seed)
    scores: dict[str, Any] = {}
    for direction, values in (("t2v", found.t2v), ("v2t", found.v2t)):
        scores[direction] = {
            name: _score(value, found.intervals[direction][name]) if name.startswith("R@") else value
            for name, value in values.items()
        }
    scores |= {name: _score(getattr(zero, name), zero.intervals[name]) for name in ("top1", "top5")}
    return {"scores": scores, "similarity": texts @ videos.T}


def _score(value: float, interval: tuple[float, float]) -> dict[str, float]:
    return {"value": float(value), "low": float(interval[0]), "high": float(interval[1])}


def _stage_scores(stage: Stage, seed: int) -> dict[str, Any]:
    questions = stage.questions
    recall = 100 * stage.detail_recall
    return {
        "cider": _score(stage.captions.cider, stage.captions.interval),
        "exact_match": _score(questions.exact_match, questions.intervals["exact_match"]),
        "wups": _score(questions.wups, questions.intervals["wups"]),
        "exact_match_by_family": questions.by_family,
        "mean_length": stage.captions.mean_length,
        "detail_recall": _score(float(recall.mean()), bootstrap_interval(recall, seed=seed)),
        "detail_length": float(np.mean([len(text.split()) for text in stage.details])),
    }


def _statistics(captions: Sequence[str]) -> dict[str, Any]:
    found = caption_statistics(captions)
    names = ("mean_length", "unique_nouns", "unique_verbs", "vocabulary")
    return {"captions": len(captions), **{name: getattr(found, name) for name in names}}


def _curve(history: History) -> list[list[float]]:
    """[step, loss] of each ten steps' mean."""
    count = len(history.steps) // 10 * 10
    steps, losses = history.steps[:count].reshape(-1, 10)[:, -1], history.losses[:count].reshape(-1, 10).mean(1)
    return [[int(step), float(loss)] for step, loss in zip(steps, losses, strict=True)]


def _machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


def _examples(
    directory: Path, records: Sequence[Record], stages: dict[str, Stage], dual: dict[str, Any], clip: ClipConfig
) -> dict[str, Any]:
    """Film strips with captions, and queries with what the encoder trained on pseudo-captions finds. Not chosen: the
    first test clips that differ in what happens."""
    shown: list[int] = []
    for i, record in enumerate(records):
        if len(shown) < 6 and record.label not in {records[j].label for j in shown if records[j].label}:
            shown.append(i)
    offsets = np.cumsum([0, *(len(record.questions) for record in records)])
    captions = []
    for i in shown:
        record = records[i]
        asked = []
        for q in range(0, len(record.questions), max(1, len(record.questions) // 3)):
            before, after = (stages[name].questions.predictions[offsets[i] + q] for name in ("visual", "language"))
            question = record.questions[q]
            asked.append({"question": question.question, "answer": question.answer, "before": before, "after": after})
        captions.append(
            {
                "key": record.key,
                "video": record.video,
                "frames": _thumbnails(directory, record, 8, clip),
                "human": list(record.captions),
                **{name: stages[name].captions.captions[i] for name in STAGES},
                "detail": stages["language"].details[i],
                "questions": asked[:3],
            }
        )
    similarity = dual["pseudo_captions"]["similarity"]
    retrieval = []
    for i in shown[:4]:
        ranked = [
            {
                "key": records[j].key,
                "frame": _thumbnails(directory, records[j], 1, clip)[0],
                "score": float(similarity[i, j]),
                "correct": bool(j == i),
            }
            for j in np.argsort(-similarity[i])[:5]
        ]
        query = records[i].captions[0]
        retrieval.append({"query": query, "key": records[i].key, "ranked": ranked, "encoder": "pseudo_captions"})
    return {"captions": captions, "retrieval": retrieval}


def _thumbnails(directory: Path, record: Record, count: int, clip: ClipConfig) -> list[str]:
    """PNG files of `count` frames of the clip, at the size they have in the file."""
    options = dataclasses.asdict(clip) | {"num_frames": count, "short_side": 128, "size": 128}
    frames = sample_clip(record.source, start_seconds=record.start_seconds, end_seconds=record.end_seconds, **options)
    names = [f"frame-{record.key}-{i + 1}of{count}.png" for i in range(count)]
    for name, frame in zip(names, frames.data, strict=True):
        save_thumbnail(frame, directory / name)
    return names
