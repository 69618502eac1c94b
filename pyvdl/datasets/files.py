"""What the readers share: annotation files read with the place of every fault, splits, and where a video lies."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pyvdl.data import Record
from pyvdl.sources import VIDEO_SUFFIXES, is_url

type OnSkip = Callable[[str], Any] | None  # hears of an annotation that gives no clip: where it stands, and why

_SPLITS = {"training": "train", "validate": "val", "validation": "val", "testing": "test"}
_SPLIT_IN_NAME = re.compile(r"(?<![a-z])(train(?:ing)?|val(?:idate|idation)?|test(?:ing)?)(?=list|set|[^a-z]|$)")


class Reader(Protocol):
    """Reads a data set from its published annotation files, one record a clip.

    annotations: the files, by the names they were published under where the name tells the split.
    videos: folder or URL of the videos; `names` is the pattern of their names in it, where it is not the usual one.
    on_skip: hears of annotations that give no clip; without it they are an error.
    Raises ValueError naming file, line or place in the JSON, and what was expected there.
    """

    def __call__(
        self, annotations: Sequence[Path], videos: str, *, names: str | None = None, on_skip: OnSkip = None
    ) -> Iterator[Record]: ...


@dataclass(frozen=True)
class Entry:
    """One object of an annotation file, or one row, and where it stands."""

    value: Mapping[str, Any]
    where: str  # "FILE:LINE", or "FILE: $.videos[3]"

    def fault(self, name: str, expected: str) -> ValueError:
        """What is wrong with the value of this name."""
        found = f"is {self.value[name]!r:.80}" if name in self.value else "is missing"
        return ValueError(f"{self.where}: {name} {found}: expected {expected}")

    def text(self, name: str) -> str:
        """A string that is not blank, as it stands."""
        value = self.value.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.fault(name, "a string that is not blank")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings, without the white space around them."""
        value = self.value.get(name)
        if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
            raise self.fault(name, "a list of strings that are not blank")
        return tuple(text.strip() for text in value)

    def whole(self, name: str) -> int:
        """A whole number from 0 on; in a row, its digits."""
        value = self.value.get(name)
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value):
            return int(value)
        if type(value) is not int or value < 0:
            raise self.fault(name, "a whole number of 0 or more")
        return value

    def time(self, name: str) -> float:
        """Seconds as "HH:MM:SS.mmm"."""
        match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", str(self.value.get(name)))
        if match is None:
            raise self.fault(name, "a time as HH:MM:SS.mmm")
        return 3600.0 * int(match[1]) + 60.0 * int(match[2]) + float(match[3])

    def seconds(self, name: str) -> float:
        """A number above 0."""
        value = self.value.get(name)
        if value is None or not _is_number(value) or value <= 0:
            raise self.fault(name, "a number of seconds above 0")
        return float(value)

    def spans(self, name: str) -> list[tuple[float, float]]:
        """A list of [start, end], numbers of seconds in whatever order."""
        value = self.value.get(name)
        if not isinstance(value, list):
            raise self.fault(name, "a list of [start, end] in seconds")
        for i, span in enumerate(value):
            if not isinstance(span, list) or len(span) != 2 or not all(map(_is_number, span)):
                raise ValueError(f"{self.where}: {name}[{i}] is {span!r:.80}: expected [start, end] in seconds")
        return [(float(start), float(end)) for start, end in value]

    def member(self, name: str) -> Entry:
        """An object within this one."""
        return _entry(self.value[name], f"{self.where}.{name}")

    def entries(self, name: str) -> list[Entry]:
        """A list of objects."""
        value = self.value.get(name)
        if not isinstance(value, list):
            raise self.fault(name, "a list of objects")
        return [_entry(item, f"{self.where}.{name}[{i}]") for i, item in enumerate(value)]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _entry(value: Any, where: str) -> Entry:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: found {value!r:.80}: expected an object")
    return Entry(value, where)


def json_object(path: Path) -> Entry:
    """A JSON file that holds one object."""
    return _entry(_json(path), f"{path}: $")


def json_list(path: Path) -> list[Entry]:
    """A JSON file that holds a list of objects."""
    value = _json(path)
    if not isinstance(value, list):
        raise ValueError(f"{path}: $: found {value!r:.80}: expected a list of objects")
    return [_entry(item, f"{path}: $[{i}]") for i, item in enumerate(value)]


def _json(path: Path) -> Any:
    text = "".join(line for _, line in lines(path))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: expected whole JSON: {error.msg}, column {error.colno}") from error


def json_lines(path: Path) -> Iterator[Entry]:
    """A file with an object on each line."""
    for number, line in lines(path):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: expected one JSON object: {error}") from error
            yield _entry(value, f"{path}:{number}")


