"""Attention over packed segments: one operator, several kernels, no recompilation for a new mix of shapes.

The queries of a segment attend only to the keys of the same segment. The operator takes the lengths as tensors, so code
compiled around it has no guard on them. It chooses a kernel:

  dense   equal segments in one dense call, a view without copies when they lie side by side; any device and dtype.
          On a CPU short ones of other lengths too, padded: a call costs more than the padding
  varlen  torch's variable-length flash kernels; GPU, fp16 and bf16
  flash   flash-attn's variable-length kernels (the extra `flash`); GPU, fp16 and bf16
  naive   softmax(q·k)·v as matrix products; for tests
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stdit.errors import StditError
from stdit.models.groups import Group, group_segments, scatter
from stdit.models.operators import Opaque, operator
from stdit.models.packing import Segments
from stdit.models.positions import wide_dtype
from stdit.models.sequence import gather_heads, gather_tokens

BACKENDS = ("varlen", "flash", "dense", "naive")  # "auto" takes the first that can run
SCORES_AT_ONCE = 1 << 27  # elements; bounds the memory of attention as matrix products
CALL_WORTH = 10_000_000  # multiply-adds of padding that a dense call less is worth on a CPU, forward and backward
Grads = tuple[Tensor, Tensor, Tensor]  # gradients of q, k and v


class Call(NamedTuple):
    """The arguments of one attention over segments, in the operator's order; see `segment_attention`."""

    q: Tensor  # (N, H, d)
    k: Tensor  # (M, H, d)
    v: Tensor  # (M, H, d)
    multiplicity: Tensor | None
    q_offsets: Tensor  # (S+1,) int32 on the device of q
    k_offsets: Tensor
    q_host: Tensor  # (S+1,) int64, the same on the CPU
    k_host: Tensor
    backend: str = "auto"

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """Offsets of queries and of keys, and the longest segment of each, as the kernels take them."""
        return self.q_offsets, self.k_offsets, int(self.q_host.diff().max()), int(self.k_host.diff().max())


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_segments: Segments,
    k_segments: Segments,
    multiplicity: Tensor | None = None,
    backend: str = "auto",
    may_be_kept: bool = False,
) -> Tensor:
    """Softmax attention of each segment's queries to its own keys, scaled by 1/√d.

    Deterministic if the kernel is; differentiable once. Raises StditError if the backend cannot run these tensors.

    q: (N, H, d). k, v: (M, H, d). q_segments, k_segments: the same number of both. Returns (N, H, d).
    A segment may have no queries, where another rank has them.
    multiplicity: (M,) fp32 on the CPU; entry j counts the identical keys that key j represents. Applied exactly: as a
        bias of log n, or by merging log-sum-exps if the kernel takes no bias.
    backend: a name of BACKENDS, or "auto".
    may_be_kept: whether a block that is recomputed in backward may keep the output (`Recompute`).
    """
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise StditError(f"q, k and v differ: {[(t.dtype, str(t.device)) for t in (q, k, v)]}.")
    only_shapes = torch.compiler.is_compiling() or q.device.type == "meta"
    run = ATTENTION.compiled if only_shapes else ATTENTION.eager
    ends = (q_segments.offsets, k_segments.offsets, q_segments.host, k_segments.host)
    out, _ = (partial(ATTENTION.keeping, run) if may_be_kept else run)(q, k, v, multiplicity, *ends, backend)
    return out


def shared_attention(
    q: Tensor, k: Tensor, v: Tensor, q_segments: Segments, k_segments: Segments, backend: str = "auto"
) -> Tensor:
    """`segment_attention` of tokens that a group of ranks may share: each rank computes all of them for some heads.

    q, k, v: (n, H, d) of this rank's tokens. Returns (n, H, d).
    """
    if (sharing := q_segments.sharing) is None:
        return segment_attention(q, k, v, q_segments, k_segments, None, backend, may_be_kept=True)
    heads, whole = q.shape[1], sharing.whole
    q, k, v = gather_tokens(sharing.group, sharing.tokens, q, k, v)  # (N, h, d) each
    if sharing.order is not None:
        q, k, v = (x[sharing.order] for x in (q, k, v))
    out = q  # without heads, where there are more ranks than heads
    if q.shape[1]:
        out = segment_attention(q, k, v, whole, whole, None, backend, may_be_kept=True)
    out = out if sharing.inverse_order is None else out[sharing.inverse_order]
    return gather_heads(sharing.group, sharing.tokens, heads, out)[0]


