"""WordTokenizer: ids, truncation, round trips, the file format."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvdl.text import CAPTION_PROMPT, DETAIL_PROMPT, QUESTION_PROMPT, WordTokenizer, split_words

WORDS = ["a", "dog", "runs", ".", ",", "("]


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer(WORDS)


def test_special_ids_and_padding(tokenizer: WordTokenizer) -> None:
    ids = tokenizer.encode("A dog flies.", 8)
    assert ids.dtype == np.int32
    assert ids.tolist() == [4, 5, 2, 7, 1, 0, 0, 0]
    assert tokenizer.encode("a dog", 5, bos=True).tolist() == [3, 4, 5, 1, 0]
    assert tokenizer.vocab_size == 4 + len(WORDS)


def test_truncation_keeps_the_end(tokenizer: WordTokenizer) -> None:
    assert tokenizer.encode("a dog runs .", 3).tolist() == [4, 5, 1]
    assert tokenizer.encode("a dog runs .", 3, bos=True).tolist() == [3, 4, 1]
    assert tokenizer.encode("a dog", 1).tolist() == [1]
    with pytest.raises(ValueError, match="length=0"):
        tokenizer.encode("a", 0)
    with pytest.raises(ValueError, match="length=1"):
        tokenizer.encode("a", 1, bos=True)


def test_batch_is_rows_of_encode(tokenizer: WordTokenizer) -> None:
    texts = ["a dog", "runs, runs", ""]
    batch = tokenizer.encode_batch(texts, 6)
    assert batch.shape == (3, 6)
    assert batch.dtype == np.int32
    for row, text in zip(batch, texts):
        np.testing.assert_array_equal(row, tokenizer.encode(text, 6))
    assert tokenizer.encode_batch([], 6).shape == (0, 6)


def test_decode(tokenizer: WordTokenizer) -> None:
    assert tokenizer.decode([3, 4, 5, 6, 7, 1, 5, 5]) == "a dog runs."
    assert tokenizer.decode([0, 9, 4, 2, 8, 5]) == "(a, dog"
    with pytest.raises(ValueError, match="token id 10"):
        tokenizer.decode([10])
    with pytest.raises(ValueError, match="token id -1"):
        tokenizer.decode([-1])


def test_split_words() -> None:
    assert split_words("It's a T-shirt: don't!") == ["it's", "a", "t-shirt", ":", "don't", "!"]
    assert split_words("  ") == []


def test_from_texts_ranks_by_count_then_alphabet() -> None:
    texts = ["b a", "b c", "c a", "d"]
    assert WordTokenizer.from_texts(texts).words == ("a", "b", "c", "d")
    assert WordTokenizer.from_texts([*texts, "c"]).words == ("c", "a", "b", "d")


def test_bad_words_are_refused() -> None:
    with pytest.raises(ValueError, match="more than once"):
        WordTokenizer(["a", "a"])
    for word in ("A", "two words", ""):
        with pytest.raises(ValueError, match="expected one lower-case word"):
            WordTokenizer([word])


def test_save_and_load(tokenizer: WordTokenizer, tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(tmp_path)
    assert WordTokenizer.load(path).words == tokenizer.words
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    path.write_text(json.dumps({"words": ["a"]}))
    with pytest.raises(ValueError, match="pyvdl-word-tokenizer"):
        WordTokenizer.load(path)
    for damaged in ("{", '{"format": "pyvdl-word-tokenizer"}', '{"format": "pyvdl-word-tokenizer", "words": [1]}'):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
            WordTokenizer.load(path)
    with pytest.raises(FileNotFoundError):
        tokenizer.save(tmp_path / "absent")


def test_prompts_survive_their_own_vocabulary() -> None:
    prompts = [CAPTION_PROMPT, DETAIL_PROMPT, QUESTION_PROMPT.format(question="what moves?")]
    tokenizer = WordTokenizer.from_texts(prompts)
    for prompt in prompts:
        assert tokenizer.decode(tokenizer.encode(prompt, 16)) == prompt.lower()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["dog", "it's", "t-shirt", "été", "7"]), max_size=10), st.integers(1, 12))
def test_round_trip_up_to_truncation(words: list[str], length: int) -> None:
    tokenizer = WordTokenizer.from_texts(["dog it's t-shirt été 7"])
    assert tokenizer.decode(tokenizer.encode(" ".join(words), length)) == " ".join(words[: length - 1])


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_any_text_encodes_to_known_ids(text: str) -> None:
    tokenizer = WordTokenizer.from_texts([text])
    ids = tokenizer.encode(text, 64)
    assert 2 not in ids
    assert (ids == 1).sum() == 1
    assert split_words(tokenizer.decode(ids)) == split_words(text)
