"""The command line: `pyvdl VERB ...`, the same as `python -m pyvdl`.

Exit codes: 0 done, 1 the job failed, 2 the command was wrong; a failure is one line on stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pyvdl import __version__, commands
from pyvdl.benchmarks import BY_NAME
from pyvdl.commands import UsageError
from pyvdl.commands.options import (
    VIDEOS_HELP,
    add_ablation,
    add_cuts,
    add_filters,
    add_job,
    add_language_model,
    add_loading,
    add_sampling,
    add_training,
    add_videos,
    corpus_size,
    positive,
    sample_size,
    share,
    unsigned,
)
from pyvdl.config import PRESETS

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
    p.add_argument("--seed", type=unsigned, default=0, help="of corpus and training (default: 0)")

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
    what.add_argument("--synthetic", type=corpus_size, metavar="N", help="render N clips in all parts")
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
    p.add_argument("--shard-size", type=positive, metavar="N", help="clips a file (default: 1000 a tar, 64 of arrays)")
    p.add_argument("--num-threads", type=positive, default=os.cpu_count() or 1, metavar="N", help="default: all cores")
    p.add_argument("--seed", type=unsigned, default=0, help="of what is random in scenes or clips (default: 0)")

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
    add_language_model(p)

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
    p.add_argument("--pseudo-share", type=share, default=0.5, metavar="X", help="of all rows (default: 0.5)")
    add_training(p)

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
    add_training(p)

    p = verb(
        "caption",
        commands.caption,
        "Captions videos. One video prints its captions; several print a row each, with a status; --out writes shards\n"
        "and goes on where it stopped.",
        "pyvdl caption video.mp4 --num-samples 3",
    )
    add_videos(p)
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
    add_cuts(p)
    add_sampling(p)
    add_job(p, "caption")
    add_filters(p)

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
        type=positive,
        default=1,
        metavar="N",
        help="embed so many equal parts of each video, and take their mean (default: 1)",
    )
    p.add_argument("--out", type=Path, metavar="FILE", help="write the scores as JSON too")
    p.add_argument("--save", type=Path, metavar="DIR", help="write what was predicted too, as --predictions reads it")
    add_loading(p)

    p = verb(
        "embed",
        commands.embed,
        "Embeds videos: writes shards of rows with an embedding each (float32, length 1; NaN where a video failed),\n"
        "and goes on where it stopped. A model of images gives the mean of 8 frames' embeddings.",
        "pyvdl embed corpus/test.jsonl --model runs/encoder/model --out runs/embeddings --export npz",
    )
    add_videos(p)
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
    add_cuts(p)
    add_job(p, "embed")

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
        type=sample_size,
        metavar="N",
        help="so many captions of each set at random, or 'equal': as many as the smallest set has (default: all)",
    )
    p.add_argument("--seed", type=unsigned, default=0, help="of the samples (default: 0)")

    p = verb(
        "ablate",
        commands.ablate,
        "Runs one of the paper's ablations as a grid of recipes, and prints its table beside ours, with which of its\n"
        "directions agree. By itself on the small corpus of the demo, in minutes; with --test on data and models of\n"
        "your own, at any size. What several recipes share is done once, and the same command goes on where it\n"
        "stopped. Without a name: which ablations there are.",
        "pyvdl ablate order --out ablations",
    )
    add_ablation(p)
    return parser


if __name__ == "__main__":
    sys.exit(main())
