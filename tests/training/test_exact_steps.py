"""Every ZeRO stage × ranks × micro-steps × sequence parallelism against a plain loop over single clips, in fp32.

The loop is written here: each clip alone through the module, `backward`, torch's or timm's optimizer. Shapes are mixed,
first frames are known in some clips, and the model has 3 heads, which 2 and 4 ranks do not divide.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from children import Child, finish_together
from random_weights import build_random
from tensor_files import load_file
from tiny_runs import ALONE
from torch import Tensor

from stdit.data.scan.scan import scan
from stdit.data.toy import ToySettings, make_toy
from stdit.shipped import DEEPSPEED
from stdit.training.config import load_config
from stdit.training.objectives.protocol import StepKey
from stdit.training.setup.resolve import resolve

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")
WORKER = Path(__file__).with_name("exact_worker.py")
LIMIT = 3000.0  # seconds for all trainings of some number of ranks
STEPS = 20
CLIP = 0.5  # below the gradients' norm
OPTIMIZERS = {"sgd": "optimizer.name=sgd+optimizer.lr=0.05", "adamw": "optimizer.name=adamw+optimizer.lr=2e-3"}
TOKENS = {1: 100_000, 3: 288}  # of all packs of a micro-step, by micro-steps at the least


class Setting(NamedTuple):
    """stage: of ZeRO; -1: plain torch."""

    stage: int
    ranks: int
    shared: int  # ranks that share a pack
    micro_steps: int
    optimizer: str

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


SETTINGS = [
    Setting(*one)
    for one in product((-1, 0, 1, 2, 3), (1, 2, 4), (1, 2, 4), TOKENS, OPTIMIZERS)
    if one[2] <= one[1] and (one[0] >= 0 or one[1] == 1)
]


@pytest.fixture(scope="module")
def config(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of all trainings, beside zero0.json to zero3.json."""
    folder = tmp_path_factory.mktemp("exact")
    toy = ToySettings(clips=40, held_out=1, shapes=("32x32", "48x32"), scales=(1.0,), seconds=(0.7,), fps=(16,),
                      image_share=0.3)  # fmt: skip
    make_toy(folder / "clips", toy)
    scan(folder / "clips" / "train", out=folder / "manifest.parquet")
    settings = yaml.safe_load((tiny / "flow.yaml").read_text())
    settings["model"]["heads"] = 3
    settings["data"] |= {"manifest": str(folder / "manifest.parquet"), "workers": 0}
    settings["plan"]["largest_clips_per_step"] = 13
    settings["schedule"]["warmup"] = 0
    (folder / "flow.yaml").write_text(yaml.safe_dump(settings))
    for stage in range(4):
        settings = {"zero_optimization": {"stage": 0}}
        if stage:
            settings = json.loads((DEEPSPEED / f"zero{stage}.json").read_text())
        if stage == 3:
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # cuts small parameters too
        (folder / f"zero{stage}.json").write_text(json.dumps(settings))
    return folder / "flow.yaml"


def settings_of(one: Setting, config: Path) -> list[str]:
    tokens = TOKENS[one.micro_steps] // (one.ranks // one.shared)
    path = "null" if one.stage < 0 else config.with_name(f"zero{one.stage}.json")
    return [
        *OPTIMIZERS[one.optimizer].split("+"), "optimizer.weight_decay=0", f"optimizer.clip={CLIP}",
        f"parallel.deepspeed={path}", f"parallel.sequence_parallel={one.shared}", f"plan.tokens_per_pack={tokens}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(config: Path) -> Path:
    """The folder with what `exact_worker.py` wrote of every setting."""
    for ranks in (1, 2, 4):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        wanted = [f"{one.name}={'+'.join(settings_of(one, config))}" for one in SETTINGS if one.ranks == ranks]
        command = [sys.executable, str(WORKER), str(config), str(config.parent), str(STEPS), *wanted]
        each = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} for rank in range(ranks)]
        finish_together([Child(command, environment | one) for one in each], LIMIT)
    return config.parent


class Expected(NamedTuple):
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    losses: list[float]


@cache
def plain_loop(config: Path, optimizer_name: str) -> Expected:
    """Twenty steps of one process, a clip at a time."""
    settings = settings_of(Setting(-1, 1, 1, 1, optimizer_name), config)
    settings += ["run=unused", f"schedule.steps={STEPS}"]
    run = load_config(config, settings)
    parts = build_random(resolve(run), ALONE)
    module, objective = parts.objective.module.train(), parts.objective
    lr, parameters = run.optimizer.lr, dict(module.named_parameters())
    if optimizer_name == "sgd":
        optimizer = torch.optim.SGD(parameters.values(), lr, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(parameters.values(), lr, run.optimizer.betas, weight_decay=0.0)
    gradients, losses = dict[str, Tensor](), []
    epoch = index = 0
    for step in range(STEPS):
        if index == parts.plan_of(epoch).num_steps:
            epoch, index = epoch + 1, 0
        items = parts.plan_of(epoch).step(index)
        examples = parts.loader.fetch(items, epoch)
        key = StepKey(run.run.seed, epoch, index, len(items), step)
        weight = sum(objective.weight([example], key) for example in examples)
        loss = 0.0
        for example, item in zip(examples, items):
            value = module(objective.prepare([example], [item], key)) / weight
            value.backward()
            loss += float(value.detach())
        if step == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in parameters.items()}
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        assert norm > 1.1 * CLIP or step
        optimizer.param_groups[0]["lr"] = lr * run.schedule.factor(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        index += 1
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return Expected(gradients, weights, losses)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda one: one.name)
def test_a_training_equals_a_plain_loop_over_single_clips(runs: Path, config: Path, setting: Setting) -> None:
    expected, found = plain_loop(config, setting.optimizer), load_file(runs / f"{setting.name}.safetensors")
    seen = json.loads((runs / f"{setting.name}.json").read_text())
    assert seen["losses"] == pytest.approx(expected.losses, rel=1e-5)
    assert min(seen["micro_steps"]) >= setting.micro_steps and (setting.micro_steps > 1) == (
        max(seen["micro_steps"]) > 1
    )
    assert len(expected.gradients) > 50 and all(gradient.any() for gradient in expected.gradients.values())
    apart = {name: relative(found[f"gradient/{name}"], one) for name, one in expected.gradients.items()}
    worst = max(apart, key=apart.__getitem__)
    assert apart[worst] <= 1e-5, worst
    whole, other = (torch.cat([one[name].flatten() for name in expected.weights]) for one in (
        {name: found[f"weight/{name}"] for name in expected.weights}, expected.weights,
    ))  # fmt: skip
    print(f"{setting.name}: gradients {apart[worst]:.1e}, weights {relative(whole, other):.1e}")
    assert relative(whole, other) <= 1e-4
