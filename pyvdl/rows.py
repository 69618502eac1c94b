"""What captioning says about each clip: rows, the files that hold them, and how they are read back. No jax here."""

from __future__ import annotations

import dataclasses
import io
import json
import operator
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypedDict

from pyvdl.sources import is_url
from pyvdl.storage import Folder

Format = Literal["parquet", "jsonl"]
Kind = Literal["bool", "int", "float", "string", "strings", "json"]  # of the values of a carried column
FORMATS: tuple[Format, ...] = ("parquet", "jsonl")
_SHARD_NAME = re.compile(r"captions-(\d{5,})-of-(\d{5,})\.(parquet|jsonl)")
_COLUMNS = b"pyvdl.columns"  # keys of a Parquet file's own metadata
_COUNTS = b"pyvdl.counts"


class Dropped(TypedDict):
    """A caption that a filter dropped."""

    caption: str
    log_prob: float
    clip_score: float | None
    reason: str  # the filter's name


@dataclass(frozen=True, kw_only=True)
class CaptionRow:
    """What captioning says about one clip; `captions` is empty and `error` says why when `status` is "failed"."""

    key: str
    video: str
    start_seconds: float
    end_seconds: float | None
    captions: list[str]
    log_probs: list[float]  # natural log, summed over the tokens of a caption and its end
    prompt: str
    status: Literal["ok", "failed"]
    error: str | None  # "kind: what happened"
    seed: int  # of this clip's samples
    model_sha256: str | None = None  # of weights and words; None outside of a job
    recipe_sha256: str | None = None  # of all that the captions depend on besides the clip; None outside of a job
    clip_scores: list[float] | None = None  # of each caption: cosine with the clip; None without a dual encoder
    dropped: list[Dropped] | None = None  # in the order they were drawn; None without filters
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)  # columns carried over from the manifest

    def to_json(self) -> str:
        """One line of JSON."""
        values = {name: getattr(self, name) for name in ROW_NAMES}
        return json.dumps(values | dict(self.extra), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> CaptionRow:
        """Reads what `to_json` wrote; ValueError says what is missing."""
        found = json.loads(line)
        if not isinstance(found, dict) or not set(found) >= _NEEDED:
            got = sorted(found) if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"expected a JSON object with {', '.join(sorted(_NEEDED))}, not {got}")
        return cls.from_values(found)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> CaptionRow:
        """A row from its columns, carried ones among them."""
        named = {name: value for name, value in values.items() if name in ROW_NAMES}
        return cls(**named, extra={name: value for name, value in values.items() if name not in ROW_NAMES})


ROW_NAMES = tuple(f.name for f in dataclasses.fields(CaptionRow) if f.name != "extra")
_NEEDED = set(ROW_NAMES) - {"model_sha256", "recipe_sha256", "clip_scores", "dropped"}


@dataclass
class Counts:
    """What rows there are."""

    rows: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # by the kind of error
    dropped: Counter[str] = field(default_factory=Counter)  # captions, by the name of the filter

    def add(self, row: CaptionRow) -> None:
        self.rows += 1
        if row.dropped:
            self.dropped.update(caption["reason"] for caption in row.dropped)
        if row.error is not None:
            self.failed[row.error.partition(":")[0]] += 1

    def __iadd__(self, other: Counts) -> Counts:
        self.rows += other.rows
        self.failed += other.failed
        self.dropped += other.dropped
        return self


def shard_name(shard: int, shards: int, format: Format) -> str:
    return f"captions-{shard:05d}-of-{shards:05d}.{format}"


def widened(kind: Kind | None, value: Any) -> Kind | None:
    """The kind of a column that holds values of `kind` (None: none yet, or only nulls) and `value`."""
    found: Kind
    match value:
        case None:
            return kind
        case bool():
            found = "bool"
        case int() if -(1 << 63) <= value < 1 << 63:
            found = "int"
        case float():
            found = "float"
        case str():
            found = "string"
        case list() | tuple() if all(isinstance(item, str) for item in value):
            found = "strings"
        case _:
            found = "json"
    if kind is None or kind == found:
        return found
    return "float" if {kind, found} == {"int", "float"} else "json"


