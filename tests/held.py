"""The command line, whose training waits for a file before a batch: `python -m tests.held FILE BATCH ARGUMENTS`.

So it cannot end before it was killed or stopped, however seldom whoever is to do that gets a turn.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import Any

import jax

from pyvdl.__main__ import main
from pyvdl.data import Batches

NOTICE_SECONDS = 10.0  # JAX looks once a second for a SIGTERM to one of several processes, which all are to hear of


def hold(path: Path, first: int) -> None:
    """Makes each batch from the `first` on, counted from 1, wait."""
    take, numbers = Batches.__next__, itertools.count(1)

    def held(batches: Any) -> Any:
        if next(numbers) >= first:
            while not path.exists():
                time.sleep(0.02)
            time.sleep(NOTICE_SECONDS if jax.process_count() > 1 else 0)
        return take(batches)

    Batches.__next__ = held  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    hold(Path(sys.argv[1]), int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
