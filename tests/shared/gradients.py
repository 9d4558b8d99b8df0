"""The gradients that an engine holds between a step's last backward and its update."""

from __future__ import annotations

import torch
from torch import Tensor

from stdit.training.engine.engine import Engine, TorchEngine


def gradients_of(engine: Engine) -> dict[str, Tensor]:
    """Whole gradients by parameter, in fp32, before clipping."""
    if isinstance(engine, TorchEngine):
        pairs = zip(engine.flat_masters, engine.pieces)
        return {p.name: torch.zeros_like(flat) if flat.grad is None else flat.grad.clone() for flat, (p,) in pairs}
    from deepspeed.utils import safe_get_full_grad

    parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    return {name: safe_get_full_grad(p).detach().float().cpu().clone() for name, p in parameters.items()}
