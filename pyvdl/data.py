"""Manifests of captioned clips, and batches of decoded clips with a position that can be saved.

Grain orders the records (shuffled anew each epoch, repeated); the C++ loader's threads decode ahead; what the caller's
`encode` makes of a record's texts is stacked beside the clips.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
from absl import logging

from pyvdl.config import ClipConfig
from pyvdl.sources import FileSlice, absolute, file_path, with_file_path
from pyvdl.storage import write_whole

Family = Literal["temporal", "causal", "descriptive", "short"]
Encode = Callable[["Record", np.random.Generator], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a clip with its answer, or its answers."""

    question: str
    answer: str
    family: Family | None = None  # None: not known
    type: str | None = None  # the data set's own, such as NExT-QA's "CW"
    references: tuple[str, ...] = ()  # further answers, as right as `answer`
    options: tuple[str, ...] = ()  # of a multiple choice
    correct: int | None = None  # the option that is the answer; others may read the same
    key: str | None = None  # what the data set calls the question

    @property
    def answers(self) -> tuple[str, ...]:
        """All that are right."""
        return (self.answer, *self.references)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One clip: a segment of a video file, and the texts that belong to it."""

    key: str
    video: str  # path, URL, or as fsspec names what is in a file: tar://MEMBER::PATH, array://ROW::PATH
    byte_range: tuple[int, int] | None = None  # offset and length of the video in its file; None: all of `video`
    start_seconds: float = 0.0  # from the first shown frame
    end_seconds: float | None = None  # None: to the end of the video
    captions: tuple[str, ...] = ()
    narrative: str | None = None  # a longer account with actor tags
    alt_text: str | None = None
    questions: tuple[Question, ...] = ()
    label: str | None = None
    split: str | None = None
    group: str | None = None  # clips of one group are no negatives of each other
    extra: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, hash=False
    )  # keys of the manifest not named here

    def __post_init__(self) -> None:
        """Refuses what would be read as something else, later on: a text as its letters, for one."""
        if not isinstance(self.video, str):
            raise TypeError(f"video must be a string, not {self.video!r}")
        if isinstance(self.captions, str):
            raise TypeError(f"captions must be a tuple of texts, not the one text {self.captions!r}")

    @property
    def source(self) -> str | FileSlice:
        """What the decoder opens; with a byte range that part of the file, without looking for it in the tar."""
        return self.video if self.byte_range is None else FileSlice(file_path(self.video), *self.byte_range)

    def part(self, number: int, start_seconds: float, end_seconds: float) -> Record:
        """A part of the clip with the key KEY#0000, ...; parts of one clip are no negatives of each other."""
        return dataclasses.replace(
            self,
            key=f"{self.key}#{number:04d}",
            start_seconds=start_seconds,
            end_seconds=end_seconds,
            group=self.group or self.key,
        )

    def equal_parts(self, end_seconds: float, count: int) -> list[Record]:
        """`count` parts of equal length of the clip, which ends at `end_seconds`."""
        bounds = np.linspace(self.start_seconds, end_seconds, count + 1).tolist()
        return [self.part(i, start, end) for i, (start, end) in enumerate(itertools.pairwise(bounds))]


_NAMED = frozenset(field.name for field in dataclasses.fields(Record)) - {"extra"}
_OF_QUESTION = frozenset(field.name for field in dataclasses.fields(Question))


def read_manifest(path: str | os.PathLike[str]) -> list[Record]:
    """Reads a JSONL manifest, one object for each clip; a relative video path is relative to the manifest's folder;
    a URL stays as it is.

    Raises ValueError naming file, line and what was expected there.
    """
    source = Path(path)
    folder = os.fspath(source.parent)
    records: list[Record] = []
    lines: dict[str, int] = {}
    with source.open("rb") as file:  # decoded line by line, so that what is not UTF-8 has a line number
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = parse_record(parse_object(line.decode("utf-8")), folder)
                if record.key in lines:
                    raise ValueError(f"key {record.key!r} stands on line {lines[record.key]} already: expected its own")
            except ValueError as error:
                raise ValueError(f"{source}:{number}: {error}") from error
            lines[record.key] = number
            records.append(record)
    return records


