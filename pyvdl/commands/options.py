"""Options that several verbs share, and the values they take."""

from __future__ import annotations

import argparse
import math
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

from pyvdl.ablate import GRIDS
from pyvdl.clip_prompts import prompt_columns
from pyvdl.config import PRESETS
from pyvdl.rows import FORMATS

VIDEOS_HELP = "video, folder, manifest (.jsonl, .csv, .parquet), or WebDataset tars ('clips/{00000..00099}.tar')"


def add_ablation(p: ArgumentParser) -> None:
    p.add_argument("name", nargs="?", choices=tuple(GRIDS), metavar="NAME", help=", ".join(GRIDS))
    p.add_argument(
        "--out",
        type=Path,
        default=Path("ablations"),
        metavar="DIR",
        help="where everything goes (default: ablations); of all grids the same, so that they share what is done.\n"
        "The folder of `pyvdl demo` has corpus and image models already",
    )
    p.add_argument("--seed", type=unsigned, default=0, help="of corpus and training (default: 0)")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KIND.A.B=C",
        help="change a setting of all trainings of a kind (visual.steps=500, language.batch_size=32,\n"
        "contrastive.optim.peak_learning_rate=3e-4) or of captioning (caption.num_samples=10); again for more",
    )
    group = p.add_argument_group("data and models of your own (default: the small corpus and its stand-ins)")
    group.add_argument("--test", type=Path, metavar="DATA", help="test records: manifest or WebDataset tars")
    group.add_argument("--preset", choices=tuple(PRESETS), help="sizes and recipes (default: paper)")
    group.add_argument(
        "--data", type=Path, metavar="DATA", help="labelled: captions, narratives, and instruct's questions"
    )
    group.add_argument("--unlabelled", type=Path, metavar="DATA", help="clips to caption, with alt-text")
    group.add_argument("--vlm", type=Path, metavar="DIR", help="image vision-language model, as adapt takes it")
    group.add_argument("--encoder", type=Path, metavar="DIR", help="dual encoder to begin with, as train takes it")
    group.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="NAME=DATA",
        help="instruction data 'pictures' (LLaVA) or 'long answers' (ActivityNet-Instruct), or a language model's\n"
        "'summary' of each unlabelled clip as its caption; rows without their source are left out; again for more",
    )


def add_language_model(parser: ArgumentParser) -> None:
    p = parser.add_argument_group("with a language model")
    p.add_argument("--model", metavar="NAME", help="as the endpoint knows it")
    p.add_argument("--base-url", metavar="URL", help="of the endpoint (default: OPENAI_BASE_URL, or OpenAI's)")
    p.add_argument("--templates", type=Path, metavar="FILE", help="your own instructions and examples, a TOML file")
    p.add_argument("--seed", type=unsigned, metavar="N", help="of the examples and requests (default: 0)")
    p.add_argument("--temperature", type=_non_negative, metavar="X", help="(default: the endpoint's)")
    p.add_argument("--max-tokens", type=positive, metavar="N", help="of a reply, thoughts included (default: 1024)")
    p.add_argument(
        "--language", metavar="CODE", help="questions in others are left out; 'any' keeps them (default: en)"
    )
    p.add_argument("--concurrency", type=positive, metavar="N", help="requests at a time (default: 16)")
    p.add_argument("--requests-per-minute", type=positive, metavar="N", help="at most (default: no limit)")
    p.add_argument("--tokens-per-minute", type=positive, metavar="N", help="in and out, at most (default: no limit)")
    p.add_argument("--timeout-seconds", type=positive, metavar="N", help="of one try of a request (default: 120)")
    p.add_argument("--retries", type=unsigned, metavar="N", help="of a request that may work later (default: 6)")
    p.add_argument("--price-in", type=_non_negative, metavar="X", help="of a million tokens in, to tell the cost")
    p.add_argument("--price-out", type=_non_negative, metavar="X", help="of a million tokens out")


def add_training(p: ArgumentParser) -> None:
    p.add_argument(
        "--data", type=Path, required=True, metavar="DATA", help="training records: manifest or WebDataset tars"
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    p.add_argument("--model", type=Path, metavar="DIR", help="saved model to start from (default: a random one)")
    p.add_argument("--preset", choices=tuple(PRESETS), default="toy", help="sizes and recipe (default: toy)")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=C",
        help="change a setting of the recipe (steps=500, optim.peak_learning_rate=3e-4, clip.crop=center) or of a new "
        "model (model.vision.depth=4); again for more",
    )
    p.add_argument("--fraction", type=share, default=1.0, metavar="X", help="share of the records (default: 1)")
    _add_distributed(p, "train")


