"""The training loop: freezing by part, logging, checkpoints and exact resume; and the two losses of the method."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from pyvdl.checkpoint import Checkpointer
from pyvdl.config import TrainConfig
from pyvdl.optim import make_optimizer, make_schedule
from pyvdl.progress import Progress
from pyvdl.sharding import BATCH_AXES, contrastive_loss, make_mesh, put, put_batch, replicated
from pyvdl.step import WEIGHT, Batch, LossFunction, PairedLoss, begin, make_step, placed, shapes, split
from pyvdl.text import PAD_ID

# What a later run reads of a line of metrics.jsonl.
_LINE_KEYS = frozenset({"step", "losses", "grad_norms", "seconds", "wait_seconds", "compile_seconds"})
_MOST_SKIPPED = 100  # steps in a row that are not finite, before a run that skips them stops too
_HOST_ONLY = frozenset({"index"})  # record numbers are int64 and no loss reads them


class BatchSource(Protocol):
    """What `fit` reads: `pyvdl.data.Batches`, or any iterator whose position can be saved."""

    def __next__(self) -> Mapping[str, np.ndarray]: ...

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the batch handed out last, as JSON can hold it."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a position that `get_state` returned."""


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


def fit(
    model: nnx.Module,
    loss_fn: LossFunction,
    batches: BatchSource,
    config: TrainConfig,
    *,
    workdir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    name: str = "train",
) -> History:
    """Trains `model` in place for `config.steps` steps and returns what happened.

    `loss_fn(model, batch)` returns the loss and a dict of scalars to log. Only parameters below the prefixes
    `config.trainable` (path components joined by "/") get gradients and optimizer state. With a `workdir` the run
    writes metrics.jsonl and checkpoints there, goes on from the newest checkpoint if there is one, and a SIGTERM makes
    it save and exit with status 0. Raises ValueError when a prefix names no parameter or `batches` ends early,
    FloatingPointError when the loss or the gradient is no longer finite (it names the step and its records; the newest
    checkpoint is of before), RuntimeError when not one clip of a whole log interval could be used (the loss reports
    `failed_share`).
    """
    check_settings(model, config)
    mesh = make_mesh(config.fsdp, config.tensor)
    rows = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if config.batch_size // config.accumulate % rows:
        raise ValueError(
            f"batch_size={config.batch_size} in accumulate={config.accumulate} parts does not divide over the {rows} "
            f"shares of {mesh.size} devices: change these, or set a larger tensor"
        )
    graph, *_ = split(model, config.trainable)
    # Of the settings only those that the program depends on: other runs then find it compiled.
    kept = TrainConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        optim=config.optim,
        accumulate=config.accumulate,
        skip_nonfinite=config.skip_nonfinite,
    )
    train_step = _compiled_step(graph, loss_fn, kept, mesh)

    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        checkpointer = stop = profiler = None
        first = 0
        if workdir is not None:
            checkpointer = stack.enter_context(Checkpointer(workdir, config.keep_checkpoints))
            first = checkpointer.latest_step or 0
            if first > config.steps:
                raise ValueError(f"steps={config.steps}: {checkpointer.directory} already holds step {first}")
        if checkpointer is not None and first:
            template = placed(shapes(model, config), mesh)
            rest = jax.tree.map(lambda x: put(x, replicated(mesh)), split(model, config.trainable)[3])
            wanted = nnx.merge_state(template.params, template.frozen, rest)
            checkpointer.check(first, wanted, template.opt_state)
            nnx.update(model, nnx.merge_state(template.params, template.frozen))  # lets go of the arrays it had
            restored, opt_state, data_state = checkpointer.restore(first, wanted, template.opt_state)
            nnx.update(model, restored)
            _, params, frozen, rest = split(model, config.trainable)
            batches.set_state(data_state)
        else:
            params, opt_state, rest, frozen = begin(model, config, mesh)
        stack.callback(lambda: nnx.update(model, nnx.merge_state(params, frozen, rest)))
        if workdir is not None:
            stop = stack.enter_context(_StopRequest())
            if config.profile_steps:
                profiler = _Profiler(Path(workdir) / "profile", *config.profile_steps)
                stack.callback(profiler.close)
        log = _Log(config, workdir, first)
        bar = stack.enter_context(
            Progress(name, config.steps, done=first, enabled=progress and jax.process_index() == 0)
        )
        source = _Ahead(batches, mesh, config.steps - first)
        previous: jax.Array | None = None
        for step, (batch, data_state, index) in enumerate(source, first + 1):
            if profiler is not None:
                profiler.before(step)
            params, opt_state, rest, scalars = train_step(params, opt_state, rest, frozen, batch)
            log.add(scalars, index)
            if profiler is not None:
                profiler.after(step, scalars["loss"])
            source.pull(scalars["loss"])
            if previous is None:
                log.begin_clock(scalars["loss"])
                source.wait_seconds = 0.0
            else:
                previous.block_until_ready()  # at most two steps in flight: the host must not queue batches without end
            previous = scalars["loss"]
            bar.advance()
            stopping = stop is not None and stop.reached(step)
            saving = checkpointer is not None and (
                stopping or step == config.steps or step % config.checkpoint_every == 0
            )
            if saving or step == config.steps or step % config.log_every == 0:
                bar.note(log.write(step, source.take_wait_seconds(), source.rows))
            if saving and checkpointer is not None:
                checkpointer.save(step, nnx.merge_state(params, frozen, rest), opt_state, data_state)
            if stopping and checkpointer is not None:
                checkpointer.wait()
                bar.note(f"stopped by SIGTERM, saved step {step}")
                raise SystemExit(0)
        if checkpointer is not None:
            checkpointer.wait()
    return log.history()


