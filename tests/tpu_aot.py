"""Compiles space_time_attention ahead of time for a TPU that is not there: `python -m tests.tpu_aot v5e '[...]'`.

A process of its own, since libtpu reads its environment when it is loaded. Each case is [B, S, N, D, dtype,
class_tokens]; a line of JSON says for each the kernels found in the program and the bytes of temporaries in HBM.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from typing import Any

CHIPS = {
    "v5e": ("v5litepod-4", "v5e:2x2"),
    "v6e": ("v6e-4", "v6e:2x2"),
    "v5p": ("v5p-8", "v5p:2x2x1"),
}


def main(chip: str, cases: list[tuple[int, int, int, int, str, int]]) -> None:
    accelerator, topology_name = CHIPS[chip]
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=accelerator,
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="true",
    )
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from pyvdl.kernels import space_time_attention

    topology = topologies.get_topology_desc(platform="tpu", topology_name=topology_name)
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
