"""The measures of a VAE: reconstruction of a clip that arrives in parts, and statistics of latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stdit.evaluation.metrics import EXACT_PSNR, decibels, ssim
from stdit.pixels import to_video
from stdit.vae.training.lpips import Lpips

OUTLIER = 3.0  # standard deviations
STILL = 1  # grey levels by which a still pixel changes at most
STILL_SHARE = 0.01  # of all pixels, that must be still for `flicker_still`

DEFINITIONS = {  # x the source, y the reconstruction
    "psnr": "dB, per clip: 10·log10(255² / MSE) over all frames, pixels and colours of uint8 RGB, borders included; "
    f"an exact clip counts {EXACT_PSNR:g}",
    "psnr_frames": "dB: the mean over a clip's frames of the PSNR per frame",
    "ssim": "per frame and colour (Wang et al. 2004) of uint8 RGB, range 255, Gaussian window 11×11 of σ 1.5, without "
    "5 pixels at each border; then the mean",
    "lpips": "per frame: VGG16, version 0.1, RGB in [−1, 1]; the mean over frames; lower is nearer",
    "flicker": "change of the error between frames, in grey levels of 255: the mean of "
    "|(y_t − y_(t−1)) − (x_t − x_(t−1))| over frames, pixels and colours. 0 only if y moves exactly like x: for a "
    "still y it is the source's motion",
    "flicker_still": "the same over the pixels that are still in the source (no colour changes by more than "
    f"{STILL} grey level from the frame before), where every change is flicker. None for an image, and if less than "
    f"{STILL_SHARE:.0%} of the pixels are still",
    "motion": "the sum of squares of y_t − y_(t−1) over that of x_t − x_(t−1): 1 as in the source, less is "
    "stiller, more is restless. None for an image or a still clip",
    "sharpness": "gradient energy, relative to the source: the sum of squared differences between neighbouring pixels "
    "of rows and columns. 1 as sharp, less is blurred, more is noise or ringing",
    "latents": "mean and standard deviation of the raw latents per channel; outliers: the share further than "
    f"{OUTLIER:g} standard deviations from the mean of its clip and channel (0.0027 if normal), and the furthest",
}
MEASURES = tuple(DEFINITIONS)[:-1]
RATIOS = ("motion", "sharpness")  # summed up by their median: a source with almost no motion would dominate a mean


@dataclass
class ClipMeasures:
    """Accumulates the measures of DEFINITIONS over the frames of one clip."""

    lpips: Lpips | None = None
    # per frame; flicker and still from the second frame on
    errors: list[float] = field(default_factory=list)  # mean squared
    ssims: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)  # LPIPS
    flicker: list[float] = field(default_factory=list)
    still: list[np.ndarray] = field(default_factory=list)  # flicker summed over the still pixels; their share
    # sums over the clip: of the source, of the reconstruction
    motion: np.ndarray = field(default_factory=lambda: np.zeros(2))
    gradients: np.ndarray = field(default_factory=lambda: np.zeros(2))
    last: np.ndarray | None = None  # the frame before, (2, H, W, 3)

    def add(self, source: np.ndarray, rebuilt: np.ndarray) -> None:
        """Adds the next frames of both, uint8 (T, H, W, 3)."""
        for frame, made in zip(source, rebuilt):
            both = np.stack([frame, made]).astype(np.int32)  # (2, H, W, 3)
            self.errors.append(float(np.square(both[1] - both[0]).mean()))
            self.ssims.append(ssim(made, frame))
            for axis in (1, 2):
                self.gradients += np.square(np.diff(both, axis=axis)).sum((1, 2, 3))
            if self.last is not None:
                change = both - self.last
                error, still = np.abs(change[1] - change[0]).mean(2), np.abs(change[0]).max(2) <= STILL  # (H, W)
                self.flicker.append(float(error.mean()))
                self.still.append(np.array([error[still].sum() / still.size, still.mean()]))
                self.motion += np.square(change).sum((1, 2, 3))
            self.last = both
            if self.lpips is not None:
                device = self.lpips.heads[0].device
                pair = [to_video(torch.from_numpy(image[None])).to(device)[None] for image in (frame, made)]
                with torch.no_grad():
                    self.distances.append(float(self.lpips(*pair)))

    def result(self) -> dict[str, float | None]:
        flicker, share = np.mean(self.still, 0) if self.still else (0.0, 0.0)
        return {
            "psnr": min(decibels(float(np.mean(self.errors))), EXACT_PSNR),
            "psnr_frames": float(np.mean([min(decibels(mse), EXACT_PSNR) for mse in self.errors])),
            "ssim": float(np.mean(self.ssims)),
            "lpips": float(np.mean(self.distances)) if self.distances else None,
            "flicker": float(np.mean(self.flicker)) if self.flicker else None,
            "flicker_still": float(flicker / share) if share >= STILL_SHARE else None,
            "motion": float(self.motion[1] / self.motion[0]) if self.motion[0] else None,
            "sharpness": float(self.gradients[1] / self.gradients[0]) if self.gradients[0] else None,
        }


def latent_statistics(latents: Tensor) -> dict[str, Any]:
    """Statistics per channel of one clip's raw latents (z, T', H', W'), and their count; see DEFINITIONS."""
    values = latents.double().flatten(1)  # (z, N)
    mean, std = values.mean(1), values.std(1, correction=0)
    far = ((values - mean[:, None]).abs() / std.clamp_min(1e-12)[:, None]).cpu()
    return {
        "count": values.shape[1],
        "mean": mean.tolist(),
        "std": std.tolist(),
        "outliers": (far > OUTLIER).double().mean(1).tolist(),
        "furthest": far.amax(1).tolist(),
    }


def pooled_statistics(clips: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Combines `latent_statistics` of clips into those of all their latents together; every latent counts once."""
    counts = np.array([clip["count"] for clip in clips], float)
    weights = (counts / counts.sum())[:, None]
    mean, std, outliers, furthest = (
        np.array([clip[name] for clip in clips]) for name in ("mean", "std", "outliers", "furthest")
    )
    whole = (weights * mean).sum(0)
    variance = (weights * (std**2 + (mean - whole) ** 2)).sum(0)
    return {
        "mean": whole.tolist(),
        "std": np.sqrt(variance).tolist(),
        "outliers": (weights * outliers).sum(0).tolist(),
        "furthest": furthest.max(0).tolist(),
    }
