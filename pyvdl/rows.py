"""What jobs say about each clip: rows, the files that hold them, and how they are read back. No jax here."""

from __future__ import annotations

import dataclasses
import functools
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
from typing import Any, Literal, Self, TypedDict

import numpy as np

from pyvdl.sources import is_url, writable
from pyvdl.storage import Folder, read_object

Format = Literal["parquet", "jsonl"]
RowKind = Literal["captions", "embeddings", "parts"]  # what the rows of a job hold; parts are records, see `open_cuts`
# Of the values of a carried column; "long" are numbers of which a float may be another.
Kind = Literal["bool", "int", "long", "float", "string", "strings", "json"]
FORMATS: Mapping[RowKind, tuple[Format, ...]] = {
    "captions": ("parquet", "jsonl"),
    "embeddings": ("parquet",),
    "parts": ("jsonl",),
}
JOB_FILE = "job.json"  # beside the shards: what was asked for
_SHARD_NAME = re.compile(r"captions-(\d{5,})-of-(\d{5,})\.(parquet|jsonl)")
_COLUMNS = b"pyvdl.columns"  # keys of a Parquet file's own metadata
_COUNTS = b"pyvdl.counts"
_SURROGATE = re.compile("[\ud800-\udfff]")
_EXACT = 1 << 53  # a float holds each int up to here


class Dropped(TypedDict):
    """A caption that a filter dropped."""

    caption: str
    log_prob: float
    clip_score: float | None
    reason: str  # the filter's name


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a job says about one clip; `error` says why when `status` is "failed"."""

    key: str
    video: str
    start_seconds: float
    end_seconds: float | None
    status: Literal["ok", "failed"]
    error: str | None  # "kind: what happened"
    model_sha256: str | None = None  # of weights and words; None outside of a job
    recipe_sha256: str | None = None  # of all that the row depends on besides the clip; None outside of a job
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)  # columns carried over from the manifest

    @classmethod
    @functools.cache
    def names(cls) -> tuple[str, ...]:
        """Of the columns that are not carried over."""
        return tuple(f.name for f in dataclasses.fields(cls) if f.name != "extra")

    @classmethod
    @functools.cache
    def _needed(cls) -> frozenset[str]:
        return frozenset(
            f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING
        )

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """A row from its columns, carried ones among them; ValueError says what is missing."""
        if not values.keys() >= cls._needed():
            raise ValueError(f"expected {', '.join(sorted(cls._needed()))}, not {sorted(values)}")
        named = {name: value for name, value in values.items() if name in cls.names()}
        return cls(**named, extra={name: value for name, value in values.items() if name not in named})

    def to_json(self) -> str:
        """One line of JSON."""
        values = {name: getattr(self, name) for name in self.names()}
        return _json(values | dict(self.extra))

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Reads what `to_json` wrote; ValueError says what is missing."""
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError(f"expected a JSON object, not {type(found).__name__}")
        return cls.from_values(found)


@dataclass(frozen=True, kw_only=True)
class CaptionRow(Row):
    """What captioning says about one clip; `captions` is empty when it failed."""

    captions: list[str]
    log_probs: list[float]  # natural log, summed over the tokens of a caption and its end
    prompt: str
    seed: int  # of this clip's samples
    clip_scores: list[float] | None = None  # of each caption: cosine with the clip; None without a dual encoder
    dropped: list[Dropped] | None = None  # in the order they were drawn; None without filters


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddingRow(Row):
    """The embedding of one clip."""

    embedding: Sequence[float] | np.ndarray  # float32[E], of length 1; NaN when it failed


ROW_NAMES = frozenset(CaptionRow.names() + EmbeddingRow.names())


