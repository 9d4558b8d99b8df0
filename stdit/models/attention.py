"""Attention over packed segments: one operator, several kernels, no recompilation for a new mix of shapes.

Every segment's queries attend to the keys of the same segment only. The lengths reach the operator as tensors, so
code compiled around it has no guard on them. Which kernel runs is the operator's own business:

  dense   equal segments in one dense call, a view without copies when they lie side by side; any device and dtype
  varlen  torch's variable-length flash kernels; GPU, fp16 and bf16
  flash   flash-attn's variable-length kernels (the extra `flash`); GPU, fp16 and bf16
  naive   softmax(q·k) written out; for tests
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stdit.errors import StditError
from stdit.models.packing import Segments

BACKENDS = ("varlen", "flash", "dense", "naive")  # in the order that "auto" tries
SCORES_AT_ONCE = 1 << 27  # elements, where attention is written out
Slices = tuple[tuple[int, int], ...]  # (start, stop) of rows


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_segments: Segments,
    k_segments: Segments,
    multiplicity: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of every segment's queries to its own keys, scaled by 1/√d.

    q: (N, H, d). k, v: (M, H, d). multiplicity: (M,) fp32 on the CPU, how many equal keys each key stands for: exact,
    a bias of log n, or a merge of log-sum-exps where a kernel takes no bias. Returns (N, H, d). Deterministic where
    the kernel is; differentiable once. Raises where the backend cannot do what is asked, naming those that can.
    """
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise StditError(f"q, k and v differ: {[(t.dtype, str(t.device)) for t in (q, k, v)]}.")
    run = _attention if torch.compiler.is_compiling() else _Attention.apply
    ends = (q_segments.offsets, k_segments.offsets, q_segments.host, k_segments.host)
    out, _ = run(q, k, v, multiplicity, *ends, backend)
    return out


@lru_cache(maxsize=256)
def choose_backend(backend: str, device: str, dtype: torch.dtype, head_dim: int) -> str:
    """The backend to use: the first that can for "auto", else the one named, or an error saying why it cannot."""
    if backend == "auto":
        return next(name for name in BACKENDS if not refusal(name, device, dtype, head_dim))
    if backend not in BACKENDS:
        raise StditError(f"attention backend {backend!r} does not exist. Known: auto, {', '.join(BACKENDS)}.")
    why = refusal(backend, device, dtype, head_dim)
    if why:
        able = [name for name in BACKENDS if not refusal(name, device, dtype, head_dim)]
        raise StditError(
            f"attention backend {backend!r} {why}; asked for {dtype}, head_dim {head_dim} on {device}. "
            f"Able to: {', '.join(able)}."
        )
    return backend


def refusal(backend: str, device: str, dtype: torch.dtype, head_dim: int) -> str:
    """Why a backend cannot serve such tensors, or an empty string."""
    if backend in ("dense", "naive"):
        return ""
    if device != "cuda":
        return "runs on a GPU only"
    if backend == "flash" and importlib.util.find_spec("flash_attn") is None:
        return "needs flash-attn (pip install 'stdit[flash]')"
    if backend == "varlen" and not torch.backends.cuda.is_flash_attention_available():
        return "needs a torch built with its flash kernels"
    if dtype not in (torch.float16, torch.bfloat16):
        return "takes float16 and bfloat16 only"
    return "takes head_dim up to 256, a multiple of 8" if head_dim % 8 or head_dim > 256 else ""


# The operator: opaque to compiled code; eager code calls the same functions as a plain autograd function, for speed.


def _attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    multiplicity: Tensor | None,
    q_offsets: Tensor,
    k_offsets: Tensor,
    q_host: Tensor,
    k_host: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Returns the output (N, H, d) and the log-sum-exp of every query's scores (N, H), fp32 or fp64."""
    backend = choose_backend(backend, q.device.type, q.dtype, q.shape[-1])
    _check_segments(q, k, multiplicity, q_host, k_host)
    if backend in ("dense", "naive"):
        return _dense_forward(q, k, v, multiplicity, q_host, k_host, naive=backend == "naive")
    kernel = _varlen_forward if backend == "varlen" else _flash_forward
    out, lse = kernel(q, k, v, q_offsets, k_offsets, _longest(q_host), _longest(k_host))
    return merge_extra_keys(out, lse, q, k, v, multiplicity, q_host, k_host)


