"""Reads question and answer pairs out of what a language model wrote, whatever it put around them.

Asked for lines of "Q:" and "A:", models number them, set them in bold, in lists, tables or JSON, leave answers out,
think aloud first and say goodbye afterwards.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import json_repair

from pyvdl.data import encodable

from .prompts import Pair

_THOUGHT = re.compile(r"<(think|thinking|reasoning)>.*?(</\1>|\Z)", re.DOTALL | re.IGNORECASE)
_JSON = re.compile(r"\[\s*[\[{]|\{\s*[\"']")  # a list of lists or objects, or an object
# What stands before a line's words: bullets, quotes, headings, emphasis, numbers.
_LEAD = re.compile(r"(?:[\s|>#*_`~•–-]|\d{1,3}[.):](?=[\s*_]|$)|\(\d{1,3}\))*")
_MARKER = re.compile(
    r"(?:(q|question)|a|ans|answer)[\s*_`#]*\d{0,3}[*_`]*\s*(?:[:：]|[.)](?=\s))[\s*_`]*", re.IGNORECASE
)
_ANSWER_INSIDE = re.compile(r"(?<=[?？.!\s*_|])(?:a|ans|answer)[*_`]*\s*[:：][\s*_`]*", re.IGNORECASE)
_ANSWERS = re.compile(r"answers?[\s*_`:：]*", re.IGNORECASE)  # a heading
_RULE = re.compile(r"[\s|:*_=-]*")  # a line without a word


def parse_reply(text: str) -> list[Pair]:
    """The pairs of a reply in their order; a question without an answer has an empty one. None found: an empty list."""
    text = _THOUGHT.sub(" ", text)
    return list(_from_json(text)) or _from_lines(text)


def _from_json(text: str) -> Iterator[Pair]:
    """Pairs of the lists or objects in `text`, mended where they are broken or cut off."""
    if start := _JSON.search(text):
        yield from _walk(json_repair.loads(f"[{text[start.start() :]}]"))  # in a list: there may be several


def _walk(found: Any) -> Iterator[Pair]:
    if isinstance(found, list):
        texts = [item for item in found if isinstance(item, str)]
        if len(found) == len(texts) == 2 and _asks(texts[0]) and not _asks(texts[1]):
            yield Pair(_clean(texts[0]), _clean(texts[1]))
        else:
            for item in found:
                yield from _walk(item)
    elif isinstance(found, dict):
        named = {str(name).strip().lower(): value for name, value in found.items()}
        question = next((named[name] for name in ("question", "q") if isinstance(named.get(name), str)), None)
        questions, answers = named.get("questions"), named.get("answers")
        if question is not None:
            answer = next((named[name] for name in ("answer", "a") if name in named), None)
            yield Pair(_clean(question), _clean(_said(answer)))
        elif isinstance(questions, list) and isinstance(answers, list):
            for asked, answer in itertools.zip_longest(questions, answers):
                yield Pair(_clean(_said(asked)), _clean(_said(answer)))
        else:
            for name, value in found.items():
                if isinstance(name, str) and _asks(name) and not isinstance(value, list | dict):
                    yield Pair(_clean(name), _clean(_said(value)))
                else:
                    yield from _walk(value)


def _said(value: Any) -> str:
    """A JSON value as words; a list or an object is no answer."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, str | int | float) else ""


def _from_lines(text: str) -> list[Pair]:
    """Pairs of lines; where no line says "Q:", of each line that asks and what follows it."""
    bodies = [_LEAD.sub("", line, count=1).rstrip(" |") for line in text.splitlines()]
    marked = any((marker := _MARKER.match(body)) and marker[1] for body in bodies)
    pairs: list[list[str]] = []  # question, answer
    is_open = False  # whether the last pair may go on
    listed: Iterator[list[str]] | None = None  # under a heading "Answers": the questions they belong to
    for line, body in zip(text.splitlines(), bodies):
        if _RULE.fullmatch(line):
            is_open = is_open and not pairs[-1][1]  # a gap ends an answer: what follows without a marker is talk
        elif listed is not None:
            if pair := next(listed, None):
                pair[1] = body
        elif not marked and pairs and _ANSWERS.fullmatch(body) and not any(answer for _, answer in pairs):
            listed = iter(pairs)
        elif marker := _MARKER.match(body):
            said = body[marker.end() :]
            if marker[1]:
                pairs.append(_split(said, marked))
                is_open = True
            elif is_open:
                pairs[-1][1] += f" {said}"
        elif not marked and _asks(body, anywhere=True):
            pairs.append(_split(body, marked))
            is_open = True
        elif is_open:
            question, answer = pairs[-1]
            if not answer.strip() and not _asks(question, anywhere=True):
                pairs[-1][0] += f" {body}"
            elif not answer.strip() or body[:1].islower():
                pairs[-1][1] += f" {body}"
            else:
                is_open = False  # a sentence of its own: talk
    return [Pair(_clean(question), _clean(answer)) for question, answer in pairs]


def _split(said: str, marked: bool) -> list[str]:
    """Question and answer of one line; the answer is empty if it does not stand there."""
    if inside := _ANSWER_INSIDE.search(said):
        return [said[: inside.start()], said[inside.end() :]]
    if not marked and (asked := re.match(r"[^?？]*[?？]", said)):
        return [asked[0], said[asked.end() :].strip(" |*_-–:")]
    return [said, ""]


def _asks(text: str, anywhere: bool = False) -> bool:
    return bool(re.search(r"[?？]" if anywhere else r"[?？][\s*_`\"']*$", text))


def _clean(text: str) -> str:
    """Without emphasis, quotes around it, white space that means nothing, and what cannot be written."""
    text = " ".join(re.sub(r"\*\*|__|`", "", encodable(text)).split()).strip("*_| ")
    if len(text) > 1 and text[0] + text[-1] in {'""', "''", "“”"}:
        text = text[1:-1].strip()
    return text
