"""Files of captions, answers and chosen options: JSON lines, by whatever model they were made.

    {"key": "video7010", "prediction": "a man talks"}                       a caption of a clip
    {"key": "video7010", "question": "0", "prediction": "couch"}            an answer
    {"key": "11", "question": "8", "prediction": 2}                         the number of an option, from 0

`key` is the clip's, `question` the data set's key of the question, or its number in the record where it has none. A
clip that a model could not take has "" (or -1) and may say why in `error`. A line that has `references` (all right
captions or answers), or `options` and `correct`, needs no annotations beside it; `type` and `family` of a question are
those of a manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from pyvdl import metrics
from pyvdl.benchmarks import Task
from pyvdl.data import Family, Question, Record, parse_object
from pyvdl.evaluate.report import Result, Score, mean_score
from pyvdl.evaluate.scores import answer_points, owners, score_captions, score_choices

_FORMS: Mapping[Task, str] = {
    "captions": '{"key": KEY, "prediction": CAPTION}',
    "questions": '{"key": KEY, "question": QUESTION, "prediction": ANSWER}',
    "choices": '{"key": KEY, "question": QUESTION, "prediction": NUMBER}',
}
_SLOW_RESAMPLES = 500  # of BLEU, which is no mean over clips
Item = tuple[str, str | None]  # key and question


@dataclass(frozen=True)
class Row:
    """One line, and where it stands."""

    value: Mapping[str, Any]
    where: str

    @property
    def item(self) -> Item:
        asked = self.value.get("question")
        return str(self.value["key"]), None if asked is None else str(asked)

    def fault(self, name: str, expected: str) -> ValueError:
        found = f"is {self.value[name]!r:.80}" if name in self.value else "is missing"
        return ValueError(f"{self.where}: {name} {found}: expected {expected}")


def read_rows(path: Path) -> list[Row]:
    """The lines of a file of predictions; ValueError names file, line and what was expected."""
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    rows.append(Row(parse_object(line.decode("utf-8-sig")), f"{path}:{number}"))
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: {error}") from error
                _check(rows[-1])
    if not rows:
        raise ValueError(f"{path}: no predictions: expected JSON lines such as {_FORMS['captions']}")
    return rows


def _check(row: Row) -> None:
    for name in ("key", "question"):
        if (name == "key" or name in row.value) and type(row.value.get(name)) not in (str, int):
            raise row.fault(name, "a string" if name == "key" else "a string, the data set's key of the question")
    if type(row.value.get("prediction")) not in (str, int):
        raise row.fault("prediction", "a string, or the number of an option")
    for name in ("references", "options"):
        found = row.value.get(name, [""])
        if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
            raise row.fault(name, "a list of strings")
    if not isinstance(row.value.get("type", ""), str):
        raise row.fault("type", "a string, the data set's type of the question")
    if row.value.get("family") not in (None, *get_args(Family)):
        raise row.fault("family", f"one of {', '.join(get_args(Family))}")


def task_of(rows: Sequence[Row]) -> Task:
    """What was asked, by the first line."""
    first = rows[0].value
    return "choices" if "correct" in first else "questions" if "question" in first else "captions"


def records_of(rows: Sequence[Row], task: Task) -> list[Record]:
    """The test that lines with references are of."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.item[0], []).append(row)
    if task == "captions":
        return [Record(key=key, video="", captions=_references(some[0])) for key, some in found.items()]
    ask = _choice if task == "choices" else _question
    return [Record(key=key, video="", questions=tuple(map(ask, some))) for key, some in found.items()]


def _references(row: Row) -> tuple[str, ...]:
    if "references" not in row.value:
        raise row.fault("references", "the right texts, or the benchmark's annotations beside this file")
    return tuple(row.value["references"])


def _question(row: Row) -> Question:
    first, *more = _references(row)
    return Question(question="", answer=first, references=tuple(more), key=row.item[1], **_kind(row))


def _choice(row: Row) -> Question:
    options, correct = row.value.get("options"), row.value.get("correct")
    if options is None:
        raise row.fault("options", "all options, or the benchmark's annotations beside this file")
    if type(correct) is not int or not 0 <= correct < len(options):
        raise row.fault("correct", f"the number of the right option, 0 to {len(options) - 1}")
    right = options[correct]
    return Question("", right, options=tuple(options), correct=correct, key=row.item[1], **_kind(row))


def _kind(row: Row) -> dict[str, Any]:
    return {name: row.value[name] for name in ("type", "family") if name in row.value}


def items(records: Sequence[Record], task: Task) -> list[Item]:
    """What needs a prediction, in the records' order."""
    if task == "captions":
        return [(record.key, None) for record in records]
    return [
        (record.key, str(number) if question.key is None else question.key)
        for record in records
        for number, question in enumerate(record.questions)
    ]


def score_rows(rows: Sequence[Row], records: Sequence[Record], task: Task, source: object, seed: int = 0) -> Result:
    """Scores the predictions of every item, each of which there must be once; `source` names where they are from."""
    wanted = items(records, task)
    found: dict[Item, Row] = {}
    known = set(wanted)
    for row in rows:
        if (task == "captions") == ("question" in row.value):
            asked = "the data set's key of the question, or its number in the record"
            raise row.fault("question", "none with a caption" if task == "captions" else asked)
        if row.item not in known:
            raise ValueError(
                f"{row.where}: {_name(row.item)} is not in this test (it has {_name(wanted[0])}): take it out"
            )
        if row.item in found:
            raise ValueError(f"{row.where}: {_name(row.item)} is in {found[row.item].where} already: expected it once")
        found[row.item] = row
    if missing := [item for item in wanted if item not in found]:
        raise ValueError(
            f"{source}: {len(missing)} of {len(wanted)} predictions are missing, the first of {_name(missing[0])}: "
            f'add lines {_FORMS[task]}, with "" where there is none'
        )
    ordered = [found[item] for item in wanted]
    failed = len({row.item[0] for row in ordered if row.value.get("error")})
    score = {"captions": _score_captions, "questions": _score_questions, "choices": _score_choices}[task]
    return score(ordered, records, failed, seed)


