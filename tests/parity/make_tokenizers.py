"""Tiny tokenizer files of the kinds that checkpoints bring, and the ids that `transformers` gets from them.

Run by `make_goldens`. The texts to learn from are the few sentences below.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, SiglipTokenizer

CLIP_VOCAB, T5_VOCAB, GEMMA_VOCAB = 600, 170, 420  # ids, the special ones included
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
LEARNED = (
    "A red ball rolls slowly across the wooden floor and stops at the wall.",
    "Two children throw a ball to each other in the garden behind the house.",
    "The cook cuts three onions, puts them into a pan and stirs with a wooden spoon.",
    "A man in a blue jacket walks along the beach while the waves are rolling in.",
    "The camera follows a train that leaves the station and passes over a bridge.",
    "A cat jumps from the table onto the chair, then looks out of the window.",
    "Someone opens the door, switches the light on and sits down on the sofa.",
    "Answer in en: what does the woman do after she has closed the window?",
    "Generate the alt-text: a dog is running after a stick near the river.",
    "Describe the video in detail: the players wait while the referee is talking.",
    "A train is crossing a river; snow covers the mountains in the background.",
    "She pours coffee into two cups, adds some milk and carries them to the table.",
    "The small boat turns left, slows down and stops beside the larger one.",
    "It's raining, so the people who were waiting there don't stay for long.",
    "First he washes the car, then he dries it with a cloth in about 20 minutes.",
    "Children are playing football on the street as a bus drives past them.",
)
TEXTS = (
    "A red ball rolls across the floor.",
    "  two  cats\tlook out of the   window ",
    "What's he doing? He doesn't know!",
    "The TRAIN arrives at 12:45, platform 3.",
    "Café, naïve, Zürich, ﬁne ½ — and 東京 🙂",
    "",
    "x",
    "answer in en: how many people are waiting?\n",
    "Generate the alt-text:",
)


def make_tokenizers(out: Path) -> None:
    """Folders tokenizer-{t5,gemma,clip} and tokenizers.json in `out`."""
    # As T5 and SigLIP: unigram pieces, NFKC.
    unigram = _sentencepiece(model_type="unigram", vocab_size=T5_VOCAB, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    # As Gemma: byte pair encoding, bytes for what has no piece, digits apart, spaces and case kept, newline a piece.
    gemma = _sentencepiece(
        model_type="bpe",
        vocab_size=GEMMA_VOCAB,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["\n"],
    )
    _folder(out / "tokenizer-t5", {"spiece.model": unigram}, tokenizer_class="T5Tokenizer", extra_ids=28)
    _folder(out / "tokenizer-gemma", {"tokenizer.model": gemma}, tokenizer_class="GemmaTokenizer", add_bos_token=True)
    vocab, merges = _byte_pairs()
    clip = {
        "vocab.json": json.dumps(vocab, ensure_ascii=False, indent=0).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
    }
    _folder(out / "tokenizer-clip", clip, tokenizer_class="CLIPTokenizer")
    loaded = {kind: AutoTokenizer.from_pretrained(out / f"tokenizer-{kind}") for kind in ("t5", "gemma", "clip")}
    loaded["siglip"] = SiglipTokenizer(vocab_file=str(out / "tokenizer-t5" / "spiece.model"))
    loaded["clip"].backend_tokenizer.save(str(out / "tokenizer-clip" / "tokenizer.json"))
    goldens: dict[str, Any] = {"texts": TEXTS}
    for kind, tokenizer in loaded.items():
        # PaliGemma's prompts end in a newline.
        ids = [tokenizer(text + "\n" if kind == "gemma" else text).input_ids for text in TEXTS]
        goldens[kind] = {"ids": ids, "decoded": [tokenizer.decode(row, skip_special_tokens=True) for row in ids]}
    (out / "tokenizers.json").write_text(json.dumps(goldens, ensure_ascii=False, indent=1) + "\n")


def _sentencepiece(**settings: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LEARNED), model_writer=model, num_threads=1, minloglevel=2, **settings
    )
    return model.getvalue()


def _folder(folder: Path, files: dict[str, bytes], **settings: Any) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _byte_pairs() -> tuple[dict[str, int], list[str]]:
    """Vocabulary and merges in CLIP's order: bytes, bytes that end a word, merged pieces, the two special ones.

    Learned here: the library breaks ties as its hashing falls, and gives other merges each time.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Counter(word for sentence in LEARNED for word in re.findall(r"[a-z]+|[0-9]|[^a-z0-9 ]+", sentence.lower()))
    split = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    merges: list[str] = []
    while len(merges) < CLIP_VOCAB - 2 - 2 * len(letters):
        pairs = Counter[tuple[str, str]]()
        for word, pieces in split.items():
            for pair in itertools.pairwise(pieces):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(" ".join(best))
        for pieces in split.values():
            for place in range(len(pieces) - 1, 0, -1):
                if (pieces[place - 1 : place + 1]) == [*best]:
                    pieces[place - 1 : place + 1] = ["".join(best)]
    endings = [f"{letter}</w>" for letter in letters]
    pieces = [*letters, *endings, *(merge.replace(" ", "") for merge in merges), BEGIN, END]
    assert len(set(pieces)) == CLIP_VOCAB, len(set(pieces))
    return {piece: number for number, piece in enumerate(pieces)}, merges
