"""The command line: help, mistakes, every verb on a small corpus; a training that is killed runs in its own process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import pyvdl
from pyvdl.__main__ import main
from pyvdl.commands.training import _print_training
from pyvdl.data import read_manifest
from pyvdl.rows import read_captions
from tests.clips import write_clip

VERBS = ("demo", "probe", "prepare", "instruct", "adapt", "caption", "status", "train", "evaluate", "embed", "stats")
ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "parity" / "golden"
SHARED_VIDEOS = ROOT.parent / "shared" / "videos"
Run = Callable[..., tuple[int, str, str]]
# A model and recipe that compile and train in seconds.
TINY = [
    "--set=steps=6",
    "--set=batch_size=4",
    "--set=optim.warmup_steps=2",
    "--set=log_every=2",
]
TINY_VLM = [
    *TINY,
    "--set=model.num_frames=2",
    "--set=model.vision.image_size=32",
    "--set=model.vision.depth=1",
    "--set=model.language.encoder_layers=1",
    "--set=model.language.decoder_layers=1",
]
TINY_DUAL = [
    *TINY,
    "--set=model.vision.num_frames=2",
    "--set=model.vision.image_size=32",
    "--set=model.vision.depth=1",
    "--set=model.text.depth=1",
]


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The same programs are compiled again and again here, in this process and in others: keep them on disk."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    folder = str(tmp_path_factory.mktemp("compiled"))
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        yield
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; returns its exit code, stdout and stderr."""

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "corpus"
    assert main(["prepare", "--out", str(folder), "--synthetic", "24", "--seed", "5"]) == 0
    return folder


@pytest.fixture(scope="module")
def vlm(corpus: Path) -> Path:
    """A VLM after both stages."""
    runs = corpus.parent
    data = ["--data", str(corpus / "train.jsonl")]
    assert main(["adapt", "--stage", "visual", *data, "--out", str(runs / "visual"), *TINY_VLM]) == 0
    start = ["--model", str(runs / "visual" / "model")]
    assert main(["adapt", "--stage", "language", *start, *data, "--out", str(runs / "language"), *TINY]) == 0
    return runs / "language" / "model"


@pytest.fixture(scope="module")
def dual(corpus: Path) -> Path:
    out = corpus.parent / "dual"
    data = ["--data", str(corpus / "unlabelled.jsonl"), "--captions", "human"]
    assert main(["train", *data, "--out", str(out), *TINY_DUAL]) == 0
    return out / "model"


def test_training_reads_what_was_prepared(corpus: Path, dual: Path, run: Run, tmp_path: Path) -> None:
    """On an array of clips, one of which could not be decoded; the program is that of `dual`, which is compiled."""
    lines = (corpus / "unlabelled.jsonl").read_text()
    extra = json.dumps({"key": "gone", "video": "videos/gone.mp4", "captions": ["it moves"]})
    (corpus / "with_gone.jsonl").write_text(f"{lines}{extra}\n")
    shape = ["--set=num_frames=2", "--set=size=32", "--set=short_side=37"]
    job = ["--data", corpus / "with_gone.jsonl", "--to", "arrays", *shape, "--out", tmp_path / "cache"]
    code, out, err = run("prepare", *job)
    assert code == 0
    assert out.startswith(f"{tmp_path / 'cache' / 'clips.jsonl'}: {len(lines.splitlines())} clips (1 left out) in 1 ")
    assert err.count("gone: open: No such file or directory") == 1
    code, out, err = run("probe", tmp_path / "cache" / "clips.jsonl", "--json")
    assert code == 1
    assert {json.loads(line)["error"] for line in out.splitlines()} == {
        "open: a row of an array that `pyvdl prepare` wrote: frames, not a video"
    }
    data = ["--data", tmp_path / "cache" / "clips.jsonl", "--captions", "human"]
    assert run("train", *data, "--out", tmp_path / "run", *TINY_DUAL)[0] == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["failed_share"]) == (6, 0)