_attention = torch.library.custom_op("stdit::segment_attention", _attention_forward, mutates_args=())


@_attention.register_fake
def _(q, k, v, multiplicity, q_offsets, k_offsets, q_host, k_host, backend):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=dtype)


def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    multiplicity: Tensor | None,
    q_offsets: Tensor,
    k_offsets: Tensor,
    q_host: Tensor,
    k_host: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    backend = choose_backend(backend, q.device.type, q.dtype, q.shape[-1])
    grad = grad.contiguous()
    if backend in ("dense", "naive"):
        return _dense_backward(grad, q, k, v, out, lse, multiplicity, q_host, k_host, naive=backend == "naive")
    kernel = _varlen_backward if backend == "varlen" else _flash_backward
    grads = kernel(grad, q, k, v, out, lse, q_offsets, k_offsets, _longest(q_host), _longest(k_host))
    return add_extra_key_grads(grads, grad, q, k, v, out, lse, multiplicity, q_host, k_host)


_attention_backward_op = torch.library.custom_op(
    "stdit::segment_attention_backward", _attention_backward, mutates_args=()
)


@_attention_backward_op.register_fake
def _(grad, q, k, v, out, lse, multiplicity, q_offsets, k_offsets, q_host, k_host, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, multiplicity, *offsets, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, multiplicity, *offsets)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any, run: Callable = _attention_backward_op) -> tuple:
    if grad is None:
        return (None,) * 9
    return (*run(grad, *ctx.saved_tensors, ctx.backend), *(None,) * 6)


_attention.register_autograd(_backward, setup_context=_save)


class _Attention(torch.autograd.Function):
    forward = staticmethod(_attention_forward)
    setup_context = staticmethod(_save)
    backward = staticmethod(partial(_backward, run=_attention_backward))


def _check_segments(q: Tensor, k: Tensor, multiplicity: Tensor | None, q_host: Tensor, k_host: Tensor) -> None:
    if len(q_host) != len(k_host) or int(q_host[-1]) != len(q) or int(k_host[-1]) != len(k):
        raise StditError(
            f"{len(q)} queries in {len(q_host) - 1} segments of {int(q_host[-1])} in all, {len(k)} keys in "
            f"{len(k_host) - 1} segments of {int(k_host[-1])}: these do not fit."
        )
    if multiplicity is not None and (multiplicity.shape != (len(k),) or bool((multiplicity < 1).any())):
        raise StditError(
            f"multiplicity of shape {tuple(multiplicity.shape)}, least {multiplicity.min():g}, for {len(k)} keys: "
            "there must be one a key, 1 or more."
        )


# Grouped dense calls.


def _dense_forward(
    q: Tensor, k: Tensor, v: Tensor, multiplicity: Tensor | None, q_host: Tensor, k_host: Tensor, naive: bool
) -> tuple[Tensor, Tensor]:
    groups = _groups(tuple(q_host.tolist()), tuple(k_host.tolist()))
    bias = None if multiplicity is None else multiplicity.to(q.device, _wide(q)).log()
    whole = len(groups) == 1
    out = lse = None if whole else q.new_empty(q.shape)
    if not whole:
        lse = q.new_empty(q.shape[:2], dtype=_wide(q))
    for q_slices, k_slices, size in groups:
        gq, gk, gv = _gather(q, q_slices, size), _gather(k, k_slices, size), _gather(v, k_slices, size)
        gb = None if bias is None else _gather(bias, k_slices, size)[:, None, None]
        go, gl = _dense_call(gq, gk, gv, gb, naive)
        if whole:
            return go.transpose(1, 2).reshape(q.shape), gl.transpose(1, 2).reshape(q.shape[:2])
        _scatter(out, go, q_slices)
        _scatter(lse, gl, q_slices)
    return out, lse


