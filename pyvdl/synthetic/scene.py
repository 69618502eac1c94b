"""Scenes of the synthetic corpus: which sprites there are, what they do in turn, where they are at any instant.

A scene is a description only (no pixels, no words): `render` draws it, `words` tells it. Positions are in units of the
frame, x to the right and y downwards, with (0.5, 0.5) the centre.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
KINDS = ("ball", "beetle", "flower", "badge")
BACKGROUNDS = ("grass", "sand", "water", "brick")
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
Action = Literal["left", "right", "up", "down", "spin", "grow", "shrink", "appear", "vanish", "meet"]
ACTIONS: tuple[Action, ...] = ("left", "right", "up", "down", "spin", "grow", "shrink", "appear", "vanish", "meet")

SMALL, LARGE = 0.6, 1.45  # sprite scale before it grows and after; SPRITE is scale 1
SPRITE = 0.36  # side of a sprite in frames
NEAR, FAR = 0.22, 0.78  # where a slide starts and ends
TOUCH = 0.12  # half the distance of two sprites that have met
SPIN_DEGREES = 225.0  # ends tilted, so that even the last frame differs from the first
ROUND = ("ball", "beetle")  # a spin of these cannot be seen


@dataclass(frozen=True)
class Sprite:
    """One actor: what it looks like and where it stands when nothing has happened yet."""

    color: str
    kind: str
    texture: int  # seeds the pattern on its surface
    x: float
    y: float
    scale: float
    visible: bool

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class Event:
    """One thing that happens: `actor` does `action` between two fractions of the clip. "meet" moves actors 0 and 1."""

    action: Action
    actor: int
    start: float
    end: float
    quick: bool


@dataclass(frozen=True)
class Scene:
    """A whole clip."""

    sprites: tuple[Sprite, ...]
    events: tuple[Event, ...]
    background: str
    drift: tuple[float, float]  # frames a second
    duration_seconds: float
    texture: int  # seeds background and noise


@dataclass(frozen=True)
class State:
    """One sprite at one instant."""

    x: float
    y: float
    scale: float
    angle_degrees: float
    opacity: float


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draws a scene: one or two sprites, one or two events, one after another."""
    duration = float(rng.uniform(2.0, 6.0))
    num_events = int(rng.integers(1, 3))
    actions = [ACTIONS[int(rng.integers(len(ACTIONS)))]]
    num_sprites = 2 if actions[0] == "meet" or rng.random() < 0.5 else 1
    actors = [0]
    if num_events == 2:
        actors.append(int(rng.integers(num_sprites)))
        actions.append(_following(rng, actions[0], same=actors[1] == 0, pair=num_sprites == 2))
    names: list[tuple[str, str]] = []
    while len(names) < num_sprites:
        spins = any(a == "spin" and who == len(names) for a, who in zip(actions, actors, strict=True))
        kinds = [kind for kind in KINDS if not (spins and kind in ROUND)]
        name = (COLORS[int(rng.integers(len(COLORS)))], kinds[int(rng.integers(len(kinds)))])
        if not names or (name[0] != names[0][0] and name[1] != names[0][1]):
            names.append(name)
    sprites = _place(rng, names, actions, actors)
    background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    angle = rng.uniform(0, 2 * np.pi)
    speed = rng.uniform(0.02, 0.08)
    spans = [(0.14, 0.86)] if num_events == 1 else [(0.12, 0.48), (0.52, 0.88)]
    events = []
    for action, actor, (start, end) in zip(actions, actors, spans, strict=True):
        quick = bool(rng.random() < 0.5)
        trim = (end - start) / 4 if quick else 0.0  # the quick take half the time
        events.append(Event(action, actor, start + trim, end - trim, quick))
    drift = (float(speed * np.cos(angle)), float(speed * np.sin(angle)))
    return Scene(sprites, tuple(events), background, drift, duration, int(rng.integers(2**31)))


