"""What a data set holds: counts, the videos that are not there, and the first records."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pyvdl.data import Question, Record
from pyvdl.sources import file_path, is_url

SHOWN = 3  # records, and names of missing videos


@dataclass
class Survey:
    """Counts of the records that went through `watch`."""

    records: int = 0
    absent: int = 0  # records whose video is missing
    splits: Counter[str] = field(default_factory=Counter)  # "none" where a record has none
    captions: int = 0
    alt_texts: int = 0
    narratives: int = 0
    questions: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    videos: dict[str, bool] = field(default_factory=dict)  # path -> whether it is there; those at a URL are taken to be
    first: list[Record] = field(default_factory=list)

    @property
    def missing(self) -> list[str]:
        """The videos that are not there, in the order of the records."""
        return [video for video, there in self.videos.items() if not there]

    def watch(self, records: Iterable[Record], *, skip_missing: bool = False) -> Iterator[Record]:
        """Passes the records on while it counts them; with skip_missing only those whose video is there."""
        for record in records:
            self._count(record)
            if self.videos[record.video] or not skip_missing:
                yield record

    def _count(self, record: Record) -> None:
        self.records += 1
        self.splits[record.split or "none"] += 1
        self.captions += len(record.captions)
        self.alt_texts += record.alt_text is not None
        self.narratives += record.narrative is not None
        self.questions += len(record.questions)
        if record.label is not None:
            self.labels[record.label] += 1
        if record.video not in self.videos:
            self.videos[record.video] = is_url(record.video) or os.path.exists(file_path(record.video))
        self.absent += not self.videos[record.video]
        if len(self.first) < SHOWN:
            self.first.append(record)

    def counts(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "records": self.records,
            "records_without_video": self.absent,
            "splits": dict(self.splits),
            "captions": self.captions,
            "alt_texts": self.alt_texts,
            "narratives": self.narratives,
            "questions": self.questions,
            "classes": len(self.labels),
            "videos": len(self.videos),
            "missing": len(self.missing),
            "missing_first": self.missing[:SHOWN],
        }

    def describe(self) -> str:
        """The counts and the first records, as lines of text."""
        splits = ", ".join(f"{name} {count:,}" for name, count in self.splits.items())
        texts = [f"records     {self.records:,} ({splits})"]
        for name, count in (
            ("captions", self.captions),
            ("alt-texts", self.alt_texts),
            ("narratives", self.narratives),
            ("questions", self.questions),
            ("classes", len(self.labels)),
        ):
            texts += [f"{name:<11} {count:,}"] if count else []
        missing = self.missing
        texts.append(f"videos      {len(self.videos):,}, {len(missing):,} of them missing")
        texts += [f"  {video}" for video in missing[:SHOWN]]
        texts += ["  ..."] if len(missing) > SHOWN else []
        return "\n".join([*texts, *itertools.chain.from_iterable(map(_show, self.first))])


def _show(record: Record) -> list[str]:
    """A few lines on one record."""
    end = "end" if record.end_seconds is None else f"{record.end_seconds:g} s"
    found = ["", f"{record.key}: {record.video}, {record.start_seconds:g} s to {end}"]
    for name, values in (
        ("label", [record.label] if record.label else []),
        ("caption", list(record.captions)),
        ("alt-text", [record.alt_text] if record.alt_text else []),
        ("narrative", [record.narrative] if record.narrative else []),
        ("question", [_ask(question) for question in record.questions]),
    ):
        if values:
            more = f" (and {len(values) - 1} more)" if len(values) > 1 else ""
            text = values[0] if len(values[0]) <= 200 else values[0][:200] + "..."
            found.append(f"  {name}: {text}{more}")
    return found


def _ask(question: Question) -> str:
    choice = f" (of {', '.join(question.options)})" if question.options else ""
    return f"{question.question} -> {' / '.join(question.answers)}{choice}"
