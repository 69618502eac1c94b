"""Public checkpoints in and out: CLIP, SigLIP, PaliGemma and T5, from safetensors and from big_vision's npz.

Files are read one layer of one parameter at a time, and each process keeps its own shards of it, so that beside the
model itself a host holds about one of the file's arrays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from pyvdl.config import DualEncoderConfig, GemmaConfig, T5Config, ViTConfig, VLMConfig
from pyvdl.storage import sync_folder

from . import weight_configs, weight_names
from .dual_encoder import DualEncoder
from .t5 import T5
from .vit import ViT, resample_patches, resample_positions
from .vlm import VLM
from .weight_names import Rule

type Model = DualEncoder | VLM | T5
type Config = DualEncoderConfig | VLMConfig | T5Config
type Place = Callable[[str, tuple[int, ...]], Sharding]

# Arrays that files have beside the weights, or twice: nothing is lost with them. The last three are OpenAI's settings.
_IGNORED = (
    "position_ids",
    "lm_head.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "input_resolution",
    "context_length",
    "vocab_size",
)
_RESAMPLED = ("vision.position", "vision.patch.kernel")
_SHARD_BYTES = 4 << 30  # of a file that is written, if more than one array is in it


class Source(Protocol):
    """Named arrays that are read when asked for."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray: ...


class _Safetensors:
    """The *.safetensors files of a folder, or one of them. transformers' newer names become its older ones."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise ImportError("reading safetensors needs the package: pip install 'safetensors>=0.6'") from error
        files = [path] if path.is_file() else _weight_files(path)
        self._places: dict[str, tuple[Any, str]] = {}
        self.shapes = {}
        for file in files:
            try:
                opened = stack.enter_context(safe_open(file, framework="numpy"))
            except Exception as error:  # the library lets through what its parts raise
                raise ValueError(f"{file} cannot be read as safetensors ({error}): download it again") from error
            for stored in opened.keys():  # noqa: SIM118, it is no dict
                name = _older_name(stored)
                self._places[name] = opened, stored
                self.shapes[name] = tuple(opened.get_slice(stored).get_shape())

    def read(self, name: str) -> np.ndarray:
        opened, stored = self._places[name]
        return opened.get_tensor(stored)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = _json(index).get("weight_map")
        if not isinstance(files, dict):
            raise ValueError(f"{index} is damaged, it has no weight_map: download it again")
        names = sorted(set(files.values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which {index.name} names: download them too")
        return [folder / name for name in names]
    for name in ("model.safetensors", "open_clip_model.safetensors"):
        if (folder / name).exists():
            return [folder / name]
    raise ValueError(f"{folder} has no model.safetensors: convert the weights to that format, pickles are not read")


def _older_name(name: str) -> str:
    """PaliGemma's as transformers wrote them before its version 4.52."""
    name = name.removeprefix("model.") if name.startswith(("model.vision_tower", "model.multi_modal")) else name
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        return "vision_tower.vision_model." + name.removeprefix("vision_tower.")
    return name


