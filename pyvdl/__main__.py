"""The command line: `pyvdl VERB ...`, the same as `python -m pyvdl`.

Exit codes: 0 done, 1 the job failed, 2 the command was wrong; a failure is one line on stderr.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pyvdl import __version__, commands
from pyvdl.ablate import GRIDS
from pyvdl.benchmarks import BY_NAME
from pyvdl.commands import UsageError
from pyvdl.config import PRESETS
from pyvdl.rows import FORMATS

VIDEOS_HELP = "video, folder, manifest (.jsonl, .csv, .parquet), or WebDataset tars ('clips/{00000..00099}.tar')"
DATASETS = (  # names that pyvdl.datasets reads, which help must not import
    "smit, vidln, videocc, internvid, webvid, msrvtt, msrvtt-1ka, msrvtt-qa, vatex, kinetics600, kinetics700,\n"
    "activitynet-captions, activitynet-qa, nextqa-oe, nextqa-mc, ucf101"
)
BENCHMARK_NAMES = textwrap.fill(", ".join(BY_NAME), 115)
TEMPLATES_HELP = (
    "what names of classes stand in: nothing, one template, or all of CLIP's, 48 for UCF101 and 28 for all others "
    "(default: none)"
)
DEMO_MODEL = Path("demo/language/model")  # what `make demo` leaves

DESCRIPTION = """Adapt an image vision-language model to video, caption clips with it, train a video-text encoder on
the captions.

try it:
  demo      the whole method on a small corpus made for it, with a report
data:
  probe     what is in video files or a data set, and what is wrong with them
  prepare   rewrite a data set so that epochs cost less, or render a labelled corpus
  instruct  questions and answers from captions and narratives
the method:
  adapt     an image vision-language model to video: the visual or the language stage
  caption   videos with the adapted model
  status    how far a captioning job is
  train     the video-text dual encoder on captions
  plan      what a recipe needs on a TPU slice, compiled for it here
measure:
  evaluate  captions, answers, retrieval and zero-shot classes: benchmarks and tests of your own
  embed     videos as vectors
  stats     what a set of captions looks like
  ablate    the paper's tables again: grids of recipes, theirs beside ours"""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose mistakes are one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        arguments, unknown = _parser().parse_known_args(argv)
    except SystemExit as stop:  # --help, or a mistake already told
        return int(stop.code or 0)
    name = f"pyvdl {arguments.verb}"
    if unknown:  # parse_args would point to the general help
        return _fail(f"{name}: unrecognized arguments: {' '.join(unknown)} (see {name} --help)", 2)
    try:
        return int(arguments.run(arguments) or 0)
    except UsageError as error:
        return _fail(f"{name}: {error} (see {name} --help)", 2)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail(f"{name}: interrupted", 130)
    except (ValueError, OSError, ImportError, RuntimeError, ArithmeticError, MemoryError) as error:
        text = str(error).strip() or type(error).__name__
        return _fail(f"{name}: {text.splitlines()[0]}", 1)


