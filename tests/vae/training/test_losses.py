"""The VAE's losses against torch.distributions, matrices written out, and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from stdit.vae.training.losses import FAINT, haar, kl_loss, outlier_penalty, pixel_loss, wavelet_loss


def test_kl_equals_torch_distributions():
    mean, logvar = torch.randn(2, 3, 2, 4, 5), torch.randn(2, 3, 2, 4, 5)
    wanted = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(torch.zeros(()), torch.ones(())))
    assert_close(kl_loss(mean, logvar), wanted.mean((1, 2, 3, 4)))
    assert_close(kl_loss(torch.full((1, 8, 1, 2, 2), 2.0), torch.zeros(1, 8, 1, 2, 2)), torch.tensor([2.0]))


def test_pixels_are_means_over_a_clip():
    output, video = torch.zeros(2, 3, 5, 4, 4), torch.zeros(2, 3, 5, 4, 4)
    video[0, :, :, :2] = 0.5
    assert_close(pixel_loss(output, video), torch.tensor([0.25, 0.0]))


def haar_matrix(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The low and the high rows of the orthonormal Haar transform of n numbers, the first of an odd n left alone."""
    odd, h = n % 2, math.sqrt(0.5)
    low, high = torch.zeros(odd + n // 2, n).double(), torch.zeros(n // 2, n).double()
    low[:odd, :odd] = 1
    for k in range(n // 2):
        low[odd + k, odd + 2 * k : odd + 2 * k + 2] = h
        high[k, odd + 2 * k], high[k, odd + 2 * k + 1] = h, -h
    return low, high


@pytest.mark.parametrize("size", [(5, 4, 6), (1, 6, 4), (4, 5, 3), (2, 1, 1)])
def test_wavelets_are_the_matrices_of_haar_and_orthonormal(size: tuple[int, int, int]):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    bands = haar(x)
    axes = [haar_matrix(n) for n in size]
    wanted = [torch.einsum("bcthw,it,jh,kw->bcijk", x, t, h, w) for t in axes[0] for h in axes[1] for w in axes[2]]
    assert len(bands) == len(wanted) == 8
    for band, other in zip(bands, wanted):
        assert_close(band, other)
    assert_close(sum(band.square().sum() for band in bands), x.square().sum())  # Parseval
    assert bands[4].numel() > 0 or size[0] == 1  # an image has no temporal details


def strength(coefficient: float) -> float:
    """How far a band of such coefficients is from one of zeros."""
    return math.sqrt(coefficient**2 + FAINT**2) - FAINT


def test_the_wavelet_loss_of_known_pictures():
    rows, columns = torch.arange(8)[:, None], torch.arange(8)
    board = (0.1 * (-1.0) ** (rows + columns)).expand(2, 3, 1, 8, 8)
    zeros = torch.zeros(2, 3, 1, 8, 8)
    assert_close(wavelet_loss(zeros + 0.3, zeros), torch.zeros(2))  # flat: the pixels' own loss sees it
    # One of three bands has 2 · 0.1 everywhere, and nothing is left for coarser levels.
    assert_close(wavelet_loss(zeros, board), torch.full((2,), strength(0.2) / 3))
    assert_close(wavelet_loss(-board, board), torch.zeros(2))  # as strong, one pixel further


def test_the_wavelet_loss_of_known_motion():
    still = torch.zeros(1, 3, 5, 8, 8)
    flicker, slow = still.clone(), still.clone()
    flicker[:, :, 1::2], flicker[:, :, 2::2] = 0.1, -0.1
    # 2 pairs of frames of 2 · √2 · 0.1 in one band, of 4 · 2 cells in temporal and 3 · 3 in other bands.
    assert_close(wavelet_loss(flicker, still), torch.tensor([2 * strength(0.2 * 2**0.5) / 17]))
    slow[:, :, 1:3], slow[:, :, 3:] = 0.1, -0.1  # the second level's one pair, 4 · 1 and 3 · 2 cells
    assert_close(wavelet_loss(slow, still), torch.tensor([strength(0.8) / 10]))
    assert wavelet_loss(flicker[:, :, :1], still[:, :, :1]) == 0


def test_texture_that_is_another_draw_is_nearer_than_none():
    """To the pixels' loss it is the other way round."""
    one, other = torch.randn(2, 1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.2
    flat = torch.zeros_like(one)
    assert wavelet_loss(other, one) < 0.5 * wavelet_loss(flat, one)
    assert pixel_loss(other, one) > pixel_loss(flat, one)


@pytest.mark.parametrize("frames", [1, 3])
def test_the_outlier_penalty_is_movie_gens(frames: int):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, frames, 5, 6, generator=generator, dtype=torch.float64).float()
    x[0, :, 0, 1, 2] += 20
    x[1, 0, -1, 4, 4] -= 30
    wanted = []
    for clip in x.double().numpy():
        total = 0.0
        for t in range(frames):
            frame = clip[:, t]
            mean, std = frame.mean((1, 2)), frame.std((1, 2))
            for i in range(5):
                for j in range(6):
                    far = math.dist(frame[:, i, j], mean) - 3 * math.hypot(*std)
                    total += max(far, 0.0) / 30
        wanted.append(total / frames)
    assert min(wanted) > 0
    assert_close(outlier_penalty(x), torch.tensor(wanted, dtype=torch.float32))


def test_one_bright_spot_costs_its_closed_form_and_less_costs_nothing():
    height, n = 5.0, 16 * 16
    x = torch.zeros(1, 2, 1, 16, 16, requires_grad=True)
    with torch.no_grad():
        x[0, 1, 0, 3, 4] = height
    loss = outlier_penalty(x)
    assert_close(loss, torch.tensor([height / n * ((n - 1) / n - 3 * math.sqrt(n - 1) / n)]), check_dtype=False)
    loss.sum().backward()
    assert x.grad is not None and x.grad[0, 1, 0, 3, 4] > 0 and x.grad.isfinite().all()
    assert outlier_penalty(torch.zeros(1, 2, 1, 3, 3)) == 0  # of nine positions none is 3 deviations off
    few = torch.zeros(1, 2, 1, 3, 3, requires_grad=True)
    outlier_penalty(few + torch.arange(9).view(3, 3)).sum().backward()
    assert few.grad is not None and not few.grad.any()
