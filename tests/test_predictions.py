"""Files of predictions: what they may hold, what is told of wrong ones, and ../shared's recorded values from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyvdl import metrics
from pyvdl.benchmarks import BY_NAME
from pyvdl.data import Question, Record, write_manifest
from pyvdl.datasets import read
from tests.dataset_shapes import MSRVTT_QA, ONE_KA
from tests.evaluations import Run, runner, scores_of, write_lines

SHARED = Path(__file__).resolve().parents[2] / "shared" / "metrics"
with_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the recorded metric vectors (../shared/metrics) are not here"
)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys)


@pytest.fixture
def one_ka(tmp_path: Path) -> Path:
    path = tmp_path / "MSRVTT_JSFUSION_test.csv"
    path.write_text(ONE_KA)
    return path


CAPTIONS = [
    {"key": "a", "prediction": "a b c d", "references": ["a b c"]},
    {"key": "b", "prediction": "x y", "references": ["x y"]},
]
ANSWERS = [
    {"key": "a", "question": 0, "prediction": "Two", "references": ["two", "2"], "type": "DC"},
    {"key": "a", "question": 1, "prediction": "a cat", "references": ["the dog"], "type": "TP"},
    {"key": "b", "question": 0, "prediction": "", "references": ["dog"], "type": "CW", "error": "no frames"},
    {"key": "b", "question": 1, "prediction": "three", "references": ["two"], "type": "DC"},
]


def test_predictions_with_references_need_nothing_else(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    code, told, _ = run("--predictions", write_lines(tmp_path / "c.jsonl", CAPTIONS), "--out", out)
    assert code == 0
    found = scores_of(out)
    expected = 100 * metrics.cider(["a b c d", "x y"], [["a b c"], ["x y"]]).score
    assert found["CIDEr-D"] == pytest.approx(expected, abs=1e-9)
    assert f"{expected:.2f}" in told
    assert run("--predictions", write_lines(tmp_path / "q.jsonl", ANSWERS), "--out", out)[0] == 0
    found = scores_of(out)
    assert found["exact match"] == 0
    assert found["exact match, lower and strip"] == pytest.approx(100 / 4)
    # By NExT-OE's rules a count is right or wrong, and TP counts as TN; cat and dog have 24 / 28.
    assert found["WUPS"] == pytest.approx(100 * (1 + 24 / 28) / 4)
    assert found["WUPS at 0.9"] == pytest.approx(100 * (1 + 0.1 * 24 / 28) / 4)
    assert (found["WUPS, DC"], found["WUPS, CW"], found["WUPS, TN"]) == (50, 0, pytest.approx(100 * 24 / 28))
    assert json.loads(out.read_text())["results"][0]["counts"] == {"clips": 2, "questions": 4, "failed": 1}


def test_arrays_need_no_annotations(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    videos = np.eye(3, dtype=np.float64) * [[2.0], [1.0], [0.5]]  # of any length and type
    videos[2] = np.nan
    texts = np.eye(3)[[0, 0, 1, 2]]
    np.savez(
        tmp_path / "p.npz",
        keys=["x", "y", "z"],
        embeddings=videos,
        text_keys=["x", "x", "y", "z"],
        text_embeddings=texts,
        classes=["one", "two"],
        class_embeddings=np.stack([np.eye(3)[:2], np.eye(3)[:2] + np.eye(3)[2] / 2], axis=1),  # of two templates
        labels=["one", "one", "two"],
    )
    assert run("--predictions", tmp_path / "p.npz", "--out", out)[0] == 0
    retrieval, classes = json.loads(out.read_text())["results"]
    assert [retrieval["counts"].pop(name) for name in ("videos", "texts", "failed")] == [3, 4, 1]
    assert set(retrieval["counts"].values()) == {0}
    value = {name: score["value"] for name, score in retrieval["scores"].items()}
    assert value["text to video R@1"] == 75
    assert value["text to video mean rank"] == pytest.approx(6 / 4)
    assert value["video to text, captions pooled R@1"] == pytest.approx(200 / 3)
    assert value["first caption: text to video R@10"] == pytest.approx(200 / 3)
    assert classes["scores"]["zero-shot top-1"]["value"] == pytest.approx(100 / 3)
    np.savez(tmp_path / "p.npz", similarity=[[0.0, 0, 0, 0]] * 3 + [[0, 0, 0, 1]])
    assert run("--predictions", tmp_path / "p.npz", "--out", out)[0] == 0
    (result,) = json.loads(out.read_text())["results"]
    assert result["counts"] == {
        "videos": 4,
        "texts": 4,
        "failed": 0,
        "tied_queries of text to video": 3,
        "tied_queries of video to text": 3,
    }
    np.savez(tmp_path / "p.npz", similarity=np.zeros((4, 4)))
    assert run("--predictions", tmp_path / "p.npz", "--out", out)[0] == 0
    value = scores_of(out)
    rules = ("text to video R@1", "text to video R@1, expected ties", "text to video R@1, loose ties")
    assert [value[name] for name in rules] == [0, 25, 100]


def test_predictions_of_a_manifest(run: Run, tmp_path: Path) -> None:
    options = ("a", "b", "c")
    records = [
        Record(
            key="v", video="v.mp4", captions=("a dog",), questions=(Question("?", "b", options=options, correct=1),)
        ),
        Record(
            key="w",
            video="w.mp4",
            captions=("a cat", "it"),
            questions=(Question("?", "a", options=options, correct=0),),
        ),
    ]
    write_manifest(tmp_path / "m.jsonl", records)
    beside = ["--data", tmp_path / "m.jsonl", "--out", tmp_path / "s.json"]
    rows = [{"key": key, "question": 0, "prediction": 1} for key in ("w", "v")]
    path = write_lines(tmp_path / "p.jsonl", rows)
    assert run("nextqa-mc", "--predictions", path, *beside)[0] == 0
    assert scores_of(tmp_path / "s.json")["accuracy"] == 50
    path = write_lines(tmp_path / "p.jsonl", [{"key": "w", "prediction": "it"}, {"key": "v", "prediction": "a dog"}])
    assert run("--predictions", path, *beside)[0] == 0
    assert scores_of(tmp_path / "s.json")["CIDEr-D"] > 100


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "p.jsonl: no predictions: expected JSON lines"),
        ([CAPTIONS[0], {"key": "b"}], "p.jsonl:2: prediction is missing: expected a string"),
        ([{"prediction": "x"}], "p.jsonl:1: key is missing"),
        (
            [CAPTIONS[0], {"key": "b", "prediction": "x"}],
            "p.jsonl:2: references is missing: expected the right",
        ),
        ([CAPTIONS[0], CAPTIONS[0]], "p.jsonl:2: key 'a' is in "),
        ([{**CAPTIONS[0], "references": "a b"}], "p.jsonl:1: references is 'a b': expected a list of strings"),
        ([{**CAPTIONS[0], "prediction": 3}], "p.jsonl:1: prediction is 3: expected a string"),
        ([{**ANSWERS[0], "options": ["x"], "correct": 1}], "p.jsonl:1: correct is 1: expected the number of the right"),
        (
            [{**ANSWERS[0], "options": ["x"], "correct": 0, "prediction": 1}],
            "p.jsonl:1: prediction is 1: expected the number of an option, 0 to 0",
        ),
    ],
)
def test_a_wrong_line_is_told_with_its_number(run: Run, rows: list[dict[str, Any]], says: str, tmp_path: Path) -> None:
    code, out, err = run("--predictions", write_lines(tmp_path / "p.jsonl", rows))
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [{"key": "video7010", "question": "0", "prediction": "x"}],
            "p.jsonl: 1 of 2 predictions are missing, the first of key 'video7010' with question '1': add lines",
        ),
        (
            [{"key": "video1", "question": "0", "prediction": "x"}],
            "p.jsonl:1: key 'video1' with question '0' is",
        ),
        ([{"key": "video7010", "prediction": "x"}], "p.jsonl:1: question is missing: expected the data set's key of"),
    ],
)
def test_predictions_must_be_those_of_the_benchmark(
    run: Run, rows: list[dict[str, Any]], says: str, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "p.jsonl", rows)
    (tmp_path / "test_qa.json").write_text(json.dumps(MSRVTT_QA))
    code, _, err = run("msrvtt-qa", "--predictions", path, "--annotations", tmp_path / "test_qa.json")
    assert code == 1
    assert says in err


UNIT = np.eye(2, dtype=np.float32)
PAIRED: dict[str, Any] = {"keys": ["video0", "video6513"], "embeddings": UNIT, "text_embeddings": UNIT}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("similarity", (2, 2)),
        ("class_similarity", (2, 2)),
        ("class_embeddings", (2, 2)),
        ("class_embeddings", (2, 1, 2)),
    ],
)
def test_numbers_that_are_none_are_told(run: Run, name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    value = np.ones(shape)
    value[1] = np.nan
    arrays: dict[str, Any] = {"embeddings": UNIT, "labels": ["0", "1"], name: value}
    np.savez(tmp_path / "p.npz", **arrays)
    code, _, err = run("--predictions", tmp_path / "p.npz")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"pyvdl evaluate: {tmp_path / 'p.npz'}: {name}[1] has NaN: expected numbers")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"embeddings": None}, "embeddings is missing: expected floats of [videos, E], or similarity"),
        ({"embeddings": UNIT[0]}, "embeddings is float32[2]: expected floats of [videos, E]"),
        ({"text_embeddings": np.ones((2, 3))}, "text_embeddings is float64[2, 3]: expected floats of [texts, 2]"),
        (
            {"text_embeddings": np.ones((3, 2))},
            "text_keys is missing: expected the video's key for each of the",
        ),
        ({"text_embeddings": UNIT * np.nan}, "text_embeddings[0] has NaN"),
        ({"embeddings": UNIT * 0}, "embeddings[0] has the length 0.0"),
        ({"keys": ["video0"]}, "expected 2 strings"),
        ({"keys": ["video0", "video0"]}, "keys has 'video0' twice"),
        ({"keys": ["video0", "video1"]}, "1 of 2 videos are missing, the first is 'video6513': add their rows"),
        ({"text_keys": ["video0", "video1"]}, "text_keys has 'video1', which is not in keys"),
        ({"text_keys": ["video0", "video0"]}, "text_keys has 'video0' 2 times: expected 1, once for each"),
        ({"vectors": UNIT}, "it has 'vectors': expected of keys, embeddings, "),
    ],
)
def test_wrong_arrays_are_told(run: Run, one_ka: Path, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    arrays = {name: value for name, value in (PAIRED | changes).items() if value is not None}
    np.savez(tmp_path / "p.npz", **arrays)
    code, _, err = run("msrvtt-1ka", "--predictions", tmp_path / "p.npz", "--annotations", one_ka)
    assert code == 1
    assert err.startswith(f"pyvdl evaluate: {tmp_path / 'p.npz'}: ")
    assert says in err


def test_a_file_of_the_wrong_kind_is_told(run: Run, one_ka: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", CAPTIONS)
    code, _, err = run("msrvtt-1ka", "--predictions", path, "--annotations", one_ka)
    assert code == 1
    assert "retrieval wants a NumPy archive" in err
    np.savez(tmp_path / "p.npz", **PAIRED)
    assert "expected JSON lines of captions" in run("msrvtt-captions", "--predictions", tmp_path / "p.npz")[2]
    path = write_lines(tmp_path / "q.jsonl", ANSWERS)
    assert "q.jsonl:1: question is 0: expected none with" in run("msrvtt-captions", "--predictions", path)[2]
    (tmp_path / "p.npz").write_bytes(b"no archive")
    assert "p.npz: " in run("--predictions", tmp_path / "p.npz")[2]


# --- the recorded values of ../shared/metrics


@with_shared
def test_recorded_captions(run: Run, tmp_path: Path) -> None:
    recorded = json.loads((SHARED / "cider_msvd40.json").read_text())
    rows = [
        {"key": item["id"], "prediction": item["hypothesis_raw"], "references": item["references_raw"]}
        for item in recorded["items"]
    ]
    path = write_lines(tmp_path / "p.jsonl", rows)
    assert run("--predictions", path, "--out", tmp_path / "s.json", "--save", tmp_path)[0] == 0
    found = scores_of(tmp_path / "s.json")
    assert found["CIDEr-D"] / 100 == pytest.approx(recorded["cider_d"], abs=1e-6)
    assert found["ROUGE-L"] / 100 == pytest.approx(recorded["rouge_l"], abs=1e-6)
    bleu = [found[f"BLEU-{n}"] / 100 for n in (1, 2, 3, 4)]
    assert bleu == pytest.approx(recorded["bleu"], abs=1e-6)
    each = [json.loads(line)["scores"] for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    for name, column in (("CIDEr-D", "cider_d"), ("ROUGE-L", "rouge_l")):
        wanted = [item[column] for item in recorded["items"]]
        np.testing.assert_allclose([scores[name] / 100 for scores in each], wanted, rtol=0, atol=1e-6)


@with_shared
def test_recorded_wups(run: Run, tmp_path: Path) -> None:
    """From the raw strings: all that prepares them is ours."""
    recorded = json.loads((SHARED / "wups_nextoe60.json").read_text())
    told = [dict(zip(recorded["fields"], row, strict=True)) for row in recorded["rows"]]
    rows = [
        {"key": row["video"], "question": row["qid"], "prediction": row["prediction"]}
        | {"references": [row["answer"]], "type": row["type"]}
        for row in told
    ]
    assert run("--predictions", write_lines(tmp_path / "p.jsonl", rows), "--save", tmp_path)[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    each = {(line["key"], line["question"]): line["scores"] for line in lines}
    assert len(each) == 60
    for name, column in (("WUPS", "wups0"), ("WUPS at 0.9", "wups0.9")):
        found = [each[row["video"], row["qid"]][name] / 100 for row in told]
        np.testing.assert_allclose(found, [row[column] for row in told], rtol=0, atol=1e-6)


@with_shared
def test_recorded_retrieval(run: Run, tmp_path: Path) -> None:
    expected = json.loads((SHARED / "retrieval_expected.json").read_text())
    with np.load(SHARED / "retrieval.npz") as found:
        square, several, owners = found["sim"], found["multi_sim"], found["multi_caption_to_video"]
    names = {"R1": "R@1", "R5": "R@5", "R10": "R@10", "MR": "median rank", "MeanR": "mean rank"}

    def check(prefix: str, wanted: dict[str, float]) -> None:
        values = scores_of(tmp_path / "s.json")
        for name, value in wanted.items():
            assert values[f"{prefix} {names[name]}"] == pytest.approx(value, abs=1e-5 if value > 10 else 1e-6), name

    def score(**arrays: Any) -> None:
        np.savez(tmp_path / "p.npz", **arrays)
        assert run("--predictions", tmp_path / "p.npz", "--out", tmp_path / "s.json")[0] == 0

    score(similarity=square)
    check("text to video", expected["square"]["t2v"])
    check("video to text", expected["square"]["v2t"])
    score(similarity=several, text_keys=owners)
    check("text to video", expected["multi_caption"]["t2v"] | {"MR": 1.0})
    check("video to text", expected["multi_caption"]["v2t_best_caption_any"])
    check("video to text, captions pooled", expected["multi_caption"]["v2t_max_pooled_over_captions"])
    score(similarity=np.zeros((4, 4)))
    ties, values = expected["ties_all_equal_4x4"], scores_of(tmp_path / "s.json")
    for rule, wanted in (
        (", loose ties", "optimistic_R1"),
        ("", "pessimistic_R1"),
        (", expected ties", "clip4clip_R1"),
    ):
        for direction in ("text to video", "video to text"):
            assert values[f"{direction} R@1{rule}"] == pytest.approx(ties[wanted], abs=1e-6)
    assert ties["expected_random_R1"] == ties["clip4clip_R1"]


@with_shared
@pytest.mark.parametrize(("name", "reader"), [("UCF101", "ucf101"), ("Kinetics700", "kinetics700")])
def test_recorded_prompts(name: str, reader: str, run: Run, tmp_path: Path) -> None:
    """Names of classes as the readers have them, and CLIP's templates: what a score file says."""
    recorded = json.loads((SHARED / "clip_prompts_ucf101_k700.json").read_text())[name]
    assert list(BY_NAME[reader].templates) == recorded["templates"]
    classes = recorded["classes"]
    files = [tmp_path / "classInd.txt", tmp_path / "testlist01.txt"]
    if reader == "ucf101":
        words = ["".join(text.split()) for text in classes]
        folders = ["HandstandPushups" if word == "HandStandPushups" else word for word in words]
        files[0].write_text("".join(f"{i} {word}\n" for i, word in enumerate(folders, 1)))
        files[1].write_text("".join(f"{f}/v_{w}_g01_c01.avi\n" for f, w in zip(folders, words)))
    else:
        files = [tmp_path / "val.csv"]
        rows = "".join(f'"{text}",id{i},0,10,val\n' for i, text in enumerate(classes))
        files[0].write_text(f"label,youtube_id,time_start,time_end,split\n{rows}")
    keys = [record.key for record in read(reader, files, "")]
    np.savez(tmp_path / "p.npz", keys=keys, class_similarity=np.eye(len(keys)), classes=classes)
    asked = [reader, "--predictions", tmp_path / "p.npz", "--annotations", *files, "--out", tmp_path / "s.json"]
    assert run(*asked)[0] == 0
    assert scores_of(tmp_path / "s.json") == {"zero-shot top-1": 100, "zero-shot top-5": 100}
    assert json.loads((tmp_path / "s.json").read_text())["results"][0]["options"]["classes"] == classes
