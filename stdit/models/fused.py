"""The memory-bound operations of a block: each is one pass forward, and is recomputed in backward.

Modulation is a table (K, …, D) with a row per distinct noise level. Tokens of equal level lie in runs (a clip,
a frame), and each run takes its row (D,) in one call, so the table is never expanded to (N, D). Where runs are short (a
level per token), rows are gathered in chunks. Sums need no atomics, so they are deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stdit.models.packing import LevelIndex
from stdit.models.positions import wide_dtype

MEAN_RUN = 12288  # if runs average fewer elements than this, rows are gathered: a kernel launch per run would cost more
CHUNK = 4096  # tokens whose rows are gathered at once


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, index: LevelIndex, eps: float, rms: bool = False) -> Tensor:
    """LayerNorm(x)·(1 + scale) + shift, LayerNorm (or RMSNorm) without affine, all in fp32 (fp64 for fp64).

    x: (N, D). shift, scale: (K, D) fp32 or fp64. Returns (N, D) in x's dtype.
    """
    run = _modulated_norm if torch.compiler.is_compiling() else _ModulatedNorm.apply
    return run(x, shift, scale, index.level_of, index.run_bounds, index.run_levels, eps, rms)[0]


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, index: LevelIndex) -> Tensor:
    """x + y·gate in fp32 (fp64 for fp64). x, y: (N, D). gate: (K, D). Returns (N, D) in x's dtype."""
    run = _gated_residual if torch.compiler.is_compiling() else _GatedResidual.apply
    return run(x, y, gate, index.level_of, index.run_bounds, index.run_levels)


