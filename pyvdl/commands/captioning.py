"""caption, status and stats: texts for clips, and what they look like."""

from __future__ import annotations

import argparse
import datetime
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyvdl.commands.common import (
    UsageError,
    asked_input,
    asked_job,
    asked_mesh,
    cutting_options,
    export_asked,
    listed,
    load_asked,
    make_way,
    named_input,
    print_table,
    sampled,
)

if TYPE_CHECKING:
    from pyvdl.caption import Captioner
    from pyvdl.filters import Filters
    from pyvdl.models.dual_encoder import DualEncoder
    from pyvdl.models.vlm import VLM
    from pyvdl.models.weights import Place
    from pyvdl.tokenizers import Tokenizer

_ALL_DROPPED = "(all dropped)"  # in the place of captions


def caption(arguments: argparse.Namespace) -> int:
    from pyvdl.caption import caption_records
    from pyvdl.progress import reporting

    if arguments.out is not None:
        return _caption_job(arguments)
    if arguments.distributed or arguments.engine != "local":
        raise UsageError("--distributed and --engine go with --out, the folder that all processes see")
    if arguments.fsdp * arguments.tensor > 1:
        raise UsageError("--fsdp and --tensor go with --out")
    if arguments.export:
        raise UsageError("--export goes with --out, the folder of what is exported")
    records = listed(asked_input(arguments, **cutting_options(arguments)))
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
                print("\n".join(row.captions or [_ALL_DROPPED]))
            else:
                texts = [row.error] if row.error else row.captions or [_ALL_DROPPED]
                table.append([row.key, row.status, texts[0]])
                table += [["", "", text] for text in texts[1:]]
    if table:
        print_table(["key", "status", "caption"], table)
    return 0


def _caption_job(arguments: argparse.Namespace) -> int:
    filters = _filters(arguments)  # before anything is read
    done = asked_job(arguments, _captioner, arguments.format)
    if filters is not None:
        by_name = ", ".join(f"{count} by {name}" for name, count in done.dropped.items())
        print(f"{sum(done.dropped.values())} captions dropped" + (f" ({by_name})" if by_name else ""))
    export_asked(arguments)
    return 0


def _captioner(arguments: argparse.Namespace) -> Captioner:
    from pyvdl.caption import Captioner

    model, tokenizer, options = _captioning(arguments)
    return Captioner(model, tokenizer, **options)


def _captioning(arguments: argparse.Namespace) -> tuple[VLM, Tokenizer, dict[str, Any]]:
    """The model that is asked for, with the options of a `Captioner`."""
    from pyvdl.checkpoint import is_public
    from pyvdl.models.vlm import VLM
    from pyvdl.recipes import model_clip
    from pyvdl.sharding import place
    from pyvdl.text import PALIGEMMA_PROMPT

    mesh = None if arguments.out is None else asked_mesh(arguments)
    model, tokenizer = load_asked(arguments, None if mesh is None else place(mesh))
    if not isinstance(model, VLM):
        raise ValueError(f"{arguments.model} holds a {type(model).__name__}: captions need a VLM")
    options: dict[str, Any] = {
        "clip": sampled(arguments, model_clip(model.config)),
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


def status(arguments: argparse.Namespace) -> int:
    import dataclasses

    from pyvdl.jobs import load_job
    from pyvdl.storage import Folder

    if arguments.page is not None:
        make_way(arguments.page, "--page")
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
    print_table(["job", arguments.out], rows)
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
    print_table(["captions of", *names], [[name, *(row[n] for n in names)] for name, row in found.items()])
    counted = [f"nouns and verbs by {tagger.name}", "forms" if arguments.forms else "lemmas"]
    counted += ["names are nouns"] if arguments.proper_nouns else []
    counted += ["with marks" if arguments.punctuation else "without marks"]
    counted += [f"{size} captions of each set at random (seed {arguments.seed})"] if size is not None else []
    print("; ".join(counted))
    return 0


class _Texts:
    """Texts that are read anew whenever they are gone through."""

    def __init__(self, read: Callable[[], Iterator[str]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[str]:
        return self._read()


def _caption_sets(path: str) -> dict[str, _Texts]:
    """The texts of a captioning job's file or folder, or those of a manifest by kind; names for a table's columns."""
    from pyvdl.rows import JOB_FILE, read_captions
    from pyvdl.storage import Folder

    made = Folder(path).exists(JOB_FILE) or path.endswith(".parquet")
    if not made and os.path.isfile(path):
        with open(path, "rb") as file:
            made = b'"log_probs"' in file.readline()
    if made:
        return {path: _Texts(lambda: (text for row in read_captions(path) for text in row.captions))}
    records = named_input([path])
    found = {
        f"{path} captions": _Texts(lambda: (text for record in records for text in record.captions)),
        f"{path} alt_text": _Texts(lambda: (record.alt_text for record in records if record.alt_text)),
    }
    return {name: texts for name, texts in found.items() if any(True for _ in texts)}
