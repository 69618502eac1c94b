"""Checkpoints of every family give what `transformers` computes with them, in every format.

The goldens in tests/parity/golden come from `make goldens`; tests/parity/golden/versions.json tells what made them.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from pyvdl.config import GemmaConfig, VLMConfig
from pyvdl.models.weight_configs import to_paligemma
from pyvdl.models.weights import load_pretrained, save_pretrained
from pyvdl.tokenizers import load_tokenizer
from tests.parity.compare import Difference, cases, compare, differences

GOLDEN = Path(__file__).parent / "parity" / "golden"
UNKNOWN = 2  # of the T5 tokenizer
OTHER_FORMATS = (
    ("clip-openai-open-clip", "clip-openai"),
    ("clip-laion-open-clip", "clip-laion"),
    ("siglip-big-vision.npz", "siglip"),
    ("siglip-big-vision-scan.npz", "siglip"),
    ("paligemma-big-vision.npz", "paligemma"),
    ("paligemma2-big-vision.npz", "paligemma2"),
)


def check(found: list[Difference]) -> None:
    wrong = [f"{d.output} {d.shape}: {d.error:.1e}" for d in found if not d.agrees]
    assert not wrong, wrong


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def test_there_are_goldens_of_every_family() -> None:
    wanted = {"clip-laion", "clip-openai", "paligemma", "paligemma2", "siglip", "siglip2", "t5", "ul2"}
    assert set(cases(GOLDEN)) == wanted


@pytest.mark.parametrize("name", cases(GOLDEN))
def test_outputs_are_those_of_transformers(name: str) -> None:
    check(compare(GOLDEN / name, GOLDEN / f"{name}.npz")[1])


@pytest.mark.parametrize(("path", "name"), OTHER_FORMATS)
def test_other_formats_hold_the_same_model(path: str, name: str) -> None:
    model = load_pretrained(GOLDEN / path, dtype="float32")
    check(differences(model, golden(name), big_vision=path.endswith(".npz")))


@pytest.mark.parametrize("name", cases(GOLDEN))
def test_an_exported_model_loads_again(name: str, tmp_path: Path) -> None:
    model = load_pretrained(GOLDEN / name, dtype="float32")
    save_pretrained(model, tmp_path / "exported")
    again = load_pretrained(tmp_path / "exported", dtype="float32")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


def test_an_exported_gemma2_has_the_settings_that_transformers_takes(tmp_path: Path) -> None:
    model = load_pretrained(GOLDEN / "paligemma2", dtype="float32")
    save_pretrained(model, tmp_path / "exported")
    settings = json.loads((tmp_path / "exported" / "config.json").read_text())
    scalar = settings["text_config"]["query_pre_attn_scalar"]
    assert (scalar, type(scalar)) == (10, int)
    assert settings["image_token_index"] == settings["text_config"]["vocab_size"]
    assert settings["eos_token_id"] == 1  # transformers' generate ends there
    assert isinstance(model.config, VLMConfig)
    assert isinstance(model.config.language, GemmaConfig)
    language = dataclasses.replace(model.config.language, query_scale=0.3)
    with pytest.raises(ValueError, match=r"query_scale 0\.3"):
        to_paligemma(dataclasses.replace(model.config, language=language))


@pytest.mark.parametrize("kind", ["t5", "siglip", "paligemma", "clip", "clip of two files"])
def test_tokenizers_give_the_ids_of_transformers(kind: str, tmp_path: Path) -> None:
    goldens = json.loads((GOLDEN / "tokenizers.json").read_text(encoding="utf-8"))
    name = {"paligemma": "gemma"}.get(kind, kind.split()[0])
    folder = GOLDEN / f"tokenizer-{ {'siglip': 't5'}.get(name, name) }"
    if kind == "clip of two files":
        for file in ("vocab.json", "merges.txt"):
            shutil.copyfile(folder / file, tmp_path / file)
        folder = tmp_path
    tokenizer = load_tokenizer(folder, kind.split()[0])
    length = 1 + max(map(len, goldens[name]["ids"]))
    for text, ids, decoded in zip(goldens["texts"], goldens[name]["ids"], goldens[name]["decoded"], strict=True):
        if kind == "paligemma":
            (row,) = tokenizer.encode_prompts([text], length)
        else:
            row = tokenizer.encode(text, length, bos=True)
        np.testing.assert_array_equal(row, ids + [tokenizer.pad_id] * (length - len(ids)), err_msg=repr(text))
        if name in ("gemma", "clip") or UNKNOWN not in ids:  # unknown pieces, the libraries write differently
            assert tokenizer.decode(row[int(name == "clip") :]).strip() == decoded.strip(), text


def test_goldens_are_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 5 * 2**20
