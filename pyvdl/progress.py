"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_LINE_SECONDS = 15.0  # between plain lines that nobody asked for


class Progress:
    """Shows how many of `total` units of the work `name` are done; writes to stderr.

    On a terminal one bar moves. Elsewhere `note` prints a line and `advance` prints one now and then. `enabled=False`
    shows nothing.
    """

    def __init__(self, name: str, total: int, *, done: int = 0, enabled: bool = True) -> None:
        self.name, self.total, self.done = name, total, done
        self._enabled = enabled
        self._last_line_time = time.monotonic()
        self._bar: Bar | None = None
        if enabled and sys.stderr.isatty():
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(name, total=total, completed=done, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Counts `count` more units as done; shows `note` beside the count when it shows that."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
            if note:
                self._bar.update(self._task, note=note)
        elif self._enabled and time.monotonic() - self._last_line_time > _LINE_SECONDS:
            self.note(note)

    def note(self, text: str) -> None:
        """Shows `text` beside the count."""
        if self._bar is not None:
            self._bar.update(self._task, note=text)
        elif self._enabled:
            self._last_line_time = time.monotonic()
            print(f"{self.name} {self.done}/{self.total}  {text}".rstrip(), file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class Report(Protocol):
    """What `reporting` gives."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@contextmanager
def reporting(name: str, enabled: bool = True) -> Iterator[Report]:
    """A function to call with (done, total); the bar starts at its first call and again when the total changes."""
    bar: Progress | None = None

    def report(done: int, total: int, note: str = "") -> None:
        nonlocal bar
        if bar is None or bar.total != total or done < bar.done:
            if bar is not None:
                bar.__exit__(None, None, None)
            bar = Progress(name, total, enabled=enabled)
            bar.__enter__()
        bar.advance(done - bar.done, note)

    try:
        yield report
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)
