"""adapt, train and plan."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pyvdl.commands.common import UsageError, read_all

if TYPE_CHECKING:
    from pyvdl.data import Record
    from pyvdl.train import History


def adapt(arguments: argparse.Namespace) -> int:
    from pyvdl import recipes
    from pyvdl.sharding import join

    _check_settings(arguments)
    if arguments.distributed:
        join()
    records = recipes.fraction(read_all(arguments.data), arguments.fraction)
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
    records = read_all(manifest)
    if captions is None:
        return records
    found = captions_by_key(read_captions(captions))
    if not found:
        raise ValueError(f"{captions} has no captions: none of its clips was captioned")
    if records and not any(record.key in found for record in records):
        others = f"{len(found)} others, such as {next(iter(found))!r}"
        raise ValueError(f"{captions} has captions of no record of {manifest}, but of {others}")
    return [dataclasses.replace(record, captions=found.get(record.key, ())) for record in records]


def train(arguments: argparse.Namespace) -> int:
    import dataclasses

    from pyvdl import recipes
    from pyvdl.sharding import join
    from pyvdl.sources import is_url

    _check_settings(arguments)
    written_by_us = arguments.captions not in ("human", "alt_text")
    if written_by_us and not is_url(arguments.captions) and not Path(arguments.captions).exists():
        raise UsageError(
            f"--captions {arguments.captions!r} is neither 'human' nor 'alt_text', nor is there such a file or folder"
        )
    if arguments.distributed:
        join()
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


def _check_settings(arguments: argparse.Namespace) -> None:
    """A setting that does not exist or cannot be meant is a mistake in the command, not a failure of the job."""
    from pyvdl.config import PRESETS
    from pyvdl.overrides import override_training

    preset = PRESETS[arguments.preset](8)
    if getattr(arguments, "pseudo_captions", None) and not arguments.pseudo:
        raise UsageError("--pseudo-captions goes with --pseudo, the manifest of their clips")
    try:
        if arguments.verb == "train":
            override_training(preset.contrastive, preset.dual_encoder, arguments.set)
        else:
            run = preset.visual if arguments.stage == "visual" else preset.language
            override_training(run, preset.vlm, arguments.set)
    except ValueError as error:
        raise UsageError(f"--set {error}") from None


def _print_training(out: Path, history: History) -> None:
    if not len(history.steps):  # a run finished before, whose metrics.jsonl is gone
        print(f"{out / 'model'}: all steps done before; {out / 'metrics.jsonl'} does not tell of them")
        return
    step, loss = int(history.steps[-1]), float(history.losses[-1])
    print(f"{out / 'model'}: step {step}, loss {loss:.6f}, waited for data {history.wait_share:.1%}")
