"""A module whose gradients are small integers, so that sums over clips and ranks are exact in any order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import checkpoints
import torch
from tensor_files import load_file
from torch import Tensor, nn

from stdit.training.engine.engine import Engine
from stdit.training.engine.optimizer import EmaConfig, OptimizerConfig
from stdit.training.engine.parallel import World

SHAPES = ((12, 8), (6, 3, 2, 2), (8,), (7, 9), (1, 6, 8), (40, 8), (24, 16), (5, 5), (2, 30))
CLIPS = 4  # in a step: two micro-steps on one rank, one each on two
SAVED, LAST = 3, 5  # steps
NO_EMA = EmaConfig(decay=0)
FALLBACK = {"fallback_list": ["parts.5.*"], "fallback_lr_scale": 0.5}
MUON = {  # by precision
    "fp32": OptimizerConfig("muon", weight_decay=0.1, clip=0.0, ema=NO_EMA, options=FALLBACK),
    "bf16": OptimizerConfig("nmuon", weight_decay=0.1, clip=0.0, ema=NO_EMA, options={"conv_mode": "batched"}),
}


class Part(nn.Module):
    def __init__(self, shape: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape, generator=generator))
        self.shape = tuple(shape)  # ZeRO-3 empties the parameter

    def forward(self, generator: torch.Generator) -> Tensor:
        return (self.weight.float() * torch.randint(-3, 4, self.shape, generator=generator)).sum()


class Linear(nn.Module):
    """The sum over clips, which are seeds, of ⟨weights, integers⟩."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.parts = nn.ModuleList(Part(shape, generator) for shape in SHAPES)

    def forward(self, batch: Sequence[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in batch]
        return torch.stack([part(generator) for generator in generators for part in self.parts]).sum()


def train(engine: Engine, begin: int, end: int, world: World) -> None:
    for step in range(begin, end):
        clips = range(step * CLIPS, (step + 1) * CLIPS)
        mine = list(clips)[world.rank :: world.size]
        for start in range(0, len(mine), 2):
            engine.backward(mine[start : start + 2], 1 / CLIPS, last=start + 2 >= len(mine))
        engine.step(0.05 / (step + 1))


def save(engine: Engine, folder: Path, step: int, world: World) -> None:
    checkpoints.save(folder, step, [engine], world)


def state_of(folder: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by kind and parameter, pieces joined."""
    parts: dict[str, dict[int, Tensor]] = {}
    for file in sorted((folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            name, _, offset = key.rpartition("@")
            parts.setdefault(name, {})[int(offset)] = tensor
    joined = {}
    for name, pieces in parts.items():
        found = [piece for _, piece in sorted(pieces.items())]
        joined[name] = found[0] if "." in name.partition("/")[0] else torch.cat(found)  # each shard has all of it
    return joined