@dataclass
class Counts:
    """What rows there are."""

    rows: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # by the kind of error
    dropped: Counter[str] = field(default_factory=Counter)  # captions, by the name of the filter
    emptied: int = 0  # rows of which filters dropped all captions

    def add(self, row: Row) -> None:
        self.rows += 1
        if isinstance(row, CaptionRow) and row.dropped:
            self.dropped.update(caption["reason"] for caption in row.dropped)
            self.emptied += not row.captions
        if row.error is not None:
            self.failed[row.error.partition(":")[0]] += 1

    def __iadd__(self, other: Counts) -> Counts:
        self.rows += other.rows
        self.failed += other.failed
        self.dropped += other.dropped
        self.emptied += other.emptied
        return self


def shard_name(shard: int, shards: int, format: Format, kind: RowKind = "captions") -> str:
    return f"{kind}-{shard:05d}-of-{shards:05d}.{format}"


def widened(kind: Kind | None, value: Any) -> Kind | None:
    """The kind of a column that holds values of `kind` (None: none yet, or only nulls) and `value`."""
    found: Kind
    match value:
        case None:
            return kind
        case bool():
            found = "bool"
        case int() if -_EXACT <= value <= _EXACT:
            found = "int"
        case int() if -(1 << 63) <= value < 1 << 63:
            found = "long"
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
    other = found if kind == "int" else kind
    return other if "int" in (kind, found) and other in ("long", "float") else "json"


def check_format(format: Format) -> None:
    """Raises ImportError where a file of this format cannot be written here: to be told before the work, not after."""
    if format == "parquet":
        _pyarrow()


def encode_shard(rows: Sequence[Row], format: Format, columns: Mapping[str, Kind]) -> bytes:
    """The file of a shard. `columns` are the carried ones of the whole job: all its files have the same schema."""
    if format == "jsonl":
        return "".join(row.to_json() + "\n" for row in rows).encode()
    pa = _pyarrow()
    counts = Counts()
    for row in rows:
        counts.add(row)
    text, texts = pa.string(), pa.list_(pa.string())
    types: dict[str, Any] = dict.fromkeys(rows[0].names(), text)
    types |= {"start_seconds": pa.float64(), "end_seconds": pa.float64()}
    if isinstance(rows[0], EmbeddingRow):
        types |= {"embedding": pa.list_(pa.float32(), len(rows[0].embedding))}
    else:
        numbers = pa.list_(pa.float64())
        kinds = {"caption": text, "log_prob": pa.float64(), "clip_score": pa.float64(), "reason": text}
        types |= {"captions": texts, "log_probs": numbers, "clip_scores": numbers, "seed": pa.int64()}
        types |= {"dropped": pa.list_(pa.struct(kinds))}
    arrays = [_array(list(map(operator.attrgetter(name), rows)), kind) for name, kind in types.items()]
    carried = {"bool": pa.bool_(), "int": pa.int64(), "long": pa.int64(), "float": pa.float64()}
    carried |= {"string": text, "strings": texts}
    for name, kind in columns.items():
        values = [row.extra.get(name) for row in rows]
        if kind == "json":
            values = [None if value is None else _json(value) for value in values]
        types[name] = carried.get(kind, text)
        arrays.append(_array(values, types[name]))
    metadata = {_COLUMNS: json.dumps(dict(columns)).encode(), _COUNTS: json.dumps(vars(counts)).encode()}
    table = pa.Table.from_arrays(arrays, schema=pa.schema(list(types.items()), metadata=metadata))
    out = io.BytesIO()
    pa.parquet.write_table(table, out, compression="zstd")
    return out.getvalue()


def _json(value: Any) -> str:
    """With what is no UTF-8 as `writable` has it: in JSON with another backslash."""
    return _SURROGATE.sub(lambda found: rf"\\u{ord(found[0]):x}", json.dumps(value, ensure_ascii=False))


def _array(values: list[Any], kind: Any) -> Any:
    """The Arrow array of a column."""
    pa = _pyarrow()
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:
        return pa.array(_writable(values), kind)


def _writable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return list(map(_writable, value))
    return writable(value) if isinstance(value, str) else value


