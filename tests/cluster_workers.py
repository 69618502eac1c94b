"""Workers of a captioning job on a cluster, for tests: what their processes import."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pyvdl.caption import Captioner, Decoded
from pyvdl.config import ClipConfig
from pyvdl.rows import CaptionRow
from pyvdl.text import CAPTION_PROMPT, WordTokenizer
from tests.models import tiny_vlm

# As the command line takes it from the model.
CLIP = ClipConfig(num_frames=2, sampling="uniform", short_side=37, size=32)
WORDS = WordTokenizer.from_texts([CAPTION_PROMPT, "a red ball moves left then right and a blue star turns"])
DRAWING: dict[str, Any] = dict(clip=CLIP, num_samples=2, max_length=6, seed=3, batch_size=2)
POISON = "7-1"  # a clip that fails its shard


class Frail(Captioner):
    """Kills its process in the middle of a shard, once for all workers, and fails at one clip."""

    def __init__(self, scars: Path, **options: Any) -> None:
        super().__init__(tiny_vlm(WORDS), WORDS, **options)
        self._scars = scars
        self._batches = 0

    def rows(self, batches: Iterable[Decoded], **names: str) -> Iterator[list[CaptionRow]]:
        for rows in super().rows(batches, **names):
            self._batches += 1
            if self._batches == 4:
                with contextlib.suppress(FileExistsError):  # two workers can be here at once, and one is to be killed
                    (self._scars / "killed").touch(exist_ok=False)
                    os.kill(os.getpid(), signal.SIGKILL)
            if POISON in [row.key for row in rows]:
                with (self._scars / "poisoned").open("a") as file:
                    file.write(f"{os.getpid()}\n")
                raise ArithmeticError(f"no words for {POISON}")
            yield rows


def frail(scars: Path) -> Captioner:
    return Frail(scars, **DRAWING)


class Deadly(Captioner):
    """Kills its process at whatever clip."""

    def rows(self, batches: Iterable[Decoded], **names: str) -> Iterator[list[CaptionRow]]:
        next(iter(batches))
        os.kill(os.getpid(), signal.SIGKILL)
        yield []


def deadly() -> Captioner:
    return Deadly(tiny_vlm(WORDS), WORDS, **DRAWING)


def absent() -> Captioner:
    raise FileNotFoundError("no model\nhere")


def dying(scars: Path) -> Captioner:
    """As where the model does not fit the memory of any host."""
    with (scars / "starts").open("a") as file:
        file.write(f"{os.getpid()}\n")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
