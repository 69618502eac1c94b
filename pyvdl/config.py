"""Every setting of pyvdl as frozen dataclasses, and named presets as functions.

Presets carry the figures of the paper ("Distilling Vision-Language Models on Millions of Videos", CVPR 2024) with their
source in a comment; settings the paper leaves open name the precedent they follow. No preset is looked up at import.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Activation = Literal["gelu_tanh", "gelu", "quick_gelu"]


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A vision transformer over one frame or over a clip."""

    image_size: int = 224  # pixels, square; those right and below of the last whole patch are not seen
    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    num_frames: int = 1  # 1: frames are encoded one by one; >1: attention over space and time of so many frames
    attention: Literal["joint", "divided", "factorised"] = "joint"  # see `pyvdl.models.ViT`; of no account for 1 frame
    class_token: bool = False  # stands last in the sequence
    activation: Activation = "gelu_tanh"
    norm_epsilon: float = 1e-6
    pre_norm: bool = False  # of the embedded tokens, as in CLIP
    patch_bias: bool = True
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # subtracted from red, green, blue in [0, 1]
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)  # they are divided by
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations; parameters are float32
    remat: bool = False  # keep only the blocks' inputs for the backward pass and compute the rest again

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def num_patches(self) -> int:
        """Patches of one frame."""
        return (self.image_size // self.patch_size) ** 2

    def __post_init__(self) -> None:
        _at_least(self, 1, "image_size", "patch_size", "width", "depth", "num_heads", "mlp_dim", "num_frames")
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} is below patch_size {self.patch_size}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.attention == "factorised" and self.num_heads % 2:
            raise ValueError(f"factorised attention halves the heads: num_heads must be even, not {self.num_heads}")
        _above(self, 0, "norm_epsilon")
        if min(self.pixel_std) <= 0:
            raise ValueError(f"pixel_std must be above 0, not {self.pixel_std}")


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """A T5 v1.1 style encoder-decoder: RMSNorm before each block, gated MLP, relative position bias, no biases."""

    vocab_size: int = 32128
    width: int = 2048
    encoder_layers: int = 24
    decoder_layers: int = 24
    num_heads: int = 32
    head_dim: int = 64
    mlp_dim: int = 5120
    activation: Literal["gelu_tanh", "silu"] = "gelu_tanh"
    num_buckets: int = 32  # of relative position
    max_distance: int = 128  # tokens; farther ones share the last bucket
    norm_epsilon: float = 1e-6
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: bool = False

    def __post_init__(self) -> None:
        _at_least(
            self, 1, "vocab_size", "width", "encoder_layers", "decoder_layers", "num_heads", "head_dim", "mlp_dim"
        )
        _at_least(self, 4, "num_buckets")  # exact and far ones, before and after
        _above(self, 0, "norm_epsilon")
        if self.max_distance <= self.num_buckets // 2:  # the exact distances of the causal side
            raise ValueError(f"max_distance must be above num_buckets / 2, not {self.max_distance}")


@dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    """A Gemma 1 or 2 decoder: RMSNorm, rotary positions, few key heads, gated MLP, tied head. Defaults: Gemma 1, 2B."""

    vocab_size: int = 257_216
    width: int = 2048
    depth: int = 18
    num_heads: int = 8
    num_kv_heads: int = 1  # query head n reads key head n // (num_heads // num_kv_heads)
    head_dim: int = 256
    mlp_dim: int = 16384
    post_norms: bool = False  # Gemma 2: what attention and MLP add is normed too
    attention_softcap: float | None = None  # Gemma 2: 50; scores become softcap * tanh(scores / softcap)
    final_softcap: float | None = None  # Gemma 2: 30; the same of the logits
    window: int | None = None  # Gemma 2: 4096 tokens, in layers 0, 2, 4, ...; see `pyvdl.models.Gemma`
    query_scale: float | None = None  # of the scores; None: head_dim ** -0.5
    rope_theta: float = 1e4
    norm_epsilon: float = 1e-6
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: bool = False

    def __post_init__(self) -> None:
        _at_least(self, 1, "vocab_size", "width", "depth", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"rotary positions turn pairs: head_dim must be even, not {self.head_dim}")
        _above(self, 0, "rope_theta", "norm_epsilon")
        for name in ("attention_softcap", "final_softcap", "query_scale"):
            if getattr(self, name) is not None:
                _above(self, 0, name)
        if self.window is not None:
            _at_least(self, 1, "window")


