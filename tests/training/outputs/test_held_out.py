"""The held-out loss is the training's loss at fixed noise; what a run evaluates is what it exports."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from keyed_noise import clip_noise
from tiny_runs import ALONE, check_lines, make_quick
from torch import nn

from stdit.data.load.loader import Example, Loader
from stdit.data.plan.split import PlanItem
from stdit.evaluation.harness import evaluate_toy
from stdit.evaluation.report import read_metrics
from stdit.training.config import load_config
from stdit.training.objectives.flow import FlowBatch, FlowObjective
from stdit.training.objectives.protocol import StepKey
from stdit.training.outputs import evaluation, held_out, spread
from stdit.training.run import run
from stdit.training.setup.build import RunComponents, build
from stdit.training.setup.resolve import resolve

SEED = 7


def components(tiny: Path, *overrides: str) -> RunComponents:
    held = [f"eval.manifest={tiny / 'manifest.parquet'}", f"eval.seed={SEED}"]
    return build(resolve(load_config(tiny / "flow.yaml", [*held, *overrides])), ALONE)


def all_clips(parts: RunComponents) -> tuple[list[Example], list[PlanItem]]:
    """Every clip of the manifest, from start and centre."""
    data, buckets = parts.config.data.fixed(), parts.assignment.bucket
    rows = [row for row in range(len(parts.manifest)) if buckets[row] >= 0]
    tokens = [parts.objective.tokens(parts.assignment.shapes[buckets[row]]) for row in rows]
    items = [PlanItem(row, 0, int(buckets[row]), n, 0, place) for place, (row, n) in enumerate(zip(rows, tokens))]
    return Loader(parts.manifest, parts.assignment, data, seed=0, workers=0).fetch(items, 0), items


@torch.no_grad()
def randomised(module: nn.Module) -> nn.Module:
    """A fresh head of zeros would hide most mistakes."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


def test_it_is_the_loss_of_one_training_step_over_these_clips(tiny: Path) -> None:
    """Which drops no caption, knows no frame, routes no token and packs all clips together."""
    shared = ("objective.flow.level_weight=cosmap", "objective.flow.noise_levels.shift=3")
    alike = ("objective.flow.caption_dropout=0", "objective.flow.tasks={text_to_video: 1}")
    other = components(tiny, *shared, *alike)
    module = randomised(other.objective.fresh())
    examples, items = all_clips(other)
    batch = other.objective.prepare(examples, items, StepKey(SEED, 0, 0, len(items)))
    with torch.no_grad():
        expected = float(module(batch)) / batch.weight

    routing = "objective.flow.routing={share: 0.5, start: 0, end: 2}"
    parts = components(tiny, *shared, "objective.flow.caption_dropout=0.9", "eval.clips=1000", routing)
    found = held_out.held_out_loss(module, parts, ALONE)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert held_out.held_out_loss(module, parts, ALONE) == found  # bit for bit


def test_of_a_network_that_says_zero_it_is_the_targets_mean_square(tiny: Path) -> None:
    """At every noise level: a flow's target, ε − x_0, has none. Tokens count alike."""
    parts = components(tiny, "eval.clips=1000")
    examples, _ = all_clips(parts)
    assert isinstance(parts.objective, FlowObjective)
    total, count = 0.0, 0
    for example in examples:
        x0 = parts.objective.vae.encode(example.video[None])[0]
        noise = clip_noise(x0, SEED, example.clip_id)
        total, count = total + float((noise - x0).square().sum()), count + x0.numel()
    found = held_out.held_out_loss(parts.objective.fresh(), parts, ALONE)
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert list(found["loss_by_level"]) == ["0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1"]
    assert [*found["loss_by_level"].values()] == pytest.approx([total / count] * 4, rel=1e-5)


