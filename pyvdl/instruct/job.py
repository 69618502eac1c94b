"""Instruction data of many records from a language model: a job that goes on where it stopped.

Replies are kept as they came, in a journal beside the output; questions are read out of them and sifted when all are
there. So a kill costs the requests on their way and no others, and nothing is asked twice.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyvdl.data import Family, Question, Record, write_manifest
from pyvdl.rows import JOB_FILE
from pyvdl.storage import claim, write_whole

from .endpoint import Answer, Connection, Endpoint, EndpointError
from .filters import REASONS, Reason, check_language, sift
from .journal import Journal, Line, Spent, job_folder
from .prompts import Prompt, Templates, load_templates, make_prompt, texts_of
from .replies import parse_reply

JOURNAL_FILE = "journal.jsonl"
REJECTED_FILE = "rejected.jsonl"
Report = Callable[[int, int, Spent], None]  # (requests done, of how many, what they took)


@dataclass(kw_only=True)
class Summary:
    """What a job left behind."""

    records: int  # in the manifest
    untold: list[str]  # keys of the records left out: nothing is told of them
    questions: Counter[Family]
    rejected: Counter[Reason]
    unreadable: int  # replies without one pair
    failed: list[Line]  # requests without a reply; the same call tries them again
    damaged: int  # lines of the journal that were asked for again
    spent: Spent  # by all runs of the job
    folder: Path  # of the job

    def account(self) -> str:
        """What came out, in a sentence."""
        kept = ", ".join(f"{count} {family}" for family, count in sorted(self.questions.items()))
        text = f"{self.records} records with {self.questions.total()} questions ({kept})"
        if reasons := ", ".join(f"{count} {reason}" for reason, count in self.rejected.items() if count):
            text += f"; {self.rejected.total()} pairs left out ({reasons}): {self.folder / REJECTED_FILE}"
        return text

    def troubles(self) -> Iterator[str]:
        """What did not go as it should, a line each."""
        if self.untold:
            yield f"{len(self.untold)} records left out: nothing is told of them, the first is {self.untold[0]}"
        if self.unreadable:
            yield f"{self.unreadable} replies have no question that can be read"
        if self.damaged:
            yield f"{self.damaged} lines of {self.folder / JOURNAL_FILE} are damaged: they were asked for again"
        if self.failed:
            first = self.failed[0]
            yield (
                f"{len(self.failed)} requests failed, the same command tries them again; the first is that of "
                f"{first.key}, {first.family}: {first.error}"
            )


def instruct_job(
    records: Sequence[Record],
    out: str | os.PathLike[str],
    *,
    model: str,
    templates: Templates | None = None,
    seed: int = 0,
    temperature: float | None = None,
    max_tokens: int = 1024,
    language: str = "en",
    connection: Connection | None = None,
    give_up_after: int = 20,
    progress: Report | None = None,
) -> Summary:
    """Has `model` write questions of each family in `templates` for `records`, and writes the manifest `out`.

    Each record with texts is in the manifest, with the questions kept in place of any it had, and says under "instruct"
    its seed and for each family the model, the prompt's hash and a status. The same call again goes on where it
    stopped, and tries what failed once more; other settings, templates or records are refused with the difference.
    `language` and `connection` may change. EndpointError stops the job: the endpoint refuses, or `give_up_after`
    requests in a row have failed; those it will not answer, but answers others, do not count.
    """
    check_language(language)
    target, folder = Path(out), job_folder(out)
    if target.exists() and not folder.exists():
        raise ValueError(f"{target} exists and is not of such a job: choose another file, or delete it")
    templates = load_templates() if templates is None else templates
    told = [record for record in records if texts_of(record)]
    if not told:
        raise ValueError(f"none of the {len(records)} records has captions or a narrative")
    recipe = {
        "model": model,
        "seed": seed,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "templates_sha256": _digest(dataclasses.asdict(template) | {"family": f} for f, template in templates.items()),
        "records": len(told),
        "records_sha256": _digest([record.key, *texts_of(record)] for record in told),
    }
    folder.mkdir(parents=True, exist_ok=True)

    def prompts(record: Record) -> Iterator[Prompt]:
        for family, template in templates.items():
            yield make_prompt(record, family, template, seed)

    with Journal(folder / JOURNAL_FILE) as journal:
        if journal.is_empty:  # a wrong name or key got no answer: the next try may have another
            (folder / JOB_FILE).unlink(missing_ok=True)
        claim(folder / JOB_FILE, recipe)
        done = sum(_is_done(journal, record, prompt) for record in told for prompt in prompts(record))
        total = len(told) * len(templates)
        failed = {place for place, line in journal.lines.items() if line.error is not None}  # by earlier runs

        def todo() -> Iterator[tuple[Record, Prompt]]:
            for again in (False, True) if failed else (False,):  # what failed may fail again: it comes last
                for record in told:
                    for prompt in prompts(record):
                        is_wanted = ((record.key, prompt.family) in failed) == again
                        if is_wanted and not _is_done(journal, record, prompt):
                            yield record, prompt

        if done < total:
            has_answered = len(failed) < len(journal.lines)
            endpoint = Endpoint(model, max_tokens, temperature, connection or Connection(), has_answered)
            report = None if progress is None else lambda new: progress(done + new, total, journal.spent)
            asyncio.run(_ask(endpoint, todo(), journal, give_up_after, report))

        summary = Summary(
            records=len(told),
            untold=[record.key for record in records if not texts_of(record)],
            questions=Counter(),
            rejected=Counter({reason: 0 for reason in REASONS}),
            unreadable=0,
            failed=[],
            damaged=journal.damaged,
            spent=journal.spent,
            folder=folder,
        )
        rejected: list[str] = []
        asked = [_assemble(record, list(prompts(record)), journal, language, summary, rejected) for record in told]
    write_whole(folder / REJECTED_FILE, rejected)
    if not summary.questions.total():
        raise ValueError(f"not one question came of {len(told)} records; {folder} holds the replies")
    write_manifest(target, asked)
    return summary


def _is_done(journal: Journal, record: Record, prompt: Prompt) -> bool:
    line = journal.lines.get((record.key, prompt.family))
    return line is not None and line.error is None and line.prompt_sha256 == prompt.sha256


async def _ask(
    endpoint: Endpoint,
    todo: Iterator[tuple[Record, Prompt]],
    journal: Journal,
    give_up_after: int,
    report: Callable[[int], None] | None,
) -> None:
    """Puts an answer to each prompt into the journal, several at a time."""
    done = failures = 0

    async def work() -> None:
        nonlocal done, failures
        for record, prompt in todo:  # shared: each is taken once
            answer = await endpoint.ask(prompt.text, prompt.seed)
            journal.append(_line(record, prompt, answer, endpoint.model))
            done += 1
            if answer.error is None:
                failures = 0
            elif not (answer.is_refused and endpoint.has_answered):
                failures += 1
            if report is not None:
                report(done)
            if failures >= give_up_after:
                raise EndpointError(
                    f"stopped: the last {failures} requests to {endpoint.url} failed, the last with: {answer.error}; "
                    "the same command goes on"
                )

    async with endpoint:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(endpoint.connection.concurrency):
                    group.create_task(work())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None


def _line(record: Record, prompt: Prompt, answer: Answer, model: str) -> Line:
    return Line(
        key=record.key,
        family=prompt.family,
        prompt_sha256=prompt.sha256,
        model=answer.model or model,
        seed=prompt.seed,
        reply=answer.text,
        error=answer.error,
        is_cut=answer.is_cut,
        requests=answer.requests,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        unmetered=answer.unmetered,
    )


def _assemble(
    record: Record, prompts: Sequence[Prompt], journal: Journal, language: str, summary: Summary, rejected: list[str]
) -> Record:
    """The record with the questions kept of its replies; counts in `summary`, tells what is left out in `rejected`."""
    questions: list[Question] = []
    seen: set[str] = set()
    told: dict[str, Any] = {"seed": prompts[0].seed}
    for prompt in prompts:
        line = journal.lines[record.key, prompt.family]
        status = "ok"
        if line.reply is None:
            status = f"failed: {line.error}"
            summary.failed.append(line)
        else:
            pairs = parse_reply(line.reply)
            if not pairs:
                status = "unreadable"
                summary.unreadable += 1
            kept, left_out = sift(pairs, prompt, language=language, seen=seen, is_cut=line.is_cut)
            questions += [Question(pair.question, pair.answer, prompt.family) for pair in kept]
            summary.questions[prompt.family] += len(kept)
            summary.rejected.update(found.reason for found in left_out)
            about = {"key": record.key, "family": prompt.family}
            for found in left_out:
                row = about | dataclasses.asdict(found.pair) | {"reason": found.reason}
                rejected.append(json.dumps(row, ensure_ascii=False) + "\n")
        told[prompt.family] = {"status": status, "model": line.model, "prompt_sha256": prompt.sha256}
    return dataclasses.replace(record, questions=tuple(questions), extra={**record.extra, "instruct": told})


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
