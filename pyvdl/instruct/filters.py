"""What is left out of a language model's question and answer pairs, and why."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .prompts import Pair, Prompt

Reason = Literal["empty", "cut", "too long", "about the text", "copied", "given away", "language", "repeated"]
REASONS: tuple[Reason, ...] = get_args(Reason)
ANY_LANGUAGE = "any"

_MAX_QUESTION_WORDS = 40
_COPIED_WORDS = 10  # so many in a row are not somebody's own
_CAPTION_WORDS = 5  # so many are a caption, if it has no more
# Of what is in another language, py3langid gives the wanted one less. Few words say little: "karate" has 0.0015.
_LANGUAGE_AT_LEAST = 0.01
_LANGUAGE_OF_FEW_WORDS_AT_LEAST = 0.001
_FEW_WORDS = 4

_ABOUT_THE_TEXT = re.compile(
    r"\b(captions?|narratives?|(according to|in|from|by) the (text|description|account|passage)"
    r"|(not|\w+n't) (mentioned|specified|stated|described|said))\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w+(?:['’]\w+)*")
# Words that give nothing away.
_LIGHT = frozenset(
    re.findall(
        r"\w+",
        "a an the this that these those it its he his him she her they their them is are was were be been being do "
        "does did has have had to of in on at by with from up into onto for and or as so since because",
    )
)


@dataclass(frozen=True)
class Rejected:
    """A pair that was left out."""

    pair: Pair
    reason: Reason


def sift(
    pairs: Iterable[Pair], prompt: Prompt, *, language: str, seen: set[str], is_cut: bool
) -> tuple[list[Pair], list[Rejected]]:
    """The pairs worth keeping, and the others with the first reason that holds.

    `seen` holds what was asked of this record so far, and takes what is kept. `is_cut`: the reply ran into its length,
    so that its last pair ends somewhere.
    """
    kept: list[Pair] = []
    rejected: list[Rejected] = []
    found = list(pairs)
    for i, pair in enumerate(found):
        question = _plain(pair.question)
        if is_cut and i == len(found) - 1:
            reason: Reason | None = "cut"
        elif question in seen:
            reason = "repeated" if pair.answer else "empty"
        else:
            reason = judge(pair, prompt, language)
        if reason is None:
            seen.add(question)
            kept.append(pair)
        else:
            rejected.append(Rejected(pair, reason))
    return kept, rejected


def judge(pair: Pair, prompt: Prompt, language: str) -> Reason | None:
    """Why a pair is of no use, or None."""
    question, answer = _words(pair.question), _words(pair.answer)
    if not question or not answer:
        return "empty"
    if len(question) > _MAX_QUESTION_WORDS or len(answer) > prompt.max_answer_words:
        return "too long"
    if _ABOUT_THE_TEXT.search(pair.question) or _ABOUT_THE_TEXT.search(pair.answer):
        return "about the text"
    if _is_copied(pair, prompt):
        return "copied"
    if _gives_away(question, answer):
        return "given away"
    if language != ANY_LANGUAGE and not _is_in(language, pair):
        return "language"
    return None


def check_language(language: str) -> None:
    """Raises ValueError if nobody can tell whether a text is in this language."""
    known: Collection[str] = {ANY_LANGUAGE, *_identifier().labels}
    if language not in known:
        raise ValueError(f"language {language!r}: expected {ANY_LANGUAGE} or a code as en, one of {sorted(known)}")


def _is_copied(pair: Pair, prompt: Prompt) -> bool:
    """Whether it is an example's pair, or repeats a caption or much of one."""
    plain = (_plain(pair.question), _plain(pair.answer))
    if any(plain == (_plain(p.question), _plain(p.answer)) for example in prompt.examples for p in example.pairs):
        return True
    captions = [*prompt.captions, *(caption for example in prompt.examples for caption in example.captions)]
    sources = [f" {_plain(caption)} " for caption in captions]
    for text in plain:
        words = text.split()
        runs = [" ".join(words[i : i + _COPIED_WORDS]) for i in range(len(words) - _COPIED_WORDS + 1)]
        runs += [text] if len(words) >= _CAPTION_WORDS and f" {text} " in sources else []
        if any(f" {run} " in source for run in runs for source in sources):
            return True
    return False


def _gives_away(question: list[str], answer: list[str]) -> bool:
    """Whether all that the answer tells stands in the question, which does not offer it as one of two."""
    told = {_stem(word) for word in answer if word not in _LIGHT}
    return bool(told) and "or" not in question and told <= {_stem(word) for word in question}


def _stem(word: str) -> str:
    """A word without the ending that a verb or a plural has: enough to see that "falls" is "fall"."""
    return re.sub(r"(?<=\w{3})(?:ing|ed|es|s|e)$", "", word)


def _is_in(language: str, pair: Pair) -> bool:
    few = len(_words(pair.answer)) <= _FEW_WORDS
    together, alone = (
        dict(_identifier().rank(text))[language] for text in (f"{pair.question} {pair.answer}", pair.answer)
    )
    return together >= _LANGUAGE_AT_LEAST and alone >= (_LANGUAGE_OF_FEW_WORDS_AT_LEAST if few else _LANGUAGE_AT_LEAST)


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _plain(text: str) -> str:
    return " ".join(_words(text))