@lru_cache(maxsize=256)
def choose_backend(backend: str, device: str, dtype: torch.dtype, head_dim: int) -> str:
    """Returns the backend to use: for "auto" the first that can run. Raises StditError if the one named cannot."""
    able = [name for name in BACKENDS if not refusal(name, device, dtype, head_dim)]
    if backend == "auto":
        return able[0]
    if backend not in BACKENDS:
        raise StditError(f"attention backend {backend!r} does not exist. Known: auto, {', '.join(BACKENDS)}.")
    if backend not in able:
        raise StditError(
            f"attention backend {backend!r} {refusal(backend, device, dtype, head_dim)}; asked for {dtype}, "
            f"head_dim {head_dim} on {device}. Use one of: {', '.join(able)}."
        )
    return backend


def refusal(backend: str, device: str, dtype: torch.dtype, head_dim: int) -> str:
    """Why a backend cannot run such tensors, or ''."""
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


CALL = (  # the fields of `Call`
    "Tensor q, Tensor k, Tensor v, Tensor? multiplicity, Tensor q_offsets, Tensor k_offsets, Tensor q_host, "
    "Tensor k_host, str backend"
)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Returns the output (N, H, d) and the log-sum-exp of each query's scores (N, H), fp32 or fp64."""
    call, backend = _chosen(arguments)
    _check_segments(call)
    call, _ = _without_idle_keys(call)
    if not len(call.q):
        return torch.empty_like(call.q), call.q.new_empty(call.q.shape[:2], dtype=wide_dtype(call.q))
    if backend in FORWARD:
        return merge_extra_keys(call, *FORWARD[backend](call))
    return _dense_forward(call, naive=backend == "naive")


def _backward(grad: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> Grads:
    whole, backend = _chosen(arguments)
    call, rows = _without_idle_keys(whole)
    if not len(call.q):
        return torch.empty_like(call.q), torch.zeros_like(whole.k), torch.zeros_like(whole.v)
    if backend in BACKWARD:
        grads = add_extra_key_grads(call, BACKWARD[backend](call, grad, out, lse), grad, out, lse)
    else:
        grads = _dense_backward(call, grad, out, lse, naive=backend == "naive")
    if rows is None:
        return grads
    dq, dk, dv = grads
    return dq, torch.zeros_like(whole.k).index_copy_(0, rows, dk), torch.zeros_like(whole.v).index_copy_(0, rows, dv)


def _without_idle_keys(call: Call) -> tuple[Call, Tensor | None]:
    """The call without the segments that have no queries, and which keys it has; None for all."""
    asks, lengths = call.q_host.diff() > 0, call.k_host.diff()  # (S,)
    if bool(asks.all()):
        return call, None
    on_host = asks.repeat_interleave(lengths).nonzero().flatten()
    rows, ends = on_host.to(call.k.device, non_blocking=True), torch.cat([asks.new_ones(1), asks])
    k_host = F.pad(lengths[asks].cumsum(0), (1, 0))
    return call._replace(
        k=call.k[rows], v=call.v[rows], q_host=call.q_host[ends], k_host=k_host,
        multiplicity=None if call.multiplicity is None else call.multiplicity[on_host],
        q_offsets=call.q_host[ends].to(call.q_offsets), k_offsets=k_host.to(call.k_offsets),
    ), rows  # fmt: skip


def _chosen(arguments: tuple[Any, ...]) -> tuple[Call, str]:
    call = Call(*arguments)
    return call, choose_backend(call.backend, call.q.device.type, call.q.dtype, call.q.shape[-1])


ATTENTION = operator(
    "segment_attention",
    forward=Opaque(
        _forward,
        f"({CALL}) -> (Tensor, Tensor)",
        lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide_dtype(q))),
    ),
    derivative=Opaque(
        _backward,
        f"(Tensor grad, Tensor out, Tensor lse, {CALL}) -> (Tensor, Tensor, Tensor)",
        lambda grad, out, lse, *call: tuple(x.new_empty(x.shape) for x in call[:3]),
    ),
    saved=lambda inputs, output: ([*output, *inputs[:-1]], [inputs[-1]]),
)


