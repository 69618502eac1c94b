"""Text generation from a VLM: greedy, sampling and beam search, several texts a clip over one shared prefix.

One engine for both kinds of language model: it knows them as `pyvdl.models.vlm.LanguageModel`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from pyvdl.models.t5 import T5
from pyvdl.models.vlm import VLM, LanguageModel
from pyvdl.sampling import ban_repeats, is_any, keep_nucleus, keep_top_k, token_log_probs

END_ID = 1  # of pyvdl's own tokenizer, and of those of T5 and Gemma
PAD_ID = 0  # of the same
_COLDEST = 1e-6  # temperature: logits divided by less may be infinite, and then no distribution


class Samples(NamedTuple):
    """What `generate` returns; n texts of each of B clips."""

    tokens: Array  # int32[B, n, M], the end id included, then padding
    log_probs: Array  # float32[B, n], of the whole text under the model's own (untempered, uncut) distribution
    lengths: Array  # int32[B, n], tokens generated, the end id included


class _Settings(NamedTuple):
    """What a program is compiled for, besides shapes."""

    num_samples: int
    max_length: int
    end_ids: tuple[int, ...]
    pad_id: int
    greedy: bool
    top_k: bool  # whether there is one
    nucleus: bool
    num_beams: int
    no_repeat_ngram: int


def generate(
    model: VLM | T5,
    video: Array | np.ndarray | None,
    prompt: Array | np.ndarray,
    *,
    num_samples: int = 1,
    max_length: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    num_beams: int = 1,
    no_repeat_ngram: int = 0,
    end_ids: int | Sequence[int] = END_ID,
    pad_id: int = PAD_ID,
    seeds: Array | np.ndarray | int = 0,
) -> Samples:
    """Generates `num_samples` texts for each clip; stops when all have ended or have `max_length` tokens.

    The clip is encoded once and its texts share that. One program is compiled for each combination of shapes,
    `num_samples`, `max_length`, `num_beams`, `no_repeat_ngram`, ids and kind of sampling; temperature, top_p, top_k and
    seeds do not cause another, nor do prompts of other lengths: they are padded to the next of a few (`bucket`).

    A model and clips on a mesh (`pyvdl.sharding`: `place`, `put_batch`) are read where they stand; several TPUs want
    `jax.set_mesh(mesh)` around the call, for the kernels.

    Args:
        model: in any dtype. A T5 alone has no video.
        video: uint8[B, T, H, W, 3], or None for text alone.
        prompt: int32[B, L], padded with 0 at the end.
        num_samples: n.
        max_length: M, the end id included.
        temperature: 0 is greedy: all samples of a clip are then the same. Otherwise at least 1e-6.
        top_p: a token is drawn from the smallest set of likeliest tokens whose (tempered) probability reaches this;
            tokens as likely as the least likely one of the set stay in.
        top_k: a token is drawn from so many likeliest ones; with `top_p`, that set is made of these.
        num_beams: above 1, nothing is drawn: beam search with so many beams gives the `num_samples` texts of the
            highest mean log-probability of a token (log_probs / lengths), best first. It is the search of transformers
            with its length_penalty of 1: a text that ends counts if it is among the `num_beams` best continuations of
            its step, and a clip is done when the mean of its best unfinished text is not above that of its worst of
            `num_beams` finished ones.
        no_repeat_ngram: above 0, no n-gram of so many tokens occurs twice in a text (the prompt does not count).
        end_ids: a token that ends a text, or several.
        pad_id: fills a text up after its end.
        seeds: uint32[B], one for each clip: a clip's samples depend on its own seed only, not on its neighbours. An int
            stands for seeds, seeds + 1, ...
    """
    ends = _as_tuple(end_ids)
    check_drawing(num_samples=num_samples, max_length=max_length, temperature=temperature, top_p=top_p)
    _check_at_least(1, num_beams=num_beams)
    _check_at_least(0, no_repeat_ngram=no_repeat_ngram)
    if top_k is not None:
        _check_at_least(1, top_k=top_k)
    if num_beams > 1:
        if num_samples > num_beams:
            raise ValueError(f"num_samples must be at most num_beams = {num_beams}, not {num_samples}")
        if temperature not in (0, 1) or top_p < 1 or top_k is not None:
            raise ValueError("beam search draws nothing: num_beams above 1 goes without temperature, top_p and top_k")
    prompt = _prepared(model, video, prompt)
    batch = prompt.shape[0]
    if isinstance(seeds, int | np.integer):
        seeds = (np.arange(batch) + int(seeds)).astype(np.uint32)
    elif not isinstance(seeds, jax.Array):
        seeds = np.asarray(seeds)
    if seeds.shape != (batch,):
        raise ValueError(f"seeds must be an int or uint32[{batch}], not an array of shape {seeds.shape}")
    graphdef, state = nnx.split(model)
    return _generate(
        graphdef,
        state,
        video,
        prompt,
        jnp.asarray(seeds).astype(jnp.uint32),
        jnp.float32(temperature),
        jnp.float32(top_p),
        jnp.int32(0 if top_k is None else top_k),
        settings=_Settings(
            num_samples=num_samples,
            max_length=max_length,
            end_ids=ends,
            pad_id=pad_id,
            greedy=temperature == 0,
            top_k=top_k is not None,
            nucleus=top_p < 1,
            num_beams=num_beams,
            no_repeat_ngram=no_repeat_ngram,
        ),
    )


def check_drawing(*, num_samples: int, max_length: int, temperature: float, top_p: float) -> None:
    """ValueError where `generate` would not take them; who has long work before it asks early."""
    _check_at_least(1, num_samples=num_samples, max_length=max_length)
    if temperature != 0 and not temperature >= _COLDEST:
        raise ValueError(f"temperature must be 0 (greedy) or at least {_COLDEST}, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")


def score(
    model: VLM | T5,
    video: Array | np.ndarray | None,
    prompt: Array | np.ndarray,
    target: Array | np.ndarray,
    *,
    end_ids: int | Sequence[int] = END_ID,
    pad_id: int = PAD_ID,
) -> Array:
    """Log-probabilities float32[B, n] of given texts, as `generate` tells those of its own.

    target: int32[B, n, M]. A text goes up to its first end id; without one, to the last token that is not padding. Its
    clip is encoded once for all n. The other arguments are those of `generate`.
    """
    prompt = _prepared(model, video, prompt)
    if target.ndim != 3 or target.shape[0] != prompt.shape[0] or 0 in target.shape:
        raise ValueError(f"target must be int32[{prompt.shape[0]}, n, M], not {target.shape}")
    graphdef, state = nnx.split(model)
    return _score(graphdef, state, video, prompt, jnp.asarray(target), end_ids=_as_tuple(end_ids), pad_id=pad_id)


def bucket(length: int) -> int:
    """The length, of a few, that prompts of `length` tokens are padded to: multiples of 16 to 64, then powers of 2."""
    return -(-max(length, 1) // 16) * 16 if length <= 64 else 1 << (length - 1).bit_length()


def _as_tuple(end_ids: int | Sequence[int]) -> tuple[int, ...]:
    ends = (int(end_ids),) if isinstance(end_ids, int | np.integer) else tuple(map(int, end_ids))
    if not ends:
        raise ValueError("end_ids must hold at least one id, not ()")
    return ends


def _check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")


def _prepared(model: VLM | T5, video: Array | np.ndarray | None, prompt: Array | np.ndarray) -> Array:
    """The prompts on the device, padded to their bucket."""
    if not isinstance(model, VLM | T5):
        raise TypeError(f"model must be a VLM or a T5, which write texts, not a {type(model).__name__}")
    if not isinstance(prompt, jax.Array):
        prompt = np.asarray(prompt)
    if video is not None and not isinstance(model, VLM):
        raise ValueError(f"video must be None: a {type(model).__name__} alone reads text")
    if prompt.ndim != 2 or (video is not None and video.shape[0] != prompt.shape[0]):
        shape = None if video is None else video.shape
        raise ValueError(f"prompt must be int32[B, L] with the video's B, not {prompt.shape} for a video of {shape}")
    pad = np.pad if isinstance(prompt, np.ndarray) else jnp.pad
    return jnp.asarray(pad(prompt, ((0, 0), (0, bucket(prompt.shape[1]) - prompt.shape[1]))))


class _Drawn(NamedTuple):
    """Carried from token to token when each text goes its own way."""

    step: Array  # int32[], tokens so far
    cache: Any
    tokens: Array  # int32[B, n, M]
    log_probs: Array  # float32[B, n]
    lengths: Array  # int32[B, n]
    done: Array  # bool[B, n]


@functools.partial(jax.jit, static_argnames=("graphdef", "settings"))
def _generate(
    graphdef: Any,
    state: Any,
    video: Array | None,
    prompt: Array,
    seeds: Array,
    temperature: Array,
    top_p: Array,
    top_k: Array,
    *,
    settings: _Settings,
) -> Samples:
    language, tokens, mask = _read(nnx.merge(graphdef, state), video, prompt)
    if settings.num_beams > 1:
        return _search_beams(language, tokens, mask, settings)
    samples, length = settings.num_samples, settings.max_length
    shape = (prompt.shape[0], samples)
    keys = jax.vmap(lambda seed: jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(samples)))(
        seeds
    )

    def choose(logits: Array, s: _Drawn) -> Array:
        if settings.no_repeat_ngram:
            logits = ban_repeats(logits, s.tokens, s.step, settings.no_repeat_ngram)
        if settings.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits.reshape(-1, logits.shape[-1]) / temperature
        if settings.top_k:
            logits = keep_top_k(logits, top_k)
        if settings.nucleus:
            logits = keep_nucleus(logits, top_p)
        draw = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, s.step), row))
        return draw(keys.reshape(-1), logits).astype(jnp.int32).reshape(shape)

    def extend(s: _Drawn, logits: Array) -> _Drawn:
        """Chooses one more token of each text from logits [B, n, V]."""
        chosen = choose(logits, s)
        log_prob = token_log_probs(logits, chosen)
        chosen = jnp.where(s.done, settings.pad_id, chosen)
        return s._replace(
            step=s.step + 1,
            tokens=jax.lax.dynamic_update_slice(s.tokens, chosen[..., None], (0, 0, s.step)),
            log_probs=s.log_probs + jnp.where(s.done, 0, log_prob),
            lengths=s.lengths + ~s.done,
            done=s.done | is_any(chosen, settings.end_ids),
        )

    def advance(s: _Drawn) -> _Drawn:
        logits, cache = language.step(_at(s.tokens, s.step - 1), s.cache)
        return extend(s._replace(cache=cache), logits)

    logits, cache = language.start(tokens, mask, samples, length)
    start = _Drawn(
        step=jnp.zeros((), jnp.int32),
        cache=cache,
        tokens=jnp.full((*shape, length), settings.pad_id, jnp.int32),
        log_probs=jnp.zeros(shape, jnp.float32),
        lengths=jnp.zeros(shape, jnp.int32),
        done=jnp.zeros(shape, bool),
    )
    first = extend(start, jnp.broadcast_to(logits[:, None], (*shape, logits.shape[-1])))
    end = jax.lax.while_loop(lambda s: (s.step < length) & ~jnp.all(s.done), advance, first)
    return Samples(end.tokens, end.log_probs, end.lengths)


class _Beams(NamedTuple):
    """Carried from token to token in beam search with K beams; both sets are ordered, the best first."""

    step: Array  # int32[], tokens so far
    cache: Any
    tokens: Array  # int32[B, K, M], of the texts that go on
    log_probs: Array  # float32[B, K]; -inf: there is none
    finished: Samples  # of the texts that ended; [B, K] each
    means: Array  # float32[B, K], their log-probabilities by token; -inf: there is none
    done: Array  # bool[B]


def _search_beams(language: LanguageModel, tokens: Array, mask: Array, settings: _Settings) -> Samples:
    """See `generate`."""
    beams, length, batch = settings.num_beams, settings.max_length, tokens.shape[0]
    shape = (batch, beams)
    # Of so many candidates at least `beams` go on, even if each beam's text could end in every way.
    count = (1 + len(settings.end_ids)) * beams

    def extend(s: _Beams, logits: Array) -> tuple[_Beams, Array]:
        """One more token of each text from logits [B, K, V]; and which text, int32[B, K], each of the new continues."""
        vocabulary = logits.shape[-1]
        if count > beams * vocabulary:
            raise ValueError(f"num_beams and end_ids need {count} continuations, {beams * vocabulary} are there")
        scores = jax.nn.log_softmax(logits, axis=-1)
        if settings.no_repeat_ngram:
            scores = ban_repeats(scores, s.tokens, s.step, settings.no_repeat_ngram)
        scores = (s.log_probs[..., None] + scores).reshape(batch, -1)
        log_probs, index = jax.lax.top_k(scores, count)  # [B, count]
        parents, chosen = index // vocabulary, (index % vocabulary).astype(jnp.int32)
        tokens = _rows(s.tokens, parents)
        tokens = jax.lax.dynamic_update_slice(tokens, chosen[..., None], (0, 0, s.step))
        ends = is_any(chosen, settings.end_ids) | (s.step + 1 == length)

        finishes = ends & (jnp.arange(count) < beams) & ~s.done[:, None]
        means = jnp.concatenate([s.means, jnp.where(finishes, log_probs / (s.step + 1), -jnp.inf)], axis=1)
        lengths = jnp.broadcast_to(s.step + 1, log_probs.shape)
        both = [jnp.concatenate(pair, axis=1) for pair in zip(s.finished, (tokens, log_probs, lengths), strict=True)]
        means, best = jax.lax.top_k(means, beams)
        finished = Samples(*(_rows(x, best) for x in both))

        log_probs, going = jax.lax.top_k(jnp.where(ends, -jnp.inf, log_probs), beams)
        settled = log_probs[:, 0] / (s.step + 1) <= means[:, -1]
        after = s._replace(
            step=s.step + 1,
            tokens=_rows(tokens, going),
            log_probs=log_probs,
            finished=finished,
            means=means,
            done=s.done | settled,
        )
        return after, _rows(parents, going)

    def advance(s: _Beams) -> _Beams:
        logits, cache = language.step(_at(s.tokens, s.step - 1), s.cache)
        after, parents = extend(s, logits)
        return after._replace(cache=language.reorder(cache, parents))

    logits, cache = language.start(tokens, mask, beams, length)
    empty = jnp.full((*shape, length), settings.pad_id, jnp.int32)
    none = jnp.full(shape, -jnp.inf)
    start = _Beams(
        step=jnp.zeros((), jnp.int32),
        cache=cache,
        tokens=empty,
        log_probs=none.at[:, 0].set(0),  # all beams are the same as yet
        finished=Samples(empty, none, jnp.zeros(shape, jnp.int32)),
        means=none,
        done=jnp.zeros(batch, bool),
    )
    first, _ = extend(start, jnp.broadcast_to(logits[:, None], (*shape, logits.shape[-1])))
    end = jax.lax.while_loop(lambda s: (s.step < length) & ~jnp.all(s.done), advance, first)
    return Samples(*(x[:, : settings.num_samples] for x in end.finished))


@functools.partial(jax.jit, static_argnames=("graphdef", "end_ids", "pad_id"))
def _score(
    graphdef: Any,
    state: Any,
    video: Array | None,
    prompt: Array,
    target: Array,
    *,
    end_ids: tuple[int, ...],
    pad_id: int,
) -> Array:
    language, tokens, mask = _read(nnx.merge(graphdef, state), video, prompt)
    states = language.forced(tokens, mask, target)
    # Place by place: logits of all tokens at once would be larger than anything else.
    log_probs = jax.lax.map(
        lambda place: token_log_probs(language.logits(place[0]), place[1]),
        (jnp.moveaxis(states, 2, 0), jnp.moveaxis(target, 2, 0)),
    )
    ends = jnp.cumsum(is_any(target, end_ids), axis=-1)
    padding = jnp.cumprod(target[..., ::-1] == pad_id, axis=-1)[..., ::-1].astype(bool)
    counts = jnp.where(ends[..., -1:] > 0, ends - is_any(target, end_ids) == 0, ~padding)
    return jnp.sum(jnp.where(counts, jnp.moveaxis(log_probs, 0, 2), 0), axis=-1)


def _read(model: VLM | T5, video: Array | None, prompt: Array) -> tuple[LanguageModel, Array, Array]:
    """The language model, its prefix [B, S, E] and the mask bool[B, S]."""
    if isinstance(model, VLM):
        return model.language, *model.prefix(video, prompt)
    return model, model.embed(prompt), prompt != 0


def _at(tokens: Array, place: Array) -> Array:
    """int32[B, n, M] -> int32[B, n], the tokens at int32[] `place`."""
    return jax.lax.dynamic_index_in_dim(tokens, place, axis=2, keepdims=False)


def _rows(x: Array, index: Array) -> Array:
    """x [B, K, ...] and int32[B, R] -> [B, R, ...], those rows of each clip."""
    return jax.vmap(lambda rows, which: rows[which])(x, index)
