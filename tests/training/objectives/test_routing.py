"""Which tokens skip blocks while training: keyed by the clip, whatever the packs, ranks and resumes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from tiny_runs import ALONE, losses, make_quick, same_weights

from stdit.data.load.loader import Example
from stdit.data.plan.split import split
from stdit.errors import StditError
from stdit.models.config import TransformerConfig, cost_coefficients, transformer_flops
from stdit.sampling.pipeline import SampleRequest
from stdit.shapes import VideoShape
from stdit.training.config import load_config
from stdit.training.objectives.flow import FlowBatch, FlowObjective
from stdit.training.objectives.protocol import StepKey
from stdit.training.objectives.routing import RoutingConfig
from stdit.training.outputs.export import make_pipeline
from stdit.training.run import run
from stdit.training.setup.build import RunComponents, build
from stdit.training.setup.resolve import resolve

ROUTED = "objective.flow.routing={share: 0.5, start: 1, end: 2}"
BIG = TransformerConfig.preset("small")


def built(tiny: Path, *overrides: str) -> RunComponents:
    parts = build(resolve(load_config(tiny / "flow.yaml", ["data.workers=0", *overrides])), ALONE)
    with torch.no_grad():
        for p in parts.objective.module.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return parts


@pytest.fixture(scope="module")
def parts(tiny: Path) -> RunComponents:
    return built(tiny, ROUTED)


def batches(parts: RunComponents, groups: int = 1, bound: int = 10_000, epoch: int = 0) -> list[FlowBatch]:
    """Of the plan's first step, of all groups and micro-steps."""
    key = StepKey(0, epoch, 0, len(parts.plan.step(0)))
    packs = itertools.chain.from_iterable(split(parts.plan.items(0), groups, bound))
    return [parts.objective.prepare(parts.loader.fetch(pack, 0), pack, key) for pack in packs]  # type: ignore[misc]


def example(number: int, occurrence: int = 0) -> Example:
    return Example(str(number), number, occurrence, 0, VideoShape(9, 64, 64), 1.0, "")


@pytest.mark.parametrize(
    ("settings", "blocks"),
    [({}, range(2, 8)), ({"end": 10}, range(2, 10)), ({"start": 0, "end": 12}, range(12)), ({"end": 3}, range(2, 3))],
)
def test_blocks_that_fit_the_depth(settings: dict, blocks: range) -> None:
    assert RoutingConfig(**settings).blocks(BIG) == blocks


@pytest.mark.parametrize(
    ("preset", "settings", "words"),
    [
        ("toy", {}, ["start 2 and end 2 (unset: all but the last 4)", "transformer's 6", "start=1 and end=5"]),
        ("small", {"end": 13}, ["start 2 and end 13", "end ≤ 12"]),
        ("small", {"start": 7, "end": 7}, ["start 7 and end 7", "start=2 and end=10"]),
    ],
)
def test_blocks_that_do_not_fit_are_named_with_a_remedy(preset: str, settings: dict, words: list[str]) -> None:
    with pytest.raises(StditError) as caught:
        RoutingConfig(**settings).blocks(TransformerConfig.preset(preset))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("share", "limit"), [(1, "below 1"), (-0.1, "at least 0")])
def test_a_share_of_all_or_less_than_none_is_refused(tiny: Path, share: float, limit: str) -> None:
    with pytest.raises(StditError, match=rf"objective\.flow\.routing\.share is {share}; it must be {limit}"):
        load_config(tiny / "flow.yaml", [f"objective.flow.routing.share={share}"])


def test_an_unfit_route_is_named_when_the_run_is_built(tiny: Path) -> None:
    with pytest.raises(StditError, match=r"objective\.flow\.routing: start 2 and end 4 .* transformer's 2"):
        built(tiny, "objective.flow.routing={end: 4}")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("tokens", [1, 2, 7, 100])
