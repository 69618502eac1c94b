"""The decoder on videos made at run time: exactness, sampling, sources, faults, and the batch loader."""

from __future__ import annotations

import gc
import io
import itertools
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import pytest
from av.stream import Disposition

import pyvdl
from pyvdl import ClipLoader, ClipRequest, DecodeError, FileSlice, Limits, VideoDecoder, sample_clip
from tests.clips import decode_planes, moving_texture, write_clip

# name, options of write_clip, largest difference from PyAV's FFmpeg (MPEG-4's IDCT differs between versions)
KINDS: list[tuple[str, dict[str, Any], int]] = [
    ("h264.mp4", {"b_frames": 3}, 0),
    ("h264.mkv", {"b_frames": 3}, 0),
    ("h264.ts", {"b_frames": 3}, 0),
    ("h264.avi", {"b_frames": 2}, 0),
    ("opengop.mp4", {"options": {"x264-params": "open-gop=1:keyint=12:bframes=3"}}, 0),
    ("refresh.mkv", {"options": {"x264-params": "intra-refresh=1:keyint=12"}, "b_frames": 0}, 0),
    ("interlaced.mkv", {"options": {"x264-params": "interlaced=1"}}, 0),
    ("h264_444.mp4", {"pix_fmt": "yuv444p"}, 0),
    ("hevc.mp4", {"codec": "libx265", "b_frames": 4, "options": {"x265-params": "log-level=none:open-gop=1"}}, 0),
    ("hevc.mkv", {"codec": "libx265", "options": {"x265-params": "log-level=none:temporal-layers=3:bframes=4"}}, 0),
    ("vp9.webm", {"codec": "libvpx-vp9"}, 0),
    ("vp8.webm", {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "12"}}, 0),
    ("av1.mp4", {"codec": "libsvtav1", "size": (96, 64), "options": {"preset": "8", "svtav1-params": "keyint=24"}}, 0),
    ("av1_low_delay.mkv", {"codec": "libsvtav1", "size": (96, 64), "options": {"svtav1-params": "pred-struct=1"}}, 0),
    ("av1_grain.mkv", {"codec": "libsvtav1", "size": (96, 64), "options": {"svtav1-params": "film-grain=20"}}, 0),
    ("mpeg4.avi", {"codec": "mpeg4", "b_frames": 2}, 1),
    ("mpeg4.mp4", {"codec": "mpeg4", "b_frames": 2}, 1),
    ("mpeg4_no_b.avi", {"codec": "mpeg4", "b_frames": 0}, 1),
    ("mpeg2.ts", {"codec": "mpeg2video", "b_frames": 2}, 1),
    ("mpeg2.mpg", {"codec": "mpeg2video", "b_frames": 2}, 1),
    ("mjpeg.avi", {"codec": "mjpeg", "pix_fmt": "yuvj422p", "b_frames": 0}, 1),
]
NUM_FRAMES = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def clip(folder: Path) -> Path:
    """Two seconds of H.264 with B frames, 25 frames a second, 96 x 64, four groups of pictures."""
    path = folder / "clip.mp4"
    write_clip(path, num_frames=NUM_FRAMES, size=(96, 64), fps=25, gop=13)
    return path


def joined(planes: list[np.ndarray]) -> bytes:
    return b"".join(plane.tobytes() for plane in planes)


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def threads_fall_to(count: int) -> bool:
    """The kernel lists a thread for a moment after it was joined."""
    deadline = time.monotonic() + 5
    while num_threads() > count and time.monotonic() < deadline:
        time.sleep(0.01)
    return num_threads() <= count


# --- exactness ---


@pytest.mark.parametrize(("name", "options", "tolerance"), KINDS, ids=[kind[0] for kind in KINDS])
def test_every_way_to_a_frame_gives_the_same_picture(
    folder: Path, name: str, options: dict[str, Any], tolerance: int
) -> None:
    path = folder / name
    try:
        write_clip(path, num_frames=NUM_FRAMES, fps=25, **options)
    except av.FFmpegError as error:
        pytest.skip(f"PyAV here cannot write this: {error}")
    wanted = decode_planes(path)
    decoder = VideoDecoder(path)
    assert len(decoder) == len(wanted) == NUM_FRAMES
    in_order = [joined(decoder.get_planes_at(i)) for i in range(NUM_FRAMES)]
    for i, (got, want) in enumerate(zip(in_order, wanted)):
        difference = np.frombuffer(got, np.uint8).astype(int) - np.frombuffer(want, np.uint8)
        assert np.abs(difference).max() <= tolerance, f"frame {i}"

    rng = np.random.default_rng(0)
    for i in rng.permutation(NUM_FRAMES)[:20]:
        assert joined(decoder.get_planes_at(int(i))) == in_order[i], f"frame {i} alone"
    rgb = decoder[:].data
    for _ in range(8):
        sparse = np.sort(rng.choice(NUM_FRAMES, size=5, replace=False))
        assert np.array_equal(VideoDecoder(path).get_frames_at(sparse).data, rgb[sparse]), f"frames {sparse}"


@pytest.mark.parametrize("name", ["h264.mp4", "hevc.mp4"])
def test_frames_that_nobody_needs_are_not_decoded(folder: Path, name: str) -> None:
    path = folder / name
    options = next(options for kind, options, _ in KINDS if kind == name)
    write_clip(path, num_frames=60, fps=25, gop=20, **{k: v for k, v in options.items() if k != "options"})
    decoder = VideoDecoder(path)
    assert decoder.stats["frames_decoded"] == 0, "opening decodes nothing"
    decoder.get_planes_at(int(decoder.key_frames[1]))
    assert decoder.stats["frames_decoded"] == 1, "a key frame needs no other"
    decoder.get_planes_at(59)
    assert decoder.stats["frames_decoded"] < 14, "20 frames of the last group, without disposable ones"


def test_av1_frames_out_of_reach_of_the_wanted_ones_are_not_decoded(folder: Path) -> None:
    path = folder / "av1_references.mp4"
    write_clip(path, codec="libsvtav1", num_frames=97, size=(96, 64), gop=97, options={"preset": "8"})
    wanted = decode_planes(path)
    decoder = VideoDecoder(path)
    assert joined(decoder.get_planes_at(90)) == wanted[90]
    assert decoder.stats["packets_sent"] < 45, "half of the frames before it and more are of no use to it"
    assert joined(decoder.get_planes_at(91)) == wanted[91], "what was left out for one frame is there for the next"


