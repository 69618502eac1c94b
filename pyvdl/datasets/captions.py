"""Captioned clips: MSR-VTT, its 1k-A split, VATEX, ActivityNet Captions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyvdl.data import Record
from pyvdl.datasets.files import (
    Entry,
    Names,
    OnSkip,
    json_list,
    json_object,
    lines,
    rows,
    skip,
    sort_files,
    split_name,
    split_of,
)

_VATEX_ID = re.compile(r"(.{11})_(\d{6})_(\d{6})")


def read_msrvtt(
    annotations: Sequence[Path], videos: str, *, names: str | None = None, on_skip: OnSkip = None
) -> Iterator[Record]:
    """train_val_videodatainfo.json and test_videodatainfo.json, or MSRVTT_data.json; a clip has 20 captions.

    names may have {video_id}.
    """
    named = Names(videos, names or "{video_id}.mp4", ("video_id",))
    for path in annotations:
        root = json_object(path)
        captions = _msrvtt_captions(root)
        for entry in root.entries("videos"):
            video_id = entry.text("video_id")
            yield Record(
                key=video_id,
                video=named.path({"video_id": video_id}),
                captions=tuple(captions[video_id]),
                split=split_name(entry.text("split")),
            )


def _msrvtt_captions(root: Entry) -> dict[str, list[str]]:
    """The captions of each video."""
    found: dict[str, list[str]] = {entry.text("video_id"): [] for entry in root.entries("videos")}
    for entry in root.entries("sentences"):
        if entry.text("video_id") not in found:
            raise entry.fault("video_id", "a video of $.videos")
        found[entry.text("video_id")].append(entry.text("caption").strip())
    return found


def read_msrvtt_1ka(
    annotations: Sequence[Path], videos: str, *, names: str | None = None, on_skip: OnSkip = None
) -> Iterator[Record]:
    """MSRVTT_JSFUSION_test.csv: 1,000 pairs of a clip and a sentence. A list without sentences (MSRVTT_train.9k.csv,
    MSRVTT_train.7k.csv) takes the captions from MSRVTT_data.json.

    names may have {video_id}.
    """
    named = Names(videos, names or "{video_id}.mp4", ("video_id",))
    tables, infos = sort_files(annotations, ".csv", ".json")
    captions = {name: texts for path in infos for name, texts in _msrvtt_captions(json_object(path)).items()}
    for path in tables:
        for entry in rows(path, ("video_id",)):
            video_id = entry.text("video_id")
            if "sentence" in entry.value:
                texts = [entry.text("sentence").strip()]
            elif video_id not in captions:
                raise entry.fault("video_id", "one with captions: name MSRVTT_data.json too")
            else:
                texts = captions[video_id]
            yield Record(
                key=video_id, video=named.path({"video_id": video_id}), captions=tuple(texts), split=split_of(path)
            )


def read_vatex(
    annotations: Sequence[Path], videos: str, *, names: str | None = None, on_skip: OnSkip = None
) -> Iterator[Record]:
    """vatex_training_v1.0.json, vatex_validation_v1.0.json, vatex_public_test_english_v1.1.json: 10 English captions a
    clip. A text file of ids, one a line, takes only those clips; its name tells their split then (the 1,500 clips that
    retrieval is tested on are such a list).

    names may have {video_id}, {youtube_id}, {start} and {end} (whole seconds); without {video_id}, {start} or {end} a
    file is the whole video.
    """
    named = Names(videos, names or "{video_id}.mp4", ("video_id", "youtube_id", "start", "end"))
    tables, lists = sort_files(annotations, ".json", ".txt")
    wanted = {line.strip(): (path, number) for path in lists for number, line in lines(path) if line.strip()}
    left = dict(wanted)
    for path in tables:
        for entry in json_list(path):
            video_id = entry.text("videoID")
            if lists and video_id not in wanted:
                continue
            left.pop(video_id, None)
            match = _VATEX_ID.fullmatch(video_id)
            if match is None:
                raise entry.fault("videoID", "a YouTube id and two times of six digits, ID_000010_000020")
            start, end = int(match[2]), int(match[3])
            values = {"video_id": video_id, "youtube_id": match[1], "start": start, "end": end}
            yield Record(
                key=video_id,
                captions=entry.texts("enCap") if "enCap" in entry.value else (),  # the private test has none
                split=split_of(wanted[video_id][0]) if lists else split_of(path),
                **named.clip(values, float(start), float(end), cut=("video_id", "start", "end")),
            )
    for video_id, (path, number) in left.items():
        raise ValueError(f"{path}:{number}: {video_id!r} is in none of the JSON files: expected each clip in one")


def read_activitynet_captions(
    annotations: Sequence[Path], videos: str, *, names: str | None = None, on_skip: OnSkip = None
) -> Iterator[Record]:
    """train.json, val_1.json, val_2.json: one record a segment, with its sentence; times are held within the video.
    Keys are ID_0, ID_1, ...; of a video that an earlier file has too (val_2.json has those of val_1.json) val_2_ID_0.

    names may have {id} (with its "v_") and {youtube_id}.
    """
    named = Names(videos, names or "{id}.mp4", ("id", "youtube_id"))
    seen: set[str] = set()
    for path in annotations:
        root = json_object(path)
        for name in root.value:
            entry = root.member(name)
            stem = f"{path.stem}_{name}" if name in seen else name
            seen.add(name)
            duration, sentences = entry.seconds("duration"), entry.value.get("sentences")
            spans = entry.spans("timestamps")
            if not isinstance(sentences, list) or len(sentences) != len(spans):
                raise entry.fault("sentences", f"as many as timestamps, {len(spans)}")
            video = named.path({"id": name, "youtube_id": name.removeprefix("v_")})
            for i, (sentence, span) in enumerate(zip(sentences, spans)):
                where = f"{entry.where}.timestamps[{i}]"
                start, end = max(0.0, min(span)), min(duration, max(span))  # some are written the other way round
                if not isinstance(sentence, str) or not sentence.strip():
                    skip(on_skip, where, f"no sentence, found {sentence!r:.40}")
                elif start >= end:
                    skip(on_skip, where, f"no part of the video is in {list(span)}, of {duration} s")
                else:
                    yield Record(
                        key=f"{stem}_{i}",
                        video=video,
                        start_seconds=start,
                        end_seconds=end,
                        captions=(sentence.strip(),),
                        split=split_of(path),
                        group=name,
                    )
