"""Walks the imports of the tree and holds them against the direction of dependency."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each module of pyvdl must never import, directly or through another of our modules.
FORBIDDEN = {
    "pyvdl.video": {"jax", "flax"},
    "pyvdl.sources": {"jax", "flax", "pyvdl.video"},
    "pyvdl.metrics": {"jax", "flax", "pyvdl"},
    "pyvdl.text": {"jax", "flax", "pyvdl"},
    "pyvdl.config": {"jax", "flax", "pyvdl"},
    "pyvdl.overrides": {"jax", "flax"},
    "pyvdl.hlo": {"jax", "flax", "pyvdl"},
    "pyvdl.plan": {"jax", "flax"},  # the process that it starts has an environment of its own
    "pyvdl.kernels": {"flax", "pyvdl.models", "pyvdl.train", "pyvdl.data", "pyvdl.video", "pyvdl.config"},
    "pyvdl.models": {"pyvdl.data", "pyvdl.train", "pyvdl.video", "pyvdl.caption", "pyvdl.evaluate"},
    "pyvdl.generate": {"pyvdl.data", "pyvdl.train", "pyvdl.video"},
    "pyvdl.filters": {"pyvdl.data", "pyvdl.train", "pyvdl.video", "pyvdl.caption", "pyvdl.evaluate"},
    "pyvdl.archives": {"jax", "flax", "pyvdl.train", "pyvdl.models", "pyvdl.caption"},
    "pyvdl.arrays": {"jax", "flax", "pyvdl.train", "pyvdl.models", "pyvdl.caption", "pyvdl.cache"},
    "pyvdl.cache": {"pyvdl.train", "pyvdl.evaluate", "pyvdl.recipes"},
    "pyvdl.datasets": {"jax", "flax", "pyvdl.train", "pyvdl.models", "pyvdl.caption", "pyvdl.evaluate"},
    "pyvdl.storage": {"jax", "flax", "pyvdl.video", "pyvdl.data"},
    "pyvdl.rows": {"jax", "flax", "pyvdl.video", "pyvdl.data"},
    "pyvdl.columns": {"jax", "flax"},
    "pyvdl.manifests": {"jax", "flax"},
    "pyvdl.shots": {"jax", "flax"},
    "pyvdl.jobs": {"jax", "flax"},
    "pyvdl.exports": {"jax", "flax"},
    "pyvdl.page": {"jax", "flax", "pyvdl.video", "pyvdl.data"},
    "pyvdl.embed": {"pyvdl.pipeline", "pyvdl.train", "pyvdl.evaluate"},
    "pyvdl.pipeline": {"pyvdl.cluster"},
    "pyvdl.decoder_child": {"jax", "flax", "pyvdl.data"},
    "pyvdl.decoder_process": {"jax", "flax", "pyvdl.data"},
    "pyvdl.data": {"pyvdl.train", "pyvdl.models", "pyvdl.caption", "pyvdl.evaluate"},
    "pyvdl.benchmarks": {"jax", "flax", "pyvdl"},
    "pyvdl.evaluate": {"pyvdl.train", "pyvdl.recipes", "pyvdl.instruct"},
    "pyvdl.instruct": {"pyvdl.train", "pyvdl.evaluate", "pyvdl.recipes"},
    "pyvdl.ablate.steps": {"jax", "flax", "pyvdl.data"},
    "pyvdl.ablate.grids": {"jax", "flax", "pyvdl.data"},  # the command line lists them
    "pyvdl.starts": {"pyvdl.recipes", "pyvdl.caption", "pyvdl.evaluate"},
    "pyvdl.clock": {"jax", "flax", "pyvdl.data"},
    "pyvdl.log": {"pyvdl.data", "pyvdl.models", "pyvdl.train", "pyvdl.video"},
    "pyvdl.train": {"pyvdl.caption", "pyvdl.evaluate", "pyvdl.instruct", "pyvdl.demo"},
}
TOP = {"pyvdl.demo", "pyvdl.__main__"}  # nobody below may import these


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "pyvdl").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[0] == "kernels":
            parts = ["pyvdl", *parts]
        if parts[-1] == "__init__":
            parts.pop()
        found[".".join(parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Modules that `name` imports, in functions too; `from package import module` counts as both."""
    result: set[str] = set()
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            result.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, base]) if base else ".".join(anchor)
            result.add(base)
            result.update(f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in MODULES)
    return result


def reachable(name: str) -> set[str]:
    """Everything `name` imports through modules of ours; the lazy root package is not followed."""
    seen: set[str] = set()
    queue = [name]
    while queue:
        for target in imports(queue.pop()):
            if target not in seen:
                seen.add(target)
                if target in MODULES and target != "pyvdl":
                    queue.append(target)
    return seen


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_follow_the_direction_of_dependency(name: str) -> None:
    for room, forbidden in FORBIDDEN.items():
        if not within(name, room):
            continue
        for target in reachable(name):
            for bad in forbidden:
                assert within(target, room) or not within(target, bad), f"{name} must not import {target}"


@pytest.mark.parametrize("name", sorted(set(MODULES) - TOP))
def test_nothing_imports_the_top(name: str) -> None:
    assert not imports(name) & TOP


def test_only_video_imports_the_extension() -> None:
    users = {name for name in MODULES if any(target.startswith("pyvdl._core") for target in imports(name))}
    assert users <= {"pyvdl.video"}


def test_kernels_import_jax_only() -> None:
    allowed = {"jax", "numpy"} | sys.stdlib_module_names
    for name in MODULES:
        if within(name, "pyvdl.kernels"):
            foreign = {
                t
                for t in imports(name)
                if t.split(".")[0] not in allowed and not within(t, "pyvdl.kernels") and t != "pyvdl"
            }
            assert not foreign, f"{name} imports {foreign}"
