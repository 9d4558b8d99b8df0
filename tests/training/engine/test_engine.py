"""The plain engine against torch written out by hand; optimizers; what DeepSpeed's JSON may not say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import gradients_of
from torch import Tensor, nn

from stdit.errors import StditError
from stdit.shipped import DEEPSPEED
from stdit.training.engine.engine import TorchEngine
from stdit.training.engine.make import ParallelConfig, make_engine
from stdit.training.engine.optimizer import Ema, EmaConfig, OptimizerConfig, ScheduleConfig
from stdit.training.engine.parallel import World
from stdit.training.engine.zero import stand_alone, zero_stage

ALONE = World(0, 1, torch.device("cpu"))


class Toy(nn.Module):
    """Σ over rows of the batch of a squared error."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(5, 4)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, batch: Tensor) -> Tensor:
        x = batch.to(self.body.weight.dtype)
        return (self.body(x).float() - 1).square().sum()


def test_accumulated_gradients_clipping_and_adamw_equal_torch() -> None:
    config = OptimizerConfig(lr=0.1, clip=0.3, weight_decay=0.2, betas=(0.8, 0.9))
    engine = TorchEngine(Toy(), config, "fp32", ALONE)
    reference = Toy()
    groups = [
        {"params": [reference.body.weight], "weight_decay": 0.2},
        {"params": [reference.body.bias], "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9))
    for step in range(4):
        batch = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        losses = [engine.backward(part, 1 / 6, last=i == 1) for i, part in enumerate(batch.split([2, 4]))]
        (reference(batch) / 6).backward()
        gradients = gradients_of(engine)
        assert torch.allclose(gradients["body.weight"], reference.body.weight.grad, rtol=1e-5, atol=1e-6)
        assert not gradients["unused"].any()
        assert float(sum(losses)) == pytest.approx(float(reference(batch).detach()), rel=1e-6)
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.3)
        assert float(norm) > 0.3
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.1 / (step + 1)
        optimizer.step()
        optimizer.zero_grad()
        assert float(engine.step(0.1 / (step + 1))) == pytest.approx(float(norm), rel=1e-6)
        assert torch.allclose(engine.module.body.weight, reference.body.weight, rtol=1e-5, atol=1e-6)
        assert torch.allclose(engine.module.body.bias, reference.body.bias, rtol=1e-5, atol=1e-6)


def test_bf16_trains_fp32_masters_and_adds_up_gradients_in_fp32() -> None:
    engine = TorchEngine(Toy(), OptimizerConfig(lr=1e-4, clip=0), "bf16", ALONE)
    weight = engine.module.body.weight
    assert weight.dtype == torch.bfloat16 and all(flat.dtype == torch.float32 for flat in engine.flat_masters)
    start = (
        engine.flat_masters[0].clone() if engine.pieces[0][0].name == "body.weight" else engine.flat_masters[1].clone()
    )
    batch = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        single = engine.backward(batch, 1.0, last=False)
    assert torch.isfinite(single)
    thrice = gradients_of(engine)["body.weight"]
    engine.optimizer.zero_grad()
    engine.backward(batch, 1.0, last=True)
    assert torch.equal(thrice, gradients_of(engine)["body.weight"] * 3)
    engine.step(1e-4)
    master = dict(zip((p[0].name for p in engine.pieces), engine.flat_masters))["body.weight"]
    assert (master - start).abs().max() > 5e-5  # a step that bf16 could not hold
    assert torch.equal(engine.module.body.weight, master.bfloat16())


@pytest.mark.parametrize("name", ["sgd", "lion", "muon", "nadamw", "adopt"])
def test_timms_optimizers_by_name(name: str) -> None:
    engine = make_engine(Toy(), OptimizerConfig(name=name, lr=0.01), ParallelConfig(), "fp32", ALONE)
    batch = torch.ones(3, 5)
    losses = []
    for _ in range(10):
        losses.append(float(engine.backward(batch, 1 / 3, last=True)))
        engine.step(0.01)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("optimizer", "json_text", "words"),
    [
        ({"name": "adamv"}, None, ["'adamv'", "'adam"]),
        ({"name": "kron"}, None, ["kron", "preconditioners"]),
        ({"name": "adan"}, None, ["adan takes 3 betas", "optimizer.options.betas"]),
        ({"name": "adamw", "options": {"momentun": 1}}, None, ["adamw", "momentun"]),
        ({"name": "sgd", "options": {"momentun": 1}}, None, ["sgd", "momentun"]),
        ({"name": "adamw"}, {"train_batch_size": 8}, ["train_batch_size", "plan"]),
        ({"name": "adamw"}, {"bf16": {"enabled": True}}, ["bf16", "run.precision"]),
        ({"name": "adamw"}, {"gradient_clipping": 1.0}, ["gradient_clipping", "optimizer.clip"]),
        ({"name": "lamb"}, {"zero_optimization": {"stage": 2}}, ["lamb", "whole matrices"]),
        ({"name": "adan"}, {"zero_optimization": {"stage": 3}}, ["adan", "groups"]),
        ({"name": "adamw"}, "{", ["ds.json", "not valid JSON"]),
        ({"name": "adamw"}, "[]", ["ds.json", "list"]),
        ({"name": "adamw"}, {"zero_optimization": {"stage": "two"}}, ["ds.json", "'two'"]),
        ({"name": "adamw"}, {"zero_optimization": {"stage": True}}, ["ds.json", "True"]),
        ({"name": "adamw"}, {"zero_optimization": [1]}, ["ds.json", "zero_optimization is [1]", "JSON object"]),
        ({"name": "adamw"}, {"zero_optimization": {"offload_param": "cpu"}}, ["offload_param is 'cpu'"]),
        ({"name": "adamw"}, {"zero_optimization": {"offload_param": {"device": "nvme"}}}, ["nvme"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, optimizer: dict[str, Any], json_text: Any, words: list[str]) -> None:
    parallel = ParallelConfig()
    if json_text is not None:
        path = tmp_path / "ds.json"
        path.write_text(json_text if isinstance(json_text, str) else json.dumps(json_text))
        parallel = ParallelConfig(str(path))
    with pytest.raises(StditError) as error:
        make_engine(Toy(), OptimizerConfig(**optimizer), parallel, "fp32", ALONE)
    for word in words:
        assert word in str(error.value)


def test_deepspeed_alone_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name in (*wanted, "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    stand_alone()
    assert {name: os.environ[name] for name in wanted} == wanted and int(os.environ["MASTER_PORT"]) > 0
    monkeypatch.setenv("MASTER_PORT", "1234")
    stand_alone()
    assert os.environ["MASTER_PORT"] == "1234"


def test_several_ranks_without_deepspeed_say_what_to_do() -> None:
    with pytest.raises(StditError, match=r"deepspeed=zero1"):
        make_engine(Toy(), OptimizerConfig(), ParallelConfig(), "fp32", World(0, 2, torch.device("cpu")))


def test_the_shipped_jsons_are_free_of_what_the_config_owns() -> None:
    folder = DEEPSPEED
    stages = {path.stem: zero_stage(str(path)) for path in folder.glob("*.json")}
    assert stages == {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


def test_the_average_is_the_written_out_sum() -> None:
    flat = torch.zeros(2)
    ema = Ema([flat], EmaConfig(decay=0.9, warmup=10))
    expected = 0.0
    for step in range(1, 200):
        flat.fill_(step)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema.averages[0].tolist() == pytest.approx([expected] * 2, rel=1e-5)


@pytest.mark.parametrize("settings", [{"zero_optimization": None}, {"zero_optimization": {"offload_param": None}}, {}])
def test_null_in_a_deepspeed_json_is_as_if_it_were_not_there(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    assert zero_stage(str(tmp_path / "ds.json")) == 0


def test_a_change_of_steps_says_what_it_does_to_the_learning_rate() -> None:
    for decay in ("cosine", "linear"):
        raised = ScheduleConfig(steps=200, decay=decay, final=0.02)
        told = raised.jump(100, 100, 1e-4)
        assert told and "the learning rate of step 100 is 5.1e-05 where it was 2e-06" in told  # half-way, and the end
        assert raised.jump(200, 100, 1e-4) is None
    assert ScheduleConfig(steps=200).jump(100, 100, 1e-4) is None  # constant
    assert ScheduleConfig(steps=200, decay="linear", warmup=150).jump(100, 50, 1e-4) is None  # both warm up still


def test_schedules() -> None:
    cosine = ScheduleConfig(steps=12, warmup=2, decay="cosine", final=0.1)
    assert [cosine.factor(i) for i in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert cosine.factor(7) == pytest.approx(0.55)
    assert cosine.factor(12) == pytest.approx(0.1)
    linear = ScheduleConfig(steps=10, decay="linear")
    assert [linear.factor(i) for i in (0, 5, 10, 11)] == pytest.approx([1, 0.5, 0, 0])
    assert ScheduleConfig(steps=10, warmup=4).factor(9) == 1.0
