"""Finds transformers and VAEs on the disk: reads configs, opens files, compares names. Reads no tensor."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stdit.errors import StditError
from stdit.files import part_folder
from stdit.vae.families.diffusers_vae import VaeFolder
from stdit.weights.families import class_names, diffusers_vaes, families, recognised, table_of, titles
from stdit.weights.families.record import Family
from stdit.weights.identity import files_identity, folder_identity
from stdit.weights.keymap import Table
from stdit.weights.quantised import scaled
from stdit.weights.refused import check_known, check_no_adapter
from stdit.weights.tensor_files import NoWeights, TensorFiles, open_file, open_folder, read_json

EXPERT_NAMES = ("high", "low")  # of Wan 2.2 A14B
_EXPERT_FOLDERS = {"diffusers": ("transformer", "transformer_2"), "original": ("high_noise_model", "low_noise_model")}
OTHER_MODELS = ("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.", "conditioner.")
PREFIXES = (
    "model.diffusion_model.", "diffusion_model.", "first_stage_model.", "module.", "transformer.", "dit.", "net.",
    "model.",
)  # fmt: skip
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # torch's, in names
_OTHERS = re.compile(r"t5|clip|text_encoder|tokenizer|lora|adapter", re.IGNORECASE)
_VAE = re.compile(r"vae", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """A model on the disk: its config is read, its files are open, its names are compared; no tensor is read."""

    kind: str  # "transformer" or "vae"
    family: Family
    files: TensorFiles
    config: Any
    config_path: Path | None
    dialect: str
    table: Table

    @property
    def parameters(self) -> int:
        return sum(math.prod(entry.shape) for entry in self.files.entries.values())


def holds(kind: str, path: str | os.PathLike[str], trust_pickle: bool = False) -> bool:
    """Whether a transformer or VAE is at `path`, by folder and tensor names. Raises if files cannot be opened."""
    place = Path(path).expanduser()
    if (place / kind).is_dir() or (place / "model_index.json").is_file():
        return (place / kind).is_dir()
    try:
        files = _opened(kind, place, trust_pickle)
    except NoWeights:
        return False
    return any(family.dialect_of(files.shapes) for family in families(kind))


def find(
    kind: str, path: str | os.PathLike[str], trust_pickle: bool = False, strict: bool = True, heads: int | None = None
) -> Source:
    """Opens a transformer or VAE without reading a tensor.

    strict: raise StditError if its tensors are not those of its config.
    heads: the number of heads, for a transformer without a config.json.
    """
    files = _opened(kind, Path(path).expanduser(), trust_pickle)
    check_no_adapter(files.entries, files.path)
    found, config_path = _config(kind, files)
    if kind == "transformer":
        check_known(found.get("_class_name"), files.entries, config_path or files.path)
    try:
        return _source(kind, files, found, config_path, strict, heads)
    except StditError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        # A value in the config has an unexpected type, or gives a size that no tensor can have.
        raise StditError(f"{config_path or files.path}: not a valid config of a {kind} ({error}).") from error


def other_vae(path: str | os.PathLike[str]) -> VaeFolder | None:
    """The autoencoder at `path` if it is one that diffusers runs. Its files are checked."""
    folder = part_folder(path, "vae")
    path = folder / "config.json"
    name = str(read_json(path).get("_class_name")) if path.is_file() else ""
    traits = diffusers_vaes().get(name)
    if traits is None:
        return None
    open_folder(folder)  # raises for damaged files before anything is read
    return VaeFolder(folder, name, traits)


def expert_folders(layout: str) -> dict[str, str]:
    """The name of each expert's folder in a layout."""
    return dict(zip(EXPERT_NAMES, _EXPERT_FOLDERS["diffusers" if layout == "diffusers" else "original"]))


def expert_places(folder: Path) -> dict[str, Path] | None:
    """The paths of a folder's two experts; None if it has none."""
    for names in _EXPERT_FOLDERS.values():
        if all((folder / name).is_dir() for name in names):
            return {expert: folder / name for expert, name in zip(EXPERT_NAMES, names)}
    return None


def boundary_of(folder: Path, from_image: bool) -> float:
    """The noise level between a folder's experts: model_index.json's boundary_ratio, else Wan 2.2's."""
    path = folder / "model_index.json"
    if not path.is_file():
        return 0.9 if from_image else 0.875  # I2V-A14B's, T2V-A14B's
    found: Any = read_json(path).get("boundary_ratio")
    if type(found) not in (int, float) or not 0 < found < 1:
        raise StditError(f"{path}: boundary_ratio is {found!r}; it must be a noise level between 0 and 1.")
    return float(found)


def expert_adapter_places(folder: Path) -> dict[str, Path]:
    """The path of each expert's adapter (LoRA) in an exported model folder; an expert that did not train has none."""
    return {expert: folder / "lora" / name for expert, name in expert_folders("diffusers").items()}


