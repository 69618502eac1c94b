"""Decoding of videos: single frames, clips, and batches of clips. The sole importer of the C++ module.

The C++ module is loaded at first use, so that `import pyvdl` and everything that needs no video works without it.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import operator
import os
import secrets
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from types import ModuleType
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from pyvdl.checks import choice, has_length, real, whole
from pyvdl.sources import (
    DecodeError,
    FileSlice,
    Limits,
    Source,
    file_name,
    is_url,
    read_whole,
    source_name,
)

type _Pending = tuple[list[Any], dict[int, str]]  # clips under way, and errors known before
Sampling = Literal["uniform", "fps", "random", "keyframe"]
Crop = Literal["center", "random"] | tuple[int, int, int, int]
ShortClip = Literal["repeat_last", "loop", "error"]
Quality = Literal["exact", "fast"]
Errors = Literal["raise", "conceal"]

_PATIENCE_SECONDS = 0.1  # between looks at Ctrl-C while waiting for a batch
_SEED_STEP = 0xBF58476D1CE4E5B9  # odd, and not SplitMix64's own step, by which streams would overlap


@dataclass(frozen=True, eq=False)
class FrameBatch:
    """Frames with their times. The arrays are read-only."""

    data: npt.NDArray[np.uint8]  # uint8[T, H, W, 3], RGB
    pts_seconds: npt.NDArray[np.float64]  # float64[T], when each is shown, on the stream's own clock
    duration_seconds: npt.NDArray[np.float64]  # float64[T]

    def __len__(self) -> int:
        return len(self.data)


@dataclass(frozen=True, kw_only=True)
class VideoMetadata:
    """What a video stream is, as it is shown: sizes after rotation, frames after edit lists."""

    num_frames: int
    width: int
    height: int
    fps: float  # average
    duration_seconds: float  # from the first shown frame to the end of the last
    start_seconds: float  # pts of the first shown frame
    codec: str
    pixel_format: str
    rotation: int  # clockwise degrees that frames are turned by: 0, 90, 180 or 270
    color_space: str  # matrix as tagged; "unknown" ones are read as BT.709 from 720p on, BT.601 below
    color_range: Literal["limited", "full"]
    time_base: Fraction  # seconds in a tick
    stream_index: int  # in the container
    num_video_streams: int
    has_b_frames: bool  # frames are stored in another order than shown
    container: str
    truncated: bool  # the container lists frames that are not in the file


@dataclass(frozen=True)
class ClipRequest:
    """What one clip of a batch asks for."""

    source: Source
    start_seconds: float = 0.0  # from the first shown frame
    end_seconds: float | None = None  # None: the end of the last frame
    seed: int | None = None  # of random instants, crop, jitter and flip; None: a fresh one

    def __post_init__(self) -> None:
        """Refuses here what can be known here, so that no batch is lost to a request that cannot be meant."""
        source_name(self.source)
        start, end = self.start_seconds, self.end_seconds
        if not (math.isfinite(real("start_seconds", start)) and start >= 0):
            raise ValueError(f"start_seconds must be finite and not negative, it is {start!r}")
        if end is not None and not real("end_seconds", end) > start:
            raise ValueError(f"end_seconds must be above start_seconds = {start!r}, it is {end!r}")
        _seed(self.seed)


@dataclass(frozen=True, eq=False)
class ClipBatch:
    """Clips decoded together. `data` is read-only."""

    data: npt.NDArray[np.uint8]  # uint8[B, T, H, W, 3]; failed clips are zeros
    ok: npt.NDArray[np.bool_]  # bool[B]
    errors: list[str | None]  # "stage: message" of failed clips
    index: npt.NDArray[np.int64]  # int64[B], numbers of the requests

    def __len__(self) -> int:
        return len(self.data)


class VideoDecoder:
    """The frames of one video stream, by index or by time.

    Frame i is the i-th shown frame in presentation order: frames cut by an edit list do not count, frames of phones
    come out upright. `len(decoder)`, `decoder[i]` (uint8[H, W, 3]) and `decoder[a:b:s]` (a FrameBatch) work as for
    sequences.

    stream: number of the video stream among the video streams; None is the first.
    errors: "raise" refuses a frame that was decoded with errors, with its number; "conceal" gives what the decoder
        made of it, and the nearest frame for one that did not come out.

    Use one decoder from one thread at a time (others wait); the GIL is free while it decodes.
    Raises DecodeError where the medium is at fault.
    """

    def __init__(
        self, source: Source, *, stream: int | None = None, errors: Errors = "raise", limits: Limits | None = None
    ) -> None:
        self._path = source_name(source)
        options = _decoder_options(stream=stream, errors=errors, quality="exact", limits=limits)
        core = _core()
        with _located(self._path):
            self._decoder = core.Decoder(_native(source, limits), options)
        self._metadata: VideoMetadata | None = None

    @property
    def metadata(self) -> VideoMetadata:
        if self._metadata is None:
            with _located(self._path):
                fields = self._decoder.metadata()
            fields["time_base"] = Fraction(*fields["time_base"])
            self._metadata = VideoMetadata(**fields)
        return self._metadata

    @property
    def pts_seconds(self) -> npt.NDArray[np.float64]:
        """float64[num_frames]: when each frame is shown, on the stream's own clock."""
        return self._decoder.pts_seconds()

    @property
    def pts_ticks(self) -> npt.NDArray[np.int64]:
        """int64[num_frames]: the same in units of `metadata.time_base`."""
        return np.array(self._decoder.pts_ticks(), dtype=np.int64)

    @property
    def key_frames(self) -> npt.NDArray[np.int64]:
        """int64[K]: frames at which decoding can start, ascending."""
        return np.array(self._decoder.key_frames(), dtype=np.int64)

    @property
    def stats(self) -> dict[str, int]:
        """Work done so far: packets_read, packets_sent, frames_decoded, frames_converted, seeks."""
        return self._decoder.stats()

    def __len__(self) -> int:
        return self._decoder.num_frames()

    @overload
    def __getitem__(self, key: int) -> npt.NDArray[np.uint8]: ...
    @overload
    def __getitem__(self, key: slice) -> FrameBatch: ...
    def __getitem__(self, key: int | slice) -> npt.NDArray[np.uint8] | FrameBatch:
        if isinstance(key, slice):
            return self.get_frames_at(range(*key.indices(len(self))))
        return self.get_frames_at([key]).data[0]

    def __iter__(self) -> Iterator[npt.NDArray[np.uint8]]:
        return (self[i] for i in range(len(self)))

    def get_frames_at(self, indices: Sequence[int] | npt.NDArray[np.integer]) -> FrameBatch:
        """The frames of these numbers, in the order given; negative ones count from the end.

        Raises IndexError naming an index outside of the video.
        """
        frames = [self._index(i) for i in indices]
        with _located(self._path):
            data = self._decoder.frames(frames)
        at = np.array(frames, dtype=np.int64)
        pts = np.asarray(self._decoder.pts_seconds())[at]
        durations = np.asarray(self._decoder.durations_seconds())[at]
        return FrameBatch(data, _read_only(pts), _read_only(durations))

    def get_frames_played_at(self, seconds: Sequence[float] | npt.NDArray[np.floating]) -> FrameBatch:
        """The frames played at these times: pts <= t < pts + duration, on the stream's own clock.

        Raises ValueError naming a time outside of [first pts, end of the last frame).
        """
        times = np.asarray(seconds, dtype=np.float64).reshape(-1)
        pts = np.asarray(self._decoder.pts_seconds())
        end = float(pts[-1] + np.asarray(self._decoder.durations_seconds())[-1])
        for time in times:
            if not pts[0] <= time < end:
                raise ValueError(f"{float(time)} s is outside of what is shown, [{float(pts[0])}, {end}) s")
        return self.get_frames_at(np.searchsorted(pts, times, side="right") - 1)

    def get_planes_at(self, index: int) -> list[npt.NDArray[Any]]:
        """The stored planes of a frame, before rotation and colour conversion: uint8 or uint16[rows, columns] each."""
        with _located(self._path):
            planes, sample_bytes = self._decoder.planes(self._index(index))
        return [plane.view(np.uint16) if sample_bytes == 2 else plane for plane in planes]

    def _index(self, index: int | np.integer) -> int:
        try:
            i = operator.index(index)
        except TypeError:
            i = None
        if i is None or isinstance(index, bool):
            raise TypeError(f"a frame is named by a whole number, not {index!r} (get_frames_at takes several)")
        if not -len(self) <= i < len(self):
            raise IndexError(f"frame {i} is outside of the video's {len(self)} frames")
        return i + len(self) if i < 0 else i


