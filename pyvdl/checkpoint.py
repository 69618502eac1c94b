"""Checkpoints of a training run and saved models, both through Orbax.

Every tree is written as a flat dict from a dotted name ("vision.blocks.kernel") to an array, so that what lies on disk
depends on the names of a model's parts and not on the classes of the library that held them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import typing
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import jax
import orbax.checkpoint as ocp
import orbax.checkpoint.checkpoint_managers as policies
from flax import nnx
from jax.experimental import multihost_utils

import pyvdl
from pyvdl.config import DualEncoderConfig, VLMConfig
from pyvdl.models.dual_encoder import DualEncoder
from pyvdl.models.vlm import VLM
from pyvdl.models.weights import Place, load_pretrained
from pyvdl.storage import sync_folder
from pyvdl.tokenizers import Tokenizer, load_tokenizer

type ParamDtype = Literal["float32", "bfloat16"]

_REMEDY = "run what saved the model again, or name another model"
_CONFIGS: dict[str, type] = {"VLMConfig": VLMConfig, "DualEncoderConfig": DualEncoderConfig}


class Checkpointer:
    """Saves the state of a training run under `workdir`/checkpoints/STEP: keeps the newest `keep`, and the best.

    The best is the one with the lowest loss. Saving is asynchronous: `save` returns when the arrays are on the host. A
    checkpoint gets its final name only when it is whole, so one that a crash cut short is never restored.
    """

    def __init__(self, workdir: str | os.PathLike[str], keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: expected 1 or more checkpoints")
        self.directory = Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False),
                    ]
                ),
                best_fn=_loss,
                best_mode="min",
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,
            ),
            item_handlers={
                "model": ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
            },
        )

    @property
    def latest_step(self) -> int | None:
        """Steps done at the newest whole checkpoint, None when there is none. Waits for one being written."""
        self.wait()
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Steps done at the whole checkpoint of the lowest loss, None when there is none. Waits as `latest_step`."""
        self.wait()
        return self._manager.best_step()

    def save(
        self, step: int, model_state: Any, opt_state: Any, data_state: dict[str, Any], *, loss: float | None = None
    ) -> None:
        """Begins to write a checkpoint, never the best without a loss; `data_state` must be what JSON can hold."""
        self._manager.save(
            step,
            metrics=None if loss is None else {"loss": loss},
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(_flatten(model_state)),
                optimizer=ocp.args.StandardSave(_flatten(opt_state)),
                data=ocp.args.JsonSave(data_state),
            ),
        )

    def check(self, step: int, model_state: Any, opt_state: Any) -> None:
        """Raises ValueError when the checkpoint of `step` was written by a run of another shape; see `restore`."""
        found = self._manager.item_metadata(step)
        for name, wanted in (("model", model_state), ("optimizer", opt_state)):
            _check_same_names(f"{self.directory / str(step)}, {name}", found[name], _abstract(wanted))

    def restore(self, step: int, model_state: Any, opt_state: Any) -> tuple[Any, Any, dict[str, Any]]:
        """Returns (model_state, opt_state, data_state) after `step`, a whole checkpoint that `check` does not refuse.

        The arguments are templates: trees of arrays, or of their shapes, with the types and shardings wanted. Arrays
        are read straight to where they stand: the run that wrote them may have had another mesh.
        """
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardRestore(_abstract(model_state)),
                optimizer=ocp.args.StandardRestore(_abstract(opt_state)),
                data=ocp.args.JsonRestore(),
            ),
        )
        return _unflatten(restored.model, model_state), _unflatten(restored.optimizer, opt_state), restored.data

    def restore_model(self, step: int, model_state: Any) -> Any:
        """Returns the model's part of what `restore` does."""
        restored = self._manager.restore(
            step, args=ocp.args.Composite(model=ocp.args.StandardRestore(_abstract(model_state)))
        )
        return _unflatten(restored.model, model_state)

    def wait(self) -> None:
        """Returns when every checkpoint begun is whole on disk; raises what its writing raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the writer's threads."""
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _loss(metrics: Any) -> float:
    return metrics["loss"]


