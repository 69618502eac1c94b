"""Builds the C++ tests and runs them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture(scope="module")
def programs() -> Path:
    build = ROOT / "build" / "tests"
    configure = [
        tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        "-DPYVDL_BUILD_MODULE=OFF", "-DPYVDL_BUILD_TESTS=ON", "-DCMAKE_BUILD_TYPE=Debug",
    ]  # fmt: skip
    for command in (configure, [tool("cmake"), "--build", str(build)]):
        result = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert result.returncode == 0, result.stdout + result.stderr
    return build


@pytest.mark.parametrize("name", ["core", "convert"])
def test_program(programs: Path, name: str) -> None:
    result = subprocess.run([programs / f"test_{name}"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "\n0 failures" in "\n" + result.stdout
