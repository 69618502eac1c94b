"""Scores: retrieval and zero-shot by hand, batches that do not matter, failed clips that count as misses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pyvdl.config import ClipConfig
from pyvdl.data import Question, Record
from pyvdl.evaluate import (
    class_embeddings,
    count_ahead_in_blocks,
    embed_texts,
    embed_videos,
    evaluate_captions,
    evaluate_choices,
    evaluate_questions,
    evaluate_retrieval,
    evaluate_zero_shot,
    score_answers,
    texts,
)
from pyvdl.metrics import count_ahead, rank
from pyvdl.models.dual_encoder import DualEncoder
from pyvdl.models.vlm import VLM
from pyvdl.text import CAPTION_PROMPT, QUESTION_PROMPT, WordTokenizer
from tests.clips import write_clip
from tests.models import tiny_dual_encoder, tiny_vlm, tokenizer_of

CLIP = ClipConfig(num_frames=2, sampling="uniform", short_side=32, size=32)
NUM_CLIPS = 5
BAD = 2
QUESTIONS = ("what moves first?", "what color is the ball?", "why is it gone?")


@pytest.fixture(scope="module")
def tokenizer() -> WordTokenizer:
    return WordTokenizer.from_texts([CAPTION_PROMPT, QUESTION_PROMPT, "a red ball moves left then right", *QUESTIONS])


@pytest.fixture(scope="module")
def vlm(tokenizer: WordTokenizer) -> VLM:
    return tiny_vlm(tokenizer)


@pytest.fixture(scope="module")
def dual(tokenizer: WordTokenizer) -> DualEncoder:
    return tiny_dual_encoder(tokenizer, num_frames=2, image_size=32)


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
    assert evaluate_retrieval(same, same, ties="loose").t2v["R@1"] == 100


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(("queries", "candidates"), [(50, 30), (700, 300), (300, 700), (1, 5)])
def test_ranks_by_blocks_are_those_of_the_whole(queries: int, candidates: int, pool: bool) -> None:
    """Of small whole numbers, whose products are exact and often equal."""
    rng = np.random.default_rng(queries)
    left, right = (rng.integers(-2, 3, (n, 5)).astype(np.float32) for n in (queries, candidates))
    offered = rng.permutation(np.arange(candidates) % 30) * 3 + 5
    wanted = rng.choice(offered, queries)
    whole = count_ahead(left @ right.T, wanted, offered, pool_candidates=pool)
    for block in (128, 256, 4096):
        found = count_ahead_in_blocks(left, right, wanted, offered, pool_candidates=pool, block=block)
        for name in ("above", "equal", "right"):
            np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    assert (whole.equal > whole.right).any() or queries == 1


@pytest.mark.parametrize("width", [3, 64, 257])
def test_equal_embeddings_tie_in_whatever_block_they_stand(width: int) -> None:
    one = np.random.default_rng(width).normal(size=(1, width)).astype(np.float32)
    found = count_ahead_in_blocks(one.repeat(500, 0), one.repeat(300, 0), np.arange(500) % 300, block=128)
    assert (found.above.max(), found.equal.min(), found.right.max()) == (0, 300, 1)


def test_blocks_hold_what_failed_behind_everything() -> None:
    videos = np.eye(4, dtype=np.float32)
    videos[[1, 2]] = np.nan
    found = count_ahead_in_blocks(np.eye(4, dtype=np.float32), videos)
    several = count_ahead_in_blocks(videos, np.eye(4, dtype=np.float32)[[0, 1, 1, 2, 3]], None, [0, 1, 1, 2, 3])
    for ties in ("strict", "loose", "expected"):
        assert rank(found, ties=ties).ranks.tolist() == [1, 4, 4, 1]
        assert rank(several, ties=ties).ranks.tolist() == [1, 4, 5, 1]  # behind all that are of other groups
    with pytest.raises(ValueError, match="group 9: no candidate"):
        count_ahead_in_blocks(videos, videos, [0, 1, 2, 9])
    with pytest.raises(ValueError, match=r"queries \(4, 4\), candidates \(4, 3\)"):
        count_ahead_in_blocks(videos, videos[:, :3])


def test_a_failed_video_is_a_miss_in_both_directions_and_harms_nobody_else() -> None:
    embeddings = unit(np.random.default_rng(0).normal(size=(4, 8)).tolist())
    broken = embeddings.copy()
    broken[1] = np.nan
    scores = evaluate_retrieval(broken, embeddings)
    assert scores.failed == 1
    # With four candidates even the last one is within the first five: a failed clip is a miss all the same.
    for direction in (scores.t2v, scores.v2t):
        assert direction == {"R@1": 75, "R@5": 75, "R@10": 75, "median_rank": 1, "mean_rank": 7 / 4}
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
    # A video without texts is a candidate, and no query.
    more = np.concatenate([videos, unit([[-1, -1, -1]])])
    scores = evaluate_retrieval(more, texts, video_of_text=owner)
    assert scores.t2v_ranks.tolist() == [1, 1, 1, 3, 3, 3]
    assert scores.v2t_ranks.tolist() == [2, 2, 2]


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
    assert whole.shape == (NUM_CLIPS, dual.config.embed_dim)
    assert list(errors) == [str(BAD)]
    assert np.isnan(whole).all(1).tolist() == [i == BAD for i in range(NUM_CLIPS)]
    good = np.delete(whole, BAD, axis=0)
    np.testing.assert_allclose(np.linalg.norm(good, axis=1), 1, rtol=1e-5)
    assert len({tuple(row) for row in good.round(5).tolist()}) == 4, "clips differ"
    for batch_size in (2, 3):
        np.testing.assert_allclose(embed_videos(dual, records, clip=CLIP, batch_size=batch_size), whole, atol=2e-6)
    texts = ["a red ball", "", "ball moves left then right", "moves", "right"]
    with pytest.raises(TypeError, match="texts='a red ball' is one string"):
        embed_texts(dual, tokenizer, texts[0])
    whole = embed_texts(dual, tokenizer, texts)
    for batch_size in (2, 4):
        np.testing.assert_allclose(embed_texts(dual, tokenizer, texts, batch_size=batch_size), whole, atol=2e-6)


def test_several_clips_of_a_video_are_averaged(
    dual: DualEncoder, tokenizer: WordTokenizer, records: list[Record]
) -> None:
    errors: dict[str, str] = {}
    found = embed_videos(
        dual,
        records,
        clip=CLIP,
        clips=2,
        batch_size=4,
        on_error=lambda record, error: errors.update({record.key: error}),
    )
    halves = [
        embed_videos(dual, [r.part(i, i / 2, (i + 1) / 2) for r in records], clip=CLIP, batch_size=4) for i in range(2)
    ]
    mean = (halves[0] + halves[1]) / 2
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=2e-6)
    assert np.isnan(found).all(1).tolist() == [i == BAD for i in range(NUM_CLIPS)]
    assert list(errors) == [str(BAD)]
    with pytest.raises(ValueError, match="holds the frames of one clip"):
        embed_videos(dual, [Record(key="x", video="array://0::x.zarr", end_seconds=1.0)], clip=CLIP, clips=2)


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


def test_an_option_with_the_word_of_padding_keeps_its_end(
    vlm: VLM, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def score(model: object, frames: object, prompts: object, options: np.ndarray, **_: object) -> np.ndarray:
        asked.append(options[0].tolist())
        return np.zeros(options.shape[:2])

    monkeypatch.setattr(texts, "score", score)
    question = Question("a", answer="dog", options=("a <pad> dog", "dog"), correct=1)
    record = dataclasses.replace(records[0], questions=(question,))
    texts.choose_options(vlm, tokenizer_of(tmp_path, "a dog"), [record], clip=CLIP)
    assert asked == [[[2, 0, 3, 1], [3, 1, 0, 0]]]


def test_the_likeliest_option_is_chosen(vlm: VLM, tokenizer: WordTokenizer, records: list[Record]) -> None:
    """What the model says by itself is likelier than other words; a failed clip's questions are misses."""
    said = evaluate_questions(vlm, tokenizer, records, clip=CLIP, max_length=4, batch_size=4).predictions
    answers = iter(said)
    others = ("why is it gone then right then right", "gone gone gone gone")
    asked: list[Record] = []
    rights: list[int] = []
    for record in records:
        questions = []
        for i, question in enumerate(record.questions):
            options = [others[0], others[1]][: 1 + i % 2]  # of two or of three
            right = len(rights) % (len(options) + 1)
            options.insert(right, next(answers) or "left")
            rights.append(right)
            questions.append(
                dataclasses.replace(question, answer=options[right], options=tuple(options), correct=right)
            )
        asked.append(dataclasses.replace(record, questions=tuple(questions)))
    scores = evaluate_choices(vlm, tokenizer, asked, clip=CLIP, batch_size=4)
    first = sum(len(record.questions) for record in records[:BAD])
    bad = slice(first, first + len(records[BAD].questions))
    assert (scores.predictions[bad] == -1).all()
    assert scores.failed == 1
    good = np.delete(scores.predictions == rights, np.arange(bad.start, bad.stop))
    assert good.all()
    assert scores.accuracy == pytest.approx(100 * good.sum() / len(rights))
    assert (
        evaluate_choices(vlm, tokenizer, asked, clip=CLIP, batch_size=3).predictions.tolist()
        == scores.predictions.tolist()
    )
    with pytest.raises(ValueError, match=r"record 0: question 'what moves first\?' has no options"):
        evaluate_choices(vlm, tokenizer, records, clip=CLIP)


