"""What a test asks a model, and where the files of a benchmark are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyvdl.benchmarks import Benchmark, Task
from pyvdl.config import ClipConfig
from pyvdl.data import Record
from pyvdl.datasets import Survey, read
from pyvdl.evaluate.array_predictions import Arrays
from pyvdl.evaluate.embeddings import class_embeddings, embed_texts, embed_videos
from pyvdl.evaluate.text_predictions import Row, items
from pyvdl.evaluate.texts import ANSWER_LENGTH, CAPTION_LENGTH, choose_options, say_answers, say_captions
from pyvdl.models.dual_encoder import DualEncoder
from pyvdl.models.vlm import VLM
from pyvdl.progress import Report
from pyvdl.text import prompts_for
from pyvdl.tokenizers import Tokenizer

_TASK_OF_RECORD: dict[Task, str] = {
    "captions": "captions",
    "questions": "open questions",
    "choices": "questions with options",
    "retrieval": "captions",
    "classes": "a label",
}


class Missing(Exception):
    """What a benchmark needs is not there; says what."""


@dataclass(frozen=True, kw_only=True)
class System:
    """A model with what belongs to it, and how clips are taken for it."""

    model: VLM | DualEncoder
    tokenizer: Tokenizer
    clip: ClipConfig
    name: str  # where it was read from
    public: bool  # a checkpoint of others, which knows other prompts
    loading: dict[str, Any]  # batch_size, num_threads

    @property
    def tasks(self) -> tuple[Task, ...]:
        return ("captions", "questions", "choices") if isinstance(self.model, VLM) else ("retrieval", "classes")


def locate(benchmark: Benchmark, root: Path) -> tuple[list[Path], str]:
    """The annotation files of a benchmark below ROOT/annotations/READER, and the folder ROOT/videos/NAME.

    Raises Missing where one that it needs is not there, ValueError where there are several in place of one.
    """
    folder = root / "annotations" / benchmark.reader
    files: list[Path] = []
    for pattern in (*benchmark.files, *benchmark.several):
        found = sorted(folder.glob(pattern))
        if not found:
            raise Missing(f"no annotations: {folder / pattern} is not there")
        if len(found) > 1 and pattern in benchmark.files:
            raise ValueError(f"{', '.join(map(str, found))}: expected one of them, {benchmark.name} is read from one")
        files += found
    for pattern in benchmark.more:
        files += sorted(folder.glob(pattern))
    return files, str(root / "videos" / benchmark.videos)


def read_benchmark(
    benchmark: Benchmark, files: Sequence[Path], videos: str, split: str | None, names: str | None
) -> tuple[list[Record], list[str]]:
    """The records of its split, or of those whose files do not tell theirs; and what was left out of them, and why."""
    wanted = split or benchmark.split
    for pattern in (*benchmark.files, *benchmark.several):
        suffix = Path(pattern).suffix  # files given by name may be called otherwise
        if suffix and not any(path.suffix.lower() == suffix for path in files):
            raise ValueError(f"{', '.join(map(str, files))}: {benchmark.name} needs {pattern} as well")
    skipped: list[str] = []
    found = list(read(benchmark.reader, files, videos, names=names, on_skip=skipped.append))
    kept = [record for record in found if record.split in (None, wanted)]
    if not kept:
        there = ", ".join(sorted({str(record.split) for record in found}))
        named = ", ".join(map(str, files))
        raise ValueError(f"{named}: no record of the split {wanted!r}: found {there}; --split names another")
    return kept, skipped


def fits(record: Record, task: Task) -> bool:
    """Whether a record can be asked that."""
    if task in ("captions", "retrieval"):
        return bool(record.captions)
    if task == "classes":
        return record.label is not None
    return bool(record.questions) and all((q.correct is not None) == (task == "choices") for q in record.questions)


def check_fits(records: Sequence[Record], task: Task) -> None:
    for record in records:
        if not fits(record, task):
            raise ValueError(f"record {record.key} has not what {task} needs: expected {_TASK_OF_RECORD[task]}")


def without_videos(records: Sequence[Record]) -> list[Record]:
    """Those whose video is not there."""
    survey = Survey()
    there = {record.key for record in survey.watch(records, skip_missing=True)}
    return [record for record in records if record.key not in there]


def say(system: System, records: Sequence[Record], task: Task, report: Report) -> tuple[list[Row], dict[str, Any]]:
    """What a VLM predicts, as lines of a file; and the options that it depends on."""
    assert isinstance(system.model, VLM)
    prompt = prompts_for(system.public)[task != "captions"]
    lengths: dict[Task, int] = {"captions": CAPTION_LENGTH, "questions": ANSWER_LENGTH}
    asked: dict[str, Any] = {"prompt": prompt} | ({"max_length": lengths[task]} if task in lengths else {})
    options: dict[str, Any] = {"clip": system.clip, "progress": report} | asked | system.loading
    said: Sequence[Any]
    if task == "captions":
        said, failures = say_captions(system.model, system.tokenizer, records, **options)
    elif task == "questions":
        said, failures = say_answers(system.model, system.tokenizer, records, **options)
    else:
        chosen, failures = choose_options(system.model, system.tokenizer, records, **options)
        said = chosen.tolist()
    rows = []
    for (key, question), prediction in zip(items(records, task), said, strict=True):
        value = {"key": key} | ({} if question is None else {"question": question}) | {"prediction": prediction}
        rows.append(Row(value | ({"error": failures[key]} if key in failures else {}), "the model"))
    return rows, asked | {"clip": dataclasses.asdict(system.clip)}


def embed(
    system: System,
    records: Sequence[Record],
    tasks: Iterable[Task],
    *,
    classes: Sequence[str],
    templates: Sequence[str],
    clips: int,
    report: Report,
) -> tuple[dict[Task, Arrays], dict[str, Any]]:
    """What a dual encoder makes of the records that fit each task, as arrays of a file; videos are embedded once."""
    model = system.model
    assert isinstance(model, DualEncoder)
    errors: dict[str, str] = {}
    videos = embed_videos(
        model,
        records,
        clip=system.clip,
        clips=clips,
        progress=report,
        on_error=lambda record, error: errors.update({record.key: error}),
        **system.loading,
    )
    arrays: dict[Task, Arrays] = {}
    for task in tasks:
        mine = [i for i, record in enumerate(records) if fits(record, task)]
        some = [records[i] for i in mine]
        found = {
            "keys": np.array([record.key for record in some]),
            "embeddings": videos[mine],
            "errors": np.array([errors.get(record.key, "") for record in some]),
        }
        if task == "retrieval":
            pairs = [(record.key, caption) for record in some for caption in record.captions]
            found["text_keys"] = np.array([key for key, _ in pairs])
            found["text_embeddings"] = embed_texts(model, system.tokenizer, [caption for _, caption in pairs])
        else:
            found["labels"] = np.array([record.label for record in some])
            found["classes"] = np.array(classes)
            found["class_embeddings"] = class_embeddings(model, system.tokenizer, classes, templates)
        arrays[task] = found
    return arrays, {"clip": dataclasses.asdict(system.clip), "clips_of_a_video": clips}
