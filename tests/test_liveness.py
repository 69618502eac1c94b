"""What is alive in a compiled step: activations, gradients and the rest, read from a program's text."""

from __future__ import annotations

import pytest

from pyvdl import liveness
from pyvdl.hlo import UnreadableError

# A forward loop stacks an activation for the backward loop, which stacks a gradient for the optimizer.
STEP = """\
HloModule jit_step, is_scheduled=true

%forward (s: (s32[], f32[256], f32[3,1024], bf16[3,8,100])) -> (s32[], f32[256], f32[3,1024], bf16[3,8,100]) {
  %s = (s32[], f32[256]{0}, f32[3,1024]{1,0:T(8,128)}, bf16[3,8,100]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[256]{0} get-tuple-element(%s), index=1
  %w = f32[3,1024]{1,0:T(8,128)} get-tuple-element(%s), index=2
  %y = bf16[3,8,100]{2,1,0:T(8,128)(2,1)} get-tuple-element(%s), index=3
  %wide = f32[512]{0:T(512)} fusion(%x, %w), kind=kLoop, calls=%f, metadata={op_name="jit(step)/jvp()/while/body/mul"}
  %fast = f32[4096]{0:T(512)S(1)} copy(%wide)
  %z = bf16[3,8,100]{2,1,0:T(8,128)(2,1)} fusion(%y, %i, %fast), kind=kLoop, calls=%g,
      metadata={op_name="jit(step)/jvp()/while/body/stack"},
      backend_config={"aliasing_operands":{"lists":[{"indices":["0","3"]}]}}
  %next = f32[256]{0} fusion(%fast), kind=kLoop, calls=%h, metadata={op_name="jit(step)/jvp()/while/body/add"}
  ROOT %t = (s32[], f32[256]{0}, f32[3,1024]{1,0:T(8,128)}, bf16[3,8,100]{2,1,0:T(8,128)(2,1)}) tuple(%i, %next, %w, %z)
}

%backward (s: (s32[], bf16[3,8,100], f32[3,1024])) -> (s32[], bf16[3,8,100], f32[3,1024]) {
  %s = (s32[], bf16[3,8,100]{2,1,0:T(8,128)(2,1)}, f32[3,1024]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %y = bf16[3,8,100]{2,1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %g = f32[3,1024]{1,0:T(8,128)} get-tuple-element(%s), index=2
  %d = f32[1024]{0:T(1024)} fusion(%y), kind=kLoop, calls=%f,
      metadata={op_name="jit(step)/transpose(jvp())/while/body/dot"}
  %u = f32[3,1024]{1,0:T(8,128)} dynamic-update-slice(%g, %d, %i),
      metadata={op_name="jit(step)/transpose(jvp())/while/body/stack"}
  ROOT %t = (s32[], bf16[3,8,100]{2,1,0:T(8,128)(2,1)}, f32[3,1024]{1,0:T(8,128)}) tuple(%i, %y, %u)
}

ENTRY %main (w: f32[3,1024], x: f32[256]) -> f32[3,1024] {
  %w = f32[3,1024]{1,0:T(8,128)} parameter(0), metadata={op_name="params['w']"}
  %x = f32[256]{0} parameter(1), metadata={op_name="batch['x']"}
  %i = s32[]{:T(128)} constant(0)
  %space = bf16[3,8,100]{2,1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  %half = bf16[3,1024]{1,0:T(8,128)(2,1)} convert(%w)
  %in = (s32[], f32[256]{0}, f32[3,1024]{1,0:T(8,128)}, bf16[3,8,100]{2,1,0:T(8,128)(2,1)}) tuple(%i, %x, %w, %space)
  %first = (s32[], f32[256]{0}, f32[3,1024]{1,0:T(8,128)}, bf16[3,8,100]{2,1,0:T(8,128)(2,1)}) while(%in),
      condition=%c, body=%forward, metadata={op_name="jit(step)/jvp()/while"}
  %kept = bf16[3,8,100]{2,1,0:T(8,128)(2,1)} get-tuple-element(%first), index=3
  %zeros = f32[3,1024]{1,0:T(8,128)} broadcast(%i), dimensions={}
  %back = (s32[], bf16[3,8,100]{2,1,0:T(8,128)(2,1)}, f32[3,1024]{1,0:T(8,128)}) tuple(%i, %kept, %zeros)
  %second = (s32[], bf16[3,8,100]{2,1,0:T(8,128)(2,1)}, f32[3,1024]{1,0:T(8,128)}) while(%back),
      condition=%c, body=%backward, metadata={op_name="jit(step)/transpose(jvp())/while"}
  %grad = f32[3,1024]{1,0:T(8,128)} get-tuple-element(%second), index=2
  ROOT %new = f32[3,1024]{1,0:T(8,128)} fusion(%w, %grad, %half), kind=kLoop, calls=%k,
      metadata={op_name="jit(step)/sub"}
}
"""


def test_activations_and_gradients_are_told_apart() -> None:
    """At the peak, in the backward loop: sizes of whole tiles, the loops' state once, what is in VMEM not at all."""
    activation, gradient, layer = 3 * 8 * 128 * 2, 8 * 1024 * 4, 1024 * 4
    half, counter = 8 * 1024 * 2, 128 * 4
    assert liveness.at_peak(STEP) == (activation, gradient, layer + half + counter)


def test_liveness_needs_to_know_the_batch() -> None:
    with pytest.raises(UnreadableError, match="no argument of the program is named batch"):
        liveness.at_peak(STEP.replace("batch['x']", "data['x']"))