class _Npz:
    """big_vision's npz."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        try:
            self._file = stack.enter_context(np.load(path))
        except (ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} cannot be read as npz ({error}): download it again") from error
        self._stored = {name.removeprefix("params/"): name for name in self._file.files}
        self.shapes = {name: _npy_shape(self._file.zip, f"{stored}.npy") for name, stored in self._stored.items()}

    def read(self, name: str) -> np.ndarray:
        found = self._file[self._stored[name]]
        return found.view(ml_dtypes.bfloat16) if found.dtype == np.dtype("V2") else found


def _npy_shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)[0]


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    param_dtype: Literal["bfloat16", "float32"] = "float32",
    image_size: int | None = None,
    patch_size: int | None = None,
    place: Place | None = None,
) -> Model:
    """Reads a public checkpoint: CLIP and SigLIP as DualEncoder, PaliGemma as VLM, T5 v1.1, Flan-T5 and UL2 as T5.

    Args:
        path: a folder with config.json and safetensors as transformers writes it, with OpenCLIP's files or with
            OpenAI's names in model.safetensors; or big_vision's npz file.
        dtype: of activations.
        param_dtype: parameters are stored in.
        image_size, patch_size: of the frames to be read, when others than the checkpoint's: positions and patches are
            resampled.
        place: the sharding of a parameter by its name and shape; None puts all on the default device.

    Raises:
        ValueError: not such a checkpoint; or arrays are missing, left over or of another shape, all of them named.
    """
    where = Path(path)
    if not where.exists():
        raise ValueError(f"{where} is not there: name a public checkpoint's folder or npz file")
    if (where / "params").exists():
        raise ValueError(f"{where} is no public checkpoint but a saved model: pyvdl.checkpoint.load_model reads it")
    with contextlib.ExitStack() as stack:
        source: Source
        if where.suffix == ".npz":
            source = _Npz(where, stack)
            config, rules = _of_npz(where, source, dtype)
        else:
            source = _Safetensors(where, stack)
            config, rules = _of_safetensors(where, source, dtype)
        resized = _resized(config, image_size, patch_size)
        graph, state = nnx.split(nnx.eval_shape(lambda: _make(resized)))
        flat = dict(nnx.to_flat_state(state))
        paths = {".".join(map(str, path)): path for path in flat}
        shapes = {name: tuple(flat[path].shape) for name, path in paths.items()}
        _check(str(where), source.shapes, shapes, rules, resized != config)
        made = {
            name: array
            for rule in rules
            for name, array in zip(
                rule.ours, _assemble(source, rule, shapes, jnp.dtype(param_dtype), place), strict=True
            )
        }
    return nnx.merge(graph, nnx.from_flat_state({path: flat[path].replace(made[name]) for name, path in paths.items()}))


def _of_npz(path: Path, source: Source, dtype: Any) -> tuple[Config, list[Rule]]:
    stacked = weight_configs.stacked_towers(source.shapes)
    with _settings_of(path):
        if _any_begins(source.shapes, "llm/"):
            vlm = weight_configs.flax_paligemma(source.shapes, dtype)
            return vlm, list(weight_names.flax_paligemma(vlm, stacked))
        if _any_begins(source.shapes, "txt/"):
            siglip = weight_configs.flax_siglip(source.shapes, dtype)
            return siglip, list(weight_names.flax_siglip(siglip, stacked))
    raise ValueError(f"{path} is neither SigLIP nor PaliGemma: it has {', '.join(sorted(source.shapes)[:5])}, ...")


def _of_safetensors(path: Path, source: Source, dtype: Any) -> tuple[Config, list[Rule]]:
    folder = path.parent if path.is_file() else path
    if _any_begins(source.shapes, "visual."):
        with _settings_of(path):
            config = weight_configs.openai_clip(source.shapes, _json(folder / "open_clip_config.json"), dtype)
        return config, list(weight_names.openai_clip(config))
    described, preprocessor = _json(folder / "config.json"), _json(folder / "preprocessor_config.json")
    with _settings_of(folder / "config.json"):
        match described.get("model_type"):
            case "clip":
                clip = weight_configs.clip(described, preprocessor, dtype)
                return clip, list(weight_names.hf_clip(clip))
            case "siglip" | "siglip2":
                if len(source.shapes.get("vision_model.embeddings.patch_embedding.weight", ())) == 2:
                    raise ValueError("SigLIP 2 of variable resolution (NaFlex) is not read; use a fixed one")
                siglip = weight_configs.siglip(described, preprocessor, dtype)
                return siglip, list(weight_names.hf_siglip(siglip))
            case "paligemma":
                vlm = weight_configs.paligemma(described, preprocessor, dtype)
                return vlm, list(weight_names.hf_paligemma(vlm))
            case "t5" if "lm_head.weight" in source.shapes:
                t5 = weight_configs.t5(described, dtype)
                return t5, list(weight_names.hf_t5(t5))
            case found:
                kinds = "clip, siglip, siglip2, paligemma, t5 (with an output head of its own)"
                raise ValueError(f"model_type {found!r} is not one of {kinds}")


@contextlib.contextmanager
def _settings_of(path: Path) -> Iterator[None]:
    """Names the file in what is wrong with the settings that are read in it."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path} does not say {error}: download it again") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _any_begins(names: Iterable[str], start: str) -> bool:
    return any(name.startswith(start) for name in names)


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON ({error}): download it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged, it holds no JSON object: download it again")
    return found


def _resized[C: Config](config: C, image_size: int | None, patch_size: int | None) -> C:
    if image_size is None and patch_size is None:
        return config
    if isinstance(config, T5Config):
        raise ValueError("image_size and patch_size are for models that see: this is a language model")
    old = config.vision
    vision = dataclasses.replace(old, image_size=image_size or old.image_size, patch_size=patch_size or old.patch_size)
    return dataclasses.replace(config, vision=vision)


