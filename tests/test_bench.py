"""The decoder bench: its arithmetic, and that its output check tells a wrong frame from a right one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from bench.common import Spread, Timing, append_rows, environment, format_table, geometric_mean, interleave, ratio

pytest.importorskip("pyvdl._core", reason="the C++ module is not built")
pytest.importorskip("av", reason="PyAV is not installed")

from bench import convert, decode, loader, retrieval, workers
from bench.contenders import CONTENDERS
from bench.corpus import CASES, Case, make_clip

CASE = Case("tiny", ".mp4", "libx264", 320, 256, seconds=2.0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(CASE, tmp_path_factory.mktemp("bench"))


def test_rows_of_a_run_name_it_and_the_machine_is_told_once(tmp_path: Path) -> None:
    out = tmp_path / "results" / "rows.jsonl"
    for rounds in (1, 2):
        append_rows(out, {"rounds": rounds, "environment": {"cores": 2}}, [{"case": "a"}, {"case": "b"}])
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line.get("rounds", line.get("case")) for line in lines] == [1, "a", "b", 2, "a", "b"]
    assert all("T" in line["run"] for line in lines)
    assert "environment" not in lines[1]


def test_environment_names_machine_and_versions() -> None:
    found = environment(["numpy", "no-such-package"])
    assert found["packages"]["numpy"] == np.__version__
    assert found["packages"]["no-such-package"] is None
    assert found["cores"] >= 1
    assert found["cpu"]


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that is twice as slow in one round changes no ratio."""
    assert ratio([2.0, 40.0, 3.0], [1.0, 20.0, 1.5]) == 2.0
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)


def test_contenders_take_turns_and_nobody_is_always_first() -> None:
    calls: list[str] = []

    def run(name: str, i: int) -> Timing:
        calls.append(f"{name}{i}")
        return Timing(float(i), 0.0)

    timings = interleave(["a", "b"], run, 3)
    assert calls == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert [timing.cpu_seconds for timing in timings["b"]] == [0.0, 1.0, 2.0]


def test_table_is_aligned() -> None:
    assert format_table([["case", "ms"], ["h264", "1.5"]]) == "case   ms\n----  ---\nh264  1.5"


def test_every_case_wants_frames_that_it_has() -> None:
    for case in CASES.values():
        frames = decode.job_for(case, Path("a.mp4")).frames
        assert len(set(frames)) == decode.NUM_FRAMES
        assert min(frames) >= 0
        assert max(frames) < case.num_frames


