"""Folders of jobs: files whole or not at all, on disks and in object stores, and one job at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pyvdl import storage
from pyvdl.archives import Sample, write_archive
from pyvdl.data import Record, write_manifest
from pyvdl.storage import Folder, claim, hold, write_arrays, write_whole


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(tmp_path / "job" if request.param == "disk" else f"memory://{uuid.uuid4().hex}/job")


def test_a_folder_keeps_files(folder: Folder) -> None:
    assert folder.names() == []
    folder.make()
    folder.write("b", b"1")
    folder.write("a", b"2")
    (folder / "work").make()
    (folder / "work").write("c", b"3")
    assert folder.names() == ["a", "b"]
    assert ((folder / "work").names(), (folder / "work").read("c")) == (["c"], b"3")
    folder.write("a", b"new")
    assert folder.read("a") == b"new"
    with folder.open("a") as file:
        assert file.read(2) == b"ne"
    assert folder.modified("a") > 1e9
    folder.remove("a")
    folder.remove("a")
    assert not folder.exists("a")
    assert folder.exists("b")


class Refusing(MemoryFileSystem):
    """A bucket that others may only read."""

    protocol = "refusing"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        raise RuntimeError("403: storage.objects.create is denied")


@pytest.fixture
def guarded() -> Iterator[Path]:
    """A folder that this process may not write into. The superuser could, so it is another user meanwhile."""
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name), os.geteuid()
        folder.chmod(0o555)
        if user == 0:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(user)
            folder.chmod(0o755)


def test_a_folder_that_nothing_can_be_written_into_says_so(guarded: Path) -> None:
    for folder in (guarded, guarded / "job"):
        with pytest.raises(
            OSError, match=rf"^nothing can be written into {folder} \(Permission denied\): get the right"
        ):
            Folder(folder).make()
    (file := guarded.with_suffix(".txt")).touch()
    with pytest.raises(
        OSError, match=rf"^nothing can be written into {file}/job \(Not a directory\): .* another folder"
    ):
        Folder(file / "job").make()
    file.unlink()
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    with pytest.raises(
        OSError, match=r"into refusing://bucket/job \(RuntimeError: 403: storage.objects.create is denied"
    ):
        Folder("refusing://bucket/job").make()


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    def lines() -> object:
        yield "one\n"
        raise KeyError("two")

    write_whole(tmp_path / "file", ["before\n"])
    with pytest.raises(KeyError):
        write_whole(tmp_path / "file", lines())  # type: ignore[arg-type]
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before\n")]


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Path, target: Path) -> None:
        assert target.read_bytes() == b"before"
        raise OSError(5, "Input/output error")

    Folder(tmp_path).write("file", b"before")
    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="Input/output error"):
        Folder(tmp_path).write("file", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "with_name", lambda self, name: Path("/dev/full"))
    monkeypatch.setattr(Path, "unlink", lambda *a, **k: None)
    with pytest.raises(OSError, match=r"No space left on device: '.*captions'"):
        Folder(tmp_path).write("captions", b"x")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: Folder(path.parent).write(path.name, b"x"),
        lambda path: write_whole(path, ["x"]),
        lambda path: write_arrays(path, {"x": np.zeros(2)}),
        lambda path: write_manifest(path, [Record(key="a", video="a.mp4")]),
        lambda path: write_archive(path, [Sample(key="a", video=b"x")]),
    ],
)
def test_a_file_gets_its_name_once_its_bytes_are_on_the_disk(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(file: int) -> None:
        assert os.fstat(file).st_size
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=r"Input/output error: '.*file'"):
        write(tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["[]", '{"job": "tra', ""])
def test_a_damaged_recipe_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is damaged.*choose another folder"):
        claim(tmp_path / "run.json", {"job": "train"})


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    claim(tmp_path / "run.json", {"seed": 3, "sizes": (1, 2)})
    claim(tmp_path / "run.json", {"seed": 3, "sizes": (1, 2)})
    with pytest.raises(ValueError, match="seed was 3, now 4"):
        claim(tmp_path / "run.json", {"seed": 4, "sizes": (1, 2)})


def test_a_difference_is_told_by_its_setting(tmp_path: Path) -> None:
    claim(tmp_path / "run.json", {"train": {"batch_size": 4, "optim": {"name": "sgd"}}})
    with pytest.raises(ValueError, match=r"another job \(train\.batch_size was 4, now 8\); choose"):
        claim(tmp_path / "run.json", {"train": {"batch_size": 8, "optim": {"name": "sgd"}}})


def test_a_folder_holds_one_job_at_a_time(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BEAT_SECONDS", 0.05)
    folder.make()
    with hold(folder), pytest.raises(RuntimeError, match=r"another job writes into .* \(process \d+ on "), hold(folder):
        pytest.fail("two at a time")
    with hold(folder):
        pass


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    code = f"""if True:
        from pyvdl.storage import Folder, hold
        import os, signal
        with hold(Folder({str(tmp_path)!r})):
            os.kill(os.getpid(), signal.SIGKILL)"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    with hold(Folder(tmp_path)):
        pass


def test_a_lock_that_stands_still_in_an_object_store_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BEAT_SECONDS", 0.05)
    folder = Folder(f"memory://{uuid.uuid4().hex}")
    folder.write(".lock", b"process 1 on a machine that is gone, 1\n0")
    with hold(folder):
        pass
    assert folder.names() == []


def test_a_lock_outlasts_a_store_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BEAT_SECONDS", 0.02)
    write, beats = Folder.write, []

    def away(self: Folder, name: str, data: bytes) -> None:
        beats.append(name)
        if len(beats) == 2:
            raise OSError("the store is away")
        write(self, name, data)

    monkeypatch.setattr(Folder, "write", away)
    until = time.monotonic() + 10
    with hold(Folder(f"memory://{uuid.uuid4().hex}")):
        while len(beats) < 3:
            assert time.monotonic() < until
            time.sleep(0.01)
