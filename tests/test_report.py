"""The claims and their sentences, in the good and the bad case, and the page and table of a run."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyvdl.claims import claims, recovered_gain, verdict
from pyvdl.report import save_thumbnail, table, write_report

COLOURS = {"red": (214, 62, 54), "blue": (58, 104, 214), "green": (58, 168, 92), "yellow": (232, 190, 52)}


def score(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def stage(cider: float, exact: float, wups: float, detail: float) -> dict[str, Any]:
    return {
        "cider": score(cider, 6.1),
        "exact_match": score(exact, 3.4),
        "wups": score(wups, 3.0),
        "exact_match_by_family": {"temporal": exact - 8.0, "causal": exact + 1.5, "short": exact + 6.5},
        "mean_length": 8.4,
        "detail_recall": score(detail, 2.8),
        "detail_length": 11.0 + detail / 4,
    }


def encoder(recall: float) -> dict[str, Any]:
    return {
        "t2v": {
            "R@1": score(recall * 0.4, 3.0),
            "R@5": score(recall, 4.0),
            "R@10": score(recall * 1.25, 4.2),
            "median_rank": 6.0,
        },
        "v2t": {
            "R@1": score(recall * 0.38, 3.0),
            "R@5": score(recall * 0.97, 4.0),
            "R@10": score(recall * 1.2, 4.2),
            "median_rank": 7.0,
        },
        "top1": score(recall * 0.9, 4.0),
        "top5": score(min(96.0, recall * 1.5), 2.5),
    }


def curve(seed: int, steps: int, first: float, last: float) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    step = np.arange(0, steps, 5)
    loss = last + (first - last) * np.exp(-4 * step / steps) + rng.normal(0, 0.05 * first, len(step))
    return [[int(s), float(value)] for s, value in zip(step, loss)]


def clip(seed: int, colour: tuple[int, int, int], frames: int = 8, size: int = 96) -> np.ndarray:
    """uint8[T, H, W, 3]: a square or disc that crosses a noisy, moving background."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    result = np.empty((frames, size, size, 3), np.uint8)
    for t in range(frames):
        picture = np.stack([120 + 50 * np.sin((x + 4 * t) / 9 + c) * np.cos(y / 13 + seed) for c in range(3)], -1)
        centre = 14 + t * (size - 28) / max(1, frames - 1), size / 2 + 20 * np.sin(seed + t / 2)
        away_x, away_y = np.abs(x - centre[0]), np.abs(y - centre[1])
        inside = (np.maximum(away_x, away_y) if seed % 2 else np.hypot(away_x, away_y)) < 13
        picture[inside] = colour
        result[t] = np.clip(picture + rng.normal(0, 9, picture.shape), 0, 255)
    return result


