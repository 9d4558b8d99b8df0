"""The terms of a VAE's loss. Each returns one number per clip, (B,): a mean, so comparable across shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from stdit.vae.training.discriminator import DiscriminatorConfig
from stdit.vae.training.lpips import LpipsConfig
from stdit.vae.training.trainable_parts import Part

LEVELS = 3  # of the wavelet transform
CELL = 4  # coefficients, on each side of a cell whose contrast is compared
FAINT = 0.003  # added to contrast (under half a grey level), so that the root's slope stays finite
OUTLIER_RADIUS = 3.0  # in standard deviations: Movie Gen's r


@dataclass
class VaeLossConfig:
    """The terms of the loss and their weights; the weight of the L1 is 1.

    kl: weight of the KL divergence from a standard normal; 0: none.
    wavelet: weight of `wavelet_loss`, for details; 0: none.
    outlier: weight of `outlier_penalty`; 0: none; Movie Gen uses 1e5.
    lpips: settings of the LPIPS term; null: none.
    discriminator: settings of the adversarial term; null: none.
    train: the part of the VAE that trains, see `select_trainable_part`.
    crop: train on squares of so many pixels, drawn by key; null: on whole frames.
    frames: train on so many frames of a longer clip (1 + 4k for a temporal stride of 4), drawn by key; null: on all.
    """

    kl: NonNegativeFloat = 1e-6
    wavelet: NonNegativeFloat = 0.0
    outlier: NonNegativeFloat = 0.0
    lpips: LpipsConfig | None = None
    discriminator: DiscriminatorConfig | None = None
    train: Part = "all"
    crop: PositiveInt | None = None
    frames: PositiveInt | None = None


def pixel_loss(output: Tensor, video: Tensor) -> Tensor:
    """The mean absolute error of (B, 3, T, H, W) in [−1, 1]. Returns (B,)."""
    return F.l1_loss(output.float(), video.float(), reduction="none").flatten(1).mean(1)


def wavelet_loss(output: Tensor, video: Tensor, levels: int = LEVELS) -> Tensor:
    """The error of local contrast in each wavelet band, summed over levels. Returns (B,).

    Compares the root mean square over cells of 4×4 coefficients, in every band of details over time, rows and columns:
    texture and motion should be as strong as in the clip, wherever each line of them lies, as texture is perceived
    (Portilla & Simoncelli 2000). An L1 between the coefficients themselves blurs (docs/log.md).
    """
    low, wanted = output.float(), video.float()
    total = low.new_zeros(len(low))
    for _ in range(levels):
        (low, *details), (wanted, *others) = haar(low), haar(wanted)
        errors = [(contrast(a) - contrast(b)).abs().flatten(1) for a, b in zip(details, others) if a.numel()]
        if errors:
            total = total + torch.cat(errors, dim=1).mean(1)
    return total


def contrast(band: Tensor) -> Tensor:
    """The root mean square over cells of 4×4 coefficients, (B, C, T, H, W) to (B, C, T, ⌈H/4⌉, ⌈W/4⌉)."""
    cell = (1, min(CELL, band.shape[3]), min(CELL, band.shape[4]))
    energy = F.avg_pool3d(band.square(), cell, ceil_mode=True)
    return (energy + FAINT**2).sqrt()


def haar(x: Tensor) -> list[Tensor]:
    """One level of the orthonormal Haar transform of (B, C, T, H, W) over time, rows and columns: eight bands.

    The first band is low in all three axes. If the number of frames is odd, the first frame goes unchanged into the low
    half: time is divided as in a causal VAE, and an image has no temporal details. Rows and columns alike.
    """
    bands = [x]
    for dim in (2, 3, 4):
        bands = [half for band in bands for half in _halves(band, dim)]
    return bands


def _halves(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    odd = x.shape[dim] % 2
    pairs = x.narrow(dim, odd, x.shape[dim] - odd).unflatten(dim, (-1, 2))
    a, b = pairs.unbind(dim + 1)
    low, high = (a + b) * 0.5**0.5, (a - b) * 0.5**0.5
    return (torch.cat([x.narrow(dim, 0, odd), low], dim) if odd else low), high


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """The mean over a clip's latents (B, z, T', H', W') of KL(N(mean, e^logvar) ‖ N(0, 1)) in nats. Returns (B,).

    Kingma & Welling 2014, appendix B; small weights as in Rombach et al. 2022, appendix G.
    """
    mean, logvar = mean.float(), logvar.float()
    return (0.5 * (mean.square() + logvar.exp() - 1 - logvar)).flatten(1).mean(1)


def outlier_penalty(latents: Tensor, radius: float = OUTLIER_RADIUS) -> Tensor:
    """Movie Gen's outlier penalty (Polyak et al. 2024, section 3.1.1): the mean over positions of
    max(‖X_ij − Mean(X)‖ − r·‖Std(X)‖, 0) per frame. It keeps a VAE from storing information in a few extreme latents.

    latents: (B, z, T', H', W'). Norms are over channels, Mean and Std over the positions of a frame. Returns (B,).
    """
    x = latents.float()
    mean = x.mean((3, 4), keepdim=True)
    variance = (x - mean).square().mean((3, 4))  # (B, z, T')
    reach = radius * (variance.sum(1) + 1e-12).sqrt()[..., None, None]  # 1e-12: the root has no gradient at 0
    distance = ((x - mean).square().sum(1) + 1e-12).sqrt()  # (B, T', H', W')
    return (distance - reach).clamp_min(0).flatten(1).mean(1)
