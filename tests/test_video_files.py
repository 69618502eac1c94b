"""The decoder on the real files of ../shared/videos, against what the ffmpeg command line made of them."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from pyvdl import ClipLoader, ClipRequest, DecodeError, VideoDecoder, sample_clip

VIDEOS = Path(__file__).resolve().parents[1] / ".." / "shared" / "videos"

pytestmark = pytest.mark.skipif(
    not (VIDEOS / "expected.json").exists(), reason="../shared/videos is not beside this checkout"
)


def load() -> dict[str, dict[str, Any]]:
    path = VIDEOS / "expected.json"
    return json.loads(path.read_text())["files"] if path.exists() else {}


EXPECTED = load()
DECODABLE = [name for name, facts in EXPECTED.items() if facts["frames"]]
EXACT = [name for name in DECODABLE if EXPECTED[name]["bit_exact"]]


def opened(name: str) -> VideoDecoder:
    """`file.mp4#v:1` means the second video stream."""
    file, _, stream = name.partition("#v:")
    errors: Literal["raise", "conceal"] = "raise" if EXPECTED[name]["bit_exact"] else "conceal"
    return VideoDecoder(VIDEOS / file, stream=int(stream) if stream else None, errors=errors)


def digest(planes: list[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(plane.tobytes() for plane in planes)).hexdigest()


@cache
def digests_in_order(name: str) -> tuple[str, ...]:
    decoder = opened(name)
    return tuple(digest(decoder.get_planes_at(i)) for i in range(len(decoder)))


@pytest.mark.parametrize("name", DECODABLE)
def test_count_times_and_metadata(name: str) -> None:
    facts = EXPECTED[name]
    decoder = opened(name)
    assert len(decoder) == facts["frames"]
    ticks = facts["pts_ticks"]
    assert [t if t is None else int(got) for got, t in zip(decoder.pts_ticks, ticks)] == ticks
    assert decoder.key_frames.tolist() == facts["keyframes"]
    metadata = decoder.metadata
    assert metadata.codec == facts["codec_name"]
    assert metadata.pixel_format == facts["pix_fmt"]
    assert metadata.stream_index == facts["index"]
    assert metadata.num_video_streams == facts["video_streams"]
    assert metadata.rotation == -facts.get("rotation_ffprobe", 0) % 360
    size = (facts["width"], facts["height"])
    assert (metadata.width, metadata.height) == (size[::-1] if metadata.rotation % 180 else size)
    assert metadata.color_range == facts["rgb_convention"]["range"]
    if "start_time" in facts:
        assert decoder.pts_seconds[0] == pytest.approx(ticks[0] * float(metadata.time_base))


@pytest.mark.parametrize("name", EXACT)
def test_every_frame_is_bit_exact(name: str) -> None:
    facts = EXPECTED[name]
    digests = digests_in_order(name)
    for sample in facts["samples"]:
        assert digests[sample["index"]] == sample["sha256"], f"frame {sample['index']}"
    assert hashlib.sha256("\n".join(digests).encode()).hexdigest() == facts["all_frames_digest"]


@pytest.mark.parametrize("name", EXACT)
def test_single_frames_are_those_of_a_full_decode(name: str) -> None:
    wanted = digests_in_order(name)
    decoder = opened(name)
    rng = np.random.default_rng(0)
    picks = {0, len(wanted) - 1, *rng.integers(0, len(wanted), 5).tolist()}
    for index in rng.permutation(sorted(picks)).tolist():
        assert digest(opened(name).get_planes_at(index)) == wanted[index], f"frame {index} alone"
        assert digest(decoder.get_planes_at(index)) == wanted[index], f"frame {index}"


@pytest.mark.parametrize("name", EXACT)
def test_clips_are_those_of_a_full_decode(name: str) -> None:
    if "#" in name:
        pytest.skip("clips come from the first video stream")
    decoder = opened(name)
    metadata = decoder.metadata
    side = min(metadata.width, metadata.height)
    clip = sample_clip(VIDEOS / name, num_frames=4, short_side=side, size=side)
    indices = [int(np.flatnonzero(decoder.pts_seconds == pts)[0]) for pts in clip.pts_seconds]
    assert indices == sorted(indices)
    whole = decoder.get_frames_at(indices).data
    y, x = (metadata.height - side) // 2, (metadata.width - side) // 2
    assert np.array_equal(clip.data, whole[:, y : y + side, x : x + side])


@pytest.mark.parametrize("name", EXACT)
def test_rgb_means(name: str) -> None:
    decoder = opened(name)
    for sample in EXPECTED[name]["samples"]:
        mean = decoder[sample["index"]].reshape(-1, 3).mean(axis=0)
        assert np.abs(mean - sample["rgb_mean"]).max() <= 1.5, f"frame {sample['index']}"


@pytest.mark.parametrize("name", [name for name in EXPECTED if "autorotated_first_frame" in EXPECTED[name]])
def test_rotation_is_that_of_the_command_line(name: str) -> None:
    decoder = opened(name)
    turns = -decoder.metadata.rotation // 90
    planes = [np.rot90(plane, turns) for plane in decoder.get_planes_at(0)]
    assert digest(planes) == EXPECTED[name]["autorotated_first_frame"]["sha256"], "the angle is right"
    luma = planes[0].astype(float)
    red, green, blue = np.moveaxis(decoder[0].astype(float), -1, 0)
    grey = 0.25 * red + 0.65 * green + 0.1 * blue
    assert np.corrcoef(luma.ravel(), grey.ravel())[0, 1] > 0.98, "and RGB is turned by it"


def test_a_file_without_video_is_refused() -> None:
    for call in (VideoDecoder, sample_clip):
        with pytest.raises(DecodeError, match=r"audio_only\.mp4: stream: no video stream"):
            call(VIDEOS / "audio_only.mp4")


def test_damage_in_midstream() -> None:
    path = VIDEOS / "corrupted_midstream.mp4"
    with pytest.raises(DecodeError, match=r"frame \d+ was decoded with errors: .*NAL unit size"):
        sample_clip(path)
    before = sample_clip(path, end_seconds=2.0)
    assert before.data.any(), "what lies before the damage is good"
    assert sample_clip(path, errors="conceal").data.shape == (8, 224, 224, 3)
    concealed = VideoDecoder(path, errors="conceal")
    assert len(concealed.get_frames_at(range(49)).data) == 49


def test_open_group_of_pictures_starts_clean() -> None:
    name = "made_vfr_opengop_bframes.mkv"
    wanted = digests_in_order(name)
    decoder = opened(name)
    for key in decoder.key_frames:
        for index in range(max(0, key - 4), min(len(wanted), key + 4)):
            assert digest(opened(name).get_planes_at(index)) == wanted[index], f"frame {index} near key frame {key}"


def test_every_file_gets_a_status_in_one_batch() -> None:
    files = sorted({name.partition("#")[0] for name in EXPECTED})
    requests = [ClipRequest(VIDEOS / file) for file in files]
    (batch,) = ClipLoader(requests, batch_size=len(files), num_threads=2, prefetch=0, short_side=64, size=64)
    failed = [file for file, ok in zip(files, batch.ok) if not ok]
    assert failed == ["audio_only.mp4", "corrupted_midstream.mp4"]
    assert [error is None for error in batch.errors] == batch.ok.tolist()
