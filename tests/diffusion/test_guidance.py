"""Guidance against diffusers' guiders, on the outputs of several steps."""

from __future__ import annotations

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    SkipLayerGuidance,
)
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

from stdit.diffusion.guidance import PLAIN, GuidanceOptions, Guide, check_skipped
from stdit.errors import StditError
from stdit.sampling.request import SampleRequest

STEPS, SCALE = 5, 4.5
PROJECTED = {"adaptive_projected_guidance_rescale": 15.0, "eta": 0.2}
SKIPPING = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0, "skip_layer_guidance_scale": 3.0}


def test_plain_guidance():
    cond, uncond = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    assert Guide(PLAIN, True).combine(cond, uncond, scale=5).tolist() == [5.0, -6.0]
    assert torch.equal(Guide(PLAIN, True).combine(cond, uncond, scale=1), cond)
    assert torch.equal(Guide(PLAIN, True).combine(cond, uncond, scale=0), uncond)
    assert Guide(PLAIN, True, beyond=True).combine(cond, uncond, scale=4).tolist() == [5.0, -6.0]  # as Cosmos counts
    assert SampleRequest(["a circle"], guidance=1.5).guided and not SampleRequest(["a circle"], guidance=1.0).guided


@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize(
    ("options", "guider"),
    [
        ({}, lambda **at: ClassifierFreeGuidance(**at)),
        ({"rescale": 0.7}, lambda **at: ClassifierFreeGuidance(**at, guidance_rescale=0.7)),
        ({"zero_star": True, "zero_steps": 2}, lambda **at: ClassifierFreeZeroStarGuidance(**at, zero_init_steps=2)),
        (
            {"zero_star": True, "rescale": 0.3},
            lambda **at: ClassifierFreeZeroStarGuidance(**at, zero_init_steps=0, guidance_rescale=0.3),
        ),
        ({"parallel": 0.2, "norm": 15.0}, lambda **at: AdaptiveProjectedGuidance(**at, **PROJECTED)),
        ({"parallel": 0.2, "norm": 15.0, "momentum": -0.5}, lambda **at: AdaptiveProjectedGuidance(**at, **PROJECTED)),
        (
            {"skip_layers": (1,), "skip_scale": 3.0},
            lambda **at: SkipLayerGuidance(**at, skip_layer_guidance_layers=[1], **SKIPPING),
        ),
    ],
)
def test_it_is_diffusers(options, guider, beyond):
    generator = torch.Generator().manual_seed(0)
    guide = Guide(GuidanceOptions(**options), True, beyond)
    theirs = guider(guidance_scale=SCALE, use_original_formulation=beyond)
    if "momentum" in options:
        theirs.momentum_buffer = MomentumBuffer(options["momentum"])  # made by a step that runs the network
    for step in range(STEPS):
        text, negative, skipped = torch.randn(3, 1, 4, 3, 8, 8, generator=generator, dtype=torch.float64)
        given = {"text": text, "negative": negative + text, "skipped": skipped}  # alike, as outputs are
        theirs.set_state(step, STEPS, torch.tensor(1000.0 - step))
        branches = guide.branches(step, 0.5)
        if not branches:
            assert step < options["zero_steps"] and (theirs.forward(text, given["negative"]).pred == 0).all()
            continue
        found = guide.combine(**{branch: given[branch] for branch in branches}, scale=SCALE)
        if step == 0 and "skipped" in branches:  # where diffusers' never acts
            continue
        wanted = theirs.forward(*(given[branch] for branch in branches)).pred
        near = 1e-6 if "zero_star" in options else 1e-12  # diffusers finds the scale in fp32
        torch.testing.assert_close(found, wanted, rtol=near, atol=near)


def test_an_interval_of_levels_says_which_branches_run():
    guide = Guide(GuidanceOptions(interval=(0.2, 0.8), skip_layers=(0,), skip_interval=(0.5, 1.0)), guided=True)
    assert guide.branches(0, 0.1) == ("text",)
    assert guide.branches(0, 0.2) == ("text", "negative")
    assert guide.branches(0, 0.8) == ("text", "negative", "skipped")
    assert guide.branches(0, 0.9) == ("text", "skipped")
    assert Guide(guide.options, guided=False).branches(0, 0.6) == ("text", "skipped")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": (0.8, 0.2)}, "interval 0.8 to 0.2"),
        ({"skip_interval": (0.0, 1.5)}, "skip_interval 0 to 1.5"),
        ({"rescale": 2.0}, "rescale 2: it must be from 0 to 1"),
        ({"momentum": float("nan")}, "momentum nan"),
        ({"zero_steps": -1}, "zero_steps -1"),
    ],
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises(StditError, match=message):
        GuidanceOptions(**options)


def test_blocks_that_are_not_there_are_named():
    with pytest.raises(StditError, match="block 4; these weights have blocks 0 to 3"):
        check_skipped((1, 4), 4)
    with pytest.raises(StditError, match="all 2 blocks"):
        check_skipped((0, 1), 2)
