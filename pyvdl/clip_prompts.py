"""What a model is told beside a clip: one prompt for all, or one that is filled in from the clip's columns."""

from __future__ import annotations

import functools
import numbers
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyvdl.sources import writable
from pyvdl.tokenizers import Tokenizer

MAX_PROMPT_TOKENS = 256
_REMEMBERED = 4096  # texts; a clip's prompt is asked for to sort it, to draw and to tell, and many clips share one


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> np.ndarray:
    """int32[N, L] with L as short as the longest prompt allows: one shape for the set, whatever the batches."""
    return trim(tokenizer.encode_prompts(prompts, MAX_PROMPT_TOKENS), tokenizer.pad_id)


def trim(ids: np.ndarray, pad_id: int) -> np.ndarray:
    """int32[N, L] up to the last column with more than padding: a text may have the word of that in its midst."""
    return ids[:, : int(np.flatnonzero((ids != pad_id).any(0)).max(initial=0)) + 1]


def prompt_columns(prompt: str) -> tuple[str, ...]:
    """The columns whose values stand in for `{NAME}` in a prompt. ValueError where braces make no sense."""
    return tuple(dict.fromkeys(name for _, name in _pieces(prompt) if name is not None))


def _pieces(prompt: str) -> list[tuple[str, str | None]]:
    """Texts, each with the name of the column behind it."""
    remedy = "a column is {NAME}, a brace itself {{ or }}"
    try:
        found = list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise ValueError(f"prompt {prompt!r}: {error}; {remedy}") from None
    for _, name, form, conversion in found:
        if name is not None and (not name or form or conversion):
            raise ValueError(f"prompt {prompt!r}: {remedy}, without a form")
    return [(text, name) for text, name, _, _ in found]


@dataclass(frozen=True, kw_only=True)
class ClipPrompt:
    """What the model is told beside one clip."""

    text: str
    ids: np.ndarray  # int32[L], without padding
    error: str | None = None  # why this clip has none; text and ids are stand-ins then


class Prompts:
    """The prompts of clips by a template such as "caption en" or "answer en {question}"."""

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self.template, self.columns = template, prompt_columns(template)
        self._tokenizer = tokenizer
        self._pieces = _pieces(template)
        self._encoded = functools.lru_cache(_REMEMBERED)(self._encode)
        self._fixed = None if self.columns else self._encode("".join(text for text, _ in self._pieces))
        if self._fixed is not None and self._fixed.error is not None:
            raise ValueError(self._fixed.error)

    def of(self, columns: Mapping[str, Any]) -> ClipPrompt:
        """Of a clip with these columns."""
        if self._fixed is not None:
            return self._fixed
        texts = []
        for text, name in self._pieces:
            texts.append(text)
            if name is None:
                continue
            value = columns.get(name)
            if value is None:
                return self._none(f"the clip has no column {name!r}")
            if not isinstance(value, str | numbers.Number):
                return self._none(f"column {name!r} is a {type(value).__name__}, no text and no number")
            texts.append(writable(str(value)))
        return self._encoded("".join(texts))

    def _encode(self, text: str) -> ClipPrompt:
        found = self._tokenizer.encode_prompts([text], MAX_PROMPT_TOKENS + 1)
        ids = trim(found, self._tokenizer.pad_id)[0]
        if len(ids) > MAX_PROMPT_TOKENS:
            return self._none(f"more than {MAX_PROMPT_TOKENS} tokens: {text!r:.60}")
        return ClipPrompt(text=text, ids=ids)

    def _none(self, why: str) -> ClipPrompt:
        return ClipPrompt(text=self.template, ids=np.array([self._tokenizer.end_id], np.int32), error=f"prompt: {why}")
