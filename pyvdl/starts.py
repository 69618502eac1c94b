"""What demo and ablations begin with at toy size: sizes, the words there are, stand-ins for the published models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from flax import nnx

from pyvdl import instruct, pretrain
from pyvdl.checkpoint import load_model, save_model
from pyvdl.config import Preset
from pyvdl.data import Record
from pyvdl.models.dual_encoder import DualEncoder, inflate
from pyvdl.synthetic import Corpus, words
from pyvdl.synthetic.scene import COLORS, KINDS
from pyvdl.synthetic.words import LABELS
from pyvdl.text import CAPTION_PROMPT, DETAIL_PROMPT, QUESTION_PROMPT, WordTokenizer
from pyvdl.train import History

CLIPS = 1500
ENCODER_STEPS, TEXT_STEPS, IMAGE_STEPS = 300, 300, 400  # of the stand-ins for published models
SAMPLES = 5  # captions a clip
TOP_P, TEMPERATURE = 0.95, 0.7  # defaults of LaViLa's narrator: the paper states none
CAPTION_LENGTH = 28  # tokens
BATCH = 50  # clips, in captioning and evaluation
TEMPLATES = tuple(f"{words.article(f'{color} {kind}')} {{}}" for color in COLORS for kind in KINDS)  # zero-shot


def texts(corpus: Corpus) -> Iterator[str]:
    """What the tokenizer learns its words from: the train part alone."""
    yield from (CAPTION_PROMPT, DETAIL_PROMPT, QUESTION_PROMPT.format(question=""), *LABELS.values())
    for record in corpus.train:
        yield from record.captions
        yield instruct.describe(record.narrative or "")
        yield record.alt_text or ""
        for question in record.questions:
            yield from (question.question, question.answer)
    for record in corpus.pictures:
        yield from record.captions


def instructed(record: Record) -> Record:
    """The record with the questions the template generator finds in its narrative, in place of the corpus's own."""
    return dataclasses.replace(record, questions=tuple(instruct.generate(record.narrative or "")))


def image_models(
    corpus: Corpus, tokenizer: WordTokenizer, preset: Preset, directory: Path, seed: int
) -> dict[str, History]:
    """The stand-ins for CLIP and PaLI-3, in `encoder/model` and `image/model` below `directory`.

    Returns what happened to the encoder, the language model that reads text ("text"), and the two together
    ("pretrain").
    """
    encoder = pretrain.image_text_encoder(
        corpus.pictures, tokenizer, preset, directory / "encoder", steps=ENCODER_STEPS, seed=seed
    )
    text, image = pretrain.image_language_model(
        corpus.pictures,
        tokenizer,
        preset,
        directory / "image",
        encoder=directory / "encoder" / "model",
        text_steps=TEXT_STEPS,
        steps=IMAGE_STEPS,
        seed=seed,
    )
    return {"encoder": encoder, "text": text, "pretrain": image}


def inflated(image_encoder: Path, out: Path, preset: Preset, seed: int) -> None:
    """The start of all dual encoders: the image-text encoder with a random temporal embedding (section 1.3)."""
    model, tokenizer = load_model(image_encoder)
    assert isinstance(model, DualEncoder)
    video = inflate(model, preset.dual_encoder.vision.num_frames, rngs=nnx.Rngs(seed))
    save_model(out, video, video.config, tokenizer)
