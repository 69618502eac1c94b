"""Manifests, and batches: order, resume, failed clips, shares of several processes."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pyvdl.config import ClipConfig
from pyvdl.data import Batches, Question, Record, read_manifest, write_manifest
from pyvdl.video import sample_clip

CLIP = ClipConfig(num_frames=2, sampling="random", short_side=24, size=16, crop="random", scale_jitter=(0.9, 1.1))


def records(count: int) -> list[Record]:
    return [
        Record(key=f"k{i}", video=f"{i}.mp4", captions=(f"one {i}", f"two {i}", f"three {i}")) for i in range(count)
    ]


def encode(record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"caption": np.array([int(record.key[1:]), rng.integers(3)], np.int32), "draw": np.array(rng.random())}


def text_only(count: int, **changes: Any) -> Batches:
    arguments: dict[str, Any] = {"encode": encode, "clip": None, "batch_size": 4, "seed": 3, **changes}
    return Batches(records(count), **arguments)


def assert_same(got: list[dict[str, np.ndarray]], wanted: list[dict[str, np.ndarray]]) -> None:
    assert len(got) == len(wanted)
    for x, y in zip(got, wanted):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


def take(batches: Batches, count: int) -> list[dict[str, np.ndarray]]:
    return [next(batches) for _ in range(count)]


def test_a_url_in_a_manifest_stays_as_it_is(tmp_path: Path) -> None:
    wanted = [Record(key="a", video="s3://bucket//clips/../a.mp4"), Record(key="b", video=str(tmp_path / "b.mp4"))]
    write_manifest(tmp_path / "m.jsonl", wanted)
    assert read_manifest(tmp_path / "m.jsonl") == wanted


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    wanted = [
        Record(key="a", video=str(tmp_path / "videos" / "a.mp4")),
        Record(
            key="b",
            video="/elsewhere/b.mp4",
            start_seconds=1.5,
            end_seconds=3.0,
            captions=("Ein Bär läuft.", "two"),
            narrative="<Ball> rolls.",
            alt_text="nice",
            questions=(
                Question(question="what?", answer="a ball", family="causal"),
                Question(question="who?", answer="he", type="CW", references=("a man", "him"), key="7"),
                Question(question="where?", answer="here", options=("here", "there", "here"), correct=2),
            ),
            label="rolls",
            split="train",
            group="b",
            extra={"views": 3, "tags": ["x"]},
        ),
    ]
    write_manifest(tmp_path / "m.jsonl", wanted)
    assert read_manifest(tmp_path / "m.jsonl") == wanted
    first = json.loads((tmp_path / "m.jsonl").read_text().splitlines()[0])
    assert first == {"key": "a", "video": "videos/a.mp4"}
    questions = json.loads((tmp_path / "m.jsonl").read_text().splitlines()[1])["questions"]
    assert questions[0] == {"question": "what?", "answer": "a ball", "family": "causal"}
    assert questions[2] == {"question": "where?", "answer": "here", "options": ["here", "there", "here"], "correct": 2}
    assert [question.answers for question in wanted[1].questions] == [("a ball",), ("he", "a man", "him"), ("here",)]
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected one JSON object"),
        ("[]", "expected a JSON object"),
        ('{"key": "b"}', "'video' is missing: expected a non-empty string"),
        ('{"video": "b.mp4"}', "'key' is missing"),
        ('{"key": "b", "video": 3}', "video is 3: expected a string"),
        ('{"key": "b", "video": "b", "start_seconds": -1}', "start_seconds is -1: expected a number of 0 or more"),
        ('{"key": "b", "video": "b", "start_seconds": null}', "start_seconds is None"),
        ('{"key": "b", "video": "b", "start_seconds": 2, "end_seconds": 2}', "end_seconds is 2: .* above 2 or null"),
        ('{"key": "b", "video": "b", "captions": "text"}', "captions is 'text': expected a list of strings"),
        (
            '{"key": "b", "video": "b", "questions": [{"question": "q"}]}',
            "questions: answer is None: expected a string",
        ),
        (
            '{"key": "b", "video": "b", "questions": [{"question": "q", "answer": "a", "family": "why"}]}',
            "family is 'why': expected one of .*temporal.*causal.*short",
        ),
        *(
            (f'{{"key": "b", "video": "b", "questions": [{{"question": "q", "answer": "a", {more}}}]}}', message)
            for more, message in (
                ('"type": 3', "questions: type is 3: expected a string"),
                ('"references": "a"', "questions: references is 'a': expected a list of strings"),
                ('"options": ["a"]', "questions: correct is None: expected the index of the answer among 1 options"),
                ('"options": ["b", "a"], "correct": 0', "correct is 0: expected the index of the answer among 2 opt"),
                ('"options": ["b", "a"], "correct": 2', "correct is 2: expected the index"),
                ('"options": ["b", "a"], "correct": true', "correct is True: expected the index"),
                ('"correct": 0', "questions: correct is 0: expected the index of the answer among 0 options"),
                ('"source": "x"', "questions is .*'source'.*: expected only answer, correct, family, key, options"),
            )
        ),
        ('{"key": "a", "video": "b"}', "key 'a' stands on line 1 already"),
        ('{"key": "caf\udce9", "video": "b"}', "can't decode byte 0xe9"),
        ('{"key": "b", "video": "b", "start_seconds": 1e400}', "start_seconds is inf: expected a number of 0 or more"),
        (f'{{"key": "b", "video": "b", "end_seconds": {10**400}}}', "end_seconds is 10{79}: expected a number above"),
        (f'{{"key": "b", "video": "b", "end_seconds": {"9" * 5000}}}', "Exceeds the limit"),
    ],
)
def test_errors_name_file_line_and_expectation(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"key": "a", "video": "a.mp4"}\n\n' + line + "\n", errors="surrogateescape")
    with pytest.raises(ValueError, match=rf"m\.jsonl:3: .*{message}"):
        read_manifest(path)


def test_a_record_is_made_of_strings_and_tuples_of_them() -> None:
    with pytest.raises(TypeError, match="video must be a string, not PosixPath"):
        Record(key="a", video=Path("a.mp4"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="captions must be a tuple of texts, not the one text 'it moves'"):
        Record(key="a", video="a.mp4", captions="it moves")  # type: ignore[arg-type]


def test_an_epoch_has_every_record_once_in_an_order_of_its_own() -> None:
    got = [int(i) for batch in take(text_only(10), 10) for i in batch["index"]]
    epochs = [got[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [int(i) for batch in take(text_only(10, seed=4), 3) for i in batch["index"]][:10] != epochs[0]
    plain = [int(i) for batch in take(text_only(10, shuffle=False), 5) for i in batch["index"]]
    assert plain == list(range(10)) * 2


def test_a_mixture_draws_from_each_set_by_its_weight() -> None:
    """Of 2 and 8 records a quarter and the rest: the small set goes through four epochs, the large through three."""
    mixture = [(2, 1.0), (8, 3.0)]
    rows = [int(i) for batch in take(text_only(10, mixture=mixture), 8) for i in batch["index"]]
    small, large = [i for i in rows if i < 2], [i for i in rows if i >= 2]
    assert abs(3 * len(small) - len(large)) <= 3
    assert all(sorted(small[i : i + 2]) == [0, 1] for i in range(0, len(small) - 1, 2))
    assert all(sorted(large[i : i + 8]) == list(range(2, 10)) for i in range(0, len(large) - 7, 8))
    again = text_only(10, mixture=mixture)
    take(again, 1)
    state = again.get_state()
    rest = text_only(10, mixture=mixture)
    rest.set_state(state)
    assert [int(i) for batch in take(rest, 7) for i in batch["index"]] == rows[4:]
    for other in ([(5, 1.0), (5, 1.0)], None):
        with pytest.raises(ValueError, match="the saved position is one of"):
            text_only(10, mixture=other).set_state(state)
    with pytest.raises(ValueError, match="expected all 10 records"):
        text_only(10, mixture=[(2, 1.0), (2, 1.0)])


def test_sets_of_a_mixture_have_orders_of_their_own() -> None:
    """Two sets of the same clips, with other captions, do not go side by side."""
    rows = [int(i) for batch in take(text_only(16, mixture=[(8, 1.0), (8, 1.0)]), 8) for i in batch["index"]]
    assert [i for i in rows if i < 8] != [i - 8 for i in rows if i >= 8]


def test_arrays_belong_to_their_record_and_change_with_the_epoch() -> None:
    batches = take(text_only(8), 40)
    for batch in batches:
        np.testing.assert_array_equal(batch["caption"][:, 0], batch["index"])
        assert batch["index"].dtype == np.int64
        assert batch["ok"].all()
    draws = Counter(int(x) for batch in batches for x in batch["caption"][:, 1])
    assert min(draws.values()) > 30  # of 160, a third each
    assert len({float(x) for batch in batches for x in batch["draw"]}) == 160
    assert_same(batches, take(text_only(8), 40))


def test_a_remainder_is_dropped_or_filled_with_rows_that_do_not_count() -> None:
    assert len(list(text_only(10, num_epochs=1))) == 2
    last = list(text_only(10, num_epochs=1, shuffle=False, drop_remainder=False))[2]
    assert last["index"].tolist() == [8, 9, -1, -1]
    assert last["ok"].tolist() == [True, True, False, False]
    assert last["caption"].shape == (4, 2)


@pytest.mark.parametrize("drop_remainder", [True, False])
def test_processes_share_the_same_global_batches(drop_remainder: bool) -> None:
    arguments: dict[str, Any] = {"num_epochs": 3, "drop_remainder": drop_remainder}
    whole = list(text_only(10, **arguments))
    parts = [list(text_only(10, **arguments, process_index=i, process_count=2)) for i in range(2)]
    assert len(parts[0]) == len(parts[1]) == len(whole)
    for batch, *shares in zip(whole, *parts):
        for name, value in batch.items():
            together = np.stack([share[name] for share in shares], axis=1).reshape(value.shape)
            np.testing.assert_array_equal(together, value)


def test_a_position_is_that_of_the_batch_handed_out_last() -> None:
    whole = take(text_only(10), 9)
    first = text_only(10)
    take(first, 4)
    state = json.loads(json.dumps(first.get_state()))
    second = text_only(10, process_count=1)
    second.set_state(state)
    assert_same(take(second, 5), whole[4:])
    first.set_state(text_only(10).get_state())
    assert_same(take(first, 2), whole[:2])
    with pytest.raises(ValueError, match=r"'seed': 3.*'seed': 5"):
        text_only(10, seed=5).set_state(state)
    with pytest.raises(ValueError, match=r"'records': 10.*'records': 11"):
        text_only(11).set_state(state)


def together(processes: list[Batches], count: int) -> list[dict[str, np.ndarray]]:
    """The next global batches of all processes: each holds every len(processes)-th row."""
    shares = zip(*(take(process, count) for process in processes))
    return [
        {
            name: np.stack([share[name] for share in batch], axis=1).reshape(-1, *batch[0][name].shape[1:])
            for name in batch[0]
        }
        for batch in shares
    ]


def handed_on(make: Callable[..., Batches], counts: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
    """Two global batches from as many processes as the first of `counts` says, then two from the next, which go on from
    the position of the last process before them."""
    found: list[dict[str, np.ndarray]] = []
    state: dict[str, Any] | None = None
    for count in counts:
        processes = [make(process_index=i, process_count=count) for i in range(count)]
        for process in processes:
            if state is not None:
                process.set_state(json.loads(json.dumps(state)))
        found += together(processes, 2)
        state = processes[-1].get_state()
        assert all(process.get_state() == state for process in processes)
        for process in processes:
            process.close()
    return found


@pytest.mark.parametrize("counts", [(1, 2, 4), (4, 1, 2), (2, 4, 1)])
@pytest.mark.parametrize("mixture", [None, [(3, 1.0), (7, 2.0)]])
def test_a_position_survives_another_number_of_processes(
    counts: tuple[int, ...], mixture: list[tuple[int, float]] | None
) -> None:
    """Every global batch has the rows, in the order, that one process would have given."""
    make = partial(text_only, 10, mixture=mixture)
    assert_same(handed_on(make, counts), take(make(), 6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 3, "process_count": 2}, "batch_size=3.*multiple of the 2 processes"),
        ({"process_index": 2, "process_count": 2}, "process_index=2: expected 0 to 1"),
        ({"batch_size": 16, "num_epochs": 1}, "10 records do not fill one batch"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_only(10, **changes)
    with pytest.raises(ValueError, match="records is empty"):
        text_only(0)


def test_encode_must_not_replace_an_array_of_the_batch() -> None:
    with pytest.raises(ValueError, match="'index'"):
        next(text_only(10, encode=lambda record, rng: {"index": np.zeros(1)}))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Six clips of flat colour, grey level 30 * i; the fourth is damaged and the fifth is not there."""
    pytest.importorskip("pyvdl._core", reason="the C++ module is not built")
    folder = tmp_path_factory.mktemp("videos")
    for i in range(6):
        with av.open(str(folder / f"{i}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            ramp = np.linspace(0, 12, 32).astype(np.uint8)[None, :, None]
            for t in range(10):
                pixels = np.broadcast_to(ramp + np.uint8(30 * i + t), (32, 32, 3))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
            container.mux(stream.encode())
    (folder / "3.mp4").write_bytes((folder / "3.mp4").read_bytes()[:200])
    (folder / "4.mp4").unlink()
    path = folder / "m.jsonl"
    write_manifest(path, [Record(key=f"k{i}", video=str(folder / f"{i}.mp4")) for i in range(6)])
    return read_manifest(path)


def clips(manifest: list[Record], **changes: Any) -> Batches:
    arguments: dict[str, Any] = {"encode": encode, "clip": CLIP, "batch_size": 4, "seed": 3, **changes}
    return Batches(manifest, **arguments)


def test_clips_belong_to_their_records_and_failures_are_told(manifest: list[Record]) -> None:
    batches = clips(manifest)
    seen: Counter[int] = Counter()
    for batch in take(batches, 6):
        assert batch["video"].shape == (4, 2, 16, 16, 3)
        assert batch["video"].dtype == np.uint8
        np.testing.assert_array_equal(batch["caption"][:, 0], batch["index"])
        for video, ok, index in zip(batch["video"], batch["ok"], batch["index"]):
            seen[int(index)] += 1
            assert ok == (index not in (3, 4))
            if ok:
                assert abs(video.mean() - (30 * index + 10)) < 8
            else:
                assert not video.any()
    assert seen == Counter({i: 4 for i in range(6)})
    assert batches.failed_clips == 8
    assert batches.wait_seconds > 0
    batches.close()


def test_a_clip_is_its_segment_of_the_video(manifest: list[Record]) -> None:
    windows: list[dict[str, Any]] = [
        {"start_seconds": 0.3, "end_seconds": 0.7},
        {"start_seconds": 0.5, "end_seconds": None},
    ]
    found = [dataclasses.replace(manifest[0], key=str(window), **window) for window in windows]
    clip = ClipConfig(num_frames=2, sampling="uniform", short_side=24, size=16)
    batches = Batches(found, encode=lambda *_: {}, clip=clip, batch_size=2, seed=0, shuffle=False)
    for video, window in zip(next(batches)["video"], windows, strict=True):
        wanted = sample_clip(manifest[0].video, **dataclasses.asdict(clip), **window)
        np.testing.assert_array_equal(video, wanted.data)
    batches.close()


def test_clips_go_on_from_a_position_while_others_were_decoded_ahead(manifest: list[Record]) -> None:
    whole = take(clips(manifest, prefetch=1, num_threads=1), 7)
    first = clips(manifest, prefetch=3)
    take(first, 3)
    state = first.get_state()
    first.close()
    second = clips(manifest)
    second.set_state(state)
    assert_same(take(second, 4), whole[3:])
    second.close()
    first.set_state(state | {"position": 4})
    assert_same(take(first, 2), whole[1:3])  # what was decoded ahead of another position is forgotten
    first.close()
    again = {int(i): video for i, video in zip(whole[0]["index"], whole[0]["video"])}
    later = [(int(i), v) for batch in whole[2:4] for i, v in zip(batch["index"], batch["video"])]
    drawn = [not np.array_equal(again[i], video) for i, video in later if i in again and i not in (3, 4)]
    assert drawn
    assert all(drawn), "another epoch draws other crops"


def test_clips_survive_another_number_of_processes(manifest: list[Record]) -> None:
    assert_same(handed_on(partial(clips, manifest), (1, 4, 2)), take(clips(manifest), 6))


def test_filling_rows_of_the_last_batch_do_not_count(manifest: list[Record]) -> None:
    batches = clips(manifest, num_epochs=1, shuffle=False, drop_remainder=False)
    last = list(batches)[1]
    assert last["index"].tolist() == [4, 5, -1, -1]
    assert last["ok"].tolist() == [False, True, False, False]
    assert batches.failed_clips == 2
