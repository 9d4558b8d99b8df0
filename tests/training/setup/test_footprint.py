"""The memory that is predicted on meta tensors, against what torch's profiler sees of a real step's allocations."""

from __future__ import annotations

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torchvision.models import vgg

from stdit.data.load.loader import Example
from stdit.data.plan.split import PlanItem
from stdit.models.operators import Recompute
from stdit.models.transformer import STDiT
from stdit.shapes import VideoShape
from stdit.training.config import from_dict
from stdit.training.engine.optimizer import make_optimizer
from stdit.training.objectives.flow import FlowObjective
from stdit.training.objectives.protocol import StepKey
from stdit.training.setup.activations import activations
from stdit.training.setup.footprint import Footprint, build_on_meta, footprint
from stdit.training.setup.resolve import resolve
from stdit.vae.training.discriminator import Discriminator, DiscriminatorConfig

SHAPE = VideoShape(9, 64, 96)
CONFIG = {
    "model": {"preset": "toy", "dim": 96, "heads": 4, "layers": 5, "ffn_dim": 256, "text_dim": 32},
    "data": {"cache": "somewhere"},
    "optimizer": {"ema": {"decay": 0.99}},
}


def profiled_peak(objective: FlowObjective, clips: int) -> int:
    """Bytes that forward and backward of a real step hold at most, above what is there before."""
    size = SHAPE.latent(objective.vae.config.stride)
    shape = (objective.model_config.latent_channels, size.frames, size.height, size.width)
    examples = [Example(str(n), n, 0, 0, SHAPE, 1.0, "", None, torch.zeros(shape)) for n in range(clips)]
    items = [PlanItem(n, 0, 0, objective.tokens(SHAPE), 1, n) for n in range(clips)]
    for p in objective.module.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def step() -> None:
        objective.module(objective.prepare(examples, items, StepKey(0, 0, 0, clips))).backward()

    step()  # what is made once and kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    live = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def on_cpu(config):
    """The objective of a config with a transformer that has weights."""
    real = build_on_meta(config)
    assert isinstance(real, FlowObjective)
    real.device = torch.device("cpu")
    real.module.transformer = STDiT(real.model_config)
    real.module.transformer.recompute = Recompute.of(config.parallel.recompute)
    return real


@pytest.mark.parametrize("recompute", ["none", "all", 2, 3, "attention"])
@pytest.mark.parametrize("clips", [3])
def test_activations_are_what_a_real_step_allocates(recompute, clips):
    config = resolve(from_dict(CONFIG | {"parallel": {"recompute": recompute}}, "test"))
    predicted = activations(config, build_on_meta(config), SHAPE, clips * SHAPE.grid((4, 8, 8), (1, 2, 2)).tokens)
    assert predicted == pytest.approx(profiled_peak(on_cpu(config), clips), rel=0.03)


@pytest.mark.parametrize("recompute", ["none", 2, "attention"])
@pytest.mark.parametrize("blocks", [{"start": 1, "end": 7}, {"start": 2, "end": 8}, {"start": 0, "end": 8}])
def test_tokens_that_skip_blocks_need_what_a_real_step_allocates(blocks, recompute):
    changes = {"model": CONFIG["model"] | {"layers": 8}, "objective": {"flow": {"routing": {"share": 0.6} | blocks}}}
    config = resolve(from_dict(CONFIG | changes | {"parallel": {"recompute": recompute}}, "test"))
    tokens = 3 * SHAPE.grid((4, 8, 8), (1, 2, 2)).tokens
    predicted = activations(config, build_on_meta(config), SHAPE, tokens)
    assert predicted == pytest.approx(profiled_peak(on_cpu(config), 3), rel=0.03)
    config.objective.flow.routing = None
    assert predicted < 0.97 * activations(config, build_on_meta(config), SHAPE, tokens)


