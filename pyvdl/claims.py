"""The four claims of the method, tested on the numbers of one run and put into words that follow the numbers.

Nothing here is tuned to a wanted outcome: each claim is a comparison of 95% intervals or of values, and its sentence
says what was compared and how it came out, also when it fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RECOVERED_AT_LEAST = 0.7  # share of the gain of human captions over alt-text that pseudo-captions must recover at R@5

_COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Score:
    """A measured value with its 95% interval, in percent points."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 1) -> str:
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def read_score(report: Mapping[str, Any], *path: str) -> Score:
    """The score under `path`; a ValueError names what is missing or not a number."""
    node: Any = report
    for depth, key in enumerate(path):
        if not isinstance(node, Mapping) or key not in node:
            raise ValueError(f"the report lacks {'.'.join(path[: depth + 1])!r}")
        node = node[key]
    name = ".".join(path)
    if not isinstance(node, Mapping) or not {"value", "low", "high"} <= set(node):
        raise ValueError(f"{name} is {node!r}; expected an object with 'value', 'low' and 'high'")
    numbers = [node[key] for key in ("value", "low", "high")]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise ValueError(f"{name} is {node!r}; 'value', 'low' and 'high' must be finite numbers")
    if numbers[1] > numbers[2]:
        raise ValueError(f"{name} is {node!r}; 'low' must not be above 'high'")
    return Score(*(float(number) for number in numbers))


def recovered_gain(report: Mapping[str, Any]) -> float | None:
    """Share of the gain of human captions over alt-text (text-to-video R@5) that pseudo-captions recover.

    None where human captions do not beat alt-text: there is no gain to recover then.
    """
    alt, pseudo, human = (
        read_score(report, "dual_encoder", texts, "t2v", "R@5").value
        for texts in ("alt_text", "pseudo_captions", "human_captions")
    )
    return (pseudo - alt) / (human - alt) if human > alt else None


