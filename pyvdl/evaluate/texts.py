"""What a video-language model says of clips: captions, answers, the likeliest option; and the scores of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np

from pyvdl.caption import caption_records, clip_batches
from pyvdl.clip_prompts import encode_prompts, trim
from pyvdl.config import ClipConfig
from pyvdl.data import Question, Record
from pyvdl.evaluate.scores import (
    CaptionScores,
    ChoiceScores,
    QuestionScores,
    owners,
    score_answers,
    score_captions,
    score_choices,
)
from pyvdl.generate import generate, score
from pyvdl.models.vlm import VLM
from pyvdl.progress import Report
from pyvdl.text import CAPTION_PROMPT, QUESTION_PROMPT
from pyvdl.tokenizers import Tokenizer

CAPTION_LENGTH = 32  # tokens at most
ANSWER_LENGTH = 16
OPTION_LENGTH = 128

Failures = dict[str, str]  # of clips by their keys: why


def say_captions(
    model: VLM,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    *,
    clip: ClipConfig,
    prompt: str = CAPTION_PROMPT,
    max_length: int = CAPTION_LENGTH,
    batch_size: int = 8,
    num_threads: int = 2,
    prefetch: int = 2,
    progress: Report | None = None,
) -> tuple[list[str], Failures]:
    """A greedy caption of each clip, "" for a failed one."""
    rows = list(
        caption_records(
            model,
            tokenizer,
            records,
            clip=clip,
            prompt=prompt,
            max_length=max_length,
            temperature=0.0,
            batch_size=batch_size,
            num_threads=num_threads,
            prefetch=prefetch,
            progress=progress,
        )
    )
    failures = {row.key: row.error or "no frames" for row in rows if row.status == "failed"}
    return [row.captions[0] if row.captions else "" for row in rows], failures


def evaluate_captions(
    model: VLM, tokenizer: Tokenizer, records: Sequence[Record], *, clip: ClipConfig, seed: int = 0, **options: Any
) -> CaptionScores:
    """CIDEr-D of greedy captions; the references are the captions of each record. `seed` is that of the bootstrap,
    `options` are those of `say_captions`."""
    check_captioned(records)
    captions, failures = say_captions(model, tokenizer, records, clip=clip, **options)
    return score_captions(captions, [record.captions for record in records], len(failures), seed)


def check_captioned(records: Sequence[Record]) -> None:
    without = [record.key for record in records if not record.captions]
    if without or not records:
        raise ValueError(f"{len(without)} of {len(records)} records have no captions to compare with {without[:3]}")


def say_answers(
    model: VLM,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    *,
    clip: ClipConfig,
    prompt: str = QUESTION_PROMPT,
    max_length: int = ANSWER_LENGTH,
    **loading: Any,
) -> tuple[list[str], Failures]:
    """A greedy answer to every question, "" for those of a failed clip; `loading` as in `_ask`."""
    questions = [question for record in records for question in record.questions]
    prompts = _prompts(tokenizer, questions, prompt)
    found = [""] * len(questions)

    def answer(frames: np.ndarray, asked: np.ndarray, count: int) -> None:
        samples = generate(
            model,
            frames,
            prompts[asked],
            num_samples=1,
            max_length=max_length,
            temperature=0.0,
            seeds=np.zeros(len(asked), np.uint32),
        )
        tokens = np.asarray(samples.tokens)
        for row in range(count):
            found[asked[row]] = tokenizer.decode(tokens[row, 0])

    return found, _ask(records, answer, clip=clip, **loading)


def evaluate_questions(
    model: VLM, tokenizer: Tokenizer, records: Sequence[Record], *, clip: ClipConfig, seed: int = 0, **options: Any
) -> QuestionScores:
    """Greedy answers to every question of `records`; records without questions are left out. `seed` is that of the
    bootstrap, `options` are those of `say_answers`."""
    records, questions, owner = _asked(records)
    predictions, failures = say_answers(model, tokenizer, records, clip=clip, **options)
    return score_answers(
        predictions,
        [q.answers for q in questions],
        [q.family for q in questions],
        owner,
        len(failures),
        seed,
        [q.type for q in questions],
    )


def choose_options(
    model: VLM,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    *,
    clip: ClipConfig,
    prompt: str = QUESTION_PROMPT,
    **loading: Any,
) -> tuple[np.ndarray, Failures]:
    """int64[Q]: of every question the option of the highest log-likelihood, its end included; -1 of a failed clip."""
    questions = [question for record in records for question in record.questions]
    prompts = _prompts(tokenizer, questions, prompt)
    most = max(len(question.options) for question in questions)
    # Those with fewer options have the first one again, which wins no tie.
    texts = [option for q in questions for option in (*q.options, *q.options[:1] * (most - len(q.options)))]
    options = trim(tokenizer.encode_batch(texts, OPTION_LENGTH), tokenizer.pad_id).reshape(len(questions), most, -1)
    chosen = np.full(len(questions), -1, np.int64)

    def choose(frames: np.ndarray, asked: np.ndarray, count: int) -> None:
        found = score(model, frames, prompts[asked], options[asked], end_ids=tokenizer.end_id, pad_id=tokenizer.pad_id)
        chosen[asked[:count]] = np.asarray(found)[:count].argmax(1)

    failures = _ask(records, choose, clip=clip, **loading)
    return chosen, failures


def evaluate_choices(
    model: VLM, tokenizer: Tokenizer, records: Sequence[Record], *, clip: ClipConfig, seed: int = 0, **options: Any
) -> ChoiceScores:
    """Accuracy of the likeliest options; records without questions are left out, all others need options. `options`
    are those of `choose_options`."""
    records, questions, owner = _asked(records)
    check_options(records)
    chosen, failures = choose_options(model, tokenizer, records, clip=clip, **options)
    return score_choices(chosen, questions, owner, len(failures), seed)


def check_options(records: Sequence[Record]) -> None:
    for record in records:
        for question in record.questions:
            if question.correct is None:
                raise ValueError(f"record {record.key}: question {question.question!r:.80} has no options to choose of")


def _asked(records: Sequence[Record]) -> tuple[list[Record], list[Question], np.ndarray]:
    """The records that have questions, these, and the record of each."""
    kept = [record for record in records if record.questions]
    if not kept:
        raise ValueError("no record has questions")
    questions = [question for record in kept for question in record.questions]
    return kept, questions, owners([len(record.questions) for record in kept])


def _prompts(tokenizer: Tokenizer, questions: Sequence[Question], prompt: str) -> np.ndarray:
    return encode_prompts(tokenizer, [prompt.format(question=question.question) for question in questions])


def _ask(
    records: Sequence[Record],
    answer: Callable[[np.ndarray, np.ndarray, int], None],
    *,
    clip: ClipConfig,
    batch_size: int = 8,
    num_threads: int = 2,
    prefetch: int = 2,
    progress: Report | None = None,
) -> Failures:
    """Calls answer(frames uint8[B, T, H, W, 3], int[B] which questions, how many count) until all were asked.

    A clip is decoded once, whatever number of questions it has. What fills up the last batch does not count.
    """
    first = np.concatenate([[0], np.cumsum([len(record.questions) for record in records])])
    failures: Failures = {}

    def pairs() -> Iterator[tuple[np.ndarray, int]]:
        at_once = min(batch_size, len(records))
        batches = clip_batches(records, clip=clip, batch_size=at_once, num_threads=num_threads, prefetch=prefetch)
        done = 0
        with closing(batches):
            for batch in batches:
                for row in np.flatnonzero(batch.index >= 0):
                    record = batch.index[row]
                    if not batch.ok[row]:
                        failures[records[record].key] = batch.errors[row] or "no frames"
                        continue
                    for question in range(first[record], first[record + 1]):
                        yield batch.data[row], question
                done += int((batch.index >= 0).sum())
                if progress is not None:
                    progress(done, len(records))

    def ask(chunk: list[tuple[np.ndarray, int]]) -> None:
        full = [*chunk, *chunk[:1] * (batch_size - len(chunk))]
        answer(np.stack([frames for frames, _ in full]), np.array([number for _, number in full]), len(chunk))

    chunk: list[tuple[np.ndarray, int]] = []
    for pair in pairs():
        chunk.append(pair)
        if len(chunk) == batch_size:
            ask(chunk)
            chunk = []
    if chunk:
        ask(chunk)
    return failures
