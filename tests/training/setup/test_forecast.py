"""What `--dry-run` forecasts, by closed forms, and against the trainer that it describes."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit.errors import StditError
from stdit.models.operators import Recompute
from stdit.models.transformer import TransformerConfig, count_parameters, transformer_flops
from stdit.training.config import from_dict, load_config
from stdit.training.engine.parallel import World
from stdit.training.setup.build import build
from stdit.training.setup.forecast import CARDS, Card, Forecast, forecast, summary
from stdit.training.setup.resolve import ResolvedConfig, resolve

SMALL = {"dim": 64, "heads": 4, "layers": 6, "ffn_dim": 128, "text_dim": 32}


def config_of(*, model: dict[str, Any] = SMALL, **sections: Any) -> ResolvedConfig:
    data = {"shapes": ["64x64x9", "64x64"], "cache": "somewhere"}
    return resolve(from_dict({"model": model, "vae": {"preset": "wan2.1"}, "data": data} | sections, "test"))


def way(found: Forecast, deepspeed: str | None, recompute: Any, shared: int = 1) -> Any:
    wanted = (deepspeed, recompute, shared)
    return next(way for way in found.ways if (way.deepspeed, way.recompute, way.sequence_parallel) == wanted)


def test_the_14b_preset_on_64_cards() -> None:
    """Wan 14B at 832x480x81 on H200s: 32,760 tokens a clip, and the numbers of its weights."""
    found = forecast(
        config_of(
            model={"preset": "14B"},
            data={"shapes": ["832x480x81"], "cache": "somewhere"},
            run={"precision": "bf16"},
            plan={"largest_clips_per_step": 128},
            parallel={"deepspeed": "zero2", "recompute": "all"},
            optimizer={"ema": {"decay": 0.999}},
        ),
        64,
        Card.named("h200"),
    )
    numbers = count_parameters(TransformerConfig.preset("14B"))
    assert found.sizes.trained == numbers and 14.2e9 < numbers < 14.4e9
    assert found.run.plan.tokens == [21 * 30 * 52] and found.run.plan.num_steps == 1
    memory = found.configured.memory
    assert (memory.weights, memory.gradients, memory.moments) == (2 * numbers, numbers // 16, numbers // 8)
    assert (memory.masters, memory.average) == (numbers // 16, numbers // 16)
    sharded = way(found, "zero3", "all").memory
    assert sharded.weights == numbers // 32 and sharded.buffers == 2 * (10**9 + 5 * 10**8)
    # two clips a pack: of each block its input (N, D) in bf16 is kept, and that of attention beside it
    kept = 40 * 2 * 2 * 32_760 * 5120
    activations = {kind: way(found, "zero2", kind).memory.activations for kind in ("none", 2, "attention", "all")}
    assert activations["all"] == pytest.approx(kept + activations["none"] / 40, rel=0.1)  # and one block whole
    assert activations["attention"] - activations["all"] == pytest.approx(kept * (1 + 2 * 40 / 5120), rel=0.03)
    assert activations[2] == pytest.approx((activations["none"] + activations["all"]) / 2, rel=0.05)
    forward = 128 * transformer_flops(TransformerConfig.preset("14B"), [32_760], [128])
    attention = 128 * 40 * 4 * 5120 * 32_760**2
    assert way(found, "zero2", "none").step_flops == pytest.approx(3 * forward)
    assert way(found, "zero2", 2).step_flops == pytest.approx(3.5 * forward)
    assert way(found, "zero2", "all").step_flops == pytest.approx(4 * forward)
    assert way(found, "zero2", "attention").step_flops == pytest.approx(4 * forward - attention)
    assert found.configured.step_seconds == pytest.approx(4 * forward / (64 * 989.5e12 * 0.4))  # perfect balance
    for each in found.ways:
        assert each.fits == (each.memory.total <= 0.95 * 141e9)
    assert found.best is not None and found.best.fits
    fitting = [each.step_flops for each in found.ways if each.fits and each.deepspeed != "zero3_offload"]
    assert found.best.step_flops == min(fitting)
    assert not way(found, "zero1", "none").fits
    # shared by eight, a pack still has two clips, and a rank an eighth of its tokens
    shared = way(found, "zero2", "attention", 8).memory
    assert shared.activations == pytest.approx(activations["attention"] / 8, rel=1e-6)
    assert shared.total - shared.activations == memory.total - memory.activations


def test_it_describes_the_run_that_would_be_built(tiny: Path) -> None:
    config = resolve(load_config(tiny / "flow.yaml"))
    parts = build(config, World(0, 1, torch.device("cpu")))
    found = forecast(config, 1)
    assert found.sizes.trained == parts.parameters  # with the text encoder that trains along
    assert found.run.plan.hash == parts.plan.hash and found.run.largest == parts.shapes[0]
    told = summary(found)
    assert told["manifest"] == config.data.manifest and told["clips"] == parts.plan.num_items
    assert told["steps_per_epoch"] == parts.plan.num_steps and told["clips_per_step"] == 14 / parts.plan.num_steps
    assert {bucket["shape"]: bucket["clips"] for bucket in told["buckets"]}["48x32x1"] == 0
    assert "no clip goes to 48x32x1" in told["unused"]
    assert [each["deepspeed"] for each in told["ways"][:2]] == [None, "zero1"]
    assert told["gpu"] is None and told["best"] is None and told["configured"]["fits"] is None
    json.dumps(told)


def test_without_a_manifest_every_clip_is_the_largest() -> None:
    found = forecast(config_of(data={"shapes": ["64x64x9", "64x64"], "manifest": "nowhere.parquet"}), 2)
    assert str(found.run.largest) == "64x64x9" and found.run.plan.counts.tolist() == [16, 0]
    told = summary(found)
    assert told["manifest"] is None and told["clips"] is None and told["tokens_per_step"] == 16 * 3 * 4 * 4
    assert told["fullest_pack"] == 8 * 3 * 4 * 4  # of two ranks


def test_what_cannot_be_is_not_compared(tiny: Path) -> None:
    lion = forecast(config_of(optimizer={"name": "lion"}, parallel={"recompute": 3}), 4)
    assert {each.deepspeed for each in lion.ways} == {"zero1", "zero2", "zero3", "zero3_offload"}
    assert [each.recompute for each in lion.ways[::4]] == 3 * ["none", 2, "attention", "all", 3]
    assert [each.sequence_parallel for each in lion.ways[::20]] == [1, 2, 4]
    assert lion.configured.recompute == 3
    vae = forecast(resolve(load_config(tiny / "vae.yaml")), 4, Card.named("4090"))
    assert [(each.deepspeed, each.recompute) for each in vae.ways] == [("zero1", "none"), ("zero2", "none")]
    assert all(each.step_seconds is None and each.fits for each in vae.ways)
    whole_matrices = forecast(config_of(optimizer={"name": "adafactor"}), 1)
    assert {each.deepspeed for each in whole_matrices.ways} == {None}


def test_advice_is_what_would_fit() -> None:
    """Cards as small as needed."""
    config = config_of(run={"precision": "bf16"}, plan={"tokens_per_pack": 480}, optimizer={"ema": {"decay": 0}})
    plain = forecast(config, 1)
    totals = {(each.deepspeed, each.recompute): each.memory.total for each in plain.ways}

    def advised(card_bytes: float) -> Forecast:
        return forecast(config, 1, Card("small", card_bytes / 0.95e9, 1.0, ""))

    assert advised(totals[None, "none"] + 1).configured.fits
    middle = (totals[None, "all"] + totals[None, "attention"]) / 2
    found = advised(middle)
    assert not found.configured.fits and found.best == way(found, None, "all")
    assert found.advice == "Fits: parallel.deepspeed=null parallel.recompute=all."
    found = advised(1e5)
    assert found.best is None and "plan.tokens_per_pack=48, one clip of 64x64x9, in place of 480" in found.advice


def test_cards_have_sources() -> None:
    for name in json.loads(CARDS.read_text()):
        card = Card.named(name)
        assert card.source and 20 <= card.memory_gb <= 200 and 50 <= card.bf16_tflops <= 2500
        assert card.usable == pytest.approx(0.95 * 1e9 * card.memory_gb)
    with pytest.raises(StditError, match=r"--gpu h2000: not a known card\. Did you mean 'h200'\? Known: h200, h100"):
        Card.named("h2000")


def test_a_missing_vae_is_told_with_a_way_on() -> None:
    config = config_of()
    config.vae.path, config.vae.preset = "nowhere", None
    with pytest.raises(StditError, match=r"nowhere: no such file.*For the sizes alone: vae\.path=null vae\.preset"):
        forecast(config, 1)


@pytest.mark.parametrize(("kind", "share"), [("none", 3), ("all", 4), (1, 4), (4, 3.25)])
def test_recomputation_costs_a_share_of_a_forward(kind: Any, share: float) -> None:
    from stdit.training.setup.forecast import StepFlops

    assert StepFlops(100.0, 40.0).with_backward(Recompute.of(kind)) == 100 * share
    assert StepFlops(100.0, 40.0).with_backward(Recompute.of("attention")) == 360


def test_a_wrong_kind_of_recomputation_is_told_all_that_it_may_be() -> None:
    for given, wanted in [("'banana'", "an integer"), ("0", "above 0"), ("True", "an integer")]:
        what = rf"parallel\.recompute is {given}; it must be 'none', 'all' or 'attention' or {wanted}\."
        with pytest.raises(StditError, match=what):
            config_of(parallel={"recompute": ast.literal_eval(given)})
