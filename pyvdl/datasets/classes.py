"""Clips with a class: Kinetics, UCF101."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyvdl.data import Record
from pyvdl.datasets.files import Names, OnSkip, lines, rows, sort_files, split_name, split_of

_UCF = re.compile(r"((\w+)/(v_(\w+)_(g\d\d)_c\d\d))\.avi(?: (\d+))?")
_KINETICS = ("youtube_id", "start", "end", "label", "split")


def read_kinetics(
    annotations: Sequence[Path], videos: str, *, names: str | None = None, on_skip: OnSkip = None, classes: int
) -> Iterator[Record]:
    """train.csv, validate.csv or val.csv, test.csv: label, youtube_id, time_start, time_end, split. A test without
    labels is read too. classes: how many labels there may be, so that no other edition is taken for this one.

    names may have {youtube_id}, {start} and {end} (whole seconds), {label} and {split} (as written); without {start}
    and {end} a file is the whole video.
    """
    named = Names(videos, names or "{youtube_id}_{start:06d}_{end:06d}.mp4", _KINETICS)
    labels: set[str] = set()
    seen: Counter[str] = Counter()
    for path in annotations:
        for entry in rows(path, ("youtube_id", "time_start", "time_end")):
            video, start, end = entry.text("youtube_id"), entry.whole("time_start"), entry.whole("time_end")
            if start >= end:
                raise entry.fault("time_end", f"above {start}")
            label, split = entry.value.get("label") or None, entry.value.get("split")
            if label is not None:
                labels.add(label)
                if len(labels) > classes:
                    raise entry.fault("label", f"one of {classes} classes, and this is one more")
            key = f"{video}_{start:06d}_{end:06d}"
            seen[key] += 1  # one clip can stand in two classes
            yield Record(
                key=key if seen[key] == 1 else f"{key}#{seen[key]}",
                label=label,
                split=split_name(split) if split else split_of(path),
                group=video,
                **named.clip(
                    {"youtube_id": video, "start": start, "end": end, "label": label, "split": split},
                    float(start),
                    float(end),
                    cut=("start", "end"),
                ),
            )


def read_ucf101(
    annotations: Sequence[Path], videos: str, *, names: str | None = None, on_skip: OnSkip = None
) -> Iterator[Record]:
    """classInd.txt, and the lists of one of the three divisions, trainlist01.txt and testlist01.txt. A label is the
    name of the class in words ("Apply Eye Makeup"), as files have it: "Hand Stand Pushups", as CLIP's prompts have, is
    in the folder HandstandPushups. Clips cut from one video are one group.

    names may have {path}, as listed without suffix, and {name}, its last part.
    """
    named = Names(videos, names or "{path}.avi", ("path", "name"))
    (files,) = sort_files(annotations, ".txt")
    indices = {path: _class_indices(path) for path in files if path.name.lower().startswith("classind")}
    if len(indices) != 1:
        raise ValueError(f"{len(indices)} files are called classInd.txt: expected one among the annotations")
    numbers = next(iter(indices.values()))
    homes: dict[str, str] = {}
    for path in files:
        for number, line in () if path in indices else lines(path):
            where, text = f"{path}:{number}", line.strip()
            if not text:
                continue
            match = _UCF.fullmatch(text)
            if match is None:
                raise ValueError(
                    f"{where}: found {text!r:.80}: expected CLASS/v_CLASS_g01_c01.avi, and in a training "
                    "list the number of the class"
                )
            clip, name, file, spelled, group, index = match.groups()
            if name not in numbers or (index is not None and int(index) != numbers[name]):
                raise ValueError(f"{where}: {name} {index or ''}: expected a class of classInd.txt and its number")
            if (home := homes.setdefault(file, where)) != where:
                raise ValueError(f"{where}: {file} is in {home} already: expected the lists of one division")
            yield Record(
                key=file,
                video=named.path({"path": clip, "name": file}),
                label=re.sub(r"(?<=[a-z])(?=[A-Z])", " ", spelled),
                split=split_of(path),
                group=f"{name}_{group}",
            )


def _class_indices(path: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for number, line in lines(path):
        if match := re.fullmatch(r"(\d+) (\w+)", line.strip()):
            found[match[2]] = int(match[1])
        elif line.strip():
            raise ValueError(f"{path}:{number}: found {line.strip()!r:.80}: expected the number and name of a class")
    return found
