"""Clips kept as an array: zarr3 through TensorStore, written a shard at a time, read by row in place of decoding.

A row is named `array://ROW::PATH`, as fsspec names members of archives. Rows are uint8[T, H, W, 3] without compression:
frames of real videos do not get smaller, and reading one is two reads of a file.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyvdl.config import ClipConfig
from pyvdl.sources import absolute, is_row, is_url
from pyvdl.video import ClipBatch, ClipLoader, ClipRequest

if TYPE_CHECKING:
    import tensorstore

    from pyvdl.data import Record

_ROW = re.compile(r"array://(\d+)::(.+)", re.DOTALL)


def row_name(path: str | os.PathLike[str], row: int) -> str:
    """How a record names its clip."""
    return f"array://{row}::{os.fspath(path)}"


def create(path: str | os.PathLike[str], rows: int, shape: tuple[int, ...], shard: int) -> tensorstore.TensorStore:
    """An array uint8[rows, *shape] at `path`, made unless it is there; `shard` rows are one file, written at once."""
    chunk = [1, *shape]
    inner = {"chunk_shape": chunk, "codecs": [{"name": "bytes"}]}
    inner["index_codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    metadata = {
        "shape": [rows, *shape],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard, *shape]}},
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
        "fill_value": 0,
    }
    return _open(path, {"metadata": metadata}, create=True)


def _open(path: str | os.PathLike[str], more: dict[str, Any], **options: Any) -> tensorstore.TensorStore:
    import tensorstore

    place = os.fspath(path)
    kvstore = place if is_url(place) else {"driver": "file", "path": absolute(place)}
    # What was never written is an error, and black frames are written as any others.
    spec = {"driver": "zarr3", "fill_missing_data_reads": False, "store_data_equal_to_fill_value": True}
    return tensorstore.open(spec | {"kvstore": kvstore} | more, open=True, **options).result()


def clip_loader(
    records: Sequence[Record],
    requests: Iterable[ClipRequest],
    clip: ClipConfig,
    *,
    batch_size: int,
    num_threads: int,
    prefetch: int,
) -> ClipLoader | ArrayLoader:
    """What gives the clips of `requests`: decodes them, or reads them where `records` are rows of arrays.

    Rows are taken as they are: of `clip` only the shape counts then. Raises ValueError for records of both kinds.
    """
    kinds = {is_row(record.video) for record in records}
    if len(kinds) > 1:
        raise ValueError("some records are rows of an array and some are videos: expected all of one kind")
    options: dict[str, Any] = {"batch_size": batch_size, "num_threads": num_threads, "prefetch": prefetch}
    if kinds == {True}:
        return ArrayLoader(requests, shape=(clip.num_frames, clip.size, clip.size, 3), **options)
    return ClipLoader(requests, **options, **dataclasses.asdict(clip))


class ArrayLoader(Iterator[ClipBatch]):
    """Reads rows of arrays as `pyvdl.ClipLoader` decodes clips: in batches, in the order of `requests`, ahead.

    requests: their sources are names of rows; times and seeds are of no account, the clip is there already.
    shape: (T, H, W, 3) that each row must have; ValueError names an array of another.
    num_threads, prefetch: reads at a time, and batches read ahead of the one in hand.

    A row that cannot be read is zeros with ok False and its error text.
    """

    def __init__(
        self,
        requests: Iterable[ClipRequest],
        *,
        batch_size: int,
        num_threads: int,
        prefetch: int,
        shape: tuple[int, ...],
    ) -> None:
        import tensorstore

        self._requests = enumerate(requests)
        self._batch_size, self._prefetch, self._shape = batch_size, prefetch, shape
        limit = {"limit": num_threads}
        self._context = tensorstore.Context({"file_io_concurrency": limit, "data_copy_concurrency": limit})
        self._arrays: dict[str, Any] = {}
        self._pending: deque[list[tuple[int, Any]]] = deque()

    def __next__(self) -> ClipBatch:
        while len(self._pending) <= self._prefetch and (batch := list(self._begin())):
            self._pending.append(batch)
        if not self._pending:
            raise StopIteration
        reads = self._pending.popleft()
        data = np.zeros((len(reads), *self._shape), np.uint8)
        errors: list[str | None] = [None] * len(reads)
        for i, (_, read) in enumerate(reads):
            try:
                data[i] = read.result()
            except (ValueError, IndexError, OSError) as error:
                errors[i] = f"read: {error}"
        data.flags.writeable = False
        ok = np.array([error is None for error in errors])
        return ClipBatch(data=data, ok=ok, errors=errors, index=np.array([number for number, _ in reads], np.int64))

    def close(self) -> None:
        """Forgets what is read ahead."""
        self._pending.clear()
        self._requests = enumerate(())

    def _begin(self) -> Iterator[tuple[int, Any]]:
        """Starts the reads of one batch: number of the request, and a future of its row."""
        for number, request in itertools.islice(self._requests, self._batch_size):
            name = _ROW.fullmatch(str(request.source))
            if name is None:
                raise ValueError(f"{request.source!r} is no row of an array: expected array://ROW::PATH")
            yield number, self._array(name[2])[int(name[1])].read()

    def _array(self, path: str) -> Any:
        if path not in self._arrays:
            found = _open(path, {}, context=self._context)
            if tuple(found.shape[1:]) != self._shape:
                raise ValueError(
                    f"{path} has clips of {tuple(found.shape[1:])}; {self._shape} are asked for: prepare them with "
                    f"--set num_frames={self._shape[0]} --set size={self._shape[1]} and a short_side that goes with it"
                )
            self._arrays[path] = found
        return self._arrays[path]