@dataclass(frozen=True, kw_only=True)
class VLMConfig:
    """Frames through the tower one by one, their tokens projected, read by the language model.

    With a T5 this is the paper's model (PaLI-3's shape), with a Gemma it is PaliGemma.
    """

    vision: ViTConfig = field(default_factory=ViTConfig)
    language: T5Config | GemmaConfig = field(default_factory=T5Config)
    num_frames: int = 8  # section 4.1
    fps: float = 2.0  # section 4.1
    soft_prompt: int = 0  # learned tokens between those of the frames and the prompt: what prompt tuning trains

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_frames")
        _at_least(self, 0, "soft_prompt")
        _above(self, 0, "fps")


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """A pre-norm transformer pooled at one token: CLIP's (causal, the end of the text) or SigLIP's (the last place)."""

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    activation: Activation = "gelu_tanh"
    norm_epsilon: float = 1e-6
    causal: bool = True
    pool: Literal["end", "last"] = "end"  # the first end id, or the last token whatever it is
    end_id: int = 1  # of text
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: bool = False

    def __post_init__(self) -> None:
        _at_least(self, 1, "vocab_size", "width", "depth", "num_heads", "mlp_dim")
        _at_least(self, 0, "end_id")
        _above(self, 0, "norm_epsilon")
        _at_least(self, 2, "context_length")  # beginning and end of a text
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")


