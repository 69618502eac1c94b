"""The benchmarks of `pyvdl evaluate`: data, task, protocol, and what the paper has (arXiv 2401.06129).

A figure that is not in the paper, or was not at hand, is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

Task = Literal["captions", "questions", "choices", "retrieval", "classes"]
MODELS: Final[Mapping[Task, str]] = {  # which kind of model does it
    "captions": "a VLM",
    "questions": "a VLM",
    "choices": "a VLM",
    "retrieval": "a dual encoder",
    "classes": "a dual encoder",
}

# Prompts of CLIP, verbatim with their spelling: data/prompts.md of github.com/openai/CLIP, MIT License, Copyright (c)
# 2021 OpenAI. (Permission is granted to use, copy, modify and distribute them provided this notice stays with them.)
_SHOWN = ("photo", "video", "example", "demonstration")
_DONE = ("", " using", " doing", " during", " performing", " practicing")
_KINETICS = tuple(f"a {shown} of{who} {{}}." for shown in _SHOWN for who in ("", *(f" a person{did}" for did in _DONE)))
_UCF101 = tuple(f"a {shown} of {who} person{did} {{}}." for did in _DONE for who in ("a", "the") for shown in _SHOWN)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One test, as it is published."""

    name: str
    title: str
    reader: str  # of pyvdl.datasets
    split: str
    files: tuple[str, ...]  # patterns of the annotations it needs, each of one file, below ROOT/annotations/READER
    several: tuple[str, ...] = ()  # of which it needs one or more
    more: tuple[str, ...] = ()  # that are read where they are there
    videos: str  # folder of the videos, below ROOT/videos
    task: Task
    protocol: str
    paper: Mapping[str, float] = field(default_factory=dict)  # by names of scores; the paper's own model
    source: str = ""  # where in the paper
    templates: tuple[str, ...] = ()  # CLIP's for these classes; the shorter one that --templates one takes
    template: str = ""


_TEXT_TO_VIDEO = ("text to video R@1", "text to video R@5", "text to video R@10")
_ZERO_SHOT = ("zero-shot top-1", "zero-shot top-5")

BENCHMARKS: Final = (
    Benchmark(
        name="msrvtt-captions",
        title="MSR-VTT captions",
        reader="msrvtt",
        split="test",
        files=("test_videodatainfo.json",),
        videos="msrvtt",
        task="captions",
        protocol="CIDEr-D of one greedy caption a clip",
        paper={"CIDEr-D": 48.2},
        source="Table 3",
    ),
    Benchmark(
        name="activitynet-captions",
        title="ActivityNet captions",
        reader="activitynet-captions",
        split="val",
        files=("val_2.json",),
        videos="activitynet",
        task="captions",
        protocol="CIDEr-D of one greedy caption for each given segment",
        paper={"CIDEr-D": 31.0},
        source="Table 3",
    ),
    Benchmark(
        name="smit-captions",
        title="Spoken Moments in Time captions",
        reader="smit",
        split="test",
        files=("test_set.txt", "transcriptions"),
        videos="smit",
        task="captions",
        protocol="CIDEr-D of one greedy caption a clip",
        paper={"CIDEr-D": 43.5},
        source="Table 5, with self-training; 42.3 without",
    ),
    Benchmark(
        name="msrvtt-qa",
        title="MSRVTT-QA",
        reader="msrvtt-qa",
        split="test",
        files=("test_qa.json",),
        videos="msrvtt",
        task="questions",
        protocol="exact match of the strings; lower-cased and stripped beside it",
        paper={"exact match": 24.4},
        source="Table 3",
    ),
    Benchmark(
        name="activitynet-qa",
        title="ActivityNet-QA",
        reader="activitynet-qa",
        split="test",
        files=("test_q.json", "test_a.json"),
        videos="activitynet",
        task="questions",
        protocol="exact match of the strings; lower-cased and stripped beside it",
        paper={"exact match": 29.6},
        source="Table 3",
    ),
    Benchmark(
        name="nextqa-oe",
        title="NExT-OE",
        reader="nextqa-oe",
        split="test",
        files=("test.csv", "add_reference_answer_test.json"),
        more=("map_vid_vidorID.json",),
        videos="nextqa",
        task="questions",
        protocol="WUPS at 0 by question type, the better of two answers",
        paper={"WUPS": 29.5},
        source="Table 3",
    ),
    Benchmark(
        name="nextqa-mc",
        title="NExT-QA, multiple choice",
        reader="nextqa-mc",
        split="test",
        files=("test.csv",),
        more=("map_vid_vidorID.json",),
        videos="nextqa",
        task="choices",
        protocol="of five options the one of the highest log-likelihood",
    ),
    Benchmark(
        name="msrvtt-1ka",
        title="MSR-VTT 1k-A retrieval",
        reader="msrvtt-1ka",
        split="test",
        files=("MSRVTT_JSFUSION_test.csv",),
        videos="msrvtt",
        task="retrieval",
        protocol="1,000 pairs, both directions",
        paper=dict(zip(_TEXT_TO_VIDEO, (48.4, 73.5, 81.9))),
        source="Table 2",
    ),
    Benchmark(
        name="vatex",
        title="VATEX retrieval",
        reader="vatex",
        split="test",
        files=("*test*.txt",),  # the ids of the test, which take its clips out of whichever file they are in
        several=("vatex_*_v1.*.json",),
        videos="vatex",
        task="retrieval",
        protocol="all captions as queries (headline), and the first of each clip; both directions",
        paper=dict(zip(_TEXT_TO_VIDEO, (65.6, 91.7, 95.8))),
        source="Table 2; which captions are queries is not said",
    ),
    Benchmark(
        name="kinetics600",
        title="Kinetics-600 zero-shot",
        reader="kinetics600",
        split="val",
        files=("val*.csv",),
        videos="kinetics600",
        task="classes",
        protocol="top-1 and top-5 among the classes",
        paper=dict(zip(_ZERO_SHOT, (62.8, 86.4))),
        source="Table 2; the prompts are not said",
        templates=_KINETICS,
        template="a video of {}.",
    ),
    Benchmark(
        name="kinetics700",
        title="Kinetics-700 zero-shot",
        reader="kinetics700",
        split="val",
        files=("val*.csv",),
        videos="kinetics700",
        task="classes",
        protocol="top-1 and top-5 among the classes",
        templates=_KINETICS,
        template="a video of {}.",
    ),
    Benchmark(
        name="ucf101",
        title="UCF101 zero-shot",
        reader="ucf101",
        split="test",
        files=("classInd.txt", "testlist01.txt"),
        videos="ucf101",
        task="classes",
        protocol="top-1 and top-5 among the classes, first division",
        templates=_UCF101,
        template="a video of a person {}.",
    ),
)
BY_NAME: Final = {benchmark.name: benchmark for benchmark in BENCHMARKS}