def _fail(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


def demo(arguments: argparse.Namespace) -> int:
    from pyvdl.demo import run_demo

    run_demo(arguments.out, arguments.seed)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="pyvdl", description=DESCRIPTION, epilog="`pyvdl VERB --help` says more.")
    parser.add_argument("--version", action="version", version=f"pyvdl {__version__}")
    verbs = parser.add_subparsers(
        dest="verb", metavar="VERB", required=True, help="one of those above", parser_class=Parser
    )

    def verb(name: str, run: Callable[[argparse.Namespace], int], description: str, example: str) -> Parser:
        found: Parser = verbs.add_parser(name, description=description, epilog=f"example:\n  {example}")
        found.set_defaults(run=run)
        return found

    p = verb(
        "demo",
        demo,
        "Runs the whole method on a small corpus of real encoded videos and writes a report. Goes on where it stopped.",
        "pyvdl demo --out demo",
    )
    p.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="where everything goes (default: demo)"
    )
    p.add_argument("--seed", type=_unsigned, default=0, help="of corpus and training (default: 0)")

    p = verb(
        "probe",
        commands.probe,
        "Prints one row for each video: codec, size, frames a second, frames, duration, rotation, status. The status\n"
        "tells of the headers and the index of packets: ok does not mean that every frame's data can be decoded. Exit\n"
        "code 1 where no video could be read.\n\n"
        "With --annotations and --videos PATH is the name of a data set: prints how many records, splits and texts\n"
        "its annotation files give, which videos are missing, and three records; --out writes a manifest. Names:\n"
        f"{DATASETS}.",
        "pyvdl probe videos/ train.jsonl clip.mp4 --json\n"
        "  pyvdl probe msrvtt --annotations MSRVTT_data.json --videos msrvtt/videos --split val --out val.jsonl",
    )
    p.add_argument("paths", nargs="*", metavar="PATH", help=f"{VIDEOS_HELP}; or a data set")
    p.add_argument("--annotations", nargs="+", type=Path, metavar="FILE", help="of the data set, as they are published")
    p.add_argument("--videos", metavar="DIR", help="where the data set's videos are: folder or URL")
    p.add_argument("--split", help="only this one: train, val or test")
    p.add_argument(
        "--names",
        metavar="PATTERN",
        help="how the videos are named below --videos, such as '{youtube_id}.mp4' or '{youtube_id}.*'; the README's\n"
        "table has what each data set takes by itself",
    )
    p.add_argument("--out", type=Path, metavar="FILE", help="write the data set's records as a manifest")
    p.add_argument("--skip-missing", action="store_true", help="without those whose video is missing")
    p.add_argument("--json", action="store_true", help="one JSON object a line")
    p.add_argument("--versions", action="store_true", help="only print the versions of pyvdl, jax and FFmpeg")

    p = verb(
        "prepare",
        commands.prepare,
        "Rewrites a data set once, so that every epoch costs less: --to tars encodes each clip anew, small and with\n"
        "key frames close together, into WebDataset tars; --to arrays samples each clip once, into a zarr3 array that\n"
        "is read in place of decoding. DIR/clips.jsonl is the manifest of what is there. The same command goes on\n"
        "where it stopped. Or renders a labelled corpus of real video files (--synthetic): train.jsonl,\n"
        "unlabelled.jsonl and test.jsonl.",
        "pyvdl prepare --data clips.jsonl --to tars --out small --set short_side=256",
    )
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", nargs="+", metavar="PATH", help=VIDEOS_HELP)
    what.add_argument("--synthetic", type=_corpus_size, metavar="N", help="render N clips in all parts")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    p.add_argument("--to", choices=("tars", "arrays"), help="short videos in tars, or clips as arrays")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A=B",
        help="of tars: short_side=256, gop=8, crf=20; of arrays: what a clip has, num_frames=8 and size=224 as the "
        "model's, short_side=256, sampling=uniform, crop=center and so on; again for more",
    )
    p.add_argument("--shard-size", type=_positive, metavar="N", help="clips a file (default: 1000 a tar, 64 of arrays)")
    p.add_argument("--num-threads", type=_positive, default=os.cpu_count() or 1, metavar="N", help="default: all cores")
    p.add_argument("--seed", type=_unsigned, default=0, help="of what is random in scenes or clips (default: 0)")

    p = verb(
        "instruct",
        commands.instruct,
        "Makes instruction data: writes a manifest whose records carry questions and answers (temporal, causal,\n"
        "short). With --model, a language model writes them from captions and narratives, asked through any endpoint\n"
        "that speaks OpenAI's protocol, with OPENAI_API_KEY. The same command goes on where it stopped, and tries\n"
        "again what failed. Without, rules make them from narratives with actor tags.",
        "pyvdl instruct --data train.jsonl --out instructions.jsonl --model NAME --base-url http://localhost:8000/v1",
    )
    p.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DATA",
        help="records with captions or narratives: manifest or WebDataset tars",
    )
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="manifest to write")
    _add_language_model(p)

    p = verb(
        "adapt",
        commands.adapt,
        "Trains one stage of the adaptation: 'visual' the vision tower on short captions, 'language' the language\n"
        "model on questions, captions and descriptions, 'prompt' a soft prompt on the same; the rest is frozen. The\n"
        "same command goes on where it stopped; SIGTERM saves and ends with 0. The model is in DIR/model at the end.",
        "pyvdl adapt --stage visual --model image_model --data corpus/train.jsonl --out runs/visual",
    )
    p.add_argument("--stage", choices=("visual", "language", "prompt"), required=True)
    p.add_argument("--pseudo", type=Path, metavar="MANIFEST", help="self-training: mix these records in (visual stage)")
    p.add_argument(
        "--pseudo-captions", type=Path, metavar="PATH", help="their captions, as `pyvdl caption --out` wrote"
    )
    p.add_argument("--pseudo-share", type=_share, default=0.5, metavar="X", help="of all rows (default: 0.5)")
    _add_training(p)

    p = verb(
        "train",
        commands.train,
        "Trains the dual encoder on one kind of captions. The same command goes on where it stopped; SIGTERM saves\n"
        "and ends with 0. The model is in DIR/model at the end.",
        "pyvdl train --data corpus/unlabelled.jsonl --captions runs/captions --out runs/encoder --set steps=500",
    )
    p.add_argument(
        "--captions",
        required=True,
        metavar="SOURCE",
        help="'human' or 'alt_text' of the manifest, or what `pyvdl caption --out` wrote (file or folder)",
    )
    _add_training(p)

    p = verb(
        "caption",
        commands.caption,
        "Captions videos. One video prints its captions; several print a row each, with a status; --out writes shards\n"
        "and goes on where it stopped.",
        "pyvdl caption video.mp4 --num-samples 3",
    )
    _add_videos(p)
    p.add_argument(
        "--model",
        type=Path,
        default=DEMO_MODEL,
        metavar="DIR",
        help=f"saved VLM, or PaliGemma's folder or npz file (default: {DEMO_MODEL})",
    )
    p.add_argument("--out", metavar="DIR", help="write shards of rows into this folder or URL, and go on there")
    p.add_argument("--json", action="store_true", help="one JSON object a line")
    p.add_argument(
        "--export",
        nargs="+",
        choices=("coco", "videofolder", "webdataset"),
        default=[],
        help="with --out, once all is captioned: write it in these formats, too, into the same folder",
    )
    _add_cuts(p)
    _add_sampling(p)
    _add_job(p, "caption")
    _add_filters(p)

    p = verb(
        "status",
        commands.status,
        "Tells how far a job of captions or embeddings is, from its folder, while it runs or afterwards: shards,\n"
        "rows, failures by kind, clips a second of the last shards and the time left at that rate.",
        "pyvdl status runs/captions",
    )
    p.add_argument("out", metavar="DIR", help="what --out of `pyvdl caption` or `embed` named")
    p.add_argument(
        "--page", type=Path, metavar="FILE", help="write an HTML page too: plots, clips with their captions, errors"
    )
    p.add_argument("--json", action="store_true", help="one JSON object")

    p = verb(
        "plan",
        commands.plan,
        "Compiles a recipe's training step for a TPU slice that is not there, and prints what it needs: memory of a\n"
        "chip by kind, exchanges, bounds of a step's time, chip-hours. Nothing is measured; libtpu is needed. Hosts\n"
        "caption by themselves: a batch of captions is compiled for the chips of one host, clips and hours are told\n"
        "for all. Its settings: clips (of the job), batch_size, num_samples, max_length, fsdp, tensor, param_dtype.",
        "pyvdl plan train --topology v5e:8x16",
    )
    p.add_argument(
        "recipe",
        choices=("visual", "language", "train", "caption"),
        help="stage of the VLM, the dual encoder, or captions of the VLM",
    )
    p.add_argument("--topology", default="v5e:8x16", metavar="CHIP:AxB", help="v5e, v5p or v6e (default: v5e:8x16)")
    p.add_argument("--preset", choices=tuple(PRESETS), default="paper", help="sizes (default: paper)")
    p.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="change a setting, as in adapt and train"
    )
    p.add_argument("--json", action="store_true", help="one JSON object")

    p = verb(
        "evaluate",
        commands.evaluate,
        "Scores a model, or predictions made by any other, on a benchmark's published files or on a test of your own:\n"
        "captions (CIDEr-D), answers (exact match, WUPS) and options (log-likelihood) of a VLM; retrieval and classes\n"
        "of a dual encoder. Intervals: bootstrap 95% over clips. Benchmarks:\n"
        f"{BENCHMARK_NAMES};\n"
        "all runs those whose files are there, and prints the paper's Tables 2 and 3 beside them.",
        "pyvdl evaluate --model runs/encoder/model --data corpus/test.jsonl --out scores.json\n"
        "  pyvdl evaluate ucf101 --model runs/encoder/model --annotations classInd.txt testlist01.txt --videos ucf\n"
        "  pyvdl evaluate all --model runs/language/model runs/encoder/model --root benchmarks --out scores.json\n"
        "  pyvdl evaluate --predictions captions.jsonl",
    )
    p.add_argument(
        "benchmark",
        nargs="?",
        choices=[*BY_NAME, "all"],
        metavar="BENCHMARK",
        help="one of those above, or all (default: what the records of --data have)",
    )
    p.add_argument("--model", nargs="+", type=Path, metavar="DIR", help="saved VLM or dual encoder, or one of each")
    p.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="in place of a model: texts as JSON lines, embeddings or similarities as *.npz (see the README); for\n"
        "all, the folder that --save wrote",
    )
    p.add_argument("--data", type=Path, metavar="DATA", help="test records: manifest or WebDataset tars")
    p.add_argument("--annotations", nargs="+", type=Path, metavar="FILE", help="of the benchmark, as published")
    p.add_argument("--videos", metavar="DIR", help="where the benchmark's videos are: folder or URL")
    p.add_argument("--names", metavar="PATTERN", help="how the videos are named below --videos, as in `pyvdl probe`")
    p.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="folder of annotations/NAME with the published files of the data sets, and of videos/ (see the README)",
    )
    p.add_argument("--split", metavar="NAME", help="another one than the benchmark's: train, val or test")
    p.add_argument("--skip-missing", action="store_true", help="without clips whose video is missing (else: misses)")
    p.add_argument("--templates", choices=("none", "one", "clip"), default="none", help=TEMPLATES_HELP)
    p.add_argument(
        "--clips",
        type=_positive,
        default=1,
        metavar="N",
        help="embed so many equal parts of each video, and take their mean (default: 1)",
    )
    p.add_argument("--out", type=Path, metavar="FILE", help="write the scores as JSON too")
    p.add_argument("--save", type=Path, metavar="DIR", help="write what was predicted too, as --predictions reads it")
    _add_loading(p)

    p = verb(
        "embed",
        commands.embed,
        "Embeds videos: writes shards of rows with an embedding each (float32, length 1; NaN where a video failed),\n"
        "and goes on where it stopped. A model of images gives the mean of 8 frames' embeddings.",
        "pyvdl embed corpus/test.jsonl --model runs/encoder/model --out runs/embeddings --export npz",
    )
    _add_videos(p)
    p.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="saved dual encoder, or CLIP's or SigLIP's folder"
    )
    p.add_argument(
        "--out",
        default="embeddings",
        metavar="DIR",
        help="write shards of rows into this folder or URL, and go on there (default: embeddings)",
    )
    p.add_argument(
        "--export",
        nargs="+",
        choices=("npz",),
        default=[],
        help="once all is embedded: write it as a NumPy archive, too, into the same folder: keys, embeddings, errors",
    )
    _add_cuts(p)
    _add_job(p, "embed")

    p = verb(
        "stats",
        commands.stats,
        "Prints statistics of captions side by side: number, mean length, unique nouns and verbs, vocabulary. Words\n"
        "are those of the Penn Treebank and tagged by WordNet; --spacy takes a pipeline of spaCy for both.",
        "pyvdl stats --captions runs/captions corpus/unlabelled.jsonl --sample-size equal",
    )
    p.add_argument(
        "--captions",
        nargs="+",
        required=True,
        metavar="PATH",
        help="what `pyvdl caption --out` wrote (file or folder), or a manifest (its captions and alt-text)",
    )
    p.add_argument("--spacy", metavar="PIPELINE", help="such as en_core_web_sm, or a folder (needs the extra stats)")
    p.add_argument("--forms", action="store_true", help="count different forms of nouns and verbs, not lemmas")
    p.add_argument("--proper-nouns", action="store_true", help="count names as nouns, with --spacy")
    p.add_argument("--punctuation", action="store_true", help="count marks as tokens")
    p.add_argument(
        "--sample-size",
        type=_sample_size,
        metavar="N",
        help="so many captions of each set at random, or 'equal': as many as the smallest set has (default: all)",
    )
    p.add_argument("--seed", type=_unsigned, default=0, help="of the samples (default: 0)")

    p = verb(
        "ablate",
        commands.ablate,
        "Runs one of the paper's ablations as a grid of recipes, and prints its table beside ours, with which of its\n"
        "directions agree. By itself on the small corpus of the demo, in minutes; with --test on data and models of\n"
        "your own, at any size. What several recipes share is done once, and the same command goes on where it\n"
        "stopped. Without a name: which ablations there are.",
        "pyvdl ablate order --out ablations",
    )
    _add_ablation(p)
    return parser


