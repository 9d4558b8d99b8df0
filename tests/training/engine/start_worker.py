"""One of two ranks: makes engines of a transformer on the meta device and of the same one with its weights, and writes
what differs between them, and what the first asked for, as rank-N.json.

Arguments: an output folder, then NAME=JSON=PRECISION.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from stdit.models.packing import pack_clips, pack_texts
from stdit.models.transformer import STDiT, TransformerConfig
from stdit.training.engine.engine import Engine
from stdit.training.engine.make import ParallelConfig, make_engine
from stdit.training.engine.optimizer import OptimizerConfig
from stdit.training.engine.parallel import World, join_world, leave_world

CONFIG = TransformerConfig(dim=24, heads=2, layers=2, ffn_dim=40, text_dim=6, in_channels=3, out_channels=3)
SEED = 3


class Module(nn.Module):
    """A transformer beside weights of another origin."""

    def __init__(self, meta: bool) -> None:
        super().__init__()
        with torch.device("meta" if meta else "cpu"):
            self.transformer = STDiT(CONFIG, SEED)
        with torch.device("cpu"):
            self.there = nn.Parameter(torch.linspace(-1, 1, 77))

    def forward(self, batch: Tensor) -> Tensor:
        pack = pack_clips([batch], [torch.tensor(0.5)], CONFIG.patch)
        text = pack_texts([self.there[:12].view(2, 6).to(batch.dtype)], 0)
        return self.transformer(pack, text).float().square().sum() + self.there.float().square().sum()


def main() -> None:
    torch.set_num_threads(1)
    out, cases = Path(sys.argv[1]), [case.split("=") for case in sys.argv[2:]]
    world = join_world()
    (out / f"rank-{world.rank}.json").write_text(json.dumps({name: compare(*case, world) for name, *case in cases}))
    leave_world()


def compare(path: str, precision: str, world: World) -> dict[str, object]:
    asked: list[tuple[str, int, int]] = []
    weights = STDiT(CONFIG, SEED).starting_weights(SEED)

    def numbers(name: str, start: int, stop: int) -> Tensor:
        asked.append((name, start, stop))
        return weights.draw(name.removeprefix("transformer."), start, stop)

    def make(meta: bool) -> Engine:
        optimizer, parallel = OptimizerConfig(lr=0.01), ParallelConfig(path)
        return make_engine(Module(meta), optimizer, parallel, precision, world, numbers if meta else None)

    ours, theirs = make(meta=True), make(meta=False)
    found = {
        "asked": list(asked),
        "pieces": ours.pieces == theirs.pieces,
        "start": differences(ours, theirs, world.rank),
    }
    clip = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(world.rank))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    losses = []
    for _ in range(2):
        for engine in (ours, theirs):
            losses.append(float(engine.backward(clip.to(dtype), 1.0, last=True)))
            engine.step(0.01)
    found |= {"losses": losses, "end": differences(ours, theirs, world.rank)}
    ours = make(meta=True)  # as a resumed run does: its masters are read later
    for mine, read in zip(ours.flat_masters, theirs.flat_masters):
        mine.data.copy_(read)
    ours.copy_masters()
    found["copied"] = differences(ours, theirs, world.rank)
    found["sizes"] = {f"transformer.{name}": p.numel() for name, p in STDiT(CONFIG, SEED).named_parameters()}
    found["own"] = [(p.name, p.offset, p.numel) for pieces in ours.pieces for p in pieces]
    return found


def differences(ours: Engine, theirs: Engine, rank: int) -> int:
    """How many numbers of masters and of this rank's weights differ; those that only fill a part up do not count."""
    pairs = [*zip(masters(ours), masters(theirs)), *zip(held(ours.module, rank), held(theirs.module, rank))]
    return sum(int((one != other).sum()) for one, other in pairs)


def masters(engine: Engine) -> list[Tensor]:
    return [
        flat.detach().view(-1)[piece.start : piece.start + piece.numel]
        for flat, pieces in zip(engine.flat_masters, engine.pieces)
        for piece in pieces
    ]


def held(module: nn.Module, rank: int) -> list[Tensor]:
    found = []
    for p in module.parameters():
        part: Tensor = getattr(p, "ds_tensor", p).detach().flatten()
        whole = getattr(p, "ds_numel", p.numel())
        found.append(part[: whole - rank * len(part)] if hasattr(p, "ds_tensor") else part)
    return found


if __name__ == "__main__":
    main()
