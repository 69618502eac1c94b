"""Small videos made at run time with PyAV, for tests."""

from __future__ import annotations

from fractions import Fraction
from os import PathLike
from pathlib import Path
from typing import cast

import av
import numpy as np
import numpy.typing as npt

from bench.corpus import same_priority


def moving_texture(num_frames: int, size: tuple[int, int], seed: int = 0) -> list[npt.NDArray[np.uint8]]:
    """Frames uint8[H, W, 3] of a smooth random texture that drifts; `size` is (width, height)."""
    width, height = size
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 16, width // 8 + 16, 3)).astype(np.uint8)
    texture = np.kron(coarse, np.ones((8, 8, 1), dtype=np.uint8))
    shift = rng.integers(1, 3, 2)
    return [
        np.ascontiguousarray(texture[y : y + height, x : x + width])
        for y, x in ((i * shift[0] % 100, i * shift[1] % 100) for i in range(num_frames))
    ]


def write_clip(
    path: str | PathLike[str],
    *,
    seed: int = 0,
    num_frames: int = 24,
    size: tuple[int, int] = (64, 48),
    fps: int = 24,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    b_frames: int = 2,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    pts: list[int] | None = None,
    frames: list[npt.NDArray[np.uint8]] | None = None,
) -> None:
    """Encodes `frames` (default: a drifting texture) to `path`.

    The suffix chooses the container; `pts` counts in 1/fps.
    """
    images = frames or moving_texture(num_frames, size, seed)
    if codec == "libx265":
        options = {"x265-params": "log-level=none"} | (options or {})
    with same_priority(), av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = cast(av.VideoStream, container.add_stream(codec, rate=fps, options=options or {}))
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.time_base = Fraction(1, fps)
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = pts[i] if pts else i
            frame.time_base = Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def decode_planes(path: str | PathLike[str], stream: int = 0) -> list[bytes]:
    """The stored planes of every frame, in presentation order, as PyAV's own FFmpeg decodes them."""
    with av.open(str(path)) as container:
        container.streams.video[stream].thread_type = "NONE"
        return [b"".join(map(_visible, frame.planes)) for frame in container.decode(video=stream)]


def _visible(plane: av.video.plane.VideoPlane) -> bytes:
    """The samples of an 8-bit plane without the padding of its rows."""
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return rows[: plane.height, : plane.width].tobytes()


def write_clips(folder: Path, count: int, bad: int) -> list[Path]:
    """Writes 0.mp4 and so on; number `bad` is not a video."""
    paths = [folder / f"{i}.mp4" for i in range(count)]
    for i, path in enumerate(paths):
        if i == bad:
            path.write_bytes(b"this is not a video" * 100)
        else:
            write_clip(path, seed=i)
    return paths