def test_help_names_every_verb_and_each_has_an_example(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert all(f"\n  {verb} " in out for verb in VERBS)
    for verb in VERBS:
        code, out, err = run(verb, "--help")
        assert (code, err) == (0, "")
        assert f"example:\n  pyvdl {verb} " in out


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"pyvdl {pyvdl.__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "VERB"),
        (["state"], "'state'"),
        (["probe"], "at least one video"),
        (["probe", "--frobnicate"], "--frobnicate (see pyvdl probe --help)"),
        (["evaluate", "--data", "x.jsonl"], "--model"),
        (["caption", "x.mp4", "--model", "m", "--num-samples", "0"], "'0' is not a whole number above 0"),
        (["caption", "x.mp4", "--model", "m", "--top-p", "1.5"], "'1.5' is not"),
        (["caption", "x.mp4", "--model", "m", "--temperature", "-1"], "--temperature"),
        (["caption", "x.mp4", "--model", "m", "--sampling", "often"], "'often'"),
        (["caption", "x.mp4", "--mod", "m"], "--mod"),
        (["adapt", "--stage", "third", "--data", "d", "--out", "o"], "'third'"),
        (["adapt", "--stage", "visual", "--data", "d", "--out", "o", "--set", "stepz=3"], "'stepz'"),
        (["train", "--data", "d", "--captions", "human", "--out", "o", "--set", "steps=many"], "steps must be int"),
        (["train", "--data", "d", "--captions", "human", "--out", "o", "--set", "model.depth=2"], "'model.depth'"),
        (["train", "--data", "d", "--captions", "human", "--out", "o", "--set", "optim.name=adam"], "'adamw'"),
        (["train", "--data", "d", "--captions", "human", "--out", "o", "--seed", "1"], "--seed"),
        (["caption", "x.mp4", "--engine", "ray"], "go with --out"),
        (["caption", "x.mp4", "--export", "coco"], "goes with --out"),
        (["caption", "x.mp4", "--tensor", "2"], "--fsdp and --tensor go with --out"),
        (["caption", "x.mp4", "--out", "memory://o", "--export", "coco"], "a local folder, and --out is memory://o"),
        (["embed", "x.mp4", "--model", "m", "--out", "s3://o", "--export", "npz"], "a local folder"),
        (["caption", "x.mp4", "--out", "o", "--workers", "2"], "go with --engine ray"),
        (["caption", "x.mp4", "--out", "o", "--engine", "ray", "--worker-resources", "GPU"], "such as GPU=1"),
        (["caption", "x.mp4", "--out", "o", "--engine", "ray", "--distributed"], "brings its own processes"),
        (["train", "--data", "d", "--captions", "human", "--out", "o", "--set", "batch_size=0"], "batch_size must be"),
        (
            ["train", "--data", "d", "--captions", "human", "--out", "o", "--set", "steps=10"],
            "optim.warmup_steps must be",
        ),
        (
            ["adapt", "--stage", "visual", "--data", "d", "--out", "o", "--set", "clip.scale_jitter=(2,1)"],
            "clip.scale_j",
        ),
        (
            ["adapt", "--stage", "visual", "--data", "d", "--out", "o", "--set", "clip.size=32"],
            "clip.size follows from",
        ),
        (
            ["adapt", "--stage", "visual", "--data", "d", "--out", "o", "--set", "model.vision.depth=0"],
            "model.vision.depth",
        ),
        (["prepare", "--synthetic", "20", "--out", "o", "--seed", "-1"], "'-1'"),
        (["prepare", "--out", "o", "--synthetic", "9"], "at least 10"),
        (["train", "--data", "d", "--captions", "humn", "--out", "o"], "'humn' is neither 'human' nor 'alt_text'"),
        (["instruct", "--data", "m.jsonl", "--out", "m.jsonl"], "--out is --data"),
        (["prepare", "--out", "o"], "one of the arguments --data --synthetic is required"),
        (["prepare", "--out", "o", "--data", "m.jsonl"], "--data goes with --to"),
        (["prepare", "--out", "o", "--synthetic", "20", "--to", "tars"], "go with --data"),
        (["prepare", "--out", "o", "--data", "m.jsonl", "--to", "tars", "--set", "size=2"], "size"),
        (["prepare", "--out", "o", "--data", "m.jsonl", "--to", "arrays", "--set", "size=0"], "size"),
    ],
)
def test_a_wrong_command_is_one_line_and_code_2(run: Run, argv: list[str], says: str) -> None:
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("pyvdl")
    assert says in err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["caption", "x.mp4", "--model", "nowhere"], "nowhere"),
        (["caption", "x.mp4", "--model", "nowhere", "--out", "/dev/null/o"], "nothing can be written into /dev/null/o"),
        (["adapt", "--stage", "visual", "--data", "no.jsonl", "--out", "o"], "no.jsonl"),
        (  # 128 parts of the language stage's batch, which has 256 clips; the visual one has 64
            [
                "adapt",
                "--stage",
                "language",
                "--preset",
                "paper",
                "--data",
                "no.jsonl",
                "--out",
                "o",
                "--set=accumulate=128",
            ],
            "no.jsonl",
        ),
        (["stats", "--captions", "no.jsonl"], "no.jsonl"),
        (["caption", "none.jsonl", "--model", "nowhere"], "no clips in what was named"),
        (["probe", "none.jsonl"], "no videos in what was named"),
        (["prepare", "--data", "none.jsonl", "--to", "tars", "--out", "o"], "no clips in what was named"),
        (["adapt", "--stage", "visual", "--data", "none.jsonl", "--out", "o"], "no record has captions"),
        (
            ["adapt", "--stage", "visual", "--data", "one.jsonl", "--out", "o", "--fraction", "0.0001"],
            "a share of 0.0001 takes none of 1 records",
        ),
        (["status", "nowhere"], "nowhere holds no job"),
    ],
)
def test_a_failed_job_is_one_line_and_code_1(
    run: Run, argv: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("none.jsonl").touch()
    Path("one.jsonl").write_text('{"key": "a", "video": "a.mp4", "captions": ["it moves"]}\n')
    code, out, err = run(*argv)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert err.startswith(f"pyvdl {argv[0]}: ")
    assert says in err


def test_probe_gives_each_file_a_row(run: Run, corpus: Path, tmp_path: Path) -> None:
    video = sorted((corpus / "videos").glob("train_0*.mp4"))[0]
    (tmp_path / "good.mp4").write_bytes(video.read_bytes())
    (tmp_path / "bad.mkv").write_bytes(b"not a video at all" * 50)
    (tmp_path / "notes.txt").write_text("left out of a folder")
    code, out, err = run("probe", tmp_path, tmp_path / "missing.mp4", "--json")
    assert (code, err) == (0, "")
    bad, good, missing = map(json.loads, out.splitlines())
    assert [Path(row["video"]).name for row in (bad, good, missing)] == ["bad.mkv", "good.mp4", "missing.mp4"]
    assert [row["status"] for row in (bad, good, missing)] == ["failed", "ok", "failed"]
    assert bad["error"]
    assert missing["error"]
    assert good["error"] is None
    assert good["size"] == "128x128"
    assert good["fps"] == pytest.approx(12)
    assert good["seconds"] == pytest.approx(good["frames"] / 12, abs=0.01)
    code, out, err = run("probe", tmp_path)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["video", "codec", "size", "fps", "frames", "seconds", "rotation", "status"]
    assert len(out.splitlines()) == 3


def test_probe_of_nothing_that_can_be_read_fails(run: Run, tmp_path: Path) -> None:
    code, out, err = run("probe", tmp_path / "missing.mp4", "--json")
    assert (code, err) == (1, "pyvdl probe: none of the 1 videos named could be read\n")
    assert json.loads(out)["status"] == "failed"
    assert "index of packets" in run("probe", "--help")[1]


def test_probe_reads_manifests_and_says_versions(run: Run, corpus: Path) -> None:
    manifest = corpus / "test.jsonl"
    videos = {json.loads(line)["video"] for line in manifest.read_text().splitlines()}
    code, out, _ = run("probe", manifest, "--json")
    assert code == 0
    assert len(out.splitlines()) == len(videos)
    code, out, _ = run("probe", "--versions")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()][:2] == ["pyvdl", "jax"]
    assert "libavcodec" in out


