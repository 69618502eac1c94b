"""fit on a tiny model: freezing, logging, exact resume after a crash and after SIGTERM; the two losses."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from tensorboardX.proto import event_pb2

from pyvdl import kernels
from pyvdl.checkpoint import Checkpointer
from pyvdl.config import OptimConfig, TrainConfig
from pyvdl.flops import PEAK_FLOPS
from pyvdl.log import Log, sentence
from pyvdl.models.layers import Stack
from pyvdl.sharding import make_mesh, put_batch
from pyvdl.step import PairedLoss, begin, make_step, shapes, split
from pyvdl.train import History, _time_of, check_settings, contrastive_loss_fn, fit, vlm_loss

CONFIG = TrainConfig(
    steps=12,
    trainable=("vision",),
    optim=OptimConfig(peak_learning_rate=0.02, warmup_steps=3, b1=0.5, weight_decay=0.01),
    log_every=4,
    checkpoint_every=5,
)


class Tower(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = self.dropout(jnp.tanh(block(x)))
        return x


class Model(nnx.Module):
    """Two parts with the names of the VLM's, and dropout, whose random state must survive a restart too."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.vision = Tower(rngs=rngs)
        self.visionary = nnx.Linear(6, 6, rngs=rngs)  # shares letters with the prefix, not a path component
        self.language = nnx.Linear(6, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.language(self.visionary(self.vision(x)))


class Source:
    """Batches that follow from their number alone."""

    def __init__(self, length: int = 10**9) -> None:
        self.number, self.length = 0, length

    def __next__(self) -> dict[str, np.ndarray]:
        if self.number == self.length:
            raise StopIteration
        x = np.random.default_rng(self.number).normal(size=(8, 6)).astype(np.float32)
        self.number += 1
        return {"x": x, "y": np.tanh(x[:, :1] - x[:, 1:2]), "index": np.arange(8)}

    def get_state(self) -> dict[str, Any]:
        return {"number": self.number}

    def set_state(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


def square_loss(model: Model, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    error = model(batch["x"]) - batch["y"]
    return jnp.mean(error**2), {"mean_error": jnp.mean(error)}


def run(workdir: Path | None, config: TrainConfig = CONFIG, **arguments: Any) -> tuple[History, dict[str, Any]]:
    model = Model(rngs=nnx.Rngs(0))
    history = fit(model, square_loss, arguments.pop("source", Source()), config, workdir=workdir, progress=False)
    return history, params_of(model)


def params_of(model: nnx.Module) -> dict[str, Any]:
    found = jax.tree_util.tree_flatten_with_path(nnx.state(model, nnx.Param))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(value) for path, value in found}


def metric_steps(workdir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[History, dict[str, Any]]:
    return run(tmp_path_factory.mktemp("whole"))


def test_only_the_named_part_moves(uninterrupted: tuple[History, dict[str, Any]]) -> None:
    before, after = params_of(Model(rngs=nnx.Rngs(0))), uninterrupted[1]
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("vision/")}


def test_the_loss_falls_and_arrays_of_another_model_survive_donation() -> None:
    model = Model(rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    twin = nnx.merge(graph, state, copy=True)  # variables of its own, the same arrays
    config = dataclasses.replace(CONFIG, steps=200, trainable=("",), log_every=50)
    history = fit(model, square_loss, Source(), config, progress=False)
    assert history.losses[-20:].mean() < 0.7 * history.losses[:20].mean()
    assert list(history.steps) == list(range(1, 201))
    assert np.isfinite(np.asarray(twin(jnp.ones((1, 6))))).all()


def test_a_second_run_of_the_same_kind_compiles_nothing() -> None:
    traced = 0

    def counted(model: Model, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        nonlocal traced
        traced += 1
        return square_loss(model, batch)

    losses = []
    for steps, seed in ((12, 0), (12, 1), (13, 1)):  # the schedule is part of the step
        model = Model(rngs=nnx.Rngs(seed))
        losses.append(fit(model, counted, Source(), dataclasses.replace(CONFIG, steps=steps), progress=False).losses)
        assert traced == (1 if steps == 12 else 2)
    assert not np.array_equal(losses[0], losses[1])


def test_frozen_parts_have_no_optimizer_state(tmp_path: Path) -> None:
    run(tmp_path, dataclasses.replace(CONFIG, steps=1))
    found = {}
    with ocp.StandardCheckpointer() as reader:
        for item in ("model", "optimizer"):
            found[item] = set(reader.metadata((tmp_path / "checkpoints" / "1" / item).absolute()).item_metadata)
    assert any(".vision." in name for name in found["optimizer"])
    assert not any("language" in name or "visionary" in name for name in found["optimizer"])
    assert "language.kernel" in found["model"]
    assert "vision.blocks.0.kernel" in found["model"]


def test_unknown_prefix_names_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"'visio' names no parameter.*'language', 'vision', 'visionary'"):
        run(None, dataclasses.replace(CONFIG, trainable=("vision", "visio")))


def test_batches_that_end_early_are_an_error() -> None:
    with pytest.raises(ValueError, match="ended after 5 batches; 12 steps"):
        run(None, source=Source(length=5))


def broken_loss(model: Model, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    loss, scalars = square_loss(model, batch)
    return jnp.where(batch["x"][0, 0] == 0, jnp.nan, loss), scalars


class Poisoned(Source):
    """The third batch gives a loss that is not a number."""

    def __next__(self) -> dict[str, np.ndarray]:
        batch = super().__next__()
        if self.number == 3:
            batch["x"][0, 0] = 0
        return batch | {"index": np.arange(20) + 100 * self.number}


def test_non_finite_loss_stops_and_names_the_step_and_its_records() -> None:
    for name, told in ((str, "300, 301, 302"), ("clip {}".format, "clip 300, clip 301")):
        with pytest.raises(FloatingPointError, match=rf"step 3: loss nan.*\(records {told}"):
            fit(Model(rngs=nnx.Rngs(0)), broken_loss, Poisoned(), CONFIG, progress=False, key_of=name)


def test_a_run_goes_on_from_before_the_step_that_was_not_finite(
    uninterrupted: tuple[History, dict[str, Any]], tmp_path: Path
) -> None:
    model, told = Model(rngs=nnx.Rngs(0)), tmp_path / "nonfinite-3-0.json"
    for _ in range(2):  # the second time it is the first step
        with pytest.raises(FloatingPointError, match=f"all are in {told}, the state after step 2 is saved"):
            fit(model, broken_loss, Poisoned(), CONFIG, workdir=tmp_path, progress=False)
        assert json.loads(told.read_text())["records"] == [str(300 + i) for i in range(20)]
        assert metric_steps(tmp_path) == [2, 3]
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    before = params_of(model)
    twice = dataclasses.replace(CONFIG, steps=2)
    for name, value in run(None, twice)[1].items():
        np.testing.assert_allclose(before[name], value, rtol=1e-6, err_msg=name)
    history, params = run(tmp_path)
    np.testing.assert_allclose(history.losses, uninterrupted[0].losses, rtol=1e-6)
    for name, value in uninterrupted[1].items():
        np.testing.assert_allclose(params[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("log_every", [1, 4])
def test_non_finite_steps_are_left_out_and_counted(log_every: int, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, skip_nonfinite=True, log_every=log_every)
    model = Model(rngs=nnx.Rngs(0))
    history = fit(model, broken_loss, Poisoned(), config, workdir=tmp_path, progress=False)
    assert np.isnan(history.losses).tolist() == [step == 3 for step in range(1, 13)]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = next(line for line in lines if line["skipped"])
    assert sum(line["skipped"] for line in lines) == 1
    assert None in told["losses"]
    assert told["loss"] is None if log_every == 1 else math.isfinite(told["loss"])


def test_a_run_of_nothing_but_bad_steps_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvdl.log._MOST_SKIPPED", 3)

    def never(model: Model, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss, scalars = square_loss(model, batch)
        return loss * jnp.nan, scalars

    config = dataclasses.replace(CONFIG, skip_nonfinite=True)
    with pytest.raises(FloatingPointError, match=r"step 1: loss nan.*the state after step 4 is saved"):
        fit(Model(rngs=nnx.Rngs(0)), never, Source(), config, workdir=tmp_path, progress=False)
    assert metric_steps(tmp_path) == [4]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_parts_must_divide_over_the_devices() -> None:
    class Eight:
        shape: ClassVar[dict[str, int]] = {"data": 8, "fsdp": 1, "tensor": 1}
        size = 8

    config = dataclasses.replace(CONFIG, batch_size=16, accumulate=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyvdl.train.make_mesh", lambda fsdp, tensor: Eight())
        with pytest.raises(ValueError, match="batch_size=16 in accumulate=4 parts does not divide over the 8 shares"):
            fit(Model(rngs=nnx.Rngs(0)), square_loss, Source(), config, progress=False)


def test_scalars_of_parts_are_those_of_the_whole_batch() -> None:
    class Scores(nnx.Module):
        def __init__(self) -> None:
            self.vision = nnx.Param(jnp.eye(6))

        def __call__(self, video: Any, prompt: jax.Array, target: jax.Array) -> jax.Array:
            return jax.nn.one_hot(prompt, 6) @ self.vision[...]

    batch = {  # the first row, a part of its own, has one token and that right; the second three of which none is
        "prompt": jnp.array([[1, 1, 1], [2, 2, 2], [1, 1, 1], [3, 4, 5]]),
        "target": jnp.array([[1, 0, 0], [3, 4, 5], [1, 1, 1], [3, 4, 5]]),
        "ok": jnp.array([True, True, False, True]),
    }
    mesh = make_mesh()
    found = []
    for accumulate in (1, 2, 4):
        config = dataclasses.replace(CONFIG, batch_size=4, accumulate=accumulate)
        model = Scores()
        graph, *_ = split(model, config.trainable)
        with jax.set_mesh(mesh):
            *_, scalars = make_step(graph, vlm_loss, config, mesh)(*begin(model, config, mesh), batch)
        found.append({name: float(x) for name, x in scalars.items()})
    assert (found[0]["token_accuracy"], found[0]["failed_share"]) == (pytest.approx(4 / 7), 0.25)
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


class Layers(nnx.Module):
    def __init__(self) -> None:
        self.vision = Stack(lambda rngs: nnx.Linear(6, 6, rngs=rngs), 5, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("unroll", [None, True, False])
def test_layers_are_unrolled_as_the_settings_say(unroll: bool | None) -> None:
    def loss(model: Layers, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        return model.vision(batch["x"]).sum(), {}

    mesh, model, config = make_mesh(), Layers(), dataclasses.replace(CONFIG, unroll=unroll)
    graph, *_ = split(model, config.trainable)
    with jax.set_mesh(mesh):
        step = make_step(graph, loss, config, mesh)
        text = str(jax.make_jaxpr(step)(*begin(model, config, mesh), {"x": jnp.ones((2, 6))}))
    assert set(re.findall(r"unroll=(\d+)", text)) == {"5" if unroll else "1"}


def test_a_run_unrolls_as_its_settings_say() -> None:
    seen: list[bool | None] = []

    def loss(model: Layers, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        seen.append(model.vision.unroll)
        return model.vision(batch["x"]).mean(), {}

    for unroll in (True, False):
        fit(Layers(), loss, Source(), dataclasses.replace(CONFIG, steps=1, unroll=unroll), progress=False)
    assert list(dict.fromkeys(seen)) == [True, False]


def test_pairs_in_parts_give_the_gradients_of_the_whole_batch() -> None:
    """Of what embeds the rows, and of the number that multiplies their products."""

    class Pairs(nnx.Module):
        def __init__(self) -> None:
            self.matrix = nnx.Param(jnp.eye(6))
            self.scale = nnx.Param(jnp.asarray(2.0))

    def embed(model: Pairs, batch: dict[str, jax.Array]) -> tuple[Any, Any]:
        return (batch["x"] @ model.matrix[...], batch["y"]), model.scale[...]

    def compare(rows: Any, scale: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        scores = scale * rows[0] @ rows[1].T
        return jnp.mean(jax.nn.logsumexp(scores, axis=1) - jnp.diagonal(scores)), {}

    x, y = (jnp.asarray(np.random.default_rng(seed).normal(size=(8, 6)), jnp.float32) for seed in (0, 1))
    optim = OptimConfig(name="sgd", b1=0.0, peak_learning_rate=1.0, warmup_steps=0, schedule="constant", clip_norm=None)
    mesh, found = make_mesh(), []
    for accumulate in (1, 2, 4):
        config = TrainConfig(steps=1, batch_size=8, optim=optim, accumulate=accumulate)
        model = Pairs()
        graph, *_ = split(model, config.trainable)
        with jax.set_mesh(mesh):
            step = make_step(graph, PairedLoss(embed, compare), config, mesh)
            params, *_ = step(*begin(model, config, mesh), {"x": x, "y": y})
        found.append(params)
    assert abs(float(found[0].scale[...]) - 2) > 0.1
    for parts in found[1:]:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), parts, found[0])


class Many(nnx.Module):
    """Parameters that are 1, whose squares bfloat16 cannot add up: 1024 and 1 are 1024 there."""

    def __init__(self) -> None:
        self.vision = nnx.List([nnx.Param(jnp.ones((32, 32))), *(nnx.Param(jnp.ones(())) for _ in range(60))])


def told(model: Many, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    return jnp.mean(batch["x"]) * sum(x[...].sum().astype(jnp.float32) for x in model.vision), {}


@pytest.mark.parametrize(("name", "accumulate"), [("adamw", 1), ("adafactor", 2)])
def test_parameters_in_bfloat16_train_as_in_float32(name: Any, accumulate: int) -> None:
    optim = OptimConfig(name=name, peak_learning_rate=1.0, warmup_steps=0, schedule="constant", clip_norm=100, b2=0.999)
    mesh, found = make_mesh(), []
    for dtype in ("float32", "bfloat16"):
        config = TrainConfig(steps=9, batch_size=2, optim=optim, param_dtype=dtype, accumulate=accumulate)
        model, norms = Many(), []
        wanted = shapes(model, config)
        graph, *_ = split(model, config.trainable)
        step = jax.jit(make_step(graph, told, config, mesh))
        with jax.set_mesh(mesh):
            params, opt_state, rest, frozen = begin(model, config, mesh)
            for gradient in (1.0, 2.0**-7, 2.0**-7):
                for tree, known in ((params, wanted.params), (opt_state, wanted.opt_state)):
                    assert jax.tree.map(lambda x: x.dtype, tree) == jax.tree.map(lambda x: x.dtype, known)
                batch = {"x": jnp.full(2, gradient)}
                params, opt_state, rest, scalars = step(params, opt_state, rest, frozen, batch)
                norms.append(float(scalars["grad_norm"]))
        found.append((norms, opt_state, params))
    (norms, opt_state, params), half = found
    assert norms[0] == pytest.approx(math.sqrt(32 * 32 + 60))
    assert half[0] == pytest.approx(norms)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), half[1], opt_state)
    for x, y in zip(jax.tree.leaves(half[2]), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), y, rtol=1e-2)


def test_parts_of_a_batch_are_refused_where_a_model_has_random_state() -> None:
    config = dataclasses.replace(CONFIG, accumulate=2)
    with pytest.raises(ValueError, match="accumulate=2: a model with state beside its parameters"):
        fit(Model(rngs=nnx.Rngs(0)), square_loss, Source(), config, progress=False)


def test_a_profile_of_the_steps_asked_for_is_written(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, profile_steps=(2, 3))
    fit(Model(rngs=nnx.Rngs(0)), square_loss, Source(), config, workdir=tmp_path, progress=False)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    with pytest.raises(ValueError, match="profile_steps must be"):
        TrainConfig(profile_steps=(3, 2))


def test_metrics_have_every_log_step_once(uninterrupted: tuple[History, dict[str, Any]], tmp_path: Path) -> None:
    history, _ = run(tmp_path)
    assert metric_steps(tmp_path) == [4, 5, 8, 10, 12]
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[2])
    assert line["losses"] == [float(x) for x in history.losses[5:8]]
    assert line["loss"] == pytest.approx(np.mean(line["losses"]))
    assert {"grad_norm", "learning_rate", "steps_per_second", "clips_per_second", "wait_share", "mean_error"} <= set(
        line
    )
    assert line["clips_per_second"] == pytest.approx(8 * line["steps_per_second"])


def test_the_share_of_peak_is_told_where_the_peak_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, steps=4, log_every=2)

    def lines(name: str) -> list[dict[str, Any]]:
        fit(Model(rngs=nnx.Rngs(0)), square_loss, Source(), config, workdir=tmp_path / name, step_flops=100.0)
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    assert all("share_of_peak" not in line for line in lines("unknown"))
    monkeypatch.setitem(PEAK_FLOPS, jax.devices()[0].device_kind, 1e6)
    for line in lines("known"):
        assert line["share_of_peak"] == pytest.approx(100.0 * line["steps_per_second"] / 1e6)
        assert f"{line['share_of_peak']:.1%} of peak" in sentence(line)


def scalars_of(folder: Path) -> list[tuple[int, str, float]]:
    """TensorBoard's events: records with their length before, a checksum behind it and one behind the record."""
    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 16 + size
    return found


def test_tensorboard_gets_what_the_lines_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, tensorboard=True)
    history, _ = run(tmp_path, config)
    found = scalars_of(tmp_path / "tensorboard")
    losses = {step: value for step, name, value in found if name == "loss"}
    assert sorted(losses) == [4, 5, 8, 10, 12]
    assert losses[8] == pytest.approx(np.mean(history.losses[5:8]))
    assert {"grad_norm", "learning_rate", "clips_per_second", "wait_share", "mean_error"} <= {x[1] for x in found}
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'tensorboardX>=2\.6'"):
        run(tmp_path / "without", config)
    assert not (tmp_path / "without").exists()
    monkeypatch.setattr(jax, "process_index", lambda: 1)  # one that writes no events
    with pytest.raises(ImportError, match=r"pip install 'tensorboardX>=2\.6'"):
        check_settings(Model(rngs=nnx.Rngs(0)), config)


def test_a_damaged_history_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: expected .*losses.*delete the file"):
        run(tmp_path)


@pytest.mark.parametrize("at", [1, 5, 7])
def test_resume_gives_the_same_bits(at: int, uninterrupted: tuple[History, dict[str, Any]], tmp_path: Path) -> None:
    """The run ends after `at` batches by an error of its data; steps since the checkpoint are done again."""
    with pytest.raises(ValueError, match="ended after"):
        run(tmp_path, source=Source(length=at))
    torn = tmp_path / "metrics.jsonl"
    if torn.exists():
        torn.write_text(torn.read_text() + '{"step": 6, "lo')
    history, params = run(tmp_path)
    assert history.losses.tobytes() == uninterrupted[0].losses.tobytes()
    assert history.grad_norms.tobytes() == uninterrupted[0].grad_norms.tobytes()
    assert metric_steps(tmp_path) == [4, 5, 8, 10, 12]
    for name, value in uninterrupted[1].items():
        assert params[name].tobytes() == value.tobytes(), name


def test_an_old_history_stays_until_the_new_one_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run drops the lines after its checkpoint; what it keeps of them must outlast a power cut, too."""
    path = tmp_path / "metrics.jsonl"
    line = {"losses": [1.0], "grad_norms": [1.0], "seconds": 1.0, "wait_seconds": 0.0, "compile_seconds": 0.0}
    text = "".join(json.dumps(line | {"step": step}) + "\n" for step in (4, 5, 8))
    path.write_text(text)

    def fails(file: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=r"Input/output error: '.*metrics.jsonl'"):
        Log(CONFIG, tmp_path, 5, make_mesh(), step_flops=None, key_of=str)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [(path.name, text)]


def test_a_finished_run_is_not_run_again(uninterrupted: tuple[History, dict[str, Any]], tmp_path: Path) -> None:
    run(tmp_path)
    source = Source()
    history, params = run(tmp_path, source=source)
    assert source.number == 12  # the state of its data, nothing drawn
    assert history.losses.tobytes() == uninterrupted[0].losses.tobytes()
    assert all(np.array_equal(params[name], value) for name, value in uninterrupted[1].items())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    every = [loss for line in lines for loss in line["losses"]]
    losses = {step: np.mean(every[step - 4 : step]) for step in (5, 10, 12)}
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {10, 12, min(losses, key=lambda step: losses[step])}, "the newest two, and the best"


def test_checkpoints_compete_by_as_many_losses_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[float | None] = []
    save = Checkpointer.save

    def told(self: Checkpointer, *arguments: Any, loss: float | None) -> None:
        handed.append(loss)
        save(self, *arguments, loss=loss)

    monkeypatch.setattr(Checkpointer, "save", told)
    config = dataclasses.replace(CONFIG, checkpoint_every=3)
    history, _ = run(tmp_path, config)
    means = [float(np.mean(history.losses[step - 4 : step])) for step in (6, 9, 12)]
    assert handed == [None, *map(pytest.approx, means)]  # no four losses at step 3; lines at 4, 6, 8, 9


def test_another_run_in_the_same_workdir_is_refused(tmp_path: Path) -> None:
    run(tmp_path, dataclasses.replace(CONFIG, steps=2))
    with pytest.raises(ValueError, match="written by another run"):
        run(tmp_path, dataclasses.replace(CONFIG, trainable=("language",)))
    with pytest.raises(ValueError, match="already holds step 2"):
        run(tmp_path, dataclasses.replace(CONFIG, steps=1))


class Running:
    """What a step returns before it is done; when it is waited for, by the training's own thread, `events` are told."""

    def __init__(self, name: str, over: threading.Event, events: list[str]) -> None:
        self._name, self._over, self._events = name, over, events

    def is_ready(self) -> bool:
        return self._over.is_set()

    def block_until_ready(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._events.append(f"wait for {self._name}")
            self._over.set()
        self._over.wait()

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return np.ones((), np.float32)


def watched(
    monkeypatch: pytest.MonkeyPatch, over: threading.Event, source: Source, steps: int
) -> tuple[History, list[str]]:
    """A training whose steps compute nothing and last until `over` is set; and what happened, in its order."""
    events: list[str] = []

    def compiled(*_: Any) -> Any:
        numbers = itertools.count(1)

        def step(params: Any, opt_state: Any, rest: Any, _: Any, batch: dict[str, jax.Array], going: Any) -> Any:
            name = f"step {next(numbers)}"
            assert isinstance(batch["x"], jax.Array)
            events.append(name)
            over.clear()
            told = {"loss": Running(name, over, events), "grad_norm": np.ones(()), "finite": going}
            return params, opt_state, rest, told

        return step

    def put(*arguments: Any) -> Any:
        events.append("copy")
        return put_batch(*arguments)

    monkeypatch.setattr("pyvdl.train._compiled_step", compiled)
    monkeypatch.setattr("pyvdl.train.put_batch", put)
    return run(None, dataclasses.replace(CONFIG, steps=steps), source=source)[0], events


def test_the_next_batch_is_copied_while_a_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of a batch begins before anybody waits for the step before it; at most two steps are under way."""
    history, events = watched(monkeypatch, threading.Event(), Source(), 4)
    # The first step is waited for by itself: it compiles, and the clock begins after it.
    first = ["copy", "step 1", "copy", "wait for step 1"]
    second = ["step 2", "copy", "wait for step 1", "step 3", "copy", "wait for step 2"]
    assert events == [*first, *second, "step 4", "wait for step 3"]
    assert history.wait_seconds == 0


def test_waiting_counts_from_the_end_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    over, noticed = threading.Event(), threading.Event()

    def time_of(result: Any) -> float:
        told = _time_of(result)
        noticed.set()
        return told

    class Slow(Source):
        """The step is over, and that noticed, before the second half of a batch begins."""

        def __next__(self) -> dict[str, np.ndarray]:
            time.sleep(0.05)
            if self.number:  # else there is no step yet
                over.set()
                noticed.wait()
                noticed.clear()
            time.sleep(0.05)
            return super().__next__()

    monkeypatch.setattr("pyvdl.train._time_of", time_of)
    history, _ = watched(monkeypatch, over, Slow(), 5)  # of which three wait: the first is not timed, the last has none
    assert 3 * 0.05 <= history.wait_seconds <= history.seconds - 3 * 0.05


class Held(Source):
    """Gives its tenth batch when there is a file at `path`: no run of 12 steps ends before."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __next__(self) -> dict[str, np.ndarray]:
        while self.number == 9 and not self.path.exists():
            time.sleep(0.01)
        return super().__next__()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_same_command_goes_on_after_a_signal(
    how: signal.Signals, uninterrupted: tuple[History, dict[str, Any]], tmp_path: Path
) -> None:
    go_on = tmp_path / "go on"

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, __file__, str(tmp_path), str(go_on)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    process = start()
    waited = time.monotonic() + 90
    while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text():
        assert time.monotonic() < waited
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(how)
    go_on.touch()
    output, errors = process.communicate(timeout=60)
    assert "steps done" not in output
    if how == signal.SIGTERM:
        assert process.returncode == 0, errors
        steps = metric_steps(tmp_path)
        assert (tmp_path / "checkpoints" / str(steps[-1])).is_dir(), "SIGTERM saves the last step"
    else:
        assert process.returncode == -signal.SIGKILL
    process = start()
    output, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    assert np.frombuffer(bytes.fromhex(output.split()[-1]), np.float32).tobytes() == uninterrupted[0].losses.tobytes()
    steps = metric_steps(tmp_path)
    assert len(set(steps)) == len(steps)
    assert steps[-1] == 12


def test_four_devices_give_the_same_losses(uninterrupted: tuple[History, dict[str, Any]], tmp_path: Path) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, __file__, str(tmp_path)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout
    devices, losses = output.split()[-2:]
    assert devices == "4"
    np.testing.assert_allclose(np.frombuffer(bytes.fromhex(losses), np.float32), uninterrupted[0].losses, rtol=1e-5)


class Echo(nnx.Module):
    """A "VLM" whose logits are a table, and a "dual encoder" whose embeddings are given."""

    def __init__(self, value: np.ndarray, bias: float | None = None) -> None:
        self.value = nnx.Param(jnp.asarray(value))
        self.bias = bias

    def __call__(self, video: Any, *others: jax.Array) -> Any:
        if len(others) == 2:
            return self.value[...]
        rows = self.value[...] / jnp.linalg.norm(self.value[...], axis=-1, keepdims=True)
        bias = None if self.bias is None else jnp.float32(self.bias)
        return rows[video], rows[others[0]], jnp.float32(5.0), bias


def test_vlm_loss_averages_tokens_of_good_clips() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 4, 7)).astype(np.float32)
    target = np.array([[4, 5, 1, 0], [6, 1, 0, 0], [5, 5, 5, 1]], np.int32)
    batch = {
        "prompt": jnp.zeros((3, 1), jnp.int32),
        "target": jnp.asarray(target),
        "ok": jnp.array([True, True, False]),
    }
    loss, scalars = vlm_loss(Echo(logits), batch)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = [(0, 0, 4), (0, 1, 5), (0, 2, 1), (1, 0, 6), (1, 1, 1)]
    assert float(loss) == pytest.approx(-np.mean([logp[i] for i in picked]), rel=1e-5)
    assert float(scalars["token_accuracy"]) == pytest.approx(np.mean([logits[i[:2]].argmax() == i[2] for i in picked]))
    assert float(scalars["failed_share"]) == pytest.approx(1 / 3)
    gradient = jax.grad(lambda v: vlm_loss(Echo(v), batch)[0])(jnp.asarray(logits))
    assert not np.any(gradient[2])


def test_no_failed_clip_is_no_share_at_all() -> None:
    """1 - mean(ok) is -1e-7 for some sizes of a batch, and was told as "failed clips -0.0%"."""
    for size in (3, 48):
        ids = jnp.ones((size, 1), jnp.int32)
        for good in (True, False):
            batch = {"prompt": ids, "target": ids, "ok": jnp.full(size, good)}
            _, scalars = nnx.jit(vlm_loss)(Echo(np.zeros((size, 1, 3), np.float32)), batch)
            assert float(scalars["failed_share"]) == (not good)


def contrast(
    values: np.ndarray,
    video: list[int],
    text: list[int],
    ok: list[bool],
    group: list[int] | None,
    bias: float | None = None,
) -> Any:
    batch = {"video": jnp.array(video), "text": jnp.array(text), "ok": jnp.array(ok)}
    if group is not None:
        batch["group"] = jnp.array(group, jnp.int32)
    return jax.value_and_grad(lambda v: contrastive_loss_fn(Echo(v, bias), batch)[0])(jnp.asarray(values))


@pytest.mark.parametrize("bias", [None, -3.0], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("group", [None, [0, 1, 2, 0, 1, 5]])
def test_failed_clips_are_neither_positives_nor_negatives(group: list[int] | None, bias: float | None) -> None:
    """The loss and gradient with two failed clips equal those of the batch without these rows."""
    values = np.random.default_rng(1).normal(size=(12, 16)).astype(np.float32)
    keep = [0, 2, 3, 5]
    with_failed = contrast(values, list(range(6)), list(range(6, 12)), [i in keep for i in range(6)], group, bias)
    without = contrast(values, keep, [6 + i for i in keep], [True] * 4, group and [group[i] for i in keep], bias)
    assert float(with_failed[0]) == pytest.approx(float(without[0]), rel=1e-6)
    np.testing.assert_allclose(with_failed[1], without[1], atol=1e-7)
    whole = contrast(values, list(range(6)), list(range(6, 12)), [True] * 6, None, bias)
    rows = values / np.linalg.norm(values, axis=1, keepdims=True)
    kind = "softmax" if bias is None else "sigmoid"
    wanted = kernels.contrastive_loss(rows[:6], rows[6:], 5.0, bias, kind=kind)
    assert float(whole[0]) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("bias", [None, -3.0], ids=["softmax", "sigmoid"])
def test_a_batch_of_failed_clips_alone_teaches_nothing(bias: float | None) -> None:
    values = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    loss, gradient = contrast(values, [0, 1], [2, 3], [False, False], None, bias)
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert not np.any(gradient)


if __name__ == "__main__":
    done, _ = run(Path(sys.argv[1]), source=Held(Path(sys.argv[2])) if len(sys.argv) > 2 else Source())
    print("steps done", jax.device_count(), done.losses.tobytes().hex())


def test_clips_of_which_none_can_be_decoded_end_the_run() -> None:
    def none_ok(model: Model, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        return 0.0 * square_loss(model, batch)[0], {"failed_share": jnp.ones(())}

    with pytest.raises(RuntimeError, match="step 4: no clip of the last 4 steps could be decoded"):
        fit(Model(rngs=nnx.Rngs(0)), none_ok, Source(), CONFIG, progress=False)
