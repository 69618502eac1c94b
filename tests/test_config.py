"""Overrides of settings, and presets that belong together."""

from __future__ import annotations

from typing import Any

import pytest

from pyvdl.config import (
    GemmaConfig,
    Preset,
    TextTowerConfig,
    TrainConfig,
    ViTConfig,
    VLMConfig,
    paper,
    toy,
)
from pyvdl.overrides import override, override_training


def test_overrides_reach_nested_fields_and_leave_the_rest() -> None:
    before = TrainConfig()
    after = override(
        before,
        [
            "steps=7",
            "optim.peak_learning_rate=1",
            "optim.name=sgd",
            "optim.clip_norm=None",
            "clip.scale_jitter=(0.9, 1.33)",
            "trainable=('vision', 'projection')",
        ],
    )
    assert (after.steps, after.optim.name, after.optim.clip_norm) == (7, "sgd", None)
    assert after.optim.peak_learning_rate == 1.0
    assert isinstance(after.optim.peak_learning_rate, float)
    assert after.clip.scale_jitter == (0.9, 1.33)
    assert after.trainable == ("vision", "projection")
    assert after.batch_size == before.batch_size
    assert before == TrainConfig()


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("steps", "has no '='"),
        ("stepz=3", "unknown setting 'stepz': TrainConfig has .*steps"),
        ("optim.rate=3", "unknown setting 'optim.rate': OptimConfig has"),
        ("steps.of=3", "has no fields of its own"),
        ("optim=adamw", "is a group of settings"),
        ("steps=many", "steps must be int, not 'many'"),
        ("steps=2.5", "steps must be int, not '2.5'"),
        ("steps=True", "steps must be int, not 'True'"),
        ("steps=None", "steps must be int, not 'None'"),
        ("optim.peak_learning_rate=fast", "must be float, not 'fast'"),
        ("optim.name=adam", r"must be Literal\['adafactor', 'adamw', 'sgd'\], not 'adam'"),
        ("clip.scale_jitter=(1,)", "must be tuple.*not"),
        ("clip.scale_jitter=2", "must be tuple.*not"),
        ("trainable=vision", "must be tuple"),
    ],
)
def test_a_wrong_override_names_what_is_wanted(assignment: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        override(TrainConfig(), [assignment])


def test_an_override_cannot_make_an_impossible_model() -> None:
    with pytest.raises(ValueError, match="image_size 10 is below patch_size 14"):
        override(ViTConfig(), ["image_size=10"])
    assert override(ViTConfig(), ["image_size=10", "patch_size=5"]).num_patches == 4


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("steps=-1", "steps must be at least 1 and finite, not -1"),
        ("batch_size=0", "batch_size must be at least 1"),
        ("seed=-1", "seed must be at least 0"),
        ("trainable=()", "trainable must hold"),
        ("optim.warmup_steps=-5", r"optim\.warmup_steps must be at least 0"),
        ("optim.peak_learning_rate=1e400", r"optim\.peak_learning_rate must be .*finite, not inf"),
        ("optim.b1=1", r"optim\.b1 must be"),
        ("optim.b2=-0.1", r"optim\.b2 must be"),
        ("optim.clip_norm=0", r"optim\.clip_norm must be above 0"),
        ("optim.schedule=cosine", r"optim\.warmup_steps must be below steps = 100"),
        ("clip.short_side=100", r"clip\.short_side 100 is below size 224"),
        ("clip.scale_jitter=(2,1)", r"clip\.scale_jitter must be .*not \(2, 1\)"),
        ("model.num_frames=0", r"model\.num_frames must be at least 1"),
        ("model.vision.depth=0", r"model\.vision\.depth must be at least 1"),
        ("model.language.head_dim=0", r"model\.language\.head_dim must be"),
        ("model.language.num_buckets=2", r"model\.language\.num_buckets must be at least 4"),
        ("model.language.max_distance=16", r"model\.language\.max_distance must be above"),
        ("clip.fps=3", r"clip\.fps follows from the model"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_path(assignment: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        override_training(TrainConfig(steps=100), VLMConfig(), [assignment])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_kv_heads": 3}, "num_heads 8 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 7}, "head_dim must be even, not 7"),
        ({"window": 0}, "window must be at least 1"),
        ({"final_softcap": 0.0}, "final_softcap must be above 0"),
    ],
)
def test_ranges_of_a_gemma(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GemmaConfig(**changes)


def test_overrides_reach_whichever_language_model_there_is() -> None:
    config = VLMConfig(language=GemmaConfig())
    after = override(config, ["language.window=4096", "language.attention_softcap=50"]).language
    assert isinstance(after, GemmaConfig)
    assert (after.window, after.attention_softcap) == (4096, 50)
    with pytest.raises(ValueError, match=r"'language\.encoder_layers': GemmaConfig has"):
        override(config, ["language.encoder_layers=2"])


def test_ranges_of_a_text_tower() -> None:
    with pytest.raises(ValueError, match="context_length must be at least 2"):
        TextTowerConfig(context_length=1)
    with pytest.raises(ValueError, match="width 768 is not a multiple of num_heads 5"):
        TextTowerConfig(num_heads=5)


@pytest.mark.parametrize("preset", [toy(50), paper(50)], ids=["toy", "paper"])
def test_the_parts_of_a_preset_fit_together(preset: Preset) -> None:
    assert preset.vlm.language.vocab_size == preset.dual_encoder.text.vocab_size == 50
    for run in (preset.visual, preset.language):
        assert (run.clip.num_frames, run.clip.size) == (preset.vlm.num_frames, preset.vlm.vision.image_size)
    vision, clip = preset.dual_encoder.vision, preset.contrastive.clip
    assert (clip.num_frames, clip.size) == (vision.num_frames, vision.image_size)
    assert preset.visual.trainable == ("vision", "projection")
    assert preset.language.trainable == ("language",)
    assert preset.contrastive.optim.warmup_steps < preset.contrastive.steps
