"""Jobs on disk: clips split into shards up front, rows in shards that appear whole or not at all. No jax here.

A job's folder holds `work/`, the list of clips of each shard, and `job.json`, written last: what was asked for, and
digests of every list. Which clip is in which shard follows from the clips alone, so that any number of processes can
work on one job without a word between them, and whoever comes later finds what is left by one listing.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyvdl.columns import carried, check_prompt, texts_of
from pyvdl.data import Record, parse_record, question_to_json
from pyvdl.rows import (
    FORMATS,
    JOB_FILE,
    CaptionRow,
    Counts,
    Format,
    Kind,
    Row,
    RowKind,
    count_shard,
    encode_shard,
    read_embeddings,
    read_shard,
    shard_name,
    widened,
)
from pyvdl.sources import absolute, file_path
from pyvdl.storage import Folder, read_object, refuse_another

_SCRATCH = ".planning-"
_BUCKETS = 4096
_SPILL_BYTES = 64 << 20  # of lines that are kept in memory
_CUTS = "cuts"
_CUT_AT_ONCE = 100  # clips; few, so that little is lost where cutting stops
_RATED = 32  # shards that a rate is taken from
_DIGEST = 32  # characters
_PREFIX = 48  # characters of a line of work that only order it
_SHARD = r"(captions|embeddings|parts)-\d{5,}-of-\d{5,}\.(parquet|jsonl)"
_HALF_WRITTEN = re.compile(rf"\.({_SHARD}|job\.json|probe|\.probe\.[0-9a-f]{{32}})\.[0-9a-f]{{32}}")
_WORK_NAME = re.compile(r"\d{5,}-of-\d{5,}\.jsonl|\.\d{5,}-of-\d{5,}\.jsonl\.[0-9a-f]{32}")  # and one half written


class Spill:
    """Lines sorted into buckets by a 64-bit hash; on disk beyond a fixed amount of memory."""

    def __init__(self, folder: Path, limit_bytes: int | None = None) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes or _SPILL_BYTES
        self._kept: dict[int, list[bytes]] = {}
        self._kept_bytes = 0

    def add(self, hash64: int, line: bytes) -> None:
        self._kept.setdefault(hash64 >> 52, []).append(line)
        self._kept_bytes += len(line) + 48
        if self._kept_bytes > self._limit_bytes:
            self._folder.mkdir(parents=True, exist_ok=True)
            for bucket, lines in self._kept.items():
                with self._path(bucket).open("ab") as file:
                    file.write(b"\n".join(lines) + b"\n")
            self._kept, self._kept_bytes = {}, 0

    def buckets(self) -> Iterator[list[bytes]]:
        """The lines of each bucket, in the order of the hashes; within a bucket as they came."""
        for bucket in range(_BUCKETS):
            path = self._path(bucket)
            written = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
            yield written + self._kept.get(bucket, [])

    def _path(self, bucket: int) -> Path:
        return self._folder / f"{bucket:04d}"


@dataclass(frozen=True, kw_only=True)
class Status:
    """How far a job is."""

    shards: int
    shards_done: int
    records: int
    rows: int  # of the finished shards
    failed: Mapping[str, int]  # of those, by kind
    dropped: Mapping[str, int]  # of their captions, by the name of the filter
    clips_per_second: float | None  # between the last finished shards; None: too few
    seconds_since: float | None  # the last shard was finished

    @property
    def seconds_left(self) -> float | None:
        """At the rate of the last shards; None once all is done, or while nobody knows."""
        if self.clips_per_second is None or self.rows == self.records:
            return None
        return (self.records - self.rows) / self.clips_per_second


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job whose clips are split into shards."""

    folder: Folder
    kind: RowKind
    recipe: Mapping[str, Any]  # all that the rows depend on besides the clips
    recipe_sha256: str
    format: Format
    records: int
    shard_size: int  # of all but the last
    columns: Mapping[str, Kind]  # carried over from the manifest
    digests: Sequence[str]  # of each shard's list

    @property
    def shards(self) -> int:
        return len(self.digests)

    def size(self, shard: int) -> int:
        """How many clips a shard has."""
        return min(self.shard_size, self.records - shard * self.shard_size)

    def work(self, shard: int) -> list[Record]:
        """The clips of a shard."""
        name = _work_name(shard, self.shards)
        lists = self.folder / "work"
        data = lists.read(name)
        if _digest(data) != self.digests[shard]:
            raise ValueError(f"{lists.name}/{name} is not what the job wrote: restore it, or begin anew")
        return _records(data)

    def missing(self) -> list[int]:
        """The shards that nobody has finished."""
        names = set(self.folder.names())
        return [shard for shard in range(self.shards) if self._name(shard) not in names]

    def finish(self, shard: int, rows: Sequence[Row]) -> None:
        """Writes the rows of a shard; it is done then. Twice does no harm: it is the same file."""
        self.folder.write(self._name(shard), encode_shard(rows, self.format, self.columns))

    def finish_parts(self, shard: int, parts: Iterable[Record]) -> None:
        """Writes what the clips of a shard were cut into, where that is the job; the shard is done then."""
        self.folder.write(self._name(shard), b"".join(_line(part, part.video) + b"\n" for part in parts))

    def parts(self) -> Iterator[Record]:
        """Of all clips."""
        for shard in range(self.shards):
            yield from _records(self.folder.read(self._name(shard)))

    def captions(self, shard: int) -> list[CaptionRow]:
        """The rows of a finished shard, in the order of its clips."""
        return list(read_shard(self.folder, self._name(shard), CaptionRow))

    def embeddings(self, shard: int) -> tuple[list[str], np.ndarray, list[str | None]]:
        """Of a finished shard of embeddings the keys, float32[N, E] with NaN where a clip failed, and the errors."""
        return read_embeddings(self.folder, self._name(shard))

    def counts(self, shards: Iterable[int]) -> Counts:
        """Rows and failures of these finished shards."""
        counts = Counts()
        for shard in shards:
            counts += Counts(self.size(shard)) if self.kind == "parts" else count_shard(self.folder, self._name(shard))
        return counts

    def finished(self, shards: Iterable[int]) -> list[tuple[float, int]]:
        """When these finished shards were written, in seconds since the epoch, and their numbers, in that order."""
        return sorted((self.folder.modified(self._name(shard)), shard) for shard in shards)

    def status(self) -> Status:
        """How far the job is, by one listing and the ends of the finished shards."""
        missing = set(self.missing())
        done = [shard for shard in range(self.shards) if shard not in missing]
        counts = self.counts(done)
        times = self.finished(done)
        last = times[-_RATED:]
        rate = None
        if len(last) > 1 and last[-1][0] > last[0][0]:
            rate = sum(self.size(shard) for _, shard in last[1:]) / (last[-1][0] - last[0][0])
        return Status(
            shards=self.shards,
            shards_done=len(done),
            records=self.records,
            rows=counts.rows,
            failed=dict(counts.failed.most_common()),
            dropped=dict(counts.dropped.most_common()),
            clips_per_second=rate,
            seconds_since=max(0.0, time.time() - times[-1][0]) if times else None,
        )

    def _name(self, shard: int) -> str:
        return shard_name(shard, self.shards, self.format, self.kind)


