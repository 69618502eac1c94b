"""The decoders under test, each in a process of its own: `python -m bench.contenders NAME` serves it.

The job is the same for all: open a file, take the frames shown at the centres of equal segments, resize them so that
the shorter side has 256 pixels, cut 224 x 224 from the centre, as uint8 RGB. Every library does it in the fastest way
that was found for it, on one thread unless a batch is asked for. What a manifest would tell (frame numbers at the
constant frame rate, the resized size) comes with the job, so that nobody pays for finding out what it need not.

Requests and replies are lines of JSON on stdin and stdout; times are measured here, around the job alone. This module
also runs in environments without pyvdl: libraries are imported where they are used.
"""

from __future__ import annotations

import base64
import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import textwrap
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from bench.common import measure, peak_memory_bytes
from bench.natives import load_limits

SIZE = 224  # of the crop
SHORT_SIDE = 256
THUMB_FACTOR = 4  # pixels of a frame averaged to one of its thumbnail, each way

type Clip = npt.NDArray[np.uint8]  # uint8[T, SIZE, SIZE, 3]


@dataclass(frozen=True)
class Job:
    """One clip to decode."""

    path: str
    frames: list[int]  # wanted ones, ascending, counted in the order of display
    fps: int  # constant
    height: int  # of the resized frame
    width: int


def thumbnails(clip: Clip) -> npt.NDArray[np.uint8]:
    """uint8[T, SIZE / THUMB_FACTOR, SIZE / THUMB_FACTOR, 3]: blurred enough to forgive another filter for resizing."""
    side = SIZE // THUMB_FACTOR
    means = clip.reshape(-1, side, THUMB_FACTOR, side, THUMB_FACTOR, 3).mean((2, 4), dtype=np.float32)
    return (means + 0.5).astype(np.uint8)


