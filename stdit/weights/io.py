"""Loads and saves transformers and VAEs, completely or not at all.

Every name and shape is checked against the model before a tensor is read. Then each tensor is read once, straight to
its device and dtype, into a model that was built on the meta device.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.errors import StditError
from stdit.files import publish
from stdit.weights.expert_folders import EXPERT_NAMES, boundary_of, expert_folders, expert_places
from stdit.weights.families import family_of, on_meta, table_of
from stdit.weights.layouts import check_layout, describe, dialect_in
from stdit.weights.quantised import FP8, fp8_count
from stdit.weights.sources import PREFIXES, Source, find, other_vae
from stdit.weights.tensor_files import write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from stdit.models.experts import Experts
    from stdit.models.transformer import STDiT
    from stdit.vae.families.open_sora import AnyVAE

SHARD_BYTES = 5_000_000_000
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
    if expert not in ("both", *EXPERT_NAMES):
        raise StditError(f"expert {expert!r} does not exist. Known: both, high, low.")
    places = expert_places(Path(path).expanduser())
    if places is None:
        if expert != "both":
            raise StditError(f"{path}: holds one transformer, so there is no expert {expert!r}.")
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

    Returns a CausalVAE or Open-Sora's OpenSoraVAE. If config.json names an autoencoder that diffusers runs
    (`stdit.weights.families.diffusers_vaes`), a DiffusersVAE with the same methods.
    """
    from stdit.vae.families.diffusers_vae import load_diffusers_vae

    if (other := other_vae(path)) is not None:
        return load_diffusers_vae(other, dtype, device)
    return load(find("vae", path, trust_pickle), dtype, device)


def vae_on_meta(path: str | os.PathLike[str]) -> Any:
    """The VAE that load_vae would load, on the meta device. No weight is read."""
    from stdit.vae.families.diffusers_vae import load_diffusers_vae

    other = other_vae(path)
    return on_meta(find("vae", path).config) if other is None else load_diffusers_vae(other, device="meta")


def save_transformer(
    model: STDiT | Experts, folder: str | os.PathLike[str], layout: str = "diffusers", shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes config.json and safetensors into `folder`.

    layout: "diffusers" opens with from_pretrained(folder) of the family's class (WanTransformer3DModel for what stdit
        trains); "original" is the release's; "comfyui" is the original in one file with ComfyUI's prefix.
    shard_bytes: larger models are written in shards.

    Two experts get a folder each, transformer/ and transformer_2/ or high_noise_model/ and low_noise_model/; the noise
    level between them is written to model_index.json (`Pipeline.save`). Raises StditError, before anything is written,
    that names a setting which the layout cannot hold (see stdit/weights/layouts.py).

    The old files stay until all new ones are written beside them; then the new ones are renamed. A process that is
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
    """As save_transformer.

    "diffusers" opens with AutoencoderKLWan.from_pretrained(folder). "original" is one file, Wan2.1_VAE.safetensors
    (Wan2.2_VAE if levels have shortcuts), with our config in its metadata. For Open-Sora's both are the same.
    """
    from stdit.vae.families.diffusers_vae import DiffusersVAE

    if isinstance(vae, DiffusersVAE):
        if layout != "diffusers":
            raise StditError(f"layout {layout!r}: {vae.config.name} can only be written in layout 'diffusers'.")
        vae.module.save_pretrained(folder)
    else:
        _save("vae", vae, Path(folder), layout, shard_bytes)


def load(source: Source, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Any:
    """Reads a source's tensors into its model. The peak memory is the model's and one tensor's.

    On the CPU, a tensor of unchanged dtype and order stays a private view of the file; see tensor_files.py.
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
    """Writes a source in another layout, one tensor in memory at a time. dtype: None keeps the stored ones."""
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
    """Writes a model, one tensor in memory at a time; `read` returns native tensors. See save_transformer."""
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
    elif layout == "comfyui" and kind == "transformer":  # one file with the config in its metadata
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
    with ExitStack() as renames:  # renamed in reverse: the index last, without which shards do not load
        for name, content in reversed(documents.items()):
            part = renames.enter_context(publish(folder / name))
            part.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
        for name, shard in zip(names, shards):
            held = {foreign: entries[foreign] for foreign in shard}
            part = renames.enter_context(publish(folder / name))
            write_tensors(part, held, lambda key: read_foreign(key.removeprefix(PREFIXES[0])), metadata)
        for entry in [*folder.iterdir()]:  # all is written: remove old files that would mix with the new ones
            if entry.name in documents or (stale.fullmatch(entry.name) and entry.name not in names):
                entry.unlink()


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Fills shards in order, each with at most `limit` bytes or one tensor."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
