"""evaluate: benchmarks and tests of one's own, on models or on predictions."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyvdl.benchmarks import BENCHMARKS, BY_NAME, MODELS, TABLES, Benchmark, Task, templates
from pyvdl.commands.common import (
    UsageError,
    encoder_clip,
    load_asked,
    loading_options,
    make_way,
    print_table,
    read_all,
    sampled,
)

if TYPE_CHECKING:
    from pyvdl.data import Record
    from pyvdl.evaluate.array_predictions import Arrays
    from pyvdl.evaluate.report import Result
    from pyvdl.evaluate.running import System

_FOR_MODELS = {  # options that predictions have no use for, and what they are unless given
    "skip_missing": False,
    "clips": 1,
    "templates": "none",
    "int8": False,
    "sampling": "uniform",
    "batch_size": 8,
    "num_threads": 2,
}
_TEXTS: tuple[Task, ...] = ("captions", "questions", "choices")


def evaluate(arguments: argparse.Namespace) -> int:
    from pyvdl.evaluate.report import score_file
    from pyvdl.evaluate.running import Missing
    from pyvdl.storage import write_whole

    _check(arguments)
    if arguments.out is not None:
        make_way(arguments.out)
    systems = _load(arguments)
    every = arguments.benchmark == "all"
    chosen = BENCHMARKS if every else (BY_NAME.get(arguments.benchmark),)
    results: list[Result] = []
    left_out: dict[str, str] = {}
    faults = 0
    for benchmark in chosen:
        try:
            found = list(_run(benchmark, systems, arguments))
        except (Missing, ValueError, OSError) as error:
            if not every or benchmark is None:
                raise ValueError(str(error)) from error
            left_out[benchmark.name] = str(error)
            faults += not isinstance(error, Missing)
            found = []
        for result in found:
            _print_result(result)
        results += found
        if arguments.out is not None and results:  # again after each, so that none is lost
            write_whole(arguments.out, [json.dumps(score_file(results, left_out, seed=0), indent=1) + "\n"])
    if every:
        _print_tables(results, left_out)
        if not results:
            raise ValueError("no benchmark could be run: what each wants is above")
    return 1 if faults else 0


def _check(arguments: argparse.Namespace) -> None:
    given = {name: getattr(arguments, name) not in (None, []) for name in ("data", "annotations", "root")}
    if (arguments.model is None) == (arguments.predictions is None):
        raise UsageError("name what to score: --model, or the --predictions of one")
    if sum(given.values()) > 1:
        raise UsageError("--data, --annotations and --root do not go together: the test is in one place")
    if arguments.benchmark == "all" and not given["root"]:
        raise UsageError("all goes with --root, the folder of annotations/ and videos/")
    if arguments.benchmark is None and (given["annotations"] or given["root"]):
        raise UsageError(f"--annotations and --root go with a benchmark: {', '.join(BY_NAME)}")
    if arguments.model is not None:
        if not any(given.values()):
            raise UsageError("--model goes with --data, or with a benchmark's --annotations and --videos or --root")
        if given["annotations"] and arguments.videos is None:
            raise UsageError("--annotations goes with --videos, the folder of the videos")
    else:
        for name, default in _FOR_MODELS.items():
            if getattr(arguments, name) != default:
                raise UsageError(f"--{name.replace('_', '-')} goes with --model: predictions are made already")
    published = given["annotations"] or given["root"]
    if arguments.videos is not None and not given["annotations"]:
        raise UsageError("--videos goes with --annotations")
    if arguments.names is not None and (not published or arguments.benchmark == "all"):
        raise UsageError("--names goes with --annotations, or with --root and one benchmark")
    if arguments.split is not None and not published:
        raise UsageError("--split goes with a benchmark's --annotations or --root")


def _load(arguments: argparse.Namespace) -> list[System]:
    if arguments.model is None:
        return []
    from pyvdl.checkpoint import is_public
    from pyvdl.evaluate.running import System
    from pyvdl.models.vlm import VLM
    from pyvdl.recipes import model_clip

    found: list[System] = []
    for path in arguments.model:
        model, tokenizer = load_asked(argparse.Namespace(**vars(arguments) | {"model": path}))
        if isinstance(model, VLM):
            clip = sampled(arguments, model_clip(model.config))
        else:
            clip = encoder_clip(arguments, model.config)
        system = System(
            model=model,
            tokenizer=tokenizer,
            clip=clip,
            public=is_public(path),
            loading=loading_options(arguments),
            name=str(path),
        )
        if any(system.tasks == other.tasks for other in found):
            raise UsageError(f"--model {path} is {MODELS[system.tasks[0]]} like the one before: name one of each kind")
        found.append(system)
    if _of_encoders(arguments) and not any("retrieval" in system.tasks for system in found):
        raise UsageError("--clips and --templates go with a dual encoder")
    return found


def _of_encoders(arguments: argparse.Namespace) -> bool:
    """Whether there are options that only a dual encoder heeds."""
    return arguments.clips != 1 or arguments.templates != "none"


def _run(benchmark: Benchmark | None, systems: Sequence[System], arguments: argparse.Namespace) -> Iterator[Result]:
    """The results of one benchmark, or of a test of one's own: of each task that it has."""
    if arguments.predictions is not None:
        yield from _run_on_predictions(benchmark, arguments)
        return
    from pyvdl.evaluate.running import Missing, fits

    wanted = [system for system in systems if benchmark is None or benchmark.task in system.tasks]
    if benchmark is not None and not wanted:
        raise Missing(f"it needs {MODELS[benchmark.task]}: name one with --model")
    records, options = _records(benchmark, arguments)
    if not any(_tasks(benchmark, system, records) for system in wanted):
        kinds = " and ".join("captions or questions" if "captions" in s.tasks else "captions or labels" for s in wanted)
        raise ValueError(f"{arguments.data}: no record has {kinds}, which this model would be asked for")
    classes = sorted({record.label for record in records if record.label is not None})
    records, counts = _with_videos(records, arguments)
    for system in wanted:
        tasks = _tasks(benchmark, system, records)
        some = [record for record in records if any(fits(record, task) for task in tasks)]
        for result in _run_on_model(benchmark, system, tasks, some, classes, arguments) if tasks else ():
            more = {"model": system.name, "int8": arguments.int8} | options
            yield dataclasses.replace(result, options=result.options | more, counts=result.counts | counts)


