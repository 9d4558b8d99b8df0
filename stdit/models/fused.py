"""The memory-bound operations of a block, each one pass forward, recomputed in backward, sums without atomics.

Modulation is a (K, …, D) table of a pack's K distinct noise levels; a token's row is found by its level. Tokens of
equal level lie in runs (a clip, a frame), and a run is one call with a (D,) row, so no (N, D) gather of the table
exists; where runs are short (a level per token), rows are gathered in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stdit.models.packing import LevelIndex
from stdit.models.positions import wide_dtype

MEAN_RUN = 12288  # elements; below this mean size of runs, rows are gathered: a call a run costs more
CHUNK = 4096  # tokens gathered at once


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
    """RMSNorm over all heads at once, or over each, then the rotary turn of every pair (2i, 2i+1), in fp32.

    x: (N, D). weight: (D,), or (D_head,) for each head. cos, sin: (N, 1 or H, D_head/2), or None for no turn.
    Returns (N, D) in x's dtype.
    """
    return _RmsNormRotary.apply(x, weight, cos, sin, eps)


# LayerNorm and modulation. Compiled code sees one opaque operator, so the host's runs never make it recompile; eager
# code calls the same functions through a plain autograd function, which costs a tenth of a millisecond less.


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
        level = int(run_levels)
        out, mean, rstd = torch.native_layer_norm(wide, d, gain[level], shift[level], eps)
        return out.to(x.dtype), mean, rstd
    if rms:
        rstd = rms_reciprocal(wide, eps)
        out, mean = wide * rstd, torch.zeros_like(rstd)
    else:
        out, mean, rstd = torch.native_layer_norm(wide, d, None, None, eps)
    if _long_runs(x, run_levels):
        for a, b, level in _runs(run_bounds, run_levels):
            torch.addcmul(shift[level], out[a:b], gain[level], out=out[a:b])
    else:
        for a in range(0, len(x), CHUNK):
            rows, levels = slice(a, a + CHUNK), level_of[a : a + CHUNK]
            torch.addcmul(shift[levels], out[rows], gain[levels], out=out[rows])
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
    dshift, dscale = torch.zeros_like(gain), torch.zeros_like(gain)
    dx = torch.empty_like(x)
    if rms:
        long = _long_runs(x, run_levels)
        pieces: list[Any] = [*_runs(run_bounds, run_levels)] if long else [*_chunks(len(x))]
        for a, b, level in pieces:
            g, unit, levels = wide_grad[a:b], wide[a:b] * rstd[a:b], level_of[a:b]
            through = g * (gain[levels] if level is None else gain[level])
            dx[a:b] = (through - unit * (through * unit).mean(1, keepdim=True)) * rstd[a:b]
            if level is None:
                dshift += level_sum(g, levels, len(gain))
                dscale += level_sum(g * unit, levels, len(gain))
            else:
                dshift[level] += g.sum(0)
                dscale[level] += (g * unit).sum(0)
        return dx, dshift, dscale
    if _long_runs(x, run_levels):
        for a, b, level in _runs(run_bounds, run_levels):
            part, dgain, dbias = torch.ops.aten.native_layer_norm_backward(
                wide_grad[a:b], wide[a:b], d, mean[a:b], rstd[a:b], gain[level], gain[level], [True, True, True]
            )
            if b - a == len(x):
                dx = part.to(x.dtype)
            else:
                dx[a:b] = part
            dscale[level] += dgain
            dshift[level] += dbias
        return dx, dshift, dscale
    for a in range(0, len(x), CHUNK):
        rows, levels = slice(a, a + CHUNK), level_of[a : a + CHUNK]
        g = wide_grad[rows]
        dx[rows], _, _ = torch.ops.aten.native_layer_norm_backward(
            g * gain[levels], wide[rows], d, mean[rows], rstd[rows], None, None, [True, False, False]
        )
        dshift += level_sum(g, levels, len(gain))
        dscale += level_sum((wide[rows] - mean[rows]).mul_(rstd[rows]).mul_(g), levels, len(gain))
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
    if _long_runs(x, run_levels):
        for a, b, level in _runs(run_bounds, run_levels):
            if x.dtype == y.dtype == gate.dtype:
                torch.addcmul(x[a:b], y[a:b], gate[level], out=out[a:b])
            else:
                out[a:b] = torch.addcmul(widen(x[a:b]), widen(y[a:b]), gate[level])
        return out
    for a in range(0, len(x), CHUNK):
        rows = slice(a, a + CHUNK)
        out[rows] = torch.addcmul(widen(x[rows]), widen(y[rows]), gate[level_of[rows]])
    return out


_gated_residual = torch.library.custom_op("stdit::gated_residual", _gated_residual_forward, mutates_args=())


@_gated_residual.register_fake
def _(x, y, gate, level_of, run_bounds, run_levels):
    return torch.empty_like(x)


def _gated_residual_backward(
    grad: Tensor, y: Tensor, gate: Tensor, level_of: Tensor, run_bounds: Tensor, run_levels: Tensor
) -> tuple[Tensor, Tensor]:
    dy, dgate = torch.empty_like(y), torch.zeros_like(gate)
    if _long_runs(y, run_levels):
        for a, b, level in _runs(run_bounds, run_levels):
            g = widen(grad[a:b])
            if g.dtype == y.dtype:
                torch.mul(g, gate[level], out=dy[a:b])
            else:
                dy[a:b] = g * gate[level]
            dgate[level] += (g * y[a:b]).sum(0)
        return dy, dgate
    for a in range(0, len(y), CHUNK):
        rows = slice(a, a + CHUNK)
        g, levels = widen(grad[rows]), level_of[rows]
        dy[rows] = g * gate[levels]
        dgate += level_sum(g * y[rows], levels, len(gate))
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
    """y = R(x·w/rms(x)), R the rotary turn. Keeps x only; backward turns back by −angle and recomputes.

    x (N, D) is (N, G, D/G) where the weight is (D/G,): G = 1 norms all heads at once.
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
        u = _turn(widen(grad).clone().view_as(wide), cos, back, rstd)  # gradient of x·w, without the norm's own
        product = (u * wide).flatten(0, 1)  # (N·G, D/G)
        dweight = product.sum(0).to(weight.dtype)
        mean = torch.mv(product, weight.to(wide.dtype)).view_as(rstd) / len(weight)
        dx = u.mul_(weight).addcmul_(wide, mean * rstd.square(), value=-1)
        return dx.flatten(1).to(x.dtype), dweight, None, None, None


