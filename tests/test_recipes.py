"""What the trainings feed their models, which parts they move, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from pyvdl import data, recipes
from pyvdl.checkpoint import load_model, save_model
from pyvdl.config import ClipConfig, T5Config, TrainConfig, toy
from pyvdl.data import Question, Record
from pyvdl.models import save_pretrained
from pyvdl.models.dual_encoder import DualEncoder
from pyvdl.models.vlm import VLM
from pyvdl.overrides import override
from pyvdl.sharding import AXES
from pyvdl.text import CAPTION_PROMPT, DETAIL_PROMPT, WordTokenizer
from tests.clips import write_clip

QUESTION = Question("what spins?", "ball", "short")
RECORD = Record(
    key="a",
    video="a.mp4",
    captions=("a ball", "the ball spins"),
    narrative="<ball> first it spins.",
    questions=(QUESTION,),
)
WORDS = WordTokenizer.from_texts([CAPTION_PROMPT, DETAIL_PROMPT, "answer in en : what spins ? a the ball first it ."])
SMALL = ["steps=3", "batch_size=2", "optim.warmup_steps=1", "log_every=1", "checkpoint_every=3"]
SMALL_VLM = [
    "num_frames=2",
    "vision.image_size=32",
    "vision.depth=1",
    "language.encoder_layers=1",
    "language.decoder_layers=1",
]


def drawn(encode: recipes.Encode, record: Record, *names: str) -> set[tuple[str, ...]]:
    """What `encode` makes of a record over many draws, as text."""
    made = (encode(record, np.random.default_rng(seed)) for seed in range(60))
    return {tuple(WORDS.decode(arrays[name]) for name in names) for arrays in made}


def test_the_visual_stage_sees_the_task_prompt_and_any_caption() -> None:
    encode = recipes.short_captions(WORDS, target_length=6)
    prompt = CAPTION_PROMPT.lower()
    assert drawn(encode, RECORD, "prompt", "target") == {(prompt, "a ball"), (prompt, "the ball spins")}
    arrays = encode(RECORD, np.random.default_rng(0))
    assert arrays["prompt"].all()  # as long as the prompt is, no padding
    assert arrays["target"].shape == (6,)


def test_the_lengths_of_a_plan_are_those_of_the_data() -> None:
    sizes = toy(WORDS.vocab_size)
    encode = recipes.short_captions(WORDS, target_length=sizes.caption_length)
    arrays = encode(RECORD, np.random.default_rng(0))
    wanted = len(arrays["prompt"]), len(arrays["target"])
    assert recipes.text_lengths("visual", sizes, WORDS) == recipes.text_lengths("visual", sizes) == wanted
    assert recipes.text_lengths("language", sizes) == (sizes.prompt_length, sizes.target_length)


def test_the_language_stage_sees_questions_captions_and_the_description() -> None:
    encode = recipes.instructions(WORDS, prompt_length=10, target_length=8)
    assert drawn(encode, RECORD, "prompt", "target") == {
        ("answer in en: what spins?", "ball"),
        (CAPTION_PROMPT.lower(), "a ball"),
        (CAPTION_PROMPT.lower(), "the ball spins"),
        (DETAIL_PROMPT.lower(), "first it spins."),
    }


def test_the_dual_encoder_sees_one_caption_and_the_group() -> None:
    records = [
        RECORD,
        Record(key="b", video="v.mp4", captions=("ball",), group="v"),
        Record(key="c", video="v.mp4", captions=("ball",), group="v"),
        Record(key="v", video="w.mp4", captions=("ball",)),  # its key is another's group: no matter
    ]
    encode = recipes.one_text(WORDS, records, length=6)
    assert drawn(encode, RECORD, "text") == {("a ball",), ("the ball spins",)}
    assert encode(RECORD, np.random.default_rng(0))["text"][0] == 3  # beginning of text
    groups = [int(encode(record, np.random.default_rng(0))["group"]) for record in records]
    assert groups == [0, 1, 1, 2]


def test_a_smaller_share_of_the_data_is_part_of_a_larger_one() -> None:
    records = [Record(key=f"clip {i}", video="v.mp4") for i in range(1000)]
    tenth, half = (recipes.fraction(records, share) for share in (0.1, 0.5))
    assert 70 < len(tenth) < 130
    assert 440 < len(half) < 560
    assert {record.key for record in tenth} < {record.key for record in half}
    assert recipes.fraction(records, 1.0) == records
    with pytest.raises(ValueError, match="above 0 and at most 1, not 0"):
        recipes.fraction(records, 0)


def test_clips_are_cut_to_the_model() -> None:
    config = toy(8)
    clip = recipes.model_clip(config.vlm)
    assert (clip.num_frames, clip.size, clip.short_side, clip.fps) == (4, 64, 73, 2.0)
    clip = recipes.model_clip(config.dual_encoder, ClipConfig(num_frames=9, size=100, short_side=100, fps=5.0))
    assert (clip.num_frames, clip.size, clip.short_side, clip.fps) == (4, 64, 64, 5.0)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("clips")
    found = []
    for i, text in enumerate(("a ball", "the ball spins", "it spins")):
        write_clip(folder / f"{i}.mp4", seed=i)
        found.append(Record(key=str(i), video=str(folder / f"{i}.mp4"), captions=(text,), questions=(QUESTION,)))
    return found


def parts(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """The parameters of a saved model by the part of the model they belong to."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, value in nnx.to_flat_state(nnx.state(load_model(path)[0], nnx.Param)):
        found.setdefault(str(name[0]), {})[str(name)] = np.asarray(value[...])
    return found


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    assert first.keys() == second.keys()
    return all(np.array_equal(first[name], second[name]) for name in first)