@pytest.mark.parametrize(
    ("codec", "suffix", "options"),
    [
        ("libx264", "mkv", {"x264-params": "open-gop=1:keyint=12:bframes=3"}),
        ("libx265", "mkv", {"x265-params": "log-level=none:open-gop=1:keyint=12:bframes=3"}),
        ("mpeg2video", "mkv", {}),
        ("libvpx-vp9", "webm", {}),
    ],
)
def test_a_file_cut_in_the_middle_shows_what_can_be_decoded(
    folder: Path, codec: str, suffix: str, options: dict[str, str]
) -> None:
    whole, part = folder / f"whole-{codec}.{suffix}", folder / f"part-{codec}.{suffix}"
    write_clip(whole, num_frames=40, codec=codec, options=options, b_frames=0 if "vp" in codec else 3, size=(96, 64))
    frames = VideoDecoder(whole)
    with av.open(str(whole)) as source, av.open(str(part), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        keys = 0
        for packet in source.demux(video=0):
            keys += packet.is_keyframe
            # Some packets of the group before, then all others.
            if packet.dts is not None and (keys >= 2 or packet.dts > 200):
                packet.stream = stream
                target.mux(packet)
    cut = VideoDecoder(part)
    key = int(frames.key_frames[1])
    assert cut.key_frames[0] == 0
    assert len(cut) == 40 - key
    for i in (0, 3, len(cut) - 1, 1):
        assert joined(cut.get_planes_at(i)) == joined(frames.get_planes_at(key + i)), f"frame {i}"


def test_reading_in_order_decodes_each_frame_once(clip: Path) -> None:
    decoder = VideoDecoder(clip)
    frames = list(decoder)
    assert len(frames) == NUM_FRAMES
    assert decoder.stats["frames_decoded"] <= NUM_FRAMES + 5  # the first two calls do not know yet
    again = VideoDecoder(clip)
    assert all(np.array_equal(again[i], frames[i]) for i in range(NUM_FRAMES))


def test_variable_frame_rate(folder: Path) -> None:
    path = folder / "vfr.mkv"
    pts = list(itertools.accumulate([0] + [1, 5, 2, 9, 3] * 6))
    write_clip(path, num_frames=len(pts), fps=25, pts=pts)
    decoder = VideoDecoder(path)
    assert decoder.pts_seconds == pytest.approx([p / 25 for p in pts], abs=1e-3)
    batch = decoder.get_frames_at(range(len(pts)))
    assert batch.duration_seconds[:-1] == pytest.approx(np.diff(pts) / 25, abs=1.1e-3)
    assert batch.pts_seconds[1:] == pytest.approx((batch.pts_seconds + batch.duration_seconds)[:-1])


# --- sequences and times ---


def test_sequence_protocol(clip: Path) -> None:
    decoder = VideoDecoder(clip)
    assert len(decoder) == 50
    assert decoder[0].shape == (64, 96, 3)
    assert decoder[0].dtype == np.uint8
    assert np.array_equal(decoder[-1], decoder[49])
    batch = decoder[40:10:-7]
    assert np.array_equal(batch.data, decoder.get_frames_at([40, 33, 26, 19, 12]).data)
    assert batch.pts_seconds == pytest.approx(np.array([40, 33, 26, 19, 12]) / 25)
    assert decoder[5:5].data.shape == (0, 64, 96, 3)
    repeated = decoder.get_frames_at([7, 3, 7])
    assert np.array_equal(repeated.data[0], repeated.data[2])
    assert not np.array_equal(repeated.data[0], repeated.data[1])
    assert len(repeated) == 3


@pytest.mark.parametrize("index", [50, -51])
def test_frames_outside_raise_index_error(clip: Path, index: int) -> None:
    with pytest.raises(IndexError, match=f"frame {index} is outside of the video's 50 frames"):
        VideoDecoder(clip).get_frames_at([0, index])


@pytest.mark.parametrize("index", [1.0, True, "1", [1, 2]])
def test_what_is_no_number_of_a_frame_is_named(clip: Path, index: Any) -> None:
    message = re.escape(f"a frame is named by a whole number, not {index!r}")
    decoder = VideoDecoder(clip)
    for call in (decoder.__getitem__, lambda index: decoder.get_frames_at([0, index]), decoder.get_planes_at):
        with pytest.raises(TypeError, match=message):
            call(index)


def test_frames_played_at(clip: Path) -> None:
    decoder = VideoDecoder(clip)
    batch = decoder.get_frames_played_at([0.0, 0.0399, 0.04, 1.999])
    assert batch.pts_seconds == pytest.approx([0, 0, 0.04, 1.96])
    for bad in (-0.01, 2.0):
        with pytest.raises(ValueError, match=rf"{bad} s is outside of what is shown, \[0.0, 2.0\) s"):
            decoder.get_frames_played_at([0.5, bad])


def test_metadata(clip: Path) -> None:
    metadata = VideoDecoder(clip).metadata
    assert (metadata.num_frames, metadata.width, metadata.height, metadata.rotation) == (50, 96, 64, 0)
    assert (metadata.codec, metadata.pixel_format, metadata.color_range) == ("h264", "yuv420p", "limited")
    assert metadata.fps == pytest.approx(25)
    assert metadata.duration_seconds == pytest.approx(2)
    assert metadata.start_seconds == 0
    assert metadata.has_b_frames
    assert not metadata.truncated


def rotated(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An mp4 with the 2x2 part (a b; c d) of its track's display matrix replaced."""
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value * 65536 for value in matrix)
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le"])
@pytest.mark.parametrize(
    ("matrix", "turn", "rotation"),
    [
        ((0, 1, -1, 0), lambda f: np.rot90(f, -1), 90),
        ((-1, 0, 0, -1), lambda f: np.rot90(f, 2), 180),
        ((0, -1, 1, 0), lambda f: np.rot90(f, 1), 270),
        ((-1, 0, 0, 1), lambda f: f[:, ::-1], 0),
    ],
)
def test_frames_come_out_upright(
    folder: Path, matrix: tuple[int, int, int, int], turn: object, rotation: int, pix_fmt: str
) -> None:
    clip = folder / f"upright-{pix_fmt}.mp4"
    write_clip(clip, num_frames=NUM_FRAMES, size=(96, 64), fps=25, pix_fmt=pix_fmt)
    plain = VideoDecoder(clip)
    turned = VideoDecoder(rotated(clip.read_bytes(), matrix))
    wanted = turn(plain[3])  # type: ignore[operator]
    assert np.array_equal(turned[3], wanted)
    assert turned.metadata.rotation == rotation
    assert (turned.metadata.height, turned.metadata.width) == wanted.shape[:2]
    assert joined(turned.get_planes_at(3)) == joined(plain.get_planes_at(3)), "planes stay as they are stored"
    cut = sample_clip(rotated(clip.read_bytes(), matrix), num_frames=1, short_side=64, size=48)
    wanted = turn(plain[25])  # type: ignore[operator]
    y, x = (wanted.shape[0] - 48) // 2, (wanted.shape[1] - 48) // 2
    assert np.array_equal(cut.data[0], wanted[y : y + 48, x : x + 48])


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p"])
@pytest.mark.parametrize(("matrix", "full_range"), [("bt709", False), ("smpte170m", False), ("bt709", True)])
def test_colours_follow_matrix_and_range(folder: Path, matrix: str, full_range: bool, pix_fmt: str) -> None:
    path = folder / f"{matrix}-{full_range}-{pix_fmt}.mkv"
    y, u, v = 100, 90, 180
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        stream.codec_context.colorspace = {"bt709": 1, "smpte170m": 6}[matrix]  # numbers of ITU-T H.273
        stream.codec_context.color_range = 2 if full_range else 1
        samples = [64 * 48, *([32 * 24] if pix_fmt == "yuv420p" else [64 * 48]) * 2]
        frame: np.ndarray = np.repeat(np.array([y, u, v], np.uint8), samples)
        frame = frame.reshape(-1, 64) if pix_fmt == "yuv420p" else frame.reshape(3, 48, 64)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format=pix_fmt)))
        container.mux(stream.encode())
    kr, kb = {"bt709": (0.2126, 0.0722), "smpte170m": (0.299, 0.114)}[matrix]
    luma = y / 255 if full_range else (y - 16) / 219
    cb, cr = ((u - 128) / (255 if full_range else 224), (v - 128) / (255 if full_range else 224))
    red, blue = luma + 2 * (1 - kr) * cr, luma + 2 * (1 - kb) * cb
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    wanted = np.clip([red, green, blue], 0, 1) * 255
    decoder = VideoDecoder(path)
    assert [int(p[0, 0]) for p in decoder.get_planes_at(0)] == [y, u, v]
    assert decoder.metadata.color_range == ("full" if full_range else "limited")
    assert np.abs(decoder[0].reshape(-1, 3).mean(axis=0) - wanted).max() < 1.0


