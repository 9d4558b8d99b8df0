"""The path from noise to clip and what the network says about it (Liu et al. 2022; Lipman et al. 2022).

A clip at noise level t in [0, 1] is x_t = (1 − t)·x_0 + t·ε, with ε ~ N(0, 1); the network predicts the velocity
v = dx_t/dt = ε − x_0. Level 1 is noise, level 0 the clip: known tokens are simply tokens at level 0. Every t here is a
number or a tensor that broadcasts against the latents; `levels_over_frames` shapes one level a latent frame so.
"""

from __future__ import annotations

from torch import Tensor


def interpolate(x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """x_t = (1 − t)·x_0 + t·ε. Exactly x_0 at t = 0 and exactly ε at t = 1."""
    return (1 - t) * x0 + t * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """v = ε − x_0, what the network is trained to predict; along a straight path it does not depend on t."""
    return noise - x0


def levels_over_frames(t: Tensor, latents: Tensor) -> Tensor:
    """Shapes noise levels to broadcast against the latents of one clip.

    t: () or (F,), F dividing T (F < T where a patch spans several latent frames). latents: (C, T, H, W).
    Returns () or (T, 1, 1), in the latents' dtype.
    """
    if t.ndim == 0:
        return t.to(latents)
    frames = latents.shape[1]
    if t.ndim != 1 or frames % len(t):
        raise ValueError(f"noise levels of shape {tuple(t.shape)} do not fit {frames} latent frames.")
    return t.to(latents).repeat_interleave(frames // len(t))[:, None, None]
