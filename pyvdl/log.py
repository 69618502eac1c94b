"""What a training run tells of itself: a line each log interval, in metrics.jsonl, and for TensorBoard on request."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from pyvdl.config import TrainConfig
from pyvdl.flops import PEAK_FLOPS
from pyvdl.optim import make_schedule
from pyvdl.storage import write_whole

# What a later run reads of a line of metrics.jsonl.
_LINE_KEYS = frozenset({"step", "losses", "grad_norms", "seconds", "wait_seconds", "compile_seconds"})
_MOST_SKIPPED = 100  # steps in a row that are not finite, before a run that skips them stops too


@dataclasses.dataclass
class History:
    """What a run did, earlier runs that it resumed included. Times leave out the first step (compilation) of each."""

    steps: np.ndarray  # int64[N], counted from 1
    losses: np.ndarray  # float32[N]
    grad_norms: np.ndarray  # float32[N]
    seconds: float
    wait_seconds: float  # of `seconds`, in which the device had nothing to do because the next batch was not there
    compile_seconds: float

    @property
    def wait_share(self) -> float:
        """Share of the time in which the model waited for data."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is not finite."""

    def __init__(self, message: str, done: int) -> None:
        super().__init__(message)
        self.done = done  # steps whose state the run is left with


class Log:
    """Keeps each step's scalars on the device until a line of metrics.jsonl, and of TensorBoard's events, is due."""

    def __init__(
        self,
        config: TrainConfig,
        workdir: str | os.PathLike[str] | None,
        first: int,
        mesh: Mesh,
        *,
        step_flops: float | None,
        key_of: Callable[[int], str],
    ) -> None:
        """`first` steps are done already; else as `pyvdl.train.fit`."""
        peak = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
        self._share_of_one_a_second = step_flops and peak and step_flops / (peak * mesh.size)
        self._key_of = key_of
        self._schedule = make_schedule(config.optim, config.steps)
        self._folder = None if workdir is None else Path(workdir)
        self._path: Path | None = None
        self._events: Any = None
        self._lines: list[dict[str, Any]] = []  # of the runs before and of this one
        self._pending: list[tuple[dict[str, jax.Array], jax.Array]] = []
        self._records: list[Any] = []  # of the pending steps
        self._skip = config.skip_nonfinite
        self._log_every = config.log_every
        self._bad_in_a_row = 0
        self._timed_steps = 0
        self._compile_seconds = 0.0
        self._start = self._created = time.perf_counter()
        if workdir is not None:
            path = Path(workdir) / "metrics.jsonl"
            self._lines = _read_lines(path, first)
            if jax.process_index() == 0:
                self._path = path
                path.parent.mkdir(parents=True, exist_ok=True)
                if self._lines or path.exists():
                    write_whole(path, (json.dumps(line) + "\n" for line in self._lines))
                if config.tensorboard:
                    self._events = _events(Path(workdir) / "tensorboard", first)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._events is not None:
            self._events.close()

    def add(self, scalars: dict[str, jax.Array], finite: jax.Array, index: Any) -> None:
        """The scalars of a step, whether the state moved on, and the numbers of its records, if they are told."""
        self._pending.append((scalars, finite))
        self._records.append(index)
        self._timed_steps += 1

    def begin_clock(self, loss: jax.Array) -> None:
        """Waits for the first step of this process and leaves it out of the rates."""
        loss.block_until_ready()
        self._start = time.perf_counter()
        self._compile_seconds = self._start - self._created
        self._timed_steps = 0

    def write(self, step: int, wait_seconds: float, rows: int) -> dict[str, Any]:
        """Fetches the scalars since the last line, and returns the line that it writes of them.

        Raises NonFiniteError, with what is fetched written, where a step was not finite and is not to be skipped.
        """
        pending, self._pending = jax.device_get(self._pending), []
        fetched, good = [scalars for scalars, _ in pending], [bool(finite) for _, finite in pending]
        now = time.perf_counter()
        elapsed, self._start = now - self._start, now
        records, self._records = self._records, []
        if not self._skip and not all(good):
            bad = good.index(False)  # those after it changed nothing
            done = step - len(good) + bad
            if bad:
                self._write(done, fetched[:bad], good[:bad], elapsed, wait_seconds, rows)
            self._write(done + 1, fetched[bad : bad + 1], [False], 0.0, 0.0, rows)
            raise self._non_finite(done + 1, fetched[bad], records[bad], done)
        failed_share = float(np.mean([scalars.get("failed_share", 0.0) for scalars in fetched]))
        if failed_share == 1.0:
            raise RuntimeError(
                f"step {step}: no clip of the last {len(fetched)} steps could be decoded; see the warnings"
            )
        line = self._write(step, fetched, good, elapsed, wait_seconds, rows)
        for is_good in good:
            self._bad_in_a_row = 0 if is_good else self._bad_in_a_row + 1
        if self._bad_in_a_row >= _MOST_SKIPPED:
            bad = good.index(False)
            raise self._non_finite(step - len(good) + 1 + bad, fetched[bad], records[bad], step)
        return line

    def _non_finite(self, step: int, scalars: dict[str, Any], index: Any, done: int) -> NonFiniteError:
        """What is told of a step: all its records in a file, the first ones in the error."""
        keys = [] if index is None else [self._key_of(int(number)) for number in index]
        told = {"step": step, "loss": f"{scalars['loss']:g}", "grad_norm": f"{scalars['grad_norm']:g}"}
        of = f" (records {', '.join(keys[:16])})" if keys else ""
        where = ""
        if self._folder is not None:
            path = self._folder / f"nonfinite-{step}-{jax.process_index()}.json"
            write_whole(path, [json.dumps(told | {"records": keys}, indent=1)])
            where = f"; all are in {path}" + (f", the state after step {done} is saved" if done else "")
        return NonFiniteError(
            f"step {step}: loss {told['loss']}, gradient norm {told['grad_norm']}: expected finite numbers{of}{where}",
            done,
        )

    def _write(
        self,
        step: int,
        fetched: list[dict[str, Any]],
        good: list[bool],
        elapsed: float,
        wait_seconds: float,
        rows: int,
    ) -> dict[str, Any]:
        losses = [float(scalars["loss"]) for scalars in fetched]
        norms = [float(scalars["grad_norm"]) for scalars in fetched]
        rate = self._timed_steps / elapsed if self._timed_steps and elapsed else None
        self._timed_steps = 0
        before = self._lines[-1] if self._lines else {"seconds": 0.0, "wait_seconds": 0.0, "compile_seconds": 0.0}
        line: dict[str, Any] = {
            "step": step,
            **{
                key: float(np.mean([scalars[key] for scalars, is_good in zip(fetched, good) if is_good]))
                if any(good)
                else None
                for key in sorted(fetched[0])
            },
            "learning_rate": float(self._schedule(step - 1)),
            "steps_per_second": rate,
            "clips_per_second": rate and rate * rows,
            "wait_share": wait_seconds / elapsed if elapsed else 0.0,
            "seconds": before["seconds"] + elapsed,
            "wait_seconds": before["wait_seconds"] + wait_seconds,
            "compile_seconds": before["compile_seconds"] + self._compile_seconds,
            "skipped": good.count(False),
            "losses": [loss if is_good else None for loss, is_good in zip(losses, good)],
            "grad_norms": [norm if is_good else None for norm, is_good in zip(norms, good)],
        }
        if rate and self._share_of_one_a_second:
            line["share_of_peak"] = rate * self._share_of_one_a_second
        self._compile_seconds = 0.0
        self._lines.append(line)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())  # a checkpoint must never be ahead of the metrics
        if self._events is not None:
            for name, value in line.items():
                if isinstance(value, float) and name not in _LINE_KEYS:
                    self._events.add_scalar(name, value, step)
            self._events.flush()
        return line

    def recent_loss(self) -> float | None:
        """Mean of the newest `log_every` finite losses, those of earlier runs too; None before there are as many."""
        losses = (loss for line in reversed(self._lines) for loss in reversed(line["losses"]) if loss is not None)
        newest = list(itertools.islice(losses, self._log_every))
        return float(np.mean(newest)) if len(newest) == self._log_every else None

    def history(self) -> History:
        steps = [line["step"] - len(line["losses"]) + 1 + i for line in self._lines for i in range(len(line["losses"]))]
        last = self._lines[-1] if self._lines else {"seconds": 0.0, "wait_seconds": 0.0, "compile_seconds": 0.0}
        return History(
            steps=np.array(steps, np.int64),
            losses=np.array([loss for line in self._lines for loss in line["losses"]], np.float32),
            grad_norms=np.array([norm for line in self._lines for norm in line["grad_norms"]], np.float32),
            seconds=last["seconds"],
            wait_seconds=last["wait_seconds"],
            compile_seconds=last["compile_seconds"],
        )


