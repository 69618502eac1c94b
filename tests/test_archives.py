"""WebDataset tars: what is read of them, in place; damaged ones; patterns; writing."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest

from pyvdl.__main__ import main
from pyvdl.archives import DamagedArchive, Sample, expand, read_archive, read_records, write_archive
from pyvdl.data import Record, read_manifest, write_manifest
from pyvdl.sources import FileSlice, absolute


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """A tar as others write it."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def content(record: Record) -> bytes:
    assert isinstance(record.source, FileSlice)
    data = Path(record.source.path).read_bytes()
    return data[record.source.offset : record.source.offset + record.source.length]


def video(level: int) -> bytes:
    """Ten grey frames of 32 x 32 at this level."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8), "rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def test_samples_of_a_tar_become_records(tmp_path: Path) -> None:
    """Members of video2dataset, other video suffixes, a long name, folders, and what is not ours."""
    fields = {"key": "00000_1", "caption": "a dog", "status": "success", "yt_meta_dict": {"info": {"fps": 30}}}
    members = [
        ("00000_0.mp4", b"0" * 700),
        ("00000_0.txt", b" a cat\n"),
        ("00000_0.json", json.dumps({"caption": "a cat", "url": "u"}).encode()),
        ("00000_1.json", json.dumps(fields).encode()),
        ("00000_1.webm", b"1" * 512),
        ("00000_1.m4a", b"sound"),
        ("00000_2.json", b'{"status": "failed_to_download"}'),
        ("./deep/" + "n" * 150 + ".seg.MKV", b"2"),
        (".DS_Store", b"no"),
        ("3.mp4", b"3"),
        ("3.json", b'{"key": "clips/3.b", "captions": ["x", "y"], "label": "runs", "caption": "not this"}'),
    ]
    path = write_tar(tmp_path / "00000.tar", members)
    records = read_archive(path)
    assert [record.key for record in records] == ["00000_0", "00000_1", "deep/" + "n" * 150, "clips/3.b"]
    assert [content(record) for record in records] == [b"0" * 700, b"1" * 512, b"2", b"3"]
    assert [record.captions for record in records] == [("a cat",), ("a dog",), (), ("x", "y")]
    assert records[0].video == f"tar://00000_0.mp4::{path}"
    assert records[0].extra == {"url": "u"}
    assert records[1].extra == {"status": "success", "yt_meta_dict": {"info": {"fps": 30}}}
    assert records[3].label == "runs"
    for record in records[:2]:
        with fsspec.open(record.video, "rb") as file:  # the name is one that fsspec knows
            assert file.read() == content(record)


def test_a_manifest_keeps_where_members_are(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("x.mp4", b"abc"), ("x.txt", b"text")])
    records = read_archive(tmp_path / "a.tar")
    write_manifest(tmp_path / "m.jsonl", records)
    line = json.loads((tmp_path / "m.jsonl").read_text())
    assert line == {"key": "x", "video": "tar://x.mp4::a.tar", "byte_range": [512, 3], "captions": ["text"]}
    assert read_manifest(tmp_path / "m.jsonl") == records
    (tmp_path / "bad.jsonl").write_text('{"key": "x", "video": "a.tar", "byte_range": [5]}\n')
    with pytest.raises(ValueError, match=r"byte_range is \[5\]: expected an offset and a length"):
        read_manifest(tmp_path / "bad.jsonl")


def test_a_member_has_one_absolute_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("tar://x.mp4::a/../b.tar") == f"tar://x.mp4::{tmp_path / 'b.tar'}"
    assert absolute("tar://x.mp4::s3://bucket/b.tar") == "tar://x.mp4::s3://bucket/b.tar"


def test_a_remote_tar_is_read_by_ranges() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(member := tarfile.TarInfo("x.mp4"))
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    with fsspec.open("memory://bucket/y.tar", "wb") as target:
        target.write(file.getvalue()[512:])
    (record,) = read_records("memory://bucket/*.tar")
    assert record.source == FileSlice("memory:///bucket/y.tar", 512, 3)


WHOLE = [("a.mp4", b"a" * 600), ("a.txt", b"first"), ("b.mp4", b"b" * 600), ("b.txt", b"second"), ("c.mp4", b"c" * 600)]
HEADERS = [0, 1536, 2560, 4096, 5120]  # where the headers of those members begin


@pytest.mark.parametrize(
    ("length", "offset", "why", "keys"),
    [
        (HEADERS[4] + 700, HEADERS[4] + 700, "the file ends within c.mp4", "ab"),
        (HEADERS[4] + 100, HEADERS[4] + 100, "the file ends without the mark", "a"),  # does b go on there?
        (HEADERS[4], HEADERS[4], "the file ends without the mark", "a"),
        (HEADERS[3] + 512 + 2, HEADERS[3] + 514, "the file ends within b.txt", "a"),
        (HEADERS[1] - 1, HEADERS[1], "unexpected end of data", ""),
        (100, 0, "no tar, or a compressed one", ""),
        (0, 0, "no tar, or a compressed one", ""),
    ],
)
def test_a_truncated_tar_tells_where_it_ends(length: int, offset: int, why: str, keys: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", WHOLE)
    path.write_bytes(path.read_bytes()[:length])
    message = rf"x\.tar: {why}.* at byte {offset}; {len(keys)} samples before it are whole"
    with pytest.raises(DamagedArchive, match=message) as caught:
        read_archive(path)
    assert [record.key for record in caught.value.records] == list(keys)
    assert caught.value.offset == offset


def test_what_is_no_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", WHOLE)
    data = bytearray(path.read_bytes())
    data[HEADERS[3]] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DamagedArchive, match=f"no header of a member at byte {HEADERS[3]}; 1 samples") as caught:
        read_archive(path)
    assert [record.key for record in caught.value.records] == ["a"]


def test_tars_joined_together_are_not_taken_for_the_first(tmp_path: Path) -> None:
    first, second = (write_tar(tmp_path / f"{name}.tar", [(f"{name}.mp4", b"x")]) for name in "ab")
    with pytest.raises(DamagedArchive, match=r"more data behind the mark of the end .* at byte 10240; 0 samples"):
        read_archive(write_bytes(tmp_path / "ab.tar", first.read_bytes() + second.read_bytes()))
    padded = write_bytes(tmp_path / "0.tar", first.read_bytes() + bytes(1 << 17))
    assert [record.key for record in read_archive(padded)] == ["a"]
    with pytest.raises(DamagedArchive, match=f"the end .* at byte {10240 + (1 << 17) + 1}; 0 samples"):
        read_archive(write_bytes(tmp_path / "1.tar", padded.read_bytes() + b"\0more"))


def test_fields_of_others_with_names_of_ours_end_no_reading(tmp_path: Path) -> None:
    others = {"label": 3, "group": 17, "key": 5, "start_seconds": None, "captions": "one", "caption": "a", "url": "u"}
    times = {"end_seconds": 2, "start_seconds": 1.0, "split": ["train"]}
    names = {"x": others, "y": times, "z": {"start_seconds": None}, "w": {"end_seconds": 2, "start_seconds": 3}}
    members = [(f"{name}.json", json.dumps(fields).encode()) for name, fields in names.items()]
    path = write_tar(tmp_path / "0.tar", [*members, *((f"{name}.mp4", b"v") for name in names)])
    x, y, z, w = read_records(path)
    foreign = {"label": 3, "group": 17, "key": 5, "captions": "one"}
    assert (x.key, x.label, x.group, x.start_seconds, x.captions) == ("x", None, None, 0.0, ("a",))
    assert x.extra == {"url": "u", "foreign": foreign}
    assert (y.start_seconds, y.end_seconds, y.extra) == (1.0, 2.0, {"foreign": {"split": ["train"]}})
    assert (z.key, z.start_seconds, z.extra) == ("z", 0.0, {})
    assert (w.start_seconds, w.end_seconds, w.extra) == (3.0, None, {"foreign": {"end_seconds": 2}})
    write_manifest(tmp_path / "m.jsonl", [x, y, z, w])
    assert read_manifest(tmp_path / "m.jsonl") == [x, y, z, w]


def test_a_tar_is_named_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("x.mp4", b"x")])
    with pytest.raises(ValueError, match=r"\{0,0\}\.tar names .*/0\.tar 2 times: expected each tar once"):
        read_records(tmp_path / "{0,0}.tar")


def test_a_set_goes_on_after_a_damaged_tar_if_one_wants(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("x.mp4", b"x"), ("y.mp4", b"y")])
    write_tar(tmp_path / "1.tar", [("z.mp4", b"z")])
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:1600])
    with pytest.raises(DamagedArchive):
        read_records(tmp_path / "{0..1}.tar")
    told: list[DamagedArchive] = []
    records = read_records(tmp_path, on_damage=told.append)
    assert [record.key for record in records] == ["x", "z"]
    assert [Path(error.path).name for error in told] == ["0.tar"]


def test_a_key_is_unique_in_a_set(tmp_path: Path) -> None:
    for name in ("0.tar", "1.tar"):
        write_tar(tmp_path / name, [("x.mp4", b"x")])
    with pytest.raises(ValueError, match=r"key 'x' is in .*0\.tar and in .*1\.tar"):
        read_records(tmp_path / "*.tar")
    write_tar(tmp_path / "2.tar", [("x.mp4", b"x"), ("x.webm", b"x")])
    with pytest.raises(ValueError, match=r"2\.tar: x\.mp4 and x\.webm are of one key"):
        read_archive(tmp_path / "2.tar")
    write_tar(tmp_path / "3.tar", [("x.mp4", b"x"), ("y.mp4", b"y"), ("y.json", b'{"key": "x"}')])
    with pytest.raises(ValueError, match=r"3\.tar: two samples have the key 'x'"):
        read_archive(tmp_path / "3.tar")


@pytest.mark.parametrize(
    ("member", "data", "message"),
    [
        ("x.json", b"{", "x.json: expected one JSON object"),
        ("x.json", b"[1]", "x.json: expected a JSON object"),
        ("x.txt", b"caf\xe9", "x.txt: expected UTF-8"),
    ],
)
def test_bad_texts_are_named(member: str, data: bytes, message: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("x.mp4", b"x"), (member, data)])
    with pytest.raises(ValueError, match=rf"x\.tar: {message}"):
        read_archive(tmp_path / "x.tar")


def test_patterns(tmp_path: Path) -> None:
    for name in ("00008", "00009", "00010", "x[1]"):
        (tmp_path / f"{name}.tar").touch()

    def names(pattern: str) -> list[str]:
        return [Path(path).stem for path in expand(tmp_path / pattern)]

    assert names("{00008..00010}.tar") == ["00008", "00009", "00010"]
    assert names("{9..11}.tar") == ["9", "10", "11"]
    assert names("{b,a}{1,2}.tar") == ["b1", "b2", "a1", "a2"]
    assert names("000?0.tar") == ["00010"]
    assert names("x[1].tar") == ["x[1]"]
    assert names("") == ["00008", "00009", "00010", "x[1]"]
    with pytest.raises(ValueError, match=r"no\*\.tar: no such file"):
        names("no*.tar")
    for bad in ("{3..1}.tar", "{a}.tar", "{}.tar"):
        with pytest.raises(ValueError, match=r"expected \{00000\.\.00099\}"):
            names(bad)


def test_what_is_written_is_read_and_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "v.bin").write_bytes(b"from a file")
    samples = [
        Sample(key="a", video=b"bytes", text="Ein Bär läuft."),
        Sample(key="dir.x/b", video=tmp_path / "v.bin", suffix="webm", fields={"key": "k.1", "captions": ["c", "d"]}),
    ]
    write_archive(tmp_path / "0.tar", samples)
    first, second = read_archive(tmp_path / "0.tar")
    assert (first.key, first.captions, content(first)) == ("a", ("Ein Bär läuft.",), b"bytes")
    assert (second.key, second.captions, content(second)) == ("k.1", ("c", "d"), b"from a file")
    write_archive(tmp_path / "1.tar", samples)
    assert (tmp_path / "0.tar").read_bytes() == (tmp_path / "1.tar").read_bytes()
    with pytest.raises(FileNotFoundError):
        write_archive(tmp_path / "2.tar", [samples[0], Sample(key="c", video=tmp_path / "none.mp4")])
    with pytest.raises(ValueError, match="two samples have the key 'a'"):
        write_archive(tmp_path / "2.tar", [samples[0], samples[0]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "1.tar", "v.bin"]
    for key in ("", "a.b", "x/a.b", "/a"):
        with pytest.raises(ValueError, match="expected one without a dot"):
            Sample(key=key, video=b"")
    with pytest.raises(ValueError, match="suffix 'txt': expected one of"):
        Sample(key="a", video=b"", suffix="txt")


def test_members_are_decoded_in_place_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyvdl._core", reason="the C++ module is not built")
    import pyvdl

    levels = {"a": 40, "b": 200}
    write_archive(tmp_path / "0.tar", [Sample(key=key, video=video(level), text=key) for key, level in levels.items()])
    records = read_archive(tmp_path / "0.tar")
    for record in records:
        assert abs(pyvdl.VideoDecoder(record.source)[5].mean() - levels[record.key]) < 4
    requests = [pyvdl.ClipRequest(record.source, record.start_seconds) for record in records]
    (batch,) = pyvdl.ClipLoader(requests, batch_size=2, num_frames=2, short_side=32, size=32)
    assert batch.ok.all()
    assert main(["probe", str(tmp_path), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["video"], row["size"]) for row in rows] == [(record.video, "32x32") for record in records]
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[: records[1].source.offset + 9])  # type: ignore[union-attr]
    assert main(["probe", str(tmp_path / "{0..0}.tar")]) == 0
    captured = capsys.readouterr()
    assert "left out of the data:" in captured.err
    assert "the file ends within b.mp4" in captured.err
    assert "b.mp4" not in captured.out
