"""The paper's ablations as grids: each row of a table is a recipe, with the paper's figures where they are at hand.

Figures are those of the paper's tables (arXiv 2401.06129). None stands where the paper has no such row or its figure is
not at hand: of Tables 9, 10 and 11 no figure is. Directions are taken from the figures, never written down beside them;
a direction that the paper tells in words alone is a `Told`, with its words' sense and place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from .steps import Adapt, Captions, ImageModel, Said, Scored, Step, Texts, Train, order


class Measure(NamedTuple):
    """A score of ours."""

    title: str
    by: str  # what of the test clips it is measured by
    together: Literal["captions", "answers", "embeddings"]  # scores that one pass over the test clips gives


SCORES = {
    "cider": Measure("CIDEr-D", "captions", "captions"),
    "wups": Measure("WUPS", "questions", "answers"),
    "exact_match": Measure("exact match", "questions", "answers"),
    "R@1": Measure("R@1", "text to video", "embeddings"),
    "R@5": Measure("R@5", "text to video", "embeddings"),
    "R@10": Measure("R@10", "text to video", "embeddings"),
    "top1": Measure("top-1", "zero-shot classes", "embeddings"),
    "top5": Measure("top-5", "zero-shot classes", "embeddings"),
}


@dataclass(frozen=True)
class Column:
    """A column of the paper's table, and the score of ours that it is held against."""

    title: str
    score: str


@dataclass(frozen=True)
class Row:
    """One row: a recipe, the paper's figures in the columns' order, and what is not the paper's about it."""

    key: str
    label: str
    recipe: Scored
    paper: tuple[float | None, ...] = ()  # () as long as the columns: no figure at all
    stand_in: str | None = None  # what stands for the paper's source at toy size
    curve: str | None = None  # rows of one curve, over the share of the clips


@dataclass(frozen=True)
class Told:
    """A direction that the paper tells, or implies, without figures that are at hand: `better` is above `worse`."""

    better: str
    worse: str
    score: str
    source: str


@dataclass(frozen=True)
class Grid:
    """One ablation."""

    name: str
    source: str  # the tables and figures it is
    title: str
    asks: str  # the question it answers
    columns: tuple[Column, ...]
    scores: tuple[str, ...]  # ours, in the order they are shown
    rows: tuple[Row, ...]
    pairs: tuple[tuple[str, str], ...]  # rows whose directions are compared: (one, the one before it)
    again: str  # the row that is trained a second time with another seed, to see what that alone changes
    told: tuple[Told, ...] = ()
    notes: tuple[str, ...] = ()

    def row(self, key: str) -> Row:
        return next(row for row in self.rows if row.key == key)

    def paper(self, row: Row) -> tuple[float | None, ...]:
        """The paper's figures of a row, one for each column."""
        return row.paper or (None,) * len(self.columns)

    def repeated(self) -> Scored:
        """The recipe of the row `again`, its last training with another seed."""
        recipe = self.row(self.again).recipe
        assert not isinstance(recipe, ImageModel)
        return replace(recipe, again=1)

    def steps(self) -> Iterator[Step]:
        """All trainings and jobs of the grid, each once, in an order in which they can be done."""
        seen: set[Step] = set()
        for recipe in (*(row.recipe for row in self.rows), self.repeated()):
            for step in () if isinstance(recipe, ImageModel) else order(recipe):
                if step not in seen:
                    seen.add(step)
                    yield step


# Recipes that several grids share ------------------------------------------------------------------------------------

IMAGE = ImageModel()
VISUAL = Adapt(stage="visual", lesson="captions")
LANGUAGE = Adapt(stage="language", lesson="instructions", start=VISUAL)  # the method: V, then L
FRAMES = Captions(model=None, frames=4)
ALT_TEXT: Texts = "alt-text"
PSEUDO: Texts = Said(Captions(model=LANGUAGE), "all")
SUMMARY_STAND_IN = "in place of PaLM 2's summary, an offline template merges what the frames are said to show"

_RULES = "in place of PaLM 2, rules make the questions out of narratives, with shorter answers"
_RECALLS = ("R@1", "R@5", "R@10")

CAPTION_SOURCE = Grid(
    name="caption-source",
    source="Table 4",
    title="Where the captions come from",
    asks="Which texts make the better video-text encoder: alt-text, an image model's, or the video model's?",
    columns=(Column("MSR-VTT R@1", "R@1"),),
    scores=_RECALLS,
    rows=(
        Row("alt-text", "alt-text", Train(texts=ALT_TEXT), (37.0,)),
        Row("frame", "image model, one frame", Train(texts=Said(FRAMES, "middle frame")), (39.5,)),
        Row(
            "summary", "image model, frames + summary", Train(texts=Said(FRAMES, "summary")), (39.8,), SUMMARY_STAND_IN
        ),
        Row("V", "after V, one sample", Train(texts=Said(Captions(model=VISUAL), "first")), (41.7,)),
        Row("V samples", "after V, several samples", Train(texts=Said(Captions(model=VISUAL), "all")), (43.6,)),
        Row("V+L samples", "after V and L, several samples", Train(texts=PSEUDO), (44.3,)),
    ),
    pairs=(
        ("frame", "alt-text"),
        ("summary", "frame"),
        ("V", "summary"),
        ("V samples", "V"),
        ("V+L samples", "V samples"),
        ("V+L samples", "alt-text"),
    ),
    again="V+L samples",
    notes=(
        "The paper's table is of its SGD recipe: --preset paper-sgd.",
        "One sample and several are drawn by the same job: one is the first of them.",
    ),
)

