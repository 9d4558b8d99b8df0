"""Muon under every ZeRO stage against timm's Muon on one rank, bit for bit: all gradients here are exact sums."""

from __future__ import annotations

import json
import math
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Child, finish_together
from exact_gradients import LAST, MUON, SAVED, Linear, save, state_of, train
from thread_world import ThreadWorld
from timm.optim.muon import Muon
from torch import Tensor, nn

from stdit.errors import StditError
from stdit.shipped import DEEPSPEED
from stdit.training.engine import muon
from stdit.training.engine.checkpoint import Checkpoint
from stdit.training.engine.engine import Engine, ShardPiece
from stdit.training.engine.make import ParallelConfig, make_engine
from stdit.training.engine.muon import ShardedMuon
from stdit.training.engine.optimizer import OptimizerConfig
from stdit.training.engine.parallel import World

WORKER = Path(__file__).with_name("muon_worker.py")
ALONE = World(0, 1, torch.device("cpu"))
LIMIT = 1200.0  # seconds for all trainings together, on a machine that is busy with other things
MATRICES = {"a": (6, 5), "b": (8, 4), "c": (4, 3, 2, 2), "d": (5, 9), "e": (7, 7)}


def drawn(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in MATRICES.items()}


def joined(seed: int) -> Tensor:
    return torch.cat([one.flatten() for one in drawn(seed).values()])


def train_cut(rank: int, ranks: int, options: dict[str, Any]) -> Tensor:
    """A rank's stretch of the matrices laid end to end, after four steps."""
    each = -(-len(joined(0)) // ranks)
    low, high = rank * each, min((rank + 1) * each, len(joined(0)))
    flat, pieces, begin = nn.Parameter(joined(0)[low:high].clone()), [], 0
    for name, shape in MATRICES.items():
        first, last = max(low, begin), min(high, begin + math.prod(shape))
        if first < last:
            pieces.append(ShardPiece(name, shape, first - begin, first - low, last - first))
        begin += math.prod(shape)
    whole = Muon([nn.Parameter(torch.zeros(4, 4))], lr=0.02, weight_decay=0.1, **options)
    groups = [{**whole.param_groups[0], "params": [flat], "use_fallback": False}]
    optimizer = ShardedMuon(groups, ThreadWorld(rank, ranks, torch.device("cpu")))
    flat.grad = torch.ones_like(flat)
    optimizer.step()  # of DeepSpeed, when it starts
    assert torch.equal(flat, joined(0)[low:high])
    optimizer.attach([flat], [pieces])
    for step in range(1, 5):
        flat.grad = joined(step)[low:high].clone()
        optimizer.step()
    return flat.detach()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": True, "adjust_lr_fn": "original", "momentum": 0.8},
        {"conv_mode": "batched", "scale_eps": True, "eps": 1e-3, "ns_coefficients": "original"},
        {
            "conv_mode": "batched",
            "normalize_spatial": False,
            "adjust_lr_fn": None,
            "ns_steps": 3,
            "safety_factor": 1.02,
        },
    ],
)
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_cut_anywhere_it_is_timms_muon(monkeypatch: pytest.MonkeyPatch, ranks: int, options: dict[str, Any]) -> None:
    monkeypatch.setattr(muon, "ROUND", 40)  # several rounds
    parameters = [nn.Parameter(one) for one in drawn(0).values()]
    optimizer = Muon(parameters, lr=0.02, weight_decay=0.1, **options)
    for step in range(1, 5):
        for parameter, gradient in zip(parameters, drawn(step).values()):
            parameter.grad = gradient
        optimizer.step()
    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(lambda rank: train_cut(rank, ranks, options), range(ranks)))
    assert torch.equal(torch.cat(found), torch.cat([one.detach().flatten() for one in parameters]))


def test_the_work_is_dealt_evenly() -> None:
    """Forty equal matrices on eight ranks are five each, also where a rank holds whole matrices of its own."""
    pieces = [[ShardPiece(f"{rank}.{n}", (8, 8), 0, n * 64, 64) for n in range(5)] for rank in range(8)]
    for rank in range(8):
        (one,) = muon._plan(pieces, rank)
        assert sum(len(part) for part in one.received) == 5
        assert sorted(piece.name for part in one.sent for piece in part) == [piece.name for piece in pieces[rank]]


def plain(precision: str, seed: int = 0) -> Engine:
    return make_engine(Linear(seed), MUON[precision], ParallelConfig(), precision, ALONE)


