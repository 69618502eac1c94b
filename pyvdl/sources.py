"""What a video is decoded from: paths, URLs, parts of files, file-like objects; the limits and the error of decoding.

No C++ here: manifests and jobs look at sources, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Protocol

from pyvdl.checks import real, whole

type Source = str | os.PathLike[str] | bytes | FileSlice | Readable

_INT64 = (1 << 63) - 1
_SCHEME_END = "://"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_INSIDE = re.compile(r"(?:tar|array)://.*::(.*)", re.DOTALL)  # as fsspec writes it: what is in a file::its path
VIDEO_SUFFIXES = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts"}
    | {".vob", ".webm", ".wmv"}
)


class DecodeError(RuntimeError):
    """A medium that cannot be decoded as asked.

    `path` names the source ("<bytes>" for memory), `stage` is where it failed (open, header, stream, codec, read,
    decode, convert, sample, limits or timeout), `message` says why, in FFmpeg's words where they help.
    """

    def __init__(self, path: str | None, stage: str, message: str) -> None:
        super().__init__(path, stage, message)
        self.path = path
        self.stage = stage
        self.message = message

    def __str__(self) -> str:
        where = "" if self.path is None else f"{self.path}: "
        return f"{where}{self.stage}: {self.message}"


class Readable(Protocol):
    """A file-like object with the bytes of a video; it is read once, from where it stands to its end."""

    def read(self, size: int = -1, /) -> bytes: ...


@dataclass(frozen=True)
class FileSlice:
    """Part of a file that is a whole video by itself, such as a member of a tar file; read in place."""

    path: str | os.PathLike[str]
    offset: int  # first byte
    length: int  # bytes

    def __post_init__(self) -> None:
        whole("offset", self.offset, 0, _INT64)
        whole("length", self.length, 0, _INT64)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Guards against files that would take too much memory or time; what exceeds them is a DecodeError."""

    max_pixels: int = 1 << 26  # of one frame; 8192 x 8192
    max_frames: int = 5_000_000  # of the stream
    max_seconds: float = 7 * 24 * 3600.0  # of the stream
    max_bytes: int = 4 << 30  # of one result, and of what is read whole: a pipe, a file-like object, a URL

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_frames", "max_bytes"):
            whole(name, getattr(self, name), 1, _INT64)
        if not real("max_seconds", self.max_seconds) > 0:
            raise ValueError(f"max_seconds must be above 0, not {self.max_seconds!r}")


def source_name(source: Source) -> str:
    """How errors call it. Raises TypeError for what is no source."""
    if isinstance(source, bytes):
        return "<bytes>"
    if isinstance(source, FileSlice):
        return f"{os.fspath(source.path)}[{source.offset}:{source.offset + source.length}]"
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if callable(getattr(source, "read", None)):
        return str(getattr(source, "name", "<file>"))
    raise TypeError(
        f"a source is a path, a URL, bytes, a pyvdl.FileSlice or a file-like object, not {type(source).__name__}"
    )


def is_url(source: str | os.PathLike[str] | FileSlice) -> bool:
    """Whether fsspec is to read it: `scheme://...`."""
    return _URL.match(_path(source)) is not None


def open_binary(path: str) -> IO[bytes]:
    """Opens a file or URL to read bytes."""
    if not is_url(path):
        return open(path, "rb")
    import fsspec

    file: IO[bytes] = fsspec.open(path, "rb").open()
    return file


def file_path(video: str) -> str:
    """The path or URL of what holds the video: itself, or the tar file or array that it is in."""
    inside = _INSIDE.fullmatch(video) if _SCHEME_END in video else None  # jobs ask for millions
    return inside[1] if inside else video


def with_file_path(video: str, change: Callable[[str], str]) -> str:
    """The name of the video with its file's path changed; what lies at a URL keeps its name."""
    if _SCHEME_END not in video:
        return change(video)
    path = file_path(video)
    return video if is_url(path) else video.removesuffix(path) + change(path)


def is_row(video: str) -> bool:
    """Whether it names a row of an array that `pyvdl prepare` wrote."""
    return video.startswith("array://")


def absolute(video: str) -> str:
    """The name with a path, however it was spelled, from the root on; a URL as it is. Links are not followed."""
    return with_file_path(video, os.path.abspath)


def read_whole(source: Readable | str | os.PathLike[str] | FileSlice, max_bytes: int) -> bytes:
    """The bytes of a file-like object, or of what fsspec finds at a URL. Raises DecodeError, whatever goes wrong."""
    if isinstance(source, (FileSlice, str, os.PathLike)) and is_row(_path(source)):
        raise DecodeError(None, "open", "a row of an array that `pyvdl prepare` wrote: frames, not a video")
    try:
        if isinstance(source, (FileSlice, str, os.PathLike)):
            import fsspec

            with fsspec.open(_path(source), "rb") as file:
                if isinstance(source, FileSlice):
                    file.seek(source.offset)
                    data = file.read(min(source.length, max_bytes + 1))
                else:
                    data = file.read(max_bytes + 1)
        else:
            data = source.read(max_bytes + 1)
    except Exception as error:  # each file system has errors of its own
        raise DecodeError(None, "open", f"{type(error).__name__}: {error}") from error
    if not isinstance(data, bytes):
        raise DecodeError(None, "open", f"read() gave {type(data).__name__}, not bytes: open the file in binary mode")
    if len(data) > max_bytes:
        raise DecodeError(None, "limits", f"more than max_bytes = {max_bytes} bytes to read")
    return data


def file_name(path: str | os.PathLike[str]) -> bytes:
    """The path as the system takes it. To C a path ends at its first NUL byte: another file would be opened."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        raise DecodeError(None, "open", f"no file can have the name {os.fspath(path)!r}") from None
    if not name:
        raise DecodeError(None, "open", "the path is empty")
    if b"\0" in name:
        raise DecodeError(None, "open", f"the path holds a NUL byte: {os.fspath(path)!r}")
    return name


def writable(name: str) -> str:
    """The name as UTF-8 can hold it: of a file whose name is none, with \\udcff in place of the byte ff."""
    return name.encode("utf-8", "backslashreplace").decode()


def _path(source: str | os.PathLike[str] | FileSlice) -> str:
    return os.fspath(source.path if isinstance(source, FileSlice) else source)
