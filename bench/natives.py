"""Builds the bench's C++ files into shared libraries and loads them, so that one clock measures everybody alike."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.common import ROOT

BUILD = ROOT / "build" / "bench"
FFMPEG = ("libavformat", "libavcodec", "libavutil", "libswscale")


class BuildError(RuntimeError):
    """A C++ file that does not build. The text is what the failing tool said."""


def load_limits() -> ctypes.CDLL:
    """limits.cpp, built unless that was done since it changed."""
    source, target = ROOT / "bench" / "limits.cpp", BUILD / "limits.so"
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        _compile([str(source)], target)
    library = ctypes.CDLL(str(target))
    library.limit_clip.argtypes = [ctypes.c_char_p, ctypes.c_void_p, *[ctypes.c_int] * 5, ctypes.c_void_p]
    library.limit_clip.restype = ctypes.c_char_p
    library.limit_open.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p)]
    library.limit_open.restype = ctypes.c_char_p
    library.limit_close.argtypes = [ctypes.c_void_p]
    library.limit_close.restype = None
    library.limit_decode.argtypes = [ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64)]
    library.limit_decode.restype = ctypes.c_char_p
    library.limit_ffmpeg.argtypes = []
    library.limit_ffmpeg.restype = ctypes.c_char_p
    return library


def load_convert() -> ctypes.CDLL:
    """convert.cpp with the parts of csrc, compiled as pyvdl's own module is, from what stands there now."""
    core, target = BUILD / "core", BUILD / "convert.so"
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if cmake is None:
        raise BuildError("cmake is not installed")
    _run([cmake, "-S", str(ROOT), "-B", str(core), "-DPYVDL_BUILD_MODULE=OFF", "-DPYVDL_BUILD_TESTS=OFF"])
    _run([cmake, "--build", str(core), "--target", "pyvdl_core"])
    sources = [f"-I{ROOT / 'csrc'}", str(ROOT / "bench" / "convert.cpp"), str(core / "libpyvdl_core.a")]
    _compile(sources, target)
    library = ctypes.CDLL(str(target))
    library.convert_pictures.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 9, ctypes.c_void_p]
    library.convert_pictures.restype = ctypes.c_double
    library.ffmpeg_version.argtypes = []
    library.ffmpeg_version.restype = ctypes.c_char_p
    return library


def _compile(arguments: Sequence[str], target: Path) -> None:
    """Makes a shared library that appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    flags = shlex.split(_run(["pkg-config", "--cflags", "--libs", *FFMPEG]))
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        partial = Path(folder) / target.name
        _run(
            ["c++", "-O2", "-std=c++20", "-Wall", "-Wextra", "-fPIC", "-shared", "-o", str(partial), *arguments, *flags]
        )
        os.replace(partial, target)


def _run(command: Sequence[str]) -> str:
    """What the command printed."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise BuildError(f"{command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{command[0]} failed: {(error.stderr or error.stdout).strip()}") from error
