"""An engine of a module on the meta device is that of the module with its weights, bit for bit, and each rank asks for
no more than it holds."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Child, finish_together
from torch import Tensor, nn

from stdit.models.transformer import STDiT, TransformerConfig
from stdit.shipped import DEEPSPEED
from stdit.training.engine.make import ParallelConfig, make_engine
from stdit.training.engine.optimizer import OptimizerConfig
from stdit.training.engine.parallel import World
from stdit.training.engine.start import allocate, fill, frozen_alone

WORKER = Path(__file__).with_name("start_worker.py")
ALONE = World(0, 1, torch.device("cpu"))
SMALL = TransformerConfig(dim=24, heads=2, layers=1, ffn_dim=40, text_dim=6, frequency_dim=16)
CASES = [(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank wrote."""
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("start")
    whole = json.loads((DEEPSPEED / "zero3.json").read_text())
    whole["zero_optimization"]["stage3_param_persistence_threshold"] = 30  # norms stay whole, all else is cut
    (out / "zero3.json").write_text(json.dumps(whole))
    paths = {1: DEEPSPEED / "zero1.json", 2: DEEPSPEED / "zero2.json", 3: out / "zero3.json"}
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"TORCH_EXTENSIONS_DIR": str(out / "compiled"), "WORLD_SIZE": "2"}
    cases = [f"{stage}-{precision}={paths[stage]}={precision}" for stage, precision in CASES]
    command = [sys.executable, str(WORKER), str(out), *cases]
    finish_together([Child(command, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)])
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_two_ranks_start_and_train_as_from_weights_bit_for_bit(
    seen: list[dict[str, Any]], stage: int, precision: str
) -> None:
    for rank in seen:
        found = rank[f"{stage}-{precision}"]
        assert found["pieces"] and found["start"] == 0 and found["end"] == 0
        first, same, second, again = found["losses"]
        assert first == same and second == again and first != second


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_masters_that_are_read_later_are_copied_into_the_weights(
    seen: list[dict[str, Any]], stage: int, precision: str
) -> None:
    assert [rank[f"{stage}-{precision}"]["copied"] for rank in seen] == [0, 0]


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_a_rank_asks_for_what_it_holds(seen: list[dict[str, Any]], stage: int, precision: str) -> None:
    """Of the weights all, under stage 3 its own part; of the masters its own part."""
    sizes = seen[0][f"{stage}-{precision}"]["sizes"]
    for number, rank in enumerate(seen):
        found = rank[f"{stage}-{precision}"]
        own = sorted((name, start, start + count) for name, start, count in found["own"] if name in sizes)
        whole = sorted((name, 0, size) for name, size in sizes.items())
        weights = own if stage == 3 else whole
        masters = own if precision == "bf16" else []  # in fp32 they are the weights' own numbers
        assert sorted(map(tuple, found["asked"])) == sorted(weights + masters), number
    parts = [found for rank in seen for found in rank[f"{stage}-{precision}"]["own"] if found[0] in sizes]
    assert sum(count for _, _, count in parts) == sum(sizes.values())


def test_one_rank_of_plain_torch_takes_them_too() -> None:
    weights = STDiT(SMALL, 2).starting_weights(2)
    with torch.device("meta"):
        module = STDiT(SMALL)
    engine = make_engine(module, OptimizerConfig(), ParallelConfig(), "bf16", ALONE, weights.draw)
    for flat, (piece,) in zip(engine.flat_masters, engine.pieces):
        assert torch.equal(flat.detach(), STDiT(SMALL, 2).get_parameter(piece.name).detach()), piece.name


def test_what_is_there_already_stays() -> None:
    module = nn.Module()
    module.inner = nn.Linear(3, 2)
    with torch.device("meta"):
        module.outer = nn.Linear(2, 2)
        module.outer.register_buffer("zeros", torch.empty(4))
    module.outer.bias.requires_grad_(False)
    before = module.inner.weight

    def numbers(name: str, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop) + 10.0 * name.endswith("bias")

    names = allocate(module, torch.bfloat16)
    assert names == ["outer.weight", "outer.bias"]
    fill(module, names, numbers)
    assert module.inner.weight is before
    assert module.outer.weight.dtype == torch.bfloat16 and module.outer.weight.tolist() == [[0, 1], [2, 3]]
    assert module.outer.bias.tolist() == [10, 11] and not module.outer.bias.requires_grad
    assert module.outer.zeros.tolist() == [0] * 4


def test_of_a_resumed_module_frozen_weights_alone_are_read() -> None:
    module = nn.Linear(3, 2, device="meta")
    module.weight.requires_grad_(False)
    asked = []

    def numbers(name: str, start: int, stop: int) -> Tensor:
        asked.append((name, start, stop))
        return torch.arange(start, stop) + 1.0

    fill(module, allocate(module, torch.float32), frozen_alone(module, numbers))
    assert module.weight.tolist() == [[1, 2, 3], [4, 5, 6]] and module.bias.tolist() == [0, 0]
    assert asked == [("weight", 0, 6)]
