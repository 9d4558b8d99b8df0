"""Which part of a VAE trains on, and which stays bit for bit as it was."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stdit.errors import StditError
from stdit.vae.autoencoder import CausalVAE
from stdit.vae.layers import CausalConv3d, Downsample, Upsample

Part = Literal["all", "decoder", "temporal"]


class Taps(nn.Module):
    """A kernel (C_out, C_in, k_t, k_h, k_w) out of its taps on earlier frames, and the one on the present."""

    def forward(self, past: Tensor, present: Tensor) -> Tensor:
        return torch.cat([past, present], dim=2)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight[:, :, :-1].clone(), weight[:, :, -1:].clone()


def select_trainable_part(vae: CausalVAE, part: Part) -> None:
    """Lets `part` of the VAE train, from now on.

    all. decoder: latents stay what they were, so a transformer trained on them goes on working (Blattmann et al. 2023,
    Align your Latents, section 3.1.1: against flicker). temporal: what an image does not run through, in encoder and
    decoder, so images are encoded and decoded as before: the taps of kernels on earlier frames, split off for this
    (`join_taps` undoes it), and the convolutions over time.
    """
    if not isinstance(vae, CausalVAE):
        raise StditError(
            f"vae.path: a {vae.config.name} does not train here; VAEs in Wan's layout do, and Stable Diffusion's image "
            "VAE with vae.inflate=true."
        )
    vae.requires_grad_(part == "all")
    if part == "decoder":
        vae.conv2.requires_grad_(True)
        vae.decoder.requires_grad_(True)
    elif part == "temporal":
        for module in vae.modules():
            if isinstance(module, Downsample | Upsample) and module.time_conv is not None:
                module.time_conv.requires_grad_(True)
        for conv in [module for module in vae.modules() if isinstance(module, CausalConv3d) and module.memory]:
            parametrize.register_parametrization(conv, "weight", Taps())
            conv.parametrizations.weight.original0.requires_grad_(True)  # type: ignore[union-attr]


def join_taps(module: nn.Module) -> None:
    """Makes kernels in a module that `select_trainable_part` split whole again."""
    for layer in list(module.modules()):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight")