def test_output_check_finds_a_frame_that_is_one_off(clip: Path) -> None:
    reference = decode.Reference(clip)
    wanted = reference.wanted(decode.NUM_FRAMES)
    assert wanted.tolist() == decode.job_for(CASE, clip).frames
    right = reference._thumbnails[0, wanted]
    assert reference.check(right) == decode.Check(decode.NUM_FRAMES, decode.NUM_FRAMES, 0.0)
    late = right.copy()
    late[5] = reference._thumbnails[0, wanted[5] + 1]
    found = reference.check(late)
    assert found.right == decode.NUM_FRAMES - 1
    assert not found.good
    assert not reference.check(right // 2 + 60).good


@pytest.mark.parametrize("name", ["pyvdl", "pyvdl-fast", "limit-a", "limit-b", "pyav"])
def test_a_worker_gives_the_wanted_frames_and_its_times(name: str, clip: Path) -> None:
    worker = workers.Worker(CONTENDERS[name])
    try:
        job = decode.job_for(CASE, clip)
        check = decode.check_outputs(decode.Reference(clip), job, {name: worker})[name]
        assert isinstance(check, decode.Check)
        assert check.good, check
        timing = decode.time_clip(worker, job)
        assert timing.cpu_seconds > 0
        assert math.isfinite(timing.wall_seconds)
        with pytest.raises(workers.ContenderError):
            decode.time_clip(worker, decode.job_for(CASE, clip.with_name("missing.mp4")))
        assert decode.time_clip(worker, job).cpu_seconds > 0  # a failure does not end the worker
        assert worker._process is not None
        worker._process.kill()
        worker._process.wait()
        with pytest.raises(workers.ContenderError, match="its process ended with code -9"):
            decode.time_clip(worker, job)
        assert decode.time_clip(worker, job).cpu_seconds > 0  # it is started anew
    finally:
        worker.close()


def test_a_contender_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PEERS", Path("no") / "such" / "environment")
    with pytest.raises(workers.ContenderError, match=r"not installed \(pip install decord2"):
        workers.Worker(CONTENDERS["decord2"])


@pytest.mark.parametrize(
    "case",
    [
        Case("groups", ".mp4", "libx264", 322, 258, seconds=2.0, options={"g": "12"}),
        Case("delayed", ".avi", "mpeg4", 320, 256, seconds=1.0, options={"bf": "2"}),  # packets without pts
    ],
    ids=lambda case: case.name,
)
def test_limits_give_every_wanted_frame_whatever_they_leave_out(case: Case, tmp_path: Path) -> None:
    path = make_clip(case, tmp_path)
    job = decode.job_for(case, path)
    everything, least = (CONTENDERS[name]().clip(job) for name in ("limit-a", "limit-b"))
    assert np.array_equal(everything, least)
    check = decode.Reference(path).check(decode.thumbnails(least))
    assert check.good, check


def test_ratios_to_the_limits_are_told_for_each_family_with_the_cases_they_cover() -> None:
    def line(name: str, **seconds: float) -> decode.Line:
        return decode.Line(name, {who: [Timing(taken, taken)] for who, taken in seconds.items()}, {}, {})

    lines = [
        line("h264-240p", **{"pyvdl": 2.0, "limit-a": 4.0, "limit-b": 2.0, "opencv": 6.0}),
        line("h264-720p", **{"pyvdl": 8.0, "limit-a": 4.0, "limit-b": 2.0, "opencv": 6.0}),
        line("av1-720p", **{"pyvdl": 2.0, "limit-a": 2.0, "limit-b": 2.0}),
        line("mixed", **{"pyvdl": 9.0, "limit-a": 1.0, "limit-b": 1.0}),
    ]
    found = decode.family_ratios(lines, ["pyvdl", "limit-a", "limit-b", "opencv"], "cpu_seconds")
    means = {(ratio.contender, ratio.limit, ratio.family): ratio.geometric_mean for ratio in found}
    assert means["pyvdl", "limit-b", "H.264 with B"] == pytest.approx(2.0)
    assert means["pyvdl", "limit-a", "H.264 with B"] == pytest.approx(1.0)
    assert means["pyvdl", "limit-b", "all"] == pytest.approx(4 ** (1 / 3))
    assert ("opencv", "limit-b", "AV1") not in means
    table = decode.family_table([ratio for ratio in found if ratio.limit == "limit-b"])
    assert "(3.00)" in table  # OpenCV's mean over all cases lacks one of them


def test_reference_conversion_is_exact_where_the_answer_is_known() -> None:
    kind = convert.Format("tiny", 512, 512, bt709=True)
    gray = np.full((768, 512), 128, dtype=np.uint8)
    assert np.allclose(convert.reference(kind, gray), 255 * (128 - 16) / 219)
    ramp = gray.copy()
    ramp[:512] = 16 + np.arange(512) % 256 // 2  # luma x / 2 in the left half
    row = convert.reference(kind, ramp)[100, :100, 1]
    luma_x = 2 * (16 + np.arange(100)) + 0.5  # where output pixels stand: between two luma pixels
    # A symmetric filter leaves a straight line where it is; steps of x // 2 lie a quarter below x / 2 on average.
    assert np.allclose(row, 255 * (luma_x / 2 - 0.25) / 219, atol=0.01)


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    case = Case("groups", ".mp4", "libx264", 128, 96, seconds=1.0, options={"g": "10"})
    return {case.name: make_clip(case, tmp_path_factory.mktemp("groups"))}


def test_options_are_compared_by_time_and_picture(groups: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(loader, "VIEW", {"short_side": 96, "size": 96})
    (fast,) = loader.compare_quality(groups, 2)
    assert 20 < fast["psnr_db"] < 100
    assert fast["times_faster"] > 0
    (keyframe,) = loader.compare_keyframe(groups, 1)
    assert {"case", "times_faster", "default_cpu_seconds", "keyframe_cpu_seconds"} <= keyframe.keys()
    assert "psnr_db" not in keyframe


def test_openings_and_threads_are_timed(groups: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "OPENINGS", 2)
    monkeypatch.setattr(loader, "VIEW", {"short_side": 96, "size": 96})
    (opening,) = loader.time_openings(groups, 1)
    assert opening["first_ms"]["median"] == pytest.approx(
        opening["header_ms"]["median"] + opening["first_more_ms"]["median"]
    )
    assert opening["header_ms"]["median"] > 0
    assert opening["later_ms"]["median"] > 0
    (scaling,) = loader.compare_threads(groups, 1)
    assert scaling["scaling"] > 0
    assert [path.name for path in groups["groups"].parent.iterdir()] == [groups["groups"].name]  # copies are gone


def test_memory_is_told_by_a_process_of_its_own(groups: dict[str, Path]) -> None:
    ballast = np.ones(64 << 20, dtype=np.uint8)  # of the parent: must not count
    options = {"num_frames": 4, "short_side": 96, "size": 96}
    found = loader.footprint([str(groups["groups"])] * 8, 2, [4, 8], options)
    assert found["slots_bytes"] == 2 * 4 * 96 * 96 * 3
    assert found["imported_bytes"] < found["loaded_bytes"] <= found["peak_bytes"][0] <= found["peak_bytes"][1]
    assert found["peak_bytes"][1] - found["imported_bytes"] < ballast.nbytes
    with pytest.raises(RuntimeError, match="clips failed"):
        loader.footprint([str(groups["groups"].with_name("missing.mp4"))], 1, [1], options)


def test_retrieval_has_ties_and_its_memory_is_told() -> None:
    row = retrieval.score(texts=300, videos=50, width=16)
    assert [row["counts"].pop(name) for name in ("videos", "texts", "failed")] == [50, 300, 0]
    assert sum(row["counts"].values()) >= 60  # texts of ten videos that are there twice, and these
    assert row["peak_bytes"] > 2**26
