"""How a module is trained: its gradients, the optimizer step, and which rank holds which part of the fp32 state.

Two engines have one interface: `TorchEngine` here is plain PyTorch on one rank, `zero.DeepSpeedEngine` shards over
ranks with ZeRO. Both train fp32 masters; with precision bf16 the module computes in bf16 copies of them.

The fp32 state of a rank is a list of flat tensors (`flat_masters`), which the optimizer updates in place, and for each
of them a list of the pieces of parameters in it. Checkpoints and the moving average need nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stdit.errors import StditError
from stdit.training.engine.clipping import NormLimit
from stdit.training.engine.optimizer import Ema, OptimizerConfig, make_optimizer
from stdit.training.engine.parallel import World

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ShardPiece:
    """`numel` numbers of the flattened parameter `name` from `offset` on, at `start` of a flat master."""

    name: str
    shape: tuple[int, ...]
    offset: int
    start: int
    numel: int


class Engine:
    """The interface of both engines."""

    module: nn.Module
    optimizer: torch.optim.Optimizer  # its state is keyed by flat master
    shapes: dict[str, tuple[int, ...]]  # of all parameters that train, in the same order on all ranks
    flat_masters: list[Tensor]
    pieces: list[list[ShardPiece]]  # by flat master
    limit: NormLimit  # of the gradient
    ema: Ema | None = None  # of the flat masters, set by `make_engine`
    replicated = False  # whether every rank holds all pieces
    differentiable = True  # whether the result of `forward` may be differentiated, outside training

    def copy_masters(self) -> None:
        """Writes the masters into the module's weights. All ranks call it together, after they read a checkpoint."""
        raise NotImplementedError

    def backward(self, batch: Any, scale: float, last: bool) -> Tensor:
        """Adds the gradient of scale · module(batch) to the step's, and returns module(batch).

        The module returns a sum over clips; scale is 1 / the step's total weight over all ranks. last: whether this is
        the step's last micro-step.
        """
        raise NotImplementedError

    def forward(self, batch: Any) -> Tensor:
        """module(batch), outside training. All ranks call it together."""
        return self.module(batch)

    def step(self, lr: float) -> float:
        """Clips, updates masters and weights, clears the gradients. Returns the gradient's norm before clipping; if it
        is not finite, on any rank, no rank has updated anything."""
        raise NotImplementedError


class TorchEngine(Engine):
    """Plain PyTorch on one rank."""

    def __init__(self, module: nn.Module, config: OptimizerConfig, precision: str, world: World) -> None:
        if world.size > 1:
            raise StditError(
                f"{world.size} ranks need DeepSpeed: set parallel.deepspeed=zero1 (or zero2, zero3) and "
                f"`pip install stdit[train]`."
            )
        self.limit = NormLimit(config.clip, config.adaptive_clip)
        self.module = module.to(world.device)
        masters = trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._copies: list[nn.Parameter] = []
        if PRECISIONS[precision] is not torch.float32:
            masters = {name: nn.Parameter(p.detach().float().clone()) for name, p in trained.items()}
            self.module.to(PRECISIONS[precision])
            self._copies = list(trained.values())
        self.shapes = {name: tuple(p.shape) for name, p in trained.items()}
        self.flat_masters = list(masters.values())
        self.pieces = [[ShardPiece(name, tuple(p.shape), 0, 0, p.numel())] for name, p in masters.items()]
        self.optimizer = make_optimizer(masters, config)

    @torch.no_grad()
    def copy_masters(self) -> None:
        if self._copies:
            torch._foreach_copy_([copy.data for copy in self._copies], self.flat_masters)

    def backward(self, batch: Any, scale: float, last: bool) -> Tensor:
        total = self.module(batch)
        (total * nan_if_not_finite(scale, total)).backward()
        for master, copy in zip(self.flat_masters, self._copies):  # gradients add up in fp32
            if copy.grad is not None:
                master.grad = copy.grad.float() if master.grad is None else master.grad.add_(copy.grad)
                copy.grad = None
        return total.detach()

    @torch.no_grad()
    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        gradients = [flat.grad for flat in self.flat_masters if flat.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if math.isfinite(value := float(norm)):
            if limit := self.limit.value:
                torch.nn.utils.clip_grads_with_norm_(self.flat_masters, limit, norm)
            self.optimizer.step()
            self.copy_masters()
        self.optimizer.zero_grad(set_to_none=True)
        self.limit.note(value)
        return value


def nan_if_not_finite(scale: float, total: Tensor) -> Tensor:
    """`scale`, or nan if the loss is not finite: the gradient is then not finite either, and no rank updates."""
    value = total.detach()
    return value - value + scale
