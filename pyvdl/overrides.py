"""Settings changed by `path.to.field=value`, as the command line has them."""

from __future__ import annotations

import ast
import dataclasses
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pyvdl.config import CaptionConfig, DualEncoderConfig, TrainConfig, VLMConfig


def override[T](config: T, assignments: Iterable[str]) -> T:
    """Returns `config` with `path.to.field=value` assignments applied, all at once: their order does not matter.

    Values are read as Python literals and fall back to plain strings. Raises ValueError naming the unknown field and
    the fields there are, or the value and what is wanted.
    """
    changes: dict[str, Any] = {}  # nested as the settings are
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(f"override {assignment!r} has no '='; write path.to.field=value")
        _read(config, path.strip(), text.strip(), changes)
    return _changed(config, changes, "")


@dataclass(frozen=True, kw_only=True)
class _NewModel:
    """Gives the settings of a model the name they have in assignments."""

    model: Any


def override_training[R: (TrainConfig, CaptionConfig), M: (VLMConfig, DualEncoderConfig)](
    config: R, model: M, assignments: Iterable[str]
) -> tuple[R, M]:
    """Applies the assignments of a run: those of `model.path.to.field` to a new model, the others to the run."""
    changes = list(assignments)
    for change in changes:
        name = change.partition("=")[0].strip()
        if name in ("clip.num_frames", "clip.size") or (name == "clip.fps" and isinstance(model, VLMConfig)):
            raise ValueError(f"{name} follows from the model: set it there when a new one is made (model....)")
    run = override(config, [change for change in changes if not change.startswith("model.")])
    made = override(_NewModel(model=model), [change for change in changes if change.startswith("model.")])
    return run, made.model


def _read(config: Any, path: str, text: str, changes: dict[str, Any]) -> None:
    """Puts the value of one assignment where it belongs in `changes`."""
    *groups, name = path.split(".")
    for group in groups:
        _check_known(config, group, path)
        config = getattr(config, group)
        if not dataclasses.is_dataclass(config):
            raise ValueError(f"unknown setting {path!r}: {group!r} has no fields of its own")
        changes = changes.setdefault(group, {})
    _check_known(config, name, path)
    if dataclasses.is_dataclass(getattr(config, name)):
        raise ValueError(f"{path!r} is a group of settings; set one of its fields")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    hint = typing.get_type_hints(type(config))[name]
    if not _fits(value, hint):
        wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise ValueError(f"{path} must be {wanted}, not {text!r}")
    changes[name] = float(value) if hint is float else value


def _check_known(config: Any, name: str, path: str) -> None:
    fields = {f.name for f in dataclasses.fields(config)}
    if name not in fields:
        raise ValueError(f"unknown setting {path!r}: {type(config).__name__} has {', '.join(sorted(fields))}")


def _changed(config: Any, changes: dict[str, Any], path: str) -> Any:
    """`config` with nested `changes`; what a group refuses is told with the path to the group."""
    values = {
        name: _changed(getattr(config, name), value, f"{path}{name}.") if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    try:
        return dataclasses.replace(config, **values)
    except ValueError as error:
        raise ValueError(f"{path}{error}") from None


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the annotated type; a whole number fits where a float is wanted."""
    arguments = typing.get_args(hint)
    match typing.get_origin(hint):
        case typing.Literal:
            return value in arguments
        case types.UnionType:
            return any(_fits(value, argument) for argument in arguments)
        case origin if origin is tuple:
            kinds = arguments[:1] * len(value) if arguments[1:] == (...,) and isinstance(value, tuple) else arguments
            return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint
