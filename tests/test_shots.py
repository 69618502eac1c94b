"""Clips cut where a shot ends: in videos encoded here with known cuts."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pyvdl import shots
from pyvdl.data import Record
from pyvdl.manifests import Input
from pyvdl.shots import RATE, Shots, _cuts, differences, find_cuts
from tests.clips import write_clip


def write_shots(path: Path, lengths: Sequence[int], *, fps: int) -> None:
    """Soft stripes that move over a colour for so many frames, then others over another, and so on."""
    y, x = np.mgrid[:64, :96] / 64
    frames = []
    for number, length in enumerate(lengths):
        rng = np.random.default_rng(number)
        colour, slope = rng.permutation([40, 120, 200]), rng.uniform(2, 6, 2)
        for i in range(length):
            wave = 40 * np.sin(slope[0] * x + slope[1] * y + i / fps)
            frames.append((colour + wave[..., None]).astype(np.uint8))
    write_clip(path, frames=frames, fps=fps, gop=50)


def times(found: list[Record]) -> list[tuple[float, float | None]]:
    return [(record.start_seconds, record.end_seconds) for record in found]


def test_short_shots_belong_to_the_one_before_and_long_ones_are_parted() -> None:
    asked = Shots(min_seconds=1.0)
    assert asked.edges(2.0, 9.0, [2.5, 3.0, 3.9, 4.0, 8.5]) == [2.0, 3.0, 4.0, 9.0]
    assert asked.edges(0.0, 9.0, []) == [0.0, 9.0]
    parted = asked.edges(0.0, 9.5, [2.0, 5.0], max_seconds=3.0)
    np.testing.assert_allclose(parted, [0, 2, 5, 7.25, 9.5])
    with pytest.raises(ValueError, match="min_seconds must be finite and above 0, not 0"):
        Shots(min_seconds=0)


def test_differences_are_those_of_hue_saturation_and_value() -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 2, 2, 3)).astype(np.uint8)
    hsv = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in frames.reshape(-1, 3) / 255]).reshape(3, 2, 2, 3)
    hue, rest = hsv[..., 0] * 180, hsv[..., 1:] * 255
    turn = np.abs(np.diff(hue, axis=0))
    wanted = (np.minimum(turn, 180 - turn) + np.abs(np.diff(rest, axis=0)).sum(-1)).mean((1, 2)) / 3
    np.testing.assert_allclose(differences(frames, None), [0, *wanted], rtol=1e-4)
    np.testing.assert_allclose(differences(frames[1:], frames[0]), wanted, rtol=1e-4)


def test_a_cut_stands_out_from_the_motion_around_it() -> None:
    assert find_cuts(np.array([0, 2, 2, 40, 2, 2.0])).tolist() == [3]
    assert find_cuts(np.array([0, 20, 20, 40, 20, 20.0])).tolist() == []  # much moves
    assert find_cuts(np.array([0, 0, 0, 14, 0, 0.0])).tolist() == []  # little changes
    assert find_cuts(np.zeros(1)).tolist() == []


def test_frames_looked_at_twice_are_nothing_to_compare_with() -> None:
    slow = np.array([0, 20, 0, 20, 0, 20, 0, 90, 0, 20, 0, 20, 0.0])
    stills = np.array([0, 0, 0, 0, 0, 30, 0, 0, 0, 0, 0, 0, 20, 0, 0, 0, 0, 0])
    for values, cuts in ((slow, [7]), (stills, [5, 12]), (np.zeros(3), [])):
        times = 10 + (np.arange(len(values)) + 0.5) / RATE
        np.testing.assert_allclose(_cuts(times, values), [10 + i / RATE for i in cuts])


@pytest.mark.parametrize(
    ("fps", "lengths", "edges"),
    [
        (25, [50, 10, 40, 75], [0, 2, 4, 7]),  # the cut at 2.4 makes too short a shot
        (24, [36, 48, 30], [0, 1.5, 3.5, 4.75]),
        (10, [20, 15, 25], [0, 2, 3.5, 6]),  # slower than what is looked at
        (60, [150, 90], [0, 2.5, 4]),
    ],
)
def test_known_cuts_are_found(fps: int, lengths: list[int], edges: list[float], tmp_path: Path) -> None:
    write_shots(tmp_path / "v.mp4", lengths, fps=fps)
    found = list(Input([tmp_path / "v.mp4"], shots=Shots()))
    np.testing.assert_allclose([record.start_seconds for record in found], edges[:-1], atol=0.5 / RATE + 0.001)
    assert [record.end_seconds for record in found[:-1]] == [record.start_seconds for record in found[1:]]
    assert found[-1].end_seconds == edges[-1]
    assert [record.key for record in found] == [f"{tmp_path / 'v.mp4'}#{i:04d}" for i in range(len(found))]
    assert {record.group for record in found} == {str(tmp_path / "v.mp4")}


def test_many_videos_in_parts_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts fall on the seams of parts, and what cannot be decoded costs no other video."""
    monkeypatch.setattr(shots, "_FRAMES", 32)
    monkeypatch.setattr(shots, "_CLIP", shots.ClipConfig(**{**vars(shots._CLIP), "num_frames": 32}))
    for name, lengths in (("a", [32, 64, 40]), ("c", [40]), ("d", [30, 30])):
        write_shots(tmp_path / f"{name}.mp4", lengths, fps=25)
    (tmp_path / "b.mp4").write_bytes(b"this is not a video" * 100)
    damaged = bytearray((tmp_path / "a.mp4").read_bytes())
    media = damaged.index(b"mdat")
    size = int.from_bytes(damaged[media - 4 : media], "big")
    damaged[media + size - 150 : media + size - 50] = bytes(100)  # of the last frames
    (tmp_path / "e.mp4").write_bytes(damaged)
    (tmp_path / "f.mp4").write_bytes(b"")
    found = list(Input([tmp_path], shots=Shots(min_seconds=0.5)))
    by_video = {name: [r for r in found if Path(r.video).stem == name] for name in "abcdef"}
    assert [Path(record.video).stem for record in found] == sorted(Path(record.video).stem for record in found)
    assert times(by_video["a"]) == [(0.0, 1.28), (1.28, 3.84), (3.84, 5.44)]
    assert times(by_video["d"]) == [(0.0, 1.2), (1.2, 2.4)]
    assert times(by_video["c"]) == [(0.0, 1.6)]
    for name in "bf":
        assert times(by_video[name]) == [(0.0, None)]
    assert times(by_video["e"])[:2] == times(by_video["a"])[:2]
