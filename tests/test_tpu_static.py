"""The static estimates for TPUs: what is read from libtpu's dumps, the floors, and what makes a row invalid."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental import pallas as pl

import pyvdl.kernels
from bench import tpu_aot, tpu_dumps, tpu_ops, tpu_static, tpu_tune
from bench.tpu_dumps import EstimateError, Instruction
from bench.tpu_static import CHIPS, Product

HLO = """HloModule jit_f, entry_computation_layout={(bf16[8]{0})->bf16[8]{0}}

%cond (p: (s32[], bf16[8])) -> pred[] {
  %p = (s32[], bf16[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %p = (s32[], bf16[8]) parameter(0)
  %fusion.1 = bf16[8]{0} fusion(%p), kind=kLoop, calls=%c, backend_config={"estimated_cycles":"100"}
  ROOT %t = (s32[], bf16[8]) tuple(%i, %fusion.1)
}

ENTRY %main (x: bf16[8]) -> bf16[8] {
  %x = bf16[8]{0} parameter(0)
  %attn.1 = (bf16[8]{0}, /*index=1*/f32[8]{0}) custom-call(%x), custom_call_target="tpu_custom_call",
      backend_config={"custom_call_config": {
      }, "used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}
  %while.1 = (s32[], bf16[8]) while(%attn.1), condition=%cond, body=%body
  ROOT %copy.2 = bf16[8]{0} copy(%while.1), backend_config={"estimated_cycles":"7"}
}
"""
BUNDLES = b"""0x0: bundle slots:
  %s1_s0 = inlined_call_operand.hbm [shape: bf16[1,2048,128]]
  %12 = vld [vmem:[#allocation1_spill] sm:$0xff]
  %13 = vmatpush1.bf16.msra.mxu0 %v1
0x1: bundle slots:
  %14 = vmatmul.mubr.bf16.gmra.mxu0 %v2
  %15 = vmatprep.mubr.bf16.mxu0 %v2
  %16 = vexp2.f32 %v3
  %17 = vadd.xlane.f32 %v4
  %18 = vadd.f32 %v4, %v5
  %19 = vpop.f32.mrf.mxu0
  vst [vmem:[#allocation1_spill]] %v5
  %20 = sadd.s32 1, %s1
"""
FACTS: dict[str, Any] = {
    "scale": 2.0,
    "whole": False,
    "flops": 2 * 2 * 16 * 128 * 128,
    "products": [[16, 128, 128, 2]],
    "hbm_bytes": 0,
    "temporary_bytes": 3,
    "compile_seconds": 1.0,
}


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """What libtpu leaves of HLO's one kernel."""
    (tmp_path / "attn.1_TPU.textproto").write_text(
        'hlo_op_estimate {\n  hlo_op_name: "attn.1"\n  estimated_cycles: 200\n}\n', encoding="utf-8"
    )
    (tmp_path / "attn.1_bundles.txt").write_bytes(BUNDLES)
    return tmp_path


def test_scheduled_instructions_are_found_with_their_trips() -> None:
    assert tpu_dumps.instructions(HLO) == [
        Instruction("attn.1", "pallas", None, 1, 4096),
        Instruction("fusion.1", "fusion", 100, 5, 0),
        Instruction("copy.2", "copy", 7, 1, 0),
    ]


def test_a_loop_of_unknown_length_is_told() -> None:
    unknown = HLO.replace("direction=LT", "direction=NE")
    assert Instruction("while.1", "while of unknown trip count", None, 1, 0) in tpu_dumps.instructions(unknown)


def test_a_loop_of_the_compiler_itself_is_counted_by_its_trips() -> None:
    """A large reshape becomes a loop with an unsigned counter, and what is in it may have no estimate."""
    own = HLO.replace("%n = s32[]{:T(128)} constant(5)", "%n = u32[]{:T(128)} constant(128)")
    assert Instruction("fusion.1", "fusion", 100, 128, 0) in tpu_dumps.instructions(own)
    line = "  %shape.1 = bf16[1024,1024]{1,0:T(8,128)(2,1)} reshape(%fusion.1)\n"
    own = own.replace("  ROOT %t =", f"{line}  ROOT %t =")
    assert tpu_dumps.uncounted(own, ()) == ["shape.1 (2 MiB, 128 times)"]
    assert tpu_dumps.uncounted(own, ("shape.1",)) == []
    assert tpu_dumps.uncounted(HLO, ()) == []


def test_executed_instructions_are_counted_by_slot() -> None:
    counts = tpu_dumps.executed(BUNDLES.splitlines())
    slots = {"VLD": 1, "MATPUSH": 1, "MATMUL": 1, "EUP": 1, "XLU": 1, "VALU": 1, "VPOP": 1, "VST": 1}
    assert counts == slots | {"rows": 16, "spills": 2}


def test_an_estimate_puts_profile_and_program_together(profile: Path) -> None:
    found = tpu_static.read("a:b()", "v5e", "simulate", FACTS, HLO, tpu_dumps.profile(profile))
    assert found.broken == ()
    assert found.cycles == 2 * (200 + 5 * 100 + 7)
    assert found.seconds == pytest.approx(found.cycles / 1.5e9)
    assert found.floor_seconds == pytest.approx(2 * 16 / 4 / 1.5e9)
    assert found.useful == pytest.approx(2 * 16 / 4 / found.cycles)
    assert found.busy == pytest.approx(16 / 4 / 200)
    assert found.spills_per_cycle == pytest.approx(2 / 200)
    assert found.kernels == {"attn.1": pytest.approx(2 * 200 / 1.5e9)}
    assert (found.vmem_bytes, found.temporary_bytes) == (4096, 3)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"flops": FACTS["flops"] * 1.1}, "only 0.91 of the useful flops"),
        ({"products": [[1e6, 128, 128, 1]]}, "faster than the floor"),
    ],
)
def test_what_cannot_be_makes_a_row_invalid(change: dict[str, Any], told: str, profile: Path) -> None:
    found = tpu_static.read("a:b()", "v5e", "simulate", FACTS | change, HLO, tpu_dumps.profile(profile))
    assert any(told in reason for reason in found.broken)
    assert "INVALID" in tpu_aot.cells(tpu_aot.CASES[0], "v5e", found)[-1]


def test_a_program_takes_as_long_as_its_bytes(profile: Path) -> None:
    found = tpu_static.read("a:b()", "v5e", "simulate", FACTS | {"hbm_bytes": 819e6}, HLO, tpu_dumps.profile(profile))
    assert found.broken == ()
    assert found.seconds == found.floor_seconds == pytest.approx(1e-3)
    assert found.cycles == 2 * (200 + 5 * 100 + 7)
    assert found.useful == pytest.approx(2 * 16 / 4 / 1.5e6)
    assert tpu_aot.cells(tpu_aot.CASES[0], "v5e", found)[-1] == "as long as its bytes take; instructions 1 us"


def test_a_kernel_without_estimate_makes_a_row_invalid(tmp_path: Path) -> None:
    found = tpu_static.read("a:b()", "v5e", "simulate", FACTS, HLO, tpu_dumps.profile(tmp_path))
    assert found.broken == ("no estimate of attn.1 (pallas)",)


def test_a_kernel_of_another_program_makes_a_row_invalid(profile: Path) -> None:
    found = tpu_static.read(
        "a:b()", "v5e", "simulate", FACTS, HLO.replace("%attn.1 =", "%attn.2 ="), tpu_dumps.profile(profile)
    )
    assert "simulated, but not in the program: attn.1" in found.broken


def test_peaks_are_those_of_the_data_sheets() -> None:
    for name, peak in {"v5e": 197e12, "v6e": 918e12, "v5p": 459e12 / 2}.items():
        assert CHIPS[name].flops_per_cycle * CHIPS[name].clock_hz == pytest.approx(peak, rel=0.01)


def test_floors_of_attention_count_streamed_rows() -> None:
    """A unit for scores and their gradients whatever D, and D over the MXU's width of one for the other products."""
    for name, width in {"v5e": 128, "v6e": 256}.items():
        chip = CHIPS[name]
        unit = 128 * 2048**2 / (4 * 128 if name == "v5e" else 2 * 2 * 256) / chip.clock_hz
        for what, scores, others in (("fwd", 1, 1), ("fwd+bwd", 3, 4)):
            products = tpu_ops.score_products(what, 2048, 2048, 64, 128)
            assert tpu_static.floor_seconds(chip, products, 0) == pytest.approx(unit * (scores + others * 64 / width))
    assert tpu_static.floor_seconds(CHIPS["v5e"], (), 819e9) == pytest.approx(1.0)
    assert Product(8, 8, 8, 1).cycles(CHIPS["v5e"]) == 2


def test_specs_take_numbers_words_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu_ops, "told", lambda *args, **kwargs: (args, kwargs), raising=False)
    assert tpu_static.load("bench.tpu_ops:told(joint,fwd+bwd,8,heads=2)") == (("joint", "fwd+bwd", 8), {"heads": 2})
    with pytest.raises(ValueError, match="a spec is module:function"):
        tpu_static.load("bench.tpu_ops")


def test_programs_are_whole_ops_with_a_slice() -> None:
    for case in tpu_aot.CASES:
        if case.spec.startswith("bench.tpu_ops:attention"):
            program = tpu_static.load(case.spec)
            assert program.whole_args is not None
            assert program.args[0].shape[1] == program.whole_args[0].shape[1]
            assert program.whole_args[0].size == program.scale * program.args[0].size
    assert len({case.name for case in tpu_aot.CASES}) == len(tpu_aot.CASES)


def test_rows_are_chosen_by_their_names() -> None:
    names = [case.name for case in tpu_aot.chosen(tpu_aot.CASES, [r"^joint fwd 2048x64", "^matrix"])]
    assert names[:2] == ["matrix product 4096", "joint fwd 2048x64 pyvdl"]
    assert not any("bwd" in name for name in names)


def test_a_missing_estimate_has_a_row_that_says_why() -> None:
    row = tpu_aot.cells(tpu_aot.CASES[0], "v6e", "not built")
    assert len(row) == len(tpu_aot.HEAD)
    assert row[-1] == "no estimate: not built"
    assert tpu_aot.markdown([tpu_aot.HEAD, row]).count("\n") == 2


def test_public_kernels_that_are_not_installed_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tpu_aot, "ANCHORS", tmp_path)
    tpu_aot.anchor_versions.cache_clear()
    try:
        with pytest.raises(EstimateError, match=r"not installed: python -m bench.tpu_aot --setup"):
            tpu_aot.run_case(tpu_aot.CASES[0], "v5e")
    finally:
        tpu_aot.anchor_versions.cache_clear()


def test_a_program_that_fails_says_why() -> None:
    with pytest.raises(EstimateError, match=r"NotImplementedError: .*axis_name"):
        tpu_static.estimate("bench.tpu_ops:contrastive_ring(softmax,128,4,reference)", "v5e", mode="compile")


def test_tuning_traces_the_whole_program_under_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, dict[str, int]]] = []
    current: dict[str, int] = {}

    @contextlib.contextmanager
    def override(**settings: int) -> Iterator[None]:
        current.update(settings)
        yield
        current.clear()

    @jax.custom_vjp
    def core(q: Any, k: Any, v: Any) -> Any:
        return q

    def forward(q: Any, k: Any, v: Any) -> Any:
        seen.append(("forward", dict(current)))
        return q, None

    def backward(saved: Any, gradient: Any) -> Any:
        seen.append(("backward", dict(current)))
        return gradient, gradient, gradient

    core.defvjp(forward, backward)
    tuning = types.ModuleType("pyvdl.kernels.tuning")
    monkeypatch.setattr(tuning, "override", override, raising=False)
    monkeypatch.setitem(sys.modules, "pyvdl.kernels.tuning", tuning)
    monkeypatch.setattr(pyvdl.kernels, "tuning", tuning, raising=False)
    monkeypatch.setattr(pyvdl.kernels, "space_time_attention", lambda q, k, v, **_: core(q, k, v))
    case = tpu_tune.TUNABLE["joint fwd+bwd 2048x64"]
    program = tpu_static.load(tpu_tune.tuned_spec(case, {"query_chunk": 256}))
    assert program.args == tpu_static.load(case.spec).args
    jax.eval_shape(program.fn, *program.args)
    assert seen == [("forward", {"query_chunk": 256}), ("backward", {"query_chunk": 256})]