def test_each_stage_moves_its_part_only(records: list[Record], tmp_path: Path) -> None:
    config = override(toy(WORDS.vocab_size).vlm, SMALL_VLM)
    save_model(tmp_path / "start", VLM(config, rngs=nnx.Rngs(0)), config, WORDS)
    start = parts(tmp_path / "start")

    history = recipes.adapt("visual", records, tmp_path / "visual", start=tmp_path / "start", assignments=SMALL)
    assert history.steps.tolist() == [1, 2, 3]
    seen = parts(tmp_path / "visual" / "model")
    assert not same(start["vision"], seen["vision"])
    assert not same(start["projection"], seen["projection"])
    assert same(start["language"], seen["language"])
    assert not (tmp_path / "visual" / "best").exists()  # no other checkpoint than the last
    assert load_model(tmp_path / "visual" / "model")[1].digest() == WORDS.digest()

    recipes.adapt("language", records, tmp_path / "language", start=tmp_path / "visual" / "model", assignments=SMALL)
    heard = parts(tmp_path / "language" / "model")
    assert same(seen["vision"], heard["vision"])
    assert same(seen["projection"], heard["projection"])
    assert not same(seen["language"], heard["language"])

    with pytest.raises(ValueError, match=r"another job \(train\.seed was 0, now 1\)"):
        recipes.adapt("visual", records, tmp_path / "visual", start=tmp_path / "start", assignments=[*SMALL, "seed=1"])
    asked = json.loads((tmp_path / "visual" / "run.json").read_text())
    assert (asked["job"], asked["preset"], asked["data_sha256"]) == ("adapt visual", "toy", data.digest(records))
    assert asked["model"] == json.loads(json.dumps(dataclasses.asdict(config)))
    every = {field.name for field in dataclasses.fields(TrainConfig)}
    assert asked["train"].keys() | asked["how"].keys() == every | {"mesh", "processes", "device"}
    assert asked["train"]["steps"] == 3
    assert asked["how"]["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert asked["versions"]["jax"] == jax.__version__
    # How it is done may change, and the file tells how it was done last.
    again = [*SMALL, "log_every=2", "num_threads=1"]
    recipes.adapt("visual", records, tmp_path / "visual", start=tmp_path / "start", assignments=again)
    last = json.loads((tmp_path / "visual" / "run.json").read_text())
    assert last == asked | {"how": asked["how"] | {"log_every": 2, "num_threads": 1}}


def test_the_best_model_is_saved_beside_the_last(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(toy(WORDS.vocab_size).vlm, SMALL_VLM)
    save_model(tmp_path / "start", VLM(config, rngs=nnx.Rngs(0)), config, WORDS)
    often = [*SMALL, "checkpoint_every=1"]
    losses = iter((1.0, 2.0, 3.0))
    monkeypatch.setattr("pyvdl.log.Log.recent_loss", lambda log: next(losses))
    recipes.adapt("visual", records, tmp_path / "run", start=tmp_path / "start", assignments=often)
    best, last = (parts(tmp_path / "run" / name) for name in ("best", "model"))
    start = parts(tmp_path / "start")
    assert same(best["language"], start["language"])
    assert not same(best["vision"], last["vision"])
    assert not same(best["vision"], start["vision"])


def test_prompt_tuning_moves_a_soft_prompt_only(records: list[Record], tmp_path: Path) -> None:
    config = override(toy(WORDS.vocab_size).vlm, SMALL_VLM)
    save_model(tmp_path / "start", VLM(config, rngs=nnx.Rngs(0)), config, WORDS)
    start = parts(tmp_path / "start")
    for out in ("tuned", "again"):
        recipes.adapt("prompt", records, tmp_path / out, start=tmp_path / "start", assignments=SMALL)
    tuned = parts(tmp_path / "tuned" / "model")
    assert tuned.pop("soft_prompt").popitem()[1].shape == (recipes.SOFT_PROMPT, config.language.width)
    assert all(same(tuned[name], start[name]) for name in start)
    assert tuned.keys() == start.keys()
    # Whoever reads the model hears the soft prompt.
    model, _ = load_model(tmp_path / "tuned" / "model")
    assert isinstance(model, VLM)
    video, prompt = jnp.zeros((1, 2, 32, 32, 3), jnp.uint8), jnp.array([[5, 6, 0]], jnp.int32)
    tokens, mask = model.prefix(video, prompt)
    patches = 2 * config.vision.num_patches
    assert tokens.shape[1] == patches + recipes.SOFT_PROMPT + 3
    assert mask[0].tolist() == [True] * (patches + recipes.SOFT_PROMPT + 2) + [False]
    np.testing.assert_array_equal(tokens[0, patches : patches + recipes.SOFT_PROMPT], model.soft_prompt[...])
    with pytest.raises(ValueError, match="has a soft prompt of 100 tokens already"):
        recipes.adapt("prompt", records, tmp_path / "more", start=tmp_path / "tuned" / "model", assignments=SMALL)
    with pytest.raises(ValueError, match="export its parts"):
        save_pretrained(model, tmp_path / "exported")


def test_self_training_mixes_pseudo_captions_into_the_visual_stage(records: list[Record], tmp_path: Path) -> None:
    config = override(toy(WORDS.vocab_size).vlm, SMALL_VLM)
    save_model(tmp_path / "start", VLM(config, rngs=nnx.Rngs(0)), config, WORDS)
    pseudo = [Record(key=f"pseudo {r.key}", video=r.video, captions=("a ball",)) for r in records]
    options: dict[str, Any] = {"start": tmp_path / "start", "assignments": SMALL, "pseudo": pseudo}
    recipes.adapt("visual", records, tmp_path / "mixed", pseudo_share=0.25, **options)
    asked = json.loads((tmp_path / "mixed" / "run.json").read_text())
    assert asked["mixture"] == [[len(records), 0.75], [len(pseudo), 0.25]]
    with pytest.raises(ValueError, match="visual stage only"):
        recipes.adapt("language", records, tmp_path / "language", **options)
    with pytest.raises(ValueError, match="no pseudo record has captions"):
        recipes.adapt("visual", records, tmp_path / "none", **options | {"pseudo": [Record(key="x", video="x.mp4")]})
    with pytest.raises(ValueError, match="no record has captions of its own"):
        recipes.adapt("visual", [Record(key="x", video="x.mp4")], tmp_path / "alone", **options)
    with pytest.raises(ValueError, match="pseudo_share must be above 0 and below 1, not 1"):
        recipes.adapt("visual", records, tmp_path / "all", pseudo_share=1, **options)


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no record has captions, which this training needs"):
        recipes.train([Record(key="a", video="a.mp4")], tmp_path)
    with pytest.raises(ValueError, match="preset 'huge': expected one of toy, demo, paper"):
        recipes.train([RECORD], tmp_path, preset="huge")
    with pytest.raises(ValueError, match=r"model\.language\.vocab_size=4 is less than the \d+ ids of the texts"):
        recipes.adapt("visual", [RECORD], tmp_path, assignments=["model.language.vocab_size=4"])
    with pytest.raises(ValueError, match=r"model\.text\.vocab_size=4 is less than the \d+ ids of the texts"):
        recipes.train([RECORD], tmp_path, assignments=["model.text.vocab_size=4"])
    config = toy(WORDS.vocab_size)
    small = override(config.vlm, SMALL_VLM)
    save_model(tmp_path / "vlm", VLM(small, rngs=nnx.Rngs(0)), small, WORDS)
    with pytest.raises(ValueError, match="holds a VLM, not a DualEncoder"):
        recipes.train([RECORD], tmp_path, start=tmp_path / "vlm")
    with pytest.raises(ValueError, match=r"model\.num_frames=2: the shape of a saved model"):
        recipes.adapt("visual", [RECORD], tmp_path, start=tmp_path / "vlm", assignments=["model.num_frames=2"])


def test_the_paper_preset_has_the_papers_figures() -> None:
    paper = recipes.PRESETS["paper"](32128)
    vision, language = paper.vlm.vision, paper.vlm.language
    assert (vision.width, vision.depth, vision.num_patches) == (1664, 48, 256)
    assert isinstance(language, T5Config)
    assert (language.width, language.encoder_layers) == (2048, 24)
    assert (paper.visual.steps, paper.visual.batch_size) == (40_000, 64)
    assert (paper.language.steps, paper.language.batch_size) == (10_000, 256)
    assert paper.contrastive.clip.scale_jitter == (0.9, 1.33)
    assert paper.dual_encoder.vision.num_frames * paper.dual_encoder.vision.num_patches + 1 == 1025


def test_what_the_model_fixes_cannot_be_set_for_the_run(tmp_path: Path) -> None:
    for setting in ("clip.num_frames=8", "clip.size=32", "clip.fps=4"):
        with pytest.raises(ValueError, match=f"{setting.split('=')[0]} follows from the model"):
            recipes.adapt("visual", [RECORD], tmp_path / "run", assignments=[setting])
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_leaves_the_folder_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(toy(8).visual, batch_size=4)
    model = nnx.eval_shape(lambda: VLM(toy(8).vlm, rngs=nnx.Rngs(0)))
    mesh = AbstractMesh((8, 1, 1), AXES)
    monkeypatch.setattr("pyvdl.train.make_mesh", lambda fsdp, tensor: mesh)
    with pytest.raises(ValueError, match="batch_size=4 in accumulate=1 parts does not divide over the 8 shares"):
        recipes._run(model, WORDS, recipes.vlm_loss, [RECORD], dict, config, tmp_path, {"job": "adapt"}, 1.0)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_settings_that_cannot_run_leave_the_folder_free(tmp_path: Path) -> None:
    out = tmp_path / "run"
    for setting, message in (
        ("steps=0", "steps must be at least 1"),
        ("trainable=('x',)", "names no parameter"),
        ("batch_size=0", "batch_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            recipes.adapt("visual", [RECORD], out, assignments=[setting])
        assert not (out / recipes.RUN_FILE).exists()


def test_a_run_is_the_same_however_its_paths_are_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = [
        data.digest([Record(key="a", video=path)]) for path in ("v.mp4", "./v.mp4", str(tmp_path / "v.mp4"), "w.mp4")
    ]
    assert found[0] == found[1] == found[2] != found[3]


def test_a_run_is_known_by_the_weights_it_starts_from() -> None:
    found = [
        recipes._asked("train", "toy", "a/model", DualEncoder(toy(20).dual_encoder, rngs=nnx.Rngs(seed)), WORDS)
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]