def _make(config: Config) -> Model:
    match config:
        case DualEncoderConfig():
            return DualEncoder(config, rngs=nnx.Rngs(0))
        case VLMConfig():
            return VLM(config, rngs=nnx.Rngs(0))
        case T5Config():
            return T5(config, rngs=nnx.Rngs(0))


def _check(
    where: str,
    theirs: Mapping[str, tuple[int, ...]],
    ours: Mapping[str, tuple[int, ...]],
    rules: list[Rule],
    resized: bool,
) -> None:
    """Raises with all that is missing, left over or misshapen, before anything is read."""
    wanted = _expected_shapes(ours, rules)
    free = {name for rule in rules if resized and {*rule.ours} & {*_RESAMPLED} for name in rule.theirs}
    faults = [f"missing {name} {list(shape)}" for name, shape in wanted.items() if name not in theirs]
    faults += [f"unknown {name}" for name in theirs if name not in wanted and not name.endswith(_IGNORED)]
    for name, shape in wanted.items():
        # A number may be a list of one, as in some of OpenCLIP's.
        number = name in theirs and math.prod(shape) == math.prod(theirs[name]) == 1
        if name in theirs and theirs[name] != shape and name not in free and not number:
            faults.append(f"{name} is {list(theirs[name])}, not {list(shape)}")
    if faults:
        raise ValueError(f"{where} does not hold the weights that its settings ask for: {'; '.join(faults)}")


def _expected_shapes(ours: Mapping[str, tuple[int, ...]], rules: list[Rule]) -> dict[str, tuple[int, ...]]:
    """Of their arrays, from the shapes of our parameters."""
    wanted: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        nothing = [np.broadcast_to(np.float32(0), ours[name][1:] if rule.depth else ours[name]) for name in rule.ours]
        for name, piece in zip(rule.theirs, rule.split(*nothing), strict=True):
            if rule.stacked:
                wanted[name] = (rule.depth, *piece.shape)
            elif rule.depth:
                wanted |= {name.format(layer): piece.shape for layer in range(rule.depth)}
            else:
                wanted[name] = piece.shape
    return wanted


def _assemble(
    source: Source, rule: Rule, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, place: Place | None
) -> Iterator[jax.Array]:
    """Our parameters of one rule."""
    shardings = [_sharding(name, shapes[name], place) for name in rule.ours]
    if not rule.depth:
        arrays = rule.join(*map(source.read, rule.theirs))
        for name, array, sharding in zip(rule.ours, arrays, shardings, strict=True):
            yield _put(_resampled(name, array, shapes[name]), dtype, sharding)
        return
    (name,), (sharding,) = rule.ours, shardings
    whole = [source.read(their) for their in rule.theirs] if rule.stacked else []
    zeros = jax.jit(functools.partial(jnp.zeros, shapes[name], dtype), out_shardings=sharding)
    insert = _insert(sharding)
    stack = zeros()
    for layer in range(rule.depth):
        pieces = [x[layer] for x in whole] if whole else [source.read(their.format(layer)) for their in rule.theirs]
        (array,) = rule.join(*pieces)
        stack = insert(stack, _put(array, dtype, _without_layers(sharding)), layer)
    yield stack


def _sharding(name: str, shape: tuple[int, ...], place: Place | None) -> Sharding:
    return place(name, shape) if place else jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


