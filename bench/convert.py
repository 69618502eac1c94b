"""Times pyvdl's conversion of decoded frames against swscale's and holds both against exact arithmetic:
`python -m bench.convert`.

Both are given the same smooth random pictures, several in turn, and resize them so that the shorter side has 256
pixels, of which the central 224 x 224 are kept. The reference is the definition in float64: a triangle filter as wide
as the step between output pixels, over each plane where its samples stand (chroma on the left luma column, between the
luma rows), then the colour matrix.
"""

from __future__ import annotations

import argparse
import ctypes
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.common import Spread, Timing, append_rows, environment, format_table, interleave, ratio
from bench.contenders import SHORT_SIDE, SIZE
from bench.natives import ROOT, load_convert

NUM_PICTURES = 4
REPEATS = 20  # of each picture in a round
CONVERTERS = ("pyvdl", "swscale")


@dataclass(frozen=True)
class Format:
    """What the decoder gives."""

    name: str
    width: int
    height: int
    bt709: bool

    @property
    def resized(self) -> tuple[int, int]:
        """Width and height with SHORT_SIDE pixels on the shorter side."""
        scale = SHORT_SIDE / min(self.width, self.height)
        return round(self.width * scale), round(self.height * scale)


FORMATS = (
    Format("360p", 640, 360, bt709=False),
    Format("720p", 1280, 720, bt709=True),
    Format("1080p", 1920, 1080, bt709=True),
)


