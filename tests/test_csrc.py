"""Builds the C++ tests and runs them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.clips import write_clip
from tests.soak.seeds import write_corpus, write_seeds

ROOT = Path(__file__).resolve().parents[1]


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture(scope="module")
def programs() -> Path:
    """The folder of the C++ programs, built with every [] of the standard library checked."""
    build = ROOT / "build" / "tests"
    configure = [
        tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        "-DPYVDL_BUILD_MODULE=OFF", "-DPYVDL_BUILD_TESTS=ON", "-DCMAKE_BUILD_TYPE=Debug",
    ]  # fmt: skip
    for command in (configure, [tool("cmake"), "--build", str(build)]):
        run(command)
    return build


def run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("name", ["core", "convert"])
def test_program(programs: Path, name: str) -> None:
    assert "\n0 failures" in "\n" + run([str(programs / f"test_{name}")])


def test_a_file_that_cannot_be_read_is_no_damaged_one(programs: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"clip.{suffix}" for suffix in ("mp4", "mkv", "ts")]
    frames = list(np.random.default_rng(0).integers(0, 256, (30, 120, 160, 3), dtype=np.uint8))  # noise: many bytes
    for file in files:
        write_clip(file, frames=frames)
    assert "\n0 failures" in "\n" + run([str(programs / "test_reading"), *map(str, files)])


def test_damaged_files_do_no_harm(programs: Path, tmp_path: Path) -> None:
    """A moment of what `make soak` does at length and under sanitizers."""
    seeds, corpus = tmp_path / "seeds", tmp_path / "corpus"
    seeds.mkdir()
    corpus.mkdir()
    write_seeds(seeds)
    write_corpus(seeds, corpus)
    flags = ["-max_total_time=5", "-seed=1", f"-artifact_prefix={tmp_path}/"]
    output = run([str(programs / "pyvdl_fuzz"), *flags, str(corpus)])
    count = re.search(r"executed_units: (\d+)", output)
    assert count is not None, output
    assert int(count[1]) > 20, output
