"""`make soak`: the decoder under sanitizers. Fuzzing, threads that meet, and files opened a thousand times.

SOAK_SECONDS (default 60) is the time of fuzzing; the threads get half of it. Uses the processors it may run on
(`taskset -c 0 make soak`: one). What is found is written to build/soak/findings: the report and, where one input
causes it, the input, which `build/soak/address/pyvdl_fuzz FILE` runs again. Exit status 1 on any finding in our code.

FFmpeg is the distribution's library and not instrumented, but its memory is watched. A finding counts as FFmpeg's, and
not as ours, when every stack of the report begins there. Too much time or memory is always ours: limits are to
prevent it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.soak.seeds import ROOT, write_corpus, write_seeds

WORK = ROOT / "build" / "soak"
FINDINGS = WORK / "findings"
CORES = len(os.sched_getaffinity(0))
INPUT_SECONDS = 10  # for one input; the target's own time limit is 3
OPENINGS = 1000
GRACE_SECONDS = 120  # after which a program counts as hanging

RUNTIME = re.compile(r"/lib(c|m|stdc\+\+|gcc_s|asan|ubsan|lsan|tsan|pthread)[.-]")
LIBRARY = re.compile(r"/(lib[^/ ]+)\.so")
OURS = ("/csrc/", "/tests/soak/")
DRIVERS = ("on_alarm", "fuzzer::", "__interceptor_", "__asan_", "__sanitizer_")
TITLES = (
    re.compile(r"runtime error: (.*)"),
    re.compile(r"ERROR: (broken promise: .*|timeout)"),
    re.compile(r"Assertion '(.*)' failed"),
    re.compile(r"what\(\):\s+(.*)"),
    re.compile(r"(?:ERROR|WARNING): \w+: (data race|detected memory leaks|[\w-]+)"),
)


@dataclass
class Record:
    """What was found: key -> (whose, first file, times)."""

    found: dict[str, tuple[str, Path, int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, report: str, inputs: Iterable[Path] = ()) -> None:
        owner, key = judge(report)
        FINDINGS.mkdir(parents=True, exist_ok=True)
        name = f"{owner}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        kept = FINDINGS / f"{name}.txt"
        with self.lock:
            times = self.found[key][2] if key in self.found else 0
            self.found[key] = (owner, kept, times + 1)
            if times == 0:
                kept.write_text(report)
            for path in inputs:
                if (FINDINGS / name).exists():
                    path.unlink()
                else:
                    path.rename(FINDINGS / name)

    def count(self, owner: str) -> int:
        return sum(found[0] == owner for found in self.found.values())


def origin(frame: str) -> str | None:
    """Whose code a line of a stack is in; None for sanitizers, the C and C++ libraries and those who only call."""
    if any(name in frame for name in DRIVERS):
        return None
    if any(place in frame for place in OURS):
        return "ours"
    if RUNTIME.search(frame) or not LIBRARY.search(frame):
        return None
    return "ffmpeg"


def judge(report: str) -> tuple[str, str]:
    """(ours or ffmpeg, what it is and where)."""
    title = next((match[1] for pattern in TITLES if (match := pattern.search(report))), "died")
    title = re.sub(r"0x[0-9a-f]+|-?\d+", "N", title)
    owners, place = set(), ""
    for stack in re.split(r"^\s*#0 ", report, flags=re.MULTILINE)[1:]:
        for frame in stack.splitlines():
            if frame.strip() == "":
                break
            if owner := origin(frame):
                owners.add(owner)
                place = place or re.sub(r"^\s*(#\d+ )?0x[0-9a-f]+ (in )?", "", frame).replace(f"{ROOT}/", "")
                break
    unbounded = title in ("timeout", "out-of-memory", "allocation-size-too-big")
    owner = "ffmpeg" if owners == {"ffmpeg"} and not unbounded else "ours"
    return owner, f"{title} at {place or 'an unknown place'}"


def clang() -> str | None:
    """A clang++ that has libFuzzer, where there is one; its reports need a symbolizer."""
    if symbolizer() is None:
        return None
    for name in ("clang++", *(f"clang++-{version}" for version in range(22, 13, -1))):
        if (path := shutil.which(name)) is None:
            continue
        program = 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }'
        command = [path, "-fsanitize=fuzzer,address,undefined", "-x", "c++", "-", "-o", "/dev/null"]
        if subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0:
            return path
    return None


def symbolizer() -> str | None:
    names = ("llvm-symbolizer", *(f"llvm-symbolizer-{version}" for version in range(22, 13, -1)))
    return next((path for name in names if (path := shutil.which(name))), None)


def build(sanitizer: str, compiler: str) -> Path:
    """Returns the folder of the programs."""
    folder = WORK / sanitizer
    tools = Path(sys.executable).parent
    configure: list[str | Path] = [
        tools / "cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}",
        f"-DCMAKE_CXX_COMPILER={compiler}", "-DPYVDL_BUILD_MODULE=OFF", f"-DPYVDL_SANITIZE={sanitizer}",
    ]  # fmt: skip
    compile_all: list[str | Path] = [tools / "cmake", "--build", folder]
    for command in (configure, compile_all):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
    return folder


def environment(leaks: bool) -> dict[str, str]:
    address = {
        "detect_leaks": int(leaks),
        "handle_abort": 1,
        "allocator_may_return_null": 1,  # FFmpeg copes; our own `new` reports it
        "max_allocation_size_mb": 256,
        "quarantine_size_mb": 16,
    }
    variables = {
        "ASAN_OPTIONS": ":".join(f"{name}={value}" for name, value in address.items()),
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "exitcode=66",
    }
    if path := symbolizer():
        variables |= {"ASAN_SYMBOLIZER_PATH": path, "TSAN_SYMBOLIZER_PATH": path}
    return os.environ | variables


def run(command: list[str | Path], seconds: float, leaks: bool = False) -> tuple[int, str]:
    """Exit status and what was printed; a program that does not end is a finding, too."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds, env=environment(leaks)
        )
    except subprocess.TimeoutExpired as hang:
        return 1, f"ERROR: timeout\n{command} did not end\n{hang.stderr!r}"
    return done.returncode, done.stderr + done.stdout  # the last line is the program's own


