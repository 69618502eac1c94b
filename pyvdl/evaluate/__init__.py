"""Scores of a model, or of what somebody else's model said, on a test set.

All scores are in percent points (x100) with 95% bootstrap intervals over test clips. A clip that cannot be decoded
counts as a miss, never as absent, and its number is reported as `failed`. Rows that pad the last batch never count.
"""

from pyvdl.evaluate.blocks import count_ahead_in_blocks
from pyvdl.evaluate.embeddings import class_embeddings, embed_texts, embed_videos
from pyvdl.evaluate.retrieval import (
    RECALL_AT,
    RetrievalScores,
    ZeroShotScores,
    evaluate_retrieval,
    evaluate_zero_shot,
)
from pyvdl.evaluate.scores import CaptionScores, ChoiceScores, QuestionScores, score_answers
from pyvdl.evaluate.texts import evaluate_captions, evaluate_choices, evaluate_questions

__all__ = [
    "RECALL_AT",
    "CaptionScores",
    "ChoiceScores",
    "QuestionScores",
    "RetrievalScores",
    "ZeroShotScores",
    "class_embeddings",
    "count_ahead_in_blocks",
    "embed_texts",
    "embed_videos",
    "evaluate_captions",
    "evaluate_choices",
    "evaluate_questions",
    "evaluate_retrieval",
    "evaluate_zero_shot",
    "score_answers",
]
