"""Distances between clips, and the certainty of a share of right answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stdit.errors import StditError

EXACT_PSNR = 100.0  # dB: the value of a clip or frame that is reproduced exactly, for means
SSIM_BORDER = 5  # pixels on each side without a whole 11×11 window
SMALLEST_SSIM = 2 * SSIM_BORDER + 1  # pixels per side


def psnr(clip: np.ndarray, reference: np.ndarray, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio of one clip in dB: 10·log10(peak² / MSE), the MSE over all frames, pixels, channels.

    Equals scikit-image's `peak_signal_noise_ratio(reference, clip, data_range=peak)` of the whole array. Papers that
    average over frames report slightly higher numbers. Equal clips give infinity.
    """
    clip, reference = np.asarray(clip), np.asarray(reference)
    if clip.shape != reference.shape:
        raise StditError(f"PSNR compares clips of one shape, not {clip.shape} with {reference.shape}.")
    return decibels(float(np.mean((clip.astype(np.float64) - reference.astype(np.float64)) ** 2)), peak)


def decibels(mse: float, peak: float = 255.0) -> float:
    """PSNR in dB of a mean squared error; infinity for none.

    By hand, for clips whose frames arrive in pieces; also, torchmetrics takes the logarithms in fp32.
    """
    return math.inf if mse == 0 else 10 * math.log10(peak**2 / mse)


def mean_psnr(clips: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> float:
    """The mean of the clips' PSNR. A clip that is reproduced exactly counts as EXACT_PSNR."""
    pairs = zip(clips, references, strict=True)
    return float(np.mean([min(psnr(clip, reference), EXACT_PSNR) for clip, reference in pairs]))


def ssim(frame: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of two uint8 pictures (H, W, C): the mean over pixels and channels.

    Per channel, with a Gaussian window of σ 1.5 cut off at 11×11, population variances, K 0.01 and 0.03; the border of
    5 pixels does not count. Equals scikit-image's `structural_similarity(…, channel_axis=-1, data_range=255,
    gaussian_weights=True, use_sample_covariance=False)` up to the rounding of fp32.
    """
    if frame.shape != reference.shape or frame.ndim != 3 or min(frame.shape[:2]) < SMALLEST_SSIM:
        raise StditError(
            f"SSIM compares pictures of one shape (H, W, C), at least {SMALLEST_SSIM} pixels a side, not {frame.shape} "
            f"with {reference.shape}."
        )
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = (torch.from_numpy(picture).permute(2, 0, 1)[None].float() for picture in (frame, reference))
    # torchmetrics' own mean includes reflected borders in some versions, so take the map and cut them off
    _, similarity = structural_similarity_index_measure(x, y, data_range=255.0, return_full_image=True)
    inner = similarity[..., SSIM_BORDER:-SSIM_BORDER, SSIM_BORDER:-SSIM_BORDER]
    return float(inner.double().mean())


def binomial_p(right: int, total: int, chance: float) -> float:
    """The exact probability of `right` or more right answers out of `total` by chance alone; 0 < chance < 1."""
    if right == 0:
        return 1.0
    import torch

    counts = torch.arange(right, total + 1, dtype=torch.float64)
    binomial = torch.distributions.Binomial(total, torch.tensor(chance, dtype=torch.float64))
    return min(1.0, float(binomial.log_prob(counts).exp().sum()))


def wilson_interval(right: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927). Unlike p ± z·σ it stays within [0, 1] and holds for small counts."""
    share, z2 = right / total, z * z
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total)) / (1 + z2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)