@dataclass(frozen=True, kw_only=True)
class DualEncoderConfig:
    """CLIP-like or SigLIP-like video-text encoder; `vision.num_frames` frames are encoded together."""

    vision: ViTConfig = field(default_factory=lambda: ViTConfig(num_frames=4, class_token=True))
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    embed_dim: int = 768
    pool: Literal["class", "mean", "map"] = "class"  # of the video's tokens; map: SigLIP's attention pooling
    vision_projection: bool = True  # without: the pooled width is embed_dim
    text_projection_bias: bool = False
    kind: Literal["softmax", "sigmoid"] = "softmax"  # of the contrastive loss; sigmoid has a learned bias

    def __post_init__(self) -> None:
        _at_least(self, 1, "embed_dim")
        if self.vision.class_token != (self.pool == "class"):
            raise ValueError(
                f"pool {self.pool!r} with vision.class_token {self.vision.class_token}: one needs the other"
            )
        if not self.vision_projection and self.vision.width != self.embed_dim:
            raise ValueError(
                f"without vision_projection embed_dim must be vision.width = {self.vision.width}, not {self.embed_dim}"
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule of one training run."""

    name: Literal["adafactor", "adamw", "sgd"] = "adafactor"
    peak_learning_rate: float = 1e-4
    warmup_steps: int = 1000
    schedule: Literal["inverse_sqrt", "cosine", "constant"] = "inverse_sqrt"
    weight_decay: float = 0.0  # decoupled, matrices only
    b1: float = 0.0  # first-moment decay; SGD reads it as momentum
    b2: float = 0.999  # AdamW's second-moment decay; Adafactor's cap of 1 - t**-decay_exponent
    decay_exponent: float = 0.8  # Adafactor's second-moment decay is min(b2, 1 - t**-decay_exponent)
    clip_norm: float | None = 1.0  # global gradient norm

    def __post_init__(self) -> None:
        _at_least(self, 0, "peak_learning_rate", "warmup_steps", "weight_decay")
        _above(self, 0, "decay_exponent")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if self.clip_norm is not None:
            _above(self, 0, "clip_norm")


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """How a clip is sampled for a model: the arguments of `pyvdl.sample_clip` that a recipe fixes."""

    num_frames: int = 8
    sampling: Literal["uniform", "fps", "random", "keyframe"] = "fps"
    fps: float = 2.0
    short_side: int = 256  # pixels
    size: int = 224  # pixels of the square crop
    crop: Literal["center", "random"] = "center"
    scale_jitter: tuple[float, float] | None = None  # height and width scaled by independent factors
    short_clip: Literal["repeat_last", "loop", "error"] = "repeat_last"

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_frames", "short_side", "size")
        _above(self, 0, "fps")
        if self.size > self.short_side:
            raise ValueError(f"short_side {self.short_side} is below size {self.size}: there is nothing to cut it from")
        if self.scale_jitter is not None and not 0 < self.scale_jitter[0] <= self.scale_jitter[1] < math.inf:
            raise ValueError(f"scale_jitter must be (low, high) with 0 < low <= high, not {self.scale_jitter}")


@dataclass(frozen=True, kw_only=True)
class ShortVideoConfig:
    """What `pyvdl prepare --to tars` makes of a video: H.264 of few pixels, with key frames close together."""

    short_side: int = 256  # pixels; a smaller video keeps its size
    gop: int = 8  # frames from one key frame to the next
    crf: int = 20  # x264's constant quality: 0 is lossless, 51 the worst

    def __post_init__(self) -> None:
        _at_least(self, 2, "short_side")
        _at_least(self, 1, "gop")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf must be from 0 to 51, not {self.crf}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: which parts move, for how long, with what."""

    steps: int = 10_000
    batch_size: int = 64
    seed: int = 0
    trainable: tuple[str, ...] = ("",)  # prefixes of parameter paths ("vision", "language"); "" trains all
    optim: OptimConfig = field(default_factory=OptimConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    num_threads: int = 2  # decoding threads of this process
    prefetch: int = 2  # batches decoded ahead
    fsdp: int = 1  # devices that parameters and batches are both split over; the rest split batches alone
    tensor: int = 1  # devices that matrices and attention heads are split over
    accumulate: int = 1  # parts of a batch that go through the model one after the other; the step is that of the whole
    # All layers one after the other in the program, not a loop of one, which copies into stacks and out of them; longer
    # compilation. None: on GPUs, for towers without `remat`.
    unroll: bool | None = None
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of parameters as they are kept, those not trained too
    skip_nonfinite: bool = (
        False  # leave out steps whose loss or gradient is not finite, and count them; else stop there
    )
    tensorboard: bool = False  # events of each log line, in the run's folder
    profile_steps: tuple[int, ...] = ()  # first and last step of a profile, written to the run's folder

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints", "num_threads")
        _at_least(self, 1, "fsdp", "tensor", "accumulate")
        _at_least(self, 0, "seed", "prefetch")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate must divide batch_size = {self.batch_size}, not be {self.accumulate}")
        if self.profile_steps and not (
            len(self.profile_steps) == 2 and 1 <= self.profile_steps[0] <= self.profile_steps[1]
        ):
            raise ValueError(f"profile_steps must be (first, last) step, from 1 on, not {self.profile_steps}")
        if not self.trainable:
            raise ValueError("trainable must hold at least one prefix, not ()")
        if self.optim.schedule == "cosine" and self.optim.warmup_steps >= self.steps:
            raise ValueError(
                f"optim.warmup_steps must be below steps = {self.steps} with the cosine schedule, "
                f"not {self.optim.warmup_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """How a large captioning job runs on each host's devices, as `pyvdl plan caption` asks for it."""

    clips: int = 1_000_000  # of the whole job
    batch_size: int = 8  # clips at a time on the devices of a host
    num_samples: int = 10  # captions of a clip; with max_length as LaViLa's narrator has them
    max_length: int = 77  # tokens of a caption
    fsdp: int = 1  # devices of a host that parameters and clips are both split over
    tensor: int = 1  # devices of a host that matrices and attention heads are split over
    param_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of parameters as they are kept

    def __post_init__(self) -> None:
        _at_least(self, 1, "clips", "batch_size", "num_samples", "max_length", "fsdp", "tensor")


def _at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        if not least <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be at least {least} and finite, not {getattr(config, name)}")


def _above(config: Any, bound: int, *names: str) -> None:
    for name in names:
        if not bound < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be above {bound} and finite, not {getattr(config, name)}")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The settings of the whole method at one size; vocabularies are those of the tokenizer a run brings."""

    vlm: VLMConfig
    dual_encoder: DualEncoderConfig
    visual: TrainConfig  # vision tower trains on short captions
    language: TrainConfig  # language model trains on instruction data
    contrastive: TrainConfig  # the dual encoder
    prompt_length: int  # tokens, of a question with its task prompt
    caption_length: int  # tokens, of a short caption
    target_length: int  # tokens, of the longest answer: a detailed description


def paper(vocab_size: int = 32_128) -> Preset:
    """The figures of the paper; sections and tables named where they stand. For accelerators."""
    adafactor = OptimConfig(
        name="adafactor", peak_learning_rate=1e-4, warmup_steps=1000, schedule="inverse_sqrt", b1=0.0
    )  # section 4.1 and supplement
    clip = ClipConfig(num_frames=8, fps=2.0, sampling="fps")  # section 4.1
    adamw = OptimConfig(
        name="adamw", peak_learning_rate=1e-3, warmup_steps=5000, schedule="cosine", weight_decay=0.01, b1=0.9, b2=0.999
    )  # main recipe of the dual encoder; the rate is the one stated for SGD
    return Preset(
        vlm=VLMConfig(
            vision=ViTConfig(width=1664, depth=48, num_heads=16, mlp_dim=8192),  # ViT-G/14
            language=T5Config(vocab_size=vocab_size),  # T5 XL's shape for the unpublished UL2 3B
        ),
        dual_encoder=DualEncoderConfig(
            vision=ViTConfig(num_frames=4, class_token=True), text=TextTowerConfig(vocab_size=vocab_size)
        ),  # ViT-L/14
        visual=TrainConfig(steps=40_000, batch_size=64, trainable=("vision", "projection"), optim=adafactor, clip=clip),
        language=TrainConfig(steps=10_000, batch_size=256, trainable=("language",), optim=adafactor, clip=clip),
        contrastive=TrainConfig(
            steps=334_000,  # 20 epochs of 17.1 million clips
            batch_size=1024,
            optim=adamw,
            clip=ClipConfig(num_frames=4, fps=2.0, sampling="fps", crop="random", scale_jitter=(0.9, 1.33)),
        ),
        prompt_length=64,
        caption_length=77,
        target_length=128,
    )


def paper_sgd(vocab_size: int = 32_128) -> Preset:
    """The paper's other recipe of the dual encoder (Table 4): SGD with momentum for 100 epochs."""
    preset = paper(vocab_size)
    sgd = OptimConfig(name="sgd", peak_learning_rate=1e-3, warmup_steps=5000, schedule="cosine", b1=0.9)
    steps = 1_670_000  # 100 epochs of 17.1 million clips
    return dataclasses.replace(preset, contrastive=dataclasses.replace(preset.contrastive, steps=steps, optim=sgd))


def paligemma(vocab_size: int = 257_216) -> Preset:
    """The paper's method with PaliGemma 3B (SigLIP So400m and Gemma 2B) for the unpublished PaLI-3."""
    vision = ViTConfig(width=1152, depth=27, num_heads=16, mlp_dim=4304)
    return dataclasses.replace(
        paper(vocab_size), vlm=VLMConfig(vision=vision, language=GemmaConfig(vocab_size=vocab_size))
    )


def toy(vocab_size: int = 32_128) -> Preset:
    """The same method at a size that trains in seconds on two cores: for trials and tests, not for scores."""
    adafactor = OptimConfig(name="adafactor", peak_learning_rate=1e-3, warmup_steps=20)
    adamw = OptimConfig(name="adamw", peak_learning_rate=1e-3, warmup_steps=10, schedule="cosine", b1=0.9)
    vision = ViTConfig(image_size=64, patch_size=16, width=64, depth=2, num_heads=2, mlp_dim=128, dtype="float32")
    clip = ClipConfig(num_frames=4, sampling="uniform", short_side=72, size=64)
    stage = TrainConfig(steps=100, batch_size=8, optim=adafactor, clip=clip, log_every=10, checkpoint_every=50)
    return Preset(
        vlm=VLMConfig(
            vision=vision,
            language=T5Config(
                vocab_size=vocab_size,
                width=64,
                encoder_layers=2,
                decoder_layers=2,
                num_heads=2,
                head_dim=32,
                mlp_dim=128,
                dtype="float32",
            ),
            num_frames=4,
        ),
        dual_encoder=DualEncoderConfig(
            vision=dataclasses.replace(vision, num_frames=4, class_token=True),
            text=TextTowerConfig(
                vocab_size=vocab_size, context_length=32, width=64, depth=2, num_heads=2, mlp_dim=128, dtype="float32"
            ),
            embed_dim=64,
        ),
        visual=dataclasses.replace(stage, trainable=("vision", "projection")),
        language=dataclasses.replace(stage, trainable=("language",)),
        contrastive=dataclasses.replace(
            stage, optim=adamw, clip=dataclasses.replace(clip, crop="random", scale_jitter=(0.9, 1.33))
        ),
        prompt_length=32,
        caption_length=32,
        target_length=32,
    )


def demo(vocab_size: int = 32_128) -> Preset:
    """What `pyvdl demo` trains: the whole method in minutes on two CPU cores, so float32 and 4 frames of 64 x 64."""
    vision = ViTConfig(image_size=64, patch_size=16, width=128, depth=2, num_heads=4, mlp_dim=384, dtype="float32")
    clip = ClipConfig(num_frames=4, sampling="uniform", short_side=68, size=64, crop="random")
    adafactor = OptimConfig(name="adafactor", peak_learning_rate=2e-3, warmup_steps=50)
    stage = TrainConfig(
        batch_size=16,
        optim=adafactor,
        clip=clip,
        log_every=25,
        checkpoint_every=250,
        keep_checkpoints=1,
        num_threads=1,
    )
    return Preset(
        vlm=VLMConfig(
            vision=vision,
            language=T5Config(
                vocab_size=vocab_size,
                width=128,
                encoder_layers=2,
                decoder_layers=2,
                num_heads=4,
                head_dim=32,
                mlp_dim=256,
                num_buckets=64,
                dtype="float32",
            ),
            num_frames=4,
        ),
        dual_encoder=DualEncoderConfig(
            vision=dataclasses.replace(vision, num_frames=4, class_token=True),
            text=TextTowerConfig(
                vocab_size=vocab_size, context_length=24, width=128, depth=2, num_heads=4, mlp_dim=256, dtype="float32"
            ),
            embed_dim=128,
        ),
        visual=dataclasses.replace(stage, steps=600, trainable=("vision", "projection")),
        language=dataclasses.replace(stage, steps=800, trainable=("language",)),
        contrastive=dataclasses.replace(
            stage,
            steps=120,
            batch_size=48,
            optim=OptimConfig(
                name="adamw",
                peak_learning_rate=1e-3,
                warmup_steps=20,
                schedule="cosine",
                weight_decay=0.01,
                b1=0.9,
                b2=0.98,
            ),
            clip=dataclasses.replace(clip, scale_jitter=(0.9, 1.33)),
        ),
        prompt_length=24,
        caption_length=28,
        target_length=48,
    )


PRESETS: dict[str, Callable[..., Preset]] = {
    "toy": toy,
    "demo": demo,
    "paper": paper,
    "paper-sgd": paper_sgd,
    "paligemma": paligemma,
}