# --- clips ---


def test_sample_clip_takes_the_planned_frames(clip: Path) -> None:
    decoder = VideoDecoder(clip)
    options: dict[str, Any] = {"short_side": 64, "size": 64}
    cut = decoder[:].data[:, :, 16:80]
    uniform = sample_clip(clip, num_frames=5, **options)
    assert np.array_equal(uniform.data, cut[[5, 15, 25, 35, 45]])
    assert uniform.pts_seconds == pytest.approx([0.2, 0.6, 1.0, 1.4, 1.8])
    assert uniform.duration_seconds == pytest.approx([0.04] * 5)
    window = sample_clip(clip, start_seconds=0.4, end_seconds=0.8, num_frames=2, **options)
    assert np.array_equal(window.data, cut[[12, 17]])
    stepped = sample_clip(clip, num_frames=6, sampling="fps", fps=2.5, **options)
    assert np.array_equal(stepped.data, cut[[0, 10, 20, 30, 40, 40]])
    looped = sample_clip(clip, num_frames=7, sampling="fps", fps=2.5, short_clip="loop", **options)
    assert np.array_equal(looped.data, cut[[0, 10, 20, 30, 40, 0, 10]])
    keys = sample_clip(clip, num_frames=4, sampling="keyframe", **options)
    assert np.array_equal(keys.data, cut[[0, 13, 26, 39]])
    with pytest.raises(DecodeError, match=r"5 instants at 2\.5 frames a second, 7 wanted"):
        sample_clip(clip, num_frames=7, sampling="fps", fps=2.5, short_clip="error")
    with pytest.raises(DecodeError, match=r"outside the video's \[0, 2\) s") as caught:
        sample_clip(clip, start_seconds=2.0)
    assert caught.value.stage == "sample"


def test_start_seconds_count_from_the_first_shown_frame(folder: Path) -> None:
    path = folder / "late.mkv"
    write_clip(path, num_frames=20, fps=10, pts=list(range(30, 50)))
    assert VideoDecoder(path).metadata.start_seconds == pytest.approx(3.0)
    late = sample_clip(path, num_frames=2, end_seconds=1.0, short_side=48, size=48)
    assert late.pts_seconds == pytest.approx([3.2, 3.7])


def test_random_sampling_depends_on_the_seed_alone(clip: Path) -> None:
    options: dict[str, Any] = {
        "sampling": "random",
        "crop": "random",
        "scale_jitter": (0.8, 1.2),
        "flip": True,
        "num_frames": 4,
    }
    first = sample_clip(clip, seed=5, short_side=64, size=48, **options)
    assert np.array_equal(first.data, sample_clip(clip.read_bytes(), seed=5, short_side=64, size=48, **options).data)
    others = [sample_clip(clip, seed=seed, short_side=64, size=48, **options) for seed in range(6, 12)]
    assert all(not np.array_equal(first.data, other.data) for other in others)
    assert len({tuple(other.pts_seconds) for other in others}) > 1
    free = [sample_clip(clip, short_side=64, size=48, **options).data.tobytes() for _ in range(3)]
    assert len(set(free)) > 1, "without a seed each call draws one"


def test_crop_and_flip_are_the_same_for_all_frames(folder: Path) -> None:
    path = folder / "still.mp4"
    write_clip(path, frames=moving_texture(1, (96, 64)) * 8, options={"qp": "10"})
    frames = sample_clip(path, seed=3, crop="random", scale_jitter=(0.8, 1.2), flip=True, short_side=64, size=48).data
    assert np.abs(frames.astype(int) - frames[0]).max() < 20


