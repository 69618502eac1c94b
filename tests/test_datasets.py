"""Readers of data sets, on small files in the published shapes; what is wrong in them is told with its place."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pyvdl.__main__ import DATASETS, main
from pyvdl.data import Record, read_manifest, write_manifest
from pyvdl.datasets import READERS, Survey, read
from pyvdl.datasets.files import Names, split_of
from tests.dataset_shapes import (
    ANET,
    ANET_A,
    ANET_Q,
    INTERNVID,
    KINETICS,
    MSRVTT,
    MSRVTT_QA,
    NEXT_MC,
    NEXT_OE,
    SHAPES,
    UCF,
    VATEX,
    VIDLN,
    WEBVID,
)


def lay(folder: Path, files: Mapping[str, Any]) -> list[Path]:
    """Writes texts as they are and everything else as JSON, JSONL by the name; the paths in their order."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jsonl") and not isinstance(content, str):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8", newline="")
    return [folder / name for name in dict.fromkeys(Path(name).parts[0] for name in files)]


def records(name: str, folder: Path, files: Mapping[str, Any], **options: Any) -> list[Record]:
    return list(read(name, lay(folder, files), "videos", **options))


@pytest.mark.parametrize("name", READERS)
def test_published_shapes_become_records_and_a_manifest(name: str, tmp_path: Path) -> None:
    files, wanted = SHAPES[name]
    found = records(name, tmp_path / "annotations", files)
    assert found == wanted
    write_manifest(tmp_path / "m.jsonl", found)
    again = [Path(record.video).resolve() for record in read_manifest(tmp_path / "m.jsonl")]
    assert again == [Path(record.video).resolve() for record in wanted]
    write_manifest(tmp_path / "again.jsonl", read_manifest(tmp_path / "m.jsonl"))
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "m.jsonl").read_bytes()


