"""What a language model is asked, and files of templates."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyvdl.data import Family, Record
from pyvdl.instruct.filters import judge
from pyvdl.instruct.prompts import FAMILIES, Prompt, load_templates, make_prompt, record_seed, texts_of

OURS = load_templates()
WHOLE = """
[causal]
instruction = "Ask why."
max_answer_words = 9
examples = [
  { captions = ["one"], pairs = [{ question = "Why one?", answer = "So." }] },
  { captions = ["two", "zwei"], pairs = [{ question = "Why two?", answer = "Therefore." }] },
]
"""


def record(key: str = "a", captions: tuple[str, ...] = ("a man walks",), narrative: str | None = None) -> Record:
    return Record(key=key, video="v.mp4", captions=captions, narrative=narrative)


def test_a_prompt_is_an_instruction_two_examples_and_the_texts() -> None:
    both = record(captions=("a  man\nwalks", "a man walks"), narrative="<Man> He walks.")
    prompt = make_prompt(both, "short", OURS["short"], 0)
    parts = prompt.text.split("\n\n")
    assert len(parts) == 4
    assert parts[0].startswith(OURS["short"].instruction)
    assert parts[1].startswith("Example 1\nCaptions:\n- <")
    assert parts[2].startswith("Example 2\nCaptions:\n- <")
    assert parts[3] == "Now this one\nCaptions:\n- a man walks\n- <Man> He walks."
    for part, example in zip(parts[1:3], prompt.examples):
        assert part.endswith(f"Q: {example.pairs[-1].question}\nA: {example.pairs[-1].answer}")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_draw_of_two_of_three_examples_comes_up_and_is_the_records_own(family: Family) -> None:
    template = OURS[family]
    drawn = {key: make_prompt(record(key), family, template, 0) for key in map(str, range(90))}
    draws = [tuple(template.examples.index(example) for example in prompt.examples) for prompt in drawn.values()]
    assert {len(set(draw)) for draw in draws} == {2}
    assert len(set(draws)) == 6
    assert min(draws.count(draw) for draw in set(draws)) >= 5
    assert all(make_prompt(record(key), family, template, 0) == prompt for key, prompt in drawn.items())
    assert any(make_prompt(record(key), family, template, 1).text != prompt.text for key, prompt in drawn.items())


def test_seeds_and_prompts_stay_the_same_from_version_to_version() -> None:
    """A journal of an earlier run is only of use then."""
    assert record_seed(record("clip-7"), 3) == 2099932369
    template = load_templates(None)["temporal"]
    first, second = make_prompt(record("clip-7"), "temporal", template, 3).examples
    assert (template.examples.index(first), template.examples.index(second)) == (0, 2)


def test_texts_are_whole_lines_each_once() -> None:
    assert texts_of(record(captions=(" a b ", "a\nb", ""), narrative="a b")) == ("a b",)
    assert texts_of(record(captions=(), narrative=None)) == ()


def test_our_own_examples_pass_our_own_filters() -> None:
    assert set(OURS) == set(FAMILIES)
    for family, template in OURS.items():
        assert len(template.examples) == 3
        for example in template.examples:
            prompt = Prompt(
                family=family,
                text="",
                seed=0,
                captions=example.captions,
                examples=(),
                max_answer_words=template.max_answer_words,
            )
            assert [judge(pair, prompt, "en") for pair in example.pairs] == [None] * len(example.pairs)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text(WHOLE)
    templates = load_templates(path)
    assert list(templates) == ["causal"]
    text = make_prompt(record(), "causal", templates["causal"], 0).text
    assert re.match(r"Ask why\. Begin the line .*\n\nExample 1\n", text)
    assert "Captions:\n- two\n- zwei\nQ: Why two?\nA: Therefore." in text


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("[causal]", "[causel]", "tables causel: expected some of temporal, causal, short"),
        (WHOLE, "", "tables none: expected some of"),
        ("[causal]", "[causal", r"expected TOML in UTF-8: .*line 2"),
        ("max_answer_words = 9\n", "", "causal has instruction, examples: expected instruction, max_answer_words, ex"),
        ("= 9", "= 0", r"causal\.max_answer_words is 0: expected a whole number above 0"),
        ("= 9", "= true", r"causal\.max_answer_words is True"),
        ("Ask why.", " ", r"causal\.instruction is ' ': expected a text"),
        ('"two", "zwei"', '"two", 2', r"causal\.examples\[1\]\.captions\[1\] is 2: expected a text"),
        ('["one"]', "[]", r"causal\.examples\[0\]\.captions is \[\]: expected a list of at least 1"),
        (
            'answer = "So."',
            'reply = "So."',
            r"causal\.examples\[0\]\.pairs\[0\] has question, reply: expected",
        ),
        ('answer = "So."', "answer = []", r"causal\.examples\[0\]\.pairs\[0\]\.answer is \[\]: expected a text"),
        (
            '  { captions = ["one"]',
            '  "x", { captions = ["one"]',
            r"causal\.examples\[0\] has 'x': expected captions, pairs",
        ),
    ],
)
def test_a_wrong_file_is_told_by_its_place(tmp_path: Path, old: str, new: str, told: str) -> None:
    path = tmp_path / "t.toml"
    path.write_text(WHOLE.replace(old, new))
    with pytest.raises(ValueError, match=rf"t\.toml: {told}"):
        load_templates(path)


def test_one_example_is_not_enough(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text(re.sub(r"\n.*\"two\".*", "", WHOLE))
    with pytest.raises(ValueError, match=r"causal\.examples is .*: expected a list of at least 2"):
        load_templates(path)