def open_job(
    folder: Folder,
    recipe: Mapping[str, Any],
    records: Iterable[Record],
    *,
    shard_size: int,
    format: Format,
    kind: RowKind = "captions",
    input_sha256: str | None = None,
) -> Job:
    """Splits `records` into the shards of a new job, or finds the job that was begun in the folder.

    Clips of one file stand together, in the order in which they lie in it; the order of `records` does not matter. They
    are read once, and kept on disk beyond a fixed amount of memory.

    A job of another recipe or of other clips is refused with the difference. input_sha256 stands for `records`: where
    it is that of the job found, they are not read.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size}: expected at least 1")
    if format not in FORMATS[kind]:
        raise ValueError(f"a job of {kind} in the format {format!r}: expected {' or '.join(FORMATS[kind])}")
    asked = dict(recipe) | {"kind": kind, "shard_size": shard_size, "format": format}
    names = set(folder.names())
    if JOB_FILE not in names:
        if finished := sorted(name for name in names if name.startswith(("captions-", "embeddings-"))):
            raise ValueError(f"{folder.name} holds {finished[0]} but no {JOB_FILE}: choose another folder")
        _remove_half_written(folder, names)
        return _Planner(folder, asked, shard_size).write(records, input_sha256)
    found = read_object(folder.read(JOB_FILE), f"{folder.name}/{JOB_FILE}")
    refuse_another(folder.name, found.get("recipe", {}), asked)
    _remove_half_written(folder, names)
    job = load_job(folder)
    if not is_listed(folder, input_sha256):
        _Planner(folder, asked, shard_size).compare(records, job)
    return job


def _remove_half_written(folder: Folder, names: Iterable[str]) -> None:
    """What a process that was killed has left."""
    for name in filter(_HALF_WRITTEN.fullmatch, names):
        folder.remove(name)


def is_listed(folder: Folder, input_sha256: str | None) -> bool:
    """Whether the job in a folder, if there is one, has listed the clips that this stands for."""
    if input_sha256 is None or not folder.exists(JOB_FILE):
        return False
    return read_object(folder.read(JOB_FILE), f"{folder.name}/{JOB_FILE}").get("input_sha256") == input_sha256


def open_cuts(
    folder: Folder, recipe: Mapping[str, Any], records: Iterable[Record], input_sha256: str | None, prompt: str
) -> Job:
    """What has to be done before a job in this folder on the parts of long clips: to cut these, in a job beside it.

    Its shards are lists of clips, and then of their parts, so that they are cut by many and no clip twice. recipe: all
    that the parts depend on besides the clips. prompt: what the parts are captioned with; ValueError before anything is
    cut where it names a column that they will not have.
    """
    options: dict[str, Any] = {"shard_size": _CUT_AT_ONCE, "format": "jsonl", "kind": "parts"}
    job = open_job(folder / _CUTS, recipe, records, input_sha256=input_sha256, **options)
    check_prompt(prompt, {*job.columns, "group"})
    return job


def load_cuts(folder: Folder) -> Job:
    """What `open_cuts` has opened."""
    return load_job(folder / _CUTS)


def load_job(folder: Folder) -> Job:
    """The job in a folder; ValueError where there is none."""
    try:
        found = read_object(folder.read(JOB_FILE), f"{folder.name}/{JOB_FILE}")
    except FileNotFoundError:
        if (folder / _CUTS).exists(JOB_FILE):
            cuts = load_cuts(folder)
            cut = f"{cuts.shards - len(cuts.missing())} of {cuts.shards} lists of long clips are cut"
            raise ValueError(f"{folder.name}: {cut} ({cuts.folder.name}), the job begins when all are") from None
        raise ValueError(f"{folder.name} holds no job, or one whose clips are not listed yet") from None
    try:
        return Job(
            folder=folder,
            kind=found["recipe"]["kind"],
            recipe=found["recipe"],
            recipe_sha256=found["recipe_sha256"],
            format=found["recipe"]["format"],
            records=found["records"],
            shard_size=found["recipe"]["shard_size"],
            columns=found["columns"],
            digests=found["shards"],
        )
    except KeyError as error:
        raise ValueError(f"{folder.name}/{JOB_FILE} has no {error}: it is not that of such a job") from None


class _Planner:
    """Splits clips into shards, in memory that does not grow with their number."""

    def __init__(self, folder: Folder, recipe: Mapping[str, Any], shard_size: int) -> None:
        self._folder = folder
        self._recipe = recipe
        self._shard_size = shard_size

    def write(self, records: Iterable[Record], input_sha256: str | None) -> Job:
        """Writes the lists and then, the job being one from there on, job.json."""
        work = self._folder / "work"
        work.make()
        for name in filter(_WORK_NAME.fullmatch, work.names()):  # of a job that was stopped before it was one
            work.remove(name)
        with _scratch(self._folder) as scratch:
            columns, count = self._read(records, scratch)
            check_prompt(self._recipe.get("prompt", ""), columns)
            shards = -(-count // self._shard_size)
            digests = []
            for shard, data in enumerate(self._lists()):
                work.write(_work_name(shard, shards), data)
                digests.append(_digest(data))
        told = {
            "recipe": self._recipe,
            "recipe_sha256": _digest(json.dumps(self._recipe, sort_keys=True).encode()),
            "input_sha256": input_sha256,
            "records": count,
            "columns": columns,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "shards": digests,
        }
        self._folder.write(JOB_FILE, json.dumps(told, indent=1).encode())
        return load_job(self._folder)

    def compare(self, records: Iterable[Record], job: Job) -> None:
        """Raises ValueError with the difference unless `records` are those of the job."""
        with _scratch(self._folder) as scratch:
            self._read(records, scratch)
            if [_digest(data) for data in self._lists()] == list(job.digests):
                return
            before = Spill(scratch / "before")
            for shard in range(job.shards):
                for record in job.work(shard):
                    _add_key(before, record.key, _line(record, record.video))
            counts: Counter[str] = Counter()
            some: dict[str, list[bytes]] = {"added": [], "removed": [], "changed": []}

            def note(what: str, keys: Iterable[bytes]) -> None:
                found = list(keys)
                counts[what] += len(found)
                some[what] = sorted([*some[what], *found])[:3]

            for old, new in zip(before.buckets(), self._by_key.buckets()):
                was, now = ({line[_DIGEST:]: line[:_DIGEST] for line in lines} for lines in (old, new))
                note("added", now.keys() - was.keys())
                note("removed", was.keys() - now.keys())
                note("changed", (key for key in was.keys() & now.keys() if was[key] != now[key]))
        told = "; ".join(
            f"{counts[what]} {what} ({_shown(keys)}{', ...' if counts[what] > 3 else ''})"
            for what, keys in some.items()
            if keys
        )
        raise ValueError(
            f"{self._folder.name} is a job on other clips: {told}; give the same ones, or choose another folder"
        )

    def _read(self, records: Iterable[Record], scratch: Path) -> tuple[dict[str, Kind | None], int]:
        """Sorts the records by file and by key; returns the carried columns and the number of records."""
        self._by_file, self._by_key = Spill(scratch / "files"), Spill(scratch / "keys")
        columns: dict[str, Kind | None] = {}
        count = 0
        for record in records:
            count += 1
            video = absolute(record.video)
            line = _line(record, video)
            _add_key(self._by_key, record.key, line)
            place = _place(record, video)
            self._by_file.add(place[0], struct.pack(">QQd", *place).hex().encode() + line)
            for name, value in carried(record).items():
                columns[name] = widened(columns.get(name), value)
        if not count:
            raise ValueError("no clips: expected at least one")
        self._refuse_duplicates()
        return {name: kind or "string" for name, kind in sorted(columns.items())}, count

    def _refuse_duplicates(self) -> None:
        total = 0
        some: list[bytes] = []
        for lines in self._by_key.buckets():
            seen = Counter(line[_DIGEST:] for line in lines)
            if len(seen) < len(lines):
                found = [key for key, times in seen.items() if times > 1]
                total += len(found)
                some = sorted([*some, *found])[:3]
        if total:
            raise ValueError(f"{total} keys stand for more than one clip ({_shown(some)}): give each clip its own")

    def _lists(self) -> Iterator[bytes]:
        """The lists of all shards, one after the other."""
        waiting: list[bytes] = []
        for lines in self._by_file.buckets():
            waiting += [line[_PREFIX:] + b"\n" for line in sorted(lines)]
            whole = len(waiting) // self._shard_size * self._shard_size
            for start in range(0, whole, self._shard_size):
                yield b"".join(waiting[start : start + self._shard_size])
            del waiting[:whole]
        if waiting:
            yield b"".join(waiting)


class _scratch:
    """A folder for what does not fit memory: beside the work where that is a disk, else where temporary files go."""

    def __init__(self, folder: Folder) -> None:
        self._parent = folder.local

    def __enter__(self) -> Path:
        if self._parent is not None:
            for left in self._parent.glob(f"{_SCRATCH}*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        self._path = tempfile.mkdtemp(prefix=_SCRATCH, dir=self._parent)
        return Path(self._path)

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


def _work_name(shard: int, shards: int) -> str:
    return f"{shard:05d}-of-{shards:05d}.jsonl"


def _line(record: Record, video: str) -> bytes:
    """A record as one line, the same for the same record however its path was spelled; `video` is absolute."""
    values: dict[str, Any] = {"key": record.key, "video": video, "start_seconds": record.start_seconds}
    if record.end_seconds is not None:
        values["end_seconds"] = record.end_seconds
    if record.byte_range is not None:
        values["byte_range"] = record.byte_range
    values |= texts_of(record)
    if record.captions:
        values["captions"] = record.captions
    if record.questions:
        values["questions"] = [question_to_json(question) for question in record.questions]
    if record.extra:
        values["extra"] = dict(record.extra)
    return json.dumps(values).encode()


def _records(lines: bytes) -> list[Record]:
    return list(map(_record, json.loads(b"[" + lines[:-1].replace(b"\n", b",") + b"]")))  # fewer calls than by lines


def _record(values: dict[str, Any]) -> Record:
    """The record of what a line of `_line` holds."""
    if "questions" in values:
        return parse_record(values | values.pop("extra", {}), "/")
    for name in ("byte_range", "captions"):
        if name in values:
            values[name] = tuple(values[name])
    return Record(**values)


def _place(record: Record, video: str) -> tuple[int, int, float]:
    """Where a clip stands among all: hash of its file, where in the file the video begins, and where the clip."""
    offset = 0 if record.byte_range is None else record.byte_range[0]
    return _hash64(file_path(video).encode(errors="surrogatepass")), offset, record.start_seconds


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _add_key(spill: Spill, key: str, line: bytes) -> None:
    """Adds a key, in one line whatever is in it, after the digest of its clip."""
    name = key.replace("\\", "\\\\").replace("\n", "\\n").encode(errors="surrogatepass")
    spill.add(_hash64(name), _digest(line).encode() + name)


def _shown(names: list[bytes]) -> str:
    return ", ".join(repr(name.decode(errors="replace")) for name in names)