def check_settings(model: nnx.Module, config: TrainConfig) -> None:
    """Raises ValueError for settings that `fit` could not run this model with."""
    split(model, config.trainable)
    make_optimizer(config.optim, config.steps)


def vlm_loss(model: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Negative log-likelihood of the target tokens given video and prompt (paper, Eq. 1), averaged over tokens.

    batch: video uint8[B, T, H, W, 3] (absent: text only), prompt int32[B, L], target int32[B, M], ok bool[B]. Padding
    and clips that are not ok have weight 0.
    """
    target, ok = batch["target"], batch["ok"]
    logits = model(batch.get("video"), batch["prompt"], target)
    weights = ((target != PAD_ID) & ok[:, None]).astype(jnp.float32)
    tokens = weights.sum()
    count = jnp.maximum(tokens, 1.0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), target)
    correct = (jnp.argmax(logits, axis=-1) == target) * weights
    scalars = {"token_accuracy": correct.sum() / count, "failed_share": _failed_share(ok), WEIGHT: tokens}
    return (losses * weights).sum() / count, scalars


def _embed_pairs(model: Any, batch: Batch) -> tuple[Any, Any]:
    video, text, scale, bias = model(batch["video"], batch["text"])
    return (video, text), (scale, bias)


def _compare_pairs(rows: Any, numbers: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    (video, text), (scale, bias), ok = rows, numbers, batch["ok"]
    groups = batch.get("group", jnp.arange(len(ok), dtype=jnp.int32))
    video, text, groups = _set_aside(video, text, groups, ok)
    share = jnp.mean(ok, dtype=jnp.float32)
    kind = "softmax" if bias is None else "sigmoid"
    loss = contrastive_loss(video, text, scale, bias, kind=kind, groups=groups)
    if bias is not None:
        loss -= (1 - share) * nnx.softplus(-bias)  # of a row set aside with itself: the logit is the bias
    loss = loss / jnp.maximum(share, 1.0 / len(ok))  # the kernel's mean counts the rows set aside, each with loss 0
    return loss, {"scale": scale, "failed_share": _failed_share(ok)}


# Contrastive loss of a dual encoder, softmax or sigmoid as it is made, averaged over the clips that are ok.
#
# batch: video uint8[B, T, H, W, 3], text int32[B, L], ok bool[B], optional group int32[B] of 0 or more (clips of one
# group are no negatives of each other). A clip that is not ok is neither a positive nor a negative: see `_set_aside`.
contrastive_loss_fn = PairedLoss(_embed_pairs, _compare_pairs)


def _failed_share(ok: jax.Array) -> jax.Array:
    """Share of bool[B] that is False: exactly 0 for none, where a mean over many clips can miss 1 by its rounding."""
    return jnp.where(ok.all(), 0.0, 1.0 - jnp.mean(ok, dtype=jnp.float32))


def _set_aside(
    video: jax.Array, text: jax.Array, groups: jax.Array, ok: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Makes rows that are not ok invisible to a contrastive loss, shapes unchanged but for two columns.

    The two columns give an ok row and a bad row the logit -1024 * scale, whose exponential is 0, and leave the logits
    of ok rows as they are. Bad rows lose their content, share one group, and so have only themselves: the softmax of
    one is no loss.
    video, text float[B, E] -> [B, E + 2] each.
    """
    far = 32.0
    video, text = jnp.where(ok[:, None], video, 0.0), jnp.where(ok[:, None], text, 0.0)
    bad, good = jnp.where(ok, 0.0, -far), jnp.where(ok, far, 0.0)
    video = jnp.concatenate([video, jnp.stack([good, bad], axis=1).astype(video.dtype)], axis=1)
    text = jnp.concatenate([text, jnp.stack([bad, good], axis=1).astype(text.dtype)], axis=1)
    return video, text, jnp.where(ok, groups, -1)


@functools.lru_cache(maxsize=1)  # runs of one kind after another, as of the dual encoders, compile once
def _compiled_step(graph: Any, loss_fn: LossFunction, config: TrainConfig, mesh: Mesh) -> Any:
    return jax.jit(make_step(graph, loss_fn, config, mesh), donate_argnums=(0, 1))


class _Ahead:
    """Hands out `count` batches as device arrays with the data state after each and the numbers of its records, if they
    are told; the next is copied while one is used."""

    def __init__(self, batches: BatchSource, mesh: Mesh, count: int) -> None:
        self.wait_seconds = 0.0
        self.rows = 0
        self._batches, self._mesh, self._count = batches, mesh, count
        self._taken = 0
        self._next: tuple[Batch, dict[str, Any], Any] | None = None

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, Any], Any]]:
        self.pull(None)
        while self._next is not None:
            item, self._next = self._next, None
            yield item

    def pull(self, running: jax.Array | None) -> None:
        """Fetches the next batch while the step whose result is `running` computes.

        Time spent here counts as waiting only if that step was over before the batch had come.
        """
        if self._taken == self._count:
            return
        begin = time.perf_counter()
        try:
            batch = next(self._batches)
        except StopIteration:
            raise ValueError(f"batches ended after {self._taken} batches; {self._count} steps were to do") from None
        if running is not None and running.is_ready():  # type: ignore[attr-defined]
            self.wait_seconds += time.perf_counter() - begin
        self._taken += 1
        arrays = {key: value for key, value in batch.items() if key not in _HOST_ONLY}
        self.rows = len(next(iter(arrays.values()))) * jax.process_count()
        self._next = put_batch(arrays, self._mesh), self._batches.get_state(), batch.get("index")

    def take_wait_seconds(self) -> float:
        """Returns the waiting time since the last call."""
        result, self.wait_seconds = self.wait_seconds, 0.0
        return result


