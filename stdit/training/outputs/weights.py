"""From an engine's shards to whole weights, and from these to a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stdit.training.engine.ema import Ema
from stdit.training.engine.engine import Engine
from stdit.training.engine.parallel import World
from stdit.training.setup.lora import merge_lora
from stdit.vae.training.trainable_parts import join_split_kernels


def averaged_weights(engine: Engine, ema: Ema | None, world: World) -> dict[str, Tensor] | None:
    """All averaged weights (without an average: the masters) in fp32 on rank 0's CPU, None on other ranks."""
    weights: dict[str, Tensor] = {}
    for flat, pieces in zip(ema.averages if ema is not None else engine.flat_masters, engine.pieces):
        numbers = flat.detach().reshape(-1)
        mine = [(piece, numbers[piece.start : piece.start + piece.numel].cpu()) for piece in pieces]
        gathered = [mine] if engine.replicated else world.gather_on_main(mine)
        for piece, part in (pair for rank in gathered or [] for pair in rank):
            if piece.name not in weights:
                weights[piece.name] = torch.empty(piece.shape)
            weights[piece.name].view(-1)[piece.offset : piece.offset + piece.numel] = part
    return weights if world.is_main else None


@torch.no_grad()
def with_weights(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Fills a module of `Objective.fresh` with all trained weights, and merges adapters and split kernels."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert parameters.keys() == weights.keys(), parameters.keys() ^ weights.keys()
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
    merge_lora(module)
    join_split_kernels(module)
    return module
