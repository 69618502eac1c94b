"""Benchmarks on files in their published shapes with tiny models; their predictions read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyvdl import metrics
from pyvdl.benchmarks import BENCHMARKS, BY_NAME, TABLES
from pyvdl.checkpoint import save_model
from pyvdl.data import Record, write_manifest
from pyvdl.datasets import READERS, read
from pyvdl.evaluate.running import locate
from pyvdl.text import CAPTION_PROMPT, QUESTION_PROMPT, WordTokenizer
from tests.clips import write_clip
from tests.dataset_shapes import ANET_A, ANET_Q, MSRVTT, MSRVTT_QA, NEXT_MC, NEXT_OE, ONE_KA, UCF, VATEX
from tests.evaluations import Run, runner, scores_of, write_lines
from tests.models import tiny_dual_encoder, tiny_vlm

SEGMENTS = {"v_abc": {"duration": 1.0, "timestamps": [[0, 0.4], [0.5, 1]], "sentences": ["She walks.", "She stops."]}}
VIDEOS: Any = MSRVTT["videos"]
CLASSES = (
    "label,youtube_id,time_start,time_end,split\npetting cat,---QUuC4vJs,84,94,validate\nair drumming,b,0,10,val\n"
)
# Of each data set below ROOT/annotations. Spoken Moments has none, Kinetics-700 has no videos.
ANNOTATIONS: dict[str, Any] = {
    "msrvtt/test_videodatainfo.json": {**MSRVTT, "videos": [v | {"split": "test"} for v in VIDEOS]},
    "activitynet-captions/val_2.json": SEGMENTS,
    "msrvtt-qa/test_qa.json": MSRVTT_QA,
    "activitynet-qa/test_q.json": ANET_Q,
    "activitynet-qa/test_a.json": ANET_A,
    "nextqa-oe/test.csv": NEXT_OE,
    "nextqa-oe/add_reference_answer_test.json": {"11": {"4": "not at all", "5": "fled"}},
    "nextqa-mc/test.csv": f"{NEXT_MC}22,9,640,360,why,0,3,CW,a b,c,d e f,g,h\n",
    "msrvtt-1ka/MSRVTT_JSFUSION_test.csv": ONE_KA,
    "vatex/vatex_public_test_english_v1.1.json": VATEX,
    "vatex/vatex_validation_v1.0.json": [{**VATEX[0], "videoID": "bbbbbbbbbbb_000000_000010"}],
    "vatex/test_list.txt": "".join(f"{clip['videoID']}\n" for clip in VATEX),
    "kinetics600/val.csv": CLASSES,
    "kinetics700/val.csv": CLASSES,
    "ucf101/classInd.txt": UCF["classInd.txt"],
    "ucf101/testlist01.txt": UCF["testlist01.txt"],
}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    for name, content in ANNOTATIONS.items():
        path = folder / "annotations" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    for i in range(2):
        write_clip(folder / f"{i}.mp4", seed=i)
    for benchmark in BENCHMARKS:
        if benchmark.name in ("smit-captions", "kinetics700"):
            continue
        files, videos = locate(benchmark, folder)
        for i, record in enumerate(read(benchmark.reader, files, videos)):
            Path(record.video).parent.mkdir(parents=True, exist_ok=True)
            if not Path(record.video).exists():
                shutil.copyfile(folder / f"{i % 2}.mp4", record.video)
    (folder / "videos" / "nextqa" / "22.mp4").write_bytes(b"no video")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A VLM and a dual encoder of random parameters."""
    tokenizer = WordTokenizer.from_texts([CAPTION_PROMPT, QUESTION_PROMPT, "a man walks . he stops , river road mall"])
    folder = tmp_path_factory.mktemp("models")
    vlm, dual = tiny_vlm(tokenizer), tiny_dual_encoder(tokenizer, num_frames=2, image_size=32)
    save_model(folder / "vlm", vlm, vlm.config, tokenizer)
    save_model(folder / "dual", dual, dual.config, tokenizer)
    return folder / "vlm", folder / "dual"


