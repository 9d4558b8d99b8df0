"""Kills trainings with SIGKILL, and checks that each goes on from the newest whole checkpoint of the one before.

Arguments: a folder, the number of kills. Every second one falls while a checkpoint is being written. Prints how many
were killed, how many of them while writing, and the last step.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from torch import Tensor, nn

from stdit.training.engine.agreement import agree
from stdit.training.engine.checkpoint import CheckpointConfig, published, remove_strays
from stdit.training.engine.engine import TorchEngine
from stdit.training.engine.optimizer import Ema, EmaConfig, OptimizerConfig
from stdit.training.engine.parallel import World
from stdit.training.engine.saver import Saver

sys.path.append(str(Path(__file__).parents[2] / "shared"))
from checkpoints import half_written

ALONE = World(0, 1, torch.device("cpu"))


def make(seed: int) -> TorchEngine:
    torch.manual_seed(seed)
    engine = TorchEngine(nn.Linear(400, 400), OptimizerConfig(lr=0.01), "fp32", ALONE)
    engine.ema = Ema(engine.flat_masters, EmaConfig(0.9))
    return engine


def step(engine: TorchEngine, number: int) -> None:
    assert engine.ema is not None
    for flat in engine.flat_masters:
        flat.grad = torch.randn(flat.shape, generator=torch.Generator().manual_seed(number))
    engine.step(0.01)
    engine.ema.update(number)


def state_of(engine: TorchEngine) -> list[Tensor]:
    assert engine.ema is not None
    found = [*engine.flat_masters, *engine.ema.averages]
    return [*found, *(engine.optimizer.state[flat]["exp_avg_sq"] for flat in engine.flat_masters)]


def resume(folder: Path) -> tuple[TorchEngine, int]:
    remove_strays(folder)
    found, engine = agree(folder, ALONE, refused), make(0)
    if found is not None:
        engine = make(1)
        found.load_state([engine])
    return engine, found.step if found else 0


def refused(what: str) -> None:
    raise AssertionError(what)


def train(folder: Path) -> None:
    engine, done = resume(folder)
    saver = Saver(folder, CheckpointConfig(keep=2), ALONE)
    while True:
        done += 1
        if saver.is_ready:
            saver.go_on()
        step(engine, done)
        saver.start(done, [engine], {})


def main() -> None:
    torch.set_num_threads(1)
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    expected, done = make(0), 0
    killed = writing = 0
    for number in range(kills):
        before = len(published(folder)) and int(published(folder)[-1].name[5:])
        child = os.fork()
        if child == 0:
            try:
                train(folder)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        end = time.monotonic() + 60
        while not published(folder) or int(published(folder)[-1].name[5:]) <= before:
            assert time.monotonic() < end and os.waitpid(child, os.WNOHANG) == (0, 0), "it has ended by itself"
            time.sleep(0.001)
        time.sleep(random.random() * 0.1)
        while number % 2 and not (half := half_written(folder)) and time.monotonic() < end:
            pass
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        killed += 1
        writing += bool(number % 2 and half)
        engine, found = resume(folder)
        assert found > before
        while done < found:
            done += 1
            step(expected, done)
        for one, other in zip(state_of(expected), state_of(engine)):
            assert torch.equal(one, other), found
    print(killed, writing, done)


if __name__ == "__main__":
    main()