def _read_lines(path: Path, last_step: int) -> list[dict[str, Any]]:
    """The lines of the file at `path` but for those after `last_step`, whose steps are about to be done again."""
    if not path.exists():
        return []
    kept: list[dict[str, Any]] = []
    texts = path.read_text(encoding="utf-8").splitlines()
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            if number == len(texts):
                break  # cut short by a crash
            line = None
        if not isinstance(line, dict) or not line.keys() >= _LINE_KEYS:
            raise ValueError(
                f"{path}:{number}: expected one JSON object with {', '.join(sorted(_LINE_KEYS))}; "
                "delete the file to go on without this history"
            )
        if line["step"] <= last_step:
            kept.append(line)
    return kept


def sentence(line: dict[str, Any]) -> str:
    """A line for the eye."""
    parts = ["no step was finite"]
    if line["loss"] is not None:
        parts = [f"loss {line['loss']:.4f}", f"grad {line['grad_norm']:.3g}", f"lr {line['learning_rate']:.3g}"]
    if line["clips_per_second"]:
        parts.append(f"{line['clips_per_second']:.1f} clips/s")
    if "share_of_peak" in line:
        parts.append(f"{line['share_of_peak']:.1%} of peak")
    parts.append(f"wait {line['wait_share']:.1%}")
    if line.get("failed_share"):
        parts.append(f"failed clips {line['failed_share']:.1%}")
    if line["skipped"]:
        parts.append(f"skipped steps {line['skipped']}")
    return "  ".join(parts)


def _events(folder: Path, first: int) -> Any:
    """The writer of TensorBoard's events; those after step `first` are about to be written again."""
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first + 1)
