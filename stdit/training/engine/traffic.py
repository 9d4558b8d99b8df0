"""Counts what this rank's collectives send, its own and DeepSpeed's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

# What a rank sends in a ring of R ranks, in units of the bytes of the argument that counts.
SHARES: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "reduce": lambda ranks: (ranks - 1) / ranks,
    "broadcast": lambda ranks: (ranks - 1) / ranks,
    "all_gather": lambda ranks: ranks - 1,
    "all_gather_into_tensor": lambda ranks: ranks - 1,
    "reduce_scatter": lambda ranks: (ranks - 1) / ranks,
    "reduce_scatter_tensor": lambda ranks: (ranks - 1) / ranks,
    "all_to_all_single": lambda ranks: (ranks - 1) / ranks,  # of equal splits
}
# The argument that counts: its place, and its name.
ARGUMENTS = {
    "all_gather": (1, "tensor"), "all_gather_into_tensor": (1, "input_tensor"), "reduce_scatter": (1, "input_list"),
    "reduce_scatter_tensor": (1, "input"), "all_to_all_single": (1, "input"),
}  # fmt: skip


@dataclass
class Traffic:
    """calls: of collectives. sent: bytes, in rings; a tree or a switch that adds up may send others."""

    calls: int = 0
    sent: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.calls + other.calls, self.sent + other.sent)

    def take(self) -> Traffic:
        """What was counted since the last call."""
        taken = Traffic(self.calls, self.sent)
        self.calls, self.sent = 0, 0.0
        return taken


TRAFFIC = Traffic()
_COUNTED: set[str] = set()


def count_collectives() -> None:
    """Counts every call of torch.distributed's collectives from now on, in TRAFFIC. Before DeepSpeed is imported, which
    keeps some of the functions."""
    for name in SHARES.keys() - _COUNTED:
        _COUNTED.add(name)
        counted = _counted(name, getattr(distributed_c10d, name))
        for module in (dist, distributed_c10d):
            setattr(module, name, counted)


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    place, argument = ARGUMENTS.get(name, (0, "tensor"))

    @wraps(function)
    def counted(*arguments: Any, **named: Any) -> Any:
        group = named.get("group")
        value = named[argument] if argument in named else arguments[place]
        sent = SHARES[name](dist.get_world_size(group)) * _bytes(value)
        if name == "all_to_all_single":
            splits = named.get("input_split_sizes", arguments[3] if len(arguments) > 3 else None)
            if splits is not None:  # all but this rank's own rows
                sent = value.nbytes - value[: splits[dist.get_rank(group)]].nbytes
        TRAFFIC.calls += 1
        TRAFFIC.sent += sent
        return function(*arguments, **named)

    return counted


def _bytes(value: Tensor | Sequence[Tensor]) -> int:
    return value.nbytes if isinstance(value, Tensor) else sum(tensor.nbytes for tensor in value)