def test_all_runs_what_is_there_and_its_predictions_score_the_same(
    run: Run, root: Path, models: tuple[Path, Path], tmp_path: Path
) -> None:
    out, save = tmp_path / "scores.json", tmp_path / "said"
    options = ["--root", root, "--batch-size", 2, "--templates", "clip", "--clips", 2]
    code, told, _ = run("all", "--model", *models, *options, "--out", out, "--save", save)
    assert code == 0
    found = json.loads(out.read_text())
    by_name = {result["benchmark"]: result for result in found["results"]}
    assert set(by_name) == set(BY_NAME) - {"smit-captions", "kinetics700"}
    assert found["left_out"]["smit-captions"].startswith("no annotations: ")
    assert found["left_out"]["kinetics700"].startswith("none of its 2 videos is there, the first is ")
    assert all(f"  {name}: {why}" in told for name, why in found["left_out"].items())
    assert found["versions"]["jax"]
    for name, result in by_name.items():
        assert result["metrics"]
        assert set(result["metrics"].values()) <= set(metrics.DEFINITIONS.values())
        assert result["scores"].keys() >= result["paper"].keys()
        for score in result["scores"].values():
            assert score["low"] <= score["value"] <= score["high"]
        assert result["options"]["model"] == str(models[BY_NAME[name].task in ("retrieval", "classes")])
    assert by_name["nextqa-oe"]["counts"] == {"clips": 2, "questions": 3, "failed": 1, "missing_videos": 0}
    assert by_name["nextqa-mc"]["counts"]["failed"] == 1
    assert by_name["ucf101"]["options"]["templates"] == list(BY_NAME["ucf101"].templates)
    assert by_name["vatex"]["counts"]["texts"] == 3
    lengths = {name: result["options"].get("max_length") for name, result in by_name.items()}
    assert [lengths[name] for name in ("msrvtt-captions", "msrvtt-qa", "nextqa-mc", "vatex")] == [32, 16, None, None]
    assert "first caption: text to video R@1" in by_name["vatex"]["scores"]
    for table in TABLES:
        assert table.title in told
        assert all(name in told for name, _ in table.rows)
    ours = [line.split()[1:] for line in told.splitlines() if line.startswith("ours ")]
    assert ours[0][0] == f"{by_name['msrvtt-1ka']['scores']['text to video R@1']['value']:.2f}"

    again = tmp_path / "again.json"
    (save / "vatex.npz").rename(save / "elsewhere.npz")
    code, _, _ = run("all", "--predictions", save, "--root", root, "--out", again)
    assert code == 0
    second = json.loads(again.read_text())
    assert second["left_out"]["vatex"] == f"no predictions: {save / 'vatex.npz'} is not there"
    for result in second["results"]:
        assert result["scores"] == by_name[result["benchmark"]]["scores"]
    assert len(second["results"]) == len(by_name) - 1
    # What is right stands in the files, too: they need no annotations.
    for name in ("nextqa-oe", "nextqa-mc", "activitynet-captions"):
        assert run("--predictions", save / f"{name}.jsonl", "--out", again)[0] == 0
        assert scores_of(again) == {k: v["value"] for k, v in by_name[name]["scores"].items()}
    assert run("--predictions", save / "kinetics600.npz", "--out", again)[0] == 0
    assert scores_of(again) == {k: v["value"] for k, v in by_name["kinetics600"]["scores"].items()}


def test_what_is_wrong_in_one_benchmark_does_not_stop_the_others(run: Run, root: Path, tmp_path: Path) -> None:
    rows = [{"key": "video7010", "question": key, "prediction": "couch"} for key in ("0", "1")]
    write_lines(tmp_path / "msrvtt-qa.jsonl", rows)
    write_lines(tmp_path / "nextqa-oe.jsonl", [{"key": "11"}])
    code, told, _ = run("all", "--predictions", tmp_path, "--root", root, "--out", tmp_path / "s.json")
    assert code == 1
    assert f"\n  nextqa-oe: {tmp_path / 'nextqa-oe.jsonl'}:1: prediction is missing" in told
    found = json.loads((tmp_path / "s.json").read_text())
    (result,) = found["results"]
    assert (result["benchmark"], result["scores"]["exact match"]["value"]) == ("msrvtt-qa", 50)
    assert set(found["left_out"]) == set(BY_NAME) - {"msrvtt-qa"}
    (tmp_path / "msrvtt-qa.jsonl").unlink()
    (tmp_path / "nextqa-oe.jsonl").unlink()
    code, _, err = run("all", "--predictions", tmp_path, "--root", root)
    assert (code, err) == (1, "pyvdl evaluate: no benchmark could be run: what each wants is above\n")


def test_a_list_is_needed_where_it_makes_the_test_and_one_file_where_one_is_meant(run: Run, tmp_path: Path) -> None:
    for name in ("vatex/vatex_public_test_english_v1.1.json", "kinetics600/val.csv", "kinetics600/validate.csv"):
        (path := tmp_path / "annotations" / name).parent.mkdir(parents=True, exist_ok=True)
        content = VATEX if path.suffix == ".json" else CLASSES
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    np.savez(tmp_path / "p.npz", similarity=np.eye(3))
    asked = ["--predictions", tmp_path / "p.npz"]
    vatex, kinetics = tmp_path / "annotations" / "vatex", tmp_path / "annotations" / "kinetics600"
    code, _, err = run("vatex", *asked, "--root", tmp_path)
    assert (code, err) == (1, f"pyvdl evaluate: no annotations: {vatex / '*test*.txt'} is not there\n")
    code, _, err = run("vatex", *asked, "--annotations", vatex / "vatex_public_test_english_v1.1.json")
    assert (code, err.rpartition(": ")[2]) == (1, "vatex needs *test*.txt as well\n")
    code, _, err = run("kinetics600", *asked, "--root", tmp_path)
    assert code == 1
    assert err.startswith(f"pyvdl evaluate: {kinetics / 'val.csv'}, {kinetics / 'validate.csv'}: expected one of them")