def test_as_many_tokens_skip_as_the_share_says(share: float, tokens: int) -> None:
    config, key = RoutingConfig(share=share), StepKey(0, 0, 0, 1)
    for known in {0, tokens // 3, tokens - 1}:
        stays = config.staying(tokens, known, example(0), key)
        assert stays[:known].all() and stays.any()
        assert int((~stays).sum()) == min(round(share * tokens), tokens - max(known, 1))


def test_every_unknown_token_skips_as_often() -> None:
    config = RoutingConfig(share=0.25)
    stays = torch.stack([config.staying(40, 8, example(n), StepKey(0, 0, 0, 1)) for n in range(2000)]).double()
    assert (stays[:, 8:].mean(0) - (1 - 10 / 32)).abs().max() < 0.05  # 5 standard deviations


def test_which_tokens_skip_follows_from_seed_epoch_clip_and_occurrence() -> None:
    config, key = RoutingConfig(), StepKey(0, 0, 0, 1)
    one = config.staying(60, 0, example(0), key)
    assert torch.equal(one, config.staying(60, 0, example(0), StepKey(0, 0, 7, 99, done=5)))  # not of the step
    others = [(example(0), StepKey(1, 0, 0, 1)), (example(0), StepKey(0, 1, 0, 1)), (example(1), key)]
    for about, other in [*others, (example(0, occurrence=1), key)]:
        assert not torch.equal(one, config.staying(60, 0, about, other))


def test_a_share_of_zero_is_no_routing_bit_for_bit(tiny: Path) -> None:
    plain, none = built(tiny), built(tiny, ROUTED.replace("0.5", "0"))
    assert plain.objective.cost == none.objective.cost and plain.plan.hash == none.plan.hash
    for one, other in zip(batches(plain), batches(none), strict=True):
        found = [parts.objective.module(batch) for parts, batch in ((plain, one), (none, other))]
        assert torch.equal(*found) and one.flops == other.flops
        grads = [
            torch.autograd.grad(loss, list(parts.objective.module.parameters()))
            for loss, parts in zip(found, (plain, none))
        ]
        assert all(map(torch.equal, *grads))


def test_known_tokens_stay_and_the_loss_has_all_others(parts: RunComponents) -> None:
    known = 0
    for batch in batches(parts):
        assert batch.routing is not None
        stays = torch.zeros(len(batch.pack.tokens), dtype=torch.bool)
        stays[batch.routing.kept] = True
        clean = batch.pack.levels[batch.pack.level_of] == 0
        known += int(clean.sum())
        assert stays[clean].all() and not stays.all()
        assert (batch.token_weights[~stays] > 0).all()
    assert known


@pytest.mark.parametrize(("groups", "bound"), [(1, 90), (2, 100), (3, 80)])
def test_loss_and_gradient_of_a_step_do_not_depend_on_its_split(parts: RunComponents, groups: int, bound: int) -> None:
    """Whatever number of ranks and micro-steps: the sums of the loss and of its gradients are the same."""

    def total(dealt: list[FlowBatch]) -> tuple[float, torch.Tensor]:
        parts.objective.module.zero_grad()
        loss = sum(parts.objective.module(batch) for batch in dealt)
        gradients = torch.autograd.grad(loss, list(parts.objective.module.parameters()))
        return float(loss.detach()), torch.cat([gradient.flatten() for gradient in gradients])

    dealt = batches(parts, groups, bound)
    assert len(dealt) > 2
    (whole, gradient), (found, gradients) = total(batches(parts)), total(dealt)
    assert found == pytest.approx(whole, rel=1e-5)
    assert float((gradients - gradient).norm() / gradient.norm()) < 1e-5


def test_routing_changes_the_loss_and_its_cost(tiny: Path, parts: RunComponents) -> None:
    plain = built(tiny)
    (batch,), (unrouted,) = batches(parts), batches(plain)
    objective = parts.objective
    assert isinstance(objective, FlowObjective) and batch.routing is not None
    with torch.no_grad():
        assert float(objective.module(batch)) != pytest.approx(float(objective.module(unrouted)), rel=1e-4)
    kept = batch.routing.segments.lengths
    texts = [len(ids) + (len(ids) < 32) for ids in batch.text_ids or []]
    config, lengths = objective.model_config, batch.pack.segments.lengths
    assert batch.flops == 3 * transformer_flops(config, lengths, texts, kept, 1) < unrouted.flops
    assert objective.cost == cost_coefficients(config, 0.5, 1)
    assert parts.plan.hash != plain.plan.hash


def test_a_rank_without_clips_has_every_gradient(parts: RunComponents) -> None:
    batch = parts.objective.prepare([], [], StepKey(0, 0, 0, 4))
    gradients = torch.autograd.grad(parts.objective.module(batch), list(parts.objective.module.parameters()))
    assert all(not gradient.any() for gradient in gradients)


def test_sampling_never_routes(tiny: Path, parts: RunComponents) -> None:
    request = SampleRequest(["a red circle"], seed=1, size=(32, 32), frames=5, steps=2, guidance=2.0)
    runs = (parts, built(tiny))  # of the same weights
    one, other = (next(make_pipeline(run, run.objective.module).sample_latents(request)) for run in runs)
    assert torch.equal(one, other)


@pytest.mark.parametrize("recompute", ["none", "2"])
def test_a_run_that_goes_on_is_the_uninterrupted_one(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recompute: str
) -> None:
    make_quick(monkeypatch)
    settings = [ROUTED, f"parallel.recompute={recompute}", "schedule.decay=constant", "data.workers=0"]
    for name, steps in (("whole", [8]), ("broken", [3, 8])):
        for last in steps:
            overrides = [*settings, f"run={tmp_path / name}", f"schedule.steps={last}"]
            run(load_config(tiny / "flow.yaml", overrides), ALONE)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    assert same_weights(tmp_path / "whole", tmp_path / "broken")
    with pytest.raises(StditError, match=r"objective\.flow\.routing"):
        run(load_config(tiny / "flow.yaml", [*overrides, "objective.flow.routing=null"]), ALONE)
