"""Random starting weights: fresh ones are too kind, since a head of zeros lets no gradient through to the rest."""

from __future__ import annotations

import torch

from stdit.training.config import RunConfig
from stdit.training.engine.parallel import World
from stdit.training.engine.start import allocate, fill
from stdit.training.setup import build


def build_random(config: RunConfig, world: World) -> build.RunComponents:
    """As `build`, with noise on all weights that train, the same on all ranks."""
    parts = build.build(config, world)
    if (numbers := parts.objective.numbers) is not None:
        fill(parts.objective.module, allocate(parts.objective.module, torch.float32), numbers)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parts.objective.module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return parts
