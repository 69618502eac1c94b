"""Reading what language models write, and leaving out what is no use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvdl.data import Record
from pyvdl.instruct.filters import Reason, check_language, judge, sift
from pyvdl.instruct.prompts import Pair, load_templates, make_prompt
from pyvdl.instruct.replies import parse_reply

BOTH = [("What does he do first?", "He runs."), ("And then?", "He jumps.")]
WAYS = {
    "as asked": "Q: What does he do first?\nA: He runs.\nQ: And then?\nA: He jumps.",
    "gaps and Windows lines": "Q: What does he do first?\r\n\r\nA: He runs.\r\n\r\n\r\n"
    "Q: And then?\r\n\r\nA: He jumps.\r\n",
    "numbers and talk": "Sure, here are some questions:\n\n1. Q: What does he do first?\n   A: He runs.\n\n"
    "2. Q: And then?\n   A: He jumps.\n\nLet me know if you need more!",
    "talk right behind": "Q: What does he do first?\nA: He runs.\nQ: And then?\nA: He jumps.\nI hope that this helps.",
    "bold and numbered markers": "**Q1:** What does he do first?\n**A1:** He runs.\n\n"
    "**Q2:** And then?\n**A2:** He jumps.",
    "headings": "### Temporal\n\n1. **Question 1: What does he do first?**\n   - **Answer:** He runs.\n\n"
    "2. **Question 2: And then?**\n   - *Answer*: He jumps.",
    "no markers": "1. What does he do first?\n- He runs.\n2) And then?\n- He jumps.",
    "one line, no markers": "* **What does he do first?** He runs.\n* **And then?** - He jumps.",
    "one line": "Q: What does he do first? A: He runs.\nQ: And then? **A:** He jumps.",
    "answers without markers": "Q: What does he do first?\nHe runs.\nQ: And then?\nHe jumps.",
    "below the markers": "Question:\nWhat does he do first?\nAnswer:\nHe runs.\n"
    "Question:\nAnd then?\nAnswer:\nHe jumps.",
    "wrapped": "Q: What does he\ndo first?\nA: He\nruns.\nQ: And then?\nA: He jumps.",
    "all answers last": "Questions:\n1. What does he do first?\n2. And then?\n\nAnswers:\n1. He runs.\n2. He jumps.",
    "a table": "| Question | Answer |\n|---|:--|\n| What does he do first? | He runs. |\n| And then? | He jumps. |",
    "thoughts": "<think>\nQ: Is this it?\nA: No.\n</think>\n\n"
    "Q: What does he do first?\nA: He runs.\nQ: And then?\nA: He jumps.",
    "quotes": "Q: \"What does he do first?\"\nA: “He runs.”\nQ: 'And then?'\nA: `He jumps.`",
    "JSON": '```json\n[{"question": "What does he do first?", "answer": "He runs."},\n'
    ' {"question": "And then?", "answer": "He jumps."}]\n```\nHope this helps [really]!',
    "Python's notion of JSON": "{'qa': [{'Q': 'What does he do first?', 'A': 'He runs.',}, "
    "{'Q': 'And then?', 'A': 'He jumps.'},]}",
    "JSON lines": '{"question": "What does he do first?", "answer": "He runs."}\n'
    '{"question": "And then?", "answer": "He jumps."}',
    "JSON by questions": '{"What does he do first?": "He runs.", "And then?": "He jumps."}',
    "JSON of two lists": '{"questions": ["What does he do first?", "And then?"], "answers": ["He runs.", "He jumps."]}',
    "JSON of lists": '[["What does he do first?", "He runs."], ["And then?", "He jumps."]]',
    "JSON without its end": '{"temporal": [{"question": "What does he do first?", "answer": "He runs."}, '
    '{"question": "And then?", "answer": "He jumps."',
}


def pairs(text: str) -> list[tuple[str, str]]:
    return [(pair.question, pair.answer) for pair in parse_reply(text)]


@pytest.mark.parametrize("way", WAYS)
def test_pairs_are_read_however_they_are_written(way: str) -> None:
    assert pairs(WAYS[way]) == BOTH


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("I am sorry, I cannot help with that.", []),
        ("<think>Q: Is this it?\nA: No.", []),
        ("Q: One?\nQ: Two?\nA: Yes.\nQ: Three?", [("One?", ""), ("Two?", "Yes."), ("Three?", "")]),
        ("Q: One?\nA:\nQ: Two?\nA: Yes.", [("One?", ""), ("Two?", "Yes.")]),
        ("1. One?\n2. Two?\n- Yes.\n\nShall I go on?", [("One?", ""), ("Two?", "Yes."), ("Shall I go on?", "")]),
        ('[{"question": "One?"}, {"question": "Two?", "answer": null}]', [("One?", ""), ("Two?", "")]),
        (
            '[{"question": "Is it?", "answer": true}, {"question": "How many?", "answer": 2}]',
            [("Is it?", "yes"), ("How many?", "2")],
        ),
        ("Q: What is A. doing?\nA: 2. An apple: red", [("What is A. doing?", "2. An apple: red")]),
        ("Q: What does <Man> do?\nA: He [sic] runs {fast}.", [("What does <Man> do?", "He [sic] runs {fast}.")]),
        ("Q：什么颜色？\nA：红色", [("什么颜色？", "红色")]),
    ],
)
def test_what_is_missing_stays_empty_and_nothing_is_made_up(text: str, found: list[tuple[str, str]]) -> None:
    assert pairs(text) == found


@given(st.text(st.sampled_from("QA:?\n -*1.)[]{}\"'|<think>/ab,")))
def test_any_reply_can_be_read(text: str) -> None:
    for pair in parse_reply(text):
        assert pair.question == pair.question.strip()
        assert "\n" not in pair.question + pair.answer


WORDS = st.lists(
    st.sampled_from(["the", "man", "2", "runs", "3.5", "A", "question", "or", "it's"]), min_size=1, max_size=6
)


@given(st.lists(st.tuples(WORDS, WORDS), max_size=5))
def test_replies_as_asked_for_are_read_back(made: list[tuple[list[str], list[str]]]) -> None:
    told = [("What " + " ".join(question) + "?", " ".join(answer) + ".") for question, answer in made]
    assert pairs("".join(f"Q: {question}\nA: {answer}\n" for question, answer in told)) == told


CAPTION = "<Man> A tall man in a red coat walks to the table, picks up a cup and drinks from it. <Dog> A dog barks."
SHORT = make_prompt(
    Record(key="a", video="v", captions=(CAPTION, "a man drinks some tea", "a dog")),
    "short",
    load_templates()["short"],
    0,
)
LONG = make_prompt(
    Record(key="a", video="v", captions=(CAPTION, "a man drinks some tea")), "causal", load_templates()["causal"], 0
)


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("What does the man pick up?", "cup", None),
        ("Is the coat red or blue?", "red", None),
        ("Who barks?", "a dog", None),
        ("What sport is it?", "karate", None),
        ("", "cup", "empty"),
        ("What does he do?", " ... ", "empty"),
        ("What does he do?", "he walks to the table and drinks", "too long"),
        ("What " + "very " * 40 + "long?", "cup", "too long"),
        ("What colour is mentioned in the caption?", "red", "about the text"),
        ("How old is he?", "not specified", "about the text"),
        ("How old is he?", "it isn't stated", "about the text"),
        (SHORT.examples[1].pairs[0].question, SHORT.examples[1].pairs[0].answer.upper(), "copied"),
        ("What happens?", "A man drinks some tea.", "copied"),
        ("Does a tall man in a red coat walk to the table, or does he?", "yes", None),
        ("Is it that a tall man in a red coat walks to the table?", "yes", "copied"),
        ("What does the man do with the cup he drinks from?", "drinking", "given away"),
        ("How many of the two men walk?", "Two", "given away"),
        ("Welche Farbe hat der Mantel?", "rot", "language"),
        ("What colour is the coat?", "红色", "language"),
        ("那个男人先做什么？", "喝茶", "language"),
    ],
)
def test_a_pair_is_judged(question: str, answer: str, reason: Reason | None) -> None:
    assert judge(Pair(question, answer), SHORT, "en") == reason


def test_long_answers_are_judged() -> None:
    good = Pair("Why does the man go to the table?", "He wants to drink from the cup that stands there.")
    assert judge(good, LONG, "en") is None
    assert judge(Pair("Why does he go to the table?", "Er will aus der Tasse trinken."), LONG, "en") == "language"
    assert judge(Pair("Warum geht er zum Tisch?", "Er will aus der Tasse trinken."), LONG, "de") is None
    assert judge(Pair("Warum geht er zum Tisch?", "Er will aus der Tasse trinken."), LONG, "any") is None
    copied = Pair("Why does he drink?", "The man in a red coat walks to the table, picks up a cup and drinks.")
    assert judge(copied, LONG, "en") == "copied"
    with pytest.raises(ValueError, match="language 'xx': expected any or a code as en, one of"):
        check_language("xx")


def test_what_is_left_out_is_counted_and_nothing_is_asked_twice() -> None:
    seen = {"who barks"}
    found = [
        Pair("What is it?", "cup"),
        Pair("what is it", "a cup!"),
        Pair("Who barks?", "dog"),
        Pair("Who?", ""),
        Pair("Where?", "table"),
    ]
    kept, rejected = sift(found, SHORT, language="en", seen=seen, is_cut=True)
    assert kept == [Pair("What is it?", "cup")]
    assert [(left_out.pair.question, left_out.reason) for left_out in rejected] == [
        ("what is it", "repeated"),
        ("Who barks?", "repeated"),
        ("Who?", "empty"),
        ("Where?", "cut"),
    ]
    assert seen == {"who barks", "what is it"}
