"""What each verb of the command line does; `__main__` reads the arguments and tells failures.

What a command needs is imported inside it, so that help and mistakes answer at once.
"""

from pyvdl.commands.ablations import ablate
from pyvdl.commands.captioning import caption, stats, status
from pyvdl.commands.common import UsageError
from pyvdl.commands.data import MODEL_ONLY, instruct, prepare, probe
from pyvdl.commands.embedding import embed
from pyvdl.commands.evaluating import evaluate
from pyvdl.commands.training import adapt, plan, train

__all__ = [
    "MODEL_ONLY",
    "UsageError",
    "ablate",
    "adapt",
    "caption",
    "embed",
    "evaluate",
    "instruct",
    "plan",
    "prepare",
    "probe",
    "stats",
    "status",
    "train",
]
