"""Checkpoints: any number of writers and readers, published whole, kept on a full disk."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save
from hypothesis import given
from hypothesis import strategies as st
from thread_world import ThreadWorld
from torch import Tensor, nn

from stdit.errors import StditError
from stdit.training.engine.agreement import agree
from stdit.training.engine.checkpoint import (
    FORMAT,
    MANIFEST,
    Checkpoint,
    CheckpointConfig,
    checksum,
    published,
    remove_strays,
    step_of,
)
from stdit.training.engine.engine import Engine, ShardPiece, TorchEngine
from stdit.training.engine.optimizer import Ema, EmaConfig, OptimizerConfig, group_state, make_optimizer
from stdit.training.engine.parallel import World
from stdit.training.engine.saver import Saver, Write, find_layout

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
    save(tmp_path, 3, [engine], ALONE)
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
        values = dict(module.named_parameters())
        for name, shape, n in sizes:
            low, high = max(begin, rank * each), min(begin + n, (rank + 1) * each)
            if low < high:
                numbers = values[name].detach().flatten()[low - begin : high - begin]
                self.flat_masters[0].data[low - rank * each : high - rank * each] = numbers
                self.pieces[0].append(ShardPiece(name, shape, low - begin, low - rank * each, high - low))
            begin += n
        self.optimizer = make_optimizer({"all.weight": self.flat_masters[0]}, OptimizerConfig())


class EveryEngine(Engine):
    """What a rank of ZeRO 3 holds: its stretch of every parameter."""

    def __init__(self, module: nn.Module, rank: int, ranks: int) -> None:
        self.module = module
        self.flat_masters, self.pieces, parts = [], [[]], []
        start = 0
        for name, p in module.named_parameters():
            each = -(-p.numel() // ranks)
            part = p.detach().flatten()[rank * each : (rank + 1) * each]
            if part.numel():
                self.pieces[0].append(ShardPiece(name, tuple(p.shape), rank * each, start, part.numel()))
            parts.append(torch.nn.functional.pad(part, (0, each - part.numel())))
            start += each
        self.flat_masters = [nn.Parameter(torch.cat(parts))]
        self.optimizer = make_optimizer({"all.weight": self.flat_masters[0]}, OptimizerConfig())


def write_shards(run: Path, engines: list[Any]) -> None:
    """A checkpoint of as many ranks as there are engines, written one after another in this thread."""
    savers = [Saver(run, CheckpointConfig(), World(rank, len(engines), ALONE.device)) for rank in range(len(engines))]
    folder = run / "checkpoints" / ".tmp-step-00000001"
    shards = [saver._write_shard(folder, saver._snapshot([engine])) for saver, engine in zip(savers, engines)]
    savers[0]._layout = find_layout([engine.pieces for engine in engines])
    about = {"format": FORMAT, "step": 1, "groups": [], "state": {}}
    savers[0]._publish(Write(1, about, Future()), shards)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_any_number_of_ranks_reads_and_writes_the_same_numbers(tmp_path: Path, ranks: int) -> None:
    engine = trained()
    save(tmp_path / "one", 3, [engine], ALONE)
    source = Checkpoint.latest(tmp_path / "one")
    assert source is not None
    jobs = []
    with ThreadPoolExecutor(ranks) as pool:
        for rank in range(ranks):
            part = CutEngine(Model(1), rank, ranks)
            part.ema = Ema(part.flat_masters, EmaConfig(0.9))
            source.load_state([part])
            world = ThreadWorld(rank, ranks, torch.device("cpu"))
            jobs.append(pool.submit(save, tmp_path / "many", 3, [part], world))
    for job in jobs:
        job.result()

    again = Checkpoint.latest(tmp_path / "many")
    assert again is not None and len(again.about["shards"]) == ranks
    restored = TorchEngine(Model(2), OptimizerConfig(lr=0.05), "fp32", ALONE)
    restored.ema = Ema(restored.flat_masters, EmaConfig(0.9))
    again.load_weights(restored.module)
    again.load_state([restored])
    for one, other in zip(state_of(engine), state_of(restored)):
        assert torch.equal(one, other)


def test_only_whole_checkpoints_count_and_old_ones_go(tmp_path: Path) -> None:
    engine = trained()
    for step in (1, 2, 10):
        save(tmp_path, step, [engine], ALONE, {"n": step}, keep=2)
    assert [path.name for path in published(tmp_path)] == ["step-00000002", "step-00000010"]
    (tmp_path / "checkpoints" / ".tmp-step-00000011").mkdir()
    (tmp_path / "checkpoints" / "step-00000012").mkdir()  # no manifest
    found = Checkpoint.latest(tmp_path)
    assert found is not None and found.step == 10 and found.state == {"n": 10}
    remove_strays(tmp_path)
    assert not list((tmp_path / "checkpoints").glob(".tmp*"))


def test_every_kth_checkpoint_stays_and_later_ones_do_not_count(tmp_path: Path) -> None:
    """A later one was refused when the run was resumed: it must not push out those that the run can go on from."""
    engine, saver = trained(), Saver(tmp_path, CheckpointConfig(keep=2, keep_every=4), ALONE)
    for step in (40, *range(1, 12)):
        saver.start(step, [engine], {})
    saver.finish()
    assert [step_of(path) for path in published(tmp_path)] == [4, 8, 10, 11, 40]


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    engine = trained()
    path = save(tmp_path, 1, [engine], ALONE)
    other = Model(0)
    other.b = nn.Linear(3, 6)
    with pytest.raises(StditError, match=r"b\.bias, b\.weight"):
        Checkpoint(path).load_weights(other)
    with pytest.raises(StditError, match=r"step-00000001 has no exp_avg_cubed of a\.weight"):
        Checkpoint(path).weights("exp_avg_cubed")


def test_a_checkpoint_of_another_format_is_no_damage(tmp_path: Path) -> None:
    path = save(tmp_path, 1, [trained()], ALONE)
    about = json.loads((path / MANIFEST).read_text())
    early = {key: value for key, value in about.items() if key != "sha256"} | {"format": 1}
    late = about | {"format": 9}
    for other in (early, late | {"sha256": checksum(late)}):
        (path / MANIFEST).write_text(json.dumps(other))
        with pytest.raises(StditError, match=rf"step-00000001 has checkpoint format {other['format']}, .* model\.init"):
            agree(tmp_path, ALONE, print)


CUTS = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=6), min_size=1, max_size=3)


@given(CUTS, st.data())
def test_runs_of_pieces_are_the_pieces(cuts: list[list[int]], data: st.DataObject) -> None:
    """cuts: by parameter, how many numbers of it each rank holds."""
    ranks: list[list[list[ShardPiece]]] = [[[]] for _ in range(6)]
    for number, counts in enumerate(cuts):
        begin = 0
        for rank, numel in enumerate(counts):
            if numel:
                ranks[rank][0].append(ShardPiece(f"p{number}", (sum(counts),), begin, 0, numel))
            begin += numel
    parameters = find_layout(ranks).parameters
    found = Checkpoint.__new__(Checkpoint)
    found.parameters, found.path = parameters, Path("here")
    for number, counts in enumerate(cuts):
        owners = [rank for rank, numel in enumerate(counts) for _ in range(numel)]
        if owners:
            low = data.draw(st.integers(0, len(owners)))
            high = data.draw(st.integers(low, len(owners)))
            parts = list(found.parts(f"p{number}", low, high - low))
            assert [part.shard for part in parts for _ in range(part.numel)] == owners[low:high]
            assert all(owners.index(part.shard) == part.piece for part in parts)
            with pytest.raises(StditError, match=rf"{len(owners) - low} of {len(owners) - low + 1} numbers"):
                list(found.parts(f"p{number}", low, len(owners) - low + 1))


@pytest.mark.parametrize(("ranks", "pieces"), [(64, "cut"), (64, "every")])
def test_a_rank_opens_only_the_shards_that_hold_its_pieces(
    tmp_path: Path, ranks: int, pieces: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO 1 and 2 lay parameters end to end and cut that (`cut`), ZeRO 3 cuts every parameter (`every`)."""
    make = CutEngine if pieces == "cut" else EveryEngine
    engines = [make(Model(0), rank, ranks) for rank in range(ranks)]
    write_shards(tmp_path, engines)
    opened: list[int] = []
    real = Checkpoint._open

    def count(self: Checkpoint, number: int) -> Any:
        opened.append(number)
        return real(self, number)

    monkeypatch.setattr(Checkpoint, "_open", count)
    for rank in (0, 7, ranks - 1):
        opened.clear()
        again = make(Model(1), rank, ranks)
        found = Checkpoint.latest(tmp_path)
        assert found is not None
        found.load_state([again])
        assert set(opened) <= {rank}
        for flat, mine in zip(again.flat_masters, engines[rank].flat_masters):
            assert torch.equal(flat, mine)
    other = make(Model(1), 1, 3)
    opened.clear()
    found.load_state([other])
    assert len(opened) == len(set(opened)) <= ranks // 3 + 2  # a third of them, each once


def test_weights_are_read_by_one_rank_each_and_reach_all(tmp_path: Path) -> None:
    engines = [CutEngine(Model(0), rank, 5) for rank in range(5)]
    with torch.no_grad():
        engines[0].flat_masters[0][3] = -0.0
    write_shards(tmp_path, engines)
    expected = Checkpoint(published(tmp_path)[0]).weights()
    modules = [Model(rank + 1) for rank in range(3)]

    def load(rank: int) -> None:
        found = Checkpoint.latest(tmp_path)
        assert found is not None
        found.load_weights(modules[rank], world=ThreadWorld(rank, 3, torch.device("cpu")))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(load, range(3)))
    for module in modules:
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter.view(torch.int32), expected[name].view(torch.int32)), name  # -0 too
