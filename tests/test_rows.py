"""Rows of captions: text and Parquet, carried columns, folders of shards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from pyvdl.rows import (
    CaptionRow,
    Counts,
    Dropped,
    Format,
    captions_by_key,
    count_shard,
    encode_shard,
    read_captions,
    shard_name,
    widened,
)
from pyvdl.storage import Folder


def row(key: str, **changes: Any) -> CaptionRow:
    fields: dict[str, Any] = dict(
        key=key, video="v.mp4", start_seconds=0.0, end_seconds=None, captions=["a ball"], log_probs=[-1.0]
    )
    rest: dict[str, Any] = dict(prompt="p", status="ok", error=None, seed=1)
    return CaptionRow(**(fields | rest | changes))


def failed(key: str, error: str) -> CaptionRow:
    return row(key, status="failed", error=error, captions=[], log_probs=[])


def test_rows_survive_json() -> None:
    made = row("ключ", captions=["un caffè"], end_seconds=2.5, extra={"views": 3})
    assert CaptionRow.from_json(made.to_json()) == made
    with pytest.raises(ValueError, match="expected captions, end_seconds"):
        CaptionRow.from_json('{"key": "a"}')


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_rows_survive_files(format: Format, tmp_path: Path) -> None:
    extra = {"views": 3, "tags": ["x", "y"], "box": {"left": 0.5}, "title": "é", "share": 1.5, "safe": True}
    rows = [row("a", extra=extra, recipe_sha256="r", model_sha256="m"), failed("b", "open: no such file")]
    columns = {name: widened(None, value) for name, value in extra.items()}
    (tmp_path / "rows").write_bytes(encode_shard(rows, format, {n: k for n, k in columns.items() if k}))
    found = list(read_captions(tmp_path / "rows"))
    assert found[0] == rows[0]
    assert found[1].error == rows[1].error
    assert {value for value in found[1].extra.values()} <= {None}


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_what_utf8_cannot_say_is_written_otherwise(format: Format, tmp_path: Path) -> None:
    """Names of files that are not UTF-8, and half pairs of surrogates."""
    odd = {"title": "caf\udce9", "tags": ["x", "\ud83d"], "box": {"\udcff": ["\udcff"]}}
    rows = [row("\udcff.mp4", video="/v/\udcff.mp4", extra=odd)]
    (tmp_path / "rows").write_bytes(encode_shard(rows, format, {"title": "string", "tags": "strings", "box": "json"}))
    (found,) = read_captions(tmp_path / "rows")
    assert (found.key, found.video) == (r"\udcff.mp4", r"/v/\udcff.mp4")
    assert found.extra == {"title": r"caf\udce9", "tags": ["x", r"\ud83d"], "box": {r"\udcff": [r"\udcff"]}}


@pytest.mark.parametrize("ids", [[(1 << 60) + 1, 1.5, 2], [(1 << 60) + 1, 1, None]])
def test_large_numbers_stay_what_they_are(ids: list[Any], tmp_path: Path) -> None:
    kind = None
    for value in ids:
        kind = widened(kind, value)
    assert kind is not None
    rows = [row(str(i), extra={"id": value}) for i, value in enumerate(ids)]
    (tmp_path / "rows").write_bytes(encode_shard(rows, "parquet", {"id": kind}))
    assert [found.extra["id"] for found in read_captions(tmp_path / "rows")] == ids


def test_files_of_a_job_have_one_schema_and_count_their_failures(tmp_path: Path) -> None:
    columns: Any = {"views": "int", "box": "json"}
    gone: Dropped = {"caption": "a a", "log_prob": -1.0, "clip_score": None, "reason": "keep_best"}
    dropped: Any = {"captions": [], "log_probs": [], "dropped": [gone]}
    first, second = [failed("a", "open: gone")], [row("b", extra={"views": 1, "box": [1, {}]}, **dropped)]
    for number, rows in enumerate((first, second)):
        (tmp_path / shard_name(number, 2, "parquet")).write_bytes(encode_shard(rows, "parquet", columns))
    schemas = [pyarrow.parquet.read_schema(path) for path in sorted(tmp_path.iterdir())]
    assert schemas[0].equals(schemas[1])
    assert schemas[0].names == [*CaptionRow.names(), "views", "box"]
    counts = Counts()
    for number in range(2):
        counts += count_shard(Folder(tmp_path), shard_name(number, 2, "parquet"))
    assert counts == Counts(2, Counter({"open": 1}), Counter({"keep_best": 1}), 1)
    assert [found.extra for found in read_captions(tmp_path)][1] == {"views": 1, "box": [1, {}]}


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([None, 1, 2], "int"),
        ([1, 0.5], "float"),
        ([True, False], "bool"),
        ([True, 1], "json"),
        (["a", None], "string"),
        ([["a"], []], "strings"),
        ([[1]], "json"),
        ([1 << 70], "json"),
        ([1 << 60, None, 1], "long"),
        ([1, 1 << 60], "long"),
        ([1 << 60, 1.5, 2], "json"),  # a float would be another number
        ([1 << 53, 1.5], "float"),
        (["a", 1], "json"),
        ([None], None),
    ],
)
def test_a_carried_column_is_as_wide_as_its_values_need(values: list[Any], kind: str | None) -> None:
    found = None
    for value in values:
        found = widened(found, value)
    assert found == kind


def test_a_broken_row_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for broken in (b"{broken", b"caf\xe9"):
        path.write_bytes(row("a").to_json().encode() + b"\n" + broken + b"\n")
        with pytest.raises(ValueError, match=r"rows\.jsonl, line 2"):
            list(read_captions(path))
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"rows\.jsonl is no Parquet file"):
        list(read_captions(path))


def test_a_folder_that_lacks_shards_is_no_whole_job(tmp_path: Path) -> None:
    for number in (0, 2):
        (tmp_path / shard_name(number, 3, "jsonl")).write_bytes(encode_shard([row(str(number))], "jsonl", {}))
    with pytest.raises(ValueError, match="holds 2 caption shards, no whole job"):
        list(read_captions(tmp_path))
    (tmp_path / shard_name(1, 2, "jsonl")).write_bytes(encode_shard([row("1")], "jsonl", {}))  # of another job
    with pytest.raises(ValueError, match="holds 3 caption shards, no whole job"):
        list(read_captions(tmp_path))


def test_shards_are_read_in_their_order(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / shard_name(number, 12, "jsonl")).write_bytes(encode_shard([row(str(number))], "jsonl", {}))
    assert [found.key for found in read_captions(tmp_path)] == list(map(str, range(12)))


def test_a_key_with_two_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' has more than one row"):
        captions_by_key([row("a"), row("a")])
    assert captions_by_key([row("a"), failed("b", "open: gone")]) == {"a": ("a ball",)}
