"""Scores of captions, answers and rankings: numpy and strings only, no Java, nothing downloaded while running.

All scores are fractions (1.0 is perfect; CIDEr is on its own scale); papers print them x100.
"""

from .answers import ExactMatchScore, exact_match
from .bootstrap import bootstrap_difference, bootstrap_interval
from .cider import CiderScore, DocumentFrequencies, cider, document_frequencies
from .definitions import DEFINITIONS
from .overlap import BleuScore, RougeScore, bleu, bleu_of_counts, rouge_l
from .preparing import prepare_answer
from .ptb import ptb_tokenize
from .retrieval import Ahead, RankingScores, Ties, count_ahead, rank, recall_at_k, top_k_accuracy
from .statistics import CaptionStatistics, caption_statistics
from .taggers import SpacyTagger, Tagger, Token, WordNetTagger
from .wups import QUESTION_TYPES, WupsScore, wups

__all__ = [
    "DEFINITIONS",
    "QUESTION_TYPES",
    "Ahead",
    "BleuScore",
    "CaptionStatistics",
    "CiderScore",
    "DocumentFrequencies",
    "ExactMatchScore",
    "RankingScores",
    "RougeScore",
    "SpacyTagger",
    "Tagger",
    "Ties",
    "Token",
    "WordNetTagger",
    "WupsScore",
    "bleu",
    "bleu_of_counts",
    "bootstrap_difference",
    "bootstrap_interval",
    "caption_statistics",
    "cider",
    "count_ahead",
    "document_frequencies",
    "exact_match",
    "prepare_answer",
    "ptb_tokenize",
    "rank",
    "recall_at_k",
    "rouge_l",
    "top_k_accuracy",
    "wups",
]
