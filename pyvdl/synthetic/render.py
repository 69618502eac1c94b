"""Draws scenes: textured sprites over moving, noisy backgrounds, as uint8 RGB frames."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import numpy as np

from pyvdl.synthetic.scene import SPRITE, Scene, Sprite, states

try:
    from PIL import Image
except ImportError as error:
    raise ImportError("drawing scenes needs Pillow: pip install 'pillow>=10'") from error

RGB = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "purple": (150, 50, 190),
    "orange": (240, 140, 30),
    "cyan": (60, 210, 220),
    "pink": (240, 130, 190),
}
TINTS = {"grass": (58, 82, 46), "sand": (150, 128, 92), "water": (44, 62, 96), "brick": (104, 62, 54)}
CORES = {"beetle": (15, 15, 15), "flower": (250, 250, 250), "badge": (120, 70, 30)}  # colours of the middle
TILE = 64  # pixels of a sprite's own picture before it is scaled


@functools.cache
def _mask(kind: str) -> np.ndarray:
    """float[TILE, TILE] in [0, 1]: where a sprite of this kind is."""
    u = (np.arange(4 * TILE) + 0.5) / (2 * TILE) - 1.0  # four samples a pixel each way, averaged below
    x, y = np.meshgrid(u, u)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    if kind in ("ball", "beetle"):
        inside = radius < 0.95
    elif kind == "badge":
        inside = np.maximum(abs(x), abs(y)) < 0.85
    else:  # flower: the radius swings five times around
        swing = np.abs(np.mod((angle + np.pi / 2) * 5 / (2 * np.pi), 1.0) - 0.5) * 2
        inside = radius < 0.55 + 0.42 * swing
    return inside.reshape(TILE, 4, TILE, 4).mean((1, 3))


def draw_sprite(sprite: Sprite) -> Image.Image:
    """RGBA picture of one sprite: its colour with a pattern of its own (stripes or dots)."""
    rng = np.random.default_rng(sprite.texture)
    u = np.arange(TILE) / TILE
    x, y = np.meshgrid(u, u)
    turn = rng.uniform(0, np.pi)
    waves = np.sin(2 * np.pi * rng.uniform(2, 4) * (x * np.cos(turn) + y * np.sin(turn)) + rng.uniform(0, 6))
    if rng.random() < 0.5:
        waves = waves * np.sin(2 * np.pi * rng.uniform(2, 4) * (y * np.cos(turn) - x * np.sin(turn)))
    shade = 0.87 + 0.13 * waves + rng.normal(0, 0.03, x.shape)
    color = np.asarray(RGB[sprite.color]) * shade[..., None]
    if sprite.kind in CORES:
        core = np.hypot(2 * x - 1 + 1 / TILE, 2 * y - 1 + 1 / TILE) < 0.5
        color = np.where(core[..., None], np.asarray(CORES[sprite.kind]), color)
    pixels = np.concatenate([color, 255 * _mask(sprite.kind)[..., None]], axis=-1)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "RGBA")


@functools.cache
def _cloud_filter(side: int) -> np.ndarray:
    """float32[side, side // 2 + 1]: how strong each frequency is in clouds."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij"))
    return ((frequency + 0.01) ** -1.5).astype(np.float32)


def draw_background(scene: Scene, size: int) -> np.ndarray:
    """uint8[2 * size, 2 * size, 3] periodic texture: clouds in the tint of the background, with bricks or ripples."""
    rng = np.random.default_rng(scene.texture)
    side = 2 * size
    spectrum = np.fft.rfft2(rng.standard_normal((side, side), np.float32)) * _cloud_filter(side)
    clouds = np.fft.irfft2(spectrum, (side, side))
    shade = 1.0 + 0.22 * clouds / clouds.std()
    x, y = np.meshgrid(np.arange(side, dtype=np.float32) / side, np.arange(side, dtype=np.float32) / side)
    if scene.background == "brick":
        row = np.floor(y * 16)
        edge = (np.mod(y * 16, 1) < 0.14) | (np.mod(x * 8 + 0.5 * np.mod(row, 2), 1) < 0.07)
        shade = shade * np.where(edge, 0.6, 1.0)
    elif scene.background == "water":
        shade = shade * (1 + 0.2 * np.sin(2 * np.pi * (12 * y + 0.3 * np.sin(2 * np.pi * 3 * x))))
    elif scene.background == "grass":
        shade = shade * (1 + 0.25 * np.sin(2 * np.pi * (24 * x + 0.4 * np.sin(2 * np.pi * 5 * y))))
    tint = np.asarray(TINTS[scene.background], np.float32)
    return np.clip(tint * shade[..., None], 0, 255).astype(np.uint8)


def render(scene: Scene, instants_seconds: Iterable[float], *, size: int) -> Iterator[np.ndarray]:
    """Yields the frames of `scene` at the given instants as uint8[size, size, 3]."""
    rng = np.random.default_rng(scene.texture + 1)
    texture = draw_background(scene, size)
    noise = (3 * rng.standard_normal((4, size, size, 3), np.float32)).astype(np.int16)
    pictures = [draw_sprite(sprite) for sprite in scene.sprites]
    offset = rng.uniform(0, size, 2)

    @functools.lru_cache(len(pictures))  # most frames show a sprite as the one before did, elsewhere
    def turned(number: int, side: int, angle_degrees: float) -> Image.Image:
        drawn = pictures[number].resize((side, side), Image.Resampling.BILINEAR)
        return drawn.rotate(-angle_degrees, Image.Resampling.BILINEAR, expand=True) if angle_degrees else drawn

    for seconds in instants_seconds:
        dx, dy = (int(offset[k] + scene.drift[k] * size * seconds) % size for k in range(2))
        frame = Image.fromarray(texture[dy : dy + size, dx : dx + size])
        for number, state in enumerate(states(scene, seconds)):
            side = round(SPRITE * state.scale * size)
            if state.opacity <= 0.02 or side < 2:
                continue
            drawn = turned(number, side, state.angle_degrees)
            corner = (round(state.x * size - drawn.width / 2), round(state.y * size - drawn.height / 2))
            if state.opacity < 1:
                alpha = drawn.getchannel("A").point([round(v * state.opacity) for v in range(256)])
                frame.paste(drawn, corner, alpha)
            else:
                frame.paste(drawn, corner, drawn)
        grain = noise[int(rng.integers(4))]
        yield np.clip(np.asarray(frame, dtype=np.int16) + grain, 0, 255).astype(np.uint8)
