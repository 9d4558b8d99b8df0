"""Muon under ZeRO: each matrix is orthogonalised whole, by one rank (Liu et al. 2025, arXiv 2502.16982, algorithm 1).

Muon's update of a matrix is its momentum with all singular values near 1, which needs the whole matrix, and ZeRO cuts
masters anywhere. Every rank updates the momentum of its own pieces and sends them to the rank that owns the matrix,
which returns its pieces of the orthogonalised matrix. Both ways are in bf16, the precision in which timm's Muon
orthogonalises: given the same gradients, masters and momentum are bit for bit those of timm's Muon on one rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from timm.optim.muon import Muon, get_lr_scale, muon, reshape_for_muon
from torch import Tensor

from stdit.training.engine.engine import ShardPiece
from stdit.training.engine.parallel import World

ROUND = 2**27  # numbers of the matrices in a round, per rank: 256 MiB in bf16


@dataclass(frozen=True)
class Round:
    """Matrices that are orthogonalised at the same time.

    sent: this rank's pieces of them, by the rank that owns the matrix.
    received: the pieces of the matrices that this rank owns, by the rank that holds them.
    """

    sent: list[list[ShardPiece]]
    received: list[list[ShardPiece]]


class ShardedMuon(Muon):
    """timm's Muon (muon and nmuon) over flat masters.

    Its state has timm's names, cut as the masters are. Groups with `use_fallback` take timm's AdamW, which needs no
    whole matrices.
    """

    def __init__(self, groups: list[dict[str, Any]], world: World) -> None:
        super().__init__(groups)
        self._world = world
        self._rounds: dict[Tensor, list[Round]] = {}  # by flat master

    def attach(self, flat_masters: Sequence[Tensor], pieces: Sequence[list[ShardPiece]]) -> None:
        """Says which pieces lie where. All ranks call it together, with their flat masters in the same order.

        Before that, a step leaves matrices alone.
        """
        everywhere = self._world.gather(list(pieces))  # by rank, by flat master
        for index, flat in enumerate(flat_masters):
            self._rounds[flat] = _plan([held[index] for held in everywhere], self._world.rank)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """All ranks call it together, with the same flat masters in `param_groups`."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["use_fallback"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            if not group["use_fallback"]:
                for flat in group["params"]:
                    if flat in self._rounds:
                        self._step_matrices(flat, group)

    def _step_matrices(self, flat: Tensor, group: dict[str, Any]) -> None:
        gradient, state = flat.grad, self.state[flat]
        assert gradient is not None, "DeepSpeed gives every flat master a gradient"
        if "momentum_buffer" not in state:
            state["use_muon"] = True
            state["momentum_buffer"] = torch.zeros_like(flat)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        for one in self._rounds[flat]:
            self._apply(one, flat.view(-1), update.view(-1), group)

    def _apply(self, matrices: Round, flat: Tensor, update: Tensor, group: dict[str, Any]) -> None:
        ours, theirs = (list(chain.from_iterable(parts)) for parts in (matrices.sent, matrices.received))
        parts = [update[piece.start : piece.start + piece.numel] for piece in ours]
        whole: dict[str, Tensor] = {}
        for piece, numbers in zip(theirs, self._exchange(parts, matrices.sent, matrices.received, self._world.device)):
            if piece.name not in whole:
                whole[piece.name] = numbers.new_empty(piece.shape)
            whole[piece.name].view(-1)[piece.offset : piece.offset + piece.numel] = numbers
        done = {name: _orthogonal(matrix, group).view(-1) for name, matrix in whole.items()}
        parts = [done[piece.name][piece.offset : piece.offset + piece.numel] for piece in theirs]
        for piece, numbers in zip(ours, self._exchange(parts, matrices.received, matrices.sent, flat.device)):
            rate = group["lr"] * _scale(piece.shape, group)
            flat[piece.start : piece.start + piece.numel].add_(numbers, alpha=-rate)

    def _exchange(
        self, parts: list[Tensor], sent: list[list[ShardPiece]], received: list[list[ShardPiece]], device: torch.device
    ) -> Sequence[Tensor]:
        """Sends `parts`, which are the numbers of `sent`, in bf16. Returns those of `received`, on `device`."""
        numbers = torch.cat([part.bfloat16() for part in parts] or [torch.empty(0, dtype=torch.bfloat16)])
        counts = [[sum(piece.numel for piece in pieces) for pieces in side] for side in (sent, received)]
        numbers = self._world.exchange(numbers.to(self._world.device), *counts).to(device)
        return numbers.split([piece.numel for piece in chain.from_iterable(received)])


def _plan(pieces: Sequence[Sequence[ShardPiece]], rank: int) -> list[Round]:
    """The rounds of a flat master. The largest matrices come first; each goes to the rank with the least work so far.

    pieces: by rank.
    """
    ranks = len(pieces)
    shapes = {piece.name: piece.shape for held in pieces for piece in held}
    owners: dict[str, int] = {}
    rounds: dict[str, int] = {}
    work, begun = [0] * ranks, 0
    for name in sorted(shapes, key=lambda name: (-math.prod(shapes[name]), name)):
        rows, numel = shapes[name][0], math.prod(shapes[name])
        owners[name] = work.index(min(work))
        work[owners[name]] += numel * min(rows, numel // rows)  # a product of the matrix with itself
        rounds[name] = begun // (ROUND * ranks)
        begun += numel

    def chosen(held: Sequence[ShardPiece], number: int, owner: int) -> list[ShardPiece]:
        return [piece for piece in held if rounds[piece.name] == number and owners[piece.name] == owner]

    return [
        Round(
            sent=[chosen(pieces[rank], number, owner) for owner in range(ranks)],
            received=[chosen(held, number, rank) for held in pieces],
        )
        for number in sorted(set(rounds.values()))
    ]


def _orthogonal(matrix: Tensor, group: dict[str, Any]) -> Tensor:
    """The orthogonalised matrix or kernel, in bf16: timm's step from zeros, without momentum, at learning rate -1."""
    result = torch.zeros_like(matrix)
    muon(
        [result], [matrix], [matrix], lr=-1.0, weight_decay=0.0, momentum=0.0, nesterov=False,
        ns_steps=group["ns_steps"], ns_coefficients=group["ns_coefficients"], eps=group["eps"],
        safety_factor=group["safety_factor"], adjust_lr_fn=None, conv_mode=group["conv_mode"], normalize_spatial=False,
        scale_eps=group["scale_eps"],
    )  # fmt: skip
    return result


def _scale(shape: tuple[int, ...], group: dict[str, Any]) -> float:
    """timm's factor on the learning rate of a matrix or kernel."""
    rows = reshape_for_muon(torch.empty(shape, device="meta"), group["conv_mode"])[0].shape
    scale = get_lr_scale(rows, group["adjust_lr_fn"]) if group["adjust_lr_fn"] else 1.0
    return scale * rows[0] ** -0.5 if len(rows) == 3 and group["normalize_spatial"] else scale