def test_a_clip_named_twice_is_refused_where_keys_matter(run: Run, tmp_path: Path) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"key": "a", "video": "v.mp4"}\n')
    code, _, err = run("caption", manifest, manifest)
    assert (code, "key 'a' is named twice" in err) == (2, True)
    assert len(run("probe", manifest, manifest, "--json")[1].splitlines()) == 1


def test_a_folder_without_videos_is_told(run: Run, tmp_path: Path) -> None:
    code, _, err = run("probe", tmp_path)
    assert code == 1
    assert "no video and no tar in this folder" in err


def test_instruct_writes_questions_of_three_families(run: Run, corpus: Path, tmp_path: Path) -> None:
    code, _, err = run("instruct", "--data", corpus / "train.jsonl", "--out", tmp_path)
    assert (code, "is a folder" in err) == (2, True)
    out_file = tmp_path / "new" / "instructions.jsonl"
    code, out, _ = run("instruct", "--data", corpus / "train.jsonl", "--out", out_file)
    assert code == 0
    rows = [json.loads(line) for line in out_file.read_text().splitlines()]
    families = {question["family"] for row in rows for question in row["questions"]}
    assert families == {"temporal", "causal", "short"}
    assert f"{sum(len(row['questions']) for row in rows)} questions" in out
    # Paths in the new manifest still lead to the videos.
    code, out, _ = run("probe", out_file, "--json")
    assert all(json.loads(line)["status"] == "ok" for line in out.splitlines())


