"""Weights of clips and of noise levels, against their closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stdit.diffusion.paths import DdpmPath, EdmPath, FlowPath
from stdit.errors import StditError
from stdit.training.config import load_config
from stdit.training.engine.parallel import World
from stdit.training.objectives.config import FlowConfig
from stdit.training.objectives.loss_weights import LEVEL_WEIGHTS, cosmap
from stdit.training.objectives.protocol import StepKey
from stdit.training.setup.build import build
from stdit.training.setup.resolve import resolve


def test_cosmap_is_a_density_over_levels() -> None:
    t = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert float(cosmap(t, FlowPath()).mean()) == pytest.approx(1, abs=1e-8)
    assert float(cosmap(torch.tensor(0.5, dtype=torch.float64), FlowPath())) == pytest.approx(4 / math.pi)
    assert LEVEL_WEIGHTS["uniform"](t, FlowPath()).unique().tolist() == [1.0]


def test_the_path_tells_a_weight_the_signal_to_noise_ratio() -> None:
    t = torch.arange(1, 1000, dtype=torch.float64) / 1000
    one, zero, ddpm = torch.ones_like(t), torch.zeros_like(t), DdpmPath.of({})
    ratios = [(FlowPath(), (1 - t) / t), (EdmPath(), 0.5 * (1 - t) / t), (ddpm, (1 / ddpm.alphas[1:] - 1) ** -0.5)]
    for path, ratio in ratios:
        torch.testing.assert_close(path.noisy(one, zero, t) / path.noisy(zero, one, t), ratio)


def test_a_level_weight_scales_the_error_and_not_the_sum_of_weights(tiny: Path) -> None:
    parts = build(resolve(load_config(tiny / "flow.yaml")), World(0, 1, torch.device("cpu")))
    objective, items = parts.objective, parts.plan.step(0)
    examples, key = parts.loader.fetch(items, 0), StepKey(0, 0, 0, len(items))
    plain = objective.prepare(examples, items, key)
    objective.config = replace(objective.config, flow=replace(objective.config.flow, level_weight="cosmap"))
    weighted = objective.prepare(examples, items, key)
    known = plain.token_weights == 0
    factors = cosmap(plain.pack.levels[plain.pack.level_of], objective.path)[~known].float()
    torch.testing.assert_close(weighted.token_weights[~known], factors * plain.token_weights[~known])
    assert not weighted.token_weights[known].any() and weighted.weight == plain.weight


def test_an_unknown_weight_is_told_the_nearest() -> None:
    with pytest.raises(StditError, match=r"level_weight 'cosmop' .* Did you mean 'cosmap'"):
        FlowConfig(level_weight="cosmop")
