"""What people said about videos: Spoken Moments in Time, Video Localized Narratives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pyvdl.data import Record
from pyvdl.datasets.files import Entry, Names, OnSkip, json_lines, lines, skip, sort_files, split_name, split_of


def read_spoken_moments(
    annotations: Sequence[Path], videos: str, *, names: str | None = None, on_skip: OnSkip = None
) -> Iterator[Record]:
    """train_set.txt and its like, one name of a video (CLASS/NAME) a line, and the folder of transcriptions, whose
    NAME.txt hold what was said in their first line.

    names may have {name}.
    """
    named = Names(videos, names or "{name}.mp4", ("name",))
    lists, folders = sort_files(annotations, ".txt", "/")
    if not lists or len(folders) != 1:
        raise ValueError(f"{len(lists)} lists, {len(folders)} folders: expected lists and one folder of transcriptions")
    for path in lists:
        for number, line in lines(path):
            name = line.strip()
            if not name:
                continue
            said = folders[0] / f"{name}.txt"
            text = next((text.strip() for _, text in lines(said)), "") if said.is_file() else None
            if not text:
                why = "is not there" if text is None else "is blank in its first line"
                skip(on_skip, f"{path}:{number}", f"the transcription {said} {why}")
                continue
            yield Record(key=name, video=named.path({"name": name}), captions=(text,), split=split_of(path))


def read_localized_narratives(
    annotations: Sequence[Path], videos: str, *, names: str | None = None, on_skip: OnSkip = None
) -> Iterator[Record]:
    """OVIS_train.jsonl, UVO_sparse_train.jsonl, oops_val.jsonl, kinetics_train.jsonl and so on: what one annotator said
    of each actor, as a narrative with actor tags. A video may have several. `extra["actors"]` tells of each actor the
    key frames it was pointed at in, and when it was spoken of.

    names may have {dataset_id}, such as OVIS_train, and {video_id}.
    """
    named = Names(videos, names or "{dataset_id}/{video_id}.mp4", ("dataset_id", "video_id"))
    for path in annotations:
        for entry in json_lines(path):
            dataset_id, video_id = entry.text("dataset_id"), entry.text("video_id")
            narratives = entry.entries("actor_narratives")
            if not narratives:
                skip(on_skip, entry.where, "actor_narratives is empty")
                continue
            told = [(actor.text("actor_name").strip(), actor.text("caption").strip()) for actor in narratives]
            yield Record(
                key=f"{dataset_id}_{entry.whole('vidln_id')}",
                video=named.path({"dataset_id": dataset_id, "video_id": video_id}),
                narrative=" ".join(f"<{name}> {text}" for name, text in told),
                split=split_name(dataset_id.rpartition("_")[2]),
                group=video_id,
                extra={"actors": [_actor(actor, entry) for actor in narratives]},
            )


def _actor(actor: Entry, video: Entry) -> dict[str, Any]:
    """name, keyframes (names of frames of the video) and, where its words have times, spoken_seconds: [start, end] from
    the start of the annotator's recording, not of the video."""
    frames = video.value.get("keyframe_names")
    if not isinstance(frames, list):
        raise video.fault("keyframe_names", "a list of names")
    chosen = actor.value.get("keyframe_selection_indices")
    if not isinstance(chosen, list) or not all(type(i) is int and 0 <= i < len(frames) for i in chosen):
        raise actor.fault("keyframe_selection_indices", f"indices of the {len(frames)} keyframe_names")
    found: dict[str, Any] = {"name": actor.text("actor_name").strip(), "keyframes": [frames[i] for i in chosen]}
    if actor.value.get("time_alignment"):
        words = actor.entries("time_alignment")
        start, end = min(word.whole("start_ms") for word in words), max(word.whole("end_ms") for word in words)
        found["spoken_seconds"] = [start / 1000, end / 1000]
    return found
