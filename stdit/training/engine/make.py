"""Chooses a run's engine."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import nn

from stdit.errors import StditError, nearest_name
from stdit.models.operators import RecomputeKind
from stdit.training.engine.engine import Engine, TorchEngine
from stdit.training.engine.optimizer import ELEMENTWISE, SHARDED_MUON, Ema, OptimizerConfig, make_optimizer, shardable
from stdit.training.engine.parallel import TIMEOUT, World
from stdit.training.engine.start import Numbers, allocate, fill
from stdit.training.engine.zero import DeepSpeedEngine, zero_stage


@dataclass
class ParallelConfig:
    """How ranks share a run.

    deepspeed: a DeepSpeed JSON, or zero1, zero2, zero3 or zero3_offload. Required on more than one rank.
    sequence_parallel: consecutive ranks that share every pack of a transformer's tokens (Ulysses), for clips that are
        too large for one; it divides the number of ranks, and had best not exceed the model's heads.
    recompute: what a transformer computes again in backward instead of keeping it, which saves memory: none, all (every
        block), n (every n-th block), or attention (every block, but for the output of its self-attention, which is
        kept).
    timeout: minutes that ranks wait for one another: then the run ends with an error that names the rank that hangs.
    """

    deepspeed: str | None = None
    sequence_parallel: PositiveInt = 1
    recompute: RecomputeKind | PositiveInt = "none"
    timeout: Annotated[float, Field(gt=0, le=1440)] = TIMEOUT

    def groups(self, ranks: int) -> int:
        """How many groups of ranks there are, each with its own packs. Raises StditError if ranks are left over."""
        if ranks % self.sequence_parallel:
            fitting = [size for size in range(1, ranks + 1) if ranks % size == 0]
            raise StditError(
                f"parallel.sequence_parallel={self.sequence_parallel} does not divide {ranks} ranks into groups. "
                f"Set it to one of {', '.join(map(str, fitting))}, or change the number of ranks."
            )
        return ranks // self.sequence_parallel

    @property
    def name_of_group(self) -> str:
        return "rank" if self.sequence_parallel == 1 else "group"


def make_engine(
    module: nn.Module,
    optimizer: OptimizerConfig,
    parallel: ParallelConfig,
    precision: str,
    world: World,
    numbers: Numbers | None = None,
) -> Engine:
    """The engine that the config asks for.

    module: with its starting weights, in fp32.
    numbers: the starting weights of parameters that are on the meta device instead.
    """
    check_engine(optimizer, parallel, world.device)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    for pattern in optimizer.options.get("fallback_list", []):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise StditError(
                f"optimizer.options.fallback_list: {pattern!r} is the name of no parameter that trains."
                f"{nearest_name(pattern, names)} Patterns are such as '*.head.weight'."
            )
    engine: Engine
    if parallel.deepspeed is None:
        if numbers is not None:
            fill(module, allocate(module, torch.float32), numbers)
        engine = TorchEngine(module, optimizer, precision, world)
    else:
        engine = DeepSpeedEngine(module, optimizer, parallel.deepspeed, precision, world, numbers)
    if optimizer.ema.decay > 0:
        engine.ema = Ema(engine.flat_masters, optimizer.ema)
    return engine


def check_engine(config: OptimizerConfig, parallel: ParallelConfig, device: torch.device) -> None:
    """Raises StditError for settings that no engine can have, before anything large is made."""
    stage = zero_stage(parallel.deepspeed)
    if stage > 0 and not shardable(config):
        algo = f" with optimizer.options.algo={config.options['algo']}" if "algo" in config.options else ""
        raise StditError(
            f"optimizer.name={config.name}{algo} needs whole matrices or groups, and ZeRO stage {stage} cuts them. "
            f"Use one of {', '.join(sorted(ELEMENTWISE | SHARDED_MUON))}, or one rank without parallel.deepspeed."
        )
    sizes = {"a.weight": (4, 4), "a.bias": (4,)}
    make_optimizer({name: nn.Parameter(torch.zeros(size, device=device)) for name, size in sizes.items()}, config)
