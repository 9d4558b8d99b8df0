"""Transformers and VAEs from strangers' files and to them, whole or not at all.

Every name and shape is checked against the model before a tensor is read; then each tensor is read once, straight to
its device and dtype, into a model that was built without memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.errors import StditError
from stdit.files import publish
from stdit.weights.experts import EXPERT_NAMES, boundary_of, expert_folders, expert_places
from stdit.weights.families import (
    class_names,
    diffusers_vaes,
    families,
    family_of,
    on_meta,
    recognised,
    shapes_of,
    table_of,
    titles,
)
from stdit.weights.families.record import Family
from stdit.weights.files import Entry, NoWeights, TensorFiles, open_file, open_folder, read_json, write_tensors
from stdit.weights.identity import files_identity, folder_identity
from stdit.weights.keymap import Table
from stdit.weights.layouts import check_layout, describe, dialect_in
from stdit.weights.others import check_known, check_no_adapter
from stdit.weights.quantised import FP8, fp8_count, scaled

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from stdit.models.experts import Experts
    from stdit.models.transformer import STDiT
    from stdit.vae.families.diffusers_vae import VaeFolder
    from stdit.vae.families.open_sora import AnyVAE

SHARD_BYTES = 5_000_000_000
OTHER_MODELS = ("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.", "conditioner.")
PREFIXES = (
    "model.diffusion_model.", "diffusion_model.", "first_stage_model.", "module.", "transformer.", "dit.", "net.",
    "model.",
)  # fmt: skip
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # torch's, in names
_STEM = "diffusion_pytorch_model"
_VAE_STEMS = ("Wan2.1_VAE", "Wan2.2_VAE")  # original releases keep it beside the transformer
_OTHERS = re.compile(r"t5|clip|text_encoder|tokenizer|lora|adapter", re.IGNORECASE)
_VAE = re.compile(r"vae", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """A model found on the disk: config read, files opened, names compared; no tensor read yet."""

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


def load_transformer(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trust_pickle: bool = False,
    expert: str = "both",
    heads: int | None = None,
) -> STDiT | Experts:
    """A transformer from a model folder (stdit's or diffusers'), its transformer/, an original release, or a file.

    dtype: None keeps each tensor's stored dtype; fp8, plain or with scales, becomes bf16. heads: their number, for a
    file alone whose tensors do not tell it. trust_pickle: allows .pth and .bin files, tensors only. expert: of a
    folder with two (Wan 2.2 A14B: transformer/ and transformer_2/, or high_noise_model/ and low_noise_model/), "both"
    as one `Experts`, or "high" or "low" alone, as an STDiT.
    Raises StditError that names the file and the tensors where anything is missing, unexpected, misshaped or damaged,
    and the variant where the weights are of a kind that stdit does not run.
    """
    if expert not in ("both", *EXPERT_NAMES):
        raise StditError(f"expert {expert!r} is not known: both, high or low.")
    places = expert_places(Path(path).expanduser())
    if places is None:
        if expert != "both":
            raise StditError(f"{path}: holds one transformer, not the two experts that {expert!r} would choose from.")
        return load(find("transformer", path, trust_pickle, heads=heads), dtype, device)
    if expert != "both":
        return load(find("transformer", places[expert], trust_pickle, heads=heads), dtype, device)
    sources = {name: find("transformer", place, trust_pickle, heads=heads) for name, place in places.items()}
    if sources["high"].config != sources["low"].config:
        raise StditError(f"{places['high']} and {places['low']} have different configs: they are not two experts.")
    from stdit.models.experts import Experts

    high, low = (load(sources[name], dtype, device) for name in EXPERT_NAMES)
    return Experts(high, low, boundary_of(Path(path).expanduser(), high.config.image_channels > 0))


def load_vae(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trust_pickle: bool = False,
) -> Any:
    """A causal VAE from a model folder, its vae/, an original Wan release, or a file; otherwise as load_transformer.

    A CausalVAE, or Open-Sora's OpenSoraVAE; where config.json names an autoencoder of diffusers
    (`stdit.weights.families.diffusers_vaes`), an OtherVAE, which diffusers runs behind the same methods.
    """
    from stdit.vae.families.diffusers_vae import load_other

    if (other := other_vae(path)) is not None:
        return load_other(other, dtype, device)
    return load(find("vae", path, trust_pickle), dtype, device)


def vae_on_meta(path: str | os.PathLike[str]) -> Any:
    """The VAE that load_vae would load, without memory. No weight is read."""
    from stdit.vae.families.diffusers_vae import other_on_meta

    other = other_vae(path)
    return on_meta(find("vae", path).config) if other is None else other_on_meta(other)


def other_vae(path: str | os.PathLike[str]) -> VaeFolder | None:
    """An autoencoder that diffusers runs, its files checked; None if none is there."""
    from stdit.vae.families.diffusers_vae import VaeFolder

    folder = Path(path).expanduser()
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    path = folder / "config.json"
    name = str(read_json(path).get("_class_name")) if path.is_file() else ""
    traits = diffusers_vaes().get(name)
    if traits is None:
        return None
    open_folder(folder)  # raises for files that are damaged, before anything is read
    return VaeFolder(folder, name, traits)


def save_transformer(
    model: STDiT | Experts, folder: str | os.PathLike[str], layout: str = "diffusers", shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes config.json and safetensors into `folder`, in shards above shard_bytes.

    layout: "diffusers" opens with from_pretrained(folder) of the family's class (WanTransformer3DModel for what stdit
    trains), "original" is a release's, "comfyui" that in one file with its prefix. Of two experts each has a folder in
    `folder`, transformer/ and transformer_2/ or high_noise_model/ and low_noise_model/; the noise level between them is
    model_index.json's (`Pipeline.save`). Raises StditError, before anything is written, that names a setting which the
    layout cannot hold (see stdit/weights/layouts.py).

    What was there before stays until all new files are written beside it; then they are renamed. A process that is
    killed among the renames leaves the old model, the new one, or a folder that does not load: never a mixture.
    """
    from stdit.models.experts import Experts

    if isinstance(model, Experts):
        for name, expert in zip(expert_folders(layout).values(), (model.high, model.low)):
            _save("transformer", expert, Path(folder) / name, layout, shard_bytes)
    else:
        _save("transformer", model, Path(folder), layout, shard_bytes)


