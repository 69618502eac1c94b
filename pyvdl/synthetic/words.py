"""Puts scenes into words: short captions, narratives with actor tags, noisy alt-text, image captions, questions.

Everything a writer would know comes from the scene; nothing here looks at pixels. The alt-text is spoiled at fixed
rates (`ALT_TEXT_NOISE`), as text found beside videos on the web is: parts are wrong, missing or vague, some texts are
about something else altogether.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pyvdl.synthetic.scene import (
    ACTIONS,
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    KINDS,
    Event,
    Scene,
    State,
    sample_scene,
    states,
)

# Fixed before the first training; printed by the demo. For every part of a text (colour, kind, deed, background)
# wrong = another value, missing = left out, vague = a word that says little; unrelated = the text is another scene's.
ALT_TEXT_NOISE = {"wrong": 0.2, "missing": 0.2, "vague": 0.2, "unrelated": 0.2}

# Several ways to say what happens, as people differ; the first is the plain one that narratives and answers use.
PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("slides left", "moves to the left", "drifts left"),
    "right": ("slides right", "moves to the right", "drifts right"),
    "up": ("slides up", "moves to the top", "rises"),
    "down": ("slides down", "moves to the bottom", "sinks"),
    "spin": ("spins", "turns around", "rotates"),
    "grow": ("grows", "gets bigger", "becomes larger"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller"),
    "appear": ("appears", "shows up", "fades in"),
    "vanish": ("vanishes", "disappears", "fades out"),
}
PROGRESSIVE = {
    "left": "sliding left",
    "right": "sliding right",
    "up": "sliding up",
    "down": "sliding down",
    "spin": "spinning",
    "grow": "growing",
    "shrink": "shrinking",
    "appear": "appearing",
    "vanish": "vanishing",
}
BASE = {  # after "does" or "will"
    "left": "slide left",
    "right": "slide right",
    "up": "slide up",
    "down": "slide down",
    "spin": "spin",
    "grow": "grow",
    "shrink": "shrink",
    "appear": "appear",
    "vanish": "vanish",
    "meet": "meet",
}


# Classes for zero-shot classification, to follow the name of a sprite.
LABELS = {action: phrases[0] for action, phrases in PHRASES.items()} | {"meet": "and another meet"}


class Answered(NamedTuple):
    """One question about a clip; `family` is temporal, causal or short."""

    question: str
    answer: str
    family: str


def article(name: str) -> str:
    """The name with "a" or "an" before it."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A short caption as a person would write: who does what, one thing after another, now and then over what."""
    told: list[str] = []
    for i, event in enumerate(scene.events):
        if event.action == "meet":
            pair = " and ".join(article(sprite.name) for sprite in scene.sprites)
            if i:  # one of them has acted already
                pair = "the two"
            text = f"{pair} {_pick(rng, ('meet', 'come together', 'move together'))}"
        else:
            name = scene.sprites[event.actor].name
            again = i > 0 and (scene.events[0].action == "meet" or scene.events[0].actor == event.actor)
            alone = again and scene.events[0].action != "meet"
            who = "" if alone else f"the {name} " if again else f"{article(name)} "
            text = who + _pick(rng, PHRASES[event.action])
        told.append(text)
    text = _pick(rng, (" and then ", ", then ")).join(told)
    if (
        len(scene.sprites) == 2
        and {e.actor for e in scene.events} == {0}
        and all(e.action != "meet" for e in scene.events)
    ):
        text += f" {_pick(rng, ('beside', 'near', 'next to'))} {article(scene.sprites[1].name)}"
    if rng.random() < 0.4:
        text += f" {_pick(rng, ('over', 'on'))} {scene.background}"
    return text


def _cell(x: float, y: float) -> str:
    """Where in the frame, on a grid of three by three: "top left", "right", "centered"."""
    rows, columns = ("top", "", "bottom"), ("left", "", "right")
    row, column = (int(np.digitize(v, (0.36, 0.64))) for v in (y, x))
    return f"{rows[row]} {columns[column]}".strip() or "centered"


