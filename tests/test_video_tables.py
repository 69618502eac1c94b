"""Large mp4 files, whose index is made of the container's tables: the same frames, without reading all samples."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from clips import write_clip

from pyvdl import DecodeError, VideoDecoder, sample_clip

FRAMES = 60


@pytest.fixture(scope="module", params=["libx264", "libx265"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise at the finest quantisation: more than the 4 MiB up to which a stream is read whole."""
    path = tmp_path_factory.mktemp("large") / f"{request.param}.mp4"
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (256, 352, 3), np.uint8) for _ in range(FRAMES)]
    options = {"crf": "4", "preset": "ultrafast"}
    if request.param == "libx265":
        options = {"preset": "ultrafast", "x265-params": "crf=2:log-level=none:open-gop=1:bframes=2"}
    write_clip(path, codec=request.param, frames=noise, gop=20, options=options)
    assert path.stat().st_size > 5 << 20
    return path


def remuxed(path: Path, target: Path) -> Path:
    with av.open(str(path)) as source, av.open(str(target), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                copy.mux(packet)
    return target


def bytes_read() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def test_frames_are_those_of_the_file_read_whole(large: Path, tmp_path: Path) -> None:
    tables, whole = VideoDecoder(large), VideoDecoder(remuxed(large, tmp_path / "whole.mkv"))
    assert len(tables) == len(whole) == FRAMES
    assert tables.key_frames.tolist() == whole.key_frames.tolist()
    for indices in ([0, 7, 19, 20, 33], [59], [3, 4, 5], [40, 22], list(range(FRAMES))):
        np.testing.assert_array_equal(tables.get_frames_at(indices).data, whole.get_frames_at(indices).data)
    assert tables.stats["packets_sent"] == whole.stats["packets_sent"], "the same packets are left out"


def test_opening_leaves_the_samples_alone(large: Path) -> None:
    before = bytes_read()
    decoder = VideoDecoder(large)
    opening = bytes_read() - before
    assert opening < large.stat().st_size / 10
    decoder.get_frames_at([5])
    assert bytes_read() - before - opening > opening / 10, "what is decoded has been read"


def test_bytes_in_memory_and_clips_are_the_same(large: Path) -> None:
    data = large.read_bytes()
    clips = [sample_clip(source, num_frames=6, size=64, short_side=72).data for source in (data, large, large)]
    np.testing.assert_array_equal(clips[0], clips[1])
    np.testing.assert_array_equal(clips[1], clips[2])  # the second time from the index that was kept


def test_a_cut_file_is_told(large: Path, tmp_path: Path) -> None:
    path = tmp_path / "faststart.mp4"
    with av.open(str(large)) as source, av.open(str(path), "w", options={"movflags": "faststart"}) as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                copy.mux(packet)
    path.write_bytes(path.read_bytes()[:-100_000])
    decoder = VideoDecoder(path)
    assert decoder.metadata.truncated
    assert 40 < len(decoder) < FRAMES


def test_a_sample_without_a_picture_is_no_frame(large: Path, tmp_path: Path) -> None:
    """The tables promise a picture; the sample's one unit is of a type that holds none."""
    with av.open(str(large)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    victim = next(i for i, packet in enumerate(packets) if i > 25 and not packet.is_keyframe)
    body, data = bytes(packets[victim]), large.read_bytes()
    at = data.index(body)
    hevc = "265" in large.name
    changed = bytearray(body)
    cursor = 0
    while cursor + 5 <= len(body):  # every unit of the sample becomes supplemental information
        changed[cursor + 4] = 39 << 1 if hevc else 6
        cursor += 4 + int.from_bytes(body[cursor : cursor + 4], "big")
    path = tmp_path / "no_picture.mp4"
    path.write_bytes(data[:at] + bytes(changed) + data[at + len(body) :])
    decoder = VideoDecoder(path)
    decoder.get_frames_at([2])
    with pytest.raises(DecodeError, match="tables and its packets contradict"):
        decoder.get_frames_at(list(range(20, 40)))
    decoder.get_frames_at([2])
