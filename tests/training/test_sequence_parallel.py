"""Two ranks that share every pack, under ZeRO 1, 2 and 3, against one rank of plain torch, in fp32.

There are several micro-steps a step, packs of several clips, known tokens, and 3 heads, which 2 ranks do not divide.
test_exact_steps.py has four ranks, in two groups and in one, and all stages.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Child, finish_together
from exact_gradients import state_of
from tensor_files import load_file
from thread_group import ThreadGroup, run_together
from thread_world import ThreadWorld
from tiny_models import save_tiny_model
from tiny_runs import ALONE
from torch import Tensor

from stdit.errors import StditError
from stdit.keyed.stream import KeyedStream
from stdit.models.sequence import SequenceGroup
from stdit.shipped import DEEPSPEED
from stdit.training.bad_clips import agreed
from stdit.training.batches import MicroStep, StepClips
from stdit.training.config import load_config
from stdit.training.engine.checkpoint import Checkpoint
from stdit.training.engine.make import ParallelConfig
from stdit.training.objectives.flow import FlowObjective
from stdit.training.objectives.protocol import StepKey
from stdit.training.setup.build import RunComponents, build
from stdit.training.setup.resolve import resolve

WORKER = Path(__file__).with_name("zero_worker.py")
LIMIT = 900.0  # seconds
STEPS = 8
STAGES = ("zero1", "zero2", "zero3")
RESUMED = ("zero2", "zero3")
OTHERS = [("routed", "zero2"), ("lora", "zero3")]  # and the stage


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with flow.yaml, a model to fine-tune, its text encoder, and JSONs by the name of their stage."""
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("shared")
    config = (tiny / "flow.yaml").read_text()
    for old, new in (("tokens_per_pack: 200", "tokens_per_pack: 150"), ("heads: 2\n  layers", "heads: 3\n  layers")):
        assert old in config
        config = config.replace(old, new)
    (out / "flow.yaml").write_text(config + f"eval: {{manifest: {tiny / 'manifest.parquet'}, clips: 3}}\n")
    save_tiny_model(out)
    for stage in STAGES:
        settings = json.loads((DEEPSPEED / f"{stage}.json").read_text())
        if stage == "zero3":
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # cuts small parameters too
        (out / f"{stage}.json").write_text(json.dumps(settings))
    return out


