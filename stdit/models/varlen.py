"""Variable-length attention kernels on a GPU, and multiplicity for kernels that take no bias."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from stdit.models.positions import wide_dtype

# The kernels. All take and give the log-sum-exp as (H, N); backward takes the merged ones.


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, q_longest: int, k_longest: int
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, q_offsets, k_offsets, q_longest, k_longest, 0.0, False, False
    )
    return out, lse.T.contiguous()


def varlen_backward(
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


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, q_longest: int, k_longest: int
) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attnvarlen_forward

    out, lse, *_ = _flash_attnvarlen_forward(
        q, k, v, q_offsets, k_offsets, q_longest, k_longest, 0.0, q.shape[-1] ** -0.5, causal=False
    )
    return out, lse.T.contiguous()


def flash_backward(
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
    from flash_attn.flash_attn_interface import _flash_attnvarlen_backward

    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    ends = (q_offsets, k_offsets, q_longest, k_longest)
    _flash_attnvarlen_backward(
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
    wide, scale = wide_dtype(q), q.shape[-1] ** -0.5
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
    return (q.to(wide_dtype(q)) * key).sum(-1) * q.shape[-1] ** -0.5


def longest(host: Tensor) -> int:
    return int(host.diff().max())
