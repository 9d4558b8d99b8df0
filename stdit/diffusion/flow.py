"""The path from noise to clip and what the network says about it (Liu et al. 2022; Lipman et al. 2022).

A clip at noise level t in [0, 1] is x_t = (1 − t)·x_0 + t·ε, with ε ~ N(0, 1); the network predicts the velocity
v = dx_t/dt = ε − x_0. Level 1 is noise, level 0 the clip: known tokens are simply tokens at level 0. Every t here is a
number or a tensor that broadcasts against the latents.
"""

from __future__ import annotations

from torch import Tensor


def interpolate(x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """x_t = (1 − t)·x_0 + t·ε. Exactly x_0 at t = 0 and exactly ε at t = 1."""
    return (1 - t) * x0 + t * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """v = ε − x_0, what the network is trained to predict; along a straight path it does not depend on t."""
    return noise - x0