def test_instruct_leaves_out_what_it_cannot_read(run: Run, tmp_path: Path) -> None:
    manifest, out_file = tmp_path / "m.jsonl", tmp_path / "out.jsonl"
    rows = [
        {"key": "plain", "video": "v.mp4", "narrative": "a man walks"},
        {"key": "tagged", "video": "v.mp4", "narrative": "<man> a man is here, first it spins."},
    ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = run("instruct", "--data", manifest, "--out", out_file)
    assert code == 0
    assert err.startswith("1 records left out, the first is plain: narrative without actor tags")
    assert [json.loads(line)["key"] for line in out_file.read_text().splitlines()] == ["tagged"]
    manifest.write_text(json.dumps(rows[0]))
    code, _, err = run("instruct", "--data", manifest, "--out", out_file)
    assert code == 1
    assert "no narrative can be read, the first is that of plain" in err


def test_caption_one_several_and_a_job(run: Run, corpus: Path, vlm: Path, tmp_path: Path) -> None:
    video = sorted((corpus / "videos").glob("test_0*"))[0]
    options = ["--model", vlm, "--max-length", "8", "--batch-size", "2"]
    code, out, err = run("caption", video, *options, "--num-samples", "2")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 2

    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"nothing")
    code, out, err = run("caption", bad, *options)
    assert (code, out) == (1, "")
    assert err.startswith(f"pyvdl caption: {bad}: ")
    assert err.count("\n") == 1

    code, out, _ = run("caption", video, bad, *options, "--json")
    assert code == 0
    assert [json.loads(line)["status"] for line in out.splitlines()] == ["ok", "failed"]
    code, out, _ = run("caption", video, bad, *options)
    assert code == 0
    assert [line.split()[1] for line in out.splitlines()] == ["status", "ok", "failed"]
    code, out, err = run("caption", video, *options, "--int8")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 1

    job = ["caption", corpus / "unlabelled.jsonl", *options, "--out", tmp_path / "job", "--shard-size", "3"]
    code, out, _ = run(*job)
    assert code == 0
    code, again, _ = run(*job)
    assert code == 0
    assert "3 of them from an earlier run" in again
    code, _, err = run(*job, "--seed", "1")
    assert code == 1
    assert "seed was 0, now 1" in err

    code, _, err = run(*job[:-4], "--out", tmp_path / "split", "--tensor", "64")
    assert (code, "fsdp * tensor must divide" in err) == (1, True)

    code, out, _ = run("status", tmp_path / "job")
    assert code == 0
    assert "shards" in out
    assert "3 of 3" in out
    code, out, _ = run("status", tmp_path / "job", "--json", "--page", tmp_path / "job.html")
    assert json.loads(out)["shards_done"] == 3
    assert "<h1>Captions of " in (tmp_path / "job.html").read_text()

    code, out, _ = run("stats", "--captions", tmp_path / "job", corpus / "unlabelled.jsonl")
    assert code == 0
    assert len(out.splitlines()) == 5  # header, job, human captions, alt-text, how it was counted
    assert out.splitlines()[-1] == "nouns and verbs by WordNet; lemmas; without marks"