def _add_ablation(p: Parser) -> None:
    p.add_argument("name", nargs="?", choices=tuple(GRIDS), metavar="NAME", help=", ".join(GRIDS))
    p.add_argument(
        "--out",
        type=Path,
        default=Path("ablations"),
        metavar="DIR",
        help="where everything goes (default: ablations); of all grids the same, so that they share what is done.\n"
        "The folder of `pyvdl demo` has corpus and image models already",
    )
    p.add_argument("--seed", type=_unsigned, default=0, help="of corpus and training (default: 0)")
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


def _add_language_model(parser: Parser) -> None:
    p = parser.add_argument_group("with a language model")
    p.add_argument("--model", metavar="NAME", help="as the endpoint knows it")
    p.add_argument("--base-url", metavar="URL", help="of the endpoint (default: OPENAI_BASE_URL, or OpenAI's)")
    p.add_argument("--templates", type=Path, metavar="FILE", help="your own instructions and examples, a TOML file")
    p.add_argument("--seed", type=_unsigned, metavar="N", help="of the examples and requests (default: 0)")
    p.add_argument("--temperature", type=_non_negative, metavar="X", help="(default: the endpoint's)")
    p.add_argument("--max-tokens", type=_positive, metavar="N", help="of a reply, thoughts included (default: 1024)")
    p.add_argument(
        "--language", metavar="CODE", help="questions in others are left out; 'any' keeps them (default: en)"
    )
    p.add_argument("--concurrency", type=_positive, metavar="N", help="requests at a time (default: 16)")
    p.add_argument("--requests-per-minute", type=_positive, metavar="N", help="at most (default: no limit)")
    p.add_argument("--tokens-per-minute", type=_positive, metavar="N", help="in and out, at most (default: no limit)")
    p.add_argument("--timeout-seconds", type=_positive, metavar="N", help="of one try of a request (default: 120)")
    p.add_argument("--retries", type=_unsigned, metavar="N", help="of a request that may work later (default: 6)")
    p.add_argument("--price-in", type=_non_negative, metavar="X", help="of a million tokens in, to tell the cost")
    p.add_argument("--price-out", type=_non_negative, metavar="X", help="of a million tokens out")


