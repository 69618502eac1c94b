"""What a manifest says of a clip besides its place: as rows carry it over, and as prompts name it. No jax here."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any

from pyvdl.clip_prompts import prompt_columns
from pyvdl.data import Record, question_to_json
from pyvdl.rows import ROW_NAMES

_PLACE = ("key", "video", "start_seconds", "end_seconds")
_TEXTS = ("narrative", "alt_text", "label", "split", "group")  # of a record
_texts = operator.attrgetter(*_TEXTS)
_NONE = (None,) * len(_TEXTS)  # as most records have it
_BEFORE = "source_"


def carried(record: Record) -> dict[str, Any]:
    """What a row takes over from its record. A column called as one of the row's own becomes source_NAME, one called
    source_NAME then source_source_NAME, and so on: no two become one, whatever other columns a clip has."""
    return {_carried_name(name): value for name, value in _columns(record).items()}


def prompt_values(record: Record) -> dict[str, Any]:
    """What `{NAME}` in a prompt stands for, by the names that the manifest has."""
    return _columns(record) | {name: getattr(record, name) for name in _PLACE}


def check_prompt(prompt: str, columns: Iterable[str]) -> None:
    """ValueError where it names what no clip has. columns: as they are carried."""
    there = {*_PLACE, *map(_own_name, columns)}
    for name in prompt_columns(prompt):
        if name not in there:
            raise ValueError(
                f"the prompt names {name!r}, and no clip has such a column; there are: {', '.join(sorted(there))}"
            )


def texts_of(record: Record) -> dict[str, Any]:
    """Those of a record's texts that there are one of."""
    texts = _texts(record)
    return {} if texts == _NONE else {name: text for name, text in zip(_TEXTS, texts) if text is not None}


def _columns(record: Record) -> dict[str, Any]:
    values = texts_of(record)
    if record.captions:
        values["captions"] = list(record.captions)
    if record.questions:
        values["questions"] = [question_to_json(question) for question in record.questions]
    return values | dict(record.extra)


@functools.lru_cache(4096)
def _carried_name(name: str) -> str:
    bare = name
    while bare.startswith(_BEFORE):
        bare = bare.removeprefix(_BEFORE)
    return _BEFORE + name if bare in ROW_NAMES else name


def _own_name(carried: str) -> str:
    """The manifest's name of a carried column."""
    bare = carried.removeprefix(_BEFORE)
    return bare if _carried_name(bare) == carried else carried
