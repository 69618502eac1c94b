"""The clips of a job, one after the other, from whatever lists them: never all in memory. No jax here.

Manifests (JSONL, CSV, Parquet), WebDataset tars, folders and patterns, on disks and wherever fsspec reaches.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from pyvdl.archives import DamagedArchive, expand, read_archive
from pyvdl.data import Record, parse_object, parse_record
from pyvdl.decoder_process import measure_seconds
from pyvdl.shots import Shots, cut_at_shots
from pyvdl.sources import VIDEO_SUFFIXES, is_url, open_binary, writable

MANIFESTS = (".jsonl", ".csv", ".parquet")
_NUMBERS = ("start_seconds", "end_seconds")  # of a CSV file, where all is text
_PARQUET_ROWS = 1024  # at a time
_MEASURED = 1024  # clips at a time: each time starts a process
_CHUNK_BYTES = 1 << 20
_REST = "\0"  # no column's name: fields behind the last one
_PLAIN = frozenset({str, int, float, bool})  # of a Parquet file's values, most

OnDamage = Callable[[DamagedArchive], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """Cuts clips: into windows, see `cut`, or where a shot ends and into windows only where a shot is longer than these
    (equal parts). What becomes of a clip does not depend on the others."""

    window_seconds: float | None = None
    shots: Shots | None = None

    def __call__(self, records: Iterable[Record]) -> Iterator[Record]:
        if self.shots is not None:
            return cut_at_shots(measured(records), self.shots, self.window_seconds)
        assert self.window_seconds is not None
        return cut(records, self.window_seconds)

    def recipe(self) -> dict[str, Any]:
        """All that the parts depend on besides the clips."""
        shortest = None if self.shots is None else self.shots.min_seconds
        return {"window_seconds": self.window_seconds, "min_shot_seconds": shortest}


class Input:
    """The clips that `paths` list, to be read as often as wanted.

    A path is a video, a manifest, a tar, a pattern of those (`clips/*.mp4`, `{00000..00099}.tar`), or a folder of
    videos or tars (not deeper). A manifest's columns are `video`, and where wanted `key` (else the video's name as
    written, and the times where there are any), `start_seconds`, `end_seconds` and others, which are carried along. A
    relative video is relative to its manifest.

    on_damage: is told of each damaged tar, of which the whole samples are taken; without it that is an error.
    window_seconds, shots: how each clip is cut, see `Cut`; None for both leaves them as they are.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        on_damage: OnDamage | None = None,
        window_seconds: float | None = None,
        shots: Shots | None = None,
    ) -> None:
        self._files = [file for path in paths for file in _files(os.fspath(path))]
        self._on_damage = on_damage
        whole = window_seconds is None and shots is None
        self.cut = None if whole else Cut(window_seconds=window_seconds, shots=shots)

    def __iter__(self) -> Iterator[Record]:
        return self.uncut() if self.cut is None else self.cut(self.uncut())

    def uncut(self) -> Iterator[Record]:
        """The clips as they are listed."""
        for file in self._files:
            suffix = _suffix(file)
            if suffix == ".tar":
                yield from self._read_tar(file)
            elif suffix in MANIFESTS:
                yield from _read_manifest(file, suffix)
            else:
                yield Record(key=writable(file), video=file)

    def sha256(self) -> str:
        """Stands for all clips listed: names, contents of manifests, sizes and times of tars."""
        window, shortest = (None, None) if self.cut is None else self.cut.recipe().values()
        digest = hashlib.sha256(f"{window}\0{shortest}\0".encode())
        for file in self._files:
            suffix = _suffix(file)
            name = file if is_url(file) else os.path.abspath(file)
            digest.update(f"{name}\0".encode(errors="surrogatepass"))
            if suffix in MANIFESTS:
                with open_binary(file) as manifest:
                    while chunk := manifest.read(_CHUNK_BYTES):
                        digest.update(chunk)
            elif suffix == ".tar":
                digest.update(_stamp(file).encode())
        return digest.hexdigest()

    def _read_tar(self, file: str) -> list[Record]:
        try:
            return read_archive(file)
        except DamagedArchive as error:
            if self._on_damage is None:
                raise
            self._on_damage(error)
            return error.records


def cut(records: Iterable[Record], seconds: float, *, timeout_seconds: float = 60.0) -> Iterator[Record]:
    """Cuts each clip into windows of so many seconds, with the keys KEY#0000, KEY#0001, ...

    The last one is longer by what is left where that is less than half a window, else shorter. A clip without an end is
    measured, within timeout_seconds; one that cannot be stays as it is.
    """
    for record, end in measured(records, timeout_seconds=timeout_seconds):
        start = record.start_seconds
        if end is None or end <= start:
            yield record
            continue
        count = max(1, math.floor((end - start) / seconds + 0.5))
        for i in range(count):
            yield record.part(i, start + i * seconds, end if i == count - 1 else start + (i + 1) * seconds)