def claims(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The four claims, each {"claim": sentence, "holds": bool, "figures": sentences, "short": the verdict's clause}."""
    return [_visual(report), _language(report), _pseudo_captions(report), _recovered(report)]


def verdict(tested: Sequence[Mapping[str, Any]]) -> str:
    """One or two sentences on what `claims` returned: how many hold, which do, which do not, each with its figures."""
    if not tested:
        raise ValueError("there are no claims to give a verdict on")
    total = _count(len(tested))
    held = [claim["short"] for claim in tested if claim["holds"]]
    failed = [claim["short"] for claim in tested if not claim["holds"]]
    if not failed:
        opening = "The claim holds" if len(tested) == 1 else f"All {total} claims hold"
        return f"{opening}: {'; '.join(held)}."
    if not held:
        opening = "The claim does not hold" if len(tested) == 1 else f"None of the {total} claims holds"
        return f"{opening}: {'; '.join(failed)}."
    verb = "claims holds" if len(held) == 1 else "claims hold"
    fails = "does not" if len(failed) == 1 else "do not"
    opening = f"{_count(len(held)).capitalize()} of {total} {verb}: {'; '.join(held)}."
    return f"{opening} {_count(len(failed)).capitalize()} {fails}: {'; '.join(failed)}."


def _visual(report: Mapping[str, Any]) -> dict[str, Any]:
    before = read_score(report, "vlm", "image", "cider")
    after = read_score(report, "vlm", "visual", "cider")
    rises = after.low > before.high
    digits = _digits(after.low, before.high)
    if rises:
        short = f"the visual stage raises CIDEr from {before.value:.1f} to {after.value:.1f}"
    else:
        short = (
            f"CIDEr after the visual stage, {after.text(digits)}, is not clearly above the image model's, "
            f"{before.text(digits)}"
        )
    return {
        "claim": "The visual stage raises CIDEr well above the image model's.",
        "holds": rises,
        "figures": f"CIDEr {after.text(digits)} after the visual stage, {before.text(digits)} for the image model: "
        f"{_outcome(after, before)}.",
        "short": short,
    }


def _language(report: Mapping[str, Any]) -> dict[str, Any]:
    names = {"exact_match": "exact match", "wups": "WUPS", "detail_recall": "detail recall"}
    figures, outcomes, rises, short_rises, short_fails = [], [], [], [], []
    for key, name in names.items():
        before = read_score(report, "vlm", "visual", key)
        after = read_score(report, "vlm", "language", key)
        digits = _digits(after.low, before.high)
        rises.append(after.low > before.high)
        figures.append((f"{name} {after.text(digits)}", f"{before.text(digits)} before"))
        outcomes.append(_outcome(after, before))
        if rises[-1]:
            short_rises.append(f"{name} from {before.value:.1f} to {after.value:.1f}")
        else:
            short_fails.append(f"{name} is not clearly up ({before.text(digits)} to {after.text(digits)})")

    before = read_score(report, "vlm", "visual", "cider")
    after = read_score(report, "vlm", "language", "cider")
    digits = _digits(after.high, before.value)
    kept = after.high >= before.value
    relation = "not below" if kept else "below"
    cider = (
        f"CIDEr {after.text(digits)} ({before.value:.{digits}f} before): the upper end of its 95% interval is "
        f"{relation} the value before, so it counts as {'kept' if kept else 'lost'}."
    )
    if not kept:
        short_fails.append(f"CIDEr falls from {before.value:.{digits}f} to {after.text(digits)}")
    if len(set(outcomes)) == 1:
        compared = _listing([f"{now} ({then})" for now, then in figures]) + f"; each {outcomes[0]}"
    else:
        compared = _listing([f"{now} ({then}; {outcome})" for (now, then), outcome in zip(figures, outcomes)])
    if short_fails:
        short = "after the language stage " + ", ".join(short_fails)
    else:
        short = (
            f"the language stage raises {_listing(short_rises)} and keeps CIDEr ({after.value:.1f}, "
            f"{before.value:.1f} before)"
        )
    return {
        "claim": "The language stage raises question answering and detail without losing CIDEr.",
        "holds": all(rises) and kept,
        "figures": f"After the language stage: {compared}. {cider}",
        "short": short,
    }


def _pseudo_captions(report: Mapping[str, Any]) -> dict[str, Any]:
    alt = read_score(report, "dual_encoder", "alt_text", "t2v", "R@5")
    pseudo = read_score(report, "dual_encoder", "pseudo_captions", "t2v", "R@5")
    beats = pseudo.low > alt.high
    digits = _digits(pseudo.low, alt.high)
    if beats:
        short = (
            f"training on pseudo-captions lifts text-to-video R@5 from alt-text's {alt.value:.1f} to {pseudo.value:.1f}"
        )
    else:
        short = (
            f"text-to-video R@5 with pseudo-captions, {pseudo.text(digits)}, is not clearly above alt-text's, "
            f"{alt.text(digits)}"
        )
    return {
        "claim": "The encoder trained on pseudo-captions clearly beats the one trained on alt-text.",
        "holds": beats,
        "figures": f"Text-to-video R@5 {pseudo.text(digits)} with pseudo-captions, {alt.text(digits)} with alt-text: "
        f"{_outcome(pseudo, alt)}.",
        "short": short,
    }


def _recovered(report: Mapping[str, Any]) -> dict[str, Any]:
    alt, pseudo, human = (
        read_score(report, "dual_encoder", texts, "t2v", "R@5")
        for texts in ("alt_text", "pseudo_captions", "human_captions")
    )
    share = recovered_gain(report)
    digits = _digits(human.value, alt.value)
    values = (
        f"Text-to-video R@5 {alt.value:.{digits}f} with alt-text, {pseudo.value:.{digits}f} with pseudo-captions, "
        f"{human.value:.{digits}f} with human captions"
    )
    needed = f"{100 * RECOVERED_AT_LEAST:.0f}%"
    if share is None:
        holds = False
        figures = f"{values}: human captions do not beat alt-text, so there is no gain to recover a share of."
        short = (
            f"human captions (R@5 {human.value:.{digits}f}) do not beat alt-text ({alt.value:.{digits}f}), "
            "so there is no gain to recover"
        )
    else:
        holds = share >= RECOVERED_AT_LEAST
        percent = f"{100 * share:.{_digits(100 * share, 100 * RECOVERED_AT_LEAST, coarsest=0)}f}%"
        figures = (
            f"{values}: pseudo-captions recover {percent} of the gain, {'at least' if holds else 'less than'} {needed}."
        )
        if human.low <= alt.high:
            figures += (
                " The 95% intervals of human captions and alt-text overlap, so this share is itself not well known."
            )
        if holds:
            short = f"pseudo-captions recover {percent} of what human captions gain"
        else:
            short = f"pseudo-captions recover {percent} of what human captions gain, less than {needed}"
    return {
        "claim": f"Pseudo-captions recover at least {needed} of what human captions gain over alt-text.",
        "holds": holds,
        "figures": figures,
        "short": short,
    }


def _outcome(after: Score, before: Score) -> str:
    """How two intervals lie to each other; touching ones overlap."""
    if after.low > before.high:
        return "higher, with 95% intervals that do not overlap"
    if before.low > after.high:
        return "lower, with 95% intervals that do not overlap"
    return "with 95% intervals that overlap"


def _digits(first: float, second: float, coarsest: int = 1) -> int:
    """Decimals needed so that two different numbers that decide a claim do not read the same."""
    if first == second:
        return coarsest
    return next((d for d in range(coarsest, 9) if f"{first:.{d}f}" != f"{second:.{d}f}"), 9)


def _listing(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def _count(number: int) -> str:
    return _COUNTS[number] if number < len(_COUNTS) else str(number)