def test_caption_with_filters(run: Run, corpus: Path, vlm: Path, dual: Path, tmp_path: Path) -> None:
    video = sorted((corpus / "videos").glob("test_0*"))[0]
    options = ["--model", vlm, "--max-length", "8", "--batch-size", "2", "--num-samples", "2"]
    filters = ["--clip-score", dual, "--keep-best", "1", "--min-clip-score=-1"]
    code, out, _ = run("caption", video, *options, *filters, "--json")
    assert code == 0
    row = json.loads(out)
    assert len(row["captions"]) == len(row["clip_scores"]) == len(row["dropped"]) == 1
    assert row["dropped"][0]["reason"] == "keep_best"
    assert row["dropped"][0]["clip_score"] <= row["clip_scores"][0]
    code, out, _ = run("caption", corpus / "test.jsonl", *options, "--min-log-prob=0", "--out", tmp_path / "job")
    assert code == 0
    assert re.search(r"(\d+) captions dropped \(\1 by min_log_prob\)", out)
    assert run("caption", video, *options, "--min-log-prob=0") == (0, "(all dropped)\n", "")
    code, _, err = run("caption", video, *options, "--min-clip-score", "0.2")
    assert (code, "goes with --clip-score" in err) == (2, True)
    code, _, err = run("caption", video, *options, "--max-overlap", "1.5")
    assert (code, "--max-overlap must be at least 0 and below 1, not 1.5" in err) == (2, True)
    code, _, err = run("caption", video, *options, "--clip-score", vlm)
    assert (code, "holds a VLM: --clip-score needs a dual encoder" in err) == (1, True)


def test_caption_cuts_long_videos(run: Run, vlm: Path, tmp_path: Path) -> None:
    write_clip(tmp_path / "long.mp4", num_frames=60)  # 2.5 seconds
    options = ["--model", vlm, "--max-length", "8", "--batch-size", "2", "--out", tmp_path / "job"]
    for skipped in (0, 1):
        code, out, _ = run("caption", tmp_path / "long.mp4", *options, "--window-seconds", "0.8")
        assert (code, f"3 rows (0 failed) in 1 shards, {skipped} of them" in out) == (0, True)
    code, _, err = run("caption", tmp_path / "long.mp4", *options, "--cut", "shots")
    assert (code, "cuts holds another job (min_shot_seconds was None, now 1.0" in err) == (1, True)
    # The lists of a job are manifests: so training finds the clips that were cut.
    (lists,) = (tmp_path / "job" / "work").glob("*.jsonl")
    found = read_manifest(lists)
    assert sorted(record.start_seconds for record in found) == [0.0, 0.8, 1.6]
    assert {record.group for record in found} == {str(tmp_path / "long.mp4")}
    assert {row.key for row in read_captions(tmp_path / "job")} == {record.key for record in found}


def test_stats_of_sets_of_equal_size(run: Run, tmp_path: Path) -> None:
    texts = [f"a {name} runs." for name in ("dog", "cat", "fox", "horse", "goat", "duck")]
    for name, count in (("many", 6), ("few", 2)):
        lines = [{"key": f"{i}", "video": "v.mp4", "captions": [text]} for i, text in enumerate(texts[:count])]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["stats", "--captions", tmp_path / "many.jsonl", tmp_path / "few.jsonl", "--forms", "--punctuation"]
    code, out, _ = run(*command, "--sample-size", "equal", "--seed", "3")
    assert code == 0
    table = [line.split() for line in out.splitlines()]
    assert [row[2:4] for row in table[1:3]] == [["2", "8"]] * 2  # captions, tokens
    assert out.splitlines()[-1].endswith("; forms; with marks; 2 captions of each set at random (seed 3)")
    code, out, _ = run(*command)
    assert [line.split()[2:4] for line in out.splitlines()[1:3]] == [["6", "24"], ["2", "8"]]
    code, _, err = run(*command, "--sample-size", "3")
    assert (code, "sample_size=3: expected 1 to 2" in err) == (1, True)
    code, _, err = run(*command, "--proper-nouns")
    assert (code, "--proper-nouns goes with --spacy" in err) == (2, True)
    code, _, err = run(*command, "--spacy", "no_such_pipeline")
    assert (code, "python -m spacy download no_such_pipeline" in err) == (1, True)