def changed(value: Any, path: Sequence[Any], new: Any) -> Any:
    """A copy with the value at the path replaced; None takes it away."""
    copy = json.loads(json.dumps(value))
    place = copy
    for step in path[:-1]:
        place = place[step]
    if new is None:
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return copy


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("msrvtt", {"a.json": json.dumps(MSRVTT)[:-30]}, r"a\.json:1: expected whole JSON: .* column \d+"),
    ("msrvtt", {"a.json": []}, r"a\.json: \$: found \[\]: expected an object"),
    ("msrvtt", {"a.json": {"videos": []}}, r"a\.json: \$: sentences is missing: expected a list of objects"),
    (
        "msrvtt",
        {"a.json": changed(MSRVTT, ("videos", 1, "video_id"), 6513)},
        r"\$\.videos\[1\]: video_id is 6513: expected a string that is not blank",
    ),
    ("msrvtt", {"a.json": changed(MSRVTT, ("videos", 0), "x")}, r"\$\.videos\[0\]: found 'x': expected an object"),
    (
        "msrvtt",
        {"a.json": changed(MSRVTT, ("sentences", 2, "video_id"), "video9")},
        r"\$\.sentences\[2\]: video_id is 'video9': expected a video of \$\.videos",
    ),
    ("msrvtt", {"a.json": {"videos": [], "sentences": []}}, r"a\.json: no record of msrvtt in it"),
    ("msrvtt-1ka", {"test.csv": "key,video\n"}, r"test\.csv:1: expected the columns video_id: no video_id"),
    ("msrvtt-1ka", {"test.csv": "video_id\nvideo0\n"}, r"test\.csv:2: video_id is 'video0': .*MSRVTT_data\.json too"),
    (
        "msrvtt-1ka",
        {"test.csv": "key,vid_key,video_id,sentence\nret0,msr1,video1,a cat\nret1,ms"},
        r"test\.csv:3: 2 cells: expected 4, key, vid_key, video_id, sentence",
    ),
    ("msrvtt-1ka", {"a.txt": ""}, r"a\.txt: this data set is read from \*\.csv, \*\.json"),
    ("msrvtt-qa", {"a.json": {}}, r"\$: found \{\}: expected a list of objects"),
    (
        "msrvtt-qa",
        {"a.json": changed(MSRVTT_QA, (1, "video_id"), "video7")},
        r"a\.json: \$\[1\]: video_id is 'video7': expected a whole number of 0 or more",
    ),
    ("vatex", {"a.json": changed(VATEX, (1, "videoID"), "abc")}, r"\$\[1\]: videoID is 'abc': expected a YouTube id"),
    ("vatex", {"a.json": changed(VATEX, (0, "enCap", 1), " ")}, r"\$\[0\]: enCap is .*: expected a list of strings"),
    (
        "vatex",
        {"a.json": VATEX, "test_list.txt": "aaaaaaaaaaa_000000_000010\nzzz\n"},
        r"test_list\.txt:2: 'zzz' is in none of the JSON files",
    ),
    (
        "activitynet-captions",
        {"a.json": changed(ANET, ("v_abc", "duration"), 0)},
        r"\$\.v_abc: duration is 0: .*above 0",
    ),
    (
        "activitynet-captions",
        {"a.json": changed(ANET, ("v_abc", "timestamps", 1), [1])},
        r"\$\.v_abc: timestamps\[1\] is \[1\]: expected \[start, end\] in seconds",
    ),
    (
        "activitynet-captions",
        {"a.json": changed(ANET, ("v_abc", "sentences", 0), None)},
        r"\$\.v_abc: sentences is .*: expected as many as timestamps, 3",
    ),
    (
        "activitynet-captions",
        {"a.json": changed(ANET, ("v_abc", "timestamps", 2), [90, 95])},
        r"\$\.v_abc\.timestamps\[2\]: no part of the video is in \[90\.0, 95\.0\], of 82\.73 s",
    ),
    ("activitynet-qa", {"val_q.json": ANET_Q}, r"val_q\.json: \$\[0\]: question_id is 'v_abc_1': .*\*_a\.json"),
    (
        "activitynet-qa",
        {"val_q.json": ANET_Q[:2], "val_a.json": ANET_A},
        r"val_a\.json: \$\[1\]: question_id is 'v_abc_2': expected one that is asked",
    ),
    (
        "activitynet-qa",
        {"val_q.json": ANET_Q, "val_a.json": changed(ANET_A, (0, "type"), 9)},
        r"val_a\.json: \$\[0\]: type is 9: expected 0 to 8",
    ),
    (
        "nextqa-oe",
        {"test.csv": NEXT_OE.replace("CW", "CX")},
        r"test\.csv:3: type is 'CX': expected one of CW, CH, TN",
    ),
    ("nextqa-oe", {"test.csv": NEXT_OE, "more.json": {"22": {"9": "x"}}}, r"more\.json: \$\.22\.9 answers no question"),
    (
        "nextqa-oe",
        {"test.csv": NEXT_OE, "more.json": {"22": {"0": 3}}},
        r"more\.json: \$\.22: 0 is 3: expected a string",
    ),
    ("nextqa-oe", {"test.csv": NEXT_OE, "map.json": {"22": "1/22"}}, r"names '\{vidor\}\.mp4' needs vidor"),
    ("nextqa-mc", {"val.csv": NEXT_MC.replace(",2,8", ",5,8")}, r"val\.csv:2: answer is '5': .*an option, 0 to 4"),
    ("nextqa-mc", {"val.csv": NEXT_OE}, r"val\.csv:1: expected the columns .*: no a0, a1, a2, a3, a4"),
    ("kinetics600", {"a.csv": KINETICS.replace("84", "x")}, r"a\.csv:2: time_start is 'x': expected a whole number"),
    ("kinetics600", {"a.csv": KINETICS.replace("94", "84")}, r"a\.csv:2: time_end is '84': expected above 84"),
    (
        "kinetics600",
        {"a.csv": "label,youtube_id,time_start,time_end\n" + "".join(f"c{i},v,0,10\n" for i in range(601))},
        r"a\.csv:602: label is 'c600': expected one of 600 classes, and this is one more",
    ),
    ("kinetics700", {"a.csv": ""}, r"a\.csv: expected a line of columns, youtube_id, time_start, time_end, found none"),
    ("kinetics700", {"a.csv": KINETICS + 'x,"y'}, r"a\.csv:4: expected comma-separated values: unexpected end of data"),
    ("ucf101", {"trainlist01.txt": UCF["trainlist01.txt"]}, r"0 files are called classInd\.txt: expected one"),
    ("ucf101", UCF | {"classInd.txt": "one\n"}, r"classInd\.txt:1: found 'one': expected the number and name"),
    ("ucf101", UCF | {"trainlist01.txt": "a.avi\n"}, r"trainlist01\.txt:1: found 'a\.avi': expected CLASS/v_CLASS"),
    (
        "ucf101",
        UCF | {"trainlist01.txt": UCF["trainlist01.txt"].replace(" 1", " 2")},
        r"trainlist01\.txt:1: ApplyEyeMakeup 2: expected a class of classInd\.txt and its number",
    ),
    (
        "ucf101",
        UCF | {"testlist02.txt": UCF["testlist01.txt"]},
        r"testlist02\.txt:1: v_HandStandPushups_g01_c02 is in .*testlist01\.txt:1 already: .*one division",
    ),
    ("smit", {"train_set.txt": "a\n"}, r"1 lists, 0 folders: expected lists and one folder of transcriptions"),
    (
        "smit",
        {"train_set.txt": "a\nb\n", "transcriptions/a.txt": "x"},
        r"train_set\.txt:2: the transcription .*b\.txt is not there",
    ),
    ("smit", {"s.txt": "a\n", "transcriptions/a.txt": ""}, r"s\.txt:1: the transcription .*a\.txt is blank"),
    ("vidln", {"a.jsonl": json.dumps(VIDLN) + "\n" + json.dumps(VIDLN)[:99]}, r"a\.jsonl:2: expected one JSON object"),
    (
        "vidln",
        {"a.jsonl": [changed(VIDLN, ("actor_narratives", 0, "keyframe_selection_indices"), [3])]},
        r"a\.jsonl:1\.actor_narratives\[0\]: keyframe_selection_indices is \[3\]: expected indices of the 3",
    ),
    ("vidln", {"a.jsonl": [changed(VIDLN, ("keyframe_names",), None)]}, r"a\.jsonl:1: keyframe_names is missing"),
    ("vidln", {"a.jsonl": [VIDLN | {"actor_narratives": []}]}, r"a\.jsonl:1: actor_narratives is empty"),
    ("videocc", {"a.csv": "aaaaaaaaaa1,1,2\n"}, r"a\.csv:1: 3 cells: expected 4, video, start, end, caption"),
    ("videocc", {"a.csv": "?,1,2,x\n"}, r"a\.csv:1: video is '\?': expected a YouTube id or the address"),
    ("videocc", {"a.csv": "aaaaaaaaaa1,1.5,2,x\n"}, r"a\.csv:1: start is '1\.5': expected a whole number"),
    ("videocc", {"a.csv": "aaaaaaaaaa1,2,2,x\n"}, r"a\.csv:1: no text for 2 to 2 microseconds, or no such time"),
    (
        "internvid",
        {"a.jsonl": [INTERNVID, INTERNVID | {"Start_timestamp": "67.2"}]},
        r"a\.jsonl:2: Start_timestamp is '67\.2': expected a time as HH:MM:SS\.mmm",
    ),
    ("internvid", {"a.jsonl": [INTERNVID | {"Caption": ""}]}, r"a\.jsonl:1: no caption for 00:01:07\.200 to"),
    ("webvid", {"a.csv": WEBVID.replace("006001_006050", "")}, r"a\.csv:2: page_dir is blank"),
    (
        "webvid",
        {"a.csv": "videoid,name\n1,x\n"},
        r"names '\{page_dir\}/\{videoid\}\.mp4' has 'page_dir': .*name, videoid",
    ),
]


