"""The limit that follows the norms of the last steps, against its averages written out; and how engines keep to it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import ALONE, losses, make_quick, same_weights

from stdit.evaluation.report import read_metrics
from stdit.training.config import load_config
from stdit.training.engine.clipping import AdaptiveClipConfig, NormLimit
from stdit.training.engine.engine import TorchEngine
from stdit.training.engine.optimizer import OptimizerConfig
from stdit.training.run import run


def noted(norms: list[float], config: AdaptiveClipConfig, fixed: float = 0.0) -> NormLimit:
    limit = NormLimit(fixed, config)
    for norm in norms:
        limit.note(norm)
    return limit


def test_at_first_mean_and_deviation_are_the_plain_ones() -> None:
    norms = np.random.default_rng(0).uniform(1, 2, 20).tolist()
    limit = noted(norms, AdaptiveClipConfig(sigma=2, decay=0.99, warmup=20))
    assert limit.value == pytest.approx(np.mean(norms) + 2 * np.std(norms), rel=1e-12)
    assert noted(norms[:19], AdaptiveClipConfig(warmup=20)).value == 0


def test_later_they_are_exponential_averages() -> None:
    """Of weights (1 − decay) · decay^age, of which the first steps share the rest; no norm is clipped here."""
    norms, decay = np.random.default_rng(1).uniform(1, 2, 60), 0.9
    limit = noted(norms.tolist(), AdaptiveClipConfig(sigma=1000, decay=decay, warmup=20))
    weights = (1 - decay) * decay ** np.arange(60)[::-1]
    weights[:10] = decay**50 / 10  # 1 / steps is larger than 1 − decay up to the tenth
    assert weights.sum() == pytest.approx(1)
    mean = (weights * norms).sum()
    assert limit.mean == pytest.approx(mean, rel=1e-12)
    assert limit.variance == pytest.approx((weights * (norms - mean) ** 2).sum(), rel=1e-9)


def test_a_spike_counts_as_clipped_and_what_is_not_finite_does_not_count() -> None:
    norms, config = np.random.default_rng(2).uniform(1, 2, 40).tolist(), AdaptiveClipConfig()
    before = noted(norms, config)
    spiked, clipped = noted([*norms, 1e6], config), noted([*norms, before.value], config)
    assert spiked == clipped and spiked.value < 1.2 * before.value
    assert noted([*norms, math.nan, math.inf], config) == before
    assert noted(norms, config, fixed=0.5).value == 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_engine_clips_a_spike_to_the_limit(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4))

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return (self.weight * batch).sum()

    adaptive = AdaptiveClipConfig(sigma=3, warmup=3)
    config = OptimizerConfig(name="sgd", lr=1.0, weight_decay=0.0, clip=0.0, adaptive_clip=adaptive)
    engine = TorchEngine(Linear(), config, precision, ALONE)
    direction, stepped = torch.full((4,), 0.5), list[float]()
    monkeypatch.setattr(engine.optimizer, "step", lambda: stepped.append(float(engine.flat_masters[0].grad.norm())))
    for norm in (1.0, 1.25, 1.5, 64.0, 1.25):
        engine.backward(norm * direction, 1.0, last=True)
        assert engine.step(1.0) == pytest.approx(norm)
    limit = 1.25 + 3 * np.std([1, 1.25, 1.5])
    assert stepped == pytest.approx([1.0, 1.25, 1.5, limit, 1.25], rel=1e-5)


def test_a_run_that_goes_on_keeps_the_averages(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)
    settings = ["optimizer.adaptive_clip={sigma: 0.5, warmup: 2}", "optimizer.clip=0", "data.workers=0"]
    settings += ["schedule.decay=constant"]
    for name, steps in (("whole", ["8"]), ("cut", ["4", "8"])):
        for count in steps:
            overrides = [f"run={tmp_path / name}", *settings, f"schedule.steps={count}"]
            run(load_config(tiny / "flow.yaml", overrides), ALONE)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
    lines = read_metrics(tmp_path / "cut", "train")
    limits = [line.get("grad_limit") for line in lines]
    assert limits[:2] == [None, None] and any(line["grad_norm"] > line["grad_limit"] for line in lines[2:])
    assert limits == [line.get("grad_limit") for line in read_metrics(tmp_path / "whole", "train")]
    levels = [[line["loss_by_level"] for line in read_metrics(tmp_path / name, "train")] for name in ("cut", "whole")]
    assert levels[0] == levels[1] and len(levels[0][0]) == 4