def _name(item: Item) -> str:
    return f"key {item[0]!r}" if item[1] is None else f"key {item[0]!r} with question {item[1]!r}"


def _texts(rows: Sequence[Row]) -> list[str]:
    for row in rows:
        if not isinstance(row.value["prediction"], str):
            raise row.fault("prediction", "a string")
    return [row.value["prediction"] for row in rows]


def _score_captions(rows: list[Row], records: Sequence[Record], failed: int, seed: int) -> Result:
    captions, references = _texts(rows), [record.captions for record in records]
    found = score_captions(captions, references, failed, seed)
    bleu, rouge = metrics.bleu(captions, references), metrics.rouge_l(captions, references)
    scores = {"CIDEr-D": Score(found.cider, *found.interval)}
    for n, value in enumerate(bleu.score):

        def resampled(picks: np.ndarray, n: int = n) -> float:
            return 100 * metrics.bleu_of_counts(bleu.counts[picks.astype(int)])[n]

        numbers = np.arange(len(rows))
        interval = metrics.bootstrap_interval(numbers, statistic=resampled, resamples=_SLOW_RESAMPLES, seed=seed)
        scores[f"BLEU-{n + 1}"] = Score(100 * value, *interval)
    scores["ROUGE-L"] = mean_score(100 * rouge.per_item, seed=seed)
    points = {"CIDEr-D": found.per_item, "ROUGE-L": 100 * rouge.per_item}
    return Result(
        task="captions",
        metrics=("CIDEr-D", "BLEU", "ROUGE-L"),
        scores=scores,
        counts={"clips": len(rows), "references": sum(map(len, references)), "failed": failed},
        rows=_scored(rows, points, [{"references": list(texts)} for texts in references]),
    )


def _score_questions(rows: list[Row], records: Sequence[Record], failed: int, seed: int) -> Result:
    questions = [question for record in records for question in record.questions]
    owner = owners([len(record.questions) for record in records])
    points = answer_points(_texts(rows), [q.answers for q in questions], [q.type for q in questions])
    titles = {
        "exact_match": "exact match",
        "exact_match_normalised": "exact match, lower and strip",
        "wups": "WUPS",
        "wups_09": "WUPS at 0.9",
    }
    scores = {titles[name]: mean_score(values, owner, seed) for name, values in points.items()}
    for name in ("exact_match", "wups"):
        scores |= _by_kind(titles[name], points[name], questions, owner, seed)
    known = [{"references": list(q.answers)} | _told(q) for q in questions]
    return Result(
        task="questions",
        metrics=("exact match", "WUPS"),
        scores=scores,
        counts={"clips": len(records), "questions": len(rows), "failed": failed},
        rows=_scored(rows, {titles[name]: values for name, values in points.items()}, known),
    )


def _score_choices(rows: list[Row], records: Sequence[Record], failed: int, seed: int) -> Result:
    questions = [question for record in records for question in record.questions]
    owner = owners([len(record.questions) for record in records])
    for row, question in zip(rows, questions):
        choice = row.value["prediction"]
        if type(choice) is not int or not -1 <= choice < len(question.options):
            raise row.fault("prediction", f"the number of an option, 0 to {len(question.options) - 1}, or -1 for none")
    found = score_choices(np.array([row.value["prediction"] for row in rows]), questions, owner, failed, seed)
    scores = {"accuracy": Score(found.accuracy, *found.interval)}
    scores |= _by_kind("accuracy", found.per_question, questions, owner, seed)
    known = [{"options": list(q.options), "correct": q.correct} | _told(q) for q in questions]
    return Result(
        task="choices",
        metrics=("multiple choice",),
        scores=scores,
        counts={"clips": len(records), "questions": len(rows), "failed": failed},
        rows=_scored(rows, {"accuracy": found.per_question}, known),
    )


def _told(question: Question) -> dict[str, Any]:
    """Its kind, as `_kind` reads it."""
    named = {"type": question.type, "family": question.family}
    return {name: value for name, value in named.items() if value is not None}


def _by_kind(
    title: str, points: np.ndarray, questions: Sequence[Question], owner: np.ndarray, seed: int
) -> dict[str, Score]:
    """The same score of each family and of each type; NExT-QA's TP counts as TN, as in its own tables."""
    merged = [("TN" if q.type == "TP" else q.type) for q in questions]
    scores = {}
    for kinds in (np.array([q.family or "" for q in questions]), np.array([kind or "" for kind in merged])):
        for kind in sorted({*kinds.tolist()} - {""}):
            mine = kinds == kind
            scores[f"{title}, {kind}"] = mean_score(points[mine], owner[mine], seed)
    return scores


def _scored(rows: Sequence[Row], points: Mapping[str, np.ndarray], known: Sequence[dict[str, Any]]) -> list[Any]:
    """The lines again, each with what is right and its scores: they are read without annotations then."""
    return [
        {name: row.value[name] for name in ("key", "question", "prediction", "error") if name in row.value}
        | right
        | {"scores": {name: float(values[i]) for name, values in points.items()}}
        for i, (row, right) in enumerate(zip(rows, known))
    ]