def save_vae(
    vae: AnyVAE, folder: str | os.PathLike[str], layout: str = "diffusers", shard_bytes: int = SHARD_BYTES
) -> None:
    """As save_transformer. "diffusers" opens with AutoencoderKLWan.from_pretrained(folder); "original" is one file,
    Wan2.1_VAE.safetensors (Wan2.2_VAE where levels have shortcuts), which carries our config in its metadata. Of
    Open-Sora's both are the same, config.json and its own tensors."""
    from stdit.vae.families.diffusers_vae import OtherVAE

    if isinstance(vae, OtherVAE):
        if layout != "diffusers":
            raise StditError(f"layout {layout!r}: a {vae.config.name} is written as diffusers has it only.")
        vae.module.save_pretrained(folder)
    else:
        _save("vae", vae, Path(folder), layout, shard_bytes)


def holds(kind: str, path: str | os.PathLike[str], trust_pickle: bool = False) -> bool:
    """Whether a transformer or VAE is at `path`, by folder and tensor names. Raises where files cannot be opened."""
    place = Path(path).expanduser()
    if (place / kind).is_dir() or (place / "model_index.json").is_file():
        return (place / kind).is_dir()
    try:
        _, files = _opened(kind, place, trust_pickle)
    except NoWeights:
        return False
    return any(family.dialect_of(files.shapes) for family in families(kind))


def find(
    kind: str,
    path: str | os.PathLike[str],
    trust_pickle: bool = False,
    strict: bool = True,
    heads: int | None = None,
) -> Source:
    """Opens a transformer or VAE without reading a tensor. strict: raise if its tensors are not those of its config.
    heads: of a transformer without a config."""
    folder, files = _opened(kind, Path(path).expanduser(), trust_pickle)
    check_no_adapter(files.entries, files.path)
    found, config_path = _config(kind, folder, files)
    if kind == "transformer":
        check_known(found.get("_class_name"), files.entries, config_path or files.path)
    try:
        return _source(kind, files, found, config_path, strict, heads)
    except StditError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        # A value of another type than any family's code expects of its config, or a size that no tensor has.
        raise StditError(
            f"{config_path or files.path}: not a config of a {kind} that can be read ({error}). Is it damaged?"
        ) from error


def transformer_identity(paths: Iterable[str | os.PathLike[str]]) -> tuple[str, str]:
    """SHA-256 (hex) of the weights of one or more transformers, and of their configs."""
    found = [find("transformer", path) for path in paths]
    weights = [folder_identity(file) for one in found for file in one.files.files]
    configs = [one.config_path for one in found if one.config_path is not None]
    return hashlib.sha256("".join(weights).encode()).hexdigest(), files_identity(configs)