TRAINED_PART = Grid(
    name="trained-part",
    source="Table 5, rows 1 to 3",
    title="Which part trains in the visual stage",
    asks="On short video captions: is it the vision tower that should learn, the language model, or both?",
    columns=(Column("S-MiT CIDEr", "cider"),),
    scores=("cider",),
    rows=(
        Row("language", "language model", Adapt(stage="visual", lesson="captions", trainable=("language",)), (41.2,)),
        Row("vision", "vision tower", VISUAL, (42.3,)),
        Row("both", "both", Adapt(stage="visual", lesson="captions", trainable=("",)), (40.3,)),
    ),
    pairs=(("vision", "language"), ("vision", "both"), ("language", "both")),
    again="vision",
    notes=("With the vision tower the projection into the language model trains, too.",),
)

SELF_TRAINING = Grid(
    name="self-training",
    source="Table 5, row 4",
    title="Self-training",
    asks="Does the visual stage gain from clips that the model itself has captioned?",
    columns=(Column("S-MiT CIDEr", "cider"),),
    scores=("cider",),
    rows=(
        Row("without", "human captions", VISUAL, (42.3,)),
        Row(
            "with",
            "human and pseudo-captions",
            Adapt(stage="visual", lesson="captions", pseudo=Captions(model=LANGUAGE)),
            (43.5,),
        ),
    ),
    pairs=(("with", "without"),),
    again="with",
    notes=(
        "The paper does not tell the ratio of human and pseudo-captions in a batch: here one to one.",
        "Both train for as many steps, so the one with pseudo-captions sees the human ones half as often.",
    ),
)

INSTRUCTION_SOURCE = Grid(
    name="instruction-source",
    source="Table 6",
    title="Where the instructions come from",
    asks="What should the language stage read, so that captions and answers both gain?",
    columns=(
        Column("MSR-VTT CIDEr", "cider"),
        Column("ActivityNet CIDEr", "cider"),
        Column("NExT-OE WUPS", "wups"),
    ),
    scores=("cider", "wups", "exact_match"),
    rows=(
        Row("none", "no adaptation", IMAGE, (21.3, 13.8, 23.2)),
        Row(
            "pictures",
            "instructions about pictures",
            Adapt(stage="language", lesson="pictures", start=VISUAL),
            (16.9, 25.1, 16.3),
            "in place of LLaVA 1.0's data, templates ask what single pictures show, where and in which colour",
        ),
        Row(
            "long answers",
            "long answers about videos",
            Adapt(stage="language", lesson="long answers", start=VISUAL),
            (30.8, 34.6, 11.7),
            "in place of ActivityNet-Instruct, templates ask what happens: answers are whole narratives or sentences",
        ),
        Row(
            "reasoning",
            "temporal and causal",
            Adapt(stage="language", lesson="reasoning", start=VISUAL),
            (28.5, 29.5, 5.0),
            _RULES,
        ),
        Row(
            "reasoning and captions",
            "+ short captions",
            Adapt(stage="language", lesson="reasoning and captions", start=VISUAL),
            (51.6, 35.1, 3.9),
            _RULES,
        ),
        Row("instructions", "+ short questions", LANGUAGE, (48.2, 31.0, 29.5), _RULES),
    ),
    pairs=(
        ("pictures", "none"),
        ("long answers", "none"),
        ("reasoning", "none"),
        ("reasoning and captions", "reasoning"),
        ("instructions", "reasoning and captions"),
        ("instructions", "none"),
    ),
    again="instructions",
    notes=(
        "All but the first row begin with the model after the visual stage: the last row is the method's own recipe.",
        "The rows whose questions rules make learn to tell the narratives, too.",
        "The test asks the questions that the rules make, in the same words and as shortly: what the paper's short "
        "questions bring back, the answers' form, the toy's reasoning questions have already.",
    ),
)

