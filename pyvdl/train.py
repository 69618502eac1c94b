"""The training loop: freezing by part, logging, checkpoints and exact resume; and the two losses of the method."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
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
from pyvdl.log import History, Log, NonFiniteError, sentence
from pyvdl.optim import make_optimizer
from pyvdl.progress import Progress
from pyvdl.sharding import (
    BATCH_AXES,
    contrastive_loss,
    make_mesh,
    put,
    put_batch,
    replicated,
    shares_of_a_process,
)
from pyvdl.step import (
    FAILED_SHARE,
    FINITE,
    WEIGHT,
    Batch,
    LossFunction,
    PairedLoss,
    State,
    begin,
    make_step,
    placed,
    shapes,
    split,
)
from pyvdl.text import PAD_ID

_HOST_ONLY = frozenset({"index"})  # record numbers are int64 and no loss reads them


class BatchSource(Protocol):
    """What `fit` reads: `pyvdl.data.Batches`, or any iterator whose position can be saved."""

    def __next__(self) -> Mapping[str, np.ndarray]: ...

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the batch handed out last, as JSON can hold it."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a position that `get_state` returned."""


def fit(
    model: nnx.Module,
    loss_fn: LossFunction,
    batches: BatchSource,
    config: TrainConfig,
    *,
    workdir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    name: str = "train",
    step_flops: float | None = None,
    key_of: Callable[[int], str] = str,
) -> History:
    """Trains `model` in place for `config.steps` steps and returns what happened.

    `loss_fn(model, batch)` returns the loss and a dict of scalars to log. Only parameters below the prefixes
    `config.trainable` (path components joined by "/") get gradients and optimizer state. With a `workdir` the run
    writes metrics.jsonl and checkpoints there, goes on from the newest checkpoint if there is one, and a SIGTERM makes
    it save and exit with status 0. `step_flops` are the operations that the model needs for a step: with them the share
    of the devices' peak is told where it is known. `key_of` names a record by its number in `batches`.

    Raises ValueError when a prefix names no parameter or `batches` ends early, FloatingPointError when the loss or the
    gradient is no longer finite (it names the step and its records; the state before it is that of `model`, and saved),
    RuntimeError when not one clip of a whole log interval could be used (the loss reports `failed_share`).
    """
    check_settings(model, config)
    mesh = make_mesh(config.fsdp, config.tensor)
    graph, *_ = split(model, config.trainable)
    # Of the settings only those that the program depends on: other runs then find it compiled.
    kept = TrainConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        optim=config.optim,
        accumulate=config.accumulate,
        unroll=config.unroll,
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
            params, opt_state, rest, frozen = _resumed(checkpointer, first, model, batches, config, mesh)
        else:
            params, opt_state, rest, frozen = begin(model, config, mesh)
        stack.callback(lambda: nnx.update(model, nnx.merge_state(params, frozen, rest)))
        if workdir is not None:
            stop = stack.enter_context(_StopRequest())
            if config.profile_steps:
                profiler = _Profiler(Path(workdir) / "profile", *config.profile_steps)
                stack.callback(profiler.close)
        log = stack.enter_context(Log(config, workdir, first, mesh, step_flops=step_flops, key_of=key_of))
        bar = stack.enter_context(
            Progress(name, config.steps, done=first, enabled=progress and jax.process_index() == 0)
        )
        source = _Ahead(batches, mesh, config.steps - first, stack.enter_context(ThreadPoolExecutor(1)))
        previous: jax.Array | None = None
        going = put(jnp.array(True), replicated(mesh))
        data_states: dict[int, dict[str, Any]] = {}  # after the steps since the last line, and at that
        for step, (batch, data_state, index) in enumerate(source, first + 1):
            if profiler is not None:
                profiler.before(step)
            params, opt_state, rest, scalars = train_step(params, opt_state, rest, frozen, batch, going)
            going = scalars.pop(FINITE)
            log.add(scalars, going, index)
            data_states[step] = data_state
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
                try:
                    line = log.write(step, source.take_wait_seconds(), source.rows)
                except NonFiniteError as error:
                    done = error.done
                    if checkpointer is not None and done in data_states and done != checkpointer.latest_step:
                        state = nnx.merge_state(params, frozen, rest)
                        checkpointer.save(done, state, opt_state, data_states[done], loss=log.recent_loss())
                    raise
                bar.note(sentence(line))
                data_states = {step: data_state}
            if saving and checkpointer is not None:
                model_state = nnx.merge_state(params, frozen, rest)
                checkpointer.save(step, model_state, opt_state, data_state, loss=log.recent_loss())
            if stopping and checkpointer is not None:
                checkpointer.wait()
                bar.note(f"stopped by SIGTERM, saved step {step}")
                raise SystemExit(0)
        if checkpointer is not None:
            checkpointer.wait()
    return log.history()