def sample_clip(
    source: Source,
    *,
    start_seconds: float = 0.0,
    end_seconds: float | None = None,
    num_frames: int = 8,
    sampling: Sampling = "uniform",
    fps: float = 2.0,
    short_side: int = 256,
    size: int = 224,
    crop: Crop = "center",
    scale_jitter: tuple[float, float] | None = None,
    flip: bool = False,
    short_clip: ShortClip = "repeat_last",
    quality: Quality = "exact",
    errors: Errors = "raise",
    limits: Limits | None = None,
    timeout_seconds: float | None = None,
    seed: int | None = None,
) -> FrameBatch:
    """Decodes the frames a model needs from [start_seconds, end_seconds) of a video: uint8[num_frames, size, size, 3].

    start_seconds, end_seconds: count from the first shown frame; None, or more than there is, means the end of the
        last.
    sampling: "uniform" takes the frames shown at the centres of num_frames equal segments of the window; "random" one
        uniform instant in each segment; "keyframe" the key frame at or before each uniform instant (repeats allowed);
        "fps" steps of 1/fps from the start, at most num_frames.
    short_clip: what fills up "fps" sampling in a short window: the last frame again, the frames from the first on, or
        an error. With "error", uniform and random sampling too refuse a window that shows fewer frames than num_frames.
    short_side, size, crop: the upright picture is resized (bilinear, averaging when it shrinks) so that its shorter
        side has short_side pixels, then a size x size square is cut from the centre or at random, or the rectangle
        (y, x, h, w), which then is the output's size. All frames of a clip are cut alike.
    scale_jitter: (low, high) factors drawn independently for height and width of the resized picture. A side that
        becomes smaller than `size` is enlarged to it.
    flip: mirror left to right with probability 1/2.
    quality: "fast" leaves out the loop filter on frames that are not taken: quicker, with small differences.
    errors: see VideoDecoder.
    timeout_seconds: DecodeError of stage "timeout" after this time.
    seed: of everything random here: the same seed gives the same bytes on every machine. None draws a fresh one.
    """
    options = _clip_options(
        num_frames=num_frames,
        sampling=sampling,
        fps=fps,
        short_side=short_side,
        size=size,
        crop=crop,
        scale_jitter=scale_jitter,
        flip=flip,
        short_clip=short_clip,
        quality=quality,
        errors=errors,
        limits=limits,
        timeout_seconds=timeout_seconds,
    )
    request = ClipRequest(source, start_seconds, end_seconds, seed)
    with _located(source_name(source)):
        data, pts_seconds, duration_seconds = _core().sample_clip(*_native_request(request, limits), options)
    return FrameBatch(data, _read_only(pts_seconds), _read_only(duration_seconds))


