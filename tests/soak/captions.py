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
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable

from tests.kills import Scene, finish, make_scene, run_damaged, run_killed, run_ray_killed, shards, start
from tests.soak.seeds import ROOT

WORK = ROOT / "build" / "soak" / "captions"
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


def damage(scene: Scene) -> bool:
    begin = time.monotonic()
    keys, rows = run_damaged(scene, WORK / "damaged", MUTATIONS)
    kinds = Counter("ok" if row.error is None else row.error.partition(":")[0] for row in rows)
    print(f"damaged files: {len(rows)} rows in {time.monotonic() - begin:.0f} s, {json.dumps(kinds)}", flush=True)
    return sorted(row.key for row in rows) == sorted(keys)


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