def test_captions_of_a_job_train_the_dual_encoder(
    run: Run, corpus: Path, vlm: Path, dual: Path, tmp_path: Path
) -> None:
    job, out = tmp_path / "job", tmp_path / "run"
    assert run("caption", corpus / "unlabelled.jsonl", "--model", vlm, "--out", job, "--max-length", "6")[0] == 0
    data = ["--data", corpus / "unlabelled.jsonl", "--captions", job]
    code, said, _ = run("train", *data, "--model", dual, "--out", out, *TINY)
    assert code == 0
    assert f"{out / 'model'}: step 6" in said
    code, _, err = run("train", "--data", corpus / "test.jsonl", *data[2:], "--out", tmp_path / "other", *TINY_DUAL)
    assert code == 1
    assert f"{job} has captions of no record of {corpus / 'test.jsonl'}, but of " in err
    code, _, err = run("train", *data, "--model", vlm, "--out", tmp_path / "other", *TINY)
    assert code == 1
    assert "holds a VLM, not a DualEncoder" in err
    code, _, err = run("train", *data, "--model", dual, "--out", out, *TINY, "--set=seed=3")
    assert code == 1
    assert "another job" in err


def test_a_finished_run_without_its_history_still_says_where_the_model_is(capsys: pytest.CaptureFixture[str]) -> None:
    from pyvdl.train import History

    none = np.zeros(0, np.float32)
    _print_training(Path("run"), History(none.astype(np.int64), none, none, 0.0, 0.0, 0.0))
    assert "run/model: all steps done before" in capsys.readouterr().out


