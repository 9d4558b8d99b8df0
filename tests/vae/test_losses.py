"""The VAE's loss against torch.distributions and by hand."""

from __future__ import annotations

import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from stdit.vae.losses import kl_to_normal, vae_loss


def test_kl_equals_torch_distributions():
    mean, logvar = torch.randn(2, 3, 2, 4, 5), torch.randn(2, 3, 2, 4, 5)
    wanted = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(torch.zeros(()), torch.ones(())))
    assert_close(kl_to_normal(mean, logvar), wanted)
    assert_close(kl_to_normal(torch.zeros(3), torch.zeros(3)), torch.zeros(3))


def test_loss_is_per_element_means():
    output, video = torch.zeros(2, 3, 5, 4, 4), torch.zeros(2, 3, 5, 4, 4)
    video[0] = 0.5
    mean, logvar = torch.zeros(2, 8, 2, 1, 1), torch.zeros(2, 8, 2, 1, 1)
    mean[1] = 2.0
    assert_close(vae_loss(output, video, mean, logvar, kl_weight=0.0), torch.tensor([0.5, 0.0]))
    assert_close(vae_loss(output, video, mean, logvar, kl_weight=0.1), torch.tensor([0.5, 0.2]))
