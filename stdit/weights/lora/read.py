"""Reads LoRA files as other programs write them; `write.py` shows the layouts.

Any mixture of prefix, ending and dialect is read, as long as every name is one of the model's: names joined by
underscores are compared with the model's own names, never taken apart. Without an alpha an adapter is added as it is
(alpha = rank), as diffusers and ComfyUI do.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from stdit.errors import StditError, nearest_name
from stdit.models.config import TransformerConfig
from stdit.weights.families import families, family_of, table_of
from stdit.weights.families.record import Family
from stdit.weights.keymap import Shape, Table, abridged
from stdit.weights.lora.adapters import Adapter, Pair, converted
from stdit.weights.tensor_files import TensorFiles, open_file, read_json

FILES = {
    "common": "pytorch_lora_weights.safetensors",  # which diffusers looks for in a folder
    "diffusers": "pytorch_lora_weights.safetensors",
    "peft": "adapter_model.safetensors",
    "original": "lora.safetensors",  # any name would do
    "kohya": "lora.safetensors",
}
_PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "pipe.dit.", "dit.", "unet.",
)  # fmt: skip
# prefixes of names whose dots became underscores; VideoX-Fun's ends in two
_JOINED = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
_PARTS = {
    "down": r"lora_A(?:\.\w+)?\.weight|lora_down\.weight|lora\.down\.weight",  # peft has the adapter's name in it
    "up": r"lora_B(?:\.\w+)?\.weight|lora_up\.weight|lora\.up\.weight",
    "up_bias": r"lora_B(?:\.\w+)?\.bias",
    "alpha": r"alpha",
    "diff": r"diff|w_norm",
    "diff_b": r"diff_b|b_norm",
    "diff_m": r"diff_m",  # of a modulation, in lightx2v's files
}
_OTHERS = re.compile(r"(transformer_2|text_encoders?\w*|lora_te\d?_\w+)\b")  # other models in the file
_NAME = re.compile(r"(.+)\.(?:" + "|".join(f"(?P<{part}>{ending})" for part, ending in _PARTS.items()) + ")")
_REFUSED = {
    r"\.(dora_scale|lora_magnitude_vector)": "DoRA",
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.b?oft_": "OFT",
    r"\.lora_mid\.": "LoCon in Tucker form",
    r"\.(a1|a2|b1|b2)\.weight$": "GLoRA",
    r"\.(set_weight|reshape_weight)$": "a patch that replaces weights",
}
_PARTLY = "to use the rest of it, ask for it: --lora-partly, or `partly=True`"
_OTHER_BASE = re.compile(r"pissa|olora|corda|loftq")  # initialisations that change the base weights


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file with its names parsed; no tensor is read.

    modules: by module, as the file names it without its prefix: by part (a key of _PARTS) the tensor's name.
    joined: names have underscores instead of dots.
    settings: peft's LoraConfig, if the file has one.
    others: names of tensors for other models, which are left out.
    """

    files: TensorFiles
    modules: dict[str, dict[str, str]]
    joined: bool
    settings: dict[str, Any]
    others: tuple[str, ...] = ()

    @cached_property
    def ranks(self) -> dict[str, int]:
        shapes = self.files.shapes
        return {module: shapes[parts["down"]][0] for module, parts in self.modules.items() if "down" in parts}

    def alpha(self, module: str) -> float:
        """The alpha of a module, for alpha / rank."""
        parts, rank = self.modules[module], self.ranks[module]
        if "alpha" in parts:
            tensor = self.files.read(parts["alpha"])
            alpha: Any = float(tensor) if tensor.numel() == 1 else math.nan
        else:
            alpha = self.settings.get("lora_alpha", rank)
            for pattern, value in (self.settings.get("alpha_pattern") or {}).items():
                name = pattern.removeprefix("^").replace("\\.", ".")
                if module == name or (module.endswith(f".{name}") and pattern[0] != "^"):
                    alpha = value
                    break
        if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
            raise StditError(f"{self.files.path}: alpha of {module} is {alpha!r}, not a positive number.")
        return float(alpha) * (math.sqrt(rank) if self.settings.get("use_rslora") else 1)

    def resolve(self, table: Table) -> dict[str, str]:
        """The dialect's name of the weight that each module adapts. Modules that the table does not have are absent."""
        known: dict[str, list[str]] = {}
        for name in table.foreign_shapes:
            module = name.removesuffix(".weight")
            known.setdefault(module.replace(".", "_") if self.joined else module, []).append(name)
        for module in self.modules:
            if len(known.get(module, ())) > 1:
                raise StditError(f"{self.files.path}: {module} may be any of {', '.join(known[module])}.")
        return {module: known[module][0] for module in self.modules if module in known}


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a safetensors file, or one of FILES in a folder, is an adapter by its tensors' names. Raises StditError
    if it cannot be read."""
    place = _place(path)
    if not place.is_file() or place.suffix not in (".safetensors", ".sft"):
        return False
    names = open_file(place).entries
    return any(_NAME.fullmatch(name) or re.search("|".join(_REFUSED), name) for name in names)


def open_adapter(path: str | os.PathLike[str], partly: bool = False) -> LoraFile:
    """Opens a LoRA file. Raises StditError for a name that it does not know and for an incomplete pair.

    partly: leave out tensors for other models (a text encoder, a second transformer) instead of raising.
    """
    files = open_file(_place(path))
    for name in files.entries:
        for pattern, kind in _REFUSED.items():
            if re.search(pattern, name):
                raise StditError(f"{files.path}: holds {kind} ({name}), which stdit does not read; it reads LoRA.")
    others = tuple(name for name in files.entries if _OTHERS.match(name))
    if others and not partly:
        raise StditError(
            f"{files.path}: holds an adapter for a model other than the transformer ({others[0]}). Split the file so "
            f"that it has the transformer's tensors only; {_PARTLY}."
        )
    files = replace(files, entries={name: entry for name, entry in files.entries.items() if name not in others})
    dotted = files.without_prefix(_PREFIXES)
    files = dotted.without_prefix(_JOINED)
    joined = files.prefix != dotted.prefix
    modules: dict[str, dict[str, str]] = {}
    for name in files.entries:
        if not (found := _NAME.fullmatch(name)):
            raise StditError(
                f"{files.path}: {files.prefix}{name} is not part of a LoRA, whose tensors end in lora_A.weight and "
                "lora_B.weight, or lora_down.weight, lora_up.weight and alpha."
            )
        module, part = found[1], next(part for part in _PARTS if found[part])
        if part == "diff_m":
            module, part = f"{module}{'_' if joined else '.'}modulation", "diff"
        if part in modules.setdefault(module, {}):
            raise StditError(f"{files.path}: {files.prefix}{module} has two tensors for {part}.")
        modules[module][part] = name
    if not modules:
        raise StditError(f"{files.path}: holds no tensors{' for a transformer' if others else ''}.")
    for parts in modules.values():
        for part, other in {"down": "up", "up": "down", "alpha": "down", "up_bias": "up"}.items():
            if part in parts and other not in parts:
                raise StditError(f"{files.path}: {files.prefix}{parts[part]} has no lora_{other} beside it.")
        if "down" in parts and any(len(files.entries[parts[part]].shape) < 2 for part in ("down", "up")):
            raise StditError(f"{files.path}: {files.prefix}{parts['down']} and its lora_up must be matrices.")
    return LoraFile(files, modules, joined, _settings(files), others)


def read_adapter(path: str | os.PathLike[str], config: TransformerConfig, partly: bool = False) -> Adapter:
    """An adapter for a model of this config, under our names.

    partly: leave out layers that this model does not have, with a warning that names them.

    Raises StditError that names the file and the tensor if anything is unknown, missing, misshaped, not finite, or of a
    kind that stdit does not read. No tensor is read before all names and shapes are checked.
    """
    found = open_adapter(path, partly)
    table, names = fitted(found, config, partly)
    left_out = [*found.others, *(module for module in found.modules if module not in names)]
    if left_out:
        warnings.warn(
            f"{found.files.path}: {len(names)} layers are adapted. Left out, because this model does not have them: "
            f"{_kinds(left_out)}.",
            stacklevel=2,
        )

    def tensor(name: str) -> Tensor:
        stored = found.files.read(name)
        return stored.float() if stored.itemsize == 1 else stored  # torch computes little in fp8

    pairs: dict[str, Pair] = {}
    differences: dict[str, Tensor] = {}
    for module, name in names.items():
        parts = found.modules[module]
        if "down" in parts:
            down = tensor(parts["down"]).reshape(-1, *table.foreign_shapes[name][1:])
            pairs[name] = Pair(down, tensor(parts["up"]).flatten(1), found.alpha(module))
        if "diff" in parts:
            differences[name] = tensor(parts["diff"])
        if "diff_b" in parts:
            differences[_bias(name)] = tensor(parts["diff_b"])
        if "up_bias" in parts:
            differences[_bias(name)] = tensor(parts["up_bias"]) * pairs[name].scale
    return converted(Adapter(pairs, differences), table, back=True)


def _place(path: str | os.PathLike[str]) -> Path:
    """The file itself, or the one of FILES that is in the folder."""
    place = Path(path).expanduser()
    return next((place / name for name in FILES.values() if (place / name).is_file()), place)


def _settings(files: TensorFiles) -> dict[str, Any]:
    """peft's LoraConfig, from the file's metadata (diffusers) or from adapter_config.json beside it (peft)."""
    beside = files.path.parent / "adapter_config.json"
    if carried := files.metadata.get("lora_adapter_metadata"):
        try:
            found = json.loads(carried)
        except (ValueError, RecursionError) as error:
            raise StditError(f"{files.path}: lora_adapter_metadata is not valid JSON ({error}).") from None
    else:
        found = read_json(beside) if files.path.name == "adapter_model.safetensors" and beside.is_file() else {}
    if not isinstance(found, dict):
        raise StditError(f"{files.path}: lora_adapter_metadata is not a JSON object.")
    found = {key.removeprefix("transformer."): value for key, value in found.items()}
    patterns = found.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or any(not re.fullmatch(r"\^?([\w-]|\\?\.)+", key) for key in patterns):
        raise StditError(f"{files.path}: alpha_pattern of its LoraConfig must be numbers by layers' names.")
    if found.get("use_dora"):
        raise StditError(f"{files.path}: holds DoRA (use_dora), which stdit does not read; it reads LoRA.")
    start = found.get("init_lora_weights")
    if isinstance(start, str) and _OTHER_BASE.match(start.lower()):
        raise StditError(
            f"{files.path}: init_lora_weights is {start!r}, so it was trained over changed base weights. Save it as an "
            "ordinary LoRA, with peft's path_initial_model_for_weight_conversion."
        )
    return found


def fitted(found: LoraFile, config: TransformerConfig, partly: bool = False) -> tuple[Table, dict[str, str]]:
    """The table of the dialect that has most of a file's names, and the weight that each module adapts; shapes are
    checked.

    partly: unknown names are left out, unless all are unknown.
    """
    tables = []
    for dialect in ("original", "diffusers"):
        with suppress(StditError):  # the dialect has no such model
            tables.append(table_of(config, dialect))
    table = max(tables, key=lambda table: len(found.resolve(table)))
    names = found.resolve(table)
    unknown = [module for module in found.modules if module not in names]
    if unknown and not (partly and names):
        known = [name.removesuffix(".weight") for name in table.foreign_shapes]
        raise StditError(
            f"{found.files.path}: adapts {len(unknown)} layers that this {family_of(config).title} of "
            f"{config.layers} blocks does not have, such as {found.files.prefix}{unknown[0]}."
            f"{nearest_name(unknown[0], known)} It has {len(names)} of the file's {len(found.modules)}; it does not "
            f"have {_kinds(unknown)}. For which family it is tells `stdit weights inspect {found.files.path}`"
            f"{f'; {_PARTLY}' if names else ''}."
        )
    for module, name in names.items():
        _check_shapes(found, module, name, table.foreign_shapes)
    return table, names


def _kinds(modules: Iterable[str]) -> str:
    """Layer names with * for block numbers, each once."""
    return abridged(list(dict.fromkeys(re.sub(r"(?<=blocks[._])\d+", "*", module) for module in modules)))


def _check_shapes(found: LoraFile, module: str, name: str, shapes: dict[str, Shape]) -> None:
    """Checks the shape and dtype of every tensor of a module against its weight."""
    shape, rank, parts = shapes[name], found.ranks.get(module, 0), found.modules[module]
    columns, ones = math.prod(shape[1:]), (1,) * (len(shape) - 2)
    wanted: dict[str, list[Shape]] = {
        "alpha": [(), (1,)],
        "diff": [shape],
        "down": [(rank, *shape[1:]), (rank, columns), (rank, columns, *ones)],
        "up": [(shape[0], rank), (shape[0], rank, *ones)],
    }
    for part in ("diff_b", "up_bias"):
        if part in parts and not (name.endswith(".weight") and _bias(name) in shapes):
            raise StditError(f"{found.files.path}: {parts[part]} changes a bias, and {name} has none.")
        wanted[part] = [shapes.get(_bias(name), ())]
    for part, tensor in parts.items():
        entry = found.files.entries[tensor]
        if entry.shape not in wanted[part] or (part in ("down", "up") and (rank < 1 or len(shape) < 2)):
            raise StditError(
                f"{found.files.path}: {tensor} is {entry.shape}; for {name}, which is {shape}, it should be "
                f"{' or '.join(map(str, dict.fromkeys(wanted[part])))}. Is it for a model of another size?"
            )
        if part != "alpha" and not entry.dtype.startswith(("float", "bfloat")):
            raise StditError(f"{found.files.path}: {tensor} is {entry.dtype}, not floating point.")


def _bias(weight: str) -> str:
    return weight.removesuffix(".weight") + ".bias"


def describe(path: str | os.PathLike[str], config: TransformerConfig | None = None) -> dict[str, Any]:
    """The families whose names a LoRA file has, its ranks, alphas and adapted layers.

    config: of its model, to check shapes too; without it only names are compared.
    """
    found = open_adapter(path, partly=True)
    if config is not None:
        fitted(found, config)
    entries = found.files.entries.values()
    targets = Counter(re.sub(r"(?<=block)\d+|(?<=[._])\d+(?=[._])", "*", name, count=1) for name in found.modules)
    return {
        "kind": "adapter",
        "path": str(found.files.path),
        "fits": [
            f"{family.title} ({dialect} names)"
            for family in families("transformer")
            for dialect in ("original", "diffusers")
            if _fits(found, family, dialect)
        ],
        "prefix": found.files.prefix,
        "ranks": dict(sorted(Counter(found.ranks.values()).items())),
        "alphas": dict(sorted(Counter(map(found.alpha, found.ranks)).items())),
        "for_other_models": len(found.others),
        "differences": sum("diff" in parts or "diff_b" in parts for parts in found.modules.values()),
        "parameters": sum(math.prod(entry.shape) for entry in entries),
        "dtypes": dict(Counter(entry.dtype for entry in entries)),
        "targets": dict(targets),
    }


def _fits(found: LoraFile, family: Family, dialect: str) -> bool:
    """Whether a small model of the family, with as many layers as the file names, has all of the file's names."""
    numbers = re.findall(r"blocks?[._]?(\d{1,3})(?=[._])", "\n".join(found.modules))
    layers = max(map(int, numbers), default=0) + 1
    return any(len(found.resolve(table_of(config, dialect))) == len(found.modules) for config in family.samples(layers))