def test_fixed_crop_and_flip(clip: Path) -> None:
    whole = sample_clip(clip, num_frames=2, short_side=64, crop=(0, 0, 64, 96))
    part = sample_clip(clip, num_frames=2, short_side=64, crop=(3, 10, 20, 40))
    assert np.array_equal(part.data, whole.data[:, 3:23, 10:50])
    flipped = {sample_clip(clip, num_frames=2, short_side=64, crop=(0, 0, 64, 96), flip=True, seed=s).data.tobytes()
               for s in range(16)}  # fmt: skip
    assert flipped == {whole.data.tobytes(), whole.data[:, :, ::-1].tobytes()}
    with pytest.raises(DecodeError, match=r"crop \(60, 0, 20, 40\) does not fit"):
        sample_clip(clip, short_side=64, crop=(60, 0, 20, 40))


def test_resizing_averages_over_what_it_covers(folder: Path) -> None:
    path = folder / "stripes.mkv"
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # a resize by point sampling or plain bilinear weights would show a pattern
    write_clip(path, frames=[stripes] * 2, pix_fmt="yuv444p", options={"qp": "1"})
    small = sample_clip(path, num_frames=1, short_side=16, size=16).data[0]
    assert np.abs(small.astype(int)[2:-2, 2:-2] - 127).max() < 12


def test_jitter_below_the_crop_is_enlarged_to_it(clip: Path) -> None:
    assert sample_clip(clip, scale_jitter=(0.1, 0.2), short_side=64, size=60, seed=0).data.shape == (8, 60, 60, 3)


def test_fast_quality_is_close_to_exact(clip: Path) -> None:
    exact = sample_clip(clip, short_side=64, size=64).data.astype(float)
    fast = sample_clip(clip, short_side=64, size=64, quality="fast").data.astype(float)
    assert 0 < np.sqrt(((exact - fast) ** 2).mean()) < 255 / 10 ** (30 / 20)  # 30 dB on this texture of hard edges


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampling": "often"}, "sampling must be one of 'uniform', 'fps', 'random', 'keyframe', not 'often'"),
        ({"short_clip": "cut"}, "short_clip must be one of"),
        ({"quality": "best"}, "quality must be one of 'exact', 'fast', not 'best'"),
        ({"errors": "ignore"}, "errors must be one of 'raise', 'conceal', not 'ignore'"),
        ({"crop": "left"}, "crop must be one of 'center', 'random', not 'left'"),
        ({"crop": (0, 0, 0, 5)}, "crop: h must be at least 1, not 0"),
        ({"num_frames": 0}, "num_frames must be at least 1, not 0"),
        ({"size": 300}, "size 300 exceeds short_side 256"),
        ({"fps": 0.0}, "fps must be finite and above 0, not 0.0"),
        ({"scale_jitter": (1.2, 0.8)}, "scale_jitter must be"),
        ({"scale_jitter": (0.8, 1.2, 1.5)}, "scale_jitter must be None or (low, high), not"),
        ({"crop": None}, "crop must be 'center', 'random' or (y, x, h, w) in pixels, not None"),
        ({"crop": (0, -1, 5, 5)}, "crop: x must be at least 0, not -1"),
        ({"short_side": 1 << 31}, "short_side must be at most 2147483647, not 2147483648"),
        ({"start_seconds": -1.0}, "start_seconds must be finite and not negative, it is -1.0"),
        ({"start_seconds": 2.0, "end_seconds": 1.0}, "end_seconds must be above start_seconds = 2.0, it is 1.0"),
        ({"timeout_seconds": 0.0}, "timeout_seconds must be None or above 0, not 0.0"),
        ({"limits": Limits(max_bytes=1000)}, "exceed limits.max_bytes = 1000"),
    ],
)
def test_bad_arguments_are_named(clip: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        sample_clip(clip, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_frames": 8.0}, "num_frames must be a whole number, not 8.0"),
        ({"size": True}, "size must be a whole number, not True"),
        ({"crop": (0, 0, 5.0, 5)}, "crop: h must be a whole number, not 5.0"),
        ({"flip": 1}, "flip must be True or False, not 1"),
        ({"fps": "2"}, "fps must be a number, not '2'"),
        ({"scale_jitter": ("a", "b")}, "scale_jitter must be a number, not 'a'"),
        ({"timeout_seconds": "1"}, "timeout_seconds must be a number"),
        ({"start_seconds": None}, "start_seconds must be a number, not None"),
        ({"seed": "a"}, "seed must be a whole number or None, not 'a'"),
        ({"limits": {"max_frames": 3}}, "limits must be pyvdl.Limits(...) or None, not {'max_frames': 3}"),
    ],
)
def test_arguments_of_another_type_are_named(clip: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words.replace("(", r"\(").replace(")", r"\)")):
        sample_clip(clip, **options)


@pytest.mark.parametrize(
    ("path", "words"),
    [("", "the path is empty"), ("{clip}\0.mp4", "holds a NUL byte"), ("\ud800.mp4", "no file can have the name")],
)
def test_a_path_that_cannot_be_opened_fails_its_clip_alone(clip: Path, path: str, words: str) -> None:
    path = path.format(clip=clip)
    for call in (VideoDecoder, sample_clip):
        with pytest.raises(DecodeError, match=f"open: .*{words}"):
            call(path)
    requests = [ClipRequest(clip), ClipRequest(path), ClipRequest(FileSlice(path, 0, 1)), ClipRequest(clip)]
    (batch,) = ClipLoader(requests, batch_size=4, num_frames=1)
    assert batch.ok.tolist() == [True, False, False, True]
    assert not batch.data[1:3].any()
    for error in batch.errors[1:3]:
        assert error is not None
        assert error.startswith("open: ")
        assert words in error


def test_numpy_numbers_are_numbers(clip: Path) -> None:
    options: dict[str, Any] = {"num_frames": np.int32(2), "size": np.int64(32), "fps": np.float32(2), "flip": np.True_}
    assert sample_clip(clip, seed=0, **options).data.shape == (2, 32, 32, 3)
    assert len(VideoDecoder(clip, stream=np.int64(0), limits=Limits(max_frames=np.int64(50)))) == 50  # type: ignore