def _records(benchmark: Benchmark | None, arguments: argparse.Namespace) -> tuple[list[Record], dict[str, Any]]:
    """The records of the test, and where they are from."""
    from pyvdl.evaluate.running import check_fits, locate, read_benchmark

    options: dict[str, Any] = {"data": str(arguments.data)}
    if arguments.data is not None:
        records = read_all(arguments.data)
    else:
        assert benchmark is not None
        files, videos = arguments.annotations, arguments.videos or ""
        if arguments.root is not None:
            files, videos = locate(benchmark, arguments.root)
        records, skipped = read_benchmark(benchmark, files, videos, arguments.split, arguments.names)
        options = {"annotations": [str(path) for path in files], "split": arguments.split or benchmark.split}
        if skipped:
            print(f"{len(skipped)} annotations left out, the first is {skipped[0]}", file=sys.stderr)
    if benchmark is not None:
        check_fits(records, benchmark.task)
    return records, options


def _tasks(benchmark: Benchmark | None, system: System, records: Sequence[Record]) -> list[Task]:
    from pyvdl.evaluate.running import fits

    if benchmark is not None:
        return [benchmark.task]
    return [task for task in system.tasks if any(fits(record, task) for record in records)]


def _with_videos(records: list[Record], arguments: argparse.Namespace) -> tuple[list[Record], dict[str, int]]:
    """The records to be asked, and how many videos are missing: these are misses, or left out."""
    from pyvdl.evaluate.running import Missing, without_videos

    missing = without_videos(records)
    if len(missing) == len(records):
        raise Missing(f"none of its {len(records)} videos is there, the first is {records[0].video}")
    if arguments.skip_missing:
        gone = {record.key for record in missing}
        return [record for record in records if record.key not in gone], {"left_out_for_want_of_video": len(missing)}
    return records, {"missing_videos": len(missing)}


