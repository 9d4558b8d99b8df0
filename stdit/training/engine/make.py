"""Chooses a run's engine."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from stdit.errors import StditError, nearest_name
from stdit.training.engine.engine import Engine, TorchEngine
from stdit.training.engine.optimizer import ELEMENTWISE, SHARDED_MUON, Ema, OptimizerConfig, make_optimizer, shardable
from stdit.training.engine.parallel import World
from stdit.training.engine.zero import DeepSpeedEngine, zero_stage


@dataclass
class ParallelConfig:
    """How ranks share a run.

    deepspeed: a DeepSpeed JSON, or zero1, zero2, zero3 or zero3_offload. Required on more than one rank.
    sequence_parallel: ranks that share a clip; only 1 is supported so far.
    """

    deepspeed: str | None = None
    sequence_parallel: int = 1

    def __post_init__(self) -> None:
        if self.sequence_parallel != 1:
            raise StditError(f"sequence_parallel {self.sequence_parallel}: only 1 is supported so far.")


def make_engine(
    module: nn.Module, optimizer: OptimizerConfig, parallel: ParallelConfig, precision: str, world: World
) -> Engine:
    """The engine that the config asks for. module: with its starting weights, in fp32."""
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
        engine = TorchEngine(module, optimizer, precision, world)
    else:
        engine = DeepSpeedEngine(module, optimizer, parallel.deepspeed, precision, world)
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
