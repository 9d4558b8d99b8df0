"""Classifier-free guidance (Ho & Salimans 2022)."""

from __future__ import annotations

from torch import Tensor


def needs_unconditional(scale: float) -> bool:
    """Whether a guidance scale asks for the unconditional prediction: above 1 only, as in diffusers' WanPipeline."""
    return scale > 1.0


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """v = v_uncond + scale · (v_cond − v_uncond). Scale 1 is the conditional prediction."""
    return unconditional + scale * (conditional - unconditional)
