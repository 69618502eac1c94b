"""Tokenizers of public checkpoints, from the files that come with them: SentencePiece, tokenizer.json, CLIP's BPE."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from pyvdl.text import WordTokenizer

_SENTENCEPIECE = ("tokenizer.model", "spiece.model")
_FILES = (*_SENTENCEPIECE, "tokenizer.json", "vocab.json", "merges.txt")
_KINDS = ("clip", "siglip", "paligemma", "t5")


class Tokenizer(Protocol):
    """What models and recipes ask of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def pad_id(self) -> int:
        """Stands behind a text, up to the length asked for."""

    @property
    def end_id(self) -> int:
        """Of a text."""

    def encode(self, text: str, length: int, *, bos: bool = False) -> np.ndarray:
        """Returns int32[length]: the ids of `text`, its end, padding. `bos`: for a text tower that wants a beginning.

        A long text never loses its end.
        """

    def encode_batch(self, texts: Sequence[str], length: int, *, bos: bool = False) -> np.ndarray:
        """Returns int32[N, length], one row per text."""

    def encode_prompts(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Returns int32[N, length]: what a language model reads before it answers."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text up to the first end, without special tokens."""

    def digest(self) -> str:
        """Names the tokenizer by what is in it."""

    def save(self, path: Path) -> None:
        """Writes what `load_tokenizer` reads into a folder that is there."""


class Pieces(Protocol):
    """A library's tokenizer: text to ids and back, without special tokens."""

    vocab_size: int

    def ids(self, text: str) -> list[int]: ...

    def text(self, ids: list[int]) -> str: ...

    def name(self, id: int) -> str:
        """Of a token, as the file has it."""


class _SentencePieces:
    def __init__(self, path: Path) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise ImportError(f"{path} needs the package: pip install 'sentencepiece>=0.2'") from error
        self._model = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{path} is no SentencePiece model ({error}): download it again") from None
        self.vocab_size = self._model.GetPieceSize()

    def ids(self, text: str) -> list[int]:
        return self._model.EncodeAsIds(text)

    def text(self, ids: list[int]) -> str:
        return self._model.DecodeIds([i for i in ids if i < self.vocab_size and i != self._model.unk_id()]).strip()

    def name(self, id: int) -> str:
        return self._model.IdToPiece(id)


class _HuggingFacePieces:
    def __init__(self, path: Path) -> None:
        tokenizers = _tokenizers(path)
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no other type
            raise ValueError(f"{path} is no tokenizer.json ({error}): download it again") from None
        self._model.no_padding()
        self._model.no_truncation()
        self.vocab_size = self._model.get_vocab_size()

    def ids(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def text(self, ids: list[int]) -> str:
        return self._model.decode(ids).replace("</w>", " ").strip()  # which ends a word of CLIP's

    def name(self, id: int) -> str:
        return self._model.id_to_token(id)


class _ClipPieces(_HuggingFacePieces):
    """From vocab.json and merges.txt alone."""

    def __init__(self, folder: Path) -> None:
        tokenizers = _tokenizers(folder / "vocab.json")
        from tokenizers import decoders, models, normalizers, pre_tokenizers

        vocab, merges = folder / "vocab.json", folder / "merges.txt"
        try:
            bpe = models.BPE.from_file(str(vocab), str(merges), end_of_word_suffix="</w>", unk_token="<|endoftext|>")
        except Exception as error:  # the library raises no other type
            raise ValueError(f"{vocab} and {merges.name} are no BPE ({error}): download them again") from None
        self._model = tokenizers.Tokenizer(bpe)
        spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
        self._model.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
        words = tokenizers.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
        self._model.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        self._model.decoder = decoders.ByteLevel()
        self.vocab_size = self._model.get_vocab_size()


def _tokenizers(path: Path) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"{path} needs the package: pip install 'tokenizers>=0.21'") from error
    return tokenizers


class Frame(NamedTuple):
    """What a family of models puts around and does to a text."""

    pad_id: int
    end_id: int
    begin: tuple[int, ...] = ()  # of every text of a text tower
    prompt_begin: tuple[int, ...] = ()
    prompt_end: str | None = None  # None: the end of a text
    lower: bool = False
    bare: bool = False  # no punctuation, single spaces


class PretrainedTokenizer:
    """A checkpoint's own tokenizer, see Tokenizer."""

    def __init__(self, pieces: Pieces, frame: Frame, folder: Path) -> None:
        self._pieces, self._frame, self._folder = pieces, frame, folder

    @property
    def vocab_size(self) -> int:
        return self._pieces.vocab_size

    @property
    def pad_id(self) -> int:
        return self._frame.pad_id

    @property
    def end_id(self) -> int:
        return self._frame.end_id

    def encode(self, text: str, length: int, *, bos: bool = False) -> np.ndarray:
        begin = self._frame.begin if bos else ()
        return self._row(begin, self._ids(text), (self._frame.end_id,), length)

    def encode_batch(self, texts: Sequence[str], length: int, *, bos: bool = False) -> np.ndarray:
        return np.stack([self.encode(text, length, bos=bos) for text in texts])

    def encode_prompts(self, texts: Sequence[str], length: int) -> np.ndarray:
        frame = self._frame
        end = [frame.end_id] if frame.prompt_end is None else self._pieces.ids(frame.prompt_end)
        return np.stack([self._row(frame.prompt_begin, self._ids(text), end, length) for text in texts])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        found = np.asarray(ids).tolist()
        if self.end_id in found:
            found = found[: found.index(self.end_id)]
        return self._pieces.text([i for i in found if i != self.pad_id])

    def digest(self) -> str:
        digest = hashlib.sha256(repr(self._frame).encode())
        for name in _FILES:
            if (self._folder / name).exists():
                digest.update((self._folder / name).read_bytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        for name in _FILES:
            if (self._folder / name).exists():
                shutil.copyfile(self._folder / name, path / name)
        (path / "tokenizer_frame.json").write_text(json.dumps(self._frame._asdict()) + "\n", encoding="utf-8")

    def _ids(self, text: str) -> list[int]:
        if self._frame.lower:
            text = text.lower()
        if self._frame.bare:
            text = " ".join(text.translate(str.maketrans("", "", string.punctuation)).split())
        return self._pieces.ids(text)

    def _row(self, begin: Sequence[int], ids: list[int], end: Sequence[int], length: int) -> np.ndarray:
        room = length - len(begin) - len(end)
        if room < 0:
            raise ValueError(f"length={length}: expected at least {len(begin) + len(end)}")
        row = np.full(length, self._frame.pad_id, np.int32)
        found = [*begin, *ids[:room], *end]
        row[: len(found)] = found
        return row


def load_tokenizer(folder: str | os.PathLike[str], kind: str | None = None) -> Tokenizer:
    """Reads the tokenizer of a checkpoint from its folder, or what `save` wrote.

    kind: "clip", "siglip", "paligemma" or "t5"; None reads it from what `save` or config.json says. Raises ValueError
    naming the files that are looked for.
    """
    where = Path(folder)
    saved = where / "tokenizer_frame.json"
    if kind is None and saved.exists():
        found = json.loads(saved.read_text(encoding="utf-8"))
        parts: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in found.items()}
        frame = Frame(**parts)
        return PretrainedTokenizer(_pieces(where), frame, where)
    if kind is None and _is_word_tokenizer(where / "tokenizer.json"):
        return WordTokenizer.load(where / "tokenizer.json")
    kind = kind or _kind(where / "config.json")
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {_KINDS}, not {kind!r}")
    pieces = _pieces(where)
    frame, names = _frame(kind, pieces)
    for i, name in names.items():
        if pieces.name(i) != name:
            raise ValueError(
                f"{where}: the tokenizer there is none of {kind}, its token {i} is {pieces.name(i)!r}, not {name!r}: "
                "put the checkpoint's own there"
            )
    return PretrainedTokenizer(pieces, frame, where)


def _pieces(folder: Path) -> Pieces:
    # tokenizer.json first: where both are there, it is what transformers reads.
    if (folder / "tokenizer.json").exists():
        return _HuggingFacePieces(folder / "tokenizer.json")
    for name in _SENTENCEPIECE:
        if (folder / name).exists():
            return _SentencePieces(folder / name)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _ClipPieces(folder)
    raise ValueError(f"{folder} has no tokenizer: put tokenizer.json, {', '.join(_SENTENCEPIECE)} or vocab.json there")


def _frame(kind: str, pieces: Pieces) -> tuple[Frame, dict[int, str]]:
    """And what the tokens must be called that it speaks of: those of another tokenizer mean something else."""
    match kind:
        case "clip":
            begin, end = pieces.vocab_size - 2, pieces.vocab_size - 1
            names = {begin: "<|startoftext|>", end: "<|endoftext|>"}
            return Frame(pad_id=end, end_id=end, begin=(begin,), lower=True), names
        case "siglip" if pieces.name(1) == "<eos>":  # SigLIP 2, with Gemma's tokens
            return Frame(pad_id=0, end_id=1, lower=True), {0: "<pad>"}
        case "siglip":
            return Frame(pad_id=1, end_id=1, lower=True, bare=True), {1: "</s>"}
        case "paligemma":
            names = {0: "<pad>", 1: "<eos>", 2: "<bos>"}
            return Frame(pad_id=0, end_id=1, prompt_begin=(2,), prompt_end="\n"), names
    return Frame(pad_id=0, end_id=1), {0: "<pad>", 1: "</s>"}


def _kind(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("model_type", "")
    except FileNotFoundError:
        raise ValueError(f"{path} is not there: tell load_tokenizer the kind, one of {_KINDS}") from None
    return {"siglip2": "siglip"}.get(found, found)


def _is_word_tokenizer(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open(encoding="utf-8") as file:
        return "pyvdl-word-tokenizer" in file.read(200)
