"""What a wanted frame needs: `python -m bench.closure`. How far a decoder could go in leaving frames out.

For frames at the centres of a clip's segments, every packet since the last key frame that others may refer to is left
out alone, on trial, and the frame decoded without it. Where the frame comes out the same, bit by bit, that packet was
not needed. This bounds from above what following the references in the headers can give, which must keep what is
listed, used or not. Packets that nothing may refer to are left out by pyvdl already; they are counted, not tried.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

import av
import numpy as np

from bench.common import ROOT, format_table, progress
from bench.corpus import CASES, Case, make_clip
from pyvdl import VideoDecoder

TARGETS = 4  # frames of a clip
TRIALS = 24  # packets tried for each, spread evenly


def decoded(header: bytes | None, codec: str, packets: list[av.Packet], wanted: int) -> bytes | None:
    """The planes of the frame whose pts is `wanted`; None where it does not come out."""
    context = cast(av.VideoCodecContext, av.CodecContext.create(codec, "r"))
    context.extradata = header
    context.thread_type = "NONE"
    for packet in [*packets, None]:
        try:
            frames = context.decode(packet)
        except av.FFmpegError:
            continue
        for frame in frames:
            if frame.pts == wanted:
                return b"".join(bytes(plane) for plane in frame.planes)
    return None


def referable(packet: bytes, codec: str) -> bool:
    """May other frames refer to this one: what the headers of its slices say (H.264 nal_ref_idc, HEVC unit types)."""
    at = 0
    while at + 5 <= len(packet):
        kind = packet[at + 4]
        if codec == "h264" and kind & 31 in (1, 5):
            return kind >> 5 & 3 != 0
        if codec == "hevc" and kind >> 1 & 63 < 32:
            return kind >> 1 & 63 > 14 or kind >> 1 & 1 == 1
        at += 4 + int.from_bytes(packet[at : at + 4], "big")
    return True


def count(case: Case, path: Path) -> tuple[int, int, int]:
    """(packets tried, of these not needed, packets that pyvdl leaves out already)."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        header, codec = stream.codec_context.extradata, stream.codec_context.name
        packets = [packet for packet in container.demux(stream) if packet.size]
    reader = VideoDecoder(path)
    times = reader.pts_ticks
    tried = unneeded = left_out = 0
    for rank in np.linspace(0, len(reader), TARGETS, endpoint=False).astype(int) + len(reader) // (2 * TARGETS):
        wanted = int(times[rank])
        target = next(i for i, packet in enumerate(packets) if packet.pts == wanted)
        start = max(i for i in range(target + 1) if packets[i].is_keyframe)
        between = list(range(start + 1, target))
        fresh = VideoDecoder(path)
        fresh.get_planes_at(int(rank))
        left_out += max(0, len(between) + 2 - fresh.stats["packets_sent"])
        chosen = sorted({between[int(i)] for i in np.linspace(0, len(between) - 1, min(TRIALS, len(between)))})
        # What follows in the stream pushes the wanted frame out of the decoder.
        end = min(len(packets), target + 1 + 16)
        whole = decoded(header, codec, packets[start:end], wanted)
        if whole is None:
            raise RuntimeError(f"{case.name}: frame {rank} does not come out of its own group")
        for i in chosen:
            if not referable(bytes(packets[i]), codec):
                continue
            tried += 1
            rest = [packets[j] for j in range(start, end) if j != i]
            unneeded += decoded(header, codec, rest, wanted) == whole
    return tried, unneeded, left_out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.closure", description=__doc__.partition("\n")[0])
    families = ("H.264 with B", "H.264 baseline", "HEVC")
    names = [name for name, case in CASES.items() if case.family in families and case.width < 1920]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE")
    parser.add_argument("--corpus", type=Path, default=ROOT / "build" / "bench" / "decode")
    arguments = parser.parse_args()
    rows = [["case", "left out already", "tried", "not needed"]]
    for name in arguments.cases:
        tried, unneeded, left_out = count(CASES[name], make_clip(CASES[name], arguments.corpus))
        rows.append([name, str(left_out), str(tried), f"{unneeded} ({unneeded / max(tried, 1):.0%})"])
        progress(f"{name}: done")
    print(format_table(rows))


if __name__ == "__main__":
    main()
