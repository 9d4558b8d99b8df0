"""Variable-length attention kernels for GPUs, and key multiplicity for kernels without a bias."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stdit.models.positions import wide_dtype

Grads = tuple[Tensor, Tensor, Tensor]  # gradients of q, k and v


class Call(NamedTuple):
    """The arguments of one attention over segments, in the operator's order.

    q: (N, H, d).
    k, v: (M, H, d).
    multiplicity: (M,) fp32 on the CPU, how many identical keys each key represents, or None.
    q_offsets, k_offsets: (S+1,) int32 on the device of q.
    q_host, k_host: the same on the CPU, int64.
    backend: a name of `attention.BACKENDS`, or "auto".
    """

    q: Tensor
    k: Tensor
    v: Tensor
    multiplicity: Tensor | None
    q_offsets: Tensor
    k_offsets: Tensor
    q_host: Tensor
    k_host: Tensor
    backend: str = "auto"

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """Offsets of queries and of keys, and the longest segment of each, as the kernels take them."""
        return self.q_offsets, self.k_offsets, int(self.q_host.diff().max()), int(self.k_host.diff().max())


# The kernels return log-sum-exps (H, N); here they are (N, H). Backward takes the merged ones.


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


FORWARD = {"varlen": varlen_forward, "flash": flash_forward}
BACKWARD = {"varlen": varlen_backward, "flash": flash_backward}


# Multiplicity for kernels without a bias: the kernel counts each key once, then its n − 1 copies are merged in.


def merge_extra_keys(call: Call, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Corrects an output (N, H, d) and log-sum-exp (N, H) that counted key j once to count it multiplicity[j] times."""
    for rows, j, extra in _extra_keys(call):
        score = _scores(call, rows, j) + math.log(extra)
        merged = torch.logaddexp(lse[rows], score)
        kept, added = (lse[rows] - merged).exp()[..., None], (score - merged).exp()[..., None]
        out[rows] = (out[rows] * kept + call.v[j] * added).to(out.dtype)
        lse[rows] = merged
    return out, lse


def add_extra_key_grads(call: Call, grads: Grads, grad: Tensor, out: Tensor, lse: Tensor) -> Grads:
    """Adds the contribution of the n − 1 extra copies of each key to a kernel's gradients.

    With the merged log-sum-exp, the rule of flash backward holds for each copy: p = exp(score − lse) and
    dscore = p·(dout·v − dout·out) (Dao et al. 2022, algorithm 4).
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
    """Yields (slice of queries, key, n − 1) for each key that represents n > 1."""
    if call.multiplicity is None:
        return
    counts = call.multiplicity.tolist()
    q_ends, k_ends = call.q_host.tolist(), call.k_host.tolist()
    for segment in range(len(q_ends) - 1):
        for j in range(k_ends[segment], k_ends[segment + 1]):
            if counts[j] != 1:
                yield slice(q_ends[segment], q_ends[segment + 1]), j, counts[j] - 1


def _scores(call: Call, rows: slice, j: int) -> Tensor:
    """Scaled scores (L, H) of some queries with key j."""
    q = call.q[rows]
    return (q.to(wide_dtype(q)) * call.k[j]).sum(-1) * call.scale