class _Log:
    """Keeps each step's scalars on the device until a line of metrics.jsonl is due."""

    def __init__(self, config: TrainConfig, workdir: str | os.PathLike[str] | None, first: int) -> None:
        self._schedule = make_schedule(config.optim, config.steps)
        self._path: Path | None = None
        self._lines: list[dict[str, Any]] = []  # of the runs before and of this one
        self._pending: list[dict[str, jax.Array]] = []
        self._records: list[Any] = []  # of the pending steps
        self._skip = config.skip_nonfinite
        self._bad_in_a_row = 0
        self._timed_steps = 0
        self._compile_seconds = 0.0
        self._start = self._created = time.perf_counter()
        if workdir is not None:
            path = Path(workdir) / "metrics.jsonl"
            self._lines = _read_lines(path, first)
            if jax.process_index() == 0:
                self._path = path
                _replace_lines(path, self._lines)

    def add(self, scalars: dict[str, jax.Array], index: Any) -> None:
        self._pending.append(scalars)
        self._records.append(index)
        self._timed_steps += 1

    def begin_clock(self, loss: jax.Array) -> None:
        """Waits for the first step of this process and leaves it out of the rates."""
        loss.block_until_ready()
        self._start = time.perf_counter()
        self._compile_seconds = self._start - self._created
        self._timed_steps = 0

    def write(self, step: int, wait_seconds: float, rows: int) -> str:
        """Fetches the scalars since the last line, writes them and returns a sentence for the eye."""
        fetched = jax.device_get(self._pending)
        self._pending = []
        now = time.perf_counter()
        elapsed, self._start = now - self._start, now
        records, self._records = self._records, []
        losses = [float(scalars["loss"]) for scalars in fetched]
        norms = [float(scalars["grad_norm"]) for scalars in fetched]
        good = [math.isfinite(loss) and math.isfinite(norm) for loss, norm in zip(losses, norms)]
        skipped = len(good) - sum(good)
        for is_good in good:
            self._bad_in_a_row = 0 if is_good else self._bad_in_a_row + 1
        if skipped and (not self._skip or self._bad_in_a_row >= _MOST_SKIPPED):
            i = good.index(False)
            of = "" if records[i] is None else f" (records {', '.join(map(str, records[i][:16]))})"
            at = step - len(losses) + 1 + i
            raise FloatingPointError(
                f"step {at}: loss {losses[i]}, gradient norm {norms[i]}: expected finite numbers{of}"
            )
        failed_share = float(np.mean([scalars.get("failed_share", 0.0) for scalars in fetched]))
        if failed_share == 1.0:
            raise RuntimeError(
                f"step {step}: no clip of the last {len(fetched)} steps could be decoded; see the warnings"
            )
        rate = self._timed_steps / elapsed if self._timed_steps else None
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
            "wait_share": wait_seconds / elapsed,
            "seconds": before["seconds"] + elapsed,
            "wait_seconds": before["wait_seconds"] + wait_seconds,
            "compile_seconds": before["compile_seconds"] + self._compile_seconds,
            "skipped": skipped,
            "losses": [loss if is_good else None for loss, is_good in zip(losses, good)],
            "grad_norms": [norm if is_good else None for norm, is_good in zip(norms, good)],
        }
        self._compile_seconds = 0.0
        self._lines.append(line)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())  # a checkpoint must never be ahead of the metrics
        speed = f"  {line['clips_per_second']:.1f} clips/s" if rate else ""
        failed = f"  failed clips {failed_share:.1%}" if failed_share else ""
        failed += f"  skipped steps {skipped}" if skipped else ""
        if not any(good):
            return f"no step was finite{speed}{failed}"
        return (
            f"loss {line['loss']:.4f}  grad {line['grad_norm']:.3g}  lr {line['learning_rate']:.3g}{speed}"
            f"  wait {line['wait_share']:.1%}{failed}"
        )

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


def _replace_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not lines and not path.exists():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(temporary, path)


class _Profiler:
    """Profiles the steps from `first` to `last` into `folder`, for TensorBoard or xprof."""

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self._folder, self._first, self._last = folder, first, last
        self._running = False

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, loss: jax.Array) -> None:
        if step == self._last:
            loss.block_until_ready()
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


class _StopRequest:
    """Within the context a SIGTERM is noticed. Signals are the main thread's: elsewhere nothing is installed.

    Several processes must stop after the same step, whichever of them is told first: there JAX's own distributed
    runtime takes the signal and agrees on the step.
    """

    def __init__(self) -> None:
        self._requested = False
        self._together = jax.process_count() > 1
        self._installed = threading.current_thread() is threading.main_thread() and not self._together

    def reached(self, step: int) -> bool:
        """Whether to stop after this step."""
        if self._together:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def __enter__(self) -> Self:
        if self._installed:
            self._before = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._before)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