def measured(records: Iterable[Record], *, timeout_seconds: float = 60.0) -> Iterator[tuple[Record, float | None]]:
    """Records with their ends in seconds; None where a video that has none named cannot be measured."""
    for some in itertools.batched(records, _MEASURED):
        lengths = measure_seconds((r.source for r in some if r.end_seconds is None), timeout_seconds=timeout_seconds)
        with contextlib.closing(lengths):
            for record in some:
                yield record, next(lengths) if record.end_seconds is None else record.end_seconds


def _files(path: str) -> list[str]:
    """The files that a path means."""
    if is_url(path):
        import fsspec

        system, inner = fsspec.url_to_fs(path)
        if "tar://" in path or not system.isdir(inner):
            return expand(path)
        found = sorted(system.unstrip_protocol(name) for name in system.ls(inner, detail=False))
    elif not os.path.isdir(path):
        named = expand(path)
        for name in named:  # a video may have vanished, and costs its row; a folder may not
            if _suffix(name) not in VIDEO_SUFFIXES | {".tar", *MANIFESTS} and not os.path.exists(name):
                raise ValueError(f"{name}: no such file or folder")
        return named
    else:
        found = sorted(entry.path for entry in os.scandir(path))
    chosen = [name for name in found if _suffix(name) in VIDEO_SUFFIXES | {".tar"}]
    if not chosen:
        suffixes = " ".join(sorted(VIDEO_SUFFIXES))
        raise ValueError(f"{path}: no video and no tar in this folder (suffixes .tar {suffixes})")
    return chosen


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _stamp(file: str) -> str:
    if not is_url(file):
        found = os.stat(file)
        return f"{found.st_size} {found.st_mtime_ns}"
    import fsspec

    system, inner = fsspec.url_to_fs(file)
    info = system.info(inner)
    return " ".join(str(info.get(name)) for name in ("size", "ETag", "etag", "mtime", "LastModified", "updated"))


def _read_manifest(file: str, suffix: str) -> Iterator[Record]:
    folder = file.rpartition("/")[0]
    rows, parse = _READERS[suffix]
    with open_binary(file) as opened:
        for number, row in rows(opened, file):
            try:
                yield _record(parse(row), folder)
            except ValueError as error:
                raise ValueError(f"{file}:{number}: {error}") from error


def _jsonl_rows(file: IO[bytes], name: str) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _csv_rows(file: IO[bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), restkey=_REST)  # as Excel writes it, too
    try:
        for column, times in Counter(lines.fieldnames or ()).items():
            if times > 1 or not column:
                raise ValueError(f"{name}: {times} columns are called {column!r}: give each a name of its own")
        for row in lines:
            yield lines.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{name}:{lines.line_num + 1}: {error}") from error


def _typed(row: dict[str, Any]) -> dict[str, Any]:
    if _REST in row or None in row.values():
        raise ValueError("expected as many fields as the first line has names")
    found: dict[str, Any] = {name: value for name, value in row.items() if value != ""}
    for name in _NUMBERS:
        if name in found:
            try:
                found[name] = float(found[name])
            except ValueError:
                raise ValueError(f"{name} is {found[name]!r}: expected a number") from None
    return found


def _parquet_rows(file: IO[bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install 'pyarrow>=16'") from error
    try:
        # By this thread alone: Arrow's let go of `file` later, and a process that ends meanwhile is aborted.
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(_PARQUET_ROWS, use_threads=False)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{name} is no Parquet file: {error}") from error


def _json_values(row: dict[str, Any]) -> dict[str, Any]:
    """The values that there are; dates, decimals and the like, which JSON has no kind for, become text."""
    found = {name: value for name, value in row.items() if value is not None}
    for name, value in found.items():
        if type(value) not in _PLAIN:
            try:
                found[name] = json.loads(json.dumps(value, default=_text))
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None
    return found


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        raise ValueError("holds bytes, which are not carried along: leave the column out")
    return str(value.isoformat() if hasattr(value, "isoformat") else value)


# Of each kind of manifest: its rows with the numbers of lines or rows, and what makes an object of one.
_READERS: dict[str, tuple[Callable[..., Iterator[tuple[int, Any]]], Callable[[Any], dict[str, Any]]]] = {
    ".jsonl": (_jsonl_rows, lambda line: parse_object(line.decode("utf-8"))),
    ".csv": (_csv_rows, _typed),
    ".parquet": (_parquet_rows, _json_values),
}


def _record(found: dict[str, Any], folder: str) -> Record:
    """A record of a manifest whose folder may be a URL, and whose key may follow from the rest."""
    video = found.get("video")
    if isinstance(video, str) and not found.get("key"):
        times = [str(found[name]) for name in _NUMBERS if found.get(name) is not None]
        found = found | {"key": "#".join([video, "-".join(times)]) if times else video}
    if not is_url(folder):
        return parse_record(found, Path(folder))
    record = parse_record(found, Path("/"))
    if not isinstance(video, str) or is_url(video) or os.path.isabs(video):
        return record
    return dataclasses.replace(record, video=f"{folder}/{video}")