LABELS = Grid(
    name="labels",
    source="Table 8, with Table 2's rows of VideoCC",
    title="Human-labelled clips or pseudo-captioned ones",
    asks="Is an encoder better off with clips that humans captioned or with those that the model did?",
    columns=(
        *(Column(f"MSR-VTT {recall}", recall) for recall in _RECALLS),
        *(Column(f"VATEX {recall}", recall) for recall in _RECALLS),
        Column("K600 top-1", "top1"),
        Column("K600 top-5", "top5"),
    ),
    scores=(*_RECALLS, "top1", "top5"),
    rows=(
        Row("alt-text", "alt-text", Train(texts=ALT_TEXT), (37.0, 62.1, 72.5, 37.7, 66.9, 77.2, 48.6, 74.8)),
        Row("pseudo", "pseudo-captions", Train(texts=PSEUDO), (48.2, 72.2, 80.8, 64.2, 90.2, 95.1, 61.1, 85.6)),
        Row("labelled", "human-labelled", Train(texts="labelled"), (45.2, 70.8, 80.5, 66.7, 92.0, 96.2, 64.2, 88.8)),
        Row("human", "human, of the pseudo's clips", Train(texts="human")),
    ),
    pairs=(("pseudo", "alt-text"), ("labelled", "alt-text"), ("labelled", "pseudo")),
    again="pseudo",
    notes=(
        "In the paper the labelled set (S-MiT, 0.48 million clips) is 15 times smaller than the pseudo-captioned one "
        "(VideoCC+, 7.1 million); in the toy it is larger (half of the corpus against a third).",
        "The last row is not in the paper: what the pseudo-captioned clips would give if humans had captioned them.",
        "The paper's test sets disagree between labelled and pseudo; ours is of the labelled set's kind.",
    ),
)

ORDER = Grid(
    name="order",
    source="Table 9",
    title="Which stage comes first, and prompt tuning",
    asks="Should the vision tower adapt before the language model or after it, and would a soft prompt do instead?",
    columns=(
        Column("MSR-VTT CIDEr", "cider"),
        Column("ActivityNet CIDEr", "cider"),
        Column("MSR-VTT-QA", "exact_match"),
        Column("ActivityNet-QA", "exact_match"),
        Column("NExT-OE WUPS", "wups"),
    ),
    scores=("cider", "exact_match", "wups"),
    rows=(
        Row("none", "no adaptation", IMAGE, (21.3, 13.8, 12.7, 22.9, 23.2)),
        Row("V", "V alone", VISUAL),
        Row("L", "L alone", Adapt(stage="language", lesson="instructions")),
        Row(
            "LV",
            "L, then V",
            Adapt(stage="visual", lesson="captions", start=Adapt(stage="language", lesson="instructions")),
        ),
        Row("prompt", "V, then prompt tuning", Adapt(stage="prompt", lesson="instructions", start=VISUAL)),
        Row("VL", "V, then L", LANGUAGE, (48.2, 31.0, 24.4, 29.6, 29.5)),
    ),
    pairs=(("VL", "none"),),
    again="VL",
    told=tuple(
        Told("VL", worse, score, f"its recipe is V, then L, not {name}")
        for worse, name in (("LV", "L, then V"), ("prompt", "a soft prompt"))
        for score in ("cider", "exact_match", "wups")
    ),
    notes=(
        "Table 9's own figures are not at hand. The rows 'no adaptation' and 'V, then L' have those of Table 3. That "
        "the paper's recipe is V, then L is taken to mean that its Table 9 has it above the other two.",
        "The soft prompt is of 100 tokens, as in its own paper (arXiv 2104.08691): Table 9's number is not at hand. It "
        "trains for as long as the language stage and at its rate, which was not searched for it.",
    ),
)

_SHARES = (0.03, 0.1, 0.3, 1.0)
_CURVES: dict[str, tuple[Texts, str | None]] = {
    "alt-text": (ALT_TEXT, None),
    "frames + summary": (Said(FRAMES, "summary"), SUMMARY_STAND_IN),
    "pseudo-captions": (PSEUDO, None),
}
_ALL = {"alt-text": 37.0, "frames + summary": 39.8, "pseudo-captions": 44.3}  # Table 4

DATA_SCALE = Grid(
    name="data-scale",
    source="Figure 5, Tables 10 and 11",
    title="How much data there is",
    asks="How do the encoders fare when there are fewer clips, with each kind of text?",
    columns=(Column("MSR-VTT R@1", "R@1"),),
    scores=_RECALLS,
    rows=tuple(
        Row(
            f"{curve} {share:g}",
            f"{curve}, {100 * share:g}%",
            Train(texts=texts, share=share),
            (_ALL[curve],) if share == 1 else (),
            stand_in,
            curve,
        )
        for curve, (texts, stand_in) in _CURVES.items()
        for share in _SHARES
    ),
    pairs=(("frames + summary 1", "alt-text 1"), ("pseudo-captions 1", "frames + summary 1")),
    again="pseudo-captions 1",
    notes=(
        "Of Figure 5 the ends at all of the data are taken from Table 4, which has the same sources; between them its "
        "statements in words are at hand, not its points. Of Tables 10 and 11 nothing is at hand but that they are of "
        "data scale.",
        "Figure 5 has alt-text and merged frame captions saturate, and 1% of VideoCC+ be worth all of VideoCC's "
        "alt-text: see the curves, no direction is judged by it.",
        "A smaller share is part of a larger one. All train for as many steps: fewer clips are seen oftener each.",
    ),
)

GRIDS = {
    grid.name: grid
    for grid in (CAPTION_SOURCE, TRAINED_PART, SELF_TRAINING, INSTRUCTION_SOURCE, LABELS, ORDER, DATA_SCALE)
}