def _run_on_model(
    benchmark: Benchmark | None,
    system: System,
    tasks: Sequence[Task],
    records: list[Record],
    classes: Sequence[str],
    arguments: argparse.Namespace,
) -> Iterator[Result]:
    from pyvdl.evaluate.array_predictions import score_arrays
    from pyvdl.evaluate.running import embed, fits, say
    from pyvdl.evaluate.text_predictions import score_rows
    from pyvdl.progress import reporting

    title = "evaluate" if benchmark is None else f"evaluate {benchmark.name}"
    if system.tasks[0] in _TEXTS:
        for task in tasks:
            mine = [record for record in records if fits(record, task)]
            with reporting(title) as report:
                rows, options = say(system, mine, task, report)
            result = score_rows(rows, mine, task, "the model")
            yield _told(benchmark, result, options, None, arguments)
        return
    prompts = templates(benchmark, arguments.templates)
    with reporting(title) as report:
        arrays, options = embed(
            system, records, tasks, classes=classes, templates=prompts, clips=arguments.clips, report=report
        )
    for task in tasks:
        mine = [record for record in records if fits(record, task)]
        result = score_arrays(arrays[task], mine, task, "the model")
        more = options | ({"templates": list(prompts)} if task == "classes" else {})
        yield _told(benchmark, result, more, arrays[task], arguments)


def _run_on_predictions(benchmark: Benchmark | None, arguments: argparse.Namespace) -> Iterator[Result]:
    from pyvdl.evaluate.array_predictions import read_arrays, score_arrays, tasks_of
    from pyvdl.evaluate.running import Missing, fits
    from pyvdl.evaluate.text_predictions import read_rows, records_of, score_rows, task_of

    path: Path = arguments.predictions
    if arguments.benchmark == "all":
        assert benchmark is not None
        path = path / f"{benchmark.name}{'.jsonl' if benchmark.task in _TEXTS else '.npz'}"
        if not path.exists():
            raise Missing(f"no predictions: {path} is not there")
    beside = arguments.data is not None or arguments.annotations or arguments.root is not None
    records, options = _records(benchmark, arguments) if beside else (None, {})
    options |= {"predictions": str(path)}
    if path.suffix != ".npz":
        rows = read_rows(path)
        task = task_of(rows) if benchmark is None else benchmark.task
        if task not in _TEXTS:
            raise ValueError(f"{path}: {task} wants a NumPy archive of embeddings or similarities, *.npz")
        mine = records_of(rows, task) if records is None else [record for record in records if fits(record, task)]
        yield _told(benchmark, score_rows(rows, mine, task, path), options, None, arguments)
        return
    arrays = read_arrays(path)
    tasks = tasks_of(arrays) if benchmark is None else [benchmark.task]
    if not tasks or tasks[0] in _TEXTS:
        wanted = "text_embeddings, similarity, class_embeddings or class_similarity in it"
        raise ValueError(f"{path}: expected {'JSON lines of ' + tasks[0] if tasks else wanted}")
    for task in tasks:
        some = None if records is None else [record for record in records if fits(record, task)]
        if task == "classes":
            options["templates"] = "those of the predictions"
        yield _told(benchmark, score_arrays(arrays, some, task, path), options, arrays, arguments)


def _told(
    benchmark: Benchmark | None,
    result: Result,
    options: dict[str, Any],
    arrays: Arrays | None,
    arguments: argparse.Namespace,
) -> Result:
    """The result with its name and options; what was predicted is written where --save asks for it."""
    from pyvdl.storage import write_arrays, write_whole

    name = result.task if benchmark is None else benchmark.name
    if arguments.save is not None:
        arguments.save.mkdir(parents=True, exist_ok=True)
        if arrays is None:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows)
            write_whole(arguments.save / f"{name}.jsonl", lines)
        else:
            write_arrays(arguments.save / f"{name}.npz", arrays)
    asked = None if benchmark is None else benchmark.name
    return dataclasses.replace(result, benchmark=asked, options=options | result.options)


def _print_result(result: Result) -> None:
    paper = BY_NAME[result.benchmark].paper if result.benchmark is not None else {}
    header = ["score", "value", "95% interval"] + (["paper"] if paper else [])
    if result.benchmark is not None:
        print(f"\n{BY_NAME[result.benchmark].title}: {BY_NAME[result.benchmark].protocol}")
    print_table(
        header,
        [
            [name, score.value, f"{score.low:.1f} to {score.high:.1f}", *([paper.get(name)] if paper else [])]
            for name, score in result.scores.items()
        ],
    )
    print(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in result.counts.items()))


def _print_tables(results: Sequence[Result], left_out: dict[str, str]) -> None:
    from pyvdl.evaluate.report import filled

    for table in TABLES:
        print(f"\n{table.title}")
        rows = filled(table, results)
        print_table(["", *(heading for heading, _, _ in table.columns)], rows)
    if left_out:
        print("\nleft out:")
        for name, why in left_out.items():
            print(f"  {name}: {why}")
