"""Files of embeddings or similarities: NumPy archives (.npz), by whatever model they were made.

    keys              str[N]         of the videos; where it is left out "0", "1", ...
    embeddings        float[N, E]    of the videos, NaN where one failed (`pyvdl embed --export npz`)
    text_keys         str[M]         of retrieval: the key of the video that each text describes, texts of one video in
                                     the order of its captions; where it is left out, text i describes video i
    text_embeddings   float[M, E]
    similarity        float[M, N]    in place of both embeddings
    classes           str[C]         of zero-shot classes: their names
    class_embeddings  float[C, E], or float[C, K, E] of K templates
    class_similarity  float[N, C]    in place of both embeddings
    labels            str[N]         the right classes, where no annotations are beside the file

Embeddings are compared by their cosine.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pyvdl.benchmarks import Task
from pyvdl.data import Record
from pyvdl.evaluate.blocks import broken
from pyvdl.evaluate.report import Result, Score
from pyvdl.evaluate.retrieval import RECALL_AT, Direction, Pairs, direction_scores, score_classes
from pyvdl.metrics import Ahead, Ties

Arrays = dict[str, np.ndarray]
_NAMES = ("keys", "embeddings", "errors", "text_keys", "text_embeddings", "similarity", "classes", "class_embeddings")
NAMES = (*_NAMES, "class_similarity", "labels")
_TITLES: Mapping[Direction, str] = {"t2v": "text to video", "v2t": "video to text"}
_UNIT = 1e-3  # how far from 1 the length of an embedding may be to be left as it is


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of predictions; ValueError names file, array and what was expected."""
    try:
        with np.load(path, allow_pickle=False) as found:
            if unknown := sorted(set(found.files) - set(NAMES)):
                raise ValueError(f"it has {unknown[0]!r}: expected of {', '.join(NAMES)}")
            arrays = {name: found[name] for name in found.files}
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: {error}") from error
    return arrays


def tasks_of(arrays: Arrays) -> list[Task]:
    """What a file without annotations is of."""
    tasks: list[Task] = []
    if "text_embeddings" in arrays or "similarity" in arrays:
        tasks.append("retrieval")
    if "class_embeddings" in arrays or "class_similarity" in arrays:
        tasks.append("classes")
    return tasks


def score_arrays(arrays: Arrays, records: Sequence[Record] | None, task: Task, source: object, seed: int = 0) -> Result:
    """Scores retrieval or classes; of `records`, if given, each must be there. `source` names where the arrays are
    from."""
    found = _Reading(arrays, source)
    if task == "retrieval":
        return _retrieval(found.pairs(records), seed)
    return _classes(*found.classes(records), seed)


