"""Plans of recipes: what is read of a compiled program, what follows, and one recipe compiled for a slice."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from pyvdl import hlo, plan
from pyvdl.__main__ import main
from pyvdl.config import TrainConfig
from pyvdl.plan import Memory, Plan, PlanError, Request, captioning_tensor, parse_topology, suitable_mesh

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


@pytest.mark.parametrize(
    "branches", ["true_computation=%body, false_computation=%other", "branch_computations={%body, %other}"]
)
def test_all_branches_are_read(branches: str) -> None:
    text = PROGRAM.replace("while(%p), condition=%condition, body=%body", f"conditional(%p, %p, %p), {branches}")
    text = "%other (s: f32[8]) -> f32[8] {\n  ROOT %negate.1 = f32[8] negate(%s)\n}\n\n" + text
    found = [label for label, *_ in hlo.scheduled(text)]
    assert {"reduce.1", "permute.1", "negate.1"} <= set(found)


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


def test_captions_split_a_model_no_more_than_it_needs() -> None:
    assert [captioning_tensor(4, size << 30, 16 << 30) for size in (6, 10, 40, 100)] == [1, 2, 4, 4]  # of half of 16


@pytest.mark.parametrize(
    ("condition", "trips"),
    [
        ("%c = s32[] constant(3)\n  ROOT %less = pred[] compare(%i, %c), direction=LT", 3),
        ("%c = u32[] constant(3)\n  ROOT %less = pred[] compare(%i, %c), direction=LT", 3),  # of XLA's own loops
        (  # over tokens: at most
            "%c = s32[] constant(3)\n  %one = s32[] constant(1)\n  %next = s32[] add(%i, %one)\n"
            "  %less = pred[] compare(%next, %c), direction=LT\n  ROOT %and = pred[] and(%less, %going)",
            3,
        ),
        ("%c = s32[] constant(3)\n  ROOT %less = pred[] compare(%i, %c), direction=NE", None),
        ("ROOT %less = pred[] compare(%i, %c), direction=LT", None),
    ],
)
def test_trips_of_loops_are_read_from_their_conditions(condition: str, trips: int | None) -> None:
    text = PROGRAM.replace("%c = s32[] constant(3)\n  ROOT %less = pred[] compare(%i, %c), direction=LT", condition)
    found = {label: count for label, _, _, count in hlo.scheduled(text)}
    assert found.get("loop", found["reduce.1"]) == trips


def planned(**changes: int) -> Plan:
    parts = {"parameters": 1 << 30, "optimizer": 2 << 30, "batch": 1 << 20, "temporaries": 4 << 30}
    return Plan(
        request=Request("train", "paper", "v5e:8x16"),
        mesh={"data": 64, "fsdp": 2, "tensor": 1},
        copies=1,
        hosts=16,
        batch_size=1024,
        steps=3600,
        memory=Memory(**parts | changes),
        compiled=True,
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
    large = plan.describe(planned(activations=9 << 30, gradients=1 << 30, optimizer=9 << 30))
    assert "activations, at the peak (estimate)       9.00 GiB a chip" in large
    assert "gradients, at the peak (estimate)         1.00 GiB a chip" in large
    assert "DOES NOT FIT" in large
    advice = [line for line in large.splitlines() if "to make it fit" in line]
    assert [line.split()[4:6] for line in advice[:3]] == [
        ["--set", "model.vision.remat=True"],
        ["--set", "accumulate=2:"],
        ["--set", "fsdp=4"],
    ]


def test_advice_is_not_what_the_run_has() -> None:
    """Nor parts of the batch that do not divide over the chips, nor an axis that does not divide them."""
    found = planned(activations=20 << 30)
    told = {
        ("model.vision.remat=True",): ["--set model.text.remat=True: keeps less", "--set accumulate=2:"],
        ("model.vision.remat=True", "model.text.remat=True", "accumulate=4"): ["--set accumulate=8:"],
        ("model.vision.remat=True", "model.text.remat=True", "accumulate=8"): [],
    }
    for assignments, wanted in told.items():
        request = dataclasses.replace(found.request, assignments=assignments)
        given = dataclasses.replace(found, request=request).advice()
        assert len(given) == len(wanted) + 2
        assert all(text.startswith(start) for text, start in zip(given, wanted, strict=False)), given
        assert given[-2].startswith("--set fsdp=2 --set tensor=2:")
    whole = dataclasses.replace(found, mesh={"data": 1, "fsdp": 128, "tensor": 1}).advice()
    assert whole[-2].startswith("--set fsdp=64 --set tensor=2:")


def test_captions_are_told_of_all_hosts() -> None:
    """Two chips of each host take a batch of 8 in a second."""
    found = dataclasses.replace(
        planned(parameters=0, optimizer=0, frozen=5 << 30, caches=3 << 30),
        request=Request("caption", "paper", "v5e:8x16"),
        mesh={"data": 2, "fsdp": 1, "tensor": 2},
        copies=32,
        hosts=32,
        batch_size=8,
    )
    text = plan.describe(found)
    assert "128 chips, each of 32 hosts: data 2 x fsdp 1 x tensor 2" in text
    assert "1000000 clips, 10 captions of at most 77 tokens for each" in text
    assert "keys and values                           3.00 GiB a chip" in text
    assert "256 clips a second: 5 decoding cores on each of 32 hosts" in text
    assert "3600 batches on each host: 1.0 hours, 128 chip-hours" in text
    large = dataclasses.replace(found, memory=dataclasses.replace(found.memory, caches=9 << 30))
    assert large.advice()[0] == "--set batch_size=4: fewer clips at a time"


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
    assert min(memory["temporaries"], memory["program"]) > 0
    assert {"all-reduce", "collective-permute"} <= found["collectives"].keys()  # gradients, the loss's ring
    # Gradients are summed over the parts of the batch; the toy's activations stay in VMEM.
    parts = plan.plan(Request("language", "toy", "v5e:2x2", ("accumulate=2",))).memory
    assert 0.9 * parts.parameters < parts.gradients < 2.1 * parts.parameters
    # Inside an error of libtpu's process, what it says reaches the user.
    with pytest.raises(PlanError, match="batch_size = 8 in 1 parts does not divide over 16 shares"):
        plan.plan(Request("train", "toy", "v5e:4x4", ("fsdp=16",)))
    # So large that the compiler tells nothing else of it.
    large = ["plan", "visual", "--preset", "toy", "--topology", "v5e:2x2", "--set", "batch_size=262144"]
    assert main(large) == 1
    told = capsys.readouterr().out
    assert "of 16 GiB: DOES NOT FIT\n  the compiler stopped there" in told
    assert "to make it fit: --set model.vision.remat=True --set model.language.remat=True: keeps less" in told
    # Too few clips for the chips: as training would refuse it.
    with pytest.raises(PlanError, match=r"data 32 x fsdp 1 x tensor 4, .* of several processes: set a smaller tensor"):
        plan.plan(Request("train", "toy", "v5e:8x16", ("batch_size=32",)))


def test_captions_are_compiled_for_one_host(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["num_samples=3", "max_length=5", "clips=96", "model.vision.depth=1", "model.language.decoder_layers=1"]
    command = ["plan", "caption", "--preset", "toy", "--topology", "v5e:4x4", "--json"]
    assert main([*command, *(word for setting in settings for word in ("--set", setting))]) == 0
    found = json.loads(capsys.readouterr().out)
    chips = math.prod(found["mesh"].values())
    assert found["copies"] == found["hosts"] == 16 // chips
    assert found["chips"] == 16
    assert found["steps"] == 96 // (8 * found["hosts"])
    clips = 8 / chips
    heads, tokens = 2 * 32, 4 * 16 + 32  # numbers of a key; of a prefix
    keys_and_values = clips * 2 * 4 * heads * (tokens + 3 * 5)
    assert found["memory"]["caches"] == pytest.approx(keys_and_values, rel=0.01)
    assert found["memory"]["parameters"] == 0
    assert found["bounds"]["compiler"] > 0
    with pytest.raises(PlanError, match="batch_size = 6 does not divide over 4 shares"):
        plan.plan(Request("caption", "toy", "v5e:2x2", ("batch_size=6",)))
