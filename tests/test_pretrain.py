"""Stand-ins for published models: stories, their position, pictures one by one, and the tower that is handed on."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pyvdl import pretrain
from pyvdl.config import DualEncoderConfig, T5Config, TextTowerConfig, ViTConfig, VLMConfig
from pyvdl.models.dual_encoder import DualEncoder
from pyvdl.models.vlm import VLM
from pyvdl.synthetic.scene import BACKGROUNDS
from pyvdl.text import CAPTION_PROMPT, PAD_ID, WordTokenizer

VISION = ViTConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=16, dtype="float32")
LANGUAGE = T5Config(
    vocab_size=50, width=16, encoder_layers=1, decoder_layers=1, num_heads=2, head_dim=8, mlp_dim=16, dtype="float32"
)
TEXT = TextTowerConfig(vocab_size=50, context_length=8, width=16, depth=1, num_heads=2, mlp_dim=16, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer() -> WordTokenizer:
    told = [pretrain.story(np.random.default_rng(i)) for i in range(300)]
    return WordTokenizer.from_texts([text for pair in told for text in pair])


def stories(tokenizer: WordTokenizer, seed: int = 0) -> pretrain.Stories:
    return pretrain.Stories(tokenizer, batch_size=4, seed=seed)


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


# Stories.


def test_story_tells_pictures_of_one_scene_then_asks_for_a_caption() -> None:
    for seed in range(20):
        shown, caption = pretrain.story(np.random.default_rng(seed))
        assert shown.endswith(f" {CAPTION_PROMPT}")
        spoken = shown.removesuffix(f" {CAPTION_PROMPT}").split()
        slots = [spoken[i : i + pretrain.PICTURE_LENGTH] for i in range(0, len(spoken), pretrain.PICTURE_LENGTH)]
        assert len(slots) in (1, pretrain.PICTURES)
        assert all(len(slot) == pretrain.PICTURE_LENGTH and slot[-1] == "." for slot in slots)
        pictures = [" ".join(slot).rstrip(" .") for slot in slots]
        assert len(slots) > 1 or pictures == [caption]
        backgrounds = {background for text in pictures for background in BACKGROUNDS if background in text.split()}
        assert len(backgrounds) == 1
        assert caption


def test_story_is_that_of_its_generator() -> None:
    assert pretrain.story(np.random.default_rng(5)) == pretrain.story(np.random.default_rng(5))
    assert pretrain.story(np.random.default_rng(5)) != pretrain.story(np.random.default_rng(6))


def test_lengths_hold_every_story(tokenizer: WordTokenizer) -> None:
    """A cut story would lose its task prompt, a cut caption its last word."""
    told = [pretrain.story(np.random.default_rng([1, i])) for i in range(300)]
    shown, captions = (tokenizer.encode_batch(texts, 500) for texts in zip(*told))
    assert np.all((shown != PAD_ID).sum(1) <= pretrain.STORY_LENGTH)
    assert np.all((captions != PAD_ID).sum(1) <= pretrain.CAPTION_LENGTH)


def test_prompt_fits_its_length(tokenizer: WordTokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(CAPTION_PROMPT, pretrain.PROMPT_LENGTH)) == tokenizer.decode(
        tokenizer.encode(CAPTION_PROMPT, 100)
    )


def test_batches_of_stories(tokenizer: WordTokenizer) -> None:
    batch = next(stories(tokenizer))
    assert batch["prompt"].shape == (4, pretrain.STORY_LENGTH)
    assert batch["target"].shape == (4, pretrain.CAPTION_LENGTH)
    assert batch["prompt"].dtype == batch["target"].dtype == np.int32
    assert batch["ok"].tolist() == [True] * 4
    assert len({row.tobytes() for row in batch["prompt"]}) == 4
    assert not same(batch, next(stories(tokenizer, seed=1)))


def test_stories_go_on_from_a_saved_position(tokenizer: WordTokenizer) -> None:
    told = stories(tokenizer)
    next(told)
    state = json.loads(json.dumps(told.get_state()))  # as a checkpoint keeps it
    following = [next(told), next(told)]
    other = stories(tokenizer)
    other.set_state(state)
    assert same(next(other), following[0])
    assert same(next(other), following[1])
    assert other.get_state() == told.get_state() != state
    assert not same(following[0], following[1])


# Pictures one by one.


def test_pictures_of_a_clip_count_one_by_one() -> None:
    """Row t of clip b becomes row b * T + t, with its own text; all pictures of a clip share its status."""
    texts = {name: jax.random.randint(jax.random.key(1), (3, 2, 8), 4, 50) for name in ("prompt", "target")}
    video = jax.random.randint(jax.random.key(0), (3, 2, 16, 16, 3), 0, 256).astype(jnp.uint8)
    single = pretrain._singly({"video": video, "ok": jnp.array([True, False, True]), **texts})
    assert set(single) == {"video", "ok", "prompt", "target"}
    assert single["video"].shape == (6, 1, 16, 16, 3)
    assert single["ok"].tolist() == [True, True, False, False, True, True]
    for clip in range(3):
        for picture in range(2):
            row = 2 * clip + picture
            np.testing.assert_array_equal(single["video"][row, 0], video[clip, picture])
            np.testing.assert_array_equal(single["target"][row], texts["target"][clip, picture])


# The tower.


def test_tower_is_copied_without_its_class_token() -> None:
    shape = DualEncoderConfig(vision=dataclasses.replace(VISION, class_token=True), text=TEXT, embed_dim=16)
    source = DualEncoder(shape, rngs=nnx.Rngs(1))
    target = VLM(VLMConfig(vision=VISION, language=LANGUAGE, num_frames=2), rngs=nnx.Rngs(2))
    pretrain._copy_tower(source.vision, target.vision)
    given = dict(nnx.to_flat_state(nnx.state(source.vision, nnx.Param)))
    taken = dict(nnx.to_flat_state(nnx.state(target.vision, nnx.Param)))
    assert set(given) - set(taken) == {path for path in given if "class_token" in path}
    assert set(taken) <= set(given)
    for path, value in taken.items():
        np.testing.assert_array_equal(value[...], given[path][...])