def _add_training(p: Parser) -> None:
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
    p.add_argument("--fraction", type=_share, default=1.0, metavar="X", help="share of the records (default: 1)")
    _add_distributed(p, "train")


def _add_distributed(p: Parser, verb: str) -> None:
    p.add_argument(
        "--distributed",
        action="store_true",
        help=f"{verb} together with the other processes that run this command: on TPU slices, Slurm and GKE found by\n"
        "themselves, elsewhere named by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    )


def _add_videos(p: Parser) -> None:
    p.add_argument("videos", nargs="*", metavar="PATH", help=VIDEOS_HELP)
    p.add_argument("--videos", nargs="+", default=[], metavar="PATH", dest="more_videos", help="the same")


def _add_sampling(p: Parser) -> None:
    p.add_argument("--num-samples", type=_positive, default=1, metavar="N", help="captions a video (default: 1)")
    p.add_argument("--temperature", type=_non_negative, metavar="X", default=1.0, help="0 is greedy (default: 1)")
    p.add_argument("--top-p", type=_share, metavar="P", default=0.95, help="nucleus (default: 0.95)")
    p.add_argument("--max-length", type=_positive, default=32, metavar="TOKENS", help="of a caption (default: 32)")
    p.add_argument("--prompt", help="task prompt (default: that of the model's captions)")
    p.add_argument("--seed", type=_unsigned, default=0, help="of the samples (default: 0)")
    p.add_argument("--format", choices=FORMATS["captions"], default="parquet", help="of --out (default: parquet)")


def _add_job(p: Parser, verb: str) -> None:
    p.add_argument("--shard-size", type=_positive, default=1000, metavar="ROWS", help="of --out (default: 1000)")
    p.add_argument(
        "--timeout-seconds",
        type=_seconds,
        default=60.0,
        metavar="X",
        help="that decoding one clip may take, with --out (default: 60)",
    )
    text = "with --out: split the model's parameters over so many of each process's devices (default: 1)"
    p.add_argument("--fsdp", type=_positive, default=1, metavar="N", help=text)
    p.add_argument("--tensor", type=_positive, default=1, metavar="N", help="the same for matrices and heads")
    _add_distributed(p, verb)
    p.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="with --out: this process and those of --distributed, or the workers of a Ray cluster, whose hosts may\n"
        "come and go: that of RAY_ADDRESS, else one on this machine for as long as it takes (default: local)",
    )
    p.add_argument(
        "--workers", type=_positive, metavar="N", help="of --engine ray (default: as many as have a place now)"
    )
    p.add_argument(
        "--worker-resources",
        type=_resource,
        nargs="+",
        default=[],
        metavar="NAME=X",
        help="what a worker takes of a host, by Ray's names: GPU=1, TPU=4, CPU=8, ... (default: CPU=1)",
    )
    _add_loading(p)