def start(out: Path, ranks: int, engines: list[str]) -> list[Child]:
    """Starts `zero_worker.py` on all ranks."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(WORKER), str(out / "flow.yaml"), str(out), *engines]
    if ranks == 1:
        return [Child(command, environment)]
    each = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} for rank in range(ranks)]
    return [Child(command, environment | one) for one in each]


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    """The folder, with folders NAME-OPTIMIZER that have gradients.safetensors, seen.json and checkpoints."""
    json_of = {stage: folder / f"{stage}.json" for stage in STAGES}
    engines = [f"half-shared-{stage}={json_of[stage]}={STEPS}" for stage in STAGES]
    engines += [f"rest-shared-{stage}={json_of[stage]}={STEPS}=half-shared-{stage}" for stage in RESUMED]
    engines += [f"{kind}-shared-{stage}={json_of[stage]}=2" for kind, stage in OTHERS]
    engines += [f"moved-alone={json_of['zero3']}={STEPS + 2}=half-shared-zero1"]  # each rank has packs of its own again
    alone = [f"one=={STEPS}", f"more=={STEPS + 2}=one", *(f"{kind}-one==2" for kind, _ in OTHERS)]
    finish_together([*start(folder, 2, engines), *start(folder, 1, alone)], LIMIT)
    return folder


def seen(runs: Path, name: str) -> dict[str, Any]:
    return json.loads((runs / name / "seen.json").read_text())


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys() and len(found) > 20
    one, other = (torch.cat([parts[name].double().flatten() for name in sorted(parts)]) for parts in (found, expected))
    return float((one - other).norm() / other.norm())


def check_equals_one_rank(runs: Path, name: str) -> None:
    """Gradients before clipping, losses, held-out loss, clips, weights and their average."""
    one, other = runs / "one-adamw", runs / f"{name}-adamw"
    expected, found = (load_file(folder / "gradients.safetensors") for folder in (one, other))
    for parameter, gradient in expected.items():
        assert gradient.any(), parameter
        assert relative_of(found[parameter], gradient) <= 1e-5, parameter
    wanted, ours = seen(runs, one.name), seen(runs, other.name)
    assert ours["ids"] == wanted["ids"] and len(ours["losses"]) == STEPS
    assert ours["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert ours["losses"][-1] < 0.95 * ours["losses"][0]
    assert ours["evaluated"]["loss"] == pytest.approx(wanted["evaluated"]["loss"], rel=1e-5)
    kept = [Checkpoint.latest(folder) for folder in (one, other)]
    assert kept[0] is not None and kept[1] is not None
    for kind in ("master", "ema"):
        assert relative(kept[1].weights(kind), kept[0].weights(kind)) <= 1e-4


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_that_share_packs_equal_one(runs: Path, stage: str) -> None:
    check_equals_one_rank(runs, f"half-shared-{stage}")
    packs = seen(runs, f"half-shared-{stage}-adamw")["packs"]
    assert packs[0] == packs[1] and any(len(step) > 1 for step in packs[0]) and max(map(max, packs[0])) > 1


@pytest.mark.parametrize("stage", RESUMED)
def test_the_same_bits_after_a_resume(runs: Path, stage: str) -> None:
    whole, rest = f"half-shared-{stage}-adamw", f"rest-shared-{stage}-adamw"
    assert seen(runs, rest)["losses"] == seen(runs, whole)["losses"][STEPS // 2 :]
    expected, found = (state_of(runs / name, STEPS) for name in (whole, rest))
    assert expected.keys() == found.keys() and len(found) > 50
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def relative_of(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("kind", "stage"), OTHERS)
def test_routing_checkpointed_blocks_and_adapters_too(runs: Path, kind: str, stage: str) -> None:
    one, other = (runs / f"{name}-adamw" for name in (f"{kind}-one", f"{kind}-shared-{stage}"))
    assert relative(*(load_file(folder / "gradients.safetensors") for folder in (other, one))) <= 1e-5
    assert seen(runs, other.name)["losses"] == pytest.approx(seen(runs, one.name)["losses"], rel=1e-5)


def test_a_run_goes_on_with_packs_of_each_ranks_own(runs: Path) -> None:
    expected, found = seen(runs, "more-adamw"), seen(runs, "moved-alone-adamw")
    assert len(found["losses"]) == 2 and found["ids"] == expected["ids"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)


@pytest.fixture(scope="module")
def parts(tiny: Path) -> RunComponents:
    parts = build(resolve(load_config(tiny / "flow.yaml", ["data.workers=0"])), ALONE)
    with torch.no_grad():
        for p in parts.objective.module.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return parts


@pytest.mark.parametrize("clips", [0, 1, 5])
def test_shares_of_a_batch_add_up_to_it(parts: RunComponents, clips: int) -> None:
    """Losses, weights of tokens and FLOPs; of no clips there is one token, and a rank without any."""
    objective, items = parts.objective, parts.plan.step(0)[:clips]
    assert isinstance(objective, FlowObjective)
    examples, key = parts.loader.fetch(items, 0), StepKey(0, 0, 0, max(1, clips))
    whole = objective.prepare(examples, items, key)

    def work(group: ThreadGroup) -> tuple[Any, float]:
        batch = shared_by(objective, group).prepare(examples, items, key)
        with torch.no_grad():
            return batch, float(objective.module(batch))

    batches, losses = zip(*run_together(2, work))
    with torch.no_grad():
        assert sum(losses) == pytest.approx(float(objective.module(whole)), rel=1e-5)
    assert torch.equal(torch.cat([batch.token_weights for batch in batches]), whole.token_weights)
    assert torch.equal(torch.cat([batch.pack.tokens for batch in batches]), whole.pack.tokens)
    assert [batch.weight for batch in batches] == [whole.weight] * 2
    assert sum(batch.flops for batch in batches) in (whole.flops, whole.flops - 1)


def test_noise_is_drawn_for_the_tokens_that_a_rank_holds(parts: RunComponents, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token's once, of three ranks; two of a clip that is cut draw its parts."""
    objective, items = parts.objective, parts.plan.step(0)[:2]
    assert isinstance(objective, FlowObjective)
    examples, key = parts.loader.fetch(items, 0), StepKey(0, 0, 0, 2)
    drawn: list[tuple[int, int, int]] = []
    normal = KeyedStream.normal

    def counted(self: KeyedStream, start: int, stop: int, device: torch.device) -> Tensor:
        drawn.append((self.key, start, stop))
        return normal(self, start, stop, device)

    monkeypatch.setattr(KeyedStream, "normal", counted)
    for rank in range(3):
        shared_by(objective, SequenceGroup(rank, 3)).prepare(examples, items, key)
    features = 4 * objective.model_config.latent_channels  # patches of 1×2×2
    assert sum(stop - start for _, start, stop in drawn) == features * sum(item.tokens for item in items)
    places = [(key, number) for key, start, stop in drawn for number in range(start, stop)]
    assert len(set(places)) == len(places) and len(drawn) > 3


def shared_by(objective: FlowObjective, group: ThreadGroup | SequenceGroup) -> FlowObjective:
    from copy import copy

    other = copy(objective)
    other.group = group
    return other


def test_a_clip_that_one_rank_cannot_read_has_failed_on_all(parts: RunComponents) -> None:
    items = parts.plan.step(0)[:3]
    examples = parts.loader.fetch(items, 0)

    def work(group: ThreadGroup) -> StepClips:
        mine = list(examples)
        if group.rank == 1:
            mine[2] = replace(mine[2], weight=0.0, failure="the disk is gone", reason="unreadable")
        step = StepClips(0, 0, 3, [MicroStep(items[:1], mine[:1]), MicroStep(items[1:], mine[1:])])
        return agreed(step, ThreadWorld(group.rank, 2, torch.device("cpu")))

    for step in run_together(2, work):
        assert [example.failure for example in step.examples] == [None, None, "the disk is gone"]
        assert [example.weight for example in step.examples] == [1, 1, 0]
        assert [len(micro.examples) for micro in step.micro_steps] == [1, 2]


def test_ranks_that_are_left_over_are_refused() -> None:
    assert ParallelConfig(sequence_parallel=4).groups(8) == 2
    with pytest.raises(StditError, match=r"sequence_parallel=4 does not divide 6 ranks.*one of 1, 2, 3, 6"):
        ParallelConfig(sequence_parallel=4).groups(6)


def test_a_vae_is_refused(tiny: Path) -> None:
    settings = ["parallel.sequence_parallel=2", "parallel.deepspeed=zero2"]
    world = replace(ALONE, size=2)
    with pytest.raises(StditError, match="sequence_parallel=2 is for transformers"):
        build(resolve(load_config(tiny / "vae.yaml", settings)), world)
