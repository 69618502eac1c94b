"""Clips listed by manifests, tars, folders and patterns: streamed, on disks and elsewhere."""

from __future__ import annotations

import json
import os
import uuid
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from pyvdl.archives import DamagedArchive, Sample, write_archive
from pyvdl.data import Record
from pyvdl.jobs import open_job
from pyvdl.manifests import Input
from pyvdl.shots import Shots
from pyvdl.storage import Folder
from tests.clips import write_clip

ROWS: list[dict[str, Any]] = [
    {"key": "a", "video": "a.mp4", "start_seconds": 1.0, "end_seconds": 2.5, "alt_text": "first", "source": "web"},
    {"video": "sub/b.mp4", "source": "web"},
    {"video": "/x/c.mp4", "start_seconds": 2.0},
    {"key": "d", "video": "https://host/d.mp4"},
]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    if path.suffix == ".parquet":
        names = list(dict.fromkeys(name for row in rows for name in row))
        pyarrow.parquet.write_table(pyarrow.table({n: [row.get(n) for row in rows] for n in names}), path)
    elif path.suffix == ".csv":
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines = [",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def wanted(folder: str) -> list[Record]:
    web: dict[str, Any] = {"source": "web"}
    return [
        Record(key="a", video=f"{folder}/a.mp4", start_seconds=1.0, end_seconds=2.5, alt_text="first", extra=web),
        Record(key="sub/b.mp4", video=f"{folder}/sub/b.mp4", extra=web),
        Record(key="/x/c.mp4#2.0", video="/x/c.mp4", start_seconds=2.0),
        Record(key="d", video="https://host/d.mp4"),
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_manifests_of_every_kind_list_the_same_clips(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"clips{suffix}")
    assert list(Input([path])) == wanted(str(tmp_path))
    root = f"memory://{uuid.uuid4().hex}"
    with fsspec.open(f"{root}/clips{suffix}", "wb") as file:
        file.write(path.read_bytes())
    assert list(Input([f"{root}/clips{suffix}"])) == wanted(root)
    assert list(Input([f"{root}/*{suffix}"])) == wanted(root.replace("memory://", "memory:///"))


def test_a_table_by_excel_has_a_mark_before_its_first_column(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("video,views\n/x/é.mp4,3\n", encoding="utf-8-sig")
    assert list(Input([tmp_path / "m.csv"])) == [Record(key="/x/é.mp4", video="/x/é.mp4", extra={"views": "3"})]


def test_columns_that_json_has_no_kind_for_are_carried_as_text(tmp_path: Path) -> None:
    when, price = datetime(2026, 1, 2, 3), Decimal("1.50")
    rows = [{"video": "/x/a.mp4", "when": when, "price": price, "seen": {"first": [when.date()]}, "bytes": None}]
    wanted = {"when": "2026-01-02T03:00:00", "price": "1.50", "seen": {"first": ["2026-01-02"]}}
    path = write(tmp_path / "m.parquet", rows)
    (record,) = Input([path])
    assert record.extra == wanted
    job = open_job(Folder(tmp_path / "job"), {}, Input([path]), shard_size=1, format="parquet")
    assert job.columns == {"when": "string", "price": "string", "seen": "json"}
    assert job.work(0)[0].extra == wanted
    write(path, [*rows, {"video": "/x/b.mp4", "bytes": b"picture"}])
    with pytest.raises(ValueError, match=r"m\.parquet:2: bytes holds bytes, which are not carried along: leave"):
        list(Input([path]))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.jsonl", '{"video": "a.mp4"}\n{"key": "a", "video": 3}\n', r"m\.jsonl:2: video is 3: expected a string"),
        ("m.jsonl", "\nnonsense\n", r"m\.jsonl:2: expected one JSON object"),
        ("m.csv", "video,start_seconds\na.mp4,soon\n", r"m\.csv:2: start_seconds is 'soon': expected a number"),
        ("m.csv", "video,key\na.mp4\n", r"m\.csv:2: expected as many fields"),
        ("m.csv", "path\na.mp4\n", r"m\.csv:2: 'video' is missing"),
        ("m.csv", "video,key,key\na.mp4,1,2\n", r"m\.csv: 2 columns are called 'key': give each a name of its own"),
        ("m.csv", ",video\n0,a.mp4\n", r"m\.csv: 1 columns are called '': give each a name"),
        ("m.parquet", "no", r"m\.parquet is no Parquet file"),
    ],
)
def test_what_is_wrong_in_a_manifest_is_told_with_its_place(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        list(Input([tmp_path / name]))


def test_folders_patterns_and_videos(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.MKV", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    both = [str(tmp_path / "a.MKV"), str(tmp_path / "b.mp4")]
    assert [record.video for record in Input([tmp_path])] == both
    assert [record.video for record in Input([f"{tmp_path}/*.[mM]*", "v.mp4"])] == [*both, "v.mp4"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no video and no tar in this folder"):
        Input([tmp_path / "empty"])
    with pytest.raises(ValueError, match="no such file"):
        Input([f"{tmp_path}/*.avi"])
    with pytest.raises(ValueError, match="vidoes: no such file or folder"):
        Input([tmp_path / "vidoes"])
    root = f"memory://{uuid.uuid4().hex}"
    for name in ("b.mp4", "notes.txt"):
        fsspec.open(f"{root}/{name}", "wb").open().close()
    assert [record.video for record in Input([root])] == [f"{root.replace('://', ':///')}/b.mp4"]


def test_tars_are_read_and_damaged_ones_told(tmp_path: Path) -> None:
    for name in ("00000", "00001"):
        samples = [Sample(key=f"{name}-{i}", video=b"v" * 700, text=f"text {i}") for i in range(3)]
        write_archive(tmp_path / f"{name}.tar", samples)
    found = list(Input([tmp_path / "{00000..00001}.tar"]))
    assert [record.key for record in found] == [f"{tar}-{i}" for tar in ("00000", "00001") for i in range(3)]
    os.truncate(tmp_path / "00000.tar", 4000)
    with pytest.raises(ValueError, match=r"00000\.tar"):
        list(Input([tmp_path]))
    told: list[DamagedArchive] = []
    assert [record.key for record in Input([tmp_path], told.append)] == ["00000-0", *(f"00001-{i}" for i in range(3))]
    assert [Path(error.path).name for error in told] == ["00000.tar"]


def test_a_digest_stands_for_the_clips(tmp_path: Path) -> None:
    write_archive(tmp_path / "t.tar", [Sample(key="a", video=b"v")])
    paths: list[str | Path] = [write(tmp_path / "m.jsonl"), tmp_path / "t.tar", "v.mp4"]
    first = Input(paths).sha256()
    assert first == Input(paths).sha256()
    assert first != Input(paths[::-1]).sha256()
    write(tmp_path / "m.jsonl", ROWS[:2])
    second = Input(paths).sha256()
    os.utime(tmp_path / "t.tar", (1, 1))
    assert len({first, second, Input(paths).sha256()}) == 3


def test_long_clips_are_cut_into_windows(tmp_path: Path) -> None:
    write_clip(tmp_path / "v.mp4", num_frames=60)  # 2.5 s
    (tmp_path / "bad.mp4").write_bytes(b"bad")
    rows: list[dict[str, Any]] = [
        {"key": "v", "video": "v.mp4", "start_seconds": 0.25, "views": 3},
        {"key": "bad", "video": "bad.mp4"},
        {"key": "known", "video": "bad.mp4", "start_seconds": 1.0, "end_seconds": 3.8},
        {"key": "short", "video": "v.mp4", "end_seconds": 0.1},
    ]
    found = list(Input([write(tmp_path / "m.jsonl", rows)], window_seconds=1.0))
    assert [(r.key, r.start_seconds, r.end_seconds) for r in found] == [
        ("v#0000", 0.25, 1.25),
        ("v#0001", 1.25, 2.5),  # a quarter of a window is left over
        ("bad", 0.0, None),
        ("known#0000", 1.0, 2.0),
        ("known#0001", 2.0, 3.0),
        ("known#0002", 3.0, 3.8),
        ("short#0000", 0.0, 0.1),
    ]
    assert found[1].extra == {"views": 3}
    assert [record.group for record in found[:3]] == ["v", "v", None]
    cut: list[dict[str, Any]] = [{}, {"window_seconds": 1.0}, {"shots": Shots()}, {"shots": Shots(min_seconds=2.0)}]
    assert len({Input([tmp_path / "m.jsonl"], **options).sha256() for options in cut}) == 4
