"""The processes that contenders run in, and the environment of those that do not live in pyvdl's."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from bench.contenders import CONTENDERS, Contender
from bench.natives import BUILD, ROOT, BuildError, load_limits

PEERS = BUILD / "peers"  # their environment
PATIENCE_SECONDS = 600.0  # for one reply


class ContenderError(RuntimeError):
    """A contender that cannot be started, or that failed at a job. The text says why."""


class Worker:
    """The process of one contender. `hello` is what it said of itself; it is started again after it died."""

    def __init__(self, kind: type[Contender]) -> None:
        self.name = kind.name
        self._kind = kind
        self._process: subprocess.Popen[str] | None = None
        self.hello = self._start()

    def _start(self) -> dict[str, Any]:
        python = Path(sys.executable)
        if self._kind.own_environment:
            python = PEERS / "bin" / "python"
        install = f"pip install {' '.join(self._kind.requirements)}"
        if not python.exists():
            raise ContenderError(f"not installed ({install}, or all peers: python -m bench.decode --setup)")
        self._process = subprocess.Popen(
            [python, "-m", "bench.contenders", self.name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        hello = self._receive()
        if "error" in hello:
            self.close()
            state = "not installed" if hello["missing"] else "does not load"
            raise ContenderError(f"{state} ({install}, or all peers: python -m bench.decode --setup): {hello['error']}")
        return hello

    def _receive(self) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        timer = threading.Timer(PATIENCE_SECONDS, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            self.close()
            raise ContenderError(f"its process ended with code {process.returncode}")
        return json.loads(line)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request of contenders.answer()."""
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: there is no reply, which tells how
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        reply = self._receive()
        if "error" in reply:
            raise ContenderError(reply["error"])
        return reply

    def close(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            process.communicate()  # stdin ends, and with it the process


def set_up_peers() -> None:
    """Makes the peers' environment and the limits. What cannot be installed or built does not keep the others away."""
    uv = shutil.which("uv")
    if uv:
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, PEERS], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", str(PEERS / "bin" / "python")]
    else:
        subprocess.run([sys.executable, "-m", "venv", "--clear", PEERS], check=True)
        install = [str(PEERS / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, "numpy"], check=True)
    peers = [kind for kind in CONTENDERS.values() if kind.own_environment]
    for requirements in dict.fromkeys(kind.requirements for kind in peers):
        print(f"installing {' '.join(requirements)}", flush=True)
        subprocess.run([*install, *requirements], check=False)
    for kind in peers:
        try:
            with contextlib.closing(Worker(kind)) as worker:
                print(f"{kind.name} {worker.hello['version']}: ready")
        except ContenderError as error:
            print(f"{kind.name}: {error}")
    try:
        load_limits()
        print("limit-a, limit-b: ready")
    except BuildError as error:
        print(f"limit-a, limit-b: {error}")
    print("torchcodec and SPDL load the system's FFmpeg with all its libraries: apt-get install ffmpeg")
