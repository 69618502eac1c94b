"""Instruction data: (question, answer) pairs in three families (temporal, causal, short) from what is told of videos.

The paper has a language model read a video's captions and write the pairs (section 4.2). `job` does that through any
endpoint that speaks OpenAI's protocol: `prompts` says what is asked, `endpoint` asks, `replies` reads what comes back
and `filters` leaves out what is no use. `rules` makes pairs without a language model, from narratives with actor tags.
"""

from .journal import job_folder
from .rules import Deed, describe, generate, parse

__all__ = ["Deed", "describe", "generate", "job_folder", "parse"]
