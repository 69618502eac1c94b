"""The synthetic corpus: scenes that can be, words that fit them, files that hold what the manifests say."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pyvdl import instruct, pretrain
from pyvdl.config import ClipConfig
from pyvdl.data import Record, read_manifest
from pyvdl.synthetic import ALT_TEXT_NOISE, Corpus, corpus, make_corpus, words
from pyvdl.synthetic.render import draw_sprite, render
from pyvdl.synthetic.scene import ACTIONS, BACKGROUNDS, DIRECTIONS, KINDS, SPRITE, Scene, State, sample_scene, states

pytest.importorskip("pyvdl._core", reason="the C++ module is not built")

from pyvdl.video import VideoDecoder, sample_clip

CLIPS, SEED = 16, 3
NUM_SCENES = 300
FRACTIONS = np.linspace(0, 1, 13)  # of a clip


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(np.random.default_rng([11, i])) for i in range(NUM_SCENES)]


def actions(scene: Scene) -> tuple[str, ...]:
    return tuple(event.action for event in scene.events)


def at_end(scene: Scene) -> list[State]:
    return states(scene, scene.duration_seconds)


# Scenes.


def covered(points: np.ndarray, state: State) -> np.ndarray:
    """float[N, 2]: where the points of a sprite, each coordinate in [-1, 1], stand in the frame."""
    turn = np.deg2rad(state.angle_degrees)
    cos, sin = np.cos(turn), np.sin(turn)
    return points @ np.array([[cos, sin], [-sin, cos]]) * SPRITE * state.scale / 2 + [state.x, state.y]


def test_sprites_stay_within_the_frame_and_apart(scenes: list[Scene]) -> None:
    """At most a twentieth of a sprite is ever cut off or covered by another that it does not meet."""
    pairs = 0
    for scene in scenes[:120]:
        outlines = []
        for sprite in scene.sprites:
            alpha = np.asarray(draw_sprite(sprite).getchannel("A"))
            outlines.append(2 * (np.argwhere(alpha > 128)[:, ::-1] + 0.5) / len(alpha) - 1)
        for fraction in FRACTIONS:
            now = states(scene, float(fraction) * scene.duration_seconds)
            seen = [covered(points, state) for points, state in zip(outlines, now) if state.opacity > 0.02]
            for places in seen:
                assert np.mean((places < 0) | (places > 1)) < 0.05, (actions(scene), fraction)
            if len(seen) == 2 and "meet" not in actions(scene):
                pairs += 1
                cells = [set(map(tuple, np.floor(places * corpus.SIZE).astype(int))) for places in seen]
                assert len(cells[0] & cells[1]) < 0.05 * min(map(len, cells)), (actions(scene), fraction)
    assert pairs > 100


def test_everything_that_happens_can_be_seen(scenes: list[Scene]) -> None:
    """Events follow one another; each one changes its actors, who are there when it begins or when it ends."""
    for scene in scenes:
        last = 0.0
        for event in scene.events:
            assert last <= event.start < event.end <= 1.0
            last = event.end
            before = states(scene, event.start * scene.duration_seconds)
            after = states(scene, event.end * scene.duration_seconds)
            for actor in (0, 1) if event.action == "meet" else (event.actor,):
                old, new = before[actor], after[actor]
                change = max(
                    np.hypot(new.x - old.x, new.y - old.y),
                    abs(new.scale - old.scale),
                    abs(new.angle_degrees - old.angle_degrees) / 90,
                    abs(new.opacity - old.opacity),
                )
                assert change > 0.1, actions(scene)
                assert max(old.opacity, new.opacity) > 0.9, actions(scene)


def test_second_events_make_sense(scenes: list[Scene]) -> None:
    """Nobody acts before appearing or after vanishing (but to come back), and nobody does the same thing again."""
    for scene in scenes:
        for i in range(len(scene.sprites)):
            own = [event.action for event in scene.events if event.actor == i or event.action == "meet"]
            assert len(own) == len(set(own)), own
            assert "appear" not in own[1:] or own == ["vanish", "appear"], own
            assert "vanish" not in own[:-1] or own == ["vanish", "appear"], own
            assert scene.sprites[i].visible == (own[:1] != ["appear"])
    assert {len(scene.events) for scene in scenes} == {1, 2}
    assert {action for scene in scenes for action in actions(scene)} == set(ACTIONS)


def test_slides_end_where_they_lead(scenes: list[Scene]) -> None:
    ends = {"left": ("x", -1), "right": ("x", 1), "up": ("y", -1), "down": ("y", 1)}
    for scene in scenes:
        for event in scene.events:
            if event.action in DIRECTIONS:
                axis, sign = ends[event.action]
                before = getattr(states(scene, event.start * scene.duration_seconds)[event.actor], axis) - 0.5
                after = getattr(states(scene, event.end * scene.duration_seconds)[event.actor], axis) - 0.5
                assert sign * after > 0.15 > -0.15 > sign * before


def test_two_sprites_differ_in_color_and_kind(scenes: list[Scene]) -> None:
    pairs = [scene.sprites for scene in scenes if len(scene.sprites) == 2]
    assert 0.3 < len(pairs) / len(scenes) < 0.9
    assert all(a.color != b.color and a.kind != b.kind for a, b in pairs)


# Words.


def plain(text: str) -> str:
    """The words alone, with a space around each."""
    return f" {' '.join(re.findall(r'[a-z]+', text.lower()))} "


def test_narratives_hold_every_fact(scenes: list[Scene]) -> None:
    for scene in scenes:
        told = plain(instruct.describe(words.narrative(scene)))
        assert words.facts(scene)
        for fact in words.facts(scene):
            assert f" {fact} " in told


def test_narratives_name_the_scene_as_it_is(scenes: list[Scene]) -> None:
    for scene in scenes:
        actors, deeds, background = instruct.parse(words.narrative(scene))
        assert actors == [sprite.name for sprite in scene.sprites]
        assert background == scene.background
        happened = {(scene.sprites[e.actor].name, i) for i, e in enumerate(scene.events) if e.action != "meet"}
        assert happened <= {(deed.actor, deed.order) for deed in deeds}


def test_captions_name_the_actors_and_no_one_else(scenes: list[Scene]) -> None:
    for number, scene in enumerate(scenes):
        rng = np.random.default_rng(number)
        said = [words.caption(scene, rng) for _ in range(3)]
        for text in said:
            found = set(re.findall(rf"\w+ (?:{'|'.join(KINDS)})\b", text))
            acting = {0, 1} if "meet" in actions(scene) else {event.actor for event in scene.events}
            if "the two" in text:  # one is named, the other one is seen
                acting = {0}
            assert {scene.sprites[actor].name for actor in acting} <= found, text
            assert found <= {sprite.name for sprite in scene.sprites}, text
            assert not set(BACKGROUNDS) - {scene.background} & set(text.split())


def test_captions_of_a_clip_differ_now_and_then(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(0)
    different = [len({words.caption(scene, rng) for _ in range(3)}) for scene in scenes]
    assert np.mean(different) > 2


def test_picture_captions_say_what_is_there_and_nothing_of_motion(scenes: list[Scene]) -> None:
    verbs = {word for phrases in words.PHRASES.values() for phrase in phrases for word in phrase.split()}
    verbs -= {"to", "the", "left", "right", "up", "top", "bottom", "in", "out", "around"}
    lengths = []
    for scene in scenes:
        for fraction in FRACTIONS:
            seconds = float(fraction) * scene.duration_seconds
            text = words.image_caption(scene, seconds)
            for sprite, state in zip(scene.sprites, states(scene, seconds)):
                if state.opacity > 0.9:
                    assert sprite.name in text
                elif state.opacity < 0.1:
                    assert sprite.name not in text
            assert scene.background in text
            assert not verbs & set(text.split())
            lengths.append(len(text.split()))
    assert max(lengths) < pretrain.PICTURE_LENGTH


def test_every_scene_has_questions_with_short_answers(scenes: list[Scene]) -> None:
    families: Counter[str] = Counter()
    for scene in scenes:
        asked = words.questions(scene)
        families.update(question.family for question in asked)
        assert len({question.question for question in asked}) == len(asked)
        for question in asked:
            assert question.question.endswith("?")
            assert 1 <= len(question.answer.split()) <= 6
    assert set(families) == {"temporal", "causal", "short"}
    assert min(families.values()) > NUM_SCENES / 3


def test_the_template_generator_never_contradicts_the_scene(scenes: list[Scene]) -> None:
    """What is asked of the narrative and of the scene alike has one answer."""
    shared = 0
    for scene in scenes:
        true = {question.question: question.answer for question in words.questions(scene)}
        for found in instruct.generate(words.narrative(scene)):
            if found.question in true:
                shared += 1
                assert found.answer == true[found.question], (found.question, words.narrative(scene))
    assert shared > NUM_SCENES


def holds(question: str, scene: Scene) -> bool:
    """Whether what a "why" question takes for granted is so."""
    first, last = states(scene, 0.0), at_end(scene)
    concerned = [i for i, sprite in enumerate(scene.sprites) if sprite.name in question]
    i = concerned[0]
    there = all(last[k].opacity > 0.9 for k in concerned)
    seen: dict[str, Callable[[], bool]] = {
        "touch at the end": lambda: there and np.hypot(last[0].x - last[1].x, last[0].y - last[1].y) < SPRITE,
        "gone at the end": lambda: last[i].opacity < 0.1,
        "not there at the start": lambda: first[i].opacity < 0.1,
        "bigger at the end": lambda: there and last[i].scale > first[i].scale,
        "smaller at the end": lambda: there and last[i].scale < first[i].scale,
        "on the left at the end": lambda: there and last[i].x < 0.4,
        "on the right at the end": lambda: there and last[i].x > 0.6,
        "at the top at the end": lambda: there and last[i].y < 0.4,
        "at the bottom at the end": lambda: there and last[i].y > 0.6,
    }
    return next(check for phrase, check in seen.items() if phrase in question)()


def test_causal_questions_take_nothing_false_for_granted(scenes: list[Scene]) -> None:
    for scene in scenes:
        for question in words.questions(scene):
            if question.family == "causal":
                assert holds(question.question, scene), (question.question, actions(scene))


def test_labels_belong_to_clips_in_which_one_thing_happens(scenes: list[Scene]) -> None:
    for scene in scenes:
        label = words.label(scene)
        assert label == (words.LABELS[scene.events[0].action] if len(scene.events) == 1 else None)
    assert len(set(words.LABELS.values())) == len(ACTIONS)


# Alt-text.


def test_a_part_is_spoiled_at_the_stated_rates() -> None:
    rng = np.random.default_rng(0)
    count = 20_000
    found = Counter(words._spoil(rng, "right", ("right", "wrong", "wrong too"), ("vague",)) for _ in range(count))
    assert found["wrong"] + found["wrong too"] == pytest.approx(count * ALT_TEXT_NOISE["wrong"], abs=0.015 * count)
    assert found[""] == pytest.approx(count * ALT_TEXT_NOISE["missing"], abs=0.015 * count)
    assert found["vague"] == pytest.approx(count * ALT_TEXT_NOISE["vague"], abs=0.015 * count)
    assert found["right"] > 0


def test_alt_texts_are_as_noisy_as_stated(scenes: list[Scene]) -> None:
    """Over many texts, the background is right, wrong or not told as often as the rates of all kinds of noise say."""
    unrelated, wrong = ALT_TEXT_NOISE["unrelated"], ALT_TEXT_NOISE["wrong"]
    untold = ALT_TEXT_NOISE["missing"] + ALT_TEXT_NOISE["vague"]
    by_chance = unrelated * (1 - untold) / len(BACKGROUNDS)  # another scene's text that names this background
    expected = {
        "right": (1 - unrelated) * (1 - untold - wrong) + by_chance,
        "wrong": (1 - unrelated) * wrong + by_chance * (len(BACKGROUNDS) - 1),
        "untold": untold,
    }
    counts: Counter[str] = Counter()
    rng = np.random.default_rng(1)
    for scene in scenes:
        for _ in range(20):
            named = set(BACKGROUNDS) & set(words.alt_text(scene, rng).split())
            assert len(named) <= 1
            counts["untold" if not named else "right" if named == {scene.background} else "wrong"] += 1
    for kind, share in expected.items():
        assert counts[kind] / counts.total() == pytest.approx(share, abs=0.025), kind


def test_alt_texts_are_never_empty(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(2)
    assert all(words.alt_text(scene, rng).strip() for scene in scenes for _ in range(20))


# Files.


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make(tmp_path_factory.mktemp("corpus"))


def make(directory: Path, seed: int = SEED, progress: Callable[[int, int], None] | None = None) -> Corpus:
    """A small corpus with a larger share of long videos, so that there is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "LONG_SHARE", 0.5)
        return make_corpus(directory, num_clips=CLIPS, seed=seed, num_workers=1, progress=progress)