def test_recomputation_and_fewer_tokens_need_less():
    config = resolve(from_dict(CONFIG, "test"))
    whole = activations(config, build_on_meta(config), SHAPE, 10_000)
    assert activations(config, build_on_meta(config), SHAPE, 5_000) == pytest.approx(whole / 2, rel=0.02)
    objective = build_on_meta(config)
    kinds = [activations(config, objective, SHAPE, 10_000, Recompute.of(kind)) for kind in ("all", "attention", 2)]
    assert kinds == sorted(kinds) and kinds[0] < 0.6 * whole and kinds[2] < whole


def test_state_is_split_as_zero_says():
    """Bytes a parameter: weights, gradients, masters, moments, average. Stages 1 and 2 keep masters in fp32 too."""
    for precision, stage, each in [
        ("fp32", 0, (4, 4, 0, 8, 4)),
        ("bf16", 0, (2, 4, 4, 8, 4)),
        ("fp32", 1, (4, 4, 1, 2, 1)),
        ("bf16", 1, (2, 4, 1, 2, 1)),
        ("bf16", 2, (2, 1, 1, 2, 1)),
        ("fp32", 3, (1, 1, 0, 2, 1)),
        ("bf16", 3, (0.5, 1, 1, 2, 1)),
    ]:
        deepspeed = None if stage == 0 else f"zero{stage}"
        config = resolve(
            from_dict(CONFIG | {"run": {"precision": precision}, "parallel": {"deepspeed": deepspeed}}, "test")
        )
        objective = build_on_meta(config)
        parameters = sum(p.numel() for p in objective.module.parameters())
        found = footprint(config, objective, SHAPE, 100, ranks=4)
        state = (found.weights, found.gradients, found.masters, found.moments, found.average)
        assert state == pytest.approx([parameters * one for one in each], abs=2), (precision, stage)
        assert found.vae == 4 * sum(p.numel() for p in objective.vae.parameters())
        config.model.expert = "both"
        both = footprint(config, build_on_meta(config), SHAPE, 100, ranks=4)
        twice = (both.weights, both.gradients, both.masters, both.moments, both.average)
        assert twice == pytest.approx([2 * one for one in state], abs=4)