@pytest.mark.parametrize(("name", "files", "message"), FAULTS)
def test_wrong_and_half_files_are_told_with_the_place(
    name: str, files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        records(name, tmp_path, files)


def test_what_is_not_utf8_has_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(KINETICS.encode() + b"caf\xe9,v,0,10,val\n")
    with pytest.raises(ValueError, match=r"a\.csv:4: expected UTF-8: .*0xe9"):
        list(read("kinetics600", [tmp_path / "a.csv"], "videos"))
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbf" + KINETICS.encode())  # a byte order mark is none of the columns
    assert len(list(read("kinetics600", [tmp_path / "b.csv"], "videos"))) == 2
    assert len(list(read("kinetics600", [str(tmp_path / "b.csv")], "videos"))) == 2
    with pytest.raises(TypeError, match=r"a list of files, not the one path 'b\.csv'"):
        list(read("kinetics600", "b.csv", "videos"))


def test_what_gives_no_clip_is_told_and_the_rest_read(tmp_path: Path) -> None:
    told: list[str] = []
    anet = changed(ANET, ("v_abc", "timestamps", 1), [5, 5])
    found = records("activitynet-captions", tmp_path, {"train.json": anet}, on_skip=told.append)
    assert [record.key for record in found] == ["v_abc_0", "v_abc_2"]
    assert told == [f"{tmp_path}/train.json: $.v_abc.timestamps[1]: no part of the video is in [5.0, 5.0], of 82.73 s"]


def test_two_annotations_of_a_video_have_keys_of_their_own(tmp_path: Path) -> None:
    found = records("activitynet-captions", tmp_path, {"val_1.json": ANET, "val_2.json": ANET})
    keys = ["v_abc_0", "v_abc_1", "v_abc_2", "val_2_v_abc_0", "val_2_v_abc_1", "val_2_v_abc_2"]
    assert [record.key for record in found] == keys
    assert {record.group for record in found} == {"v_abc"}


def test_a_clip_of_two_classes_is_two_records(tmp_path: Path) -> None:
    found = records("kinetics600", tmp_path, {"a.csv": KINETICS + "dancing,b,0,10,train\n"})
    assert [record.key for record in found[1:]] == ["b_000000_000010", "b_000000_000010#2"]
    write_manifest(tmp_path / "m.jsonl", found)
    with pytest.raises(ValueError, match="two records have the key 'b_000000_000010': expected each"):
        write_manifest(tmp_path / "m.jsonl", [*found, found[1]])
    assert len(read_manifest(tmp_path / "m.jsonl")) == 3


def test_a_list_of_ids_takes_its_clips_of_vatex(tmp_path: Path) -> None:
    files = {"vatex_validation_v1.0.json": VATEX, "test_list.txt": "aaaaaaaaaaa_000000_000010\n"}
    assert [(record.key[:4], record.split) for record in records("vatex", tmp_path, files)] == [("aaaa", "test")]
    files = {"vatex_private_test_without_annotations.json": [{"videoID": "aaaaaaaaaaa_000000_000010"}]}
    private = records("vatex", tmp_path, files)
    assert (private[0].captions, private[0].split) == ((), "test")


def test_a_header_of_videocc_is_left_out(tmp_path: Path) -> None:
    table = "Video URL,Start timestamp (microseconds),End timestamp(microseconds),Caption\naaaaaaaaaa1,0,1000000,x\n"
    assert [record.end_seconds for record in records("videocc", tmp_path, {"a.csv": table})] == [1.0]


def test_a_split_is_asked_for_by_any_of_its_names(tmp_path: Path) -> None:
    files = {"train_val_videodatainfo.json": MSRVTT}
    for split in ("val", "validate", "Validation"):
        assert [record.key for record in records("msrvtt", tmp_path, files, split=split)] == ["video6513"]
    with pytest.raises(ValueError, match=r"videodatainfo\.json: no record of the split 'test': found train, val"):
        records("msrvtt", tmp_path, files, split="test")
    with pytest.raises(ValueError, match="data set 'coco': expected one of smit, vidln"):
        list(read("coco", [], "videos"))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("vatex_training_v1.0.json", "train"),
        ("vatex_public_test_english_v1.1.json", "test"),
        ("MSRVTT_JSFUSION_test.csv", "test"),
        ("MSRVTT_train.9k.csv", "train"),
        ("trainlist01.txt", "train"),
        ("val_1.json", "val"),
        ("validate.csv", "val"),
        ("results_2M_val.csv", "val"),
        ("train_val_videodatainfo.json", None),
        ("evaluation.json", None),
        ("testimony.csv", None),
    ],
)
def test_the_name_of_a_file_tells_its_split(name: str, split: str | None) -> None:
    assert split_of(Path("train") / name) == split