def templates(benchmark: Benchmark | None, kind: Literal["none", "one", "clip"]) -> tuple[str, ...]:
    """What the name of a class stands in; classes of one's own take those of Kinetics."""
    home = benchmark if benchmark is not None else BY_NAME["kinetics600"]
    return {"none": ("{}",), "one": (home.template,), "clip": home.templates}[kind]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the paper: its columns are scores of benchmarks."""

    title: str
    columns: tuple[tuple[str, str, str], ...]  # heading, benchmark, score
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]


TABLES: Final = (
    Table(
        title="Table 2: zero-shot retrieval and classification (paper: ViT-L with joint space-time attention)",
        columns=(
            *((f"MSR-VTT {name.split()[-1]}", "msrvtt-1ka", name) for name in _TEXT_TO_VIDEO),
            *((f"VATEX {name.split()[-1]}", "vatex", name) for name in _TEXT_TO_VIDEO),
            *((f"K600 {name.split()[-1]}", "kinetics600", name) for name in _ZERO_SHOT),
        ),
        rows=(
            ("paper: CLIP", (31.2, 53.7, 64.2, 45.2, None, None, 55.1, 79.2)),
            ("paper: VideoCC", (37.0, 62.1, 72.5, 37.7, 66.9, 77.2, 48.6, 74.8)),
            ("paper: VideoCC+", (48.2, 72.2, 80.8, 64.2, 90.2, 95.1, 61.1, 85.6)),
            ("paper: InternVid", (42.5, 67.0, 76.8, 58.7, 87.0, 93.0, 60.7, 85.0)),
            ("paper: InternVid+", (46.3, 71.5, 80.3, 65.2, 91.3, 95.5, 62.7, 86.2)),
            ("paper: VideoCC+ and InternVid+", (48.4, 73.5, 81.9, 65.6, 91.7, 95.8, 62.8, 86.4)),
        ),
    ),
    Table(
        title="Table 3: zero-shot captions and answers of the video-language model",
        columns=(
            ("MSR-VTT CIDEr", "msrvtt-captions", "CIDEr-D"),
            ("MSRVTT-QA", "msrvtt-qa", "exact match"),
            ("ActivityNet CIDEr", "activitynet-captions", "CIDEr-D"),
            ("ActivityNet-QA", "activitynet-qa", "exact match"),
            ("NExT-OE WUPS", "nextqa-oe", "WUPS"),
        ),
        rows=(
            ("paper: DeCap", (18.6, None, 15.0, None, None)),
            ("paper: FrozenBiLM", (None, 16.8, None, 25.9, None)),
            ("paper: Flamingo-80B", (None, None, None, None, 26.7)),
            ("paper: PaLI-3, 8 frames", (21.3, 12.7, 13.8, 22.9, 23.2)),
            ("paper: adapted", (48.2, 24.4, 31.0, 29.6, 29.5)),
        ),
    ),
)
