"""Adapters (LoRA) over frozen weights: adds them to a model, exports them, merges them."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor, nn

from stdit.errors import StditError
from stdit.keyed.weights import ZERO, Start, StartingWeights
from stdit.models.blocks import LoraLinear
from stdit.models.transformer import STDiT, TransformerConfig
from stdit.training.config import LoraConfig
from stdit.weights.families import family_of
from stdit.weights.lora.adapters import Adapter, Pair, merge
from stdit.weights.lora.read import FILES
from stdit.weights.lora.write import write_adapter
from stdit.weights.sources import expert_adapter_places


def add_lora(model: STDiT, config: LoraConfig, seed: int) -> None:
    """Freezes a model and adds an adapter to each target layer, in fp32.

    A starts as in peft (Kaiming, uniform, with a = √5); B at zero, so that the output is unchanged.
    """
    model.requires_grad_(False)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for pattern in config.targets:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise StditError(
                f"model.lora.targets: {pattern!r} is no linear layer of this model; they are named "
                f"{', '.join(list(linears)[:3])}, …, blocks.0.self_attn.q, …, {next(reversed(linears))}."
            )
    starts: dict[str, Start] = {}
    for name, module in linears.items():
        if any(fnmatchcase(name, pattern) for pattern in config.targets):
            layer = LoraLinear(module, config.rank, config.alpha)
            model.set_submodule(name, layer)
            starts[f"{name}.lora_down.weight"] = Start("uniform", layer.in_features**-0.5)
            starts[f"{name}.lora_up.weight"] = ZERO
    StartingWeights(starts, "lora", seed).fill(model)


def adapter_of(weights: Mapping[str, Tensor], config: LoraConfig, expert: str = "") -> Adapter:
    """The adapter of a training.

    weights: the parameters that trained, by name: of the objective's module or of the transformer alone.
    expert: high or low, if two experts train together.
    """
    pairs, start = {}, f"{expert}." if expert else ""
    for name, down in weights.items():
        if name.startswith(start) and name.endswith(".lora_down.weight"):
            layer = name.removesuffix(".lora_down.weight")
            pair = Pair(down, weights[f"{layer}.lora_up.weight"], config.alpha)
            pairs[f"{layer.removeprefix(start).removeprefix('transformer.')}.weight"] = pair
    return Adapter(pairs)


def export_adapters(
    weights: Mapping[str, Tensor], folder: Path, model: TransformerConfig, config: LoraConfig, expert: str | None
) -> None:
    """Writes the trained adapter into a model folder; those of experts to `expert_adapter_places`.

    weights: as for `adapter_of`.
    expert: high, low or both; None for a single transformer.
    """
    places = {"": folder} if expert is None else expert_adapter_places(folder)
    if expert in ("high", "low"):
        places = {"": places[expert]}
    files = {FILES[config.layout]: config.layout}
    if config.layout == "common" and not family_of(model).diffusers_reads_common_lora:
        files = {"lora.safetensors": "common", FILES["diffusers"]: "diffusers"}
    for name, place in places.items():
        for file, layout in files.items():
            write_adapter(adapter_of(weights, config, name), place / file, model, layout)


def merge_lora(module: nn.Module) -> None:
    """Merges the adapters of a module, if it has any, into its weights."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLinear)}
    pairs = {
        f"{name}.weight": Pair(layer.lora_down.weight, layer.lora_up.weight, layer.alpha)
        for name, layer in layers.items()
    }
    merge(module, [(Adapter(pairs), 1.0)])
    for name, layer in layers.items():
        module.set_submodule(name, layer.plain())
