"""Metrics against scikit-image and scipy."""

from __future__ import annotations

import numpy as np
import pytest

from stdit.errors import StditError
from stdit.evaluation.metrics import binomial_p, mean_psnr, psnr, ssim, wilson_interval


def test_psnr_is_scikit_images():
    reference = pytest.importorskip("skimage.metrics").peak_signal_noise_ratio
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 256, (2, 5, 7, 9, 3), dtype=np.uint8)
    assert psnr(one, other) == pytest.approx(reference(other, one, data_range=255), abs=1e-9)
    assert psnr(one / 255, other / 255, peak=1) == pytest.approx(psnr(one, other), abs=1e-9)
    assert psnr(one, one) == np.inf and mean_psnr([one, one], [one, other]) == pytest.approx(
        (100 + psnr(one, other)) / 2
    )
    with pytest.raises(StditError, match="one shape"):
        psnr(one, other[:4])


@pytest.mark.parametrize("size", [(11, 11), (13, 30)])
def test_ssim_is_scikit_images(size):
    reference = pytest.importorskip("skimage.metrics", reason="pip install 'stdit[dev]'").structural_similarity
    rng = np.random.default_rng(0)
    one = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    other = np.clip(one + rng.normal(0, 40, one.shape), 0, 255).astype(np.uint8)
    same = dict(channel_axis=-1, gaussian_weights=True, use_sample_covariance=False)
    assert ssim(other, one) == pytest.approx(reference(one, other, data_range=255, **same), abs=1e-6)
    assert ssim(one, one) == 1
    with pytest.raises(StditError, match="at least 11 pixels"):
        ssim(one[:10], one[:10])


@pytest.mark.parametrize(
    "right, total, chance", [(0, 64, 0.25), (30, 64, 0.25), (64, 64, 1 / 6), (1, 1, 0.5), (900, 2000, 0.4)]
)
def test_binomial_p_and_wilson_interval_are_scipys(right, total, chance):
    stats = pytest.importorskip("scipy.stats")
    test = stats.binomtest(right, total, chance, alternative="greater")
    assert binomial_p(right, total, chance) == pytest.approx(test.pvalue, rel=1e-9)
    interval = stats.binomtest(right, total).proportion_ci(method="wilson")
    assert wilson_interval(right, total) == pytest.approx((interval.low, interval.high), abs=1e-12)