def _source(
    kind: str, files: TensorFiles, found: dict[str, Any], config_path: Path | None, strict: bool, heads: int | None
) -> Source:
    family = recognised(kind, found, files.shapes)
    dialect = family.dialect_of(files.shapes)
    others = [other.title for other in families(kind) if not dialect and other.dialect_of(files.shapes)]
    if found and others:
        raise StditError(
            f"{files.path}: these tensors are of a {others[0]}, {config_path or 'the config in its metadata'} "
            f"is of a {family.title}. Put the config.json of the weights beside them."
        )
    config = None
    if found or dialect:
        options = {} if heads is None else {"heads": heads}
        config = family.config_from(found, files.shapes, config_path or files.path, **options)
    if config is not None and heads is not None and config.heads != heads:
        raise StditError(f"{config_path or files.path}: says {config.heads} heads, not {heads}.")
    if config is None or not dialect:
        known = ", nor a ".join(titles(kind))
        raise StditError(f"{files.path}: not a {known}: its tensors are named {_some(files.entries)}.")
    table = family.keymap(config, dialect).table(shapes_of(on_meta(config)))
    if strict:
        where = f"the config {config_path} is of other weights" if config_path else "these are other weights"
        table.check(files.shapes, files.path, f"The file is damaged, or {where}: get both from the same place again.")
    return Source(kind, family, files, config, config_path, dialect, table)