@functools.lru_cache
def _insert(sharding: Sharding) -> Callable[..., jax.Array]:
    return jax.jit(
        lambda stack, x, layer: jax.lax.dynamic_update_index_in_dim(stack, x, layer, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )


def _without_layers(sharding: Sharding) -> Sharding:
    """Of one layer of what has `sharding`."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    layers, *rest = (*sharding.spec, None)
    if layers is not None:
        raise ValueError(f"place must leave axis 0, the layers, whole, not {sharding.spec}")
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*rest[:-1]))


def _put(array: np.ndarray, dtype: np.dtype, sharding: Sharding) -> jax.Array:
    """Only the parts that this process holds are converted and copied."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.asarray(array[index], dtype, order="C"))


def _resampled(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.shape == shape:
        return array
    if name == "vision.position":
        return resample_positions(array, shape[0])
    return resample_patches(array, round((shape[0] / 3) ** 0.5))


def save_pretrained(model: Model | ViT, path: str | os.PathLike[str]) -> None:
    """Writes a folder that `transformers` loads, and `load_pretrained` too; it appears whole or not at all.

    Parameters are written in the type they have. Of a model that transformers has no class for, the parts may have one:
    a `VLM` with a T5 has a T5, and in its `ViT` a SigLIP tower (for transformers only). Raises ValueError for what has
    none, with the settings that would be lost: attention over time, for instance.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ImportError("writing safetensors needs the package: pip install 'safetensors>=0.6'") from error
    described, rules = _described(model)
    values = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(model))}
    target = Path(path).absolute()
    if target.exists():
        raise ValueError(f"{target} is there already: delete it, or name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    temporary.mkdir()
    try:
        files: list[list[str]] = []
        for shard in _shards(values, rules):
            save_file(shard, temporary / f"{len(files)}", metadata={"format": "pt"})
            files.append(list(shard))
        names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        if len(files) == 1:
            names = ["model.safetensors"]
        else:
            index = {"metadata": {}, "weight_map": {name: file for file, held in zip(names, files) for name in held}}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
        for i, name in enumerate(names):
            (temporary / f"{i}").rename(temporary / name)
        (temporary / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        if not isinstance(model, T5):
            vision = model.config if isinstance(model, ViT) else model.config.vision
            preprocessor = weight_configs.to_preprocessor(vision)
            text = json.dumps(preprocessor, indent=2) + "\n"
            (temporary / "preprocessor_config.json").write_text(text, encoding="utf-8")
        sync_folder(temporary)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _described(model: Model | ViT) -> tuple[dict[str, Any], list[Rule]]:
    """What stands in config.json, and the rules of the family. Raises where that would be read as another model."""
    config = model.config
    if isinstance(config, T5Config):
        return weight_configs.to_t5(config), list(weight_names.hf_t5(config))
    vision = config if isinstance(config, ViTConfig) else config.vision
    if vision.num_frames > 1:
        raise ValueError(f"transformers has no model of {vision.num_frames} frames at once: export the image model")
    read: Callable[..., Any]
    match config:
        case ViTConfig():
            described, read = weight_configs.to_siglip_vision(config), weight_configs.siglip_vision
            rules = weight_names.hf_siglip_tower(config, "vision_model", "")
        case DualEncoderConfig(kind="softmax"):
            described, read, rules = (
                weight_configs.to_dual_encoder(config),
                weight_configs.clip,
                weight_names.hf_clip(config),
            )
        case DualEncoderConfig():
            described, read = weight_configs.to_dual_encoder(config), weight_configs.siglip
            rules = weight_names.hf_siglip(config)
        case VLMConfig(language=GemmaConfig()):
            described, read = weight_configs.to_paligemma(config), weight_configs.paligemma
            rules = weight_names.hf_paligemma(config)
        case _:
            raise ValueError("transformers has no model of a tower with a T5: export its parts, .vision and .language")
    again = _settings(read(described, weight_configs.to_preprocessor(vision), "float32"))
    lost = [f"{name} {value}" for name, value in _settings(config).items() if value != again[name]]
    if lost:
        raise ValueError(f"transformers' {described['architectures'][0]} cannot have {', '.join(lost)}")
    return described, list(rules)


def _settings(config: Any, path: str = "") -> dict[str, Any]:
    """By dotted name: those that an image model's outputs depend on."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, value = f"{path}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= _settings(value, f"{name}.")
        elif field.name == "query_scale":
            found[name] = round(value or config.head_dim**-0.5, 9)
        elif field.name not in ("dtype", "remat", "attention", "num_frames", "fps"):
            found[name] = value
    return found


def _shards(values: Mapping[str, Any], rules: list[Rule]) -> Iterator[dict[str, np.ndarray]]:
    """Their arrays by name, as many at a time as go into one file."""
    shard: dict[str, np.ndarray] = {}
    for rule in rules:
        for layer in range(rule.depth or 1):
            ours = [np.asarray(values[name][layer] if rule.depth else values[name][...]) for name in rule.ours]
            for name, array in zip(rule.theirs, rule.split(*ours), strict=True):
                if shard and sum(x.nbytes for x in shard.values()) + array.nbytes > _SHARD_BYTES:
                    yield shard
                    shard = {}
                shard[name.format(layer)] = np.ascontiguousarray(array).reshape(array.shape)
    yield shard
