"""Attention ops: argument checks and dispatch by implementation and by the platform that a program is lowered for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from . import (
    attention_biased_tpu,
    attention_cudnn,
    attention_splash,
    attention_tpu,
    attention_tpu_backward,
    attention_xla,
    grouped_tpu,
    reference,
    tuning,
)
from . import distance_bias as laid_out
from .attention_xla import ATTENTION_RESIDUALS

MODES = ("joint", "space", "time")
IMPLEMENTATIONS = ("pallas_tpu", "pallas_gpu", "cudnn", "xla", "reference")


def _check_float(**arrays: Array) -> None:
    for name, x in arrays.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be of a floating type (bfloat16, float32), not {x.dtype}")


def _check_lengths(name: str, lengths: Array | None, batch: int) -> None:
    if lengths is None:
        return
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"{name} must be int32[{batch}] (one for each row), not {lengths.dtype}{list(lengths.shape)}")


def space_time_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    frames: int,
    mode: str = "joint",
    class_tokens: int = 1,
    scale: float | None = None,
    implementation: str | None = None,
) -> Array:
    """Attention among the tokens of a clip.

    Tokens are ordered frame by frame, then the class token if there is one: S = T*P + class_tokens. Modes: "joint",
    all tokens attend to all; "space", a patch attends to the patches of its frame; "time", a patch attends to the
    patches at its place in all frames. In "space" and "time" patches attend to the class token too, and the class
    token to all.

    XLA's partitioner knows no kernels: a program for several TPUs calls this inside `jax.shard_map`, with B or N split.

    Args:
        q, k, v: [B, S, N, D] of one floating type. Softmax statistics are float32.
        frames: T.
        mode: "joint", "space" or "time".
        class_tokens: 0 or 1.
        scale: of the scores; None is D ** -0.5.
        implementation: see the package docstring.

    Returns:
        [B, S, N, D] of q's type.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, not {mode!r}")
    if class_tokens not in (0, 1):
        raise ValueError(f"class_tokens must be 0 or 1, not {class_tokens!r}")
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(f"q, k and v must be of one shape [B, S, N, D], not {q.shape}, {k.shape}, {v.shape}")
    _check_float(q=q, k=k, v=v)
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q, k and v must be of one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    patches = q.shape[1] - class_tokens
    if frames < 1 or patches < frames or patches % frames:
        raise ValueError(
            f"S must be frames * patches + class_tokens with frames, patches >= 1; S is {q.shape[1]}, frames {frames}, "
            f"class_tokens {class_tokens}"
        )
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation must be None or one of {IMPLEMENTATIONS}, not {implementation!r}")
    if implementation == "reference":
        return reference.space_time_attention(q, k, v, frames=frames, mode=mode, class_tokens=class_tokens, scale=scale)
    if implementation == "pallas_gpu":
        raise NotImplementedError("space_time_attention: 'pallas_gpu' is not built; use 'cudnn', 'xla' or None")
    call = _Call(frames, mode, class_tokens, scale, implementation)
    if implementation == "pallas_tpu" and (reason := _why_not_tpu(call, q)):
        raise NotImplementedError(f"space_time_attention: 'pallas_tpu' {reason}; use 'xla' or None")
    if implementation == "cudnn" and (reason := attention_cudnn.refusal(q)):
        raise NotImplementedError(f"space_time_attention: 'cudnn' {reason}; use 'xla' or None")
    cudnn: Callable[..., Array] = functools.partial(attention_cudnn.space_time, **call.grouping())
    xla: Callable[..., Array] = functools.partial(attention_xla.space_time, **call.grouping())
    if implementation == "cudnn":
        return cudnn(q, k, v)
    if implementation == "xla":
        return xla(q, k, v)
    shared = implementation == "pallas_tpu" or not _why_not_tpu(call, q)
    best = functools.partial(_space_time, call) if shared else xla
    if implementation is None and attention_cudnn.is_here():
        # cuDNN keeps residuals of its own, so the choice stands around the whole op and not inside its rules. Groups of
        # a few tokens fill no tile of cuDNN's; there XLA's own backward is 1.3 times as fast as our rule (H100).
        if not (mode == "joint" or (mode == "space" and patches // frames >= 64)):
            return jax.lax.platform_dependent(q, k, v, cuda=xla, default=best)
        if not attention_cudnn.refusal(q):
            return jax.lax.platform_dependent(q, k, v, cuda=cudnn, default=best)
    return best(q, k, v)


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    prefix_lengths: Array | None = None,
    q_offset: int | Array = 0,
    kv_lengths: Array | None = None,
    bias: Array | None = None,
    distance_bias: Array | None = None,
    softcap: float | None = None,
    window: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Array:
    """Attention as language models need it. A query with no key to attend to gives zeros.

    Query i stands at position q_offset + i, key j at position j. A key is attended to when all that is given allows it.

    Args:
        q: [B, S, N, D].
        k, v: [B, K, Nkv, D]; N is a multiple of Nkv, query head n reads key head n // (N // Nkv).
        causal: keys at or before the query's position.
        prefix_lengths: int32[B]; with `causal`, the first keys that every query sees (prefix-LM).
        q_offset: int, int32[] or int32[B], the position of the first query.
        kv_lengths: int32[B], the number of valid keys.
        bias: broadcastable to [B, N, S, K], added to the scaled (and capped) scores.
        distance_bias: [N, 2F + 1], of -F, ..., F, added to the scores by the distance j - i from query to key; beyond F
            it is that of F. For q_offset 0.
        softcap: scores become softcap * tanh(scores / softcap).
        window: keys nearer than this to the query, on either side.
        scale: of the scores; None is D ** -0.5.
        implementation: see the package docstring.

    Returns:
        [B, S, N, D] of q's type.
    """
    _check_operands(q, k, v)
    options: dict[str, Any] = {
        "causal": causal,
        "prefix_lengths": None if prefix_lengths is None else jnp.asarray(prefix_lengths),
        "q_offset": q_offset,
        "kv_lengths": None if kv_lengths is None else jnp.asarray(kv_lengths),
        "bias": bias,
        "distance_bias": distance_bias,
        "softcap": softcap,
        "window": window,
    }
    _check_options(q, k, **options)
    options["scale"] = q.shape[3] ** -0.5 if scale is None else scale
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation must be None or one of {IMPLEMENTATIONS}, not {implementation!r}")
    if implementation == "reference":
        return reference.attention(q, k, v, **options)
    if implementation == "pallas_gpu":
        raise NotImplementedError("attention: 'pallas_gpu' is not built; use 'cudnn', 'xla' or None")
    branches: dict[str, Callable[..., Array]] = {"xla": functools.partial(_attention_xla, **options)}
    for_tpu: Any = attention_splash if distance_bias is None else attention_biased_tpu
    for name, module in (("cudnn", attention_cudnn), ("pallas_tpu", for_tpu)):
        if reason := module.refusal_of_options(q, k, options):
            if implementation == name:
                raise NotImplementedError(f"attention: {name!r} {reason}; use 'xla' or None")
        else:
            branches[name] = functools.partial(module.attention, **options)
    if implementation is not None:
        return branches[implementation](q, k, v)
    platforms = {"default": branches["xla"]}
    if "cudnn" in branches and attention_cudnn.is_here():
        platforms["cuda"] = branches["cudnn"]
    if "pallas_tpu" in branches and q.shape[1] * k.shape[1] >= for_tpu.LEAST_SCORES:
        if distance_bias is not None:  # chooses by the platform inside its own rules of differentiation
            return attention_biased_tpu.by_platform(q, k, v, **options)
        platforms["tpu"] = branches["pallas_tpu"]
    if len(platforms) == 1:
        return branches["xla"](q, k, v)
    return jax.lax.platform_dependent(q, k, v, **platforms)


def _check_operands(q: Array, k: Array, v: Array) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(f"q must be [B, S, N, D] and k, v [B, K, Nkv, D], not {q.shape}, {k.shape}, {v.shape}")
    batch, _, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    if k.shape[0] != batch or k.shape[3] != head_dim or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k and v must be [{batch}, K, a divisor of {heads}, {head_dim}], not {k.shape}")
    _check_float(q=q, k=k, v=v)
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q, k and v must be of one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")


def _check_options(
    q: Array,
    k: Array,
    *,
    causal: bool,
    prefix_lengths: Array | None,
    q_offset: int | Array,
    kv_lengths: Array | None,
    bias: Array | None,
    distance_bias: Array | None,
    softcap: float | None,
    window: int | None,
) -> None:
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    _check_lengths("prefix_lengths", prefix_lengths, batch)
    _check_lengths("kv_lengths", kv_lengths, batch)
    if prefix_lengths is not None and not causal:
        raise ValueError("prefix_lengths needs causal=True: without it every key is visible already")
    if isinstance(q_offset, int):
        if q_offset < 0:
            raise ValueError(f"q_offset must be at least 0, not {q_offset}")
    elif q_offset.shape not in ((), (batch,)) or not jnp.issubdtype(q_offset.dtype, jnp.integer):
        raise ValueError(f"q_offset must be an int, int32[] or int32[{batch}], not {q_offset.dtype}{q_offset.shape}")
    if bias is not None:
        wanted = (batch, heads, queries, keys)
        if bias.ndim != 4 or any(b not in (1, w) for b, w in zip(bias.shape, wanted)):
            raise ValueError(f"bias must be broadcastable to [B, N, S, K] = {wanted} and have 4 axes, not {bias.shape}")
        _check_float(bias=bias)
    if distance_bias is not None:
        if distance_bias.ndim != 2 or distance_bias.shape[0] != heads or distance_bias.shape[1] % 2 == 0:
            raise ValueError(f"distance_bias must be [{heads}, an odd number], not {distance_bias.shape}")
        if not isinstance(q_offset, int) or q_offset != 0:
            raise ValueError("distance_bias goes with q_offset=0: its rows begin at position 0")
        _check_float(distance_bias=distance_bias)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, not {softcap}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window}")


def _attention_xla(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool,
    prefix_lengths: Array | None,
    q_offset: int | Array,
    kv_lengths: Array | None,
    bias: Array | None,
    distance_bias: Array | None,
    softcap: float | None,
    window: int | None,
    scale: float,
) -> Array:
    if distance_bias is not None:
        of_distance = laid_out.matrix(distance_bias, q.shape[1], k.shape[1])
        bias = of_distance if bias is None else bias + of_distance
    mask = None
    if causal or window is not None or kv_lengths is not None:
        mask = reference.attention_mask(
            q.shape[0] if any(getattr(x, "ndim", 0) for x in (prefix_lengths, q_offset, kv_lengths)) else 1,
            q.shape[1],
            k.shape[1],
            causal=causal,
            prefix_lengths=prefix_lengths,
            q_offset=q_offset,
            kv_lengths=kv_lengths,
            window=window,
        )[:, None]
    return attention_xla.dense(q, k, v, scale, bias=bias, mask=mask, softcap=softcap)


Rule = Callable[..., tuple[Array, ...]]


class _Call(NamedTuple):
    """What is static in one call of space_time_attention."""

    frames: int
    mode: str
    class_tokens: int
    scale: float
    implementation: str | None  # None or "pallas_tpu"

    def grouping(self) -> dict[str, Any]:
        return {"frames": self.frames, "mode": self.mode, "class_tokens": self.class_tokens, "scale": self.scale}


def _why_not_tpu(call: _Call, q: Array) -> str | None:
    """The reason, in words, why the TPU kernels do not take this; None if they do."""
    if 0 not in q.shape and call.mode != "joint":
        return grouped_tpu.refusal(q.shape, q.dtype, call.frames, call.mode, call.class_tokens)
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 and float32, not {q.dtype}"
    if 0 in q.shape:
        return f"takes no empty arrays, {q.shape}"
    head_dim = q.shape[3]
    if head_dim not in tuning.JOINT_HEAD_DIMS:
        return f"takes head dims {tuning.JOINT_HEAD_DIMS}, not {head_dim}"
    needed, there = tuning.joint_backward_bytes(q.shape, q.dtype), tuning.vmem_bytes()
    if needed > there:
        return f"needs {needed >> 20} MiB of the chip's vector memory at {q.shape}, {there >> 20} MiB are there"
    return None


def _choose(call: _Call, tpu: Rule, xla: Rule, *arrays: Array) -> tuple[Array, ...]:
    """One rule for all platforms, so that the residuals are the same whichever a program is lowered for."""
    if call.implementation == "pallas_tpu":
        return tpu(*arrays)
    chosen: tuple[Array, ...] = jax.lax.platform_dependent(*arrays, tpu=tpu, default=xla)
    return chosen


def _forward(call: _Call, *inputs: Array) -> tuple[Array, ...]:
    tpu = functools.partial(attention_tpu.forward, scale=call.scale)
    if call.mode != "joint":
        tpu = functools.partial(grouped_tpu.forward, **call.grouping())
    return _choose(call, tpu, functools.partial(attention_xla.forward, **call.grouping()), *inputs)


def _backward(call: _Call, residuals: tuple[Array, ...], do: Array) -> tuple[Array, ...]:
    tpu = functools.partial(attention_tpu_backward.backward, scale=call.scale)
    if call.mode != "joint":
        tpu = functools.partial(grouped_tpu.backward, **call.grouping())
    return _choose(call, tpu, functools.partial(attention_xla.backward, **call.grouping()), *residuals, do)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _space_time(call: _Call, q: Array, k: Array, v: Array) -> Array:
    return _forward(call, q, k, v)[0]


def _space_time_fwd(call: _Call, q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    out, lse = _forward(call, q, k, v)
    # Kept with heads side by side, as the kernels have it: a TPU pads the last dimension of what it stores to 128.
    flat = checkpoint_name(out.reshape(*out.shape[:2], -1), ATTENTION_RESIDUALS)
    out, lse = flat.reshape(out.shape), checkpoint_name(lse, ATTENTION_RESIDUALS)
    return out, (q, k, v, out, lse)


_space_time.defvjp(_space_time_fwd, _backward)
