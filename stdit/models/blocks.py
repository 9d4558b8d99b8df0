"""Wan's block and head: self-attention, cross-attention to text, MLP, each modulated by the noise level.

Layers keep their weights in the stored dtype and compute in that of their input, norms in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stdit.models.attention import segment_attention, shared_attention
from stdit.models.config import TransformerConfig
from stdit.models.fused import gated_residual, modulated_norm, rms_norm_rotary, widen
from stdit.models.packing import LevelIndex, Segments, TextPack
from stdit.models.positions import apply_rotary
from stdit.shapes import TokenGrid


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switches autocast off; a no-op for meta tensors, which have none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with affine, computed in fp32 (fp64 for fp64) and returned in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.layer_norm(wide, self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm over `dim` channels, all heads at once or each, and the rotary turn after it; in fp32 (fp64 for fp64)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        return rms_norm_rotary(x, self.weight, cos, sin, self.eps)


class Rotary(nn.Module):
    """The rotary turn without a norm; replaces RMSNorm if qk_norm is "none"."""

    def forward(self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        if cos is None or sin is None:
            return x
        return apply_rotary(x.unflatten(1, (-1, 2 * cos.shape[-1])), cos, sin).flatten(1)


class Compression(nn.Module):
    """Merges the keys or values of each square of factor × factor tokens of a frame into one (PixArt-Σ).

    Left-over tokens at the right and lower edges are dropped.
    """

    def __init__(self, dim: int, factor: int) -> None:
        super().__init__()
        self.sr = nn.Conv2d(dim, dim, factor, factor, groups=dim)
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor, grids: Sequence[TokenGrid]) -> Tensor:
        """x: (N, D), the tokens of the grids. Returns (M, D)."""
        weight, bias = self.sr.weight.to(x.dtype), cast(Tensor, self.sr.bias).to(x.dtype)
        parts = []
        for part, grid in zip(x.split([grid.tokens for grid in grids]), grids):
            frames = part.view(grid.frames, grid.height, grid.width, -1).permute(0, 3, 1, 2)
            small = F.conv2d(frames, weight, bias, self.sr.stride, groups=len(weight))
            parts.append(small.flatten(2).transpose(1, 2).flatten(0, 1))
        return self.norm(torch.cat(parts))


class LowRank(nn.Sequential):
    """SiLU, then two linear layers of low rank without biases (Cosmos' AdaLN-LoRA). Ignores autocast."""

    def __init__(self, dim: int, rank: int, out: int) -> None:
        super().__init__(nn.SiLU(), Linear(dim, rank, bias=False), Linear(rank, out, bias=False))

    def forward(self, c: Tensor) -> Tensor:
        with without_autocast(c.device):
            return super().forward(c)


class LoraLinear(Linear):
    """A linear layer with a low-rank addition: x·Wᵀ + b + alpha/rank · x·Aᵀ·Bᵀ (LoRA, Hu et al. 2022).

    It replaces the layer `base`, whose parameters keep their names.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_down = Linear(base.in_features, rank, bias=False)  # A
        self.lora_up = Linear(rank, base.out_features, bias=False)  # B
        self.alpha, self.scale = alpha, alpha / rank

    def plain(self) -> Linear:
        """The linear layer with the same weight and bias, without A and B."""
        with torch.device("meta"):
            layer = Linear(self.in_features, self.out_features, self.bias is not None)
        layer.weight, layer.bias = self.weight, self.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_up(self.lora_down(x)) * self.scale


@dataclass
class BlockInputs:
    """What every block of a forward reads besides the tokens x, their modulation and the text."""

    c: Tensor  # (K, D) embeddings of the pack's K distinct noise levels
    levels: LevelIndex  # which of the K levels each token has
    cos: Tensor | None  # (N, 1 or H, D_head/2) rotary turns of q and k, None for no turn
    sin: Tensor | None
    segments: Segments  # the tokens that attend to each other; Wan's are the clips
    clips: Segments  # the tokens that attend to each text
    text: TextPack  # before it is embedded; only its segments and multiplicity are read

    # Only other families, and Wan's image-to-video weights, set the rest.
    image: TextPack | None = None  # embedded image tokens (I, D), which cross-attention sees besides the text
    added: Tensor | None = None  # (N, D), added to the tokens before the block
    order: Tensor | None = None  # (N,) token order for self-attention, where segments are not contiguous
    inverse_order: Tensor | None = None  # (N,) the way back
    grids: tuple[TokenGrid, ...] = ()  # of each clip, for blocks that compress keys
    compressed: Segments | None = None  # of the compressed keys


class Attention(nn.Module):
    """The projections and norms of multi-head attention. `backend` is a name of `attention.BACKENDS`, or "auto"."""

    def __init__(self, config: TransformerConfig, context_dim: int, norm: str) -> None:
        super().__init__()
        d, bias, self.heads, self.backend = config.dim, config.bias, config.heads, "auto"
        self.q, self.k = Linear(d, d, bias), Linear(context_dim, d, bias)
        self.v, self.o = Linear(context_dim, d, bias), Linear(d, d, bias)
        self.norm_q, self.norm_k = qk_norm(config, norm), qk_norm(config, norm)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.heads, -1))  # (N, D) to (N, H, D_head)


def qk_norm(config: TransformerConfig, kind: str) -> nn.Module:
    """The norm of q or k, with the rotary turn. kind: across_heads, per_head or none."""
    if kind == "none":
        return Rotary()
    eps = config.eps if config.qk_eps is None else config.qk_eps
    return RMSNorm(config.dim if kind == "across_heads" else config.head_dim, eps)


class SelfAttention(Attention):
    """Attention among the tokens of each segment. q and k are turned by their positions."""

    def __init__(self, config: TransformerConfig, compressed: bool = False) -> None:
        super().__init__(config, config.dim, "per_head" if config.qk_norm == "per_head_self" else config.qk_norm)
        self.compression = Compression(config.dim, config.compression) if compressed else None

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        x = x if inputs.order is None else x[inputs.order]  # (N, D)
        q, k, v, key_segments = self.q(x), self.k(x), self.v(x), inputs.segments  # (N, D) each
        if self.compression is not None and inputs.compressed is not None:
            k, v, key_segments = self.compression(k, inputs.grids), self.compression(v, inputs.grids), inputs.compressed
        q = self.split_heads(self.norm_q(q, inputs.cos, inputs.sin))  # (N, H, D_head)
        k = self.split_heads(self.norm_k(k, inputs.cos, inputs.sin))  # (N, H, D_head)
        v = self.split_heads(v)  # (N, H, D_head)
        out = shared_attention(q, k, v, inputs.segments, key_segments, self.backend)
        out = self.o(out.flatten(1))  # (N, D)
        return out if inputs.inverse_order is None else out[inputs.inverse_order]


class CrossAttention(Attention):
    """Attention of each clip's tokens to its text, and to its image tokens where the weights have keys for them."""

    def __init__(self, config: TransformerConfig) -> None:
        norm = "none" if config.qk_norm == "per_head_self" else config.qk_norm
        super().__init__(config, config.context_dim, norm)
        if config.image_text_dim:
            d = config.dim
            self.k_img, self.v_img, self.norm_k_img = Linear(d, d), Linear(d, d), qk_norm(config, norm)

    def forward(self, x: Tensor, y: Tensor, inputs: BlockInputs) -> Tensor:
        """x: (N, D). y: (M, D_context). Returns (N, D)."""
        q = self.split_heads(self.norm_q(self.q(x)))  # (N, H, D_head)
        k, v = self.split_heads(self.norm_k(self.k(y))), self.split_heads(self.v(y))  # (M, H, D_head) each
        clips, text = inputs.clips, inputs.text
        out = segment_attention(q, k, v, clips, text.segments, text.multiplicity, self.backend)
        if inputs.image is not None:
            tokens = inputs.image.tokens
            k, v = self.split_heads(self.norm_k_img(self.k_img(tokens))), self.split_heads(self.v_img(tokens))
            out = out + segment_attention(q, k, v, clips, inputs.image.segments, backend=self.backend)
        return self.o(out.flatten(1))  # (N, D)


class Block(nn.Module):
    """Wan's block. cross: whether it attends to text. compressed: whether self-attention compresses its keys."""

    def __init__(self, config: TransformerConfig, cross: bool = True, compressed: bool = False) -> None:
        super().__init__()
        d, self.eps, self.rms = config.dim, config.eps, config.norm == "rms"
        self.self_attn = SelfAttention(config, compressed)
        self.norm3 = LayerNorm(d, config.eps) if cross and config.cross_norm == "affine" else nn.Identity()
        self.cross_attn = CrossAttention(config) if cross else None
        self.ffn = nn.Sequential(
            Linear(d, config.ffn_dim, config.bias),
            nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none"),
            Linear(config.ffn_dim, d, config.bias),
        )
        self.modulation: nn.Parameter | None = nn.Parameter(torch.empty(1, 6, d))

    def forward(self, x: Tensor, modulation: Tensor, y: Tensor, inputs: BlockInputs) -> Tensor:
        """x: (N, D). modulation: (K, 6, D). y: (M, D_context) text. Returns (N, D)."""
        assert self.modulation is not None
        rows = modulation + self.modulation.to(modulation.dtype)  # (K, 6, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.unbind(1)  # (K, D) each
        x = x if inputs.added is None else x + inputs.added  # (N, D)
        h = modulated_norm(x, shift1, scale1, inputs.levels, self.eps, self.rms)  # (N, D)
        x = gated_residual(x, self.self_attn(h, inputs), gate1, inputs.levels)  # (N, D)
        if self.cross_attn is not None:
            x = x + self.cross_attn(self.norm3(x), y, inputs)  # (N, D)
        h = self.ffn(modulated_norm(x, shift2, scale2, inputs.levels, self.eps, self.rms))  # (N, D)
        return gated_residual(x, h, gate2, inputs.levels)  # (N, D)


class Head(nn.Module):
    """The last norm, modulated by the noise level's embedding, and the projection to patches of the output."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d, self.eps = config.dim, config.eps
        self.head = Linear(d, config.out_channels * config.patch_volume, config.bias)
        self.modulation: nn.Parameter | None = nn.Parameter(torch.empty(1, 2, d))

    def rows(self, c: Tensor, modulation: Tensor) -> Tensor:
        """Shift and scale: (K, 2, D)."""
        assert self.modulation is not None
        return c[:, None] + self.modulation.to(c.dtype)

    def forward(self, x: Tensor, c: Tensor, modulation: Tensor, levels: LevelIndex) -> Tensor:
        """x: (N, D). c: (K, D). modulation: (K, 6, D), that of the blocks. Returns (N, pt·ph·pw·C_out)."""
        shift, scale = self.rows(c, modulation).unbind(1)  # (K, D) each
        return self.head(modulated_norm(x, shift, scale, levels, self.eps))
