"""One small file per family of open weights: how its config becomes ours, and how its keys do, in both directions.

FAMILY                               what messages call it
CLASSES                              the classes that its config.json may name
config_from(found, shapes, place)    our config of a config.json in any dialect; where `found` is {}, of
                                     the tensors' shapes alone, or with {"_heads": n}; `place` is for errors
fits(shapes)                         (optional) whether tensors without a config.json are this family's, where
                                     another has the same names
config_to_diffusers(config)          config.json as diffusers wants it
config_to_original(config)           as the original release has it (where it has one)
dialect_of(shapes)                   "original" or "diffusers", by the names alone, "" for another family's
keymap(config, dialect)              a KeyMap, our names ↔ that dialect's
built_in(config, layout)             our settings: the values that the layout's program has built in, so that a
                                     config.json does not change them; None where ComfyUI has no such model
NOT_WRITTEN                          (optional) settings that may differ when read back: they change no output
metadata(config)                     (optional) what the program looks for in a file's own metadata
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from stdit.weights.keymap import Shape, Table

if TYPE_CHECKING:
    from torch import nn

KINDS = ("transformer", "vae")
FAMILIES = {
    "transformer": ("wan", "ltx", "pixart", "latte", "allegro", "cosmos", "stdit3"),
    "vae": ("wan_vae", "open_sora_vae"),
}


def families(kind: str) -> list[ModuleType]:
    """The modules of all families of a kind. Names shared by several belong to the first, unless a config says."""
    return [importlib.import_module(f"stdit.weights.families.{name}") for name in FAMILIES[kind]]


def family_of(kind: str, found: Mapping[str, Any], shapes: Mapping[str, Shape]) -> ModuleType:
    """The family of a config.json, or else of tensors by their names; where neither is known, the first."""
    known = families(kind)
    named = [family for family in known if found.get("_class_name") in family.CLASSES]
    alike = [family for family in known if family.dialect_of(shapes)]
    fitting = [family for family in alike if not hasattr(family, "fits") or family.fits(shapes)]
    return (named or fitting or alike or known)[0]


def family_module(config: Any) -> ModuleType:
    """The family of a config."""
    return importlib.import_module(f"stdit.weights.families.{getattr(config, 'family', 'wan_vae')}")


def table_of(config: Any, dialect: str) -> tuple[ModuleType, Table]:
    """The family of a config, and how its model's tensors are those of a dialect."""
    family = family_module(config)
    return family, family.keymap(config, dialect).table(shapes_of(on_meta(config)))


def on_meta(config: Any) -> nn.Module:
    """The model without memory. Nothing is drawn: on the meta device that takes longer than reading the weights."""
    import torch
    from torch.overrides import TorchFunctionMode

    from stdit.models.transformer import STDiT
    from stdit.vae.autoencoder import CausalVAE, VaeConfig
    from stdit.vae.families.open_sora import OpenSoraConfig, OpenSoraVAE

    class Undrawn(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") in ("kaiming_uniform_", "uniform_", "normal_", "trunc_normal_"):
                return args[0] if args else (kwargs or {})["tensor"]
            return func(*args, **(kwargs or {}))

    with torch.device("meta"), Undrawn():
        if isinstance(config, OpenSoraConfig):
            return OpenSoraVAE(config)
        return CausalVAE(config) if isinstance(config, VaeConfig) else STDiT(config)


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """Of its tensors, by our names."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
