"""Scores: retrieval and zero-shot by hand, batches that do not matter, failed clips that count as misses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from pyvdl.config import ClipConfig, T5Config, toy
from pyvdl.data import Question, Record
from pyvdl.evaluate import (
    class_embeddings,
    embed_texts,
    embed_videos,
    evaluate_captions,
    evaluate_questions,
    evaluate_retrieval,
    evaluate_zero_shot,
    score_answers,
)
from pyvdl.models.dual_encoder import DualEncoder
from pyvdl.models.vlm import VLM
from pyvdl.text import CAPTION_PROMPT, QUESTION_PROMPT, WordTokenizer
from tests.clips import write_clip

CLIP = ClipConfig(num_frames=2, sampling="uniform", short_side=32, size=32)
NUM_CLIPS = 5
BAD = 2
QUESTIONS = ("what moves first?", "what color is the ball?", "why is it gone?")


@pytest.fixture(scope="module")
def tokenizer() -> WordTokenizer:
    return WordTokenizer.from_texts([CAPTION_PROMPT, QUESTION_PROMPT, "a red ball moves left then right", *QUESTIONS])


@pytest.fixture(scope="module")
def vlm(tokenizer: WordTokenizer) -> VLM:
    config = toy(tokenizer.vocab_size).vlm
    vision = dataclasses.replace(config.vision, image_size=32, width=32, mlp_dim=64, depth=1)
    assert isinstance(config.language, T5Config)
    language = dataclasses.replace(
        config.language, width=32, head_dim=16, mlp_dim=64, encoder_layers=1, decoder_layers=1
    )
    return VLM(dataclasses.replace(config, vision=vision, language=language, num_frames=2), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def dual(tokenizer: WordTokenizer) -> DualEncoder:
    config = toy(tokenizer.vocab_size).dual_encoder
    vision = dataclasses.replace(config.vision, image_size=32, width=32, mlp_dim=64, depth=1, num_frames=2)
    text = dataclasses.replace(config.text, width=32, mlp_dim=64, depth=1)
    return DualEncoder(dataclasses.replace(config, vision=vision, text=text, embed_dim=16), rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("clips")
    found = []
    for i in range(NUM_CLIPS):
        path = folder / f"{i}.mp4"
        if i == BAD:
            path.write_bytes(b"no video")
        else:
            write_clip(path, seed=i)
        questions = tuple(Question(question=QUESTIONS[j], answer="left", family="short") for j in range(i % 3 + 1))
        found.append(Record(key=str(i), video=str(path), captions=("a red ball moves",), questions=questions))
    return found


def unit(rows: list[list[float]]) -> np.ndarray:
    values = np.array(rows, np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_retrieval_by_hand() -> None:
    videos = np.eye(12, dtype=np.float32)
    texts = videos.copy()
    texts[0] = unit([[0.5, 0.9] + [0.0] * 10])[0]  # nearer to video 1 than to its own
    scores = evaluate_retrieval(videos, texts)
    assert scores.t2v_ranks.tolist() == [2] + [1] * 11
    # Video 0 scores 0 with the texts of 2 to 11 and 0.49 with its own; video 1 finds its own text best.
    assert scores.v2t_ranks.tolist() == [1] * 12
    assert scores.t2v["R@1"] == pytest.approx(100 * 11 / 12)
    assert scores.t2v["R@5"] == scores.v2t["R@1"] == 100
    assert scores.t2v["median_rank"] == 1
    low, high = scores.intervals["t2v"]["R@1"]
    assert low < scores.t2v["R@1"] < high <= 100
    assert scores.intervals["v2t"]["R@1"] == (100, 100)


def test_a_constant_model_finds_nothing() -> None:
    same = np.ones((20, 4), np.float32) / 2
    scores = evaluate_retrieval(same, same)
    assert scores.t2v["R@10"] == scores.v2t["R@10"] == 0


def test_a_failed_video_is_a_miss_in_both_directions_and_harms_nobody_else() -> None:
    embeddings = unit(np.random.default_rng(0).normal(size=(4, 8)).tolist())
    broken = embeddings.copy()
    broken[1] = np.nan
    scores = evaluate_retrieval(broken, embeddings)
    assert scores.failed == 1
    # With four candidates even the last one is within the first five: a failed clip is a miss all the same.
    for direction in (scores.t2v, scores.v2t):
        assert direction == {"R@1": 75, "R@5": 75, "R@10": 75, "median_rank": 1}
    assert scores.t2v_ranks.tolist() == scores.v2t_ranks.tolist() == [1, 4, 1, 1]


def test_several_texts_a_video() -> None:
    videos = np.eye(3, dtype=np.float32)
    texts = np.concatenate([videos, videos[[1, 2, 0]]])  # the second text of each is wrong
    owner = np.array([0, 1, 2, 0, 1, 2])
    scores = evaluate_retrieval(videos, texts, video_of_text=owner)
    assert scores.t2v["R@1"] == 50
    assert scores.t2v_ranks.tolist() == [1, 1, 1, 3, 3, 3]  # ties stand ahead
    # Each video finds its own right text, level with a wrong one of another video.
    assert scores.v2t_ranks.tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="3 videos and 6 texts"):
        evaluate_retrieval(videos, texts)


def test_zero_shot_by_hand() -> None:
    classes = np.eye(8, dtype=np.float32)
    videos = unit([[9, 8, 7, 6, 5, 4, 3, 2], [9, 8, 7, 6, 5, 4, 3, 2], [9, 8, 7, 6, 5, 4, 3, 2]])
    scores = evaluate_zero_shot(videos, classes, [0, 4, 5])
    assert scores.top1 == pytest.approx(100 / 3)
    assert scores.top5 == pytest.approx(200 / 3)
    assert scores.predictions.tolist() == [0, 0, 0]
    videos[0] = np.nan
    scores = evaluate_zero_shot(videos, classes, [0, 4, 5])
    assert (scores.top1, scores.failed) == (0, 1)
    assert scores.predictions.tolist() == [-1, 0, 0]
    with pytest.raises(ValueError, match="8"):
        evaluate_zero_shot(videos, classes, [0, 4, 8])


def test_embeddings_do_not_depend_on_batches(
    dual: DualEncoder, tokenizer: WordTokenizer, records: list[Record]
) -> None:
    errors: dict[str, str] = {}
    whole = embed_videos(
        dual, records, clip=CLIP, batch_size=8, on_error=lambda record, error: errors.update({record.key: error})
    )
    assert whole.shape == (NUM_CLIPS, 16)
    assert list(errors) == [str(BAD)]
    assert np.isnan(whole).all(1).tolist() == [i == BAD for i in range(NUM_CLIPS)]
    good = np.delete(whole, BAD, axis=0)
    np.testing.assert_allclose(np.linalg.norm(good, axis=1), 1, rtol=1e-5)
    assert len({tuple(row) for row in good.round(5).tolist()}) == 4, "clips differ"
    for batch_size in (2, 3):
        np.testing.assert_allclose(embed_videos(dual, records, clip=CLIP, batch_size=batch_size), whole, atol=2e-6)
    texts = ["a red ball", "", "ball moves left then right", "moves", "right"]
    whole = embed_texts(dual, tokenizer, texts)
    for batch_size in (2, 4):
        np.testing.assert_allclose(embed_texts(dual, tokenizer, texts, batch_size=batch_size), whole, atol=2e-6)


def test_class_embeddings_are_the_mean_over_templates(dual: DualEncoder, tokenizer: WordTokenizer) -> None:
    names, templates = ["ball", "left"], ["a red {}", "the {} moves", "{}"]
    found = class_embeddings(dual, tokenizer, names, templates, batch_size=4)
    for name, row in zip(names, found, strict=True):
        each = embed_texts(dual, tokenizer, [t.format(name) for t in templates])
        np.testing.assert_allclose(row, each.mean(0) / np.linalg.norm(each.mean(0)), atol=1e-5)
    with pytest.raises(ValueError, match="no braces"):
        class_embeddings(dual, tokenizer, names, ["no braces"])


def test_captions_that_are_the_references_score_high_and_failed_ones_nothing(
    vlm: VLM, tokenizer: WordTokenizer, records: list[Record]
) -> None:
    first = evaluate_captions(vlm, tokenizer, records, clip=CLIP, max_length=6, batch_size=2)
    assert first.captions[BAD] == ""
    assert first.failed == 1
    assert first.per_item.shape == (NUM_CLIPS,)
    # A random model says much the same of every clip: its own words become references that tell the clips apart.
    own = [
        dataclasses.replace(record, captions=(f"{text} of clip number {i} here",))
        for i, (record, text) in enumerate(zip(records, first.captions, strict=True))
    ]
    again = evaluate_captions(vlm, tokenizer, own, clip=CLIP, max_length=6, batch_size=3)
    assert again.captions == first.captions
    assert again.per_item[BAD] == 0
    low, high = again.interval
    assert low <= again.cider <= high
    assert again.cider == pytest.approx(again.per_item.mean())
    with pytest.raises(ValueError, match="1 of 1 records have no captions"):
        evaluate_captions(vlm, tokenizer, [Record(key="x", video="x.mp4")], clip=CLIP)


def test_answers_do_not_depend_on_batches(vlm: VLM, tokenizer: WordTokenizer, records: list[Record]) -> None:
    total = sum(len(record.questions) for record in records)
    first = evaluate_questions(vlm, tokenizer, records, clip=CLIP, max_length=4, batch_size=2)
    assert first.questions == len(first.predictions) == total
    assert first.failed == 1
    bad = sum(len(record.questions) for record in records[:BAD])
    assert first.predictions[bad : bad + len(records[BAD].questions)] == [""] * len(records[BAD].questions)
    for batch_size in (3, 16):
        again = evaluate_questions(vlm, tokenizer, records, clip=CLIP, max_length=4, batch_size=batch_size)
        assert again.predictions == first.predictions
    # The model's own answers as the truth: all right but where it said nothing, as for the failed clip.
    answers = iter(text or "unknowable" for text in first.predictions)
    own = [
        dataclasses.replace(
            record,
            questions=tuple(
                Question(question=q.question, answer=next(answers), family="temporal") for q in record.questions
            ),
        )
        for record in records
    ]
    scores = evaluate_questions(vlm, tokenizer, own, clip=CLIP, max_length=4, batch_size=4)
    assert scores.exact_match == pytest.approx(100 * sum(map(bool, first.predictions)) / total)
    assert scores.by_family == {"temporal": scores.exact_match}


def test_answers_are_scored_raw_and_normalised() -> None:
    scores = score_answers(
        ["Left", "red", "a dog"], ["left", "red", "cat"], ["temporal", "short", "short"], np.array([0, 0, 1])
    )
    assert scores.exact_match == pytest.approx(100 / 3)
    assert scores.exact_match_normalised == pytest.approx(200 / 3)
    assert scores.by_family == {"short": 50, "temporal": 0}
    assert scores.exact_match_normalised <= scores.wups <= 100
    assert set(scores.intervals) == {"exact_match", "exact_match_normalised", "wups"}


def test_any_answer_of_a_question_is_right_and_families_may_be_unknown() -> None:
    scores = score_answers(["him", "red"], [("a man", "him"), ("blue",)], [None, "short"], np.array([0, 1]))
    assert (scores.exact_match, scores.by_family) == (50, {"short": 0})


def test_records_without_questions_are_refused(vlm: VLM, tokenizer: WordTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no record has questions"):
        evaluate_questions(vlm, tokenizer, [Record(key="x", video=str(tmp_path / "x.mp4"))], clip=CLIP)
