"""Clips cut where a shot ends. No jax here.

That is found as PySceneDetect's AdaptiveDetector finds it: a frame begins a shot where the mean difference of hue,
saturation and value from the frame before is much larger than those of the frames around it. So cuts are found; fades
and dissolves are not.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pyvdl.config import ClipConfig
from pyvdl.data import Record
from pyvdl.decoder_process import DecoderProcess
from pyvdl.sources import DecodeError, Source, is_url, read_whole
from pyvdl.video import ClipRequest, Limits

# The detector's numbers, PySceneDetect's defaults but for the rate and the size (it takes all frames, larger).
RATE = 25.0  # frames a second that are looked at, and so the precision of a cut
_SIZE = 32  # pixels of their square centre
_RATIO = 3.0  # of a cut's difference to the mean of those around it
_AROUND = 2  # frames on either side
_LEAST = 15.0  # difference, of 255
_FRAMES = 1024  # decoded at a time
_BATCH = 4
_PREFETCH = 1
_REPEATED = 5  # frames that look the same, so many or more, are a still; fewer are one frame of a slow video

_CLIP = ClipConfig(num_frames=_FRAMES, sampling="fps", fps=RATE, short_side=_SIZE, size=_SIZE)


@dataclass(frozen=True, kw_only=True)
class Shots:
    """How clips are cut where a shot ends."""

    min_seconds: float = 1.0  # a shorter shot belongs to the one before
    num_threads: int = 2  # that decode
    timeout_seconds: float = 60.0  # for decoding so much of a clip at a time (41 s of it)

    def __post_init__(self) -> None:
        if not 0 < self.min_seconds < math.inf:
            raise ValueError(f"min_seconds must be finite and above 0, not {self.min_seconds}")

    def edges(self, start: float, end: float, cuts: Sequence[float], max_seconds: float | None = None) -> list[float]:
        """Where the shots of [start, end) begin, and its end; `cuts` ascend. A shot longer than max_seconds is parted
        equally."""
        found = [start]
        for time in cuts:
            if time - found[-1] >= self.min_seconds:
                found.append(time)
        if len(found) > 1 and end - found[-1] < self.min_seconds:
            found.pop()
        parts = []
        for a, b in itertools.pairwise([*found, end]):
            count = 1 if max_seconds is None else math.ceil((b - a) / max_seconds)
            parts += [a + i * (b - a) / count for i in range(count)]
        return [*parts, end]


def cut_at_shots(
    measured: Iterable[tuple[Record, float | None]], shots: Shots, max_seconds: float | None = None
) -> Iterator[Record]:
    """Cuts clips, given with their ends in seconds, where a shot ends, and longer shots than max_seconds equally.

    All of each clip is decoded for it. What cannot be decoded has no cuts, and a clip without an end stays as it is:
    captioning tells what is wrong with them.
    """
    decoder = DecoderProcess(
        _CLIP,
        batch_size=_BATCH,
        num_threads=shots.num_threads,
        prefetch=_PREFETCH,
        timeout_seconds=shots.timeout_seconds,
    )
    with decoder:
        for record, end, cuts in _with_cuts(measured, decoder):
            if end is None or end <= record.start_seconds:
                yield record
                continue
            edges = [round(edge, 3) for edge in shots.edges(record.start_seconds, end, cuts, max_seconds)]
            for i, (a, b) in enumerate(itertools.pairwise(edges)):
                yield record.part(i, a, b)


def _with_cuts(
    measured: Iterable[tuple[Record, float | None]], decoder: DecoderProcess
) -> Iterator[tuple[Record, float | None, list[float]]]:
    """The clips in their order, with the times of cuts."""
    waiting: deque[tuple[Record, float | None, int]] = deque()  # with the number of requests that it is decoded by

    def requests() -> Iterator[ClipRequest]:
        for record, end in measured:
            made = _requests(record, end)
            waiting.append((record, end, len(made)))
            yield from made

    found: list[np.ndarray] = []  # differences of the first clip that waits, of each request
    last: np.ndarray | None = None
    for batch in decoder.decode(itertools.batched(requests(), _BATCH)):
        for frames, error in zip(batch.data, batch.errors):
            while waiting[0][2] == 0:
                yield (*waiting.popleft()[:2], [])
            if error is None:
                found.append(differences(frames, last))
                last = frames[-1].copy()
            else:
                found.append(np.zeros(_FRAMES, np.float32))
                last = None
            record, end, count = waiting[0]
            if len(found) == count:
                waiting.popleft()
                yield record, end, _cuts(_times(record, end), np.concatenate(found))
                found, last = [], None
        batch.release()
    for record, end, _ in waiting:
        yield record, end, []


def _times(record: Record, end: float | None) -> np.ndarray:
    """float64[T]: of the frames that are looked at: amid those of a video of RATE frames a second."""
    return np.zeros(0) if end is None else np.arange(record.start_seconds + 0.5 / RATE, end, 1 / RATE)


def _requests(record: Record, end: float | None) -> list[ClipRequest]:
    if end is None:
        return []
    edges = [*_times(record, end)[::_FRAMES].tolist(), end]
    source: Source = record.source
    if len(edges) > 2 and isinstance(source, str) and is_url(source):
        try:
            source = read_whole(source, Limits().max_bytes)  # once, for all requests
        except DecodeError:
            return []
    return [ClipRequest(source, a, b, 0) for a, b in itertools.pairwise(edges)]


def _cuts(times: np.ndarray, values: np.ndarray) -> list[float]:
    """Where shots begin, by the differences of the frames at `times`."""
    values = values[: len(times)]  # what stands behind is the last frame again
    # A frame that is looked at several times is nothing to compare with: slow videos would be all cuts. What stays the
    # same for longer is a picture that stands still.
    same = values == 0
    runs = np.diff(np.flatnonzero(np.diff(same, prepend=not same[0], append=not same[-1])))
    keep = ~(same & (np.repeat(runs, runs) < _REPEATED))
    keep[0] = True
    looked = np.flatnonzero(keep)
    return (times[looked[find_cuts(values[looked])]] - 0.5 / RATE).tolist()


def find_cuts(values: np.ndarray) -> np.ndarray:
    """int64[C]: frames that begin a shot, by the differences float32[T] of each frame from the one before."""
    padded = np.pad(values.astype(np.float64), _AROUND, mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * _AROUND + 1)
    mean = (around.sum(axis=1) - values) / (2 * _AROUND)
    return np.flatnonzero((values >= _LEAST) & (values >= _RATIO * mean))


def differences(frames: np.ndarray, before: np.ndarray | None) -> np.ndarray:
    """float32[T]: how far each of the frames uint8[T, H, W, 3] is from the one before, of 255; 0 for a first one.

    That is the mean over pixels of the differences in hue (a circle of 180, as OpenCV has it), saturation and value.
    """
    frames = frames if before is None else np.concatenate([before[None], frames])
    hue, saturation, value = _hsv(frames)
    turn = np.abs(np.diff(hue, axis=0))
    parts = [np.minimum(turn, 180 - turn), np.abs(np.diff(saturation, axis=0)), np.abs(np.diff(value, axis=0))]
    found = np.mean(parts, axis=(0, 2, 3))
    return found if before is not None else np.concatenate([np.zeros(1, np.float32), found])


def _hsv(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 each, as OpenCV scales 8-bit pictures: hue of 180, saturation and value of 255."""
    red, green, blue = np.moveaxis(frames.astype(np.float32), -1, 0)
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    safe = np.maximum(spread, 1)
    of_green, of_blue = 2 + (blue - red) / safe, 4 + (red - green) / safe
    sector = np.where(value == red, (green - blue) / safe, np.where(value == green, of_green, of_blue))
    return 30 * (sector % 6), 255 * spread / np.maximum(value, 1), value