def make_pictures(kind: Format, count: int) -> npt.NDArray[np.uint8]:
    """uint8[count, 3 * H / 2, W] smooth random planes Y, U, V, one behind the other, in limited range."""
    rng = np.random.default_rng(0)
    height, width = kind.height, kind.width
    pictures = np.empty((count, height * width * 3 // 2), dtype=np.uint8)
    for picture in pictures:
        planes = [_waves(rng, height, width, 16, 235)]
        planes += [_waves(rng, height // 2, width // 2, 16, 240) for _ in range(2)]
        picture[:] = np.concatenate([plane.reshape(-1) for plane in planes])
    return pictures.reshape(count, height * 3 // 2, width)


def _waves(rng: np.random.Generator, height: int, width: int, low: int, high: int) -> npt.NDArray[np.uint8]:
    """Random waves, no shorter than 8 samples, that fill the range."""
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) * (np.hypot(y, x) < 1 / 8)
    waves = np.fft.irfft2(spectrum, (height, width))
    waves = (waves - waves.min()) / (waves.max() - waves.min())
    return np.rint(low + (high - low) * waves).astype(np.uint8)


def filter_matrix(samples: int, step: float, first: float, count: int) -> npt.NDArray[np.float64]:
    """float64[count, samples]: triangles around first, first + step, ..., in samples; the edge goes on outside."""
    centers = first + step * np.arange(count)
    reach = max(step, 1.0)
    near = np.floor(centers - reach).astype(int)[:, None] + np.arange(2 * math.ceil(reach) + 2)
    weights = np.maximum(0, 1 - np.abs(near - centers[:, None]) / reach)
    matrix = np.zeros((count, samples))
    np.add.at(matrix, (np.arange(count)[:, None], near.clip(0, samples - 1)), weights)
    return matrix / matrix.sum(1, keepdims=True)


def reference(kind: Format, picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """float64[SIZE, SIZE, 3] of a picture of make_pictures(): chroma is made full size first, then all resized."""
    steps, origins = [], []  # of output pixels in luma pixels: down, right
    for full, resized in zip((kind.height, kind.width), kind.resized[::-1]):
        steps.append(full / resized)
        origins.append(((resized - SIZE) // 2 + 0.5) * full / resized - 0.5)
    luma_size = kind.height * kind.width
    flat = picture.reshape(-1)
    planes = [flat[:luma_size].reshape(kind.height, kind.width)]
    planes += list(flat[luma_size:].reshape(2, kind.height // 2, kind.width // 2))
    resampled = []
    for i, plane in enumerate(planes):
        down = filter_matrix(kind.height, steps[0], origins[0], SIZE)
        right = filter_matrix(kind.width, steps[1], origins[1], SIZE)
        if i:  # the first sample stands half a luma pixel below that of luma, and not beside it
            down = down @ filter_matrix(plane.shape[0], 0.5, -0.25, kind.height)
            right = right @ filter_matrix(plane.shape[1], 0.5, 0.0, kind.width)
        resampled.append(down @ plane.astype(np.float64) @ right.T)
    red, blue = (0.2126, 0.0722) if kind.bt709 else (0.299, 0.114)
    y = (resampled[0] - 16) / 219
    u, v = ((plane - 128) / 224 for plane in resampled[1:])
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    g = (y - red * r - blue * b) / (1 - red - blue)
    return (255 * np.stack([r, g, b], axis=-1)).clip(0, 255)


def psnr(values: npt.NDArray[np.generic], wanted: npt.NDArray[np.generic]) -> float:
    """Decibels, of values from 0 to 255; infinite where all are equal."""
    error = float(np.mean((values.astype(np.float64) - wanted.astype(np.float64)) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def convert(
    library: ctypes.CDLL, kind: Format, pictures: npt.NDArray[np.uint8], converter: str, repeats: int
) -> tuple[npt.NDArray[np.uint8], Timing]:
    """uint8[N, SIZE, SIZE, 3], and the time of one picture: CPU time, on which others do not weigh."""
    result = np.empty((len(pictures), SIZE, SIZE, 3), dtype=np.uint8)
    width, height = kind.resized
    seconds = library.convert_pictures(
        pictures.ctypes.data, len(pictures), kind.width, kind.height, kind.bt709, width, height, SIZE,
        converter == "pyvdl", repeats, result.ctypes.data,
    )  # fmt: skip
    if seconds < 0:
        raise RuntimeError(f"{converter} cannot convert {kind.name}")
    return result, Timing(seconds, seconds)


def compare(library: ctypes.CDLL, kind: Format, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """CPU seconds of one picture, one a round, and decibels, of each converter."""
    pictures = make_pictures(kind, NUM_PICTURES)
    exact = np.stack([reference(kind, picture) for picture in pictures])
    quality = {name: psnr(convert(library, kind, pictures, name, 1)[0], exact) for name in CONVERTERS}
    timings = interleave(CONVERTERS, lambda name, _: convert(library, kind, pictures, name, REPEATS)[1], rounds)
    return {name: [timing.cpu_seconds for timing in taken] for name, taken in timings.items()}, quality


def run(rounds: int, out: Path) -> None:
    """The whole benchmark: prints a table, keeps rows."""
    env = environment(["pyvdl", "numpy"])
    library = load_convert()
    env["ffmpeg"] = library.ffmpeg_version().decode()
    print(f"{env['cpu']}, {env['cores']} cores (load {env['load']}), {env['system']}, Python {env['python']}")
    print(f"pyvdl {env['packages']['pyvdl']}, FFmpeg {env['ffmpeg']}")
    table = [["one frame", *(f"{name} us" for name in CONVERTERS), "faster", *(f"{name} dB" for name in CONVERTERS)]]
    rows = []
    for kind in FORMATS:
        seconds, quality = compare(library, kind, rounds)
        cells = [f"{1e6 * Spread.of(seconds[name]).median:.0f}" for name in CONVERTERS]
        cells.append(f"{ratio(seconds['swscale'], seconds['pyvdl']):.2f}x")
        table.append([kind.name, *cells, *(f"{quality[name]:.1f}" for name in CONVERTERS)])
        for name in CONVERTERS:
            row = {"bench": "convert", "case": kind.name, "contender": name, "psnr_db": quality[name]}
            row["cpu_seconds"] = asdict(Spread.of(seconds[name]))
            row["cpu_seconds_ratio"] = ratio(seconds[name], seconds["pyvdl"])
            rows.append(row)
    print(f"\nyuv420p to {SIZE} x {SIZE} RGB24, CPU time, median of {rounds} rounds; dB to exact arithmetic:")
    print(format_table(table))
    append_rows(out, {"rounds": rounds, "environment": env}, rows)
    print(f"rows: {out}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.convert",
        description="Times pyvdl's conversion of decoded frames against swscale's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="times that both do everything")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results" / "decode.jsonl", help="file that rows are added to"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {options.rounds}")
    run(options.rounds, options.out)


if __name__ == "__main__":
    main()
