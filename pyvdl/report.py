"""The page of a run: plots, one self-contained HTML file and the plain-text table, all made from its report."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyvdl.claims import claims, read_score, verdict
from pyvdl.page import draw, frame_image, new_figure, number, photograph_uri, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGES = {"image": "image model", "visual": "visual stage", "language": "language stage"}
TEXTS = {"alt_text": "alt-text", "pseudo_captions": "pseudo-captions", "human_captions": "human captions"}
LOSSES = {
    "adapt": {"pretrain": "image model", "visual": "visual stage", "language": "language stage"},
    "dual_encoder": {f"dual_{key}": label for key, label in TEXTS.items()},
}
STATISTICS = {
    "captions": "captions",
    "mean_length": "words a caption",
    "vocabulary": "different words",
    "unique_nouns": "different nouns",
    "unique_verbs": "different verbs",
}
_COMMON_WORDS = frozenset(
    (
        "a",
        "an",
        "the",
        "and",
        "or",
        "of",
        "in",
        "on",
        "at",
        "to",
        "is",
        "are",
        "it",
        "its",
        "with",
        "by",
        "from",
        "then",
    )
)
_THUMBNAIL = 160  # pixels, the longer side


def write_report(report: Mapping[str, Any], directory: Path) -> Path:
    """Writes the plots and `report.html` into `directory`; returns the page's path.

    Frame files named by the report's examples must be in `directory` already (`save_thumbnail`). The page
    holds everything it shows: images are data URIs, there is no script and no address to load anything from.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tested = claims(report)
    films = [_film(example, directory) for example in report["examples"]["captions"]]  # before the plots: may refuse
    searches = [_search(example, directory) for example in report["examples"]["retrieval"]]
    plots = draw(lambda colours: _figures(report, colours))
    for name, files in plots.items():
        for theme, png in files.items():
            (directory / (f"plot-{name}.png" if theme == "light" else f"plot-{name}-{theme}.png")).write_bytes(png)
    path = directory / "report.html"
    write_page(
        path,
        "report.html.j2",
        plots=plots,
        report=report,
        claims=[claim | {"figures": _unbroken(claim["figures"])} for claim in tested],
        verdict=_unbroken(verdict(tested)),
        held=sum(claim["holds"] for claim in tested),
        tables=_tables(report),
        statistics=_statistics(report),
        films=films,
        searches=searches,
        steps=_steps(report),
        stages=STAGES,
        texts=TEXTS,
    )
    return path


def table(report: Mapping[str, Any]) -> str:
    """The main table as aligned plain text, each score as value [low, high]."""
    blocks = []
    for section in _tables(report):
        rows = [[section["title"], *section["columns"]]]
        for row in section["rows"]:
            rows.append([row["label"], *(f"{cell['value']} {cell['interval']}".strip() for cell in row["cells"])])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, "Scores are in percent points with 95% bootstrap intervals over the test clips."])


def save_thumbnail(frame: np.ndarray, path: Path) -> Path:
    """Writes one frame, uint8[H, W, 3], as PNG; larger ones are shrunk so that no side passes 160 pixels."""
    image = frame_image(frame)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    image.save(path, format="PNG")
    return Path(path)


# What the page and the text table show ------------------------------------------------------------------------------


