"""What a VAE trains on: reconstruction and a small pull of the posterior towards a standard normal."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def vae_loss(output: Tensor, video: Tensor, mean: Tensor, logvar: Tensor, kl_weight: float) -> Tensor:
    """L1 + kl_weight · KL of a VAE (Rombach et al. 2022, appendix G, without its perceptual and adversarial terms).

    output, video: (B, 3, T, H, W) in [−1, 1]; mean, logvar: (B, z, T', H', W') of the raw latents.
    The L1 is the mean over a clip's elements (frames, rows, columns, colours), the KL the mean over its latent
    elements, in nats; so both mean the same at any shape. Returns (B,).
    """
    reconstruction = F.l1_loss(output.float(), video.float(), reduction="none").flatten(1).mean(1)  # (B,)
    kl = kl_to_normal(mean, logvar).flatten(1).mean(1)  # (B,)
    return reconstruction + kl_weight * kl


def kl_to_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, e^logvar) ‖ N(0, 1)) in nats an element, same shape (Kingma & Welling 2014, appendix B)."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
