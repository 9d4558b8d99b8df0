from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from stdit.diffusion.noise_levels import NoiseLevelConfig, noise_levels, shift_by_tokens, shift_noise_level
from stdit.diffusion.noise_levels import stratified_uniform as uniform
from stdit.errors import StditError
from stdit.settings import read


@pytest.mark.parametrize("count", [1, 7, 64])
def test_each_stratum_holds_one_position_on_any_rank(count):
    u = uniform(range(count), count, seed=1, epoch=2, step=3)
    assert sorted((u * count).long().tolist()) == list(range(count))
    halves = [uniform(range(rank, count, 2), count, seed=1, epoch=2, step=3) for rank in range(2)]
    for rank in range(2):
        assert torch.equal(halves[rank], u[rank::2])
    if count > 1:
        assert not torch.equal(u, uniform(range(count), count, seed=1, epoch=2, step=4))
        assert not torch.equal(u, uniform(range(count), count, seed=1, epoch=3, step=3))


def test_a_position_does_not_keep_its_stratum():
    u = torch.stack([uniform(range(8), 8, seed=0, epoch=0, step=step) for step in range(400)])  # (steps, positions)
    assert (u.mean(0) - 0.5).abs().max() < 0.075  # 5 σ of a mean of 400 uniforms


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_levels_are_logit_normal_then_shifted(shift):
    config = NoiseLevelConfig(mean=-0.3, std=1.4, shift=shift)
    t = torch.cat(
        [noise_levels(range(50), 50, [9] * 50, config, seed=0, epoch=0, step=step) for step in range(40)]
    ).numpy()
    logit = np.log(t) - np.log1p(-t) - np.log(shift)  # the shift adds log(shift) to the logit
    assert stats.kstest(logit, stats.norm(-0.3, 1.4).cdf).pvalue > 1e-3
    assert t.dtype == np.float64 and t.min() > 0 and t.max() < 1


def test_shift_by_tokens_is_relative_to_the_base_and_composes():
    base = NoiseLevelConfig(distribution="uniform", shift=2.0)
    by_tokens = NoiseLevelConfig(distribution="uniform", shift=2.0, shift_tokens=100)
    key = dict(seed=0, epoch=0, step=0)
    plain = noise_levels(range(3), 3, [100, 100, 400], base, **key)
    moved = noise_levels(range(3), 3, [100, 100, 400], by_tokens, **key)
    torch.testing.assert_close(moved[:2], plain[:2], rtol=0, atol=1e-15)
    torch.testing.assert_close(moved[2:], shift_noise_level(plain[2:], 2.0), rtol=1e-14, atol=0)
    assert shift_by_tokens(400, 100) == 2
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    torch.testing.assert_close(shift_noise_level(shift_noise_level(t, 3.0), 2.0), shift_noise_level(t, 6.0))
    assert shift_noise_level(t, 1.0).tolist() == t.tolist()


@pytest.mark.parametrize("distribution", ["logit_normal", "uniform"])
@pytest.mark.parametrize("span", [(0.875, 1.0), (0.0, 0.875), (0.3, 0.6)])
def test_levels_of_a_range_are_those_of_all_that_lie_in_it(distribution, span):
    """Against rejection: the same distribution, drawn without a range, and what lies outside thrown away."""
    everywhere = NoiseLevelConfig(distribution, mean=0.4, std=1.2, shift=3.0, shift_tokens=16)
    within = NoiseLevelConfig(distribution, mean=0.4, std=1.2, shift=3.0, shift_tokens=16, range=span)
    many = noise_levels(range(4000), 4000, [64] * 4000, everywhere, seed=0, epoch=0, step=0)
    kept = many[(many >= span[0]) & (many <= span[1])]
    found = noise_levels(range(500), 500, [64] * 500, within, seed=1, epoch=0, step=0)
    assert span[0] <= found.min() and found.max() <= span[1]
    assert stats.ks_2samp(kept.numpy(), found.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    "wrong",
    [
        {"range": (0.5, 0.5)},
        {"range": (0.0, 1.5)},
        {"distribution": "normal"},
        {"std": 0.0},
        {"shift": -1.0},
        {"shift_tokens": 0},
    ],
)
def test_wrong_config_is_an_error(wrong):
    with pytest.raises(StditError, match=f"noise levels: .*{next(iter(wrong))}"):
        read(NoiseLevelConfig, wrong, "noise levels")
