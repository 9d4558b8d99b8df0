"""The memory-bound operations of a block: each is one pass forward, and is recomputed in backward.

Modulation is a table (K, …, D) with a row per distinct noise level. Tokens of equal level lie in runs (a clip,
a frame), and each run takes its row (D,) in one call, so the table is never expanded to (N, D). Where runs are short (a
level per token), rows are gathered in chunks. Sums need no atomics, so they are deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stdit.models.operators import Opaque, operator
from stdit.models.packing import LevelIndex
from stdit.models.positions import apply_rotary, wide_dtype

MEAN_RUN = 12288  # if runs average fewer elements than this, rows are gathered: a kernel launch per run would cost more
CHUNK = 4096  # tokens whose rows are gathered at once
INDEX = "Tensor level_of, Tensor run_bounds, Tensor run_levels"  # the fields of `LevelIndex` in an operator's schema


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, index: LevelIndex, eps: float, rms: bool = False) -> Tensor:
    """LayerNorm(x)·(1 + scale) + shift, LayerNorm (or RMSNorm) without affine, all in fp32 (fp64 for fp64).

    x: (N, D). shift, scale: (K, D) fp32 or fp64. Returns (N, D) in x's dtype.
    """
    run = NORM.compiled if torch.compiler.is_compiling() else NORM.eager
    return run(x, shift, scale, eps, rms, index.level_of, index.run_bounds, index.run_levels)[0]


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, index: LevelIndex) -> Tensor:
    """x + y·gate in fp32 (fp64 for fp64). x, y: (N, D). gate: (K, D). Returns (N, D) in x's dtype."""
    run = RESIDUAL.compiled if torch.compiler.is_compiling() else RESIDUAL.eager
    return run(x, y, gate, index.level_of, index.run_bounds, index.run_levels)


def rms_norm_rotary(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over all heads at once or over each head, then the rotary turn of each pair (2i, 2i+1), in fp32.

    x: (N, D). weight: (D,), or (D_head,) to norm each head. cos, sin: (N, 1 or H, D_head/2), or None for no turn.
    Returns (N, D) in x's dtype.
    """
    return _RmsNormRotary.apply(x, weight, cos, sin, eps)


def _norm_forward(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, rms: bool, *parts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output (N, D) and, for backward, each token's mean (0 for RMSNorm) and 1/σ (N, 1)."""
    wide, d, index = widen(x), x.shape[1:], LevelIndex(*parts)
    gain = scale + 1
    if len(index.run_levels) == 1 and not rms:
        only = int(index.run_levels)
        out, mean, rstd = torch.native_layer_norm(wide, d, gain[only], shift[only], eps)
        return out.to(x.dtype), mean, rstd
    if rms:
        rstd = rms_reciprocal(wide, eps)
        out, mean = wide * rstd, torch.zeros_like(rstd)
    else:
        out, mean, rstd = torch.native_layer_norm(wide, d, None, None, eps)
    for rows, level in _pieces(x, index):
        torch.addcmul(shift[level], out[rows], gain[level], out=out[rows])
    return out.to(x.dtype), mean, rstd


def _norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *parts, rms = rest
    wide, wide_grad, d = widen(x), widen(grad), x.shape[1:]
    gain = scale + 1
    dx, dshift, dscale = torch.empty_like(x), torch.zeros_like(gain), torch.zeros_like(gain)
    layer_norm_backward = torch.ops.aten.native_layer_norm_backward
    for rows, level in _pieces(x, LevelIndex(*parts)):
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


def _norm_saved(inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> tuple[list[Tensor], list[bool]]:
    x, _, scale, _, rms, *parts = inputs
    return [x, *output[1:], scale, *parts], [rms]


def _norm_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    moment = x.new_empty(x.shape[0], 1, dtype=wide_dtype(x))
    return torch.empty_like(x), moment, torch.empty_like(moment)


NORM = operator(
    "modulated_norm",
    forward=Opaque(
        _norm_forward,
        f"(Tensor x, Tensor shift, Tensor scale, float eps, bool rms, {INDEX}) -> (Tensor, Tensor, Tensor)",
        _norm_fake,
    ),
    derivative=Opaque(
        _norm_backward,
        f"(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor scale, {INDEX}, bool rms)"
        " -> (Tensor, Tensor, Tensor)",
        lambda grad, x, mean, rstd, scale, *_: (torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)),
    ),
    saved=_norm_saved,
)


def _residual_forward(x: Tensor, y: Tensor, gate: Tensor, *parts: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for rows, level in _pieces(x, LevelIndex(*parts)):
        if x.dtype == y.dtype == gate.dtype:
            torch.addcmul(x[rows], y[rows], gate[level], out=out[rows])
        else:
            out[rows] = torch.addcmul(widen(x[rows]), widen(y[rows]), gate[level])
    return out


def _residual_backward(grad: Tensor, y: Tensor, gate: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
    dy, dgate = torch.empty_like(y), torch.zeros_like(gate)
    for rows, level in _pieces(y, LevelIndex(*parts)):
        g = widen(grad[rows])
        if g.dtype == y.dtype:
            torch.mul(g, gate[level], out=dy[rows])
        else:
            dy[rows] = g * gate[level]
        _add_by_level(dgate, g * y[rows], level)
    return dy, dgate


RESIDUAL = operator(
    "gated_residual",
    forward=Opaque(
        _residual_forward, f"(Tensor x, Tensor y, Tensor gate, {INDEX}) -> Tensor", lambda x, *_: torch.empty_like(x)
    ),
    derivative=Opaque(
        _residual_backward,
        f"(Tensor grad, Tensor y, Tensor gate, {INDEX}) -> (Tensor, Tensor)",
        lambda grad, y, gate, *_: (torch.empty_like(y), torch.empty_like(gate)),
    ),
    saved=lambda inputs, output: (inputs[1:], []),
    residual=True,
)


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
    """Multiplies x (N, G, D/G) by factor (N, G, 1), mostly in place, and turns its pairs; G is 1 or H."""
    if cos is None or sin is None:
        return x.mul_(factor)
    cos, sin = cos * factor, sin * factor
    (_, groups, width), half = x.shape, cos.shape[-1]
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # vectorised on CPUs, unlike strided pairs
        pairs = torch.view_as_complex(x.view(len(x), groups * width // (2 * half), half, 2))  # (N, H, D_head/2)
        pairs.mul_(torch.complex(cos, sin))
        return x
    return apply_rotary(x.view(len(x), groups * width // (2 * half), 2 * half), cos, sin).view_as(x)


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


def _pieces(x: Tensor, index: LevelIndex) -> Iterator[tuple[slice, int | Tensor]]:
    """Cuts the tokens of x into runs, each with its level, or into chunks, each with a level per token."""
    if len(index.run_levels) == 1 or len(index.run_levels) * MEAN_RUN <= x.numel():
        bounds = index.run_bounds.tolist()
        yield from zip(map(slice, bounds, bounds[1:]), index.run_levels.tolist())
    else:
        for rows in (slice(start, start + CHUNK) for start in range(0, len(x), CHUNK)):
            yield rows, index.level_of[rows]
