"""probe, prepare and instruct: what there is to train on."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from pyvdl.commands.common import UsageError, listed, make_way, named_input, print_table, read_all

# Options of `instruct` that need --model.
MODEL_ONLY = (
    *("base_url", "templates", "seed", "temperature", "max_tokens", "language", "concurrency", "requests_per_minute"),
    *("tokens_per_minute", "timeout_seconds", "retries", "price_in", "price_out"),
)


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
    for video, source in {record.video: record.source for record in named_input(arguments.paths)}.items():
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
    if not rows:
        raise ValueError("no videos in what was named")
    if not arguments.json:
        columns = ("codec", "size", "fps", "frames", "seconds", "rotation", "status")
        print_table(
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
        make_way(arguments.out)
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
    from pyvdl.config import ClipConfig, ShortVideoConfig
    from pyvdl.overrides import override
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
    records = listed(named_input(arguments.data))
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
    make_way(arguments.out)
    if arguments.data.resolve() == arguments.out.resolve():
        raise UsageError("--out is --data: the records that are read would be lost")
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
    told = [(record, record.narrative) for record in read_all(arguments.data) if record.narrative]
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

    given = {name: value for name in MODEL_ONLY if (value := getattr(arguments, name)) is not None}
    templates = load_templates(given.pop("templates", None))
    prices = given.pop("price_in", None), given.pop("price_out", None)
    settings = {name: given.pop(name) for name in ("seed", "temperature", "max_tokens", "language") if name in given}
    with reporting("instruct") as report:
        made = instruct_job(
            read_all(arguments.data),
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