def _dense_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    multiplicity: Tensor | None,
    q_host: Tensor,
    k_host: Tensor,
    naive: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = _groups(tuple(q_host.tolist()), tuple(k_host.tolist()))
    bias = None if multiplicity is None else multiplicity.to(q.device, _wide(q)).log()
    whole = len(groups) == 1
    grads = () if whole else tuple(t.new_empty(t.shape) for t in (q, k, v))
    for q_slices, k_slices, size in groups:
        tensors = [_gather(t, q_slices, size) for t in (grad, q)] + [_gather(t, k_slices, size) for t in (k, v)]
        gb = None if bias is None else _gather(bias, k_slices, size)[:, None, None]
        if naive or q.device.type != "cpu":
            parts = _written_out_backward(*tensors, gb)
        else:
            go, gl = (_gather(t, q_slices, size) for t in (out, lse))
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *tensors, go, gl, 0.0, False, attn_mask=gb
            )
        if whole:
            return tuple(part.transpose(1, 2).reshape(t.shape) for part, t in zip(parts, (q, k, v)))
        for total, part, slices in zip(grads, parts, (q_slices, k_slices, k_slices)):
            _scatter(total, part, slices)
    return grads


def _dense_call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, naive: bool) -> tuple[Tensor, Tensor]:
    """q (S, H, Lq, d), k, v (S, H, Lk, d), bias (S, 1, 1, Lk) -> output (S, H, Lq, d), log-sum-exp (S, H, Lq)."""
    if q.device.type == "cpu" and not naive:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias)
    if not naive:
        mask = None if bias is None else bias.to(q.dtype).expand(q.shape[0], 1, q.shape[2], k.shape[2])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out, out.new_zeros(out.shape[:3], dtype=_wide(q))  # unused: backward computes its own
    scores = _written_out_scores(q, k, bias)
    return (scores.softmax(-1) @ v.to(scores.dtype)).to(q.dtype), scores.logsumexp(-1)


