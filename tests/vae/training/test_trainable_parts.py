"""What stays when a part of a VAE trains: its weights bit for bit, and what it computes to rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from stdit.vae.autoencoder import CausalVAE, VaeConfig
from stdit.vae.training.trainable_parts import Part, join_split_kernels, select_trainable_part

CONFIG = VaeConfig(base_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,), z_dim=3, patch_size=2)
WAN22 = replace(CONFIG, decoder_base_dim=8, dim_mult=(1, 1), residual=True)
INFLATED = replace(CONFIG, groups=2)  # as from an image VAE


def changed(config: VaeConfig, part: Part) -> tuple[CausalVAE, CausalVAE]:
    """A VAE, and itself after some steps of its part."""
    torch.manual_seed(0)
    before, after = CausalVAE(config), CausalVAE(config)
    after.load_state_dict(before.state_dict())
    select_trainable_part(after, part)
    with torch.no_grad():
        for p in after.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape)
    join_split_kernels(after)
    assert after.state_dict().keys() == before.state_dict().keys()
    return before, after


@torch.no_grad()
@pytest.mark.parametrize("config", [CONFIG, WAN22, INFLATED])
def test_decoder_only_leaves_latents(config: VaeConfig):
    before, after = changed(config, "decoder")
    clip = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    latents = before.encode(clip)
    assert_close(after.encode(clip), latents, rtol=0, atol=1e-6)
    assert (after.decode(latents) - before.decode(latents)).abs().max() > 1e-2
    moved = {name for name, p in before.named_parameters() if not torch.equal(p, after.get_parameter(name))}
    assert moved == {name for name, _ in before.named_parameters() if name.startswith(("decoder.", "conv2."))}


@torch.no_grad()
@pytest.mark.parametrize("config", [CONFIG, WAN22, INFLATED])
def test_temporal_only_leaves_images(config: VaeConfig):
    before, after = changed(config, "temporal")
    image, clip = torch.rand(1, 3, 1, 16, 16) * 2 - 1, torch.rand(1, 3, 5, 16, 16) * 2 - 1
    latents = before.encode(image)
    assert_close(after.encode(image), latents, rtol=0, atol=1e-6)
    assert_close(after.decode(latents), before.decode(latents), rtol=0, atol=1e-6)
    assert (after.encode(clip) - before.encode(clip)).abs().max() > 1e-2
    latents = before.encode(clip)
    assert (after.decode(latents) - before.decode(latents)).abs().max() > 1e-2


def test_split_kernels_are_the_same_vae():
    torch.manual_seed(0)
    vae = CausalVAE(CONFIG)
    clip = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    whole = vae.encode(clip)
    select_trainable_part(vae, "temporal")
    assert_close(vae.encode(clip), whole, rtol=0, atol=1e-6)
    trained = {name for name, p in vae.named_parameters() if p.requires_grad}
    assert trained and all("time_conv" in name or name.endswith(".original0") for name in trained)
    select_trainable_part(vae_all := CausalVAE(CONFIG), "all")
    assert all(p.requires_grad for p in vae_all.parameters())
