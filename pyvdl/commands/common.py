"""What the commands share: where they write, what they read, and tables."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from pyvdl.config import ClipConfig, DualEncoderConfig
    from pyvdl.data import Record
    from pyvdl.manifests import Input
    from pyvdl.models.dual_encoder import DualEncoder
    from pyvdl.models.vlm import VLM
    from pyvdl.models.weights import Place
    from pyvdl.pipeline import JobSummary, Maker
    from pyvdl.rows import Format
    from pyvdl.tokenizers import Tokenizer


class UsageError(Exception):
    """The command cannot be meant so: exit code 2."""


def make_way(out: Path, option: str = "--out") -> None:
    """Makes the folder of the file to write, or fails, before the work whose result would be lost."""
    if out.is_dir():
        raise UsageError(f"{option} {out} is a folder: name a file in it")
    out.parent.mkdir(parents=True, exist_ok=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
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


def named_input(paths: Sequence[str], **cutting: Any) -> Input:
    """The clips that `paths` list; of a damaged tar those that are whole, and once what is wrong with it."""
    from pyvdl.manifests import Input

    told: set[str] = set()

    def tell(error: Exception) -> None:
        if str(error) not in told:
            print(f"left out of the data: {error}", file=sys.stderr)
            told.add(str(error))

    return Input(paths, tell, **cutting)


def read_all(path: Path) -> list[Record]:
    """The records of a manifest, or of tars: those of a damaged one that are whole, and what is wrong with it."""
    from pyvdl.archives import read_records

    return read_records(path, on_damage=lambda error: print(f"left out of the data: {error}", file=sys.stderr))


def asked_input(arguments: argparse.Namespace, **cutting: Any) -> Input:
    paths = [*arguments.videos, *arguments.more_videos]
    if not paths:
        raise UsageError("no videos: name files, folders or manifests")
    return named_input(paths, **cutting)


def listed(records: Iterable[Record]) -> list[Record]:
    """All of them at once; a key stands for one clip in what is written, so none may come twice."""
    found = list(records)
    if not found:
        raise ValueError("no clips in what was named")
    seen: set[str] = set()
    for record in found:
        if record.key in seen:
            raise UsageError(f"key {record.key!r} is named twice by the paths given: name each clip once")
        seen.add(record.key)
    return found


def load_asked(arguments: argparse.Namespace, place: Place | None = None) -> tuple[VLM | DualEncoder, Tokenizer]:
    from pyvdl.checkpoint import load_model

    path = arguments.model
    if not path.exists():
        raise ValueError(
            f"no saved model in {path}: name one with --model (`make demo` leaves one in demo/language/model)"
        )
    finish = finisher(arguments)
    model, tokenizer = load_model(path, place=place)
    finish(model)
    return model, tokenizer


def finisher(arguments: argparse.Namespace) -> Callable[[VLM | DualEncoder], None]:
    """What is done to a model once it is read; asked for before, so that a missing package is told at once."""
    if not arguments.int8:
        return lambda model: None
    from pyvdl.quantize import quantize

    return quantize


def sampled(arguments: argparse.Namespace, clip: ClipConfig) -> ClipConfig:
    import dataclasses

    return dataclasses.replace(clip, sampling=arguments.sampling)


def encoder_clip(arguments: argparse.Namespace, config: DualEncoderConfig) -> ClipConfig:
    """Of a model of images the frames are embedded one by one: as many as clips have by default."""
    import dataclasses

    from pyvdl.config import ClipConfig
    from pyvdl.recipes import model_clip

    clip = sampled(arguments, model_clip(config))
    return dataclasses.replace(clip, num_frames=ClipConfig().num_frames) if config.vision.num_frames == 1 else clip


def asked_mesh(arguments: argparse.Namespace) -> Mesh | None:
    """Of this process's devices, where it has more than one, or is asked to split a model over several."""
    import jax

    from pyvdl.sharding import make_mesh

    several = jax.local_device_count() > 1 or arguments.fsdp * arguments.tensor > 1
    return make_mesh(arguments.fsdp, arguments.tensor, jax.local_devices()) if several else None


def asked_job(arguments: argparse.Namespace, load: Callable[[argparse.Namespace], Maker], format: Format) -> JobSummary:
    """Runs the job that is asked for with what `load` makes of the arguments, here or on a cluster; tells its end."""
    from functools import partial

    from pyvdl.progress import reporting
    from pyvdl.sources import is_url

    ray = arguments.engine == "ray"
    if ray and arguments.distributed:
        raise UsageError("--distributed does not go with --engine ray, which brings its own processes")
    if not ray and (arguments.workers is not None or arguments.worker_resources):
        raise UsageError("--workers and --worker-resources go with --engine ray")
    if arguments.export and is_url(arguments.out):
        raise UsageError(f"--export writes files and links into a local folder, and --out is {arguments.out}")
    asked = asked_input(arguments, **cutting_options(arguments))
    first = True  # of several processes
    run: Callable[..., JobSummary]
    if ray:  # this process leaves the devices to the workers
        from pyvdl.cluster import run_on_cluster

        run = partial(run_on_cluster, workers=arguments.workers, needs=dict(arguments.worker_resources))
        # Workers stand elsewhere.
        paths = {name: value.absolute() for name, value in vars(arguments).items() if isinstance(value, Path)}
        arguments = argparse.Namespace(**vars(arguments) | paths)
    else:
        import jax

        from pyvdl.pipeline import run_job
        from pyvdl.sharding import join

        run = run_job
        if arguments.distributed:
            join()
            # JAX takes it as a notice that a training heeds. A job would go on: it loses nothing where it ends.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        first = jax.process_index() == 0
    with reporting(arguments.verb, enabled=first) as report:
        done = run(
            partial(load, arguments),
            asked.uncut(),
            arguments.out,
            shard_size=arguments.shard_size,
            format=format,
            num_threads=arguments.num_threads,
            timeout_seconds=arguments.timeout_seconds,
            input_sha256=asked.sha256() if first else None,
            cut=asked.cut,
            progress=report,
        )
    print(
        f"{arguments.out}: {done.rows} rows ({done.failed} failed) in {done.shards} shards, "
        f"{done.shards_skipped} of them from an earlier run"
    )
    return done


def export_asked(arguments: argparse.Namespace) -> None:
    """Writes a finished job in the formats that are asked for; of several processes the first does.

    The others wait until it has: JAX gives those that end five minutes, and then ends all.
    """
    from pyvdl.exports import export

    def write() -> None:
        for kind in arguments.export:
            print(f"{kind}: {export(arguments.out, kind)}")

    if not arguments.distributed:
        write()
        return
    import jax

    from pyvdl.sharding import meet

    try:
        if jax.process_index() == 0:
            write()
    finally:
        meet("exported")


def loading_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"batch_size": arguments.batch_size, "num_threads": arguments.num_threads}


def cutting_options(arguments: argparse.Namespace) -> dict[str, Any]:
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