def test_answers_are_scored_raw_and_normalised() -> None:
    scores = score_answers(
        ["Left", "red", "a dog"], ["left", "red", "cat"], ["temporal", "short", "short"], np.array([0, 0, 1])
    )
    assert scores.exact_match == pytest.approx(100 / 3)
    assert scores.exact_match_normalised == pytest.approx(200 / 3)
    assert scores.by_family == {"short": 50, "temporal": 0}
    assert scores.exact_match_normalised <= scores.wups <= 100
    assert set(scores.intervals) == {"exact_match", "exact_match_normalised", "wups"}


def test_questions_of_one_clip_are_drawn_together() -> None:
    answers = ["left"] * 40
    said = ["left", "right"] * 20
    apart = [score_answers(said, answers, [None] * 40, owner) for owner in (np.arange(40), np.arange(40) % 4)]
    for name in ("exact_match", "exact_match_normalised", "wups"):
        widths = [np.subtract(*scores.intervals[name][::-1]) for scores in apart]
        assert widths[1] > 2 * widths[0] > 0, "four clips say less than forty"


def test_any_answer_of_a_question_is_right_and_families_may_be_unknown() -> None:
    scores = score_answers(["him", "red"], [("a man", "him"), ("blue",)], [None, "short"], np.array([0, 1]))
    assert (scores.exact_match, scores.by_family) == (50, {"short": 0})


def test_records_without_questions_are_refused(vlm: VLM, tokenizer: WordTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no record has questions"):
        evaluate_questions(vlm, tokenizer, [Record(key="x", video=str(tmp_path / "x.mp4"))], clip=CLIP)
