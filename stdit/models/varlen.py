"""Variable-length attention kernels on a GPU, and multiplicity for kernels that take no bias."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stdit.models.positions import wide_dtype

Grads = tuple[Tensor, Tensor, Tensor]  # of q, k and v


class Call(NamedTuple):
    """What one attention over segments is asked, in the order that the operator takes it.

    q: (N, H, d). k, v: (M, H, d). multiplicity: (M,) fp32 on the CPU, or None. q_offsets, k_offsets: (S+1,) int32 on
    the device of q; q_host, k_host: the same on the CPU, int64.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    multiplicity: Tensor | None
    q_offsets: Tensor
    k_offsets: Tensor
    q_host: Tensor
    k_host: Tensor

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """Where segments begin, and how long the longest is, of queries and of keys: what kernels are told."""
        return self.q_offsets, self.k_offsets, int(self.q_host.diff().max()), int(self.k_host.diff().max())


# The kernels. Their log-sum-exp is (H, N), here it is (N, H); backward takes the merged one.


def varlen_forward(call: Call) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(call.q, call.k, call.v, *call.bounds, 0.0, False, False)
    return out, lse.T.contiguous()


def varlen_backward(call: Call, grad: Tensor, out: Tensor, lse: Tensor) -> Grads:
    lse, none = lse.T.contiguous(), call.q.new_empty(0)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=call.q.device)
    return torch.ops.aten._flash_attention_backward(
        grad, call.q, call.k, call.v, out, lse, *call.bounds, 0.0, False, no_dropout, none
    )


def flash_forward(call: Call) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attnvarlen_forward

    out, lse, *_ = _flash_attnvarlen_forward(call.q, call.k, call.v, *call.bounds, 0.0, call.scale, causal=False)
    return out, lse.T.contiguous()


def flash_backward(call: Call, grad: Tensor, out: Tensor, lse: Tensor) -> Grads:
    from flash_attn.flash_attn_interface import _flash_attnvarlen_backward

    q, k, v = call.q, call.k, call.v
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _flash_attnvarlen_backward(
        grad, q, k, v, out, lse.T.contiguous(), *grads, *call.bounds,
        dropout_p=0.0, softmax_scale=call.scale, causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
        alibi_slopes=None, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return grads


# Multiplicity for kernels without a bias: the kernel has counted every key once, the n − 1 others are merged in.


def merge_extra_keys(call: Call, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Counts key j multiplicity[j] times in an output (N, H, d) and log-sum-exp (N, H) that counted it once."""
    for rows, j, extra in _extra_keys(call):
        score = _scores(call, rows, j) + math.log(extra)
        merged = torch.logaddexp(lse[rows], score)
        kept, added = (lse[rows] - merged).exp()[..., None], (score - merged).exp()[..., None]
        out[rows] = (out[rows] * kept + call.v[j] * added).to(out.dtype)
        lse[rows] = merged
    return out, lse


def add_extra_key_grads(call: Call, grads: Grads, grad: Tensor, out: Tensor, lse: Tensor) -> Grads:
    """Adds what the n − 1 extra copies of a key contribute to a kernel's gradients for the merged output.

    With the merged log-sum-exp, p = exp(score − lse) and dscore = p·(dout·v − dout·out), the rule of any flash
    backward (Dao et al. 2022, algorithm 4), holds copy by copy.
    """
    dq, dk, dv = grads
    for rows, j, extra in _extra_keys(call):
        q, k, v = call.q[rows], call.k[j], call.v[j]
        g = grad[rows].to(wide_dtype(q))
        p = (_scores(call, rows, j) + math.log(extra) - lse[rows]).exp()
        dscore = p * ((g * v).sum(-1) - (g * out[rows]).sum(-1)) * call.scale
        dq[rows] += (dscore[..., None] * k).to(dq.dtype)
        dk[j] += (dscore[..., None] * q).sum(0).to(dk.dtype)
        dv[j] += (p[..., None] * g).sum(0).to(dv.dtype)
    return dq, dk, dv


def _extra_keys(call: Call) -> Iterator[tuple[slice, int, float]]:
    """The queries (a slice), the key and n − 1, for every key that stands for n > 1."""
    if call.multiplicity is None:
        return
    counts = call.multiplicity.tolist()
    q_ends, k_ends = call.q_host.tolist(), call.k_host.tolist()
    for segment in range(len(q_ends) - 1):
        for j in range(k_ends[segment], k_ends[segment + 1]):
            if counts[j] != 1:
                yield slice(q_ends[segment], q_ends[segment + 1]), j, counts[j] - 1


def _scores(call: Call, rows: slice, j: int) -> Tensor:
    """Scaled scores (L, H) of some queries with one key."""
    q = call.q[rows]
    return (q.to(wide_dtype(q)) * call.k[j]).sum(-1) * call.scale