def test_names_of_files_are_a_pattern(tmp_path: Path) -> None:
    def found(pattern: str, videos: str = "videos", name: str = "kinetics600") -> Record:
        return next(iter(READERS[name]([tmp_path / "a.csv"], videos, names=pattern)))

    lay(tmp_path, {"a.csv": KINETICS})
    assert found("{split}/{label}/{youtube_id}_{start}.mkv").video == "videos/validate/petting cat/---QUuC4vJs_84.mkv"
    whole = found("{youtube_id}.mp4", "s3://bucket/k600/")  # without the times it is the whole video
    assert (whole.video, whole.start_seconds, whole.end_seconds) == ("s3://bucket/k600/---QUuC4vJs.mp4", 84.0, 94.0)
    for name in ("---QUuC4vJs.webm", "---QUuC4vJs.info.json", "---QUuC4vJs.mkv"):
        (tmp_path / name).touch()
    assert found("{youtube_id}.*", str(tmp_path)).video == f"{tmp_path}/---QUuC4vJs.mkv"
    assert found("{youtube_id}.*", str(tmp_path / "none")).video == f"{tmp_path}/none/---QUuC4vJs.*"
    for pattern, message in (
        ("{id}.mp4", r"names '\{id\}\.mp4' has 'id': expected of end, label, split, start, youtube_id"),
        ("{youtube_id.mp4", r"names '\{youtube_id\.mp4': expected '\}'"),
        ("{youtube_id:d}.mp4", r"names .*: Unknown format code 'd'"),
        ("{label.upper}.mp4", r"names .* has 'label\.upper': expected of"),
        ("{}.mp4", r"names '\{\}\.mp4' has '': expected of"),
    ):
        with pytest.raises(ValueError, match=message):
            found(pattern)
    assert Names("videos", "{x}.mp4", ("x",)).path({"x": "/etc/passwd"}) == "videos/etc/passwd.mp4"


