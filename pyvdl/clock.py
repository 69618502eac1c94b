"""Seconds of a long work's parts, over all its starts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyvdl.storage import write_whole


class Clock:
    """Seconds spent in each phase, those of a start that was stopped included; says on stderr what begins."""

    def __init__(self, path: Path) -> None:
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        self._path = path
        self._before = sum(self.seconds.values())
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str, says: str) -> Iterator[None]:
        print(f"[{self.total:5.0f} s] {says}", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
            write_whole(self._path, [json.dumps(self.seconds)])

    @property
    def total(self) -> float:
        return self._before + time.perf_counter() - self._start
