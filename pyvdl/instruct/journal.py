"""What came of each request of a job, a line each, in a file that only grows: what was paid for is kept."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pyvdl.data import Family


@dataclass(kw_only=True)
class Spent:
    """What requests took."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unmetered: int = 0  # replies whose tokens the endpoint did not count

    def add(self, line: Line) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(line, field.name))

    def account(self, price_in: float | None = None, price_out: float | None = None) -> str:
        """In a sentence; with the cost, in the currency of the prices, which are for a million tokens."""
        text = f"{self.requests:,} requests, {self.prompt_tokens:,} tokens in, {self.completion_tokens:,} out"
        if self.unmetered:
            text += f" (the endpoint does not count those of {self.unmetered:,} replies)"
        if price_in is not None or price_out is not None:
            cost = (self.prompt_tokens * (price_in or 0) + self.completion_tokens * (price_out or 0)) / 1e6
            text += f", cost {cost:.2f}"
        return text


@dataclass(frozen=True, kw_only=True)
class Line:
    """One request, with its retries: a reply, or an error."""

    key: str
    family: Family
    prompt_sha256: str
    model: str  # as the endpoint names it
    seed: int
    reply: str | None
    error: str | None
    is_cut: bool  # the reply ran into its greatest length
    requests: int
    prompt_tokens: int
    completion_tokens: int
    unmetered: int


def job_folder(out: str | os.PathLike[str]) -> Path:
    """Where the journal of the job that writes `out` stands."""
    return Path(f"{os.fspath(out)}.job")


_NAMES = {field.name for field in dataclasses.fields(Line)}


class Journal:
    """The lines of a job, the newest of each record and family; one process at a time has it open.

    A line that a kill left half written is cut off at opening; one that is damaged otherwise counts in `damaged` and as
    not written.
    """

    def __init__(self, path: Path) -> None:
        self.lines: dict[tuple[str, Family], Line] = {}
        self.spent = Spent()
        self.damaged = 0
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{path.parent}: another process is at work on this job") from None
        self._read()

    @property
    def is_empty(self) -> bool:
        return not self.lines and not self.damaged

    def append(self, line: Line) -> None:
        """Writes a line out at once."""
        self._file.write(json.dumps(dataclasses.asdict(line), ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self._take(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _read(self) -> None:
        self._file.seek(0)
        whole = 0
        for text in self._file:
            if not text.endswith(b"\n"):
                self._file.truncate(whole)
                break
            whole += len(text)
            try:
                found = json.loads(text)
                if not isinstance(found, dict) or set(found) != _NAMES:
                    raise ValueError("another kind of line")
            except ValueError:
                self.damaged += 1
                continue
            self._take(Line(**found))

    def _take(self, line: Line) -> None:
        self.lines[line.key, line.family] = line
        self.spent.add(line)
