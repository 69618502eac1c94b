"""Where jobs write: folders on local disks or wherever fsspec reaches, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from pyvdl.sources import is_url

BEAT_SECONDS = 10.0  # of the lock in an object store
_LOCK = ".lock"


class Folder:
    """The folder at a path or URL (gs://, s3://, memory://, ...), with files that are written at once.

    A local file gets its name when its bytes are on the disk; an object store takes it by one put. Raises OSError
    naming the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        self.local = None if is_url(path) else Path(path)  # None: reached through fsspec
        if self.local is None:
            from fsspec.core import url_to_fs

            self._fs, self._root = url_to_fs(self.name)

    def make(self) -> None:
        """Makes the folder, where folders exist by themselves, and tries to write into it; OSError says what failed."""
        probe = f".probe.{uuid.uuid4().hex}"
        try:
            if self.local is not None:
                self.local.mkdir(parents=True, exist_ok=True)
            self.write(probe, b"\n")
            self.remove(probe)
        except Exception as error:  # each file system has errors of its own
            why = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
            raise OSError(
                f"nothing can be written into {self.name} ({why}): get the right to, or choose another folder"
            ) from error

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.local / name if self.local is not None else f"{self.name.rstrip('/')}/{name}")

    def names(self) -> list[str]:
        """Names of the files in it, sorted; one listing. Of a folder that is not there, no names."""
        try:
            if self.local is not None:
                return sorted(entry.name for entry in os.scandir(self.local) if entry.is_file())
            self._fs.invalidate_cache(self._root)
            found = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rsplit("/", 1)[-1] for entry in found if entry["type"] == "file")

    def exists(self, name: str) -> bool:
        if self.local is not None:
            return (self.local / name).exists()
        self._fs.invalidate_cache(self._root)
        return self._fs.exists(self._at(name))

    def read(self, name: str) -> bytes:
        if self.local is not None:
            return (self.local / name).read_bytes()
        return self._fs.cat_file(self._at(name))

    def open(self, name: str) -> IO[bytes]:
        """The file, to read parts of it."""
        return (self.local / name).open("rb") if self.local is not None else self._fs.open(self._at(name), "rb")

    def modified(self, name: str) -> float:
        """When the file was written, in seconds since the epoch."""
        if self.local is not None:
            return (self.local / name).stat().st_mtime
        return self._fs.modified(self._at(name)).timestamp()

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, whole or not at all; one that is there is replaced."""
        if self.local is None:
            self._fs.pipe_file(self._at(name), data)
        else:
            with whole_file(self.local / name) as file:
                file.write(data)

    def remove(self, name: str) -> None:
        if self.local is not None:
            (self.local / name).unlink(missing_ok=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


@contextlib.contextmanager
def hold(folder: Folder) -> Iterator[None]:
    """Keeps other jobs out of a folder; RuntimeError when one is in it already.

    On a disk the lock goes with the process that holds it. In an object store it is an object that is written anew
    every few seconds: one that stands still is that of a process that has ended, which takes a while to see.
    """
    who = f"process {os.getpid()} on {socket.gethostname()}"
    if folder.local is not None:
        with (folder.local / _LOCK).open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise _occupied(folder, file.read()) from None
            file.truncate(0)
            file.write(who)
            file.flush()
            yield
            file.truncate(0)
        return
    name = f"{who}, {uuid.uuid4().hex}"

    def beat() -> None:
        folder.write(_LOCK, f"{name}\n{time.time()}".encode())

    def found() -> bytes:
        return folder.read(_LOCK) if folder.exists(_LOCK) else b""

    if before := found():
        time.sleep(3 * BEAT_SECONDS)
        if found() not in (before, b""):
            raise _occupied(folder, before.decode().partition(",")[0])
    beat()
    time.sleep(BEAT_SECONDS / 4)  # of two that begin at once, the later one's name stays
    if not (now := found()).startswith(name.encode()):
        raise _occupied(folder, now.decode().partition(",")[0])
    ended = threading.Event()

    def go_on() -> None:
        while not ended.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # the store is away: the job's own writes will tell
                beat()

    heart = threading.Thread(target=go_on, daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        folder.remove(_LOCK)


def _occupied(folder: Folder, who: str) -> RuntimeError:
    return RuntimeError(f"another job writes into {folder.name} ({who}): wait for it, or choose another folder")


def write_whole(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file that appears whole or not at all."""
    with whole_file(path) as file:
        file.writelines(line.encode() for line in lines)


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Writes a NumPy archive that appears whole or not at all."""
    import numpy as np

    with whole_file(path) as file:
        np.savez(file, **arrays)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write into that gets its name when its bytes are on the disk."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # on several hosts processes have the same number
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error  # a full disk does not say which file
    finally:
        with contextlib.suppress(OSError):  # what went wrong above is told, not this
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Returns when the bytes of all files below a folder are on the disk, where they must be before it is renamed."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def claim(path: Path, recipe: dict[str, Any], how: dict[str, Any] | None = None) -> None:
    """Writes the recipe of a new run, or holds it against that of the run found there.

    `how` stands in the file, too, as it was the last time: how the work is done, which may change, and not what comes
    out.
    """
    recipe, how = json.loads(json.dumps((recipe, how or {})))  # tuples become lists, as in what is read back
    found = read_object(path.read_bytes(), path) if path.exists() else None
    if found is not None:
        refuse_another(path.parent, {name: value for name, value in found.items() if name not in how}, recipe)
    if found is None or any(found.get(name) != value for name, value in how.items()):
        write_whole(path, [json.dumps(recipe | how, indent=1) + "\n"])


def read_object(data: bytes, where: object) -> dict[str, Any]:
    """The JSON object that describes a folder."""
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"{where} is damaged: nobody knows what this folder holds; choose another folder, or delete this one"
        )
    return found


def refuse_another(folder: object, found: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Raises ValueError with the differences between the recipe found in a folder and the one asked for."""
    recipe = json.loads(json.dumps(recipe))  # tuples become lists, as in what is read back
    found, recipe = _flat(found), _flat(recipe)
    changed = [name for name in sorted({*found, *recipe}) if found.get(name) != recipe.get(name)]
    if changed:
        differences = "; ".join(f"{name} was {found.get(name)!r}, now {recipe.get(name)!r}" for name in changed)
        raise ValueError(f"{folder} holds another job ({differences}); choose another folder")


def _flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """{"train": {"seed": 0}} -> {"train.seed": 0}: a difference is then told by the one setting it is in."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return flat