def test_every_benchmark_has_a_reader_and_every_column_of_a_table_a_benchmark() -> None:
    assert {benchmark.reader for benchmark in BENCHMARKS} <= set(READERS)
    for table in TABLES:
        assert all(len(figures) == len(table.columns) for _, figures in table.rows)
        for i, (_, name, score) in enumerate(table.columns):
            assert table.rows[-1][1][i] == BY_NAME[name].paper[score]
    for benchmark in BENCHMARKS:
        if benchmark.task == "classes":
            assert len(set(benchmark.templates)) == {"ucf101": 48}.get(benchmark.name, 28)
            assert benchmark.template in benchmark.templates


def test_a_model_of_the_other_kind_is_told(run: Run, root: Path, models: tuple[Path, Path]) -> None:
    code, _, err = run("msrvtt-1ka", "--model", models[0], "--root", root)
    assert (code, err) == (1, "pyvdl evaluate: it needs a dual encoder: name one with --model\n")
    code, _, err = run("--model", models[0], models[0], "--data", "x.jsonl")
    assert code == 2
    assert "name one of each kind" in err
    code, _, err = run("--model", models[0], "--data", "x.jsonl", "--templates", "clip")
    assert code == 2
    assert "--clips and --templates go with a dual encoder" in err


def test_names_of_the_videos_go_with_a_root(run: Run, root: Path, models: tuple[Path, Path]) -> None:
    named = ["--root", root, "--names", "{label}/{youtube_id}.mp4"]
    code, _, err = run("kinetics700", "--model", models[1], *named)
    first = root / "videos" / "kinetics700" / "petting cat" / "---QUuC4vJs.mp4"
    assert (code, err) == (1, f"pyvdl evaluate: none of its 2 videos is there, the first is {first}\n")


def test_a_manifest_asks_each_model_what_it_has(
    run: Run, root: Path, models: tuple[Path, Path], tmp_path: Path
) -> None:
    video = str(root / "0.mp4")
    write_manifest(tmp_path / "m.jsonl", [Record(key=key, video=video, label=key) for key in ("walking", "river")])
    out = tmp_path / "s.json"
    assert run("--model", *models, "--data", tmp_path / "m.jsonl", "--out", out)[0] == 0
    (result,) = json.loads(out.read_text())["results"]
    assert (result["task"], result["options"]["classes"]) == ("classes", ["river", "walking"])
    code, _, err = run("--model", models[0], "--data", tmp_path / "m.jsonl")
    assert code == 1
    assert "no record has captions or questions, which this model would be asked for" in err


def test_missing_videos_are_misses_or_left_out(run: Run, root: Path, models: tuple[Path, Path], tmp_path: Path) -> None:
    files = [root / "annotations" / "ucf101" / name for name in ("classInd.txt", "testlist01.txt")]
    both = tmp_path / "testlist01.txt"
    both.write_text(files[1].read_text() + "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\n")
    asked = ["ucf101", "--model", models[1], "--annotations", files[0], both, "--videos", root / "videos" / "ucf101"]
    out = tmp_path / "scores.json"
    for more, top5, counts in (
        ([], 50, {"clips": 2, "classes": 2, "failed": 1, "missing_videos": 1}),
        (["--skip-missing"], 100, {"clips": 1, "classes": 2, "failed": 0, "left_out_for_want_of_video": 1}),
    ):
        assert run(*asked, *more, "--out", out)[0] == 0
        (result,) = json.loads(out.read_text())["results"]
        assert result["counts"] == counts
        assert result["scores"]["zero-shot top-5"]["value"] == top5
        assert result["options"]["templates"] == ["{}"]
        assert result["options"]["classes"] == ["Apply Eye Makeup", "Hand Stand Pushups"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["msrvtt-1ka"], "--model, or the --predictions"),
        (["--model", "m", "--predictions", "p"], "--model, or the --predictions"),
        (["all", "--model", "m", "--data", "d"], "all goes with --root"),
        (["--model", "m", "--root", "r"], "go with a benchmark: msrvtt-captions, "),
        (["vatex", "--model", "m"], "--model goes with --data, or"),
        (["vatex", "--model", "m", "--annotations", "a.json"], "--annotations goes with --videos"),
        (["vatex", "--model", "m", "--data", "d", "--root", "r"], "do not go together"),
        (["vatex", "--model", "m", "--data", "d", "--names", "{x}"], "--names goes with --annotations"),
        (["vatex", "--model", "m", "--data", "d", "--split", "val"], "--split goes with a benchmark's --annotations"),
        (
            ["all", "--model", "m", "--root", "r", "--names", "{x}"],
            "--names goes with --annotations, or with --root and",
        ),
        *(
            (["--predictions", "p", *option.split()], f"{option.split()[0]} goes with --model: predictions are made")
            for option in (
                "--clips 2",
                "--templates one",
                "--skip-missing",
                "--int8",
                "--sampling fps",
                "--batch-size 4",
                "--num-threads 1",
            )
        ),
        (["imagenet", "--model", "m", "--data", "d"], "'imagenet'"),
    ],
)
def test_what_does_not_go_together_is_told(run: Run, argv: list[str], says: str) -> None:
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert says in err
