"""Compiles space_time_attention ahead of time for a TPU that is not there: `python -m tests.tpu_aot v5e '[...]'`.

A process of its own, since libtpu reads its environment (see bench.tpu_static) when it is loaded. Each case is
[B, S, N, D, dtype, class_tokens]; a line of JSON says for each the kernels found in the program and the bytes of
temporaries in HBM.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.tpu_static import CHIPS
from pyvdl.kernels import space_time_attention


def main(chip: str, cases: list[tuple[int, int, int, int, str, int]]) -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topologies[1])
    sharding = NamedSharding(Mesh(np.array(topology.devices)[:1], ("chip",)), PartitionSpec())
    for batch, tokens, heads, head_dim, dtype, class_tokens in cases:
        attend = functools.partial(space_time_attention, frames=1, class_tokens=class_tokens)

        def gradients(*arrays: jax.Array, attend: Any = attend) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            out, pull = jax.vjp(attend, *arrays[:3])
            return out, pull(arrays[3])

        x = jax.ShapeDtypeStruct((batch, tokens, heads, head_dim), dtype, sharding=sharding)
        compiled = jax.jit(gradients).lower(x, x, x, x).compile()
        kernels = sorted(set(re.findall(r"joint_attention_(?:for|back)ward", compiled.as_text() or "")))
        memory = compiled.memory_analysis()
        print(json.dumps({"kernels": kernels, "temp_bytes": memory and memory.temp_size_in_bytes}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