def _resumed(
    checkpointer: Checkpointer, step: int, model: nnx.Module, batches: BatchSource, config: TrainConfig, mesh: Mesh
) -> State:
    """The state after `step`, whose arrays are those of `model` from then on; `batches` goes on from there."""
    template = placed(shapes(model, config), mesh)
    rest = jax.tree.map(lambda x: put(x, replicated(mesh)), split(model, config.trainable)[3])
    wanted = nnx.merge_state(template.params, template.frozen, rest)
    checkpointer.check(step, wanted, template.opt_state)
    nnx.update(model, nnx.merge_state(template.params, template.frozen))  # lets go of the arrays it had
    restored, opt_state, data_state = checkpointer.restore(step, wanted, template.opt_state)
    nnx.update(model, restored)
    _, params, frozen, rest = split(model, config.trainable)
    batches.set_state(data_state)
    return State(params, opt_state, rest, frozen)


def check_settings(model: nnx.Module, config: TrainConfig) -> None:
    """Raises ValueError for settings that `fit` could not run this model with on the devices there are.

    ImportError where what they need is not installed: in every process, though process 0 alone writes the events. The
    others would wait for it.
    """
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ImportError("tensorboard=True needs the package: pip install 'tensorboardX>=2.6'")
    split(model, config.trainable)
    make_optimizer(config.optim, config.steps)
    mesh = make_mesh(config.fsdp, config.tensor)
    rows = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if config.batch_size // config.accumulate % rows:
        raise ValueError(
            f"batch_size={config.batch_size} in accumulate={config.accumulate} parts does not divide over the {rows} "
            f"shares of {mesh.size} devices: change these, or set a larger tensor"
        )
    shares_of_a_process(mesh)


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
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    correct = (jnp.argmax(logits, axis=-1) == target) * weights
    scalars = {"token_accuracy": correct.sum() / count, FAILED_SHARE: _failed_share(ok), WEIGHT: tokens}
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
    return loss, {"scale": scale, FAILED_SHARE: _failed_share(ok)}


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

    def __init__(self, batches: BatchSource, mesh: Mesh, count: int, watch: Executor) -> None:
        self.wait_seconds = 0.0
        self._watch = watch
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

        Of the time spent here only that after the end of that step counts as waiting.
        """
        if self._taken == self._count:
            return
        begin = time.perf_counter()
        over = None if running is None else self._watch.submit(_time_of, running)
        try:
            batch = next(self._batches)
        except StopIteration:
            raise ValueError(f"batches ended after {self._taken} batches; {self._count} steps were to do") from None
        end = time.perf_counter()
        if running is not None and over is not None and running.is_ready():  # type: ignore[attr-defined]
            self.wait_seconds += max(0.0, end - max(begin, over.result()))
        self._taken += 1
        arrays = {key: value for key, value in batch.items() if key not in _HOST_ONLY}
        self.rows = len(next(iter(arrays.values()))) * jax.process_count()
        self._next = put_batch(arrays, self._mesh), self._batches.get_state(), batch.get("index")

    def take_wait_seconds(self) -> float:
        """Returns the waiting time since the last call."""
        result, self.wait_seconds = self.wait_seconds, 0.0
        return result


def _time_of(result: jax.Array) -> float:
    """When it was there."""
    result.block_until_ready()
    return time.perf_counter()


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
