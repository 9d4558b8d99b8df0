"""Loads and saves transformers and VAEs, completely or not at all.

Every name and shape is checked against the model before a tensor is read. Then each tensor is read once, straight to
its device and dtype, into a model that was built on the meta device.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor, nn

from stdit.errors import StditError
from stdit.files import publish
from stdit.models.transformer import Experts, STDiT
from stdit.vae.config import VaeConfig
from stdit.vae.families.diffusers_vae import DiffusersVAE, load_diffusers_vae
from stdit.vae.families.open_sora import AnyVAE
from stdit.weights.families import family_of, on_meta, shapes_of, table_of
from stdit.weights.keymap import Read
from stdit.weights.quantised import is_quantised
from stdit.weights.sources import PREFIXES, Source, boundary_of, expert_folders, expert_places, find, other_vae
from stdit.weights.tensor_files import write_tensors

LAYOUTS = ("diffusers", "original", "comfyui")
SHARD_BYTES = 5_000_000_000
NumbersOf = Callable[[Tensor], Tensor]  # a parameter or buffer of a model to the numbers that are written of it
_STEM = "diffusion_pytorch_model"
_VAE_STEMS = ("Wan2.1_VAE", "Wan2.2_VAE")  # original releases keep it beside the transformer


def load_transformer(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trust_pickle: bool = False,
    expert: str = "both",
    heads: int | None = None,
) -> STDiT | Experts:
    """A transformer from a model folder (stdit's or diffusers'), its transformer/, an original release, or a file.

    dtype: None keeps each tensor's stored dtype; fp8, with or without scales, becomes bf16.
    trust_pickle: open .pth and .bin files too, reading tensors only.
    expert: for a folder with two (Wan 2.2 A14B: transformer/ and transformer_2/, or high_noise_model/ and
        low_noise_model/), "both" gives an `Experts`, "high" or "low" one STDiT.
    heads: the number of heads, for a single file whose tensors do not tell it.

    Raises StditError that names the file and the tensors if anything is missing, unexpected, misshaped or damaged, and
    the variant if stdit does not run it.
    """
    if expert not in ("both", "high", "low"):
        raise StditError(f"expert {expert!r} does not exist. Known: both, high, low.")
    places = expert_places(Path(path).expanduser())
    if places is None and expert != "both":
        raise StditError(f"{path}: holds one transformer, so there is no expert {expert!r}.")
    if places is None or expert != "both":
        place = path if places is None else places[expert]
        return load(find("transformer", place, trust_pickle, heads=heads), dtype, device)
    sources = [find("transformer", place, trust_pickle, heads=heads) for place in places.values()]
    if sources[0].config != sources[1].config:
        raise StditError(f"{places['high']} and {places['low']} have different configs: they are not two experts.")
    high, low = (load(source, dtype, device) for source in sources)
    return Experts(high, low, boundary_of(Path(path).expanduser(), high.config.image_channels > 0))


def load_vae(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trust_pickle: bool = False,
) -> Any:
    """A causal VAE from a model folder, its vae/, an original Wan release, or a file; otherwise as load_transformer.

    Returns a CausalVAE or Open-Sora's OpenSoraVAE. If config.json names an autoencoder that diffusers runs
    (`stdit.weights.families.diffusers_vaes`), a DiffusersVAE with the same methods.
    """
    if (other := other_vae(path)) is not None:
        return load_diffusers_vae(other, dtype, device)
    return load(find("vae", path, trust_pickle), dtype, device)


def vae_on_meta(path: str | os.PathLike[str]) -> Any:
    """The VAE that load_vae would load, on the meta device. No weight is read."""
    other = other_vae(path)
    return on_meta(find("vae", path).config) if other is None else load_diffusers_vae(other, device="meta")


def own(tensor: Tensor) -> Tensor:
    """The numbers that a tensor has."""
    return tensor


def save_transformer(
    model: STDiT | Experts,
    folder: str | os.PathLike[str],
    layout: str = "diffusers",
    shard_bytes: int = SHARD_BYTES,
    numbers: NumbersOf = own,
) -> None:
    """Writes config.json and safetensors into `folder`, one tensor in memory at a time.

    layout: "diffusers" opens with from_pretrained(folder) of the family's class (WanTransformer3DModel for what stdit
        trains); "original" is the release's; "comfyui" is the original in one file with ComfyUI's prefix.
    shard_bytes: larger models are written in shards.
    numbers: gives what is written of a parameter or buffer of the model, which may hold no numbers of its own.

    Two experts get a folder each, transformer/ and transformer_2/ or high_noise_model/ and low_noise_model/; the noise
    level between them is written to model_index.json (`Pipeline.save`). Raises StditError, before anything is written,
    that names a setting which the layout cannot hold (see `check_layout`).

    The old files stay until all new ones are written beside them; then the new ones are renamed. A process that is
    killed among the renames leaves the old model, the new one, or a folder that does not load: never a mixture.
    """
    if isinstance(model, Experts):
        for name, expert in zip(expert_folders(layout).values(), (model.high, model.low)):
            _save(expert, Path(folder) / name, layout, shard_bytes, numbers)
    else:
        _save(model, Path(folder), layout, shard_bytes, numbers)


def save_vae(
    vae: AnyVAE, folder: str | os.PathLike[str], layout: str = "diffusers", shard_bytes: int = SHARD_BYTES
) -> None:
    """As save_transformer.

    "diffusers" opens with AutoencoderKLWan.from_pretrained(folder). "original" is one file, Wan2.1_VAE.safetensors
    (Wan2.2_VAE if levels have shortcuts), with our config in its metadata. For Open-Sora's both are the same.
    """
    if isinstance(vae, DiffusersVAE):
        if layout != "diffusers":
            raise StditError(f"layout {layout!r}: {vae.config.name} can only be written in layout 'diffusers'.")
        vae.module.save_pretrained(folder)
    else:
        _save(vae, Path(folder), layout, shard_bytes)


def load(source: Source, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Any:
    """Reads a source's tensors into its model. The peak memory is the model's and one tensor's.

    On the CPU, a tensor of unchanged dtype and order stays a private view of the file; see tensor_files.py.
    """
    model = on_meta(source.config)
    files = source.files.reopened()  # the model may change its tensors in place
    quantised = {name for name, entry in files.entries.items() if is_quantised(entry)}
    if quantised:  # nothing computes in fp8 here
        scales = ", with scales" if any(entry.scale for entry in files.entries.values()) else ""
        computed = str(dtype or torch.bfloat16).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
        print(
            f"{files.path}: {len(quantised)} of {len(files.entries)} tensors are fp8{scales}; they are computed in "
            f"{computed}.",
            file=sys.stderr,
        )
    tensors: dict[str, Tensor] = {}
    for move in source.table.moves:
        stored = {name: files.read(name) for name in move.foreign}
        there = {tensor.untyped_storage().data_ptr() for tensor in stored.values()}
        kept = torch.bfloat16 if dtype is None and move.foreign[0] in quantised else dtype
        for name, tensor in move.to_native(stored.__getitem__).items():
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


def part_reader(source: Source) -> Callable[[str, int, int], Tensor]:
    """A function that reads numbers start to stop of a flattened native tensor, (stop − start,) fp32, and keeps none.

    Raises StditError for values that are not finite.
    """
    files = source.files.reopened()
    moves = {name: move for move in source.table.moves for name in move.native}

    def numbers(name: str, start: int, stop: int) -> Tensor:
        part = moves[name].to_native(files.read)[name].flatten()[start:stop].to(torch.float32, copy=True)
        for foreign in moves[name].foreign:
            files.release(foreign)
        return part

    return numbers


def convert(source: Source, folder: str | os.PathLike[str], layout: str, dtype: torch.dtype | None = None) -> None:
    """Writes a source in another layout, one tensor in memory at a time. dtype: None keeps the stored ones."""
    files, table = source.files, source.table

    def stored(name: str) -> torch.dtype:
        entry = files.entries[name]
        found: torch.dtype = torch.bfloat16 if entry.scale else getattr(torch, entry.dtype)
        return dtype if dtype is not None and found.is_floating_point else found

    def read(name: str) -> Tensor:
        tensor = files.read(name).to(stored(name), copy=True)
        files.release(name)
        return tensor

    like = dict(table.to_native(lambda name: torch.empty(files.entries[name].shape, dtype=stored(name), device="meta")))
    _write(source.config, like, table.native_reader(read), Path(folder), layout, SHARD_BYTES)


def dialect_in(layout: str) -> str:
    """The dialect of a layout. Raises StditError for an unknown layout."""
    if layout not in LAYOUTS:
        raise StditError(f"layout {layout!r} does not exist. Known: {', '.join(LAYOUTS)}.")
    return "diffusers" if layout == "diffusers" else "original"


def check_layout(config: Any, layout: str) -> None:
    """Raises StditError if a model of this config, written in `layout`, would be read as another network.

    Checked for two readers: stdit, by reading back what it would write, and the layout's own program, by the settings
    that its code has built in (`Family.built_in`).
    """
    family, dialect = family_of(config), dialect_in(layout)

    def refuse(name: str, other: Any) -> NoReturn:
        advice = "Write layout 'diffusers'." if layout != "diffusers" else f"Leave {name} as it is."
        raise StditError(
            f"layout {layout!r} cannot hold {name}={getattr(config, name)}: it gives this {family.title} "
            f"{name}={other}, so that what is written would be another network. {advice}"
        )

    native = shapes_of(on_meta(config))
    if layout == "comfyui" and not family.comfyui:
        raise StditError(f"layout {layout!r}: ComfyUI has no {family.title}. Write layout 'diffusers' or 'original'.")
    for name, allowed in family.built_in(config, layout).items():
        if getattr(config, name) not in allowed:
            refuse(name, " or ".join(map(str, allowed)))
    keymap = family.keymap(config, dialect)
    unplaced = keymap.unplaced(native)
    shapes = keymap.table({name: shape for name, shape in native.items() if name not in unplaced}).foreign_shapes
    written = [family.written(config, dialect)]
    if layout == "comfyui":  # reads the file's metadata, no config.json
        written.append(json.loads(family.metadata(config).get("config", "{}")).get("transformer", {}))
    for found in written:
        try:
            again = asdict(family.config_from(json.loads(json.dumps(found)), shapes, f"layout {layout!r}"))
        except StditError as error:
            raise StditError(f"{error}\nSo layout {layout!r} cannot hold this {family.title}.") from None
        for name, value in asdict(config).items():
            if again[name] != value and name not in family.not_written:
                refuse(name, again[name])
    if unplaced:
        raise StditError(f"layout {layout!r} has no place for this {family.title}'s tensor {unplaced[0]}.")


def _save(model: nn.Module, folder: Path, layout: str, shard_bytes: int, numbers: NumbersOf = own) -> None:
    state = model.state_dict(keep_vars=True)
    _write(model.config, state, lambda name: numbers(state[name]).detach(), folder, layout, shard_bytes)


def _write(config: Any, like: Mapping[str, Tensor], read: Read, folder: Path, layout: str, shard_bytes: int) -> None:
    """Writes a model, one tensor in memory at a time. See save_transformer.

    like: native tensors of its shapes and dtypes, which may be on the meta device. read: returns a native tensor.
    """
    family, dialect = family_of(config), dialect_in(layout)
    check_layout(config, layout)
    table = table_of(config, dialect)
    described = family.written(config, dialect)
    metadata = {"format": "pt", "stdit_config": json.dumps(described, sort_keys=True)}
    if dialect == "original":
        metadata |= family.metadata(config)
    stem, prefix = _STEM, ""
    if dialect == "original" and isinstance(config, VaeConfig):
        stem = _VAE_STEMS[config.residual]
    elif layout == "comfyui":  # one file with the config in its metadata
        stem, prefix, shard_bytes = config.family, PREFIXES[0], sys.maxsize
    foreign = dict(table.to_foreign(lambda name: torch.empty_like(like[name], device="meta")))
    first = next(iter(foreign.values())).dtype
    made = {name: make().to(first) for name, make in table.computed.items()}
    foreign = {f"{prefix}{name}": tensor for name, tensor in (foreign | made).items()}
    read_foreign = table.foreign_reader(read)

    def read_part(name: str) -> Tensor:
        name = name.removeprefix(prefix)
        return made[name] if name in made else read_foreign(name)

    split = split_state_dict_into_shards_factory(
        foreign,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=shard_bytes,
    )
    documents: dict[str, Any] = {"config.json": described} if stem == _STEM else {}
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        documents[f"{stem}.safetensors.index.json"] = index
    stems = _VAE_STEMS if stem in _VAE_STEMS else (stem,)
    stale = re.compile(rf"({'|'.join(map(re.escape, stems))})" + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    with ExitStack() as renames:  # renamed in reverse: the index last, without which shards do not load
        for name, content in reversed(documents.items()):
            part = renames.enter_context(publish(folder / name))
            part.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
        for name, shard in split.filename_to_tensors.items():
            part = renames.enter_context(publish(folder / name))
            write_tensors(part, {key: foreign[key] for key in shard}, read_part, metadata)
        for entry in [*folder.iterdir()]:  # all is written: remove old files that would mix with the new ones
            if entry.name in documents or (stale.fullmatch(entry.name) and entry.name not in split.filename_to_tensors):
                entry.unlink()
