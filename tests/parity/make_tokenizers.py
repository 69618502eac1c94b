"""Tiny tokenizer files of the kinds that checkpoints bring, and the ids that `transformers` gets from them.

Run by `make_goldens`. The texts to learn from are the few sentences below.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
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
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _byte_pairs() -> tuple[dict[str, int], list[str]]:
    """Vocabulary and merges in CLIP's order: bytes, bytes that end a word, merged pieces, the two special ones."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = CLIP_VOCAB - 2 - 2 * len(alphabet)
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4 * CLIP_VOCAB, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator([sentence.lower() for sentence in LEARNED], trainer)
    found = json.loads(learner.to_str())["model"]["merges"]
    pairs = [" ".join(pair) if isinstance(pair, list) else pair for pair in found][:size]
    letters = sorted(alphabet)
    pieces = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *(pair.replace(" ", "") for pair in pairs),
        BEGIN,
        END,
    ]
    assert len(set(pieces)) == CLIP_VOCAB, len(set(pieces))
    return {piece: number for number, piece in enumerate(pieces)}, pairs
