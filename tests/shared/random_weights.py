"""Random starting weights: fresh ones are too kind, since a head of zeros lets no gradient through to the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stdit.training.config import RunConfig
from stdit.training.engine.parallel import World
from stdit.training.setup import build


def build_random(config: RunConfig, world: World) -> build.RunComponents:
    """As `build`, with noise on all weights that train, the same on all ranks. Frozen ones stay as they are,
    on the meta device if they are there."""
    parts = build.build(config, world)
    module, numbers, generator = parts.objective.module, parts.objective.numbers, torch.Generator().manual_seed(0)
    for name, parameter in [*module.named_parameters()]:
        if not parameter.requires_grad:
            continue
        if parameter.is_meta:
            assert numbers is not None
            parameter = nn.Parameter(numbers(name, 0, parameter.numel()).view(parameter.shape))
            place, _, own = name.rpartition(".")
            setattr(module.get_submodule(place), own, parameter)
        add_noise(parameter, generator)
    return parts


@torch.no_grad()
def add_noise(parameter: Tensor, generator: torch.Generator) -> None:
    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
