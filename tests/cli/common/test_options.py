"""--memory: how it is written, and that the VAE keeps to it."""

from __future__ import annotations

import pytest
import torch
import typer

from stdit.cli.common.options import memory_bytes
from stdit.errors import StditError
from stdit.vae.autoencoder import CausalVAE, VaeConfig


def test_how_bytes_are_written():
    found = {text: memory_bytes(text) for text in ("800", "8GB", "8 gb", "1.5G", "2GiB", "500MB", "3 KiB", "1T")}
    assert list(found.values()) == [800, 8e9, 8e9, 1.5e9, 2**31, 5e8, 3 * 2**10, 1e12]
    for text in ("", "much", "8XB", "-1GB", "0", "0.1", "8GB!", "9" * 400):
        with pytest.raises(typer.BadParameter, match="8GB, 500MB or 2GiB"):
            memory_bytes(text)


@torch.no_grad()
def test_the_vae_keeps_to_it():
    vae = CausalVAE(VaeConfig(base_dim=4, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,), z_dim=2))
    video = torch.zeros(3, 3, 8, 8)
    latents = vae.encode(video[None])
    vae.memory = 1000
    for work in (
        lambda: vae.encode(video[None]),
        lambda: vae.decode(latents),
        lambda: list(vae.encode_stream(video.unbind(1))),
        lambda: list(vae.decode_stream(latents[0])),
    ):
        with pytest.raises(StditError, match=r"memory 1000: .*Give at least"):
            work()
    assert torch.equal(vae.encode(video[None], memory=1 << 30), latents)  # the call's own counts