class ClipLoader(Iterator[ClipBatch]):
    """Decodes clips on `num_threads` threads and gives them in batches, in the order of `requests`.

    requests: any iterable of ClipRequest, endless ones too; it is read by the thread that iterates, at most
        `prefetch` batches ahead of it.
    batch_size: clips in a batch; the last batch holds what is left.
    prefetch: batches decoded ahead of the one in hand. Memory: prefetch + 1 batches, besides those the caller keeps.
    seed: gives each request without a seed of its own one that depends on this and the request's number.
    The other arguments are those of `sample_clip`. Raises RuntimeError where a thread cannot be started.

    A clip that fails is zeros with ok False and its error text; it never stops the others. Each batch is fresh memory,
    aligned to 64 bytes and read-only, which jax.device_put uses without a copy on CPU. Use as a context manager, or
    call close(), to stop early; leaving the loop and forgetting the loader does the same.
    """

    def __init__(
        self,
        requests: Iterable[ClipRequest],
        *,
        batch_size: int,
        num_threads: int = 1,
        prefetch: int = 2,
        num_frames: int = 8,
        sampling: Sampling = "uniform",
        fps: float = 2.0,
        short_side: int = 256,
        size: int = 224,
        crop: Crop = "center",
        scale_jitter: tuple[float, float] | None = None,
        flip: bool = False,
        short_clip: ShortClip = "repeat_last",
        quality: Quality = "exact",
        errors: Errors = "raise",
        limits: Limits | None = None,
        timeout_seconds: float | None = None,
        seed: int | None = None,
    ) -> None:
        batch_size = whole("batch_size", batch_size, 1)
        num_threads = whole("num_threads", num_threads, 1)
        prefetch = whole("prefetch", prefetch, 0)
        options = _clip_options(
            num_frames=num_frames,
            sampling=sampling,
            fps=fps,
            short_side=short_side,
            size=size,
            crop=crop,
            scale_jitter=scale_jitter,
            flip=flip,
            short_clip=short_clip,
            quality=quality,
            errors=errors,
            limits=limits,
            timeout_seconds=timeout_seconds,
        )
        self._requests = enumerate(requests)
        self._seed = _seed(seed)
        self._limits = limits
        self._batch_size = batch_size
        self._prefetch = prefetch
        self._pending: deque[_Pending] = deque()  # keeps the bytes that the threads read from
        self._loader = _core().ClipLoader(options, num_threads)
        # Runs when the loader is forgotten and at interpreter exit: no thread outlives the interpreter.
        self._finalizer = weakref.finalize(self, _close_loader, self._loader, self._pending)

    def __iter__(self) -> ClipLoader:
        return self

    def __next__(self) -> ClipBatch:
        self._submit(1)
        if not self._pending:
            self.close()
            raise StopIteration
        self._submit(self._prefetch + 1)
        while (result := self._loader.next(_PATIENCE_SECONDS)) is None:
            # Back in the interpreter, so that Ctrl-C is heard, and a close() from another thread.
            if not self._finalizer.alive:
                raise StopIteration
        data, errors, index = result
        with contextlib.suppress(IndexError):  # a close() from another thread has emptied it
            for row, error in self._pending.popleft()[1].items():
                errors[row] = error
        return ClipBatch(
            data=data,
            ok=np.array([not error for error in errors], dtype=np.bool_),
            errors=[error or None for error in errors],
            index=np.array(index, dtype=np.int64),
        )

    def _submit(self, batches: int) -> None:
        """Reads requests until `batches` batches are under way or the requests end."""
        while len(self._pending) < batches and self._finalizer.alive:
            taken = itertools.islice(self._requests, self._batch_size)
            clips: list[Any] = []
            refused: dict[int, str] = {}  # row of the batch -> why its source cannot be opened
            for number, request in taken:
                if not isinstance(request, ClipRequest):
                    raise TypeError(f"requests must give pyvdl.ClipRequest, such as ClipRequest(path), not {request!r}")
                request = self._seeded(number, request)
                try:
                    clips.append(_native_request(request, self._limits))
                except DecodeError as error:
                    refused[len(clips)] = f"{error.stage}: {error.message}"
                    clips.append(_native_request(replace(request, source=b""), None))  # fails, in its place
            if not clips:
                return
            try:
                self._pending.append((clips, refused))  # before a thread may read from them
                self._loader.submit(clips)
            except BaseException:  # Ctrl-C too: what is pending and what the threads have may differ from now on
                self.close()
                raise

    def _seeded(self, number: int, request: ClipRequest) -> ClipRequest:
        if self._seed is None or request.seed is not None:
            return request
        return replace(request, seed=self._seed + number * _SEED_STEP)

    @property
    def clips_done(self) -> int:
        """Clips decoded or failed so far, those ahead of the batch in hand included: tells whether anything moves."""
        return self._loader.clips_done()

    def close(self) -> None:
        """Stops decoding and ends the threads. Iterating ends, too."""
        self._finalizer()

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ffmpeg_versions() -> dict[str, tuple[str, str]]:
    """Of FFmpeg and each of its libraries: (version compiled against, version found at run time)."""
    return _core().ffmpeg_versions()


