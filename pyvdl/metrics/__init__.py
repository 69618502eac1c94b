"""Scores of captions, answers and rankings: numpy and strings only, no Java, nothing downloaded while running.

All scores are fractions (1.0 is perfect; CIDEr is on its own scale); papers print them x100.
"""

from .bootstrap import bootstrap_difference, bootstrap_interval
from .cider import CiderScore, DocumentFrequencies, cider, document_frequencies
from .ptb import ptb_tokenize
from .retrieval import RankingScores, recall_at_k, top_k_accuracy

__all__ = [
    "CiderScore",
    "DocumentFrequencies",
    "RankingScores",
    "bootstrap_difference",
    "bootstrap_interval",
    "cider",
    "document_frequencies",
    "ptb_tokenize",
    "recall_at_k",
    "top_k_accuracy",
]
