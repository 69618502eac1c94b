"""The method's trainings as functions from a manifest to a folder: two stages of the VLM, then the dual encoder.

Each writes `out/run.json` (every setting, as it was resolved), its checkpoints and metrics, and at the end `out/model`;
beside it `out/best` where a checkpoint before the last one had the lowest loss.
The same call again goes on where the last one stopped; another call on the same folder is refused with the difference.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

import pyvdl
from pyvdl.caption import model_digest
from pyvdl.checkpoint import Checkpointer, load_model, save_model
from pyvdl.clip_prompts import encode_prompts
from pyvdl.config import PRESETS, ClipConfig, DualEncoderConfig, Preset, TrainConfig, VLMConfig
from pyvdl.data import Batches, Encode, Record, digest
from pyvdl.flops import training_flops
from pyvdl.instruct import describe
from pyvdl.models.dual_encoder import DualEncoder
from pyvdl.models.vlm import VLM, with_soft_prompt
from pyvdl.overrides import override_training
from pyvdl.sharding import make_mesh, place
from pyvdl.step import create
from pyvdl.storage import claim
from pyvdl.text import CAPTION_PROMPT, DETAIL_PROMPT, QUESTION_PROMPT, WordTokenizer
from pyvdl.tokenizers import Tokenizer
from pyvdl.train import History, check_settings, contrastive_loss_fn, fit, vlm_loss

Stage = Literal["visual", "language", "prompt"]
SOFT_PROMPT = 100  # tokens, as in Lester et al. (arXiv 2104.08691); the paper tells no number
RUN_FILE = "run.json"
# How a run is done, not what comes out: these may differ when it is resumed.
_FREE = (
    "num_threads",
    "prefetch",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "fsdp",
    "tensor",
    "accumulate",
    "unroll",
    "profile_steps",
    "tensorboard",
)


def short_captions(tokenizer: Tokenizer, *, target_length: int) -> Encode:
    """The visual stage's data: the caption task prompt, and one caption of the clip drawn at random."""
    prompt = encode_prompts(tokenizer, [CAPTION_PROMPT])[0]

    def encode(record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        text = record.captions[rng.integers(len(record.captions))]
        return {"prompt": prompt, "target": tokenizer.encode(text, target_length)}

    return encode


def instructions(tokenizer: Tokenizer, *, prompt_length: int, target_length: int) -> Encode:
    """The language stage's data: one question, caption or description of the clip, each drawn equally often."""

    def encode(record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        pairs = [(QUESTION_PROMPT.format(question=q.question), q.answer) for q in record.questions]
        pairs += [(CAPTION_PROMPT, caption) for caption in record.captions]
        pairs += [(DETAIL_PROMPT, describe(record.narrative))] if record.narrative else []
        prompt, target = pairs[rng.integers(len(pairs))]
        return {
            "prompt": tokenizer.encode_prompts([prompt], prompt_length)[0],
            "target": tokenizer.encode(target, target_length),
        }

    return encode


def one_text(tokenizer: Tokenizer, records: Sequence[Record], *, length: int) -> Encode:
    """The dual encoder's data: one caption of the clip drawn at random, and the number of its group."""
    numbers: dict[tuple[str, str], int] = {}

    def name(record: Record) -> tuple[str, str]:
        return ("key", record.key) if record.group is None else ("group", record.group)

    for record in records:
        numbers.setdefault(name(record), len(numbers))

    def encode(record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        text = record.captions[rng.integers(len(record.captions))]
        return {"text": tokenizer.encode(text, length, bos=True), "group": np.array(numbers[name(record)], np.int32)}

    return encode


def text_lengths(stage: Stage, sizes: Preset, tokenizer: Tokenizer | None = None) -> tuple[int, int]:
    """Tokens of a prompt and of a target as `adapt` pads them; without a tokenizer, by the one of a new model."""
    if stage != "visual":
        return sizes.prompt_length, sizes.target_length
    tokenizer = tokenizer or WordTokenizer.from_texts([CAPTION_PROMPT])
    return encode_prompts(tokenizer, [CAPTION_PROMPT]).shape[1], sizes.caption_length


def model_clip(config: VLMConfig | DualEncoderConfig, clip: ClipConfig | None = None) -> ClipConfig:
    """`clip` with the frames and pixels this model reads; the short side stays as much larger than the crop."""
    clip = clip or ClipConfig()
    size = config.vision.image_size
    frames = config.num_frames if isinstance(config, VLMConfig) else config.vision.num_frames
    short_side = round(clip.short_side * size / clip.size)
    fps = config.fps if isinstance(config, VLMConfig) else clip.fps
    return dataclasses.replace(clip, num_frames=frames, size=size, short_side=short_side, fps=fps)


def fraction(records: Sequence[Record], share: float) -> list[Record]:
    """The records of a share of the data (paper, Figure 5), by their keys: a smaller share is part of a larger."""
    if not 0 < share <= 1:
        raise ValueError(f"the share of the data must be above 0 and at most 1, not {share}")

    def place(record: Record) -> float:
        return int.from_bytes(hashlib.sha256(record.key.encode()).digest()[:8]) / 2**64

    part = [record for record in records if place(record) < share]
    if records and not part:
        raise ValueError(f"a share of {share} takes none of {len(records)} records: take a larger one")
    return part


def adapt(
    stage: Stage,
    records: Sequence[Record],
    out: str | os.PathLike[str],
    *,
    start: str | os.PathLike[str] | None = None,
    preset: str = "toy",
    assignments: Iterable[str] = (),
    pseudo: Sequence[Record] = (),
    pseudo_share: float = 0.5,
) -> History:
    """Trains one stage of the VLM on `records` into `out`.

    "visual" trains the vision tower and the projection on short captions, "language" the language model on questions,
    captions and descriptions; the rest is frozen (paper, section 4). "prompt" trains a soft prompt on what "language"
    reads, in place of it (paper, Table 9). The stages take each other's models, in any order.

    `start` is a saved VLM; without it a random one of the preset begins. `assignments` are `a.b=c` changes of the
    preset's TrainConfig, `model.a.b=c` of a new model.

    Self-training (paper, Table 5) mixes records whose captions a model wrote, `pseudo`, into the visual stage: they are
    `pseudo_share` of the rows. The paper does not tell the ratio; one to one is ours.
    """
    mixture = None
    if stage == "visual":
        records = [record for record in records if record.captions]
        if pseudo:
            pseudo = [record for record in pseudo if record.captions]
            if not pseudo:
                raise ValueError("no pseudo record has captions: give what wrote them, too (--pseudo-captions)")
            if not records:
                raise ValueError("no record has captions of its own, which the pseudo-captions would be mixed with")
            if not 0 < pseudo_share < 1:
                raise ValueError(f"pseudo_share must be above 0 and below 1, not {pseudo_share}")
            mixture = [(len(records), 1 - pseudo_share), (len(pseudo), pseudo_share)]
            records = [*records, *pseudo]
    elif pseudo:
        raise ValueError("pseudo-captions are mixed into the visual stage only")
    else:
        records = [record for record in records if record.questions or record.captions or record.narrative]
    texts = [text for record in records for text in _texts(record)]
    model, tokenizer, sizes, config = _begin(
        VLM,
        texts,
        "captions" if stage == "visual" else "questions, captions or a narrative",
        start,
        preset,
        assignments,
        lambda p: p.visual if stage == "visual" else p.language,
    )
    if stage == "prompt":
        model = with_soft_prompt(model, SOFT_PROMPT, rngs=nnx.Rngs(config.seed))
        config = dataclasses.replace(config, trainable=("soft_prompt",))
    prompt, target = text_lengths(stage, sizes, tokenizer)
    encode: Encode
    if stage == "visual":
        encode = short_captions(tokenizer, target_length=target)
    else:
        encode = instructions(tokenizer, prompt_length=prompt, target_length=target)
    asked = _asked(f"adapt {stage}", preset, start, model, tokenizer)
    flops = training_flops(model.config, config.trainable, config.batch_size, prompt, target)
    return _run(model, tokenizer, vlm_loss, records, encode, config, Path(out), asked, flops, mixture)


def train(
    records: Sequence[Record],
    out: str | os.PathLike[str],
    *,
    start: str | os.PathLike[str] | None = None,
    preset: str = "toy",
    assignments: Iterable[str] = (),
) -> History:
    """Trains the dual encoder on the captions of `records` (one drawn at random a step) into `out`; else as `adapt`."""
    records = [record for record in records if record.captions]
    texts = [text for record in records for text in record.captions]
    model, tokenizer, _, config = _begin(
        DualEncoder, texts, "captions", start, preset, assignments, lambda p: p.contrastive
    )
    encode = one_text(tokenizer, records, length=model.config.text.context_length)
    asked = _asked("train", preset, start, model, tokenizer)
    flops = training_flops(model.config, config.trainable, config.batch_size)
    return _run(model, tokenizer, contrastive_loss_fn, records, encode, config, Path(out), asked, flops)


def _asked(
    job: str, preset: str, start: str | os.PathLike[str] | None, model: VLM | DualEncoder, tokenizer: Tokenizer
) -> dict[str, Any]:
    """What a run is known by; the start by its weights, since a path may come to hold another model."""
    return {
        "job": job,
        "preset": preset,
        "start_sha256": None if start is None else model_digest(model, tokenizer),
    }


def _texts(record: Record) -> list[str]:
    asked = [text for q in record.questions for text in (QUESTION_PROMPT.format(question=q.question), q.answer)]
    detail = [describe(record.narrative)] if record.narrative else []
    return [CAPTION_PROMPT, DETAIL_PROMPT, *record.captions, *asked, *detail]


def _begin[M: (VLM, DualEncoder)](
    kind: type[M],
    texts: Sequence[str],
    needs: str,
    start: str | os.PathLike[str] | None,
    preset: str,
    assignments: Iterable[str],
    recipe: Callable[[Preset], TrainConfig],
) -> tuple[M, Tokenizer, Preset, TrainConfig]:
    """The model and tokenizer to start from, and the settings with their changes."""
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
    if not texts:
        raise ValueError(f"no record has {needs}, which this training needs")
    changes = list(assignments)
    if start is None:
        tokenizer: Tokenizer = WordTokenizer.from_texts(texts)
        sizes = PRESETS[preset](tokenizer.vocab_size)
    else:
        for change in changes:
            if change.startswith("model."):
                raise ValueError(f"{change}: the shape of a saved model cannot be changed")
        sizes = PRESETS[preset](1)  # its models, and so their vocabularies, are not made
    shape: Any = sizes.vlm if kind is VLM else sizes.dual_encoder
    config, shape = override_training(recipe(sizes), shape, changes)
    mesh = make_mesh(config.fsdp, config.tensor)
    if start is None:
        part, known = ("language", shape.language) if kind is VLM else ("text", shape.text)
        if known.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"model.{part}.vocab_size={known.vocab_size} is less than the {tokenizer.vocab_size} ids of the texts"
            )

        def new() -> M:
            return kind(shape, rngs=nnx.Rngs(config.seed))

        check_settings(nnx.eval_shape(new), config)
        model = create(new, mesh, config.param_dtype)
    else:
        found, tokenizer = load_model(start, param_dtype=config.param_dtype, place=place(mesh))
        if not isinstance(found, kind):
            raise ValueError(f"{os.fspath(start)} holds a {type(found).__name__}, not a {kind.__name__}")
        model = found
    return model, tokenizer, sizes, dataclasses.replace(config, clip=model_clip(model.config, config.clip))


def _run(
    model: VLM | DualEncoder,
    tokenizer: Tokenizer,
    loss: Callable[..., Any],
    records: Sequence[Record],
    encode: Encode,
    config: TrainConfig,
    out: Path,
    asked: dict[str, Any],
    flops: float,
    mixture: Sequence[tuple[int, float]] | None = None,
) -> History:
    check_settings(model, config)  # before the folder is claimed for them
    chosen = dataclasses.asdict(config)
    free = {name: chosen.pop(name) for name in _FREE}
    shape = dataclasses.asdict(model.config)
    batches = Batches(
        records,
        encode=encode,
        clip=config.clip,
        batch_size=config.batch_size,
        seed=config.seed,
        mixture=mixture,
        num_threads=config.num_threads,
        prefetch=config.prefetch,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    out.mkdir(parents=True, exist_ok=True)
    mixed = {} if mixture is None else {"mixture": mixture}
    recipe = asked | mixed | {"data_sha256": digest(records), "model": shape, "train": chosen}
    claim(out / RUN_FILE, recipe, {"how": free | _machines(config), "versions": _versions()})
    with closing(batches):
        history = fit(
            model,
            loss,
            batches,
            config,
            workdir=out,
            name=asked["job"],
            step_flops=flops,
            key_of=lambda number: records[number].key,
        )
    save_model(out / "model", model, model.config, tokenizer)
    with Checkpointer(out, config.keep_checkpoints) as checkpointer:
        best = checkpointer.best_step
        if best is not None and best != config.steps:
            nnx.update(model, checkpointer.restore_model(best, nnx.state(model)))
            save_model(out / "best", model, model.config, tokenizer)
    return history


def _machines(config: TrainConfig) -> dict[str, Any]:
    mesh = make_mesh(config.fsdp, config.tensor)
    kind = mesh.devices.flat[0].device_kind
    return {"mesh": dict(mesh.shape), "processes": jax.process_count(), "device": kind}


def _versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"pyvdl": pyvdl.__version__, **{name: importlib.metadata.version(name) for name in names}}
