"""Checkpoints: what a save costs the steps, and what reading one rank's pieces of many ranks' shards costs.

python benchmarks/checkpoints.py                             # both
python benchmarks/checkpoints.py --ranks 512 4096 --only reading
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stdit.training.engine import checkpoint
from stdit.training.engine.checkpoint import FORMAT, Checkpoint, CheckpointConfig, published
from stdit.training.engine.engine import Engine, ShardPiece, TorchEngine
from stdit.training.engine.optimizer import Ema, EmaConfig, OptimizerConfig
from stdit.training.engine.parallel import World
from stdit.training.engine.saver import Saver, Write, find_layout

CPU = torch.device("cpu")


class CutEngine(Engine):
    """What a rank of ZeRO holds of `parameters` vectors of `size` numbers: of each a stretch (3), or a stretch of all
    laid end to end (1)."""

    def __init__(self, stage: int, parameters: int, size: int, rank: int, ranks: int) -> None:
        self.pieces = [[]]
        start, total = 0, parameters * size
        each = -(-size // ranks) if stage == 3 else -(-total // ranks)
        for number in range(parameters):
            begin = 0 if stage == 3 else number * size  # of the parameter, in what is cut
            low, high = max(rank * each, begin), min((rank + 1) * each, begin + size)
            if low < high:
                name = f"blocks.{number}.weight"
                self.pieces[0].append(ShardPiece(name, (size,), low - begin, start, high - low))
                start += high - low
        self.flat_masters = [nn.Parameter(torch.full((each * (parameters if stage == 3 else 1),), float(rank)))]
        self.optimizer = torch.optim.AdamW(self.flat_masters)
        for flat in self.flat_masters:
            moments = {"exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
            self.optimizer.state[flat] = {"step": torch.tensor(3.0), **moments}


def write_shards(run: Path, stage: int, parameters: int, size: int, ranks: int) -> None:
    """What `ranks` ranks would write, one after another."""
    savers = [Saver(run, CheckpointConfig(), World(rank, ranks, CPU)) for rank in range(ranks)]
    engines = [CutEngine(stage, parameters, size, rank, ranks) for rank in range(ranks)]
    folder = run / "checkpoints" / ".tmp-step-00000001"
    shards = [saver._write_shard(folder, saver._snapshot([engine])) for saver, engine in zip(savers, engines)]
    savers[0]._layout = find_layout([engine.pieces for engine in engines])
    savers[0]._publish(Write(1, {"format": FORMAT, "step": 1, "groups": [], "state": {}}, Future()), shards)


def reading(numbers: list[int]) -> None:
    opened: set[str] = set()
    sys.addaudithook(lambda event, found: opened.add(str(found[0])) if event == "open" else None)
    real = checkpoint.safe_open

    def count(file: Path, framework: str) -> Any:
        opened.add(str(file))
        return real(file, framework)

    checkpoint.safe_open = count
    for ranks in numbers:
        for stage, parameters, size in ((1, 200, 5000), (3, 60, 5000)):
            with tempfile.TemporaryDirectory() as place:
                run = Path(place) / "run"
                write_shards(run, stage, parameters, size, ranks)
                (path,) = published(run)
                kib = (path / "manifest.json").stat().st_size / 2**10
                seconds, files = [], []
                for rank in (0, ranks // 2, ranks - 1):
                    engine = CutEngine(stage, parameters, size, rank, ranks)
                    expected = [flat.detach().clone() for flat in engine.flat_masters]
                    with torch.no_grad():
                        for flat in engine.flat_masters:
                            flat.zero_()
                    opened.clear()
                    begun = time.perf_counter()
                    found = Checkpoint(path)
                    assert not found.find_damage(rank, ranks)
                    found.load_state([engine])
                    seconds.append(time.perf_counter() - begun)
                    files.append(len({name for name in opened if name.startswith(str(path))}))
                    for flat, pieces, numbers_there in zip(engine.flat_masters, engine.pieces, expected):
                        for piece in pieces:
                            here = slice(piece.start, piece.start + piece.numel)
                            assert torch.equal(flat.detach()[here], numbers_there[here])
                print(
                    f"{ranks} ranks, ZeRO {stage}: manifest {kib:,.0f} KiB; opening, verifying and reading one rank's "
                    f"pieces: {max(seconds):.3f} s, {max(files)} files",
                    flush=True,
                )


def writing(million: int, saves: int) -> None:
    """Saves of a state of four tensors of so many numbers."""
    with tempfile.TemporaryDirectory() as place:
        engine = TorchEngine(nn.Linear(1000, million * 1000, bias=False), OptimizerConfig(), "fp32", World(0, 1, CPU))
        engine.ema = Ema(engine.flat_masters, EmaConfig())
        for flat in engine.flat_masters:
            flat.grad = torch.ones_like(flat)
        engine.step(0.01)
        saver = Saver(Path(place) / "run", CheckpointConfig(keep=1), World(0, 1, CPU))
        shares = []
        for step in range(1, saves + 1):
            begun = time.perf_counter()
            saver.start(step, [engine], {})
            held = time.perf_counter() - begun
            while saver._write is not None:  # where the steps would go on
                if saver.is_ready:
                    moment = time.perf_counter()
                    saver.go_on()
                    held += time.perf_counter() - moment
                time.sleep(0.001)
            took = time.perf_counter() - begun
            shares.append(held / took)
            gib = 4 * 4 * million * 1e6 / 2**30
            print(f"save {step}: {gib:.2f} GiB in {took:.2f} s, the steps held up {held:.3f} s ({held / took:.1%})")
        print(f"median of the share after the first: {statistics.median(shares[1:]):.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["reading", "writing"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--million", type=int, default=30, help="numbers of the model that is saved")
    parser.add_argument("--saves", type=int, default=6)
    options = parser.parse_args()
    if options.only != "writing":
        reading(options.ranks)
    if options.only != "reading":
        writing(options.million, options.saves)


if __name__ == "__main__":
    main()