def _close_loader(loader: Any, pending: deque[_Pending]) -> None:
    loader.close()  # joins the threads: only then may the sources be freed
    pending.clear()


def _core() -> ModuleType:
    try:
        return importlib.import_module("pyvdl._core")
    except ImportError as error:
        raise ImportError(
            f"pyvdl's C++ decoder is not installed ({error}). Install it from the repository with: make env, "
            "or, where FFmpeg's development packages are, with: pip install --no-build-isolation -e ."
        ) from error


class _located:
    """Adds the path to DecodeErrors, which the C++ module raises without one."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, DecodeError) and error.path is None:
            raise DecodeError(self._path, error.stage, error.message) from None


def _native(source: Source, limits: Limits | None) -> Any:
    core = _core()
    if isinstance(source, bytes):
        return core.Source.memory(source)
    if not isinstance(source, (FileSlice, str, os.PathLike)) or is_url(source):
        return core.Source.memory(read_whole(source, (limits or Limits()).max_bytes))
    if isinstance(source, FileSlice):
        return core.Source.file(file_name(source.path), operator.index(source.offset), operator.index(source.length))
    return core.Source.file(file_name(source), 0, -1)


def _native_request(request: ClipRequest, limits: Limits | None) -> tuple[Any, float, float | None, int]:
    start, end = request.start_seconds, request.end_seconds
    seed = secrets.randbits(64) if request.seed is None else operator.index(request.seed) & (1 << 64) - 1
    return _native(request.source, limits), float(start), None if end is None else float(end), seed


def _seed(seed: int | None) -> int | None:
    """As Python's int, so that arithmetic does not overflow."""
    try:
        return None if seed is None else operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be a whole number or None, not {seed!r}") from None


