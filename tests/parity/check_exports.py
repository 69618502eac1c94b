"""Loads what pyvdl exported in `transformers` and compares it with the goldens.

Runs in the environment of `make parity`:
    PYTHONPATH=tests python -P -m parity.check_exports build/parity/exports build/parity/live
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import SiglipVisionModel

from .families import MODELS, compute, pixel_values
from .make_goldens import REAL, TINY

TOLERANCE = 1e-4  # relative to the output's root mean square


def load(model_class: Any, folder: Path) -> Any:
    """The exported model in float32; every tensor must find its place."""
    model, report = model_class.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = {kind: names for kind, names in report.items() if names}
    if wrong:
        raise SystemExit(f"{folder}: {wrong}")
    return model.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares exported models with what they were loaded from.")
    parser.add_argument("exports", type=Path)
    parser.add_argument("goldens", type=Path)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    failed = 0
    for name, case in (TINY | REAL).items():
        if not (arguments.exports / name).exists():
            continue
        with np.load(arguments.goldens / f"{name}.npz") as arrays:
            golden = dict(arrays)
        outputs = compute(case, load(MODELS[case.family][1], arguments.exports / name), golden)
        if case.family == "paligemma":  # its tower, exported alone
            tower = load(SiglipVisionModel, arguments.exports / f"{name}-tower")
            tokens = tower(pixel_values("paligemma", golden["images"])).last_hidden_state.numpy()
            outputs["vision_tokens of the tower"] = tokens
            golden["vision_tokens of the tower"] = golden["vision_tokens"].reshape(tokens.shape)
        for output, value in outputs.items():
            wanted = golden[output]
            if output == "greedy":
                error = float(np.mean((value != wanted) & (wanted >= 0)))
                agrees = error == 0
            else:
                error = float(np.abs(value - wanted).max() / np.sqrt(np.mean(np.square(wanted))))
                agrees = error <= TOLERANCE
            print(f"{name:20} {output:26} {error:9.1e}{'' if agrees else '  FAILED'}", flush=True)
            failed += not agrees
    print(f"{failed} outputs of exported models differ" if failed else "all exported models agree")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
