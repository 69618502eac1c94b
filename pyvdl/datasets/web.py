"""Clips of the web with texts made or found by machines: VideoCC, InternVid, WebVid and tables like it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyvdl.data import Record
from pyvdl.datasets.files import Names, OnSkip, json_lines, rows, skip, split_of

_YOUTUBE = re.compile(r"(?:(?:https?://)?(?:www\.)?(?:youtube\.com/watch\?v=|youtu\.be/))?([\w-]{11})")
_SCORES = ("UMT_Score", "Aesthetic_Score")


def read_videocc(
    annotations: Sequence[Path], videos: str, *, names: str | None = None, on_skip: OnSkip = None
) -> Iterator[Record]:
    """video_cc_public.csv: video, start and end in microseconds, and the alt-text of an image that looks like a frame.
    A clip may stand there with several texts: a record each; the records of a video are one group.

    names may have {youtube_id}, {start} and {end} (microseconds); with {start} or {end} a file is the clip alone.
    """
    named = Names(videos, names or "{youtube_id}.mp4", ("youtube_id", "start", "end"))
    for path in annotations:
        for i, entry in enumerate(rows(path, ("video", "start", "end", "caption"), header=False)):
            if i == 0 and "timestamp" in entry.value["start"].lower():
                continue  # a line of column names
            match = _YOUTUBE.fullmatch(entry.text("video"))
            if match is None:
                raise entry.fault("video", "a YouTube id or the address of a video")
            start, end, text = entry.whole("start"), entry.whole("end"), entry.value["caption"].strip()
            if start >= end or not text:
                skip(on_skip, entry.where, f"no text for {start} to {end} microseconds, or no such time")
                continue
            line = entry.where.rpartition(":")[2]
            yield Record(
                key=f"{match[1]}_{start}_{end}_{line}",
                alt_text=text,
                split=split_of(path),
                group=match[1],
                **named.clip(
                    {"youtube_id": match[1], "start": start, "end": end}, start / 1e6, end / 1e6, cut=("start", "end")
                ),
            )


def read_internvid(
    annotations: Sequence[Path], videos: str, *, names: str | None = None, on_skip: OnSkip = None
) -> Iterator[Record]:
    """InternVid-10M-flt.jsonl and its like: YouTube id, start and end, a generated caption, scores. The clips of one
    video are one group; the scores come along in `extra`.

    names may have {youtube_id}, {start} and {end} (as written, HH:MM:SS.mmm); with {start} or {end} a file is the clip
    alone.
    """
    named = Names(videos, names or "{youtube_id}.mp4", ("youtube_id", "start", "end"))
    for path in annotations:
        for entry in json_lines(path):
            video, start, end = entry.text("YoutubeID"), entry.time("Start_timestamp"), entry.time("End_timestamp")
            values = {
                "youtube_id": video,
                "start": entry.value["Start_timestamp"],
                "end": entry.value["End_timestamp"],
            }
            caption = entry.value.get("Caption")
            if start >= end or not isinstance(caption, str) or not caption.strip():
                skip(on_skip, entry.where, f"no caption for {values['start']} to {values['end']}, or no such time")
                continue
            yield Record(
                key=f"{video}_{values['start']}_{values['end']}",
                captions=(caption.strip(),),
                split=split_of(path),
                group=video,
                extra={name: entry.value[name] for name in _SCORES if name in entry.value},
                **named.clip(values, start, end, cut=("start", "end")),
            )


def read_webvid(
    annotations: Sequence[Path], videos: str, *, names: str | None = None, on_skip: OnSkip = None
) -> Iterator[Record]:
    """results_2M_train.csv and its like, any CSV file with the columns videoid and name, the text of the page.

    names may have every column of the file, {videoid} and {page_dir} as a rule.
    """
    pattern = names or "{page_dir}/{videoid}.mp4"
    for path in annotations:
        named: Names | None = None
        for entry in rows(path, ("videoid", "name")):
            named = named or Names(videos, pattern, entry.value)
            text = entry.value["name"].strip()
            lacking = sorted(field for field in named.fields if not entry.value[field].strip())
            if lacking or not text:
                skip(on_skip, entry.where, f"{lacking[0] if lacking else 'name'} is blank")
                continue
            yield Record(key=entry.text("videoid"), video=named.path(entry.value), alt_text=text, split=split_of(path))