def test_levels_of_each_part_are_stratified_over_the_clips(tiny: Path) -> None:
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.levels: dict[int, list[float]] = defaultdict(list)

        def forward(self, batch: FlowBatch) -> torch.Tensor:
            assert batch.noise_level is not None
            self.levels[self.calls() % 5].append(batch.noise_level)
            return torch.tensor(batch.weight * batch.noise_level, dtype=torch.float64)

        def calls(self) -> int:
            return sum(map(len, self.levels.values()))

    seen = Seen()
    found = held_out.held_out_loss(seen, components(tiny, "eval.clips=5", "objective.token_power=0"), ALONE)
    own, *levels = seen.levels.values()
    assert found["loss"] == pytest.approx(sum(own) / 5)
    for part, (name, drawn) in enumerate(zip(found["loss_by_level"], levels, strict=True)):
        low = part / 4
        assert all(low + i / 20 <= level <= low + (i + 1) / 20 for i, level in enumerate(sorted(drawn)))
        assert found["loss_by_level"][name] == pytest.approx(sum(drawn) / 5)


def test_one_experts_levels_are_those_that_it_trains() -> None:
    from stdit.diffusion.noise_levels import NoiseLevelConfig

    parts = held_out.level_parts(NoiseLevelConfig(range=(0.9, 1.0)))
    assert list(parts) == ["0.9-0.925", "0.925-0.95", "0.95-0.975", "0.975-1"]
    assert parts["0.95-0.975"].range == pytest.approx((0.95, 0.975))


def test_a_clip_that_cannot_be_read_leaves_the_others_as_they_were(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = components(tiny, "eval.clips=4", "data.workers=0")
    whole = {clip.item.position: clip for clip in spread.share_clips(parts, None, 4, ALONE, lambda clip: clip)}
    example = Loader._example

    def fails(self: Loader, item: PlanItem, epoch: int) -> Example:
        found = example(self, item, epoch)
        return replace(found, failure="gone", weight=0.0) if item.position == 1 else found

    monkeypatch.setattr(Loader, "_example", fails)
    rest = spread.share_clips(parts, None, 4, ALONE, lambda clip: clip)
    assert [clip.item.position for clip in rest] == [0, 2, 3] and {clip.total for clip in rest} == {4}
    assert all(clip.item == whole[clip.item.position].item for clip in rest)


def test_a_run_evaluates_the_weights_that_it_exports(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_quick(monkeypatch)
    settings = [f"run={tmp_path / 'run'}", f"eval.manifest={tiny / 'manifest.parquet'}", "eval.clips=3"]
    settings += [
        "eval.every=3",
        "eval.steps=2",
        "eval.guidance=2",
        "eval.toy={captions: 3, shapes: [32x32x5, 48x32x5]}",
    ]
    settings += ["schedule.steps=4", "optimizer.lr=0.05"]
    run(load_config(tiny / "flow.yaml", settings), ALONE)
    check_lines(tmp_path / "run")
    first, last = read_metrics(tmp_path / "run", "eval")
    assert (first["step"], last["step"]) == (3, 4) and first["loss"] != last["loss"]
    scored = evaluate_toy(tmp_path / "run" / "model", tmp_path / "scored", 3, ["32x32x5", "48x32x5"], 2, 2.0)
    for one in scored["sets"]:
        assert last["toy"][one["shape"]] == {name: score["share"] for name, score in one["samples"].items()}

    from stdit.sampling.pipeline import Pipeline

    exported = Pipeline.load(tmp_path / "run" / "model")
    parts = build(resolve(load_config(tiny / "flow.yaml", settings)), ALONE)
    module = parts.objective.fresh()
    module.transformer, module.text_encoder = exported.transformer, exported.text_encoder
    names = ("loss", "loss_by_level", "loss_by_shape")
    assert held_out.held_out_loss(module, parts, ALONE) == {name: last[name] for name in names}


def test_the_numbers_are_said() -> None:
    values = {"loss": 0.41234, "loss_by_level": {}, "toy": {"64x64x17": {"colour": 1.0, "shape": 0.5}}, "samples": []}
    assert evaluation.described(values) == "held-out loss 0.4123; 64x64x17 right: colour 100%, shape 50%"
    assert evaluation.described({"psnr": 27.126}) == "PSNR 27.13 dB" and evaluation.described({}) == ""
