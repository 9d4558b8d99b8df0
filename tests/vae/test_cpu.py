"""Convolutions that are computed faster on a CPU, against torch's own in fp64; and on no other device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stdit.vae import cpu
from stdit.vae.autoencoder import CausalVAE, VaeConfig
from stdit.vae.clips import to_frames

oneDNN = pytest.mark.skipif(not cpu.ONEDNN, reason="this torch has no oneDNN")


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.double() - wanted).norm() / wanted.norm())


@oneDNN
@torch.no_grad()
@pytest.mark.parametrize("strip", [cpu.WINOGRAD_STRIP, 1, 200])  # all rows, single ones, some
@pytest.mark.parametrize(("clips", "frames", "rows", "columns"), [(1, 2, 7, 5), (1, 4, 1, 9), (2, 6, 8, 1)])
def test_winograd_over_time(clips, frames, rows, columns, strip, monkeypatch):
    monkeypatch.setattr(cpu, "WINOGRAD_STRIP", strip)
    torch.manual_seed(0)
    conv = nn.Conv3d(6, 9, (3, 3, 3))
    x = torch.randn(clips, frames + 2, rows, columns, 6).movedim(-1, 1)
    wanted = F.conv3d(x.double(), conv.weight.double(), conv.bias.double(), padding=(0, 1, 1))
    assert apart(cpu.winograd_over_time(x, conv.weight, conv.bias), wanted) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 3, 4, 6), (3, 2, 5, 1), (2, 4, 1, 1)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_convolution_of_upsampled_frames(size, channels_last):
    torch.manual_seed(0)
    conv = nn.Conv2d(size[1], 5, 3, padding=1, dtype=torch.float64)
    frames = torch.randn(size, dtype=torch.float64)
    if channels_last:
        frames = frames.contiguous(memory_format=torch.channels_last)
    wanted = conv(F.interpolate(frames, scale_factor=2.0, mode="nearest-exact"))
    assert apart(cpu.convolve_upsampled(conv, frames), wanted) < 1e-14


@oneDNN
@torch.no_grad()
def test_a_vae_by_winograd_is_the_one_without(monkeypatch):
    torch.manual_seed(0)
    config = VaeConfig(base_dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(False, True), z_dim=3)
    vae = CausalVAE(config)
    video = torch.rand(2, 3, 9, 16, 24) * 2 - 1
    latents = vae.encode(video)
    decoded = vae.decode(latents, clamp=False)
    calls = []
    monkeypatch.setattr(cpu, "WINOGRAD_CHANNELS", 1)
    run = cpu.winograd_over_time
    monkeypatch.setattr(cpu, "winograd_over_time", lambda x, *kernel: calls.append(x.shape) or run(x, *kernel))
    assert apart(vae.encode(video), latents) < 1e-6
    encoding = len(calls)
    assert apart(vae.decode(latents, clamp=False), decoded) < 1e-6
    assert 0 < encoding < len(calls)


def test_one_frame_is_channels_last_to_torch():
    x = torch.randn(1, 1, 4, 6, 5).movedim(-1, 1)  # (B, C, T, H, W)
    frame = to_frames(x)
    assert torch.equal(frame[0], x[0, :, 0])
    assert F.pad(frame, (0, 1, 0, 1)).stride() == (5 * 7 * 5, 1, 7 * 5, 5)
    plain = torch.randn(1, 5, 1, 4, 6)
    assert torch.equal(to_frames(plain), plain[:, :, 0])


@torch.no_grad()
def test_no_other_device_takes_the_cpus_way(monkeypatch):
    for name in ("convolve", "convolve_upsampled", "norm_silu_with_past"):
        monkeypatch.setattr(cpu, name, lambda *given: pytest.fail("this is not a CPU"))
    with torch.device("meta"):
        vae = CausalVAE(VaeConfig(base_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,), z_dim=3))
        mean, _ = vae.encode_moments(torch.zeros(1, 3, 5, 8, 8))
        assert mean.shape == (1, 3, 3, 4, 4) and vae.decode_raw(mean).shape == (1, 3, 5, 8, 8)
