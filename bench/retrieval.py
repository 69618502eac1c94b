"""Retrieval among very many texts: `python -m bench.retrieval`.

Writes a file of random embeddings, some of which are equal, scores it as `pyvdl evaluate --predictions` does, and tells
the time and the most memory that this process, and where it is not the host the device, ever had. The file is written
by a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.common import ROOT, append_rows, environment, measure, peak_memory_bytes
from pyvdl.__main__ import main as pyvdl


def write_embeddings(path: Path, texts: int, videos: int, width: int) -> None:
    """Texts are near their videos; every tenth video is the one before it again, so that there are ties."""
    rng = np.random.default_rng(0)
    found = rng.standard_normal((videos, width), np.float32)
    found[1::10] = found[: len(found[1::10]) * 10 : 10]
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    owners = np.arange(texts) % videos
    told = rng.standard_normal((texts, width), np.float32)
    step = 1 << 16
    for i in range(0, texts, step):
        told[i : i + step] += 3 * found[owners[i : i + step]]
        told[i : i + step] /= np.linalg.norm(told[i : i + step], axis=1, keepdims=True)
    np.savez(path, keys=np.arange(videos), embeddings=found, text_keys=owners, text_embeddings=told)


def score(texts: int, videos: int, width: int) -> dict[str, Any]:
    """A row on one test."""
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "embeddings.npz", Path(folder) / "scores.json"
        asked = [str(path), *map(str, (texts, videos, width))]
        subprocess.run([sys.executable, "-c", _WRITE, *asked], cwd=ROOT, check=True)
        code, time = measure(lambda: pyvdl(["evaluate", "--predictions", str(path), "--out", str(out)]))
        if code:
            raise RuntimeError(f"pyvdl evaluate ended with {code}; its message is above")
        (result,) = json.loads(out.read_text())["results"]
    stats = jax.devices()[0].memory_stats() or {}
    row = {"bench": "retrieval", "texts": texts, "videos": videos, "width": width, "counts": result["counts"]}
    row |= {"seconds": time.wall_seconds, "cpu_seconds": time.cpu_seconds, "peak_bytes": peak_memory_bytes()}
    return row | {"device_peak_bytes": stats.get("peak_bytes_in_use")}


_WRITE = """
import sys
from pathlib import Path
from bench.retrieval import write_embeddings
write_embeddings(Path(sys.argv[1]), *map(int, sys.argv[2:]))
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.retrieval",
        description="Scores retrieval among very many texts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--texts", type=int, default=1_000_000, help="of all videos together")
    parser.add_argument("--videos", type=int, default=10_000, help="each with as many texts")
    parser.add_argument("--width", type=int, default=256, help="of the embeddings")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results" / "end_to_end.jsonl", help="file that rows are added to"
    )
    options = parser.parse_args(arguments)
    env = environment(("jax", "jaxlib", "numpy")) | {"device": jax.devices()[0].device_kind}
    print(f"{env['device']}, {env['cpu']}, {env['cores']} cores (load {env['load']}), {env['system']}")
    row = score(options.texts, options.videos, options.width)
    append_rows(options.out, {"environment": env}, [row])
    embeddings = 4 * options.width * (options.texts + options.videos)
    told = f"{row['texts']:,} texts x {row['videos']:,} videos of {row['width']} numbers: {row['seconds']:.0f} s"
    print(f"\n{told}, {row['cpu_seconds']:.0f} s of CPU time; peak memory of the process", end=" ")
    print(f"{row['peak_bytes'] / 2**30:.2f} GiB, of which the embeddings are {embeddings / 2**30:.2f} GiB", end="")
    if row["device_peak_bytes"] is not None:
        print(f"; of the device {row['device_peak_bytes'] / 2**30:.3f} GiB", end="")
    print(f"\nrows: {options.out}")


if __name__ == "__main__":
    main()