def test_evaluate_a_vlm(run: Run, corpus: Path, vlm: Path, tmp_path: Path) -> None:
    wanted = tmp_path / "new" / "scores.json"
    code, out, _ = run("evaluate", "--model", vlm, "--data", corpus / "test.jsonl", "--out", wanted)
    assert code == 0
    captions, questions = json.loads(wanted.read_text())["results"]
    assert set(captions["scores"]) == {"CIDEr-D", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"}
    assert {"exact match", "exact match, lower and strip", "WUPS", "exact match, causal"} <= set(questions["scores"])
    for result in (captions, questions):
        assert all(name in out for name in result["scores"])
        assert all(score["low"] <= score["value"] <= score["high"] for score in result["scores"].values())
        assert result["counts"]["failed"] == 0


def test_evaluate_and_embed_with_a_dual_encoder(run: Run, corpus: Path, dual: Path, tmp_path: Path) -> None:
    code, out, _ = run("evaluate", "--model", dual, "--data", corpus / "test.jsonl")
    assert code == 0
    assert all(f"{way} R@{k}" in out for way in ("text to video", "video to text") for k in (1, 5, 10))
    assert "zero-shot top-5" in out
    job = ["embed", "--model", dual, "--videos", corpus / "test.jsonl", "--out", tmp_path / "job", "--export", "npz"]
    code, out, _ = run(*job)
    assert code == 0
    assert "(0 failed) in 1 shards, 0 of them from an earlier run" in out
    wanted = tmp_path / "job" / "embeddings.npz"
    assert f"npz: {wanted}" in out
    with np.load(wanted) as found:
        assert found["embeddings"].dtype == np.float32
        assert len(found["keys"]) == len(found["embeddings"]) == len(found["errors"])
        np.testing.assert_allclose(np.linalg.norm(found["embeddings"], axis=1), 1, rtol=1e-5)
    code, out, _ = run(*job)
    assert (code, "1 of them from an earlier run" in out) == (0, True)

    job[job.index("--out") + 1] = small = tmp_path / "int8"
    assert run(*job, "--int8")[0] == 0
    with np.load(wanted) as found, np.load(small / "embeddings.npz") as found_small:
        products = np.sum(found["embeddings"] * found_small["embeddings"], axis=1)
    assert (products > 0.99).all()
    assert (products < 1).any()


def test_public_checkpoints(run: Run, corpus: Path, tmp_path: Path) -> None:
    """Folders as transformers writes them, with and without a tokenizer."""
    video = sorted((corpus / "videos").glob("test_0*"))[0]
    paligemma = shutil.copytree(GOLDEN / "paligemma", tmp_path / "paligemma")
    code, out, err = run("caption", "--model", paligemma, "--videos", video, "--max-length", "4")
    assert (code, out) == (1, "")
    assert "has no tokenizer: put tokenizer.json" in err
    shutil.copyfile(GOLDEN / "tokenizer-gemma" / "tokenizer.model", paligemma / "tokenizer.model")
    code, out, _ = run("caption", "--model", paligemma, "--videos", video, "--max-length", "4", "--json")
    assert code == 0
    assert json.loads(out)["prompt"] == "caption en"
    code, out, _ = run("embed", video, "--model", GOLDEN / "clip-openai", "--out", tmp_path / "clip", "--export", "npz")
    assert code == 0
    with np.load(tmp_path / "clip" / "embeddings.npz") as found:
        np.testing.assert_allclose(np.linalg.norm(found["embeddings"], axis=1), [1], rtol=1e-5)
    code, _, err = run("embed", "--model", GOLDEN / "clip-openai")
    assert code == 2
    assert "no videos" in err
    code, _, err = run("embed", video, "--model", GOLDEN / "t5", "--out", tmp_path / "t5")
    assert code == 1
    assert "a language model alone" in err


def losses(out: Path) -> list[float]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [loss for line in lines for loss in json.loads(line)["losses"]]


def long_training(corpus: Path, out: Path) -> list[str]:
    sizes = [*TINY_DUAL, "--set=steps=24", "--set=checkpoint_every=4"]
    data = ["--data", str(corpus / "unlabelled.jsonl"), "--captions", "human"]
    return ["train", *data, "--out", str(out), *sizes]


def killed(training: list[str], checkpoints: Path, how: signal.Signals, sent: Path) -> int:
    """Runs a training in a process of its own, kills it after its first new checkpoint and returns its exit code.

    It waits for its tenth batch until `sent` is there.
    """
    command = [sys.executable, "-m", "tests.held", str(sent), "10", *training]

    def seen() -> set[str]:
        return {path.name for path in checkpoints.glob("*") if path.name.isdigit()}

    before = seen()
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 200
        while seen() <= before:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(how)
        sent.touch()
        return process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()


def test_killed_training_goes_on_to_the_same_losses(corpus: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(long_training(corpus, whole)) == 0
    training = long_training(corpus, cut)
    assert killed(training, cut / "checkpoints", signal.SIGKILL, tmp_path / "killed") == -signal.SIGKILL
    assert killed(training, cut / "checkpoints", signal.SIGTERM, tmp_path / "stopped") == 0
    assert not (cut / "model").exists()
    assert 8 <= len(losses(cut)) < 24
    assert main(training) == 0
    assert losses(cut) == losses(whole)
    assert len(losses(cut)) == 24
    assert (cut / "model" / "config.json").exists()


@pytest.mark.skipif(not SHARED_VIDEOS.is_dir(), reason="the test videos are not at ../shared/videos")
def test_every_shared_video_has_a_row(run: Run, vlm: Path) -> None:
    files = sorted(p for p in SHARED_VIDEOS.iterdir() if p.suffix not in {".md", ".json"})
    code, out, _ = run("probe", SHARED_VIDEOS, "--json")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [Path(row["video"]).name for row in rows] == [p.name for p in files]
    assert [Path(row["video"]).name for row in rows if row["status"] == "failed"] == ["audio_only.mp4"]
    code, out, _ = run("caption", SHARED_VIDEOS, "--model", vlm, "--max-length", "6", "--json")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [Path(row["video"]).name for row in rows] == [p.name for p in files]
    assert {row["status"] for row in rows} == {"ok", "failed"}
    assert all(row["error"] for row in rows if row["status"] == "failed")