def save_model(
    path: str | os.PathLike[str], model: nnx.Module, config: VLMConfig | DualEncoderConfig, tokenizer: Tokenizer
) -> None:
    """Writes a directory with config.json, the tokenizer and the parameters; it appears whole or not at all.

    A directory already at `path` is replaced after the new one is complete. Where there are several processes, all call
    this, with the same path on a file system that they share.
    """
    if type(config).__name__ not in _CONFIGS:
        raise ValueError(f"config is a {type(config).__name__}: expected one of {', '.join(_CONFIGS)}")
    if any(str(leaf.dtype) == "int8" for leaf in jax.tree.leaves(nnx.state(model))):
        raise ValueError("int8 weights cannot be saved: save the model before `quantize`")
    target = Path(path).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.new")  # the same one for all processes
    first = jax.process_index() == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    try:
        if first:
            description = {
                "pyvdl": pyvdl.__version__,
                "class": type(config).__name__,
                "config": _to_dict(config),
            }
            (temporary / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            tokenizer.save(temporary)
        _meet(f"begin {target}")
        with ocp.StandardCheckpointer() as writer:
            writer.save(temporary / "params", _flatten(nnx.state(model)))
        if first:
            sync_folder(temporary)
            _replace_directory(temporary, target)
        _meet(f"end {target}")
    except BaseException:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _meet(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def load_model(
    path: str | os.PathLike[str], *, param_dtype: ParamDtype = "float32", place: Place | None = None
) -> tuple[VLM | DualEncoder, Tokenizer]:
    """Reads what `save_model` wrote, or a public checkpoint with its tokenizer beside it: see `load_weights`.

    Raises ValueError naming what the directory lacks, or a tokenizer with more ids than the model knows.
    """
    source = Path(path).absolute()
    saved = not is_public(source)
    if saved and not (source / "tokenizer.json").exists() and not (source / "tokenizer_frame.json").exists():
        raise ValueError(f"{source} is not a saved model: it has no tokenizer.json")
    model = load_weights(source, param_dtype=param_dtype, place=place)
    kind = "paligemma" if isinstance(model, VLM) else "clip" if model.config.kind == "softmax" else "siglip"
    tokenizer = load_tokenizer(source if source.is_dir() else source.parent, None if saved else kind)
    known = model.config.language.vocab_size if isinstance(model, VLM) else model.config.text.vocab_size
    if tokenizer.vocab_size > known:
        raise ValueError(f"{source}: the tokenizer has {tokenizer.vocab_size} ids, the model knows {known}")
    return model, tokenizer


def is_public(path: str | os.PathLike[str]) -> bool:
    """Whether it is, if anything, a public checkpoint: not what `save_model` wrote."""
    return not (Path(path) / "params").exists()


def load_weights(
    path: str | os.PathLike[str], *, param_dtype: ParamDtype = "float32", place: Place | None = None
) -> VLM | DualEncoder:
    """The model alone, of a folder that `save_model` wrote or of a public checkpoint (see `load_pretrained`).

    Parameters are stored in `param_dtype` and stand where `place` says, by their names and shapes, from the start: no
    device ever holds more than its part. Without `place` all are on the default device.
    A public one computes in float32 on a CPU, which only emulates bfloat16, and in bfloat16 elsewhere.
    """
    source = Path(path).absolute()
    if not source.exists():
        raise ValueError(f"{source} is not there: name a saved model or a public checkpoint")
    if is_public(source):
        if source.is_dir() and not list(source.glob("*.safetensors")):
            if (source / "model" / "params").exists():
                raise ValueError(f"{source} is the folder of a run: its model is {source / 'model'}")
            raise ValueError(f"{source} is not a saved model: it has no params, nor safetensors of a public checkpoint")
        dtype: ParamDtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        model = load_pretrained(source, dtype=dtype, param_dtype=param_dtype, place=place)
        if not isinstance(model, VLM | DualEncoder):
            raise ValueError(f"{source} holds a language model alone: a model of videos is wanted")
        return model
    config = load_config(source)
    make = VLM if isinstance(config, VLMConfig) else DualEncoder
    graph, state = nnx.split(nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0))))  # type: ignore[arg-type]
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, param_dtype, sharding=place(name, x.shape) if place else x.sharding)
        for name, x in _abstract(state).items()
    }
    with ocp.StandardCheckpointer() as reader:
        try:
            restored = reader.restore(source / "params", wanted)
        except Exception as error:  # Orbax lets through whatever its parts raise, plain Exceptions too
            first = str(error).strip().partition("\n")[0][:200]
            raise ValueError(f"{source / 'params'} cannot be read ({first}): {_REMEDY}") from error
    return nnx.merge(graph, _unflatten(restored, state))