def _place(x: float, y: float) -> str:
    """The same as part of a sentence: "at the top left", "on the right", "in the middle"."""
    cell = _cell(x, y)
    if cell == "centered":
        return "in the middle"
    return f"{'on' if cell in ('left', 'right') else 'at'} the {cell}"


def _size(scale: float) -> str:
    return "small " if scale < 0.75 else "large " if scale > 1.25 else ""


def image_caption(scene: Scene, seconds: float) -> str:
    """What one frame shows, as an image captioner would say it: no motion.

    Two sprites are told from top to bottom or from left to right, whichever sets them farther apart: a frame does not
    tell who is going to act.
    """
    seen = [pair for pair in zip(scene.sprites, states(scene, seconds), strict=True) if pair[1].opacity > 0.3]
    if len(seen) == 2:
        (_, a), (_, b) = seen
        seen.sort(key=lambda pair: pair[1].y if abs(a.y - b.y) > abs(a.x - b.x) else pair[1].x)
    parts = []
    for sprite, state in seen:
        look = "faint " if state.opacity < 0.75 else _size(state.scale) or ("tilted " if _is_tilted(state) else "")
        parts.append(f"{article(look + sprite.name)} {_cell(state.x, state.y)}")
    return f"{' and '.join(parts) if parts else 'nothing'} over {scene.background}"


def _is_tilted(state: State) -> bool:
    """Whether a square stands clearly on a corner."""
    return abs(state.angle_degrees % 90 - 45) < 25


def narrative(scene: Scene) -> str:
    """A long description, one tagged part an actor and one for the background, in the order things happen."""
    parts = []
    for i, (sprite, state) in enumerate(zip(scene.sprites, states(scene, 0.0), strict=True)):
        clauses = [f"{article(_size(sprite.scale) + sprite.name)} is {_place(state.x, state.y)}"]
        if not sprite.visible:
            clauses = [f"{article(sprite.name)} is not there yet"]
        for order, event in zip(("first", "then"), scene.events, strict=False):
            if event.action == "meet":
                clauses.append(f"{order} it meets the {scene.sprites[1 - i].name} {_pace(event)}")
            elif event.actor == i:
                clauses.append(f"{order} it {PHRASES[event.action][0]} {_pace(event)}")
        parts.append(f"<{sprite.name}> {', '.join(clauses)}.")
    dx, dy = scene.drift
    way = ("right" if dx < 0 else "left") if abs(dx) > abs(dy) else ("down" if dy < 0 else "up")
    return " ".join([*parts, f"<background> {scene.background} drifts {way}."])


def _pace(event: Event) -> str:
    return "quickly" if event.quick else "slowly"


def facts(scene: Scene) -> list[str]:
    """Phrases a detailed description should hold, each a run of words: looks, what happens and how fast, background."""
    found = [sprite.name for sprite in scene.sprites]
    for event in scene.events:
        verb = "meets" if event.action == "meet" else PHRASES[event.action][0]
        found += [verb, _pace(event)]
    return [*dict.fromkeys(found), scene.background]


def alt_text(scene: Scene, rng: np.random.Generator) -> str:
    """Text as found beside a video on the web: see `ALT_TEXT_NOISE`."""
    if rng.random() < ALT_TEXT_NOISE["unrelated"]:
        scene = sample_scene(rng)
    actors = sorted({e.actor for e in scene.events} | ({1} if any(e.action == "meet" for e in scene.events) else set()))
    words = []
    for actor in actors:
        sprite = scene.sprites[actor]
        words += [
            _spoil(rng, sprite.color, COLORS, ("bright", "")),
            _spoil(rng, sprite.kind, KINDS, ("thing", "object")),
        ]
    for event in scene.events:
        action = _spoil(rng, event.action, ACTIONS, ("moving", "video"))
        words.append(_pick(rng, PHRASES.get(action, ("meet",) if action == "meet" else (action,))))
    words.append(_spoil(rng, scene.background, BACKGROUNDS, ("outside", "background")))
    text = " ".join(word for word in words if word)
    return f"{text} {_pick(rng, ('clip', 'stock footage', 'hd', ''))}".strip() or "clip"


