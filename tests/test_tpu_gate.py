"""Simulated cycles of the TPU kernels at the main shapes stay where they were recorded. No TPU is needed.

After a change that is meant to change them: `python -m bench.tpu_aot --record`.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from bench.common import ROOT
from bench.tpu_aot import GATE, GATE_CHIP, RECORD, Case, run_case
from bench.tpu_static import libtpu_version

TOLERANCE = 0.05
REFRESH = "python -m bench.tpu_aot --record"
RECORDED: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))


def test_installed_libtpu_is_the_pinned_one() -> None:
    """With another one the gate is skipped, which must not pass unnoticed."""
    pinned = re.search(r"^libtpu==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    assert libtpu_version() == pinned.group(1)


def test_record_names_programs_of_the_gate_only() -> None:
    assert RECORDED["chip"] == GATE_CHIP
    assert set(RECORDED["cycles"]) <= {case.name for case in GATE}


@pytest.mark.parametrize("case", GATE, ids=lambda case: case.name)
def test_simulated_cycles_are_those_of_the_record(case: Case) -> None:
    libtpu = libtpu_version()
    if libtpu != RECORDED["libtpu"]:
        pytest.skip(f"recorded with libtpu {RECORDED['libtpu']}, installed is {libtpu}: {REFRESH}")
    if case.name not in RECORDED["cycles"]:
        pytest.skip(f"not recorded: {REFRESH}")
    found = run_case(case, GATE_CHIP, memory=False, own_python=True)
    assert not found.broken
    recorded = RECORDED["cycles"][case.name]
    change = found.cycles / recorded - 1
    assert abs(change) <= TOLERANCE, f"{found.cycles:.0f} cycles are {change:+.1%} of {recorded}; if meant: {REFRESH}"