def _turn(x: Tensor, cos: Tensor | None, sin: Tensor | None, factor: Tensor) -> Tensor:
    """x (N, G, D/G) times factor (N, G, 1), every pair turned by (cos, sin) (N, 1 or H, D_head/2); x is overwritten.

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


# Shared pieces.


def widen(x: Tensor) -> Tensor:
    """fp32 of anything narrower; x itself if fp32 or fp64."""
    return x.to(wide_dtype(x))


def rms_reciprocal(x: Tensor, eps: float) -> Tensor:
    """1/√(mean square + eps) along the last dimension, kept."""
    return (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()


def level_sum(values: Tensor, level_of: Tensor, levels: int) -> Tensor:
    """Sums values (N, D) by level, (K, D), in a fixed order: no atomics."""
    if values.device.type == "cpu":
        return values.new_zeros(levels, values.shape[1]).index_add_(0, level_of, values)
    if levels <= 256:
        one_hot = (torch.arange(levels, device=level_of.device)[:, None] == level_of).to(values.dtype)
        return one_hot @ values
    order = torch.argsort(level_of, stable=True)
    offsets = torch.searchsorted(level_of[order], torch.arange(levels + 1, device=level_of.device))
    return torch.segment_reduce(values[order], "sum", offsets=offsets, initial=0)


def _long_runs(x: Tensor, run_levels: Tensor) -> bool:
    return len(run_levels) * MEAN_RUN <= x.numel() or len(run_levels) == 1


def _chunks(length: int) -> list[tuple[int, int, None]]:
    return [(a, min(a + CHUNK, length), None) for a in range(0, length, CHUNK)]


def _runs(run_bounds: Tensor, run_levels: Tensor) -> list[tuple[int, int, int]]:
    bounds = run_bounds.tolist()
    return list(zip(bounds, bounds[1:], run_levels.tolist()))
