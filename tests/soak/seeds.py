"""The small videos that fuzzing starts from: one of each kind that the decoder treats in a way of its own."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

from tests.clips import write_clip

ROOT = Path(__file__).resolve().parents[2]
REAL_VIDEOS = ROOT / ".." / "shared" / "videos"
REAL_BYTES = 50_000  # larger ones make a round too long
CHOICE_BYTES = 16  # before the file, in an input of the fuzz target

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("h264.mp4", {"b_frames": 3}),
    ("h264_opengop.mkv", {"options": {"x264-params": "open-gop=1:keyint=6:bframes=3"}}),
    ("h264_interlaced.ts", {"options": {"x264-params": "interlaced=1"}}),
    ("h264.flv", {"b_frames": 2}),
    ("h264_fragments.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    ("hevc.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none:temporal-layers=3:bframes=4"}}),
    ("vp9.webm", {"codec": "libvpx-vp9"}),
    ("vp8.webm", {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "12"}}),
    ("av1.mkv", {"codec": "libsvtav1", "size": (96, 80)}),
    ("mpeg4.avi", {"codec": "mpeg4"}),
    ("mpeg4.mp4", {"codec": "mpeg4"}),
    ("mpeg2.ts", {"codec": "mpeg2video"}),
    ("mpeg2.mpg", {"codec": "mpeg2video"}),
    ("mjpeg.avi", {"codec": "mjpeg", "pix_fmt": "yuvj422p", "b_frames": 0}),
]


def write_seeds(folder: Path, kinds: list[tuple[str, dict[str, Any]]] = KINDS) -> None:
    os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder tells errors only
    for name, options in kinds:
        write_clip(folder / name, num_frames=14, gop=6, **options)
    for path in sorted(REAL_VIDEOS.iterdir()) if REAL_VIDEOS.exists() else []:
        if path.suffix not in (".md", ".json") and path.stat().st_size <= REAL_BYTES:
            (folder / path.name).write_bytes(path.read_bytes())


def write_corpus(seeds: Path, folder: Path) -> None:
    """Inputs of the fuzz target: each seed file behind two different choices of what is asked of it."""
    rng = random.Random(0)
    for path in sorted(seeds.iterdir()):
        for kind in range(2):
            choices = bytearray(rng.randbytes(CHOICE_BYTES))
            choices[13] = kind
            (folder / f"{path.name}.{kind}").write_bytes(bytes(choices) + path.read_bytes())