def write_manifest(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Writes what `read_manifest` reads, whole or not at all; videos below the manifest's folder become relative.

    Raises ValueError where two records have one key.
    """
    target = Path(path).absolute()
    keys: set[str] = set()

    def line(record: Record) -> str:
        if record.key in keys:
            raise ValueError(f"two records have the key {record.key!r}: expected each record to have its own")
        keys.add(record.key)
        return json.dumps(_to_json(record, target.parent), ensure_ascii=False) + "\n"

    write_whole(target, map(line, records))


def digest(records: Iterable[Record]) -> str:
    """Names records by what is in them: texts by content, videos by their absolute path, however it was spelled.

    Not by the videos' content: to read millions at each start would take as long as the job.
    """
    found = hashlib.sha256()
    encode = json.JSONEncoder(sort_keys=True, default=lambda x: vars(x) if isinstance(x, Question) else str(x)).encode
    for record in records:
        found.update(encode(vars(record) | {"video": absolute(record.video)}).encode())
    return found.hexdigest()


def encodable(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair: JSON's escapes can say it, UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def parse_object(text: str) -> dict[str, Any]:
    """One JSON object, with texts that can be written again; ValueError says what was found instead."""
    try:
        found = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # a surrogate, mostly one of a pair
            found = json.loads(encodable(json.dumps(found, ensure_ascii=False)))
    except json.JSONDecodeError as error:
        raise ValueError(f"expected one JSON object: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, found {text.strip()[:40]!r}")
    return found


def parse_record(found: Mapping[str, Any], folder: str | os.PathLike[str]) -> Record:
    """The record of a manifest's object, with paths relative to `folder`; ValueError says what was expected."""
    # A manifest may have millions of lines: what is absent or as most lines have it costs next to nothing here.
    for name in ("video", "key"):
        if not found.get(name):
            raise ValueError(f"{name!r} is missing: expected a non-empty string")
    for name in ("key", "video", "narrative", "alt_text", "label", "split", "group"):
        if (text := found.get(name)) is not None:
            _check(name, text, isinstance(text, str), "a string")
    start, end = found.get("start_seconds", 0.0), found.get("end_seconds")
    if "start_seconds" in found:
        _check("start_seconds", start, _is_seconds(start), "a number of 0 or more")
    if end is not None:
        _check("end_seconds", end, _is_seconds(end) and end > start, f"a number above {start} or null")
    values = {name: value for name, value in found.items() if name in _NAMED}
    if (byte_range := found.get("byte_range")) is not None:
        good = _is_list_of(byte_range, int) and len(byte_range) == 2 and min(byte_range) >= 0
        _check("byte_range", byte_range, good, "an offset and a length in bytes, or null")
        values["byte_range"] = tuple(byte_range)
    captions = found.get("captions") or []
    _check("captions", captions, _is_list_of(captions, str), "a list of strings")
    questions = found.get("questions") or []
    _check("questions", questions, _is_list_of(questions, dict), "a list of objects")
    values["video"] = with_file_path(found["video"], lambda path: os.path.normpath(os.path.join(folder, path)))
    values["start_seconds"] = float(start)
    values["end_seconds"] = None if end is None else float(end)
    values["captions"] = tuple(captions)
    values["questions"] = tuple(map(_parse_question, questions))
    return Record(**values, extra={name: value for name, value in found.items() if name not in _NAMED})


def _parse_question(found: dict[str, Any]) -> Question:
    for name in ("question", "answer"):
        _check(f"questions: {name}", found.get(name), isinstance(found.get(name), str), "a string")
    if (family := found.get("family")) is not None:
        _check("questions: family", family, family in get_args(Family), f"one of {get_args(Family)} or null")
    for name in ("type", "key"):
        if (text := found.get(name)) is not None:
            _check(f"questions: {name}", text, isinstance(text, str), "a string")
    lists = {name: found[name] or [] for name in ("references", "options") if name in found}
    for name, value in lists.items():
        _check(f"questions: {name}", value, _is_list_of(value, str), "a list of strings")
    options, correct = lists.get("options", []), found.get("correct")
    if options or correct is not None:
        good = type(correct) is int and 0 <= correct < len(options) and options[correct] == found["answer"]
        _check("questions: correct", correct, good, f"the index of the answer among {len(options)} options")
    unknown = sorted(set(found) - _OF_QUESTION)
    _check("questions", unknown, not unknown, f"only {', '.join(sorted(_OF_QUESTION))} in each")
    return Question(**found | {name: tuple(value) for name, value in lists.items()})


def _check(name: str, value: Any, is_good: bool, expected: str) -> None:
    if not is_good:
        raise ValueError(f"{name} is {value!r:.80}: expected {expected}")


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all([isinstance(item, kind) for item in value])


def _to_json(record: Record, folder: Path) -> dict[str, Any]:
    def shown(path: str) -> str:
        file = Path(path).absolute()
        return os.fspath(file.relative_to(folder) if file.is_relative_to(folder) else file)

    return {"key": record.key, "video": with_file_path(record.video, shown)} | to_fields(record)


def to_fields(record: Record) -> dict[str, Any]:
    """The object of a manifest without key and video: what `parse_record` reads."""
    result: dict[str, Any] = {}
    for field in dataclasses.fields(Record):
        value = getattr(record, field.name)
        if field.name in _NAMED - {"key", "video"} and value != field.default:
            result[field.name] = value
    if record.questions:
        result["questions"] = [question_to_json(question) for question in record.questions]
    return result | dict(record.extra)


def question_to_json(question: Question) -> dict[str, Any]:
    values = {field.name: getattr(question, field.name) for field in dataclasses.fields(Question)}
    defaults = {field.name: field.default for field in dataclasses.fields(Question)}
    return {name: value for name, value in values.items() if value != defaults[name]}


@dataclasses.dataclass(frozen=True)
class _Item:
    """One place in the endless order of records."""

    position: int  # over all processes and epochs; -1: a row that only fills the last batch
    epoch: int
    index: int  # into the records


class Batches:
    """Iterates over dicts of arrays: this process's rows of global batches of `batch_size` records.

    Each has video uint8[B, T, H, W, 3] (unless `clip` is None), ok bool[B], index int64[B] (into `records`) and what
    `encode(record, rng)` returned, stacked. `rng` and the seed of the clip's sampling follow from (seed, epoch, index)
    alone. A clip that cannot be decoded has ok False, zeros for frames, and is counted in `failed_clips`. The records
    run on over the ends of epochs; what does not fill a last batch is dropped, or, with drop_remainder=False, filled up
    with rows of ok False and index -1. Records that are rows of an array (see `pyvdl.arrays`) are read in place of
    decoding, as they are: of `clip` only the shape counts then.

    mixture: sets that the records are made of, one after the other: of each its number of records and its weight, the
    share of all rows that are drawn from it. Each set has epochs of its own. It takes num_epochs None.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        encode: Encode,
        clip: ClipConfig | None,
        batch_size: int,
        seed: int,
        mixture: Sequence[tuple[int, float]] | None = None,
        num_epochs: int | None = None,
        shuffle: bool = True,
        num_threads: int = 2,
        prefetch: int = 2,
        drop_remainder: bool = True,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        if not records:
            raise ValueError("records is empty: expected at least one")
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(f"batch_size={batch_size}: expected a positive multiple of the {process_count} processes")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index={process_index}: expected 0 to {process_count - 1}")
        self.wait_seconds = 0.0  # that __next__ waited for the decoder
        self.failed_clips = 0
        self._records = records
        self._encode = encode
        self._clip = clip
        self._batch_size = batch_size
        self._seed = seed
        self._num_threads, self._prefetch = num_threads, prefetch
        self._process_index, self._process_count = process_index, process_count
        if mixture is not None and (num_epochs is not None or sum(count for count, _ in mixture) != len(records)):
            raise ValueError(
                f"mixture is of {mixture} with num_epochs {num_epochs}: expected all {len(records)} records, None"
            )
        self._order = _order(mixture or [(len(records), 1.0)], seed, num_epochs, shuffle)
        total = len(self._order)
        self._end = total // batch_size * batch_size if drop_remainder else total
        if self._end == 0:
            raise ValueError(
                f"batch_size={batch_size}: {total} records do not fill one batch; set drop_remainder=False"
            )
        self._position = 0  # of the next record to hand out, over all processes
        self._signature: dict[str, Any] = {"seed": seed, "records": len(records), "shuffle": shuffle}
        if mixture is not None:
            self._signature["mixture"] = [list(part) for part in mixture]
        self._items: deque[_Item] = deque()  # of the clips on their way through the loader
        self._loader: Any = None
        self._clips: Iterator[Any] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._position >= self._end:
            self.close()
            raise StopIteration
        if self._clip is None:
            items = list(self._batch_items(self._position))
            batch = {"ok": np.array([item.position >= 0 for item in items])}
        else:
            items, batch = self._next_clips()
        texts = [self._encode(self._records[item.index], self._generator(item)) for item in items]
        batch["index"] = np.array([item.index if item.position >= 0 else -1 for item in items], np.int64)
        for name in texts[0]:
            if name in batch:
                raise ValueError(f"encode returned {name!r}, which the batch has already")
            batch[name] = np.stack([text[name] for text in texts])
        self._position += self._batch_size
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the batch handed out last; what is decoded ahead does not count."""
        return {"position": self._position, **self._signature}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a position that `get_state` returned for the same records, seed and order."""
        found = {name: value for name, value in state.items() if name != "position"}
        if found != self._signature:
            raise ValueError(f"the saved position is one of {found}, these batches are {self._signature}")
        self.close()
        self._position = state["position"]

    def close(self) -> None:
        """Stops decoding ahead. The next batch starts it again."""
        if self._loader is not None:
            self._loader.close()
        self._loader = self._clips = None
        self._items.clear()

    def _next_clips(self) -> tuple[list[_Item], dict[str, np.ndarray]]:
        from pyvdl.arrays import clip_loader

        if self._clips is None:
            assert self._clip is not None
            self._loader = clip_loader(
                self._records,
                self._requests(self._position),
                self._clip,
                batch_size=self._batch_size // self._process_count,
                num_threads=self._num_threads,
                prefetch=self._prefetch,
            )
            self._clips = iter(self._loader)
        begin = time.perf_counter()
        clips = next(self._clips)
        self.wait_seconds += time.perf_counter() - begin
        items = [self._items.popleft() for _ in clips.ok]
        ok = clips.ok & np.array([item.position >= 0 for item in items])
        for item, error in zip(items, clips.errors):
            if error is not None and item.position >= 0:
                self.failed_clips += 1
                logging.warning("clip %s: %s", self._records[item.index].key, error)
        return items, {"video": clips.data, "ok": ok}

    def _requests(self, position: int) -> Iterator[Any]:
        """Yields the requests of all batches from `position` on, remembering which record each one is for."""
        from pyvdl.video import ClipRequest

        for start in range(position, self._end, self._batch_size):
            for item in self._batch_items(start):
                self._items.append(item)
                record = self._records[item.index]
                yield ClipRequest(record.source, record.start_seconds, record.end_seconds, self._clip_seed(item))

    def _batch_items(self, start: int) -> Iterator[_Item]:
        """Yields this process's records of the global batch that begins at `start`: every process_count-th one."""
        for position in range(start + self._process_index, start + self._batch_size, self._process_count):
            # A filling row repeats the batch's first record, which gives it the shape of every array.
            source = position if position < self._end else start
            epoch, index = self._order[source]
            yield _Item(position if source == position else -1, epoch, index)

    def _generator(self, item: _Item) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence((self._seed, item.epoch, item.index), spawn_key=(0,)))

    def _clip_seed(self, item: _Item) -> int:
        sequence = np.random.SeedSequence((self._seed, item.epoch, item.index), spawn_key=(1,))
        return int(sequence.generate_state(1, np.uint64)[0])


def _order(sets: Sequence[tuple[int, float]], seed: int, num_epochs: int | None, shuffle: bool) -> Any:
    """Returns a Grain data set from a position to (epoch, index of a record); an epoch holds its set's records once."""
    try:
        import grain
    except ImportError as error:
        raise ImportError("batches need Grain: pip install grain") from error

    def ordered(count: int, first: int, seed: int) -> Any:
        order = grain.MapDataset.range(count).seed(seed)
        if shuffle:
            order = order.shuffle()
        return order.repeat(num_epochs).map_with_index(lambda i, index: (i // count, first + int(index)))

    firsts = [sum(count for count, _ in sets[:i]) for i in range(len(sets))]
    orders = [ordered(count, first, seed + i) for i, ((count, _), first) in enumerate(zip(sets, firsts))]
    return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights=[weight for _, weight in sets])
