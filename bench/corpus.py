"""The clips that decoders are timed on: one synthetic scene, encoded as users' files are.

The scene has what an encoder's decisions depend on: texture at all scales, a camera that moves by fractions of a pixel,
objects that cover the background, and sensor noise. Encoders run with their default settings (key frame distance,
B-frame pyramid, quality), since those, not the pictures, decide how many frames a decoder may leave out.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange, Colorspace

FPS = 30
NUM_NOISE_FIELDS = 8  # of which each frame takes one at a random offset
NOISE_LEVELS = 1.5  # standard deviation of the noise, in 8-bit levels


@dataclass(frozen=True)
class Case:
    """One clip of the corpus."""

    name: str
    suffix: str
    encoder: str
    width: int
    height: int
    seconds: float = 10.0
    options: dict[str, str] = field(default_factory=dict)

    @property
    def num_frames(self) -> int:
        return round(self.seconds * FPS)

    @property
    def family(self) -> str:
        """Cases of a family let a decoder leave out the same kinds of frames."""
        return "H.264 baseline" if self.options.get("profile") == "baseline" else _FAMILIES[self.encoder]


_FAMILIES = {
    "libx264": "H.264 with B", "libx265": "HEVC", "libvpx-vp9": "VP9", "libsvtav1": "AV1", "mpeg4": "MPEG-4"
}  # fmt: skip

CASES = {
    case.name: case
    for case in (
        Case("h264-240p", ".mp4", "libx264", 426, 240),
        Case("h264-360p", ".mp4", "libx264", 640, 360),
        Case("h264-720p", ".mp4", "libx264", 1280, 720),
        Case("h264-1080p", ".mp4", "libx264", 1920, 1080),
        Case("h264-720p-gop48", ".mp4", "libx264", 1280, 720, options={"g": "48"}),
        Case("h264-720p-baseline", ".mp4", "libx264", 1280, 720, options={"profile": "baseline"}),
        Case("hevc-720p", ".mp4", "libx265", 1280, 720, options={"x265-params": "log-level=none"}),
        Case("vp9-720p", ".webm", "libvpx-vp9", 1280, 720),
        Case("av1-720p", ".mp4", "libsvtav1", 1280, 720),
        Case("mpeg4-240p-avi", ".avi", "mpeg4", 426, 240, options={"b": "1000000", "bf": "2"}),
        Case("h264-720p-60s", ".mp4", "libx264", 1280, 720, seconds=60.0),
    )
}


class MissingEncoderError(RuntimeError):
    """This build of FFmpeg cannot write a case."""


def make_clip(case: Case, folder: Path) -> Path:
    """The file of a case in `folder`, encoded unless it is there. It appears whole or not at all.

    Raises MissingEncoderError where PyAV's FFmpeg lacks the encoder.
    """
    path = folder / f"{case.name}{case.suffix}"
    if path.exists():
        return path
    if case.encoder not in av.codecs_available:
        raise MissingEncoderError(f"PyAV's FFmpeg has no encoder {case.encoder}")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".partial-{path.name}"
    try:
        _encode(case, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def same_priority() -> Iterator[None]:
    """SVT-AV1 moves the thread that starts it to a real-time policy where it may; new threads would inherit that."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def _encode(case: Case, path: Path) -> None:
    high_definition = case.height >= 720
    with same_priority(), av.open(str(path), "w") as container:
        stream = cast(av.VideoStream, container.add_stream(case.encoder, rate=FPS, options=dict(case.options)))
        stream.width, stream.height, stream.pix_fmt = case.width, case.height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, FPS)
        stream.codec_context.colorspace = Colorspace.ITU709 if high_definition else Colorspace.ITU601
        stream.codec_context.color_range = ColorRange.MPEG
        for i, planes in enumerate(scene(case.width, case.height, case.num_frames)):
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def scene(width: int, height: int, num_frames: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Frames uint8[3 * H / 2, W] (planes Y, U, V, one below the other): the same for the same arguments."""
    rng = np.random.default_rng(0)
    margin = height // 2  # how far the camera goes from the middle
    luma = 128 + 38 * _clouds(rng, height + 2 * margin, width + 2 * margin)
    chroma = [128 + 22 * _clouds(rng, (height + 2 * margin) // 2, (width + 2 * margin) // 2) for _ in range(2)]
    objects = [_Object(rng, height // divisor) for divisor in (3, 4, 5, 6, 8, 10)]
    noise = rng.normal(0, NOISE_LEVELS, (NUM_NOISE_FIELDS, height + 64, width + 64)).astype(np.float32)
    for i in range(num_frames):
        seconds = i / FPS
        # Even at the turning points of one direction the other one moves: no two frames are alike.
        y = margin * (1 + 0.9 * np.sin(0.53 * seconds + 0.3))
        x = margin * (1 + 0.9 * np.cos(0.41 * seconds))
        planes = [_shifted(luma, y, x, height, width)]
        planes += [_shifted(plane, y / 2, x / 2, height // 2, width // 2) for plane in chroma]
        for thing in objects:
            thing.draw(planes, seconds)
        top, left = rng.integers(0, 64, 2)
        planes[0] += noise[i % NUM_NOISE_FIELDS, top : top + height, left : left + width]
        pixels = np.concatenate([plane.reshape(-1) for plane in planes])
        yield np.clip(pixels, 16, 235).astype(np.uint8).reshape(height * 3 // 2, width)


def _clouds(rng: np.random.Generator, height: int, width: int) -> npt.NDArray[np.float32]:
    """float32[H, W] periodic texture of variance 1 whose amplitude falls with frequency about as in photographs."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / (frequency + 1 / height) ** 1.4
    clouds = np.fft.irfft2(spectrum, (height, width))
    return ((clouds - clouds.mean()) / clouds.std()).astype(np.float32)


def _shifted(plane: npt.NDArray[np.float32], y: float, x: float, height: int, width: int) -> npt.NDArray[np.float32]:
    """The window of `plane` at a fractional place, by bilinear interpolation."""
    top, left = int(y), int(x)
    window = plane[top : top + height + 1, left : left + width + 1]
    rows = window[:-1] + np.float32(y - top) * (window[1:] - window[:-1])
    return rows[:, :-1] + np.float32(x - left) * (rows[:, 1:] - rows[:, :-1])


class _Object:
    """A textured disc on an elliptic path."""

    def __init__(self, rng: np.random.Generator, diameter: int) -> None:
        self.half = max(diameter // 4, 1)  # radius in chroma samples
        side = 4 * self.half
        self.tiles = [128 + rng.uniform(-60, 60) + 25 * _clouds(rng, side, side)]
        self.tiles += [
            np.float32(128 + rng.uniform(-50, 50)) + 8 * _clouds(rng, side // 2, side // 2) for _ in range(2)
        ]
        self.speed, self.phase, self.reach = rng.uniform(0.4, 1.6), rng.uniform(0, 6), rng.uniform(0.2, 0.4)

    def draw(self, planes: list[npt.NDArray[np.float32]], seconds: float) -> None:
        """Paints the disc over Y, U and V at its place at this time."""
        height, width = planes[1].shape
        angle = self.speed * seconds + self.phase
        y = round(height * (0.5 + self.reach * np.sin(angle))) - self.half
        x = round(width * (0.5 + self.reach * np.cos(0.7 * angle))) - self.half
        for plane, tile, scale in zip(planes, self.tiles, (2, 1, 1)):
            top, left, side = scale * y, scale * x, tile.shape[0]
            rows, columns = slice(max(-top, 0), plane.shape[0] - top), slice(max(-left, 0), plane.shape[1] - left)
            inside = _disc(side)[rows, columns]
            area = plane[max(top, 0) : top + side, max(left, 0) : left + side]
            area[inside] = tile[rows, columns][inside]


@functools.cache
def _disc(side: int) -> npt.NDArray[np.bool_]:
    offsets = np.arange(side) + 0.5 - side / 2
    return np.hypot(offsets[:, None], offsets[None]) < side / 2