@dataclasses.dataclass(frozen=True)
class _Reading:
    """Arrays that are checked as they are asked for."""

    arrays: Arrays
    source: object

    def fault(self, name: str, expected: str) -> ValueError:
        found = self.arrays.get(name)
        shape = "is missing" if found is None else f"is {found.dtype}{list(found.shape)}"
        return ValueError(f"{self.source}: {name} {shape}: expected {expected}")

    def matrix(self, name: str, expected: str, columns: int | None = None, may_fail: bool = False) -> np.ndarray:
        """Floats of two dimensions; NaN is refused unless rows may fail."""
        found = self.arrays.get(name)
        good = found is not None and found.ndim == 2 and found.dtype.kind == "f" and 0 not in found.shape
        if found is None or not good or (columns or found.shape[1]) != found.shape[1]:
            raise self.fault(name, expected)
        if not may_fail and (bad := np.flatnonzero(np.isnan(found.min(axis=1)))).size:
            raise ValueError(
                f"{self.source}: {name}[{bad[0]}] has NaN: expected numbers: only embeddings of videos may fail"
            )
        return found

    def names(self, name: str, length: int, default: Callable[[], list[str]]) -> list[str]:
        found = self.arrays.get(name)
        if found is None:
            return default()
        if found.shape != (length,) or found.dtype.kind not in "Uiu":
            raise self.fault(name, f"{length} strings")
        return [str(value) for value in found.tolist()]

    def embeddings(self, name: str, expected: str, columns: int | None = None, may_fail: bool = False) -> np.ndarray:
        """float32 of length 1, or NaN where one failed."""
        found = np.asarray(self.matrix(name, expected, columns, may_fail), np.float32)
        lengths = np.sqrt(np.einsum("ne,ne->n", found, found))
        bad = np.flatnonzero((lengths == 0) | np.isinf(lengths))
        if len(bad):
            raise ValueError(f"{self.source}: {name}[{bad[0]}] has the length {lengths[bad[0]]}: expected a direction")
        if (np.abs(lengths - 1) > _UNIT).any():
            found = found / lengths[:, None]
        return found

    def keys(self, length: int) -> list[str]:
        keys = self.names("keys", length, lambda: [str(i) for i in range(length)])
        if len(set(keys)) != length:
            ((twice, _),) = Counter(keys).most_common(1)
            raise ValueError(f"{self.source}: keys has {twice!r} twice: expected each video once")
        return keys

    def order(self, keys: list[str], records: Sequence[Record]) -> np.ndarray:
        """int[N]: the row of each record; each must have one, and none may be of others."""
        place = {key: i for i, key in enumerate(keys)}
        missing = [record.key for record in records if record.key not in place]
        if missing:
            raise ValueError(
                f"{self.source}: {len(missing)} of {len(records)} videos are missing, the first is {missing[0]!r}: "
                "add their rows, of NaN where a video failed"
            )
        if len(keys) > len(records):
            extra = (set(keys) - {record.key for record in records}).pop()
            raise ValueError(f"{self.source}: key {extra!r} is not in this test: take its row out")
        return np.array([place[record.key] for record in records])

    def pairs(self, records: Sequence[Record] | None) -> Pairs:
        videos = texts = similarity = None
        if "similarity" in self.arrays:
            similarity = self.matrix("similarity", "floats of [texts, videos]")
            num_texts, num_videos = similarity.shape
        else:
            videos = self.embeddings(
                "embeddings", "floats of [videos, E], or similarity of [texts, videos]", may_fail=True
            )
            texts = self.embeddings("text_embeddings", f"floats of [texts, {videos.shape[1]}]", videos.shape[1])
            num_texts, num_videos = len(texts), len(videos)
        keys = self.keys(num_videos)
        if "text_keys" not in self.arrays and num_texts != num_videos:
            raise self.fault("text_keys", f"the video's key for each of the {num_texts} texts of {num_videos} videos")
        place = {key: i for i, key in enumerate(keys)}
        told = self.names("text_keys", num_texts, lambda: keys)
        if unknown := [key for key in told if key not in place]:
            raise ValueError(
                f"{self.source}: text_keys has {unknown[0]!r}, which is not in keys: expected its video there"
            )
        owners = np.array([place[key] for key in told])
        if records is not None:
            self._check_texts(self.order(keys, records), owners, records)
        return Pairs(owners=owners, videos=videos, texts=texts, similarity=similarity)

    def _check_texts(self, rows: np.ndarray, owners: np.ndarray, records: Sequence[Record]) -> None:
        counts = np.bincount(owners, minlength=len(rows))[rows]
        for record, count in zip(records, counts.tolist()):
            if count != len(record.captions):
                raise ValueError(
                    f"{self.source}: text_keys has {record.key!r} {count} times: expected {len(record.captions)}, once "
                    "for each of its captions"
                )

    def classes(self, records: Sequence[Record] | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """Similarities float[N, C], labels int[N], failed bool[N], names."""
        if "class_similarity" in self.arrays:
            similarity = self.matrix("class_similarity", "floats of [videos, classes]")
            failed = np.zeros(len(similarity), bool)
        else:
            videos = self.embeddings(
                "embeddings", "floats of [videos, E], or class_similarity of [videos, classes]", may_fail=True
            )
            failed = broken(videos)
            similarity = np.where(failed[:, None], 0, videos) @ self._class_embeddings(videos.shape[1]).T
        names = self.names("classes", similarity.shape[1], lambda: [str(i) for i in range(similarity.shape[1])])
        place = {name: i for i, name in enumerate(names)}
        if len(place) < len(names):
            raise ValueError(f"{self.source}: classes has a name twice: expected each class once")
        if records is not None:
            rows = self.order(self.keys(len(similarity)), records)
            similarity, failed = similarity[rows], failed[rows]
            labels = [str(record.label) for record in records]
        else:
            if "labels" not in self.arrays:
                raise self.fault("labels", "the right classes, or the benchmark's annotations beside this file")
            labels = self.names("labels", len(similarity), list)
        for label in labels:
            if label not in place:
                raise ValueError(f"{self.source}: the label {label!r} is not in classes: expected such as {names[0]!r}")
        return similarity, np.array([place[label] for label in labels]), failed, names

    def _class_embeddings(self, width: int) -> np.ndarray:
        found = self.arrays.get("class_embeddings")
        expected = f"floats of [classes, {width}], or [classes, templates, {width}]"
        if found is None or found.ndim != 3:
            return self.embeddings("class_embeddings", expected, width)
        flat = _Reading({"class_embeddings": found.reshape(-1, found.shape[2])}, self.source)
        each = flat.embeddings("class_embeddings", expected, width)
        mean = each.reshape(found.shape).mean(1)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def _retrieval(pairs: Pairs, seed: int) -> Result:
    scores: dict[str, Score] = {}
    more: dict[str, Score] = {}
    counts = np.bincount(pairs.owners)
    several = bool((counts > 1).any())
    tied: dict[str, int] = {}

    def tell_all(protocol: str, pairs: Pairs, pooled: bool) -> None:
        for direction, title in _TITLES.items():
            for pool in (False, True) if pooled and direction == "v2t" else (False,):
                ahead = pairs.ahead(direction, pool)
                ties = int((ahead.equal > ahead.right).sum())
                prefix = f"{protocol}{title}{', captions pooled' if pool else ''}"
                tied[f"tied_queries of {prefix}"] = ties
                found = _named(prefix, pairs, direction, ahead, "strict", seed)
                scores.update(found)
                for rule in ("loose", "expected"):
                    other = _named(prefix, pairs, direction, ahead, rule, seed) if ties else found
                    more.update({f"{name}, {rule} ties": score for name, score in other.items()})

    tell_all("", pairs, several)
    if several:
        tell_all("first caption: ", pairs.some(np.unique(pairs.owners, return_index=True)[1]), False)
    return Result(
        task="retrieval",
        metrics=("retrieval",),
        scores=scores,
        more=more,
        counts={
            "videos": len(pairs.failed),
            "texts": len(pairs.owners),
            "failed": int(pairs.failed.sum()),
        }
        | tied,
    )


def _named(prefix: str, pairs: Pairs, direction: Direction, ahead: Ahead, ties: Ties, seed: int) -> dict[str, Score]:
    values, intervals, _ = direction_scores(pairs, direction, ahead, ties=ties, seed=seed)
    names = (*(f"R@{k}" for k in RECALL_AT), "median_rank", "mean_rank")
    return {f"{prefix} {name.replace('_', ' ')}": Score(values[name], *intervals[name]) for name in names}


def _classes(similarity: np.ndarray, labels: np.ndarray, failed: np.ndarray, names: list[str], seed: int) -> Result:
    found = score_classes(similarity, labels, failed=failed, seed=seed)
    return Result(
        task="classes",
        metrics=("zero-shot",),
        scores={f"zero-shot top-{k}": Score(getattr(found, f"top{k}"), *found.intervals[f"top{k}"]) for k in (1, 5)},
        counts={"clips": len(labels), "classes": len(names), "failed": found.failed},
        options={"classes": names},
    )