# --- sources and faults ---


class Broken(io.RawIOBase):
    def read(self, size: int = -1, /) -> bytes:
        raise OSError("the link is down")


def test_file_like_objects_and_urls_are_read_whole(clip: Path) -> None:
    wanted = sample_clip(clip, num_frames=3).data
    fsspec.filesystem("memory").pipe_file("/clip.mp4", b"..." + clip.read_bytes())
    url = FileSlice("memory://clip.mp4", 3, clip.stat().st_size)
    for source in (io.BytesIO(clip.read_bytes()), url, clip.as_uri()):
        assert np.array_equal(sample_clip(source, num_frames=3).data, wanted)
    bad = [Broken(), io.StringIO("text"), "memory://none.mp4", "nosuch://a/b.mp4", io.BytesIO(bytes(2000))]
    words = ["the link is down", "binary mode", "none.mp4", "Protocol not known: nosuch", "max_bytes = 1000"]
    requests = [ClipRequest(source) for source in [*bad, clip]]  # type: ignore[arg-type]
    limits = Limits(max_bytes=1000)
    (batch,) = ClipLoader(requests, batch_size=6, num_frames=1, size=16, short_side=16, limits=limits)
    assert batch.ok.tolist() == [False] * 5 + [True]
    for error, word in zip(batch.errors, words, strict=False):
        assert error is not None
        assert word in error
    with pytest.raises(DecodeError, match="open: OSError: the link is down"):
        VideoDecoder(Broken())


def test_sources_give_the_same(clip: Path, folder: Path) -> None:
    wanted = sample_clip(clip, num_frames=3).data
    assert np.array_equal(sample_clip(str(clip), num_frames=3).data, wanted)
    assert np.array_equal(sample_clip(clip.read_bytes(), num_frames=3).data, wanted)
    archive = folder / "shard.tar"
    with tarfile.open(archive, "w") as tar:
        tar.addfile(tarfile.TarInfo("before.txt"), io.BytesIO())
        tar.add(clip, "a.mp4")
        tar.add(clip, "b.mp4")
    with tarfile.open(archive) as tar:
        member = tar.getmember("b.mp4")
    inside = FileSlice(archive, member.offset_data, member.size)
    assert np.array_equal(sample_clip(inside, num_frames=3).data, wanted)
    with pytest.raises(DecodeError, match="are not inside the file"):
        sample_clip(FileSlice(archive, member.offset_data, 10**9))
    with pytest.raises(TypeError, match=r"a path, a URL, bytes, a pyvdl.FileSlice or a file-like object, not int"):
        sample_clip(3)  # type: ignore[arg-type]
    unusual = folder / os.fsdecode(b"caf\xe9 \xff.mp4")
    unusual.write_bytes(clip.read_bytes())
    assert np.array_equal(sample_clip(unusual, num_frames=3).data, wanted)


def audio_only(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_a_stream_is_chosen_among_those_of_videos(folder: Path) -> None:
    path = folder / "streams.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("ffv1", rate=10, width=64, height=48, pix_fmt="yuv420p") for _ in range(2)]
        for number, stream in enumerate(streams):
            frame = av.VideoFrame.from_ndarray(np.full((72, 64), 50 + number, np.uint8), format="yuv420p")
            container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    assert [VideoDecoder(path, stream=i).get_planes_at(0)[0][0, 0] for i in (None, 0, 1)] == [50, 50, 51]
    assert VideoDecoder(path, stream=1).metadata.num_video_streams == 2


@pytest.mark.parametrize("with_video", [True, False])
def test_a_picture_of_a_cover_is_no_video(folder: Path, with_video: bool) -> None:
    """As songs have one, and videos from some sites."""
    path = folder / f"cover-{with_video}.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("png", rate=1, width=32, height=32, pix_fmt="rgb24")
        cover.disposition = Disposition.attached_pic
        if with_video:
            stream = container.add_stream("ffv1", rate=10, width=64, height=48, pix_fmt="yuv420p")
            frame = av.VideoFrame.from_ndarray(np.full((72, 64), 50, np.uint8), format="yuv420p")
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 9, np.uint8), format="rgb24")))
        if with_video:
            container.mux([*stream.encode(frame), *stream.encode()])
        container.mux(cover.encode())
    if with_video:
        decoder = VideoDecoder(path)
        assert (decoder.metadata.codec, decoder.metadata.num_video_streams) == ("ffv1", 1)
        assert decoder.get_planes_at(0)[0][0, 0] == 50
    else:
        with pytest.raises(DecodeError, match="stream: no video stream"):
            VideoDecoder(path)


def test_faults_name_path_and_stage(clip: Path, folder: Path) -> None:
    text = folder / "notes.mp4"
    text.write_text("not a video " * 50)
    empty = folder / "empty.mp4"
    empty.touch()
    headless = folder / "headless.mp4"
    headless.write_bytes(clip.read_bytes()[:500])
    cases = {
        folder / "missing.mp4": ("open", "No such file"),
        folder: ("open", "directory"),
        text: ("header", "no video container recognised"),
        empty: ("header", "no bytes"),
        headless: ("header", ""),
        audio_only(folder / "audio.m4a"): ("stream", "no video stream"),
    }
    for path, (stage, words) in cases.items():
        for call in (VideoDecoder, sample_clip):
            with pytest.raises(DecodeError) as caught:
                call(path)
            assert (caught.value.path, caught.value.stage) == (str(path), stage)
            assert words in caught.value.message
    with pytest.raises(DecodeError, match="<bytes>: header"):
        VideoDecoder(b"no video")
    with pytest.raises(DecodeError, match="no video stream 1, there are 1"):
        VideoDecoder(clip, stream=1)
    copy = pickle.loads(pickle.dumps(DecodeError("a", "open", "b")))
    assert (copy.path, copy.stage, copy.message, str(copy)) == ("a", "open", "b", "a: open: b")


def test_playlists_open_nothing(clip: Path, folder: Path) -> None:
    playlists = {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{clip}\n#EXT-X-ENDLIST\n",
        "list.txt": f"ffconcat version 1.0\nfile '{clip}'\n",
    }
    for name, content in playlists.items():
        (folder / name).write_text(content)
        with pytest.raises(DecodeError):
            VideoDecoder(folder / name)