def test_a_survey_counts_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    clips = [Record(key=f"a{i}", video=f"{tmp_path}/a.mp4", captions=("x", "y"), split="train") for i in range(2)]
    clips += [Record(key=f"b{i}", video=f"{tmp_path}/b{i}.mp4", alt_text="z") for i in range(4)]
    clips.append(Record(key="c", video="s3://bucket/c.mp4", label="runs", narrative="<A> runs."))
    survey = Survey()
    assert [record.key for record in survey.watch(clips, skip_missing=True)] == ["a0", "a1", "c"]
    assert survey.counts() == {
        "records": 7,
        "records_without_video": 4,
        "splits": {"train": 2, "none": 5},
        "captions": 4,
        "alt_texts": 4,
        "narratives": 1,
        "questions": 0,
        "classes": 1,
        "videos": 6,
        "missing": 4,
        "missing_first": [f"{tmp_path}/b{i}.mp4" for i in range(3)],
    }


def run(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str, str]:
    code = main([str(argument) for argument in argv])
    return code, *capsys.readouterr()


def test_probe_tells_of_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv_file, more = lay(tmp_path, {"test.csv": NEXT_OE, "add.json": {"11": {"4": "not at all", "5": "fled"}}})
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "22.mp4").touch()
    base = ("probe", "nextqa-oe", "--annotations", csv_file, more, "--videos", tmp_path / "videos")
    code, out, err = run(capsys, *base)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "records     2 (test 2)",
        "questions   3",
        "videos      2, 1 of them missing",
        f"  {tmp_path}/videos/11.mp4",
        "",
        f"11: {tmp_path}/videos/11.mp4, 0 s to end",
        "  question: is it, old -> no / not at all (and 1 more)",
        "",
        f"22: {tmp_path}/videos/22.mp4, 0 s to end",
        "  question: why did he run -> to win",
    ]
    code, out, err = run(capsys, *base, "--json", "--out", tmp_path / "new" / "all.jsonl")
    assert (code, err) == (0, "")
    assert {"records": 2, "missing": 1, "skipped": 0}.items() <= json.loads(out).items()
    made = read_manifest(tmp_path / "new" / "all.jsonl")
    assert [q.references for q in made[0].questions] == [("not at all",), ("fled",)]
    code, out, _ = run(capsys, *base, "--skip-missing", "--out", tmp_path / "some.jsonl")
    assert out.endswith(f"\n{tmp_path}/some.jsonl: 1 records, 1 left out for want of their video\n")
    assert [record.key for record in read_manifest(tmp_path / "some.jsonl")] == ["22"]