def _following(rng: np.random.Generator, first: Action, *, same: bool, pair: bool) -> Action:
    """An action that can come second: nobody acts after vanishing, nor grows twice, nor slides on after a slide."""
    choices: list[Action] = ["left", "right", "up", "down", "spin", "grow", "shrink", "vanish"]
    if not same:
        choices.append("appear")
        if pair and first in ("spin", "grow", "shrink"):
            choices.append("meet")
    elif first == "vanish":
        return "appear"
    if first in DIRECTIONS and same:  # only across and alone: there is no room to slide on, or another sprite is there
        choices = [
            c
            for c in choices
            if c not in DIRECTIONS or (not pair and (DIRECTIONS[c][0] == 0) != (DIRECTIONS[first][0] == 0))
        ]
    elif first in DIRECTIONS and pair:  # both slide along lanes side by side
        choices = [c for c in choices if c not in DIRECTIONS or (DIRECTIONS[c][0] == 0) == (DIRECTIONS[first][0] == 0)]
    if first == "meet":
        choices = ["spin", "grow", "shrink", "vanish"]
    if same and first in ("grow", "shrink"):
        choices = [c for c in choices if c not in ("grow", "shrink")]
    if same and first == "spin":
        choices = [c for c in choices if c != "spin"]
    return choices[int(rng.integers(len(choices)))]


def _place(
    rng: np.random.Generator, names: list[tuple[str, str]], actions: list[Action], actors: list[int]
) -> tuple[Sprite, ...]:
    """Starting places that leave room for what is to come and keep two sprites apart."""
    meets = "meet" in actions
    slides = [DIRECTIONS[action] for action in actions if action in DIRECTIONS]
    upright = (
        bool(slides[0][0]) if slides else bool(rng.random() < 0.5)
    )  # two sprites: one above the other, or side by side
    sprites = []
    for i, (color, kind) in enumerate(names):
        x, y = (float(rng.uniform(0.42, 0.58)) for _ in range(2))
        if len(names) == 2:
            lane = (0.2 if i == 0 else 0.8) if meets else (0.27 if i == 0 else 0.73) + float(rng.uniform(-0.03, 0.03))
            x, y = (x, lane) if upright else (lane, y)
        scale = float(rng.uniform(0.9, 1.1))
        visible = True
        mine = [action for action, actor in zip(actions, actors, strict=True) if actor == i]
        for action in mine:
            if action == "grow":
                scale = SMALL
            elif action == "shrink":
                scale = LARGE
            elif action == "appear" and mine[0] == "appear":
                visible = False
            elif action in DIRECTIONS:
                dx, dy = DIRECTIONS[action]
                x = NEAR if dx > 0 else FAR if dx < 0 else x
                y = NEAR if dy > 0 else FAR if dy < 0 else y
        if meets:
            scale = min(scale, 1.0)
        sprites.append(Sprite(color, kind, int(rng.integers(2**31)), x, y, scale, visible))
    return tuple(sprites)


def states(scene: Scene, seconds: float) -> list[State]:
    """Every sprite of `scene` at `seconds` from its start."""
    fraction = seconds / scene.duration_seconds
    result = []
    for i, sprite in enumerate(scene.sprites):
        x, y, scale, angle, opacity = sprite.x, sprite.y, sprite.scale, 0.0, 1.0 if sprite.visible else 0.0
        for event in scene.events:
            if event.actor != i and event.action != "meet":
                continue
            done = float(np.clip((fraction - event.start) / (event.end - event.start), 0.0, 1.0))
            done = done * done * (3 - 2 * done)  # starts and stops gently
            if event.action in DIRECTIONS:
                dx, dy = DIRECTIONS[event.action]
                x += dx * (FAR - NEAR) * done
                y += dy * (FAR - NEAR) * done
            elif event.action == "spin":
                angle += SPIN_DEGREES * done
            elif event.action == "grow":
                scale += (LARGE - scale) * done
            elif event.action == "shrink":
                scale += (SMALL - scale) * done
            elif event.action == "appear":
                opacity = max(opacity, done) if done > 0 else opacity
            elif event.action == "vanish":
                opacity = min(opacity, 1.0 - done)
            elif event.action == "meet":
                other = scene.sprites[1 - i]
                middle = np.array([(sprite.x + other.x) / 2, (sprite.y + other.y) / 2])
                way = np.array([sprite.x, sprite.y]) - middle
                way *= 1 - TOUCH / np.linalg.norm(way)
                x -= float(way[0]) * done
                y -= float(way[1]) * done
        result.append(State(x, y, scale, angle, opacity))
    return result
