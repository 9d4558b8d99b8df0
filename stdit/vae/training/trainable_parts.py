"""Selects the part of a VAE that trains. The rest stays as it was, bit for bit."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stdit.errors import StditError
from stdit.vae.autoencoder import CausalVAE
from stdit.vae.layers import CausalConv3d, Downsample, Upsample

Part = Literal["all", "decoder", "temporal"]


class SplitKernel(nn.Module):
    """Parametrizes a kernel (C_out, C_in, k_t, k_h, k_w) as two: for the past frames, and for the present one."""

    def forward(self, past: Tensor, present: Tensor) -> Tensor:
        return torch.cat([past, present], dim=2)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight[:, :, :-1].clone(), weight[:, :, -1:].clone()


def select_trainable_part(vae: CausalVAE, part: Part) -> None:
    """Lets only `part` of the VAE train.

    all: every parameter.
    decoder: latents do not change, so a transformer trained on them keeps working (against flicker: Blattmann et al.
        2023, Align your Latents, section 3.1.1).
    temporal: the parameters that an image does not meet, so images are encoded and decoded as before: kernels for past
        frames, which are split off (`join_split_kernels` undoes it), and the convolutions over time.
    """
    if not isinstance(vae, CausalVAE):
        raise StditError(
            f"vae.path: {vae.config.name} cannot be trained here. VAEs in Wan's layout can, and Stable Diffusion's "
            "image VAE with vae.inflate=true."
        )
    vae.requires_grad_(part == "all")
    if part == "decoder":
        vae.conv2.requires_grad_(True)
        vae.decoder.requires_grad_(True)
    elif part == "temporal":
        for module in vae.modules():
            if isinstance(module, Downsample | Upsample) and module.time_conv is not None:
                module.time_conv.requires_grad_(True)
        for conv in [module for module in vae.modules() if isinstance(module, CausalConv3d) and module.sees_past]:
            parametrize.register_parametrization(conv, "weight", SplitKernel())
            conv.parametrizations.weight.original0.requires_grad_(True)  # type: ignore[union-attr]


def join_split_kernels(module: nn.Module) -> None:
    """Joins the kernels in `module` that `select_trainable_part` split."""
    for layer in list(module.modules()):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight")
