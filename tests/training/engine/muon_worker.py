"""One of several ranks (or the only one): trains a small module under each DeepSpeed JSON and keeps its checkpoints.

Arguments: a folder with a plain engine's checkpoints (plain-fp32, plain-bf16), then NAME=JSON=PRECISION. Each trains
from the start (folder NAME), and goes on from the plain engine's checkpoint (NAME-resumed).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from stdit.training.engine.checkpoint import Checkpoint
from stdit.training.engine.engine import Engine
from stdit.training.engine.make import ParallelConfig, make_engine
from stdit.training.engine.parallel import World, join_world, leave_world

sys.path.append(str(Path(__file__).parents[2] / "shared"))
from exact_gradients import LAST, MUON, SAVED, Linear, save, train


def main() -> None:
    torch.set_num_threads(1)
    out, cases = Path(sys.argv[1]), [case.split("=") for case in sys.argv[2:]]
    world = join_world()

    def make(module: Linear, json: str, precision: str) -> Engine:
        return make_engine(module, MUON[precision], ParallelConfig(json), precision, world)

    for name, json, precision in cases:
        engine = make(Linear(), json, precision)
        train_and_save(engine, 0, SAVED, out / name, world)
        train_and_save(engine, SAVED, LAST, out / name, world)
        found, module = Checkpoint.latest(out / f"plain-{precision}"), Linear(seed=1)
        assert found is not None and found.step == SAVED
        found.load_weights(module)
        engine = make(module, json, precision)
        found.load_state([engine])
        train_and_save(engine, SAVED, LAST, out / f"{name}-resumed", world)
    leave_world()


def train_and_save(engine: Engine, begin: int, end: int, folder: Path, world: World) -> None:
    train(engine, begin, end, world)
    save(engine, folder, end, world)


if __name__ == "__main__":
    main()
