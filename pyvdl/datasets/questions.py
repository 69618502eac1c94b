"""Questions about videos: MSRVTT-QA, ActivityNet-QA, NExT-QA with open answers and with options. One record a video."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyvdl.data import Family, Question, Record
from pyvdl.datasets.files import Entry, Names, OnSkip, json_list, json_object, rows, sort_files, split_of
from pyvdl.metrics import QUESTION_TYPES

_FAMILIES: Mapping[str, Family] = {"C": "causal", "T": "temporal", "D": "descriptive"}
_OPTIONS = ("a0", "a1", "a2", "a3", "a4")


def read_msrvtt_qa(
    annotations: Sequence[Path], videos: str, *, names: str | None = None, on_skip: OnSkip = None
) -> Iterator[Record]:
    """train_qa.json, val_qa.json, test_qa.json.

    names may have {video_id}, "video" and its number.
    """
    named = Names(videos, names or "{video_id}.mp4", ("video_id",))
    for path in annotations:
        asked = (
            (
                f"video{entry.whole('video_id')}",
                Question(entry.text("question"), entry.text("answer"), key=str(entry.whole("id"))),
            )
            for entry in json_list(path)
        )
        for video_id, questions in _by_video(asked):
            yield Record(
                key=video_id, video=named.path({"video_id": video_id}), questions=questions, split=split_of(path)
            )


def read_activitynet_qa(
    annotations: Sequence[Path], videos: str, *, names: str | None = None, on_skip: OnSkip = None
) -> Iterator[Record]:
    """train_q.json with train_a.json, and so on. The type of a question is its number there: "0" motion, "1" spatial,
    "2" temporal, "3" yes or no, "4" colour, "5" object, "6" location, "7" number, "8" other.

    names may have {id} (the YouTube id behind "v_") and {youtube_id}.
    """
    named = Names(videos, names or "{id}.mp4", ("id", "youtube_id"))
    asked: list[tuple[Path, Entry]] = []
    answers: dict[str, Entry] = {}
    for path in annotations:
        for entry in json_list(path):
            if "question" in entry.value:
                asked.append((path, entry))
            else:
                answers[entry.text("question_id")] = entry

    def question(entry: Entry) -> Question:
        answer = answers.pop(entry.text("question_id"), None)
        if answer is None:
            raise entry.fault("question_id", "one with an answer: name the file of answers (*_a.json) too")
        kind = answer.whole("type")
        if kind > 8:
            raise answer.fault("type", "0 to 8")
        return Question(entry.text("question"), answer.text("answer"), type=str(kind), key=entry.text("question_id"))

    for path in annotations:
        pairs = ((entry.text("video_name"), question(entry)) for home, entry in asked if home == path)
        for video_id, questions in _by_video(pairs):
            values = {"id": f"v_{video_id}", "youtube_id": video_id}
            yield Record(key=f"v_{video_id}", video=named.path(values), questions=questions, split=split_of(path))
    for entry in answers.values():
        raise entry.fault("question_id", "one that is asked: name the file of questions (*_q.json) too")


def read_nextqa_open(
    annotations: Sequence[Path], videos: str, *, names: str | None = None, on_skip: OnSkip = None
) -> Iterator[Record]:
    """train.csv, val.csv, test.csv of NExT-OE, and add_reference_answer_test.json with the second answers of its test.

    names may have {video} and, where map_vid_vidorID.json is named too, {vidor}, the path there.
    """
    tables, infos = sort_files(annotations, ".csv", ".json")
    paths, references = _nextqa_infos(infos)
    used: set[tuple[str, str]] = set()

    def question(entry: Entry) -> Question:
        place = (entry.text("video"), entry.text("qid"))
        used.add(place)
        return Question(
            entry.text("question"),
            entry.text("answer"),
            references=tuple(filter(None, [references.get(place)])),
            **_nextqa_question(entry),
        )

    for path in tables:
        pairs = ((entry.text("video"), question(entry)) for entry in rows(path, _columns(("answer",))))
        yield from _nextqa(pairs, videos, names, paths, path)
    if unused := sorted(set(references) - used):
        home = next(path for path in infos if path.stem != "map_vid_vidorID")
        raise ValueError(f"{home}: $.{'.'.join(unused[0])} answers no question: expected the table of its split too")


def read_nextqa_choice(
    annotations: Sequence[Path], videos: str, *, names: str | None = None, on_skip: OnSkip = None
) -> Iterator[Record]:
    """train.csv, val.csv, test.csv of NExT-QA: five options, of which `answer` is the index of the right one.

    names may have {video} and, where map_vid_vidorID.json is named too, {vidor}, the path there.
    """
    tables, infos = sort_files(annotations, ".csv", ".json")
    paths, _ = _nextqa_infos(infos)

    def question(entry: Entry) -> Question:
        correct = entry.whole("answer")
        if correct >= len(_OPTIONS):
            raise entry.fault("answer", f"the index of an option, 0 to {len(_OPTIONS) - 1}")
        options = tuple(entry.text(name) for name in _OPTIONS)
        return Question(
            entry.text("question"), options[correct], options=options, correct=correct, **_nextqa_question(entry)
        )

    for path in tables:
        pairs = ((entry.text("video"), question(entry)) for entry in rows(path, _columns(("answer", *_OPTIONS))))
        yield from _nextqa(pairs, videos, names, paths, path)


def _columns(more: Sequence[str]) -> tuple[str, ...]:
    return ("video", "question", "qid", "type", *more)


def _nextqa_question(entry: Entry) -> dict[str, Any]:
    """What both kinds of question have."""
    kind = entry.text("type")
    if kind not in QUESTION_TYPES:
        raise entry.fault("type", f"one of {', '.join(QUESTION_TYPES)}")
    return {"type": kind, "family": _FAMILIES[kind[0]], "key": entry.text("qid")}


def _nextqa_infos(infos: Sequence[Path]) -> tuple[dict[str, str], dict[tuple[str, str], str]]:
    """Paths by video, and further answers by (video, qid), told apart by what the files hold."""
    paths: dict[str, str] = {}
    references: dict[tuple[str, str], str] = {}
    for info in infos:
        root = json_object(info)
        for video, value in root.value.items():
            if isinstance(value, str):
                paths[video] = root.text(video)
            else:
                entry = root.member(video)
                references |= {(video, qid): entry.text(qid) for qid in entry.value}
    return paths, references


def _nextqa(
    asked: Iterable[tuple[str, Question]], videos: str, names: str | None, paths: Mapping[str, str], path: Path
) -> Iterator[Record]:
    fields = ("video", "vidor") if paths else ("video",)
    named = Names(videos, names or f"{{{fields[-1]}}}.mp4", fields)
    for video, questions in _by_video(asked):
        values = {"video": video, "vidor": paths.get(video)}
        yield Record(key=video, video=named.path(values), questions=questions, split=split_of(path))


def _by_video(asked: Iterable[tuple[str, Question]]) -> Iterator[tuple[str, tuple[Question, ...]]]:
    """The questions of each video together, videos in the order in which they come first."""
    found: dict[str, list[Question]] = {}
    for video, question in asked:
        found.setdefault(video, []).append(question)
    return ((video, tuple(questions)) for video, questions in found.items())
