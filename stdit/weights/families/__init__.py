"""The families of open weights: one file each, with one record (`record.Family`), and look-ups over the records.

To add a family, write its file and add its name to FAMILIES; docs/adding-a-family.md shows an example.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.weights.families.record import Family, PipelineKind, Release
from stdit.weights.keymap import Shape, Table

if TYPE_CHECKING:
    from torch import nn

    from stdit.models.config import TransformerConfig
    from stdit.text.places import Treatment
    from stdit.vae.families.diffusers_vae import VaeTraits

FAMILIES = {
    "transformer": ["wan", "ltx", "pixart", "latte", "allegro", "cosmos", "stdit3"],
    "vae": ["wan_vae", "open_sora_vae"],
}
KINDS = tuple(FAMILIES)


def families(kind: str) -> list[Family]:
    """The records of all families of a kind. Names shared by several belong to the first, unless a config says."""
    return [_record(name) for name in FAMILIES[kind]]


def _record(name: str) -> Family:
    record: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
    return record


def family_of(config: Any) -> Family:
    """The family of a config."""
    return _record(config.family)


def recognised(kind: str, found: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Family:
    """The family of a config.json, or else of tensors by their names; the first family if neither is known."""
    known = families(kind)
    named = [family for family in known if found.get("_class_name") in family.classes]
    alike = [family for family in known if family.dialect_of(shapes)]
    fitting = [family for family in alike if family.fits(shapes)]
    return (named or fitting or alike or known)[0]


def class_names(kind: str) -> list[str]:
    """The classes that a config.json of a kind may name."""
    return [name for family in families(kind) for name in family.classes]


def titles(kind: str) -> list[str]:
    """The families of a kind, as messages call them."""
    return [family.title for family in families(kind)]


def pipelines() -> dict[str, PipelineKind]:
    """Every known pipeline class, as model_index.json names it."""
    return {name: kind for family in families("transformer") for name, kind in family.pipelines.items()}


def treatment_of(folder: str | Path) -> Treatment:
    """How the pipeline of a model folder treats texts; as Wan's for any other folder."""
    from stdit.text.places import Treatment

    folder = Path(folder).expanduser()
    if not (folder / "text_encoder").is_dir():
        return Treatment()
    try:
        name = json.loads((folder / "model_index.json").read_text("utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return Treatment()
    kind = pipelines().get(str(name))
    return kind.text if kind else Treatment()


def diffusers_vaes() -> dict[str, VaeTraits]:
    """The autoencoders that diffusers runs, by class: those of the families, and those of no family here."""
    from stdit.vae.families.diffusers_vae import OTHERS

    return {name: traits for family in families("transformer") for name, traits in family.autoencoders.items()} | OTHERS


def class_of(config: Any) -> list[str]:
    """Library and class of a config's model, as model_index.json names them."""
    family = family_of(config)
    library = "stdit" if family.form(config, "diffusers") == "own" else family.library
    return [library, family.written(config, "diffusers")["_class_name"]]


def release_of(config: TransformerConfig) -> Release | None:
    """The release with these settings; None for a size that nobody released, such as most that stdit trains."""
    for release in family_of(config).releases:
        if all(getattr(config, name) == value for name, value in release.settings.items()):
            return release
    return None


def guided_by_null_text(config: TransformerConfig) -> bool:
    """Whether "no text" is as many rows of the model's `null_text` as the text has, not the text encoder's of ""."""
    return config.null_text > 0 and family_of(config).guided_by_null_text


def table_of(config: Any, dialect: str) -> Table:
    """How the tensors of a config's model are those of a dialect."""
    return family_of(config).keymap(config, dialect).table(shapes_of(on_meta(config)))


def on_meta(config: Any) -> nn.Module:
    """Builds the model on the meta device, without initialising weights: that would take longer than reading them."""
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
