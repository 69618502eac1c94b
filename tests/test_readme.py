"""What the README says of the tree, the commands and the code is so."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from pyvdl.__main__ import _parser
from pyvdl.benchmarks import BENCHMARKS, BY_NAME
from pyvdl.datasets import READERS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def named(line: str) -> list[str]:
    """The paths of one line of the tree, `a.{h,cpp}` written out; a description follows after two spaces."""
    result = []
    for path in re.split(r"  +", line.strip())[0].split():
        stem, _, endings = path.partition("{")
        result += [stem + ending for ending in endings.rstrip("}").split(",")] if endings else [path]
    return result


def test_tree_names_every_source_and_nothing_else() -> None:
    tree = next(block for block in blocks("") if block.startswith("csrc/"))
    found: set[str] = set()
    folder = ""
    for line in tree.splitlines():
        inside = line.startswith("  ")
        paths = named(line)
        if not inside and paths[0].endswith("/"):
            folder = paths[0]
        found.update(folder + path if inside else path for path in paths)
    assert [path for path in sorted(found) if not (ROOT / path).exists()] == []
    sources = [*ROOT.glob("csrc/*"), *ROOT.glob("kernels/*.py"), *ROOT.glob("pyvdl/*.py")]
    sources += [path.parent for path in ROOT.glob("pyvdl/*/__init__.py")]
    wanted = {str(path.relative_to(ROOT)) for path in sources if path.name != "__init__.py"}
    assert wanted - {path.rstrip("/") for path in found} == set()


def test_every_verb_is_in_the_table() -> None:
    verbs = next(action.choices for action in _parser()._actions if action.dest == "verb")
    assert sorted(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == sorted(verbs or ())


def test_every_data_set_is_in_the_table() -> None:
    section = README.partition("\n## Data sets\n")[2].partition("\n## ")[0]
    names = re.findall(r"^\| [^|`]+ \| ([^|]+) \|", section, re.MULTILINE)
    assert re.findall(r"`([^`]+)`", " ".join(names)) == list(READERS)


def test_every_benchmark_is_in_the_table_with_its_files_and_figures() -> None:
    section = README.partition("\n## Benchmarks\n")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in row[1:-1].split("|")] for row in re.findall(r"^\|.*`.*\|$", section, re.MULTILINE)
    ]
    assert [row[1].strip("`") for row in rows] == list(BY_NAME)
    for (_, name, files, videos, _, paper), benchmark in zip(rows, BENCHMARKS, strict=True):
        wanted = [f"{benchmark.reader}/{benchmark.files[0]}", *benchmark.files[1:], *benchmark.several, *benchmark.more]
        assert re.findall("`([^`]+)`", files) == wanted, name
        assert videos == f"`{benchmark.videos}`"
        assert [float(figure) for figure in paper.split(", ") if figure] == list(benchmark.paper.values())


@pytest.mark.parametrize("command", re.findall(r"^(pyvdl .*)$", "\n".join(blocks("sh")), re.MULTILINE))
def test_commands_are_understood(command: str) -> None:
    arguments = _parser().parse_args(shlex.split(command, comments=True)[1:])
    assert callable(arguments.run)


def test_messages_name_packages_as_the_installation_does() -> None:
    """Never `pyvdl`, which is another project where packages come from."""
    text = "\n".join(path.read_text() for path in [*(ROOT / "pyvdl").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
    told = {name for command in re.findall(r"pip install ((?:'[^']+' ?)+)", text) for name in shlex.split(command)}
    wanted = re.findall(r'"([\w-]+>=[\w.]+)"', (ROOT / "setup.py").read_text())
    assert {"pyarrow>=16", "tensorboardX>=2.6", "safetensors>=0.6"} <= told
    assert told - set(wanted) == {".[llm]"}


def test_python_examples_are_python() -> None:
    assert len(blocks("python")) == 2
    for code in blocks("python"):
        ast.parse(code)
        assert len(code.splitlines()) <= 12