def center(frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The central SIZE x SIZE pixels of [..., H, W, 3], without a copy."""
    y, x = (frames.shape[-3] - SIZE) // 2, (frames.shape[-2] - SIZE) // 2
    return frames[..., y : y + SIZE, x : x + SIZE, :]


class Contender:
    """A library. Making one imports it, which is not timed."""

    name: ClassVar[str]
    requirements: ClassVar[tuple[str, ...]]  # what pip installs; the last one is the library itself
    own_environment: ClassVar[bool] = True  # runs in the peers' environment, not in pyvdl's
    has_loader: ClassVar[bool] = False  # decodes batches on several threads by itself
    is_limit: ClassVar[bool] = False  # no library, but what its parts can do at best

    def clip(self, job: Job) -> Clip:
        raise NotImplementedError

    def batch(self, jobs: Sequence[Job], threads: int) -> Iterator[Clip | Exception]:
        """The clips of all jobs, or why there is none, in any order."""

        def attempt(job: Job) -> Clip | Exception:
            try:
                return self.clip(job)
            except Exception as error:
                return error

        with ThreadPool(threads) as pool:
            yield from pool.imap_unordered(attempt, jobs)

    def ffmpeg(self) -> str:
        """The FFmpeg it decodes with, as far as the library tells."""
        return "not told"


class Pyvdl(Contender):
    name = "pyvdl"
    requirements = ("pyvdl",)
    own_environment = False
    has_loader = True
    quality: ClassVar[str] = "exact"

    def __init__(self) -> None:
        self._video = importlib.import_module("pyvdl.video")
        self._video.ffmpeg_versions()  # loads the C++ module

    def _options(self, job: Job) -> dict[str, Any]:
        return {
            "num_frames": len(job.frames),
            "short_side": SHORT_SIDE,
            "size": SIZE,
            "quality": self.quality,
        }

    def clip(self, job: Job) -> Clip:
        return self._video.sample_clip(job.path, **self._options(job)).data

    def batch(self, jobs: Sequence[Job], threads: int) -> Iterator[Clip | Exception]:
        requests = [self._video.ClipRequest(job.path) for job in jobs]
        options = self._options(jobs[0])
        with self._video.ClipLoader(requests, batch_size=4, num_threads=threads, **options) as loader:
            for batch in loader:
                for clip, error in zip(batch.data, batch.errors):
                    yield clip if error is None else RuntimeError(error)

    def ffmpeg(self) -> str:
        return self._video.ffmpeg_versions()["ffmpeg"][1]


class PyvdlFast(Pyvdl):
    name = "pyvdl-fast"
    quality = "fast"


class LimitA(Contender):
    """FFmpeg's libraries alone (limits.cpp): every frame of the groups of pictures that hold a wanted one."""

    name = "limit-a"
    requirements = ("pyvdl",)
    own_environment = False
    is_limit = True
    skips: ClassVar[bool] = False

    def __init__(self) -> None:
        self._library = load_limits()

    def clip(self, job: Job) -> Clip:
        frames = np.array(job.frames, dtype=np.int64)
        result = np.empty((len(frames), SIZE, SIZE, 3), dtype=np.uint8)
        error: bytes | None = self._library.limit_clip(
            os.fsencode(job.path),
            frames.ctypes.data,
            len(frames),
            job.width,
            job.height,
            SIZE,
            self.skips,
            result.ctypes.data,
        )
        if error is not None:
            raise RuntimeError(error.decode())
        return result

    def ffmpeg(self) -> str:
        return self._library.limit_ffmpeg().decode()


class LimitB(LimitA):
    """The same without pictures that no other picture refers to, unless they are wanted."""

    name = "limit-b"
    skips = True


class PyAV(Contender):
    """Decodes on while the next wanted frame is in the same group of pictures, else seeks; converts wanted frames."""

    name = "pyav"
    requirements = ("av",)
    own_environment = False

    def __init__(self) -> None:
        self._av = importlib.import_module("av")

    def clip(self, job: Job) -> Clip:
        result = np.empty((len(job.frames), SIZE, SIZE, 3), dtype=np.uint8)
        with self._av.open(job.path) as container:
            stream = container.streams.video[0]
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            frame_ticks = 1 / (job.fps * stream.time_base)
            first = stream.start_time or 0
            frames: Iterator[Any] = iter(())
            group = position = None
            for slot, number in enumerate(job.frames):
                wanted = first + round(number * frame_ticks)
                key = stream.index_entries.search_timestamp(wanted, backward=True, any_frame=False)
                if position is None or key != group:
                    container.seek(wanted, stream=stream, backward=True)
                    frames = container.decode(stream)
                    group = stream.index_entries.search_timestamp(wanted, backward=True, any_frame=False)
                for frame in frames:
                    position = frame.pts
                    if position > wanted - frame_ticks / 2:
                        break
                else:
                    raise RuntimeError(f"frame {number} did not come out")
                resized = frame.reformat(job.width, job.height, format="rgb24", interpolation="BILINEAR")
                result[slot] = center(resized.to_ndarray())
        return result

    def ffmpeg(self) -> str:
        return str(self._av.ffmpeg_version_info)


class TorchCodec(Contender):
    name = "torchcodec"
    requirements = ("torch", "torchcodec")

    def __init__(self) -> None:
        self._torch = importlib.import_module("torch")
        self._torch.set_num_threads(1)
        if importlib.import_module("torchcodec").ffmpeg_major_version is None:
            raise RuntimeError("it finds no FFmpeg whose libraries it can load")
        self._decoders = importlib.import_module("torchcodec.decoders")
        self._transforms = importlib.import_module("torchcodec.transforms")

    def clip(self, job: Job) -> Clip:
        view = [self._transforms.Resize((job.height, job.width)), self._transforms.CenterCrop((SIZE, SIZE))]
        decoder = self._decoders.VideoDecoder(
            job.path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact", transforms=view
        )
        return decoder.get_frames_at(job.frames).data.numpy()

    def ffmpeg(self) -> str:
        return str(importlib.import_module("torchcodec").ffmpeg_major_version)


class TorchCodecApproximate(TorchCodec):
    """Without the scan of the file at opening, and resized by torch."""

    name = "torchcodec-approximate"

    def clip(self, job: Job) -> Clip:
        decoder = self._decoders.VideoDecoder(job.path, num_ffmpeg_threads=1, seek_mode="approximate")
        frames = decoder.get_frames_at(job.frames).data
        resized = self._torch.nn.functional.interpolate(
            frames, (job.height, job.width), mode="bilinear", antialias=True
        )
        return np.ascontiguousarray(center(resized.permute(0, 2, 3, 1).numpy()))


class Decord2(Contender):
    name = "decord2"
    requirements = ("decord2",)

    def __init__(self) -> None:
        self._decord = importlib.import_module("decord")

    def clip(self, job: Job) -> Clip:
        reader = self._decord.VideoReader(
            job.path, ctx=self._decord.cpu(0), width=job.width, height=job.height, num_threads=1
        )
        return np.ascontiguousarray(center(reader.get_batch(job.frames).asnumpy()))


class VideoReaderRs(Contender):
    """With a filter of its own: `resize_shorter_side` fails where the longer side comes out odd."""

    name = "video-reader-rs"
    requirements = ("video-reader-rs",)

    def __init__(self) -> None:
        # Some wheels do not find this one of their own libraries; once it is loaded, they do.
        if (spec := importlib.util.find_spec("video_reader")) and spec.origin:
            for library in Path(spec.origin).parents[1].glob("video_reader_rs.libs/libsharpyuv*"):
                ctypes.CDLL(str(library))
        self._reader = importlib.import_module("video_reader").PyVideoReader

    def clip(self, job: Job) -> Clip:
        view = f"scale={job.width}:{job.height}:flags=bilinear,crop={SIZE}:{SIZE}"
        return np.asarray(self._reader(job.path, threads=1, filter=view).get_batch(job.frames))


class OpenCV(Contender):
    """Grabs up to the last wanted frame (its seeking is not exact everywhere); converts wanted frames."""

    name = "opencv"
    requirements = ("opencv-python-headless",)

    def __init__(self) -> None:
        self._cv2 = importlib.import_module("cv2")
        self._cv2.setNumThreads(1)

    def clip(self, job: Job) -> Clip:
        cv2 = self._cv2
        result = np.empty((len(job.frames), SIZE, SIZE, 3), dtype=np.uint8)
        capture = cv2.VideoCapture(job.path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        next_frame = 0
        for slot, number in enumerate(job.frames):
            for i in range(next_frame, number + 1):
                if not capture.grab():
                    raise RuntimeError(f"frame {i} did not come out")
            next_frame = number + 1
            frame = cv2.resize(capture.retrieve()[1], (job.width, job.height), interpolation=cv2.INTER_LINEAR)
            result[slot] = center(frame)[..., ::-1]
        return result

    def ffmpeg(self) -> str:
        lines = (line.strip() for line in self._cv2.getBuildInformation().splitlines())
        return next((" ".join(line.split()) for line in lines if line.startswith("avcodec:")), "not told")


class Spdl(Contender):
    """One pass with a filter that drops unwanted frames first; `sample_decode_video` was slower on the common cases."""

    name = "spdl"
    requirements = ("spdl-io",)

    def __init__(self) -> None:
        self._io = importlib.import_module("spdl.io")
        self._io.demux_config()  # loads the native library

    def clip(self, job: Job) -> Clip:
        wanted = "+".join(f"eq(n\\,{number})" for number in job.frames)
        view = f"scale={job.width}:{job.height}:flags=bilinear,crop={SIZE}:{SIZE},format=pix_fmts=rgb24"
        frames = self._io.decode_packets(self._io.demux_video(job.path), filter_desc=f"select={wanted},{view}")
        return self._io.to_numpy(self._io.convert_frames(frames))


CONTENDERS: dict[str, type[Contender]] = {
    contender.name: contender
    for contender in (
        Pyvdl, PyvdlFast, LimitA, LimitB, PyAV, TorchCodec, TorchCodecApproximate, Decord2, VideoReaderRs, OpenCV, Spdl,
    )
}  # fmt: skip


def answer(contender: Contender, request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request: {"job": ...} for a clip, {"jobs": [...], "threads": n} for a batch."""
    if "jobs" in request:
        jobs = [Job(**fields) for fields in request["jobs"]]

        def count_failures() -> int:
            return sum(isinstance(clip, Exception) for clip in contender.batch(jobs, request["threads"]))

        failures, timing = measure(count_failures)
        reply: dict[str, Any] = {"failures": failures, "peak_memory_bytes": peak_memory_bytes()}
    else:
        job = Job(**request["job"])
        clip, timing = measure(lambda: contender.clip(job))
        if clip.shape != (len(job.frames), SIZE, SIZE, 3) or clip.dtype != np.uint8:
            raise RuntimeError(f"the clip is {clip.dtype}{list(clip.shape)}")
        reply = {"checksum": zlib.crc32(np.ascontiguousarray(clip)), "peak_memory_bytes": peak_memory_bytes()}
        if request.get("thumbnails"):
            reply["thumbnails"] = base64.b64encode(thumbnails(clip).tobytes()).decode()
    return reply | {"cpu_seconds": timing.cpu_seconds, "wall_seconds": timing.wall_seconds}


def brief(error: Exception) -> str:
    """One line of a table's notes: some libraries report pages."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 240)


def serve(name: str) -> None:
    """Answers requests until stdin ends. The first line out says what was loaded, or why nothing was."""
    # What libraries print must not come between the replies.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    kind = CONTENDERS[name]
    try:
        contender = kind()
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError)
        print(json.dumps({"error": brief(error), "missing": missing}), file=replies)
        return
    version = importlib.metadata.version(kind.requirements[-1])
    hello = {"version": version, "ffmpeg": contender.ffmpeg(), "peak_memory_bytes": peak_memory_bytes()}
    print(json.dumps(hello), file=replies)
    for line in sys.stdin:
        try:
            reply = answer(contender, json.loads(line))
        except Exception as error:
            reply = {"error": brief(error)}
        print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    serve(sys.argv[1])