def transformer_identity(sources: Iterable[Source]) -> tuple[str, str]:
    """SHA-256 (hex) of the weights of one or more transformers, and SHA-256 of their configs."""
    sources = list(sources)
    weights = [folder_identity(file) for source in sources for file in source.files.files]
    configs = [source.config_path for source in sources if source.config_path is not None]
    return hashlib.sha256("".join(weights).encode()).hexdigest(), files_identity(configs)


def _source(
    kind: str, files: TensorFiles, found: dict[str, Any], config_path: Path | None, strict: bool, heads: int | None
) -> Source:
    family = recognised(kind, found, files.shapes)
    dialect = family.dialect_of(files.shapes)
    place = config_path or files.path
    others = [other.title for other in families(kind) if not dialect and other.dialect_of(files.shapes)]
    if found and others:
        raise StditError(
            f"{files.path}: these tensors are for the {others[0]}, {config_path or 'the config in its metadata'} "
            f"is for the {family.title}. Put the config.json of the weights beside them."
        )
    if found or dialect:
        config = family.config_from(found, files.shapes, place, **({} if heads is None else {"heads": heads}))
        if heads is not None and config.heads != heads:
            raise StditError(f"{place}: says {config.heads} heads, not {heads}.")
    if not dialect:
        names = ", ".join(list(files.entries)[:3]) + (", …" if len(files.entries) > 3 else "")
        known = ", ".join(titles(kind))
        raise StditError(f"{files.path}: of no known family ({known}): its tensors are named {names or '(none)'}.")
    table = table_of(config, dialect)
    if strict:
        where = f"the config {config_path} is of other weights" if config_path else "these are other weights"
        table.check(files.shapes, files.path, f"The file is damaged, or {where}: get both from the same place again.")
    return Source(kind, family, files, config, config_path, dialect, table)


def _opened(kind: str, place: Path, trust_pickle: bool) -> TensorFiles:
    """The files of a model of this kind, without other programs' prefixes."""
    if not place.exists():
        raise StditError(f"{place}: no such file or folder.")
    files = open_file(place, trust_pickle) if place.is_file() else _in_folder(kind, place, trust_pickle)
    unwrapped = {_WRAPPERS.sub("", name): entry for name, entry in files.entries.items()}
    if len(unwrapped) == len(files.entries):
        files = replace(files, entries=unwrapped)
    files = scaled(files)
    if kind == "transformer":
        files = files.without_others(PREFIXES, OTHER_MODELS)
    return files.without_prefix(PREFIXES)


def _in_folder(kind: str, folder: Path, trust_pickle: bool) -> TensorFiles:
    if kind == "transformer" and (experts := expert_places(folder)):
        names = " and ".join(f"{place.name}/" for place in experts.values())
        raise StditError(f"{folder}: holds two models, {names} (Wan 2.2 A14B). Name one of them.")
    if (folder / kind).is_dir():
        return open_folder(folder / kind, trust_pickle)
    if (folder / "base.json").is_file():
        raise StditError(
            f"{folder}: is an adapter (LoRA); base.json names its base model. Name that model, or export a merged "
            "model by training with model.lora.merged=true."
        )
    if (folder / "model_index.json").is_file():
        raise StditError(f"{folder}: is a model folder without {kind}/.")
    if kind == "vae":
        named = any(_VAE.search(entry.name) and entry.is_file() for entry in folder.iterdir())
        return open_folder(folder, trust_pickle, lambda name: bool(_VAE.search(name)) or not named)
    try:
        return open_folder(folder, trust_pickle, lambda name: not (_VAE.search(name) or _OTHERS.search(name)))
    except NoWeights:
        for file in sorted(folder.glob("*.safetensors")):
            check_no_adapter(open_file(file).entries, file, NoWeights)
        raise


def _config(kind: str, files: TensorFiles) -> tuple[dict[str, Any], Path | None]:
    """The config.json beside the weights, or what the weights' own metadata carries, or nothing."""
    path = files.path.parent / "config.json"
    if path.is_file():
        found = read_json(path)
        index = path.parent.parent / "model_index.json"
        if kind == "transformer" and index.is_file():  # some families say something only there
            found["_pipeline"] = read_json(index).get("_class_name")
        if kind == "transformer" or found.get("_class_name") not in class_names("transformer"):
            return found, path
    for key in ("stdit_config", "config"):  # ours; LTX-Video's, for every model in the file
        if carried := files.metadata.get(key):
            try:
                document: Any = json.loads(carried)
            except json.JSONDecodeError as error:
                raise StditError(f"{files.path}: {key} in its metadata is not valid JSON ({error}).") from None
            if key == "config" and isinstance(document, dict):
                document = document.get(kind)
            if isinstance(document, dict):
                return document, None
    return {}, None
