"""Plans of recipes: what is read of a compiled program, what follows, and one recipe compiled for a slice."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pyvdl import hlo, plan
from pyvdl.__main__ import main
from pyvdl.config import TrainConfig
from pyvdl.plan import Memory, Plan, PlanError, Request, parse_topology, suitable_mesh

PROGRAM = """\
HloModule jit_step

%async_computation (p: f32[2,8]) -> f32[8,8] {
  %p = f32[2,8]{1,0} parameter(0)
  ROOT %all-gather.1 = f32[8,8]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}
}

%condition (s: (s32[], f32[8,8])) -> pred[] {
  %s = (s32[], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %c = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %c), direction=LT
}

%body (s: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %s = (s32[], f32[8,8]) parameter(0)
  %reduce.1 = (bf16[16]{0}, bf16[16]{0}) all-reduce(%s, %s), channel_id=8, replica_groups=[2,4]<=[8], to_apply=%add
  %permute.1 = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%s), channel_id=9, source_target_pairs={{0,1}}
  ROOT %t = (s32[], f32[8,8]) tuple(%s, %s)
}

ENTRY %main (p: f32[2,8]) -> f32[8,8] {
  %p = f32[2,8]{1,0} parameter(0)
  %start = f32[8,8]{1,0} fusion(%p), kind=kCustom, calls=%async_computation
  %done = f32[8,8]{1,0} fusion(%p), kind=kCustom, calls=%async_computation
  %one = f32[8]{0} all-reduce(%p), channel_id=10, replica_groups={{0},{1}}, to_apply=%add
  %scatter = f32[4]{0} reduce-scatter(%p), channel_id=11, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %loop = (s32[], f32[8,8]) while(%p), condition=%condition, body=%body
}
"""


def test_exchanges_are_read_with_their_bytes_and_runs() -> None:
    """A gather that two fusions hold counts once, one within a chip not at all."""
    found = {row.kind: row for row in hlo.collectives(PROGRAM)}
    assert found == {
        "all-gather": hlo.Collective("all-gather", 8 * 8 * 4 * 3 / 4, 1, 4),
        "reduce-scatter": hlo.Collective("reduce-scatter", 4 * 4, 1, 2),
        "all-reduce": hlo.Collective("all-reduce", 3 * 2 * (2 * 16 * 2) * 3 / 4, 3, 4),
        "collective-permute": hlo.Collective("collective-permute", 3 * 16, 3, 2),
    }


def test_an_unreadable_program_is_told() -> None:
    with pytest.raises(hlo.UnreadableError, match="cannot read the instruction %one = nonsense"):
        hlo.collectives(PROGRAM.replace("%one = f32[8]{0} all-reduce(%p)", "%one = nonsense"))


@pytest.mark.parametrize(
    ("batch", "chips", "gibibytes", "wanted"),
    [
        (1024, 128, 5, (2, 1)),  # more than a fifth of 16 GiB: split in two
        (1024, 128, 1, (1, 1)),
        (64, 128, 60, (16, 2)),  # two chips share a clip; 60 / 32 is below a fifth
        (64, 128, 4000, (64, 2)),  # as far as it goes
        (48, 12, 60, (12, 1)),  # no power of two
    ],
)
def test_the_mesh_suits_batch_and_state(batch: int, chips: int, gibibytes: int, wanted: tuple[int, int]) -> None:
    run = TrainConfig(batch_size=batch)
    assert suitable_mesh(run, chips, gibibytes << 30, 16 << 30) == wanted


def planned(**changes: int) -> Plan:
    memory = dataclasses.replace(Memory(1 << 30, 0, 2 << 30, 1 << 20, 4 << 30), **changes)
    return Plan(
        request=Request("train", "paper", "v5e:8x16"),
        chips=128,
        hosts=16,
        mesh={"data": 64, "fsdp": 2, "tensor": 1},
        batch_size=1024,
        steps=3600,
        memory=memory,
        flops=1e15,
        bounds={"MXU": 0.5, "interconnect": 1.0},
        collectives={"all-gather": 2e6},
        compile_seconds=1.0,
        peak_compile_bytes=1 << 30,
    )


def test_what_fits_and_what_would_make_it_fit() -> None:
    text = plan.describe(planned())
    assert "7.00 of 16 GiB: fits" in text
    assert "1000.0 ms at least, bound by interconnect" in text
    assert "3600 steps: 1.0 hours, 128 chip-hours" in text
    assert "37 decoding cores on each of 16 hosts" in text
    large = plan.describe(planned(temporaries=14 << 30, optimizer=9 << 30))
    assert "DOES NOT FIT" in large
    advice = [line for line in large.splitlines() if "to make it fit" in line]
    assert [line.split()[4:6] for line in advice[:3]] == [
        ["--set", "model.vision.remat=True"],
        ["--set", "accumulate=2"],
        ["--set", "fsdp=4"],
    ]


def test_topologies_are_checked() -> None:
    assert parse_topology("v5p:4x4x8") == ("v5p", 128)
    for text in ("v4:2x2", "v5e", "v5e:2xx2"):
        with pytest.raises(ValueError, match="topology must be CHIP:AxB"):
            parse_topology(text)


def test_a_recipe_is_compiled_for_a_slice(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "train", "--preset", "toy", "--topology", "v5e:2x2", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    assert found["fits"]
    memory = found["memory"]
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=0.01)  # AdamW
    assert memory["temporaries"] > 0
    assert {"all-reduce", "collective-permute"} <= found["collectives"].keys()  # gradients, the loss's ring
    # Inside an error of libtpu's process, what it says reaches the user.
    with pytest.raises(PlanError, match="batch_size = 8 in 1 parts does not divide over 16 shares"):
        plan.plan(Request("train", "toy", "v5e:4x4", ("fsdp=16",)))
