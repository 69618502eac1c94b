"""Instruction data from narratives: (question, answer) pairs in three families, by templates, without a language model.

The paper has an LLM read a video's narrative and write temporal, causal and short questions with answers (section 4.2).
This generator does the same from rules, for machines without an LLM: it reads narratives whose parts carry actor tags
(`<Actor> clause, first it ..., then it .... <Background> ...`, as Video Localized Narratives have them), finds who does
what in which order, and fills question templates. A clause it cannot read is left out, never guessed at.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from pyvdl.data import Question

COLORS = frozenset(
    ("red", "green", "blue", "yellow", "purple", "orange", "white", "black", "cyan", "pink", "brown", "gray", "grey")
)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# What one can see at the end (or the start) when somebody has done something: the "why" of causal questions.
CONSEQUENCES = {
    "slides left": "why is the {actor} on the left at the end?",
    "slides right": "why is the {actor} on the right at the end?",
    "slides up": "why is the {actor} at the top at the end?",
    "slides down": "why is the {actor} at the bottom at the end?",
    "grows": "why is the {actor} bigger at the end?",
    "shrinks": "why is the {actor} smaller at the end?",
    "vanishes": "why is the {actor} gone at the end?",
    "appears": "why is the {actor} not there at the start?",
}
# A later deed of the same kind hides the consequence of an earlier one.
KINDS = {
    verb: i for i, verbs in enumerate((("slides",), ("grows", "shrinks"), ("vanishes", "appears"))) for verb in verbs
}

_PART = re.compile(r"<([^>]+)>\s*([^<]*)")
# One noun and what it does: of "a tall tree sways" nothing is read, so that "tall" is no answer.
_BACKGROUND = re.compile(r"(?:(?:an?|the)\s+)?(?!(?:an?|the)\b)([\w-]+)(?:[.,]|\s+(?:is|\w+[^\Ws]s)\b|\s*$)")
_CLAUSE = re.compile(r"^(first|then) it (.+?)(?: (quickly|slowly))?$")


@dataclass(frozen=True)
class Deed:
    """Somebody does something: `verb` in the third person with its complement ("slides left")."""

    actor: str
    order: int  # 0 first, 1 then
    verb: str


def parse(narrative: str) -> tuple[list[str], list[Deed], str | None]:
    """Splits a tagged narrative into (actors, deeds in order, background or None).

    Raises ValueError when the text has no actor tags.
    """
    actors, deeds, background = [], [], None
    parts = _PART.findall(narrative)
    if not parts:
        raise ValueError(f"narrative without actor tags like '<Man> ...': {narrative[:80]!r}")
    for tag, text in parts:
        actor = tag.strip().lower()
        if actor == "background":
            if (match := _BACKGROUND.match(text.lower())) and match[1] not in COLORS:
                background = match[1]
            continue
        if actor not in actors:  # told of twice, it still is one
            actors.append(actor)
        for clause in text.rstrip(". ").split(", "):
            if match := _CLAUSE.match(clause.strip().lower()):
                deeds.append(Deed(actor, ("first", "then").index(match[1]), match[2]))
    return actors, sorted(deeds, key=lambda deed: deed.order), background


def describe(narrative: str) -> str:
    """The narrative as plain text, without its tags: the target of "describe in detail"."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", narrative)).strip()


def generate(narrative: str) -> list[Question]:
    """All questions the templates find in a narrative, answers included (paper, section 4.2: three families)."""
    actors, deeds, background = parse(narrative)
    return [*_temporal(deeds), *_causal(deeds), *_short(actors, deeds, background)]


def _temporal(deeds: list[Deed]) -> list[Question]:
    if any(deed.verb.startswith("meets") for deed in deeds):
        return []  # two act at once: nobody's deed comes first
    found = []
    for actor in dict.fromkeys(deed.actor for deed in deeds):
        own = [deed for deed in deeds if deed.actor == actor]
        found.append(
            Question(question=f"what does the {actor} do first?", answer=_base(own[0].verb), family="temporal")
        )
        if len(own) > 1:
            found.append(
                Question(question=f"what does the {actor} do last?", answer=_base(own[-1].verb), family="temporal")
            )
    for before, after in itertools.pairwise(deeds):
        who = "it" if before.actor == after.actor else f"the {after.actor}"
        question = f"what happens after the {before.actor} {before.verb}?"
        found.append(Question(question=question, answer=f"{who} {after.verb}", family="temporal"))
    return found


def _causal(deeds: list[Deed]) -> list[Question]:
    found = []
    for i, deed in enumerate(deeds):
        kind = KINDS.get(deed.verb.split()[0])
        rivals = [d for d in deeds if d.actor == deed.actor and KINDS.get(d.verb.split()[0]) == kind and d is not deed]
        appears = deed.verb == "appears"
        hidden = any(deeds.index(d) < i if appears else deeds.index(d) > i for d in rivals)
        hidden |= any(d.actor == deed.actor and d.verb == "vanishes" for d in deeds[i + 1 :])
        if deed.verb in CONSEQUENCES and not hidden:
            answer = "it appears later" if appears else f"it {deed.verb}"
            found.append(
                Question(question=CONSEQUENCES[deed.verb].format(actor=deed.actor), answer=answer, family="causal")
            )
    pair = [deed for deed in deeds if deed.verb.startswith("meets the ")]
    if pair and not any(deed.verb == "vanishes" for deed in deeds):
        other = pair[0].verb.removeprefix("meets the ")
        question = f"why do the {pair[0].actor} and the {other} touch at the end?"
        found.append(Question(question=question, answer="they move together", family="causal"))
    return found


def _short(actors: list[str], deeds: list[Deed], background: str | None) -> list[Question]:
    found = []
    for actor in actors:
        color, _, noun = actor.partition(" ")
        if color in COLORS and noun:
            found.append(Question(question=f"what color is the {noun}?", answer=color, family="short"))
    if background:
        found.append(Question(question="what is in the background?", answer=background, family="short"))
    if len(actors) < len(NUMBERS):
        found.append(Question(question="how many shapes are there?", answer=NUMBERS[len(actors)], family="short"))
    for deed in deeds:
        alone = sum(other.verb == deed.verb for other in deeds) == 1
        if alone and not deed.verb.startswith("meets"):
            found.append(Question(question=f"what is {_progressive(deed.verb)}?", answer=deed.actor, family="short"))
    return found


def _base(verb: str) -> str:
    """ "slides left" -> "slide left", "vanishes" -> "vanish"."""
    head, _, rest = verb.partition(" ")
    head = head[:-2] if re.search(r"(sh|ch|x|ss|o)es$", head) else head.removesuffix("s")
    return f"{head} {rest}".strip()


def _progressive(verb: str) -> str:
    """ "slides left" -> "sliding left", "spins" -> "spinning"."""
    head, _, rest = _base(verb).partition(" ")
    if head.endswith("e") and not head.endswith("ee"):
        head = head[:-1]
    elif re.fullmatch(r"[^aeiou]*[aeiou][bdgklmnprt]", head):
        head += head[-1]
    return f"{head}ing {rest}".strip()