def load_config(path: str | os.PathLike[str]) -> VLMConfig | DualEncoderConfig:
    """Reads only the settings of a saved model."""
    source = Path(path) / "config.json"
    if not source.exists():
        raise ValueError(f"{source.parent} is not a saved model: it has no config.json")
    try:
        found = json.loads(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{source} is damaged, it is not JSON ({error}): {_REMEDY}") from None
    name = found.get("class") if isinstance(found, dict) else None
    kind = _CONFIGS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"{source}: expected an object whose class is one of {', '.join(_CONFIGS)}; {_REMEDY}")
    return _from_dict(kind, found.get("config"), str(source))


def _to_dict(config: Any) -> dict[str, Any]:
    """The settings; those of a group that can be of several classes name theirs."""
    hints = typing.get_type_hints(type(config))
    result = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            named = {"class": type(value).__name__} if len(_kinds(hints[field.name])) > 1 else {}
            value = named | _to_dict(value)
        result[field.name] = value
    return result


def _kinds(hint: Any) -> list[Any]:
    """The classes of settings that a field with this annotation can hold."""
    return [
        kind for kind in typing.get_args(hint) or (hint,) if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    ]


def _group_from_dict(kinds: list[Any], values: Any, where: str) -> Any:
    """Reads a group of settings. One that names no class is of the first: T5, once the only language model."""
    if len(kinds) == 1 or not isinstance(values, dict) or "class" not in values:
        return _from_dict(kinds[0], values, where)
    name = values["class"]
    for kind in kinds:
        if kind.__name__ == name:
            return _from_dict(kind, {key: value for key, value in values.items() if key != "class"}, where)
    raise ValueError(f"{where}: class {name!r} is none of {', '.join(kind.__name__ for kind in kinds)}; {_REMEDY}")


def _from_dict(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where} is damaged, it has no settings of a {kind.__name__}: {_REMEDY}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(
            f"{where}: unknown settings {', '.join(unknown)}; {kind.__name__} has {', '.join(sorted(hints))}"
        )
    read = {
        name: _group_from_dict(kinds, value, where)
        if (kinds := _kinds(hints[name]))
        else tuple(value)  # which JSON calls a list
        if isinstance(value, list)
        else value
        for name, value in values.items()
    }
    try:
        return kind(**read)
    except (TypeError, ValueError) as error:  # a text where a number should be, a number out of range
        raise ValueError(f"{where} is damaged ({error}): {_REMEDY}") from None


def _replace_directory(temporary: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed here
    with contextlib.suppress(FileNotFoundError):
        target.rename(aside)
    temporary.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def _flatten(tree: Any) -> dict[str, Any]:
    """Returns dotted name -> array; random keys become their data, which is what Orbax can write."""
    result = {}
    for path, value in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = _name(path)
        if name in result:
            raise ValueError(f"two arrays of the state share the name {name!r}")
        result[name] = _key_data(value)
    return result


def _unflatten(values: dict[str, Any], like: Any) -> Any:
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    leaves = []
    for path, wanted in paths:
        value = values[_name(path)]
        if _is_key(wanted):
            value = jax.random.wrap_key_data(value, impl=str(jax.random.key_impl(wanted)))
        leaves.append(value)
    return jax.tree_util.tree_unflatten(structure, leaves)


def _abstract(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes, types and shardings to restore; arrays without a sharding go to the default device."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def describe(value: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(value, "sharding", None) or here
        if _is_key(value):  # its data has one axis more, which no device shares with another
            value = jax.eval_shape(jax.random.key_data, value)
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    return {_name(path): describe(value) for path, value in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _check_same_names(where: str, found: Any, wanted: dict[str, Any]) -> None:
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or extra:
        raise ValueError(
            f"{where}: written by another run; it lacks {missing[:3]} and has {extra[:3]} too much. "
            "Use the model and settings it was started with, or another workdir"
        )
    for name, value in wanted.items():
        has, wants = (tuple(found[name].shape), found[name].dtype), (tuple(value.shape), value.dtype)
        if has != wants:
            raise ValueError(f"{where}: {name} is {has[1]}{list(has[0])}, the model wants {wants[1]}{list(wants[0])}")


def _name(path: tuple[Any, ...]) -> str:
    if isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]  # an nnx.Variable's own content
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_key(value: Any) -> bool:
    return jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)


def _key_data(value: Any) -> Any:
    return jax.random.key_data(value) if _is_key(value) else value
