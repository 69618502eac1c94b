"""Text generation from a VLM: greedy and nucleus sampling, several samples a clip over one shared encoding."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from pyvdl.models.t5 import Cache
from pyvdl.models.vlm import VLM

END_ID = 1  # of sequence
START_ID = 0  # of the decoder; also padding


class Samples(NamedTuple):
    """What `generate` returns; n samples of each of B clips."""

    tokens: Array  # int32[B, n, M], the end id included, then padded with 0
    log_probs: Array  # float32[B, n], of the whole text under the model's own (untempered, uncut) distribution
    lengths: Array  # int32[B, n], tokens generated, the end id included


def generate(
    model: VLM,
    video: Array | np.ndarray | None,
    prompt: Array | np.ndarray,
    *,
    num_samples: int = 1,
    max_length: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seeds: Array | np.ndarray | int = 0,
) -> Samples:
    """Generates `num_samples` texts for each clip; stops when all have ended or have `max_length` tokens.

    The clip is encoded once and its samples share that encoding. One program is compiled for each combination of
    shapes, `num_samples`, `max_length` and kind of sampling; temperature, top_p and seeds do not cause another.

    Args:
        model: in any dtype.
        video: uint8[B, T, H, W, 3], or None for text alone.
        prompt: int32[B, L], padded with 0.
        num_samples: n.
        max_length: M, the end id included.
        temperature: 0 is greedy: all samples of a clip are then the same.
        top_p: a token is drawn from the smallest set of likeliest tokens whose (tempered) probability reaches this;
            tokens as likely as the least likely one of the set stay in.
        seeds: uint32[B], one for each clip: a clip's samples depend on its own seed only, not on its neighbours. An int
            stands for seeds, seeds + 1, ...
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, not {max_length}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0 (0 is greedy), not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")
    if prompt.ndim != 2 or (video is not None and video.shape[0] != prompt.shape[0]):
        shape = None if video is None else video.shape
        raise ValueError(f"prompt must be int32[B, L] with the video's B, not {prompt.shape} for a video of {shape}")
    batch = prompt.shape[0]
    if isinstance(seeds, int | np.integer):
        seeds = (np.arange(batch) + int(seeds)).astype(np.uint32)
    if seeds.shape != (batch,):
        raise ValueError(f"seeds must be an int or uint32[{batch}], not an array of shape {seeds.shape}")
    graphdef, state = nnx.split(model)
    return _generate(
        graphdef,
        state,
        video,
        jnp.asarray(prompt),
        jnp.asarray(seeds).astype(jnp.uint32),
        jnp.float32(temperature),
        jnp.float32(top_p),
        num_samples=num_samples,
        max_length=max_length,
        greedy=temperature == 0,
        nucleus=top_p < 1,
    )


class _State(NamedTuple):
    """Carried from token to token."""

    step: Array  # int32[]
    last: Array  # int32[B, n]
    cache: Cache
    tokens: Array  # int32[B, n, M]
    log_probs: Array  # float32[B, n]
    lengths: Array  # int32[B, n]
    done: Array  # bool[B, n]


@functools.partial(jax.jit, static_argnames=("graphdef", "num_samples", "max_length", "greedy", "nucleus"))
def _generate(
    graphdef: Any,
    state: Any,
    video: Array | None,
    prompt: Array,
    seeds: Array,
    temperature: Array,
    top_p: Array,
    *,
    num_samples: int,
    max_length: int,
    greedy: bool,
    nucleus: bool,
) -> Samples:
    model = nnx.merge(graphdef, state)
    memory, mask = model.encode(video, prompt)
    shape = (prompt.shape[0], num_samples)
    keys = jax.vmap(
        lambda seed: jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(num_samples))
    )(seeds)

    def advance(s: _State) -> _State:
        logits, cache = model.language.decode_step(s.last, s.cache)
        if greedy:
            chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            tempered = logits / temperature
            if nucleus:
                tempered = keep_nucleus(tempered, top_p)
            draw = jax.vmap(jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, s.step), row)))
            chosen = draw(keys, tempered).astype(jnp.int32)
        log_prob = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.where(s.done, 0, chosen)
        return _State(
            step=s.step + 1,
            last=chosen,
            cache=cache,
            tokens=jax.lax.dynamic_update_slice(s.tokens, chosen[..., None], (0, 0, s.step)),
            log_probs=s.log_probs + jnp.where(s.done, 0, log_prob),
            lengths=s.lengths + ~s.done,
            done=s.done | (chosen == END_ID),
        )

    start = _State(
        step=jnp.zeros((), jnp.int32),
        last=jnp.full(shape, START_ID, jnp.int32),
        cache=model.language.start_cache(memory, mask, num_samples, max_length),
        tokens=jnp.zeros((*shape, max_length), jnp.int32),
        log_probs=jnp.zeros(shape, jnp.float32),
        lengths=jnp.zeros(shape, jnp.int32),
        done=jnp.zeros(shape, bool),
    )
    end = jax.lax.while_loop(lambda s: (s.step < max_length) & ~jnp.all(s.done), advance, start)
    return Samples(end.tokens, end.log_probs, end.lengths)


def keep_nucleus(logits: Array, top_p: Array | float) -> Array:
    """[..., V] -> the same with -inf outside the smallest set of likeliest tokens whose probability reaches `top_p`."""
    probs = jax.nn.softmax(logits, axis=-1)
    ranked = -jnp.sort(-probs, axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked  # probability of the likelier tokens
    least = jnp.min(jnp.where(before < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(probs >= least, logits, -jnp.inf)