def rms_norm_rotary(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over all heads at once or over each head, then the rotary turn of each pair (2i, 2i+1), in fp32.

    x: (N, D).
    weight: (D,), or (D_head,) to norm each head.
    cos, sin: (N, 1 or H, D_head/2), or None for no turn.
    Returns (N, D) in x's dtype.
    """
    return _RmsNormRotary.apply(x, weight, cos, sin, eps)


# Norm and modulation. Compiled code sees one opaque operator, so a new mix of runs never recompiles it. Eager code
# calls the same functions through a plain autograd function, which is a tenth of a millisecond faster.


def _modulated_norm_forward(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    level_of: Tensor,
    run_bounds: Tensor,
    run_levels: Tensor,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output (N, D) and, for backward, each token's mean (0 for RMSNorm) and 1/σ (N, 1)."""
    wide, d = widen(x), x.shape[1:]
    gain = scale + 1
    if len(run_levels) == 1 and not rms:
        only = int(run_levels)
        out, mean, rstd = torch.native_layer_norm(wide, d, gain[only], shift[only], eps)
        return out.to(x.dtype), mean, rstd
    if rms:
        rstd = rms_reciprocal(wide, eps)
        out, mean = wide * rstd, torch.zeros_like(rstd)
    else:
        out, mean, rstd = torch.native_layer_norm(wide, d, None, None, eps)
    for rows, level in _pieces(x, level_of, run_bounds, run_levels):
        torch.addcmul(shift[level], out[rows], gain[level], out=out[rows])
    return out.to(x.dtype), mean, rstd


_modulated_norm = torch.library.custom_op("stdit::modulated_norm", _modulated_norm_forward, mutates_args=())


@_modulated_norm.register_fake
def _(x, shift, scale, level_of, run_bounds, run_levels, eps, rms):
    moment = x.new_empty(x.shape[0], 1, dtype=wide_dtype(x))
    return torch.empty_like(x), moment, torch.empty_like(moment)


def _modulated_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    level_of: Tensor,
    run_bounds: Tensor,
    run_levels: Tensor,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide, wide_grad, d = widen(x), widen(grad), x.shape[1:]
    gain = scale + 1
    dx, dshift, dscale = torch.empty_like(x), torch.zeros_like(gain), torch.zeros_like(gain)
    layer_norm_backward = torch.ops.aten.native_layer_norm_backward
    for rows, level in _pieces(x, level_of, run_bounds, run_levels):
        g, y, m, r = wide_grad[rows], wide[rows], mean[rows], rstd[rows]
        if rms:
            unit, through = y * r, g * gain[level]
            dx[rows] = (through - unit * (through * unit).mean(1, keepdim=True)) * r
            _add_by_level(dscale, g * unit, level)
            _add_by_level(dshift, g, level)
        elif isinstance(level, int):
            part, dgain, dbias = layer_norm_backward(g, y, d, m, r, gain[level], gain[level], [True, True, True])
            if len(part) == len(x):
                dx = part.to(x.dtype)
            else:
                dx[rows] = part
            dscale[level] += dgain
            dshift[level] += dbias
        else:
            dx[rows], _, _ = layer_norm_backward(g * gain[level], y, d, m, r, None, None, [True, False, False])
            _add_by_level(dscale, (y - m).mul_(r).mul_(g), level)
            _add_by_level(dshift, g, level)
    return dx, dshift, dscale


_modulated_norm_backward_op = torch.library.custom_op(
    "stdit::modulated_norm_backward", _modulated_norm_backward, mutates_args=()
)


@_modulated_norm_backward_op.register_fake
def _(grad, x, mean, rstd, scale, level_of, run_bounds, run_levels, rms):
    rows = scale.new_empty(scale.shape)
    return torch.empty_like(x), rows, torch.empty_like(rows)


def _modulated_norm_save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, scale, *index, _, ctx.rms = inputs
    ctx.save_for_backward(x, output[1], output[2], scale, *index)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _modulated_norm_grad(ctx: Any, grad: Tensor, *_: Any, run: Callable = _modulated_norm_backward_op) -> tuple:
    if grad is None:
        return (None,) * 8
    return (*run(grad.contiguous(), *ctx.saved_tensors, ctx.rms), None, None, None, None, None)


_modulated_norm.register_autograd(_modulated_norm_grad, setup_context=_modulated_norm_save)


class _ModulatedNorm(torch.autograd.Function):
    forward = staticmethod(_modulated_norm_forward)
    setup_context = staticmethod(_modulated_norm_save)
    backward = staticmethod(partial(_modulated_norm_grad, run=_modulated_norm_backward))


# The gated residual.


def _gated_residual_forward(
    x: Tensor, y: Tensor, gate: Tensor, level_of: Tensor, run_bounds: Tensor, run_levels: Tensor
) -> Tensor:
    out = torch.empty_like(x)
    for rows, level in _pieces(x, level_of, run_bounds, run_levels):
        if x.dtype == y.dtype == gate.dtype:
            torch.addcmul(x[rows], y[rows], gate[level], out=out[rows])
        else:
            out[rows] = torch.addcmul(widen(x[rows]), widen(y[rows]), gate[level])
    return out


_gated_residual = torch.library.custom_op("stdit::gated_residual", _gated_residual_forward, mutates_args=())


@_gated_residual.register_fake
def _(x, y, gate, level_of, run_bounds, run_levels):
    return torch.empty_like(x)


def _gated_residual_backward(
    grad: Tensor, y: Tensor, gate: Tensor, level_of: Tensor, run_bounds: Tensor, run_levels: Tensor
) -> tuple[Tensor, Tensor]:
    dy, dgate = torch.empty_like(y), torch.zeros_like(gate)
    for rows, level in _pieces(y, level_of, run_bounds, run_levels):
        g = widen(grad[rows])
        if g.dtype == y.dtype:
            torch.mul(g, gate[level], out=dy[rows])
        else:
            dy[rows] = g * gate[level]
        _add_by_level(dgate, g * y[rows], level)
    return dy, dgate


_gated_residual_backward_op = torch.library.custom_op(
    "stdit::gated_residual_backward", _gated_residual_backward, mutates_args=()
)


@_gated_residual_backward_op.register_fake
def _(grad, y, gate, level_of, run_bounds, run_levels):
    return torch.empty_like(y), gate.new_empty(gate.shape)


def _gated_residual_save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, *rest = inputs
    ctx.save_for_backward(*rest)


def _gated_residual_grad(ctx: Any, grad: Tensor, run: Callable = _gated_residual_backward_op) -> tuple:
    dy, dgate = run(grad.contiguous(), *ctx.saved_tensors)
    return grad, dy, dgate, None, None, None


_gated_residual.register_autograd(_gated_residual_grad, setup_context=_gated_residual_save)


class _GatedResidual(torch.autograd.Function):
    forward = staticmethod(_gated_residual_forward)
    setup_context = staticmethod(_gated_residual_save)
    backward = staticmethod(partial(_gated_residual_grad, run=_gated_residual_backward))


# RMSNorm and rotary positions.


class _RmsNormRotary(torch.autograd.Function):
    """y = R(x·w/rms(x)), where R is the rotary turn. Saves only x; backward turns by −angle and recomputes the rest.

    With a weight (D/G,), x (N, D) is seen as (N, G, D/G); G = 1 norms all heads at once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
        wide = widen(x).unflatten(1, (-1, len(weight)))
        rstd = rms_reciprocal(wide, eps)  # (N, G, 1)
        ctx.save_for_backward(x, weight, cos, sin, rstd)
        return _turn(wide * weight, cos, sin, rstd).flatten(1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin, rstd = ctx.saved_tensors
        wide = widen(x).unflatten(1, (-1, len(weight)))
        back = None if sin is None else -sin
        u = _turn(widen(grad).clone().view_as(wide), cos, back, rstd)  # gradient of x·w if rms(x) were constant
        product = (u * wide).flatten(0, 1)  # (N·G, D/G)
        dweight = product.sum(0).to(weight.dtype)
        mean = torch.mv(product, weight.to(wide.dtype)).view_as(rstd) / len(weight)
        dx = u.mul_(weight).addcmul_(wide, mean * rstd.square(), value=-1)
        return dx.flatten(1).to(x.dtype), dweight, None, None, None


def _turn(x: Tensor, cos: Tensor | None, sin: Tensor | None, factor: Tensor) -> Tensor:
    """Multiplies x (N, G, D/G) in place by factor (N, G, 1), and turns each pair by (cos, sin) (N, 1 or H, D_head/2).

    G is 1 or the number of heads.
    """
    if cos is None or sin is None:
        return x.mul_(factor)
    cos, sin = cos * factor, sin * factor
    pairs = x.view(len(x), -1, cos.shape[-1], 2)  # (N, H, D_head/2, 2)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        torch.view_as_complex(pairs).mul_(torch.complex(cos, sin))  # vectorised on CPUs, unlike strided pairs
        return x
    even, odd = pairs.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).view_as(x)


# Shared by the operations above.


def widen(x: Tensor) -> Tensor:
    """Casts to fp32 what is narrower; returns fp32 and fp64 as they are."""
    return x.to(wide_dtype(x))


def rms_reciprocal(x: Tensor, eps: float) -> Tensor:
    """1/√(mean square + eps) over the last dimension, which is kept with size 1."""
    return (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()


def level_sum(values: Tensor, level_of: Tensor, levels: int) -> Tensor:
    """Sums values (N, D) by level to (K, D), in a fixed order: no atomics."""
    if values.device.type == "cpu":
        return values.new_zeros(levels, values.shape[1]).index_add_(0, level_of, values)
    if levels <= 256:
        one_hot = (torch.arange(levels, device=level_of.device)[:, None] == level_of).to(values.dtype)
        return one_hot @ values
    order = torch.argsort(level_of, stable=True)
    offsets = torch.searchsorted(level_of[order], torch.arange(levels + 1, device=level_of.device))
    return torch.segment_reduce(values[order], "sum", offsets=offsets, initial=0)


def _add_by_level(total: Tensor, values: Tensor, level: int | Tensor) -> None:
    """Adds values (n, D) of one level, or of a level per token (n,), to the rows of total (K, D)."""
    if isinstance(level, int):
        total[level] += values.sum(0)
    else:
        total += level_sum(values, level, len(total))


def _pieces(
    x: Tensor, level_of: Tensor, run_bounds: Tensor, run_levels: Tensor
) -> Iterator[tuple[slice, int | Tensor]]:
    """Cuts the tokens of x into runs, each with its level, or into chunks, each with a level per token."""
    if len(run_levels) == 1 or len(run_levels) * MEAN_RUN <= x.numel():
        bounds = run_bounds.tolist()
        yield from zip(map(slice, bounds, bounds[1:]), run_levels.tolist())
    else:
        for rows in (slice(start, start + CHUNK) for start in range(0, len(x), CHUNK)):
            yield rows, level_of[rows]
