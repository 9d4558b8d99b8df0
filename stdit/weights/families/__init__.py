"""The families of open weights: one file each, with one record (`record.Family`), and look-ups over the records.

To add a family, write its file and add its name to FAMILIES; docs/adding-a-family.md shows an example.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.errors import StditError
from stdit.weights.families.record import Family, PipelineKind, Release
from stdit.weights.keymap import Shape, Table
from stdit.weights.tensor_files import read_json

if TYPE_CHECKING:
    from torch import nn

    from stdit.models.config import TransformerConfig
    from stdit.text.places import Treatment
    from stdit.vae.families.diffusers_vae import VaeTraits

FAMILIES = {
    "transformer": ["wan", "ltx", "pixart", "latte", "allegro", "cosmos", "stdit3"],
    "vae": ["wan_vae", "open_sora_vae"],
}


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
    kind = None
    if (folder / "text_encoder").is_dir():
        with suppress(StditError):  # no model_index.json, or a damaged one
            kind = pipelines().get(_pipeline_class(folder))
    return kind.text if kind else Treatment()


def scheduler_of(path: str | os.PathLike[str], config: TransformerConfig) -> dict[str, Any]:
    """The scheduler config of the model folder at `path`, else the one that the config's family was released with.

    It decides the path of the weights, and so how they are trained and sampled (`stdit.diffusion.solvers.path_of`).
    """
    from stdit.diffusion.solvers import read_scheduler

    folder = Path(path).expanduser()
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        return family_of(config).scheduler(config)
    if not (folder / "model_index.json").is_file():
        return read_scheduler(folder / "scheduler")
    pipeline = _pipeline_class(folder)
    kind = pipelines().get(pipeline)
    return read_scheduler(folder / "scheduler", pipeline, kind.caller if kind else "plain")


def _pipeline_class(folder: Path) -> str:
    return str(read_json(folder / "model_index.json").get("_class_name", ""))


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


def objective_of(config: TransformerConfig) -> str:
    """The training objective of a config's family, in words."""
    from stdit.diffusion.solvers import path_of

    learned = config.out_channels == 2 * config.latent_channels
    return {
        "flow": "rectified flow (velocity)",
        "ddpm": "DDPM (noise and learned variance)" if learned else "DDPM (noise)",
        "edm": "EDM (denoiser, preconditioned)",
    }[path_of(family_of(config).scheduler(config)).name]


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
