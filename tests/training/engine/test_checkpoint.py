"""Checkpoints: any number of writers and readers, published whole, kept on a full disk."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from thread_world import ThreadWorld
from torch import Tensor, nn

from stdit.errors import StditError
from stdit.training.engine import checkpoint
from stdit.training.engine.checkpoint import Checkpoint, published, remove_strays
from stdit.training.engine.engine import Engine, ShardPiece, TorchEngine
from stdit.training.engine.optimizer import Ema, EmaConfig, OptimizerConfig, group_state, make_optimizer
from stdit.training.engine.parallel import World

ALONE = World(0, 1, torch.device("cpu"))


class Model(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Linear(7, 3)
        self.b = nn.Linear(3, 5)
        self.c = nn.Linear(5, 1)  # its bias and moments are one number

    def forward(self, batch: Tensor) -> Tensor:
        return self.c(self.b(self.a(batch).tanh())).square().sum()


def options_of(name: str) -> OptimizerConfig:
    options = {"betas": [0.98, 0.92, 0.99]} if name == "adan" else {}
    return OptimizerConfig(name=name, lr=0.05, options=options)


def trained(name: str = "adamw", steps: int = 3, precision: str = "fp32") -> TorchEngine:
    engine = TorchEngine(Model(0), options_of(name), precision, ALONE)
    engine.ema = Ema(engine.flat_masters, EmaConfig(0.9))
    go_on(engine, 0, steps)
    return engine


def go_on(engine: Engine, begin: int, end: int) -> None:
    assert engine.ema is not None
    dtype = next(engine.module.parameters()).dtype
    for step in range(begin, end):
        batch = torch.randn(4, 7, generator=torch.Generator().manual_seed(step)).to(dtype)
        engine.backward(batch, 0.25, last=True)
        engine.step(0.05)
        engine.ema.update(step + 1)


def state_of(engine: Engine) -> list[Tensor]:
    assert engine.ema is not None
    found = [*engine.flat_masters, *engine.ema.averages]
    for flat in engine.flat_masters:
        found += [torch.as_tensor(value) for _, value in sorted(engine.optimizer.state[flat].items())]
    found += [torch.as_tensor(value) for group in group_state(engine.optimizer) for value in group.values()]
    return [one.detach().clone() for one in found]


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon", "adopt", "adafactor", "lamb", "adan"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loaded_state_goes_on_bit_for_bit(tmp_path: Path, name: str, precision: str) -> None:
    engine = trained(name, precision=precision)
    checkpoint.save(tmp_path, 3, [engine], {}, 0, ALONE)
    go_on(engine, 3, 6)

    found = Checkpoint.latest(tmp_path)
    assert found is not None and found.step == 3
    module = Model(1)
    found.load_weights(module)
    again = TorchEngine(module, options_of(name), precision, ALONE)
    again.ema = Ema(again.flat_masters, EmaConfig(0.9))
    found.load_state([again])
    go_on(again, 3, 6)
    for one, other in zip(state_of(engine), state_of(again)):
        assert one.dtype == other.dtype and torch.equal(one, other)


class CutEngine(Engine):
    """What a ZeRO rank holds: one flat with a stretch of all parameters laid end to end, padded."""

    def __init__(self, module: nn.Module, rank: int, ranks: int) -> None:
        self.module = module
        sizes = [(name, tuple(p.shape), p.numel()) for name, p in module.named_parameters()]
        each = -(-sum(n for _, _, n in sizes) // ranks)
        self.flat_masters = [nn.Parameter(torch.zeros(each))]
        self.pieces = [[]]
        begin = 0
        for name, shape, n in sizes:
            low, high = max(begin, rank * each), min(begin + n, (rank + 1) * each)
            if low < high:
                self.pieces[0].append(ShardPiece(name, shape, low - begin, low - rank * each, high - low))
            begin += n
        self.optimizer = make_optimizer({"all.weight": self.flat_masters[0]}, OptimizerConfig())


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_any_number_of_ranks_reads_and_writes_the_same_numbers(tmp_path: Path, ranks: int) -> None:
    engine = trained()
    checkpoint.save(tmp_path / "one", 3, [engine], {}, 0, ALONE)
    source = Checkpoint.latest(tmp_path / "one")
    assert source is not None
    jobs = []
    with ThreadPoolExecutor(ranks) as pool:
        for rank in range(ranks):
            part = CutEngine(Model(1), rank, ranks)
            part.ema = Ema(part.flat_masters, EmaConfig(0.9))
            source.load_state([part])
            world = ThreadWorld(rank, ranks, torch.device("cpu"))
            jobs.append(pool.submit(checkpoint.save, tmp_path / "many", 3, [part], {}, 0, world))
    for job in jobs:
        job.result()

    again = Checkpoint.latest(tmp_path / "many")
    assert again is not None and again.about["shards"] == ranks
    restored = TorchEngine(Model(2), OptimizerConfig(lr=0.05), "fp32", ALONE)
    restored.ema = Ema(restored.flat_masters, EmaConfig(0.9))
    again.load_weights(restored.module)
    again.load_state([restored])
    for one, other in zip(state_of(engine), state_of(restored)):
        assert torch.equal(one, other)


def test_only_whole_checkpoints_count_and_old_ones_go(tmp_path: Path) -> None:
    engine = trained()
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, [engine], {"n": step}, 2, ALONE)
    assert [path.name for path in published(tmp_path)] == ["step-00000002", "step-00000010"]
    (tmp_path / "checkpoints" / ".tmp-step-00000011").mkdir()
    (tmp_path / "checkpoints" / "step-00000012").mkdir()  # no manifest
    found = Checkpoint.latest(tmp_path)
    assert found is not None and found.step == 10 and found.state == {"n": 10}
    remove_strays(tmp_path)
    assert not list((tmp_path / "checkpoints").glob(".tmp*"))


@pytest.mark.parametrize("where", ["shard", "manifest"])
def test_a_full_disk_is_said_and_the_earlier_checkpoint_stays(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = trained()
    checkpoint.save(tmp_path, 1, [engine], {}, 1, ALONE)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "shard":
        monkeypatch.setattr(checkpoint, "save_file", full)
    else:
        monkeypatch.setattr(checkpoint.json, "dumps", full)
    with pytest.raises(StditError, match=r"no space left on the disk.*earlier ones in \S+ are kept"):
        checkpoint.save(tmp_path, 2, [engine], {}, 1, ALONE)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    found = Checkpoint.latest(tmp_path)
    assert found is not None
    found.load_state([engine])


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    engine = trained()
    path = checkpoint.save(tmp_path, 1, [engine], {}, 0, ALONE)
    other = Model(0)
    other.b = nn.Linear(3, 6)
    with pytest.raises(StditError, match=r"b\.bias, b\.weight"):
        Checkpoint(path).load_weights(other)
    shard = path / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(StditError, match=r"rank-00000.*cut short.*Remove .*step-00000001 to go on"):
        Checkpoint(path).weights()
    shard.unlink()
    with pytest.raises(StditError, match=r"lacks rank-00000"):
        Checkpoint(path).weights()
