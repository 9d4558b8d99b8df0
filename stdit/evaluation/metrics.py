"""How near two clips are, and how sure a share of right answers is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stdit.errors import StditError


def psnr(clip: np.ndarray, reference: np.ndarray, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio of one clip in dB: 10·log10(peak² / MSE), the MSE over all frames, pixels, channels.

    This is scikit-image's `peak_signal_noise_ratio(reference, clip, data_range=peak)` on the whole array. Papers that
    average over frames get a slightly higher number. Equal clips give infinity.
    """
    clip, reference = np.asarray(clip), np.asarray(reference)
    if clip.shape != reference.shape:
        raise StditError(f"PSNR compares clips of one shape, not {clip.shape} with {reference.shape}.")
    return decibels(float(np.mean((clip.astype(np.float64) - reference.astype(np.float64)) ** 2)), peak)


def decibels(mse: float, peak: float = 255.0) -> float:
    """PSNR in dB of a mean squared error; infinity for none."""
    return math.inf if mse == 0 else 10 * math.log10(peak**2 / mse)


ALIKE = 100.0  # dB that a clip or frame counts that is reproduced exactly


def mean_psnr(clips: Sequence[np.ndarray], references: Sequence[np.ndarray], peak: float = 255.0) -> float:
    """The mean over clips of each clip's own PSNR; a clip reproduced exactly counts as ALIKE."""
    if len(clips) != len(references) or not clips:
        raise StditError(
            f"PSNR of {len(clips)} clips against {len(references)} references: give the same number, not 0."
        )
    return float(np.mean([min(psnr(clip, reference, peak), ALIKE) for clip, reference in zip(clips, references)]))


SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # of the Gaussian window, in pixels: 11×11
SMALLEST_SSIM = 2 * SSIM_RADIUS + 1


def ssim(frame: np.ndarray, reference: np.ndarray, peak: float = 255.0) -> float:
    """Structural similarity of two pictures (H, W, C) (Wang et al. 2004): mean over pixels and channels, 1 if equal.

    Each channel by itself; Gaussian window of σ 1.5 cut off at 11×11, population variances, K 0.01 and 0.03; pixels
    whose window would reach over the border, 5 on each side, do not count. This is scikit-image's
    `structural_similarity(…, channel_axis=-1, data_range=peak, gaussian_weights=True, use_sample_covariance=False)`.
    """
    x, y = np.asarray(frame, np.float64), np.asarray(reference, np.float64)
    if x.shape != y.shape or x.ndim != 3 or min(x.shape[:2]) < SMALLEST_SSIM:
        raise StditError(
            f"SSIM compares pictures of one shape (H, W, C), at least {SMALLEST_SSIM} pixels a side, not {x.shape} "
            f"with {y.shape}."
        )
    window = np.exp(-0.5 * (np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1) / SSIM_SIGMA) ** 2)
    window /= window.sum()

    def local(values: np.ndarray) -> np.ndarray:
        """The mean under the window wherever all of it is inside."""
        for axis in (0, 1):
            count = values.shape[axis] - 2 * SSIM_RADIUS
            parts = (np.take(values, range(i, i + count), axis) * weight for i, weight in enumerate(window))
            values = sum(parts, np.zeros(()))
        return values

    mean_x, mean_y = local(x), local(y)
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    covariance = local(x * y) - product
    variances = local(x * x + y * y) - squares
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    return float(np.mean((2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))))


def binomial_p(right: int, total: int, chance: float) -> float:
    """The probability of `right` or more of `total` by chance alone (exact, one-sided)."""
    if not 0 <= right <= total or not 0 < chance < 1:
        raise ValueError(f"right={right} must be in 0..{total} and chance={chance} strictly between 0 and 1.")
    if right == 0:
        return 1.0
    logs = [
        math.lgamma(total + 1)
        - math.lgamma(k + 1)
        - math.lgamma(total - k + 1)
        + k * math.log(chance)
        + (total - k) * math.log1p(-chance)
        for k in range(right, total + 1)
    ]
    return min(1.0, math.fsum(math.exp(value) for value in logs))


def wilson_interval(right: int, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): within [0, 1], and right for small counts, which p ± z·σ is not."""
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"right={right} must be in 0..{total}, and total at least 1.")
    share, z2 = right / total, z * z
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total)) / (1 + z2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)