def _tables(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    vlm, dual = report["vlm"], report["dual_encoder"]
    adapted = [
        _row("CIDEr-D", [vlm[stage]["cider"] for stage in STAGES]),
        _row("exact match", [vlm[stage]["exact_match"] for stage in STAGES]),
    ]
    for family in vlm["visual"]["exact_match_by_family"]:
        adapted.append(_row(f"  {family}", [vlm[stage]["exact_match_by_family"][family] for stage in STAGES]))
    adapted += [
        _row("WUPS", [vlm[stage]["wups"] for stage in STAGES]),
        _row("detail recall", [vlm[stage]["detail_recall"] for stage in STAGES]),
        _row("words a caption", [vlm[stage]["mean_length"] for stage in STAGES]),
        _row("words a description", [vlm[stage]["detail_length"] for stage in STAGES]),
    ]
    trained = []
    for direction, name in (("t2v", "text to video"), ("v2t", "video to text")):
        for score in ("R@1", "R@5", "R@10"):
            trained.append(_row(f"{name} {score}", [dual[texts][direction][score] for texts in TEXTS]))
        trained.append(_row(f"{name} median rank", [dual[texts][direction]["median_rank"] for texts in TEXTS]))
    for score, name in (("top1", "zero-shot top-1"), ("top5", "zero-shot top-5")):
        trained.append(_row(name, [dual[texts][score] for texts in TEXTS]))
    return [
        {"title": "Captioner", "keys": list(STAGES), "columns": list(STAGES.values()), "rows": adapted},
        {"title": "Encoder, by training text", "keys": list(TEXTS), "columns": list(TEXTS.values()), "rows": trained},
    ]


def _row(label: str, scores: Sequence[Any]) -> dict[str, Any]:
    return {"label": label, "cells": [_cell(score) for score in scores]}


def _cell(score: Any) -> dict[str, str]:
    """A score with its interval, or a bare number (lengths, ranks) without one."""
    if isinstance(score, Mapping):
        return {"value": f"{score['value']:.1f}", "interval": f"[{score['low']:.1f}, {score['high']:.1f}]"}
    return {"value": f"{score:.1f}", "interval": ""}


def _statistics(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    counted = report["caption_statistics"]
    return [
        {"label": label, "cells": [number(counted[texts][key]) for texts in TEXTS]} for key, label in STATISTICS.items()
    ]


def _steps(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The method in one line a step, with the seconds each took; what no step accounts for comes last."""
    corpus, seconds = report["corpus"], report["seconds"]
    codecs = ", ".join(f"{count} {codec}" for codec, count in corpus["codecs"].items())
    pseudo = report["caption_statistics"]["pseudo_captions"]["captions"]
    lines = {
        "corpus": (
            "Corpus",
            f"{number(corpus['files'])} video files rendered and encoded ({codecs}), cut into "
            f"{number(corpus['train'])} training, {number(corpus['unlabelled'])} unlabelled "
            f"and {number(corpus['test'])} test clips.",
        ),
        "pretrain": ("Image model", "A small image-text model is trained on single frames: the starting point."),
        "visual": ("Visual stage", "The vision tower learns from short video captions; the language model is frozen."),
        "language": (
            "Language stage",
            "The language model learns from instructions made of narratives; the vision tower is frozen.",
        ),
        "caption": (
            "Captions",
            f"{number(pseudo)} captions are sampled for the unlabelled clips by nucleus sampling; all are kept.",
        ),
        "dual_encoder": (
            "Dual encoder",
            "One video-text encoder is trained three times from the same start: on alt-text, pseudo-captions and "
            "human captions.",
        ),
        "evaluate": ("Evaluation", f"Every model is scored on the same {number(corpus['test'])} test clips."),
    }
    total = seconds["total"]
    steps = [
        {"name": name, "text": text, "seconds": seconds[key], "share": seconds[key] / total}
        for key, (name, text) in lines.items()
    ]
    rest = total - sum(step["seconds"] for step in steps)
    if rest > 0.01 * total:
        steps.append(
            {"name": "Everything else", "text": "Loading, examples and all else that no step counts.", "seconds": rest}
        )
        steps[-1]["share"] = rest / total
    return steps


def _film(example: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """One test clip: its frames, what each stage said of it and which questions it answered."""
    human = {word for caption in example["human"] for word in _words(caption)}
    said = [{"key": stage, "label": label, "words": _marked(example[stage], human)} for stage, label in STAGES.items()]
    said.append({"key": "language", "label": "asked for detail", "words": _marked(example["detail"], human)})
    questions = [
        {
            "question": question["question"],
            "answer": question["answer"],
            "replies": [
                {"text": question[when], "right": _same(question[when], question["answer"])}
                for when in ("before", "after")
            ],
        }
        for question in example["questions"]
    ]
    return {
        "key": example["key"],
        "frames": [_photograph(directory / name) for name in example["frames"]],
        "human": example["human"],
        "said": said,
        "questions": questions,
    }


def _search(example: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    ranked = [{**entry, "frame": _photograph(directory / entry["frame"])} for entry in example["ranked"]]
    place = next((rank for rank, entry in enumerate(ranked, 1) if entry["correct"]), None)
    return {"query": example["query"], "encoder": TEXTS[example["encoder"]], "ranked": ranked, "place": place}


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.casefold()) if word not in _COMMON_WORDS]


def _marked(text: str, human: set[str]) -> list[tuple[str, bool]]:
    """The text in pieces, each with whether it is a telling word that a human caption of the clip has too."""
    return [(piece, piece.casefold() in human) for piece in re.findall(r"\w+|\W+", text)]


def _same(first: str, second: str) -> bool:
    return " ".join(first.casefold().split()) == " ".join(second.casefold().split())


def _unbroken(sentence: str) -> str:
    """The sentence with no-break spaces between a value and its interval, and inside the interval."""
    return re.sub(r" \[[^]]*\]", lambda interval: interval.group().replace(" ", "\u00a0"), sentence)


def _photograph(path: Path) -> str:
    """The image in a file as a data URI."""
    if not path.is_file():
        raise FileNotFoundError(f"the report names the image {path}, which is not there")
    from PIL import Image

    with Image.open(path) as image:
        return photograph_uri(image)


# Plots --------------------------------------------------------------------------------------------------------------


def _figures(report: Mapping[str, Any], colours: Mapping[str, str]) -> dict[str, Figure]:
    def vlm(score: str) -> dict[str, Any]:
        return {stage: read_score(report, "vlm", stage, score) for stage in STAGES}

    def dual(*path: str) -> dict[str, Any]:
        return {texts: read_score(report, "dual_encoder", texts, *path) for texts in TEXTS}

    recalls = ("R@1", "R@5", "R@10")
    return {
        "captions": _bars({"CIDEr-D": vlm("cider")}, STAGES, colours),
        "answers": _bars(
            {"exact match": vlm("exact_match"), "WUPS": vlm("wups"), "detail recall": vlm("detail_recall")},
            STAGES,
            colours,
        ),
        "text-to-video": _bars({recall: dual("t2v", recall) for recall in recalls}, TEXTS, colours),
        "video-to-text": _bars({recall: dual("v2t", recall) for recall in recalls}, TEXTS, colours),
        "zero-shot": _bars({"top-1": dual("top1"), "top-5": dual("top5")}, TEXTS, colours),
        "losses-captioner": _curves(report["losses"], LOSSES["adapt"], colours),
        "losses-encoder": _curves(report["losses"], LOSSES["dual_encoder"], colours),
    }


def _bars(groups: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str], colours: Mapping[str, str]) -> Figure:
    """Groups of bars, one bar for each key of `labels`, with 95% intervals and the values written above them.

    A single group has its bars named below them, several have a legend.
    """
    figure, axes = new_figure()
    width = 0.8 / len(labels)
    top = max(score.high for group in groups.values() for score in group.values())
    for position, (key, label) in enumerate(labels.items()):
        at = np.arange(len(groups)) + (position - (len(labels) - 1) / 2) * width
        scores = [group[key] for group in groups.values()]
        values = np.array([score.value for score in scores])
        ends = np.array([[score.low for score in scores], [score.high for score in scores]])
        axes.bar(at, values, (0.9 if len(groups) > 1 else 0.6) * width, color=colours[key], label=label)
        errors = np.maximum([values - ends[0], ends[1] - values], 0)
        axes.errorbar(at, values, errors, fmt="none", ecolor=colours["ink"], elinewidth=1, capsize=2.5, capthick=1)
        for x, score in zip(at, scores):
            height = max(score.high, score.value) + 0.02 * top
            axes.text(x, height, f"{score.value:.1f}", ha="center", va="bottom", fontsize=8.5, color=colours["ink"])
    if len(groups) == 1:
        axes.set_xticks((np.arange(len(labels)) - (len(labels) - 1) / 2) * width, list(labels.values()))
        axes.set_ylabel(next(iter(groups)))
        axes.margins(x=0.08)
    else:
        axes.set_xticks(np.arange(len(groups)), list(groups))
        figure.legend(loc="outside upper left", ncols=len(labels), handlelength=1, handleheight=1, columnspacing=1.4)
    axes.set_ylim(0, 1.12 * top if top > 0 else 1)
    axes.grid(axis="y", linewidth=0.7)
    return figure


def _curves(losses: Mapping[str, Any], labels: Mapping[str, str], colours: Mapping[str, str]) -> Figure:
    """Losses over steps: each curve faint as logged, its running mean over a twentieth of the run in full colour."""
    figure, axes = new_figure()
    for key, label in labels.items():
        points = np.asarray(losses[key], dtype=float).reshape(-1, 2)
        colour = colours[{"pretrain": "image"}.get(key, key.removeprefix("dual_"))]
        axes.plot(points[:, 0], points[:, 1], color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(points[:, 0], _smooth(points[:, 1]), color=colour, linewidth=1.8, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(linewidth=0.7)
    axes.margins(x=0.01)
    figure.legend(loc="outside upper left", ncols=len(labels), handlelength=1.2, columnspacing=1.4)
    return figure


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean, float64[N] -> float64[N]; the window shrinks at the ends, nothing is padded."""
    half = math.ceil(len(values) / 40)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])