def encode_shard(rows: Sequence[CaptionRow], format: Format, columns: Mapping[str, Kind]) -> bytes:
    """The file of a shard. `columns` are the carried ones of the whole job: all its files have the same schema."""
    if format == "jsonl":
        return "".join(row.to_json() + "\n" for row in rows).encode()
    pa = _pyarrow()
    counts = Counts()
    for row in rows:
        counts.add(row)
    text, texts = pa.string(), pa.list_(pa.string())
    types: dict[str, Any] = dict.fromkeys(ROW_NAMES, text)
    types |= {"start_seconds": pa.float64(), "end_seconds": pa.float64(), "seed": pa.int64()}
    numbers = pa.list_(pa.float64())
    types |= {"captions": texts, "log_probs": numbers, "clip_scores": numbers}
    kinds = {"caption": text, "log_prob": pa.float64(), "clip_score": pa.float64(), "reason": text}
    types |= {"dropped": pa.list_(pa.struct(kinds))}
    arrays = [pa.array(list(map(operator.attrgetter(name), rows)), kind) for name, kind in types.items()]
    carried = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "string": text, "strings": texts}
    for name, kind in columns.items():
        values = [row.extra.get(name) for row in rows]
        if kind == "json":
            values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
        types[name] = carried.get(kind, text)
        arrays.append(pa.array(values, types[name]))
    told = {"rows": counts.rows, "failed": counts.failed, "dropped": counts.dropped}
    metadata = {_COLUMNS: json.dumps(dict(columns)).encode(), _COUNTS: json.dumps(told).encode()}
    table = pa.Table.from_arrays(arrays, schema=pa.schema(list(types.items()), metadata=metadata))
    out = io.BytesIO()
    pa.parquet.write_table(table, out, compression="zstd")
    return out.getvalue()


def _decode_shard(data: bytes, format: str, where: object) -> Iterator[CaptionRow]:
    if format == "parquet":
        pa = _pyarrow()
        try:
            table = pa.parquet.read_table(io.BytesIO(data))
        except pa.ArrowInvalid as error:
            raise ValueError(f"{where} is no Parquet file: {error}") from None
        kinds = json.loads((table.schema.metadata or {}).get(_COLUMNS, b"{}"))
        for values in table.to_pylist():
            read = {n: json.loads(v) if v is not None and kinds.get(n) == "json" else v for n, v in values.items()}
            yield CaptionRow.from_values(read)
        return
    for number, line in enumerate(data.splitlines(), 1):
        try:
            yield CaptionRow.from_json(line.decode())
        except ValueError as error:
            raise ValueError(f"{where}, line {number}: {error}") from None


def count_shard(folder: Folder, name: str) -> Counts:
    """Rows and failures of a shard; of a Parquet file only its end is read."""
    counts = Counts()
    if name.endswith(".parquet"):
        with folder.open(name) as file:
            told = json.loads(_pyarrow().parquet.read_metadata(file).metadata[_COUNTS])
        return Counts(told["rows"], Counter(told["failed"]), Counter(told["dropped"]))
    for row in read_shard(folder, name):
        counts.add(row)
    return counts


def read_shard(folder: Folder, name: str) -> Iterator[CaptionRow]:
    """The rows of one file of a job."""
    return _decode_shard(folder.read(name), name.rpartition(".")[2], f"{folder.name}/{name}")


def read_captions(path: str | os.PathLike[str]) -> Iterator[CaptionRow]:
    """Reads one file of caption rows, or every shard of a job's folder; ValueError when shards are missing."""
    if not is_url(path) and not Path(path).is_dir():
        data = Path(path).read_bytes()
        yield from _decode_shard(data, "parquet" if data[:4] == b"PAR1" else "jsonl", path)
        return
    folder = Folder(path)
    shards = {name: match for name in folder.names() if (match := _SHARD_NAME.fullmatch(name))}
    counts = {int(match[2]) for match in shards.values()}
    if len(counts) != 1 or len(shards) != counts.pop():
        raise ValueError(f"{folder.name} holds {len(shards)} caption shards, no whole job: run the same command again")
    for name, _ in sorted(shards.items(), key=lambda item: int(item[1][1])):
        yield from read_shard(folder, name)


def captions_by_key(rows: Iterable[CaptionRow]) -> dict[str, tuple[str, ...]]:
    """The captions of each clip that was captioned; ValueError when two rows have one key."""
    found: dict[str, tuple[str, ...]] = {}
    for row in rows:
        if row.key in found:
            raise ValueError(f"key {row.key!r} has more than one row of captions")
        if row.status == "ok":
            found[row.key] = tuple(row.captions)
    return found


def _pyarrow() -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install 'pyarrow>=16', or ask for jsonl") from error
    return pyarrow