def test_the_plain_engine_is_timms_muon() -> None:
    """Groups that are split into matrices and others change no number."""
    engine, reference = plain("fp32"), Linear()
    kinds = [(decayed, fallback) for decayed in (True, False) for fallback in (True, False)]
    groups = []
    for decayed, fallback in kinds:
        chosen = [
            p
            for name, p in reference.named_parameters()
            if (p.ndim > 1) == decayed and name.startswith("parts.5.") == fallback
        ]
        groups.append({"params": chosen, "weight_decay": 0.1 if decayed else 0.0})
        groups[-1] |= {"use_fallback": True} if fallback else {}
    groups = [group for group in groups if group["params"]]
    optimizer = Muon(groups, lr=1.0, momentum=0.9, betas=(0.9, 0.95), fallback_lr_scale=0.5)
    train(engine, 0, LAST, ALONE)
    for step in range(LAST):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (step + 1)
        (reference(range(step * 4, step * 4 + 4)) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, one), other in zip(engine.module.named_parameters(), reference.parameters()):
        assert torch.equal(one, other), name


JSONS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 200},  # several flat masters
}
CASES = [(stage, precision) for stage in JSONS for precision in MUON if (stage, precision) != ("zero0", "bf16")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders plain-PRECISION, and RANKS-STAGE-PRECISION with and without -resumed, with checkpoints."""
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("muon")
    for precision in MUON:
        engine = plain(precision)
        train(engine, 0, SAVED, ALONE)
        save(engine, out / f"plain-{precision}", SAVED, ALONE)
        train(engine, SAVED, LAST, ALONE)
        save(engine, out / f"whole-{precision}", LAST, ALONE)
    for stage, settings in JSONS.items():
        (out / f"{stage}.json").write_text(json.dumps({"zero_optimization": settings}))
    offload = json.loads((DEEPSPEED / "zero3_offload.json").read_text())
    offload["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (out / "offload.json").write_text(json.dumps(offload))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def start(ranks: int, environment: dict[str, str]) -> Child:
        cases = [*CASES, ("offload", "fp32")]
        arguments = [f"{ranks}-{stage}-{precision}={out / stage}.json={precision}" for stage, precision in cases]
        return Child([sys.executable, str(WORKER), str(out), *arguments], environment)

    pair = [start(2, environment | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2"}) for r in (0, 1)]
    alone = {key: value for key, value in environment.items() if key != "MASTER_PORT"}
    finish_together([*pair, start(1, alone)], LIMIT)
    return out


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("stage", "precision"), [*CASES, ("offload", "fp32")])
def test_every_stage_trains_and_resumes_as_timms_muon_does(
    runs: Path, tmp_path: Path, stage: str, precision: str, ranks: int
) -> None:
    """From the start; from the plain engine's checkpoint; and the plain engine from this one's."""
    name, expected = f"{ranks}-{stage}-{precision}", state_of(runs / f"whole-{precision}", LAST)
    kinds = {key.split("/")[0] for key in expected}
    assert kinds == {"master", "momentum_buffer", "exp_avg", "exp_avg_sq", "tensor.step", "number.use_muon"}
    path = runs / name / "checkpoints" / f"step-{SAVED:08d}"
    module = Linear(seed=1)
    Checkpoint(path).load_weights(module)
    engine = make_engine(module, MUON[precision], ParallelConfig(), precision, ALONE)
    Checkpoint(path).load_state([engine])
    train(engine, SAVED, LAST, ALONE)
    save(engine, tmp_path, LAST, ALONE)
    for folder in (runs / name, runs / f"{name}-resumed", tmp_path):
        found = state_of(folder, LAST)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), (folder.name, key)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "adamuon"}, ["optimizer.name=adamuon", "whole matrices", "muon, "]),
        ({"name": "muon", "options": {"algo": "adamuon"}}, ["algo=adamuon", "whole matrices"]),
        ({"name": "muon", "options": {"adamw_lr": 1e-3}}, ["adamw_lr", "fallback_lr_scale"]),
        ({"name": "muon", "options": {"fallback_list": "head"}}, ["fallback_list is 'head'", "list"]),
        ({"name": "muon", "options": {"fallback_list": ["part.5.*"]}}, ["'part.5.*'", "parameter"]),
        ({"name": "lion", "options": {"fallback_list": ["parts.5.*"]}}, ["fallback_list", "muon", "lion"]),
    ],
)
def test_what_muon_cannot_do_is_said(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(StditError) as error:
        make_engine(Linear(), OptimizerConfig(**settings), ParallelConfig("zero2"), "fp32", ALONE)
    for word in words:
        assert word in str(error.value)