def damaged(path: Path, packet: int) -> bytes:
    """The file with the payload of one packet, in decoding order, blanked."""
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    data, body = path.read_bytes(), bytes(packets[packet])
    at = data.index(body)
    return data[:at] + body[:6] + bytes(len(body) - 6) + data[at + len(body) :]


def refusal(decoder: VideoDecoder, index: int) -> DecodeError | None:
    try:
        decoder.get_planes_at(index)
    except DecodeError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "libx264"), ("mkv", "libx264"), ("mp4", "libx265"), ("mkv", "mpeg2video")]
)
def test_a_frame_decoded_with_errors_is_refused_or_concealed(folder: Path, suffix: str, codec: str) -> None:
    path = folder / f"damage-{codec}.{suffix}"
    quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    write_clip(path, num_frames=48, size=(96, 64), gop=12, codec=codec, options=quiet)
    clean = [joined(VideoDecoder(path).get_planes_at(i)) for i in range(48)]
    data = damaged(path, 13)  # the first P picture of the second group of pictures
    strict, loose = VideoDecoder(data), VideoDecoder(data, errors="conceal")
    assert len(strict) == len(loose) == 48
    refused = set()
    for i in range(48):
        error = refusal(strict, i)
        if error is None:
            assert joined(strict.get_planes_at(i)) == clean[i], f"frame {i} was accepted but differs"
        else:
            assert error.stage == "decode"
            assert error.message.startswith((f"frame {i} was decoded with", f"frame {i} did not come out"))
            refused.add(i)
        assert len(loose.get_planes_at(i)) == 3
    different = {i for i in range(48) if joined(loose.get_planes_at(i)) != clean[i]}
    assert different
    assert different <= refused <= set(range(12, 24))
    with pytest.raises(DecodeError, match=r"frame \d+ (was decoded with|did not come out)"):
        sample_clip(data, num_frames=24)
    assert sample_clip(data, num_frames=24, errors="conceal").data.shape[0] == 24
    inside = sample_clip(data, num_frames=4, start_seconds=1.0)
    assert np.array_equal(inside.data, sample_clip(path, num_frames=4, start_seconds=1.0).data)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_truncated_file_is_told(folder: Path, suffix: str) -> None:
    path = folder / f"truncated.{suffix}"
    faststart = {"movflags": "faststart"} if suffix == "mp4" else None
    write_clip(path, num_frames=48, size=(96, 64), container_options=faststart)
    data = path.read_bytes()
    cut = data[: len(data) * 2 // 3]
    decoder = VideoDecoder(cut)
    assert 20 < len(decoder) < 40
    for i in range(18):
        assert joined(decoder.get_planes_at(i)) == joined(VideoDecoder(data).get_planes_at(i))
    if suffix == "mp4":  # its table tells what is missing; Matroska has none
        assert decoder.metadata.truncated
        with pytest.raises(DecodeError, match=rf"read: the file is cut off: {len(decoder)} frames of it are there"):
            sample_clip(cut)
    inside: dict[str, Any] = {"end_seconds": 0.5, "num_frames": 3}
    assert np.array_equal(sample_clip(cut, **inside).data, sample_clip(data, **inside).data)


def test_limits(clip: Path) -> None:
    for limits, words in (
        (Limits(max_pixels=96 * 64 - 1), "96x64 exceeds max_pixels = 6143"),
        (Limits(max_frames=49), "more than max_frames = 49"),
        (Limits(max_seconds=1.9), "exceed max_seconds"),
    ):
        with pytest.raises(DecodeError, match=words) as caught:
            VideoDecoder(clip, limits=limits)
        assert caught.value.stage == "limits"
    with pytest.raises(DecodeError, match="50 frames of 18432 bytes exceed max_bytes"):
        VideoDecoder(clip, limits=Limits(max_bytes=100_000))[:]
    assert len(VideoDecoder(clip, limits=Limits(max_pixels=96 * 64, max_frames=50, max_seconds=2.0))) == 50
    with pytest.raises(ValueError, match="max_frames must be at least 1, not 0"):
        Limits(max_frames=0)
    with pytest.raises(ValueError, match="max_seconds must be above 0, not nan"):
        Limits(max_seconds=math.nan)
    with pytest.raises(TypeError, match=r"max_bytes must be a whole number, not 1000000000\.0"):
        Limits(max_bytes=1e9)  # type: ignore[arg-type]


def test_time_limit(clip: Path, folder: Path) -> None:
    with pytest.raises(DecodeError) as caught:
        sample_clip(clip, timeout_seconds=1e-9)
    assert caught.value.stage == "timeout"
    stalled = folder / "stalled.mp4"
    os.mkfifo(stalled)
    writer = os.open(stalled, os.O_RDWR)
    os.write(writer, clip.read_bytes()[:1000])
    begin = time.monotonic()
    with pytest.raises(DecodeError, match=r"not finished within 0.3 s"):
        sample_clip(stalled, timeout_seconds=0.3)
    assert time.monotonic() - begin < 5
    os.close(writer)


def test_a_pipe_is_read_to_its_end(clip: Path, folder: Path) -> None:
    pipe = folder / "pipe.mp4"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(clip.read_bytes()))
    writer.start()
    piped = sample_clip(pipe, num_frames=2, timeout_seconds=20)
    writer.join()
    assert np.array_equal(piped.data, sample_clip(clip, num_frames=2).data)


# --- buffers ---


def test_buffers_are_read_only_aligned_and_freed(clip: Path) -> None:
    batch = sample_clip(clip, num_frames=3)
    array = batch.data
    assert array.ctypes.data % 64 == 0
    for values in (array, batch.pts_seconds, batch.duration_seconds):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 0
    view = array[1:]
    wanted = view.copy()
    owner = weakref.ref(array)
    del array, batch
    gc.collect()
    assert np.array_equal(view, wanted)
    del view
    gc.collect()
    assert owner() is None


# --- batches ---


def requests_for(clip: Path, count: int) -> list[ClipRequest]:
    return [ClipRequest(clip, start_seconds=(i % 7) / 10, end_seconds=None, seed=i) for i in range(count)]