def load(source: Source, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Any:
    """Reads a source's tensors into its model. Peak memory is the model and one tensor.

    What is on the CPU in its stored dtype and order stays a private view of the file; see stdit/weights/files.py.
    """
    import torch

    model = on_meta(source.config)
    files = source.files
    if count := fp8_count(files):  # nothing computes in fp8 here
        of = f"{count} of {len(files.entries)} tensors are fp8" + (", with scales" if files.scales else "")
        print(f"{files.path}: {of}; they are computed in {_short(dtype or torch.bfloat16)}.", file=sys.stderr)

    def wanted(name: str) -> torch.dtype | None:
        return torch.bfloat16 if files.entries[name].dtype in FP8 or name in files.scales else None

    tensors: dict[str, Tensor] = {}
    for move in source.table.moves:
        stored = [files.read(name) for name in move.foreign]
        there = {tensor.untyped_storage().data_ptr() for tensor in stored}
        for name, tensor in zip(move.native, move.to_native(stored)):
            kept = wanted(move.foreign[0]) if dtype is None else dtype
            tensors[name] = tensor.to(device, kept if tensor.is_floating_point() else None).contiguous()
        if there.isdisjoint(tensors[name].untyped_storage().data_ptr() for name in move.native):
            for name in move.foreign:
                files.release(name)
    model.load_state_dict(tensors, strict=True, assign=True)
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not left or str(device) == "meta", (
        f"{type(model).__name__}: {left} are neither in the state dict nor made when used"
    )
    return model


def convert(
    source: Source,
    folder: str | os.PathLike[str],
    layout: str,
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a source in another layout, a tensor in memory at a time. dtype: of its numbers, None as they are."""
    import torch

    files = source.files

    def stored(name: str) -> torch.dtype:
        found: torch.dtype = torch.bfloat16 if name in files.scales else getattr(torch, files.entries[name].dtype)
        return dtype if dtype is not None and found.is_floating_point else found

    def read(name: str) -> Tensor:
        tensor = files.read(name).to(stored(name), copy=True)
        files.release(name)
        return tensor

    dtypes = {native: stored(move.foreign[0]) for move in source.table.moves for native in move.native}
    _write(source.kind, source.config, source.table.native_reader(read), dtypes, Path(folder), layout, shard_bytes)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def _opened(kind: str, place: Path, trust_pickle: bool) -> tuple[Path, TensorFiles]:
    """The folder of a model of this kind and its files, names freed of other programs' prefixes."""
    if not place.exists():
        raise StditError(f"{place}: no such file or folder.")
    if place.is_file():
        folder, files = place.parent, open_file(place, trust_pickle)
    else:
        folder, files = _in_folder(kind, place, trust_pickle)
    files = scaled(files.renamed(lambda name: _WRAPPERS.sub("", name)))
    if kind == "transformer":
        files = files.without_others(PREFIXES, OTHER_MODELS)
    return folder, files.without_prefix(PREFIXES)


def _in_folder(kind: str, folder: Path, trust_pickle: bool) -> tuple[Path, TensorFiles]:
    """The folder that holds a model of this kind, and its files."""
    if (folder / kind).is_dir():
        if (folder / f"{kind}_2").is_dir():
            raise StditError(f"{folder}: holds two models, {kind}/ and {kind}_2/ (Wan 2.2 A14B). Name one of them.")
        return folder / kind, open_folder(folder / kind, trust_pickle)
    if (folder / "base.json").is_file():
        raise StditError(
            f"{folder}: is an adapter (LoRA); its base.json names the model below it. Where a whole one is wanted, "
            "train with model.lora.merged=true, or name that model."
        )
    if (folder / "model_index.json").is_file():
        raise StditError(f"{folder}: is a model folder without {kind}/.")
    if kind == "transformer" and (folder / "high_noise_model").is_dir():
        raise StditError(
            f"{folder}: holds two models, high_noise_model/ and low_noise_model/ (Wan 2.2). Name one of them."
        )
    if kind == "transformer":
        try:
            return folder, open_folder(
                folder, trust_pickle, lambda name: not (_VAE.search(name) or _OTHERS.search(name))
            )
        except NoWeights:
            for file in sorted(folder.glob("*.safetensors")):
                check_no_adapter(open_file(file).entries, file, NoWeights)
            raise
    named = any(_VAE.search(entry.name) and entry.is_file() for entry in folder.iterdir())
    return folder, open_folder(folder, trust_pickle, lambda name: bool(_VAE.search(name)) or not named)


def _config(kind: str, folder: Path, files: TensorFiles) -> tuple[dict[str, Any], Path | None]:
    """The config.json beside the weights, or what the weights' own metadata carries, or nothing."""
    path = folder / "config.json"
    if path.is_file():
        found = read_json(path)
        index = folder.parent / "model_index.json"
        if kind == "transformer" and index.is_file():  # what some families tell only there
            found["_pipeline"] = read_json(index).get("_class_name")
        others = class_names("transformer") if kind == "vae" else []
        if found.get("_class_name") not in others:
            return found, path
    for key in ("stdit_config", "config"):  # ours, and what LTX-Video's single files carry for every model in them
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


def _save(kind: str, model: nn.Module, folder: Path, layout: str, shard_bytes: int) -> None:
    state = model.state_dict()
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    _write(kind, model.config, state.__getitem__, dtypes, folder, layout, shard_bytes)


def _write(
    kind: str,
    config: Any,
    read: Callable[[str], Tensor],
    dtypes: Mapping[str, torch.dtype],
    folder: Path,
    layout: str,
    shard_bytes: int,
) -> None:
    """Writes a model whose native tensors `read` gives, a tensor in memory at a time; see save_transformer."""
    from stdit.vae.config import VaeConfig

    dialect = dialect_in(layout)
    check_layout(config, layout)
    table = table_of(config, dialect)
    described = describe(config, layout)
    metadata = {"format": "pt", "stdit_config": json.dumps(described, sort_keys=True)}
    if dialect == "original":
        metadata |= family_of(config).metadata(config)
    entries, read_foreign = table.written(read, dtypes)
    stem = _STEM
    stems: tuple[str, ...] = (_STEM,)
    if dialect == "original" and isinstance(config, VaeConfig):
        stem, stems = _VAE_STEMS[config.residual], _VAE_STEMS
    elif layout == "comfyui" and kind == "transformer":  # one file, which carries the config in its metadata
        stem, stems, shard_bytes = config.family, (config.family,), sys.maxsize
        entries = {PREFIXES[0] + name: entry for name, entry in entries.items()}
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in entries.items()}
    shards = _shards(sizes, shard_bytes)
    names = [f"{stem}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    names = [f"{stem}.safetensors"] if len(shards) == 1 else names
    documents = {"config.json": described} if stem == _STEM else {}
    if len(shards) > 1:
        documents[f"{stem}.safetensors.index.json"] = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {foreign: name for name, shard in zip(names, shards) for foreign in shard},
        }
    stale = re.compile(rf"({'|'.join(map(re.escape, stems))})" + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    with ExitStack() as renames:  # the last entered is renamed first, the index at the end: without it shards are none
        for name, content in reversed(documents.items()):
            part = renames.enter_context(publish(folder / name))
            part.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
        for name, shard in zip(names, shards):
            held = {foreign: entries[foreign] for foreign in shard}
            part = renames.enter_context(publish(folder / name))
            write_tensors(part, held, lambda key: read_foreign(key.removeprefix(PREFIXES[0])), metadata)
        for entry in [*folder.iterdir()]:  # all is written: what of the old would mix with it goes first
            if entry.name in documents or (stale.fullmatch(entry.name) and entry.name not in names):
                entry.unlink()


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names dealt in order to shards of at most `limit` bytes (or one tensor)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _some(entries: Mapping[str, Entry]) -> str:
    return ", ".join(list(entries)[:3]) + (", …" if len(entries) > 3 else "") if entries else "(none)"
