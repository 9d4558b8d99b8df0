"""Operators with a derivative that compiled code does not look into, so a new mix of lengths never recompiles it; and
blocks that are recomputed in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.library import custom_op
from torch.utils.checkpoint import checkpoint

RecomputeKind = Literal["none", "all", "attention"]


@dataclass(frozen=True)
class Opaque:
    """A function, its schema as torch writes it, and a fake of it: uninitialised results of the right shapes."""

    run: Callable
    schema: str
    fake: Callable

    def register(self, name: str) -> Any:
        found = custom_op(f"stdit::{name}", self.run, mutates_args=(), schema=self.schema)
        found.register_fake(self.fake)
        return found


@dataclass
class KeptOutputs:
    """What the operators of one block returned in its forward, until it is recomputed."""

    outputs: list[tuple[Tensor, ...]] = field(default_factory=list)
    taken: int | None = None  # how many the recomputation has taken; None before it begins

    def keep(self, outputs: tuple[Tensor, ...]) -> None:
        self.outputs.append(tuple(one.detach() for one in outputs))

    def take(self) -> tuple[Tensor, ...]:
        assert self.taken is not None
        self.taken += 1
        return self.outputs[self.taken - 1]


# Of the block that runs, None if it keeps nothing. By thread: backward has its own.
KEPT: ContextVar[KeptOutputs | None] = ContextVar("KEPT", default=None)


@dataclass(frozen=True)
class Operator:
    """One computation in three forms. Each is differentiable once, in its first output.

    compiled: for compiled code, and for tensors without data.
    eager: a plain autograd function, which eager code calls; it saves a tenth of a millisecond per call.
    known: takes the outputs before the inputs, and returns them: only the derivative is left to compute.
    """

    compiled: Any
    eager: Callable
    known: Callable

    def keeping(self, run: Callable, *inputs: Any) -> Any:
        """run(*inputs), one of the forms. A block that is recomputed in backward may keep the outputs (`Recompute`)."""
        kept = KEPT.get()
        if kept is not None and kept.taken is not None:
            return self.known(kept.take(), *inputs)
        outputs = run(*inputs)
        if kept is not None:
            kept.keep(outputs)
        return outputs


def operator(
    name: str,
    forward: Opaque,
    derivative: Opaque,
    saved: Callable[[tuple, Any], tuple[Sequence[Tensor], Sequence[Any]]],
    residual: bool = False,
) -> Operator:
    """Registers a computation with its derivative.

    derivative: takes the gradient and what was saved; returns the gradients of the first inputs.
    saved: (inputs, output) to the tensors, and then the other values, that the derivative takes.
    residual: the first input is added to the rest, so its gradient is that of the output.
    """

    def save(ctx: Any, inputs: tuple, output: Any) -> None:
        tensors, ctx.values = saved(inputs, output)
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(output[1:] if isinstance(output, tuple) else ()))
        ctx.set_materialize_grads(False)
        ctx.inputs = len(inputs)

    def gradients(run: Callable, ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
        if grad is None:
            return (None,) * ctx.inputs
        found = run(grad.contiguous(), *ctx.saved_tensors, *ctx.values)
        found = (grad, *found) if residual else found
        return (*found, *(None,) * (ctx.inputs - len(found)))

    opaque_derivative = derivative.register(f"{name}_backward")
    compiled = forward.register(name)
    compiled.register_autograd(partial(gradients, opaque_derivative), setup_context=save)
    run = forward.run

    class Eager(torch.autograd.Function):
        forward = staticmethod(run)
        setup_context = staticmethod(save)
        backward = staticmethod(partial(gradients, derivative.run))

    class Known(torch.autograd.Function):
        @staticmethod
        def forward(outputs: tuple[Tensor, ...], *inputs: Any) -> tuple[Tensor, ...]:
            return outputs

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
            save(ctx, inputs[1:], output)

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
            without_data = grad is not None and grad.device.type == "meta"
            return None, *gradients(opaque_derivative if without_data else derivative.run, ctx, grad)

    return Operator(compiled, Eager.apply, Known.apply)


@dataclass(frozen=True)
class Recompute:
    """Which blocks are recomputed in backward: they keep their input, and not what their derivatives need (Chen et al.
    2016, arXiv 1604.06174). Gradients stay the same, bit for bit.

    Self-attention costs most to compute again: of Wan 14B at 720p and 121 frames 79 % of a block's forward. A block may
    keep its output alone (Korthikanti et al. 2022, arXiv 2205.05198). torch's selective policy would do that too, but
    it wants the same operators in both passes, and ZeRO 3 gathers other weights in the second.

    every: each n-th block, the first among them; 0: none, 1: all.
    keeps_attention: a recomputed block keeps the output of its self-attention.
    """

    every: int = 0
    keeps_attention: bool = False

    @classmethod
    def of(cls, kind: RecomputeKind | int) -> Recompute:
        """The setting `parallel.recompute`."""
        if isinstance(kind, int):
            return cls(every=kind)
        return {"none": cls(), "all": cls(1), "attention": cls(1, keeps_attention=True)}[kind]

    def run(self, number: int, block: nn.Module, *inputs: Any) -> Tensor:
        """Runs a block, the `number`-th from 0, on its inputs."""
        if not self.every or number % self.every or not torch.is_grad_enabled():
            return cast(Tensor, block(*inputs))
        # no module draws random numbers, so there is no state of a generator to restore
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if self.keeps_attention:
            options["context_fn"] = _keeping
        return cast(Tensor, checkpoint(block, *inputs, **options))


def _keeping() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a block's forward and of its recomputation."""
    kept = KeptOutputs()
    return _During(kept, recomputing=False), _During(kept, recomputing=True)


class _During(AbstractContextManager[None]):
    """While a block runs. It can be entered again: a graph may be run backward twice."""

    def __init__(self, kept: KeptOutputs, recomputing: bool) -> None:
        self.kept, self.recomputing = kept, recomputing

    def __enter__(self) -> None:
        self.kept.taken = 0 if self.recomputing else None
        self._token = KEPT.set(self.kept)

    def __exit__(self, *error: Any) -> None:
        KEPT.reset(self._token)