def _bounds(limits: Limits | None) -> Limits:
    if limits is not None and not isinstance(limits, Limits):
        raise TypeError(f"limits must be pyvdl.Limits(...) or None, not {limits!r}")
    return limits or Limits()


def _decoder_options(*, stream: int | None, errors: Errors, quality: Quality, limits: Limits | None) -> Any:
    choice("errors", errors, ("raise", "conceal"))
    choice("quality", quality, ("exact", "fast"))
    bounds = _bounds(limits)
    return _core().DecoderOptions(
        stream=None if stream is None else whole("stream", stream, 0),
        conceal=errors == "conceal",
        fast=quality == "fast",
        max_pixels=operator.index(bounds.max_pixels),
        max_frames=operator.index(bounds.max_frames),
        max_seconds=float(bounds.max_seconds),
        max_bytes=operator.index(bounds.max_bytes),
    )


def _clip_options(
    *,
    num_frames: int,
    sampling: Sampling,
    fps: float,
    short_side: int,
    size: int,
    crop: Crop,
    scale_jitter: tuple[float, float] | None,
    flip: bool,
    short_clip: ShortClip,
    quality: Quality,
    errors: Errors,
    limits: Limits | None,
    timeout_seconds: float | None,
) -> Any:
    choice("sampling", sampling, ("uniform", "fps", "random", "keyframe"))
    choice("short_clip", short_clip, ("repeat_last", "loop", "error"))
    num_frames = whole("num_frames", num_frames, 1)
    size, short_side = whole("size", size, 1), whole("short_side", short_side, 1)
    if not isinstance(flip, bool | np.bool_):
        raise TypeError(f"flip must be True or False, not {flip!r}")
    if not (math.isfinite(real("fps", fps)) and fps > 0):
        raise ValueError(f"fps must be finite and above 0, not {fps!r}")
    if timeout_seconds is not None and not real("timeout_seconds", timeout_seconds) > 0:
        raise ValueError(f"timeout_seconds must be None or above 0, not {timeout_seconds!r}")
    jitter = None
    if scale_jitter is not None:
        if not has_length(scale_jitter, 2):
            raise ValueError(f"scale_jitter must be None or (low, high), not {scale_jitter!r}")
        jitter = [real("scale_jitter", factor) for factor in scale_jitter]
        if not 0 < jitter[0] <= jitter[1] < math.inf:
            raise ValueError(f"scale_jitter must be (low, high) with 0 < low <= high, not {scale_jitter!r}")
    rectangle = [0, 0, 0, 0]
    if isinstance(crop, str):
        choice("crop", crop, ("center", "random"))
        if size > short_side:
            raise ValueError(f"size {size} exceeds short_side {short_side}: there is nothing to cut it from")
    else:
        if not has_length(crop, 4):
            raise ValueError(f"crop must be 'center', 'random' or (y, x, h, w) in pixels, not {crop!r}")
        rectangle = [whole(f"crop: {side}", value, least) for side, value, least in zip("yxhw", crop, (0, 0, 1, 1))]
    bounds = _bounds(limits)
    height, width = (size, size) if isinstance(crop, str) else rectangle[2:]
    if num_frames * height * width * 3 > bounds.max_bytes:
        raise ValueError(f"{num_frames} frames of {height}x{width} exceed limits.max_bytes = {bounds.max_bytes}")
    core = _core()
    return core.ClipOptions(
        decoder=_decoder_options(stream=None, errors=errors, quality=quality, limits=limits),
        num_frames=num_frames,
        sampling=getattr(core.Sampling, sampling),
        fps=float(fps),
        short_clip=getattr(core.ShortClip, short_clip),
        short_side=short_side,
        size=size,
        crop=getattr(core.Crop, crop if isinstance(crop, str) else "fixed"),
        rectangle=rectangle,
        scale_jitter=jitter,
        flip=bool(flip),
        timeout_seconds=None if timeout_seconds is None else float(timeout_seconds),
    )


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.setflags(write=False)
    return array
