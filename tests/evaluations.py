"""`pyvdl evaluate` in this process, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyvdl.__main__ import main

Run = Callable[..., tuple[int, str, str]]


def runner(capsys: pytest.CaptureFixture[str]) -> Run:
    """What runs the command with the words given; returns its exit code, stdout and stderr."""

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["evaluate", *map(str, argv)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def scores_of(path: Path) -> dict[str, float]:
    """The values of a score file of one test."""
    (result,) = json.loads(path.read_text())["results"]
    return {name: score["value"] for name, score in result["scores"].items()}