def _decode_shard[R: Row](data: bytes, format: str, row: type[R], where: object) -> Iterator[R]:
    if format == "parquet":
        table = _table(data, where)
        kinds = json.loads((table.schema.metadata or {}).get(_COLUMNS, b"{}"))
        for values in table.to_pylist():
            read = {n: json.loads(v) if v is not None and kinds.get(n) == "json" else v for n, v in values.items()}
            try:
                yield row.from_values(read)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        return
    for number, line in enumerate(data.splitlines(), 1):
        try:
            yield row.from_json(line.decode())
        except ValueError as error:
            raise ValueError(f"{where}, line {number}: {error}") from None


def _table(data: bytes, where: object, columns: list[str] | None = None) -> Any:
    """The Arrow table of a Parquet file, or these columns of it."""
    pa = _pyarrow()
    try:
        # By this thread alone: Arrow's let go of `data` later, and a process that ends meanwhile is aborted.
        return pa.parquet.ParquetFile(pa.BufferReader(data)).read(columns, use_threads=False)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{where} is no Parquet file: {error}") from None


def count_shard(folder: Folder, name: str) -> Counts:
    """Rows and failures of a shard; of a Parquet file only its end is read."""
    counts = Counts()
    if name.endswith(".parquet"):
        with folder.open(name) as file:
            told = json.loads(_pyarrow().parquet.read_metadata(file).metadata[_COUNTS])
        return Counts(**told | {"failed": Counter(told["failed"]), "dropped": Counter(told["dropped"])})
    for row in read_shard(folder, name, CaptionRow):
        counts.add(row)
    return counts


def read_shard[R: Row](folder: Folder, name: str, row: type[R]) -> Iterator[R]:
    """The rows of one file of a job."""
    return _decode_shard(folder.read(name), name.rpartition(".")[2], row, f"{folder.name}/{name}")


def read_embeddings(folder: Folder, name: str) -> tuple[list[str], np.ndarray, list[str | None]]:
    """Keys, embeddings float32[N, E] (NaN where a clip failed) and errors of one file of a job, without a Python
    object for each number."""
    table = _table(folder.read(name), f"{folder.name}/{name}", ["key", "embedding", "error"])
    found = table["embedding"].combine_chunks()
    return table["key"].to_pylist(), found.flatten().to_numpy().reshape(len(found), -1), table["error"].to_pylist()


def read_captions(path: str | os.PathLike[str]) -> Iterator[CaptionRow]:
    """Reads one file of caption rows, or every shard of a job's folder; ValueError when shards are missing."""
    if not is_url(path) and not Path(path).is_dir():
        data = Path(path).read_bytes()
        yield from _decode_shard(data, "parquet" if data[:4] == b"PAR1" else "jsonl", CaptionRow, path)
        return
    folder = Folder(path)
    shards = {name: match for name in folder.names() if (match := _SHARD_NAME.fullmatch(name))}
    counts = {int(match[2]) for match in shards.values()}
    if len(counts) != 1 or len(shards) != counts.pop():
        if _is_of_embeddings(folder):
            raise ValueError(f"{folder.name} is a job of embeddings: expected one of captions")
        raise ValueError(f"{folder.name} holds {len(shards)} caption shards, no whole job: run the same command again")
    for name, _ in sorted(shards.items(), key=lambda item: int(item[1][1])):
        yield from read_shard(folder, name, CaptionRow)


def _is_of_embeddings(folder: Folder) -> bool:
    """Whether a job of embeddings is in the folder; others that have such a file say less in it."""
    if not folder.exists(JOB_FILE):
        return False
    recipe = read_object(folder.read(JOB_FILE), f"{folder.name}/{JOB_FILE}").get("recipe")
    return isinstance(recipe, dict) and recipe.get("kind") == "embeddings"


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
        text = "Parquet files need pyarrow: pip install 'pyarrow>=16' (captions can do without: --format jsonl)"
        raise ImportError(text) from error
    return pyarrow
