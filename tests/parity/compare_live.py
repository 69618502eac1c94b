"""Compares pyvdl with goldens made a moment ago, prints a table and exports every model for `check_exports`.

python -m tests.parity.compare_live build/parity/live --exports build/parity/exports
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from pyvdl.models import VLM, load_pretrained, save_pretrained
from tests.parity.compare import cases, compare, differences, versions


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares pyvdl with what transformers computed.")
    parser.add_argument("goldens", type=Path, help="folder that make_goldens filled")
    parser.add_argument("--exports", type=Path, help="folder to export the models into")
    arguments = parser.parse_args()
    made_by = " ".join(f"{name} {version}" for name, version in versions(arguments.goldens).items())
    print(f"against {made_by}\n{'checkpoint':34} {'output':18} {'shape':>20} {'error':>9}")
    failed = 0
    for name in cases(arguments.goldens):
        golden = arguments.goldens / f"{name}.npz"
        model, found = compare(arguments.goldens / name, golden)
        if arguments.exports:
            save_pretrained(model, arguments.exports / name)
            if isinstance(model, VLM):
                save_pretrained(model.vision, arguments.exports / f"{name}-tower")
        del model  # before the next one is loaded: real layers are large
        rows = [(name, difference) for difference in found]
        for other in sorted(arguments.goldens.glob(f"{name}-*")):
            if other.name.endswith(("-open-clip", "-big-vision.npz", "-big-vision-scan.npz")):
                with np.load(golden) as arrays:
                    again = differences(
                        load_pretrained(other, dtype="float32"), dict(arrays), big_vision=other.suffix == ".npz"
                    )
                rows += [(other.name, difference) for difference in again]
        for shown, difference in rows:
            same = "identical" if difference.error == 0 else f"{difference.error:.1%} off"
            error = same if difference.output == "greedy" else f"{difference.error:.1e}"
            mark = "" if difference.agrees else "  FAILED"
            print(f"{shown:34} {difference.output:18} {difference.shape!s:>20} {error:>9}{mark}", flush=True)
            failed += not difference.agrees
    print(f"{failed} outputs differ" if failed else "all outputs agree")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