OPTIONS: dict[str, Any] = {"num_frames": 3, "sampling": "random", "crop": "random", "short_side": 64, "size": 48}


def test_loader_gives_what_sample_clip_gives_in_order(clip: Path) -> None:
    requests = requests_for(clip, 11)
    wanted = [
        sample_clip(r.source, start_seconds=r.start_seconds, seed=r.seed, **OPTIONS).data
        for r in requests
    ]  # fmt: skip
    for threads, batch_size, prefetch in ((1, 4, 0), (3, 4, 2), (2, 1, 5), (2, 20, 1)):
        batches = list(
            ClipLoader(requests, batch_size=batch_size, num_threads=threads, prefetch=prefetch, **OPTIONS)
        )  # fmt: skip
        assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert np.array_equal(np.concatenate([b.data for b in batches]), np.stack(wanted))
        assert np.concatenate([b.index for b in batches]).tolist() == list(range(11))
        assert all(b.ok.all() and b.errors == [None] * len(b) for b in batches)
        assert all(b.data.ctypes.data % 64 == 0 and not b.data.flags.writeable for b in batches)


def test_a_seed_of_the_loader_serves_requests_without_one(clip: Path) -> None:
    requests = [ClipRequest(clip), ClipRequest(clip), ClipRequest(clip, seed=4)]

    def data(seed: int, threads: int) -> np.ndarray:
        (batch,) = ClipLoader(requests, batch_size=3, num_threads=threads, prefetch=0, seed=seed, **OPTIONS)
        return batch.data

    first = data(1, 1)
    assert np.array_equal(first, data(1, 3))
    assert not np.array_equal(first[0], first[1])
    other = data(2, 1)
    assert not np.array_equal(first[0], other[0])
    assert np.array_equal(first[2], other[2])


def test_a_batch_tells_its_sources_apart(clip: Path, folder: Path) -> None:
    """Parts of one file, and bytes in memory; of one length, as they may be."""
    other = folder / "other.mp4"
    write_clip(other, num_frames=NUM_FRAMES, size=(96, 64), fps=25, gop=13, seed=3)
    data = [path.read_bytes() for path in (clip, other)]
    most = max(map(len, data)) + 8
    data = [content + struct.pack(">I4s", most - len(content), b"free").ljust(most - len(content)) for content in data]
    (folder / "both").write_bytes(b"".join(data))
    sources: list[Any] = [*(FileSlice(folder / "both", i * most, most) for i in range(2)), *data]
    options: dict[str, Any] = {"num_frames": 2, "size": 32, "short_side": 40}
    (batch,) = ClipLoader([ClipRequest(source) for source in sources], batch_size=4, **options)
    wanted = [sample_clip(path, **options).data for path in (clip, other)]
    np.testing.assert_array_equal(batch.data, [*wanted, *wanted])


@pytest.mark.parametrize("quality", ["exact", "fast"])
def test_segments_of_one_file_share_their_decoding(folder: Path, quality: Any) -> None:
    path = folder / "segments.mp4"
    write_clip(path, num_frames=100, size=(96, 64), fps=25, gop=50)
    starts = (3.0, 0.1, 2.0, 1.2, 0.5)
    requests = [ClipRequest(path, start, start + 1.0, seed=i) for i, start in enumerate(starts)]
    options: dict[str, Any] = {"num_frames": 4, "size": 32, "short_side": 40, "crop": "random", "sampling": "random"}
    options["quality"] = quality
    alone = [
        sample_clip(path, start_seconds=start, end_seconds=start + 1.0, seed=i, **options).data
        for i, start in enumerate(starts)
    ]
    for threads, size in ((1, 5), (2, 5), (1, 2), (3, 4)):
        batches = ClipLoader(requests, batch_size=size, num_threads=threads, **options)
        assert np.array_equal(np.concatenate([batch.data for batch in batches]), np.stack(alone))


def test_a_bad_segment_leaves_the_others_of_its_file(clip: Path) -> None:
    requests = [ClipRequest(clip, start) for start in (0.0, 50.0, 1.0)]
    (batch,) = ClipLoader(requests, batch_size=3, num_frames=2, size=32, short_side=40)
    assert batch.ok.tolist() == [True, False, True]
    assert "lies outside" in (batch.errors[1] or "")


def test_a_file_that_changes_is_read_anew(folder: Path) -> None:
    path = folder / "changing.mp4"
    options: dict[str, Any] = {"num_frames": 3, "size": 32, "short_side": 40}

    clips = []
    for seed in (1, 2):
        write_clip(path, num_frames=20 + 10 * seed, size=(96, 64), seed=seed)
        os.utime(path, ns=(seed, seed))
        clips.append(sample_clip(path, **options).data)
        (again,) = ClipLoader([ClipRequest(path)], batch_size=1, num_threads=1, **options)
        assert np.array_equal(again.data[0], clips[-1])
    assert not np.array_equal(clips[0], clips[1])


def test_one_bad_clip_stops_nothing(clip: Path, folder: Path) -> None:
    good = ClipRequest(clip, seed=0)
    bad = [ClipRequest(folder / "missing.mp4"), ClipRequest(b"nonsense"), ClipRequest(clip, start_seconds=5.0)]
    (batch,) = ClipLoader([good, *bad, good], batch_size=8, num_threads=2, prefetch=1, **OPTIONS)
    assert batch.ok.tolist() == [True, False, False, False, True]
    assert [error and error.split(":")[0] for error in batch.errors] == [None, "open", "header", "sample", None]
    assert not batch.data[1:4].any()
    assert np.array_equal(batch.data[0], batch.data[4])


def test_requests_are_read_lazily_and_may_be_endless(clip: Path) -> None:
    taken = 0

    def endless() -> Iterator[ClipRequest]:
        nonlocal taken
        while True:
            taken += 1
            yield ClipRequest(clip, seed=taken)

    before = num_threads()
    loader = ClipLoader(endless(), batch_size=2, num_threads=2, prefetch=3, **OPTIONS)
    assert taken == 0
    next(loader)
    assert taken == 2 * (3 + 1)
    next(loader)
    assert taken == 2 * (3 + 2)
    loader.close()
    assert threads_fall_to(before)
    with pytest.raises(StopIteration):
        next(loader)


