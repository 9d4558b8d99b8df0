"""Classifier-free guidance (Ho & Salimans 2022).

Guiding the network's output guides x_0, ε and v alike: at a given sample each is a·output + b, and the weights of the
two outputs add up to one.
"""

from __future__ import annotations

from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: float, beyond: bool = False) -> Tensor:
    """uncond + scale · (cond − uncond): scale 1 is the conditional prediction.

    beyond: cond + scale · (cond − uncond), as Cosmos' pipelines count: there scale 0 is the conditional prediction.
    """
    return (conditional if beyond else unconditional) + scale * (conditional - unconditional)
