"""WebDataset tars, as video2dataset writes them: read in place as records, and written.

A sample is the members of one key, which ends at the first dot of a member's name: KEY.mp4 (or another video), KEY.txt
with its caption, KEY.json with "caption" or with fields of a manifest; other fields go to `Record.extra`, those
that are a manifest's by name only to "foreign" in it. Only headers and texts are read; a record knows which bytes of
the tar its video is.
"""

from __future__ import annotations

import dataclasses
import glob
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from pyvdl.data import Record, parse_object, parse_record, read_manifest
from pyvdl.sources import VIDEO_SUFFIXES, is_url, open_binary, writable
from pyvdl.storage import whole_file

_BRACES = re.compile(r"\{([^{}]*)\}")
_SUFFIXES = " ".join(sorted(VIDEO_SUFFIXES))
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_END_BYTES = 1 << 16  # read at a time behind the end


class DamagedArchive(ValueError):
    """A tar that ends too early, holds what is no header, or goes on after its end.

    `path` names it, `offset` is the byte from which on nothing can be read, `records` are those of the samples that are
    whole: those before the last one, which may have lost a member.
    """

    def __init__(self, path: str, offset: int, why: str, records: list[Record]) -> None:
        super().__init__(f"{path}: {why} at byte {offset}; {len(records)} samples before it are whole")
        self.path = path
        self.offset = offset
        self.records = records


@dataclasses.dataclass
class _Sample:
    video: str | None = None  # name of the member
    byte_range: tuple[int, int] = (0, 0)
    text: str | None = None
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_records(
    path: str | os.PathLike[str], *, on_damage: Callable[[DamagedArchive], None] | None = None
) -> list[Record]:
    """Reads the clips that `path` lists: a manifest, a tar, or tars by a pattern (`{00000..00099}.tar`, `*.tar`) or in
    a folder.

    on_damage: is told of each damaged tar, of which the whole samples are taken; without it that is an error.
    Raises ValueError where two records have one key or a tar is named twice, and where nothing is found.
    """
    if not Path(path).is_dir() and Path(path).suffix != ".tar":
        return read_manifest(path)
    records: list[Record] = []
    homes: dict[str, str] = {}
    tars = expand(path)
    for tar, count in Counter(tars).items():
        if count > 1:
            raise ValueError(f"{os.fspath(path)} names {tar} {count} times: expected each tar once")
    for tar in tars:
        try:
            found = read_archive(tar)
        except DamagedArchive as error:
            if on_damage is None:
                raise
            on_damage(error)
            found = error.records
        for record in found:
            if (home := homes.setdefault(record.key, tar)) != tar:
                raise ValueError(f"key {record.key!r} is in {home} and in {tar}: keys are unique in a set of tars")
        records += found
    if not records:
        raise ValueError(f"{os.fspath(path)}: no whole video in these tars (suffixes {_SUFFIXES})")
    return records


def expand(path: str | os.PathLike[str]) -> list[str]:
    """The paths that a pattern means: braces in the order written, then what `*`, `?` and `[]` find, sorted; of a
    folder its tars. Raises ValueError where nothing is found.
    """
    pattern = os.fspath(path)
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "*.tar")
    elif os.path.exists(pattern):
        return [pattern]
    found: list[str] = []
    for each in _braces(pattern):
        if not glob.has_magic(each):
            found.append(each)
            continue
        if not (paths := sorted(_glob(each))):
            raise ValueError(f"{each}: no such file")
        found += paths
    return found


