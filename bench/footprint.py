"""What a ClipLoader takes of memory, told by a process of its own: `python -m bench.footprint`.

Requests and replies are one line of JSON on stdin and stdout. This module imports nothing that the measured library
does not import itself.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from bench.common import peak_memory_bytes, resident_bytes


def measure_loader(paths: list[str], threads: int, marks: list[int], options: dict[str, Any]) -> dict[str, Any]:
    """Bytes: resident after the import and with the C++ module, and the peak after so many clips.

    One batch is under way and none is kept, so that the output slots are known.
    """
    pyvdl = importlib.import_module("pyvdl")
    imported = resident_bytes()
    video = importlib.import_module("pyvdl.video")
    video.ffmpeg_versions()  # loads the C++ module
    loaded = resident_bytes()
    requests = (pyvdl.ClipRequest(path, seed=0) for path in paths)
    peaks: dict[int, int] = {}
    done = slots = 0
    with pyvdl.ClipLoader(requests, batch_size=threads, num_threads=threads, prefetch=0, **options) as loader:
        for batch in loader:
            if not batch.ok.all():
                raise RuntimeError(f"clips failed: {[error for error in batch.errors if error]}")
            done += len(batch.data)
            slots = max(slots, batch.data.nbytes)
            del batch
            for mark in marks:
                if done >= mark and mark not in peaks:
                    peaks[mark] = peak_memory_bytes()
    return {
        "imported_bytes": imported,
        "loaded_bytes": loaded,
        "slots_bytes": slots,
        "peak_bytes": [peaks[mark] for mark in marks],
    }


if __name__ == "__main__":
    print(json.dumps(measure_loader(**json.loads(sys.stdin.readline()))))