def test_zero_has_buffers_and_may_leave_the_device(tmp_path):
    """5·10⁸ numbers of gradients at a time, and whatever stage 3 gathers, are DeepSpeed's own; a JSON may say less."""

    def of(stage: str, precision: str = "bf16", ranks: int = 4) -> Footprint:
        told = CONFIG | {"run": {"precision": precision}, "parallel": {"deepspeed": stage}}
        config = resolve(from_dict(told, "test"))
        return footprint(config, build_on_meta(config), SHAPE, 100, ranks)

    weights = of("zero1").weights
    assert [of(name).buffers for name in ("zero1", "zero2", "zero3")] == [0, 10**9, 10**9 + weights]
    assert of("zero1", "fp32").buffers == 2 * 10**9
    away = of("zero3_offload")
    assert (away.weights, away.gradients, away.masters, away.moments, away.average) == (0, 0, 0, 0, 0)
    assert away.buffers == 10**9 + weights
    small = {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": True}
    (tmp_path / "small.json").write_text(json.dumps({"zero_optimization": small}))
    assert of(str(tmp_path / "small.json")).buffers == 2 * 2 * 1000
    small = {"stage": 3, "reduce_bucket_size": 1000, "stage3_max_live_parameters": 500}
    (tmp_path / "small.json").write_text(json.dumps({"zero_optimization": small}))
    assert of(str(tmp_path / "small.json")).buffers == 2 * (1000 + 500)


@pytest.mark.parametrize(
    ("name", "options", "share"),
    [
        ("adamw", {}, 1), ("muon", {}, 0.75), ("muon", {"fallback_list": ["*.ffn.*"]}, 0.9), ("sgd", {}, 0.5),
        ("sgd", {"momentum": 0, "nesterov": False}, 0), ("lion", {}, 0.5),
    ],
)  # fmt: skip
def test_optimizers_keep_what_a_step_leaves(name, options, share):
    small = {"model": CONFIG["model"] | {"layers": 1, "dim": 24, "heads": 2, "ffn_dim": 40, "text_padding": 8}}
    told = {}
    for one in dict.fromkeys(("adamw", name)):
        settings = {"name": one, "ema": {"decay": 0}, "options": options if one == name else {}}
        config = resolve(from_dict(CONFIG | small | {"optimizer": settings}, "test"))
        objective = build_on_meta(config)
        assert isinstance(objective, FlowObjective)
        told[one] = footprint(config, objective, SHAPE, 100, ranks=1).moments
    parameters = dict(STDiT(objective.model_config).named_parameters())
    optimizer = make_optimizer(parameters, config.optimizer)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert told[name] == 4 * sum(value.numel() for value in kept if value.ndim)
    assert told[name] <= share * told["adamw"]


def test_what_a_vae_trains_against_is_counted():
    def told(vae: dict, **more: dict) -> Footprint:
        config = resolve(from_dict(CONFIG | {"objective": {"kind": "vae", "vae": vae}, "data": {}} | more, "test"))
        objective = build_on_meta(config)
        return footprint(config, objective, SHAPE, objective.tokens(SHAPE), ranks=1)

    plain, critic = told({}), DiscriminatorConfig(dim=8, layers=2)
    against = told({"discriminator": {"dim": 8, "layers": 2, "start": 100}})
    more = sum(p.numel() for p in Discriminator(critic).parameters())
    assert (against.weights, against.gradients) == (plain.weights + 4 * more, plain.gradients + 4 * more)
    assert (against.moments, against.average) == (plain.moments + 8 * more, plain.average)
    assert against.activations > plain.activations
    low = told({"discriminator": {"dim": 8, "layers": 2}}, run={"precision": "bf16"})
    assert low.activations < against.activations
    with_lpips = told({"lpips": {"path": "nowhere.pth"}})
    convolutions = sum(p.numel() for p in vgg.make_layers(vgg.cfgs["D"]).parameters())
    assert with_lpips.vae == 4 * (convolutions + 64 + 128 + 256 + 512 + 512)
    # both pictures' first activations, in 64 channels of fp32
    assert with_lpips.activations > plain.activations + 2 * 4 * 64 * SHAPE.frames * SHAPE.height * SHAPE.width


@pytest.mark.parametrize("kind", ["flow", "vae"])
def test_a_vae_that_encodes_or_trains_is_counted(kind):
    config = resolve(from_dict(CONFIG | {"objective": {"kind": kind}, "data": {}}, "test"))
    objective = build_on_meta(config)
    tokens = objective.tokens(SHAPE)
    found = activations(config, objective, SHAPE, tokens)
    assert found > 4 * SHAPE.frames * SHAPE.height * SHAPE.width * 3  # the clip itself in fp32, at least
    if kind == "flow":
        cached = resolve(from_dict(CONFIG | {"data": {"cache": "somewhere"}}, "test"))
        trained = activations(cached, build_on_meta(cached), SHAPE, tokens)
        assert trained <= found < 1.5 * trained  # the same step, and here encoding takes less
        wide = resolve(from_dict(CONFIG | {"vae": {"preset": "toy", "base_dim": 128}, "data": {}}, "test"))
        assert activations(wide, build_on_meta(wide), SHAPE, tokens) > 1.5 * trained  # and there more


def test_frozen_weights_are_no_activations():
    config = resolve(from_dict(CONFIG | {"vae": {"preset": "toy", "base_dim": 128}, "data": {}}, "test"))
    objective, image = build_on_meta(config), VideoShape(1, 16, 16)
    weights = 4 * sum(p.numel() for p in objective.vae.encoder.parameters())
    assert activations(config, objective, image, objective.tokens(image)) < 0.2 * weights