def clips_of(found: Corpus) -> list[Record]:
    return [*found.train, *found.unlabelled, *found.test]


def scene_of(record: Record) -> Scene:
    """The scene a clip was made from; its number ends the key."""
    return corpus._scene(SEED, int(record.key.rsplit("-", 1)[1]))[0]


def difference(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference of the pixels."""
    return float(np.abs(first.astype(np.int16) - second).mean())


@pytest.mark.parametrize("encoding", corpus.ENCODINGS, ids=lambda e: f"{e.codec}{e.suffix}")
def test_every_encoding_keeps_frames_and_looks(tmp_path: Path, encoding: corpus.Encoding) -> None:
    scene = sample_scene(np.random.default_rng(5))
    frames = list(render(scene, np.arange(20) / corpus.FPS, size=corpus.SIZE))
    path = tmp_path / f"clip{encoding.suffix}"
    corpus.encode(path, iter(frames), encoding)
    decoder = VideoDecoder(path)
    assert len(decoder) == 20
    decoded = decoder.get_frames_at(range(20))
    assert decoded.data.shape == (20, corpus.SIZE, corpus.SIZE, 3)
    np.testing.assert_allclose(decoded.pts_seconds, np.arange(20) / corpus.FPS, atol=1e-3)
    for shown, drawn in zip(decoded.data, frames):
        assert difference(shown, drawn) < 12
    assert [path.name for path in tmp_path.iterdir()] == [path.name]  # nothing partial is left


def test_a_failed_file_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[np.ndarray]:
        yield np.zeros((corpus.SIZE, corpus.SIZE, 3), np.uint8)
        raise OSError("no more frames")

    with pytest.raises(OSError, match="no more frames"):
        corpus.encode(tmp_path / "clip.mp4", broken(), corpus.ENCODINGS[0])
    assert not list(tmp_path.iterdir())


def test_files_decode_to_as_many_frames_as_their_clips_have(made: Corpus) -> None:
    by_file: dict[str, list[Record]] = {}
    for record in [*clips_of(made), *made.pictures]:
        by_file.setdefault(record.video, []).append(record)
    assert len(by_file) == made.num_files == len(list((made.directory / "videos").iterdir()))
    codecs: Counter[str] = Counter()
    for video, records in by_file.items():
        decoder = VideoDecoder(video)
        codecs[decoder.metadata.codec] += 1
        expected = sum(_num_frames(record) for record in records)
        assert len(decoder) == len(decoder.get_frames_at(range(len(decoder))).data) == expected
    assert codecs == made.codecs


def _num_frames(record: Record) -> int:
    if record.split == "pictures":
        return len(record.captions)
    return round(scene_of(record).duration_seconds * corpus.FPS)


def test_parts_are_disjoint_and_complete(made: Corpus) -> None:
    parts = (made.train, made.unlabelled, made.test)
    keys = [{record.key for record in part} for part in parts]
    files = [{record.video for record in part} for part in parts]
    assert sum(map(len, keys)) == len(keys[0] | keys[1] | keys[2]) == CLIPS
    assert sum(map(len, files)) == len(files[0] | files[1] | files[2])
    assert all(len(part) >= 3 for part in parts)
    assert {record.split for record in made.test} == {"test"}
    assert not {record.video for record in made.pictures} & (files[0] | files[1] | files[2])


def test_manifests_read_back(made: Corpus) -> None:
    for name in ("train", "unlabelled", "test", "pictures"):
        written: list[Record] = getattr(made, name)
        assert read_manifest(made.directory / f"{name}.jsonl") == written
        assert all(Path(record.video).is_file() for record in written)
    for record in clips_of(made):
        assert len(record.captions) == 3
        assert record.narrative
        assert record.alt_text
        assert record.questions
        assert record.extra["facts"]


def test_segments_of_long_videos_show_their_scenes(made: Corpus) -> None:
    """A segment's frames resemble its scene and no other of the file; segments lie end to end."""
    segments = [record for record in clips_of(made) if record.end_seconds is not None]
    longs = {record.video for record in segments}
    assert longs
    assert len(segments) == corpus.SEGMENTS * len(longs)
    for video in longs:
        inside = [record for record in segments if record.video == video]
        edges = [record.start_seconds for record in inside] + [inside[-1].end_seconds]
        assert edges[0] == 0.0
        assert edges[1:] == [record.end_seconds for record in inside]
        drawn = []
        for record in inside:
            scene = scene_of(record)
            instants = (np.arange(4) + 0.5) / 4 * scene.duration_seconds
            drawn.append(np.stack(list(render(scene, instants, size=corpus.SIZE))))
        for i, record in enumerate(inside):
            shown = sampled(record, 4)
            distances = [difference(shown, frames) for frames in drawn]
            assert int(np.argmin(distances)) == i
            assert distances[i] < 15


def sampled(record: Record, num_frames: int) -> np.ndarray:
    """uint8[num_frames, SIZE, SIZE, 3]: the clip as a model would get it, at full size."""
    clip = ClipConfig(num_frames=num_frames, sampling="uniform", short_side=corpus.SIZE, size=corpus.SIZE)
    start, end = record.start_seconds, record.end_seconds
    return sample_clip(record.video, start_seconds=start, end_seconds=end, **dataclasses.asdict(clip)).data


def test_captions_of_pictures_belong_to_the_frames_that_are_sampled(made: Corpus) -> None:
    assert len(made.pictures) == corpus.PICTURES_PER_CLIP * CLIPS // corpus.PICTURES
    told = {record.narrative for record in clips_of(made)}
    number = 0
    for record in made.pictures:
        assert len(record.captions) == corpus.PICTURES
        for frame, caption in zip(sampled(record, corpus.PICTURES), record.captions):
            scene, instant = corpus._picture(SEED, number)
            assert words.narrative(scene) not in told
            assert caption == words.image_caption(scene, instant)
            assert difference(frame, next(render(scene, [instant], size=corpus.SIZE))) < 15
            number += 1


def test_a_stopped_run_goes_on_and_comes_out_the_same(made: Corpus, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        make(tmp_path, progress=stop)
    assert not (tmp_path / "train.jsonl").exists()
    files = sorted((tmp_path / "videos").iterdir())
    assert files
    for path in files[1:4]:  # as if it had been stopped earlier
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in files if path.exists()}
    calls: list[tuple[int, int]] = []
    again = make(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls[0] == (len(kept) + 1, again.num_files)
    assert calls[-1] == (again.num_files, again.num_files)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    for name in ("train", "unlabelled", "test", "pictures"):
        texts = [(tmp_path / f"{name}.jsonl").read_text(), (made.directory / f"{name}.jsonl").read_text()]
        assert texts[0] == texts[1]
    for path in files:
        decoders = [VideoDecoder(path), VideoDecoder(made.directory / "videos" / path.name)]
        frames = [decoder.get_frames_at(range(len(decoder))).data for decoder in decoders]
        np.testing.assert_array_equal(frames[0], frames[1])


def test_another_seed_in_the_same_directory_is_refused(made: Corpus) -> None:
    before = (made.directory / "train.jsonl").read_text()
    with pytest.raises(ValueError, match="holds another corpus"):
        make(made.directory, seed=SEED + 1)
    assert (made.directory / "train.jsonl").read_text() == before


def test_another_seed_makes_other_scenes() -> None:
    first, second = (
        {words.narrative(sample_scene(np.random.default_rng([seed, i]))) for i in range(40)} for seed in (0, 1)
    )
    assert len(first & second) < 3


def test_too_few_clips_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_clips must be at least 10, not 9"):
        make_corpus(tmp_path / "corpus", num_clips=9)
    assert not (tmp_path / "corpus").exists()