def _written_out_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of softmax(q·k)·v by their formula, some queries at a time so that the scores fit in memory."""
    wide, scale = _wide(q), q.shape[-1] ** -0.5
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    rows = max(1, SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * k.shape[2]))
    for part in (slice(a, a + rows) for a in range(0, q.shape[2], rows)):
        p = _written_out_scores(q[:, :, part], k, bias).softmax(-1)  # (S, H, rows, Lk)
        g = grad[:, :, part].to(wide)
        dv += p.mT @ g
        dp = g @ v.to(wide).mT
        dscores = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq[:, :, part] = dscores @ k.to(wide)
        dk += dscores.mT @ q[:, :, part].to(wide)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _written_out_scores(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    scores = q.to(_wide(q)) @ k.to(_wide(q)).mT * q.shape[-1] ** -0.5
    return scores if bias is None else scores + bias


@lru_cache(maxsize=256)
def _groups(q_host: tuple[int, ...], k_host: tuple[int, ...]) -> list[tuple[Slices, Slices, int]]:
    """Segments with equal (Lq, Lk) together: their slices of the queries and of the keys, neighbours joined."""
    groups: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
    for a, b, c, d in zip(q_host, q_host[1:], k_host, k_host[1:]):
        groups.setdefault((b - a, d - c), []).append((a, b, c, d))

    def joined(slices: list[tuple[int, int]]) -> Slices:
        result: list[tuple[int, int]] = []
        for start, stop in slices:
            if result and result[-1][1] == start:
                start = result.pop()[0]
            result.append((start, stop))
        return tuple(result)

    return [
        (joined([(a, b) for a, b, _, _ in g]), joined([(c, d) for _, _, c, d in g]), len(g)) for g in groups.values()
    ]


def _gather(x: Tensor, slices: Slices, size: int) -> Tensor:
    """Rows of x (N, …) as (size, …, L): heads before length, a view when the slices are one."""
    rows = x[slices[0][0] : slices[0][1]] if len(slices) == 1 else torch.cat([x[a:b] for a, b in slices])
    rows = rows.unflatten(0, (size, -1))
    return rows.transpose(1, 2) if x.ndim > 1 else rows


def _scatter(x: Tensor, part: Tensor, slices: Slices) -> None:
    """The inverse of _gather: writes (S, H, L, …) into the rows of x (N, H, …)."""
    rows, done = part.transpose(1, 2).flatten(0, 1), 0
    for a, b in slices:
        x[a:b] = rows[done : done + b - a]
        done += b - a


# Variable-length kernels. Both take and give the log-sum-exp as (H, N); backward takes the merged ones.


def _varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, q_longest: int, k_longest: int
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, q_offsets, k_offsets, q_longest, k_longest, 0.0, False, False
    )
    return out, lse.T.contiguous()


def _varlen_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    q_longest: int,
    k_longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    lse, none = lse.T.contiguous(), q.new_empty(0)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, q_offsets, k_offsets, q_longest, k_longest, 0.0, False, no_dropout, none
    )


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, q_longest: int, k_longest: int
) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    out, lse, *_ = _flash_attn_varlen_forward(
        q, k, v, q_offsets, k_offsets, q_longest, k_longest, 0.0, q.shape[-1] ** -0.5, causal=False
    )
    return out, lse.T.contiguous()


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    q_longest: int,
    k_longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    ends = (q_offsets, k_offsets, q_longest, k_longest)
    _flash_attn_varlen_backward(
        grad,
        q,
        k,
        v,
        out,
        lse.T.contiguous(),
        *grads,
        *ends,
        dropout_p=0.0,
        softmax_scale=q.shape[-1] ** -0.5,
        causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return grads


# Multiplicity for kernels without a bias: the kernel has counted every key once, the n − 1 others are merged in.


def merge_extra_keys(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    multiplicity: Tensor | None,
    q_host: Tensor,
    k_host: Tensor,
) -> tuple[Tensor, Tensor]:
    """Counts key j multiplicity[j] times in an output (N, H, d) and log-sum-exp (N, H) that counted it once."""
    for rows, j, extra in _extra_keys(multiplicity, q_host, k_host):
        score = _scores(q[rows], k[j]) + math.log(extra)
        merged = torch.logaddexp(lse[rows], score)
        kept, added = (lse[rows] - merged).exp()[..., None], (score - merged).exp()[..., None]
        out[rows] = (out[rows] * kept + v[j] * added).to(out.dtype)
        lse[rows] = merged
    return out, lse


def add_extra_key_grads(
    grads: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    multiplicity: Tensor | None,
    q_host: Tensor,
    k_host: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds what the n − 1 extra copies of a key contribute to a kernel's gradients for the merged output.

    With the merged log-sum-exp, p = exp(score − lse) and dscore = p·(dout·v − dout·out), the rule of any flash
    backward (Dao et al. 2022, algorithm 4), holds copy by copy.
    """
    dq, dk, dv = grads
    wide, scale = _wide(q), q.shape[-1] ** -0.5
    for rows, j, extra in _extra_keys(multiplicity, q_host, k_host):
        g = grad[rows].to(wide)
        p = (_scores(q[rows], k[j]) + math.log(extra) - lse[rows]).exp()
        dscore = p * ((g * v[j]).sum(-1) - (g * out[rows]).sum(-1)) * scale
        dq[rows] += (dscore[..., None] * k[j]).to(dq.dtype)
        dk[j] += (dscore[..., None] * q[rows]).sum(0).to(dk.dtype)
        dv[j] += (p[..., None] * g).sum(0).to(dv.dtype)
    return dq, dk, dv


def _extra_keys(multiplicity: Tensor | None, q_host: Tensor, k_host: Tensor) -> Iterator[tuple[slice, int, float]]:
    """The queries (a slice), the key and n − 1, for every key that stands for n > 1."""
    if multiplicity is None:
        return
    counts = multiplicity.tolist()
    q_ends, k_ends = q_host.tolist(), k_host.tolist()
    for segment in range(len(q_ends) - 1):
        for j in range(k_ends[segment], k_ends[segment + 1]):
            if counts[j] != 1:
                yield slice(q_ends[segment], q_ends[segment + 1]), j, counts[j] - 1


def _scores(q: Tensor, key: Tensor) -> Tensor:
    """q (L, H, d), key (H, d) -> scaled scores (L, H)."""
    return (q.to(_wide(q)) * key).sum(-1) * q.shape[-1] ** -0.5


def _longest(host: Tensor) -> int:
    return int(host.diff().max())


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of sums: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