@pytest.fixture
def report() -> dict[str, Any]:
    """A run in which all four claims hold; the examples' frames are named, not written (see `with_frames`)."""
    names = [f"test-{number:04d}" for number in range(8)]
    losses = {
        "pretrain": curve(1, 900, 5.2, 1.1),
        "visual": curve(2, 600, 2.8, 0.9),
        "language": curve(3, 800, 3.4, 0.8),
        "dual_alt_text": curve(4, 700, 4.1, 2.9),
        "dual_pseudo_captions": curve(5, 700, 4.1, 1.6),
        "dual_human_captions": curve(6, 700, 4.1, 1.2),
    }
    return {
        "pyvdl": "0.1.0",
        "machine": {"cpu": "2 cores of an x86-64 server", "memory_gib": 8, "system": "Debian 12", "device": "cpu"},
        "versions": {"python": "3.12.9", "jax": "0.12.1", "flax": "0.12.8", "numpy": "2.4.0", "ffmpeg": "5.1.7"},
        "seed": 0,
        "seconds": {
            "corpus": 96.4,
            "pretrain": 121.0,
            "visual": 95.2,
            "language": 130.6,
            "caption": 58.3,
            "dual_encoder": 212.4,
            "evaluate": 44.9,
            "total": 771.2,
        },
        "corpus": {
            "train": 700,
            "unlabelled": 600,
            "test": 200,
            "files": 1180,
            "codecs": {"h264": 700, "hevc": 180, "vp9": 180, "mpeg4": 120},
            "alt_text_noise": {"wrong": 0.25, "missing": 0.3, "vague": 0.25},
        },
        "vlm": {
            "image": stage(31.8, 18.2, 25.9, 20.5),
            "visual": stage(84.6, 21.3, 29.1, 31.0),
            "language": stage(86.0, 63.4, 69.9, 58.7),
        },
        "dual_encoder": {"alt_text": encoder(22.5), "pseudo_captions": encoder(52.0), "human_captions": encoder(57.5)},
        "caption_statistics": {
            "alt_text": {"captions": 600, "mean_length": 4.1, "unique_nouns": 41, "unique_verbs": 9, "vocabulary": 88},
            "pseudo_captions": {
                "captions": 4800,
                "mean_length": 8.6,
                "unique_nouns": 34,
                "unique_verbs": 17,
                "vocabulary": 96,
            },
            "human_captions": {
                "captions": 600,
                "mean_length": 8.9,
                "unique_nouns": 36,
                "unique_verbs": 19,
                "vocabulary": 104,
            },
        },
        "recovered_gain": 29.5 / 35,
        "losses": losses,
        "throughput": {
            "decode": {"clips_per_second": 214.6, "frames_per_second": 1716.9, "threads": 2},
            "wait_share": {"visual": 0.012, "language": 0.008, "dual_encoder": 0.16},
            "caption": {"clips_per_second": 31.4, "tokens_per_second": 2310.0},
        },
        "examples": {
            "captions": [
                {
                    "key": names[index],
                    "video": f"videos/{names[index]}.mp4",
                    "frames": [f"{names[index]}-{frame}.png" for frame in range(8)],
                    "human": [f"a {colour} shape crosses the picture and then grows"],
                    "image": f"a {colour} shape <b>&",
                    "visual": f"a {colour} shape crosses the picture",
                    "language": f"a {colour} shape crosses the picture and turns",
                    "detail": f"first a {colour} shape enters, then it crosses the picture, then it grows",
                    "questions": [
                        {
                            "question": "what happens then?",
                            "answer": "it grows",
                            "before": "a shape",
                            "after": "It grows",
                        },
                        {"question": "which colour is it?", "answer": colour, "before": colour, "after": colour},
                    ],
                }
                for index, colour in enumerate(COLOURS)
            ],
            "retrieval": [
                {
                    "query": f"a {colour} shape crosses the picture",
                    "key": names[index],
                    "encoder": "pseudo_captions",
                    "ranked": [
                        {
                            "key": names[other],
                            "frame": f"{names[other]}-0.png",
                            "score": 0.81 - 0.06 * rank,
                            "correct": other == index,
                        }
                        for rank, other in enumerate([(index + shift) % 4 for shift in (3, 0, 1, 2, 2)])
                    ],
                }
                for index, colour in enumerate(COLOURS)
            ],
        },
    }