def rows(path: Path, columns: Sequence[str], *, header: bool = True) -> Iterator[Entry]:
    """A CSV file, one entry a row; with a header it has these columns and maybe others, without one exactly these."""
    names = None if header else list(columns)
    reader = csv.reader((line for _, line in lines(path)), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            if names is None:
                raise ValueError(f"{path}: expected a line of columns, {', '.join(columns)}, found none") from None
            return
        except csv.Error as error:
            raise ValueError(f"{path}:{number}: expected comma-separated values: {error}") from error
        if names is None:
            if missing := [name for name in columns if name not in row]:
                raise ValueError(f"{path}:{number}: expected the columns {', '.join(columns)}: no {', '.join(missing)}")
            names = row
        elif row:
            if len(row) != len(names):
                raise ValueError(f"{path}:{number}: {len(row)} cells: expected {len(names)}, {', '.join(names)}")
            yield Entry(dict(zip(names, row)), f"{path}:{number}")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file in UTF-8, with their numbers from 1, as they end."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: expected UTF-8: {error}") from error


def split_name(name: str) -> str:
    """ "train", "val" or "test" for the ways to write them; others only become lower case."""
    return _SPLITS.get(name.lower(), name.lower())


def split_of(path: Path) -> str | None:
    """The split that a published file's name tells: "vatex_validation_v1.0.json" is of "val"."""
    found = {split_name(word) for word in _SPLIT_IN_NAME.findall(path.name.lower())}
    return found.pop() if len(found) == 1 else None


def sort_files(annotations: Sequence[Path], *suffixes: str) -> tuple[list[Path], ...]:
    """The files by their suffix, those of each in the order given; "/" stands for a folder."""
    found: dict[str, list[Path]] = {suffix: [] for suffix in suffixes}
    for path in annotations:
        suffix = "/" if path.is_dir() else path.suffix.lower()
        if suffix not in found:
            wanted = ", ".join("a folder" if s == "/" else f"*{s}" for s in suffixes)
            raise ValueError(f"{path}: this data set is read from {wanted}")
        found[suffix].append(path)
    return tuple(found.values())


def skip(on_skip: OnSkip, where: str, why: str) -> None:
    """Leaves an annotation out, which somebody must hear."""
    if on_skip is None:
        raise ValueError(f"{where}: {why}")
    on_skip(f"{where}: {why}")


class Names:
    """Which file holds the video of an annotation: a pattern of `str.format` below the videos' folder or URL.

    A pattern that ends in ".*" means the file with whatever suffix a video can have.
    """

    def __init__(self, videos: str, pattern: str, fields: Iterable[str]) -> None:
        """fields: what the pattern may name. Raises ValueError where it names something else."""
        self.videos, self.pattern = os.fspath(videos), pattern
        self._stems: dict[str, dict[str, str]] = {}  # of each folder looked into
        try:
            parts = list(string.Formatter().parse(pattern))
        except ValueError as error:
            raise ValueError(f"names {pattern!r}: {error}") from error
        self.fields = {name for _, name, _, _ in parts if name is not None}
        known = sorted(fields)
        if unknown := sorted(self.fields - set(known)):
            raise ValueError(f"names {pattern!r} has {unknown[0]!r}: expected of {', '.join(known)}")

    def path(self, values: Mapping[str, Any]) -> str:
        """The path or URL of the video with these values of the fields."""
        for field in sorted(self.fields):
            if values[field] in (None, ""):
                raise ValueError(f"names {self.pattern!r} needs {field}, which is not given here")
        try:
            name = self.pattern.format(**values)
        except ValueError as error:
            raise ValueError(f"names {self.pattern!r}: {error}") from error
        if is_url(self.videos):
            return f"{self.videos.rstrip('/')}/{name}"
        path = os.path.normpath(f"{self.videos}/{name}")
        if not name.endswith(".*"):
            return path
        folder, stem = os.path.split(path.removesuffix(".*"))
        if folder not in self._stems:
            self._stems[folder] = _by_stem(folder)
        return os.path.join(folder, self._stems[folder].get(stem, f"{stem}.*"))

    def clip(
        self, values: Mapping[str, Any], start_seconds: float, end_seconds: float, *, cut: Iterable[str]
    ) -> dict[str, Any]:
        """The video and times of a record: where the pattern names the times (a field of `cut`) the file is the clip
        alone, else the whole video."""
        if self.fields.intersection(cut):
            return {"video": self.path(values)}
        return {"video": self.path(values), "start_seconds": start_seconds, "end_seconds": end_seconds}


def _by_stem(folder: str) -> dict[str, str]:
    """The names of the videos in a folder by their stems; of several with one stem the first by the alphabet."""
    if not os.path.isdir(folder):
        return {}
    found = sorted(name for name in os.listdir(folder) if os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES)
    return {os.path.splitext(name)[0]: name for name in reversed(found)}