def test_probe_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = lay(tmp_path, {"val_1.json": changed(ANET, ("v_abc", "timestamps", 0), [90, 99])})
    code, out, err = run(capsys, "probe", "activitynet-captions", "--annotations", path, "--videos", "v")
    assert (code, out.splitlines()[0]) == (0, "records     2 (val 2)")
    assert err.startswith(f"1 annotations left out, the first is {path}: $.v_abc.timestamps[0]: no part of the video")
    path.write_text("[")
    code, out, err = run(
        capsys, "probe", "vatex", "--annotations", path, "--videos", "v", "--out", tmp_path / "m.jsonl"
    )
    assert (code, out) == (1, "")
    assert err.startswith(f"pyvdl probe: {path}:1: expected whole JSON")
    assert [path.name for path in tmp_path.iterdir()] == ["val_1.json"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["vatex"], "vatex is a data set: name its files with --annotations, their folder with --videos"),
        (["vatex", "--annotations", "a"], "vatex needs --annotations, its files, and --videos, the folder"),
        (["vatex", "--videos", "v"], "vatex needs --annotations"),
        (["coco", "--annotations", "a", "--videos", "v"], "go with one data set: smit, vidln"),
        (["clip.mp4", "--split", "val"], "--split goes with a data set and its --annotations and --videos"),
        (["clip.mp4", "--skip-missing"], "--skip-missing goes with a data set"),
        (["vatex", "--annotations", "a", "--videos", "v", "--skip-missing"], "--skip-missing goes with --out"),
    ],
)
def test_mistakes_of_the_command_are_named(
    argv: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "probe", *argv)
    assert (code, out) == (2, "")
    assert says in err


def test_help_and_tests_know_every_data_set() -> None:
    assert DATASETS.replace("\n", " ").split(", ") == list(READERS) == sorted(SHAPES, key=list(READERS).index)


def test_rows_come_from_what_csv_writes(tmp_path: Path) -> None:
    """Quotes, commas and line ends within a cell; faults after it have their own line."""
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("videoid", "name"), (1, 'say "hi",\nthere'), (2, "é"), (3,)])
    told = []
    with pytest.raises(ValueError, match=r"a\.csv:5: 1 cells: expected 2, videoid, name"):
        told += [record.alt_text for record in READERS["webvid"]([tmp_path / "a.csv"], "v", names="{videoid}.mp4")]
    found = READERS["webvid"]([tmp_path / "a.csv"], "v", names="{videoid}.mp4")
    assert [next(found).alt_text for _ in range(2)] == ['say "hi",\nthere', "é"]