@pytest.fixture
def with_frames(report: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    for seed, (example, colour) in enumerate(zip(report["examples"]["captions"], COLOURS.values())):
        for name, frame in zip(example["frames"], clip(seed, colour)):
            save_thumbnail(frame, tmp_path / name)
    return report


class Addresses(HTMLParser):
    """Collects what a page would load, its scripts and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)
        self.loaded += [
            value or "" for name, value in attributes if name in ("src", "srcset", "href", "data", "poster")
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_all_claims_hold(report: dict[str, Any]) -> None:
    tested = claims(report)
    assert [claim["holds"] for claim in tested] == [True, True, True, True]
    sentence = verdict(tested)
    assert sentence.startswith("All four claims hold: ")
    for figure in ("31.8", "84.6", "21.3", "63.4", "22.5", "52.0", "84%"):
        assert figure in sentence
    assert "not" not in sentence.split()


def test_one_claim_fails_and_the_verdict_says_which(report: dict[str, Any]) -> None:
    report["vlm"]["language"]["cider"] = score(70.0, 5.0)
    tested = claims(report)
    assert [claim["holds"] for claim in tested] == [True, False, True, True]
    assert "below the value before, so it counts as lost" in tested[1]["figures"]
    sentence = verdict(tested)
    assert sentence.startswith("Three of four claims hold: the visual stage raises CIDEr")
    failed = sentence.partition(" One does not: ")[2]
    assert "CIDEr falls from 84.6 to 70.0 [65.0, 75.0]" in failed
    assert "keeps CIDEr" not in sentence
    assert "recover 84%" not in failed


def test_all_claims_fail(report: dict[str, Any]) -> None:
    report["vlm"] = {"image": stage(60, 50, 55, 50), "visual": stage(55, 50, 55, 50), "language": stage(30, 30, 55, 52)}
    report["dual_encoder"] = {
        "alt_text": encoder(50.0),
        "pseudo_captions": encoder(40.0),
        "human_captions": encoder(48.0),
    }
    tested = claims(report)
    assert not any(claim["holds"] for claim in tested)
    sentence = verdict(tested)
    assert sentence.startswith("None of the four claims holds: ")
    for wrong in ("raises", "lifts", "keeps", "recover "):
        assert wrong not in sentence.replace("no gain to recover", "")
    assert "lower, with 95% intervals that do not overlap" in tested[1]["figures"]  # exact match fell
    assert "with 95% intervals that overlap" in tested[1]["figures"]  # WUPS stayed
    assert "human captions (R@5 48.0) do not beat alt-text (50.0)" in sentence
    assert recovered_gain(report) is None


def test_single_claim_holding_reads_well(report: dict[str, Any]) -> None:
    report["vlm"]["language"]["wups"] = score(30.0, 3.0)
    report["dual_encoder"]["pseudo_captions"] = encoder(28.0)
    tested = claims(report)
    assert [claim["holds"] for claim in tested] == [True, False, False, False]
    sentence = verdict(tested)
    assert sentence.startswith("One of four claims holds: ")
    assert " Three do not: " in sentence
    assert "WUPS is not clearly up (29.1 [26.1, 32.1] to 30.0 [27.0, 33.0])" in sentence
    assert "recover 16% of what human captions gain, less than 70%" in sentence


@pytest.mark.parametrize(("low", "holds"), [(37.9, False), (37.9 + 1e-6, True), (37.8, False)])
def test_touching_intervals_count_as_overlap(report: dict[str, Any], low: float, holds: bool) -> None:
    report["vlm"]["image"]["cider"] = {"value": 31.8, "low": 25.7, "high": 37.9}
    report["vlm"]["visual"]["cider"] = {"value": 40.0, "low": low, "high": 45.0}
    claim = claims(report)[0]
    assert claim["holds"] is holds
    assert ("do not overlap" in claim["figures"]) is holds


def test_figures_that_decide_are_not_rounded_to_the_same_text(report: dict[str, Any]) -> None:
    report["vlm"]["image"]["cider"] = {"value": 31.8, "low": 25.7, "high": 37.91}
    report["vlm"]["visual"]["cider"] = {"value": 40.0, "low": 37.94, "high": 45.0}
    assert "37.94" in claims(report)[0]["figures"]
    assert "37.91" in claims(report)[0]["figures"]
    for texts, value in (("alt_text", 0.0), ("pseudo_captions", 69.96), ("human_captions", 100.0)):
        report["dual_encoder"][texts]["t2v"]["R@5"] = {"value": value, "low": value, "high": value}
    claim = claims(report)[3]
    assert not claim["holds"]
    assert "69.96% of the gain, less than 70%" in claim["figures"]


@pytest.mark.parametrize(("high", "holds"), [(84.6, True), (84.59, False)])
def test_cider_is_kept_when_its_interval_reaches_the_value_before(
    report: dict[str, Any], high: float, holds: bool
) -> None:
    report["vlm"]["language"]["cider"] = {"value": 80.0, "low": 75.0, "high": high}
    assert claims(report)[1]["holds"] is holds


@pytest.mark.parametrize("key", ["exact_match", "wups", "detail_recall"])
def test_language_claim_needs_every_part(report: dict[str, Any], key: str) -> None:
    report["vlm"]["language"][key] = report["vlm"]["visual"][key]
    assert [claim["holds"] for claim in claims(report)] == [True, False, True, True]


@pytest.mark.parametrize(("pseudo", "holds"), [(17.0, True), (16.9, False), (25.0, True)])
def test_recovered_share_at_its_border(report: dict[str, Any], pseudo: float, holds: bool) -> None:
    for texts, value in (("alt_text", 10.0), ("pseudo_captions", pseudo), ("human_captions", 20.0)):
        report["dual_encoder"][texts]["t2v"]["R@5"] = score(value, 1.0)
    assert recovered_gain(report) == pytest.approx((pseudo - 10) / 10)
    assert claims(report)[3]["holds"] is holds


def test_an_uncertain_gain_is_named(report: dict[str, Any]) -> None:
    assert "not well known" not in claims(report)[3]["figures"]
    report["dual_encoder"]["human_captions"]["t2v"]["R@5"] = score(24.0, 4.0)
    assert "not well known" in claims(report)[3]["figures"]


def test_equal_human_and_alt_text_is_undefined(report: dict[str, Any]) -> None:
    report["dual_encoder"]["human_captions"] = copy.deepcopy(report["dual_encoder"]["alt_text"])
    claim = claims(report)[3]
    assert not claim["holds"]
    assert "human captions do not beat alt-text, so there is no gain" in claim["figures"]


def test_bad_numbers_are_refused(report: dict[str, Any]) -> None:
    for bad, message in (
        ({"value": float("nan"), "low": 1.0, "high": 2.0}, "finite"),
        ({"value": 1.0, "low": 2.0, "high": 1.0}, "'low' must not be above"),
        (12.0, "expected an object"),
    ):
        broken = copy.deepcopy(report)
        broken["vlm"]["visual"]["cider"] = bad
        with pytest.raises(ValueError, match=message):
            claims(broken)
    del report["dual_encoder"]["pseudo_captions"]
    with pytest.raises(ValueError, match=r"lacks 'dual_encoder.pseudo_captions'"):
        claims(report)
    with pytest.raises(ValueError, match="no claims"):
        verdict([])


def test_table_is_aligned(report: dict[str, Any]) -> None:
    text = table(report)
    assert "84.6 [78.5, 90.7]" in text
    for block, columns in zip(text.split("\n\n"), (("visual stage", "language stage"), ("pseudo-captions", "human"))):
        head, rule, *rows = block.splitlines()
        assert set(rule) == {"-"}
        for column in columns:
            start = head.index(column)
            assert all(row[start - 1] == " " and row[start].isdigit() for row in rows)
    assert max(map(len, text.splitlines())) <= 100
    assert "median rank" in text


def test_page_is_self_contained_and_shows_everything(with_frames: dict[str, Any], tmp_path: Path) -> None:
    report = json.loads(json.dumps(with_frames))  # what a reader of report.json has
    path = write_report(report, tmp_path)
    assert path == tmp_path / "report.html"
    page = path.read_text(encoding="utf-8")
    found = Addresses()
    found.feed(page)
    assert not found.open
    assert "script" not in found.tags
    assert "link" not in found.tags
    assert found.loaded
    assert all(address.startswith("data:image/") for address in found.loaded)
    assert "url(" not in page
    assert "@import" not in page
    assert len(page) < 4_000_000

    shown = " ".join("".join(found.texts).replace("\u00a0", " ").split())
    assert verdict(claims(report)) in shown
    for claim in claims(report):
        assert claim["figures"] in shown
    assert shown.count("✓ holds") == 4
    assert "a red shape <b>&" in shown  # a model's words are text, never markup
    assert "25% wrong, 30% missing, 25% vague" in shown
    assert "1,180 video files rendered and encoded (700 h264, 180 hevc, 180 vp9, 120 mpeg4)" in shown
    assert "Right clip at rank 2 · encoder trained on pseudo-captions" in shown
    assert "12 min 51 s" in shown
    assert "Everything else" in shown
    assert "Debian 12" in shown
    assert found.tags.count("img") == 2 * 7 + 4 * 8 + 4 * 5  # each plot in a light and a dark version
    assert "<mark>crosses</mark>" in page
    assert "<mark>then</mark>" not in page
    assert page.count('aria-label="wrong"') == 4  # "a shape" for "it grows", once a clip; case does not matter

    from PIL import Image

    plots = sorted(tmp_path.glob("plot-*.png"))
    assert len(plots) == 14
    for plot in plots:
        with Image.open(plot) as image:
            assert image.size == (1040, 660)
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20


def test_page_in_the_negative_case(with_frames: dict[str, Any], tmp_path: Path) -> None:
    with_frames["vlm"]["visual"]["cider"] = score(33.0, 6.0)
    with_frames["dual_encoder"]["human_captions"] = encoder(20.0)
    for example in with_frames["examples"]["retrieval"]:
        for entry in example["ranked"]:
            entry["correct"] = False
    with_frames["examples"]["captions"][0]["questions"] = []
    page = write_report(with_frames, tmp_path).read_text(encoding="utf-8").replace("\u00a0", " ")
    assert "<title>pyvdl: 2 of 4 claims hold</title>" in page
    assert "Two of four claims hold" in page
    assert page.count("✗ does not hold") == 2
    assert page.count("Right clip not among these") == 4
    assert "verdict fails" in page


def test_missing_frames_and_shares_that_are_none_are_refused(with_frames: dict[str, Any], tmp_path: Path) -> None:
    broken = copy.deepcopy(with_frames)
    broken["examples"]["captions"][0]["frames"] = ["nowhere.png"]
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        write_report(broken, tmp_path)
    with_frames["throughput"]["wait_share"]["visual"] = 12.0
    with pytest.raises(ValueError, match="fraction from 0 to 1"):
        write_report(with_frames, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_thumbnail(tmp_path: Path) -> None:
    from PIL import Image

    (frame,) = clip(3, COLOURS["red"], frames=1, size=40)
    tall = np.full((400, 200, 3), (10, 200, 30), np.uint8)
    with Image.open(save_thumbnail(tall, tmp_path / "thumbnail.png")) as image:
        assert image.size == (80, 160)
        assert image.getpixel((40, 80)) == (10, 200, 30)
    with Image.open(save_thumbnail(frame, tmp_path / "small.png")) as image:
        assert np.array_equal(np.asarray(image), frame)

    with pytest.raises(ValueError, match=r"float64\[40, 40, 3\]; expected uint8"):
        save_thumbnail(frame.astype(float), tmp_path / "bad.png")