def test_a_search_tries_every_combination_and_puts_the_fastest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tpu_static.Estimate(
        "", "v5e", "simulate", 200.0, 2e-6, 1e-6, False, 0.0, 0.5, None, {}, None, {}, 2**20, 0, 1.0, (), ()
    )

    def estimate(spec: str, chip: str, *, memory: bool) -> tpu_static.Estimate:
        if "a=1,b=4" in spec:
            raise EstimateError("too large")
        return dataclasses.replace(slow, cycles=100.0 if "a=2,b=3" in spec else 200.0)

    monkeypatch.setattr(tpu_tune, "estimate", estimate)
    case = tpu_tune.TUNABLE["joint fwd 2048x64"]
    found = tpu_tune.search(case, "v5e", dict([tpu_tune.choice("a=1,2"), tpu_tune.choice("b=3,4")]))
    assert [settings for settings, _ in found] == [
        {"a": 2, "b": 3},
        {"a": 1, "b": 3},
        {"a": 2, "b": 4},
        {"a": 1, "b": 4},
    ]
    assert found[-1][1] == "too large"
    assert tpu_tune.table(found).splitlines()[2] == "| 2 | 3 | 2 | 50% |  | 1.0 |  |"


def test_pallas_kernels_are_found_inside_jit_and_gradients() -> None:
    def kernel(x_ref: Any, out_ref: Any) -> None:
        out_ref[...] = x_ref[...]

    @jax.custom_vjp
    def core(x: Any) -> Any:
        return jax.jit(pl.pallas_call(kernel, out_shape=x, name="first"))(x)

    core.defvjp(lambda x: (core(x), None), lambda _, g: (pl.pallas_call(kernel, out_shape=g, name="second")(g),))
    x = jax.ShapeDtypeStruct((8, 128), "float32")
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: jax.checkpoint(core)(x).sum()))(x).jaxpr
    names = [call.params["name"] for call in tpu_static.pallas_calls(jaxpr)]
    assert names[-1] == "second"
    assert "first" in names


def test_a_kernel_missing_from_the_profile_is_simulated_alone(profile: Path) -> None:
    asked: list[str] = []

    def build(part: str, flags: Any) -> Any:
        asked.append(part)
        folder = Path(flags[0].partition("=")[2])
        (folder / "a.textproto").write_text('hlo_op_name: "alone.1"\n estimated_cycles: 9\n', encoding="utf-8")
        raise EstimateError("aborted after that")

    kernels = [("attn", "a"), ("loss", "a"), ("twice", "a"), ("twice", "b"), ("again", "a"), ("again", "a")]
    wanted = {"attn.1", "jvp_loss_.2", "twice.1", "again.3", "rematted_again.4"}
    found = tpu_static._each_alone(build, kernels, wanted, profile)
    cycles = {name: kernel.cycles for name, kernel in found.items()}
    assert cycles == {"attn.1": 200, "jvp_loss_.2": 9, "again.3": 9, "rematted_again.4": 9}
    assert asked == ["4", "1"]