def fuzz(programs: Path, corpus: Path, seconds: float, record: Record, leaks: bool) -> int:
    """Starts again after each finding until the time is over. Returns the number of inputs run."""
    end = time.monotonic() + seconds
    artifacts = WORK / "artifacts"
    shutil.rmtree(artifacts, ignore_errors=True)
    artifacts.mkdir()

    def work(worker: int) -> int:
        executions = 0
        seed = worker + 1
        grown = WORK / f"corpus{worker}"  # where libFuzzer keeps what reached new code
        shutil.rmtree(grown, ignore_errors=True)
        shutil.copytree(corpus, grown)
        while (left := end - time.monotonic()) > 1:
            prefix = artifacts / f"{worker}-"
            status, report = run(
                [
                    programs / "pyvdl_fuzz", f"-max_total_time={int(left)}", f"-seed={seed}",
                    f"-timeout={INPUT_SECONDS}", f"-artifact_prefix={prefix}", "-print_final_stats=1",
                    "-verbosity=0", "-print_funcs=0", "-rss_limit_mb=3000", "-malloc_limit_mb=100000", grown,
                ],
                left + GRACE_SECONDS,
                leaks,
            )  # fmt: skip
            executions += sum(map(int, re.findall(r"stat::number_of_executed_units:\s*(\d+)", report)))
            inputs = list(artifacts.glob(f"{worker}-*"))
            if status:
                record.add(report, inputs)
            seed += CORES
        return executions

    with ThreadPoolExecutor(CORES) as pool:
        return sum(pool.map(work, range(CORES)))


def meet(programs: Path, seeds: Path, seconds: float, record: Record) -> str:
    command: list[str | Path] = [programs / "pyvdl_loader_threads", f"{seconds:.0f}", seeds]
    # The thread sanitizer's map of memory does not fit kernels that place libraries very randomly.
    fixed = ["setarch", "-R"]
    if shutil.which("setarch") and subprocess.run([*fixed, "true"], capture_output=True).returncode == 0:
        command = [*fixed, *command]
    status, output = run(command, seconds + GRACE_SECONDS)
    races = [part for part in output.split("=" * 18) if "WARNING: ThreadSanitizer" in part]
    for race in races:
        record.add(race)
    if status and not races:
        record.add(output)
    return output.strip().splitlines()[-1]


def open_and_close(programs: Path, seeds: Path, record: Record) -> list[str]:
    files = sorted(seeds.iterdir())

    def work(worker: int) -> str:
        prefix = WORK / f"leak{worker}-"
        command: list[str | Path] = [programs / "pyvdl_open_close", str(OPENINGS), prefix, *files[worker::CORES]]
        status, output = run(command, OPENINGS + GRACE_SECONDS)
        leaky = sorted(WORK.glob(f"{prefix.name}*"))
        for path in leaky:
            # Once more for the stack: the target reads choices before the file.
            path.write_bytes(bytes(16) + path.read_bytes())
            _, report = run([programs / "pyvdl_fuzz", path], GRACE_SECONDS, leaks=True)
            record.add(report if "LeakSanitizer" in report else output, [path])
        if status and not leaky:
            record.add(output)
        return output.strip().splitlines()[-1]

    with ThreadPoolExecutor(CORES) as pool:
        return list(pool.map(work, range(min(CORES, len(files)))))


def main() -> int:
    seconds = float(os.environ.get("SOAK_SECONDS", "60"))
    compiler = clang()
    if compiler:
        print(f"soak: {compiler}, libFuzzer", flush=True)
    else:
        compiler = "c++"
        print("soak: c++ with a mutation driver of our own; no clang with libFuzzer and llvm-symbolizer", flush=True)
    address, thread = build("address", compiler), build("thread", compiler)

    seeds, corpus = WORK / "seeds", WORK / "corpus"
    for folder in (seeds, corpus):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    write_seeds(seeds)
    write_corpus(seeds, corpus)

    record = Record()
    status, output = run([address / "pyvdl_fuzz", *sorted(corpus.iterdir())], GRACE_SECONDS, leaks=True)
    leaks = "LeakSanitizer has encountered a fatal error" not in output
    if not leaks:
        print("soak: LeakSanitizer may not trace processes here; leaks are told by the bytes that stay", flush=True)
    elif status:
        record.add(output)
    executions = fuzz(address, corpus, seconds, record, leaks)
    print(
        f"fuzz: {executions} inputs in {seconds:.0f} s on {CORES} cores, {executions / seconds:.0f} a second, from "
        f"{len(list(seeds.iterdir()))} files",
        flush=True,
    )
    print(f"threads: {meet(thread, seeds, seconds / 2, record)}", flush=True)
    for line in open_and_close(address, seeds, record):
        print(f"open and close: {line}", flush=True)

    for key, (owner, path, times) in sorted(record.found.items(), key=lambda item: item[1]):
        print(f"{owner}: {times} x {key}\n  {path.relative_to(ROOT)}")
    print(f"soak: {record.count('ours')} findings in our code, {record.count('ffmpeg')} inside FFmpeg")
    return 1 if record.count("ours") else 0


if __name__ == "__main__":
    sys.exit(main())