def test_leaving_early_ends_the_threads(clip: Path) -> None:
    before = num_threads()
    with ClipLoader(requests_for(clip, 40), batch_size=2, num_threads=2, prefetch=4, **OPTIONS) as loader:
        kept = next(loader).data
    assert threads_fall_to(before)
    for _ in ClipLoader(requests_for(clip, 40), batch_size=2, num_threads=2, prefetch=4, **OPTIONS):
        break
    gc.collect()
    assert threads_fall_to(before)
    assert kept.any(), "a batch outlives its loader"


def test_an_exception_of_the_requests_reaches_the_consumer(clip: Path) -> None:
    def failing() -> Iterator[ClipRequest]:
        yield ClipRequest(clip)
        raise OSError("manifest lost")

    before = num_threads()
    loader = ClipLoader(failing(), batch_size=1, num_threads=1, prefetch=0, **OPTIONS)
    assert next(loader).ok.all()
    with pytest.raises(OSError, match="manifest lost"):
        next(loader)
    loader.close()
    assert threads_fall_to(before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"num_threads": 0}, "num_threads must be at least 1, not 0"),
        ({"prefetch": -1}, "prefetch must be at least 0, not -1"),
    ],
)
def test_bad_loader_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ClipLoader([], **{"batch_size": 1, "num_threads": 1, "prefetch": 1} | options)


def test_what_is_no_request_is_named(clip: Path) -> None:
    with pytest.raises(TypeError, match=r"requests must give pyvdl\.ClipRequest, such as .*, not 'a.mp4'"):
        next(ClipLoader(["a.mp4"], batch_size=1))  # type: ignore[list-item]
    with pytest.raises(TypeError, match="seed must be a whole number or None, not 'a'"):
        ClipLoader([ClipRequest(clip, seed=0)], batch_size=1, seed="a")  # type: ignore[arg-type]


def test_python_runs_while_a_clip_is_decoded(folder: Path) -> None:
    path = folder / "long.mp4"
    write_clip(path, num_frames=300, size=(192, 128), fps=25)
    count = 0
    stop = threading.Event()

    def tick() -> None:
        nonlocal count
        while not stop.is_set():
            count += 1
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        # With the GIL held, the other thread would get a turn before and after the one call into the decoder. A busy
        # machine may give the decoder all of the time for a while, not for all of these.
        turns: list[int] = []
        while max(turns, default=0) < 20 and len(turns) < 100:
            decoder = VideoDecoder(path)
            before = count
            decoder[:]
            turns.append(count - before)
    finally:
        stop.set()
        thread.join()
    assert max(turns) >= 20, turns


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )


def test_the_interpreter_exits_with_a_loader_at_work(clip: Path) -> None:
    done = run_python(f"""
        import itertools, pyvdl
        requests = (pyvdl.ClipRequest({str(clip)!r}) for _ in itertools.count())
        loader = pyvdl.ClipLoader(requests, batch_size=4, num_threads=2, prefetch=4)
        print(next(loader).ok.all())
    """)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "True", "")


def test_import_does_no_work_and_needs_no_extension() -> None:
    done = run_python("""
        import sys
        import pyvdl
        assert "numpy" not in sys.modules and "pyvdl.video" not in sys.modules
        sys.modules["pyvdl._core"] = None  # as if it had not been built
        request = pyvdl.ClipRequest("a.mp4")
        try:
            pyvdl.sample_clip("a.mp4")
        except ImportError as error:
            print(error)
    """)
    assert done.returncode == 0, done.stderr
    assert "make env" in done.stdout
    assert "pip install" in done.stdout
    assert set(pyvdl.__all__) <= set(dir(pyvdl))
    done = run_python("""
        import pyvdl
        print(pyvdl.data.Record(key="a", video="a.mp4").video, pyvdl.archives.read_records.__name__)
    """)
    assert (done.stdout.split(), done.stderr) == (["a.mp4", "read_records"], "")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pyvdl.nonsense


@pytest.mark.parametrize("order", ["import av; import pyvdl", "import pyvdl; pyvdl.VideoDecoder; import av"])
def test_pyav_in_the_same_process(clip: Path, order: str) -> None:
    done = run_python(f"""
        {order}
        frames = len(pyvdl.VideoDecoder({str(clip)!r})[:].data)
        with av.open({str(clip)!r}) as container:
            print(frames, sum(1 for _ in container.decode(video=0)))
    """)
    assert (done.returncode, done.stdout.split()) == (0, ["50", "50"]), done.stderr


def test_a_request_that_cannot_be_meant_is_refused_when_made(clip: Path) -> None:
    times: list[tuple[dict[str, Any], str]] = [
        ({"start_seconds": -1.0}, "start_seconds must be finite and not negative"),
        ({"start_seconds": 2.0, "end_seconds": 1.0}, "end_seconds must be above start_seconds"),
    ]
    for options, message in times:
        with pytest.raises(ValueError, match=message):
            ClipRequest(clip, **options)
    with pytest.raises(TypeError):
        ClipRequest(clip, seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a source is a path"):
        ClipRequest(5)  # type: ignore[arg-type]


def test_seeds_may_be_numpy_integers_and_timeouts_long(clip: Path) -> None:
    options: dict[str, Any] = {"sampling": "random", "num_frames": 3, "short_side": 64, "size": 32}
    plain = sample_clip(clip, seed=5, **options).data
    requests = [ClipRequest(clip)] * 3
    of_numpy, of_python = (
        ClipLoader(requests, batch_size=3, seed=seed, **options)  # type: ignore[arg-type]
        for seed in (np.uint32(5), 5)
    )
    np.testing.assert_array_equal(next(of_numpy).data, next(of_python).data)
    for timeout_seconds in (1e10, math.inf):
        seeded = sample_clip(clip, seed=np.int64(5), timeout_seconds=timeout_seconds, **options)  # type: ignore[arg-type]
        np.testing.assert_array_equal(seeded.data, plain)


def test_a_loader_may_be_closed_from_another_thread(clip: Path) -> None:
    for i in range(40):
        loader = ClipLoader([ClipRequest(clip, seed=0)] * 12, batch_size=2, num_threads=2, prefetch=2, num_frames=2)
        closing = threading.Timer(0.001 * i, loader.close)
        closing.start()
        assert sum(len(batch) for batch in loader) <= 12
        closing.join()