def _braces(pattern: str) -> list[str]:
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    words = braces[1].split(",")
    if numbers := _RANGE.fullmatch(braces[1]):
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") else 0
        words = [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
    if (len(words) < 2 and not numbers) or not words:
        raise ValueError(f"{pattern}: expected {{00000..00099}}, from the lower to the higher, or {{a,b}} in braces")
    return [path for word in words for path in _braces(pattern[: braces.start()] + word + pattern[braces.end() :])]


def _glob(pattern: str) -> Iterable[str]:
    if not is_url(pattern):
        return glob.glob(pattern)
    import fsspec

    system, inner = fsspec.url_to_fs(pattern)
    return (system.unstrip_protocol(path) for path in system.glob(inner))


def read_archive(path: str | os.PathLike[str]) -> list[Record]:
    """The samples of one tar that have a video, in the order of the tar.

    The key is the "key" of KEY.json where that has one, else KEY. Raises DamagedArchive for a tar that is not whole,
    ValueError naming tar and member for what is in it but not as expected.
    """
    name = os.fspath(path)
    samples: dict[str, _Sample] = {}
    with open_binary(name) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        last, damage = _read_samples(name, file, size, samples)
    if damage is not None:  # of the last sample nobody knows what else belongs to it
        samples.pop(last, None)
    records: list[Record] = []
    keys: set[str] = set()
    for key, sample in samples.items():
        if sample.video is None:
            continue
        record = _record(name, writable(key), sample)
        if record.key in keys:
            raise ValueError(f"{name}: two samples have the key {record.key!r}: expected one")
        keys.add(record.key)
        records.append(record)
    if damage is not None:
        raise DamagedArchive(name, *damage, records)
    return records


def _read_samples(
    path: str, file: IO[bytes], size: int, samples: dict[str, _Sample]
) -> tuple[str, tuple[int, str] | None]:
    """Fills `samples` by key; returns the key of the last member and where the tar is damaged, if it is, and how."""
    key = ""
    try:
        tar = tarfile.TarFile(fileobj=file)
    except tarfile.ReadError as error:
        return key, (0, f"no tar, or a compressed one ({error})")
    try:
        for member in tar:
            if not member.isreg():
                continue
            folder, slash, base = member.name.removeprefix("./").rpartition("/")
            stem, _, suffix = base.partition(".")
            if not stem:  # a hidden file
                continue
            key = folder + slash + stem
            if member.offset_data + member.size > size:
                return key, (size, f"the file ends within {member.name}")
            sample = samples.setdefault(key, _Sample())
            _take(path, tar, member, suffix.lower(), sample)
    except tarfile.ReadError as error:
        return key, (tar.offset, str(error))
    # To tarfile a tar ends at whatever is no header.
    file.seek(tar.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return key, (size, "the file ends without the mark of a tar's end")
    if block.strip(b"\0"):
        return key, (tar.offset, "no header of a member")
    offset = tar.offset + tarfile.BLOCKSIZE
    while block := file.read(_END_BYTES):  # zeros, as many as the writer's records want
        if data := block.lstrip(b"\0"):
            offset += len(block) - len(data)
            return key, (offset, "more data behind the mark of the end (tars joined together?)")
        offset += len(block)
    return key, None


def _take(path: str, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, sample: _Sample) -> None:
    def content() -> str:
        file = tar.extractfile(member)
        assert file is not None
        return file.read().decode("utf-8")

    if "." + suffix.rpartition(".")[2] in VIDEO_SUFFIXES:
        if sample.video is not None:
            raise ValueError(f"{path}: {sample.video} and {member.name} are of one key: expected one video for each")
        sample.video = member.name
        sample.byte_range = (member.offset_data, member.size)
    elif suffix == "txt":
        try:
            sample.text = content().strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: {member.name}: expected UTF-8: {error}") from error
    elif suffix == "json":
        try:
            sample.fields = parse_object(content())
        except ValueError as error:
            raise ValueError(f"{path}: {member.name}: {error}") from error


def _record(path: str, key: str, sample: _Sample) -> Record:
    fields = dict(sample.fields)
    caption = fields.pop("caption", None)
    texts = [text for text in (sample.text, caption) if isinstance(text, str) and text]
    place = {"video": f"tar://{sample.video}::{path}", "byte_range": list(sample.byte_range)}
    if fields.get("start_seconds", 0.0) is None:
        fields["start_seconds"] = 0.0

    def parse(fields: Mapping[str, Any]) -> Record:
        told = {"key": fields.get("key") or key, "captions": fields.get("captions") or list(dict.fromkeys(texts))}
        return parse_record({**fields, **told, **place}, "")

    try:
        return parse(fields)
    except ValueError:  # JSON of others, with a name of ours for something else
        good: dict[str, Any] = {}
        foreign: dict[str, Any] = {}
        for name in sorted(fields, reverse=True):  # start_seconds before end_seconds, which it bounds
            try:
                parse(good | {name: fields[name]})
            except ValueError:
                foreign[name] = fields[name]
            else:
                good[name] = fields[name]
        return parse(good | {"foreign": foreign})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """What becomes members of a tar: KEY.suffix, KEY.txt where there is a text, KEY.json where there are fields."""

    key: str
    video: bytes | str | os.PathLike[str]  # bytes, or the path of a file to copy
    suffix: str = "mp4"
    text: str | None = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.key or "." in self.key.rpartition("/")[2] or self.key.startswith(("/", "./")):
            raise ValueError(f"key {self.key!r}: expected one without a dot in its last part, which would end it")
        if "." + self.suffix not in VIDEO_SUFFIXES:
            raise ValueError(f"suffix {self.suffix!r}: expected one of {_SUFFIXES}, without the dot")


def write_archive(path: str | os.PathLike[str], samples: Iterable[Sample]) -> None:
    """Writes a tar of `samples`, whole or not at all; the same samples give the same bytes.

    Raises ValueError where two samples have one key.
    """
    target = Path(path)
    keys: set[str] = set()
    with whole_file(target) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for sample in samples:
            if sample.key in keys:
                raise ValueError(f"{target}: two samples have the key {sample.key!r}: expected one")
            keys.add(sample.key)
            _add_sample(tar, sample)


def _add_sample(tar: tarfile.TarFile, sample: Sample) -> None:
    def add(suffix: str, file: IO[bytes], size: int) -> None:
        member = tarfile.TarInfo(f"{sample.key}.{suffix}")
        member.size = size
        tar.addfile(member, file)

    if isinstance(sample.video, bytes):
        add(sample.suffix, io.BytesIO(sample.video), len(sample.video))
    else:
        with open(sample.video, "rb") as file:
            add(sample.suffix, file, os.fstat(file.fileno()).st_size)
    texts = {"txt": sample.text, "json": json.dumps(dict(sample.fields), ensure_ascii=False) if sample.fields else None}
    for suffix, text in texts.items():
        if text is not None:
            data = text.encode("utf-8")
            add(suffix, io.BytesIO(data), len(data))
