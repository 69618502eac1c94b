"""The template generator of instruction data."""

from __future__ import annotations

import numpy as np
import pytest

from pyvdl import instruct
from pyvdl.synthetic import words
from pyvdl.synthetic.scene import sample_scene

NARRATIVE = (
    "<red star> a red star is on the left, first it slides right quickly, then it vanishes slowly. "
    "<blue ring> a blue ring is at the top. <background> grass drifts up."
)


def pairs(narrative: str) -> dict[str, str]:
    return {question.question: question.answer for question in instruct.generate(narrative)}


def test_a_narrative_becomes_questions_of_all_families() -> None:
    assert pairs(NARRATIVE) == {
        "what does the red star do first?": "slide right",
        "what does the red star do last?": "vanish",
        "what happens after the red star slides right?": "it vanishes",
        "why is the red star gone at the end?": "it vanishes",
        "what color is the star?": "red",
        "what color is the ring?": "blue",
        "what is in the background?": "grass",
        "how many shapes are there?": "two",
        "what is sliding right?": "red star",
        "what is vanishing?": "red star",
    }


def test_deeds_follow_each_other_whoever_is_told_of_first() -> None:
    found = pairs(
        "<blue ring> a blue ring, then it spins. <red star> a red star, first it slides right, then it spins."
    )
    assert found["what happens after the red star slides right?"] == "the blue ring spins"
    assert "what is spinning?" not in found  # two are


def test_a_consequence_undone_later_is_not_asked_for() -> None:
    text = "<red disc> a red disc is in the middle, first it vanishes slowly, then it appears slowly."
    assert not any(question.startswith("why") for question in pairs(text))


def test_a_meeting_has_no_first() -> None:
    text = "<red disc> a red disc is on the left, first it meets the blue ring slowly."
    found = pairs(f"{text} <blue ring> a blue ring is on the right.")
    assert found["why do the red disc and the blue ring touch at the end?"] == "they move together"
    assert not any("first" in question for question in found)


def test_the_detailed_description_has_no_tags() -> None:
    assert instruct.describe(NARRATIVE).startswith("a red star is on the left, first it slides right quickly")
    assert "<" not in instruct.describe(NARRATIVE)


@pytest.mark.parametrize(
    ("background", "answer"),
    [
        ("A forest sways slowly.", "forest"),
        ("The sky is blue.", "sky"),
        ("an ocean", "ocean"),
        ("A tall tree sways.", None),
        ("green trees sway.", None),
        ("a", None),
        ("", None),
    ],
)
def test_a_background_is_its_noun_or_nothing(background: str, answer: str | None) -> None:
    found = pairs(f"<man> the man walks. <background> {background}")
    assert found.get("what is in the background?") == answer


def test_an_actor_told_of_twice_is_one() -> None:
    found = pairs("<red star> a red star is here. <blue ring> a blue ring. <red star> first it spins.")
    assert found["how many shapes are there?"] == "two"


def test_text_without_tags_is_refused() -> None:
    with pytest.raises(ValueError, match="actor tags"):
        instruct.generate("a man walks")


def test_it_agrees_with_the_questions_of_the_synthetic_corpus() -> None:
    """Two independent writers: one reads the narrative, one knows the scene; what both ask they answer alike."""
    shared = 0
    for seed in range(200):
        scene = sample_scene(np.random.default_rng(seed))
        known = {q.question: q.answer for q in words.questions(scene)}
        for question, answer in pairs(words.narrative(scene)).items():
            if question in known:
                assert answer == known[question], (seed, question)
                shared += 1
    assert shared > 1000
