"""`make soak`, its second half: captioning jobs killed SOAK_KILLS (100) times each, and one over damaged files.

So often with each engine: one process, two that work together, and workers of a Ray cluster. Every ten kills a job is
done, and must be to the byte what an undisturbed one of one process wrote. Then one job over the videos beside the
repository, where there are any, and mutations of them: it ends, and every clip has a row. Exit status 1 where something
else happens.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable

from pyvdl.data import Record, write_manifest
from pyvdl.rows import read_captions
from tests.kills import Scene, finish, make_scene, run_killed, run_ray_killed, shards, start
from tests.soak.seeds import ROOT, write_seeds

WORK = ROOT / "build" / "soak" / "captions"
VIDEOS = ROOT.parent / "shared" / "videos"
CLIPS = 80
RAY_CLIPS = 600  # of a worker that is killed the other goes on
KILLS_OF_A_JOB = 10
MUTATIONS = 200


ENGINES: dict[str, Callable[..., list[int]]] = {
    "one process": functools.partial(run_killed, processes=1),
    "two processes": functools.partial(run_killed, processes=2),
    "Ray": run_ray_killed,
}


def kill(scene: Scene, wanted: dict[str, bytes], kills: int, engine: str) -> bool:
    good = True
    for number in range(-(-kills // KILLS_OF_A_JOB)):
        out = WORK / f"killed-{engine.replace(' ', '-')}-{number}"
        have = ENGINES[engine](scene, out, min(KILLS_OF_A_JOB, kills - number * KILLS_OF_A_JOB), seed=number)
        same = shards(out) == wanted
        good &= same
        told = "the same rows" if same else "OTHER ROWS"
        print(f"kills: {engine}, of {scene.shards} shards at each kill {have}, {told}", flush=True)
    return good


def start_twice(scene: Scene, wanted: dict[str, bytes]) -> bool:
    """The first is halted meanwhile, so that it does not end too early."""
    out = WORK / "twice"
    (first,) = start(scene, out)
    while not (out / ".lock").exists() or not (out / ".lock").read_text():
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    (second,) = start(scene, out)
    said = second.communicate()[0]
    first.send_signal(signal.SIGCONT)
    finish([first])
    good = second.returncode == 1 and f"another job writes into {out} (process {first.pid} on " in said
    print(f"a second job on the same folder: {said.strip().splitlines()[-1]}", flush=True)
    return good and shards(out) == wanted


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The file with bytes flipped, cut off, cut out or written twice."""
    found = bytearray(data)
    at = rng.randrange(len(found))
    length = min(len(found) - at, rng.randint(1, 1 << rng.randint(1, 16)))
    match rng.randrange(4):
        case 0:
            for _ in range(rng.randint(1, 64)):
                found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
        case 1:
            del found[at:]
        case 2:
            del found[at : at + length]
        case 3:
            found[at:at] = found[at : at + length]
    return bytes(found)


def damage(scene: Scene) -> bool:
    """One job over damaged files."""
    folder = WORK / "damaged"
    folder.mkdir()
    sources = sorted(path for path in VIDEOS.glob("*.*") if path.suffix not in (".md", ".json"))
    if not sources:
        write_seeds(folder)
        sources = sorted(folder.iterdir())
    records = [Record(key=path.name, video=str(path)) for path in sources]
    for number in range(MUTATIONS):
        rng = random.Random(number)
        source = sources[number % len(sources)]
        path = folder / f"mutation-{number:03d}{source.suffix}"
        path.write_bytes(mutate(source.read_bytes(), rng))
        records.append(Record(key=path.name, video=str(path)))
    write_manifest(folder / "clips.jsonl", records)
    begin = time.monotonic()
    finish(start(Scene(scene.model, folder / "clips.jsonl", len(records), scene.cache), folder / "out"))
    rows = list(read_captions(folder / "out"))
    kinds: dict[str, int] = {}
    for row in rows:
        kind = "ok" if row.error is None else row.error.partition(":")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    print(f"damaged files: {len(rows)} rows in {time.monotonic() - begin:.0f} s, {json.dumps(kinds)}", flush=True)
    return sorted(row.key for row in rows) == sorted(record.key for record in records)


def main() -> int:
    kills = int(os.environ.get("SOAK_KILLS", "100"))
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    good: list[bool] = []
    for clips, engines in ((CLIPS, ("one process", "two processes")), (RAY_CLIPS, ("Ray",))):
        folder = WORK / f"{clips}-clips"
        folder.mkdir()
        scene = make_scene(folder, clips)
        finish(start(scene, folder / "whole"))
        wanted = shards(folder / "whole")
        if not good:
            good += [damage(scene), start_twice(scene, wanted)]
        good += [kill(scene, wanted, kills, engine) for engine in engines]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
