"""What each verb of the command line does; `__main__` reads the arguments and tells failures.

What a command needs is imported inside it, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyvdl.caption import Captioner
    from pyvdl.config import ClipConfig, DualEncoderConfig
    from pyvdl.data import Record
    from pyvdl.filters import Filters
    from pyvdl.manifests import Input
    from pyvdl.models.dual_encoder import DualEncoder
    from pyvdl.models.vlm import VLM
    from pyvdl.models.weights import Place
    from pyvdl.progress import Report
    from pyvdl.tokenizers import Tokenizer
    from pyvdl.train import History

# Options of `instruct` that need --model.
MODEL_ONLY = (
    *("base_url", "templates", "seed", "temperature", "max_tokens", "language", "concurrency", "requests_per_minute"),
    *("tokens_per_minute", "timeout_seconds", "retries", "price_in", "price_out"),
)
Scores = list[tuple[str, float, float, float]]  # name, value, low, high


class UsageError(Exception):
    """The command cannot be meant so: exit code 2."""


def probe(arguments: argparse.Namespace) -> int:
    if arguments.versions:
        for name, version in _versions().items():
            print(f"{name:<24} {version}")
        return 0
    if arguments.annotations or arguments.videos is not None:
        return _probe_dataset(arguments)
    if not arguments.paths:
        raise UsageError("name at least one video, folder, manifest or data set, or ask for --versions")
    from pyvdl.datasets import READERS

    if given := [f"--{name}" for name in ("split", "names", "out", "skip_missing") if getattr(arguments, name)]:
        raise UsageError(f"{given[0].replace('_', '-')} goes with a data set and its --annotations and --videos")
    for path in arguments.paths:
        if path in READERS and not os.path.exists(path):
            raise UsageError(f"{path} is a data set: name its files with --annotations, their folder with --videos")
    from pyvdl.video import DecodeError, VideoDecoder

    rows = []
    for video, source in {record.video: record.source for record in _input(arguments.paths)}.items():
        row: dict[str, Any] = {"video": video, "status": "ok", "error": None}
        try:
            found = VideoDecoder(source).metadata
            row |= {
                "codec": found.codec,
                "size": f"{found.width}x{found.height}",
                "fps": found.fps,
                "frames": found.num_frames,
                "seconds": found.duration_seconds,
                "rotation": found.rotation,
            }
        except DecodeError as error:
            row |= {"status": "failed", "error": f"{error.stage}: {error.message}"}
        rows.append(row)
        if arguments.json:
            print(json.dumps(row), flush=True)
    if not arguments.json:
        columns = ("codec", "size", "fps", "frames", "seconds", "rotation", "status")
        _print_table(
            ["video", *columns],
            [
                [row["video"], *(row.get(c) for c in columns[:-1]), f"failed: {row['error']}" if row["error"] else "ok"]
                for row in rows
            ],
        )
    if not any(row["status"] == "ok" for row in rows):
        raise ValueError(f"none of the {len(rows)} videos named could be read")
    return 0


def _probe_dataset(arguments: argparse.Namespace) -> int:
    """What a data set holds, from its annotation files; with --out as a manifest too."""
    from collections import deque

    from pyvdl.data import write_manifest
    from pyvdl.datasets import READERS, Survey, read

    name = arguments.paths[0] if len(arguments.paths) == 1 else None
    if name not in READERS:
        raise UsageError(f"--annotations and --videos go with one data set: {', '.join(READERS)}")
    if not arguments.annotations or arguments.videos is None:
        raise UsageError(f"{name} needs --annotations, its files, and --videos, the folder of its videos")
    if arguments.skip_missing and arguments.out is None:
        raise UsageError("--skip-missing goes with --out")
    survey = Survey()
    skipped: list[str] = []
    records = survey.watch(
        read(
            name,
            arguments.annotations,
            arguments.videos,
            split=arguments.split,
            names=arguments.names,
            on_skip=skipped.append,
        ),
        skip_missing=arguments.skip_missing,
    )
    if arguments.out is None:
        deque(records, maxlen=0)
    else:
        _make_way(arguments.out)
        write_manifest(arguments.out, records)
    print(json.dumps(survey.counts() | {"skipped": len(skipped)}) if arguments.json else survey.describe())
    if skipped:
        print(f"{len(skipped)} annotations left out, the first is {skipped[0]}", file=sys.stderr)
    if arguments.out is not None and not arguments.json:
        left = survey.absent if arguments.skip_missing else 0
        print(f"\n{arguments.out}: {survey.records - left} records, {left} left out for want of their video")
    return 0


def prepare(arguments: argparse.Namespace) -> int:
    if arguments.synthetic is not None:
        return _synthetic(arguments)
    from pyvdl.cache import to_arrays, to_tars
    from pyvdl.config import ClipConfig, ShortVideoConfig, override
    from pyvdl.progress import reporting

    if arguments.to is None:
        raise UsageError("--data goes with --to: tars or arrays")
    try:
        clip = override(ClipConfig(sampling="uniform"), arguments.set if arguments.to == "arrays" else [])
        video = override(ShortVideoConfig(), arguments.set if arguments.to == "tars" else [])
    except ValueError as error:
        raise UsageError(f"--set {error}") from None
    options: dict[str, Any] = {"num_threads": arguments.num_threads}
    if arguments.shard_size is not None:
        options["shard_size"] = arguments.shard_size
    records = _listed(_input(arguments.data))
    with reporting("prepare") as report:
        if arguments.to == "arrays":
            done = to_arrays(records, arguments.out, clip=clip, seed=arguments.seed, progress=report, **options)
        else:
            done = to_tars(records, arguments.out, video=video, progress=report, **options)
    for key, why in done.failed.items():
        print(f"left out: {key}: {why}", file=sys.stderr)
    print(
        f"{done.manifest}: {done.records} clips ({len(done.failed)} left out) in {done.shards} shards, "
        f"{done.shards_skipped} of them from an earlier run"
    )
    return 0


def _synthetic(arguments: argparse.Namespace) -> int:
    from pyvdl.progress import reporting
    from pyvdl.synthetic import make_corpus

    if arguments.to is not None or arguments.set or arguments.shard_size is not None:
        raise UsageError("--to, --set and --shard-size go with --data, not with --synthetic")
    with reporting("prepare") as report:
        corpus = make_corpus(arguments.out, num_clips=arguments.synthetic, seed=arguments.seed, progress=report)
    parts = (("train", corpus.train), ("unlabelled", corpus.unlabelled), ("test", corpus.test))
    print(
        f"{corpus.num_files} files; " + "; ".join(f"{arguments.out / name}.jsonl {len(r)} clips" for name, r in parts)
    )
    return 0


def instruct(arguments: argparse.Namespace) -> int:
    _make_way(arguments.out)
    if arguments.model is not None:
        return _instruct_by_model(arguments)
    for name in MODEL_ONLY:
        if getattr(arguments, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is for a language model: name it with --model")
    import dataclasses
    from collections import Counter

    from pyvdl import instruct as rules
    from pyvdl.data import write_manifest

    if (job := rules.job_folder(arguments.out)).exists():
        raise ValueError(f"{arguments.out} is what a language model writes ({job}): choose another file")
    told = [(record, record.narrative) for record in _read(arguments.data) if record.narrative]
    if not told:
        raise ValueError(f"{arguments.data}: no record has a narrative")
    asked, unread = [], []
    for record, narrative in told:
        try:
            asked.append(dataclasses.replace(record, questions=tuple(rules.generate(narrative))))
        except ValueError as error:
            unread.append(f"{record.key}: {error}")
    if not asked:
        raise ValueError(f"{arguments.data}: no narrative can be read, the first is that of {unread[0]}")
    if unread:
        print(f"{len(unread)} records left out, the first is {unread[0]}", file=sys.stderr)
    write_manifest(arguments.out, asked)
    families = Counter(question.family for record in asked for question in record.questions)
    counts = ", ".join(f"{count} {family}" for family, count in sorted(families.items()))
    print(f"{arguments.out}: {len(asked)} records with {families.total()} questions ({counts})")
    return 0


def _instruct_by_model(arguments: argparse.Namespace) -> int:
    from pyvdl.instruct.job import Connection, instruct_job
    from pyvdl.instruct.prompts import load_templates
    from pyvdl.progress import reporting

    if arguments.data.resolve() == arguments.out.resolve():
        raise UsageError("--out is --data: a job that goes on must find its records as they were")
    given = {name: value for name in MODEL_ONLY if (value := getattr(arguments, name)) is not None}
    templates = load_templates(given.pop("templates", None))
    prices = given.pop("price_in", None), given.pop("price_out", None)
    settings = {name: given.pop(name) for name in ("seed", "temperature", "max_tokens", "language") if name in given}
    with reporting("instruct") as report:
        made = instruct_job(
            _read(arguments.data),
            arguments.out,
            model=arguments.model,
            templates=templates,
            connection=Connection(**given),
            progress=lambda done, total, spent: report(done, total, spent.account(*prices)),
            **settings,
        )
    print(f"{arguments.out}: {made.account()}\n{made.spent.account(*prices)}")
    for trouble in made.troubles():
        print(trouble, file=sys.stderr)
    return 0


def adapt(arguments: argparse.Namespace) -> int:
    from pyvdl import recipes
    from pyvdl.sharding import join

    _check_settings(arguments)
    if arguments.distributed:
        join()
    records = recipes.fraction(_read(arguments.data), arguments.fraction)
    history = recipes.adapt(
        arguments.stage,
        records,
        arguments.out,
        start=arguments.model,
        preset=arguments.preset,
        assignments=arguments.set,
        pseudo=_captioned(arguments.pseudo, arguments.pseudo_captions),
        pseudo_share=arguments.pseudo_share,
    )
    _print_training(arguments.out, history)
    return 0


def _captioned(manifest: Path | None, captions: str | Path | None) -> list[Record]:
    """The records of a manifest, with the captions that a folder holds for them if one is given."""
    import dataclasses

    from pyvdl.rows import captions_by_key, read_captions

    if manifest is None:
        return []
    records = _read(manifest)
    if captions is None:
        return records
    found = captions_by_key(read_captions(captions))
    return [dataclasses.replace(record, captions=found.get(record.key, ())) for record in records]


def train(arguments: argparse.Namespace) -> int:
    import dataclasses

    from pyvdl import recipes
    from pyvdl.sharding import join

    _check_settings(arguments)
    if arguments.distributed:
        join()
    written_by_us = arguments.captions not in ("human", "alt_text")
    records = _captioned(arguments.data, arguments.captions if written_by_us else None)
    if arguments.captions == "alt_text":
        records = [dataclasses.replace(r, captions=(r.alt_text,) if r.alt_text else ()) for r in records]
    records = recipes.fraction(records, arguments.fraction)
    history = recipes.train(
        records, arguments.out, start=arguments.model, preset=arguments.preset, assignments=arguments.set
    )
    _print_training(arguments.out, history)
    return 0


def plan(arguments: argparse.Namespace) -> int:
    import dataclasses

    from pyvdl import plan as planning

    request = planning.Request(arguments.recipe, arguments.preset, arguments.topology, tuple(arguments.set))
    found = planning.plan(request)
    if arguments.json:
        facts = dataclasses.asdict(found) | {"chips": found.chips, "fits": found.fits}
        facts |= {"step_seconds": found.step_seconds}
        print(json.dumps(facts | {"total_bytes": found.memory.total, "advice": found.advice()}))
    else:
        print(planning.describe(found))
    return 0 if found.fits else 1


def caption(arguments: argparse.Namespace) -> int:
    from pyvdl.caption import caption_records
    from pyvdl.progress import reporting

    if arguments.out is not None:
        return _caption_job(arguments)
    if arguments.distributed or arguments.engine != "local":
        raise UsageError("--distributed and --engine go with --out, the folder that all processes see")
    records = _listed(_asked(arguments, **_cutting(arguments)))
    model, tokenizer, options = _captioning(arguments)
    options["num_threads"] = arguments.num_threads
    alone = len(records) == 1 and not arguments.json
    table: list[list[Any]] = []
    with reporting("caption", enabled=len(records) > 1) as report:
        for row in caption_records(model, tokenizer, records, progress=report, **options):
            if arguments.json:
                print(row.to_json(), flush=True)
            elif alone and row.status == "failed":
                raise ValueError(f"{row.video}: {row.error}")
            elif alone:
                print("\n".join(row.captions))
            else:
                texts = [row.error] if row.error else row.captions or ["(all dropped)"]
                table.append([row.key, row.status, texts[0]])
                table += [["", "", text] for text in texts[1:]]
    if table:
        _print_table(["key", "status", "caption"], table)
    return 0


def _caption_job(arguments: argparse.Namespace) -> int:
    from pyvdl.exports import export
    from pyvdl.progress import reporting

    filters = _filters(arguments)  # before anything is read
    asked = _asked(arguments, **_cutting(arguments))
    first = True  # of several processes
    job: dict[str, Any] = {
        "shard_size": arguments.shard_size,
        "format": arguments.format,
        "num_threads": arguments.num_threads,
        "timeout_seconds": arguments.timeout_seconds,
    }
    if arguments.engine == "ray":
        from functools import partial

        from pyvdl.cluster import caption_on_cluster

        if arguments.distributed:
            raise UsageError("--distributed does not go with --engine ray, which brings its own processes")
        score = arguments.clip_score and arguments.clip_score.absolute()  # workers stand elsewhere
        there = argparse.Namespace(**vars(arguments) | {"model": arguments.model.absolute(), "clip_score": score})
        with reporting("caption") as report:  # this process leaves the devices to the workers
            done = caption_on_cluster(
                partial(_captioner, there),
                asked,
                arguments.out,
                workers=arguments.workers,
                needs=dict(arguments.worker_resources),
                input_sha256=asked.sha256(),
                progress=report,
                **job,
            )
    else:
        import jax

        from pyvdl.pipeline import caption_job
        from pyvdl.sharding import join

        if arguments.workers is not None or arguments.worker_resources:
            raise UsageError("--workers and --worker-resources go with --engine ray")
        if arguments.distributed:
            join()
        model, tokenizer, options = _captioning(arguments)
        first = jax.process_index() == 0
        with reporting("caption", enabled=first) as report:
            done = caption_job(
                model,
                tokenizer,
                asked,
                arguments.out,
                input_sha256=asked.sha256() if first else None,
                progress=report,
                **job,
                **options,
            )
    print(
        f"{arguments.out}: {done.rows} rows ({done.failed} failed) in {done.shards} shards, "
        f"{done.shards_skipped} of them from an earlier run"
    )
    if filters is not None:
        by_name = ", ".join(f"{count} by {name}" for name, count in done.dropped.items())
        print(f"{sum(done.dropped.values())} captions dropped" + (f" ({by_name})" if by_name else ""))
    if first:
        for kind in arguments.export:
            print(f"{kind}: {export(arguments.out, kind)}")
    return 0


def _captioner(arguments: argparse.Namespace) -> Captioner:
    """What a worker of a cluster captions with."""
    from pyvdl.caption import Captioner

    model, tokenizer, options = _captioning(arguments)
    return Captioner(model, tokenizer, **options)


def _captioning(arguments: argparse.Namespace) -> tuple[VLM, Tokenizer, dict[str, Any]]:
    """The model that is asked for, with the options of a `Captioner`."""
    import jax

    from pyvdl.checkpoint import is_public
    from pyvdl.models.vlm import VLM
    from pyvdl.recipes import model_clip
    from pyvdl.sharding import make_mesh, place
    from pyvdl.text import PALIGEMMA_PROMPT

    mesh = None
    if jax.local_device_count() > 1 and arguments.out is not None:
        mesh = make_mesh(arguments.fsdp, arguments.tensor, jax.local_devices())
    model, tokenizer = _load(arguments, None if mesh is None else place(mesh))
    if not isinstance(model, VLM):
        raise ValueError(f"{arguments.model} holds a {type(model).__name__}: captions need a VLM")
    options: dict[str, Any] = {
        "clip": _clip(arguments, model_clip(model.config)),
        "num_samples": arguments.num_samples,
        "max_length": arguments.max_length,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "mesh": mesh,
        "filters": _filters(arguments),
    }
    if arguments.clip_score is not None:
        options["encoder"] = _encoder(arguments.clip_score, None if mesh is None else place(mesh))
    if arguments.prompt is not None:
        options["prompt"] = arguments.prompt
    elif is_public(arguments.model):
        options["prompt"] = PALIGEMMA_PROMPT
    return model, tokenizer, options


def status(arguments: argparse.Namespace) -> int:
    import dataclasses

    from pyvdl.jobs import load_job
    from pyvdl.storage import Folder

    if arguments.page is not None:
        _make_way(arguments.page, "--page")
    job = load_job(Folder(arguments.out))
    if arguments.page is not None:
        from pyvdl.job_page import write_job_page

        write_job_page(job, arguments.page)
    found = job.status()
    if arguments.json:
        print(json.dumps(dataclasses.asdict(found) | {"seconds_left": found.seconds_left}))
        return 0
    failed = ", ".join(f"{count} {kind}" for kind, count in found.failed.items())
    rows: list[list[Any]] = [
        ["shards", f"{found.shards_done} of {found.shards}"],
        ["rows", f"{found.rows} of {found.records}"],
        ["failed", f"{sum(found.failed.values())}" + (f" ({failed})" if failed else "")],
    ]
    if found.dropped:
        by_name = ", ".join(f"{count} {name}" for name, count in found.dropped.items())
        rows.append(["captions dropped", f"{sum(found.dropped.values())} ({by_name})"])
    if found.seconds_since is not None:
        rows.append(["last shard", f"{found.seconds_since:.0f} s ago"])
    if found.seconds_left is not None:
        rows.append(["rate of the last shards", f"{found.clips_per_second:.1f} clips/s"])
        rows.append(["time left at that rate", str(datetime.timedelta(seconds=round(found.seconds_left)))])
    _print_table(["job", arguments.out], rows)
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    from pyvdl.models.vlm import VLM
    from pyvdl.progress import reporting
    from pyvdl.storage import write_whole

    records = _read(arguments.data)
    if arguments.out is not None:
        _make_way(arguments.out)
    model, tokenizer = _load(arguments)
    with reporting("evaluate") as report:
        if isinstance(model, VLM):
            scores, failed = _vlm_scores(model, tokenizer, records, arguments, report)
        else:
            scores, failed = _dual_encoder_scores(model, tokenizer, records, arguments, report)
    _print_table(["score", "value", "95% interval"], [[k, v, f"{low:.1f} to {high:.1f}"] for k, v, low, high in scores])
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

    clip = _clip(arguments, model_clip(model.config))
    captioned = [record for record in records if record.captions]
    asked = [record for record in records if record.questions]
    if not captioned and not asked:
        raise ValueError(f"{arguments.data}: no record has captions or questions")
    scores: Scores = []
    failed = 0
    if captioned:
        found = evaluate_captions(model, tokenizer, captioned, clip=clip, progress=report, **_loading(arguments))
        scores.append(("CIDEr-D", found.cider, *found.interval))
        failed = found.failed
    if asked:
        answers = evaluate_questions(model, tokenizer, asked, clip=clip, progress=report, **_loading(arguments))
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
    videos = embed_videos(model, records, clip=clip, progress=report, **_loading(arguments))
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

    records = _listed(_asked(arguments))
    _make_way(arguments.out)
    finish = _finish(arguments)
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
            **_loading(arguments),
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


def stats(arguments: argparse.Namespace) -> int:
    import dataclasses

    from pyvdl.metrics import SpacyTagger, Tagger, WordNetTagger, caption_statistics

    if arguments.proper_nouns and arguments.spacy is None:
        raise UsageError("--proper-nouns goes with --spacy: WordNet does not tell names from other nouns")
    sets = {name: texts for path in arguments.captions for name, texts in _caption_sets(path).items()}
    if not sets:
        raise ValueError("no captions in what was named")
    tagger: Tagger = WordNetTagger() if arguments.spacy is None else SpacyTagger(arguments.spacy)
    size = arguments.sample_size
    if size == "equal":
        size = min(sum(1 for _ in texts) for texts in sets.values())
    options = {
        "lemmas": not arguments.forms,
        "proper_nouns": arguments.proper_nouns,
        "punctuation": arguments.punctuation,
        "sample_size": size,
        "seed": arguments.seed,
    }
    found = {
        name: dataclasses.asdict(caption_statistics(texts, tagger=tagger, **options)) for name, texts in sets.items()
    }
    names = list(next(iter(found.values())))
    _print_table(["captions of", *names], [[name, *(row[n] for n in names)] for name, row in found.items()])
    counted = [f"nouns and verbs by {tagger.name}", "forms" if arguments.forms else "lemmas"]
    counted += ["names are nouns"] if arguments.proper_nouns else []
    counted += ["with marks" if arguments.punctuation else "without marks"]
    counted += [f"{size} captions of each set at random (seed {arguments.seed})"] if size is not None else []
    print("; ".join(counted))
    return 0


# What the commands share.


def _make_way(out: Path, option: str = "--out") -> None:
    """Makes the folder of the file to write, or fails, before the work whose result would be lost."""
    if out.is_dir():
        raise UsageError(f"{option} {out} is a folder: name a file in it")
    out.parent.mkdir(parents=True, exist_ok=True)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Columns as wide as they need, numbers to the right, the last column free."""

    def show(value: Any) -> str:
        return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    cells = [[show(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    numeric = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(header))]
    for line in [list(header), *cells]:
        parts = [
            text.rjust(w) if right else text.ljust(w) for text, w, right in zip(line, widths, numeric, strict=True)
        ]
        print("  ".join(parts).rstrip())


def _print_training(out: Path, history: History) -> None:
    if not len(history.steps):  # a run finished before, whose metrics.jsonl is gone
        print(f"{out / 'model'}: all steps done before; {out / 'metrics.jsonl'} does not tell of them")
        return
    step, loss = int(history.steps[-1]), float(history.losses[-1])
    print(f"{out / 'model'}: step {step}, loss {loss:.6f}, waited for data {history.wait_share:.1%}")


def _versions() -> dict[str, str]:
    """Names and versions of what a fault may depend on; FFmpeg's libraries as compiled against and as found."""
    import platform
    from importlib import metadata

    import pyvdl
    from pyvdl.video import ffmpeg_versions

    ours = {"pyvdl": pyvdl.__version__, "jax": metadata.version("jax"), "python": platform.python_version()}
    theirs = {
        name: built if built == found else f"{found} (compiled against {built})"
        for name, (built, found) in ffmpeg_versions().items()
    }
    return ours | theirs


def _input(paths: Sequence[str], **cutting: Any) -> Input:
    """The clips that `paths` list; of a damaged tar those that are whole, and once what is wrong with it."""
    from pyvdl.manifests import Input

    told: set[str] = set()

    def tell(error: Exception) -> None:
        if str(error) not in told:
            print(f"left out of the data: {error}", file=sys.stderr)
            told.add(str(error))

    return Input(paths, tell, **cutting)


def _read(path: Path) -> list[Record]:
    """The records of a manifest, or of tars: those of a damaged one that are whole, and what is wrong with it."""
    from pyvdl.archives import read_records

    return read_records(path, on_damage=lambda error: print(f"left out of the data: {error}", file=sys.stderr))


def _check_settings(arguments: argparse.Namespace) -> None:
    """A setting that does not exist or cannot be meant is a mistake in the command, not a failure of the job."""
    from pyvdl.config import PRESETS, override_training

    preset = PRESETS[arguments.preset](8)
    if getattr(arguments, "pseudo_captions", None) and not arguments.pseudo:
        raise UsageError("--pseudo-captions goes with --pseudo, the manifest of their clips")
    try:
        if arguments.verb == "train":
            override_training(preset.contrastive, preset.dual_encoder, arguments.set)
        else:
            override_training(preset.visual, preset.vlm, arguments.set)
    except ValueError as error:
        raise UsageError(f"--set {error}") from None


class _Texts:
    """Texts that are read anew whenever they are gone through."""

    def __init__(self, read: Callable[[], Iterator[str]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[str]:
        return self._read()


def _caption_sets(path: str) -> dict[str, _Texts]:
    """The texts of a captioning job's file or folder, or those of a manifest by kind; names for a table's columns."""
    from pyvdl.jobs import JOB_FILE
    from pyvdl.rows import read_captions
    from pyvdl.storage import Folder

    made = Folder(path).exists(JOB_FILE) or path.endswith(".parquet")
    if not made and os.path.isfile(path):
        with open(path, "rb") as file:
            made = b'"log_probs"' in file.readline()
    if made:
        return {path: _Texts(lambda: (text for row in read_captions(path) for text in row.captions))}
    records = _input([path])
    found = {
        f"{path} captions": _Texts(lambda: (text for record in records for text in record.captions)),
        f"{path} alt_text": _Texts(lambda: (record.alt_text for record in records if record.alt_text)),
    }
    return {name: texts for name, texts in found.items() if any(True for _ in texts)}


def _asked(arguments: argparse.Namespace, **cutting: Any) -> Input:
    paths = [*arguments.videos, *arguments.more_videos]
    if not paths:
        raise UsageError("no videos: name files, folders or manifests")
    return _input(paths, **cutting)


def _cutting(arguments: argparse.Namespace) -> dict[str, Any]:
    """How long clips are cut, as `Input` takes it."""
    from pyvdl.shots import Shots

    if arguments.cut == "windows":
        return {"window_seconds": arguments.window_seconds}
    shots = Shots(
        min_seconds=arguments.min_shot_seconds,
        num_threads=arguments.num_threads,
        timeout_seconds=arguments.timeout_seconds,
    )
    return {"window_seconds": arguments.window_seconds, "shots": shots}


def _listed(records: Iterable[Record]) -> list[Record]:
    """All of them at once; a key stands for one clip in what is written, so none may come twice."""
    found = list(records)
    seen: set[str] = set()
    for record in found:
        if record.key in seen:
            raise UsageError(f"key {record.key!r} is named twice by the paths given: name each clip once")
        seen.add(record.key)
    return found


def _load(arguments: argparse.Namespace, place: Place | None = None) -> tuple[VLM | DualEncoder, Tokenizer]:
    from pyvdl.checkpoint import load_model

    path = arguments.model
    if not path.exists():
        raise ValueError(
            f"no saved model in {path}: name one with --model (`make demo` leaves one in demo/language/model)"
        )
    finish = _finish(arguments)
    model, tokenizer = load_model(path, place=place)
    finish(model)
    return model, tokenizer


def _filters(arguments: argparse.Namespace) -> Filters | None:
    import dataclasses

    from pyvdl.filters import Filters

    asked = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Filters)}
    if asked["min_clip_score"] is not None and arguments.clip_score is None:
        raise UsageError("--min-clip-score goes with --clip-score, the dual encoder that scores captions")
    try:
        return None if set(asked.values()) == {None} else Filters(**asked)
    except ValueError as error:
        raise UsageError("--" + str(error).replace("_", "-")) from None


def _encoder(path: Path, place: Place | None) -> tuple[DualEncoder, Tokenizer]:
    from pyvdl.checkpoint import load_model
    from pyvdl.models.dual_encoder import DualEncoder

    model, tokenizer = load_model(path, place=place)
    if not isinstance(model, DualEncoder):
        raise ValueError(f"{path} holds a {type(model).__name__}: --clip-score needs a dual encoder")
    return model, tokenizer


def _finish(arguments: argparse.Namespace) -> Callable[[VLM | DualEncoder], None]:
    """What is done to a model once it is read; asked for before, so that a missing package is told at once."""
    if not arguments.int8:
        return lambda model: None
    from pyvdl.quantize import quantize

    return quantize


def _clip(arguments: argparse.Namespace, clip: ClipConfig) -> ClipConfig:
    import dataclasses

    return dataclasses.replace(clip, sampling=arguments.sampling)


def _encoder_clip(arguments: argparse.Namespace, config: DualEncoderConfig) -> ClipConfig:
    """Of a model of images the frames are embedded one by one: as many as clips have by default."""
    import dataclasses

    from pyvdl.config import ClipConfig
    from pyvdl.recipes import model_clip

    clip = _clip(arguments, model_clip(config))
    return dataclasses.replace(clip, num_frames=ClipConfig().num_frames) if config.vision.num_frames == 1 else clip


def _loading(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"batch_size": arguments.batch_size, "num_threads": arguments.num_threads}