def _add_distributed(p: ArgumentParser, verb: str) -> None:
    p.add_argument(
        "--distributed",
        action="store_true",
        help=f"{verb} together with the other processes that run this command: on TPU slices, Slurm and GKE found by\n"
        "themselves, elsewhere named by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    )


def add_videos(p: ArgumentParser) -> None:
    p.add_argument("videos", nargs="*", metavar="PATH", help=VIDEOS_HELP)
    p.add_argument("--videos", nargs="+", default=[], metavar="PATH", dest="more_videos", help="the same")


def add_sampling(p: ArgumentParser) -> None:
    p.add_argument("--num-samples", type=positive, default=1, metavar="N", help="captions a video (default: 1)")
    p.add_argument("--temperature", type=_non_negative, metavar="X", default=1.0, help="0 is greedy (default: 1)")
    p.add_argument("--top-p", type=share, metavar="P", default=0.95, help="nucleus (default: 0.95)")
    p.add_argument("--max-length", type=positive, default=32, metavar="TOKENS", help="of a caption (default: 32)")
    p.add_argument(
        "--prompt",
        type=_prompt,
        help="task prompt (default: that of the model's captions); {NAME} in it is the clip's column of that name\n"
        "(or key, video, start_seconds, end_seconds), as in 'answer en {question}'",
    )
    p.add_argument("--seed", type=unsigned, default=0, help="of the samples (default: 0)")
    p.add_argument("--format", choices=FORMATS["captions"], default="parquet", help="of --out (default: parquet)")


def add_job(p: ArgumentParser, verb: str) -> None:
    p.add_argument("--shard-size", type=positive, default=1000, metavar="ROWS", help="of --out (default: 1000)")
    p.add_argument(
        "--timeout-seconds",
        type=_seconds,
        default=60.0,
        metavar="X",
        help="that decoding one clip may take, with --out (default: 60)",
    )
    text = "with --out: split the model's parameters over so many of each process's devices (default: 1)"
    p.add_argument("--fsdp", type=positive, default=1, metavar="N", help=text)
    p.add_argument("--tensor", type=positive, default=1, metavar="N", help="the same for matrices and heads")
    _add_distributed(p, verb)
    p.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="with --out: this process and those of --distributed, or the workers of a Ray cluster, whose hosts may\n"
        "come and go: that of RAY_ADDRESS, else one on this machine for as long as it takes (default: local)",
    )
    p.add_argument(
        "--workers", type=positive, metavar="N", help="of --engine ray (default: as many as have a place now)"
    )
    p.add_argument(
        "--worker-resources",
        type=_resource,
        nargs="+",
        default=[],
        metavar="NAME=X",
        help="what a worker takes of a host, by Ray's names: GPU=1, TPU=4, CPU=8, ... (default: CPU=1)",
    )
    add_loading(p)


def add_cuts(p: ArgumentParser) -> None:
    group = p.add_argument_group("long clips (default: as they are)")
    group.add_argument(
        "--window-seconds", type=_seconds, metavar="X", help="cut longer clips into windows of X seconds"
    )
    group.add_argument(
        "--cut",
        choices=("windows", "shots"),
        default="windows",
        help="shots: cut where a shot ends, and shots longer than --window-seconds into equal parts. All of each\n"
        "clip is decoded for that before captioning begins, by all processes or workers (default: windows)",
    )
    group.add_argument(
        "--min-shot-seconds",
        type=_seconds,
        default=1.0,
        metavar="X",
        help="a shorter shot belongs to the one before (default: 1)",
    )


def add_filters(p: ArgumentParser) -> None:
    group = p.add_argument_group("filters (default: none; what they drop stands in the rows, with the filter's name)")
    group.add_argument(
        "--min-log-prob", type=float, metavar="X", help="natural log, mean over a caption's tokens and its end"
    )
    group.add_argument("--max-repetition", type=float, metavar="X", help="share of a caption's bigrams that it repeats")
    group.add_argument(
        "--max-overlap",
        type=float,
        metavar="X",
        help="of a caption's bigrams with those of a better one of its video (Jaccard index)",
    )
    group.add_argument(
        "--clip-score",
        type=Path,
        metavar="DIR",
        help="dual encoder whose cosine of video and caption is told in the rows, and says which captions are better\n"
        "(without: the mean log-probability)",
    )
    group.add_argument("--min-clip-score", type=float, metavar="X", help="the least cosine, with --clip-score")
    group.add_argument("--keep-best", type=positive, metavar="K", help="captions of a video")


def add_loading(p: ArgumentParser) -> None:
    p.add_argument(
        "--sampling",
        choices=("uniform", "fps", "keyframe"),
        default="uniform",
        help="frames spread over the clip, at the model's rate from its start, or key frames (default: uniform)",
    )
    p.add_argument("--batch-size", type=positive, default=8, metavar="N", help="clips at a time (default: 8)")
    p.add_argument("--num-threads", type=positive, default=2, metavar="N", help="that decode (default: 2)")
    p.add_argument("--int8", action="store_true", help="keep the model's matrices in int8, in less memory (needs qwix)")


def _prompt(text: str) -> str:
    try:
        prompt_columns(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _resource(text: str) -> tuple[str, float]:
    name, _, amount = text.partition("=")
    if not name or not amount.replace(".", "", 1).isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a resource with its amount, such as GPU=1")
    return name, float(amount)


def _number[T: (int, float)](kind: type[T], fits: Callable[[T], bool], wanted: str) -> Callable[[str], T]:
    """An argparse type whose message says what is wanted."""

    def read(text: str) -> T:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return read


def sample_size(text: str) -> int | str:
    return text if text == "equal" else positive(text)


positive = _number(int, lambda value: value > 0, "a whole number above 0")
unsigned = _number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")
_non_negative = _number(float, lambda value: 0 <= value < math.inf, "a number of at least 0")
_seconds = _number(float, lambda value: 0 < value < math.inf, "a number of seconds above 0")
# Fewer leave a part of the corpus empty; make_corpus refuses them too.
corpus_size = _number(int, lambda value: value >= 10, "a whole number of at least 10, clips for all three parts")
share = _number(float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