def _add_cuts(p: Parser) -> None:
    group = p.add_argument_group("long clips (default: as they are)")
    group.add_argument(
        "--window-seconds", type=_seconds, metavar="X", help="cut longer clips into windows of X seconds"
    )
    group.add_argument(
        "--cut",
        choices=("windows", "shots"),
        default="windows",
        help="shots: cut where a shot ends, and shots longer than --window-seconds into equal parts. All of each\n"
        "clip is decoded for that before captioning begins (default: windows)",
    )
    group.add_argument(
        "--min-shot-seconds",
        type=_seconds,
        default=1.0,
        metavar="X",
        help="a shorter shot belongs to the one before (default: 1)",
    )


def _add_filters(p: Parser) -> None:
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
    group.add_argument("--keep-best", type=_positive, metavar="K", help="captions of a video")


def _add_loading(p: Parser) -> None:
    p.add_argument(
        "--sampling",
        choices=("uniform", "fps", "keyframe"),
        default="uniform",
        help="frames spread over the clip, at the model's rate from its start, or key frames (default: uniform)",
    )
    p.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="clips at a time (default: 8)")
    p.add_argument("--num-threads", type=_positive, default=2, metavar="N", help="that decode (default: 2)")
    p.add_argument("--int8", action="store_true", help="keep the model's matrices in int8, in less memory (needs qwix)")


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


def _sample_size(text: str) -> int | str:
    return text if text == "equal" else _positive(text)


_positive = _number(int, lambda value: value > 0, "a whole number above 0")
_unsigned = _number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")
_non_negative = _number(float, lambda value: 0 <= value < math.inf, "a number of at least 0")
_seconds = _number(float, lambda value: 0 < value < math.inf, "a number of seconds above 0")
# Fewer leave a part of the corpus empty; make_corpus refuses them too.
_corpus_size = _number(int, lambda value: value >= 10, "a whole number of at least 10, clips for all three parts")
_share = _number(float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


if __name__ == "__main__":
    sys.exit(main())