def _check_segments(call: Call) -> None:
    q, k, multiplicity, q_host, k_host = call.q, call.k, call.multiplicity, call.q_host, call.k_host
    if len(q_host) != len(k_host) or int(q_host[-1]) != len(q) or int(k_host[-1]) != len(k):
        raise StditError(
            f"{len(q)} queries in {len(q_host) - 1} segments of {int(q_host[-1])} in all, {len(k)} keys in "
            f"{len(k_host) - 1} segments of {int(k_host[-1])}: the numbers do not match."
        )
    if multiplicity is not None and (multiplicity.shape != (len(k),) or bool((multiplicity < 1).any())):
        raise StditError(
            f"multiplicity of shape {tuple(multiplicity.shape)}, minimum {multiplicity.min():g}, for {len(k)} keys: "
            "give each key a number of 1 or more."
        )


# Dense attention: one call for each group of segments of equal lengths, or padded to those of the longest on a CPU.


def _dense_forward(call: Call, naive: bool) -> tuple[Tensor, Tensor]:
    groups, bias = _groups_of(call, naive), _bias(call)
    outs, lses = [], []
    for queries, keys in groups:
        q, k, v = queries.gather(call.q), keys.gather(call.k), keys.gather(call.v)
        out, lse = _dense_call(q, k, v, keys.gather_bias(bias, wide_dtype(call.q)), naive)
        outs.append(out)
        lses.append(lse)
    places = [queries for queries, _ in groups]
    return scatter(outs, places), scatter(lses, places)


def _dense_backward(call: Call, grad: Tensor, out: Tensor, lse: Tensor, naive: bool) -> Grads:
    groups, bias = _groups_of(call, naive), _bias(call)
    parts = []
    for queries, keys in groups:
        g, q, k, v = queries.gather(grad, padding=0.0), queries.gather(call.q), keys.gather(call.k), keys.gather(call.v)
        b = keys.gather_bias(bias, wide_dtype(call.q))
        if naive or q.device.type != "cpu":
            parts.append(_written_out_backward(g, q, k, v, b))
        else:
            o, l = queries.gather(out), queries.gather(lse, padding=math.inf)  # a padding query's weights are exp(-inf)
            backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            parts.append(backward(g, q, k, v, o, l, 0.0, False, attn_mask=b))
    dq, dk, dv = zip(*parts)
    queries_of, keys_of = [group[0] for group in groups], [group[1] for group in groups]
    return scatter(dq, queries_of), scatter(dk, keys_of), scatter(dv, keys_of)


def _groups_of(call: Call, naive: bool) -> tuple[Group, ...]:
    device, numbers = call.q.device, call.q.shape[1] * call.q.shape[2]
    worth = CALL_WORTH // numbers if device.type == "cpu" and not naive else 0
    return group_segments(tuple(call.q_host.tolist()), tuple(call.k_host.tolist()), worth, device)


def _bias(call: Call) -> Tensor | None:
    """(M,) log n, the bias on the scores of a key that represents n."""
    return (
        None
        if call.multiplicity is None
        else call.multiplicity.to(call.q.device, wide_dtype(call.q), non_blocking=True).log()
    )


def _dense_call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, naive: bool) -> tuple[Tensor, Tensor]:
    """q (S, H, Lq, d), k, v (S, H, Lk, d), bias (S, 1, 1, Lk) -> output (S, H, Lq, d), log-sum-exp (S, H, Lq)."""
    if q.device.type == "cpu" and not naive:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=bias)
    if not naive:
        mask = None if bias is None else bias.to(q.dtype).expand(q.shape[0], 1, q.shape[2], k.shape[2])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out, out.new_zeros(out.shape[:3], dtype=wide_dtype(q))  # unused: backward computes its own
    scores = _written_out_scores(q, k, bias)
    return (scores.softmax(-1) @ v.to(scores.dtype)).to(q.dtype), scores.logsumexp(-1)


def _written_out_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Grads:
    """Gradients of softmax(q·k)·v, computed for some queries at a time so that the scores fit in memory."""
    wide, scale = wide_dtype(q), q.shape[-1] ** -0.5
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
    scores = q.to(wide_dtype(q)) @ k.to(wide_dtype(q)).mT * q.shape[-1] ** -0.5
    return scores if bias is None else scores + bias


# Variable-length kernels, for GPUs. They return log-sum-exps (H, N); here these are (N, H). Backward takes merged ones.


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
