from __future__ import annotations

import pytest
import torch

from stdit.diffusion import flow
from stdit.diffusion.guidance import guide, guides_beyond, needs_unconditional


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_ends_are_exact(pair):
    x0, noise = pair
    assert torch.equal(flow.interpolate(x0, noise, 0.0), x0)
    assert torch.equal(flow.interpolate(x0, noise, 1.0), noise)


@pytest.mark.parametrize("t", [0.0, 0.437, 1.0])
def test_velocity_gives_both_ends_back_and_is_the_derivative(pair, t):
    x0, noise = pair
    x_t, v = flow.interpolate(x0, noise, t), flow.velocity(x0, noise)
    torch.testing.assert_close(x_t - t * v, x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x_t + (1 - t) * v, noise, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((flow.interpolate(x0, noise, t + 1e-3) - x_t) / 1e-3, v, rtol=1e-9, atol=1e-9)


def test_guidance():
    cond, uncond = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    assert guide(cond, uncond, 5).tolist() == [5.0, -6.0]
    assert torch.equal(guide(cond, uncond, 1), cond)
    assert torch.equal(guide(cond, uncond, 0), uncond)
    assert guide(cond, uncond, 4, beyond=True).tolist() == guide(cond, uncond, 5).tolist()  # as Cosmos counts
    assert guides_beyond("Cosmos2TextToImagePipeline") and not guides_beyond("WanPipeline")
    assert needs_unconditional(1.5) and not needs_unconditional(1.0)
