"""Tokenizers of checkpoints, from files made here: what stands around a text in each family. See test_parity too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from pyvdl.text import WordTokenizer
from pyvdl.tokenizers import load_tokenizer

TEXTS = ["a dog runs over the green field", "two red balls roll to the left", "the man opens a box, then he sits down"]


def sentence_pieces(path: Path, **ids: Any) -> None:
    SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS * 20),
        model_prefix=str(path.with_suffix("")),
        vocab_size=70,
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=["\n"],
        **ids,
    )


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    names = {"eos_piece": "<eos>", "bos_piece": "<bos>"}
    sentence_pieces(folder / "tokenizer.model", pad_id=0, eos_id=1, bos_id=2, unk_id=3, **names)
    (folder / "config.json").write_text('{"model_type": "paligemma"}')
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    sentence_pieces(folder / "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    (folder / "config.json").write_text('{"model_type": "t5"}')
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt as CLIP has them: words end in </w>, the two special tokens stand last."""
    folder = tmp_path_factory.mktemp("clip")
    library = Library(models.BPE(end_of_word_suffix="</w>"))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, end_of_word_suffix="</w>", initial_alphabet=alphabet)
    library.train_from_iterator([word for text in TEXTS * 5 for word in text.replace(",", "").split()], trainer)
    found = json.loads(library.to_str())["model"]
    vocab = {token: i for i, token in enumerate(found["vocab"])}
    # Every letter can end a word.
    for letter in sorted(alphabet):
        vocab.setdefault(f"{letter}</w>", len(vocab))
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in found["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "config.json").write_text('{"model_type": "clip"}')
    return folder


def test_prompts_and_texts_of_paligemma(gemma: Path) -> None:
    tokenizer = load_tokenizer(gemma)
    prompt, short = tokenizer.encode_prompts(["a dog runs", "a"], 24)
    newline = tokenizer.encode_prompts(["\n"], 8)[0]
    length = np.flatnonzero(prompt).max() + 1
    assert prompt[0] == 2
    assert 1 not in prompt
    assert prompt[length - 1] == newline[newline > 0][-1]
    assert not short[np.flatnonzero(short).max() + 1 :].any()
    text = tokenizer.encode("a dog runs", 24)
    assert text[text > 0][-1] == 1
    assert tokenizer.decode(text) == "a dog runs"
    assert tokenizer.decode([*text[:3], 1, *text[:3]]) == tokenizer.decode(text[:3])


def test_a_long_text_keeps_its_end(gemma: Path, t5: Path, clip: Path) -> None:
    for folder in (gemma, t5, clip):
        tokenizer = load_tokenizer(folder)
        cut = tokenizer.encode(" ".join(TEXTS), 6, bos=True)
        assert cut[-1] == tokenizer.end_id
        assert tokenizer.pad_id not in cut[:-1]
        with pytest.raises(ValueError, match="length=0"):
            tokenizer.encode("a", 0)


def test_t5_ends_prompts_and_texts(t5: Path) -> None:
    tokenizer = load_tokenizer(t5)
    (prompt,) = tokenizer.encode_prompts(["two red balls"], 20)
    np.testing.assert_array_equal(prompt, tokenizer.encode("two red balls", 20))
    assert prompt[prompt > 0][-1] == 1


def test_clip_begins_and_ends_texts_in_lower_case(clip: Path) -> None:
    tokenizer = load_tokenizer(clip)
    begin, end = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    row = tokenizer.encode("A  DOG runs, then", 24, bos=True)
    np.testing.assert_array_equal(row, tokenizer.encode("a dog runs, then", 24, bos=True))
    assert row[0] == begin
    assert (row == end).sum() > 1  # the end, and padding that is the same
    assert tokenizer.decode(row[1:]) == "a dog runs , then"


def test_siglip_strips_marks(t5: Path) -> None:
    tokenizer = load_tokenizer(t5, "siglip")
    row = tokenizer.encode("A dog,  runs!", 24, bos=True)
    np.testing.assert_array_equal(row, tokenizer.encode("a dog runs", 24))
    assert tokenizer.pad_id == tokenizer.end_id == row[-1] == 1


def tokenizer_json(folder: Path, *special: str) -> None:
    library = Library(models.BPE(unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=90, special_tokens=list(special)))
    library.save(str(folder / "tokenizer.json"))


def test_a_tokenizer_json_is_read(tmp_path: Path) -> None:
    """As SigLIP 2 has: Gemma's ids, lower case, padded with 0."""
    tokenizer_json(tmp_path, "<pad>", "<eos>", "<bos>", "<unk>")
    tokenizer = load_tokenizer(tmp_path, "siglip")
    row = tokenizer.encode("The GREEN field", 20)
    assert tokenizer.decode(row) == "the green field"
    assert row[row > 0][-1] == 1
    assert row[-1] == tokenizer.pad_id == 0


def test_siglip_is_told_from_siglip_2_by_its_tokens(gemma: Path, tmp_path: Path) -> None:
    """Both come with either kind of file. The text tower reads the last place: padding is part of the embedding."""
    tokenizer_json(tmp_path, "<pad>", "</s>", "<unk>")
    first, second = load_tokenizer(tmp_path, "siglip"), load_tokenizer(gemma, "siglip")
    assert (first.pad_id, second.pad_id) == (1, 0)
    np.testing.assert_array_equal(first.encode("The field!", 20), first.encode("the field", 20))
    assert (second.encode("the field, then", 20) != second.encode("the field then", 20)).any()


def test_a_tokenizer_of_another_family_is_refused(gemma: Path, t5: Path, clip: Path) -> None:
    for folder, kind in ((gemma, "t5"), (t5, "paligemma"), (clip, "siglip"), (clip, "t5"), (t5, "clip")):
        with pytest.raises(ValueError, match=f"none of {kind}, its token .* put the checkpoint's own"):
            load_tokenizer(folder, kind)


def test_saved_beside_a_model_and_read_again(gemma: Path, clip: Path, tmp_path: Path) -> None:
    for folder in (gemma, clip):
        tokenizer = load_tokenizer(folder)
        target = tmp_path / folder.name
        target.mkdir()
        tokenizer.save(target)
        (target / "config.json").write_text('{"pyvdl": "a model of its own"}')
        again = load_tokenizer(target)
        assert again.digest() == tokenizer.digest()
        for text in TEXTS:
            np.testing.assert_array_equal(again.encode(text, 30, bos=True), tokenizer.encode(text, 30, bos=True))
    words = WordTokenizer(["a", "dog"])
    words.save(tmp_path)
    assert load_tokenizer(tmp_path).digest() == words.digest()
    assert load_tokenizer(gemma).digest() != load_tokenizer(clip).digest()


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tell load_tokenizer the kind"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer: put"):
        load_tokenizer(tmp_path, "t5")
    (tmp_path / "spiece.model").write_bytes(b"\x00nothing")
    with pytest.raises(ValueError, match="no SentencePiece model"):
        load_tokenizer(tmp_path, "t5")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path, "t5")
    with pytest.raises(ValueError, match="kind must be one of"):
        load_tokenizer(tmp_path, "gpt")