def _spoil(rng: np.random.Generator, value: str, values: Sequence[str], vague: Sequence[str]) -> str:
    draw = rng.random()
    if draw < ALT_TEXT_NOISE["wrong"]:
        return _pick(rng, [v for v in values if v != value])
    draw -= ALT_TEXT_NOISE["wrong"]
    if draw < ALT_TEXT_NOISE["missing"]:
        return ""
    draw -= ALT_TEXT_NOISE["missing"]
    return _pick(rng, vague) if draw < ALT_TEXT_NOISE["vague"] else value


def questions(scene: Scene) -> list[Answered]:
    """All questions the scene allows, with short answers."""
    result: list[Answered] = []
    names = [sprite.name for sprite in scene.sprites]
    by_actor: dict[int, list[Event]] = {
        i: [e for e in scene.events if e.actor == i and e.action != "meet"] for i in range(len(names))
    }
    for i, own in by_actor.items():
        if own and all(e.action != "meet" for e in scene.events):
            result.append(Answered(f"what does the {names[i]} do first?", BASE[own[0].action], "temporal"))
            if len(own) == 2:
                result.append(Answered(f"what does the {names[i]} do last?", BASE[own[1].action], "temporal"))
    if len(scene.events) == 2 and all(e.action != "meet" for e in scene.events):
        first, second = scene.events
        told = f"the {names[first.actor]} {PHRASES[first.action][0]}"
        who = "it" if first.actor == second.actor else f"the {names[second.actor]}"
        result.append(Answered(f"what happens after {told}?", f"{who} {PHRASES[second.action][0]}", "temporal"))
    for i, own in by_actor.items():
        for event in own:
            reason = f"it {PHRASES[event.action][0]}"
            if event.action in DIRECTIONS:
                where = {"left": "on the left", "right": "on the right", "up": "at the top", "down": "at the bottom"}
                if own[-1] is event:
                    question = f"why is the {names[i]} {where[event.action]} at the end?"
                    result.append(Answered(question, reason, "causal"))
            elif event.action in ("grow", "shrink") and own[-1].action != "vanish":
                change = "bigger" if event.action == "grow" else "smaller"
                result.append(Answered(f"why is the {names[i]} {change} at the end?", reason, "causal"))
            elif event.action == "vanish" and own[-1] is event:
                result.append(Answered(f"why is the {names[i]} gone at the end?", reason, "causal"))
            elif event.action == "appear" and own[0] is event:
                result.append(Answered(f"why is the {names[i]} not there at the start?", "it appears later", "causal"))
    if any(e.action == "meet" for e in scene.events) and scene.events[-1].action != "vanish":
        question = f"why do the {names[0]} and the {names[1]} touch at the end?"
        result.append(Answered(question, "they move together", "causal"))
    for sprite in scene.sprites:
        result.append(Answered(f"what color is the {sprite.kind}?", sprite.color, "short"))
    result.append(Answered("what is in the background?", scene.background, "short"))
    result.append(Answered("how many shapes are there?", ("one", "two")[len(names) - 1], "short"))
    for event in scene.events:
        if event.action != "meet" and sum(e.action == event.action for e in scene.events) == 1:
            result.append(Answered(f"what is {PROGRESSIVE[event.action]}?", names[event.actor], "short"))
    return result


def label(scene: Scene) -> str | None:
    """The class of a clip in which just one thing happens, for zero-shot classification."""
    return LABELS[scene.events[0].action] if len(scene.events) == 1 else None
