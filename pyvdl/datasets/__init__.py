"""Data sets from their published annotation files, as records: `read("msrvtt", [Path("MSRVTT_data.json")], "videos")`.

A reader yields one record a clip, whether its video is there or not; `Survey` counts what is missing.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyvdl.data import Record
from pyvdl.datasets.captions import read_activitynet_captions, read_msrvtt, read_msrvtt_1ka, read_vatex
from pyvdl.datasets.classes import read_kinetics, read_ucf101
from pyvdl.datasets.files import OnSkip, Reader, split_name
from pyvdl.datasets.narratives import read_localized_narratives, read_spoken_moments
from pyvdl.datasets.questions import read_activitynet_qa, read_msrvtt_qa, read_nextqa_choice, read_nextqa_open
from pyvdl.datasets.survey import Survey
from pyvdl.datasets.web import read_internvid, read_videocc, read_webvid

__all__ = ["READERS", "Reader", "Survey", "read"]

READERS: dict[str, Reader] = {
    "smit": read_spoken_moments,
    "vidln": read_localized_narratives,
    "videocc": read_videocc,
    "internvid": read_internvid,
    "webvid": read_webvid,
    "msrvtt": read_msrvtt,
    "msrvtt-1ka": read_msrvtt_1ka,
    "msrvtt-qa": read_msrvtt_qa,
    "vatex": read_vatex,
    "kinetics600": functools.partial(read_kinetics, classes=600),
    "kinetics700": functools.partial(read_kinetics, classes=700),
    "activitynet-captions": read_activitynet_captions,
    "activitynet-qa": read_activitynet_qa,
    "nextqa-oe": read_nextqa_open,
    "nextqa-mc": read_nextqa_choice,
    "ucf101": read_ucf101,
}


def read(
    name: str,
    annotations: Sequence[str | os.PathLike[str]],
    videos: str,
    *,
    split: str | None = None,
    names: str | None = None,
    on_skip: OnSkip = None,
) -> Iterator[Record]:
    """Yields the records of a data set, or of one split ("train", "val", "test"), as its `Reader` finds them.

    Raises ValueError where there is no such data set, or no record of the split.
    """
    if isinstance(annotations, str | os.PathLike):
        raise TypeError(f"annotations must be a list of files, not the one path {os.fspath(annotations)!r}")
    if name not in READERS:
        raise ValueError(f"data set {name!r}: expected one of {', '.join(READERS)}")
    wanted = None if split is None else split_name(split)
    found: dict[str | None, int] = {}
    for record in READERS[name](list(map(Path, annotations)), videos, names=names, on_skip=on_skip):
        found[record.split] = found.get(record.split, 0) + 1
        if wanted in (None, record.split):
            yield record
    files = ", ".join(map(str, annotations))
    if not found:
        raise ValueError(f"{files}: no record of {name} in it")
    if wanted is not None and wanted not in found:
        raise ValueError(f"{files}: no record of the split {wanted!r}: found {', '.join(map(str, found))}")
